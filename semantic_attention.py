# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The two small models through which a semantic map guides FLUX.1 Fill, and the heat maps that explain them.

- [`SemanticAttentionModel`] lets the noisy latents attend to the map before each call of the transformer.
- [`SemanticProjectionModel`] adds the map's latents to the picture channels of the condition, place by place.

Both have the same interface (`enhance`, `scales`, `describe`), so the pipeline and the trainer never ask which one
they hold. Both have gates that start at exactly zero, as ControlNet's zero convolutions do
(https://huggingface.co/papers/2302.05543): an untrained module leaves the base model unchanged.

`causal_forward` and `causal_painting` run FLUX on a diptych so that the visible view is computed once for all steps.

This file stands apart from the pipeline so that the trainer can publish the two as one file. It also finds and checks
downloaded files, for pipeline, trainer, evaluation, page and converter.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.loaders.lora_base import _best_guess_weight_name as guess_weight_name
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.modeling_utils import ModelMixin

# Private, and what FLUX's own processor projects with, fused or not.
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxPosEmbed, _get_qkv_projections
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, BaseOutput

# Private, and what diffusers itself finds the file of a model with, on disk and on the Hub.
from diffusers.utils.hub_utils import _add_variant, _get_model_file
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig


SEMANTIC_POSITIONS = ("none", "rope")
# The name of the map where there is one. Only several maps need names of their own.
SINGLE_MAP = ("semantic",)
MAX_MAPS = 16
# The wavelengths run from 6 to 200 tokens. A panel of 1024 pixels is 64 tokens wide.
ROPE_THETA = 100
# The last commit that can use every module ever saved, for messages about modules that this version cannot use.
LAST_COMMIT_FOR_OLD_MODULES = "bd5985d"
# Pictures, texts and other files of somebody else's data that are larger are not read.
MAX_FILE_BYTES = 512 * 2**20
# JSON of a download that is larger or nested deeper is refused. The largest that the trainer writes, the description of
# an optimizer's state for all layers of FLUX, has less than 1 MiB and a depth of 14.
MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_DEPTH = 32
MAX_MODULE_SIZE = 4096
# The trainer's result, whole, while its files are put into the place of an earlier result.
RESULT_ON_ITS_WAY = ".result"
# Where a trained folder has the module.
SEMANTIC_SUBFOLDER = "semantic_attention"
# Arguments of every function that loads from the Hub.
HUB_ARGUMENTS = ("subfolder", "cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


# -- What was downloaded ----------------------------------------------------------------------------------------------


def open_file(source: bytes | str | os.PathLike, most: float = MAX_FILE_BYTES) -> io.BytesIO | io.BufferedReader:
    r"""
    Opens a file that somebody else wrote. Pictures, texts, JSON and weights are all read through this function.

    Args:
        source (`bytes`, `str` or `os.PathLike`):
            The path of the file, or its content.
        most (`float`, defaults to 512 MiB):
            Largest size in bytes.

    Raises:
        `ValueError`: It is a pipe or a device, which might never end, or it is too large. The message reads after the
            file's name.
        `OSError`: It cannot be opened.
    """
    if isinstance(source, bytes):
        file, size = io.BytesIO(source), len(source)
    else:
        # Opening a pipe would otherwise wait for a writer. The file that was opened is the one that is checked.
        file = open(source, "rb", opener=lambda path, flags: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))
        status = os.fstat(file.fileno())
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            file.close()
            raise ValueError("is no regular file")
    if size > most:
        file.close()
        raise ValueError(f"has {size} bytes, but at most {most} are accepted")
    return file


def read_file(path: str | os.PathLike, most: float = MAX_FILE_BYTES) -> bytes:
    r"""Reads a file that [`open_file`] opens."""
    with open_file(path, most) as file:
        return file.read()


# Weights come with files that say how to use them, and anyone may have written those. Each door that reads them calls
# the functions below before it acts on what they say. All raise a `ValueError` that names the file.


def parse_json(text: str | bytes, name: str | os.PathLike) -> Any:
    r"""
    Reads JSON that somebody else wrote.

    Args:
        text (`str` or `bytes`):
            The JSON, in UTF-8 if it is `bytes`.
        name (`str` or `os.PathLike`):
            What messages call it.

    Raises:
        `ValueError`: It is damaged, larger than 16 MiB or nested deeper than 32 levels.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"{name} is larger than {MAX_JSON_BYTES} bytes.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON that can be read: {error}") from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [entry for entry in level if isinstance(entry, (dict, list))]
        if not level:
            return value
        level = [inner for entry in level for inner in (entry.values() if isinstance(entry, dict) else entry)]
    raise ValueError(f"{name} is nested deeper than {MAX_JSON_DEPTH} levels.")


def read_json(path: str | os.PathLike) -> Any:
    r"""Reads a regular file with `parse_json`."""
    try:
        text = read_file(path, MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return parse_json(text, path)


def check_number(
    name: str, value: Any, least: float = -math.inf, most: float = math.inf, whole: bool = False
) -> int | float:
    r"""
    Returns a number that a downloaded file holds.

    Raises:
        `ValueError`: It is no finite number, no whole one where `whole` is set, or not within [least, most].
    """
    # `True` counts as a whole number in Python.
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    positive = whole and least == 1
    if not is_number or value != value or abs(value) == math.inf or (positive and value < 1):
        kind = f"{'positive ' if positive else ''}{'whole' if whole else 'finite'} number"
        raise ValueError(f"`{name}` has to be a {kind} but is {value!r:.100}")
    if not least <= value <= most:
        raise ValueError(f"`{name}` has to be within [{least:g}, {most:g}] but is {value!r:.100}")
    return value


def check_map_names(names: Any) -> tuple[str, ...]:
    r"""
    Returns the names of semantic maps as a tuple. They stand in logs, cards, figures and downloaded files.

    Raises:
        `ValueError`: There are none or more than 16, one is no word of letters, digits, `_`, `-` and `.`, is that of another
            view, or comes twice.
    """
    if not isinstance(names, (list, tuple)) or not 1 <= len(names) <= MAX_MAPS:
        raise ValueError(f"`maps` has to be a list of 1 to {MAX_MAPS} names but is {names!r:.100}")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name) or name in ("visible", "target"):
            raise ValueError(
                "`maps` has to hold names of up to 64 letters, digits, `_`, `-` and `.`, other than `visible` and `target`,"
                f" but holds {name!r:.100}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"`maps` has to hold different names but holds {names!r:.200}")
    return tuple(names)


def read_header(path: str | os.PathLike) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    r"""
    Reads the shapes of a safetensors file's tensors, and its metadata.

    Raises:
        `ValueError`: It is no regular safetensors file.
    """
    try:
        open_file(path, most=math.inf).close()
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file that can be read: {error}") from error


def check_finite(tensors: dict[str, torch.Tensor], name: str | os.PathLike) -> None:
    r"""
    Refuses weights with an infinite value or one that is not a number, which would spread to whatever they touch.

    Raises:
        `ValueError`: There is such a value. The message names the tensor.
    """
    for key, tensor in tensors.items():
        # Not every format of 8 bits knows `isfinite`.
        tensor = tensor.float() if tensor.dtype.itemsize == 1 and tensor.is_floating_point() else tensor
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds a value that is not finite, in {key[:200]!r}.")


def file_hash(path: str | os.PathLike) -> str:
    r"""Returns the SHA-256 of a regular file as hexadecimal digits."""
    with open_file(path, most=math.inf) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_damage(folder: str | os.PathLike, needed: set[str], needed_only: bool = False) -> str | None:
    r"""
    Compares files with the `manifest.json` of their folder, `{"path in the folder": [size in bytes, "SHA-256"]}`.

    Args:
        folder (`str` or `os.PathLike`):
            A checkpoint.
        needed (`set[str]`):
            Files that the manifest has to name.
        needed_only (`bool`, defaults to `False`):
            Whether to compare only these.

    Returns:
        `str` or `None`: What is wrong, or `None`.
    """
    folder = Path(folder)
    try:
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest, dict):
            return "manifest.json is no JSON object of files"
        lacking = sorted(needed - manifest.keys())
        if lacking:
            return f"manifest.json does not name {', '.join(lacking)}"
        for name in needed if needed_only else manifest:
            path, entry = folder / name, manifest[name]
            if not isinstance(entry, list) or len(entry) != 2:
                return f"manifest.json does not give size and hash of {name!r:.200}"
            # A manifest must not choose which other files of this machine are read, or have one read that never ends.
            # Links stay possible, because the cache of the Hub is made of them.
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"manifest.json names {name!r:.200}, which lies outside of the folder"
            if not path.is_file():
                return f"{name} is missing or no regular file"
            if path.stat().st_size != entry[0] or file_hash(path) != entry[1]:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def check_manifest(path: str | os.PathLike) -> None:
    r"""
    Compares a file of a checkpoint, in its folder or one folder below, with the checkpoint's manifest, if there is one.

    Raises:
        `ValueError`: The file is not what was written.
    """
    path = Path(os.path.abspath(path))
    for folder in (path.parent, path.parent.parent):
        if (folder / "manifest.json").is_file():
            damage = manifest_damage(folder, {path.relative_to(folder).as_posix()}, needed_only=True)
            if damage is not None:
                raise ValueError(f"{folder} is damaged: {damage}.")
            return


def current_result(source: str | os.PathLike) -> str:
    r"""Returns the folder that holds the whole of a trained folder's result, which is `source` unless a run was killed."""
    ready = os.path.join(source, RESULT_ON_ITS_WAY)
    return ready if os.path.isdir(ready) and not os.path.islink(ready) else str(source)


def check_module_files(model_class: type, config_file: str | os.PathLike, weights_file: str | os.PathLike) -> None:
    r"""
    Compares a module's configuration with its weights before either is used. A configuration can ask for more memory
    than any machine has.

    Args:
        model_class (`type`):
            The subclass of [`SemanticModel`] to load with.

    Raises:
        `ValueError`: A file is damaged, or they do not fit each other. The message names the file.
    """
    for file in (config_file, weights_file):
        check_manifest(file)
    config = read_json(config_file)
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} has to hold a JSON object.")
    shapes, _ = read_header(weights_file)
    try:
        for name in config.keys() & {"_class_name", "position", "injection"}:
            if not isinstance(config[name], str):
                raise ValueError(f"`{name}` has to be a text but is {config[name]!r:.100}.")
        maps = check_map_names(config.get("maps", SINGLE_MAP))
        num_layers = check_number("num_layers", config.get("num_layers", 1), least=1, whole=True)
        # Each layer takes time to make, even without memory for its weights.
        layers = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
        if num_layers * len(maps) != layers:
            each = "" if len(maps) == 1 else f" for each of {len(maps)} maps"
            raise ValueError(f"`num_layers` is {num_layers}{each}, but the weights are of {layers} layers.")
        with torch.device("meta"):
            wanted = {
                name: tuple(weight.shape) for name, weight in model_class.from_config(config).state_dict().items()
            }
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    if wanted != shapes:
        name = min(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
        raise ValueError(
            f"{weights_file} does not fit its config.json: {name[:200]!r} has to have the shape {wanted.get(name)} but"
            f" has {shapes.get(name)}."
        )
    check_finite(safetensors.torch.load_file(weights_file), weights_file)


# -- Where a LoRA lies ------------------------------------------------------------------------------------------------

LOCATION_ARGUMENTS = ("weight_name", "use_safetensors", *HUB_ARGUMENTS)


class LoraFile(NamedTuple):
    """A LoRA file on this machine, and the folder or Hub repository that it comes from."""

    path: str
    metadata: dict[str, str]
    source: str
    subfolder: str
    hub_arguments: dict[str, Any]

    @property
    def module_folder(self) -> str:
        """Where in `source` the module of a trained LoRA lies."""
        return "/".join(filter(None, (self.subfolder, SEMANTIC_SUBFOLDER)))

    @property
    def has_module(self) -> bool:
        """Whether there is a module beside the LoRA."""
        return resolve_file(self.source, self.module_folder, "config.json", self.hub_arguments) is not None


def safetensors_name(name: str) -> str:
    """The name of the safetensors file that holds the same weights as a pickle."""
    return f"{os.path.splitext(name)[0]}.safetensors"


def find_lora_file(source: str | os.PathLike, arguments: dict[str, Any]) -> LoraFile:
    r"""
    Finds a LoRA file, downloads it if it is on the Hub, and refuses pickles by whatever name.

    Args:
        source (`str` or `os.PathLike`):
            A file, folder or Hub repository.
        arguments (`dict[str, Any]`):
            Arguments of `load_lora_weights`. Those that say where the LoRA lies are taken out.

    Raises:
        `FileNotFoundError`: There is no LoRA.
        `ValueError`: It is no safetensors file.
    """
    hub_arguments = {name: arguments.pop(name) for name in LOCATION_ARGUMENTS if name in arguments}
    weight_name, subfolder = hub_arguments.pop("weight_name", None), hub_arguments.pop("subfolder", None) or ""
    use_safetensors, _ = hub_arguments.pop("use_safetensors", None), hub_arguments.pop("proxies", None)
    source, name = str(source), weight_name or LORA_WEIGHT_NAME_SAFE
    if os.path.isfile(source):
        source, subfolder, name = os.path.dirname(source) or ".", "", os.path.basename(source)
    path = resolve_file(source, subfolder, name, hub_arguments)
    if path is None and weight_name is None:
        # `FluxFillPipeline` chooses with this private function among files that have names of their own.
        folder = os.path.join(source, subfolder) if os.path.isdir(source) else source
        with contextlib.suppress(IndexError):
            name = guess_weight_name(folder, ".safetensors", hub_arguments.get("local_files_only", False)) or name
        path = resolve_file(source, subfolder, name, hub_arguments)
    elif path is not None and name.endswith(".bin"):
        # Where the same weights lie in both formats, no pickle has to be read.
        path = resolve_file(source, subfolder, safetensors_name(name), hub_arguments) or path
    if use_safetensors is False:
        reason = "`use_safetensors` is False"
    elif path is None:
        reason = f"{os.path.join(source, subfolder)!r} has no {name!r}"
        if name.endswith(".safetensors"):
            raise FileNotFoundError(f"`pretrained_model_name_or_path_or_dict` has to hold a LoRA, but {reason}.")
    else:
        try:
            return LoraFile(path, read_header(path)[1], source, subfolder, hub_arguments)
        except ValueError as error:
            reason = str(error)
    raise ValueError(
        f"`weight_name` has to be a safetensors file, because unpickling runs code from the file, but {reason}."
    )


def resolve_file(source: str, subfolder: str, filename: str, hub_arguments: dict[str, Any]) -> str | None:
    """Returns the local path of a file of a folder or Hub repository, or `None` if there is no such file."""
    source = current_result(source)
    if os.path.isdir(source):
        path = os.path.join(source, subfolder, filename)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(source, filename, subfolder=subfolder or None, **hub_arguments)
    except HFValidationError as error:
        raise ValueError(
            "`pretrained_model_name_or_path_or_dict` has to be a folder, a file, a Hub repository or a state dict, with"
            f" `weight_name` for a file in it, but is {source!r}."
        ) from error
    except LocalEntryNotFoundError:
        # It is a kind of `EntryNotFoundError`, but it says that the Hub was out of reach, not that a file is missing.
        raise
    except EntryNotFoundError:
        return None


# -- What a downloaded LoRA says --------------------------------------------------------------------------------------

# A name of layers. PEFT takes other texts for regular expressions, which can run for years. `^` marks a whole name.
LITERAL_NAME = re.compile(r"\^?\w[\w.]{0,255}")
# Fields of PEFT's configuration that say where a LoRA comes from, and that nothing here acts on.
LORA_ORIGIN = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
LORA_SWITCHES = {"fan_in_fan_out", "inference_mode", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"}
LORA_NAMES = {"target_modules", "exclude_modules"}
LORA_PATTERNS = {"rank_pattern", "alpha_pattern"}
LORA_BIASES = ("none", "all", "lora_only")
# These start with random weights or zeros. Others compute something from the base model or change it.
LORA_STARTS = (True, False, "gaussian", "orthogonal")


def check_lora_config(config: Any, rank: int) -> dict[str, Any]:
    r"""
    Checks the configuration that a LoRA file holds, before PEFT acts on it.

    Args:
        config (`dict`):
            Fields of a `peft.LoraConfig`.
        rank (`int`):
            The largest rank among the file's weights.

    Returns:
        `dict[str, Any]`: The fields that this version of PEFT knows. Those that it does not know have to be empty.

    Raises:
        `ValueError`: A field has a wrong type or range, or holds a regular expression instead of a name.
    """
    if not isinstance(config, dict):
        raise ValueError(f"its LoRA configuration is no JSON object but {config!r:.100}")
    defaults = LoraConfig().to_dict()

    def are_names(names: Any) -> bool:
        return all(isinstance(name, str) and LITERAL_NAME.fullmatch(name) for name in names)

    # What each field accepts: a test and its words, and the range of its numbers.
    tests: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(LORA_SWITCHES, (lambda v: isinstance(v, bool), "true or false")),
        **dict.fromkeys(
            LORA_NAMES,
            (lambda v: v in (None, "all-linear") or isinstance(v, list) and are_names(v), "a list of names"),
        ),
        **dict.fromkeys(
            LORA_PATTERNS, (lambda v: not v or isinstance(v, dict) and are_names(v), "a JSON object of names")
        ),
        "bias": (lambda v: v in LORA_BIASES, f"one of {LORA_BIASES}"),
        "init_lora_weights": (lambda v: v in LORA_STARTS, f"one of {LORA_STARTS}"),
    }
    ranks: dict[str, Any] = {"least": 1, "most": rank, "whole": True}
    ranges = {"r": ranks, "rank_pattern": ranks, "lora_alpha": {}, "alpha_pattern": {}}
    ranges["lora_dropout"] = {"least": 0, "most": 1}
    for field, value in config.items():
        fits, accepted = tests.get(field, (None, ""))
        if fits is not None and not fits(value):
            raise ValueError(f"`{field}` has to be {accepted} but is {value!r:.100}")
        if field in ranges:
            for number in (value or {}).values() if field in LORA_PATTERNS else [value]:
                check_number(field, number, **ranges[field])
        elif fits is None and field not in LORA_ORIGIN and value and value != defaults.get(field):
            raise ValueError(f"`{field}` is {value!r:.100}, which is not supported here")
    return {field: value for field, value in config.items() if field in defaults}


def check_lora(state_dict: dict[str, torch.Tensor], metadata: Any, name: str) -> dict[str, Any] | None:
    r"""
    Checks a LoRA that was read, before it touches a model.

    Args:
        state_dict (`dict[str, torch.Tensor]`):
            Its weights in diffusers' or another layout.
        metadata (`dict`, *optional*):
            What its file says, `{"transformer.r": 16}`.
        name (`str`):
            What messages call it.

    Returns:
        `dict[str, Any]` or `None`: The metadata, without empty fields that this version of PEFT does not know.

    Raises:
        `ValueError`: A weight is not finite, or the metadata cannot be.
    """
    check_finite(state_dict, name)
    if metadata is None:
        return None
    try:
        if not isinstance(metadata, dict):
            raise ValueError(f"its metadata is no JSON object but {metadata!r:.100}")
        rank = max((min(weight.shape) for weight in state_dict.values() if weight.ndim > 1), default=1)
        components: dict[str, dict] = {}
        for key, value in metadata.items():
            component, _, field = key.partition(".")
            components.setdefault(component, {})[field] = value
        return {
            f"{component}.{field}": value
            for component, config in components.items()
            for field, value in check_lora_config(config, rank).items()
        }
    except ValueError as error:
        raise ValueError(f"{name} holds a LoRA that cannot be used: {error}.") from error


def check_lora_fits(state_dict: dict[str, torch.Tensor], transformer: torch.nn.Module) -> None:
    r"""
    Compares a LoRA in diffusers' layout with the transformer's layers, before any of them changes.

    Raises:
        `ValueError`: It names layers, but none of these, or a weight has another shape than the layer that it names.
    """
    layers, found = dict(transformer.named_modules()), False
    for key, weight in state_dict.items():
        name = re.split(r"\.lora|\.lokr", key.removeprefix("transformer."))[0]
        layer = layers.get(name) if key.startswith("transformer.") else None
        inputs, outputs = (getattr(layer, side, None) for side in ("in_features", "out_features"))
        found = found or inputs is not None or key.startswith("text_encoder.")
        if weight.ndim != 2 or inputs is None:
            continue
        down = ".lora_A." in key or ".lora.down." in key
        up = ".lora_B." in key or ".lora.up." in key
        side, wanted = (weight.shape[1], inputs) if down else (weight.shape[0], outputs)
        if (down or up) and side != wanted:
            raise ValueError(
                f"The LoRA does not fit this model: {key[:200]!r} has the shape {tuple(weight.shape)}, but the layer has"
                f" {inputs} inputs and {outputs} outputs."
            )
    # Without names of layers, diffusers only warns.
    if not found and any(".lora" in key or ".lokr" in key for key in state_dict):
        raise ValueError(
            f"The LoRA matches no layer of this model. It was made for another one: its first weights are"
            f" {[key[:100] for key in state_dict][:3]}."
        )


# -- Layers -----------------------------------------------------------------------------------------------------------


class SemanticCrossAttention(nn.Module):
    r"""
    One gated cross-attention layer from image tokens `x` to semantic tokens `s`:

        x + scale * Out(softmax(Q(LN(x)) K(LN(s))^T / sqrt(head_dim)) V(LN(s)))

    The projections have no biases. `scale` has one entry per channel and starts at zero.

    Args:
        channels (`int`, defaults to 64):
            Channels of both token sequences: the 16 latent channels of the VAE, packed 2x2.
        num_heads (`int`, defaults to 8):
            Number of attention heads.
        head_dim (`int`, defaults to 16):
            Channels of one head. The inner width is `num_heads * head_dim`.
    """

    def __init__(self, channels: int = 64, num_heads: int = 8, head_dim: int = 16):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        inner_dim = num_heads * head_dim

        self.norm_image = nn.LayerNorm(channels)
        self.norm_semantic = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, inner_dim, bias=False)
        self.to_k = nn.Linear(channels, inner_dim, bias=False)
        self.to_v = nn.Linear(channels, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, channels, bias=False)
        # Only the gate is zero. If `to_out` were zero as well, neither would ever receive a gradient.
        self.scale = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def start_at_own_place(self, strength: float = 6.0) -> None:
        r"""
        Makes each image token attend to the semantic tokens near its own place.

        Noise and map share no content that could lead attention there. This method therefore gives queries and keys a
        constant part, which rotary embedding turns into a preference for near tokens. The output of a layer norm sums
        to zero over its channels, so a bias of ones is orthogonal to it. A projection whose rows sum to `strength`
        adds that constant and nothing else; a projection whose rows sum to zero does not see it.

        Args:
            strength (`float`, defaults to 6.0):
                The constant in each channel of queries and keys.
        """
        for norm in (self.norm_image, self.norm_semantic):
            nn.init.ones_(norm.bias)
        for projection, constant in ((self.to_q, strength), (self.to_k, strength), (self.to_v, 0.0)):
            weight = projection.weight
            weight += constant / weight.shape[1] - weight.mean(dim=1, keepdim=True)

    def _split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        rotary_emb: Any = None,
        semantic_scale: float = 1.0,
        return_query_and_key: bool = False,
    ) -> Any:
        r"""
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, image_tokens, channels)`):
                Image tokens.
            semantic_tokens (`torch.Tensor` of shape `(batch, semantic_tokens, channels)`):
                Tokens of the semantic map.
            rotary_emb (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
                Cosine and sine of shape `(tokens, head_dim)`, used for queries and keys.
            semantic_scale (`float`, defaults to 1.0):
                Multiplies the learned gate.
            return_query_and_key (`bool`, defaults to `False`):
                Whether to return queries and keys, which [`SemanticAttentionModel.attention_maps`] needs, instead.

        Returns:
            `torch.Tensor` of shape `(batch, image_tokens, channels)` in the dtype of `hidden_states`, or two of shape
            `(batch, num_heads, tokens, head_dim)`.
        """
        semantic_tokens = self.norm_semantic(semantic_tokens)
        value = self._split_heads(self.to_v(semantic_tokens))
        query: Any = self._split_heads(self.to_q(self.norm_image(hidden_states)))
        key: Any = self._split_heads(self.to_k(semantic_tokens))
        if rotary_emb is not None:
            query, key = apply_rotary_emb(query, rotary_emb), apply_rotary_emb(key, rotary_emb)
        if return_query_and_key:
            return query, key
        attended = F.scaled_dot_product_attention(query, key, value)
        update = self.to_out(attended.transpose(1, 2).flatten(-2))
        return (hidden_states + semantic_scale * self.scale * update).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


