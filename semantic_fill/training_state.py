# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint says of its run: how far it is, the states of optimizer, schedule and scaler, and what it fits.

A checkpoint may have been downloaded, so what its files say is checked before a run takes it on: no value can replace a
setting of this run, ask for memory, or be of a kind that fails later.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.logging import get_logger

from pipeline_flux_fill_semantic import SEMANTIC_MODES
from semantic_attention import SINGLE_MAP, check_finite, check_number, read_header, read_json
from semantic_fill.averages import AVERAGE, COUNT
from semantic_fill.files import printable, weights_sample
from semantic_fill.options import Options


logger = get_logger(__name__)

# What is taken from the states of schedule and gradient scaler, with the least accepted value.
COUNTERS = {"lr_scheduler": {"last_epoch": 0, "_step_count": 0}, "scaler": {"scale": 1e-30, "_growth_tracker": 0}}

# The held-out losses of a validation by their names, and what they are called.
LOSS_LABELS = {
    "loss": "right map",
    "wrong_map": "wrong map",
    "no_map": "no map",
    "not_averaged": "right map, last weights",
}
WORTH = "map_worth"


def loss_labels(found: Iterable[str]) -> dict[str, str]:
    """The losses among the figures of a validation. Of several maps, each has its own: `wrong_map_land` is `wrong land`."""
    labels = {}
    for name, label in LOSS_LABELS.items():
        labels |= {name: label} if name in found else {}
        if name == "wrong_map":
            labels |= {n: f"wrong {n.removeprefix('wrong_map_')}" for n in found if n.startswith("wrong_map_")}
    return labels


def worth_labels(found: Iterable[str], alone: str) -> dict[str, str]:
    """What maps are worth among the figures of a validation. That of a single map is called `alone`."""
    names = [name for name in found if name.startswith(WORTH)]
    return {n: alone if n == WORTH else f"{alone}: {n.removeprefix(f'{WORTH}_')}" for n in names}


@dataclass
class TrainingState:
    """How far a run is, and what it has found out on the way."""

    step: int = 0
    samples_seen: int = 0
    loss: float = math.nan  # of the last step
    # What the order of the samples follows from, and a hash of the base's weights. Checkpoints of earlier versions have none.
    seed: int | None = None
    samples: str | None = None
    base: str | None = None
    losses: list[float] = field(default_factory=list)  # of all steps
    validations: list[dict] = field(default_factory=list)  # as in `validation.jsonl`

    @property
    def comparable(self) -> list[dict]:
        """The validations that measured the same held-out loss as the last one: of the same samples, timesteps and options."""
        key = self.validations[-1].get("held_out") if self.validations else None
        # Checkpoints of earlier versions do not tell what was measured.
        return [found for found in self.validations if found.get("held_out", key) == key]

    @property
    def best(self) -> dict | None:
        """The validation with the lowest held-out loss, the first of equal ones."""
        measured = [found for found in self.comparable if found.get("loss") is not None]
        return min(measured, key=lambda found: found["loss"], default=None)

    @property
    def kept(self) -> dict | None:
        """The validation whose weights are in `best/`."""
        kept = [found for found in self.comparable if found.get("kept") and found.get("loss") is not None]
        return kept[-1] if kept else None

    @property
    def validations_since_best(self) -> int:
        return len(self.validations) - (0 if self.best is None else self.validations.index(self.best) + 1)


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
        for name in ("step", "samples_seen"):
            check_number(name, state.get(name), least=0, most=2**53, whole=True)
        # The loss of a step that was skipped may be any number.
        if not isinstance(state.get("loss"), (int, float)):
            raise ValueError(f"`loss` has to be a number but is {state.get('loss')!r:.100}")
        check_history(state)
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
    return state, TrainingState(**{f.name: state[f.name] for f in fields(TrainingState) if f.name in state})


