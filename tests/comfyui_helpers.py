# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the nodes for ComfyUI are tested on: ComfyUI itself, or a double of the few interfaces that the nodes touch.

The double stands in for ComfyUI where it is not installed. Its model is the transformer of diffusers behind ComfyUI's
interface. `to_comfyui` writes that transformer in ComfyUI's key layout, so that ComfyUI's own FLUX can be compared too.
"""

import contextlib
import copy
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import safetensors
import torch
import torch.nn.functional as F
from helpers import ROOT


COMFYUI = os.environ.get("COMFYUI", "")
DOUBLE_BLOCK = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
}
SINGLE_BLOCK = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
}
REST = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
} | {
    f"{name}.{layer}": f"time_text_embed.{embedder}.{linear}"
    for name, embedder in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    )
    for layer, linear in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
}


def to_comfyui(transformer) -> dict[str, torch.Tensor]:
    """A `FluxTransformer2DModel` in the key layout of the original FLUX, which ComfyUI reads."""
    layers = {name: [source] for name, source in REST.items()}
    for kind, blocks, parts in (
        ("double_blocks", "transformer_blocks", DOUBLE_BLOCK),
        ("single_blocks", "single_transformer_blocks", SINGLE_BLOCK),
    ):
        for index in range(len(getattr(transformer, blocks))):
            layers |= {f"{kind}.{index}.{to}": [f"{blocks}.{index}.{part}" for part in of] for to, of in parts.items()}
    weights, written = transformer.state_dict(), {}
    for layer, sources in layers.items():
        for kind in ("weight", "bias"):
            found = [weights.pop(f"{source}.{kind}") for source in sources if f"{source}.{kind}" in weights]
            if found:
                joined = torch.cat(found)
                if layer == "final_layer.adaLN_modulation.1":
                    # diffusers keeps the scale before the shift.
                    joined = torch.cat(joined.chunk(2)[::-1])
                written[f"{layer}.{'scale' if layer.endswith('_norm') else kind}"] = joined.clone()
    assert not weights, sorted(weights)
    return written


def sizes_for_comfyui(transformer) -> dict:
    """What ComfyUI takes for granted of a FLUX and what is smaller in a tiny one."""
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    return {
        "hidden_size": width,
        "num_heads": config.num_attention_heads,
        "axes_dim": list(config.axes_dims_rope),
        "context_in_dim": config.joint_attention_dim,
    }


def load_nodes() -> ModuleType:
    """The package of nodes as ComfyUI loads it: by its path, whatever its folder is called."""
    spec = importlib.util.spec_from_file_location("semantic_fill_nodes", ROOT / "comfyui" / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["semantic_fill_nodes"] = package
    try:
        spec.loader.exec_module(package)
        return sys.modules["semantic_fill_nodes.nodes"]
    finally:
        for name in [name for name in sys.modules if name.startswith("semantic_fill_nodes")]:
            del sys.modules[name]


def pack(latents: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = latents.shape
    blocks = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return blocks.reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    blocks = tokens.reshape(len(tokens), height // 2, width // 2, tokens.shape[2] // 4, 2, 2)
    return blocks.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), tokens.shape[2] // 4, height, width)


class Vae:
    """ComfyUI's interface over diffusers' VAE: pictures `(batch, height, width, 3)` to the posterior's mode."""

    def __init__(self, vae):
        self.vae = vae

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(pixels.movedim(-1, 1) * 2 - 1).latent_dist.mode()


# -- The double -------------------------------------------------------------------------------------------------------


