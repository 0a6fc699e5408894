# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What a run reads and writes: it reads no pickle, writes no token and pushes no file that is not its own."""

import hashlib
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline
from helpers import LORA_FILE, MODULE_FILE, ROOT, arguments, environment, run, script
from hub_server import HubServer
from quick_python import run_python

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.checkpoints import checkpoint_damage
from semantic_fill.encoding import load_encoders
from semantic_fill.publish import single_file_pipeline


TOKEN = "hf_planted_secret"


class Planted:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def replace_by_pickle(weights: Path, name: str, trace: Path) -> None:
    weights.unlink()
    (weights.parent / name).write_bytes(pickle.dumps(Planted(trace)))


def test_the_planted_pickle_would_leave_a_trace(tmp_path):
    pickle.loads(pickle.dumps(Planted(tmp_path / "trace")))
    assert (tmp_path / "trace").is_dir()


@pytest.mark.parametrize(
    "weights, name",
    [
        ("transformer/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder/model.safetensors", "pytorch_model.bin"),
        ("text_encoder_2/model.safetensors", "pytorch_model.bin"),
    ],
)
def test_a_pickled_base_is_refused(base_folder, triptych_folder, tmp_path, weights, name):
    shutil.copytree(base_folder, tmp_path / "base")
    replace_by_pickle(tmp_path / "base" / weights, name, tmp_path / "trace")
    options = arguments(tmp_path / "base", tmp_path / "out", data=triptych_folder)
    with pytest.raises((OSError, ValueError), match="safetensors"):
        load_encoders(options, torch.float32)
        trainer.load_transformer(options, torch.device("cpu"), torch.float32)
    assert not (tmp_path / "trace").exists()


