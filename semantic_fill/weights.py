# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Trained weights as inference loads them: saving LoRA and module, and loading them to train on.

Checkpoints and results hold the same files, so either can be painted with and started from.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from pipeline_flux_fill_semantic import SEMANTIC_MODES, SEMANTIC_SUBFOLDER, FluxFillSemanticPipeline
from semantic_attention import RESULT_ON_ITS_WAY, check_lora_fits, load_semantic_module
from semantic_fill.files import flush_to_disk, is_own_folder, list_files, new_folder, remove
from semantic_fill.options import Options


MODULE_FILES = tuple(f"{SEMANTIC_SUBFOLDER}/{name}" for name in ("config.json", SAFETENSORS_WEIGHTS_NAME))
RESULT_FILES = (LORA_WEIGHT_NAME_SAFE, *MODULE_FILES, "pipeline.py", "README.md")


def save_weights(model, weights: dict[str, torch.Tensor], folder: Path, options: Options) -> None:
    """
    Saves LoRA and module as inference loads them, in the float32 that they are trained in.

    Args:
        model (`SemanticFillModel`): The unwrapped model.
        weights (`dict[str, torch.Tensor]`): Its full tensors, from `Engine.weights`.
    """
    parts: dict[str, dict[str, Any]] = {
        part: {name.removeprefix(f"{part}."): w for name, w in weights.items() if name.startswith(f"{part}.")}
        for part in ("transformer", "semantic_attention")
    }
    semantic_attention = None
    if model.semantic_attention is not None:
        # FSDP2 gives a sharded module a class of its own, so the mode's class is taken.
        module_class: Any = SEMANTIC_MODES[options.semantic_mode].module_class
        semantic_attention = module_class.from_config(model.semantic_attention.config)
        semantic_attention.load_state_dict(parts["semantic_attention"])
    lora: Any = get_peft_model_state_dict(model.transformer, state_dict=parts["transformer"])
    FluxFillSemanticPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=lora,
        semantic_attention=semantic_attention,
        semantic_mode=options.semantic_mode,
        fusion_alpha=options.fusion_alpha,
        max_sequence_length=options.max_sequence_length,
        height=options.resolution,
        width=options.width,
        semantic_maps=options.semantic_maps if SEMANTIC_MODES[options.semantic_mode].uses_map else None,
        visible_attention=options.visible_attention,
        # Private, and what the diffusers training scripts themselves write rank and alpha with.
        **_collate_lora_metadata({"transformer": model.transformer}),
    )


def switch_result(output_dir: Path, write: Callable[[Path], Any]) -> list[str]:
    """
    Has `write` fill a new folder with a result, and puts it into the place of an earlier one. One rename switches: until
    then the earlier result is whole, and from then on the new one is, in `.result`, where `load_lora_weights` finds it
    until all its files are in their places. The next run completes what a killed one left there.

    Returns:
        `list[str]`: The names of the result's files in the output folder.
    """
    ready = output_dir / RESULT_ON_ITS_WAY
    complete_result(output_dir)
    with new_folder(output_dir / "result") as partial:
        write(partial)
    names = [path.relative_to(partial).as_posix() for path in list_files(partial)]
    remove(ready)
    os.replace(partial, ready)
    flush_to_disk(output_dir)
    complete_result(output_dir)
    return names


def complete_result(output_dir: Path) -> None:
    """Puts the files of a result that is ready into their places, where this has not happened yet."""
    ready = output_dir / RESULT_ON_ITS_WAY
    if not is_own_folder(ready):
        return
    with new_folder(output_dir / "result") as copies:
        shutil.copytree(ready, copies, symlinks=True)
    for name in RESULT_FILES:
        path, place = copies / name, output_dir / name
        if path.is_file() and not path.is_symlink():
            if place.parent != output_dir and not is_own_folder(place.parent):
                remove(place.parent)
                place.parent.mkdir()
            os.replace(path, place)
    remove(copies)
    # A module of the earlier result is no part of one that has none.
    module = output_dir / SEMANTIC_SUBFOLDER
    if not (ready / SEMANTIC_SUBFOLDER).exists() and is_own_folder(module):
        for name in MODULE_FILES:
            remove(output_dir / name)
        with contextlib.suppress(OSError):
            module.rmdir()
    gone = output_dir / ".result.gone"
    remove(gone)
    os.replace(ready, gone)
    remove(gone)


