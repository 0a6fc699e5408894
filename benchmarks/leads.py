# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Ways for the map to enter that the product does not offer, for `ablation.py` to measure against those that it does.

Each is a `SemanticAttentionModel`, so it trains, starts without effect and is counted like the original. What enters
later than the transformer's input does so in hooks that `attach` puts in place.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from semantic_attention import SemanticAttentionModel, SemanticProjection


class Lead(SemanticAttentionModel):
    """The original, with places for hooks: `enhance` leaves the tokens that hooks use."""

    def attach(self, transformer: nn.Module) -> None:
        pass


class LateLead(Lead):
    """Leaves the transformer's input as it is and remembers what its hooks need."""

    seen = None

    def enhance(self, hidden_states, semantic_tokens, positions=None, semantic_scale=1.0):
        self.seen = (semantic_tokens.to(self.dtype), positions, semantic_scale)
        return hidden_states

    def take(self):
        """What `enhance` left, once: the next call of the transformer may come without a map."""
        seen, self.seen = self.seen, None
        return seen


class TimestepGate(LateLead):
    """The update of x_t fades with the noise: it is multiplied by t."""

    def attach(self, transformer):
        def hook(module, args, kwargs):
            seen = self.take()
            if seen is not None:
                x, t = kwargs["hidden_states"], kwargs["timestep"].view(-1, 1, 1).to(self.dtype)
                channels = self.config.in_channels
                x_t = x[..., :channels].to(self.dtype)
                x_t = x_t + t * (self(x_t, *seen) - x_t)
                kwargs["hidden_states"] = torch.cat((x_t.to(x.dtype), x[..., channels:]), dim=-1)
            return args, kwargs

        transformer.register_forward_pre_hook(hook, with_kwargs=True)


class HiddenUpdate(LateLead):
    """Aligned low-rank updates of the hidden states: after the embedder, or before every 2nd block."""

    every_block = False

    def attach(self, transformer):
        self.hidden_layers, self.now = self.make_layers(transformer), None
        self.drop_unused_layers()

        def remember(module, args, kwargs):
            self.now = self.take()
            return None

        transformer.register_forward_pre_hook(remember, with_kwargs=True)
        if not self.every_block:
            transformer.x_embedder.register_forward_hook(lambda m, args, out: self.update(0, out))
            return
        for place, block in enumerate(self.blocks(transformer)):

            def hook(module, args, kwargs, place=place):
                kwargs["hidden_states"] = self.update(place, kwargs["hidden_states"])
                return args, kwargs

            block.register_forward_pre_hook(hook, with_kwargs=True)

    def blocks(self, transformer) -> list[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks][::2]

    def make_layers(self, transformer) -> nn.ModuleList:
        rank = self.config.num_heads * self.config.head_dim
        places = len(self.blocks(transformer)) if self.every_block else 1
        return nn.ModuleList(HiddenLayer(self.config.in_channels, rank, transformer.inner_dim) for _ in range(places))

    def drop_unused_layers(self) -> None:
        self.layers = nn.ModuleList()

    def update(self, place: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.now is None:
            return hidden_states
        tokens, _, strength = self.now
        return hidden_states + strength * self.hidden_layers[place](tokens)

    def scales(self):
        return [layer.scale.detach().abs().mean().item() for layer in self.hidden_layers]


class EveryBlockUpdate(HiddenUpdate):
    every_block = True


class TwoDoors:
    """Mixed in before a `HiddenUpdate`: the transformer's input is enhanced as well."""

    def enhance(self, hidden_states, semantic_tokens, positions=None, semantic_scale=1.0):
        super().enhance(hidden_states, semantic_tokens, positions, semantic_scale)
        return self.enhance_input(hidden_states, semantic_tokens, positions, semantic_scale)

    def enhance_input(self, *args):
        return SemanticAttentionModel.enhance(self, *args)

    def drop_unused_layers(self):
        pass


class InputAndEmbedder(TwoDoors, HiddenUpdate):
    pass


class InputAndBlocks(TwoDoors, EveryBlockUpdate):
    pass


def where_painted(before: torch.Tensor, after: torch.Tensor, channels: int = 64) -> torch.Tensor:
    """The transformer's input: `after` where the mask, its last channels, is 1, else `before`."""
    mask = before[..., 2 * channels :].mean(dim=-1, keepdim=True)
    return torch.lerp(before, after, mask)


class WherePainted(Lead):
    """The condition is enhanced where the mask is 1 alone, so that the visible picture stays as it is."""

    def enhance(self, hidden_states, *args, **kwargs):
        return where_painted(hidden_states, super().enhance(hidden_states, *args, **kwargs))


class RawTokens(WherePainted):
    """The map's latents themselves, without a norm, through a linear map that starts as the identity."""

    def attach(self, transformer):
        self.layers = nn.ModuleList([SemanticProjection(self.config.in_channels)])


class RawByHalf(Lead):
    """Raw latents in the whole condition, by a linear map and a gate of its own where the mask is 1 and where it is 0."""

    def attach(self, transformer):
        self.layers = nn.ModuleList(SemanticProjection(self.config.in_channels) for _ in range(2))

    def enhance(self, hidden_states, semantic_tokens, positions=None, semantic_scale=1.0):
        channels = self.config.in_channels
        seen, painted = (self.update(layer, hidden_states, semantic_tokens, semantic_scale) for layer in self.layers)
        return where_painted(seen, painted, channels)

    def update(self, layer, hidden_states, semantic_tokens, semantic_scale):
        before, part, after = self.split_input(hidden_states)
        return torch.cat((before, layer(part, semantic_tokens, None, semantic_scale), after), dim=-1)


class RawOverNoise(RawByHalf):
    """
    Raw latents in the condition where the mask is 1. Where it is 0, the noisy latents tell nothing that the condition
    does not: there the map is added to them.
    """

    def update(self, layer, hidden_states, semantic_tokens, semantic_scale):
        if layer is self.layers[1]:
            return super().update(layer, hidden_states, semantic_tokens, semantic_scale)
        x_t, x_cond = hidden_states.tensor_split((self.config.in_channels,), dim=-1)
        return torch.cat((self.over_noise(layer, x_t, semantic_tokens, semantic_scale), x_cond), dim=-1)

    def over_noise(self, layer, x_t, semantic_tokens, semantic_scale):
        return layer(x_t, semantic_tokens, None, semantic_scale)


class RawForNoise(RawOverNoise):
    """The same, with the noise fading as the gate opens."""

    def over_noise(self, layer, x_t, semantic_tokens, semantic_scale):
        return layer((1 - semantic_scale * layer.scale) * x_t, semantic_tokens, None, semantic_scale)


class DeepLayer(nn.Module):
    """Two layers with a nonlinearity in between, on the map's latents as they are."""

    def __init__(self, channels: int, inner: int = 256):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(channels, inner), nn.GELU(), nn.Linear(inner, channels))
        self.linear = nn.Linear(channels, channels)
        nn.init.eye_(self.linear.weight)
        self.scale = nn.Parameter(torch.zeros(channels))

    def forward(self, hidden_states, semantic_tokens, rotary_emb=None, semantic_scale=1.0):
        update = self.linear(semantic_tokens) + self.net(semantic_tokens)
        return hidden_states + semantic_scale * self.scale * update