def check_history(state: dict[str, Any]) -> None:
    """
    Checks the losses and validations of a state. Checkpoints of earlier versions have none.

    Raises:
        `ValueError`: if they are of other kinds than a run writes.
    """
    losses, validations = state.setdefault("losses", []), state.setdefault("validations", [])
    if not isinstance(losses, list) or not all(isinstance(loss, (int, float)) for loss in losses):
        raise ValueError("`losses` has to be a list of numbers")
    for found in validations if isinstance(validations, list) else [None]:
        if not isinstance(found, dict) or not isinstance(found.get("scales"), list):
            raise ValueError("`validations` has to be a list of objects with `scales`")
        check_number("step", found.get("step"), least=1, most=2**53, whole=True)
        values = [value for name, value in found.items() if name != "scales"]
        if not all(value is None or isinstance(value, (int, float)) for value in (*values, *found["scales"])):
            raise ValueError("`validations` has to hold numbers")


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
        if type(optimizer) is torch.optim.AdamW and entry.keys() - {AVERAGE, COUNT} != {
            "step",
            "exp_avg",
            "exp_avg_sq",
        }:
            return False
        if AVERAGE in entry or COUNT in entry:
            average, count = entry.get(AVERAGE), entry.get(COUNT)
            if not isinstance(average, torch.Tensor) or average.shape != parameters[index].shape:
                return False
            if type(count) is not int or not 0 < count < 2**53:
                return False
        # States of 8 bits have a scale for each block and a table of 256 values.
        parameter, limit = parameters[index], max(256, parameters[index].numel())
        tensors = [value for value in entry.values() if isinstance(value, torch.Tensor)]
        return all(t.shape == parameter.shape or (t.ndim < 2 and t.numel() <= limit) for t in tensors)

    if not fits or not all(fits_parameter(index, entry) for index, entry in entries.items()):
        raise ValueError(f"{folder} holds the state of another optimizer, or one for other weights.")


# -- What a checkpoint fits -------------------------------------------------------------------------------------------

# The last commit that can use what this version refuses.
OLD_COMMIT = "bd5985d"


def read_options(checkpoint: Path) -> dict[str, Any]:
    """
    The options that a checkpoint was saved with.

    Raises:
        `ValueError`: if the file holds anything else than names and single values.
    """
    saved = read_json(checkpoint / "options.json")
    if not isinstance(saved, dict) or any(isinstance(value, (dict, list)) for value in saved.values()):
        raise ValueError(f"{checkpoint / 'options.json'} has to hold a JSON object of single values.")
    if not isinstance(saved.get("semantic_mode"), str):
        raise ValueError(f"{checkpoint / 'options.json'} does not name the `semantic_mode`.")
    return saved


def fixed_options(model, options: Options) -> dict:
    """Options that a continued run cannot change: what is trained on which canvas, and the kind of optimizer."""
    names = ["semantic_mode", "visible_attention", "rank", "lora_alpha", "lora_layers", "optimizer", "use_8bit_adam"]
    names += ["fusion_alpha"] if SEMANTIC_MODES[options.semantic_mode].fuses else []
    fixed = {name: getattr(options, name) for name in names}
    if model.semantic_attention is not None:
        # The module's own configuration: --semantic_weights brings its own.
        config = model.semantic_attention.config
        fixed |= {f"semantic_{k}": v for k, v in config.items() if not k.startswith("_") and k != "in_channels"}
    if SEMANTIC_MODES[options.semantic_mode].uses_map and options.semantic_maps != SINGLE_MAP:
        fixed["semantic_maps"] = ",".join(options.semantic_maps)
    return fixed


