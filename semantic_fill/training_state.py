# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""How far a run is, and the states of optimizer, schedule and gradient scaler, as JSON and safetensors.

A checkpoint may have been downloaded, so what its files say is checked before a run takes it on: no value can replace a
setting of this run, ask for memory, or be of a kind that fails later.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from semantic_attention import check_finite, check_number, read_header, read_json


# What is taken from the states of schedule and gradient scaler, with the least accepted value.
COUNTERS = {"lr_scheduler": {"last_epoch": 0, "_step_count": 0}, "scaler": {"scale": 1e-30, "_growth_tracker": 0}}


@dataclass
class TrainingState:
    """How far a run is, and the loss of its last step."""

    step: int = 0
    samples_seen: int = 0
    loss: float = math.nan


def split_tensors(tree: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A nested state as JSON. Its tensors move to `tensors`, and their names stand in their places."""
    if isinstance(tree, torch.Tensor):
        tensors[prefix] = tree.detach().cpu().contiguous().clone()
        return {"__tensor__": prefix}
    if isinstance(tree, dict):
        return {"__dict__": [[k, split_tensors(v, f"{prefix}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [split_tensors(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
    return tree


def join_tensors(tree: Any, tensors: dict[str, Any]) -> Any:
    """
    The inverse of `split_tensors`.

    Raises:
        `ValueError`: if the JSON has another form, or names a tensor that is not there.
    """
    if isinstance(tree, list):
        return [join_tensors(v, tensors) for v in tree]
    if not isinstance(tree, dict):
        return tree
    name, pairs = tree.get("__tensor__"), tree.get("__dict__")
    if isinstance(name, str) and name in tensors:
        return tensors[name]
    if isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], (str, int)) for pair in pairs
    ):
        return {k: join_tensors(v, tensors) for k, v in pairs}
    raise ValueError(f"{tree!r:.100} is no state, or names a tensor that is not there")


def read_state(folder: Path, tensors: bool = False) -> tuple[dict[str, Any], TrainingState]:
    """
    The state of a checkpoint.

    Args:
        tensors (`bool`): Whether to read the tensors. Without them, their shapes stand in their places.

    Returns:
        `tuple[dict[str, Any], TrainingState]`: The states by their names, and how far the run is.

    Raises:
        `ValueError`: if the files cannot be what a run has written. The message names the file.
    """
    file, weights_file = folder / "training_state.json", folder / "training_state.safetensors"
    found: dict[str, Any] = read_header(weights_file)[0]
    if tensors:
        found = safetensors.torch.load_file(weights_file)
        check_finite(found, weights_file)
    try:
        state = join_tensors(read_json(file), found)
        if not isinstance(state, dict):
            raise ValueError("it holds no object")
        for field in fields(TrainingState):
            if field.type is int:
                check_number(field.name, state.get(field.name), least=0, most=2**53, whole=True)
            # The loss of a step that was skipped may be any number.
            elif not isinstance(state.get(field.name), (int, float)):
                raise ValueError(f"`{field.name}` has to be a number but is {state.get(field.name)!r:.100}")
        for part, counters in COUNTERS.items():
            if part == "lr_scheduler" or part in state:
                entries = state.get(part)
                if not isinstance(entries, dict):
                    raise ValueError(f"`{part}` is no object")
                state[part] = {
                    name: check_number(name, entries.get(name), least, 2**53, whole=name != "scale")
                    for name, least in counters.items()
                }
        optimizer = state.get("optimizer")
        if not isinstance(optimizer, dict) or not isinstance(optimizer.get("state"), dict):
            raise ValueError("`optimizer` is no state of an optimizer")
    except ValueError as error:
        raise ValueError(f"{file} cannot be used: {error}") from error
    return state, TrainingState(**{field.name: state[field.name] for field in fields(TrainingState)})


def check_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """
    Compares the state of a checkpoint's optimizer with the optimizer that it is loaded into.

    Raises:
        `ValueError`: if it is that of another optimizer or of other weights.
    """
    groups, entries = state.get("param_groups"), state["state"]
    parameters, start, fits = [], 0, isinstance(groups, list) and len(groups) == len(optimizer.param_groups)
    for group, own in zip(groups if isinstance(groups, list) else [], optimizer.param_groups):
        indices = list(range(start, start := start + len(own["params"])))
        fits = fits and isinstance(group, dict) and group.get("params") == indices
        parameters += own["params"]

    def fits_parameter(index: Any, entry: Any) -> bool:
        if index not in range(len(parameters)) or not isinstance(entry, dict):
            return False
        if type(optimizer) is torch.optim.AdamW and entry.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            return False
        # States of 8 bits have a scale for each block and a table of 256 values.
        parameter, limit = parameters[index], max(256, parameters[index].numel())
        tensors = [value for value in entry.values() if isinstance(value, torch.Tensor)]
        return all(t.shape == parameter.shape or (t.ndim < 2 and t.numel() <= limit) for t in tensors)

    if not fits or not all(fits_parameter(index, entry) for index, entry in entries.items()):
        raise ValueError(f"{folder} holds the state of another optimizer, or one for other weights.")
