# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What a run sums up at its end: what it took, and which weights it leaves, for the log, the model card and the page."""

import contextlib
import math
import statistics
import time
from collections.abc import Iterator

from accelerate.logging import get_logger

from semantic_fill.checkpoints import BEST
from semantic_fill.memory import peak_memory
from semantic_fill.training_state import TrainingState, loss_labels, worth_labels


logger = get_logger(__name__)


class Stopwatch:
    """Seconds that the parts of a run took, counted from when it is made."""

    def __init__(self):
        self.begin = time.perf_counter()
        self.parts: dict[str, float] = {}
        self.steps: list[float] = []
        self.first_step, self.step_begin = math.nan, math.nan

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0) + time.perf_counter() - begin

    def start_step(self) -> None:
        self.step_begin = time.perf_counter()
        if not self.steps:
            self.first_step = self.step_begin - self.begin

    def end_step(self) -> None:
        self.steps.append(time.perf_counter() - self.step_begin)


def summarize(run) -> dict[str, str]:
    """What a `Run` took since it was started. Logs it, and returns it for the card and the page."""
    watch, device = run.stopwatch, run.engine.accelerator.device
    summary, decay = {}, run.options.ema_decay
    if decay is not None:
        summary["weights"] = (
            f"moving averages with a decay of {decay:g}, and the last ones in `checkpoint-{run.state.step}/`"
        )
    if watch.steps:
        # The first step also compiles, and chooses kernels.
        usual = statistics.median(watch.steps[1:] or watch.steps)
        encoding = f"{watch.parts.get('encoding', 0):.1f} s of them to encode"
        summary["time to the first step"] = f"{watch.first_step:.1f} s, {encoding}"
        summary["compile time"] = (
            f"{max(0, watch.steps[0] - usual):.1f} s, which the first step took beyond a usual one"
        )
        summary["steps a second"] = f"{1 / usual:.2f}, without validations and checkpoints"
    if "paintings" in watch.parts:
        measured = f"{watch.parts.get('held-out loss', 0):.1f} s for held-out losses"
        summary["validations"] = f"{measured}, {watch.parts['paintings']:.1f} s for paintings"
    memory = peak_memory(device)
    if memory is not None:
        summary["peak memory"] = f"{memory / 2**30:.1f} GiB of the {'GPU' if device.type == 'cuda' else 'process'}"
    summary["samples seen"] = str(run.state.samples_seen)
    logger.info(f"Summary: {'; '.join(f'{name} {value}' for name, value in summary.items())}")
    return summary


def describe_weights(state: TrainingState) -> str:
    """Which weights the output folder holds, and where the best are."""
    text = f"The weights are those of step {state.step}, the last one, whose training loss was {state.loss:.4f}."
    best, kept, count = state.best, state.kept, len(state.comparable)
    if best is None:
        return f"{text} No held-out loss was measured."
    if best["step"] == state.step:
        text += f" Their held-out loss, {best['loss']:.4f}, is the lowest of {count} validations."
    else:
        text += f" The lowest held-out loss of {count} validations is that of step {best['step']}."
    if kept is not None:
        text += f" `{BEST}/` holds the weights of step {kept['step']}, because their held-out loss was the lowest."
        text += f' `load_lora_weights` takes them with `subfolder="{BEST}"`.'
    return text


def describe_run(state: TrainingState, summary: dict[str, str]) -> str:
    """What a run found out, as markdown for the model card."""
    measured = [found for found in state.validations if found.get("loss") is not None]
    lines = [describe_weights(state), ""]
    if measured:
        last = measured[-1]
        names = {"step": "step", **loss_labels(last), **worth_labels(last, "what the map is worth")}
        lines += ["Held-out loss:", "", f"| {' | '.join(names.values())} |", "| --- " * len(names) + "|"]
        steps = {last["step"], *([state.best["step"]] if state.best else [])}
        for found in (validation for validation in measured if validation["step"] in steps):
            cells = ["not finite" if found.get(name) is None else f"{found[name]:.4f}" for name in list(names)[1:]]
            lines.append(f"| {found['step']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, *(f"- {name}: {value}" for name, value in summary.items()), ""])
