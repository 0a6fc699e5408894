# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Training at FLUX.1-Fill-dev's true size on several GPUs, under the launch files of `configs/`.

    python benchmarks/scaling.py --gpus 2 4 8 --engines ddp fsdp2 --output scaling.json

Each number of GPUs is measured against one GPU that takes the same samples a step by accumulation: samples a second
after --warm_up steps, the share of N times one GPU's, the memory of a GPU (its peak from the model's build on, and what
stays between two steps), and how far the losses of all steps are apart. Weights are random, drawn on the GPU from one
seed, and pictures are noise. Everything else is as in a user's run with cached encodings. On a machine without GPUs the
processes talk through gloo, and --shape test is small enough.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from flux_shape import build_encoders, build_transformer
from measurement import ROOT, Report, StepTracker, assemble, describe, find_device
from train_speed import noise_rows

import train_semantic_fill_lora as trainer
from semantic_fill.tables import TableSource


REFERENCE = "one_gpu"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    engines = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem != REFERENCE)
    parser.add_argument("--output", type=Path, default=Path("scaling.json"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[2], help="Numbers of GPUs, each above 1.")
    parser.add_argument("--engines", nargs="+", default=engines, choices=engines, help="Launch files of configs/.")
    parser.add_argument("--shape", choices=["flux", "test"], default="flux")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--warm_up", type=int, default=5, help="First steps that are not timed.")
    parser.add_argument("--batch", type=int, default=4, help="Samples a GPU and step.")
    parser.add_argument("--resolution", type=int, help="Pixels of one panel. Default: 512, or 32 with --shape test.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--checkpointing", default="full", help="As the trainer's option.")
    # Eager steps wait for the host, whose pace says nothing about the GPUs.
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="As the trainer's option. Default: yes, but not with --shape test.",
    )
    parser.add_argument(
        "--reference", type=Path, help="Report of an earlier run with the same options, instead of one GPU again."
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="No run is begun after so many, or lasts longer.")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.resolution = args.resolution or (512 if args.shape == "flux" else 32)
    args.compile = args.shape == "flux" if args.compile is None else args.compile
    if min(args.gpus) < 2 or not 0 < args.warm_up < args.steps:
        parser.error("--gpus have to be above 1, and --warm_up above 0 and below --steps.")
    return args


# -- One process of one run -------------------------------------------------------------------------------------------


class MemoryTracker(StepTracker):
    """Also records the memory that stays between two steps."""

    resident_gib = math.nan

    def log(self, values, step=None, **kwargs):
        super().log(values, step, **kwargs)
        if torch.cuda.is_available():
            self.resident_gib = torch.cuda.memory_allocated() / 2**30


