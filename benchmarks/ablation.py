# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Every way for the map to enter, at equal steps, rank and data, on up to three tasks.

    python examples/earth.py --output_dir earth
    python benchmarks/emoji.py --output_dir emoji
    python examples/train_base.py --output_dir emoji/base --base examples/base --train_data_dir emoji/train \\
        --test_data_dir emoji/test --views glyph 3d --resolution 96
    python benchmarks/ablation.py --jobs 24

The third task are streets by day and night in thermal, from a folder with `train` and `test`, whose views `docs/data.md`
tells how to get, on a base that was trained on other scenes:

    python benchmarks/ablation.py --tasks thermal --thermal street --thermal_base street/model --num_test 69 --jobs 24

Each cell (task, variant, seed) is a run of the trainer. It then paints held-out pictures with the right map, with another
picture's and with none. Cells are shared out over `--jobs` processes. Time a step and peak memory are measured afterwards,
one variant at a time. `--figures FOLDER` draws learning curves, what the map is worth, and where painted places look in it.
"""

import argparse
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Variant:
    """
    One way for the map to enter.

    Args:
        options (`str`): Options of the trainer.
        module (`str`, *optional*): Class in `variants.py` that replaces the trainer's module.
        steps (`int`): Factor for the number of steps.
        paint_scale (`float`): The pipeline's `semantic_scale`.
        weighs (`bool`): Whether it chooses among places of the map, so that there is attention to draw.
    """

    options: str = ""
    module: str | None = None
    steps: int = 1
    paint_scale: float = 1.0
    weighs: bool = False


NONE, ROPE, TWO_LAYERS = "--semantic_position none", "--semantic_position rope", "--semantic_num_layers 2"
PROJECTION = "--semantic_mode projection"
VARIANTS = {
    "none": Variant("--semantic_mode none"),
    "pixel_fusion": Variant("--semantic_mode pixel_fusion"),
    "in_context": Variant("--semantic_mode in_context"),
    "cross_attention, none": Variant(NONE, weighs=True),
    "cross_attention, none, 2 layers": Variant(f"{NONE} {TWO_LAYERS}"),
    "cross_attention, rope": Variant(ROPE, weighs=True),
    "cross_attention, rope, 2 layers": Variant(f"{ROPE} {TWO_LAYERS}"),
    "projection": Variant(PROJECTION),
    "projection, painted at 1.25": Variant(PROJECTION, paint_scale=1.25),
    "projection, painted at 1.5": Variant(PROJECTION, paint_scale=1.5),
    "projection, 3 x the steps": Variant(PROJECTION, steps=3),
    "projection on the noise": Variant(PROJECTION, "ProjectionOnNoise"),
    "aligned": Variant(NONE, "Aligned"),
    "condition, none": Variant(NONE, "AttentionFromCondition", weighs=True),
    "condition, rope": Variant(ROPE, "AttentionFromCondition", weighs=True),
    "condition, aligned": Variant(NONE, "AlignedFromCondition"),
    "condition, aligned, 2 layers": Variant(f"{NONE} {TWO_LAYERS}", "AlignedFromCondition"),
    "condition, aligned, 3 x the steps": Variant(NONE, "AlignedFromCondition", steps=3),
    "in_context, 3 x the steps": Variant("--semantic_mode in_context", steps=3),
    "causal": Variant(f"{PROJECTION} --visible_attention causal"),
    "causal, no gradients": Variant(f"{PROJECTION} --visible_attention causal --no-visible_gradients"),
}
# The variants that --figures compares. Each has one color in all panels.
COMPARED = (
    "none",
    "pixel_fusion",
    "in_context",
    "cross_attention, none",
    "cross_attention, rope",
    "condition, rope",
    "condition, aligned",
    "projection",
)
# The columns of a row that `cells.draw_attention_row` draws.
ATTENTION_COLUMNS = ("visible", "map", "painted", "target", "attention at 1/4", "attention at 1/2", "attention at 3/4")


def file_stem(variant: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", variant)


def attention_row_path(folder: Path, task: str, variant: str) -> Path:
    return folder / f"attention-{task}-{file_stem(variant)}.png"


# -- Workers ----------------------------------------------------------------------------------------------------------


def share_of_gpus(number: int, devices: int) -> str:
    """The GPU of a worker, among those that this run may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
    return visible.split(",")[number % devices]


