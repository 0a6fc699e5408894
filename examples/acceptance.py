# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Tries the trainer on the real FLUX.1-Fill-dev, and prints a report to paste into an issue.

    hf auth login    # with an account that has accepted the license of FLUX.1-Fill-dev
    python examples/acceptance.py

One GPU of 24 GiB or more and 40 GB of disk are needed. The script fetches a public data set, makes views of it, trains 500
steps without a map and with `projection`, and measures both with the right map, a wrong one and none. A part that fails
is told in the report and costs no other.

Nobody has run this on the real weights yet. The data set, `huggan/facades`, has 606 photographs of house fronts and their
label maps in the columns `imageA` and `imageB`, according to its page. It could not be fetched where this was written, so
look at the views in `acceptance/train` before you trust the figures. `--dataset_name` and `--columns` name another.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
import torch
from datasets import load_dataset

from semantic_fill.training_state import LOSS_LABELS


ROOT = Path(__file__).resolve().parent.parent
MODES = ("none", "projection")
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")
# With less memory than this, the transformer and the encoders are not on the GPU together while it paints.
ROOMY = 40 * 2**30
# What a model card says of a run that the report repeats.
SUMMARY = ("time to the first step", "compile time", "steps a second", "peak memory", "samples seen")
CHOSEN = ("base_precision", "checkpointing", "compile", "train_batch_size", "attention_backend", "use_8bit_adam")


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="black-forest-labs/FLUX.1-Fill-dev")
    parser.add_argument("--dataset_name", default="huggan/facades")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--columns", nargs=2, default=("imageA", "imageB"), help="Picture and map. The map has fewer colors."
    )
    parser.add_argument("--prompt", default="a photograph of the front of a building")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--num_test", type=int, default=16, help="Rows that are held out.")
    parser.add_argument("--num_inference_steps", type=int, default=28)
    parser.add_argument("--output_dir", type=Path, default=Path("acceptance"))
    return parser.parse_args(args)


# -- Data -------------------------------------------------------------------------------------------------------------


def count_colors(picture: PIL.Image.Image) -> int:
    """Number of colors of 3 bits a channel, which the noise of a JPEG file hardly raises."""
    return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3) >> 5, axis=0))


def draw_sketch(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Dark lines on white where a picture has edges."""
    edges = picture.convert("L").filter(PIL.ImageFilter.GaussianBlur(1)).filter(PIL.ImageFilter.FIND_EDGES)
    return PIL.ImageOps.invert(PIL.ImageOps.autocontrast(edges)).convert("RGB")


def write_views(args: argparse.Namespace) -> dict[str, int]:
    """Writes the folders `train` and `test`: sketch, picture and map of each row. Returns the number of rows in each."""
    rows = load_dataset(args.dataset_name, split=args.split)
    if not 0 < args.num_test < len(rows):
        raise ValueError(f"--num_test has to be between 1 and {len(rows) - 1} but is {args.num_test}.")
    colors = {name: sum(count_colors(rows[i][name]) for i in range(min(8, len(rows)))) for name in args.columns}
    semantic, target = sorted(colors, key=colors.__getitem__)
    print(f"{args.dataset_name}: {len(rows)} rows. {semantic} has fewer colors than {target}, so it is the map.")
    held_out = {index * len(rows) // args.num_test for index in range(args.num_test)}
    for index, row in enumerate(rows):
        folder = args.output_dir / ("test" if index in held_out else "train")
        picture = row[target].convert("RGB")
        views = {"visible": draw_sketch(picture), "target": picture, "semantic": row[semantic].convert("RGB")}
        for name, view in views.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            view.save(folder / name / f"{index:05d}.png")
    return {"train": len(rows) - len(held_out), "test": len(held_out)}


# -- Run --------------------------------------------------------------------------------------------------------------


def run_program(*command) -> None:
    """A program in a process of its own, so that all of its memory is free after it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, command)], check=True, env=environment)


