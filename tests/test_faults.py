# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Faults, injected into real runs: what is lost, what is said, and how the run continues."""

import errno
import json
import math
import multiprocessing.connection
import random
import re
import signal
from pathlib import Path

import forked_runs
import pytest
import torch
from forked_runs import Fail, Kill, LimitFileSize, Meet, Moment, Signal
from helpers import arguments, assert_same_weights, intact_checkpoints, run, spoil, weights_of

import train_semantic_fill_lora as trainer
from semantic_fill.checkpoints import claim_output_dir
from semantic_fill.encoding import is_intact


STEPS = 12
OPTIONS = (
    "--resolution 32 --rank 4 --max_sequence_length 16 --train_batch_size 2 --report_to none --mixed_precision no"
    " --lora_dropout 0.1 --random_flip --caption_dropout 0.3 --semantic_dropout 0.3 --checkpointing_steps 2"
    f" --checkpoints_total_limit 2 --max_train_steps {STEPS} --lr_scheduler linear"
).split()
KILLS = 30


@pytest.fixture(scope="module")
def runs():
    """Starts runs: `start` returns at once, `end` waits and returns the exit code."""
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


@pytest.fixture(scope="module")
def undisturbed(runs, base_folder, triptych_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert runs.end(base_folder, triptych_folder, out) == 0, said(out)
    assert any(weight.abs().max() > 0 for name, weight in weights_of(out).items() if "lora_B" in name)
    return out


def two_at_once(chains: list) -> list:
    """
    Drives generators, two at a time, and returns their results. They yield processes and are sent the exit codes. There
    are no threads, because two of them would both read the end of one process from the fork server.
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
    # Each chain is one run, which is killed once in each phase, and twice while stepping. Some steps are always left.
    latest = {
        "encoding": operations["encoding"],
        "step": 3,
        "checkpoint": a_checkpoint,
        "result": operations["result"],
        "card": operations["card"],
    }
    phases = ("encoding", "step", "checkpoint", "step", "result", "card")

    resume = ("--resume_from_checkpoint", "latest")

    def chain(number: int):
        chance, out = random.Random(number), tmp_path / str(number) / "out"
        killed = []
        for phase in phases:
            # Half of the kills come right at an operation, the others a little later.
            delay = chance.choice((0.0, chance.uniform(0.0, 0.02)))
            moment = Moment(phase, chance.randint(1, latest[phase]), Kill(delay))
            code = yield runs.start(base_folder, triptych_folder, out, *resume, moment=moment)
            assert code == -signal.SIGKILL, (moment, said(out))
            assert set(intact_checkpoints(out)) <= set(range(2, STEPS + 1, 2))
            killed.append(phase)
        code = yield runs.start(base_folder, triptych_folder, out, *resume)
        assert code == 0, said(out)
        assert_same_weights(out, undisturbed)
        assert intact_checkpoints(out) == [STEPS - 2, STEPS]
        # No temporary file is left, but in the cache, which other runs may use.
        assert {path.name for path in out.glob(".*")} <= {".lock"}
        assert "nan" not in (out / "README.md").read_text()
        return killed

    killed = sum(two_at_once([chain(number) for number in range(KILLS // len(phases))]), [])
    assert len(killed) == KILLS and set(killed) == set(forked_runs.PHASES)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_stopped_by_a_signal_and_resumed(runs, base_folder, triptych_folder, tmp_path, undisturbed, number):
    out = tmp_path / "out"
    moment = Moment("step", 5, Signal(number))
    assert runs.end(base_folder, triptych_folder, out, moment=moment) == 128 + number, said(out)
    assert "at step 5. Continue with --resume_from_checkpoint latest." in said(out)
    assert intact_checkpoints(out) == [4, 5]
    assert runs.end(base_folder, triptych_folder, out, "--resume_from_checkpoint", "latest") == 0, said(out)
    assert_same_weights(out, undisturbed)


@pytest.mark.parametrize("phase, times, left", [("step", 2, [2, 4]), ("encoding", 1, [])])
def test_a_second_signal_and_one_while_encoding_end_the_run_at_once(
    runs, base_folder, triptych_folder, tmp_path, undisturbed, phase, times, left
):
    out = tmp_path / "out"
    moment = Moment(phase, 5, Signal(signal.SIGTERM, times))
    assert runs.end(base_folder, triptych_folder, out, moment=moment) == -signal.SIGTERM, said(out)
    assert intact_checkpoints(out) == left
    assert runs.end(base_folder, triptych_folder, out, "--resume_from_checkpoint", "latest") == 0, said(out)
    assert_same_weights(out, undisturbed)


# The second checkpoint is too long for the system, or fails at its third operation.
@pytest.mark.parametrize(
    "phase, count, action, error",
    [
        ("checkpoint", 1, LimitFileSize(100_000), "File too large"),
        ("checkpoint", 3, Fail(errno.ENOSPC), "No space left on device"),
        ("checkpoint", 3, Fail(errno.EROFS), "Read-only file system"),
        ("result", 1, Fail(errno.ENOSPC), "No space left on device"),
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
    assert "elsewhere with --output_dir" in last_line and "continue with --resume_from_checkpoint latest" in last_line
    assert intact_checkpoints(out) == ([2] if phase == "checkpoint" else [STEPS - 2, STEPS])
    assert not [path for path in out.iterdir() if path.name.endswith(".part")]
    assert runs.end(base_folder, triptych_folder, out, "--resume_from_checkpoint", "latest") == 0, said(out)
    assert_same_weights(out, undisturbed)


def test_full_disk_while_encoding(runs, base_folder, triptych_folder, tmp_path, undisturbed):
    out, cache = tmp_path / "out", tmp_path / "cache"
    # Some encodings are made by then, and some are still to make.
    half = json.loads(Path(f"{undisturbed}.log.json").read_text())["encoding"] // 2
    moment = Moment("encoding", half, Fail(errno.ENOSPC))
    code = runs.end(base_folder, triptych_folder, out, "--cache_root", cache, moment=moment)
    last_line = said(out).strip().splitlines()[-1]
    assert code == 1 and "No space left" in last_line and "elsewhere with --cache_root" in last_line
    assert not list(out.glob("checkpoint-*")) and not [path for path in cache.iterdir() if path.name.startswith(".")]
    assert runs.end(base_folder, triptych_folder, out, "--cache_root", cache) == 0, said(out)
    assert re.search(r"Encodings: [1-9]\d* found", said(out))
    assert_same_weights(out, undisturbed)


@pytest.mark.parametrize("folder", ["a file/out", "/proc/out"])
def test_output_that_cannot_be_written(tmp_path, folder):
    (tmp_path / "a file").touch()
    options = arguments("unused", tmp_path / folder, data="unused")
    with pytest.raises(RuntimeError, match="Writing failed: .*out.* elsewhere with --output_dir"):
        claim_output_dir(options)


def test_two_runs_in_one_folder_are_refused(runs, base_folder, triptych_folder, tmp_path, undisturbed):
    out, marks = tmp_path / "out", tmp_path / "marks"
    marks.mkdir()
    first = runs.start(base_folder, triptych_folder, out, moment=Moment("step", 3, Meet(str(marks), 2)))
    while first.is_alive() and not list(marks.iterdir()):
        first.join(0.01)
    second = tmp_path / "second"
    # It is the same folder by another name.
    second.symlink_to(out)
    assert runs.end(base_folder, triptych_folder, second, "--resume_from_checkpoint", "latest") == 1
    assert f"ValueError: --output_dir {second} is in use by another run." in said(second)
    (marks / "go on").touch()
    first.join(120)
    assert first.exitcode == 0, said(out)
    assert_same_weights(out, undisturbed)
    # A later run that does not continue the first is refused too.
    assert runs.end(base_folder, triptych_folder, out) == 1
    assert "holds checkpoints of an earlier run" in said(out)
    assert_same_weights(out, undisturbed)


def test_two_runs_share_one_cache_at_once(runs, base_folder, triptych_folder, tmp_path, undisturbed):
    cache, marks = tmp_path / "cache", tmp_path / "marks"
    marks.mkdir()
    # Both have listed what is missing, and made some of it, before either of them continues.
    moment = Moment("encoding", 5, Meet(str(marks), 2))
    outs = [tmp_path / name for name in ("first", "second")]
    both = [runs.start(base_folder, triptych_folder, out, "--cache_root", cache, moment=moment) for out in outs]
    for process, out in zip(both, outs):
        process.join(120)
        assert process.exitcode == 0, said(out)
        assert_same_weights(out, undisturbed)
    encodings = list(cache.glob("*.safetensors"))
    assert all(is_intact(path) for path in encodings) and len(encodings) == 27
    # Beside them is what later starts need not check again.
    assert {path.name for path in cache.iterdir()} - {path.name for path in encodings} == {
        "checked.json",
        "intact.json",
    }


# -- In this process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_out_of_memory_says_what_saves_how_much(base_folder, triptych_folder, tmp_path, monkeypatch, cached):
    def too_much(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "compare", too_much)
    flag = "--cache_latents" if cached else "--no-cache_latents"
    with pytest.raises(torch.OutOfMemoryError) as error:
        run(base_folder, tmp_path / "out", "--max_train_steps", 1, flag, data=triptych_folder)
    message = str(error.value)
    assert message.startswith("CUDA out of memory.\nA step needs about ")
    assert ("\n  --cache_latents: about" in message) != cached


def test_bad_steps_leave_a_checkpoint_to_go_on_from(base_folder, triptych_folder, tmp_path, monkeypatch, caplog):
    # The first run ends with its fourth loss, so the losses of the later ones are good.
    spoil(monkeypatch, dict.fromkeys((3, 4), lambda loss: loss * math.nan))
    more = ["--max_train_steps", 6, "--max_bad_steps", 2]
    with pytest.raises(RuntimeError, match=r"2 steps in a row .* rows \[\d, \d\].*checkpoint-4 holds the last good"):
        run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    assert caplog.text.count("skipped: loss nan") == 2
    good = run(base_folder, tmp_path / "good", "--max_train_steps", 2, data=triptych_folder)
    assert_same_weights(tmp_path / "out" / "checkpoint-4", good)
    run(base_folder, tmp_path / "out", *more, "--resume_from_checkpoint", "latest", data=triptych_folder)
    assert caplog.text.count("skipped: loss nan") == 2


def finite_without_gradient(loss):
    """A loss of the same value, whose gradients are not a number."""
    return loss + (loss * 0).sqrt()


def with_scaler(monkeypatch, scale: float) -> list:
    """Makes runs compute as with --mixed_precision fp16, which accelerate refuses on a CPU and PyTorch does not."""
    setup, made = trainer.setup, []

    def setup_and_scale(options):
        accelerator = setup(options)
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
    assert_same_weights(second, first)
    state = "training_state.safetensors"
    assert (second / state).read_bytes() == (first / state).read_bytes()
    with pytest.raises(AssertionError):
        assert_same_weights(third, second)


def test_overflow_is_the_gradient_scalers_until_it_is_down_to_1(
    base_folder, triptych_folder, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", logger="semantic_fill")
    # The gradients overflow float16 several times in a row.
    scalers = with_scaler(monkeypatch, 2.0**26)
    spoil(monkeypatch, {1: lambda loss: loss * math.nan})
    more = ["--max_train_steps", 20, "--checkpointing_steps", 20, "--max_bad_steps", 3]
    out = run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    overflows = caplog.text.count("its gradients overflowed")
    assert 3 < overflows < 19 and caplog.text.count("skipped: loss nan") == 1
    # A step without a finite loss does not change the scale.
    assert scalers[0].get_scale() == 2.0 ** (26 - overflows)
    assert any(w.abs().max() > 0 for n, w in weights_of(out).items() if "lora_B" in n)
    state = json.loads((out / "checkpoint-20" / "training_state.json").read_text())
    assert dict(dict(state["__dict__"])["scaler"]["__dict__"])["scale"] == scalers[0].get_scale()
    assert dict(dict(state["__dict__"])["lr_scheduler"]["__dict__"])["last_epoch"] == 20 - 1 - overflows
    # A continued run does not search for the scale again.
    more[1] = 21
    run(base_folder, out, *more, "--resume_from_checkpoint", "latest", data=triptych_folder)
    assert scalers[1].get_scale() == scalers[0].get_scale() and caplog.text.count("overflowed") == overflows


def test_overflow_without_end_stops_the_run(base_folder, triptych_folder, tmp_path, monkeypatch):
    # The scale can be lowered twice.
    scalers = with_scaler(monkeypatch, 4.0)
    spoil(monkeypatch, {step: finite_without_gradient for step in range(1, 10)})
    more = ["--max_train_steps", 9, "--max_bad_steps", 3]
    with pytest.raises(RuntimeError, match=r"3 steps in a row .*checkpoint-5 holds the last good weights"):
        run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    assert scalers[0].get_scale() == 1
