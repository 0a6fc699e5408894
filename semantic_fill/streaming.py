# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Quantized weights in the CPU's memory, copied to the GPU block by block while the blocks before them are computed.

No library serves here: the hooks of diffusers and accelerate bring weights for a forward pass and take them away after it,
but backward needs them as well, where a block that is checkpointed is computed again.
"""

import functools
import itertools

import torch
from diffusers import FluxTransformer2DModel

from semantic_fill.precision import FrozenLinear, blocks_of


class WeightStream:
    """
    Takes the quantized weights of a transformer's blocks from its device. From then on each call of a block copies them
    there beforehand. The block has to be checkpointed, so that backward calls it too.

    The device holds the weights of two blocks of each class: one is computed with while the other is copied. A block's
    weights are always copied to the same place, so what refers to them finds them there in backward.
    """

    def __init__(self, transformer: FluxTransformer2DModel):
        self.device = transformer.device
        self.copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.weights: list[list[torch.Tensor]] = []
        # Where each block's weights are copied to, and which block's are there.
        self.places: list[tuple[type, int]] = []
        self.buffers: dict[tuple[type, int], list[torch.Tensor]] = {}
        self.held: dict[tuple[type, int], int] = {}
        self.last = -1
        for number, block in enumerate(blocks_of(transformer)):
            layers = [module for module in block.modules() if isinstance(module, FrozenLinear)]
            # Scales and biases are little, and stay. All else that is stored is a weight, with fp8x2 in two orders.
            tensors = itertools.chain(*((*layer.parameters(False), *layer.buffers(False)) for layer in layers))
            weights = [tensor for tensor in tensors if not tensor.is_floating_point()]
            self.places.append(place := (type(block), number % 2))
            # Only pinned memory can be copied without the host waiting.
            pinned = {"device": "cpu", "pin_memory": self.copying is not None}
            self.weights.append([torch.empty_like(weight, **pinned).copy_(weight) for weight in weights])
            buffers = self.buffers.setdefault(place, [weight.detach().clone() for weight in weights])
            for weight, buffer in zip(weights, buffers, strict=True):
                weight.data = buffer
            if layers:
                block.bring_weights = functools.partial(self.bring, number)
                block.__class__ = streamed(type(block))
        if self.copying is not None:
            torch.cuda.empty_cache()

    def bring(self, number: int) -> None:
        """Has the device hold a block's weights for what is launched from now on, and begins to copy the next ones."""
        # Backward goes through the blocks in reverse, beginning with the one that was called last.
        following = number + (1 if number > self.last or number == 0 else -1)
        self.last = number
        self._copy(number)
        if self.copying is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        if 0 <= following < len(self.weights):
            self._copy(following)

    def _copy(self, number: int) -> None:
        place = self.places[number]
        if self.held.get(place) == number:
            return
        self.held[place] = number
        if self.copying is not None:
            # What computes with the weights that are there now has been launched, and has to end first.
            self.copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copying):
            for buffer, weight in zip(self.buffers[place], self.weights[number]):
                buffer.copy_(weight, non_blocking=True)


@functools.cache
def streamed(cls: type) -> type:
    """A class of blocks whose calls bring the weights first, compiled or not: a compiled block is called the same way."""

    def call(self, *args, **kwargs):
        self.bring_weights()
        return cls.__call__(self, *args, **kwargs)

    # diffusers finds the blocks to compile by the name of their class.
    return type(cls.__name__, (cls,), {"__call__": call})
