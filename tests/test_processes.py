# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Runs as users start them: launched processes, signals, and the way over the Hub."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from helpers import (
    LORA_FILE,
    MODULE_FILE,
    ON_CPU,
    ROOT,
    arguments,
    assemble,
    assert_same_weights,
    environment,
    run,
    script,
    spoil,
    weights_of,
    write_files,
    write_triptychs,
)
from hub_server import HubServer
from quick_python import run_python

from semantic_fill.averages import averaged
from semantic_fill.checkpoints import checkpoint_damage, checkpoint_step, list_checkpoints


def assert_close_weights(one, two):
    """Weights of runs that add up the same gradients in another order."""
    for file in (LORA_FILE, MODULE_FILE):
        one_weights, two_weights = weights_of(one, file), weights_of(two, file)
        assert one_weights.keys() == two_weights.keys()
        for name in one_weights:
            torch.testing.assert_close(one_weights[name], two_weights[name], atol=1e-6, rtol=1e-4)


# Gates that move at once, so that a wrong gradient of the module shows within a few steps.
LEARN = ["--lora_alpha", 4, "--semantic_scale_learning_rate", 0.1]
# The runs are compared after 5 steps of 8 samples. In the sixth, one process has a loss that is not finite.
RUN = [
    "--ema_decay",
    0.8,
    "--max_train_steps",
    7,
    "--gradient_accumulation_steps",
    2,
    "--checkpointing_steps",
    1,
    *LEARN,
]


@pytest.fixture(scope="module")
def one(base_folder, triptych_folder, tmp_path_factory):
    """What a single process trains, and the norms of its gradients."""
    norms = []
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, {12: lambda loss: loss * float("nan")})
        patch.setattr(Accelerator, "log", lambda self, values, step: norms.append(values["gradient_norm"]))
        out = tmp_path_factory.mktemp("one") / "out"
        return run(base_folder, out, *RUN, "--train_batch_size", 4, data=triptych_folder), norms


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_does(base_folder, triptych_folder, one, tmp_path, caplog, engine):
    one, norms = one

    # 3 maps of one sample at one timestep are the least that can be measured.
    held_out = write_files(tmp_path / "held out", {f"{seed}.png": seed for seed in (100, 101, 102)})
    validation = ["--validation_data_dir", held_out, "--instance_prompt", "caption 0", "--validation_steps", 7]
    paint = ["--validation_inference_steps", 2, "--num_validation_images", 1]
    # The second run continues from the checkpoint of a single process. A signal to one process, or to the launcher, stops
    # both after the same step.
    resume, (kind, number) = "--resume_from_checkpoint", ("SIGTERM", 15) if engine == "ddp" else ("Ctrl-C", 2)
    onward = [resume, one / "checkpoint-2", "--max_train_steps", 1000, "--checkpointing", "offload"]
    runs = {"two": ([[1, 12, "nan"]], [*validation, *paint]), "onward": ([[1, 5, kind]], onward)}
    for name, (faults, more) in runs.items():
        (tmp_path / name).mkdir()
        more = (*RUN, "--train_batch_size", 2, "--cache_root", tmp_path / "cache", *more)
        _, *options = script(base_folder, triptych_folder, tmp_path / name / "out", *more)
        runs[name] = [str(tmp_path / name), faults, options]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes", "2"]
    launch += ["--config_file", str(ROOT / "configs" / f"{engine}.yaml")]
    launch += [str(ROOT / "tests" / "watched_run.py"), json.dumps([*runs.values()])]
    done = subprocess.run(launch, env=environment(tmp_path), capture_output=True, text=True, timeout=300)

    def left_by(name):
        """The output folder of a run, what its processes said, and what each of them noted."""
        log = tmp_path / name / "log"
        said = log.read_text() if log.is_file() else ""
        notes = [tmp_path / name / f"rank{rank}.json" for rank in range(2)]
        assert all(path.is_file() for path in notes), said + done.stderr
        return tmp_path / name / "out", said, [json.loads(path.read_text()) for path in notes]

    two, said, ranks = left_by("two")
    assert "8 a step" in said and "Traceback" not in said
    assert_close_weights(one / "checkpoint-5", two / "checkpoint-5")
    # AdamW's steps are the same for gradients of any scale.
    assert ranks[0]["norms"] == pytest.approx(norms, rel=1e-3, nan_ok=True) and len(norms) == 7
    assert (two / "samples" / "step-000007.png").is_file()
    check_what_each_did(ranks, two, tmp_path / "cache")
    # One process measures the same. Its matrix products may round the last bit of a float32 in another way.
    more = [*RUN, "--train_batch_size", 4, "--cache_root", tmp_path / "cache", *validation]
    alone = assemble(
        arguments(base_folder, tmp_path / "alone", *more, data=triptych_folder), checkpoint=two / "checkpoint-7"
    )
    (found,) = map(json.loads, (two / "validation.jsonl").read_text().splitlines())
    with averaged(alone):
        measured = alone.held_out.measure(alone.model)
    assert len(measured) == 4 and {name: found[name] for name in measured} == pytest.approx(measured, abs=1e-6)
    # One process lists the folder. Each of them checks some of the pictures, and none is checked twice.
    names = [Path(path).name for rank in ranks for path in rank["checked"]]
    assert sorted(names) == [*(f"{index:03d}.png" for index in range(6)), "metadata.jsonl"]
    assert all(any(path.endswith(".png") for path in rank["checked"]) for rank in ranks)
    # Both skip the step that went wrong in one of them, and the next step is that of a single process again.
    assert said.count("Step 6 skipped: loss nan") == 1
    assert_same_weights(two / "checkpoint-5", two / "checkpoint-6")
    assert_close_weights(one, two)
    with pytest.raises(AssertionError):
        assert_close_weights(one, two / "checkpoint-6")

    # Each continues from the other's checkpoint.
    onward, said, ranks = left_by("onward")
    assert ", 0 to make" in said and "at step 2" in said and done.returncode != 0
    # A later run with the same cache opens no picture.
    assert [[Path(path).name for path in rank["read"]] for rank in ranks] == [["metadata.jsonl"], []]
    name = signal.Signals(number).name
    (step,) = re.findall(rf"Stopped by {name} at step (\d+). Continue with --resume_from_checkpoint latest", said)
    assert engine != "ddp" or step == "5"
    assert [len(rank["losses"]) for rank in ranks] == [2 * (int(step) - 2)] * 2
    last = list_checkpoints(onward)[-1]
    assert last.name == f"checkpoint-{step}" and checkpoint_damage(last) is None
    assert_close_weights(one / "checkpoint-5", onward / "checkpoint-5")
    caplog.set_level("INFO", logger="semantic_fill")
    more = (*RUN, "--train_batch_size", 4, "--cache_root", tmp_path / "cache", resume, two / "checkpoint-2")
    back = run(base_folder, tmp_path / "back", *more, data=triptych_folder)
    assert "at step 2" in caplog.text
    assert_close_weights(one / "checkpoint-5", back / "checkpoint-5")


