# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The moving average of what is trained, which `--ema_decay` asks for.

It is a part of the optimizer's state, with which it is saved, sharded and restored. So a resumed run continues it bit for
bit.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


# The average of a parameter, and of how many steps it is.
AVERAGE, COUNT = "average", "average_count"


def _states(optimizer: Any) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter that has been trained, with its state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state.get(parameter):
                yield parameter, optimizer.state[parameter]


@torch.no_grad()
def update_average(optimizer: Any, decay: float) -> None:
    """Averages in the parameters after a step. As in diffusers, the first steps are forgotten sooner."""
    for parameter, state in _states(optimizer):
        count = state[COUNT] = state.get(COUNT, 0) + 1
        if count == 1:
            state[AVERAGE] = parameter.detach().clone()
        else:
            state[AVERAGE].lerp_(parameter, 1 - min(decay, count / (9 + count)))


@contextlib.contextmanager
def averaged(run) -> Iterator[None]:
    """Has the parameters of a `Run` hold their averages, if it is one with `--ema_decay`."""
    if run.options.ema_decay is None:
        # The checkpoint that it continues from may have some.
        yield
        return
    pairs = [(parameter, state[AVERAGE]) for parameter, state in _states(run.optimizer) if AVERAGE in state]
    last = [parameter.detach().clone() for parameter, _ in pairs]
    with torch.no_grad():
        for parameter, average in pairs:
            parameter.copy_(average)
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), value in zip(pairs, last):
                parameter.copy_(value)
