# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Weights that are copied to the device block by block give the results of weights that stay there."""

import copy
import functools
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from semantic_fill.compiler import compile_blocks
from semantic_fill.lora import add_lora
from semantic_fill.memory import set_checkpointing
from semantic_fill.precision import PRECISIONS, FrozenLinear, quantize_blocks


QUANTIZED = [name for name, cls in PRECISIONS.items() if cls is not None]


def build(precision: str) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    sizes: Any = {"num_layers": 3, "num_single_layers": 4, "num_attention_heads": 2, "attention_head_dim": 16}
    sizes |= {"in_channels": 16, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6)}
    transformer = FluxTransformer2DModel(**sizes, guidance_embeds=False).requires_grad_(False)
    quantize_blocks(transformer, precision)
    add_lora(transformer, rank=4, alpha=4)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return transformer.train()


def forward(transformer: FluxTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(4.0))
    return transformer(
        hidden_states=draw(2, 8, 16),
        encoder_hidden_states=draw(2, 5, 16),
        pooled_projections=draw(2, 16),
        timestep=torch.full((2,), 0.5),
        txt_ids=torch.zeros(5, 3),
        img_ids=ids,
        return_dict=False,
    )[0]


def steps(transformer: FluxTransformer2DModel) -> list[torch.Tensor | None]:
    """Gradients of two steps that accumulate, and a painting's forward between them."""
    forward(transformer).square().mean().backward()
    with torch.no_grad():
        painted = forward(transformer)
    forward(transformer).square().mean().backward()
    return [painted, *(p.grad for p in transformer.parameters() if p.requires_grad)]


@pytest.mark.parametrize("precision, backend", [*((name, None) for name in QUANTIZED), ("nf4", "aot_eager")])
def test_streamed_weights_change_nothing(monkeypatch, precision, backend):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    resident = build(precision)
    streamed = copy.deepcopy(resident)
    set_checkpointing(resident, "offload")
    set_checkpointing(streamed, "stream")
    if backend:
        compiled = functools.partial(streamed.compile_repeated_blocks, backend=backend)
        monkeypatch.setattr(streamed, "compile_repeated_blocks", lambda options, **kwargs: compiled(**kwargs))
        compile_blocks(streamed, fused_lora=False)
    # Products of fp8 are in bfloat16, where a compiled block rounds in other places.
    with torch.autocast("cpu", torch.bfloat16, enabled=backend is None):
        expected, got = steps(resident), steps(streamed)
    assert all(tensor.any() for tensor in expected)
    torch.testing.assert_close(got, expected, **({"rtol": 1e-3, "atol": 1e-5} if backend else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("precision", QUANTIZED)
def test_two_blocks_of_each_class_are_on_the_device(precision):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    transformer = build(precision)

    def stored(module: torch.nn.Module) -> dict[int, int]:
        """Bytes of the quantized weights, by where they are."""
        tensors = (*module.parameters(), *module.buffers())
        return {tensor.data_ptr(): tensor.nbytes for tensor in tensors if not tensor.is_floating_point()}

    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    before = [sum(stored(block).values()) for block in blocks]
    bits = PRECISIONS[precision].bits
    linears = [module for block in blocks for module in block.modules() if isinstance(module, FrozenLinear)]
    assert sum(before) == sum(linear.in_features * linear.out_features * bits // 8 for linear in linears)
    set_checkpointing(transformer, "stream")
    assert sum(stored(transformer).values()) == sum(before[i] for i in (0, 1, 3, 4))
