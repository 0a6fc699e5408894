# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The result of a run: the files that people load, the model card, and the Hub repository."""

import ast
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
from accelerate.logging import get_logger
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, create_repo, upload_file, upload_folder
from huggingface_hub.errors import RepositoryNotFoundError

import pipeline_flux_fill_semantic
import semantic_attention
from semantic_attention import read_json
from semantic_fill.files import (
    CHECKPOINTS_REMAIN,
    explain_write_errors,
    is_hub_id,
    ornament,
    printable,
    write_atomically,
)
from semantic_fill.options import HUB_CHECKPOINT, Options
from semantic_fill.weights import save_weights, switch_result


logger = get_logger(__name__)

FLUX_LICENSE = "flux-1-dev-non-commercial-license"
FLUX_LICENSE_LINK = "https://huggingface.co/black-forest-labs/FLUX.1-Fill-dev/blob/main/LICENSE.md"
# By this tag a repository of this trainer is known.
TAG = "semantic-fill"
OTHER_FILES = "## Other files"
EVALUATION_START, EVALUATION_END = "<!-- evaluation: start -->\n", "<!-- evaluation: end -->\n"


def save_result(
    model, weights: dict[str, torch.Tensor], report: str, samples: list[Path], options: Options
) -> list[str]:
    """
    Saves weights, pipeline code and model card to the output folder, in the place of an earlier result.

    Returns:
        `list[str]`: The names of these files in the output folder.
    """
    code = single_file_pipeline().encode()

    def write(folder: Path) -> None:
        save_weights(model, weights, folder, options)
        (folder / "pipeline.py").write_bytes(code)
        # A card that cannot be written must not cost the weights.
        with ornament("The model card"):
            save_model_card(folder / "README.md", options, report, samples, code)

    with explain_write_errors("--output_dir", CHECKPOINTS_REMAIN):
        return switch_result(Path(options.output_dir), write)


def replace_card(report: str, samples: list[Path], options: Options) -> None:
    """Writes the card of a result once more, for what the run found out after it was saved."""
    code = single_file_pipeline().encode()
    card = Path(options.output_dir, "README.md")
    write_atomically(card, lambda path: save_model_card(path, options, report, samples, code))


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


def as_code(value: Any) -> str:
    """A value for between backticks on one line of Markdown, which it cannot end."""
    return printable(str(value)).replace("`", "'").replace("<", "\u2039").replace(">", "\u203a")


