# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Paintings of validation samples, made with the pipeline and the weights that are being trained.

Each sample is painted from the same noise with its own map, with another sample's and without one, so that what the map
changes can be seen.
"""

from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.training_utils import free_memory

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.encoding import Encoder
from semantic_fill.engines import Engine
from semantic_fill.files import CHECKPOINTS_REMAIN, explain_write_errors, read_encoding
from semantic_fill.layout import canvas_settings
from semantic_fill.metrics import likeness
from semantic_fill.options import Options
from semantic_fill.page import sample_file
from semantic_fill.sampling import wrong_maps


# Smaller pictures are enlarged by a whole number, so that their notes can be read.
SMALLEST_CELL = 96
# A picture and the note below it.
Cell = tuple[PIL.Image.Image, str]


# -- Paint ------------------------------------------------------------------------------------------------------------


def paint_samples(run) -> PIL.Image.Image | None:
    """
    Paints validation samples of a `Run` into `samples/` and into the trackers. Every process has to call it.

    Returns:
        `PIL.Image.Image`: A row for each sample: visible view, map, paintings and target; `None` on all but the main
        process.
    """
    options, engine, step = run.options, run.engine, run.state.step
    encoder = run.encoder if run.held_out is None else run.held_out.encoder
    accelerator, model = engine.accelerator, engine.unwrap(run.model)
    # Sharded weights need every process to paint, and one of them keeps the picture.
    if not (accelerator.is_main_process or engine.forward_is_collective):
        return None
    vae, vae_device = encoder.pipeline.vae, encoder.pipeline.vae.device
    # What the allocator keeps of a step is in pieces that the VAE's larger tensors do not fit.
    free_memory()
    vae.to(accelerator.device)
    model.eval()
    try:
        rows = _paint(model, encoder, engine, options)
    finally:
        model.train()
        vae.to(vae_device)
        free_memory()
    if not accelerator.is_main_process:
        return None
    sheet = draw_sheet(rows)
    file = sample_file(options, step)
    with explain_write_errors("--output_dir", CHECKPOINTS_REMAIN):
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(sheet), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb  # pyright: ignore[reportMissingImports] It is optional.

            tracker.log({"validation": wandb.Image(sheet)}, step=step)
    return sheet


@torch.no_grad()
def _paint(model, encoder: Encoder, engine: Engine, options: Options) -> list[dict[str, Cell]]:
    components, dataset = dict(encoder.pipeline.components), encoder.dataset
    if encoder.cached:
        # The text encoders were released, and the prompts' encodings are in the cache.
        components |= {"text_encoder": None, "text_encoder_2": None}
    pipeline = FluxFillSemanticPipeline(
        **components | {"transformer": model.transformer, "semantic_attention": model.semantic_attention},
        **canvas_settings(options),
    )
    pipeline.set_progress_bar_config(disable=True)
    indices = range(min(options.num_validation_images, len(dataset)))
    names = encoder.maps if encoder.mode.uses_map else ()
    others = {name: wrong_maps(dataset, list(indices), name) for name in names}
    rows = []
    for index in indices:
        views, caption = dataset.views(index), dataset.caption(index)
        if encoder.cached:
            prompt: dict[str, Any] = read_encoding(encoder.prompt_file(caption))
            prompt = {name: tensor[None].to(engine.accelerator.device) for name, tensor in prompt.items()}
        else:
            prompt = encoder.encode_prompts([caption])
        own = {name: views[name] for name in names if name in views}
        maps: dict[str, dict[str, torch.Tensor]] = {"right map": own} if names else {"painting": {}}
        row = {"visible": (as_picture(views["visible"]), "")}
        for name in names:
            label = "map" if len(names) == 1 else name
            row |= {label: (as_picture(own[name]), "")} if name in own else {}
            if index in others[name]:
                maps[f"wrong {label}"] = own | {name: dataset.views(others[name][index])[name]}
        maps |= {"no map": {}} if names else {}
        for name, semantic in maps.items():
            with engine.autocast():
                output: Any = pipeline(
                    image=views["visible"],
                    semantic_image=semantic,
                    num_inference_steps=options.validation_inference_steps,
                    guidance_scale=options.validation_guidance_scale,
                    max_sequence_length=encoder.max_sequence_length,
                    generator=torch.Generator().manual_seed(options.seed),
                    output_type="pt",
                    **prompt,
                )
            painted = output.images.float().cpu()
            figures = {name: values.item() for name, values in likeness(painted, views["target"][None]).items()}
            row[name] = (as_picture(painted[0]), f"{figures['psnr']:.1f} dB, SSIM {figures['ssim']:.2f}")
        rows.append(row | {"target": (as_picture(views["target"]), "")})
    return rows


# -- Draw -------------------------------------------------------------------------------------------------------------


def as_picture(view: torch.Tensor) -> PIL.Image.Image:
    """A view `(3, height, width)` in [0, 1] as a picture."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(view[None]))[0]


def draw_sheet(rows: list[dict[str, Cell]]) -> PIL.Image.Image:
    """
    Pictures row by row under the names of their columns, each with its note below it. All cells have the size of the
    largest picture, and a row may lack some of the columns.
    """
    # A column that one row lacks keeps its place. What the longest row lacks comes last.
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    width, height = (max(sides) for sides in zip(*(cell[0].size for row in rows for cell in row.values())))
    factor = max(1, -(-SMALLEST_CELL // width))
    width, height = factor * width, factor * height
    font_size = max(10, width // 24)
    font, line = PIL.ImageFont.load_default(font_size), font_size + 6
    pitch = height + line * any(note for row in rows for _, note in row.values())
    sheet = PIL.Image.new("RGB", (len(names) * width, line + len(rows) * pitch), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for column, name in enumerate(names):
        draw.text((column * width + 2, 2), name, fill="black", font=font)
        for index, row in enumerate(rows):
            if name in row:
                picture, note = row[name]
                enlarged = picture.resize(
                    (factor * picture.width, factor * picture.height), PIL.Image.Resampling.NEAREST
                )
                sheet.paste(enlarged, (column * width, line + index * pitch))
                draw.text((column * width + 2, line + index * pitch + height + 2), note, fill="black", font=font)
    return sheet
