# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Every way for the map to enter, at equal steps, rank and data, on two tasks.

    python examples/earth.py --output_dir earth
    python benchmarks/emoji.py --output_dir emoji
    python examples/train_base.py --output_dir emoji/base --base examples/base --train_data_dir emoji/train \\
        --test_data_dir emoji/test --views glyph 3d --resolution 96
    python benchmarks/ablation.py --jobs 24

Each cell (task, variant, seed) trains with the trainer's own functions and paints held-out pictures with the right map,
with another picture's and with none. Cells are shared out over `--jobs` processes; time a step and peak memory are
measured afterwards, one variant at a time. `--figures FOLDER` draws learning curves, what the map is worth, and where
painted places look in it.
"""

import argparse
import functools
import io
import itertools
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
MAX_SEQUENCE_LENGTH = 32

DIRECT = "--semantic_position direct --semantic_injection condition"
# name -> (flags of the trainer, class in leads.py or None). `--paint_scale` is the pipeline's `semantic_scale`.
MAIN = {
    "none": ("--semantic_mode none", None),
    "pixel_fusion": ("--semantic_mode pixel_fusion", None),
    "in_context": ("--semantic_mode in_context", None),
    "cross_attention": ("", None),
    "cross_attention, 2 layers": ("--semantic_num_layers 2", None),
    "cross_attention, rope": ("--semantic_position rope", None),
    "cross_attention, rope, 2 layers": ("--semantic_position rope --semantic_num_layers 2", None),
    "aligned": ("--semantic_position aligned", None),
    "condition, rope": ("--semantic_position rope --semantic_injection condition", None),
    "condition, aligned": ("--semantic_position aligned --semantic_injection condition", None),
    "condition, aligned, 2 layers": (
        "--semantic_position aligned --semantic_injection condition --semantic_num_layers 2",
        None,
    ),
    "condition, direct": (DIRECT, None),
    "condition, direct, painted at 1.25": (f"{DIRECT} --paint_scale 1.25", None),
}
ALIGNED, CONDITION = MAIN["aligned"][0], MAIN["condition, aligned"][0]
LEADS = {
    "condition, contents only": ("--semantic_injection condition", None),
    "aligned, LoRA on x_embedder": (f"{ALIGNED} --lora_layers +x_embedder", None),
    "condition, aligned, LoRA on x_embedder": (f"{CONDITION} --lora_layers +x_embedder", None),
    "aligned, timestep gate": (ALIGNED, "TimestepGate"),
    "aligned, after the embedder": (ALIGNED, "HiddenUpdate"),
    "aligned, every 2nd block": (ALIGNED, "EveryBlockUpdate"),
    "condition and embedder": (CONDITION, "InputAndEmbedder"),
    "condition and every 2nd block": (CONDITION, "InputAndBlocks"),
    "condition where painted": (CONDITION, "WherePainted"),
    "raw condition": (CONDITION, "RawTokens"),
    "raw condition, by half": (CONDITION, "RawByHalf"),
    "raw condition, and over the noise": (CONDITION, "RawOverNoise"),
    "raw condition, and for the noise": (CONDITION, "RawForNoise"),
    "deep condition": (CONDITION, "DeepTokens"),
    "raw condition and embedder": (CONDITION, "RawAndEmbedder"),
    "raw condition and every 2nd block": (CONDITION, "RawAndBlocks"),
    "condition, convolved tokens": (CONDITION, "ConvolvedTokens"),
    "condition, multi-scale tokens": (CONDITION, "MultiScaleTokens"),
    "condition, dropped tokens": (CONDITION, "DroppedTokens"),
    "condition, map guidance 1.5": (f"{CONDITION} --semantic_dropout 0.1", "MapGuidance"),
    "condition, rates / 3": (f"{CONDITION} --semantic_learning_rate 1e-3 --semantic_scale_learning_rate 1e-2", None),
    "condition, rates x 3": (f"{CONDITION} --semantic_learning_rate 1e-2 --semantic_scale_learning_rate 1e-1", None),
    "condition, 3 x the steps": (f"{CONDITION} --max_train_steps x3", None),
    "in_context, 3 x the steps": ("--semantic_mode in_context --max_train_steps x3", None),
}
# Those that --figures compares, each with a colour of its own in every panel.
COMPARED = (
    "none",
    "pixel_fusion",
    "in_context",
    "cross_attention",
    "cross_attention, rope",
    "condition, rope",
    "condition, aligned",
    "condition, direct",
)
# Rows and columns of the attention figure. The others look at their own place alone, or leave no weights to show.
ATTENDING = ("cross_attention", "cross_attention, rope", "condition, contents only", "condition, rope")
ATTENDED_PLACES = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}
ATTENTION_COLUMNS = ("visible", "map", "painted", "target", *(f"attention at {name}" for name in ATTENDED_PLACES))


@functools.cache
def load_task(name: str, args: argparse.Namespace):
    """Folders, base, size, and the label of each pixel of a `(height, width, 3)` picture."""
    if name == "earth":
        # Water is where blue is above red.
        return args.earth, args.earth_base, 128, lambda picture: (picture[..., 2] > picture[..., 0]).astype(int)
    from emoji import nearest_colours

    return args.emoji, args.emoji_base, 96, nearest_colours


def trainer_args(task: str, variant: str, seed: int, args: argparse.Namespace) -> tuple[argparse.Namespace, str]:
    import train_semantic_fill_lora as trainer

    flags, lead = (MAIN | LEADS)[variant]
    folder, base, size, _ = load_task(task, args)
    flags = flags.replace("+x_embedder", ",".join((*trainer.LORA_TARGETS, "x_embedder")))
    steps = args.steps
    if "--max_train_steps x3" in flags:
        flags, steps = flags.replace("--max_train_steps x3", ""), 3 * steps
    flags, _, paint_scale = flags.partition("--paint_scale")
    common = (
        f"--pretrained_model_name_or_path {base} --train_data_dir {folder / 'train'} --output_dir unused"
        f" --resolution {size} --max_sequence_length {MAX_SEQUENCE_LENGTH} --train_batch_size {args.batch_size}"
        f" --rank {args.rank} --learning_rate {args.learning_rate} --lr_scheduler cosine --lr_warmup_steps 10"
        f" --loss_region target --max_train_steps {steps} --seed {seed} --caption_column text"
    )
    # Only the module has them.
    rates = "" if "--semantic_mode" in flags else "--semantic_learning_rate 3e-3 --semantic_scale_learning_rate 3e-2"
    run = trainer.parse_args(f"{common} {rates} {flags}".split())
    run.paint_scale = float(paint_scale or 1.0)
    return run, lead


def read_rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [{"image": {"bytes": (folder / r["file_name"]).read_bytes()}, "text": r["text"]} for r in rows]


@functools.cache
def encoded_rows(task: str, mode: str, args: argparse.Namespace) -> tuple:
    """The base's pipeline without its transformer, the data set, and its encodings on the device, once a process."""
    import train_semantic_fill_lora as trainer

    run, _ = trainer_args(task, next(v for v in MAIN if mode in v), 0, args)
    device = torch.device(args.device)
    pipeline = trainer.load_encoders(run, device, torch.float32).to(device)
    dataset = trainer.TriptychDataset(read_rows(Path(run.train_data_dir))[: args.num_train], run)
    encoder = trainer.Encoder(pipeline, dataset, run)
    latents = {}
    for drop in (False, True):
        if drop and not encoder.mode.map_on_canvas:
            latents |= {(index, True): encoded for (index, _), encoded in latents.items()}
            break
        for start in range(0, len(dataset), 64):
            rows = range(start, min(start + 64, len(dataset)))
            views = [dataset.views(row) for row in rows]
            batch = encoder.encode_views({n: torch.stack([v[n] for v in views]).to(device) for n in views[0]}, drop)
            for i, row in enumerate(rows):
                latents[row, drop] = {name: tensor[i] for name, tensor in batch.items()}
    prompts = {p: encoder.encode_prompts([p]) for p in ("", dataset.caption(0))}
    prompts = {p: {name: tensor[0] for name, tensor in encoded.items()} for p, encoded in prompts.items()}
    return pipeline, dataset, latents, prompts


