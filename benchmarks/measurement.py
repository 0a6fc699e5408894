# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks measure with: runs of the trainer whose steps are timed, the clock, memory, and the report."""

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.tracking import GeneralTracker


ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import train_semantic_fill_lora as trainer  # noqa: E402
from semantic_fill.engines import find_engine  # noqa: E402


Result = TypeVar("Result")


# -- Runs -------------------------------------------------------------------------------------------------------------


class StepTracker(GeneralTracker):
    """
    Records when each optimizer step of a run was logged, and its loss. The trainer logs a step right after the host has
    read the step's loss, so the device is through with forward and backward by then, and the time from one entry to the
    next is that of a whole step.
    """

    name = "steps"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.times, self.losses = [], []

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **kwargs):
        self.times.append(time.perf_counter())
        self.losses.append(values["loss"])

    def seconds(self, warm_up: int) -> list[float]:
        """Seconds of each step after the first `warm_up`, which is at least 1."""
        return [b - a for a, b in zip(self.times[warm_up - 1 :], self.times[warm_up:])]


def fresh_state() -> None:
    """Resets accelerate's state, a singleton, so that one process can make several accelerators."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def assemble(options: trainer.Options, tracker: GeneralTracker, **kwargs) -> trainer.Run:
    """The run that the trainer makes of `options` and `kwargs`, with its steps logged to `tracker`."""
    fresh_state()
    accelerator = trainer.setup(options, log_with=tracker)
    accelerator.init_trackers("benchmark")
    return trainer.assemble(options, find_engine(accelerator, options), **kwargs)


# -- Time and memory ----------------------------------------------------------------------------------------------------


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gemm_peak(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Floating point operations a second of one large square product, by which the shortest possible time is reckoned."""
    if device.type != "cuda":
        size = 128
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [timed(lambda: [a @ b for _ in range(5)], device)[1] / 5 for _ in range(20)]
    return 2 * size**3 / statistics.median(times[5:])


def timed(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a function returns, and the seconds until the device is through with it."""
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")


def step_figures(seconds: list[float], batch: int, device: torch.device) -> dict[str, float]:
    """The median of timed steps of `batch` samples, their range relative to it, and the peak memory until now."""
    second = statistics.median(seconds)
    return {
        "samples/s": batch / second,
        "ms/step": 1e3 * second,
        "spread": (max(seconds) - min(seconds)) / second,
        "peak GiB": peak_gib(device),
    }


def describe(device: torch.device) -> dict:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    packages = ("torch", "diffusers", "transformers", "peft", "accelerate")
    return {"device": gpu, "command": " ".join(sys.argv)} | {name: version(name) for name in packages}


# -- Report -----------------------------------------------------------------------------------------------------------


class Report:
    """Rows of a table, written as JSON after each of them, and printed at the end."""

    def __init__(self, path: Path, about: dict):
        self.path, self.about, self.rows, self.more = path, about, [], {}
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, **row) -> None:
        self.rows.append(row)
        self.save()
        print(f"[{time.strftime('%H:%M:%S')}] " + ", ".join(f"{k} {shown(v)}" for k, v in row.items()), flush=True)

    def note(self, **facts) -> None:
        self.more |= facts
        self.save()

    def save(self) -> None:
        self.path.write_text(json.dumps({"about": self.about, "rows": self.rows} | self.more, indent=1))

    def table(self) -> str:
        return markdown(self.rows)


def markdown(rows: list[dict]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([shown(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def shown(value) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