def work(args: argparse.Namespace) -> None:
    """Runs the trainer with random weights and noise for pictures, and leaves this process's figures in `--worker`."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else None
    options = trainer.parse_args(json.loads((args.worker / "options.json").read_text()))

    def load_transformer(options: trainer.Options, load_device: torch.device, dtype: torch.dtype):
        if device is not None:
            torch.cuda.reset_peak_memory_stats(device)
        # Every process has to draw the same base.
        torch.manual_seed(1)
        transformer = build_transformer(args.shape, "bf16", load_device, dtype, drawn_on=device)
        torch.manual_seed(options.seed)
        return transformer

    dtype = torch.float32 if args.shape == "test" else torch.bfloat16
    pipeline = build_encoders(args.shape, device or torch.device("cpu"), dtype).to("cpu")
    source, tracker = TableSource(noise_rows(16, args.resolution), options), MemoryTracker()
    run = assemble(options, tracker, source=source, pipeline=pipeline, load_transformer=load_transformer)
    trainer.train(run)

    if device is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    else:
        peak = torch.cuda.max_memory_allocated(device)
    accelerator = run.engine.accelerator
    figures = {"times": tracker.times, "losses": tracker.losses, "resident_gib": tracker.resident_gib}
    path = args.worker / f"rank{accelerator.process_index}.json"
    path.write_text(json.dumps(figures | {"peak_gib": peak / 2**30}))
    accelerator.wait_for_everyone()
    accelerator.end_training()


# -- All runs ---------------------------------------------------------------------------------------------------------


def launch(
    config: str, processes: int, accumulate: int, cache: Path, seconds: float, args: argparse.Namespace
) -> dict:
    """One run of `accelerate launch`: its losses, samples a second, and the highest peak memory of its processes."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "pretrained_model_name_or_path": folder,
            # One of the data options is required. The workers make the rows.
            "dataset_name": "noise",
            "output_dir": Path(folder, "out"),
            "cache_root": cache,
            "resolution": args.resolution,
            "rank": args.rank,
            "train_batch_size": args.batch,
            "gradient_accumulation_steps": accumulate,
            "max_train_steps": args.steps,
            "checkpointing_steps": args.steps + 1,
            "checkpointing": args.checkpointing,
            "dataloader_num_workers": 2 if args.shape == "flux" else 0,
            "report_to": "none",
        }
        options = [f"--{name}={value}" for name, value in options.items()]
        options += ["--compile"] * args.compile + ["--mixed_precision=no"] * (args.shape == "test")
        Path(folder, "options.json").write_text(json.dumps(options))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", ROOT / "configs" / f"{config}.yaml", "--num_processes", processes]
        command += [__file__, "--worker", folder, "--shape", args.shape, "--resolution", args.resolution]
        # NVLink multicast hangs or fails on some virtualized hosts.
        env = os.environ | {"NCCL_NVLS_ENABLE": "0"}
        if not torch.cuda.is_available():
            env["ACCELERATE_USE_CPU"] = "true"
        started = time.perf_counter()
        log = Path(folder, "log")
        with open(log, "w") as file:
            try:
                subprocess.run(
                    [str(part) for part in command], env=env, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
                )
            except subprocess.TimeoutExpired:
                file.write(f"\nstopped after {seconds:.0f} s")
        ranks = [Path(folder, f"rank{rank}.json") for rank in range(processes)]
        # What the processes left decides, because gloo may abort one of them after its work.
        if not all(path.is_file() for path in ranks):
            raise RuntimeError(log.read_text()[-6000:])
        ranks = [json.loads(path.read_text()) for path in ranks]
    times = ranks[0]["times"]
    steps = [b - a for a, b in zip(times[args.warm_up - 1 :], times[args.warm_up :])]
    samples = args.batch * accumulate * processes
    return {
        "samples/s": samples * (args.steps - args.warm_up) / (times[-1] - times[args.warm_up - 1]),
        "ms a step, median": 1e3 * statistics.median(steps),
        "slowest": 1e3 * max(steps),
        "peak GiB a GPU": max(rank["peak_gib"] for rank in ranks),
        # Only the main process logs its steps. The others hold as much.
        "resident GiB a GPU": ranks[0]["resident_gib"],
        "losses": ranks[0]["losses"],
        "minutes": (time.perf_counter() - started) / 60,
    }


def measured_before(path: Path, row: dict, name: str) -> dict:
    """What `launch` returned for this row in the run that left the report."""
    report = json.loads(path.read_text())
    (found,) = [r for r in report["rows"] if row.items() <= r.items() and "samples/s" in r]
    return {k: found[k] for k in found if k not in (*row, "loss first", "loss last")} | {
        "losses": report["losses"][name]
    }


def main(args: argparse.Namespace) -> None:
    device = find_device()
    report = Report(args.output, describe(device) | {"nccl_nvls": "off"})
    start, losses = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as cache:
        for gpus in args.gpus:
            reference = None
            for engine in (REFERENCE, *args.engines):
                processes, accumulate = (1, gpus) if engine == REFERENCE else (gpus, 1)
                row = {"engine": engine, "GPUs": processes, "samples a step": args.batch * gpus}
                seconds = 60 * args.minutes - (time.perf_counter() - start)
                if seconds <= 0:
                    report.add(**row, result="no time left")
                    continue
                name = f"{engine} {processes}x{args.batch}x{accumulate}"
                try:
                    if engine == REFERENCE and args.reference:
                        result = measured_before(args.reference, row, name)
                    else:
                        result = launch(engine, processes, accumulate, Path(cache), seconds, args)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    report.add(**row, result="failed: " + str(error).strip().splitlines()[-1][:200])
                    continue
                curve = losses[name] = result.pop("losses")
                report.note(losses=losses)
                row |= {"loss first": curve[0], "loss last": curve[-1]}
                if engine == REFERENCE:
                    reference = result | {"losses": curve}
                elif reference is not None:
                    apart = [abs(a - b) / abs(b) for a, b in zip(curve, reference["losses"], strict=True)]
                    result["efficiency"] = result["samples/s"] / (gpus * reference["samples/s"])
                    for kind in ("peak", "resident"):
                        result[f"{kind} share"] = result[f"{kind} GiB a GPU"] / reference[f"{kind} GiB a GPU"]
                    row |= {"losses apart, mean": sum(apart) / len(apart), "losses apart, most": max(apart)}
                report.add(**row, **result)
    print(report.table())


if __name__ == "__main__":
    arguments = parse_args()
    work(arguments) if arguments.worker else main(arguments)