class SemanticProjection(nn.Module):
    r"""
    One gated linear layer that adds to each image token the semantic token of its own place: `x + scale * Linear(s)`.

    There is no norm, because a norm would remove the level of the tokens, which is what makes a color. The linear map
    starts as the identity, so an opening gate shows the map to the transformer as it shows a picture.

    Args:
        channels (`int`, defaults to 64):
            Channels of both token sequences.
    """

    def __init__(self, channels: int = 64):
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.scale = nn.Parameter(torch.zeros(channels))

    def forward(
        self, hidden_states: torch.Tensor, semantic_tokens: torch.Tensor, semantic_scale: float = 1.0
    ) -> torch.Tensor:
        r"""Takes and returns what [`SemanticCrossAttention`] does, with as many semantic tokens as image tokens."""
        update = self.linear(semantic_tokens)
        return (hidden_states + semantic_scale * self.scale * update).to(hidden_states.dtype)


# -- Models -----------------------------------------------------------------------------------------------------------


class SemanticModel(ModelMixin, ConfigMixin):
    r"""
    The interface that the two ways in share. Use [`SemanticAttentionModel`] or [`SemanticProjectionModel`].

    A subclass has its layers in `layers`, names itself in `description`, and says in `input_part` which of the
    transformer's input channels it enhances: part 0 are the noisy latents, part 1 the picture channels of the
    condition, each `in_channels` wide.

    A module for several maps has `num_layers` layers for each of them, map by map. All maps see the same input, and their
    updates add up, so their order makes no difference.
    """

    description: str
    input_part: int
    layers: Any

    def register_to_config(self, **kwargs) -> None:
        # The files of a module for one map are those of versions that knew no other.
        if tuple(kwargs.get("maps", ())) == SINGLE_MAP:
            del kwargs["maps"]
        super().register_to_config(**kwargs)

    @property
    def maps(self) -> tuple[str, ...]:
        r"""The names of the semantic maps, in the order of their tokens."""
        return tuple(self.config.get("maps", SINGLE_MAP))

    def layers_of(self, semantic_map: int) -> Any:
        r"""The layers of a map, by its index in `maps`."""
        count = len(self.layers) // len(self.maps)
        return list(self.layers)[semantic_map * count : (semantic_map + 1) * count]

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs):
        r"""
        Makes the model that a config describes, which may be an older one. See [`load_semantic_module`].

        `from_pretrained`, a saved pipeline folder and [`load_semantic_module`] all make their model here, so older
        weights are recognized in this one place. diffusers itself ignores unknown config values with a warning, and an
        old module would then act on the wrong channels.

        Args:
            config (`dict`):
                The config of a saved model, or the `config` of a model.
            return_unused_kwargs, kwargs:
                As in [`~ConfigMixin.from_config`].

        Raises:
            `ValueError`: The config describes a module that this version cannot use.
        """
        config = dict(config)
        class_name = config.get("_class_name", cls.__name__)
        position, injection = config.get("position", "none"), config.pop("injection", "noise")
        model_class = {c.__name__: c for c in (SemanticAttentionModel, SemanticProjectionModel)}.get(class_name)
        if model_class is None:
            raise ValueError(
                f"The module's config has the `_class_name` {class_name!r}, but this version can only load"
                f" `SemanticAttentionModel` and `SemanticProjectionModel`. Commit {LAST_COMMIT_FOR_OLD_MODULES} can"
                " still use every older module."
            )
        if model_class is SemanticAttentionModel and (position, injection) == ("direct", "condition"):
            model_class = SemanticProjectionModel
            config = {k: v for k, v in config.items() if k not in ("position", "num_heads", "head_dim")}
        elif injection != "noise" or position not in SEMANTIC_POSITIONS:
            raise ValueError(
                f"The module was saved with `position={position!r}` and `injection={injection!r}`, which this version"
                f" no longer supports. Commit {LAST_COMMIT_FOR_OLD_MODULES} can still use it."
            )
        return super(SemanticModel, model_class).from_config(config, return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        r"""
        Loads a module, as [`~ModelMixin.from_pretrained`] does, once its configuration has been compared with its weights.

        Raises:
            `ValueError`: A file is damaged, holds values that are not finite, or does not fit the other, or a pickle is
                asked for.
            `OSError`: There is no module.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("`use_safetensors` cannot be False, because unpickling runs code from the file.")
        kwargs["use_safetensors"] = True
        source = current_result(pretrained_model_name_or_path)
        if os.path.isdir(source):
            # diffusers would prefer weights beside the subfolder.
            source = os.path.join(source, kwargs.pop("subfolder", None) or "")
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        weights_name = _add_variant(SAFETENSORS_WEIGHTS_NAME, kwargs.get("variant"))
        config_file, weights_file = (
            _get_model_file(source, weights_name=name, **where) for name in (cls.config_name, weights_name)
        )
        check_module_files(cls, config_file, weights_file)
        return super().from_pretrained(source, **kwargs)

    @staticmethod
    def _check_sizes(**sizes: int) -> None:
        for name, size in sizes.items():
            # The upper bound stops a damaged config before it fills the memory.
            check_number(name, size, least=1, most=MAX_MODULE_SIZE, whole=True)

    def _check_tokens(self, hidden_states: torch.Tensor, semantic_tokens: torch.Tensor) -> None:
        channels = self.config["in_channels"]
        for name, tokens in (("hidden_states", hidden_states), ("semantic_tokens", semantic_tokens)):
            if tokens.ndim != 3 or tokens.shape[-1] != channels:
                raise ValueError(
                    f"`{name}` has to have the shape (batch, tokens, {channels}) but has {tuple(tokens.shape)}."
                )
        if hidden_states.shape[0] != semantic_tokens.shape[0]:
            raise ValueError(
                f"`semantic_tokens` has to have the batch size of `hidden_states`, {hidden_states.shape[0]}, but has"
                f" {semantic_tokens.shape[0]}."
            )

    def split_input(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        r"""
        Splits the transformer's input into the channels before the enhanced part, the enhanced part, and the rest.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, 6 * in_channels)`):
                The transformer's input.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: The second has the shape `(batch, tokens, in_channels)`
            and the module's dtype. It is what `forward` takes.
        """
        channels = self.config["in_channels"]
        start = self.input_part * channels
        before, part, after = hidden_states.tensor_split((start, start + channels), dim=-1)
        return before, part.to(self.dtype), after

    def enhance(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        semantic_scale: float | Sequence[float] = 1.0,
        keep_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Enhances this model's part of the transformer's input and leaves the other channels unchanged.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, 6 * in_channels)`):
                The transformer's input, `x_t` and `x_cond` concatenated on channels, in any floating dtype.
            semantic_tokens (`torch.Tensor` of shape `(batch, tokens, in_channels)`):
                One token of the map for the place of each image token, in the module's dtype. `tile_across_panels`
                and [`FluxFillSemanticPipeline.encode_semantic`] make them. Those of a module for several maps have the
                shape `(batch, maps, tokens, in_channels)`.
            positions (`torch.Tensor` of shape `(tokens, 2)`, *optional*):
                Row and column of each token within its panel. Only an attention with `position="rope"` uses them.
            semantic_scale (`float` or `list[float]`, defaults to 1.0):
                Strength of the guidance, of all maps or of each. It multiplies the learned gates. 0 leaves a map out.
            keep_map (`torch.Tensor` of shape `(batch, maps)` and dtype bool, *optional*):
                `False` where a sample leaves a map out.

        Returns:
            `torch.Tensor` of the shape and dtype of `hidden_states`.

        Raises:
            `ValueError`: The shapes do not fit each other.
        """
        before, part, after = self.split_input(hidden_states)
        enhanced = self(part, semantic_tokens, positions, semantic_scale, keep_map)
        return torch.cat((before, enhanced.to(hidden_states.dtype), after), dim=-1)

    def forward(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        semantic_scale: float | Sequence[float] = 1.0,
        keep_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Applies the layers to the part of the input that this model enhances.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, in_channels)`):
                Noisy image tokens `x_t` for an attention, the picture channels of `x_cond` for a projection.
            semantic_tokens, positions, semantic_scale, keep_map:
                As in [`~SemanticModel.enhance`].

        Returns:
            `torch.Tensor` of shape `(batch, tokens, in_channels)`: The enhanced tokens, in the dtype of
            `hidden_states`.
        """
        enhanced = None
        for index, scale in enumerate(self._scale_of_each(semantic_scale)):
            if scale == 0:
                continue
            tokens = self._tokens_of(semantic_tokens, index)
            updated = self._run_layers(self.layers_of(index), hidden_states, tokens, positions, scale)
            if keep_map is not None:
                updated = torch.where(keep_map[:, index, None, None], updated, hidden_states)
            enhanced = updated if enhanced is None else enhanced + (updated - hidden_states)
        return hidden_states if enhanced is None else enhanced

    def _run_layers(
        self,
        layers: Any,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        positions: torch.Tensor | None,
        semantic_scale: float,
    ) -> torch.Tensor:
        """Applies the layers of one map, one after the other. Its tokens have the shape of `hidden_states`."""
        raise NotImplementedError

    def _scale_of_each(self, semantic_scale: float | Sequence[float]) -> Sequence[float]:
        if not isinstance(semantic_scale, (list, tuple)):
            return [semantic_scale] * len(self.maps)  # pyright: ignore[reportReturnType] It is a number.
        if len(semantic_scale) != len(self.maps):
            raise ValueError(
                f"`semantic_scale` has to hold a number for each of the maps {self.maps} but holds {len(semantic_scale)}."
            )
        return semantic_scale

    def _tokens_of(self, semantic_tokens: torch.Tensor, semantic_map: int) -> torch.Tensor:
        if len(self.maps) == 1:
            return semantic_tokens
        if semantic_tokens.ndim != 4 or semantic_tokens.shape[1] != len(self.maps):
            raise ValueError(
                f"`semantic_tokens` has to have the shape (batch, {len(self.maps)}, tokens, channels) for the maps"
                f" {self.maps} but has {tuple(semantic_tokens.shape)}."
            )
        return semantic_tokens[:, semantic_map]

    def scales(self) -> list[float]:
        r"""Returns the mean absolute gate of each layer, in the order of `layers`. All are exactly 0 before training."""
        return [layer.scale.detach().abs().mean().item() for layer in self.layers]

    def named_scales(self) -> dict[str, float]:
        r"""Returns the mean absolute gates by what logs call each layer, which with several maps says which map it is for."""
        return dict(zip(name_layers(self.maps, len(self.layers)), self.scales()))

    def describe(self) -> list[str]:
        r"""Returns the two lines that a training run logs at its start: what the module is, and its size."""
        maps = "" if len(self.maps) == 1 else f" for each of the maps {', '.join(self.maps)}"
        return [
            f"{self._summary()}{maps}",
            f"Added {self.num_parameters()} {self.description} parameters to optimizer",
        ]


def name_layers(maps: Sequence[str], count: int) -> list[str]:
    r"""Names the `count` layers of a module for these maps: `layer 0`, or `land layer 0` where there are several maps."""
    if len(maps) == 1:
        return [f"layer {index}" for index in range(count)]
    return [f"{name} layer {index}" for name in maps for index in range(count // len(maps))]


class SemanticAttentionModel(SemanticModel):
    r"""
    A stack of [`SemanticCrossAttention`] layers that enhances the noisy latents `x_t`.

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
            `"none"` compares contents only. `"rope"` rotates queries and keys by their row and column within the panel
            (2-D rotary embedding, https://huggingface.co/papers/2104.09864, half of each head for either axis) and
            starts with each token attending to its own place. It needs a `head_dim` that is a multiple of 4.
        maps (`list[str]`, defaults to `["semantic"]`):
            Names of the semantic maps. Each has layers of its own.

    Raises:
        `ValueError`: A size is not a positive integer, `position` is unknown or does not fit `head_dim`, or a name cannot
            be.
    """

    description = "semantic cross-attention"
    input_part = 0
    _repeated_blocks = ["SemanticCrossAttention"]
    _no_split_modules = ["SemanticCrossAttention"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 64,
        num_layers: int = 1,
        num_heads: int = 8,
        head_dim: int = 16,
        position: str = "none",
        maps: Sequence[str] = SINGLE_MAP,
    ):
        super().__init__()
        maps = check_map_names(maps)
        self._check_sizes(in_channels=in_channels, num_layers=num_layers, num_heads=num_heads, head_dim=head_dim)
        if position not in SEMANTIC_POSITIONS:
            raise ValueError(f"`position` has to be one of {SEMANTIC_POSITIONS} but is {position!r}.")
        if position == "rope" and head_dim % 4 != 0:
            raise ValueError(
                f'`head_dim` has to be a multiple of 4 with `position="rope"`, which gives half of a head to rows and'
                f" half to columns, but is {head_dim}."
            )
        self.pos_embed = None
        self.layers: Any = nn.ModuleList(
            SemanticCrossAttention(in_channels, num_heads, head_dim) for _ in range(num_layers * len(maps))
        )
        if position == "rope":
            self.pos_embed = FluxPosEmbed(theta=ROPE_THETA, axes_dim=[head_dim // 2] * 2)
            for layer in self.layers:
                layer.start_at_own_place()

    def _summary(self) -> str:
        return f"Using Cross-Attention with {self.config['num_layers']} layers, {self.config['num_heads']} heads"

    def _rotary_emb(
        self, hidden_states: torch.Tensor, semantic_tokens: torch.Tensor, positions: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        self._check_tokens(hidden_states, semantic_tokens)
        if self.pos_embed is None:
            return None
        tokens = hidden_states.shape[1]
        if positions is None or tuple(positions.shape) != (tokens, 2) or semantic_tokens.shape[1] != tokens:
            got = None if positions is None else tuple(positions.shape)
            raise ValueError(
                f'With `position="rope"`, `positions` has to have the shape ({tokens}, 2), the row and column of each'
                f" of the {tokens} image tokens and of as many semantic tokens, but has {got} for"
                f" {semantic_tokens.shape[1]} semantic tokens."
            )
        return self.pos_embed(positions)

    def _run_layers(self, layers, hidden_states, semantic_tokens, positions, semantic_scale) -> torch.Tensor:
        rotary_emb = self._rotary_emb(hidden_states, semantic_tokens, positions)
        for layer in layers:
            hidden_states = layer(hidden_states, semantic_tokens, rotary_emb, semantic_scale)
        return hidden_states

    @torch.no_grad()
    def attention_maps(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        semantic_scale: float | Sequence[float] = 1.0,
        layer: int = -1,
        tokens: torch.Tensor | list[int] | None = None,
        chunk_size: int = 256,
        semantic_map: int = 0,
    ) -> Iterator[torch.Tensor]:
        r"""
        Computes where the image tokens look in the semantic map.

        `forward` never forms these matrices. At 512 pixels a whole one has 8 x 2048 x 2048 floats per picture, so this
        method yields it in chunks of image tokens.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, in_channels)`):
                Noisy image tokens, as in `forward`.
            semantic_tokens, positions, semantic_scale:
                As in [`~SemanticModel.enhance`].
            layer (`int`, defaults to -1):
                Index of the layer whose attention is returned, among those of one map. The layers before it are applied.
            tokens (`torch.Tensor` or `list[int]`, *optional*):
                Indices of the image tokens whose attention is returned. Defaults to all of them.
            chunk_size (`int`, defaults to 256):
                Number of image tokens in a chunk.
            semantic_map (`int`, defaults to 0):
                Index of the map that the tokens look in.

        Yields:
            `torch.Tensor` of shape `(batch, num_heads, up to chunk_size, semantic_tokens)` in float32. Each row sums
            to one. `torch.cat(list(...), dim=2)` is the whole matrix.

        Raises:
            `IndexError`: `layer` or one of `tokens` does not exist.
            `ValueError`: The shapes do not fit each other.
        """
        semantic_tokens, layers = self._tokens_of(semantic_tokens, semantic_map), self.layers_of(semantic_map)
        rotary_emb = self._rotary_emb(hidden_states, semantic_tokens, positions)
        scale, block = self._scale_of_each(semantic_scale)[semantic_map], layers[layer]
        for earlier in layers[: layer % len(layers)]:
            hidden_states = earlier(hidden_states, semantic_tokens, rotary_emb, scale)
        # Offloading brings the weights of a layer that is called, and of no other.
        query, key = block(hidden_states, semantic_tokens, rotary_emb, return_query_and_key=True)
        if tokens is not None:
            query = query[:, :, torch.as_tensor(tokens, device=query.device)]
        query, key = query.float() * block.head_dim**-0.5, key.float().transpose(-1, -2)
        for chunk in query.split(chunk_size, dim=2):
            yield (chunk @ key).softmax(dim=-1)


class SemanticProjectionModel(SemanticModel):
    r"""
    A stack of [`SemanticProjection`] layers that adds the map to the picture channels of the condition `x_cond`.

    Those channels are empty where the transformer paints, and they are the same at every timestep.

    Args:
        in_channels (`int`, defaults to 64), num_layers (`int`, defaults to 1), maps (`list[str]`, defaults to
        `["semantic"]`):
            As in [`SemanticAttentionModel`]. With 64 channels a layer has 4224 parameters.

    Raises:
        `ValueError`: A size is not a positive integer, or a name cannot be.
    """

    description = "semantic projection"
    input_part = 1
    _repeated_blocks = ["SemanticProjection"]
    _no_split_modules = ["SemanticProjection"]

    @register_to_config
    def __init__(self, in_channels: int = 64, num_layers: int = 1, maps: Sequence[str] = SINGLE_MAP):
        super().__init__()
        maps = check_map_names(maps)
        self._check_sizes(in_channels=in_channels, num_layers=num_layers)
        self.layers = nn.ModuleList(SemanticProjection(in_channels) for _ in range(num_layers * len(maps)))

    def _summary(self) -> str:
        return f"Using a projection with {self.config['num_layers']} layers"

    def _run_layers(self, layers, hidden_states, semantic_tokens, positions, semantic_scale) -> torch.Tensor:
        self._check_tokens(hidden_states, semantic_tokens)
        if semantic_tokens.shape[1] != hidden_states.shape[1]:
            raise ValueError(
                f"`semantic_tokens` has to hold one token for each of the {hidden_states.shape[1]} image tokens but"
                f" holds {semantic_tokens.shape[1]}."
            )
        for layer in layers:
            hidden_states = layer(hidden_states, semantic_tokens, semantic_scale)
        return hidden_states


def load_semantic_module(
    source: str | os.PathLike, subfolder: str | None = None, **kwargs
) -> SemanticAttentionModel | SemanticProjectionModel:
    r"""
    Loads a saved semantic module. Its config decides which of the two models it is.

    Older configs are understood: `position="direct"` with `injection="condition"` becomes a
    [`SemanticProjectionModel`], and `"none"` or `"rope"` on the noise load as they are.

    Args:
        source (`str` or `os.PathLike`):
            A folder or Hub repository.
        subfolder (`str`, *optional*):
            The folder within `source` that holds the module's `config.json`.
        kwargs (*optional*):
            As in [`~ModelMixin.from_pretrained`].

    Raises:
        `ValueError`: The module is of a kind that this version no longer supports. The message names the setting and a
            commit that can still use the module.
        `OSError`: There is no module in `source`.
    """
    return SemanticAttentionModel.from_pretrained(source, subfolder=subfolder, **kwargs)


# -- The visible view, computed once ----------------------------------------------------------------------------------

VISIBLE_ATTENTIONS = ("joint", "causal")
# Causal paintings of one process take turns: what they keep lies in the layers of a transformer that they may share.
_PAINTING = threading.RLock()


def split_panels(tokens: torch.Tensor, columns: int, dim: int = 1) -> tuple[torch.Tensor, ...]:
    r"""Splits the tokens of a diptych, whose panels have so many columns, into those of the visible and the target view."""
    return tuple(panel.flatten(dim, dim + 1) for panel in tokens.unflatten(dim, (-1, 2, columns)).unbind(dim + 1))


def join_panels(visible: torch.Tensor, target: torch.Tensor, columns: int) -> torch.Tensor:
    r"""Puts the tokens `(batch, tokens, channels)` of two panels of so many columns back beside each other."""
    return torch.stack([view.unflatten(1, (-1, columns)) for view in (visible, target)], dim=2).flatten(1, 3)


class CausalAttnProcessor(FluxAttnProcessor):
    r"""
    FLUX's attention for two passes. That of the prompt and the visible view attends to itself. That of the target attends
    to itself and to the keys and values of the other. In any other call it is [`FluxAttnProcessor`].

    Args:
        stock (`FluxAttnProcessor`):
            The processor in whose place this one stands.
    """

    def __init__(self, stock: FluxAttnProcessor):
        super().__init__()
        self._attention_backend = stock._attention_backend
        self.kept: tuple[torch.Tensor, ...] = ()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
        view: str | None = None,
    ) -> Any:
        """
        As in `FluxAttnProcessor`. With the `view` `"visible"` keys and values are kept, and with `"target"` those kept are
        attended to. `"both"` has the passes one behind the other in the batch, the second with a prompt that nothing sees.
        """
        if view is None:
            stock: Any = super().__call__
            return stock(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        projected: Any = _get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in projected[:3])
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            text = [x.unflatten(-1, (-1, attn.head_dim)) for x in projected[3:]]
            text[:2] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
            query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, (query, key, value)))
        tokens = query.shape[1]
        if view == "both":
            first, second = zip(*(x.chunk(2) for x in (query, key, value)))
            # The positions are those of the prompt and of both views.
            unseen = 2 * tokens - image_rotary_emb[0].shape[0]
            seen, kept = self._attend(first, [table[:tokens] for table in image_rotary_emb])
            own, _ = self._attend(
                [x[:, unseen:] for x in second], [table[tokens:] for table in image_rotary_emb], kept
            )
            out = torch.cat((seen, F.pad(own, (0, 0, 0, 0, unseen, 0))))
        elif view == "visible":
            out, self.kept = self._attend((query, key, value), image_rotary_emb)
        else:
            out, _ = self._attend((query, key, value), image_rotary_emb, self.kept)
        out = out.flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        text_tokens = encoder_hidden_states.shape[1]
        text_out, image_out = out.split_with_sizes([text_tokens, tokens - text_tokens], dim=1)
        image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
        return image_out, attn.to_add_out(text_out.contiguous())

    def _attend(self, projected: Sequence, image_rotary_emb: Any, kept: tuple = ()) -> tuple[torch.Tensor, tuple]:
        """Attention to what was kept and to the keys and values of its own, and these."""
        query, key, value = projected
        # Its annotations say that it returns two tensors.
        rotate: Any = apply_rotary_emb
        query, key = (rotate(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        keys, values = (torch.cat(pair, dim=1) for pair in zip(kept, (key, value))) if kept else (key, value)
        return dispatch_attention_fn(query, keys, values, backend=self._attention_backend), (key, value)


def _attentions_of(transformer: Any) -> dict[str, Any]:
    """The attention layers of FLUX's blocks by name. Looking for them in all modules takes longer than some steps."""
    names = ("transformer_blocks", "single_transformer_blocks")
    return {f"{name}.{i}.attn": block.attn for name in names for i, block in enumerate(getattr(transformer, name))}