def as_text(value: Any) -> str:
    """A value for a line of Markdown, in which it can be no link, table or HTML."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", printable(str(value)))


def as_string(value: str) -> str:
    """A value as a string of Python on one line, which ends neither the line nor a block of code."""
    text = printable(json.dumps(value, ensure_ascii=False))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("`", "\\u0060")


CAUSAL_WARNING = """\
Prompt and visible view were trained to be computed once (`visible_attention` in the LoRA's metadata). The pipeline
below follows it. A program that does not know it, such as a stock `FluxFillPipeline`, ComfyUI's own loader or sd-scripts,
loads this LoRA all the same and **paints wrong pictures**.

"""


def save_model_card(path: Path, options: Options, report: str, samples: list[Path], code: bytes) -> None:
    """
    Writes the model card.

    Args:
        report (`str`): What the run found out, from `summary.describe_run`.
        samples (`list[Path]`): Validation pictures, of which the last is shown.
        code (`bytes`): Content of the repository's `pipeline.py`, whose hash the card states.
    """
    repo = options.hub_model_id or Path(options.output_dir).resolve().name
    mode = pipeline_flux_fill_semantic.SEMANTIC_MODES[options.semantic_mode]
    base, maps = options.pretrained_model_name_or_path, options.semantic_maps if mode.uses_map else ()
    on_hub, base_name = is_hub_id(base), base if is_hub_id(base) else Path(base).name
    by_flux = base.startswith("black-forest-labs/FLUX.1")
    picture = ""
    if samples:
        sample = samples[-1]
        views = "map, paintings with it, with another sample's and without one" if mode.uses_map else "painting"
        if mode.uses_map and len(maps) > 1:
            views = "maps, paintings with them, with each of another sample and without any"
        kind = "Held-out samples" if options.validation_data_dir or options.validation_fraction else "Training samples"
        picture = f"{kind}: visible view, {views}, and target:\n\n![{sample.stem}](samples/{sample.name})\n\n"
    arguments = "\n".join(f"- `{name}`: `{as_code(value)}`" for name, value in public_config(options).items())
    prompt = as_string(options.instance_prompt or "...")
    entries = (f"{as_string(name)}: map_{index + 1}" for index, name in enumerate(maps))
    call = f"{{{', '.join(entries)}}}" if len(maps) > 1 else "semantic_map"
    names = f", guided by the maps {', '.join(f'`{as_code(name)}`' for name in maps)}" if len(maps) > 1 else ""
    origin = [(name, getattr(options, name)) for name in ("revision", "variant")]
    origin = "".join(f" {name}={as_string(value)}," for name, value in origin if value is not None)
    size = "the nearest of several shapes of this area" if options.aspect_buckets else "this size"
    causal = CAUSAL_WARNING if options.visible_attention == "causal" else ""
    text = f"""
# Semantic fill: {as_text(repo)}

A LoRA{" and a semantic module" if mode.module_class else ""} for
{f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{as_code(base_name)}`"}. It paints a second view of a scene beside the
first, in the mode `{options.semantic_mode}`{names}.

{causal}{report}
{picture}## Use

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    {as_string(base_name)},{origin} custom_pipeline={as_string(repo)}, trust_remote_code=True, dtype=torch.bfloat16
).to("cuda")
pipe.load_lora_weights({as_string(repo)})
painted = pipe(
    prompt={prompt}, image=visible, {f"semantic_image={call}, " if mode.uses_map else ""}max_sequence_length={options.max_sequence_length}
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
        tags=["image-to-image", "diffusers-training", "diffusers", "lora", "flux", TAG],
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
        content = card.content.encode()
        upload_file(repo_id=trained, path_or_fileobj=content, path_in_repo="README.md", commit_message="Evaluation")
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


def tracker_config(options: Options) -> dict:
    """The options in the types that trackers take."""
    return {k: v if isinstance(v, int | float | str) else str(v) for k, v in public_config(options).items()}


def open_repo(options: Options) -> str:
    """
    Creates the Hub repository or finds it. This comes before training, so that a missing token costs no training time.

    Raises:
        `RuntimeError`: if it cannot be written, is public where --hub_private_repo was passed, or holds something else and
            was not named.
    """
    name = options.hub_model_id or Path(options.output_dir).resolve().name
    api, found = HfApi(), None
    try:
        try:
            full_name = name if "/" in name else f"{api.whoami()['name']}/{name}"
            found = api.model_info(full_name)
        except RepositoryNotFoundError:
            pass
        repo_id = create_repo(name, private=options.hub_private_repo or None, exist_ok=True).repo_id
    except Exception as error:
        raise RuntimeError(
            f"--push_to_hub cannot write to {name}: {error}. Log in with `hf auth login`, or set HF_TOKEN to a token with"
            " write access. Nothing was trained yet."
        ) from error
    if found is not None and options.hub_private_repo and not found.private:
        raise RuntimeError(
            f"--hub_private_repo was passed, but {repo_id} exists and is public. Make it private on the Hub, or name another"
            " with --hub_model_id. Nothing was trained yet."
        )
    files = [] if found is None else _other_files(found.siblings, [])
    if found is not None and files and options.hub_model_id is None and TAG not in (found.tags or ()):
        raise RuntimeError(
            f"{repo_id} exists and holds something else ({', '.join(map(printable, files[:5]))}). To push there all the"
            f" same, pass --hub_model_id {repo_id}. Nothing was trained yet."
        )
    return repo_id


def _other_files(siblings: Sequence[Any] | None, own: Sequence[str]) -> list[str]:
    """The files of a repository that this trainer does not write."""
    names = sorted(sibling.rfilename for sibling in siblings or ())
    known = {".gitattributes", *own}
    return [name for name in names if name not in known and not name.startswith(("samples/", f"{HUB_CHECKPOINT}/"))]


def own_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of a run's files that are still regular files inside the folder. Links may lead to anything."""
    root, found = folder.resolve(), []
    for name in names:
        path = folder / name
        if path.is_file() and path.resolve() == root / name:
            found.append(name)
        else:
            logger.warning(f"{printable(str(path))} is not uploaded, because it is no regular file of this run")
    return found


def push_checkpoint(folder: Path, repo_id: str) -> None:
    """Replaces the checkpoint in the Hub repository, in one commit. If it fails you get a warning; training goes on."""
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=HUB_CHECKPOINT,
            allow_patterns=own_files(folder, ("manifest.json", *read_json(folder / "manifest.json"))),
            delete_patterns="*",
            commit_message=folder.name,
        )
        logger.info(f"Pushed {folder} to {repo_id}")
    except Exception as error:
        logger.warning(f"{folder} is saved, but the upload to {repo_id} failed: {error}. Training goes on.")


def push_to_hub(repo_id: str, files: list[str], output_dir: str) -> None:
    """Uploads these files of the output folder and nothing else in it."""
    files = own_files(Path(output_dir), files)
    with ornament("Naming other files of the repository in the card"):
        _name_other_files(repo_id, files, Path(output_dir, "README.md"))
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


def _name_other_files(repo_id: str, files: list[str], card: Path) -> None:
    """Says in the card that the repository also holds what this trainer did not write, if it does."""
    others = _other_files(HfApi().model_info(repo_id).siblings, files)
    if others and card.is_file():
        names = ", ".join(f"`{as_code(name)}`" for name in others[:20]) + (", ..." if len(others) > 20 else "")
        note = f"\n{OTHER_FILES}\n\nThis repository also holds files that this training did not write: {names}.\n"
        text = card.read_text(encoding="utf-8").partition(f"\n{OTHER_FILES}\n")[0] + note
        write_atomically(card, lambda path: path.write_text(text, encoding="utf-8"))
