# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Whether what `--fast` chooses fits the card: the trainer at FLUX.1-Fill-dev's true size with little memory left free.

    python benchmarks/cards.py --devices 0,1,2,3 --output cards.json
    python benchmarks/cards.py --gib 11.5 --row="7.6 --checkpointing offload --use_8bit_adam"

Each row is a run of the trainer's script on a GPU whose memory another process holds, but for the GiB of the row. The run
reads a folder of the true size, encodes, takes five steps, saves a checkpoint and paints. The process that holds the
memory also watches how much the GPU has left. So the peak is what the card had to have: tensors, the allocator's gaps, the
CUDA context, and compiled kernels. *Estimate* is what `--fast` expected.

The folder has the layout, files and sizes of FLUX.1-Fill-dev. Its weights are cut from 16 million random numbers, which
takes seconds, and memory and speed do not depend on them. It is made once and takes 34 GB.
"""

import argparse
import concurrent.futures
import json
import os
import queue
import re
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers import FluxFillPipeline
from flux_shape import empty_components, random_weight
from huggingface_hub import split_torch_state_dict_into_shards
from measurement import ROOT, Report, describe, find_device
from small_flux_fill import build_pipeline
from startup import make_triptychs


# The options of each card of the documents, by the GiB of a card of 8, 12, 16, 24 and 48 GiB that a desktop leaves free.
CARDS = {
    7.6: "--train_batch_size 1",
    11.5: "--train_batch_size 1",
    15.3: "--train_batch_size 1 --use_8bit_adam",
    23: "--train_batch_size 4",
    47: "--train_batch_size 4",
}
STEPS, SAMPLES = 5, 4
# How the files of a model's weights are called, where it is not `model`.
FILES = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, nargs="*", help=f"GiB left free, of {[*CARDS]}. Default: all of them.")
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="'GIB OPTIONS'",
        help='One more row, with options of the trainer, as in --row="11.5 --rank 64", and NAME=value for variables of the'
        " environment. 0 GiB leaves the GPU as it is.",
    )
    parser.add_argument("--devices", default="0", help="GPUs that rows are run on, one row at a time on each.")
    parser.add_argument("--folder", type=Path, help="Where base and results go and stay. Default: a temporary folder.")
    parser.add_argument("--script", type=Path, default=ROOT / "train_semantic_fill_lora.py", help="The trainer.")
    parser.add_argument("--minutes", type=float, default=60.0, help="No row is begun after so many.")
    parser.add_argument("--shape", choices=["flux", "test"], default="flux")
    parser.add_argument("--output", type=Path, default=Path("cards.json"))
    args = parser.parse_args(arguments)
    gib = args.gib if args.gib is not None else [] if args.row else [*CARDS]
    if unknown := [number for number in gib if number not in CARDS]:
        parser.error(f"--gib {unknown} are none of {[*CARDS]}: give such rows with their options, as --row.")
    rows = [(number, CARDS[number].split()) for number in gib]
    args.rows = rows + [(float(row.split()[0]), row.split()[1:]) for row in args.row]
    return args


# -- The base ---------------------------------------------------------------------------------------------------------


def random_bytes(shape: torch.Size, name: str = "weight") -> memoryview:
    weight = random_weight(torch.empty(shape, device="meta"), name, torch.device("cpu"), torch.bfloat16)
    return memoryview(weight.flatten().view(torch.uint8).numpy())


def cut_weight(key: str, shape: torch.Size, pool: memoryview) -> Iterator[memoryview]:
    """The bytes of a tensor. A matrix begins where its name says in the pool, which is repeated."""
    if len(shape) < 2:
        yield random_bytes(shape, key.rpartition(".")[-1])
        return
    left = 2 * shape.numel()
    start = zlib.crc32(key.encode()) % (len(pool) // 2) * 2
    while left:
        part = pool[start : start + left]
        yield part
        start, left = 0, left - len(part)


def write_shard(path: Path, shapes: dict[str, torch.Size], pool: memoryview) -> None:
    """A safetensors file, written without its tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, shape in shapes.items():
        end = offset + 2 * shape.numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, shape in shapes.items():
            file.writelines(cut_weight(key, shape, pool))


