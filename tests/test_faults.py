# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Faults, injected into real runs: what is lost, what is said, and how the run goes on."""

import errno
import itertools
import json
import math
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import forked_runs
import pytest
import safetensors.torch
import torch
from accelerate.state import PartialState
from forked_runs import Fail, Kill, LimitFileSize, Meet, Moment, Signal
from test_training import arguments, run

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from training_speed import CHECKPOINTING, memory_advice


WEIGHTS = ("pytorch_lora_weights.safetensors", "semantic_attention/diffusion_pytorch_model.safetensors")
STEPS = 12
OPTIONS = (
    "--resolution 32 --rank 4 --max_sequence_length 16 --train_batch_size 2 --report_to none --mixed_precision no"
    " --lora_dropout 0.1 --random_flip --caption_dropout 0.3 --semantic_dropout 0.3 --checkpointing_steps 2"
    f" --checkpoints_total_limit 2 --max_train_steps {STEPS} --lr_scheduler linear"
).split()
KILLS = 30


@pytest.fixture(scope="module")
def runs():
    """Runs to start: `start` at once, or `end` and tell the exit code."""
    return Runs()


class Runs:
    def __init__(self):
        self.context = forked_runs.context()

    def start(self, base_folder, data, out: Path, *more, moment: Moment | None = None):
        out.parent.mkdir(parents=True, exist_ok=True)
        options = ["--pretrained_model_name_or_path", base_folder, "--train_data_dir", data, "--output_dir", out]
        options = [str(option) for option in (*options, *OPTIONS, "--cache_dir", f"{out}.hf", *more)]
        process = self.context.Process(target=forked_runs.train, args=(options, f"{out}.log", moment))
        process.start()
        return process

    def end(self, *args, **kwargs) -> int:
        process = self.start(*args, **kwargs)
        process.join(120)
        return process.exitcode


def said(out: Path) -> str:
    return Path(f"{out}.log").read_text()


def assert_same_result(out: Path, expected: Path) -> None:
    for file in WEIGHTS:
        found, wanted = (safetensors.torch.load_file(folder / file) for folder in (out, expected))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), file


def whole_checkpoints(out: Path) -> list[int]:
    """The steps of all that is called a checkpoint, each of them whole."""
    found = trainer.list_checkpoints(out)
    assert [trainer.checkpoint_damage(path) for path in found] == [None] * len(found)
    return [trainer.checkpoint_step(path) for path in found]


