# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What a run pushes to the Hub and loads from it: checkpoints, cards, and trained weights to start from; and faults."""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import FluxFillPipeline
from helpers import LORA_FILE, MODULE_FILE, ON_CPU, ROOT, arguments, run, weights_of
from hub_server import HubServer
from huggingface_hub import ModelCard
from quick_python import run_python

from semantic_fill.publish import public_config, save_model_card, single_file_pipeline


TOKEN = "hf_planted_secret"
# Each client is a process with a home of its own, as on another machine.
PREAMBLE = """
import logging, os, re, subprocess, sys
from pathlib import Path
sys.path[:0] = {paths}
from helpers import arguments, run
from semantic_fill.publish import open_repo, push_to_hub
base, data, tmp = {arguments}
def refused(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("was not refused")
"""


@pytest.fixture
def hub():
    with HubServer(token=TOKEN) as server:
        yield server


@pytest.fixture
def client(hub, base_folder, triptych_folder, tmp_path):
    def run_code(code: str, home: str) -> str:
        preamble = PREAMBLE.format(
            paths=[str(ROOT / "tests"), str(ROOT), str(ROOT / "examples")],
            arguments=(base_folder, triptych_folder, str(tmp_path)),
        )
        # The tests' conftest keeps clients off the Hub unless told otherwise.
        env = {**hub.environment(tmp_path / home, TOKEN), **ON_CPU, "HF_HUB_OFFLINE": "0"}
        done = run_python("-c", preamble + code, env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout + done.stderr

    return run_code


TRAIN = """
logging.basicConfig(level=logging.INFO, force=True)
run(base, Path(tmp, "out"), *"{options} --max_train_steps 4 --checkpointing_steps 2 --push_to_hub"
    " --hub_model_id user/fill-v1.5 --hub_strategy every_checkpoint".split(), data=data)
"""

RESUME = """
import safetensors.torch
repo = ["--resume_from_checkpoint", "user/fill-v1.5"]
options = "{options} --max_train_steps".split()
run(base, Path(tmp, "resumed"), *options, 6, *repo, data=data)

# Nothing is learned at a rate of zero, so what is saved is what was loaded.
start = "--lora_alpha 8 --lora_weights user/fill-v1.5 --semantic_weights user/fill-v1.5 --learning_rate 0".split()
run(base, Path(tmp, "started"), *start, "--max_train_steps", 1, data=data)
said = refused(ValueError, lambda: run(base, Path(tmp, "x"), *start[2:], "--max_train_steps", 1, data=data))
assert "has rank 4 and alpha 8" in said and "pass --rank 4 --lora_alpha 8" in said, said

def resume(repo):
    return refused(ValueError, lambda: run(base, Path(tmp, "x"), "--resume_from_checkpoint", repo, data=data))

assert "no folder, and no Hub repository that can be read" in resume("user/none")
assert "has no `last-checkpoint/`" in resume("user/empty")
assert "is no intact checkpoint: pytorch_lora_weights.safetensors is not what was written" in resume("user/damaged")
for option, text in (("--lora_weights", "holds no trained LoRA"), ("--semantic_weights", "holds no trained module")):
    more = [option, "user/empty", "--max_train_steps", 1]
    said = refused(ValueError, lambda: run(base, Path(tmp, "x"), *more, data=data))
    assert "user/empty" in said and text in said, said
"""


def test_checkpoints_go_over_the_hub(hub, client, base_folder, triptych_folder, tmp_path):
    options = "--lora_alpha 8 --lora_dropout 0.1 --random_flip --lr_warmup_steps 3"
    options += " --lr_scheduler constant_with_warmup"
    # The first checkpoint is refused. The second one's first try is cut in the middle, and its next try is answered with
    # 500.
    hub.add_repo("user/fill-v1.5", {"notes.md": b"kept", "last-checkpoint/of-another-mode.json": b"{}"}, private=True)
    hub.fail("POST", "/commit/main$", 403, times=1)
    hub.fail("POST", "/commit/main$", "cut", times=1)
    hub.fail("POST", "/commit/main$", 500, times=1)
    said = client(TRAIN.format(options=options), "trainer")
    assert "checkpoint-2 is saved, but the upload to user/fill-v1.5 failed" in said and "Training goes on" in said
    assert [r.status for r in hub.requests if "/commit/" in r.path] == [403, "cut", 500, 200, 200]
    files = hub.files("user/fill-v1.5")
    assert files["notes.md"] == b"kept"
    pushed = {name.removeprefix("last-checkpoint/") for name in files if name.startswith("last-checkpoint/")}
    local = tmp_path / "out" / "checkpoint-4"
    assert pushed == {p.relative_to(local).as_posix() for p in local.rglob("*") if p.is_file()}
    assert {Path(name).suffix for name in pushed} == {".json", ".safetensors"}
    assert files[LORA_FILE] == (tmp_path / "out" / LORA_FILE).read_bytes()
    assert not any(TOKEN.encode() in content for content in files.values())

    before = {name: content for name, content in files.items() if name.startswith("last-checkpoint/")}
    damaged = before[f"last-checkpoint/{LORA_FILE}"]
    hub.add_repo("user/damaged", before | {f"last-checkpoint/{LORA_FILE}": damaged[:-1] + bytes([damaged[-1] ^ 1])})
    hub.add_repo("user/empty", {"README.md": b""})
    client(RESUME.format(options=options), "elsewhere")
    undisturbed = run(
        base_folder, tmp_path / "undisturbed", *options.split(), "--max_train_steps", 6, data=triptych_folder
    )
    for file in (LORA_FILE, MODULE_FILE):
        expected, resumed = weights_of(undisturbed, file), weights_of(tmp_path / "resumed", file)
        for name in expected:
            torch.testing.assert_close(resumed[name], expected[name], atol=1e-6, rtol=1e-5)
        pushed, started = safetensors.torch.load(files[file]), weights_of(tmp_path / "started", file)
        assert all(torch.equal(pushed[name], started[name]) for name in pushed)


FAULTS = """
import huggingface_hub
from huggingface_hub import ModelCard
from quick_python import run_python
def push(name):
    more = ["--push_to_hub", "--hub_private_repo", "--hub_model_id", "user/" + name]
    options = arguments(base, Path(tmp, "out"), *more, data=data)
    push_to_hub(open_repo(options), ["README.md", "pipeline.py"], options.output_dir)
for name in ("exists", "once500", "once-cut"):
    push(name)
for name, status in (("gone", "404"), ("conflict", "409")):
    said = refused(RuntimeError, lambda: push(name))
    assert "Training is done and saved in" in said and status in said and "hf upload user/" + name in said, said
# The command that it advises uploads what the push would have uploaded.
os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
subprocess.run(re.search("with `(hf upload .*)`", said)[1], shell=True, check=True)
said = refused(RuntimeError, lambda: push("public"))
assert "--hub_private_repo was passed, but user/public exists and is public" in said, said
# The default name is that of the folder. A repository that holds something else is taken only if it is named.
def push_named(folder, *more):
    options = arguments(base, Path(tmp, folder), "--push_to_hub", *more, data=data)
    push_to_hub(open_repo(options), ["README.md", "pipeline.py"], options.output_dir)
said = refused(RuntimeError, lambda: push_named("named"))
assert "user/named exists and holds something else (notes`<b>.md, weights.bin). To push there" in said, said
assert "pass --hub_model_id user/named. Nothing was trained yet" in said, said
for _ in range(2):
    push_named("named", "--hub_model_id", "user/named")
# By the tag of its card it is known as one of this trainer's now.
push_named("named")
for name in ("../up", "someone/else"):
    said = refused(RuntimeError, lambda: push(name))
    assert "--push_to_hub cannot write to" in said and "hf auth login" in said, said
# Before version 2 the library asks the real Hub.
if int(huggingface_hub.__version__.split(".")[0]) > 1:
    for name in ("out", "named"):
        ModelCard.load(str(Path(tmp, name, "README.md"))).validate()
os.environ["HF_TOKEN"] = "hf_wrong"
said = refused(RuntimeError, lambda: push("fill"))
assert "401" in said and "hf auth login" in said and "Nothing was trained" in said and "hf_wrong" not in said, said
"""


def test_faults_and_card_validation(hub, client, base_folder, triptych_folder, tmp_path):
    code = single_file_pipeline().encode()
    # On the Hub, the base and the data are repositories. On this machine they are folders.
    paths = ["--palette", tmp_path / "palette.json", "--validation_data_dir", tmp_path / "held_out"]
    plain = arguments(base_folder, tmp_path / "out", "--max_train_steps", 7, *paths, data=triptych_folder)
    more = ["--hub_model_id", "user/fill", "--instance_prompt", 'a "hot": é', "--dataset_name", "user/data"]
    more += ["--width", 48, "--revision", "v1"]
    named = arguments("black-forest-labs/FLUX.1-Fill-dev", tmp_path / "named", *more, "--max_train_steps", 7)
    for options in (plain, named):
        folder = Path(options.output_dir)
        folder.mkdir()
        (folder / "pipeline.py").write_bytes(code)
        save_model_card(folder / "README.md", options, "What it found.\n", [Path("samples/step-000007.png")], code)
    (tmp_path / "out" / "checkpoint-1").mkdir()
    (tmp_path / "out" / "checkpoint-1" / "training_state.json").write_text("{}")
    hub.add_repo("user/exists", private=True)
    hub.add_repo("user/public")
    others = {"notes`<b>.md": b"kept", "weights.bin": b"kept"}
    hub.add_repo("user/named", others | {"samples/a.png": b"", "last-checkpoint/b": b""})
    hub.fail("POST", "/once500/commit/", 500)
    hub.fail("POST", "/once-cut/commit/", "cut")
    hub.fail("POST", "/gone/commit/", 404)
    hub.fail("POST", "/conflict/commit/", 409)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    client(FAULTS, "pusher")
    assert hub.repos["model", "user/once500"].private
    for name in ("exists", "once500", "once-cut"):
        assert hub.files(f"user/{name}")["pipeline.py"] == before[tmp_path / "out" / "pipeline.py"]
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    assert set(hub.files("user/conflict")) - {".gitattributes"} == {"README.md", "pipeline.py"}

    pushed = hub.files("user/named")
    assert {name: pushed[name] for name in others} == others
    _, note = pushed["README.md"].decode().split("## Other files\n\n")
    assert note == (
        "This repository also holds files that this training did not write: `notes'\u2039b\u203a.md`, `weights.bin`.\n"
    )
    assert b"## Other files" not in hub.files("user/exists")["README.md"]

    card = ModelCard.load(tmp_path / "named" / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "black-forest-labs/FLUX.1-Fill-dev" and data["datasets"] == ["user/data"]
    assert data["license"] == "other" and data["license_name"] == "flux-1-dev-non-commercial-license"
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "image-to-image")
    assert data["instance_prompt"] == 'a "hot": é' and "lora" in data["tags"]
    assert "![step-000007](samples/step-000007.png)" in card.text and hashlib.sha256(code).hexdigest() in card.text
    assert "48x32 pixels a view. Views of other sizes were scaled to this size and cropped" in " ".join(
        card.text.split()
    )
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(snippet, "card", "exec")
    # The base is that of training.
    assert '"black-forest-labs/FLUX.1-Fill-dev", revision="v1", custom_pipeline="user/fill"' in snippet
    for name, value in public_config(named).items():
        assert f"- `{name}`: `{value}`\n" in card.text
    assert str(tmp_path) not in card.content
    # A local folder is no model of the Hub, and its path is private.
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "base_model" not in card.data.to_dict() and card.data.license_name == "as-base-model"
    assert str(tmp_path) not in card.content and Path(base_folder).name in card.text


def test_stock_pipeline_applies_the_alpha(base, base_folder, triptych_folder, tmp_path):
    more = ["--lora_alpha", 12, "--learning_rate", "1e-2", "--max_train_steps", 2]
    out = run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    call = {"prompt": "a", "num_inference_steps": 2, "max_sequence_length": 16, "height": 32, "width": 64}
    call |= {"image": torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0)), "output_type": "pt"}
    call["mask_image"] = torch.ones(1, 1, 32, 64)

    def paint(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(generator=torch.Generator().manual_seed(0), **call).images

    stock = FluxFillPipeline.from_pretrained(base_folder)
    stock.load_lora_weights(out)
    painted = paint(stock)
    # Independently, W + alpha / r * B A is merged by hand.
    pictures = {}
    for alpha in (12, 4):
        merged = FluxFillPipeline(**base.components)
        merged.register_modules(transformer=copy.deepcopy(base.transformer))
        weights, state = weights_of(out), merged.transformer.state_dict()
        for name in [n for n in weights if ".lora_A." in n]:
            target = name.removeprefix("transformer.").replace(".lora_A.weight", ".weight")
            state[target] += alpha / 4 * weights[name.replace("lora_A", "lora_B")] @ weights[name]
        pictures[alpha] = paint(merged)
    torch.testing.assert_close(painted, pictures[12], atol=1e-4, rtol=1e-4)
    assert (painted - pictures[4]).abs().max() > 1e-3
    assert json.loads((out / "semantic_attention" / "config.json").read_text())["num_layers"] == 1
