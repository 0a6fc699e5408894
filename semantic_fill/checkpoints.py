# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: saving and finding them, continuing from one, stopping by signal, and the lock on the output folder.

A checkpoint is a folder with the weights as inference loads them, the states of optimizer, schedule and gradient scaler,
and a manifest with the size and hash of every file. It is written beside its place and renamed, so it exists whole or not
at all. Nothing is pickled: accelerate's own checkpoints are, and are tied to the engine that wrote them.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import safetensors.torch
import torch
from accelerate.logging import get_logger
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download

from pipeline_flux_fill_semantic import SEMANTIC_MODES, SEMANTIC_SUBFOLDER
from semantic_attention import file_hash, manifest_damage, read_json
from semantic_fill.engines import Engine
from semantic_fill.files import (
    CHECKPOINTS_REMAIN,
    explain_write_errors,
    flush_to_disk,
    is_hub_id,
    list_files,
    printable,
)
from semantic_fill.options import HUB_CHECKPOINT, Options
from semantic_fill.training_state import TrainingState, check_optimizer_state, read_state, split_tensors
from semantic_fill.weights import save_weights


logger = get_logger(__name__)

# The last commit that can use what this version refuses.
OLD_COMMIT = "bd5985d"
# Numbers of the optimizer that a continued run may change.
SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")


def fixed_options(model, options: Options) -> dict:
    """Options that a continued run cannot change: the shapes of what is trained, and the kind of optimizer."""
    names = ("semantic_mode", "rank", "lora_alpha", "lora_layers", "optimizer", "use_8bit_adam")
    fixed = {name: getattr(options, name) for name in names}
    if model.semantic_attention is not None:
        # The module's own configuration: --semantic_weights brings its own.
        config = model.semantic_attention.config
        fixed |= {f"semantic_{k}": v for k, v in config.items() if not k.startswith("_") and k != "in_channels"}
    return fixed


def check_fixed_options(checkpoint: Path, options: Options) -> None:
    """Refuses to continue from a checkpoint with options that its state does not fit."""
    saved = read_options(checkpoint)
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

    for name, value in saved.items():
        wanted = getattr(options, name, value)
        if wanted != value:
            raise ValueError(
                f"--resume_from_checkpoint: {checkpoint} was trained {spell(name, value)}, so a run"
                f" {spell(name, wanted)} cannot continue from it. It can start from its weights with --lora_weights and"
                " --semantic_weights."
            )


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


class Checkpointer:
    """
    Saves and restores everything of a run that training changes.

    Args:
        engine (`Engine`), model, optimizer, lr_scheduler:
            What is trained, the model unwrapped.
        options (`Options`):
            The run's options.
        on_saved (`Callable[[Path], None]`, *optional*):
            Called on the main process with each checkpoint's folder.
    """

    def __init__(
        self,
        engine: Engine,
        model,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
        options: Options,
        on_saved: Callable[[Path], None] | None = None,
    ):
        self.engine, self.model, self.optimizer, self.lr_scheduler = engine, model, optimizer, lr_scheduler
        self.options, self.on_saved = options, on_saved

    def save(self, progress: TrainingState) -> None:
        """Saves a checkpoint. A collective: every process has to call it."""
        accelerator = self.engine.accelerator
        weights = self.engine.weights(self.model)
        state = asdict(progress)
        state["optimizer"] = self.engine.optimizer_state(self.optimizer)
        state["lr_scheduler"] = self.lr_scheduler.state_dict()
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        if accelerator.is_main_process:
            folder = save_checkpoint(self.model, weights, state, self.options)
            if self.on_saved is not None:
                self.on_saved(folder)
        accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> TrainingState:
        """Restores optimizer, schedule and scaler. Rates and other settings of the optimizer are those of this run."""
        state, progress = read_state(folder, tensors=True)
        check_optimizer_state(state["optimizer"], self.optimizer, folder)
        schedule = self.lr_scheduler
        rates = schedule.base_lrs
        # What changes in training is taken from the checkpoint. Settings are those of this run.
        settings = [
            {k: v for k, v in group.items() if k in SETTINGS or v is None or isinstance(v, (bool, str))}
            for group in schedule.optimizer.param_groups
        ]
        self.engine.load_optimizer(self.optimizer, state["optimizer"])
        schedule.load_state_dict(schedule.state_dict() | state["lr_scheduler"])
        schedule.base_lrs = rates
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        # Private, but the schedule offers no other way to change its rates.
        schedule._last_lr = [rate * factor for rate, factor in zip(rates, factors)]
        for group, setting, rate in zip(schedule.optimizer.param_groups, settings, schedule.get_last_lr()):
            group |= setting | {"lr": rate}
        scaler = self.engine.accelerator.scaler
        if "scaler" in state and scaler is not None:
            scaler.load_state_dict(scaler.state_dict() | state["scaler"])
        logger.info(f"Resuming from {folder} at step {progress.step}")
        return progress


# -- Folders ----------------------------------------------------------------------------------------------------------


