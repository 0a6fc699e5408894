# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""FLUX.1-Fill-dev in its true shape with random weights, made on the device.

Random weights take as long as real ones, whose download needs a license to be accepted. `--shape test` of the benchmarks
takes the tiny models of the tests instead, to try a benchmark without a GPU.
"""

from typing import Any

import torch
import torch.nn as nn
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from measurement import ROOT  # noqa: F401, its import puts the repository on the path
from small_flux_fill import build_pipeline, build_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.precision import PRECISIONS, replace_linears


FLUX_FILL = {
    "attention_head_dim": 128,
    "axes_dims_rope": (16, 56, 56),
    "guidance_embeds": True,
    "in_channels": 384,
    "out_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
}
SCHEDULER = {
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def random_weight(parameter: torch.Tensor, name: str, device, dtype) -> torch.Tensor:
    """Small enough that activations stay finite through all blocks."""
    weight = torch.empty(parameter.shape, device=device, dtype=dtype)
    if parameter.ndim > 1:
        return weight.normal_(std=0.02)
    return weight.fill_(0.0 if name == "bias" else 1.0)


@torch.no_grad()
def materialize(
    model: nn.Module, device: torch.device, dtype: torch.dtype, drawn_on: torch.device | None = None
) -> nn.Module:
    """Replaces weights on the meta device by random ones, one by one. A GPU as `drawn_on` draws them fastest."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                weight = random_weight(parameter, name, drawn_on or device, dtype).to(device)
                module._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return model.to(device).eval()


def transformer_config(shape: str) -> dict:
    return FLUX_FILL if shape == "flux" else dict(build_pipeline("test").transformer.config)


def build_transformer(
    shape: str,
    precision: str,
    device: torch.device,
    dtype: torch.dtype,
    drawn_on: torch.device | None = None,
    **config,
) -> FluxTransformer2DModel:
    """
    The frozen base, quantized layer by layer, so that it never exists in bf16 as a whole. Loading does the same. `config`
    replaces parts of the transformer's.
    """
    with init_empty_weights():
        transformer = FluxTransformer2DModel.from_config(transformer_config(shape) | config)
    if PRECISIONS[precision] is not None:
        with torch.no_grad():
            for linear, frozen in replace_linears(transformer, precision):
                frozen.quantize(random_weight(linear.weight, "weight", device, dtype))
    return materialize(transformer, device, dtype, drawn_on)


def build_scheduler(shape: str) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**SCHEDULER) if shape == "flux" else build_pipeline("test").scheduler


def build_vae(shape: str, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    if shape != "flux":
        return build_pipeline("test").vae.to(device, dtype)
    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKL(**VAE)
    return materialize(vae, device, dtype)


def empty_components() -> dict[str, Any]:
    """All components of FLUX.1-Fill-dev, the models on the meta device. The tokenizers know an alphabet only."""
    clip_tokenizer, t5_tokenizer = build_tokenizers()
    ids = {f"{name}_token_id": getattr(clip_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with init_empty_weights(include_buffers=False):
        return {
            "scheduler": build_scheduler("flux"),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L, **ids)),
            "tokenizer": clip_tokenizer,
            "text_encoder_2": T5EncoderModel(T5Config(**T5_XXL)),
            "tokenizer_2": t5_tokenizer,
            "transformer": FluxTransformer2DModel.from_config(FLUX_FILL),
        }


def build_encoders(shape: str, device: torch.device, dtype: torch.dtype) -> FluxFillSemanticPipeline:
    """The pipeline without its transformer, as training loads it. Its weights are always the same, so caches are found."""
    torch.manual_seed(0)
    if shape != "flux":
        base = build_pipeline("test")
        components = base.components | {"transformer": None}
        pipeline = FluxFillSemanticPipeline(**components).to(dtype)
        for name in ("vae", "text_encoder", "text_encoder_2"):
            components[name].requires_grad_(False)
        return pipeline.to(device)
    components = empty_components()
    for name in ("vae", "text_encoder", "text_encoder_2"):
        components[name] = materialize(components[name], device, dtype)
    return FluxFillSemanticPipeline(**components | {"transformer": None})


def forward_flops(shape: str, image_tokens: int, text_tokens: int) -> float:
    """Floating point operations of the transformer's forward for one sample."""
    with init_empty_weights():
        transformer = FluxTransformer2DModel.from_config(transformer_config(shape))
    config = transformer.config
    meta = {"device": "meta"}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(
            hidden_states=torch.empty(1, image_tokens, config.in_channels, **meta),
            timestep=torch.empty(1, **meta),
            guidance=torch.empty(1, **meta),
            pooled_projections=torch.empty(1, config.pooled_projection_dim, **meta),
            encoder_hidden_states=torch.empty(1, text_tokens, config.joint_attention_dim, **meta),
            txt_ids=torch.empty(text_tokens, 3, **meta),
            img_ids=torch.empty(image_tokens, 3, **meta),
        )
    return counter.get_total_flops()