class DeepTokens(WherePainted):
    def attach(self, transformer):
        self.layers = nn.ModuleList([DeepLayer(self.config.in_channels)])


class RawDoor:
    """Mixed in before `TwoDoors`: raw latents where painted."""

    def attach(self, transformer):
        super().attach(transformer)
        self.layers = nn.ModuleList([SemanticProjection(self.config.in_channels)])

    def enhance_input(self, hidden_states, *args):
        return where_painted(hidden_states, super().enhance_input(hidden_states, *args))


class RawAndEmbedder(RawDoor, InputAndEmbedder):
    pass


class RawAndBlocks(RawDoor, InputAndBlocks):
    pass


class HiddenLayer(nn.Module):
    def __init__(self, channels: int, rank: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.down, self.up = nn.Linear(channels, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.scale * self.up(self.down(self.norm(tokens)))


class ConvolvedTokens(Lead):
    """A depthwise 3x3 convolution, an identity at first, over the map's token grid."""

    def __init__(self, **config):
        super().__init__(**config)
        channels = self.config.in_channels
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        nn.init.dirac_(self.convolution.weight, groups=channels)

    def enhance(self, hidden_states, semantic_tokens, positions=None, semantic_scale=1.0):
        return super().enhance(hidden_states, self.spread(semantic_tokens, positions), positions, semantic_scale)

    def spread(self, tokens, positions):
        rows, columns = (int(edge) + 1 for edge in positions.amax(dim=0))
        # The map is the same under each panel.
        grid = tokens.to(self.dtype).unflatten(1, (rows, -1, columns))
        one_panel = self.filter(grid[:, :, 0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return one_panel[:, :, None].expand(-1, -1, grid.shape[2], -1, -1).flatten(1, 3)

    def filter(self, grid: torch.Tensor) -> torch.Tensor:
        return self.convolution(grid)


class MultiScaleTokens(ConvolvedTokens):
    """The map's tokens, plus gated means over 3x3 tokens and over the whole map."""

    def __init__(self, **config):
        super().__init__(**config)
        del self.convolution
        self.weights = nn.Parameter(torch.zeros(2, self.config.in_channels, 1, 1))

    def filter(self, grid):
        near = F.avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)
        return grid + self.weights[0] * near + self.weights[1] * grid.mean(dim=(2, 3), keepdim=True)


class DroppedTokens(Lead):
    """A tenth of the map's tokens is zero in training."""

    def enhance(self, hidden_states, semantic_tokens, positions=None, semantic_scale=1.0):
        keep = torch.ones_like(semantic_tokens[..., :1])
        dropped = F.dropout(keep, 0.1, self.training) * (0.9 if self.training else 1.0)
        return super().enhance(hidden_states, semantic_tokens * dropped, positions, semantic_scale)


class MapGuidance(LateLead):
    """Classifier-free guidance on the map at inference (two calls a step): v = v_without + 1.5 (v_with - v_without)."""

    strength = 1.5

    def attach(self, transformer):
        plain_forward = transformer.forward

        def forward(hidden_states, **kwargs):
            seen = self.take()
            if seen is None:
                return plain_forward(hidden_states=hidden_states, **kwargs)
            enhanced = SemanticAttentionModel.enhance(self, hidden_states, *seen)
            guided = plain_forward(hidden_states=enhanced, **kwargs)
            if transformer.training:
                return guided
            plain = plain_forward(hidden_states=hidden_states, **kwargs)
            return (torch.lerp(plain[0], guided[0], self.strength),)

        transformer.forward = forward