def save_checkpoint(model, weights: dict[str, torch.Tensor], state: dict, options: Options) -> Path:
    """Writes a checkpoint beside its place and renames it. Only then are the oldest ones deleted."""
    output_dir = Path(options.output_dir)
    folder = output_dir / f"checkpoint-{state['step']}"
    partial, replaced = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("part", "old"))
    for path in (partial, replaced):
        shutil.rmtree(path, ignore_errors=True)
    try:
        with explain_write_errors("--output_dir", CHECKPOINTS_REMAIN):
            save_weights(model, weights, partial, options)
            tensors = {}
            described = split_tensors(state, "state", tensors)
            safetensors.torch.save_file(tensors, partial / "training_state.safetensors")
            (partial / "training_state.json").write_text(json.dumps(described))
            (partial / "options.json").write_text(json.dumps(fixed_options(model, options)))
            files = list_files(partial)
            manifest = {path.relative_to(partial).as_posix(): [path.stat().st_size, file_hash(path)] for path in files}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))
            for path in (partial, *partial.rglob("*")):
                flush_to_disk(path)
            if folder.exists():
                os.replace(folder, replaced)
            os.replace(partial, folder)
            flush_to_disk(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    logger.info(f"Saved {folder}")
    if options.checkpoints_total_limit is not None:
        others = [path for path in list_checkpoints(output_dir) if path != folder]
        # Checkpoints of later steps are left from a run that was given up, so they are deleted first.
        others.sort(key=lambda path: checkpoint_step(path) < state["step"])
        for old in others[: max(0, len(others) + 1 - options.checkpoints_total_limit)]:
            # After the rename, a deletion that is cut off leaves nothing that looks like a checkpoint.
            deleted = old.with_name(f".{old.name}.gone")
            os.replace(old, deleted)
            shutil.rmtree(deleted)
            logger.info(f"Deleted {old}")
    return folder


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders from the oldest to the newest."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=checkpoint_step)


def checkpoint_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or `None`."""
    needed = {LORA_WEIGHT_NAME_SAFE, "options.json", "training_state.json", "training_state.safetensors"}
    try:
        mode = read_options(folder)["semantic_mode"]
        if mode in SEMANTIC_MODES and SEMANTIC_MODES[mode].module_class is not None:
            needed |= {f"{SEMANTIC_SUBFOLDER}/{name}" for name in ("config.json", SAFETENSORS_WEIGHTS_NAME)}
        damage = manifest_damage(folder, needed)
        if damage is None:
            read_state(folder)
        return damage
    except ValueError as error:
        return str(error)


def find_checkpoint(options: Options) -> Path | None:
    """
    The checkpoint to continue from: the newest intact one for `latest`, or the one that was named.

    Raises:
        `ValueError`: if the named one is damaged, or does not fit the options of this run.
    """
    source, path = options.resume_from_checkpoint, None
    if source is None:
        return None
    if source != "latest":
        path = Path(source)
        path = path if path.is_dir() else Path(options.output_dir, path.name)
        if not path.is_dir() and is_hub_id(source):
            path = download_checkpoint(source, options.cache_dir)
        damage = checkpoint_damage(path)
        if damage:
            raise ValueError(f"--resume_from_checkpoint {source} is no intact checkpoint: {damage}.")
    else:
        for candidate in reversed(list_checkpoints(Path(options.output_dir))):
            damage = checkpoint_damage(candidate)
            if damage is None:
                path = candidate
                break
            logger.warning(f"Skipping the damaged checkpoint {candidate}: {damage}")
        else:
            logger.info(f"No checkpoint in {options.output_dir}: starting from step 0")
    if path is not None:
        check_fixed_options(path, options)
    return path


def download_checkpoint(repo_id: str, cache_dir: str | None) -> Path:
    try:
        folder = snapshot_download(repo_id, allow_patterns=f"{HUB_CHECKPOINT}/*", cache_dir=cache_dir)
    except Exception as error:
        raise ValueError(
            f"--resume_from_checkpoint {repo_id} is no folder, and no Hub repository that can be read: {error}"
        ) from error
    path = Path(folder, HUB_CHECKPOINT)
    if not path.is_dir():
        raise ValueError(
            f"--resume_from_checkpoint {repo_id} has no `{HUB_CHECKPOINT}/`, which --hub_strategy every_checkpoint"
            " pushes. To start from its result, pass --lora_weights and --semantic_weights."
        )
    return path


def claim_output_dir(options: Options) -> filelock.FileLock:
    """
    Creates the output folder and locks it until the lock is released or the process ends.

    Raises:
        `ValueError`: if another run uses the folder, or it holds checkpoints that this run does not continue from.
    """
    folder = Path(options.output_dir)
    lock = filelock.FileLock(folder / ".lock")
    with explain_write_errors("--output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"--output_dir {folder} is in use by another run.") from None
    # A run that was killed between two renames left a checkpoint under its temporary name.
    for path in folder.glob(".checkpoint-*.old"):
        if not (folder / path.stem[1:]).exists():
            os.replace(path, folder / path.stem[1:])
    for path in (*folder.glob(".checkpoint-*.*"), *folder.glob(".result.part")):
        shutil.rmtree(path, ignore_errors=True)
    if options.resume_from_checkpoint is None and list_checkpoints(folder):
        lock.release()
        raise ValueError(
            f"--output_dir {folder} holds checkpoints of an earlier run. Continue it with --resume_from_checkpoint"
            " latest, or pass another folder."
        )
    return lock


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a stop after the current step. A second signal ends the run at once."""

    def __enter__(self):
        self.number = 0
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        self.number = number
        signal.signal(number, self.previous[number])

    def __exit__(self, *exc):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
