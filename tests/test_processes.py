# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Runs as users start them: launched processes, signals, and the way over the Hub."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, assert_ended_well, write_triptychs
from hub_server import HubServer


FILES = ("pytorch_lora_weights.safetensors", "semantic_attention/diffusion_pytorch_model.safetensors")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def command(base_folder, data, output_dir, *more, config="one_gpu", processes=1):
    launch = [*LAUNCH, "--config_file", str(ROOT / "configs" / f"{config}.yaml"), "--num_processes", str(processes)]
    options = f"--mixed_precision no --pretrained_model_name_or_path {base_folder} --train_data_dir {data}"
    options += f" --output_dir {output_dir} --resolution 32 --rank 4 --max_sequence_length 16 --report_to none"
    return [*launch, str(ROOT / "train_semantic_fill_lora.py"), *options.split(), *map(str, more)]


def environment(tmp_path, **more):
    return os.environ | ON_CPU | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)} | more


def launch(tmp_path, base_folder, data, name, processes, batch, config, *more):
    """A run into `tmp_path / name` that ended well; its log."""
    more = ["--train_batch_size", batch, "--cache_root", tmp_path / "cache", *more]
    run = command(base_folder, data, tmp_path / name, *more, config=config, processes=processes)
    done = subprocess.run(run, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert_ended_well(done, processes)
    return done.stderr


def assert_same_weights(one, two):
    for file in FILES:
        one_weights, two_weights = (safetensors.torch.load_file(folder / file) for folder in (one, two))
        assert one_weights.keys() == two_weights.keys()
        for name in one_weights:
            torch.testing.assert_close(one_weights[name], two_weights[name], atol=1e-6, rtol=1e-4)


# Gates that move at once, so that a wrong gradient of the module shows within a few steps.
LEARN = ["--lora_alpha", 4, "--semantic_scale_learning_rate", 0.1]


def needs(engine):
    return pytest.param(
        engine,
        marks=pytest.mark.skipif(
            engine == "deepspeed_zero2" and importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed"
        ),
    )


@pytest.fixture(scope="module")
def one_process(base_folder, triptych_folder, tmp_path_factory):
    """What a single process trains in 5 steps of 4 samples, with a checkpoint on its way, and its encodings."""
    folder = tmp_path_factory.mktemp("one")
    more = ["--max_train_steps", 5, "--checkpointing_steps", 2, *LEARN]
    assert "4 a step" in launch(folder, base_folder, triptych_folder, "one", 1, 4, "one_gpu", *more)
    return folder


@pytest.mark.parametrize("engine", [needs(engine) for engine in ("ddp", "fsdp2", "deepspeed_zero2")])
def test_processes_go_on_from_one_another(base_folder, triptych_folder, one_process, tmp_path, engine):
    """Two processes train what one does, and either goes on from the other's checkpoint."""

    def run(*args):
        return launch(one_process, base_folder, triptych_folder, *args, *LEARN, "--max_train_steps", 5)

    one, two, onward, back = (one_process / name for name in ("one", engine, f"{engine}_onward", f"{engine}_back"))
    paint = ["--validation_steps", 5, "--validation_inference_steps", 2, "--num_validation_images", 1]
    log = run(two.name, 2, 2, engine, "--checkpointing_steps", 2, *paint)
    assert "4 a step" in log and ", 0 to make" in log
    assert_same_weights(one, two)
    assert (two / "samples" / "step-000005.png").is_file()
    assert {path.name for path in two.glob("*checkpoint*")} == {"checkpoint-2", "checkpoint-4"}

    assert "at step 2" in run(onward.name, 2, 2, engine, "--resume_from_checkpoint", one / "checkpoint-2")
    assert_same_weights(one, onward)
    log = run(back.name, 1, 4, "one_gpu", "--resume_from_checkpoint", two / "checkpoint-2")
    assert "at step 2" in log
    assert_same_weights(one, back)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_what_each_process_does(base_folder, triptych_folder, tmp_path, engine):
    more = ["--max_train_steps", 2, "--train_batch_size", 1, "--gradient_accumulation_steps", 3]
    more += ["--checkpointing_steps", 1, "--checkpoints_total_limit", 1]
    out = tmp_path / "out"
    run = command(base_folder, triptych_folder, out, *more, config=engine, processes=2)
    script = run.index(str(ROOT / "train_semantic_fill_lora.py"))
    run[script : script + 1] = [str(ROOT / "tests" / "watched_run.py"), str(tmp_path)]
    done = subprocess.run(run, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    assert_ended_well(done, processes=2)
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]

    # Every sample of the run is trained once, with noise of its own.
    assert sorted(ranks[0]["rows"] + ranks[1]["rows"]) == list(range(12))
    noise = [number for rank in ranks for drawn in rank["noise"] for number in drawn]
    assert len(set(noise)) == len(noise) == 12
    # The 6 samples are encoded once, shared out.
    assert sum(len(rank["encoded"]) for rank in ranks) == 6
    assert min(len(rank["encoded"]) for rank in ranks) > 0
    # Gradients are shared in the last micro-step of each step only.
    for rank in ranks:
        before_1, before_2, after_1, *second = rank["reductions"]
        assert before_1 == before_2 == 0 < after_1
        assert second == [after_1, after_1, 2 * after_1]
    # The logged loss is the mean over processes and micro-steps.
    for step, logged in enumerate(ranks[0]["logged"]):
        losses = [loss for rank in ranks for loss in rank["losses"][3 * step : 3 * step + 3]]
        assert len(set(losses)) == 6
        assert logged == pytest.approx(sum(losses) / 6)
    # The first process alone writes, but for the encodings that are shared out.
    assert any("checkpoint-1" in path for path in ranks[0]["written"])
    assert all(path.startswith(str(out / "cache")) for path in ranks[1]["written"]), ranks[1]["written"]
    assert {path.name for path in out.glob("*checkpoint*")} == {"checkpoint-2"}


def test_sigterm_leaves_a_checkpoint_to_go_on_from(base_folder, triptych_folder, tmp_path):
    script, out = ROOT / "train_semantic_fill_lora.py", tmp_path / "out"
    options = command(base_folder, triptych_folder, out, "--max_train_steps", 100000, "--train_batch_size", 1)
    run = [sys.executable, *options[options.index(str(script)) :]]
    with subprocess.Popen(run, env=environment(tmp_path), stderr=subprocess.PIPE, text=True) as process:
        log = ""
        for line in process.stderr:
            log += line
            if "[Step 100]" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM, log[-3000:]
    assert "Go on with --resume_from_checkpoint latest" in log
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name.rsplit("-")[-1])
    run[run.index("--max_train_steps") + 1] = str(step + 1)
    done = subprocess.run([*run, "--resume_from_checkpoint", "latest"], env=environment(tmp_path), capture_output=True)
    assert done.returncode == 0 and (out / FILES[0]).is_file()


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