def check_what_each_did(ranks, out, cache):
    """Checks the notes of a run of 7 steps, each of 2 micro-steps of 2 samples in either process."""
    # Every sample of the run is trained once, with noise of its own.
    assert sorted(ranks[0]["rows"] + ranks[1]["rows"]) == list(range(56))
    noise = [number for rank in ranks for drawn in rank["noise"] for number in drawn]
    assert len(set(noise)) == len(noise) == 56
    # Each of the 6 samples and the prompts is encoded once, by one of the processes.
    encoded = sorted(str(what) for rank in ranks for what in rank["encoded"])
    assert encoded == sorted(["", "caption 0", "caption 1", *map(str, range(6))])
    assert all(any(isinstance(what, int) for what in rank["encoded"]) for rank in ranks)
    # Gradients are exchanged in the last micro-step of each step only.
    for rank in ranks:
        in_a_step = rank["reductions"][1]
        assert in_a_step > 0
        assert rank["reductions"] == [n * in_a_step for step in range(7) for n in (step, step + 1)]
    # The logged loss is the mean over processes and micro-steps.
    assert len(ranks[0]["logged"]) == 7
    for step, logged in enumerate(ranks[0]["logged"]):
        losses = [loss for rank in ranks for loss in rank["losses"][2 * step : 2 * step + 2]]
        assert len(set(losses)) == 4
        assert logged == pytest.approx(sum(losses) / 4, nan_ok=step == 5)
    # Only the first process writes, apart from the encodings, which both make.
    checkpoints = {f"checkpoint-{step}" for step in range(1, 8)}
    assert {path.name for path in out.glob("*checkpoint*")} == checkpoints
    assert any("checkpoint-1" in path for path in ranks[0]["written"])
    assert any(path.startswith(str(cache)) for path in ranks[1]["written"])
    assert all(path.startswith(str(cache)) for path in ranks[1]["written"]), ranks[1]["written"]
    # Each waits until the other has encoded, and the second one waits whenever the first one writes.
    last_encoded = max(at for rank in ranks for event, at in rank["times"] if event == "encoded")
    steps = [at for event, at in ranks[1]["times"] if event == "step"]
    saved = [at for event, at in ranks[0]["times"] if event == "checkpoint"]
    assert all(last_encoded < min(at for event, at in rank["times"] if event == "step") for rank in ranks)
    assert len(steps) == 14 and len(saved) == 7
    assert all(at < steps[2 * step] for step, at in enumerate(saved[:-1], start=1))
    assert saved[-1] < dict(ranks[0]["times"])["result"] < dict(ranks[1]["times"])["end"]