def train(mode: str, args: argparse.Namespace) -> None:
    folder, on_gpu = args.output_dir, torch.cuda.is_available()
    options = (
        f"--resolution {args.resolution} --rank {args.rank} --max_train_steps {args.steps} --semantic_mode {mode}"
    )
    options += f" --validation_steps {args.steps} --validation_inference_steps {args.num_inference_steps}"
    options += " --report_to none --overwrite_output_dir --mixed_precision " + ("bf16 --fast" if on_gpu else "no")
    run_program(
        *(ROOT / "train_semantic_fill_lora.py", "--pretrained_model_name_or_path", args.base, *options.split()),
        *("--train_data_dir", folder / "train", "--validation_data_dir", folder / "test"),
        *("--instance_prompt", args.prompt, "--cache_root", folder / "cache", "--output_dir", folder / mode),
    )


def evaluate(mode: str, args: argparse.Namespace) -> None:
    folder, on_gpu = args.output_dir, torch.cuda.is_available()
    offload = ["--offload"] * (on_gpu and torch.cuda.get_device_properties(0).total_memory < ROOMY)
    run_program(
        *("-m", "semantic_fill.evaluate", "--pretrained_model_name_or_path", args.base, "--trained", folder / mode),
        *("--train_data_dir", folder / "test", "--instance_prompt", args.prompt, "--metrics", "psnr", "ssim"),
        *("--num_inference_steps", args.num_inference_steps, "--output_dir", folder / f"evaluation-{mode}", *offload),
    )


# -- Report -----------------------------------------------------------------------------------------------------------


def describe_machine() -> list[str]:
    gpu = "no GPU"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return [gpu, f"commit {commit}", *(f"{name} {found}" for name in PACKAGES if (found := find_version(name)))]


def find_version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def describe_training(folder: Path) -> list[str]:
    """Lines of what the run's card and its last validation say."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^- `?([a-z0-9_ ]+)`?: (.+)$", card, re.MULTILINE))
    lines = [f"- {name}: {said[name]}" for name in (*SUMMARY, *CHOSEN) if name in said]
    losses = json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])
    found = [f"{losses[name]:.4f} ({label})" for name, label in LOSS_LABELS.items() if losses.get(name) is not None]
    return [*lines, f"- held-out loss: {', '.join(found)}"]


def describe_evaluation(folder: Path) -> list[str]:
    return ["", *(folder / "evaluation.md").read_text(encoding="utf-8").splitlines(), ""]


def main(args: argparse.Namespace) -> bool:
    """Runs all parts and prints the report. Returns whether none of them failed."""
    failed = False
    counts = write_views(args)
    report = ["## Acceptance run", "", f"- {'; '.join(describe_machine())}"]
    report += [f"- base {args.base}; data {args.dataset_name}, {counts['train']} rows, {counts['test']} held out"]
    report += [f"- {args.steps} steps at {args.resolution} pixels, rank {args.rank}"]
    for mode in MODES:
        report += ["", f"### `{mode}`", ""]
        trained, evaluated = args.output_dir / mode, args.output_dir / f"evaluation-{mode}"
        for part, describe, folder in (
            (train, describe_training, trained),
            (evaluate, describe_evaluation, evaluated),
        ):
            start = time.monotonic()
            try:
                part(mode, args)
                report += describe(folder)
            except Exception as error:
                failed = True
                report += [f"- FAILED: {type(error).__name__}: {error}"]
                break
            finally:
                report += [f"- minutes to {part.__name__}: {(time.monotonic() - start) / 60:.1f}"]
    text = "\n".join(report) + "\n"
    (args.output_dir / "report.md").write_text(text, encoding="utf-8")
    print(f"\nPaste this into an issue, with pictures of {args.output_dir}:\n\n{text}")
    return not failed


if __name__ == "__main__":
    sys.exit(not main(parse_args()))