def start_worker(numbers, devices: int) -> None:
    number = numbers.get()
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = share_of_gpus(number, devices)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    logging.disable(logging.WARNING)


def call(function: str, *args) -> dict:
    """Calls a function of `cells.py`, which a worker may import only once it knows its GPU."""
    import cells

    return getattr(cells, function)(*args)


def run_all(
    function: str, cells: list[tuple], jobs: int, devices: int, args, output: Path, cells_a_process: int | None = None
) -> None:
    """Shares cells, which are a function's arguments, out over processes, and writes each row when it is there."""
    # For the workers' own bars. This process has read it already.
    os.environ["TQDM_DISABLE"] = "1"
    context = multiprocessing.get_context("spawn")
    numbers = context.Manager().Queue()
    for number in range(jobs if cells_a_process is None else len(cells) + jobs):
        numbers.put(number)
    with ProcessPoolExecutor(
        jobs, context, start_worker, (numbers, devices), max_tasks_per_child=cells_a_process
    ) as pool:
        futures = {pool.submit(call, function, *cell, args): cell[:3] for cell in cells}
        for future in tqdm(as_completed(futures), total=len(futures), mininterval=10):
            try:
                row = future.result()
            except Exception as error:
                logger.error(f"{futures[future]} failed: {error!r}")
                continue
            with open(output, "a") as file:
                file.write(json.dumps(row) + "\n")


# -- Tables and figures -----------------------------------------------------------------------------------------------


def table(rows: list[dict], costs: list[dict], task: str) -> str:
    """Markdown, best first: mean and, after ±, the standard deviation over the seeds."""
    cost = {c["variant"]: c for c in costs if c["task"] == task}
    lines = [
        "| variant | PSNR, dB | SSIM | region IoU | wrong-map drop, dB | without map, dB | trained | image tokens"
        " | ms a step | peak MiB | seeds |",
        "| --- " * 11 + "|",
    ]

    def spread(values: list[float], digits: int) -> str:
        if not values:
            return ""
        deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{deviation}"

    variants = {}
    for row in rows:
        if row["task"] == task:
            variants.setdefault(row["variant"], []).append(row)
    for name, cells in sorted(variants.items(), key=lambda item: -np.mean([c["right"]["psnr"] for c in item[1]])):
        drop = [c["right"]["psnr"] - c["wrong"]["psnr"] for c in cells if "wrong" in c]
        without = [c["without"]["psnr"] for c in cells if "without" in c]
        columns = [spread([c["right"][key] for c in cells], digits) for key, digits in (("psnr", 2), ("ssim", 3))]
        ious = [c["right"]["iou"] for c in cells if "iou" in c["right"]]
        columns += [spread(ious, 3), spread(drop, 2), spread(without, 2)]
        columns += [f"{cells[0]['trained']:,}", str(cells[0]["tokens"])]
        columns += [f"{cost[name][key]:.0f}" if name in cost else "" for key in ("step_ms", "peak_mib")]
        lines.append(f"| {name} | " + " | ".join(columns) + f" | {len(cells)} |")
    if variants and task == "thermal":
        # Imported last: a worker imports this file before it knows its GPU, and the libraries look for GPUs at once.
        from thermal import street_tables

        lines.append(f"\n{street_tables(variants)}")
    return "\n".join(lines)