def test_sigterm_leaves_a_checkpoint_to_go_on_from(base_folder, triptych_folder, tmp_path):
    out = tmp_path / "out"
    more = ["--max_train_steps", 100000, "--train_batch_size", 1]
    start = [sys.executable, *script(base_folder, triptych_folder, out, *more, "--checkpointing_steps", 2)]
    with subprocess.Popen(start, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        log = ""
        for line in process.stderr:
            log += line
            if "checkpoint-2" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM, log[-3000:]
    assert "Continue with --resume_from_checkpoint latest" in log
    step = checkpoint_step(list_checkpoints(out)[-1])
    more[1] = step + 1
    run(base_folder, out, *more, "--resume_from_checkpoint", "latest", data=triptych_folder)
    assert (out / LORA_FILE).is_file()


# Runs the code of a model card on a CPU, in float32.
PAINT = """
import re, sys, torch
card, repo, source, output = sys.argv[1:]
(code,) = re.findall(r"```python\\n(.*?)```", open(card).read(), re.DOTALL)
assert code.count(repo) == 2 and '.to("cuda")' in code
code = code.replace(repo, source).replace('.to("cuda")', "").replace("bfloat16", "float32")
views = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
names = {"visible": views[0], "semantic_map": views[1]}
torch.manual_seed(0)
exec(code, names)
assert type(names["pipe"]).__module__.startswith("diffusers_modules.")
names["painted"].save(output)
"""


def test_train_push_and_load_elsewhere(base_folder, triptych_folder, tmp_path):
    # A dot in the name of a repository is none of a Python module.
    repo, out = "user/fill-v1.5", tmp_path / "out"
    more = ["--max_train_steps", 2, "--train_batch_size", 1, "--semantic_scale_learning_rate", 1, "--push_to_hub"]
    more += ["--hub_model_id", repo, "--validation_inference_steps", 1, "--keep_best", "--validation_steps", 2]
    held_out = write_files(tmp_path / "held out", {"a.png": 100, "b.png": 101})
    more += ["--validation_data_dir", held_out, "--instance_prompt", "x"]
    flux = "black-forest-labs/FLUX.1-Fill-dev"
    with HubServer(token="hf_planted_secret") as hub:
        files = (path for path in Path(base_folder).rglob("*") if path.is_file())
        hub.add_repo(flux, {path.relative_to(base_folder).as_posix(): path.read_bytes() for path in files})
        env = environment(tmp_path) | hub.environment(tmp_path / "trainer", token=hub.token)
        env.pop("HF_HUB_OFFLINE", None)
        done = run_python(*script(flux, triptych_folder, out, *more), env=env)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {LORA_FILE, MODULE_FILE, "README.md", "pipeline.py", "semantic_attention/config.json"} <= set(
            hub.files(repo)
        )
        assert not any(name.startswith(("checkpoint", "cache", "logs", ".lock")) for name in hub.files(repo))
        for path in out.rglob("*"):
            assert path.is_dir() or b"hf_planted_secret" not in path.read_bytes()
        assert "hf_planted_secret" not in done.stderr + done.stdout

        # The card shows the figures and the paintings with the right map, a wrong one and none.
        pushed = hub.files(repo)
        content, (found,) = pushed["README.md"].decode(), map(json.loads, open(out / "validation.jsonl"))
        losses = " | ".join(f"{found[name]:.4f}" for name in ("loss", "wrong_map", "no_map", "map_worth"))
        assert "| step | right map | wrong map | no map | what the map is worth |" in content
        assert f"| 2 | {losses} |" in content and "- samples seen: 2\n" in content
        assert (
            "Held-out samples: visible view, map, paintings with it, with another sample's and without one" in content
        )
        assert "![step-000002](samples/step-000002.png)" in content
        with PIL.Image.open(io.BytesIO(pushed["samples/step-000002.png"])) as sheet:
            assert sheet.size == (6 * 96, 16 + 2 * (96 + 16))
        for file in (LORA_FILE, MODULE_FILE):
            best, last = (safetensors.torch.load(pushed[name]) for name in (f"best/{file}", file))
            assert best.keys() == last.keys() and all(torch.equal(best[name], last[name]) for name in last)
        card = tmp_path / "card.md"
        card.write_bytes(hub.files(repo)["README.md"])
        pictures = []
        for source in (str(out), repo):
            env = hub.environment(tmp_path / f"painter{len(pictures)}", token=None)
            env = {**os.environ, **ON_CPU, **env}
            env.pop("HF_HUB_OFFLINE", None)
            env.pop("PYTHONPATH", None)
            paint = ("-c", PAINT, card, repo, source, tmp_path / "picture.png")
            done = run_python(*paint, env=env, cwd=tmp_path)
            assert done.returncode == 0, done.stderr[-3000:]
            pictures.append((tmp_path / "picture.png").read_bytes())
        assert pictures[0] == pictures[1]


def test_a_failed_upload_keeps_the_result(base_folder, tmp_path):
    data, out = write_triptychs(tmp_path / "data", 2), tmp_path / "out"
    with HubServer(token="hf_planted_secret") as hub:
        hub.fail("POST", r"/commit/", 403, times=20)
        env = environment(tmp_path) | hub.environment(tmp_path / "trainer", token=hub.token)
        env.pop("HF_HUB_OFFLINE", None)
        more = ["--max_train_steps", 1, "--push_to_hub", "--hub_model_id", "user/fill"]
        more += ["--validation_inference_steps", 1]
        done = run_python(*script(base_folder, data, out, *more), env=env)
    assert done.returncode != 0
    assert "Training is done and saved in" in done.stderr and "hf upload user/fill" in done.stderr
    assert all(Path(out, file).is_file() for file in (LORA_FILE, MODULE_FILE))