def use_causal_attention(transformer: Any) -> None:
    r"""
    Prepares the attention of a `FluxTransformer2DModel` for the passes of `causal_forward`. Other calls are as before.

    Raises:
        `ValueError`: The transformer has other attention processors than FLUX's own, or is sharded along its tokens.
    """
    processors = {}
    for name, attn in _attentions_of(transformer).items():
        stock = attn.processor
        if type(stock) not in (FluxAttnProcessor, CausalAttnProcessor) or stock._parallel_config is not None:
            raise ValueError(
                f'`visible_attention="causal"` replaces FLUX\'s own attention processors, but `{name}` is'
                f" {type(stock).__name__} with the parallel configuration {stock._parallel_config}."
            )
        processors[attn] = stock if type(stock) is CausalAttnProcessor else CausalAttnProcessor(stock)
    for attn, processor in processors.items():
        attn.set_processor(processor)


def show_condition(hidden_states: torch.Tensor, columns: int) -> torch.Tensor:
    r"""Puts the latents of the visible view, which the condition holds, into the place of its noisy ones."""
    visible, target = split_panels(hidden_states, columns)
    channels = hidden_states.shape[-1] // 6
    clean = visible[..., channels : 2 * channels]
    return join_panels(torch.cat((clean, visible[..., channels:]), dim=-1), target, columns)


