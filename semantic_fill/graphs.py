# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Micro-steps as CUDA graphs: the kernels of forward, loss and backward are launched at once.

A step of one sample has thousands of short kernels, and the host needs longer to launch them than the GPU to run them. A
graph is captured for each shape of batch, and replaying it takes the host a few milliseconds.

No library serves here. The compiler's own graphs (`mode="reduce-overhead"`) hold one block each, and the host still walks
through checkpointing, autograd and everything that is not compiled. `torch.cuda.make_graphed_callables` captures forward and
backward apart, for one shape.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch


logger = logging.getLogger(__name__)


class Graphs:
    """
    Runs micro-steps, each as the graph of its batch's shape.

    A graph repeats kernels at fixed addresses. So batches are copied into tensors of its own, and gradients have to be
    cleared in place. What a micro-step does in Python is not repeated.

    Args:
        drop_gradients (`Callable`, *optional*): Sets gradients to `None`, where each micro-step is a step. The first graph
            then makes them in memory that its forward has used. Otherwise they exist before it, beside all that it needs.
            All shapes have to give gradients to the same parameters, because graphs write over each other's other memory.
    """

    def __init__(self, drop_gradients: Callable[[], None] = lambda: None):
        self.drop_gradients = drop_gradients
        self.inputs: dict[tuple, Any] = {}
        self.captured: dict[tuple, tuple[Any, torch.Tensor]] = {}
        self.pool, self.given_up = None, False

    def __call__(self, micro_step: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        """
        The result of `micro_step(batch)`.

        Args:
            micro_step (`Callable`): Accumulates gradients and returns a loss without a graph of autograd, which would
                keep the streams of an earlier micro-step alive. The same one in each call.
            batch: A dataclass. Its tensors may differ in value from call to call.
        """
        if self.given_up:
            return micro_step(batch)
        key = shape_of(batch)
        if key not in self.inputs:
            # This one runs without a graph. It compiles, chooses kernels and makes gradients, which nothing captured can.
            # It needs as much memory as all graphs, which share theirs.
            self.release()
            self.inputs[key] = dataclasses.replace(batch, **{n: t.clone() for n, t in tensors_of(batch).items()})
            return micro_step(self.inputs[key])
        inputs = self.inputs[key]
        for name, tensor in tensors_of(batch).items():
            getattr(inputs, name).copy_(tensor)
        if key not in self.captured and not self.capture(key, micro_step):
            return micro_step(batch)
        graph, loss = self.captured[key]
        graph.replay()
        # The next replay overwrites it.
        return loss.clone()

    def capture(self, key: tuple, micro_step: Callable[[Any], torch.Tensor]) -> bool:
        """Whether a graph was captured. If not, there will be none from here on."""
        if not self.captured:
            self.drop_gradients()
        try:
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.captured[key] = capture(micro_step, self.inputs[key], self.pool)
        except Exception as error:
            # Ending a capture that has failed raises too, and says less.
            reason = error.__context__ or error
            logger.warning(f"Steps run without CUDA graphs from here on, because one could not be captured: {reason}")
            end_capture(self.pool)
            self.given_up = True
            self.release()
        return not self.given_up

    def release(self) -> None:
        """Frees what the graphs hold, which is all that a step needs at its peak. They are captured again when needed."""
        self.captured.clear()
        self.drop_gradients()
        self.pool = None
        torch.cuda.empty_cache()


def tensors_of(batch: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if torch.is_tensor(value)}


def shape_of(batch: Any) -> tuple:
    """What a graph depends on: shape and dtype of a batch's tensors, and the values of all else."""
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors_of(batch).items()}
    return tuple((vars(batch) | described).items())


def capture(micro_step: Callable[[Any], torch.Tensor], inputs: Any, pool: Any) -> tuple[Any, torch.Tensor]:
    """The graph of a micro-step, and the tensor that its replays write the loss to. Nothing is computed yet."""
    graph = torch.cuda.CUDAGraph()
    # Where the capture fails, torch's own context does not restore the stream. Other threads may go on to use the device.
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
    ):
        return graph, micro_step(inputs)


def end_capture(pool: Any) -> None:
    """
    Ends what torch leaves open after a failed capture. Its allocator would keep memory that another stream has used, as
    in a capture, and its generator would refuse to draw. The first has no public function.
    """
    with contextlib.suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    device = torch.cuda.current_device()
    fresh = torch.Generator(f"cuda:{device}").manual_seed(torch.initial_seed())
    torch.cuda.default_generators[device].graphsafe_set_state(fresh)
