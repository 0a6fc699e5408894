# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""FLUX.1 Fill as a paired image translator, guided by a semantic map.

The visible view and the unknown target view stand side by side on one canvas whose right half is masked (in-context
editing, https://huggingface.co/papers/2504.20690). While the pipeline denoises, a small module brings the semantic map
into the transformer's input before each call of the transformer.

The pipeline is a subclass of `FluxFillPipeline` that calls `super().__call__` with the module hooked in, so it follows
diffusers instead of copying it. Training uses its encoding methods and its reader of pictures. The file imports
`semantic_attention.py` and nothing else of this project, because the Hub gets these two files as one `pipeline.py`.
"""

import contextlib
import copy
import functools
import io
import json
import numbers
import os
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME, LORA_WEIGHT_NAME_SAFE
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, logging, replace_example_docstring
from huggingface_hub.errors import LocalEntryNotFoundError
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast  # pyright: ignore Found at run time.


# As a dynamic module (`custom_pipeline=`) this file has a package, and the other file stands beside it. Installed, it
# has none. `import ... as` passes the dynamic loader's check for packages that are not installed. The Hub's
# `pipeline.py` has the other file's source in place of this statement.
if TYPE_CHECKING or __package__:
    from .semantic_attention import (
        SEMANTIC_SUBFOLDER,
        SINGLE_MAP,
        VISIBLE_ATTENTIONS,
        AttentionRecorder,
        LoraFile,
        SemanticAttentionModel,
        SemanticAttentionOutput,
        SemanticProjectionModel,
        causal_painting,
        check_lora,
        check_lora_fits,
        check_manifest,
        check_map_names,
        check_number,
        find_lora_file,
        load_semantic_module,
        open_file,
        parse_json,
        safetensors_name,
    )
else:
    import semantic_attention as _semantic_attention

    globals().update({name: value for name, value in vars(_semantic_attention).items() if not name.startswith("_")})

# `save_pretrained` records the component as ["semantic_attention", "SemanticAttentionModel"]. A pipeline loaded
# through `custom_pipeline=` must be able to import that name where the package is not installed.
sys.modules.setdefault("semantic_attention", sys.modules[SemanticAttentionModel.__module__])

logger = logging.get_logger(__name__)

# The key in the LoRA file's safetensors metadata that says how the map entered in training.
SEMANTIC_METADATA_KEY = "semantic_fill"
# What the configuration of a pipeline, an adapter and the metadata of a LoRA file all say.
SETTINGS = ("semantic_mode", "fusion_alpha", "max_sequence_length", "visible_attention")
# Longest side of a view in pixels that weights may name.
MAX_SIDE = 16384
# A map with more different values than this holds shades. Where all values are below this, they are label numbers.
LABEL_LIMIT = 64


# -- Modes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SemanticMode:
    """
    How the semantic map enters.

    Args:
        panels (`tuple[str, ...]`):
            The views on the canvas, from left to right. `"semantic"` stands for all maps.
        module_class (`type`, *optional*):
            The class of the module that brings the map into the transformer's input.
        fuses (`bool`, defaults to `False`):
            Whether the map is blended into the visible view.
    """

    panels: tuple[str, ...] = ("visible", "target")
    module_class: type | None = None
    fuses: bool = False

    def panels_of(self, maps: Sequence[str]) -> tuple[str, ...]:
        """The views on the canvas, with the maps by their names."""
        return tuple(view for panel in self.panels for view in (maps if panel == "semantic" else (panel,)))

    @property
    def is_diptych(self) -> bool:
        """Whether nothing but the two views is on the canvas."""
        return "semantic" not in self.panels

    @property
    def map_on_canvas(self) -> bool:
        """Whether the map is part of the picture that is painted."""
        return self.fuses or "semantic" in self.panels

    @property
    def uses_map(self) -> bool:
        """Whether the map has any effect."""
        return self.map_on_canvas or self.module_class is not None


# To add a mode, add it here. Everything else asks the mode.
SEMANTIC_MODES = {
    "cross_attention": SemanticMode(module_class=SemanticAttentionModel),
    "projection": SemanticMode(module_class=SemanticProjectionModel),
    "pixel_fusion": SemanticMode(fuses=True),
    "in_context": SemanticMode(panels=("visible", "target", "semantic")),
    "none": SemanticMode(),
}


def _get_mode(name: str) -> SemanticMode:
    if not isinstance(name, str) or name not in SEMANTIC_MODES:
        raise ValueError(f"`semantic_mode` has to be one of {tuple(SEMANTIC_MODES)} but is {name!r}.")
    return SEMANTIC_MODES[name]


def _is_of_class(module: torch.nn.Module | None, module_class: type | None) -> bool:
    # A process may hold each class twice, installed and as a dynamic module, so `isinstance` does not tell. The
    # classes' `description` does, and a compiled module passes it through as well.
    return getattr(module, "description", None) == getattr(module_class, "description", None)


# -- Adapters ---------------------------------------------------------------------------------------------------------


@dataclass
class SemanticAdapter:
    r"""
    What a trained LoRA brings beside its layers. [`FluxFillSemanticPipeline.semantic_adapters`] has one for each.

    Args:
        semantic_mode, fusion_alpha, max_sequence_length, semantic_maps, visible_attention:
            As in [`FluxFillSemanticPipeline`].
        height, width (`int`, *optional*):
            Size of a view in training, in pixels.
        module (`SemanticAttentionModel` or `SemanticProjectionModel`, *optional*):
            The module of a mode that has one.
        lora_scaling (`float`, defaults to 1.0):
            The mean scaling of the LoRA's layers at weight 1. PEFT keeps weights multiplied by it.
        fused_weight (`float`, *optional*):
            The weight that the LoRA had when it was last fused.
        is_permanent (`bool`, defaults to `False`):
            Whether the fused LoRA can no longer be taken out of the transformer's weights.

    Raises:
        `ValueError`: A setting is out of range, or module and mode do not fit each other.
    """

    semantic_mode: str = "cross_attention"
    fusion_alpha: float = 0.5
    max_sequence_length: int = 512
    height: int | None = None
    width: int | None = None
    module: Any = None
    semantic_maps: Any = None
    visible_attention: str = "joint"
    lora_scaling: float = 1.0
    fused_weight: float | None = None
    is_permanent: bool = False

    def __post_init__(self):
        mode = _get_mode(self.semantic_mode)
        if self.semantic_mode == "cross_attention" and _is_of_class(self.module, SemanticProjectionModel):
            # Such weights were saved before the projection had a mode of its own.
            self.semantic_mode = "projection"
        elif mode.module_class and self.module is not None and not _is_of_class(self.module, mode.module_class):
            raise ValueError(
                f"`semantic_attention` has to be a `{mode.module_class.__name__}` with"
                f' `semantic_mode="{self.semantic_mode}"` but is {type(self.module).__name__}.'
            )
        check_number("fusion_alpha", self.fusion_alpha, least=0, most=1)
        check_number("max_sequence_length", self.max_sequence_length, least=1, most=512, whole=True)
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None:
                check_number(name, side, least=1, most=MAX_SIDE, whole=True)
        named, own = self.semantic_maps, getattr(self.module, "maps", None)
        self.semantic_maps = check_map_names((own or SINGLE_MAP) if named is None else named)
        if own is not None and self.semantic_maps != tuple(own):
            raise ValueError(
                f"`semantic_maps` has to be {tuple(own)}, those of the module, but is {self.semantic_maps}."
            )
        if mode.fuses and len(self.semantic_maps) > 1:
            raise ValueError(
                f'`semantic_mode="{self.semantic_mode}"` takes one map, but `semantic_maps` is {self.semantic_maps}.'
            )
        if self.visible_attention not in VISIBLE_ATTENTIONS:
            raise ValueError(
                f"`visible_attention` has to be one of {VISIBLE_ATTENTIONS} but is {self.visible_attention!r:.100}."
            )
        if self.is_causal and not mode.is_diptych:
            raise ValueError(
                '`visible_attention="causal"` needs a canvas of two panels, unlike'
                f' `semantic_mode="{self.semantic_mode}"`.'
            )

    @property
    def is_causal(self) -> bool:
        """Whether prompt and visible view are computed once for all steps."""
        return self.visible_attention == "causal"

    @property
    def mode(self) -> SemanticMode:
        """The mode that `semantic_mode` names."""
        return SEMANTIC_MODES[self.semantic_mode]

    @property
    def guide(self) -> Any:
        """The module, if the mode uses one."""
        return self.module if self.mode.module_class is not None else None

    @property
    def canvas(self) -> str:
        """What is on the canvas, in words. Adapters with the same canvas can act together."""
        visible = f"visible with {self.fusion_alpha:g} of the map" if self.mode.fuses else "visible"
        panels = " | ".join(visible if panel == "visible" else panel for panel in self.panels)
        return f"{panels}, {self.visible_attention}" if self.is_causal else panels

    @property
    def panels(self) -> tuple[str, ...]:
        """The views on the canvas, from left to right."""
        return self.mode.panels_of(self.semantic_maps)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the configuration of a pipeline has as well."""
        return {name: getattr(self, name) for name in SETTINGS}


class _LoraState(NamedTuple):
    """The adapters that act in a model, those that are merged into its weights, and the mean scaling of each."""

    acting: set[str]
    merged: set[str]
    scalings: dict[str, float]


def _lora_state(model: torch.nn.Module | None) -> _LoraState:
    """Asks PEFT's layers, so that whatever changes them, also without the pipeline, changes the modules with them."""
    if model is None:
        return _LoraState(set(), set(), {})
    acting, merged, scalings = set(), set(), {}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            merged.update(layer.merged_adapters)
            if not layer.disable_adapters:
                # A layer with merged adapters ignores all others.
                acting.update(layer.merged_adapters or layer.active_adapters)
            for name, scaling in getattr(layer, "scaling", {}).items():
                scalings.setdefault(name, []).append(float(scaling))
    return _LoraState(acting, merged, {name: sum(each) / len(each) for name, each in scalings.items()})


class _Guide(NamedTuple):
    """A module at work in one call, and what its `enhance` takes after the transformer's input."""

    module: Any
    semantic_tokens: torch.Tensor
    positions: torch.Tensor
    scale: list[float]


# -- The token grid ---------------------------------------------------------------------------------------------------


class _Canvas(NamedTuple):
    """The canvas in tokens: rows, columns of one panel, number of panels, and index of the painted panel."""

    rows: int
    columns: int
    panels: int
    target: int


def tile_across_panels(tokens: torch.Tensor, rows: int, columns: int, num_panels: int) -> torch.Tensor:
    r"""
    Repeats the token grid of one panel across the canvas, so that each image token has the token of its own place.

    Args:
        tokens (`torch.Tensor` of shape `(batch, rows * columns, channels)`):
            The tokens of one panel.
        rows, columns (`int`):
            Size of one panel in tokens.
        num_panels (`int`):
            Number of panels on the canvas, side by side.

    Returns:
        `torch.Tensor` of shape `(batch, rows * num_panels * columns, channels)`.
    """
    return tokens.unflatten(1, (rows, 1, columns)).expand(-1, -1, num_panels, -1, -1).flatten(1, 3)


def panel_positions(rows: int, columns: int, num_panels: int, device: torch.device | None = None) -> torch.Tensor:
    r"""
    Computes the place of each token of the canvas within its panel.

    Args:
        rows, columns, num_panels (`int`):
            As in [`tile_across_panels`].
        device (`torch.device`, *optional*):
            Device of the result.

    Returns:
        `torch.Tensor` of shape `(rows * num_panels * columns, 2)` and dtype float32: row and column, in tokens.
    """
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).to(device=device, dtype=torch.float32)
    return tile_across_panels(grid[None], rows, columns, num_panels)[0]


