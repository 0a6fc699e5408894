# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What `--aspect_buckets` is worth for samples of several shapes, against cropping all of them to one.

    python benchmarks/buckets.py --output_dir buckets

Views of the Earth are cut to the shapes 2:1, 1:1 and 1:2, a third of them each. Both kinds of run train on all of them.
Held-out samples of the three shapes are then painted by both, whole, as a user would.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import PIL.Image
from measurement import ROOT


import earth  # isort: skip: the line before makes examples/ importable.


SHAPES = ((2, 1), (1, 1), (1, 2))


def write_shapes(folder: Path, split: str, count: int, size: int) -> None:
    """Triptychs whose views are the middles of square ones, in turn of each shape. Longer sides are `size` pixels."""
    folder.mkdir(parents=True)
    for index, (left, top, right, bottom) in enumerate(earth.draw_boxes(split, count, 0, size)):
        wide, high = SHAPES[index % len(SHAPES)]
        x, y = ((right - left) * (1 - side / max(wide, high)) / 2 for side in (wide, high))
        width, height = (size * side // max(wide, high) for side in (wide, high))
        triptych = PIL.Image.new("RGB", (3 * width, height))
        for place, view in enumerate(
            (earth.load_earth().hillshade, earth.load_earth().satellite, earth.load_earth().map)
        ):
            # The colors of the map are labels, which must not be blended.
            resample = PIL.Image.Resampling.NEAREST if place == 2 else PIL.Image.Resampling.LANCZOS
            box = (left + x, top + y, right - x, bottom - y)
            triptych.paste(view.resize((width, height), resample, box=box), (place * width, 0))
        triptych.save(folder / f"{index:05d}.png")


def train(args: argparse.Namespace, out: Path, *more: object) -> None:
    command = [sys.executable, ROOT / "train_semantic_fill_lora.py", "--pretrained_model_name_or_path", args.base]
    command += ["--train_data_dir", args.output_dir / "train", "--instance_prompt", earth.PROMPT, "--output_dir", out]
    command += ["--resolution", args.resolution, "--max_sequence_length", 32, "--semantic_mode", "projection"]
    command += ["--train_batch_size", args.batch, "--loss_region", "target", "--learning_rate", 3e-3]
    command += [
        "--max_train_steps",
        args.steps,
        "--report_to",
        "none",
        "--cache_root",
        args.output_dir / "cache",
        *more,
    ]
    subprocess.run(list(map(str, command)), check=True)


def measure(args: argparse.Namespace, trained: Path) -> float:
    """PSNR of paintings of the held-out samples, each in its own shape, in dB."""
    command = [sys.executable, "-m", "semantic_fill.evaluate", "--pretrained_model_name_or_path", args.base]
    command += ["--trained", trained, "--train_data_dir", args.output_dir / "test", "--instance_prompt", earth.PROMPT]
    command += ["--resolution", args.resolution, "--aspect_buckets", "--maps", "right", "--metrics", "psnr"]
    command += ["--num_inference_steps", 8, "--batch_size", 16, "--output_dir", trained / "evaluation"]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT)
    return json.loads((trained / "evaluation" / "evaluation.json").read_text())["figures"]["right"]["psnr"]


def main(args: argparse.Namespace) -> None:
    for split, count in (("train", args.num_train), ("test", args.num_test)):
        write_shapes(args.output_dir / split, split, count, args.resolution * 3 // 2)
    found: dict[str, list[float]] = {"cropped": [], "buckets": []}
    for seed in range(args.seeds):
        for name, shapes in (("cropped", []), ("buckets", ["--aspect_buckets"])):
            trained = (args.output_dir / f"{name}-{seed}").absolute()
            train(args, trained, *shapes, "--seed", seed)
            found[name].append(measure(args, trained))
    gains = [buckets - cropped for buckets, cropped in zip(found["buckets"], found["cropped"])]
    print("| seed | cropped, dB | buckets, dB | gain |\n| --- | --- | --- | --- |")
    for seed, row in enumerate(zip(found["cropped"], found["buckets"], gains)):
        print(f"| {seed} | {' | '.join(f'{value:.2f}' for value in row)} |")
    print(f"Mean gain: {statistics.mean(gains):.2f} dB")


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="New folder for data and runs.")
    parser.add_argument("--base", default=str(ROOT / "examples" / "base"))
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--num_train", type=int, default=240)
    parser.add_argument("--num_test", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    return parser.parse_args(args)


if __name__ == "__main__":
    main(parse_args())