@pytest.fixture(scope="module")
def undisturbed(runs, base_folder, triptych_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert runs.end(base_folder, triptych_folder, out) == 0, said(out)
    weights = safetensors.torch.load_file(out / WEIGHTS[0])
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    return out


def two_at_once(chains: list) -> list:
    """
    What generators return that yield processes and are sent their exit codes. Without threads: two of them would read
    one process's end from the fork server.
    """
    waiting, running, results = [*chains], {}, []

    def advance(chain, code) -> None:
        try:
            running[chain.send(code)] = chain
        except StopIteration as stop:
            results.append(stop.value)

    while waiting or running:
        while waiting and len(running) < 2:
            advance(waiting.pop(), None)
        ended = multiprocessing.connection.wait([process.sentinel for process in running], timeout=120)
        assert ended, "no run ended in time"
        for process in [process for process in running if process.sentinel in ended]:
            process.join()
            advance(running.pop(process), process.exitcode)
    return results


def test_killed_at_30_moments_and_resumed(runs, base_folder, triptych_folder, tmp_path, undisturbed):
    operations = json.loads(Path(f"{undisturbed}.log.json").read_text())
    a_checkpoint = operations["checkpoint"] // (STEPS // 2)
    assert set(operations) == set(forked_runs.PHASES) and min(a_checkpoint, operations["result"]) > 5
    # Each chain is one run, killed once in each phase and twice while stepping. Steps are counted so that some are left.
    latest = {
        "encoding": operations["encoding"],
        "step": 3,
        "checkpoint": a_checkpoint,
        "result": operations["result"],
    }
    phases = ("encoding", "step", "checkpoint", "step", "result")

    go_on = ("--resume_from_checkpoint", "latest")

    def chain(number: int):
        chance, out = random.Random(number), tmp_path / str(number) / "out"
        killed = []
        for phase in phases:
            # Half of the kills right at an operation, the others somewhere after it.
            delay = chance.choice((0.0, chance.uniform(0.0, 0.02)))
            moment = Moment(phase, chance.randint(1, latest[phase]), Kill(delay))
            code = yield runs.start(base_folder, triptych_folder, out, *go_on, moment=moment)
            assert code == -signal.SIGKILL, (moment, said(out))
            assert set(whole_checkpoints(out)) <= set(range(2, STEPS + 1, 2))
            killed.append(phase)
        code = yield runs.start(base_folder, triptych_folder, out, *go_on)
        assert code == 0, said(out)
        assert_same_result(out, undisturbed)
        assert whole_checkpoints(out) == [STEPS - 2, STEPS]
        # Nothing is left of what was cut short.
        assert not [path for path in out.iterdir() if path.name.startswith(".") and path.name != ".lock"]
        assert "nan" not in (out / "README.md").read_text()
        return killed

    killed = sum(two_at_once([chain(number) for number in range(KILLS // len(phases))]), [])
    assert len(killed) == KILLS and set(killed) == set(forked_runs.PHASES)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_stopped_by_a_signal_and_resumed(runs, base_folder, triptych_folder, tmp_path, undisturbed, number):
    out = tmp_path / "out"
    moment = Moment("step", 5, Signal(number))
    assert runs.end(base_folder, triptych_folder, out, moment=moment) == 128 + number, said(out)
    assert "at step 5. Go on with --resume_from_checkpoint latest." in said(out)
    assert whole_checkpoints(out) == [4, 5]
    assert runs.end(base_folder, triptych_folder, out, "--resume_from_checkpoint", "latest") == 0, said(out)
    assert_same_result(out, undisturbed)


@pytest.mark.parametrize("phase, times, left", [("step", 2, [2, 4]), ("encoding", 1, [])])
def test_a_second_signal_and_one_while_encoding_end_the_run_at_once(
    runs, base_folder, triptych_folder, tmp_path, undisturbed, phase, times, left
):
    out = tmp_path / "out"
    moment = Moment(phase, 5, Signal(signal.SIGTERM, times))
    assert runs.end(base_folder, triptych_folder, out, moment=moment) == -signal.SIGTERM, said(out)
    assert whole_checkpoints(out) == left
    assert runs.end(base_folder, triptych_folder, out, "--resume_from_checkpoint", "latest") == 0, said(out)
    assert_same_result(out, undisturbed)


# The second checkpoint fails: too long for the system, or at its first operation.
@pytest.mark.parametrize(
    "phase, count, action, error",
    [
        ("checkpoint", 1, LimitFileSize(100_000), "File too large"),
        ("checkpoint", 3, Fail(errno.ENOSPC), "No space left on device"),
        ("checkpoint", 3, Fail(errno.EROFS), "Read-only file system"),
        ("result", 3, Fail(errno.ENOSPC), "No space left on device"),
    ],
)
def test_full_disk_and_read_only_output(
    runs, base_folder, triptych_folder, tmp_path, undisturbed, phase, count, action, error
):
    out = tmp_path / "out"
    operations = json.loads(Path(f"{undisturbed}.log.json").read_text())
    if phase == "checkpoint":
        count += operations["checkpoint"] // (STEPS // 2)
    assert runs.end(base_folder, triptych_folder, out, moment=Moment(phase, count, action)) == 1
    last_line = said(out).strip().splitlines()[-1]
    assert last_line.startswith("RuntimeError: Writing failed: ") and error in last_line
    assert "elsewhere with --output_dir" in last_line and "go on with --resume_from_checkpoint latest" in last_line
    assert whole_checkpoints(out) == ([2] if phase == "checkpoint" else [STEPS - 2, STEPS])
    assert not [path for path in out.iterdir() if path.name.endswith(".part")]
    assert runs.end(base_folder, triptych_folder, out, "--resume_from_checkpoint", "latest") == 0, said(out)
    assert_same_result(out, undisturbed)


def test_full_disk_while_encoding(runs, base_folder, triptych_folder, tmp_path, undisturbed):
    out, cache = tmp_path / "out", tmp_path / "cache"
    moment = Moment("encoding", 8, Fail(errno.ENOSPC))
    code = runs.end(base_folder, triptych_folder, out, "--cache_root", cache, moment=moment)
    last_line = said(out).strip().splitlines()[-1]
    assert code == 1 and "No space left" in last_line and "elsewhere with --cache_root" in last_line
    assert not list(out.glob("checkpoint-*")) and not [path for path in cache.iterdir() if path.name.startswith(".")]
    assert runs.end(base_folder, triptych_folder, out, "--cache_root", cache) == 0, said(out)
    assert re.search(r"Encodings: [1-9]\d* found", said(out))
    assert_same_result(out, undisturbed)


@pytest.mark.parametrize("folder", ["a file/out", "/proc/out"])
def test_output_that_cannot_be_written(base_folder, triptych_folder, tmp_path, folder):
    (tmp_path / "a file").touch()
    args = trainer.parse_args(
        [
            "--pretrained_model_name_or_path",
            "unused",
            "--train_data_dir",
            "unused",
            "--output_dir",
            str(tmp_path / folder),
        ]
    )
    with pytest.raises(RuntimeError, match="Writing failed: .*out.* elsewhere with --output_dir"):
        trainer.claim_output_dir(args)


def test_two_runs_in_one_folder_are_refused(runs, base_folder, triptych_folder, tmp_path, undisturbed):
    out, marks = tmp_path / "out", tmp_path / "marks"
    marks.mkdir()
    first = runs.start(base_folder, triptych_folder, out, moment=Moment("step", 3, Meet(str(marks), 2)))
    while first.is_alive() and not list(marks.iterdir()):
        first.join(0.01)
    second = tmp_path / "second"
    # The same folder by another name.
    second.symlink_to(out)
    assert runs.end(base_folder, triptych_folder, second, "--resume_from_checkpoint", "latest") == 1
    assert f"ValueError: --output_dir {second} is in use by another run." in said(second)
    (marks / "go on").touch()
    first.join(120)
    assert first.exitcode == 0, said(out)
    assert_same_result(out, undisturbed)
    # A later run that does not go on with the first is refused too.
    assert runs.end(base_folder, triptych_folder, out) == 1
    assert "holds checkpoints of an earlier run" in said(out)
    assert_same_result(out, undisturbed)


def test_two_runs_share_one_cache_at_once(runs, base_folder, triptych_folder, tmp_path, undisturbed):
    cache, marks = tmp_path / "cache", tmp_path / "marks"
    marks.mkdir()
    # Both have found out what is missing and made some of it before either goes on.
    moment = Moment("encoding", 5, Meet(str(marks), 2))
    outs = [tmp_path / name for name in ("first", "second")]
    both = [runs.start(base_folder, triptych_folder, out, "--cache_root", cache, moment=moment) for out in outs]
    for process, out in zip(both, outs):
        process.join(120)
        assert process.exitcode == 0, said(out)
        assert_same_result(out, undisturbed)
    assert all(trainer.is_whole(path) for path in cache.iterdir()) and len(list(cache.iterdir())) == 15


# -- In this process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_out_of_memory_says_what_saves_how_much(base_folder, triptych_folder, tmp_path, monkeypatch, cached):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "compare", too_much)
    flag = "--cache_latents" if cached else "--no-cache_latents"
    with pytest.raises(torch.OutOfMemoryError) as error:
        run(base_folder, tmp_path / "out", "--max_train_steps", 1, flag, data=triptych_folder)
    message = str(error.value)
    assert message.startswith("CUDA out of memory.\nOf about ")
    assert ("\n  --cache_latents: about" in message) != cached


def test_memory_advice_names_flags_that_exist_and_what_they_save(base_folder, tmp_path):
    flux = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128}
    flux |= {"joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": [16, 56, 56]}
    (tmp_path / "transformer").mkdir()
    config = json.loads(Path(base_folder, "transformer", "config.json").read_text()) | flux
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))

    def advice(*more):
        return memory_advice(
            arguments(tmp_path, "unused", "--train_batch_size", 4, *more, data="unused"), 2560, 10 * 2**30
        )

    flags = dict(re.findall(r"^  (--.*): about ([\d.]+) GiB$", advice("--no-cache_latents"), re.MULTILINE))
    saved = [float(number) for number in flags.values()]
    assert saved == sorted(saved, reverse=True) and flags["--cache_latents"] == "10.00"
    expected = {f"--checkpointing {name}" for name in CHECKPOINTING if name != "none"}
    assert expected | {"--base_precision nf4", "--use_8bit_adam"} <= set(flags) and "--checkpointing none" not in flags
    # The bits of 11.8 billion weights.
    assert float(flags["--base_precision nf4"]) == pytest.approx(11.8e9 * (16 - 4) / 8 / 2**30, rel=0.05)
    accepted = "--no-cache_latents", *" ".join(flags).split()
    assert arguments(tmp_path, "unused", *accepted, data="unused").train_batch_size == 1
    everything = ["--checkpointing", "offload", "--base_precision", "nf4", "--train_batch_size", 1, "--use_8bit_adam"]
    assert "Every flag that saves memory is in use" in advice(*everything)


def test_bad_steps_leave_a_checkpoint_to_go_on_from(base_folder, triptych_folder, tmp_path, monkeypatch, caplog):
    compare, steps = trainer.compare, []

    def not_a_number_from_the_third(*args):
        steps.append(args)
        return compare(*args) * (float("nan") if 3 <= len(steps) <= 4 else 1)

    monkeypatch.setattr(trainer, "compare", not_a_number_from_the_third)
    more = ["--max_train_steps", 6, "--max_bad_steps", 2]
    with pytest.raises(RuntimeError, match=r"2 steps in a row .* rows \[\d, \d\].*checkpoint-4 holds the last good"):
        run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    assert caplog.text.count("skipped: loss nan") == 2
    good = run(base_folder, tmp_path / "good", "--max_train_steps", 2, data=triptych_folder)
    # The patched loss is good again for this run.
    for file in WEIGHTS:
        left = safetensors.torch.load_file(tmp_path / "out" / "checkpoint-4" / file)
        wanted = safetensors.torch.load_file(good / file)
        assert all(torch.equal(left[name], wanted[name]) for name in wanted)
    run(base_folder, tmp_path / "out", *more, "--resume_from_checkpoint", "latest", data=triptych_folder)


def spoil(monkeypatch, spoiled: dict) -> None:
    """Puts a run's losses, counted from 1, through functions."""
    compare, count = trainer.compare, itertools.count(1)

    def spoiled_compare(pred, *args):
        return spoiled.get(next(count), lambda loss: loss)(compare(pred, *args))

    monkeypatch.setattr(trainer, "compare", spoiled_compare)


def finite_without_gradient(loss):
    """The loss as it is, with gradients that are not a number."""
    return loss + (loss * 0).sqrt()


def with_scaler(monkeypatch, scale: float) -> list:
    """Has the next run compute as --mixed_precision fp16 does, which accelerate refuses on a CPU and PyTorch does not."""
    setup, made = trainer.setup, []

    def setup_and_scale(args):
        accelerator = setup(args)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        made.append(accelerator.scaler)
        return accelerator

    monkeypatch.setattr(trainer, "setup", setup_and_scale)
    return made


def test_gradients_that_are_not_finite_are_not_applied(base_folder, triptych_folder, tmp_path, monkeypatch, caplog):
    spoil(monkeypatch, {2: finite_without_gradient})
    more = ["--max_train_steps", 3, "--checkpointing_steps", 1]
    out = run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    assert len(re.findall(r"Step 2 skipped: loss \d\S+, gradient norm nan, rows \[\d, \d\]", caplog.text)) == 1
    first, second, third = (out / f"checkpoint-{step}" for step in (1, 2, 3))
    assert_same_result(second, first)
    state = "training_state.safetensors"
    assert (second / state).read_bytes() == (first / state).read_bytes()
    with pytest.raises(AssertionError):
        assert_same_result(third, second)


def test_overflow_is_the_gradient_scalers_until_it_is_down_to_1(
    base_folder, triptych_folder, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="train_semantic_fill_lora")
    # Several times in a row too much for float16.
    scalers = with_scaler(monkeypatch, 2.0**26)
    spoil(monkeypatch, {1: lambda loss: loss * math.nan})
    more = ["--max_train_steps", 20, "--checkpointing_steps", 20, "--max_bad_steps", 3]
    out = run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    overflows = caplog.text.count("its gradients overflowed")
    assert 3 < overflows < 19 and caplog.text.count("skipped: loss nan") == 1
    # The step without a finite loss says nothing of the scale.
    assert scalers[0].get_scale() == 2.0 ** (26 - overflows)
    assert any(w.abs().max() > 0 for n, w in safetensors.torch.load_file(out / WEIGHTS[0]).items() if "lora_B" in n)
    state = json.loads((out / "checkpoint-20" / "training_state.json").read_text())
    assert dict(dict(state["__dict__"])["scaler"]["__dict__"])["scale"] == scalers[0].get_scale()
    assert dict(dict(state["__dict__"])["lr_scheduler"]["__dict__"])["last_epoch"] == 20 - 1 - overflows
    # What was found out is not found out again.
    more[1] = 21
    run(base_folder, out, *more, "--resume_from_checkpoint", "latest", data=triptych_folder)
    assert scalers[1].get_scale() == scalers[0].get_scale() and caplog.text.count("overflowed") == overflows


def test_overflow_without_end_stops_the_run(base_folder, triptych_folder, tmp_path, monkeypatch):
    # Twice there is a scale to lower.
    scalers = with_scaler(monkeypatch, 4.0)
    spoil(monkeypatch, {step: finite_without_gradient for step in range(1, 10)})
    more = ["--max_train_steps", 9, "--max_bad_steps", 3]
    with pytest.raises(RuntimeError, match=r"3 steps in a row .*checkpoint-5 holds the last good weights"):
        run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    assert scalers[0].get_scale() == 1


def test_a_resumed_run_has_its_own_rates(base_folder, triptych_folder, tmp_path, monkeypatch):
    out, more = tmp_path / "out", ["--checkpointing_steps", 2, "--lr_scheduler", "linear"]
    run(base_folder, out, "--max_train_steps", 2, *more, data=triptych_folder)
    seen = []
    train = trainer.train

    def look(accelerator, model, optimizer, lr_scheduler, *args):
        seen.append([(group["lr"], group["weight_decay"], group["name"]) for group in optimizer.param_groups])
        assert lr_scheduler.last_epoch == 2 and optimizer.state_dict()["state"][0]["step"] == 2
        return train(accelerator, model, optimizer, lr_scheduler, *args)

    monkeypatch.setattr(trainer, "train", look)
    more += ["--resume_from_checkpoint", "latest", "--learning_rate", 1e-5, "--adam_weight_decay", 0.5]
    run(base_folder, out, "--max_train_steps", 4, *more, data=triptych_folder)
    # Half of the longer run's way down.
    rates = [
        (pytest.approx(rate / 2), 0.5, name) for rate, name in ((1e-5, "lora"), (1e-5, "module"), (1e-4, "scale"))
    ]
    assert seen == [rates]
    assert whole_checkpoints(out) == [2, 4]


@pytest.mark.parametrize(
    "options, before",
    [
        ("--rank 8", "with --rank 4"),
        ("--semantic_position rope", "with --semantic_position none"),
        ("--semantic_mode none", "with --semantic_mode cross_attention"),
        ("--optimizer prodigy", "with --optimizer adamw"),
        ("--lora_layers attn.to_k", "without --lora_layers"),
        ("--use_8bit_adam", "without --use_8bit_adam"),
    ],
)
def test_what_a_checkpoint_does_not_fit_is_refused_before_a_model_is_loaded(
    base_folder, triptych_folder, one_step, monkeypatch, options, before
):
    monkeypatch.setattr(trainer, "load_encoders", None)
    more = ["--resume_from_checkpoint", "latest", *options.split()]
    with pytest.raises(
        ValueError, match=f"checkpoint-1 was trained {before}, so that a run with {options} cannot go on"
    ):
        run(base_folder, one_step, *more, data=triptych_folder)


@pytest.fixture(scope="module")
def one_step(base_folder, triptych_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one_step") / "out"
    return run(base_folder, out, "--max_train_steps", 1, "--checkpointing_steps", 1, data=triptych_folder)


@pytest.mark.parametrize("file", WEIGHTS)
def test_damaged_weights_to_start_from_are_named(base_folder, one_step, tmp_path, file):
    folder = tmp_path / "start"
    shutil.copytree(one_step, folder)
    with open(folder / file, "r+b") as opened:
        opened.write(b"\xff")
    option = "--lora_weights" if file == WEIGHTS[0] else "--semantic_weights"
    args = arguments(base_folder, "unused", option, folder, data="unused")
    with pytest.raises(ValueError, match=f"{folder} holds no trained"):
        trainer.build_model(args, torch.device("cpu"), torch.float32)
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    with pytest.raises((OSError, ValueError), match=str(folder / file)):
        pipe.load_lora_weights(folder)
    assert pipe.semantic_attention is None and not pipe.get_active_adapters()


@pytest.mark.parametrize("folder", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_damaged_file_of_the_base_is_named(base_folder, tmp_path, folder):
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    (file,) = (base / folder).glob("*.safetensors")
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    args = arguments(base, "unused", data="unused")
    with pytest.raises((OSError, ValueError), match=str(file)):
        trainer.load_encoders(args, torch.device("cpu"), torch.float32)
        trainer.build_model(args, torch.device("cpu"), torch.float32)


def test_a_whole_checkpoint_stands_at_every_moment(one_step, tmp_path, monkeypatch):
    """With room for a single checkpoint: the next is on the disk, whole, before anything of it goes."""
    out = tmp_path / "out"
    shutil.copytree(one_step, out)
    args = arguments("unused", out, "--checkpoints_total_limit", 1, data="unused")
    flushed, moments = set(), []

    def save_weights(model, weights, folder, args):
        shutil.copytree(one_step / "checkpoint-1", folder)
        for name in ("manifest.json", "options.json", "training_state.json", "training_state.safetensors"):
            (folder / name).unlink()

    def look(function):
        def call(*args, **kwargs):
            moments.append(whole_checkpoints(out))
            result = function(*args, **kwargs)
            moments.append(whole_checkpoints(out))
            return result

        return call

    def replace(old, new, real=os.replace):
        if Path(new).name == "checkpoint-2":
            # All of it, its folders' names too.
            assert {path for path in (old, *Path(old).rglob("*"))} == flushed
        real(old, new)

    def fsync(number, real=os.fsync):
        flushed.add(Path(os.readlink(f"/proc/self/fd/{number}")))
        real(number)

    PartialState()
    monkeypatch.setattr(trainer, "save_weights", save_weights)
    monkeypatch.setattr(trainer, "fixed_options", lambda *args: {})
    monkeypatch.setattr(os, "replace", look(replace))
    monkeypatch.setattr(os, "fsync", look(fsync))
    monkeypatch.setattr(shutil, "rmtree", look(shutil.rmtree))
    trainer.save_checkpoint(None, {}, {"step": 2, "samples_seen": 4, "loss": 1.0}, args)
    assert out in flushed
    assert [1] in moments and moments[-1] == [2] and [] not in moments and [1, 2] in moments


def test_the_limit_never_removes_the_checkpoint_just_written(base_folder, triptych_folder, tmp_path):
    out, more = tmp_path / "out", ["--checkpointing_steps", 2]
    run(base_folder, out, "--max_train_steps", 6, *more, data=triptych_folder)
    for number in (4, 6):
        (out / f"checkpoint-{number}" / "training_state.json").write_text("{")
    more += ["--checkpoints_total_limit", 1, "--resume_from_checkpoint", "latest"]
    run(base_folder, out, "--max_train_steps", 4, *more, data=triptych_folder)
    assert whole_checkpoints(out) == [4]


@pytest.mark.parametrize("content", ["", "{", "[]", "1", "{}", '{"pytorch_lora_weights.safetensors": 3}'])
def test_a_damaged_manifest_is_no_checkpoint(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert trainer.checkpoint_damage(tmp_path) is not None


@pytest.mark.parametrize("damage", ["head", "content", "gone"])
def test_an_encoding_damaged_under_way_is_named(base_folder, triptych_folder, tmp_path, monkeypatch, damage):
    build_model, cache = trainer.build_model, tmp_path / "cache"

    def damage_and_build(*args):
        for path in cache.iterdir():
            content = bytearray(path.read_bytes())
            content[{"head": 0, "content": -1, "gone": 0}[damage]] ^= 1
            path.write_bytes(content)
            if damage == "gone":
                path.unlink()
        return build_model(*args)

    more = ["--cache_root", cache, "--max_train_steps", 1]
    with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
        patch.setattr(trainer, "build_model", damage_and_build)
        run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    (path,) = re.findall(r"The encoding (\S+) was damaged while the run was under way", str(error.value))
    assert Path(path).parent == cache and "go on with --resume_from_checkpoint latest" in str(error.value)
    run(base_folder, tmp_path / "out", *more, "--resume_from_checkpoint", "latest", data=triptych_folder)


def test_leftovers_of_killed_runs_go_after_a_day(base_folder, triptych_folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # As a kill: nothing tidies up.
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        trainer.write_atomically(cache / "a.safetensors", lambda path: path.write_bytes(b"half"))
    (left,) = cache.iterdir()
    others = [cache / "b.safetensors", cache / ".hidden", cache / f".b.safetensors.{'0' * 32}"]
    for path in others:
        path.write_bytes(b"of others")
    long_ago = time.time() - 25 * 60 * 60
    for path in (left, *others[:2]):
        os.utime(path, (long_ago, long_ago))
    run(base_folder, tmp_path / "out", "--cache_root", cache, "--max_train_steps", 1, data=triptych_folder)
    assert not left.exists() and all(path.exists() for path in others)


def test_a_flipped_bit_in_an_encoding_is_seen(tmp_path, caplog):
    tensors = {"a": torch.arange(8, dtype=torch.bfloat16), "b": torch.zeros(3)}
    path = tmp_path / "encoding.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"crc32": trainer.checksum(tensors)})
    assert trainer.is_whole(path)
    content = bytearray(path.read_bytes())
    PartialState()
    for place in (0, 9, len(content) - 1):
        damaged = content.copy()
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert not trainer.is_whole(path)
    assert caplog.text.count(f"{path} is damaged") == 3
    assert not trainer.is_whole(tmp_path / "missing")
