# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Ways in for the map that the product does not offer, for `ablation.py` to measure against those that it does.

Each is a subclass of a model of the product with the same interface, so it trains, starts without effect and paints like
the original. More of them were measured with commit bd5985d, which has their code (RESULTS.md).
"""

import torch
import torch.nn as nn

from semantic_attention import SemanticAttentionModel, SemanticCrossAttention, SemanticProjectionModel


class AttentionFromCondition(SemanticAttentionModel):
    """The picture channels of the condition attend to the map, in place of the noisy latents."""

    input_part = 1


class ProjectionOnNoise(SemanticProjectionModel):
    """The map's latents are added to the noisy latents, in place of the condition's picture channels."""

    input_part = 0


class AlignedLayer(SemanticCrossAttention):
    """
    Attention of each image token to the semantic token of its own place alone. The softmax over one token is 1, so
    queries, keys and the norm of the image tokens are gone.
    """

    def __init__(self, channels: int = 64, num_heads: int = 8, head_dim: int = 16):
        super().__init__(channels, num_heads, head_dim)
        del self.norm_image, self.to_q, self.to_k

    def forward(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        rotary_emb: None = None,
        semantic_scale: float = 1.0,
    ) -> torch.Tensor:
        update = self.to_out(self.to_v(self.norm_semantic(semantic_tokens)))
        return (hidden_states + semantic_scale * self.scale * update).to(hidden_states.dtype)


class Aligned(SemanticAttentionModel):
    """A stack of `AlignedLayer`s with 16576 parameters each, on the noisy latents."""

    def __init__(self, **config):
        super().__init__(**config)
        sizes = (self.config["in_channels"], self.config["num_heads"], self.config["head_dim"])
        self.layers = nn.ModuleList(AlignedLayer(*sizes) for _ in self.layers)

    def _summary(self) -> str:
        return f"Using aligned tokens with {len(self.layers)} layers"


class AlignedFromCondition(Aligned):
    """The same, on the picture channels of the condition."""

    input_part = 1


MODULES = {cls.__name__: cls for cls in (AttentionFromCondition, ProjectionOnNoise, Aligned, AlignedFromCondition)}
