# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The cross-attention that lets the noisy image tokens of FLUX.1 Fill look a semantic map up.

One layer computes, for image tokens `x` and semantic tokens `s`,

    x + scale * Out(softmax(Q(LN(x)) K(LN(s))^T / sqrt(head_dim)) V(LN(s)))

with a per-channel `scale` that starts at exactly zero, as ControlNet's zero convolutions do
(https://huggingface.co/papers/2302.05543): an untrained module leaves the base model as it is.
"""

from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import FluxPosEmbed


SEMANTIC_POSITIONS = ("none", "rope", "aligned", "direct")
# Which of the transformer's input channels look the map up: the noisy latents x_t come first, then the picture channels
# of x_cond.
SEMANTIC_INJECTIONS = {"noise": 0, "condition": 1}
# Wavelengths of 6 to 200 tokens: a panel of 1024 pixels is 64 tokens wide.
ROPE_THETA = 100


class SemanticCrossAttention(nn.Module):
    r"""
    One gated cross-attention layer from image tokens to semantic tokens.

    Args:
        channels (`int`, defaults to 64):
            Channels of both token sequences: the 16 latent channels of the VAE, packed 2x2.
        num_heads (`int`, defaults to 8):
            Number of attention heads.
        head_dim (`int`, defaults to 16):
            Channels of one head. The inner width is `num_heads * head_dim`.
        aligned (`bool`, defaults to `False`):
            Whether each image token sees the semantic token of its own place alone. The softmax over one token is 1,
            so there are no queries and keys, and no norm of the image tokens.
    """

    def __init__(self, channels: int = 64, num_heads: int = 8, head_dim: int = 16, aligned: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.aligned = aligned
        inner_dim = num_heads * head_dim

        if not aligned:
            self.norm_image = nn.LayerNorm(channels)
        self.norm_semantic = nn.LayerNorm(channels)
        if not aligned:
            self.to_q = nn.Linear(channels, inner_dim, bias=False)
            self.to_k = nn.Linear(channels, inner_dim, bias=False)
        self.to_v = nn.Linear(channels, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, channels, bias=False)
        # Only the gate is zero. With `to_out` at zero as well, neither would ever receive a gradient.
        self.scale = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def start_at_own_place(self, strength: float = 6.0) -> None:
        """
        Gives queries and keys a constant part, which rotary embedding turns into a preference for near tokens: noise
        and map have no contents in common that would lead attention there.

        A norm's output sums to zero over its channels, so a bias of ones is orthogonal to it: projections whose rows
        sum to `strength` add that constant and nothing else, and values whose rows sum to zero do not see it.
        """
        for norm in (self.norm_image, self.norm_semantic):
            nn.init.ones_(norm.bias)
        for projection, constant in ((self.to_q, strength), (self.to_k, strength), (self.to_v, 0.0)):
            weight = projection.weight
            weight += constant / weight.shape[1] - weight.mean(dim=1, keepdim=True)

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def query_and_key(
        self,
        hidden_states: torch.Tensor,
        normed_semantic_tokens: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query = self._heads(self.to_q(self.norm_image(hidden_states)))
        key = self._heads(self.to_k(normed_semantic_tokens))
        if rotary_emb is not None:
            query, key = apply_rotary_emb(query, rotary_emb), apply_rotary_emb(key, rotary_emb)
        return query, key

    def forward(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        semantic_scale: float = 1.0,
    ) -> torch.Tensor:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, image_tokens, channels)`):
                Noisy image tokens.
            semantic_tokens (`torch.Tensor` of shape `(batch, semantic_tokens, channels)`):
                Tokens of the semantic map.
            rotary_emb (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                Cosine and sine of shape `(tokens, head_dim)`, for queries and keys alike.
            semantic_scale (`float`, defaults to 1.0):
                Multiplies the learnt gate.

        Returns:
            `torch.Tensor` of shape `(batch, image_tokens, channels)` in the dtype of `hidden_states`.
        """
        normed_semantic_tokens = self.norm_semantic(semantic_tokens)
        value = self.to_v(normed_semantic_tokens)
        if self.aligned:
            update = self.to_out(value)
        else:
            query, key = self.query_and_key(hidden_states, normed_semantic_tokens, rotary_emb)
            attended = F.scaled_dot_product_attention(query, key, self._heads(value))
            update = self.to_out(attended.transpose(1, 2).flatten(-2))
        return (hidden_states + semantic_scale * self.scale * update).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, aligned={self.aligned}"


class SemanticProjection(nn.Module):
    r"""
    One gated layer that gives each image token the map's latents of its own place, `x + scale * Linear(s)`.

    A norm would take from the tokens what makes a colour: their level. The linear map starts as the identity, so that an
    opening gate shows the transformer the map as it shows it a picture.

    Args:
        channels (`int`, defaults to 64):
            Channels of both token sequences.
    """

    # As `SemanticCrossAttention.aligned`: the own place has all attention.
    aligned, num_heads = True, 1

    def __init__(self, channels: int = 64):
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.scale = nn.Parameter(torch.zeros(channels))

    def forward(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        rotary_emb: None = None,
        semantic_scale: float = 1.0,
    ) -> torch.Tensor:
        r"""As [`SemanticCrossAttention.forward`], with one semantic token for each image token and no positions."""
        update = self.linear(semantic_tokens)
        return (hidden_states + semantic_scale * self.scale * update).to(hidden_states.dtype)


class SemanticAttentionModel(ModelMixin, ConfigMixin):
    r"""
    A stack of [`SemanticCrossAttention`] layers: the part of a trained semantic fill that stands beside its LoRA.

    Args:
        in_channels (`int`, defaults to 64):
            Channels of the image and semantic tokens.
        num_layers (`int`, defaults to 1):
            Number of layers, applied one after the other.
        num_heads (`int`, defaults to 8):
            Attention heads in a layer.
        head_dim (`int`, defaults to 16):
            Channels of a head. With the defaults a layer has 33088 parameters.
        position (`str`, defaults to `"none"`):
            `"none"` compares contents only. `"rope"` rotates queries and keys by their row and their column within
            the panel (2-D rotary embedding, https://huggingface.co/papers/2104.09864, half of each head for either
            axis), which needs a `head_dim` that is a multiple of 4, and starts with each token looking at its own
            place. `"aligned"` looks at the own place only: a layer has 16576 parameters. `"direct"` takes the latents of
            the own place without norm, heads and attention ([`SemanticProjection`]): a layer has 4224.
        injection (`str`, defaults to `"noise"`):
            What [`~SemanticAttentionModel.enhance`] lets look the map up: `"noise"`, the noisy latents x_t, or
            `"condition"`, the picture channels of x_cond, which are empty where the model paints and the same at each
            timestep.
    """

    _repeated_blocks = ["SemanticCrossAttention", "SemanticProjection"]
    _no_split_modules = ["SemanticCrossAttention", "SemanticProjection"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 1,
        num_heads: int = 8,
        head_dim: int = 16,
        position: str = "none",
        injection: str = "noise",
    ):
        super().__init__()
        for name, number in (
            ("in_channels", in_channels),
            ("num_layers", num_layers),
            ("num_heads", num_heads),
            ("head_dim", head_dim),
        ):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"`{name}` has to be a positive integer but is {number!r}.")
        for name, choice, choices in (
            ("position", position, SEMANTIC_POSITIONS),
            ("injection", injection, tuple(SEMANTIC_INJECTIONS)),
        ):
            if choice not in choices:
                raise ValueError(f"`{name}` has to be one of {choices} but is {choice!r}.")
        if position == "rope" and head_dim % 4 != 0:
            raise ValueError(
                f'`head_dim` has to be a multiple of 4 with `position="rope"`, which gives half of a head to rows and'
                f" half to columns, but is {head_dim}."
            )
        self.pos_embed = None
        self.layers = nn.ModuleList(
            SemanticProjection(in_channels)
            if position == "direct"
            else SemanticCrossAttention(in_channels, num_heads, head_dim, aligned=position == "aligned")
            for _ in range(num_layers)
        )
        if position == "rope":
            self.pos_embed = FluxPosEmbed(theta=ROPE_THETA, axes_dim=(head_dim // 2,) * 2)
            for layer in self.layers:
                layer.start_at_own_place()

    def _rotary_emb(
        self, hidden_states: torch.Tensor, semantic_tokens: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        for name, tokens in (("hidden_states", hidden_states), ("semantic_tokens", semantic_tokens)):
            if tokens.ndim != 3 or tokens.shape[-1] != self.config.in_channels:
                raise ValueError(
                    f"`{name}` has to have the shape (batch, tokens, {self.config.in_channels}) but has"
                    f" {tuple(tokens.shape)}."
                )
        if hidden_states.shape[0] != semantic_tokens.shape[0]:
            raise ValueError(
                f"`semantic_tokens` has to have the batch size of `hidden_states`, {hidden_states.shape[0]}, but has"
                f" {semantic_tokens.shape[0]}."
            )
        tokens = hidden_states.shape[1]
        if self.config.position in ("aligned", "direct") and semantic_tokens.shape[1] != tokens:
            raise ValueError(
                f'With `position="{self.config.position}"`, `semantic_tokens` has to hold one token for each of the {tokens} image'
                f" tokens but holds {semantic_tokens.shape[1]}."
            )
        if self.pos_embed is None:
            return None
        if positions is None or tuple(positions.shape) != (tokens, 2) or semantic_tokens.shape[1] != tokens:
            got = None if positions is None else tuple(positions.shape)
            raise ValueError(
                f'With `position="rope"`, `positions` has to have the shape ({tokens}, 2), (row, column) of each of'
                f" the {tokens} image tokens and of the semantic tokens laid under them, but has {got} for"
                f" {semantic_tokens.shape[1]} semantic tokens."
            )
        return self.pos_embed(positions)

    def forward(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        semantic_scale: float = 1.0,
    ) -> torch.Tensor:
        r"""
        Enhances noisy image tokens with what they find in the semantic map.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, in_channels)`):
                Noisy image tokens, `x_t`.
            semantic_tokens (`torch.Tensor` of shape `(batch, tokens, in_channels)`):
                Tokens of the semantic map, one for the place of each image token within its panel (see
                `lay_under_panels` and [`FluxFillSemanticPipeline.encode_semantic`]).
            positions (`torch.Tensor` of shape `(tokens, 2)`, *optional*):
                Row and column of each token within its panel. Needed with `position="rope"` only.
            semantic_scale (`float`, defaults to 1.0):
                Strength of the guidance: multiplies the learnt gates.

        Returns:
            `torch.Tensor` of shape `(batch, tokens, in_channels)`: the enhanced tokens, in the dtype of
            `hidden_states`.
        """
        rotary_emb = self._rotary_emb(hidden_states, semantic_tokens, positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, semantic_tokens, rotary_emb, semantic_scale)
        return hidden_states

    def enhance(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        semantic_scale: float = 1.0,
    ) -> torch.Tensor:
        r"""
        Enhances that part of the transformer's input which `injection` names.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, 6 * in_channels)`):
                The transformer's input, `x_t` and `x_cond` side by side, in any floating dtype.
            semantic_tokens, positions, semantic_scale:
                As in `forward`.

        Returns:
            `torch.Tensor`: `hidden_states` with `in_channels` of its channels enhanced, in its own dtype.
        """
        before, part, after = self.split_input(hidden_states)
        enhanced = self(part, semantic_tokens, positions, semantic_scale)
        return torch.cat((before, enhanced.to(hidden_states.dtype), after), dim=-1)

    def split_input(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        The transformer's input in three: the channels before those that `injection` names, those themselves
        (`(batch, tokens, in_channels)`, in the module's dtype: what `forward` and `attention_maps` take), and the rest.
        """
        channels = self.config.in_channels
        start = SEMANTIC_INJECTIONS[self.config.injection] * channels
        before, part, after = hidden_states.tensor_split((start, start + channels), dim=-1)
        return before, part.to(self.dtype), after

    def scales(self) -> list[float]:
        r"""The mean absolute gate of each layer. All are exactly 0 before training."""
        return [layer.scale.detach().abs().mean().item() for layer in self.layers]

    @torch.no_grad()
    def attention_maps(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        semantic_scale: float = 1.0,
        layer: int = -1,
        tokens: torch.Tensor | list[int] | None = None,
        chunk_size: int = 256,
    ) -> Iterator[torch.Tensor]:
        r"""
        Where the image tokens look in the semantic map. `forward` never forms these matrices; at 512 pixels the whole
        is 8 x 2048 x 2048 floats a picture, so it comes in chunks of image tokens.

        Args:
            hidden_states, semantic_tokens, positions, semantic_scale:
                As in `forward`.
            layer (`int`, defaults to -1):
                The layer looked at; those before it are applied.
            tokens (`torch.Tensor` or `list[int]`, *optional*):
                Indices of the image tokens asked for. Defaults to all of them.
            chunk_size (`int`, defaults to 256):
                Image tokens in a chunk.

        Yields:
            `torch.Tensor` of shape `(batch, heads, up to chunk_size, semantic_tokens)` in float32, each row summing to
            one. `torch.cat(list(...), dim=2)` is the whole.
        """
        if not -len(self.layers) <= layer < len(self.layers):
            raise ValueError(
                f"`layer` has to be within [{-len(self.layers)}, {len(self.layers) - 1}], the model's layers, but is"
                f" {layer}."
            )
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` has to be a positive integer but is {chunk_size}.")
        rotary_emb = self._rotary_emb(hidden_states, semantic_tokens, positions)
        tokens = torch.arange(hidden_states.shape[1]) if tokens is None else torch.as_tensor(tokens)
        if tokens.numel() > 0 and not 0 <= tokens.min() <= tokens.max() < hidden_states.shape[1]:
            raise ValueError(
                f"`tokens` has to hold indices within [0, {hidden_states.shape[1] - 1}], the image tokens, but holds"
                f" [{tokens.min()}, {tokens.max()}]."
            )
        layer = layer % len(self.layers)
        for before in self.layers[:layer]:
            hidden_states = before(hidden_states, semantic_tokens, rotary_emb, semantic_scale)
        block = self.layers[layer]
        if block.aligned:
            for chunk in tokens.to(hidden_states.device).split(chunk_size):
                own_place = F.one_hot(chunk, semantic_tokens.shape[1]).float()
                yield own_place.expand(len(hidden_states), block.num_heads, -1, -1)
            return
        query, key = block.query_and_key(hidden_states, block.norm_semantic(semantic_tokens), rotary_emb)
        query = query[:, :, tokens.to(query.device)]
        query, key = query.float() * block.head_dim**-0.5, key.float().transpose(-1, -2)
        for chunk in query.split(chunk_size, dim=2):
            yield (chunk @ key).softmax(dim=-1)
