# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""FLUX.1 Fill as a paired image translator, guided by a semantic map.

The visible view and the yet unknown target view stand side by side in one picture whose right half is masked
(in-context editing, https://huggingface.co/papers/2504.20690). While denoising, a small cross-attention over the
semantic map enhances the noisy tokens before each call of the transformer.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import BaseOutput, logging, replace_example_docstring
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast


# As a dynamic module (`custom_pipeline=`) this file has a package, and the module stands beside it; installed, it has
# none. `import ... as` escapes the dynamic loader's check for packages that are not installed.
if __package__:
    from .semantic_attention import SemanticAttentionModel
else:
    import semantic_attention as _semantic_attention

    SemanticAttentionModel = _semantic_attention.SemanticAttentionModel

# `save_pretrained` records the component as ["semantic_attention", "SemanticAttentionModel"], which a pipeline loaded
# through `custom_pipeline=` must be able to import again where the package is not installed.
sys.modules.setdefault("semantic_attention", sys.modules[SemanticAttentionModel.__module__])

logger = logging.get_logger(__name__)

SEMANTIC_SUBFOLDER = "semantic_attention"
# Safetensors metadata key beside diffusers' own: how the map entered while the LoRA was trained.
SEMANTIC_METADATA_KEY = "semantic_fill"


@dataclass(frozen=True)
class SemanticMode:
    """How the semantic map enters: the views that stand side by side on the canvas, and what else happens to them."""

    panels: tuple[str, ...] = ("visible", "target")
    attends: bool = False
    fuses: bool = False

    @property
    def map_on_canvas(self) -> bool:
        return self.fuses or "semantic" in self.panels


SEMANTIC_MODES = {
    "cross_attention": SemanticMode(attends=True),
    "none": SemanticMode(),
    "pixel_fusion": SemanticMode(fuses=True),
    "in_context": SemanticMode(panels=("visible", "target", "semantic")),
}


def _semantic_mode(name: str) -> SemanticMode:
    if name not in SEMANTIC_MODES:
        raise ValueError(f"`semantic_mode` has to be one of {tuple(SEMANTIC_MODES)} but is {name!r}.")
    return SEMANTIC_MODES[name]


def lay_under_panels(tokens: torch.Tensor, rows: int, columns: int, num_panels: int) -> torch.Tensor:
    """Repeats one panel's `(batch, rows * columns, channels)` tokens under each of `num_panels` panels in a row."""
    return tokens.unflatten(1, (rows, 1, columns)).expand(-1, -1, num_panels, -1, -1).flatten(1, 3)


def panel_positions(rows: int, columns: int, num_panels: int, device: torch.device | None = None) -> torch.Tensor:
    """`(rows * num_panels * columns, 2)`: the row, and the column within its panel, of each token of the canvas."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(device=device, dtype=torch.float32)
    return lay_under_panels(grid[None], rows, columns, num_panels)[0]


def refuse_deep(picture: PIL.Image.Image) -> None:
    """
    Raises a `ValueError` where a picture has more than 8 bits a channel: which range of them is to be seen is not to be
    guessed. Pillow has no mode for colours of 16 bits and cuts them short as it loads them; before, the file's tiles
    tell.
    """
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"has the mode {picture.mode}; 8 bits a channel are accepted")
    if any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ())):
        raise ValueError("has 16 bits a channel; 8 are accepted")


def to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    """
    A picture in RGB as training and painting read it: CMYK, grey and palette pictures are converted, transparent places
    are laid over mid-grey.

    Raises:
        `ValueError`: where it is empty or animated, or has more than 8 bits a channel.
    """
    if 0 in picture.size:
        raise ValueError(f"is {picture.width}x{picture.height} pixels")
    # A photograph in the format MPO only has further views of itself behind it.
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        raise ValueError(f"is animated ({picture.n_frames} frames)")
    refuse_deep(picture)
    if picture.has_transparency_data:
        ground = PIL.Image.new("RGBA", picture.size, (128, 128, 128, 255))
        picture = PIL.Image.alpha_composite(ground, picture.convert("RGBA"))
    return picture.convert("RGB")


# Colours of a heat map from 0 to 1; between them it is linear.
HEAT_COLOURS = np.array([[0, 0, 0], [150, 20, 90], [245, 110, 30], [255, 250, 200]], np.float32)


@dataclass
class SemanticAttentionOutput(BaseOutput):
    r"""
    What [`FluxFillSemanticPipeline.semantic_attention_maps`] saw.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            What the call painted.
        maps (`np.ndarray` of shape `(pictures, steps, points, rows, columns)` and dtype `float32`):
            How much each point looks at each place of the semantic map, a grid of 16x16-pixel tokens. Every heat map
            sums to one. Without `average_heads` the shape is `(pictures, steps, points, heads, rows, columns)`.
        points (`list[tuple[float, float]]`):
            The points, (x, y) in pixels of one view.
        steps (`list[int]`):
            The steps, counted from 0.
        size (`tuple[int, int]`):
            Width and height of one view in pixels.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    maps: np.ndarray
    points: list[tuple[float, float]]
    steps: list[int]
    size: tuple[int, int]

    def overlay(
        self,
        background: PIL.Image.Image,
        picture: int = 0,
        step: int = 0,
        point: int = 0,
        opacity: float = 0.6,
    ) -> PIL.Image.Image:
        r"""
        One heat map, brightest at its largest weight, over a picture, with a ring around its point.

        Args:
            background (`PIL.Image.Image`):
                The semantic map, or any view of the same scene.
            picture, step, point (`int`, default to 0):
                Places in `maps`. Heads are averaged.
            opacity (`float`, defaults to 0.6):
                Share of the heat, in [0, 1].

        Returns:
            `PIL.Image.Image`: RGB, as large as `background`.
        """
        if not 0 <= opacity <= 1:
            raise ValueError(f"`opacity` has to be within [0, 1] but is {opacity}.")
        heat = self.maps[picture, step, point]
        heat = heat.reshape(-1, *heat.shape[-2:]).mean(axis=0)
        levels = heat / heat.max() * (len(HEAT_COLOURS) - 1)
        colours = np.stack([np.interp(levels, range(len(HEAT_COLOURS)), channel) for channel in HEAT_COLOURS.T], -1)
        colours = PIL.Image.fromarray(colours.round().astype(np.uint8))
        colours = colours.resize(background.size, PIL.Image.Resampling.NEAREST)
        blended = PIL.Image.blend(background.convert("RGB"), colours, opacity)
        x, y = (at * side / of for at, side, of in zip(self.points[point], background.size, self.size))
        radius, line = max(3, min(background.size) / 40), max(1, min(background.size) // 160)
        draw = PIL.ImageDraw.Draw(blended)
        for grow, colour in ((line, "black"), (0, "white")):
            box = (x - radius - grow, y - radius - grow, x + radius + grow, y + radius + grow)
            draw.ellipse(box, outline=colour, width=line)
        return blended

    def class_mass(
        self, semantic_image: PIL.Image.Image, palette: dict[tuple[int, int, int], str]
    ) -> dict[str, np.ndarray]:
        r"""
        How much of the attention falls on each class of the semantic map. A token's weight is shared out evenly among
        its pixels.

        Args:
            semantic_image (`PIL.Image.Image`):
                The map that was passed to the call.
            palette (`dict[tuple[int, int, int], str]`):
                Names of the map's colours. Colours of the same name are one class; colours of no name are `"other"`.

        Returns:
            `dict[str, np.ndarray]`: `maps.shape[:-2]` for each name, summing to one over the names.
        """
        pixels = np.asarray(semantic_image.convert("RGB"))
        (height, width), (rows, columns) = pixels.shape[:2], self.maps.shape[-2:]
        tokens = np.arange(height)[:, None] * rows // height * columns + np.arange(width) * columns // width
        area = np.bincount(tokens.ravel(), minlength=rows * columns)
        if not area.all():
            raise ValueError(
                f"`semantic_image` has to have at least one pixel for each of the {columns}x{rows} tokens but is"
                f" {width}x{height}."
            )
        flat_maps, mass, left = self.maps.reshape(*self.maps.shape[:-2], -1), {}, np.ones((height, width), bool)
        for colour, name in palette.items():
            here = (pixels == np.array(colour)).all(axis=-1)
            left &= ~here
            share = np.bincount(tokens[here], minlength=rows * columns) / area
            mass[name] = mass.get(name, 0) + flat_maps @ share
        if left.any():
            share = np.bincount(tokens[left], minlength=rows * columns) / area
            mass["other"] = mass.get("other", 0) + flat_maps @ share
        return mass


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers.utils import load_image

        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "black-forest-labs/FLUX.1-Fill-dev",
        ...     custom_pipeline="user/my-semantic-fill",
        ...     trust_remote_code=True,
        ...     dtype=torch.bfloat16,
        ... ).to("cuda")
        >>> pipe.load_lora_weights("user/my-semantic-fill")
        >>> thermal = pipe(
        ...     prompt="a thermal photograph of a street",
        ...     image=load_image("street.png"),
        ...     semantic_image=load_image("street_panoptic.png"),
        ... ).images[0]
        ```
"""


class FluxFillSemanticPipeline(FluxFillPipeline):
    r"""
    Translates a picture into another view of the same scene with FLUX.1 Fill, guided by a semantic map.

    Without `mask_image` a call paints the target view beside the visible one. With `mask_image` it is
    [`FluxFillPipeline`] plus guidance. Without a semantic map, or at `semantic_scale=0`, both give what
    [`FluxFillPipeline`] gives, bit for bit.

    Args:
        scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer:
            The components of [`FluxFillPipeline`].
        semantic_attention (`SemanticAttentionModel`, *optional*):
            The cross-attention over the semantic map; loaded by `load_lora_weights` as well.
        semantic_mode (`str`, defaults to `"cross_attention"`):
            How the map enters, one of `"cross_attention"`, `"none"`, `"pixel_fusion"` (the visible view is blended
            with the map) and `"in_context"` (the map is a third panel). `load_lora_weights` sets it to what the
            weights were trained with.
        fusion_alpha (`float`, defaults to 0.5):
            Share of the map in the blend of `"pixel_fusion"`, in [0, 1].
        max_sequence_length (`int`, defaults to 512):
            T5 tokens of a prompt where a call names no number. `load_lora_weights` sets it as well.
    """

    _optional_components = ["semantic_attention"]
    # Small enough to stay on the device, and called between two steps of the transformer.
    _exclude_from_cpu_offload = ["semantic_attention"]
    # Sees what the module is about to see in each step; set for the time of `semantic_attention_maps` only.
    _attention_observer = None

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        semantic_attention: SemanticAttentionModel | None = None,
        semantic_mode: str = "cross_attention",
        fusion_alpha: float = 0.5,
        max_sequence_length: int = 512,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
        self._set_semantic_attention(semantic_attention)
        self._set_semantic_mode(semantic_mode, fusion_alpha, max_sequence_length)

    def _set_semantic_attention(self, semantic_attention: SemanticAttentionModel | None) -> None:
        channels = self.latent_channels * 4
        if semantic_attention is not None:
            config = getattr(semantic_attention, "config", None)
            if getattr(config, "in_channels", None) != channels:
                raise ValueError(
                    f"`semantic_attention` has to be a `SemanticAttentionModel` with `in_channels={channels}`, the"
                    f" channels of a token, but is {type(semantic_attention).__name__} with {config}."
                )
        self.register_modules(semantic_attention=semantic_attention)
        if semantic_attention is not None:
            # Not the name of the dynamic module that this code may run as.
            self.register_to_config(semantic_attention=("semantic_attention", type(semantic_attention).__name__))

    def _set_semantic_mode(self, semantic_mode: str, fusion_alpha: float, max_sequence_length: int) -> None:
        _semantic_mode(semantic_mode)
        if not 0 <= fusion_alpha <= 1:
            raise ValueError(f"`fusion_alpha` has to be within [0, 1] but is {fusion_alpha}.")
        self.register_to_config(
            semantic_mode=semantic_mode, fusion_alpha=fusion_alpha, max_sequence_length=max_sequence_length
        )

    @property
    def _patch_size(self) -> int:
        """Pixels of a picture along one side of a token: the VAE's factor times the 2x2 packing."""
        return self.vae_scale_factor * 2

    # -- Encode: the steps that training and inference share ---------------------------------------------------------

    def prepare_diptych(
        self,
        visible: torch.Tensor,
        target: torch.Tensor | None = None,
        semantic: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Puts the views on one canvas, as the pipeline's `semantic_mode` wants them.

        Args:
            visible (`torch.Tensor` of shape `(batch, 3, height, width)`):
                The visible view, in [0, 1].
            target (`torch.Tensor` of the same shape, *optional*):
                The target view. Where it is unknown, the visible view stands in its place: with `strength` below 1
                painting starts from it, at 1 and in the masked picture it leaves no trace.
            semantic (`torch.Tensor` of the same shape, *optional*):
                The semantic map, for the modes that put it on the canvas. Without it `"pixel_fusion"` leaves the
                visible view as it is and `"in_context"` has a mid-grey third panel.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the diptych `(batch, 3, height, panels * width)` in [0, 1] and the
            mask `(1, 1, height, panels * width)`, 1 on the target panel and 0 elsewhere.
        """
        mode = SEMANTIC_MODES[self.config.semantic_mode]
        target = visible if target is None else target
        semantic_panel = torch.full_like(visible, 0.5) if semantic is None else semantic
        if mode.fuses and semantic is not None:
            visible = torch.lerp(visible, semantic, self.config.fusion_alpha)
        views = {"visible": visible, "target": target, "semantic": semantic_panel}
        diptych = torch.cat([views[panel] for panel in mode.panels], dim=3)
        one_panel = torch.ones_like(visible[:1, :1])
        mask = torch.cat([one_panel * (panel == "target") for panel in mode.panels], dim=3)
        return diptych, mask

    def encode_moments(self, diptych: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        The VAE's share of `encode_diptych`: posterior parameters (mean and log-variance) of the diptych and of the
        masked diptych, whose hidden part is mid-grey.

        Args:
            diptych (`torch.Tensor` of shape `(batch, 3, height, width)`):
                Pixels in [0, 1].
            mask (`torch.Tensor` of shape `(1 or batch, 1, height, width)`):
                1 where the transformer paints, 0 where it sees.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`, each `(batch, 2 * latent_channels, height / 8, width / 8)`.
        """
        pixels = self.image_processor.preprocess(diptych.to(self._execution_device))
        masked = pixels * (1 - mask.to(pixels.device))
        return tuple(self.vae.encode(x.to(self.vae.dtype)).latent_dist.parameters for x in (pixels, masked))

    def encode_diptych(
        self,
        diptych: torch.Tensor | None,
        mask: torch.Tensor,
        moments: tuple[torch.Tensor, torch.Tensor] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        Encodes a diptych as `__call__` does, drawing from the VAE's posterior.

        Args:
            diptych (`torch.Tensor` of shape `(batch, 3, height, width)`):
                Pixels in [0, 1]; `None` where `moments` are given.
            mask (`torch.Tensor` of shape `(1 or batch, 1, height, width)`):
                1 where the transformer paints, 0 where it sees.
            moments (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                What `encode_moments` gave for this diptych and mask earlier.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the two draws deterministic: that of the diptych first, then that of the masked one.
            dtype (`torch.dtype`, *optional*):
                Dtype of the results. Defaults to the VAE's.

        Returns:
            `x_0` `(batch, tokens, 64)`, `x_cond` `(batch, tokens, 320)` and `img_ids` `(tokens, 3)`.
        """
        if moments is None:
            moments = self.encode_moments(diptych, mask)
        dtype = dtype or moments[0].dtype
        latents, masked_latents = (DiagonalGaussianDistribution(m).sample(generator) for m in moments)
        batch_size, channels, height, width = latents.shape
        x_0 = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        x_0 = self._pack_latents(x_0, batch_size, channels, height, width).to(dtype)
        # The very method that `FluxFillPipeline.__call__` encodes its masked picture with.
        mask_tokens, masked_tokens = self.prepare_mask_latents(
            mask=mask,
            masked_image=masked_latents,
            batch_size=batch_size,
            num_channels_latents=channels,
            num_images_per_prompt=1,
            height=height * self.vae_scale_factor,
            width=width * self.vae_scale_factor,
            dtype=dtype,
            device=latents.device,
            generator=None,
        )
        x_cond = torch.cat((masked_tokens, mask_tokens), dim=-1)
        img_ids = self._prepare_latent_image_ids(batch_size, height // 2, width // 2, latents.device, dtype)
        return x_0, x_cond, img_ids

    def encode_semantic(self, semantic: torch.Tensor) -> torch.Tensor:
        r"""
        Encodes the semantic map by the mode of the VAE's posterior, which takes nothing from any random stream.

        Args:
            semantic (`torch.Tensor` of shape `(batch, 3, height, width)`):
                The map as a picture, in [0, 1].

        Returns:
            `torch.Tensor` of shape `(batch, height / 16 * width / 16, 64)`: the map's tokens, in the VAE's dtype.
            `lay_under_panels` repeats them across the canvas.
        """
        pixels = self.image_processor.preprocess(semantic.to(self._execution_device)).to(self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        return self._pack_latents(latents, *latents.shape)

    # -- Attend ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _semantic_guidance(
        self,
        semantic_tokens: torch.Tensor | None,
        positions: torch.Tensor | None,
        semantic_scale: float,
        layout: tuple[int, int, int, int],
    ):
        """
        Enhances the transformer's input for the time of one call, also where that call ends in an error. `layout` is
        the canvas in tokens: rows, columns of a panel, panels, and which of them is painted.
        """

        if self._attention_observer is not None and semantic_tokens is None:
            raise ValueError(
                "`semantic_attention_maps` needs a `semantic_image` and a `semantic_scale` other than 0: without them no"
                " map is attended."
            )

        def enhance(transformer, args, kwargs):
            if self._attention_observer is not None:
                self._attention_observer(kwargs["hidden_states"], semantic_tokens, positions, semantic_scale, layout)
            kwargs["hidden_states"] = self.semantic_attention.enhance(
                kwargs["hidden_states"], semantic_tokens, positions, semantic_scale
            )
            return args, kwargs

        # A call that ended in an error, or with Ctrl-C, left its own there, perhaps of another size.
        self.transformer._reset_stateful_cache()
        with contextlib.ExitStack() as stack:
            # `FluxFillPipeline` opens no cache context itself, which FirstBlockCache and its kin need.
            stack.enter_context(self.transformer.cache_context("cond"))
            if semantic_tokens is not None:
                handle = self.transformer.register_forward_pre_hook(enhance, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    # -- Paint -------------------------------------------------------------------------------------------------------

    def _read_view(self, name: str, view: PipelineImageInput, size: tuple[int, int] | None, mode: str) -> torch.Tensor:
        """A picture argument as `(batch, 3, height, width)` in [0, 1] on the device, resized where a `size` is given."""
        accepted = "a PIL image, a numpy array (batch, height, width, 3) or a tensor (batch, 3, height, width)"
        pictures = []
        for item in view if isinstance(view, (list, tuple)) else [view]:
            if isinstance(item, PIL.Image.Image):
                item = VaeImageProcessor.pil_to_numpy(_usable(name, item))
            if isinstance(item, np.ndarray):
                if item.dtype.kind not in "fiu":
                    raise ValueError(f"`{name}` has to hold real numbers but has the dtype {item.dtype}.")
                item = np.ascontiguousarray(item)
                item = torch.from_numpy(item).movedim(-1, -3) if item.ndim in (3, 4) else torch.from_numpy(item)
            if not isinstance(item, torch.Tensor):
                raise ValueError(f"`{name}` has to be {accepted}, or a list of them, but is {type(item).__name__}.")
            if item.ndim not in (3, 4) or item.shape[-3] != 3 or item.numel() == 0:
                raise ValueError(
                    f"`{name}` has to be {accepted}, or a list of them, but has, channels first, the shape"
                    f" {tuple(item.shape)}."
                )
            if item.is_complex() or item.dtype == torch.bool:
                raise ValueError(f"`{name}` has to hold real numbers but has the dtype {item.dtype}.")
            low, high = (extreme.item() for extreme in item.aminmax())
            # Written so that NaN fails as well.
            if not (low >= 0 and high <= 1):
                raise ValueError(f"`{name}` has to hold values within [0, 1] but holds [{low}, {high}].")
            pictures.append(item if item.ndim == 4 else item[None])
        sizes = [f"{picture.shape[-1]}x{picture.shape[-2]}" for picture in pictures]
        if len(set(sizes)) != 1:
            raise ValueError(f"`{name}` has to hold pictures of one size but holds {sizes}.")
        # Contiguous, because convolutions round differently on channels-last pictures.
        pixels = torch.cat(pictures).to(torch.float32).contiguous()
        if size is not None and size != pixels.shape[-2:]:
            pixels = F.interpolate(pixels, size, mode=mode, antialias=mode != "nearest-exact")
        if pixels.shape[-2] % self._patch_size or pixels.shape[-1] % self._patch_size:
            raise ValueError(
                f"`{name}` is {sizes[0]} pixels, but width and height have to be multiples of {self._patch_size}. Pass"
                " `height` and `width` to resize it."
            )
        # `FluxFillPipeline` works on pictures where they are.
        return pixels.to(self._execution_device)

    def _check_semantic_inputs(
        self, image, semantic_image, mask_image, semantic_scale, height, width, output_type
    ) -> None:
        mode = SEMANTIC_MODES[self.config.semantic_mode]
        if image is None:
            raise ValueError(
                "`image` has to be the visible view, or with `mask_image` the picture to fill, but is None."
            )
        if not isinstance(semantic_scale, (int, float)) or not np.isfinite(semantic_scale):
            raise ValueError(f"`semantic_scale` has to be a finite number but is {semantic_scale!r}.")
        if semantic_image is not None and mode.attends and semantic_scale != 0 and self.semantic_attention is None:
            raise ValueError(
                "`semantic_image` was passed, but the pipeline has no `semantic_attention` to look it up with. Load"
                " one with `load_lora_weights` or pass `semantic_attention=` when making the pipeline, or leave"
                " `semantic_image` out."
            )
        if semantic_image is not None and not (mode.attends or mode.map_on_canvas):
            raise ValueError(
                f'`semantic_image` was passed, but `semantic_mode="{self.config.semantic_mode}"` uses no map. Leave it'
                " out."
            )
        if mask_image is not None and mode.map_on_canvas:
            raise ValueError(
                f'`mask_image` was passed, but `semantic_mode="{self.config.semantic_mode}"` makes its own mask. It is'
                ' accepted with the modes "cross_attention" and "none".'
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type` has to be "pil", "np", "pt" or "latent" but is {output_type!r}.')
        if (height is None) != (width is None):
            raise ValueError(f"`height` and `width` have to be passed together but are {height} and {width}.")
        for name, size in (("height", height), ("width", width)):
            if size is not None and (not _is_count(size) or size < self._patch_size or size % self._patch_size):
                raise ValueError(f"`{name}` has to be a positive multiple of {self._patch_size} but is {size}.")

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        semantic_image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        semantic_scale: float = 1.0,
        return_diptych: bool = False,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 30.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.FloatTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        pooled_prompt_embeds: torch.FloatTensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[int, int, dict], None] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int | None = None,
    ):
        r"""
        Paints the target view of `image`, or with `mask_image` fills `image` itself.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to paint. One prompt serves all pictures of a batch.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                The visible view, `(batch, height, width, 3)` as numpy array or `(batch, 3, height, width)` as tensor,
                in [0, 1]. Its sides have to be multiples of 16 unless `height` and `width` are passed. With
                `mask_image` the picture to fill.
            semantic_image (as `image`, *optional*):
                The semantic map of the same scene, pixel for pixel. One map serves all pictures of a batch. With
                `height` and `width`, or `mask_image`, it is resized with them, keeping its colours.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                As in [`FluxFillPipeline`]: white is repainted.
            semantic_scale (`float`, defaults to 1.0):
                Strength of the guidance. 0 leaves the module out.
            return_diptych (`bool`, defaults to `False`):
                Whether to give the whole canvas back instead of the target view. Without meaning with `mask_image`.
            prompt_2 (`str` or `list[str]`, *optional*):
                Prompt of the T5 encoder. Defaults to `prompt`.
            height, width (`int`, *optional*):
                Size of one view in pixels, multiples of 16. Default to the size of `image`; with `mask_image` to 1024,
                as in [`FluxFillPipeline`].
            strength (`float`, defaults to 1.0):
                Below 1, painting starts from the noised visible view instead of from noise alone.
            num_inference_steps (`int`, defaults to 50), sigmas (`list[float]`, *optional*), guidance_scale (`float`,
            defaults to 30.0), num_images_per_prompt (`int`, defaults to 1), generator (`torch.Generator` or
            `list[torch.Generator]`, *optional*), prompt_embeds, pooled_prompt_embeds (`torch.Tensor`, *optional*),
            joint_attention_kwargs (`dict`, *optional*), callback_on_step_end (`Callable`, *optional*),
            callback_on_step_end_tensor_inputs (`list[str]`):
                As in [`FluxFillPipeline`].
            max_sequence_length (`int`, *optional*):
                T5 tokens of a prompt. Defaults to the pipeline's, which `load_lora_weights` takes over from training.
            latents (`torch.Tensor` of shape `(batch, tokens, 64)`, *optional*):
                Noisy tokens of the whole canvas to start from.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for the packed latents `(batch, tokens, 64)` of what would have
                been decoded.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`~pipelines.flux.FluxPipelineOutput`] instead of a tuple.

        Examples:

        Returns:
            [`~pipelines.flux.FluxPipelineOutput`] or `tuple`: the pictures.

        Raises:
            `ValueError`: where an argument does not fit the pipeline or another argument.
        """
        mode = SEMANTIC_MODES[self.config.semantic_mode]
        self._check_semantic_inputs(image, semantic_image, mask_image, semantic_scale, height, width, output_type)
        if mask_image is not None:
            _check_fill_picture("image", image)
            _check_fill_picture("mask_image", mask_image)
        _check_texts(prompt=prompt, prompt_2=prompt_2)
        _check_numbers(strength=strength, guidance_scale=guidance_scale)
        _check_counts(num_inference_steps=num_inference_steps, num_images_per_prompt=num_images_per_prompt)
        if max_sequence_length is not None:
            _check_counts(max_sequence_length=max_sequence_length)
        for name, value, kind in (
            ("sigmas", sigmas, list),
            ("joint_attention_kwargs", joint_attention_kwargs, dict),
            ("callback_on_step_end_tensor_inputs", callback_on_step_end_tensor_inputs, list),
        ):
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"`{name}` has to be a {kind.__name__} but is {value!r}.")
        if sigmas is not None and len(sigmas) == 0:
            raise ValueError("`sigmas` has to hold a number for each step but is empty.")
        if sigmas is not None:
            _check_numbers(**{f"sigmas[{i}]": sigma for i, sigma in enumerate(sigmas)})
        _check_tensors(latents=latents, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds)
        config = self.transformer.config
        for name, tensor, ndim, channels in (
            ("prompt_embeds", prompt_embeds, 3, config.joint_attention_dim),
            ("pooled_prompt_embeds", pooled_prompt_embeds, 2, config.pooled_projection_dim),
        ):
            if tensor is not None and (tensor.ndim != ndim or 0 in tensor.shape or tensor.shape[-1] != channels):
                raise ValueError(
                    f"`{name}` has to have {ndim} dimensions, the last of them {channels} long, but has the shape"
                    f" {tuple(tensor.shape)}."
                )
        if (
            prompt_embeds is not None
            and pooled_prompt_embeds is not None
            and len(prompt_embeds) != len(pooled_prompt_embeds)
        ):
            raise ValueError(
                f"`pooled_prompt_embeds` has to hold as many prompts as `prompt_embeds`, {len(prompt_embeds)}, but holds"
                f" {len(pooled_prompt_embeds)}."
            )
        for part in generator if isinstance(generator, (list, tuple)) else [generator]:
            if part is not None and not isinstance(part, torch.Generator):
                raise ValueError(f"`generator` has to be a `torch.Generator` or a list of them but holds {part!r}.")

        # 1. Read
        translates = mask_image is None
        size = None if height is None else (height, width)
        if translates:
            visible = self._read_view("image", image, size, mode="bicubic").clamp(0, 1)
            height, width = visible.shape[-2:]
            num_images = visible.shape[0]
        else:
            # `FluxFillPipeline` resizes the picture and its mask, so the map goes with them.
            size = size or (self.default_sample_size * self.vae_scale_factor,) * 2
            height, width = size
            num_images = _batch_size(image)
        semantic = None
        if semantic_image is not None:
            # A map holds labels: blending two of them would make a third.
            semantic = self._read_view("semantic_image", semantic_image, size, mode="nearest-exact")
            if semantic.shape[-2:] != (height, width):
                raise ValueError(
                    f"`semantic_image` has to be as large as `image`, {width}x{height} pixels, but is"
                    f" {semantic.shape[-1]}x{semantic.shape[-2]}. Pass `height` and `width` to resize both."
                )
        num_maps = 0 if semantic is None else semantic.shape[0]
        if max(num_images, num_maps) > 1:
            prompt, prompt_2 = (
                [text] * max(num_images, num_maps) if isinstance(text, str) else text for text in (prompt, prompt_2)
            )
        batch_size = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
        for name, number in (("image", num_images), ("semantic_image", num_maps)):
            if number > 1 and number != batch_size:
                raise ValueError(
                    f"`{name}` has to hold 1 picture or one for each of the {batch_size} prompts, but holds {number}."
                )
        panels, panel_index = (len(mode.panels), mode.panels.index("target")) if translates else (1, 0)
        rows, columns = height // self._patch_size, width // self._patch_size
        if latents is not None:
            expected = (batch_size * num_images_per_prompt, rows * panels * columns, self.latent_channels * 4)
            if tuple(latents.shape) != expected:
                raise ValueError(
                    f"`latents` has to have the shape {expected}, the packed canvas, but has {tuple(latents.shape)}."
                )

        # 2. Encode
        if semantic is not None:
            semantic = semantic.expand(batch_size, -1, -1, -1)
        if translates:
            if semantic is not None and mode.map_on_canvas:
                image, mask_image = self.prepare_diptych(visible.expand_as(semantic), semantic=semantic.to(visible))
            else:
                image, mask_image = self.prepare_diptych(visible)
            if len(image) > 1:
                # `FluxFillPipeline` would repeat the prompts one by one but the pictures batch by batch.
                image = image.repeat_interleave(num_images_per_prompt, dim=0)
        elif num_images > 1 and num_images_per_prompt > 1:
            raise ValueError(
                f"`num_images_per_prompt` has to be 1 with `mask_image` and several pictures, but is"
                f" {num_images_per_prompt} with {num_images}. Repeat the prompts, pictures and masks instead."
            )
        semantic_tokens, positions = None, None
        if semantic is not None and mode.attends and semantic_scale != 0:
            semantic_tokens = lay_under_panels(self.encode_semantic(semantic), rows, columns, panels)
            semantic_tokens = semantic_tokens.repeat_interleave(num_images_per_prompt, dim=0)
            semantic_tokens = semantic_tokens.to(self.semantic_attention.dtype)
            positions = panel_positions(rows, columns, panels, semantic_tokens.device)

        # 3. Denoise and decode
        with self._semantic_guidance(semantic_tokens, positions, semantic_scale, (rows, columns, panels, panel_index)):
            images = super().__call__(
                prompt=prompt,
                prompt_2=prompt_2,
                image=image,
                mask_image=mask_image,
                height=height,
                width=width * panels,
                strength=strength,
                num_inference_steps=num_inference_steps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                output_type=output_type,
                return_dict=False,
                joint_attention_kwargs=joint_attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                max_sequence_length=max_sequence_length or self.config.max_sequence_length,
            )[0]

        # 4. Cut the target view out
        if translates and not return_diptych:
            images = _cut_panel(images, panel_index, panels, rows)
        if not return_dict:
            return (images,)
        return FluxPipelineOutput(images=images)

    # -- See why ------------------------------------------------------------------------------------------------------

    def semantic_attention_maps(
        self,
        *args,
        points: list[tuple[float, float]],
        steps: list[int] | None = None,
        layer: int = -1,
        average_heads: bool = True,
        chunk_size: int = 256,
        **kwargs,
    ) -> SemanticAttentionOutput:
        r"""
        Paints as a call does, bit for bit, and tells where in the semantic map the given points look.

        Args:
            points (`list[tuple[float, float]]`):
                Points of the painted view, (x, y) in pixels from its upper left corner; with `mask_image`, of the
                picture. Each stands for the 16x16-pixel token it falls in.
            steps (`list[int]`, *optional*):
                Denoising steps looked at, counted from 0; negative ones from the end. Defaults to all.
            layer (`int`, defaults to -1):
                Layer of the module looked at.
            average_heads (`bool`, defaults to `True`):
                Whether to average the heads instead of giving each its own map.
            chunk_size (`int`, defaults to 256):
                Points attended at once. The whole attention matrix is never formed.
            args, kwargs:
                As in `__call__`; `semantic_image` has to be among them.

        Returns:
            [`SemanticAttentionOutput`]: the pictures and the heat maps. The map lies under every panel, so the weights
            of its copies are added up.

        Raises:
            `ValueError`: where a point lies outside of the view, a step or layer does not exist, or no map is attended.
        """
        points = [tuple(point) for point in points]
        if not points or any(len(point) != 2 for point in points):
            raise ValueError(f"`points` has to hold at least one (x, y) but is {points!r}.")
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` has to be a positive integer but is {chunk_size}.")
        if self.semantic_attention is None or not SEMANTIC_MODES[self.config.semantic_mode].attends:
            raise ValueError(
                "`semantic_attention_maps` needs a pipeline with a `semantic_attention`, but this one has"
                f" {type(self.semantic_attention).__name__} in the mode {self.config.semantic_mode!r}."
            )
        num_layers = len(self.semantic_attention.layers)
        if not -num_layers <= layer < num_layers:
            raise ValueError(f"`layer` has to be within [{-num_layers}, {num_layers - 1}] but is {layer}.")
        if steps is not None and len(steps) == 0:
            raise ValueError("`steps` has to hold at least one step but is empty.")
        calls, seen, wanted, view = 0, {}, [], None

        def observe(hidden_states, semantic_tokens, positions, semantic_scale, layout):
            nonlocal calls, wanted, view
            rows, columns, panels, panel_index = layout
            if calls == 0:
                view = (columns * self._patch_size, rows * self._patch_size)
                for x, y in points:
                    if not (0 <= x < view[0] and 0 <= y < view[1]):
                        raise ValueError(
                            f"`points` has to lie within the view's {view[0]}x{view[1]} but has {(x, y)}."
                        )
                wanted = list(range(self.num_timesteps)) if steps is None else list(steps)
                for step in wanted:
                    if not -self.num_timesteps <= step < self.num_timesteps:
                        raise ValueError(
                            f"`steps` has to be within [{-self.num_timesteps}, {self.num_timesteps - 1}] but has {step}."
                        )
                wanted = [step % self.num_timesteps for step in wanted]
            if calls in wanted:
                tokens = [
                    (int(y) // self._patch_size * panels + panel_index) * columns + int(x) // self._patch_size
                    for x, y in points
                ]
                _, part, _ = self.semantic_attention.split_input(hidden_states)
                chunks = []
                for chunk in self.semantic_attention.attention_maps(
                    part, semantic_tokens, positions, semantic_scale, layer, tokens, chunk_size
                ):
                    chunk = chunk.unflatten(-1, (rows, panels, columns)).sum(dim=-2).transpose(1, 2)
                    chunks.append((chunk.mean(dim=2) if average_heads else chunk).cpu())
                seen[calls] = torch.cat(chunks, dim=1).numpy()
            calls += 1

        self._attention_observer = observe
        try:
            result = self(*args, **kwargs)
        finally:
            self._attention_observer = None
        maps = np.stack([seen[step] for step in wanted], axis=1)
        return SemanticAttentionOutput(images=result[0], maps=maps, points=points, steps=wanted, size=view)

    # -- Load and save -----------------------------------------------------------------------------------------------

    def load_lora_weights(
        self, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs
    ) -> None:
        r"""
        Loads a trained LoRA **and** its semantic attention module, and takes over the mode they were trained in.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A folder or Hub repository that [`FluxFillSemanticPipeline.save_lora_weights`] or the training script
                wrote. A state dict can hold the LoRA only.
            kwargs (*optional*):
                As in [`~loaders.FluxLoraLoaderMixin.load_lora_weights`].

        Raises:
            `ValueError`: where the weights were trained with `"cross_attention"` but the module is missing, where the
                LoRA's file is damaged, where a pickle is asked for, or where there is no such folder.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, dict):
            return super().load_lora_weights(source, **kwargs)
        source = str(source)
        if kwargs.get("use_safetensors") is False or not (kwargs.get("weight_name") or ".safetensors").endswith(
            ".safetensors"
        ):
            raise ValueError(
                f"`weight_name` has to be a safetensors file, as unpickling runs what it reads, but is"
                f" {kwargs.get('weight_name')!r} with `use_safetensors={kwargs.get('use_safetensors')}`."
            )
        # Else diffusers takes a pickle where there is no other file.
        kwargs["use_safetensors"] = True
        hub_kwargs = {
            name: kwargs[name]
            for name in ("cache_dir", "force_download", "local_files_only", "token", "revision")
            if name in kwargs
        }
        subfolder = kwargs.get("subfolder") or ""
        lora_file = _resolve_file(source, subfolder, kwargs.get("weight_name") or LORA_WEIGHT_NAME_SAFE, hub_kwargs)
        trained_with = {"semantic_mode": "cross_attention", "fusion_alpha": self.config.fusion_alpha}
        trained_with["max_sequence_length"] = self.config.max_sequence_length
        if lora_file is not None:
            try:
                with safetensors.safe_open(lora_file, framework="pt") as weights:
                    trained_with |= json.loads((weights.metadata() or {}).get(SEMANTIC_METADATA_KEY, "{}"))
            except safetensors.SafetensorError as error:
                raise ValueError(
                    f"`pretrained_model_name_or_path_or_dict` holds a damaged file, {lora_file}: {error}"
                ) from error

        before = self.semantic_attention, {name: self.config[name] for name in trained_with}
        module = None
        if _semantic_mode(trained_with["semantic_mode"]).attends:
            module_folder = "/".join(filter(None, (subfolder, SEMANTIC_SUBFOLDER)))
            if _resolve_file(source, module_folder, "config.json", hub_kwargs) is None:
                raise ValueError(
                    "`pretrained_model_name_or_path_or_dict` has to hold the module in"
                    f" `{module_folder}/config.json` beside the LoRA, but {source!r} has no such file. A LoRA without"
                    " a module loads with `FluxFillPipeline.load_lora_weights`."
                )
            module = SemanticAttentionModel.from_pretrained(
                source, subfolder=module_folder, use_safetensors=True, dtype=self.transformer.dtype, **hub_kwargs
            ).to(self._execution_device)
        if self.semantic_attention is not None and module is not None:
            logger.warning("The pipeline's `semantic_attention` is replaced by that of the LoRA being loaded.")
        # In place before the LoRA, whose loading takes offloading hooks off all components and sets them again.
        self._set_semantic_attention(module)
        self._set_semantic_mode(**{name: trained_with[name] for name in before[1]})
        try:
            super().load_lora_weights(source, **kwargs)
        except Exception:
            self._set_semantic_attention(before[0])
            self._set_semantic_mode(**before[1])
            raise

    def unload_lora_weights(self, reset_to_overwritten_params: bool = False) -> None:
        r"""
        Removes the LoRA **and** the semantic attention module. A LoRA that was fused stays in the transformer's
        weights, and the module stays with it.

        Args:
            reset_to_overwritten_params (`bool`, defaults to `False`):
                As in [`~loaders.FluxLoraLoaderMixin.unload_lora_weights`].
        """
        super().unload_lora_weights(reset_to_overwritten_params)
        if self.num_fused_loras > 0:
            return
        self._set_semantic_attention(None)
        self._set_semantic_mode("cross_attention", self.config.fusion_alpha, max_sequence_length=512)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        semantic_attention: SemanticAttentionModel | None = None,
        semantic_mode: str = "cross_attention",
        fusion_alpha: float = 0.5,
        max_sequence_length: int = 512,
        is_main_process: bool = True,
        weight_name: str | None = None,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        r"""
        Saves a LoRA and its semantic attention module as safetensors.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to save to; made where it does not exist.
            transformer_lora_layers (`dict[str, torch.nn.Module]` or `dict[str, torch.Tensor]`):
                State dict of the LoRA.
            semantic_attention (`SemanticAttentionModel`, *optional*):
                The module, saved under `semantic_attention/`. Needed with `semantic_mode="cross_attention"`.
            semantic_mode (`str`, defaults to `"cross_attention"`), fusion_alpha (`float`, defaults to 0.5):
                How the map enters, written into the metadata of the LoRA file.
            max_sequence_length (`int`, defaults to 512):
                T5 tokens of a prompt while it was trained, written there as well.
            is_main_process (`bool`, defaults to `True`):
                Whether this process writes; the others return at once.
            weight_name (`str`, *optional*):
                File name of the LoRA. Defaults to `pytorch_lora_weights.safetensors`.
            transformer_lora_adapter_metadata (`dict`, *optional*):
                The LoRA's configuration, rank and alpha above all.
        """
        if _semantic_mode(semantic_mode).attends != (semantic_attention is not None):
            raise ValueError(
                f'`semantic_attention` has to be given with `semantic_mode="cross_attention"` and with no other, but'
                f' is {type(semantic_attention).__name__} with "{semantic_mode}".'
            )
        if not is_main_process:
            return
        adapter_metadata = {f"transformer.{k}": v for k, v in (transformer_lora_adapter_metadata or {}).items()}
        metadata = {"format": "pt"}
        trained_with = {"semantic_mode": semantic_mode, "fusion_alpha": fusion_alpha}
        trained_with["max_sequence_length"] = max_sequence_length
        metadata[SEMANTIC_METADATA_KEY] = json.dumps(trained_with)
        if adapter_metadata:
            metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(
                adapter_metadata, indent=2, sort_keys=True, default=sorted
            )
        super().save_lora_weights(
            save_directory,
            transformer_lora_layers=transformer_lora_layers,
            weight_name=weight_name,
            save_function=lambda weights, path: safetensors.torch.save_file(weights, path, metadata=metadata),
        )
        if semantic_attention is not None:
            semantic_attention.save_pretrained(os.path.join(save_directory, SEMANTIC_SUBFOLDER))


def _resolve_file(source: str, subfolder: str, filename: str, hub_kwargs: dict[str, Any]) -> str | None:
    """The local path of a file of a folder or Hub repository, or `None` where there is no such file."""
    if os.path.isdir(source):
        path = os.path.join(source, subfolder, filename)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(source, filename, subfolder=subfolder or None, **hub_kwargs)
    except HFValidationError as error:
        raise ValueError(
            "`pretrained_model_name_or_path_or_dict` has to be a folder, a Hub repository or a state dict, with"
            f" `weight_name` for a file in it, but is {source!r}."
        ) from error
    except LocalEntryNotFoundError:
        # A kind of `EntryNotFoundError`, but it says that the Hub was not reached, not that the file is missing.
        raise
    except EntryNotFoundError:
        return None


def _usable(name: str, picture: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return to_rgb(picture)
    # Pillow reads a file's pixels only now, and raises what its decoders raise.
    except Exception as error:
        raise ValueError(f"`{name}` holds a picture that cannot be used: {error}.") from error


def _check_fill_picture(name: str, view: PipelineImageInput) -> None:
    """What `FluxFillPipeline` does not check itself of a picture and its mask."""
    items = view if isinstance(view, (list, tuple)) else [view]
    if not items:
        raise ValueError(f"`{name}` has to hold a picture but is empty.")
    for item in items:
        if isinstance(item, PIL.Image.Image):
            _usable(name, item)
        elif isinstance(item, np.ndarray) and item.dtype.kind in "fiu" or isinstance(item, torch.Tensor):
            numbers = torch.as_tensor(np.ascontiguousarray(item) if isinstance(item, np.ndarray) else item)
            if numbers.ndim not in (2, 3, 4) or numbers.numel() == 0 or not numbers.isfinite().all():
                raise ValueError(
                    f"`{name}` has to be a picture of finite numbers but has the shape {tuple(numbers.shape)} or holds"
                    " others."
                )
        else:
            raise ValueError(
                f"`{name}` has to be a PIL image, a numpy array, a tensor or a list of them but holds"
                f" {type(item).__name__}."
            )


def _is_count(number) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def _check_counts(**counts) -> None:
    for name, number in counts.items():
        if not _is_count(number):
            raise ValueError(f"`{name}` has to be a positive integer but is {number!r}.")


def _check_numbers(**numbers) -> None:
    for name, number in numbers.items():
        if not isinstance(number, (int, float, np.number)) or not np.isfinite(number) or number < 0:
            raise ValueError(f"`{name}` has to be a finite number, not below 0, but is {number!r}.")


def _check_texts(**texts) -> None:
    lengths = {}
    for name, text in texts.items():
        parts = [text] if isinstance(text, str) else text
        if parts is None:
            continue
        if not isinstance(parts, list) or not parts or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"`{name}` has to be a string or a list of strings but is {repr(text)[:100]}.")
        lengths[name] = len(parts)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"`prompt` and `prompt_2` have to be as many, but are {lengths}.")


def _check_tensors(**tensors) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"`{name}` has to be a tensor of floating point numbers but is {repr(tensor)[:100]}.")
        if not tensor.isfinite().all():
            raise ValueError(f"`{name}` has to hold finite numbers but holds NaN or infinite ones.")


def _batch_size(picture: PipelineImageInput) -> int:
    if isinstance(picture, (list, tuple)):
        return sum(_batch_size(item) for item in picture)
    return picture.shape[0] if isinstance(picture, (torch.Tensor, np.ndarray)) and picture.ndim == 4 else 1


def _cut_panel(images, index: int, panels: int, rows: int):
    """One panel of PIL pictures, numpy (..., width, 3), tensor (..., width) or packed latents (batch, tokens, 64)."""
    if isinstance(images, list):
        return [
            picture.crop((index * picture.width // panels, 0, (index + 1) * picture.width // panels, picture.height))
            for picture in images
        ]
    if isinstance(images, np.ndarray):
        return np.split(images, panels, axis=2)[index]
    if images.ndim == 3:
        return images.unflatten(1, (rows, panels, -1))[:, :, index].flatten(1, 2)
    return images.chunk(panels, dim=3)[index]
