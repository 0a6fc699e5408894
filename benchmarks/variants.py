# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the product does not offer, for `ablation.py` to measure against what it does: ways in for the map, and ways to
compute the visible view once.

Each is a subclass of a class of the product with the same interface, so it trains and paints like the original. More ways
in for the map were measured with commit bd5985d, which has their code (RESULTS.md).
"""

import contextlib
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import _get_qkv_projections
from peft.tuners.tuners_utils import BaseTunerLayer

from semantic_attention import (
    BOTH,
    VISIBLE,
    CausalAttention,
    CausalAttnProcessor,
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


class PromptKept(TwoCalls):
    """The prompt is computed once too, beside the visible view. The target's pass holds the target alone."""

    keeps_prompt = True

    @staticmethod
    def without_prompt(inputs):
        prompt, ids = inputs["encoder_hidden_states"], inputs["txt_ids"]
        return inputs | {"encoder_hidden_states": prompt[:, :0], "txt_ids": ids[:0]}

    def __call__(self, transformer, hidden_states, columns, img_ids, **inputs):
        visible, target = split_panels(hidden_states, columns)
        inputs |= {"img_ids": torch.cat(split_panels(img_ids, columns, dim=0))}
        seen: list[torch.Tensor] = []
        handle = transformer.proj_out.register_forward_hook(lambda module, args, out: seen.append(out))
        self.see(transformer, visible, **inputs)
        handle.remove()
        out = transformer(hidden_states=target, **self.without_prompt(inputs))[0] + 0 * seen[0].sum()
        return (join_panels(torch.zeros_like(out), out, columns),)

    @contextlib.contextmanager
    def painting(self, transformer, columns, enhance=None):
        def strip(transformer, args, kwargs):
            return args, kwargs if self.passes == VISIBLE else self.without_prompt(kwargs)

        with super().painting(transformer, columns, enhance):
            # After the hook that runs the pass of the visible view.
            handle = transformer.register_forward_pre_hook(strip, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()


class Zeros(CausalAttention):
    """The noise channels of the visible view are zero, at t = 0, in one call with gradients."""

    show = staticmethod(without_visible_noise)


class ZerosAtOne(Zeros):
    """The same at t = 1."""

    seen_at = 1.0


class FirstStep(CausalAttention):
    """The visible view is seen as in the first step of painting: at t = 1, with nothing but noise in its noise channels."""

    seen_at = 1.0

    # The noise of a training batch, which the trainer sets.
    x_1 = None

    def show(self, hidden_states, columns):
        if self.x_1 is None:
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

    seen_at, show, x_1 = 1.0, FirstStep.show, None


class FirstStepUnseen(PromptUnseen):
    """The same, without the prompt for the visible view."""

    seen_at, show, x_1 = 1.0, FirstStep.show, None


class FirstStepPromptKept(PromptKept):
    """The same, with the prompt computed once too."""

    seen_at, show, x_1 = 1.0, FirstStep.show, None


class FirstStepJointAtFirst(JointAtFirst):
    """The same, joint in the first third."""

    seen_at, painted_with, x_1 = 1.0, FirstStep, None

    def show(self, hidden_states, columns):
        return hidden_states if self.calls < self.joint_steps else FirstStep.show(self, hidden_states, columns)


# -- Half resolution, and joint attention to a visible view that is known -----------------------------------------------

equal_views = CausalAttnProcessor.__call__


def views_of_any_size(
    self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
):
    """The processor of `CausalAttention` for one pass a call and views of `sizes` tokens, if `causal` has them."""
    if self.causal.sizes is None:
        return equal_views(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
    seen_tokens, target_tokens = self.causal.sizes
    text_tokens = image_rotary_emb[0].shape[0] - seen_tokens - target_tokens
    projected = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
    query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[:3])
    query, key = attn.norm_q(query), attn.norm_k(key)
    if encoder_hidden_states is not None:
        text = [x.unflatten(-1, (-1, attn.head_dim)) for x in projected[3:]]
        text[:2] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, (query, key, value)))
    ours = text_tokens + seen_tokens
    if self.causal.passes == VISIBLE:
        rotary = [table[:ours] for table in image_rotary_emb]
    else:
        rotary = [torch.cat((table[:text_tokens], table[ours:])) for table in image_rotary_emb]
    query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
    if self.causal.passes == VISIBLE:
        self.kept = tuple(x[:, text_tokens:].clone() for x in (key, value))
    else:
        key, value = (torch.cat(pair, dim=1) for pair in zip((key, value), self.kept))
    out = dispatch_attention_fn(query, key, value, backend=self._attention_backend).flatten(2, 3).to(query.dtype)
    if encoder_hidden_states is None:
        return out
    text_out, image_out = out.split_with_sizes([text_tokens, out.shape[1] - text_tokens], dim=1)
    return attn.to_out[1](attn.to_out[0](image_out.contiguous())), attn.to_add_out(text_out.contiguous())


