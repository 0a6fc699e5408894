# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""One cell of the ablation: trains one variant on one task with one seed, paints held-out pictures, and measures both.

`ablation.py` imports this file in its workers only, because the libraries look for GPUs as soon as they are imported. So
the type of each `variant`, `ablation.Variant`, is not imported here.
"""

import argparse
import dataclasses
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from diffusers.utils import make_image_grid
from emoji import nearest_colors
from measurement import StepTracker, assemble, free
from thermal import Streets
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from variants import MODULES

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.checks import check_samples
from semantic_fill.data import TriptychDataset
from semantic_fill.encoding import Encoder, read_encoding
from semantic_fill.layout import canvas_settings
from semantic_fill.metrics import to_bytes
from semantic_fill.sources import list_folder


ATTENDED_PLACES = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
# Steps of a measurement of costs that are not timed.
WARM_UP = 5


@dataclass(frozen=True)
class Task:
    """
    What a variant is trained and judged on.

    Args:
        folder, base (`Path`): The data, in `train` and `test`, and the base model.
        height, width (`int`): Size of a view in pixels.
        label (`Callable`, *optional*): Labels each pixel of a `(height, width, 3)` picture, for the IoU.
        prompt (`str`, *optional*): For data without captions.
    """

    folder: Path
    base: Path
    height: int
    width: int
    label: Callable[[np.ndarray], np.ndarray] | None = None
    prompt: str | None = None


def find_task(name: str, args: argparse.Namespace) -> Task:
    if name == "earth":
        # Water is where blue is above red.
        water = lambda picture: (picture[..., 2] > picture[..., 0]).astype(int)  # noqa: E731
        return Task(args.earth, args.earth_base, 128, 128, water)
    if name == "emoji":
        return Task(args.emoji, args.emoji_base, 96, 96, nearest_colors)
    return Task(args.thermal, args.thermal_base, 256, 336, prompt=args.thermal_prompt)


# -- Train ------------------------------------------------------------------------------------------------------------


def options_of(task: str, variant, seed: int, steps: int, args: argparse.Namespace) -> trainer.Options:
    found = find_task(task, args)
    options = {
        "pretrained_model_name_or_path": found.base,
        "train_data_dir": found.folder / "train",
        "cache_root": args.cache_root,
        "output_dir": args.output.parent,
        "resolution": found.height,
        "width": found.width,
        "max_sequence_length": 32,
        "train_batch_size": args.batch_size,
        "rank": args.rank,
        "learning_rate": args.learning_rate,
        "semantic_learning_rate": 3e-3,
        "semantic_scale_learning_rate": 3e-2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": min(10, steps // 10),
        "loss_region": "target",
        "max_train_steps": steps,
        "checkpointing_steps": steps + 1,
        "seed": seed,
        "mixed_precision": args.mixed_precision,
        "report_to": "none",
        "log_level": "error",
    }
    if found.prompt is not None:
        options["instance_prompt"] = found.prompt
    given = [f"--{k}={v}" for k, v in options.items()]
    return trainer.parse_args([*given, *variant.options.split(), *args.options.split()])


# The encoders of this process, by task, mode and attention of the visible view.
encoders: dict[tuple[str, ...], Encoder] = {}


def build(
    task: str, variant, seed: int, steps: int, args: argparse.Namespace, num_train: int | None = None
) -> tuple[trainer.Run, StepTracker]:
    """A run with the variant's module in the place of the trainer's."""
    options, tracker = options_of(task, variant, seed, steps, args), StepTracker()
    options = dataclasses.replace(options, max_train_samples=num_train)

    def build_model(transformer, options: trainer.Options) -> trainer.SemanticFillModel:
        model = trainer.build_model(transformer, options)
        if variant.module is not None:
            config = {k: v for k, v in model.semantic_attention.config.items() if not k.startswith("_")}
            model.semantic_attention = MODULES[variant.module](**config).to(transformer.device)
        return model

    key = (task, options.semantic_mode, options.visible_attention)
    run = assemble(options, tracker, encoder=encoders.get(key), build_model=build_model)
    encoders[key] = run.encoder
    # Nothing goes on from a cell, and the checkpoint of a variant's module would not be the trainer's.
    run.checkpointer.save = lambda state: None
    return run, tracker


# -- Paint ------------------------------------------------------------------------------------------------------------


def make_painter(run: trainer.Run) -> FluxFillSemanticPipeline:
    model, components = run.engine.unwrap(run.model).eval(), run.encoder.pipeline.components
    trained = {"transformer": model.transformer, "semantic_attention": model.semantic_attention}
    painter = FluxFillSemanticPipeline(
        **components | trained,
        **canvas_settings(run.options),
    )
    painter.vae.to(run.engine.accelerator.device)
    painter.set_progress_bar_config(disable=True)
    return painter


def prompt_of(run: trainer.Run, count: int) -> dict[str, torch.Tensor]:
    """The encoded prompt, which all samples of a task share, for `count` pictures."""
    encoded = read_encoding(run.encoder.prompt_file(run.encoder.dataset.caption(0)))
    device = run.engine.accelerator.device
    return {k: v.to(device).expand(count, *v.shape) for k, v in encoded.items()}


@torch.no_grad()
def paint(
    run: trainer.Run, variant, views: list[dict], maps: torch.Tensor | None, args: argparse.Namespace
) -> torch.Tensor:
    painter, painted = make_painter(run), []
    for start in range(0, len(views), 32):
        batch = views[start : start + 32]
        painted.append(
            painter(
                image=torch.stack([view["visible"] for view in batch]),
                semantic_image=None if maps is None else maps[start : start + 32],
                semantic_scale=variant.paint_scale,
                num_inference_steps=args.num_inference_steps,
                max_sequence_length=run.options.max_sequence_length,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
                output_type="pt",
                **prompt_of(run, len(batch)),
            ).images.float()
        )
    return torch.cat(painted).clamp(0, 1).cpu()


def draw_attention_row(run: trainer.Run, variant, views: list[dict], args: argparse.Namespace) -> PIL.Image.Image:
    """
    Visible view, map, painting, target and one heat map for each of `ATTENDED_PLACES`, for the held-out picture with the
    most varied map, half-way through denoising. A heat map is brightest at its largest weight, which is written on it.
    """
    view = max(views, key=lambda view: view["semantic"].std(dim=(1, 2)).sum().item())
    height, width = view["visible"].shape[-2:]
    # The middles of tokens, which are what attends.
    points = [(int(at * width) // 16 * 16 + 8, int(at * height) // 16 * 16 + 8) for at in ATTENDED_PLACES.values()]
    seen = make_painter(run).semantic_attention_maps(
        image=view["visible"][None],
        semantic_image=view["semantic"][None],
        semantic_scale=variant.paint_scale,
        num_inference_steps=args.num_inference_steps,
        max_sequence_length=run.options.max_sequence_length,
        generator=[torch.Generator().manual_seed(0)],
        points=points,
        steps=[args.num_inference_steps // 2],
        **prompt_of(run, 1),
    )

    def enlarge(picture) -> PIL.Image.Image:
        if torch.is_tensor(picture):
            picture = as_picture(picture)
        return picture.resize((2 * width, 2 * height), PIL.Image.Resampling.NEAREST)

    tiles = [enlarge(x) for x in (view["visible"], view["semantic"], seen.images[0], view["target"])]
    font = PIL.ImageFont.load_default(height // 5)
    for index in range(len(points)):
        tile = seen.overlay(tiles[1], point=index)
        label = f"max {seen.maps[0, 0, index].max():.0%}"
        PIL.ImageDraw.Draw(tile).text((4, 0), label, "white", font, stroke_width=2, stroke_fill="black")
        tiles.append(tile)
    return make_image_grid(tiles, rows=1, cols=len(tiles))


def as_picture(pixels: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(to_bytes(pixels).permute(1, 2, 0).numpy())


def figures(painted: torch.Tensor, target: torch.Tensor, label) -> dict[str, float]:
    """PSNR in dB, SSIM, and with `label` the mean IoU of what painting and target show. Means over the pictures."""
    psnr = peak_signal_noise_ratio(painted, target, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(painted, target, data_range=1.0)
    found = {"psnr": psnr.item(), "ssim": ssim.item()}
    if label is not None:
        ious = []
        for ours, theirs in zip(painted, target):
            a, b = (label(to_bytes(x).permute(1, 2, 0).numpy()) for x in (ours, theirs))
            ious.append(np.mean([((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in np.unique(b)]))
        found["iou"] = float(np.mean(ious))
    return found


def draw_sheet(columns: dict[str, torch.Tensor], rows: int = 8) -> PIL.Image.Image:
    """Pictures `(count, 3, height, width)` in [0, 1] under the names of their columns, of scenes spread over all."""
    count = len(next(iter(columns.values())))
    chosen = [row * count // rows for row in range(min(rows, count))]
    tiles = [as_picture(pictures[row]) for row in chosen for pictures in columns.values()]
    sheet = make_image_grid(tiles, rows=len(chosen), cols=len(columns))
    for index, name in enumerate(columns):
        draw = PIL.ImageDraw.Draw(sheet)
        draw.text((index * tiles[0].width + 4, 2), name, "white", stroke_width=2, stroke_fill="black")
    return sheet


# -- Measure ----------------------------------------------------------------------------------------------------------


def run_cell(
    task: str, name: str, seed: int, variant, picture: Path | None, sheet: Path | None, args: argparse.Namespace
) -> dict:
    """Trains and paints one cell. `picture` and `sheet` are where attention maps and paintings go, if they are drawn."""
    run, tracker = build(task, variant, seed, variant.steps * args.steps, args, args.num_train)
    start = time.monotonic()
    trainer.train(run)
    seconds, losses = time.monotonic() - start, tracker.losses

    found = find_task(task, args)
    source, shape = list_folder(found.folder / "test", run.options), found.width / found.height
    findings = check_samples(source, shape, pairs=False)
    test = TriptychDataset(source, run.options, findings, list(range(min(args.num_test, len(source)))))
    views = [test.views(i) for i in range(len(test))]
    visible, target, maps = (torch.stack([v[name] for v in views]) for name in ("visible", "target", "semantic"))
    streets = Streets(found.folder / "test", [source.name(i) for i in range(len(test))]) if task == "thermal" else None
    others = [*range(1, len(test)), 0] if streets is None else streets.others()
    row = {
        "task": task,
        "variant": name,
        "seed": seed,
        "tokens": run.encoder.image_tokens,
        "trained": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "steps": len(losses),
    }
    shown = {"right": maps, "wrong": maps[others], "without": None}
    if streets is not None:
        shown["empty"] = torch.zeros_like(maps)
    if not run.encoder.mode.uses_map:
        shown = {"right": None}
    paintings = {kind: paint(run, variant, views, shown_maps, args) for kind, shown_maps in shown.items()}
    for kind, painted in paintings.items():
        row[kind] = figures(painted, target, found.label)
        if streets is not None:
            pictures = (to_bytes(x) for x in (painted, target, visible))
            row[kind] |= streets.judge(*pictures, shown=others if kind == "wrong" else None)
    window = max(1, len(losses) // 20)
    row["loss"] = float(np.mean(losses[-len(losses) // 4 :]))
    row["curve"] = np.array(losses[: len(losses) // window * window]).reshape(-1, window).mean(1).round(4).tolist()
    row["seconds"] = seconds
    if picture is not None:
        draw_attention_row(run, variant, views, args).save(picture)
    if sheet is not None:
        draw_sheet({"visible": visible, "map": maps, "target": target} | paintings).save(sheet, quality=85)
    return row


def run_cost(task: str, name: str, variant, args: argparse.Namespace) -> dict:
    """Milliseconds a step and peak memory of one variant, in a process of its own and with few samples."""
    run, tracker = build(task, variant, 0, WARM_UP + args.cost_steps, args, num_train=4 * args.batch_size)
    device = run.engine.accelerator.device
    free(device)
    trainer.train(run)
    # Without a GPU, this is the memory of the process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    milliseconds = 1000 * statistics.median(tracker.seconds(WARM_UP))
    return {"task": task, "variant": name, "step_ms": milliseconds, "peak_mib": peak}
