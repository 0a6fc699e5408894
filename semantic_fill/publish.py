# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The result of a run: the files that people load, the model card, and the Hub repository."""

import ast
import hashlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import diffusers
import peft
import torch
import transformers
from accelerate.logging import get_logger
from huggingface_hub import EvalResult, ModelCard, ModelCardData, create_repo, upload_file, upload_folder

import pipeline_flux_fill_semantic
import semantic_attention
from semantic_fill.files import CHECKPOINTS_REMAIN, explain_write_errors, flush_to_disk, is_hub_id, list_files
from semantic_fill.options import HUB_CHECKPOINT, Options
from semantic_fill.weights import save_weights


logger = get_logger(__name__)

FLUX_LICENSE = "flux-1-dev-non-commercial-license"
FLUX_LICENSE_LINK = "https://huggingface.co/black-forest-labs/FLUX.1-Fill-dev/blob/main/LICENSE.md"
EVALUATION_START, EVALUATION_END = "<!-- evaluation: start -->\n", "<!-- evaluation: end -->\n"


def save_result(
    model, weights: dict[str, torch.Tensor], loss: float, samples: list[Path], options: Options
) -> list[str]:
    """
    Saves weights, pipeline code and model card to the output folder. Each file is replaced as a whole, the card last.

    Returns:
        `list[str]`: The names of these files in the output folder.
    """
    output_dir = Path(options.output_dir)
    partial = output_dir / ".result.part"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain_write_errors("--output_dir", CHECKPOINTS_REMAIN):
            save_weights(model, weights, partial, options)
            code = single_file_pipeline().encode()
            (partial / "pipeline.py").write_bytes(code)
            save_model_card(partial / "README.md", options, loss, samples, code)
            files = sorted(list_files(partial), key=lambda path: path.name == "README.md")
            for path in files:
                flush_to_disk(path)
            for path in files:
                place = output_dir / path.relative_to(partial)
                place.parent.mkdir(exist_ok=True)
                os.replace(path, place)
            flush_to_disk(output_dir)
            return [path.relative_to(partial).as_posix() for path in files]
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def single_file_pipeline() -> str:
    """
    The pipeline and its module as the source of one file. So `custom_pipeline="user/repo"` works whatever the repository
    is called: the dynamic loader breaks relative imports where the name contains a dot.
    """
    module = Path(semantic_attention.__file__).read_text(encoding="utf-8")
    pipeline = Path(pipeline_flux_fill_semantic.__file__).read_text(encoding="utf-8")
    (branch,) = (
        node
        for node in ast.parse(pipeline).body
        if isinstance(node, ast.If) and "__package__" in ast.unparse(node.test)
    )
    lines = pipeline.splitlines(keepends=True)
    return "".join((*lines[: branch.lineno - 1], module, "\n\n", *lines[branch.end_lineno :]))