CausalAttnProcessor.__call__ = views_of_any_size
# Tokens of both views where they differ.
CausalAttention.sizes = None


def pooled(grid: torch.Tensor) -> torch.Tensor:
    """Means of 2x2 places of `(batch, channels, rows, columns)`, of fewer at odd edges."""
    return F.avg_pool2d(grid, 2, ceil_mode=True, count_include_pad=False)


def pooled_tokens(tokens: torch.Tensor, columns: int) -> torch.Tensor:
    """`(batch, rows * columns, channels)` with a quarter of the tokens."""
    grid = tokens.unflatten(1, (-1, columns)).movedim(-1, 1)
    return pooled(grid).flatten(2).transpose(1, 2)


def pooled_latents(tokens: torch.Tensor, columns: int) -> torch.Tensor:
    """Packed latents `(batch, rows * columns, 64)` of a picture of half the size."""
    grid = tokens.unflatten(1, (-1, columns)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    grid = pooled(grid.flatten(4, 5).flatten(2, 3))
    grid = F.pad(grid, (0, grid.shape[3] % 2, 0, grid.shape[2] % 2), mode="replicate")
    packed = grid.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
    return packed.flatten(3).flatten(1, 2)


class HalfResolution(TwoCalls):
    """The pass of the visible view has a quarter of its tokens, which are means of 2x2. The VAE decodes as usual."""

    # Means of independent noise are smaller.
    noise_gain = 1.0

    def compact(self, visible, columns):
        tokens, channels = pooled_tokens(visible, columns), visible.shape[-1] // 6
        return torch.cat((self.noise_gain * tokens[..., :channels], tokens[..., channels:]), -1)

    def passes_of(self, hidden_states, img_ids, columns):
        """The tokens of both passes, and the positions of both together."""
        visible, target = split_panels(hidden_states, columns)
        ids = split_panels(img_ids, columns, dim=0)
        visible = self.compact(visible, columns)
        self.sizes = visible.shape[1], target.shape[1]
        return visible, target, torch.cat((pooled_tokens(ids[0][None].float(), columns)[0].to(ids[1].dtype), ids[1]))

    def __call__(self, transformer, hidden_states, columns, img_ids, **inputs):
        visible, target, inputs["img_ids"] = self.passes_of(hidden_states, img_ids, columns)
        seen = []
        handle = transformer.proj_out.register_forward_hook(lambda module, args, out: seen.append(out))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.gradients):
            self.see(transformer, visible, **inputs)
        handle.remove()
        out = transformer(hidden_states=target, **inputs)[0] + 0 * seen[0].sum()
        return (join_panels(torch.zeros_like(out), out, columns),)

    @contextlib.contextmanager
    def painting(self, transformer, columns, enhance=None):
        moved = []

        def before(transformer, args, kwargs):
            if self.passes == VISIBLE:
                return None
            noisy = kwargs["hidden_states"]
            kwargs["hidden_states"] = self.show(noisy, columns)
            clean = CausalAttention.show(noisy, columns)
            moved[:] = [(noisy - clean)[..., : noisy.shape[-1] // 6] / kwargs["timestep"][:, None, None]]
            if enhance is not None:
                args, kwargs = enhance(transformer, args, kwargs)
            visible, target, kwargs["img_ids"] = self.passes_of(kwargs["hidden_states"], kwargs["img_ids"], columns)
            if self.passes == BOTH:
                self.see(transformer, **kwargs | {"hidden_states": visible})
            return args, kwargs | {"hidden_states": target}

        def after(transformer, args, kwargs, output):
            if self.passes == VISIBLE:
                return None
            return (join_panels(torch.zeros_like(output[0]), output[0], columns) + moved[0],)

        def restore():
            for processor in transformer.attn_processors.values():
                processor.kept = None
            transformer.set_attn_processor(dict(self.stock))

        with contextlib.ExitStack() as stack:
            stack.callback(restore)
            stack.callback(transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(transformer.register_forward_hook(after, with_kwargs=True).remove)
            yield


class HalfLatents(HalfResolution):
    """The same with the latents of a picture of half the size, in place of means of packed ones."""

    def compact(self, visible, columns):
        channels = visible.shape[-1] // 6
        noise, clean = (pooled_latents(part, columns) for part in visible[..., : 2 * channels].split(channels, -1))
        return torch.cat((self.noise_gain * noise, clean, pooled_tokens(visible[..., 2 * channels :], columns)), -1)


class FirstStepHalf(HalfResolution):
    """Half resolution, seen as in the first step."""

    seen_at, show, x_1, noise_gain = 1.0, FirstStep.show, None, 2.0


class FirstStepHalfLatents(HalfLatents):
    """The same with the latents of a picture of half the size."""

    seen_at, show, x_1, noise_gain = 1.0, FirstStep.show, None, 2.0


class Known(CausalAttention):
    """
    Joint attention to a visible view whose noisy latents lead to the condition's, and not to those that were encoded beside
    the target, which tell something about the target. Nothing is computed once. It tells what attention itself is worth.
    """

    def __init__(self, transformer, gradients=True):
        super().__init__(transformer, gradients)
        transformer.set_attn_processor(dict(self.stock))

    def show(self, hidden_states, columns):
        self.clean = split_panels(CausalAttention.show(hidden_states, columns), columns)[0][..., :64]
        return hidden_states

    def __call__(self, transformer, hidden_states, columns, timestep, **inputs):
        visible, target = split_panels(hidden_states, columns)
        noise = split_panels(self.x_1, columns)[0]
        noisy = torch.lerp(self.clean, noise.to(self.clean), timestep[:, None, None].to(self.clean))
        visible = torch.cat((noisy, visible[..., noisy.shape[-1] :]), -1)
        return transformer(hidden_states=join_panels(visible, target, columns), timestep=timestep, **inputs)

    @contextlib.contextmanager
    def painting(self, transformer, columns, enhance=None):
        moved = []

        def before(transformer, args, kwargs):
            noisy = kwargs["hidden_states"]
            clean = CausalAttention.show(noisy, columns)
            moved[:] = [(noisy - clean)[..., : noisy.shape[-1] // 6] / kwargs["timestep"][:, None, None]]
            return enhance(transformer, args, kwargs) if enhance is not None else (args, kwargs)

        def after(transformer, args, kwargs, output):
            straight, painted = split_panels(moved[0], columns)[0], split_panels(output[0], columns)[1]
            return (join_panels(straight, painted, columns),)

        with contextlib.ExitStack() as stack:
            stack.callback(transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(transformer.register_forward_hook(after, with_kwargs=True).remove)
            yield


CAUSAL = {
    cls.__name__: cls
    for cls in (
        PromptUnseen,
        PromptKept,
        FirstStepPromptKept,
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
        HalfResolution,
        HalfLatents,
        FirstStepHalf,
        FirstStepHalfLatents,
        Known,
    )
}