def learning_curves(rows: list[dict], task: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    Steps `(points,)` and losses `(seeds, points)` of those of COMPARED that ran. A point is the mean over a 20th of the
    run.

    Every loss is the mean over the target's tokens alone, so that of `in_context` leaves its third panel out. Even so,
    close curves are comparable only among the variants without the map on the canvas, which share latents, noise and
    timesteps. With the map there, the VAE encodes the target differently (on emoji with 5 % more variance for
    `in_context` and 22 % for `pixel_fusion`), and `in_context` draws other noise for its larger canvas.
    """
    rows = [row for row in rows if row["task"] == task and row["variant"] in COMPARED]
    curves = {}
    for name in COMPARED:
        # Runs are appended to a file, so the last one of a seed counts. Lengths do not mix.
        cells = {r["seed"]: r for r in rows if r["variant"] == name and r["steps"] == rows[-1]["steps"]}
        if cells:
            losses = np.array([cells[seed]["curve"] for seed in sorted(cells)])
            window = max(1, rows[-1]["steps"] // 20)
            curves[name] = ((np.arange(losses.shape[1]) + 0.5) * window, losses)
    return curves


def draw_figures(rows: list[dict], tasks: list[str], folder: Path) -> None:
    """Learning curves, the worth of the map, and the attention rows that cells left, as PNGs in `folder`."""
    # Imported last, so that a machine without matplotlib still measures.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def save(figure, name: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, bbox_inches="tight")
        plt.close(figure)
        picture = PIL.Image.open(buffer).convert("RGB")
        picture.quantize(128, method=PIL.Image.Quantize.MAXCOVERAGE, kmeans=3).save(folder / name, optimize=True)

    trained = {task: curves for task in tasks if (curves := learning_curves(rows, task))}

    def panels(ylabel: str, xlabel: str) -> tuple:
        size = (4.2 * len(trained), 3.4)
        figure, axes = plt.subplots(1, len(trained), figsize=size, squeeze=False, layout="constrained")
        for axis, task in zip(axes[0], trained):
            axis.set(title=task, xlabel=xlabel)
        axes[0, 0].set_ylabel(ylabel)
        return figure, axes[0]

    def add_legend(figure, axes) -> None:
        handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
        names = [name for name in COMPARED if name in handles]
        figure.legend([handles[name] for name in names], names, loc="outside right center", fontsize=8)

    if trained:
        figure, axes = panels("training loss of the target", "step")
        for axis, curves in zip(axes, trained.values()):
            for name, (steps, losses) in curves.items():
                color = f"C{COMPARED.index(name)}"
                axis.plot(steps, losses.mean(axis=0), color=color, label=name, linewidth=1.2)
                axis.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.15, linewidth=0)
        add_legend(figure, axes)
        save(figure, "learning_curves.png")

        figure, axes = panels("wrong-map drop, dB", "PSNR with the right map, dB")
        for axis, task in zip(axes, trained):
            for index, name in enumerate(COMPARED):
                cells = [row for row in rows if row["task"] == task and row["variant"] == name]
                if cells:
                    right = np.mean([c["right"]["psnr"] for c in cells])
                    drop = np.mean([c["right"]["psnr"] - c.get("wrong", c["right"])["psnr"] for c in cells])
                    axis.plot(right, drop, "osD^vP*X"[index], color=f"C{index}", label=name)
            axis.grid(alpha=0.3)
        add_legend(figure, axes)
        save(figure, "map_worth.png")

    for task in tasks:
        paths = {name: attention_row_path(folder, task, name) for name in VARIANTS if VARIANTS[name].weighs}
        paths = {name: path for name, path in paths.items() if path.exists()}
        if not paths:
            continue
        figure, axes = plt.subplots(len(paths), 1, figsize=(9, 1.32 * len(paths)), squeeze=False)
        for axis, (name, path) in zip(axes[:, 0], paths.items()):
            row = PIL.Image.open(path)
            side = row.width / len(ATTENTION_COLUMNS)
            axis.imshow(row)
            axis.xaxis.tick_top()
            axis.set_xticks(side * (np.arange(len(ATTENTION_COLUMNS)) + 0.5), [], fontsize=8)
            axis.set_yticks([row.height / 2], [name.replace(", ", ",\n")], fontsize=8)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        axes[0, 0].set_xticklabels(ATTENTION_COLUMNS)
        figure.subplots_adjust(hspace=0.04)
        save(figure, f"attention-{task}.png")


# -- Main -------------------------------------------------------------------------------------------------------------


def read_output(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("ablation.jsonl"), help="Cells that are in it already are not run again."
    )
    parser.add_argument("--tasks", nargs="+", default=["earth", "emoji"], choices=["earth", "emoji", "thermal"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--earth", type=Path, default=Path("earth"))
    parser.add_argument("--earth_base", type=Path, default=ROOT / "examples" / "base")
    parser.add_argument("--emoji", type=Path, default=Path("emoji"))
    parser.add_argument("--emoji_base", type=Path, default=Path("emoji/base"))
    parser.add_argument("--thermal", type=Path, default=Path("street"))
    parser.add_argument("--thermal_base", type=Path, default=Path("street/model"))
    parser.add_argument(
        "--thermal_prompt", default="visible to target", help="The prompt that its base was trained with."
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    parser.add_argument("--options", default="", help="More options of the trainer, for every variant.")
    parser.add_argument("--num_train", type=int, help="Train on the first rows only, up to this number.")
    parser.add_argument("--num_test", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=8)
    parser.add_argument("--cost_steps", type=int, default=20, help="Timed steps of each variant. 0 measures no costs.")
    parser.add_argument("--cache_root", type=Path, default=Path("ablation-cache"), help="Folder for encodings.")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--show", action="store_true", help="Print the tables of what --output holds, run nothing.")
    parser.add_argument("--sheets", type=Path, help="Folder for a sheet of each cell's paintings.")
    parser.add_argument("--figures", type=Path, help="Draw what --output holds, and attention, in this folder.")
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for folder in (args.figures, args.sheets, args.output.parent):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    costs_file = args.output.with_suffix(".costs.jsonl")
    if not args.show:
        devices = torch.cuda.device_count() if args.device == "cuda" else 0
        cells = list(itertools.product(args.tasks, args.variants, args.seeds))
        there = {(row["task"], row["variant"], row["seed"]) for row in read_output(args.output)}
        cells = [cell for cell in cells if cell not in there]
        # Seed by seed, so that an ablation that is cut off has the same seeds of all variants. Long cells come first, so
        # that no worker is left with one at the end.
        random.Random(0).shuffle(cells)
        cells.sort(key=lambda cell: (cell[2], -VARIANTS[cell[1]].steps, "in_context" not in cell[1]))

        def picture(task: str, variant: str, seed: int) -> Path | None:
            drawn = args.figures is not None and seed == 0 and VARIANTS[variant].weighs
            return attention_row_path(args.figures, task, variant) if drawn else None

        def sheet(task: str, variant: str, seed: int) -> Path | None:
            return args.sheets and args.sheets / f"{task}-{file_stem(variant)}-{seed}.jpg"

        calls = [(*cell, VARIANTS[cell[1]], picture(*cell), sheet(*cell)) for cell in cells]
        run_all("run_cell", calls, args.jobs, devices, args, args.output)
        if args.cost_steps:
            calls = [(task, variant, VARIANTS[variant]) for task in args.tasks for variant in args.variants]
            run_all("run_cost", calls, 1, min(devices, 1), args, costs_file, cells_a_process=1)
    rows, costs = read_output(args.output), read_output(costs_file)
    for task in args.tasks:
        print(f"\n## {task}\n\n{table(rows, costs, task)}")
    if args.figures is not None:
        draw_figures(rows, args.tasks, args.figures)


if __name__ == "__main__":
    main(parse_args())