def check_fixed_options(checkpoint: Path, options: Options) -> None:
    """Refuses to continue from a checkpoint with options that its state does not fit."""
    # Earlier checkpoints had no choice.
    saved = {"visible_attention": "joint"} | read_options(checkpoint)
    entry = (saved.get("semantic_position", "none"), saved.pop("semantic_injection", "noise"))
    if entry == ("direct", "condition"):
        # Before it was a mode of its own, the projection was a setting of cross_attention.
        layers = saved["semantic_num_layers"]
        saved = {name: value for name, value in saved.items() if not name.startswith("semantic_")}
        saved |= {"semantic_mode": "projection", "semantic_num_layers": layers}
    elif entry not in (("none", "noise"), ("rope", "noise")):
        raise ValueError(
            f"--resume_from_checkpoint: {checkpoint} was trained with --semantic_position {entry[0]} and"
            f" --semantic_injection {entry[1]}, which no longer exist. Commit {OLD_COMMIT} can still use it."
        )

    def spell(name: str, value) -> str:
        if value in (None, False):
            return f"without --{name}"
        return f"with --{name}" if value is True else f"with --{name} {printable(str(value)[:100])}"

    if SEMANTIC_MODES[options.semantic_mode].uses_map:
        saved = {"semantic_maps": ",".join(SINGLE_MAP)} | saved
    for name, value in saved.items():
        wanted = ",".join(options.semantic_maps) if name == "semantic_maps" else getattr(options, name, value)
        if wanted != value:
            raise ValueError(
                f"--resume_from_checkpoint: {checkpoint} was trained {spell(name, value)}, so a run"
                f" {spell(name, wanted)} cannot continue from it. It can start from its weights with --lora_weights and"
                " --semantic_weights."
            )


def check_same_samples(checkpoint: Path | None, samples: str, options: Options) -> TrainingState:
    """
    Refuses to continue with other samples or another seed than those of a checkpoint, unless --allow_changed_data is
    passed. Which sample is trained on when follows from both.

    Args:
        samples (`str`): The fingerprint of this run's samples.

    Returns:
        `TrainingState`: How far the checkpoint is. Without one, a run begins.

    Raises:
        `ValueError`: if they differ.
    """
    state, changed = TrainingState() if checkpoint is None else read_state(checkpoint)[1], []
    if state.seed not in (None, options.seed):
        changed.append(f"--seed was {state.seed!r:.100} and is {options.seed}")
    if state.samples not in (None, samples):
        changed.append("the samples, their order or their captions are others")
    _refuse_changes(changed, checkpoint, options)
    return state


def check_same_base(checkpoint: Path | None, state: TrainingState, vae: Any, options: Options) -> str | None:
    """
    Refuses to continue with other weights of the base's transformer than those of a checkpoint, unless --allow_changed_data
    is passed. What was learned is a change of those weights.

    Args:
        vae (`AutoencoderKL`): The base's VAE. It notes its folder, beside that of the transformer.

    Returns:
        `str`: The hash of this run's weights. `None` if they are in no files.

    Raises:
        `ValueError`: if they differ.
    """
    folder = vae.config.get("_name_or_path")
    base = weights_sample(Path(folder).parent / "transformer", options.variant) if folder else None
    if base is not None and state.base not in (None, base):
        _refuse_changes(["the weights of the base's transformer are others"], checkpoint, options)
    return base


def _refuse_changes(changed: list[str], checkpoint: Path | None, options: Options) -> None:
    if not changed:
        return
    message = f"--resume_from_checkpoint: since {checkpoint} was saved, {' and '.join(changed)}"
    if not options.allow_changed_data:
        raise ValueError(f"{message}. Pass --allow_changed_data to continue all the same.")
    logger.warning(f"{message}. The run continues, and is not what an undisturbed one would have been.")


def refuse_untrained(state: TrainingState, lr_scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
    """
    Ends a run that has no result.

    Raises:
        `RuntimeError`: if no step of the run was applied. The schedule counts those that were.
    """
    if state.step > 0 and lr_scheduler.last_epoch == 0:
        raise RuntimeError(
            f"None of the {state.step} steps had a finite loss and gradient, so nothing was trained and no result is saved."
            " Lower --learning_rate, or look at the samples."
        )
