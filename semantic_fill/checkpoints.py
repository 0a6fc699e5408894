# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: saving and finding them, continuing from one, stopping by signal, and the lock on the output folder.

A checkpoint is a folder with the weights as inference loads them, the states of optimizer, schedule and gradient scaler,
and a manifest with the size and hash of every file. It is written beside its place and renamed, so it exists whole or not
at all. Nothing is pickled: accelerate's own checkpoints are, and are tied to the engine that wrote them.
"""

import functools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import filelock
import safetensors.torch
import torch
from accelerate.logging import get_logger
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import snapshot_download

from pipeline_flux_fill_semantic import SEMANTIC_MODES
from semantic_attention import file_hash, manifest_damage
from semantic_fill.engines import Engine
from semantic_fill.files import (
    CHECKPOINTS_REMAIN,
    explain_write_errors,
    is_hub_id,
    is_own_folder,
    list_files,
    remove,
    remove_temporary_files,
    replace_folder,
)
from semantic_fill.options import HUB_CHECKPOINT, Options
from semantic_fill.training_state import (
    TrainingState,
    check_fixed_options,
    check_optimizer_state,
    fixed_options,
    read_options,
    read_state,
    split_tensors,
)
from semantic_fill.weights import MODULE_FILES, complete_result, save_weights


logger = get_logger(__name__)

# `checkpoint-N`, and what a killed run leaves of a checkpoint or a result.
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
LEFTOVER = re.compile(rf"\.({CHECKPOINT.pattern}|result|best)\.(part|old|gone)(-[0-9a-f]{{32}})?")
SAMPLE = re.compile(r"step-\d{6}\.png")
# Numbers of the optimizer that a continued run may change.
SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")
# Folder in the output folder for the weights of the lowest held-out loss.
BEST = "best"


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
        if self.engine.accelerator.is_main_process:
            restore_best(folder, Path(self.options.output_dir))
        return progress


# -- Folders ----------------------------------------------------------------------------------------------------------


def save_checkpoint(model, weights: dict[str, torch.Tensor], state: dict, options: Options) -> Path:
    """Writes a checkpoint beside its place and renames it. Only then are the oldest ones deleted."""
    output_dir = Path(options.output_dir)
    folder = output_dir / f"checkpoint-{state['step']}"

    def write(partial: Path) -> None:
        save_weights(model, weights, partial, options)
        # A run that continues elsewhere, or from an earlier checkpoint, has the best weights of its own past.
        if any(found.get("kept") for found in state["validations"]) and (output_dir / BEST).is_dir():
            copy_weights(output_dir / BEST, partial / BEST)
        tensors = {}
        described = split_tensors(state, "state", tensors)
        safetensors.torch.save_file(tensors, partial / "training_state.safetensors")
        (partial / "training_state.json").write_text(json.dumps(described))
        (partial / "options.json").write_text(json.dumps(fixed_options(model, options)))
        files = list_files(partial)
        manifest = {path.relative_to(partial).as_posix(): [path.stat().st_size, file_hash(path)] for path in files}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2))

    with explain_write_errors("--output_dir", CHECKPOINTS_REMAIN):
        replace_folder(folder, write)
    logger.info(f"Saved {folder}")
    if options.checkpoints_total_limit is not None:
        others = [path for path in list_checkpoints(output_dir) if path != folder]
        # Checkpoints of later steps are left from a run that was given up, so they are deleted first.
        others.sort(key=lambda path: checkpoint_step(path) < state["step"])
        for old in others[: max(0, len(others) + 1 - options.checkpoints_total_limit)]:
            delete_checkpoint(old)
    return folder


def delete_checkpoint(folder: Path) -> None:
    # After the rename, a deletion that is cut off leaves nothing that looks like a checkpoint.
    deleted = folder.with_name(f".{folder.name}.gone")
    remove(deleted)
    os.replace(folder, deleted)
    remove(deleted)
    logger.info(f"Deleted {folder}")


def copy_weights(source: Path, folder: Path) -> None:
    """Copies the files of trained weights, and nothing that may lie beside them."""
    for name in (LORA_WEIGHT_NAME_SAFE, *MODULE_FILES):
        if (source / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def restore_best(checkpoint: Path, output_dir: Path) -> None:
    """Has `best/` hold what it held when the checkpoint was saved."""
    if (checkpoint / BEST).is_dir():
        replace_folder(output_dir / BEST, functools.partial(copy_weights, checkpoint / BEST))


def checkpoint_step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def list_checkpoints(output_dir: Path) -> list[Path]:
    """
    The checkpoints of a run, from the oldest to the newest: folders of exactly these names, and no links. Nothing else is
    ever counted, deleted or moved.
    """
    found = [path for path in output_dir.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(filter(is_own_folder, found), key=checkpoint_step)


def checkpoint_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or `None`."""
    needed = {LORA_WEIGHT_NAME_SAFE, "options.json", "training_state.json", "training_state.safetensors"}
    try:
        mode = read_options(folder)["semantic_mode"]
        if mode in SEMANTIC_MODES and SEMANTIC_MODES[mode].module_class is not None:
            needed |= set(MODULE_FILES)
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
        # A bare name is that of a checkpoint of this run.
        path = Path(options.output_dir, source) if not path.is_dir() and path.name == source else path
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
        `ValueError`: if another run uses the folder, or it holds the result or checkpoints of an earlier run that this one
            neither continues nor may overwrite.
    """
    folder = Path(options.output_dir)
    lock = filelock.FileLock(folder / ".lock")
    with explain_write_errors("--output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"--output_dir {folder} is in use by another run.") from None
        try:
            clean_up(folder)
            check_earlier_run(folder, options)
        except BaseException:
            lock.release()
            raise
    return lock


def clean_up(folder: Path) -> None:
    """Completes or removes what a killed run left half-done in an output folder."""
    for path in list(folder.glob(".*")):
        place = folder / path.name.split(".")[1]
        if LEFTOVER.fullmatch(path.name):
            # A run that was killed between two renames left a checkpoint under its temporary name.
            if path.name.endswith(".old") and is_own_folder(path) and not os.path.lexists(place):
                os.replace(path, place)
            else:
                remove(path)
    for written in (folder, folder / "samples"):
        remove_temporary_files(written)
    complete_result(folder)


def check_earlier_run(folder: Path, options: Options) -> None:
    """Refuses a folder with an earlier run that this one would mix with, or with --overwrite_output_dir clears it."""
    for path in folder.glob("checkpoint-*"):
        if CHECKPOINT.fullmatch(path.name) and not is_own_folder(path):
            raise ValueError(
                f"{path} is no folder, but has the name of a checkpoint. It stays as it is; move it away."
            )
    checkpoints, result = list_checkpoints(folder), folder / LORA_WEIGHT_NAME_SAFE
    resumed = options.resume_from_checkpoint
    if resumed is not None and (resumed != "latest" or checkpoints):
        return
    if options.overwrite_output_dir:
        samples = [path for path in folder.glob("samples/step-*.png") if SAMPLE.fullmatch(path.name)]
        for path in checkpoints:
            delete_checkpoint(path)
        for path in samples:
            path.unlink()
        if (folder / "validation.jsonl").is_file():
            for name in (BEST, "validation.jsonl", "samples/index.html"):
                remove(folder / name)
    elif checkpoints or result.is_file():
        held = "checkpoints" if checkpoints else "the result"
        hint = "Continue it with --resume_from_checkpoint latest, or pass" if checkpoints else "Pass"
        raise ValueError(
            f"--output_dir {folder} holds {held} of an earlier run. {hint} another folder, or --overwrite_output_dir to"
            " replace it."
        )


class StopSignals:
    """
    Turns SIGTERM, SIGHUP and Ctrl-C into a stop after the current step. A second signal ends the run at once. A signal that
    the run was started to ignore, as `nohup` does, stays ignored.
    """

    def __enter__(self):
        self.number = 0
        # Windows has no SIGHUP, which tells that the terminal was closed.
        names = [name for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
        numbers = [number for name in names if signal.getsignal(number := getattr(signal, name)) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number, frame):
        self.number = number
        signal.signal(number, self.previous[number])

    def __exit__(self, *exc):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