def inputs_of_pass(view: str, tokens: torch.Tensor, img_ids: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
    r"""
    The inputs of a call of the transformer that computes one view: `"visible"` beside the prompt at t = 0, whose keys and
    values are kept, or `"target"`, which has no prompt of its own.
    """
    kwargs = {**(inputs.get("joint_attention_kwargs") or {}), "view": view}
    inputs = inputs | {"hidden_states": tokens, "img_ids": img_ids, "joint_attention_kwargs": kwargs}
    if view == "visible":
        return inputs | {"timestep": torch.zeros_like(inputs["timestep"])}
    prompt, txt_ids = inputs["encoder_hidden_states"], inputs["txt_ids"]
    return inputs | {"encoder_hidden_states": prompt[:, :0], "txt_ids": txt_ids[:0]}


def forget_visible(transformer: Any) -> None:
    r"""Drops the keys and values that a pass of the visible view has kept."""
    for attn in _attentions_of(transformer).values():
        attn.processor.kept = ()


def causal_forward(
    transformer: Any,
    hidden_states: torch.Tensor,
    columns: int,
    img_ids: torch.Tensor,
    visible_gradients: bool = True,
    **inputs,
) -> tuple[torch.Tensor]:
    r"""
    A forward pass in which prompt and visible view depend on nothing that changes from one denoising step to the next.

    They attend to each other at t = 0, without noise if `show_condition` came before. The target attends to itself and to
    them, as with an attention mask over the whole diptych and a timestep for each token. OminiControl2
    (https://huggingface.co/papers/2503.08280) treats a condition in the same way.

    With gradients, both passes are one call of the transformer, as twice the samples with half of the image tokens. So the
    second one also computes a prompt, which nothing sees.

    Args:
        transformer (`FluxTransformer2DModel`):
            A transformer after `use_causal_attention`.
        hidden_states (`torch.Tensor` of shape `(batch, tokens, 384)`):
            The transformer's input for the diptych.
        columns (`int`):
            Columns of a panel, in tokens.
        img_ids (`torch.Tensor` of shape `(tokens, 3)`), inputs (*optional*):
            As in the transformer's `forward`.
        visible_gradients (`bool`, defaults to `True`):
            Whether gradients go through the pass of the visible view. Otherwise it is a call of its own, and what it keeps
            lives until the next one, or until `forget_visible`.

    Returns:
        `tuple[torch.Tensor]`: The velocity `(batch, tokens, 64)`, which is 0 for the visible view.
    """
    views, ids = split_panels(hidden_states, columns), split_panels(img_ids, columns, dim=0)
    if visible_gradients:
        batched = ("encoder_hidden_states", "pooled_projections", "guidance")
        t = inputs.pop("timestep")
        inputs |= {name: torch.cat((inputs[name],) * 2) for name in batched if inputs.get(name) is not None}
        inputs |= {"timestep": torch.cat((torch.zeros_like(t), t)), "joint_attention_kwargs": {"view": "both"}}
        out = transformer(hidden_states=torch.cat(views), img_ids=torch.cat(ids), **inputs)[0].chunk(2)[1]
    else:
        with torch.no_grad():
            transformer(**inputs_of_pass("visible", views[0], ids[0], inputs))
        out = transformer(**inputs_of_pass("target", views[1], ids[1], inputs))[0]
    return (join_panels(torch.zeros_like(out), out, columns),)


@contextlib.contextmanager
def causal_painting(transformer: Any, columns: int, enhance: Callable | None = None) -> Iterator[None]:
    r"""
    While the context lasts, this thread's calls of the transformer give what `causal_forward` gives for `show_condition`.
    Prompt and visible view are computed in the first of them. Their keys and values live as long as the context.

    Args:
        transformer (`FluxTransformer2DModel`):
            The transformer, or what compiled it.
        columns (`int`):
            Columns of a panel, in tokens.
        enhance (`Callable`, *optional*):
            A forward pre-hook with keyword arguments that works on the whole diptych.
    """
    stock = {attn: attn.processor for attn in _attentions_of(transformer).values()}
    thread, moved = threading.get_ident(), []

    def before(transformer, args, kwargs):
        if threading.get_ident() != thread or "view" in (kwargs.get("joint_attention_kwargs") or {}):
            # A call of somebody else, or the one below.
            return None
        noisy, is_first = kwargs["hidden_states"], not moved
        kwargs["hidden_states"] = shown = show_condition(noisy, columns)
        # The visible view leaves its noise behind as the target does, and ends as it is shown.
        moved[:] = [(noisy - shown)[..., : noisy.shape[-1] // 6] / kwargs["timestep"][:, None, None]]
        if enhance is not None:
            args, kwargs = enhance(transformer, args, kwargs)
        views = split_panels(kwargs["hidden_states"], columns)
        ids = split_panels(kwargs["img_ids"], columns, dim=0)
        if is_first:
            # A cache of steps would compare the views with each other.
            with transformer.cache_context("visible"):
                transformer(**inputs_of_pass("visible", views[0], ids[0], kwargs))
            stack.enter_context(transformer.cache_context("cond"))
        return args, inputs_of_pass("target", views[1], ids[1], kwargs)

    def after(transformer, args, kwargs, output):
        if (kwargs.get("joint_attention_kwargs") or {}).get("view") != "target":
            return None
        return (join_panels(torch.zeros_like(output[0]), output[0], columns) + moved[0],)

    def restore():
        forget_visible(transformer)
        for attn, processor in stock.items():
            attn.set_processor(processor)

    with _PAINTING, contextlib.ExitStack() as stack:
        use_causal_attention(transformer)
        stack.callback(restore)
        # Before the hook with which FSDP2 gathers weights, because the first call above ends with shards.
        stack.enter_context(transformer.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        stack.enter_context(transformer.register_forward_hook(after, with_kwargs=True))
        yield


# -- Attention maps ---------------------------------------------------------------------------------------------------

# The colors of a heat map from 0 to 1, with linear interpolation between them.
HEAT_COLORS = np.array([[0, 0, 0], [150, 20, 90], [245, 110, 30], [255, 250, 200]], np.float32)


@dataclass
class SemanticAttentionOutput(BaseOutput):
    r"""
    The result of [`FluxFillSemanticPipeline.semantic_attention_maps`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The painted pictures.
        maps (`np.ndarray` of shape `(pictures, steps, points, rows, columns)` and dtype `float32`):
            How much each point looks at each place of the semantic map, on a grid of 16x16-pixel tokens. Every heat
            map sums to one. Without `average_heads` the shape is `(pictures, steps, points, heads, rows, columns)`.
        points (`list[tuple[float, float]]`):
            The points, (x, y) in pixels of one view.
        steps (`list[int]`):
            The denoising steps, counted from 0.
        size (`tuple[int, int]`):
            Width and height of one view in pixels.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    maps: np.ndarray
    points: list[tuple[float, float]]
    steps: list[int]
    size: tuple[int, int]

    def overlay(
        self,
        background: PIL.Image.Image,
        picture: int = 0,
        step: int = 0,
        point: int = 0,
        opacity: float = 0.6,
    ) -> PIL.Image.Image:
        r"""
        Draws one heat map over a picture, brightest at its largest weight, with a ring around its point.

        Args:
            background (`PIL.Image.Image`):
                The semantic map, or any view of the same scene.
            picture, step, point (`int`, default to 0):
                Indices into `maps`. Heads are averaged.
            opacity (`float`, defaults to 0.6):
                Opacity of the heat map, in [0, 1].

        Returns:
            `PIL.Image.Image`: An RGB picture of the size of `background`.

        Raises:
            `ValueError`: `opacity` is out of range.
            `IndexError`: An index does not exist.
        """
        if not 0 <= opacity <= 1:
            raise ValueError(f"`opacity` has to be within [0, 1] but is {opacity}.")
        heat = self.maps[picture, step, point]
        heat = heat.reshape(-1, *heat.shape[-2:]).mean(axis=0)
        levels = heat / heat.max() * (len(HEAT_COLORS) - 1)
        colors = np.stack([np.interp(levels, range(len(HEAT_COLORS)), channel) for channel in HEAT_COLORS.T], -1)
        colors = PIL.Image.fromarray(colors.round().astype(np.uint8))
        colors = colors.resize(background.size, PIL.Image.Resampling.NEAREST)
        blended = PIL.Image.blend(background.convert("RGB"), colors, opacity)
        x, y = (at * side / of for at, side, of in zip(self.points[point], background.size, self.size))
        radius, line = max(3, min(background.size) / 40), max(1, min(background.size) // 160)
        draw = PIL.ImageDraw.Draw(blended)
        for grow, color in ((line, "black"), (0, "white")):
            box = (x - radius - grow, y - radius - grow, x + radius + grow, y + radius + grow)
            draw.ellipse(box, outline=color, width=line)
        return blended

    def class_mass(
        self, semantic_image: PIL.Image.Image, palette: dict[tuple[int, int, int], str]
    ) -> dict[str, np.ndarray]:
        r"""
        Computes how much of the attention falls on each class of the semantic map.

        The weight of a token is shared evenly among its pixels.

        Args:
            semantic_image (`PIL.Image.Image`):
                The map that was passed to the call, with at least one pixel for each token.
            palette (`dict[tuple[int, int, int], str]`):
                The class name of each color of the map. Colors of the same name are one class. Colors without a name
                are counted as `"other"`.

        Returns:
            `dict[str, np.ndarray]`: An array of the shape `maps.shape[:-2]` for each name. The arrays sum to one over
            the names.

        Raises:
            `ValueError`: `semantic_image` has fewer pixels than tokens along a side.
        """
        pixels = np.asarray(semantic_image.convert("RGB"))
        (height, width), (rows, columns) = pixels.shape[:2], self.maps.shape[-2:]
        tokens = np.arange(height)[:, None] * rows // height * columns + np.arange(width) * columns // width
        area = np.bincount(tokens.ravel(), minlength=rows * columns)
        if not area.all():
            raise ValueError(
                f"`semantic_image` has to have at least one pixel for each of the {columns}x{rows} tokens but is"
                f" {width}x{height}."
            )
        flat_maps, mass, left = self.maps.reshape(*self.maps.shape[:-2], -1), {}, np.ones((height, width), bool)
        for color, name in palette.items():
            here = (pixels == np.array(color)).all(axis=-1)
            left &= ~here
            share = np.bincount(tokens[here], minlength=rows * columns) / area
            mass[name] = mass.get(name, 0) + flat_maps @ share
        if left.any():
            share = np.bincount(tokens[left], minlength=rows * columns) / area
            mass["other"] = mass.get("other", 0) + flat_maps @ share
        return mass


class AttentionRecorder:
    r"""Collects the heat maps of [`FluxFillSemanticPipeline.semantic_attention_maps`] while a call runs."""

    def __init__(
        self, pipeline, module, semantic_map: int, points, steps, layer: int, average_heads: bool, chunk_size: int
    ):
        self.pipeline, self.module, self.semantic_map = pipeline, module, semantic_map
        self.points = [(x, y) for x, y in points]
        self.steps: Any = steps if steps is None else list(steps)
        self.layer, self.average_heads, self.chunk_size = layer, average_heads, chunk_size
        self.size: Any = None
        self.calls, self.maps = 0, {}
        if not self.points or self.steps == []:
            raise ValueError(f"`points` and `steps` have to hold at least one but are {points!r} and {steps!r}.")

    def start(self, canvas) -> None:
        """Resolves points and steps, which needs the size of the view and the number of steps of the call."""
        patch, num_steps = self.pipeline.patch_size, self.pipeline.num_timesteps
        self.size = width, height = canvas.columns * patch, canvas.rows * patch
        for x, y in self.points:
            if not (0 <= x < width and 0 <= y < height):
                raise ValueError(f"`points` has to lie within the view's {width}x{height} but has {(x, y)}.")
        steps = range(num_steps) if self.steps is None else self.steps
        for step in steps:
            if not -num_steps <= step < num_steps:
                raise ValueError(f"`steps` has to be within [{-num_steps}, {num_steps - 1}] but has {step}.")
        self.steps = [step % num_steps for step in steps]
        self.tokens = [
            (int(y) // patch * canvas.panels + canvas.target) * canvas.columns + int(x) // patch
            for x, y in self.points
        ]

    def __call__(self, hidden_states, guides, canvas) -> None:
        """Records one step. The arguments are what the modules are about to see."""
        if self.calls == 0:
            self.start(canvas)
        if self.calls in self.steps:
            _, *arguments = next(guide for guide in guides if guide.module is self.module)
            _, part, _ = self.module.split_input(hidden_states)
            chunks = []
            how = (self.layer, self.tokens, self.chunk_size, self.semantic_map)
            for chunk in self.module.attention_maps(part, *arguments, *how):
                chunk = chunk.unflatten(-1, (canvas.rows, canvas.panels, canvas.columns)).sum(dim=-2).transpose(1, 2)
                chunks.append((chunk.mean(dim=2) if self.average_heads else chunk).cpu())
            self.maps[self.calls] = torch.cat(chunks, dim=1).numpy()
        self.calls += 1

    def output(self, images) -> SemanticAttentionOutput:
        # A call that was interrupted has fewer steps.
        steps = [step for step in self.steps if step in self.maps]
        if not steps:
            raise ValueError(f"The call was interrupted before the first of the steps {self.steps}.")
        maps = np.stack([self.maps[step] for step in steps], axis=1)
        return SemanticAttentionOutput(images=images, maps=maps, points=self.points, steps=steps, size=self.size)
