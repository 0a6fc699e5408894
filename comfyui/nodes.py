# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""ComfyUI nodes that paint with a LoRA of Semantic Fill, its module and a semantic map.

ComfyUI's own loader reads the LoRA but has no place for the module, so the map would be lost. These nodes load both, lay
the diptych, and hook the module into FLUX Fill. They need nothing that ComfyUI does not have, so the arithmetic of
`semantic_attention.py`, which needs diffusers, stands here once more. `tests/test_comfyui.py` holds the two together.
"""

import json
import logging
import os
from dataclasses import dataclass

import comfy.sd
import comfy.utils
import folder_paths
import node_helpers
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP


KEY = "semantic_fill"
MODES = ("cross_attention", "projection", "pixel_fusion", "in_context", "none")
# What the metadata of a LoRA file may say.
SETTINGS = {
    "semantic_mode": str,
    "fusion_alpha": (int, float),
    "max_sequence_length": int,
    "height": int,
    "width": int,
    "semantic_maps": list,
}
# The name of the map where there is one.
SINGLE_MAP = ("semantic",)
# The modes whose map enters through a module, with the weights of a layer and the input channels that it enhances: the
# noisy latents, or the picture channels of the condition behind them.
MODULES = {
    "cross_attention": (
        {"scale", *(f"to_{name}.weight" for name in ("q", "k", "v", "out"))}
        | {f"norm_{view}.{part}" for view in ("image", "semantic") for part in ("weight", "bias")},
        slice(0, 16),
    ),
    "projection": ({"scale", "linear.weight", "linear.bias"}, slice(16, 32)),
}
MODULE_FILE = os.path.join("semantic_attention", "diffusion_pytorch_model.safetensors")
BESIDE = "beside the LoRA"
ROPE_THETA = 100


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Makes tokens `(batch, rows * columns, 4 * channels)` of latents, in FLUX's order."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Makes latents `(batch, channels, height, width)` of tokens."""
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def rotate(values: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turns each pair of channels by its angle."""
    even, odd = values.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (values.float() * cosine.to(values.device) + turned * sine.to(values.device)).to(values.dtype)


@dataclass
class SemanticModule:
    """A trained module: `SemanticAttentionModel` or `SemanticProjectionModel`."""

    kind: str
    layers: list[dict[str, torch.Tensor]]
    num_heads: int = 8
    position: str = "none"
    maps: tuple[str, ...] = SINGLE_MAP

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines for rows and columns, half of a head for either."""
        if self.position != "rope":
            return None
        width = self.layers[0]["to_q.weight"].shape[0] // self.num_heads // 2
        frequencies = ROPE_THETA ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = (positions.double()[:, :, None] * frequencies).flatten(1).repeat_interleave(2, dim=1)
        return angles.cos().float(), angles.sin().float()

    def attend(self, x, tokens, weights, rotary) -> torch.Tensor:
        def norm(name, values):
            return F.layer_norm(values, values.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

        def heads(name, values):
            return F.linear(values, weights[f"{name}.weight"]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        tokens = norm("norm_semantic", tokens)
        query, key, value = heads("to_q", norm("norm_image", x)), heads("to_k", tokens), heads("to_v", tokens)
        if rotary is not None:
            query, key = (rotate(each, *rotary) for each in (query, key))
        attended = F.scaled_dot_product_attention(query, key, value)
        return F.linear(attended.transpose(1, 2).flatten(-2), weights["to_out.weight"])

    def enhance(self, x, tokens, rotary, scale: float, name: str) -> torch.Tensor:
        """Enhances tokens of the transformer's input with the tokens of a map, each for its own place."""
        count = len(self.layers) // len(self.maps)
        first = self.maps.index(name) * count
        for layer in self.layers[first : first + count]:
            weights = {name: weight.to(x) for name, weight in layer.items()}
            if self.kind == "projection":
                update = F.linear(tokens, weights["linear.weight"], weights["linear.bias"])
            else:
                update = self.attend(x, tokens, weights, rotary)
            x = x + scale * weights["scale"] * update
        return x


@dataclass
class SemanticFill:
    """What a trained LoRA says about itself, and its module."""

    semantic_mode: str = "cross_attention"
    fusion_alpha: float = 0.5
    max_sequence_length: int = 512
    height: int = 0
    width: int = 0
    module: SemanticModule | None = None
    strength: float = 1.0
    semantic_maps: tuple[str, ...] = SINGLE_MAP

    @property
    def panels(self) -> tuple[str, ...]:
        """The views on the canvas, from left to right."""
        return ("visible", "target", *(self.semantic_maps if self.semantic_mode == "in_context" else ()))


class Guidance:
    """Enhances the input of FLUX before each of its calls."""

    def __init__(
        self,
        module: SemanticModule,
        tokens: dict[str, torch.Tensor],
        size: tuple[int, int],
        panels: int,
        scales: dict[str, float],
    ):
        rows, columns = size[0] // 2, size[1] // 2
        tiled = {n: t.unflatten(1, (rows, 1, columns)).expand(-1, -1, panels, -1, -1) for n, t in tokens.items()}
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(rows, 1, columns, 2)
        self.module, self.scales = module, scales
        self.tokens = {name: each.flatten(1, 3) for name, each in tiled.items()}
        self.count = len(next(iter(tokens.values())))
        self.rotary = module.rotary(places.expand(-1, panels, -1, -1).flatten(0, 2))
        self.size = (size[0], size[1] * panels)

    def __call__(self, executor, x: torch.Tensor, *args, **kwargs):
        """`x` are the noisy latents, the masked picture's latents and the mask, `(batch, 96, height, width)`."""
        if tuple(x.shape[-2:]) != self.size or x.shape[0] % self.count:
            raise ValueError(
                f"The map is for {self.count} latents of {self.size}, but {x.shape[0]} of {tuple(x.shape[-2:])} are"
                " sampled. Sample the latent that Semantic Fill Conditioning gives."
            )
        channels = MODULES[self.module.kind][1]
        # Positive and negative prompts come as whole batches, one behind the other.
        copies, part = x.shape[0] // self.count, pack(x[:, channels])
        updated = [
            self.module.enhance(part, tokens.to(x).repeat(copies, 1, 1), self.rotary, self.scales[name], name)
            for name, tokens in self.tokens.items()
        ]
        # All maps see the same input, and their updates add up.
        enhanced = sum((other - part for other in updated[1:]), start=updated[0])
        x = torch.cat((x[:, : channels.start], unpack(enhanced, *self.size), x[:, channels.stop :]), dim=1)
        return executor(x, *args, **kwargs)


def resize(name: str, pictures: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Makes `(batch, 3, height, width)` of ComfyUI's `(batch, height, width, channels)`."""
    pictures = pictures[..., :3].movedim(-1, 1)
    rows, columns = pictures.shape[-2:]
    if (rows, columns) == size:
        return pictures
    # Sides that are multiples of 16 keep a shape only nearly.
    if not 0.95 < columns * size[0] / (rows * size[1]) < 1.05:
        logging.warning(
            f"`{name}` is {columns}x{rows} pixels and is squashed to {size[1]}x{size[0]}. Training crops pictures to the"
            " shape of a view and squashes none: crop it first, or set `width` and `height`."
        )
    return F.interpolate(pictures, size, mode=mode, antialias=mode != "nearest-exact")


def read_json(text: str, name: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} has to be a JSON object but is {value!r:.100}.")
    return value


def check_names(names, source: str) -> tuple[str, ...]:
    """The names of maps in a file that somebody else wrote."""
    known = isinstance(names, list) and all(isinstance(name, str) and len(name) <= 64 for name in names)
    if not known or not 1 <= len(names) <= 16 or len(set(names)) < len(names):
        raise ValueError(f"{source} has to name 1 to 16 different maps but has {names!r:.100}.")
    return tuple(names)


def load_module(path: str) -> SemanticModule:
    """Loads a module. Weights tell which of the two kinds it is, and `config.json` beside them tells the rest."""
    config_file, config = os.path.join(os.path.dirname(path), "config.json"), {}
    if os.path.isfile(config_file):
        with open(config_file, encoding="utf-8") as file:
            config = read_json(file.read(), config_file)
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in comfy.utils.load_torch_file(path, safe_load=True).items():
        index, _, part = name.removeprefix("layers.").partition(".")
        layers.setdefault(index, {})[part] = weight
    ordered = [layers[index] for index in sorted(layers, key=lambda index: (len(index), index))]
    kinds = [kind for kind, (names, _) in MODULES.items() if all(layer.keys() == names for layer in ordered)]
    if not ordered or not kinds or any(layer["scale"].shape != (64,) for layer in ordered):
        raise ValueError(f"{path} is no module for FLUX that these nodes can use.")
    maps = check_names(config.get("maps", list(SINGLE_MAP)), config_file)
    if len(ordered) % len(maps):
        raise ValueError(f"{config_file} names {len(maps)} maps, but the weights have {len(ordered)} layers.")
    if kinds[0] == "projection":
        return SemanticModule("projection", ordered, maps=maps)
    if not config:
        raise ValueError(f"{path} needs the `config.json` that lies beside it in the trained folder.")
    position, injection, heads = config.get("position"), config.get("injection", "noise"), config.get("num_heads")
    if position not in ("none", "rope") or injection != "noise" or not isinstance(heads, int) or heads < 1:
        raise ValueError(
            f"{config_file} has position={position!r}, injection={injection!r} and num_heads={heads!r}, but these nodes"
            " can use the positions 'none' and 'rope' on the noise."
        )
    return SemanticModule("cross_attention", ordered, heads, position, maps)


def add_alphas(lora: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """Writes the alphas of a diffusers LoRA beside its weights. ComfyUI would take the rank for alpha without them."""
    alphas = {}
    for key, down in lora.items():
        layer, found, _ = key.removeprefix("transformer.").partition(".lora_A.")
        if not found:
            continue
        alpha = config.get("transformer.lora_alpha", down.shape[0])
        for name, value in (config.get("transformer.alpha_pattern") or {}).items():
            if f".{layer}".endswith(f".{name}") or layer == name.removeprefix("^"):
                alpha = value
        # This kind divides by the root of the rank.
        root = down.shape[0] ** 0.5 if config.get("transformer.use_rslora") else 1.0
        alphas[f"transformer.{layer}.alpha"] = torch.tensor(float(alpha) * root)
    return lora | alphas


class LoadSemanticFill:
    DESCRIPTION = "Loads a trained LoRA and its module. A trained folder lies in models/loras."
    CATEGORY = "loaders"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "SEMANTIC_FILL", "INT")
    RETURN_NAMES = ("model", "semantic_fill", "prompt_length")

    @classmethod
    def INPUT_TYPES(cls):
        files = [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]
        return {
            "required": {
                "model": ("MODEL",),
                "lora": ([name for name in files if not name.endswith(MODULE_FILE)],),
                "module": ([BESIDE, *files], {"tooltip": "The module's weights, if they lie elsewhere."}),
                "strength": ("FLOAT", {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}),
            }
        }

    def load(self, model, lora: str, module: str = BESIDE, strength: float = 1.0):
        path = folder_paths.get_full_path_or_raise("loras", lora)
        weights, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        metadata = metadata or {}
        said = read_json(metadata.get(KEY, "{}"), f"The metadata of {lora}")
        wrong = [name for name in said if not isinstance(said[name], SETTINGS.get(name, ()))]
        if wrong:
            raise ValueError(
                f"{lora} was trained with {wrong[0]}={said[wrong[0]]!r:.100}, which these nodes do not know."
            )
        beside = os.path.join(os.path.dirname(path), MODULE_FILE)
        if not said and module == BESIDE and not os.path.isfile(beside):
            raise ValueError(f"{lora} was not trained by Semantic Fill. Load it with ComfyUI's own node Load LoRA.")
        maps = check_names(said.pop("semantic_maps", list(SINGLE_MAP)), lora)
        fill = SemanticFill(**said, strength=strength, semantic_maps=maps)
        if fill.semantic_mode not in MODES:
            raise ValueError(f"{lora} has the `semantic_mode` {fill.semantic_mode!r}, but these nodes know {MODES}.")
        if fill.semantic_mode in MODULES:
            chosen = beside if module == BESIDE else folder_paths.get_full_path_or_raise("loras", module)
            if not os.path.isfile(chosen):
                raise ValueError(
                    f"{lora} needs its module, but there is no {chosen}. Copy the whole trained folder to models/loras, or"
                    " choose the module's file."
                )
            fill.module = load_module(chosen)
            # Older weights of a projection say cross_attention.
            if fill.module.kind != fill.semantic_mode and fill.module.kind != "projection":
                raise ValueError(f"{lora} needs a module of the kind {fill.semantic_mode}, but {chosen} is another.")
            fill.semantic_mode = fill.module.kind
            if fill.semantic_maps != fill.module.maps:
                raise ValueError(f"{lora} is for the maps {fill.semantic_maps}, but {chosen} for {fill.module.maps}.")
        config = read_json(metadata.get("lora_adapter_metadata", "{}"), f"The metadata of {lora}")
        model, _ = comfy.sd.load_lora_for_models(model, None, add_alphas(weights, config), strength, 0.0)
        return model, fill, fill.max_sequence_length


class SemanticFillConditioning:
    DESCRIPTION = "Lays the diptych and its mask, and brings the map into the model."
    CATEGORY = "conditioning/inpaint"
    FUNCTION = "prepare"
    RETURN_TYPES = ("MODEL", "CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("model", "positive", "negative", "latent")

    @classmethod
    def INPUT_TYPES(cls):
        side = {"default": 0, "min": 0, "max": 16384, "step": 16, "tooltip": "Of one view. 0 is the size of training."}
        return {
            "required": {
                "semantic_fill": ("SEMANTIC_FILL",),
                "model": ("MODEL",),
                "positive": ("CONDITIONING",),
                "negative": ("CONDITIONING",),
                "vae": ("VAE",),
                "visible": ("IMAGE",),
                "width": ("INT", side),
                "height": ("INT", side),
                "scale": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05}),
            },
            "optional": {
                "semantic": ("IMAGE", {"tooltip": "The semantic map of the same scene."}),
                "maps": ("SEMANTIC_MAPS", {"tooltip": "Several maps by name, from Semantic Map."}),
            },
        }

    def prepare(
        self, semantic_fill, model, positive, negative, vae, visible, width, height, scale, semantic=None, maps=None
    ):
        fill, mode = semantic_fill, semantic_fill.semantic_mode
        names = list(fill.semantic_maps)
        if semantic is not None and len(names) > 1:
            raise ValueError(f"This LoRA takes the maps {', '.join(names)}: connect them to `maps`, by Semantic Map.")
        given = dict(maps or {}) | ({} if semantic is None else {names[0]: (semantic, 1.0)})
        unknown = [name for name in given if name not in names]
        if unknown and mode != "none":
            raise ValueError(f"This LoRA takes the maps {', '.join(names)}, but `maps` has {', '.join(unknown)}.")
        scales = {name: scale * own for name, (_, own) in given.items()}
        config = model.get_model_object("model_config").unet_config
        if config.get("image_model") != "flux" or config.get("in_channels") != 96:
            raise ValueError(
                f"`model` has to be a FLUX.1 Fill, of the kind flux with 96 input channels, but is of the kind"
                f" {config.get('image_model')} with {config.get('in_channels')}."
            )
        size = (height or fill.height or visible.shape[1], width or fill.width or visible.shape[2])
        if size[0] % 16 or size[1] % 16:
            raise ValueError(f"`width` and `height` have to be multiples of 16 but are {size[1]} and {size[0]}.")
        if given and mode == "none":
            raise ValueError("This LoRA was trained without a map: leave `semantic` out.")
        for each in scales.values() if fill.module is None else ():
            if each not in (0, 1):
                raise ValueError(
                    f"The mode {mode} has the map on its canvas, so `scale` has to be 0 or 1 but is {each}."
                )
        # A map holds labels, and blending two of them would make a third.
        views = {"visible": resize("visible", visible, size, "bicubic").clamp(0, 1)}
        views |= {
            name: resize(name, given[name][0], size, "nearest-exact") for name in names if scales.get(name, 0) != 0
        }
        batch = max(len(view) for view in views.values())
        if any(len(view) not in (1, batch) for view in views.values()):
            counts = ", ".join(f"`{name}` {len(view)}" for name, view in views.items() if name != "visible")
            raise ValueError(f"`visible` holds {len(visible)} pictures but {counts}.")
        views = {name: view.expand(batch, -1, -1, -1) for name, view in views.items()}
        visible, shown = views["visible"], {name: views[name] for name in names if name in views}

        def encode(pixels):
            latents = vae.encode(pixels.movedim(1, -1).contiguous())
            if latents.shape[1] != 16:
                raise ValueError(f"`vae` has to be that of FLUX, with 16 channels, but has {latents.shape[1]}.")
            return latents

        views = dict.fromkeys(names, torch.full_like(visible, 0.5)) | {"target": visible} | views
        for semantic in shown.values() if mode == "pixel_fusion" else ():
            views["visible"] = torch.lerp(visible, semantic, fill.fusion_alpha)
        canvas = torch.cat([views[name] for name in fill.panels], dim=3)
        mask = torch.cat([torch.full_like(visible[:, :1], name == "target") for name in fill.panels], dim=3)
        condition = {"concat_latent_image": encode(0.5 + (canvas - 0.5) * (1 - mask)), "concat_mask": mask}
        positive, negative = (node_helpers.conditioning_set_values(each, condition) for each in (positive, negative))
        model = model.clone()
        model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, KEY)
        if fill.module is not None and shown:
            latents = model.get_model_object("latent_format")
            tokens = {name: pack(latents.process_in(encode(each))) for name, each in shown.items()}
            strengths = {name: scales[name] * fill.strength for name in shown}
            latent_size = (size[0] // 8, size[1] // 8)
            guidance = Guidance(fill.module, tokens, latent_size, len(fill.panels), strengths)
            model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, guidance)
        return model, positive, negative, {"samples": encode(canvas)}


class SemanticFillMap:
    DESCRIPTION = "Names one of several maps. Chain one node for each map, and connect the last to the conditioning."
    CATEGORY = "conditioning/inpaint"
    FUNCTION = "add"
    RETURN_TYPES = ("SEMANTIC_MAPS",)
    RETURN_NAMES = ("maps",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "name": ("STRING", {"default": "semantic", "tooltip": "What the map was called in training."}),
                "image": ("IMAGE",),
                "scale": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05}),
            },
            "optional": {"maps": ("SEMANTIC_MAPS",)},
        }

    def add(self, name, image, scale, maps=None):
        if name in (maps or {}):
            raise ValueError(f"Two maps are called {name}.")
        return ({**(maps or {}), name: (image, scale)},)


class SemanticFillCutTarget:
    DESCRIPTION = "Cuts the painted panel out of the canvas."
    CATEGORY = "image"
    FUNCTION = "cut"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"semantic_fill": ("SEMANTIC_FILL",), "image": ("IMAGE",)}}

    def cut(self, semantic_fill, image):
        panels = semantic_fill.panels
        return (image.chunk(len(panels), dim=2)[panels.index("target")],)


NODES = {
    "Load Semantic Fill": LoadSemanticFill,
    "Semantic Map": SemanticFillMap,
    "Semantic Fill Conditioning": SemanticFillConditioning,
    "Cut Target": SemanticFillCutTarget,
}
NODE_CLASS_MAPPINGS = {node.__name__: node for node in NODES.values()}
NODE_DISPLAY_NAME_MAPPINGS = {node.__name__: title for title, node in NODES.items()}