def save_model_card(path: Path, options: Options, loss: float, samples: list[Path], code: bytes) -> None:
    """
    Writes the model card.

    Args:
        loss (`float`): Loss of the last step.
        samples (`list[Path]`): Validation pictures, of which the last is shown.
        code (`bytes`): Content of the repository's `pipeline.py`, whose hash the card states.
    """
    repo = options.hub_model_id or Path(options.output_dir).resolve().name
    mode = pipeline_flux_fill_semantic.SEMANTIC_MODES[options.semantic_mode]
    base = options.pretrained_model_name_or_path
    on_hub, base_name = is_hub_id(base), base if is_hub_id(base) else Path(base).name
    by_flux = base.startswith("black-forest-labs/FLUX.1")
    picture = ""
    if samples:
        sample = samples[-1]
        picture = f"Visible view, map, painting and target:\n\n![{sample.stem}](samples/{sample.name})\n\n"
    arguments = "\n".join(f"- `{name}`: `{value}`" for name, value in public_config(options).items())
    prompt = json.dumps(options.instance_prompt or "...", ensure_ascii=False)
    size = "the nearest of several shapes of this area" if options.aspect_buckets else "this size"
    text = f"""
# Semantic fill: {repo}

A LoRA{" and a semantic module" if mode.module_class else ""} for
{f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{base_name}`"}. It paints a second view of a scene beside the
first, in the mode `{options.semantic_mode}`. It was trained for {options.max_train_steps} steps; the loss of the last step was {loss:.4f}.

{picture}## Use

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "{base_name}", custom_pipeline="{repo}", trust_remote_code=True, dtype=torch.bfloat16
).to("cuda")
pipe.load_lora_weights("{repo}")
painted = pipe(
    prompt={prompt}, image=visible, {"semantic_image=semantic_map, " if mode.uses_map else ""}max_sequence_length={options.max_sequence_length}
).images[0]
```

`trust_remote_code=True` runs `pipeline.py` of this repository (sha256
`{hashlib.sha256(code).hexdigest()}`).

## Training

<details><summary>All arguments</summary>

{arguments}

</details>

Versions: torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}, peft
{peft.__version__}.

## Limits

The map steers only what it was trained to steer, at sizes near the training resolution of {options.width}x{options.resolution}
pixels a view. Views of other sizes were scaled to {size} and cropped about their center. Outputs are subject to the
license of the base model.
"""
    data = ModelCardData(
        # The Hub refuses a card that names a folder as its model or data set.
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=[options.dataset_name] if options.dataset_name and not os.path.isdir(options.dataset_name) else None,
        license="other",
        license_name=FLUX_LICENSE if by_flux else "as-base-model",
        license_link=FLUX_LICENSE_LINK if by_flux else None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=["image-to-image", "diffusers-training", "diffusers", "lora", "flux", "semantic-fill"],
        instance_prompt=options.instance_prompt,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(path)


def add_to_model_card(trained: str, section: str, results: list[EvalResult], picture: Path) -> None:
    """Puts an evaluation into the card of a trained folder or repository, in place of an earlier one."""
    on_hub, path = is_hub_id(trained), Path(trained, "README.md")
    card = ModelCard.load(trained if on_hub else path)
    section = f"{EVALUATION_START}{section}{EVALUATION_END}"
    before = re.compile(re.escape(EVALUATION_START) + ".*?" + re.escape(EVALUATION_END), re.DOTALL)
    if before.search(card.text):
        card.text = before.sub(lambda _: section, card.text)
    else:
        # The list of arguments is long, so the figures come before it.
        head, training, rest = card.text.partition("## Training\n")
        card.text = f"{head}{section}\n{training}{rest}"
    card.data["model_name"] = trained if on_hub else Path(trained).resolve().name
    card.data["eval_results"] = results
    place = f"samples/{picture.name}"
    if on_hub:
        upload_file(repo_id=trained, path_or_fileobj=picture, path_in_repo=place, commit_message="Evaluation")
        card.push_to_hub(trained, commit_message="Evaluation")
    else:
        (path.parent / "samples").mkdir(exist_ok=True)
        shutil.copyfile(picture, path.parent / place)
        card.save(path)


def public_config(options: Options) -> dict:
    """The options as trackers and cards may show them. Local paths are shortened to their names."""
    paths = ("dir", "root", "name_or_path", "weights", "dataset_name", "palette", "resume_from_checkpoint")
    return {
        name: Path(value).name if isinstance(value, str) and name.endswith(paths) and not is_hub_id(value) else value
        for name, value in vars(options).items()
    }


def open_repo(options: Options) -> str:
    """
    Creates the Hub repository or finds it. This comes before training, so that a missing token costs no training time.
    """
    name = options.hub_model_id or Path(options.output_dir).resolve().name
    try:
        return create_repo(name, private=options.hub_private_repo or None, exist_ok=True).repo_id
    except Exception as error:
        raise RuntimeError(
            f"--push_to_hub cannot write to {name}: {error}. Log in with `hf auth login`, or set HF_TOKEN to a token with"
            " write access. Nothing was trained yet."
        ) from error


def push_checkpoint(folder: Path, repo_id: str) -> None:
    """Replaces the checkpoint in the Hub repository, in one commit. If it fails you get a warning; training goes on."""
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=HUB_CHECKPOINT,
            delete_patterns="*",
            commit_message=folder.name,
        )
        logger.info(f"Pushed {folder} to {repo_id}")
    except Exception as error:
        logger.warning(f"{folder} is saved, but the upload to {repo_id} failed: {error}. Training goes on.")


def push_to_hub(repo_id: str, files: list[str], output_dir: str) -> None:
    """Uploads these files of the output folder and nothing else in it."""
    try:
        upload_folder(
            repo_id=repo_id, folder_path=output_dir, commit_message="Semantic fill training", allow_patterns=files
        )
    except Exception as error:
        # Without --include, the command would upload checkpoints and cache too.
        command = ["hf", "upload", repo_id, output_dir, "."]
        command += [part for file in files for part in ("--include", file)]
        raise RuntimeError(
            f"Training is done and saved in {output_dir}, but the upload to {repo_id} failed: {error}. Upload it with"
            f" `{shlex.join(command)}`."
        ) from error