def write_base(folder: Path, shape: str) -> None:
    """A FLUX.1 Fill with random weights in bfloat16, as `from_pretrained` reads it."""
    pipeline = FluxFillPipeline(**empty_components()) if shape == "flux" else build_pipeline("test")
    pipeline.save_config(folder)
    jobs, pool = [], random_bytes(torch.Size((4096, 4096)))
    for name, component in pipeline.components.items():
        if not isinstance(component, nn.Module):
            # Components that are left out are `None`.
            if component is not None:
                component.save_pretrained(folder / name)
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        if name in FILES:
            component.save_config(folder / name)
        else:
            component.config.save_pretrained(folder / name)
        tied = getattr(component, "_tied_weights_keys", None) or ()
        weights = component.state_dict().items()
        tensors = {key: weight.to("meta", torch.bfloat16) for key, weight in weights if key not in tied}
        stem = FILES.get(name, "model")
        shards = split_torch_state_dict_into_shards(
            tensors,
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size="50KB" if shape == "test" else "10GB" if name == "transformer" else "5GB",
        )
        for file, keys in shards.filename_to_tensors.items():
            jobs.append((folder / name / file, {key: tensors[key].shape for key in keys}, pool))
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (folder / name / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    # Most of the time goes into writing, which threads do at the same time.
    with concurrent.futures.ThreadPoolExecutor() as threads:
        list(threads.map(write_shard, *zip(*jobs)))


# -- A row ------------------------------------------------------------------------------------------------------------


@contextmanager
def held(gib: float, environment: dict[str, str]) -> Iterator[dict]:
    """What `hold.py` reports, which leaves so many GiB of the GPU free. Empty without a GPU."""
    report = {}
    if not torch.cuda.is_available():
        yield report
        return
    command = [sys.executable, str(ROOT / "benchmarks" / "hold.py"), str(gib)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        report |= json.loads(process.stdout.readline())
        try:
            yield report
        finally:
            report |= json.loads(process.communicate()[0])


def launch(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Runs the trainer. Returns its exit code."""
    with open(log, "w") as file:
        return subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode


def run_row(gib: float, options: list[str], out: Path, args: argparse.Namespace, device: str) -> tuple[dict, dict]:
    """The figures of a run, and the memory that the GPU had in use in each of its seconds."""
    small = args.shape == "test"
    fixed = {
        "pretrained_model_name_or_path": args.folder / "base",
        "train_data_dir": args.folder / "data",
        "output_dir": out,
        "cache_root": out / "cache",
        "resolution": 32 if small else 512,
        "max_sequence_length": 16 if small else 512,
        "semantic_mode": "projection",
        "max_train_steps": STEPS,
        "checkpointing_steps": STEPS,
        "validation_steps": STEPS,
        "num_validation_images": 1,
        "validation_inference_steps": 4,
        "mixed_precision": "no" if small else "bf16",
        "report_to": "none",
    }
    command = [sys.executable, str(args.script), "--fast", *(f"--{name}={value}" for name, value in fixed.items())]
    variables = dict(option.split("=", 1) for option in options if not option.startswith("-") and "=" in option)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": device} | variables
    log, started = out.with_suffix(".log"), time.perf_counter()
    with held(gib, environment) as memory:
        command += [option for option in options if option.partition("=")[0] not in variables]
        code = launch(command, environment, log)
    figures = {"GiB free": memory.get("free", 0) / 2**30, "options": " ".join(options)}
    figures |= {"ended": how_it_ended(code, out, log.read_text()), **read_log(log.read_text())}
    figures |= {"peak GiB": memory.get("peak", 0) / 2**30, "s": time.perf_counter() - started}
    if figures["peak GiB"]:
        figures["estimate / peak"] = figures.get("estimate GiB", 0) / figures["peak GiB"]
    return figures, memory.get("GiB by second", {})


def how_it_ended(code: int, out: Path, log: str) -> str:
    """`well` for a run that left its weights, a checkpoint and a painting."""
    wanted = ("pytorch_lora_weights.safetensors", f"checkpoint-{STEPS}/*", "samples/*.png")
    missing = [pattern for pattern in wanted if not any(out.glob(pattern))]
    if code == 0 and not missing:
        return "well"
    errors = re.findall(r"\S*(?:Error|Exception)\b.*", log)
    return f"exit code {code}, without {missing}: {errors[-1][:200] if errors else log[-200:]}"


def read_log(log: str) -> dict:
    """What a run chose and expected, and the time of a step after the first."""
    found = {
        "chosen": r"--fast chose (.*?): ",
        "estimate GiB": r"Needed: .*? about ([\d.]+) GiB",
        "first step after s": r"time to the first step ([\d.]+) s",
        "steps/s": r"steps a second ([\d.]+)",
    }
    matches = {name: re.search(pattern, log) for name, pattern in found.items()}
    figures: dict = {name: match[1] for name, match in matches.items() if match}
    figures |= {name: float(value) for name, value in figures.items() if name != "chosen"}
    if "steps/s" in figures:
        figures["ms/step"] = 1e3 / figures.pop("steps/s")
    return figures


# -- All rows ---------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    report = Report(args.output, describe(find_device()))
    if not (args.folder / "base").exists():
        write_base(args.folder / "part", args.shape)
        make_triptychs(args.folder / "data", SAMPLES, args.shape == "test", "metadata")
        (args.folder / "part").rename(args.folder / "base")
        report.note(**{"making the base, s": time.perf_counter() - began})
    devices: queue.Queue[str] = queue.Queue()
    for device in args.devices.split(","):
        devices.put(device)

    def measure(number: int) -> None:
        (gib, options), device = args.rows[number], devices.get()
        try:
            if time.perf_counter() - began < 60 * args.minutes:
                figures, seconds = run_row(gib, options, args.folder / f"row{number}", args, device)
                report.note(**{f"GiB of row {number} by second": seconds})
                report.add(row=number, **figures)
        finally:
            devices.put(device)

    with concurrent.futures.ThreadPoolExecutor(devices.qsize()) as pool:
        list((pool.map if devices.qsize() > 1 else map)(measure, range(len(args.rows))))
    print(report.table())


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.folder:
        main(arguments)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            arguments.folder = Path(temporary)
            main(arguments)