# -- Pictures: the one reader that training, evaluation, the page and painting share ----------------------------------


# What is read as a picture, MPO as JPEG. Pillow also knows formats that start another program, such as PostScript, and many that
# hardly anyone has tested.
PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")


def require_8bit(picture: PIL.Image.Image) -> None:
    r"""
    Refuses a picture with more than 8 bits per channel, because nobody can guess which part of that range matters.

    Call it before the picture is loaded: Pillow has no mode for colors of 16 bits and cuts them while it loads them.
    Until then the file's tiles still say so.

    Raises:
        `ValueError`: The picture has more than 8 bits per channel.
    """
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"has the mode {picture.mode}, but only 8 bits per channel are accepted")
    if any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ())):
        raise ValueError("has 16 bits per channel, but only 8 are accepted")


def _upright(picture: Any) -> PIL.Image.Image:
    """Returns a copy in the picture's own mode with its EXIF orientation applied, or says why it cannot be used."""
    if 0 in picture.size:
        raise ValueError(f"is {picture.width}x{picture.height} pixels")
    # A photograph in MPO format only has further views of itself behind it.
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        raise ValueError(f"is animated ({picture.n_frames} frames)")
    require_8bit(picture)
    return PIL.ImageOps.exif_transpose(picture)


@functools.lru_cache(maxsize=16)
def _srgb_transform(profile: bytes, mode: str) -> PIL.ImageCms.ImageCmsTransform | None:
    """The transform from an ICC profile to sRGB, or `None` where the profile is sRGB, damaged or for another mode."""
    try:
        source = PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = PIL.ImageCms.buildTransform(source, PIL.ImageCms.createProfile("sRGB"), mode, "RGB")
    except (PIL.ImageCms.PyCMSError, OSError):
        return None
    if mode == "RGB":
        # Many versions of the sRGB profile differ by rounding. They must not move the colors of a label map.
        colors = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), axis=-1).reshape(64, 64, 3)
        moved: Any = PIL.ImageCms.applyTransform(PIL.Image.fromarray(colors), transform)
        if np.abs(np.asarray(moved, np.int16) - colors).max() <= 2:
            return None
    return transform


def _to_srgb(picture: PIL.Image.Image) -> PIL.Image.Image:
    alpha = None
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    rgb: Any = picture.convert("RGB")
    profile = picture.info.get("icc_profile")
    if profile:
        source = picture if picture.mode in ("L", "CMYK") else rgb
        transform = _srgb_transform(profile, source.mode)
        rgb = rgb if transform is None else PIL.ImageCms.applyTransform(source, transform)
    if alpha is not None:
        rgb.putalpha(alpha)
        rgb = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgb.size, (128, 128, 128, 255)), rgb).convert("RGB")
    return rgb


def read_picture(source: PIL.Image.Image | bytes | str | os.PathLike) -> PIL.Image.Image:
    r"""
    Reads a picture the way training, evaluation and painting all see it.

    The EXIF orientation is applied. Colors are converted to sRGB by the embedded ICC profile, if there is one. CMYK,
    grayscale and palette pictures become RGB. Transparent places are laid over mid-gray.

    Args:
        source (`PIL.Image.Image`, `bytes`, `str` or `os.PathLike`):
            A picture, the bytes of a picture file, or the path of one. A `PIL.Image.Image` is left unchanged.

    Returns:
        `PIL.Image.Image`: An upright picture in the mode RGB, with the file's contents loaded.

    Raises:
        `ValueError`: The picture is empty, animated, damaged or missing, has more than 8 bits per channel, or is a
            file of a format that is not in `PICTURE_FORMATS`, with more than 512 MiB or with more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS`. The message reads after the picture's name: "is animated (3 frames)".
    """
    return _read(source, _to_srgb)


def _read(
    source: PIL.Image.Image | bytes | str | os.PathLike, convert: Callable[[PIL.Image.Image], PIL.Image.Image]
) -> PIL.Image.Image:
    try:
        if isinstance(source, PIL.Image.Image):
            return convert(_upright(source))
        with open_file(source) as file, PIL.Image.open(file, formats=PICTURE_FORMATS) as picture:
            limit = PIL.Image.MAX_IMAGE_PIXELS
            # Between one and two times its limit, Pillow only warns.
            if limit is not None and picture.width * picture.height > limit:
                raise ValueError(f"is {picture.width}x{picture.height} pixels, but at most {limit} are accepted")
            return convert(_upright(picture))
    except ValueError:
        raise
    # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error, DecompressionBombError and others.
    except Exception as error:
        raise ValueError(f"cannot be read as a picture ({type(error).__name__}: {error})") from error


