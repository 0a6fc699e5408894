# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Paintings of validation samples, made with the pipeline and the weights that are being trained."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers.image_processor import VaeImageProcessor

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.encoding import Encoder
from semantic_fill.engines import Engine
from semantic_fill.files import CHECKPOINTS_REMAIN, explain_write_errors, read_encoding
from semantic_fill.options import Options


def paint_samples(model, encoder: Encoder, step: int, engine: Engine, options: Options) -> PIL.Image.Image | None:
    """
    Paints samples into `samples/` and into the trackers. Every process has to call it.

    Args:
        model (`SemanticFillModel`): The unwrapped model.

    Returns:
        `PIL.Image.Image`: Rows of visible view, map, painting and target; `None` on all but the main process.
    """
    accelerator = engine.accelerator
    # Sharded weights need every process to paint, and one of them keeps the picture.
    if not (accelerator.is_main_process or engine.forward_is_collective):
        return None
    vae, vae_device = encoder.pipeline.vae, encoder.pipeline.vae.device
    vae.to(accelerator.device)
    model.eval()
    try:
        pictures = _paint(model, encoder, engine, options)
    finally:
        model.train()
        vae.to(vae_device)
    if not accelerator.is_main_process:
        return None
    grid = tile_pictures(pictures, columns=4)
    folder = Path(options.output_dir, "samples")
    with explain_write_errors("--output_dir", CHECKPOINTS_REMAIN):
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"step-{step:06d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb  # pyright: ignore[reportMissingImports] It is optional.

            tracker.log({"validation": wandb.Image(grid)}, step=step)
    return grid


@torch.no_grad()
def _paint(model, encoder: Encoder, engine: Engine, options: Options) -> list[PIL.Image.Image]:
    components = dict(encoder.pipeline.components)
    if encoder.cached:
        # The text encoders were released, and the prompts' encodings are in the cache.
        components |= {"text_encoder": None, "text_encoder_2": None}
    pipeline = FluxFillSemanticPipeline(
        **components | {"transformer": model.transformer, "semantic_attention": model.semantic_attention},
        semantic_mode=options.semantic_mode,
        fusion_alpha=options.fusion_alpha,
    )
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for index in range(min(options.num_validation_images, len(encoder.dataset))):
        views, caption = encoder.dataset.views(index), encoder.dataset.caption(index)
        if encoder.cached:
            prompt: dict[str, Any] = read_encoding(encoder.prompt_file(caption))
            prompt = {name: tensor[None].to(engine.accelerator.device) for name, tensor in prompt.items()}
        else:
            prompt = encoder.encode_prompts([caption])
        with engine.autocast():
            output: Any = pipeline(
                image=views["visible"],
                semantic_image=views["semantic"] if encoder.mode.uses_map else None,
                num_inference_steps=options.validation_inference_steps,
                guidance_scale=options.validation_guidance_scale,
                max_sequence_length=encoder.max_sequence_length,
                generator=torch.Generator().manual_seed(options.seed),
                output_type="pt",
                **prompt,
            )
        # Pairs have no map to show.
        semantic = views.get("semantic", torch.full_like(views["visible"], 0.5))
        row = torch.stack([views["visible"], semantic, output.images[0].float().cpu(), views["target"]])
        pictures += VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(row))
    return pictures


def tile_pictures(pictures: list[PIL.Image.Image], columns: int) -> PIL.Image.Image:
    """Pictures row by row in one. All cells have the size of the largest picture."""
    width, height = (max(sides) for sides in zip(*(picture.size for picture in pictures)))
    grid = PIL.Image.new("RGB", (columns * width, len(pictures) // columns * height))
    for index, picture in enumerate(pictures):
        grid.paste(picture, (index % columns * width, index // columns * height))
    return grid