class DoubleModel:
    """A `ModelPatcher` over diffusers' transformer."""

    def __init__(self, transformer, config: dict, latent_format):
        self.transformer, self.wrappers = transformer, {}
        self.objects = {"model_config": SimpleNamespace(unet_config=config), "latent_format": latent_format}

    def clone(self) -> "DoubleModel":
        clone = copy.copy(self)
        clone.wrappers = {kind: {key: list(each) for key, each in of.items()} for kind, of in self.wrappers.items()}
        return clone

    def get_model_object(self, name: str):
        return self.objects[name]

    def add_wrapper_with_key(self, kind: str, key: str, wrapper) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def velocity(self, x, time, text, pooled, guidance) -> torch.Tensor:
        height, width = x.shape[-2:]
        ids = torch.zeros(height // 2, width // 2, 3)
        ids[..., 1], ids[..., 2] = torch.arange(height // 2)[:, None], torch.arange(width // 2)
        tokens = self.transformer(
            hidden_states=pack(x),
            timestep=time,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=ids.flatten(0, 1),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


class Double:
    """As much of ComfyUI as the nodes touch."""

    name = "double"

    def __init__(self, base, loras: Path):
        self.base = base
        vae = base.vae.config
        self.latent_format = SimpleNamespace(process_in=lambda z: (z - vae.shift_factor) * vae.scaling_factor)
        patcher_extension = SimpleNamespace(WrappersMP=SimpleNamespace(DIFFUSION_MODEL="diffusion_model"))
        modules = {
            "comfy": SimpleNamespace(),
            "comfy.sd": SimpleNamespace(load_lora_for_models=self.load_lora),
            "comfy.utils": SimpleNamespace(load_torch_file=self.load_torch_file),
            "comfy.patcher_extension": patcher_extension,
            "folder_paths": SimpleNamespace(
                get_filename_list=lambda kind: sorted(p.relative_to(loras).as_posix() for p in loras.rglob("*.*")),
                get_full_path_or_raise=lambda kind, name: str(loras / name),
            ),
            "node_helpers": SimpleNamespace(
                conditioning_set_values=lambda conditioning, values: [[t, d | values] for t, d in conditioning]
            ),
        }
        for name in ("sd", "utils", "patcher_extension"):
            setattr(modules["comfy"], name, modules[f"comfy.{name}"])
        before = {name: sys.modules.get(name) for name in modules}
        sys.modules.update(modules)  # pyright: ignore[reportArgumentType] They are modules to whoever imports them.
        try:
            self.nodes = load_nodes()
        finally:
            for name, module in before.items():
                del sys.modules[name]
                if module is not None:
                    sys.modules[name] = module

    @staticmethod
    def load_torch_file(path: str, safe_load: bool, return_metadata: bool = False):
        assert safe_load
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return (tensors, file.metadata()) if return_metadata else tensors

    @staticmethod
    def load_lora(model: DoubleModel, clip, lora: dict, strength: float, strength_clip: float):
        """Adds each LoRA to its layer as ComfyUI does, where an alpha that is missing is the rank."""
        assert clip is None
        model = model.clone()
        model.transformer = copy.deepcopy(model.transformer)
        layers = dict(model.transformer.named_modules())
        for key, down in lora.items():
            name, found, _ = key.partition(".lora_A.")
            if found:
                scale = strength * float(lora.get(f"{name}.alpha", down.shape[0])) / down.shape[0]
                layers[name.removeprefix("transformer.")].weight.data += scale * lora[f"{name}.lora_B.weight"] @ down
        return model, None

    def model(self, **config) -> DoubleModel:
        config = {"image_model": "flux", "in_channels": 96} | config
        return DoubleModel(self.base.transformer, config, self.latent_format)

    @torch.no_grad()
    def sample(self, model, noise, positive, negative, latent, sigmas, cfg=1.0) -> torch.Tensor:
        """Euler's method. Both prompts come in one batch where they are needed, as in ComfyUI."""
        x = noise
        conditions = [positive] if cfg == 1.0 else [positive, negative]
        texts, pooled, guidance, seen = [], [], [], []
        for ((text, values),) in conditions:
            texts.append(text.expand(len(x), -1, -1))
            pooled.append(values["pooled_output"].expand(len(x), -1))
            guidance += [values["guidance"]] * len(x)
            masks = F.pixel_unshuffle(values["concat_mask"], 8)
            seen.append(torch.cat((self.latent_format.process_in(values["concat_latent_image"]), masks), dim=1))
        wrappers = [each for of in model.wrappers.get("diffusion_model", {}).values() for each in of]

        def call(x, *args, rest=wrappers):
            if not rest:
                return model.velocity(x, *args)
            return rest[0](lambda *args: call(*args, rest=rest[1:]), x, *args)

        for sigma, following in zip(sigmas[:-1], sigmas[1:]):
            several = torch.cat([x] * len(conditions))
            states = torch.cat((several, torch.cat(seen)), dim=1)
            time = sigma.expand(len(several))
            velocity = call(states, time, torch.cat(texts), torch.cat(pooled), torch.tensor(guidance))
            if cfg != 1.0:
                wanted, unwanted = velocity.chunk(2)
                velocity = unwanted + cfg * (wanted - unwanted)
            x = x + (following - sigma) * velocity
        return x


# -- ComfyUI itself ---------------------------------------------------------------------------------------------------


class RealComfyUI:
    """The checkout of ComfyUI that the environment variable COMFYUI names."""

    name = "ComfyUI"

    def __init__(self, base, loras: Path):
        self.base = base
        if COMFYUI not in sys.path:
            sys.path.append(COMFYUI)
        import comfy.options  # pyright: ignore
        from comfy.cli_args import args  # pyright: ignore

        args.cpu = True
        import comfy.model_detection  # pyright: ignore
        import comfy.sample  # pyright: ignore
        import comfy.samplers  # pyright: ignore
        import comfy.sd  # pyright: ignore
        import folder_paths  # pyright: ignore

        self.comfy = comfy
        folder_paths.folder_names_and_paths["loras"] = ([str(loras)], {".safetensors"})
        folder_paths.filename_list_cache.pop("loras", None)
        self.latent_format = comfy.latent_formats.Flux()
        self.nodes = load_nodes()

    @contextlib.contextmanager
    def tiny(self):
        """ComfyUI takes the sizes of FLUX for granted."""
        detection = self.comfy.model_detection
        detect, sizes = detection.detect_unet_config, sizes_for_comfyui(self.base.transformer)
        detection.detect_unet_config = lambda *args, **kwargs: detect(*args, **kwargs) | sizes
        try:
            yield
        finally:
            detection.detect_unet_config = detect

    def model(self, **options):
        with self.tiny():
            weights = to_comfyui(self.base.transformer)
            return self.comfy.sd.load_diffusion_model_state_dict(weights, options)

    def load_lora(self, model, clip, lora: dict, strength: float, strength_clip: float):
        return self.comfy.sd.load_lora_for_models(model, clip, lora, strength, strength_clip)

    @torch.no_grad()
    def sample(self, model, noise, positive, negative, latent, sigmas, cfg=1.0) -> torch.Tensor:
        samples = self.comfy.sample.sample_custom(
            model,
            noise,
            cfg,
            self.comfy.samplers.sampler_object("euler"),
            sigmas,
            positive,
            negative,
            latent["samples"],
            disable_pbar=True,
            seed=0,
        )
        return self.latent_format.process_in(samples)