@pytest.mark.parametrize("repo", ["user/fill", "user/fill-v1.5"])
def test_train_push_and_load_elsewhere(base_folder, triptych_folder, tmp_path, repo):
    out = tmp_path / "out"
    more = ["--max_train_steps", 2, "--train_batch_size", 1, "--semantic_scale_learning_rate", 1, "--push_to_hub"]
    more += ["--hub_model_id", repo]
    flux = "black-forest-labs/FLUX.1-Fill-dev"
    with HubServer(token="hf_planted_secret") as hub:
        files = (path for path in Path(base_folder).rglob("*") if path.is_file())
        hub.add_repo(flux, {path.relative_to(base_folder).as_posix(): path.read_bytes() for path in files})
        env = environment(tmp_path) | hub.environment(tmp_path / "trainer", token=hub.token)
        env.pop("HF_HUB_OFFLINE", None)
        run = command(flux, triptych_folder, out, *more)
        done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {*FILES, "README.md", "pipeline.py", "semantic_attention/config.json"} <= set(hub.files(repo))
        assert not any(name.startswith(("checkpoint", "cache", "logs", ".lock")) for name in hub.files(repo))
        for path in out.rglob("*"):
            assert path.is_dir() or b"hf_planted_secret" not in path.read_bytes()
        assert "hf_planted_secret" not in done.stderr + done.stdout

        card = tmp_path / "card.md"
        card.write_bytes(hub.files(repo)["README.md"])
        pictures = []
        for source in (str(out), repo):
            env = hub.environment(tmp_path / f"painter{len(pictures)}", token=None)
            env = {**os.environ, **ON_CPU, **env}
            env.pop("HF_HUB_OFFLINE", None)
            env.pop("PYTHONPATH", None)
            paint = [sys.executable, "-c", PAINT, str(card), repo, source, str(tmp_path / "picture.png")]
            done = subprocess.run(paint, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
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
        run = command(base_folder, data, out, *more)
        done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "Training is done and saved in" in done.stderr and "hf upload user/fill" in done.stderr
    assert all(Path(out, file).is_file() for file in FILES)