@pytest.fixture(scope="module")
def trained(base_folder, triptych_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    return run(base_folder, out, "--max_train_steps", 1, "--checkpointing_steps", 1, data=triptych_folder)


@pytest.mark.parametrize(
    "weights, name",
    [
        (LORA_FILE, "pytorch_lora_weights.bin"),
        (MODULE_FILE, "diffusion_pytorch_model.bin"),
        # A pickle by the right name.
        (LORA_FILE, Path(LORA_FILE).name),
        (MODULE_FILE, Path(MODULE_FILE).name),
    ],
)
def test_a_pickled_lora_or_module_is_refused(base, base_folder, trained, tmp_path, weights, name):
    folder = tmp_path / "trained"
    shutil.copytree(trained, folder)
    replace_by_pickle(folder / weights, name, tmp_path / "trace")
    pipe = FluxFillSemanticPipeline.from_pipe(FluxFillPipeline(**base.components))
    with pytest.raises(Exception, match="(?i)safetensors|header"):
        pipe.load_lora_weights(folder)
    with pytest.raises(ValueError, match="`weight_name` has to be a safetensors file"):
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.bin")
    options = arguments(base_folder, "out", "--lora_weights", folder, "--semantic_weights", folder, data="unused")
    transformer = trainer.load_transformer(options, torch.device("cpu"), torch.float32)
    with pytest.raises(Exception, match="(?i)safetensors|header|holds no trained"):
        trainer.build_model(transformer, options)
    assert not (tmp_path / "trace").exists()


def test_a_pickle_in_a_checkpoint_is_refused(base_folder, trained, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(trained / "checkpoint-1", checkpoint)
    replace_by_pickle(checkpoint / "training_state.safetensors", "training_state.safetensors", tmp_path / "trace")
    assert "training_state.safetensors is not what was written" in checkpoint_damage(checkpoint)
    assert not (tmp_path / "trace").exists()


def test_nothing_in_the_product_unpickles():
    # `weights_only=True` reads tensors and refuses objects.
    unpickles = re.compile(
        r"\bimport pickle\b|\btorch\.load\((?![^\n]*weights_only=True)|\bjoblib\b|allow_pickle\s*=\s*True|use_safetensors\s*=\s*False"
    )
    folders = (ROOT, ROOT / "semantic_fill", ROOT / "examples", ROOT / "benchmarks")
    paths = [path for folder in folders for path in folder.glob("*.py")]
    assert {"train_semantic_fill_lora.py", "checkpoints.py", "demo.py"} <= {path.name for path in paths}
    for path in paths:
        assert not unpickles.search(path.read_text()), path


def test_a_run_and_a_painting_unpickle_no_object(base_folder, triptych_folder, tmp_path):
    """No library on the way does either."""
    found = []

    def note(event, args):
        if event == "pickle.find_class" and found is not None:
            found.append(args)

    sys.addaudithook(note)
    pickle.loads(pickle.dumps(Planted(tmp_path / "trace")))
    assert [name for _, name in found] == ["mkdir"]
    found.clear()
    more = ["--max_train_steps", 1, "--checkpointing_steps", 1]
    out = run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    more[1] = 2
    run(base_folder, out, *more, "--resume_from_checkpoint", "latest", data=triptych_folder)
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(out)
    picture = torch.zeros(3, 32, 32)
    pipe(
        "x", image=picture, semantic_image=picture, num_inference_steps=1, max_sequence_length=16, output_type="latent"
    )
    seen, found = found, None
    assert seen == []


def test_a_token_on_the_command_line_is_not_repeated(capsys, tmp_path):
    for option in ("--hub_token", "--token", "--hf_token", "--use_auth_token"):
        config = tmp_path / "run.yaml"
        config.write_text(f"{option[2:]}: {TOKEN}")
        for passed in ([option, TOKEN], [f"{option}={TOKEN}"], ["--config", config]):
            with pytest.raises(SystemExit):
                arguments("unused", "unused", *passed, data="unused")
            printed = "".join(capsys.readouterr())
            assert TOKEN not in printed and f"{option}. Tokens are not taken here" in printed and "HF_TOKEN" in printed


def test_only_the_result_is_pushed_and_no_token_is_written(base_folder, triptych_folder, tmp_path):
    out = tmp_path / "out"
    (out / "semantic_attention").mkdir(parents=True)
    for name in ("evil.py", "model.bin", "semantic_attention/evil.py", ".env", "README.md", "pipeline.py"):
        (out / name).write_text("foreign")
    more = "--max_train_steps 2 --checkpointing_steps 1 --push_to_hub --hub_model_id user/fill --validation_steps 2"
    more += " --log_level debug --hub_strategy every_checkpoint"
    more += " --num_validation_images 1 --validation_inference_steps 1"
    with HubServer(token=TOKEN) as hub:
        env = environment(tmp_path) | hub.environment(tmp_path / "trainer", token=TOKEN)
        env.pop("HF_HUB_OFFLINE", None)
        start = script(base_folder, triptych_folder, out, *more.split(), "--report_to", "tensorboard")
        done = run_python(*start, env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        pushed = {name: content for name, content in hub.files("user/fill").items() if name != ".gitattributes"}
    wanted = {
        LORA_FILE,
        MODULE_FILE,
        "README.md",
        "pipeline.py",
        "semantic_attention/config.json",
        "samples/step-000002.png",
    }
    state = {"manifest.json", "options.json", "training_state.json", "training_state.safetensors"}
    state |= {LORA_FILE, MODULE_FILE, "semantic_attention/config.json"}
    assert set(pushed) == wanted | {f"last-checkpoint/{name}" for name in state}
    # The pushed code is that of the two released files, and the card says which.
    assert pushed["pipeline.py"] == single_file_pipeline().encode()
    assert hashlib.sha256(pushed["pipeline.py"]).hexdigest() in pushed["README.md"].decode()
    module, pipeline = (
        (ROOT / name).read_text() for name in ("semantic_attention.py", "pipeline_flux_fill_semantic.py")
    )
    # The module stands where the other file chooses how to import it. Nothing else is added, and nothing is missing.
    pattern = r"^if [^\n]*__package__:\n.*?(?=^# `save_pretrained` records)"
    choice = re.search(pattern, pipeline, re.MULTILINE | re.DOTALL)[0]
    assert "SemanticAttentionModel" in re.findall(r"^        (\w+),$", choice, re.MULTILINE)
    before, after = pipeline.split(choice)
    code = pushed["pipeline.py"].decode()
    assert code.startswith(before) and code.endswith(after)
    assert code[len(before) : -len(after)].strip() == module.strip()

    written = [path for path in out.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in written)
    assert any(path.parent.name == "checkpoint-2" for path in written)
    for name, content in (*((path, path.read_bytes()) for path in written), *pushed.items()):
        assert TOKEN.encode() not in content, name
    assert TOKEN not in done.stdout + done.stderr


def test_the_readme_says_what_remote_code_is():
    paragraphs = re.split(r"\n\s*\n", (ROOT / "README.md").read_text())
    (paragraph,) = (text for text in paragraphs if text.startswith("`trust_remote_code=True` runs"))
    for said in ("`pipeline.py`", "`semantic_attention.py`", "`pipeline_flux_fill_semantic.py`", "hash"):
        assert said in paragraph