def build(task: str, variant: str, seed: int, args: argparse.Namespace):
    """Everything of a run but its loop."""
    import leads

    import train_semantic_fill_lora as trainer

    run, lead = trainer_args(task, variant, seed, args)
    pipeline, dataset, latents, prompts = encoded_rows(task, run.semantic_mode, args)

    class MemoryEncoder(trainer.Encoder):
        def read(self, draws):
            prompt = prompts["" if draws.drop_caption else dataset.caption(draws.index)]
            return {"draws": draws, "encoded": latents[draws.index, draws.drop_map] | prompt}

    device = torch.device(args.device)
    encoder = MemoryEncoder(pipeline, dataset, run)
    torch.manual_seed(seed)
    model = trainer.build_model(run, device, torch.float32)
    if lead is not None:
        config = {k: v for k, v in model.semantic_attention.config.items() if not k.startswith("_")}
        model.semantic_attention = getattr(leads, lead)(**config)
        model.semantic_attention.attach(model.transformer)
        model.semantic_attention.to(device)
    tokens = encoder.image_tokens
    shift = trainer.timestep_shift_factor(run, pipeline.scheduler, tokens)
    step = trainer.Step(encoder, run, device, torch.float32, shift, model.transformer.config.guidance_embeds)
    optimizer = trainer.build_optimizer(trainer.parameter_groups(model, run), run)
    schedule = trainer.get_scheduler(
        run.lr_scheduler, optimizer, num_warmup_steps=run.lr_warmup_steps, num_training_steps=run.max_train_steps
    )
    batches = iter(trainer.RunSampler(len(dataset), run, 0, 1, 0))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def train_step() -> torch.Tensor:
        loss = step(model, [encoder.read(draws) for draws in next(batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss.detach()

    return run, model, pipeline, train_step, tokens, sum(p.numel() for p in parameters)


def make_painter(pipeline, model, run):
    from pipeline_flux_fill_semantic import FluxFillSemanticPipeline

    painter = FluxFillSemanticPipeline(
        **{**pipeline.components, "transformer": model.transformer, "semantic_attention": model.semantic_attention},
        semantic_mode=run.semantic_mode,
        fusion_alpha=run.fusion_alpha,
    )
    painter.set_progress_bar_config(disable=True)
    return painter


@torch.no_grad()
def paint(pipeline, model, run, views: list[dict], maps: list[torch.Tensor] | None, args) -> torch.Tensor:
    painter = make_painter(pipeline, model, run)
    painted = []
    for start in range(0, len(views), 32):
        batch = views[start : start + 32]
        painted.append(
            painter(
                prompt=run.instance_prompt or views[0]["prompt"],
                image=torch.stack([view["visible"] for view in batch]),
                semantic_image=None if maps is None else torch.stack(maps[start : start + 32]),
                semantic_scale=run.paint_scale,
                num_inference_steps=args.num_inference_steps,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                generator=[torch.Generator().manual_seed(start + i) for i in range(len(batch))],
                output_type="pt",
            ).images.float()
        )
    return torch.cat(painted).clamp(0, 1).cpu()


def draw_attention_row(pipeline, model, run, views: list[dict], args) -> PIL.Image.Image:
    """
    ATTENTION_COLUMNS side by side, for the held-out picture with the most varied map, half-way through denoising. A
    heat map is brightest at its largest weight, so that weight is written on it.
    """
    from diffusers.utils import make_image_grid

    view = max(views, key=lambda view: view["semantic"].std(dim=(1, 2)).sum().item())
    height, width = view["visible"].shape[-2:]
    # The middles of tokens, which are what attends.
    points = [(int(at * width) // 16 * 16 + 8, int(at * height) // 16 * 16 + 8) for at in ATTENDED_PLACES.values()]
    seen = make_painter(pipeline, model, run).semantic_attention_maps(
        prompt=run.instance_prompt or view["prompt"],
        image=view["visible"][None],
        semantic_image=view["semantic"][None],
        semantic_scale=run.paint_scale,
        num_inference_steps=args.num_inference_steps,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=[torch.Generator().manual_seed(0)],
        points=points,
        steps=[args.num_inference_steps // 2],
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


def attention_row_path(folder: Path, task: str, variant: str) -> Path:
    return folder / f"attention-{task}-{re.sub(r'[^a-z0-9_]+', '-', variant)}.png"


def figures(painted: torch.Tensor, target: torch.Tensor, label) -> dict[str, float]:
    """PSNR in dB and SSIM, and the mean IoU of the labels that painting and target show; means over the pictures."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr = peak_signal_noise_ratio(painted, target, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(painted, target, data_range=1.0)
    ious = []
    for ours, theirs in zip(painted, target):
        a, b = (label((x * 255).round().byte().permute(1, 2, 0).numpy()) for x in (ours, theirs))
        ious.append(np.mean([((a == k) & (b == k)).sum() / ((a == k) | (b == k)).sum() for k in np.unique(b)]))
    return {"psnr": psnr.item(), "ssim": ssim.item(), "iou": float(np.mean(ious))}


def run_cell(task: str, variant: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains and paints one cell."""
    import train_semantic_fill_lora as trainer
    from pipeline_flux_fill_semantic import SEMANTIC_MODES

    run, model, pipeline, train_step, tokens, trained = build(task, variant, seed, args)
    model.train()
    start = time.monotonic()
    losses = torch.stack([train_step() for _ in range(run.max_train_steps)]).tolist()
    seconds = time.monotonic() - start
    model.eval()

    folder, _, _, label = load_task(task, args)
    test = trainer.TriptychDataset(read_rows(folder / "test")[: args.num_test], run)
    views = [test.views(i) | {"prompt": test.caption(i)} for i in range(len(test))]
    target, maps = torch.stack([v["target"] for v in views]), [v["semantic"] for v in views]
    sees_map = SEMANTIC_MODES[run.semantic_mode].attends or SEMANTIC_MODES[run.semantic_mode].map_on_canvas
    row = {"task": task, "variant": variant, "seed": seed, "tokens": tokens, "trained": trained, "steps": len(losses)}
    row["right"] = figures(paint(pipeline, model, run, views, maps if sees_map else None, args), target, label)
    if sees_map:
        row["wrong"] = figures(paint(pipeline, model, run, views, maps[1:] + maps[:1], args), target, label)
        row["without"] = figures(paint(pipeline, model, run, views, None, args), target, label)
    window = max(1, len(losses) // 20)
    row["loss"] = float(np.mean(losses[-len(losses) // 4 :]))
    row["curve"] = np.array(losses[: len(losses) // window * window]).reshape(-1, window).mean(1).round(4).tolist()
    row["seconds"] = seconds

    weighs = SEMANTIC_MODES[run.semantic_mode].attends and run.semantic_position in ("none", "rope")
    if args.figures is not None and seed == 0 and weighs and (MAIN | LEADS)[variant][1] is None:
        picture = draw_attention_row(pipeline, model, run, views, args)
        picture.save(attention_row_path(args.figures, task, variant))
    return row


def run_cost(task: str, variant: str, args: argparse.Namespace) -> dict:
    """Milliseconds a step and peak memory of one variant, in a process of its own and with few encodings in memory."""
    args.num_train = 4 * args.batch_size
    _, _, _, train_step, _, _ = build(task, variant, 0, args)
    cuda = args.device == "cuda"
    for _ in range(5):
        train_step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.monotonic()
    for _ in range(args.cost_steps):
        train_step()
    if cuda:
        torch.cuda.synchronize()
    milliseconds = 1000 * (time.monotonic() - start) / args.cost_steps
    # Of the device, or without one of the process.
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    return {"task": task, "variant": variant, "step_ms": milliseconds, "peak_mib": peak}


def share_of_gpus(number: int, devices: int) -> str:
    """The GPU of a worker, among those that this run itself may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
    return visible.split(",")[number % devices]


def start_worker(numbers, devices: int) -> None:
    number = numbers.get()
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = share_of_gpus(number, devices)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    # Its backward crashes at some shapes in torch 2.11.
    torch.backends.cuda.enable_cudnn_sdp(False)
    logging.disable(logging.WARNING)


def run_all(
    function, cells: list[tuple], jobs: int, devices: int, args, output: Path, cells_a_process: int | None = None
) -> list[dict]:
    """Shares the cells out over processes and writes each row when it is there."""
    context = multiprocessing.get_context("spawn")
    numbers = context.Manager().Queue()
    for number in range(jobs if cells_a_process is None else len(cells) + jobs):
        numbers.put(number)
    rows = []
    with ProcessPoolExecutor(
        jobs, context, start_worker, (numbers, devices), max_tasks_per_child=cells_a_process
    ) as pool:
        futures = {pool.submit(function, *cell, args): cell for cell in cells}
        for future in tqdm(as_completed(futures), total=len(futures), mininterval=10):
            try:
                rows.append(future.result())
            except Exception as error:
                logger.error(f"{futures[future]} failed: {error!r}")
                continue
            with open(output, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return rows


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
        columns += [spread([c["right"]["iou"] for c in cells], 3), spread(drop, 2), spread(without, 2)]
        columns += [f"{cells[0]['trained']:,}", str(cells[0]["tokens"])]
        columns += [f"{cost[name][key]:.0f}" if name in cost else "" for key in ("step_ms", "peak_mib")]
        lines.append(f"| {name} | " + " | ".join(columns) + f" | {len(cells)} |")
    return "\n".join(lines)


def learning_curves(rows: list[dict], task: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """
    Steps `(points,)` and losses `(seeds, points)` of those of COMPARED that ran, a point being the mean over a 20th of
    the run.

    Every loss is the mean over the target's tokens alone: that of `in_context` leaves its third panel out. Close curves
    are still to be compared among the variants without the map on the canvas only. These share their latents, noise and
    timesteps; with it the VAE encodes the target otherwise (on emoji with 5 % more variance for `in_context`, 22 % for
    `pixel_fusion`), and the draws of `in_context`, for a larger canvas, are others.
    """
    rows = [row for row in rows if row["task"] == task and row["variant"] in COMPARED]
    curves = {}
    for name in COMPARED:
        # Runs are appended to a file: the last one of a seed counts, and lengths do not mix.
        cells = {r["seed"]: r for r in rows if r["variant"] == name and r["steps"] == rows[-1]["steps"]}
        if cells:
            losses = np.array([cells[seed]["curve"] for seed in sorted(cells)])
            window = max(1, rows[-1]["steps"] // 20)
            curves[name] = ((np.arange(losses.shape[1]) + 0.5) * window, losses)
    return curves


def draw_figures(rows: list[dict], tasks: list[str], folder: Path) -> None:
    """Learning curves, the worth of the map, and the attention rows that cells left, as PNGs in `folder`."""
    # Here and called last, so that a machine without matplotlib still measures.
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
                colour = f"C{COMPARED.index(name)}"
                axis.plot(steps, losses.mean(axis=0), color=colour, label=name, linewidth=1.2)
                axis.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0)
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
        paths = {name: attention_row_path(folder, task, name) for name in ATTENDING}
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


def read_output(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("ablation.jsonl"), help="Cells that are in it already are not run again."
    )
    parser.add_argument("--tasks", nargs="+", default=["earth", "emoji"])
    parser.add_argument("--variants", nargs="+", default=[*MAIN, *LEADS], help=f"Among {[*MAIN, *LEADS]}")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--lead_seeds", nargs="+", type=int, help="Seeds of the leads. Defaults to --seeds.")
    parser.add_argument("--earth", type=Path, default=Path("earth"))
    parser.add_argument("--earth_base", type=Path, default=ROOT / "examples" / "base")
    parser.add_argument("--emoji", type=Path, default=Path("emoji"))
    parser.add_argument("--emoji_base", type=Path, default=Path("emoji/base"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--num_train", type=int, help="Train on the first so many rows alone.")
    parser.add_argument("--num_test", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=8)
    parser.add_argument("--cost_steps", type=int, default=20, help="Timed steps of each variant; 0 leaves costs out.")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--show", action="store_true", help="Print the tables of what --output holds, run nothing.")
    parser.add_argument("--figures", type=Path, help="Draw what --output holds, and attention, in this folder.")
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.figures is not None:
        args.figures.mkdir(parents=True, exist_ok=True)
    costs_file = args.output.with_suffix(".costs.jsonl")
    if not args.show:
        devices = torch.cuda.device_count() if args.device == "cuda" else 0
        unset = argparse.Namespace(**vars(args))
        for name in ("variants", "tasks", "seeds", "lead_seeds"):
            # Workers keep what they loaded by their arguments, which have to be hashable.
            delattr(unset, name)
        shared = HashableNamespace(**vars(unset))
        seeds = {v: args.seeds if v in MAIN or args.lead_seeds is None else args.lead_seeds for v in args.variants}
        cells = [(t, v, s) for t, v in itertools.product(args.tasks, args.variants) for s in seeds[v]]
        there = {(row["task"], row["variant"], row["seed"]) for row in read_output(args.output)}
        cells = [cell for cell in cells if cell not in there]
        # Seed by seed, so that one that is cut off has the same seeds of all; long cells first, so that no worker is left
        # with one at the end.
        random.Random(0).shuffle(cells)
        cells.sort(key=lambda cell: (cell[2], "3 x" not in cell[1], "in_context" not in cell[1]))
        run_all(run_cell, cells, args.jobs, devices, shared, args.output)
        if args.cost_steps:
            cost_cells = [(t, v) for t in args.tasks for v in args.variants]
            run_all(run_cost, cost_cells, 1, min(devices, 1), shared, costs_file, cells_a_process=1)
    rows, costs = read_output(args.output), read_output(costs_file)
    for task in args.tasks:
        print(f"\n## {task}\n\n{table(rows, costs, task)}")
    if args.figures is not None:
        draw_figures(rows, args.tasks, args.figures)


class HashableNamespace(argparse.Namespace):
    def __hash__(self):
        return hash(tuple(sorted((k, str(v)) for k, v in vars(self).items())))


if __name__ == "__main__":
    main(parse_args())
