# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the product does not offer, for `ablation.py` to measure against what it does: ways in for the map, and ways to
compute the visible view once.

Each is a subclass of a class of the product with the same interface, so it trains and paints like the original. More ways
in for the map were measured with commit bd5985d, which has their code (RESULTS.md).
"""

import copy

import torch
import torch.nn as nn
from peft.tuners.tuners_utils import BaseTunerLayer

from semantic_attention import (
    CausalAttention,
    SemanticAttentionModel,
    SemanticCrossAttention,
    SemanticProjectionModel,
    join_panels,
    split_panels,
)


# -- Ways in for the map ----------------------------------------------------------------------------------------------


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


# -- Ways to compute the visible view once ----------------------------------------------------------------------------


class TwoCalls(CausalAttention):
    """Training calls the transformer once for each pass, so that they can differ. Only eager blocks without checkpointing."""

    def __call__(self, transformer, hidden_states, columns, img_ids, **inputs):
        visible, target = split_panels(hidden_states, columns)
        inputs |= {"img_ids": torch.cat(split_panels(img_ids, columns, dim=0))}
        seen: list[torch.Tensor] = []
        handle = transformer.proj_out.register_forward_hook(lambda module, args, out: seen.append(out))
        self.see(transformer, visible, **inputs)
        handle.remove()
        # Weights that only lead to the output of the visible view get gradients of zero, because a run checks for some.
        out = transformer(hidden_states=target, **inputs)[0] + 0 * seen[0].sum()
        return (join_panels(torch.zeros_like(out), out, columns),)


class PromptUnseen(TwoCalls):
    """The visible view attends to itself alone."""

    def see(self, transformer, hidden_states, timestep, encoder_hidden_states, txt_ids, **inputs):
        inputs |= {"encoder_hidden_states": encoder_hidden_states[:, :0], "txt_ids": txt_ids[:0]}
        super().see(transformer, hidden_states, timestep, **inputs)


class ZeroNoise(TwoCalls):
    """The noise channels of the visible view are zero. The condition shows it all the same."""

    def see(self, transformer, hidden_states, timestep, **inputs):
        channels = hidden_states.shape[-1] // 6
        hidden_states = torch.cat((torch.zeros_like(hidden_states[..., :channels]), hidden_states[..., channels:]), -1)
        super().see(transformer, hidden_states, timestep, **inputs)


class OwnLora(TwoCalls):
    """The pass of the visible view has a LoRA of its own, of the same rank."""

    def __init__(self, transformer, gradients=True):
        super().__init__(transformer, gradients)
        self.layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
        if "visible" not in transformer.peft_config:
            transformer.add_adapter(copy.deepcopy(transformer.peft_config["default"]), "visible")
            self.choose("default")
            for name, parameter in transformer.named_parameters():
                parameter.requires_grad_("lora_" in name)

    def choose(self, name: str) -> None:
        for layer in self.layers:
            # PEFT's own method would also freeze the other one.
            layer._active_adapter = [name]

    def see(self, transformer, hidden_states, timestep, **inputs):
        self.choose("visible")
        super().see(transformer, hidden_states, timestep, **inputs)
        self.choose("default")


class JointAtFirst(CausalAttention):
    """The first `joint_steps` of a training are joint."""

    joint_steps = 0
    painted_with = CausalAttention

    def __init__(self, transformer, gradients=True):
        super().__init__(transformer, gradients)
        self.calls, self.processors = 0, transformer.attn_processors
        transformer.set_attn_processor(dict(self.stock))

    def show(self, hidden_states, columns):
        return hidden_states if self.calls < self.joint_steps else super().show(hidden_states, columns)

    def __call__(self, transformer, hidden_states, columns, **inputs):
        self.calls += 1
        if self.calls <= self.joint_steps:
            return transformer(hidden_states=hidden_states, **inputs)
        if self.calls == self.joint_steps + 1:
            transformer.set_attn_processor(dict(self.processors))
        return super().__call__(transformer, hidden_states, columns, **inputs)


def without_visible_noise(hidden_states: torch.Tensor, columns: int) -> torch.Tensor:
    """Zeros in the noise channels of the visible view."""
    visible, target = split_panels(hidden_states, columns)
    channels = hidden_states.shape[-1] // 6
    return join_panels(
        torch.cat((torch.zeros_like(visible[..., :channels]), visible[..., channels:]), -1), target, columns
    )


class Zeros(CausalAttention):
    """The noise channels of the visible view are zero, at t = 0, in one call with gradients."""

    show = staticmethod(without_visible_noise)


class ZerosAtOne(Zeros):
    """The same at t = 1."""

    seen_at = 1.0


class FirstStep(CausalAttention):
    """The visible view is seen as in the first step of painting: at t = 1, with nothing but noise in its noise channels."""

    seen_at = 1.0

    def show(self, hidden_states, columns):
        if not torch.is_grad_enabled():
            # Painting, which looks at the visible view in the first step only.
            return hidden_states
        visible, target = split_panels(hidden_states, columns)
        noise = split_panels(self.x_1, columns)[0]
        return join_panels(torch.cat((noise, visible[..., noise.shape[-1] :]), -1), target, columns)


class FirstStepLoss(FirstStep):
    """The same, with a loss on the whole canvas. The velocity of the visible view is that from its own noise."""

    visible_loss = True


class FirstStepOwnLora(OwnLora):
    """The same, with a LoRA of its own for the visible view."""

    seen_at, show = 1.0, FirstStep.show


class FirstStepUnseen(PromptUnseen):
    """The same, without the prompt for the visible view."""

    seen_at, show = 1.0, FirstStep.show


class FirstStepJointAtFirst(JointAtFirst):
    """The same, joint in the first third."""

    seen_at, painted_with = 1.0, FirstStep

    def show(self, hidden_states, columns):
        return hidden_states if self.calls < self.joint_steps else FirstStep.show(self, hidden_states, columns)


CAUSAL = {
    cls.__name__: cls
    for cls in (
        PromptUnseen,
        ZeroNoise,
        OwnLora,
        JointAtFirst,
        Zeros,
        ZerosAtOne,
        FirstStep,
        FirstStepLoss,
        FirstStepOwnLora,
        FirstStepUnseen,
        FirstStepJointAtFirst,
    )
}