def load_weights(folder: Path, model) -> None:
    """Loads LoRA and module of a checkpoint into a model that is not sharded yet."""
    load_lora(model.transformer, folder)
    if model.semantic_attention is not None:
        module = load_module(str(folder), type(model.semantic_attention))
        try:
            model.semantic_attention.load_state_dict(module.state_dict())
        except RuntimeError as error:
            raise ValueError(f"The module in {folder} is not that of this run: {error}") from error


def load_lora(transformer: FluxTransformer2DModel, source: str | os.PathLike, cache_dir: str | None = None) -> None:
    """
    Loads a LoRA of a folder or Hub repository into the transformer's own.

    Raises:
        `ValueError`: if there is none, or its rank, alpha or layers are not those of this run.
    """
    try:
        weights, metadata = FluxFillSemanticPipeline.lora_state_dict(
            str(source),
            weight_name=LORA_WEIGHT_NAME_SAFE,
            use_safetensors=True,
            cache_dir=cache_dir,
            return_lora_metadata=True,
        )
        check_lora_fits(weights, transformer)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} holds no trained LoRA: {error}") from error
    config = transformer.peft_config["default"]
    rank = next((weight.shape[0] for name, weight in weights.items() if ".lora_A." in name), None)
    # Where there is no metadata, diffusers takes the rank for alpha.
    alpha = (metadata or {}).get("transformer.lora_alpha", rank)
    if (rank, alpha) != (config.r, config.lora_alpha):
        raise ValueError(
            f"The LoRA in {source} has rank {rank} and alpha {alpha}, but --rank is {config.r} and --lora_alpha"
            f" {config.lora_alpha}: pass --rank {rank} --lora_alpha {alpha}."
        )
    weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    result = set_peft_model_state_dict(transformer, convert_unet_state_dict_to_peft(weights))
    missing = [name for name in result.missing_keys if "lora" in name]
    if missing or result.unexpected_keys:
        raise ValueError(
            f"The LoRA in {source} does not fit --lora_layers: missing {missing[:3]}, unexpected"
            f" {result.unexpected_keys[:3]}."
        )


def load_module(
    source: str, module_class: type, cache_dir: str | None = None, maps: Sequence[str] | None = None
) -> torch.nn.Module:
    """
    The module of a trained folder or Hub repository, or of the `semantic_attention` folder itself.

    Args:
        maps (`Sequence[str]`, *optional*): Names of the maps that it has to be for.

    Raises:
        `ValueError`: if there is none, or it is of another class or for other maps, which the run cannot use.
    """
    errors = []
    for subfolder in (SEMANTIC_SUBFOLDER, None):
        try:
            module = load_semantic_module(source, subfolder=subfolder, cache_dir=cache_dir, dtype=torch.float32)
        except OSError as error:
            errors.append(str(error))
            continue
        except ValueError as error:
            raise ValueError(f"{source} holds no trained module that can be used: {error}") from error
        if not isinstance(module, module_class):
            raise ValueError(
                f"--semantic_weights {source} holds a {type(module).__name__}, but --semantic_mode needs a"
                f" {module_class.__name__}."
            )
        if maps is not None and module.maps != tuple(maps):
            raise ValueError(
                f"--semantic_weights {source} holds a module for the maps {', '.join(module.maps)}, but the data has"
                f" {', '.join(maps)}. Names and order have to be the same."
            )
        return module
    raise ValueError(f"--semantic_weights {source} holds no trained module: {errors[0]}")