def _read_argument(name: str, picture: PIL.Image.Image, convert: Callable = _to_srgb) -> PIL.Image.Image:
    try:
        return _read(picture, convert)
    except ValueError as error:
        raise ValueError(f"`{name}` holds a picture that {error}.") from error


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

    Without `mask_image`, a call paints the target view beside the visible one. With `mask_image`, it is
    [`FluxFillPipeline`] plus guidance. Without a semantic map, or at `semantic_scale=0`, both equal
    [`FluxFillPipeline`] bit for bit.

    Args:
        scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer:
            The components of [`FluxFillPipeline`].
        semantic_attention (`SemanticAttentionModel` or `SemanticProjectionModel`, *optional*):
            The pipeline's own module, which brings the map into the transformer's input. It acts while no trained
            adapter does, and unloading adapters leaves it in place.
        semantic_mode (`str`, defaults to `"cross_attention"`):
            How the map enters: `"cross_attention"` (the noisy latents attend to it), `"projection"` (its latents enter
            the condition at their own place), `"pixel_fusion"` (it is blended into the visible view), `"in_context"`
            (it is a third panel) or `"none"`. A [`SemanticProjectionModel`] turns `"cross_attention"` into
            `"projection"`. A trained adapter has its own mode, blend and prompt length, which count while it acts.
        fusion_alpha (`float`, defaults to 0.5):
            Share of the map in the blend of `"pixel_fusion"`, in [0, 1].
        max_sequence_length (`int`, defaults to 512):
            Number of T5 tokens of a prompt, used by calls that do not pass one.
        semantic_maps (`list[str]`, *optional*):
            Names of the maps where there are several, in the order of their panels. Defaults to the module's, or else to
            one map, `"semantic"`.
        visible_attention (`str`, defaults to `"joint"`):
            `"joint"`: all tokens attend to each other. `"causal"`: prompt and visible view attend to each other alone, so
            a call computes them once for all steps, and the VAE encodes and decodes the target by itself. It paints well
            only with weights that were trained so. A trained adapter has its own.

    Raises:
        `ValueError`: An argument is out of range, or module and mode do not fit each other.
    """

    _optional_components = ["semantic_attention"]
    # The module is small enough to stay on the device, and it runs between two steps of the transformer.
    _exclude_from_cpu_offload = ["semantic_attention"]
    # It records what the module is about to see in each step, and it is set only while `semantic_attention_maps` runs.
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
        semantic_attention: SemanticAttentionModel | SemanticProjectionModel | None = None,
        semantic_mode: str = "cross_attention",
        fusion_alpha: float = 0.5,
        max_sequence_length: int = 512,
        semantic_maps: Sequence[str] | None = None,
        visible_attention: str = "joint",
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
        self.register_to_config(
            semantic_mode=semantic_mode,
            fusion_alpha=fusion_alpha,
            max_sequence_length=max_sequence_length,
            visible_attention=visible_attention,
        )
        if semantic_maps is not None:
            self.register_to_config(semantic_maps=list(semantic_maps))
        self.register_modules(semantic_attention=semantic_attention)

    # -- What acts: the trained adapters that are active, or else the pipeline's own module and settings ---------------

    @property
    def semantic_adapters(self) -> dict[str, SemanticAdapter]:
        r"""The trained adapters by the names of their LoRAs. Ordinary LoRAs are none of them."""
        # They stand beside their LoRA layers, so that pipelines which share a transformer share both.
        transformer = self.__dict__.get("transformer")
        if transformer is None:
            return {}
        if getattr(transformer, "_semantic_adapters", None) is None:
            transformer._semantic_adapters = {}
        return transformer._semantic_adapters

    def _acting_adapters(self, lora_scale: float = 1.0) -> list[tuple[SemanticAdapter, float]]:
        """The trained adapters that act, with their weights, or else the pipeline's own settings and module."""
        acting = []
        state = _lora_state(self.transformer if self.semantic_adapters else None)
        for name, adapter in self.semantic_adapters.items():
            weight = state.scalings.get(name, 0.0) / adapter.lora_scaling
            is_fused = adapter.is_permanent or name in state.merged
            if is_fused and adapter.fused_weight is not None:
                weight = adapter.fused_weight
            if weight != 0 and (adapter.is_permanent or name in state.acting):
                acting.append((adapter, weight if is_fused else weight * lora_scale))
        return acting or [(SemanticAdapter(**self._own_settings, module=self._own_module), 1.0)]

    @property
    def _own_settings(self) -> dict[str, Any]:
        return {
            name: self._internal_dict[name] for name in (*SETTINGS, "semantic_maps") if name in self._internal_dict
        }

    @property
    def semantic_attention(self) -> Any:
        r"""The module that acts: that of the first active adapter with one, or else the pipeline's own, if any."""
        return next((adapter.module for adapter, _ in self._acting_adapters() if adapter.module is not None), None)

    @semantic_attention.setter
    def semantic_attention(self, module: Any) -> None:
        if module is not None:
            self._check_channels(module)
        own = SemanticAdapter(**self._own_settings, module=module)
        # diffusers would record the name of the dynamic module that this code may run as.
        module_class = type(getattr(module, "_orig_mod", module))
        recorded = (None, None) if module is None else (SEMANTIC_SUBFOLDER, module_class.__name__)
        self.register_to_config(**own.settings, semantic_attention=recorded)
        self._own_module = module

    def _check_channels(self, module: Any) -> None:
        channels, config = self.latent_channels * 4, getattr(module, "config", None)
        if getattr(config, "in_channels", None) != channels:
            raise ValueError(
                "`semantic_attention` has to be a `SemanticAttentionModel` or `SemanticProjectionModel` with"
                f" `in_channels={channels}`, but is {type(module).__name__} with {config}."
            )

    @property
    def config(self) -> FrozenDict:
        r"""The configuration. `semantic_mode`, `fusion_alpha`, `max_sequence_length` and `visible_attention` are those that act."""
        if not self.semantic_adapters:
            return self._internal_dict
        adapters = [adapter for adapter, _ in self._acting_adapters()]
        longest = max(adapter.max_sequence_length for adapter in adapters)
        return FrozenDict({**self._internal_dict, **adapters[0].settings, "max_sequence_length": longest})

    @property
    def components(self) -> dict[str, Any]:
        r"""The pipeline's own components, with which others of its kind can be made. Adapters are no components."""
        return super().components | {"semantic_attention": self._own_module}

    @classmethod
    def from_pipe(cls, pipeline, **kwargs) -> Any:
        r"""Makes a pipeline of the components of another. Adapters come with the transformer that both then share."""
        return super().from_pipe(pipeline, **getattr(pipeline, "_own_settings", {}) | kwargs)

    @contextlib.contextmanager
    def _adapters_aside(self):
        """Shows the pipeline as it is without adapters, because diffusers reads its components as attributes."""
        adapters = self.semantic_adapters
        self.transformer._semantic_adapters = {}
        try:
            yield
        finally:
            self.transformer._semantic_adapters = adapters

    def to(self, *args, **kwargs) -> Any:
        r"""Moves or casts the pipeline as [`~DiffusionPipeline.to`] does, and with it the module that acts."""
        super().to(*args, **kwargs)
        if self.semantic_attention is not self._own_module:
            with self._adapters_aside():
                super().to(*args, **kwargs)
        return self

    @property
    def semantic_maps(self) -> tuple[str, ...]:
        r"""The names of the maps that a call takes: those of the active adapters, or else of the pipeline's own module."""
        acting = [adapter for adapter, _ in self._acting_adapters()]
        using = [adapter for adapter in acting if adapter.guide is not None or adapter.mode.map_on_canvas]
        # A call has to work while an adapter is switched off, so that people can compare.
        using = using or [adapter for adapter in self.semantic_adapters.values() if adapter.mode.uses_map] or acting
        return tuple(dict.fromkeys(name for adapter in using for name in adapter.semantic_maps))

    @property
    def patch_size(self) -> int:
        """Number of pixels along one side of a token: the VAE's factor times the 2x2 packing."""
        return self.vae_scale_factor * 2

    # -- Encode: the steps that training and inference share ----------------------------------------------------------

    def prepare_diptych(
        self,
        visible: torch.Tensor,
        target: torch.Tensor | None = None,
        semantic: torch.Tensor | dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Puts the views on one canvas, arranged as the pipeline's `semantic_mode` says.

        Args:
            visible (`torch.Tensor` of shape `(batch, 3, height, width)`):
                The visible view, in [0, 1].
            target (`torch.Tensor` of the same shape, *optional*):
                The target view. If it is unknown, the visible view takes its place: with `strength` below 1, painting
                starts from it; at 1, and in the masked picture, it leaves no trace.
            semantic (`torch.Tensor` of the same shape or `dict[str, torch.Tensor]`, *optional*):
                The semantic map, or maps by their names, for the modes that put them on the canvas. Without it,
                `"pixel_fusion"` leaves the visible view unchanged and `"in_context"` has a mid-gray panel in its place.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The canvas `(batch, 3, height, panels * width)` in [0, 1], and the
            mask `(1, 1, height, panels * width)`, which is 1 on the target panel and 0 elsewhere.
        """
        adapter, _ = self._acting_adapters()[0]
        target = visible if target is None else target
        maps: dict[str, torch.Tensor] = {}
        if semantic is not None:
            maps = semantic if isinstance(semantic, dict) else {adapter.semantic_maps[0]: semantic}
        missing = torch.full_like(visible, 0.5)
        for semantic_map in maps.values() if adapter.mode.fuses else ():
            visible = torch.lerp(visible, semantic_map, adapter.fusion_alpha)
        views = {**dict.fromkeys(adapter.semantic_maps, missing), **maps, "visible": visible, "target": target}
        diptych = torch.cat([views[panel] for panel in adapter.panels], dim=3)
        one_panel = torch.ones_like(visible[:1, :1])
        mask = torch.cat([one_panel * (panel == "target") for panel in adapter.panels], dim=3)
        return diptych, mask

    def encode_moments(self, diptych: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Runs the VAE's part of `encode_diptych`, whose result does not depend on any random number and can be cached.

        Args:
            diptych (`torch.Tensor` of shape `(batch, 3, height, width)`):
                Pixels in [0, 1].
            mask (`torch.Tensor` of shape `(1 or batch, 1, height, width)`):
                1 where the transformer paints, 0 where it sees.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The posterior's parameters (mean and log-variance) for the diptych and
            for the masked diptych, whose hidden part is mid-gray. Both have the shape
            `(batch, 2 * latent_channels, height / 8, width / 8)` and the VAE's dtype. With
            `visible_attention="causal"`, the first has the visible view of the second, and the target by itself.
        """
        pixels = self.image_processor.preprocess(diptych.to(self._execution_device))
        masked = pixels * (1 - mask.to(pixels.device))
        is_causal = self._acting_adapters()[0][0].is_causal
        # The VAE's norms see all that it encodes, so latents are decoded well only beside those that they were encoded
        # beside. The visible view is encoded without the target, which is therefore encoded and decoded by itself.
        known = pixels.chunk(2, dim=3)[1].contiguous() if is_causal else pixels
        moments, masked_moments = (
            self.vae.encode(x.to(self.vae.dtype)).latent_dist.parameters for x in (known, masked)
        )
        if is_causal:
            moments = torch.cat((masked_moments.chunk(2, dim=3)[0], moments), dim=3)
        return moments, masked_moments

    def encode_diptych(
        self,
        diptych: torch.Tensor | None,
        mask: torch.Tensor,
        moments: tuple[torch.Tensor, torch.Tensor] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        Encodes a diptych as `__call__` does, with samples of the VAE's posterior.

        Args:
            diptych, mask:
                As in [`~FluxFillSemanticPipeline.encode_moments`]. `diptych` is `None` if `moments` are passed.
            moments (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                What `encode_moments` returned for this diptych and mask.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes the two samples deterministic: first that of the diptych, then that of the masked diptych.
            dtype (`torch.dtype`, *optional*):
                Dtype of the results. Defaults to the VAE's.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: `x_0` `(batch, tokens, 64)`, `x_cond`
            `(batch, tokens, 320)` and `img_ids` `(tokens, 3)`.
        """
        if moments is None:
            moments = self.encode_moments(diptych, mask)  # pyright: ignore[reportArgumentType] One of them is given.
        dtype = dtype or moments[0].dtype
        # The method takes lists too, whatever its annotation says.
        generators: Any = generator
        latents, masked_latents = (DiagonalGaussianDistribution(m).sample(generators) for m in moments)
        batch_size, channels, height, width = latents.shape
        x_0 = self._scale_and_pack(latents).to(dtype)
        # `FluxFillPipeline.__call__` encodes its masked picture with this very method.
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
        # diffusers has no public function for the grid of positions that its `__call__` uses.
        img_ids = self._prepare_latent_image_ids(batch_size, height // 2, width // 2, latents.device, dtype)
        return x_0, x_cond, img_ids

    def encode_semantic(self, semantic: torch.Tensor) -> torch.Tensor:
        r"""
        Encodes the semantic map by the mode of the VAE's posterior, which consumes no random numbers.

        Args:
            semantic (`torch.Tensor` of shape `(batch, 3, height, width)`):
                The map as a picture, in [0, 1].

        Returns:
            `torch.Tensor` of shape `(batch, height / 16 * width / 16, 64)`: The map's tokens, in the VAE's dtype.
            [`tile_across_panels`] repeats them across the canvas.
        """
        pixels = self.image_processor.preprocess(semantic.to(self._execution_device)).to(self.vae.dtype)
        return self._scale_and_pack(self.vae.encode(pixels).latent_dist.mode())

    def _scale_and_pack(self, latents: torch.Tensor) -> torch.Tensor:
        latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        # diffusers has no public function for the packing that its `__call__` uses.
        return self._pack_latents(latents, *latents.shape)

    def _decode_panels(self, latents: Any, canvas: _Canvas, output_type: Any) -> Any:
        """Decodes each panel of packed latents by itself, and puts the pictures beside each other."""
        panels = latents.unflatten(1, (canvas.rows, -1, canvas.columns)).unbind(2)
        height, width = canvas.rows * self.patch_size, canvas.columns * self.patch_size
        # diffusers has no public function for what its `__call__` unpacks with.
        latents = self._unpack_latents(torch.cat(panels).flatten(1, 2), height, width, self.vae_scale_factor)
        latents = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        pictures = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        self.maybe_free_model_hooks()
        pictures = torch.cat(pictures.chunk(len(panels)), dim=3)
        return self.image_processor.postprocess(pictures, output_type=output_type)

    # -- Guide --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _semantic_guidance(self, guides: list[_Guide], canvas: _Canvas, is_causal: bool):
        """Enhances the transformer's input during one call. An error in that call ends the guidance as well."""
        seen = self._attention_observer
        if seen is not None and not any(g.module is seen.module and g.scale[seen.semantic_map] != 0 for g in guides):
            raise ValueError(
                "`semantic_attention_maps` needs a `semantic_image` and a `semantic_scale` other than 0, because"
                " without them nothing attends to a map."
            )

        # Another thread may paint with the same transformer in another pipeline.
        this_thread = threading.local()
        this_thread.is_guided = True

        def enhance(transformer, args, kwargs):
            if not hasattr(this_thread, "is_guided"):
                return None
            hidden_states = kwargs["hidden_states"]
            if self._attention_observer is not None:
                self._attention_observer(hidden_states, guides, canvas)
            enhanced = [module.enhance(hidden_states, *arguments) for module, *arguments in guides]
            # Each module sees the same input, and their updates add up.
            kwargs["hidden_states"] = sum((other - hidden_states for other in enhanced[1:]), start=enhanced[0])
            return args, kwargs

        # A call that ended in an error or with Ctrl-C leaves its residuals in the cache, perhaps of another size.
        # diffusers resets them only at the end of a complete call and has no public method for it.
        self.transformer._reset_stateful_cache()
        # FirstBlockCache and similar caches need a context, and `FluxFillPipeline` opens none.
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.transformer.cache_context("cond"))
            if is_causal:
                stack.enter_context(causal_painting(self.transformer, canvas.columns, enhance if guides else None))
            elif guides:
                stack.enter_context(self.transformer.register_forward_pre_hook(enhance, with_kwargs=True))
            yield

    # -- Paint --------------------------------------------------------------------------------------------------------

    def _read_view(
        self, name: str, view: PipelineImageInput | None, height: int | None, width: int | None, mode: str
    ) -> torch.Tensor:
        """Reads a picture argument as `(batch, 3, height, width)` in [0, 1] on the device, resized to a given size."""
        pictures = []
        for item in view if isinstance(view, (list, tuple)) else [view]:
            if isinstance(item, PIL.Image.Image):
                item = VaeImageProcessor.pil_to_numpy(_read_argument(name, item))
            if isinstance(item, np.ndarray) and item.dtype.kind in "biuf":
                item = torch.from_numpy(np.ascontiguousarray(item))
                item = item.movedim(-1, -3) if item.ndim > 2 else item
            if not isinstance(item, torch.Tensor) or item.ndim not in (3, 4) or item.shape[-3] != 3 or 0 in item.shape:
                raise ValueError(
                    f"`{name}` has to be a PIL image, a numpy array (batch, height, width, 3), a tensor (batch, 3,"
                    f" height, width) or a list of them, but is or holds {getattr(item, 'shape', type(item).__name__)}"
                )
            pictures.append(item if item.ndim == 4 else item[None])
        sizes = {f"{picture.shape[-1]}x{picture.shape[-2]}" for picture in pictures}
        if len(sizes) != 1:
            raise ValueError(f"`{name}` has to hold pictures of one size but holds {sorted(sizes)}.")
        # The pixels have to be contiguous, because convolutions round differently on channels-last pictures.
        pixels = torch.cat(pictures).to(torch.float32).contiguous()
        low, high = (extreme.item() for extreme in pixels.aminmax())
        # This form of the condition makes NaN fail as well.
        if not (low >= 0 and high <= 1):
            raise ValueError(f"`{name}` has to hold values within [0, 1] but holds [{low}, {high}].")
        size = (height or pixels.shape[-2], width or pixels.shape[-1])
        if size[0] % self.patch_size or size[1] % self.patch_size:
            raise ValueError(
                f"`{name}` would be {size[1]}x{size[0]} pixels, but width and height have to be multiples of"
                f" {self.patch_size}. Pass such a `height` and `width` to resize it."
            )
        if size != pixels.shape[-2:]:
            rows, columns = pixels.shape[-2:]
            # Sides that are multiples of 16 keep a shape only nearly.
            if not 0.95 < columns * size[0] / (rows * size[1]) < 1.05:
                logger.warning(
                    f"`{name}` is {columns}x{rows} pixels and is squashed to {size[1]}x{size[0]}. Training crops pictures to"
                    " the shape of a view and squashes none: crop it first."
                )
            pixels = F.interpolate(pixels, size, mode=mode, antialias=mode != "nearest-exact")
        # `FluxFillPipeline` works on pictures wherever they are.
        return pixels.to(self._execution_device)

    def _check_semantic_arguments(
        self,
        semantic_image: dict[str, Any],
        semantic_scale: dict[str, float],
        translates: bool,
        acting: list[SemanticAdapter],
    ) -> None:
        """
        Refuses adapters that cannot act together, and calls whose maps would be ignored in silence. `semantic_image` and
        `semantic_scale` have an entry for each map.
        """
        name, mode = acting[0].semantic_mode, acting[0].mode
        for adapter in acting[1:]:
            if adapter.canvas != acting[0].canvas:
                raise ValueError(
                    f"The active adapters were trained on different canvases, {acting[0].canvas} (`{name}`) and"
                    f" {adapter.canvas} (`{adapter.semantic_mode}`), so they cannot paint together. Choose one of them"
                    " with `set_adapters`."
                )
        if acting[0].is_causal and not translates:
            raise ValueError('`mask_image` cannot go with `visible_attention="causal"`, which needs a visible view.')
        for scale in semantic_scale.values():
            if not isinstance(scale, numbers.Real) or not np.isfinite(scale):
                raise ValueError(f"`semantic_scale` has to be a finite number but is {scale!r}.")
        if not semantic_image:
            return
        if not any(adapter.mode.uses_map for adapter in acting):
            raise ValueError(f'`semantic_image` was passed, but `semantic_mode="{name}"` uses no map. Leave it out.')
        scales = [semantic_scale[map_name] for map_name in semantic_image]
        if mode.map_on_canvas and (not translates or not set(scales) <= {0, 1}):
            raise ValueError(
                f'With `semantic_mode="{name}"` the map is a part of the canvas, so `semantic_image` excludes'
                f" `mask_image` and needs a `semantic_scale` of 0 or 1, which is {', '.join(map(str, scales))}."
            )
        if mode.map_on_canvas or not any(scales) or any(adapter.guide is not None for adapter in acting):
            return
        if any(adapter.mode.uses_map for adapter in self.semantic_adapters.values()):
            # The same call has to work while an adapter is switched off, so that people can compare.
            logger.warning("`semantic_image` has no effect, because no adapter that uses a map is active.")
            return
        raise ValueError(
            "`semantic_image` was passed, but the pipeline has no `semantic_attention` that could use it. Load one"
            " with `load_lora_weights` or pass one to the constructor, or leave `semantic_image` out."
        )

    def _name_maps(self, semantic_image, semantic_scale, maps: tuple[str, ...]) -> tuple[dict, dict]:
        """The maps of a call that are there and the scale of each map that could be, both by name."""
        if semantic_image is None:
            semantic_image = {}
        elif not isinstance(semantic_image, dict):
            listed = [semantic_image] if len(maps) == 1 else semantic_image
            number = len(listed) if isinstance(listed, (list, tuple)) else None
            if number != len(maps):
                raise ValueError(
                    f"`semantic_image` has to be a dict of the maps {', '.join(maps)} or a list of {len(maps)} in this"
                    f" order, but is {'one map' if number is None else f'a list of {number}'}."
                )
            semantic_image = dict(zip(maps, listed))
        for argument, given in (("semantic_image", semantic_image), ("semantic_scale", semantic_scale)):
            unknown = [name for name in given if name not in maps] if isinstance(given, dict) else []
            if unknown:
                raise ValueError(
                    f"`{argument}` has to name maps out of {', '.join(maps)}, which these weights were trained with, but"
                    f" names {', '.join(map(repr, unknown))}."
                )
        scales = semantic_scale if isinstance(semantic_scale, dict) else dict.fromkeys(maps, semantic_scale)
        scales = {name: scales.get(name, 1.0) for name in maps}
        return {name: semantic_image[name] for name in maps if semantic_image.get(name) is not None}, scales

    def _read_pictures_to_fill(self, image, mask_image) -> tuple[Any, Any]:
        """Reads the PIL images among the arguments of the fill mode, and leaves all others to `FluxFillPipeline`."""

        def read_all(name, view, convert):
            if isinstance(view, list):
                return [read_all(name, item, convert) for item in view]
            if not isinstance(view, PIL.Image.Image):
                return view
            if name == "mask_image" and view.mode.startswith(("I", "F")):
                # `FluxFillPipeline` takes such masks, although no picture may have so many levels.
                return PIL.ImageOps.exif_transpose(view)
            return _read_argument(name, view, convert)

        # `FluxFillPipeline` resizes a mask in the mask's own mode, so only its orientation may change here.
        return read_all("image", image, _to_srgb), read_all("mask_image", mask_image, lambda picture: picture)

    def _read_semantic(self, name: str, semantic_image, height: int, width: int, resizes: bool) -> torch.Tensor:
        """Reads a map at the size of a view. It is resized only if the view was, since a wrong map must not pass."""
        # A map holds labels. Blending two of them would make a third.
        size = (height, width) if resizes else (None, None)
        semantic = self._read_view(name, semantic_image, *size, mode="nearest-exact")
        if semantic.shape[-2:] != (height, width):
            raise ValueError(
                f"`{name}` has to be as large as `image`, {width}x{height} pixels, but is"
                f" {semantic.shape[-1]}x{semantic.shape[-2]}. Pass `height` and `width` to resize both."
            )
        pictures = semantic_image if isinstance(semantic_image, (list, tuple)) else [semantic_image]
        # A training run has colored its tensors, and asking about values makes the host wait for the device.
        if any(isinstance(picture, PIL.Image.Image) for picture in pictures):
            if 0 < semantic.max() < LABEL_LIMIT / 255 and (semantic == semantic[:, :1]).all():
                logger.warning(
                    f"`{name}` holds gray values below {LABEL_LIMIT} alone. If they are label numbers, they are nearly"
                    " black as colors: give the map the colors of training."
                )
        return semantic

    def _prepare_canvas(
        self, visible: torch.Tensor, maps: dict[str, torch.Tensor], num_images_per_prompt: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the views on the canvas and repeats it for each picture of a prompt."""
        if maps and SEMANTIC_MODES[self.config["semantic_mode"]].map_on_canvas:
            maps = {name: semantic.to(visible) for name, semantic in maps.items()}
            image, mask = self.prepare_diptych(visible.expand_as(next(iter(maps.values()))), semantic=maps)
        else:
            image, mask = self.prepare_diptych(visible)
        if len(image) > 1:
            # `FluxFillPipeline` would repeat the prompts one by one but the pictures batch by batch.
            image = image.repeat_interleave(num_images_per_prompt, dim=0)
        return image, mask

    def _prepare_guides(
        self,
        maps: dict[str, torch.Tensor],
        acting: list[tuple[SemanticAdapter, float]],
        semantic_scale: dict[str, float],
        canvas: _Canvas,
        total: int,
        as_batches: bool,
    ) -> list[_Guide]:
        """
        Encodes the maps as tokens of the canvas, repeated for all pictures that are painted, and brings the modules that
        act to the device.
        """
        guiding = [(adapter, weight) for adapter, weight in acting if adapter.guide is not None]
        guides, encoded, grid = [], {}, canvas[:3]
        for name, semantic in maps.items() if guiding else ():
            tokens = tile_across_panels(self.encode_semantic(semantic), *grid)
            copies = total // len(tokens)
            encoded[name] = tokens.repeat(copies, 1, 1) if as_batches else tokens.repeat_interleave(copies, dim=0)
        for adapter, weight in guiding:
            module, given = adapter.module, [name for name in adapter.semantic_maps if name in encoded]
            if not given:
                continue
            tokens = encoded[given[0]]
            if len(adapter.semantic_maps) > 1:
                # A map that is left out has a scale of 0, so its tokens are never looked at.
                tokens = torch.stack([encoded.get(name, tokens) for name in adapter.semantic_maps], dim=1)
            if module is not self._own_module:
                # It is no component, so it follows the transformer as its LoRA does.
                module.to(tokens.device)
                if module.dtype != self._module_dtype:
                    module.to(self._module_dtype)
            scale = [weight * semantic_scale[name] if name in given else 0.0 for name in adapter.semantic_maps]
            guides.append(_Guide(module, tokens.to(module.dtype), panel_positions(*grid, device=tokens.device), scale))
        return guides

    @property
    def _module_dtype(self) -> torch.dtype:
        # The weights of a quantized transformer may all be integers.
        return self.transformer.dtype if self.transformer.dtype.is_floating_point else torch.float32

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        masked_image_latents: torch.FloatTensor | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 30.0,
        num_images_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.FloatTensor | None = None,
        prompt_embeds: torch.FloatTensor | None = None,
        pooled_prompt_embeds: torch.FloatTensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int | None = None,
        semantic_image: PipelineImageInput | dict[str, Any] | None = None,
        semantic_scale: float | dict[str, float] = 1.0,
        return_diptych: bool = False,
    ):
        r"""
        Paints the target view of `image`, or with `mask_image` fills `image` itself.

        The parameters of [`FluxFillPipeline`] come first, in its order.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                What to paint. One prompt serves all pictures of a batch.
            prompt_2 (`str` or `list[str]`, *optional*):
                Prompt of the T5 encoder. Defaults to `prompt`.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                The visible view: a picture, a numpy array `(batch, height, width, 3)` or a tensor
                `(batch, 3, height, width)`, in [0, 1]. Its sides have to be multiples of 16 unless `height` and
                `width` are passed. With `mask_image`, the picture to fill. PIL images pass [`read_picture`].
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*):
                As in [`FluxFillPipeline`]: white is repainted. A PIL image is brought upright by its EXIF orientation.
            masked_image_latents (`torch.Tensor`, *optional*):
                As in [`FluxFillPipeline`].
            height, width (`int`, *optional*):
                Size of one view in pixels, multiples of 16. Default to the size of `image`. With `mask_image` they
                default to 1024 and are rounded down to multiples of 16, as in [`FluxFillPipeline`].
            strength (`float`, defaults to 1.0):
                Below 1, painting starts from the noised visible view instead of from noise alone.
            num_inference_steps (`int`, defaults to 50), sigmas (`list[float]`, *optional*), guidance_scale (`float`,
            defaults to 30.0), num_images_per_prompt (`int`, defaults to 1), generator (`torch.Generator` or
            `list[torch.Generator]`, *optional*):
                As in [`FluxFillPipeline`].
            latents (`torch.Tensor` of shape `(batch, tokens, 64)`, *optional*):
                Noisy tokens of the whole canvas to start from.
            prompt_embeds, pooled_prompt_embeds (`torch.Tensor`, *optional*):
                As in [`FluxFillPipeline`].
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for the packed latents `(batch, tokens, 64)` of what would have
                been decoded.
            return_dict (`bool`, defaults to `True`):
                Whether to return a [`~pipelines.flux.FluxPipelineOutput`] instead of a tuple.
            joint_attention_kwargs (`dict`, *optional*), callback_on_step_end (`Callable`, *optional*),
            callback_on_step_end_tensor_inputs (`list[str]`):
                As in [`FluxFillPipeline`]. The callback sees the latents without the module's enhancement.
            max_sequence_length (`int`, *optional*):
                Number of T5 tokens of a prompt. Defaults to that of the active adapters' training, or else to the
                pipeline's.
            semantic_image (as `image` or `dict`, *optional*):
                The semantic map of the same scene, pixel for pixel. One map serves all pictures of a batch. With
                `height` and `width`, or `mask_image`, it is resized with them and keeps its colors. Weights for several
                maps take a dict of their names or a list in the order of [`~FluxFillSemanticPipeline.semantic_maps`].
                Maps that are missing or `None` are left out.
            semantic_scale (`float` or `dict[str, float]`, defaults to 1.0):
                Strength of the guidance, of all maps or by their names. 0 drops a map. The modes that put the map on the
                canvas accept 0 and 1.
            return_diptych (`bool`, defaults to `False`):
                Whether to return the whole canvas instead of the target view. It has no effect with `mask_image`.

        Examples:

        Returns:
            [`~pipelines.flux.FluxPipelineOutput`] or `tuple`: The pictures.

        Raises:
            `ValueError`: An argument does not fit the pipeline or another argument.
        """
        translates = mask_image is None and masked_image_latents is None
        acting = self._acting_adapters((joint_attention_kwargs or {}).get("scale", 1.0))
        adapters = [adapter for adapter, _ in acting]
        mode = adapters[0].mode
        given, scales = self._name_maps(semantic_image, semantic_scale, self.semantic_maps)
        self._check_semantic_arguments(given, scales, translates, adapters)

        # 1. Read the pictures
        if translates:
            visible = self._read_view("image", image, height, width, mode="bicubic").clamp(0, 1)
            resizes = bool(height or width)
            height, width = visible.shape[-2:]
            num_images, view_height, view_width = len(visible), height, width
        else:
            image, mask_image = self._read_pictures_to_fill(image, mask_image)
            num_images, resizes = _count_pictures(image), True
            # `FluxFillPipeline` resizes picture and mask to this size.
            default = self.default_sample_size * self.vae_scale_factor
            view_height, view_width = (
                (side or default) // self.patch_size * self.patch_size for side in (height, width)
            )
        maps = {}
        for name, picture in given.items():
            argument = "semantic_image" if len(scales) == 1 else f'semantic_image["{name}"]'
            maps[name] = self._read_semantic(argument, picture, view_height, view_width, resizes)
        num_maps = max(map(len, maps.values()), default=0)
        if max_sequence_length is None:
            max_sequence_length = max(adapter.max_sequence_length for adapter in adapters)
        panels, target = (len(adapters[0].panels), mode.panels.index("target")) if translates else (1, 0)
        canvas = _Canvas(view_height // self.patch_size, view_width // self.patch_size, panels, target)

        # 2. Match pictures, maps and prompts
        per_prompt = num_images_per_prompt or 1
        # `FluxFillPipeline` paints as many pictures as one prompt asks for, with a picture to fill for each. Several maps
        # ask for as many prompts.
        if max(num_images, num_maps) > 1 and (translates or per_prompt == 1 or num_maps > 1):
            prompt, prompt_2 = (
                [text] * max(num_images, num_maps) if isinstance(text, str) else text for text in (prompt, prompt_2)
            )
        batch_size = len(prompt) if isinstance(prompt, list) else 1 if prompt_embeds is None else len(prompt_embeds)
        numbers = [("image", num_images if translates else 1), *(("semantic_image", len(m)) for m in maps.values())]
        for name, number in numbers:
            if number > 1 and number != batch_size and (translates or number != num_images):
                raise ValueError(
                    f"`{name}` has to hold 1 picture or one for each of the {batch_size} prompts, but holds {number}."
                )

        # 3. Put the views on the canvas and encode the map
        maps = {name: m.expand(max(batch_size, num_maps), -1, -1, -1) for name, m in maps.items() if scales[name] != 0}
        if translates:
            image, mask_image = self._prepare_canvas(visible, maps, per_prompt)
            width = view_width * panels
        # `FluxFillPipeline` repeats several pictures to fill as whole batches, and the maps go with them.
        as_batches = not translates and num_images > 1
        guides = self._prepare_guides(maps, acting, scales, canvas, batch_size * per_prompt, as_batches)

        # 4. Denoise and decode
        is_causal = adapters[0].is_causal
        with self._semantic_guidance(guides, canvas, is_causal):
            # The stock annotations leave out pictures that the stock method accepts.
            paint: Any = super().__call__
            images = paint(
                prompt=prompt,
                prompt_2=prompt_2,
                image=image,
                mask_image=mask_image,
                masked_image_latents=masked_image_latents,
                height=height,
                width=width,
                strength=strength,
                num_inference_steps=num_inference_steps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                output_type="latent" if is_causal else output_type,
                return_dict=False,
                joint_attention_kwargs=joint_attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
                max_sequence_length=max_sequence_length,
            )[0]

        # 5. Cut out the target view
        if translates and not return_diptych:
            images = _cut_target(images, canvas)
        if is_causal and output_type != "latent":
            images = self._decode_panels(images, canvas, output_type)
        return FluxPipelineOutput(images=images) if return_dict else (images,)

    # -- Explain ------------------------------------------------------------------------------------------------------

    def semantic_attention_maps(
        self,
        *args,
        points: list[tuple[float, float]],
        steps: list[int] | None = None,
        layer: int = -1,
        average_heads: bool = True,
        chunk_size: int = 256,
        semantic_map: str | None = None,
        **kwargs,
    ) -> SemanticAttentionOutput:
        r"""
        Paints exactly what a call paints, and records where in the semantic map the given points look.

        It needs a [`SemanticAttentionModel`], since a projection has no attention.

        Args:
            points (`list[tuple[float, float]]`):
                Points of the painted view, (x, y) in pixels from its upper left corner. With `mask_image`, points of
                the picture. Each stands for the 16x16-pixel token it falls in.
            steps (`list[int]`, *optional*):
                Denoising steps to record, counted from 0. Negative ones count from the end. Defaults to all. A call
                that is interrupted has those before.
            layer (`int`, defaults to -1):
                Index of the module's layer to record.
            average_heads (`bool`, defaults to `True`):
                Whether to average the heads instead of returning a map for each.
            chunk_size (`int`, defaults to 256):
                Number of points whose attention is computed at once. The whole attention matrix is never formed.
            semantic_map (`str`, *optional*):
                Name of the map that the points look in. Defaults to the module's first one.
            args, kwargs:
                As in `__call__`. `semantic_image` has to be among them.

        Returns:
            [`SemanticAttentionOutput`]: The pictures and the heat maps. The map is repeated under every panel, so the
            weights of its copies are added up.

        Raises:
            `ValueError`: A point lies outside of the view, a step, layer or map does not exist, the pipeline's module is
                no attention, or the call uses no map or is interrupted before the first of the steps.
        """
        acting = [adapter for adapter, _ in self._acting_adapters()]
        attending = [a.module for a in acting if a.semantic_mode == "cross_attention" and a.module is not None]
        # Of several modules, the first that has the map.
        module: Any = next((m for m in attending if semantic_map in m.maps), attending[0] if attending else None)
        if module is None:
            raise ValueError(
                "`semantic_attention_maps` needs a pipeline with a `SemanticAttentionModel`, because nothing else"
                f" attends to the map, but this one has {type(self.semantic_attention).__name__} in the mode"
                f" {acting[0].semantic_mode!r}."
            )
        if semantic_map is not None and semantic_map not in module.maps:
            raise ValueError(
                f"`semantic_map` has to be one of {', '.join(module.maps)}, which these weights were trained with, but is"
                f" {semantic_map!r}."
            )
        index = 0 if semantic_map is None else module.maps.index(semantic_map)
        count = len(module.layers_of(index))
        if not -count <= layer < count:
            raise ValueError(f"`layer` has to be within [{-count}, {count - 1}] but is {layer}.")
        recorder = AttentionRecorder(self, module, index, points, steps, layer, average_heads, chunk_size)
        self._attention_observer = recorder
        try:
            images = self(*args, **kwargs)[0]
        finally:
            self._attention_observer = None
        return recorder.output(images)

    # -- Load and save ------------------------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ) -> None:
        r"""
        Loads a LoRA, and with a trained one its module and settings as parts of the same adapter.

        The module acts while its LoRA does, and with the LoRA's weight. The modules of several active adapters add
        their updates up. A LoRA whose file names no `semantic_mode`, and a state dict, is an ordinary LoRA that changes
        nothing else.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                A file, folder or Hub repository in any format that [`FluxFillPipeline`] loads, as safetensors, or a
                state dict. Of a pickle `x.bin`, only `x.safetensors` beside it is read. The module of a trained LoRA is
                looked for in the folder `semantic_attention` beside it.
            adapter_name (`str`, *optional*), hotswap (`bool`, defaults to `False`), kwargs (*optional*):
                As in [`~loaders.FluxLoraLoaderMixin.load_lora_weights`].

        Raises:
            `FileNotFoundError`: There is no LoRA.
            `ValueError`: The weights need a module that is missing or that this version cannot use, the LoRA's file is
                damaged or a pickle, or there is no such folder. In each case the pipeline is left unchanged.
        """
        source: Any = pretrained_model_name_or_path_or_dict
        adapter = None
        if not isinstance(source, dict):
            file = find_lora_file(source, kwargs)
            source, adapter = file.path, self._read_adapter(file)
        before = self._lora_names
        active = self.transformer.active_adapters() if before else []
        try:
            super().load_lora_weights(source, adapter_name=adapter_name, hotswap=hotswap, **kwargs)
            loaded = {name for name in before if name == adapter_name} if hotswap else self._lora_names - before
            if adapter is not None and not loaded:
                raise ValueError(f"{source} holds no LoRA for this transformer, so its module would belong to none.")
        except Exception as error:
            # diffusers leaves what it loaded before the error.
            for name in self._lora_names - before:
                super().delete_adapters(name)
            if active:
                self.transformer.set_adapter(active)
            if isinstance(error, (KeyError, AttributeError, IndexError, TypeError)):
                # diffusers raises these for names of layers that it does not expect.
                name = "The state dict" if isinstance(source, dict) else f"The LoRA in {source}"
                raise ValueError(f"{name} cannot be loaded ({type(error).__name__}: {error}).") from error
            raise
        for name in loaded:
            self.semantic_adapters.pop(name, None)
            if adapter is not None:
                adapter.lora_scaling = _lora_state(self.transformer).scalings.get(name) or 1.0
                self.semantic_adapters[name] = adapter

    @property
    def _lora_names(self) -> set[str]:
        return set(getattr(self.transformer, "peft_config", None) or ())

    @classmethod
    def lora_state_dict(
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        return_alphas: bool = False,
        **kwargs,
    ) -> Any:
        r"""
        Reads a LoRA as [`~loaders.FluxLoraLoaderMixin.lora_state_dict`] does, but never a pickle, and checks it before
        anything acts on it. Every LoRA that the pipeline loads comes through here.

        Raises:
            `FileNotFoundError`: There is no LoRA.
            `ValueError`: A pickle is asked for, the file is damaged, a weight is not finite, or the configuration of the
                LoRA has a wrong type or range.
        """
        source: Any = pretrained_model_name_or_path_or_dict
        name = "The state dict"
        if not isinstance(source, dict):
            source = name = find_lora_file(source, kwargs).path
            check_manifest(source)
            # Otherwise diffusers takes what is no safetensors file for a pickle.
            kwargs["use_safetensors"] = True
        returns_metadata = kwargs.pop("return_lora_metadata", False)
        try:
            state_dict, alphas, metadata = super().lora_state_dict(
                source, return_alphas=True, return_lora_metadata=True, **kwargs
            )
        # The readers of other layouts raise these for names and shapes that they do not expect.
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} holds no LoRA that can be read ({type(error).__name__}: {error}).") from error
        # A state dict may hold alphas as numbers.
        numbers = {key: torch.as_tensor(alpha) for key, alpha in (alphas or {}).items()}
        metadata = check_lora(state_dict | numbers, metadata, name)
        outputs = (state_dict, *([alphas] if return_alphas else []), *([metadata] if returns_metadata else []))
        return outputs if len(outputs) > 1 else state_dict

    @classmethod
    def load_lora_into_transformer(cls, state_dict, network_alphas, transformer, *args, **kwargs) -> None:
        r"""
        Loads a LoRA into the transformer as [`~loaders.FluxLoraLoaderMixin.load_lora_into_transformer`] does.

        Raises:
            `ValueError`: The LoRA matches no layer of the transformer, or a weight does not fit its layer. The
                transformer is left unchanged.
        """
        check_lora_fits(state_dict, transformer)
        super().load_lora_into_transformer(state_dict, network_alphas, transformer, *args, **kwargs)

    def _read_adapter(self, file: LoraFile) -> SemanticAdapter | None:
        """Reads what a trained LoRA brings beside its layers. An ordinary one brings nothing."""
        settings = _read_settings(file)
        if "semantic_mode" not in settings:
            return None
        module: Any = None
        if SEMANTIC_MODES[settings["semantic_mode"]].module_class is not None:
            if not file.has_module:
                raise ValueError(
                    "`pretrained_model_name_or_path_or_dict` has to hold the LoRA's module in"
                    f" `{file.module_folder}/config.json`, but {file.source!r} has no such file."
                    " `FluxFillPipeline.load_lora_weights` loads a LoRA alone."
                )
            module = load_semantic_module(
                file.source,
                subfolder=file.module_folder,
                use_safetensors=True,
                dtype=self._module_dtype,
                **file.hub_arguments,
            )
            self._check_channels(module)
        if self._own_module is not None:
            logger.warning("While this LoRA is active, it takes the place of the pipeline's own `semantic_attention`.")
        own = {name: self._own_settings[name] for name in SETTINGS}
        return SemanticAdapter(**own | settings, module=module)

    def fuse_lora(self, *args, **kwargs) -> None:
        r"""
        Fuses LoRAs as [`~loaders.FluxLoraLoaderMixin.fuse_lora`] does. Their modules stay active, with the weight that
        the LoRAs have now.
        """
        before = self._merged_loras
        super().fuse_lora(*args, **kwargs)
        for name in self._merged_loras - before:
            adapter = self.semantic_adapters[name]
            adapter.fused_weight = _lora_state(self.transformer).scalings[name] / adapter.lora_scaling

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        r"""Deletes LoRAs and their modules. A fused LoRA stays in the transformer's weights, and its module with it."""
        merged = self._merged_loras
        super().delete_adapters(adapter_names)
        self._forget_adapters([adapter_names] if isinstance(adapter_names, str) else adapter_names, merged)

    def unload_lora_weights(self, reset_to_overwritten_params: bool = False) -> None:
        r"""
        Removes all LoRAs and their modules. A fused LoRA stays in the transformer's weights, and its module with it.

        Args:
            reset_to_overwritten_params (`bool`, defaults to `False`):
                As in [`~loaders.FluxLoraLoaderMixin.unload_lora_weights`].
        """
        merged = self._merged_loras
        super().unload_lora_weights(reset_to_overwritten_params)
        self._forget_adapters(list(self.semantic_adapters), merged)

    @property
    def _merged_loras(self) -> set[str]:
        """The trained adapters that are merged into the transformer's weights and could be taken out again."""
        return _lora_state(self.transformer).merged & self.semantic_adapters.keys()

    def _forget_adapters(self, names: list[str], merged: set[str]) -> None:
        for name in names:
            adapter = self.semantic_adapters.pop(name, None)
            if adapter is None:
                continue
            if name in merged:
                adapter.is_permanent = True
                # Another LoRA may take its name, and be fused as well.
                name = f"{name} (fused, {sum(other.is_permanent for other in self.semantic_adapters.values())})"
            if adapter.is_permanent:
                self.semantic_adapters[name] = adapter

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        r"""
        Saves a pipeline that paints what this one paints, which is left unchanged. The saved transformer has the active
        LoRAs in its weights, and the saved module has its adapter's weight in its gates.

        Args:
            save_directory (`str` or `os.PathLike`), args, kwargs (*optional*):
                As in [`~DiffusionPipeline.save_pretrained`].

        Raises:
            `ValueError`: Several modules act, but a saved pipeline has one, or a LoRA is on quantized weights.
        """
        acting = self._acting_adapters()
        modules = [(adapter.module, weight) for adapter, weight in acting if adapter.module is not None]
        if len(modules) > 1:
            raise ValueError(
                f"A saved pipeline has one module, but {len(modules)} act. Choose one adapter with `set_adapters`."
            )
        saved, transformer = copy.copy(self), getattr(self.transformer, "_orig_mod", self.transformer)
        with contextlib.ExitStack() as stack:
            if self.semantic_adapters:
                module, weight = copy.deepcopy(modules[0]) if modules else (None, 1.0)
                for layer in module.layers if module is not None else ():
                    layer.scale.data.mul_(weight)
                saved.register_to_config(**{name: self.config[name] for name in SETTINGS})
                maps = acting[0][0].semantic_maps
                if maps != SINGLE_MAP or "semantic_maps" in self._own_settings:
                    saved.register_to_config(semantic_maps=list(maps))
                stack.enter_context(self._adapters_aside())
                saved.semantic_attention = module
            if transformer is not None:
                # diffusers would save PEFT's names, which it cannot load.
                stack.enter_context(transformer.register_state_dict_post_hook(_merge_loras))
            super(FluxFillSemanticPipeline, saved).save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        text_encoder_lora_layers: dict[str, torch.nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
        semantic_attention: SemanticAttentionModel | SemanticProjectionModel | None = None,
        semantic_mode: str | None = None,
        fusion_alpha: float = 0.5,
        max_sequence_length: int = 512,
        height: int | None = None,
        width: int | None = None,
        semantic_maps: Sequence[str] | None = None,
        visible_attention: str = "joint",
    ) -> None:
        r"""
        Saves a LoRA. With `semantic_mode` or `semantic_attention` it is saved as a trained one, with its module.

        The parameters of [`FluxFillPipeline`] come first, in its order.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to save to. It is created if it does not exist.
            transformer_lora_layers, text_encoder_lora_layers, transformer_lora_adapter_metadata,
            text_encoder_lora_adapter_metadata (`dict`, *optional*):
                As in [`~loaders.FluxLoraLoaderMixin.save_lora_weights`].
            is_main_process (`bool`, defaults to `True`):
                Whether this process writes. The others return at once.
            weight_name (`str`, *optional*):
                File name of the LoRA. Defaults to `pytorch_lora_weights.safetensors`.
            save_function (`Callable`, *optional*):
                Writes the file, and gets the state dict and a path. It cannot write the metadata of a trained LoRA.
            safe_serialization (`bool`, defaults to `True`):
                `False` writes a pickle, `pytorch_lora_weights.bin`, as [`FluxFillPipeline`] does, and the same weights
                beside it as safetensors, which are what this class loads. A trained LoRA has to be safetensors.
            semantic_attention (`SemanticAttentionModel` or `SemanticProjectionModel`, *optional*):
                The module, saved under `semantic_attention/`. It has to be of the mode's class.
            semantic_mode (`str`, *optional*), fusion_alpha (`float`, defaults to 0.5), max_sequence_length (`int`,
            defaults to 512), height, width (`int`, *optional*), semantic_maps (`list[str]`, *optional*):
                How it was trained, as in [`SemanticAdapter`]. The mode defaults to `"cross_attention"` if a module is
                passed.
            visible_attention (`str`, defaults to `"joint"`):
                As in [`FluxFillSemanticPipeline`].

        Raises:
            `ValueError`: The mode is unknown, the module is not of its class, a number or name is out of range, the
                format would lose the mode, or there are no layers.
        """
        if semantic_mode is not None or semantic_attention is not None or visible_attention != "joint":
            semantic_mode = semantic_mode or "cross_attention"
            module_class = _get_mode(semantic_mode).module_class
            if not _is_of_class(semantic_attention, module_class):
                raise ValueError(
                    f"`semantic_attention` has to be {f'a `{module_class.__name__}`' if module_class else 'None'} with"
                    f' `semantic_mode="{semantic_mode}"` but is {type(semantic_attention).__name__}.'
                )
            for name, value, needed in (
                ("save_function", save_function, None),
                ("safe_serialization", safe_serialization, True),
            ):
                if value is not needed:
                    raise ValueError(
                        f'`{name}` has to be {needed} with `semantic_mode="{semantic_mode}"`, which is written as'
                        f" metadata of a safetensors file, but is {value!r}."
                    )
            adapter = SemanticAdapter(
                semantic_mode,
                fusion_alpha,
                max_sequence_length,
                height,
                width,
                semantic_attention,
                semantic_maps,
                visible_attention,
            )
            trained_with = adapter.settings
            if not adapter.is_causal:
                # A file that does not say so is joint, as all were before there was a choice.
                del trained_with["visible_attention"]
            if adapter.semantic_maps != SINGLE_MAP:
                trained_with["semantic_maps"] = adapter.semantic_maps
            sizes = {"height": height, "width": width}
            trained_with |= {name: size for name, size in sizes.items() if size is not None}
            metadata = {"format": "pt", SEMANTIC_METADATA_KEY: json.dumps(trained_with)}
            configs = {
                "transformer": transformer_lora_adapter_metadata,
                "text_encoder": text_encoder_lora_adapter_metadata,
            }
            lora_config = {f"{part}.{k}": v for part, config in configs.items() for k, v in (config or {}).items()}
            if lora_config:
                metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(lora_config, indent=2, sort_keys=True, default=sorted)
            save_function = functools.partial(save_tensors, metadata=metadata)
        if not is_main_process:
            return
        stock: Any = super()
        save = functools.partial(
            stock.save_lora_weights,
            save_directory,
            transformer_lora_layers=transformer_lora_layers,
            text_encoder_lora_layers=text_encoder_lora_layers,
            save_function=save_function,
            transformer_lora_adapter_metadata=transformer_lora_adapter_metadata,
            text_encoder_lora_adapter_metadata=text_encoder_lora_adapter_metadata,
        )
        save(weight_name=weight_name, safe_serialization=safe_serialization)
        if not safe_serialization and save_function is None:
            save(weight_name=safetensors_name(weight_name or LORA_WEIGHT_NAME))
        if semantic_attention is not None:
            folder = os.path.join(save_directory, SEMANTIC_SUBFOLDER)
            semantic_attention.save_pretrained(folder)
            # The configuration was written as any file, see `save_tensors`.
            shutil.copymode(os.path.join(folder, "config.json"), os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))


def save_tensors(tensors: dict[str, torch.Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    r"""Writes a safetensors file with the mode that the umask gives. Safetensors itself keeps others from reading it."""
    with open(path, "wb") as file:
        file.write(safetensors.torch.save(tensors, metadata=metadata))


def _merge_loras(transformer: torch.nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, _) -> None:
    """Gives a state dict the entries of a transformer that has its active LoRAs in its weights, instead of PEFT's."""
    for name, module in transformer.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        # One layer at a time fits into any memory, and PEFT itself knows how each kind of LoRA is merged.
        layer: Any = copy.deepcopy(module)
        if not layer.get_base_layer().weight.is_floating_point():
            raise ValueError("A LoRA on quantized weights cannot be merged into them: unload it before you save.")
        if layer.disable_adapters and layer.merged:
            layer.unmerge()
        elif not layer.disable_adapters and not layer.merged:
            layer.merge()
        for key in [key for key in state_dict if key.startswith(f"{prefix}{name}.")]:
            del state_dict[key]
        state_dict.update({f"{prefix}{name}.{key}": w for key, w in layer.get_base_layer().state_dict().items()})


def read_trained_settings(
    source: str | os.PathLike, subfolder: str = "", weight_name: str | None = None, **hub_arguments
) -> dict[str, Any]:
    r"""
    Reads what trained weights say about themselves, without loading a model.

    Args:
        source (`str` or `os.PathLike`):
            A LoRA file, or a folder or Hub repository that holds one.
        subfolder (`str`, defaults to `""`), weight_name (`str`, *optional*):
            The LoRA file in it, which is found as in [`FluxFillSemanticPipeline.load_lora_weights`].
        hub_arguments (*optional*):
            As in [`~huggingface_hub.hf_hub_download`].

    Returns:
        `dict[str, Any]`: `semantic_mode`, `fusion_alpha` and `max_sequence_length`, the size of a view in training
        as `height` and `width`, the names of several maps as `semantic_maps`, and `visible_attention` if it is
        `"causal"`. What the file does not say is missing: earlier files have no size, and ordinary LoRAs say nothing.
        Nothing is known either where there is no LoRA.

    Raises:
        `ValueError`: The file is damaged or a pickle, names an unknown mode, or states a number that cannot be.
    """
    try:
        return _read_settings(
            find_lora_file(source, {"weight_name": weight_name, "subfolder": subfolder, **hub_arguments})
        )
    except FileNotFoundError:
        return {}


def _read_settings(file: LoraFile) -> dict[str, Any]:
    """Reads what a LoRA file says about its training."""
    known = (*SETTINGS, "height", "width", "semantic_maps")
    try:
        settings = parse_json(file.metadata.get(SEMANTIC_METADATA_KEY, "{}"), SEMANTIC_METADATA_KEY)
        if not isinstance(settings, dict):
            raise ValueError(f"its `{SEMANTIC_METADATA_KEY}` is no JSON object but {settings!r}")
        checked = SemanticAdapter(**{name: settings[name] for name in known if name in settings})
    except ValueError as error:
        raise ValueError(
            f"`pretrained_model_name_or_path_or_dict` holds a damaged file, {file.path}: {error}"
        ) from error
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        logger.warning(f"{file.path} says what this version does not know, and it is ignored: {str(unknown)[:200]}")
    said = {name: getattr(checked, name) for name in known if name in settings}
    if "semantic_mode" not in said and os.path.basename(file.path) == LORA_WEIGHT_NAME_SAFE:
        # Tools that rewrite a LoRA lose its metadata. A module beside the file still tells that it was trained here.
        with contextlib.suppress(LocalEntryNotFoundError):
            if file.has_module:
                said["semantic_mode"] = "cross_attention"
    return said


def _count_pictures(view: PipelineImageInput | None) -> int:
    if isinstance(view, (list, tuple)):
        return sum(_count_pictures(item) for item in view)
    return view.shape[0] if isinstance(view, (torch.Tensor, np.ndarray)) and view.ndim == 4 else 1


def _cut_target(images, canvas: _Canvas):
    """
    Cuts the target panel out of PIL pictures, a numpy array (batch, height, width, 3), a tensor (batch, 3, height,
    width) or packed latents (batch, tokens, 64).
    """
    rows, _, panels, target = canvas
    if isinstance(images, list):
        return [
            picture.crop((target * picture.width // panels, 0, (target + 1) * picture.width // panels, picture.height))
            for picture in images
        ]
    if isinstance(images, np.ndarray):
        return np.split(images, panels, axis=2)[target]
    if images.ndim == 3:
        return images.unflatten(1, (rows, panels, -1))[:, :, target].flatten(1, 2)
    return images.chunk(panels, dim=3)[target]
