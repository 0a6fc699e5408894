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
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from diffusers.utils import make_image_grid
from emoji import nearest_colors
from measurement import StepTracker, assemble, free
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from variants import MODULES

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.checks import check_samples
from semantic_fill.data import TriptychDataset
from semantic_fill.encoding import Encoder, read_encoding
from semantic_fill.sources import list_folder


ATTENDED_PLACES = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
# Steps of a measurement of costs that are not timed.
WARM_UP = 5


def find_task(name: str, args: argparse.Namespace):
    """Folder, base, resolution, and a function that labels each pixel of a `(height, width, 3)` picture."""
    if name == "earth":
        # Water is where blue is above red.
        return args.earth, args.earth_base, 128, lambda picture: (picture[..., 2] > picture[..., 0]).astype(int)
    return args.emoji, args.emoji_base, 96, nearest_colors


# -- Train ------------------------------------------------------------------------------------------------------------


def options_of(task: str, variant, seed: int, steps: int, args: argparse.Namespace) -> trainer.Options:
    folder, base, resolution, _ = find_task(task, args)
    options = {
        "pretrained_model_name_or_path": base,
        "train_data_dir": folder / "train",
        "cache_root": args.cache_root,
        "output_dir": args.output.parent,
        "resolution": resolution,
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
        "mixed_precision": "no",
        "report_to": "none",
        "log_level": "error",
    }
    return trainer.parse_args([*(f"--{k}={v}" for k, v in options.items()), *variant.options.split()])


# The encoders of this process, by task and mode.
encoders: dict[tuple[str, str], Encoder] = {}


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

    key = (task, options.semantic_mode)
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
        semantic_mode=run.options.semantic_mode,
        fusion_alpha=run.options.fusion_alpha,
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
    run: trainer.Run, variant, views: list[dict], maps: list[torch.Tensor] | None, args: argparse.Namespace
) -> torch.Tensor:
    painter, painted = make_painter(run), []
    for start in range(0, len(views), 32):
        batch = views[start : start + 32]
        painted.append(
            painter(
                image=torch.stack([view["visible"] for view in batch]),
                semantic_image=None if maps is None else torch.stack(maps[start : start + 32]),
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
            picture = PIL.Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy())
        return picture.resize((2 * width, 2 * height), PIL.Image.Resampling.NEAREST)

    tiles = [enlarge(x) for x in (view["visible"], view["semantic"], seen.images[0], view["target"])]
    font = PIL.ImageFont.load_default(height // 5)
    for index in range(len(points)):
        tile = seen.overlay(tiles[1], point=index)
        label = f"max {seen.maps[0, 0, index].max():.0%}"
        PIL.ImageDraw.Draw(tile).text((4, 0), label, "white", font, stroke_width=2, stroke_fill="black")
        tiles.append(tile)
    return make_image_grid(tiles, rows=1, cols=len(tiles))


def figures(painted: torch.Tensor, target: torch.Tensor, label) -> dict[str, float]:
    """PSNR in dB, SSIM, and the mean IoU of the labels that painting and target show. Means over the pictures."""
    psnr = peak_signal_noise_ratio(painted, target, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(painted, target, data_range=1.0)
    ious = []
    for ours, theirs in zip(painted, target):
        a, b = (label((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in (ours, theirs))
        ious.append(np.mean([((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in np.unique(b)]))
    return {"psnr": psnr.item(), "ssim": ssim.item(), "iou": float(np.mean(ious))}


# -- Measure ----------------------------------------------------------------------------------------------------------


def run_cell(task: str, name: str, seed: int, variant, picture: Path | None, args: argparse.Namespace) -> dict:
    """Trains and paints one cell. `picture` is where its row of attention maps goes, if it has one."""
    run, tracker = build(task, variant, seed, variant.steps * args.steps, args, args.num_train)
    start = time.monotonic()
    trainer.train(run)
    seconds, losses = time.monotonic() - start, tracker.losses

    folder, _, _, label = find_task(task, args)
    source, shape = list_folder(folder / "test", run.options), run.options.width / run.options.resolution
    findings = check_samples(source, shape, pairs=False)
    test = TriptychDataset(source, run.options, findings, list(range(min(args.num_test, len(source)))))
    views = [test.views(i) for i in range(len(test))]
    target, maps = torch.stack([v["target"] for v in views]), [v["semantic"] for v in views]
    row = {
        "task": task,
        "variant": name,
        "seed": seed,
        "tokens": run.encoder.image_tokens,
        "trained": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "steps": len(losses),
    }
    paintings = {"right": maps, "wrong": maps[1:] + maps[:1], "without": None}
    if not run.encoder.mode.uses_map:
        paintings = {"right": None}
    for kind, shown in paintings.items():
        row[kind] = figures(paint(run, variant, views, shown, args), target, label)
    window = max(1, len(losses) // 20)
    row["loss"] = float(np.mean(losses[-len(losses) // 4 :]))
    row["curve"] = np.array(losses[: len(losses) // window * window]).reshape(-1, window).mean(1).round(4).tolist()
    row["seconds"] = seconds
    if picture is not None:
        draw_attention_row(run, variant, views, args).save(picture)
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
