#!/usr/bin/env python
# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Trains a LoRA on FLUX.1 Fill and a cross-attention over a semantic map together, from triptychs.

A triptych shows three pixel-aligned views of a scene: visible | target | semantic. One batch goes its way through
`read` -> `encode` -> `noise` -> `attend` and `predict` (`SemanticFillModel`) -> `compare`.
"""

import argparse
import ast
import contextlib
import copy
import functools
import gc
import hashlib
import io
import json
import logging
import math
import os
import random
import shlex
import shutil
import signal
import time
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import filelock
import numpy as np
import peft
import PIL.Image
import PIL.ImageOps
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator, cpu_offload
from accelerate.logging import get_logger
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, broadcast_object_list, set_seed
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from diffusers.training_utils import (
    _collate_lora_metadata,
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    free_memory,
)
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME, convert_unet_state_dict_to_peft, make_image_grid
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelCard, ModelCardData, create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from tqdm.auto import tqdm

from base_precision import LORA_LAYERS, PRECISIONS, FrozenLinearConfig
from pipeline_flux_fill_semantic import (
    SEMANTIC_MODES,
    SEMANTIC_SUBFOLDER,
    FluxFillSemanticPipeline,
    lay_under_panels,
    panel_positions,
    refuse_deep,
    to_rgb,
)
from semantic_attention import SEMANTIC_INJECTIONS, SEMANTIC_POSITIONS, SemanticAttentionModel
from training_engines import DDP_OPTIONS, Engine, find_engine
from training_speed import CHECKPOINTING, CUDNN, choose_plan, compiler_options, device_memory, memory_advice


if TYPE_CHECKING:
    import datasets

logger = get_logger(__name__)

PANELS = ("visible", "target", "semantic")
CHECKPOINT_PREFIX = "checkpoint"
# Where a pushed checkpoint lies in its repository, whatever its step.
HUB_CHECKPOINT = "last-checkpoint"
FLUX_LICENSE = "flux-1-dev-non-commercial-license"
FLUX_LICENSE_LINK = "https://huggingface.co/black-forest-labs/FLUX.1-Fill-dev/blob/main/LICENSE.md"
GO_ON = "Earlier checkpoints are whole: go on with --resume_from_checkpoint latest."
# Where the weights of LoRA and module stand in `SemanticFillModel`.
PARTS = ("transformer.", "semantic_attention.")
# Attention and feed-forward of both kinds of blocks, as in the diffusers FLUX LoRA examples; the transformer's last layer
# is called `proj_out` too.
LORA_TARGETS = [
    "attn.to_k",
    "attn.to_q",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
]
# The other one takes rules that no option states.
LR_SCHEDULERS = [s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT]


# -- Arguments --------------------------------------------------------------------------------------------------------


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What `load_rows` and `TriptychDataset` are told, in training and in evaluation."""
    add = parser.add_argument
    add("--dataset_name", help="Data set on the Hub, or a folder of parquet or webdataset files.")
    add("--dataset_config_name", help="Configuration of the Hub data set.")
    add("--train_data_dir", help="Local folder with pictures and a `metadata.jsonl`.")
    add("--image_column", default="image", help="Column of the triptych (visible | target | semantic).")
    add("--visible_column", help="Column of the visible view, where the views are three pictures.")
    add("--target_column", help="Column of the target view.")
    add("--semantic_column", help="Column of the semantic map.")
    add("--caption_column", help="Column of the captions. Default: `text` where the data has it.")
    add("--instance_prompt", help="One prompt for all samples without a caption.")
    add("--max_train_samples", type=int, help="Use the first so many rows only.")
    add("--resolution", type=int, default=512, help="Height of a panel in pixels, and its width unless --width.")
    add("--width", type=int, help="Width of a panel in pixels, where it is not the resolution.")


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    boolean = argparse.BooleanOptionalAction

    # Model
    add("--pretrained_model_name_or_path", required=True, help="FLUX.1 Fill: a folder or a Hub repository.")
    add("--revision", help="Revision of the model on the Hub.")
    add("--variant", help="Variant of the model's files, e.g. fp16.")
    add("--cache_dir", help="Where downloaded models and data sets are kept.")

    add_data_arguments(parser)
    add(
        "--max_sequence_length",
        type=lambda value: value if value == "auto" else int(value),
        help="T5 tokens of a prompt. `auto`: as the longest in the data. Default: 512, or auto with --fast.",
    )

    # Geometry
    add("--random_flip", action="store_true", help="Mirror all three views together, half of the time.")

    # Semantic guidance
    add("--semantic_mode", default="cross_attention", choices=list(SEMANTIC_MODES), help="How the map enters.")
    add("--fusion_alpha", type=float, default=0.5, help="Share of the map in the blend of pixel_fusion.")
    add("--semantic_num_layers", type=int, default=1)
    add("--semantic_num_heads", type=int, default=8)
    add("--semantic_head_dim", type=int, default=16)
    add(
        "--semantic_position", default="none", choices=SEMANTIC_POSITIONS, help="How the cross-attention finds places."
    )
    add(
        "--semantic_injection",
        default="noise",
        choices=tuple(SEMANTIC_INJECTIONS),
        help="What looks the map up: the noisy latents, or the condition's picture channels.",
    )
    add("--semantic_dropout", type=float, default=0.0, help="Share of samples trained without their map.")
    add("--semantic_weights", help="Trained module to start from: a trained folder or Hub repository.")

    # LoRA
    add("--rank", type=int, default=16, help="Rank of the LoRA.")
    add("--lora_alpha", type=int, help="Default: the rank.")
    add("--lora_dropout", type=float, default=0.0)
    add(
        "--lora_layers",
        help="Comma-separated module names. Default: attention and feed-forward of all blocks, last layer.",
    )
    add(
        "--fused_lora",
        action=boolean,
        default=True,
        help="LoRA products in the base's dtype, and with --compile one for all layers that read the same input."
        " --no-fused_lora: PEFT's own layers.",
    )
    add("--lora_weights", help="Trained LoRA to start from: a folder or Hub repository.")

    # Objective
    add("--guidance_scale", type=float, default=1.0, help="Fed to the guidance embedding while training.")
    add(
        "--weighting_scheme",
        default="logit_normal",
        choices=["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"],
        help="Distribution of timesteps (logit_normal, mode) or weight of the loss (sigma_sqrt, cosmap).",
    )
    add("--logit_mean", type=float, default=0.0)
    add("--logit_std", type=float, default=1.0)
    add("--mode_scale", type=float, default=1.29)
    add(
        "--timestep_shift",
        default="resolution",
        help="`resolution`: as inference shifts at this size. `none`, or a factor such as 3.0.",
    )
    add("--loss_region", default="diptych", choices=["diptych", "target"], help="Where the loss is taken.")
    add("--caption_dropout", type=float, default=0.0, help="Share of samples trained with an empty prompt.")

    # Loop
    add("--output_dir", default="semantic-fill-lora")
    add("--seed", type=int, default=0, help="Every draw is a function of it and of the sample's place in the run.")
    add("--train_batch_size", type=int, default=4, help="Samples a process and micro-step.")
    add("--num_train_epochs", type=int, default=1)
    add("--max_train_steps", type=int, help="Optimizer steps; overrides --num_train_epochs.")
    add("--gradient_accumulation_steps", type=int, default=1)
    add(
        "--checkpointing",
        choices=list(CHECKPOINTING),
        help="What backward computes again: nothing (default), all but matrix products and attention, or all; offload"
        " is full with the blocks' inputs kept in the CPU's memory.",
    )
    add("--gradient_checkpointing", action="store_true", help="The same as --checkpointing full.")
    add("--dataloader_num_workers", type=int, default=0)
    add("--max_bad_steps", type=int, default=10, help="Stop after so many steps in a row without finite gradients.")

    # Optimizer and schedule
    add("--optimizer", default="adamw", choices=["adamw", "prodigy"])
    add("--use_8bit_adam", action="store_true", help="AdamW of bitsandbytes, with 8-bit states.")
    add("--learning_rate", type=float, default=1e-4, help="Rate of the LoRA.")
    add("--semantic_learning_rate", type=float, help="Rate of the module. Default: --learning_rate.")
    add(
        "--semantic_scale_learning_rate",
        type=float,
        help="Rate of the module's gates, which start at zero. Default: ten times --semantic_learning_rate.",
    )
    add("--prodigy_use_bias_correction", action=boolean, default=True)
    add("--prodigy_safeguard_warmup", action=boolean, default=True)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-4)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS)
    add("--lr_warmup_steps", type=int, default=0)
    add("--lr_num_cycles", type=int, default=1)
    add("--lr_power", type=float, default=1.0)

    # Precision and speed
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: accelerate's configuration.")
    add("--allow_tf32", action="store_true")
    add("--compile", action=boolean, help="Compile the transformer's repeated blocks. Default: no.")
    add(
        "--base_precision",
        choices=list(PRECISIONS),
        help="Of the frozen blocks. Default: bf16, which is the dtype of --mixed_precision; nf4 needs bitsandbytes.",
    )
    add(
        "--attention_backend",
        choices=[backend.value for backend in AttentionBackendName],
        help="As in diffusers' `set_attention_backend`. Default: native, or with --fast cuDNN's where its backward works.",
    )
    add(
        "--fast",
        action="store_true",
        help="Choose --base_precision, --checkpointing, --compile and --attention_backend by the GPU and its free memory,"
        " and prompts as long as the data's longest. What is passed beside it stays.",
    )
    add("--cache_latents", action=boolean, default=True, help="Encode pictures and prompts once, before training.")
    add("--cache_root", help="Where encodings are kept. Default: OUTPUT_DIR/cache.")

    # Checkpoints, validation, trackers, Hub
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help="`latest`, the path of a checkpoint, or a Hub repository one was pushed to.")
    add(
        "--validation_steps",
        type=int,
        help="Paint validation samples every so many steps, and at the end. With --push_to_hub the latter in any case.",
    )
    add("--num_validation_images", type=int, default=4, help="Training rows painted, from the first on.")
    add("--validation_inference_steps", type=int, default=28)
    add("--validation_guidance_scale", type=float, default=30.0)
    add("--logging_dir", default="logs")
    add("--log_level", default="info", choices=["debug", "info", "warning", "error"])
    add("--report_to", default="tensorboard", help="tensorboard, wandb, all or none.")
    add("--push_to_hub", action="store_true", help="With the token of `hf auth login` or HF_TOKEN.")
    add("--hub_model_id", help="Default: the name of --output_dir.")
    add("--hub_private_repo", action="store_true")
    add(
        "--hub_strategy",
        default="end",
        choices=["end", "every_checkpoint"],
        help=f"What is pushed: the result, or each checkpoint as `{HUB_CHECKPOINT}/` as well.",
    )
    # Known only to be refused: an unknown argument would be printed with its value.
    add("--hub_token", "--token", "--hf_token", "--use_auth_token", help=argparse.SUPPRESS)

    args = parser.parse_args(input_args)
    # A second time without defaults, which tells what was passed from what was not.
    unset = object()
    untold = argparse.Namespace(**dict.fromkeys(vars(args), unset))
    passed = {name for name, value in vars(parser.parse_args(input_args, untold)).items() if value is not unset}
    try:
        check_args(args, passed)
    except ValueError as error:
        parser.error(str(error))
    return args


@dataclass(frozen=True)
class Contradiction:
    """An option that was passed, what it cannot go with, when the latter is so, and why."""

    option: str
    other: str
    holds: Callable[[argparse.Namespace], bool]
    why: str

    def __str__(self):
        other = self.other if self.other.startswith("without ") else f"with {self.other}"
        return f"--{self.option} cannot go {other}: {self.why}."


def _attends(args: argparse.Namespace) -> bool:
    return SEMANTIC_MODES[args.semantic_mode].attends


HEAD_OPTIONS = ("semantic_num_heads", "semantic_head_dim")
MODULE_OPTIONS = [f"semantic_{name}" for name in ("num_layers", "num_heads", "head_dim", "position", "injection")]
CONTRADICTIONS = [
    Contradiction(
        "revision",
        "a local --pretrained_model_name_or_path",
        lambda a: os.path.isdir(a.pretrained_model_name_or_path),
        "a folder has no revisions",
    ),
    Contradiction(
        "dataset_config_name",
        "--train_data_dir",
        lambda a: a.train_data_dir is not None,
        "a folder has no configurations",
    ),
    Contradiction(
        "dataset_config_name",
        "a local --dataset_name",
        lambda a: a.dataset_name is not None and os.path.isdir(a.dataset_name),
        "a folder has no configurations",
    ),
    Contradiction(
        "image_column",
        "--visible_column",
        lambda a: a.visible_column is not None,
        "the views are either one picture or three",
    ),
    Contradiction(
        "fusion_alpha",
        "a --semantic_mode other than pixel_fusion",
        lambda a: not SEMANTIC_MODES[a.semantic_mode].fuses,
        "nothing is blended",
    ),
    *(
        Contradiction(
            name,
            "a --semantic_mode other than cross_attention",
            lambda a: not _attends(a),
            "there is no module",
        )
        for name in (*MODULE_OPTIONS, "semantic_weights", "semantic_learning_rate", "semantic_scale_learning_rate")
    ),
    Contradiction(
        "semantic_dropout", "--semantic_mode none", lambda a: a.semantic_mode == "none", "there is no map to drop"
    ),
    *(
        Contradiction(
            name, "--semantic_weights", lambda a: a.semantic_weights is not None, "the module there has its own"
        )
        for name in MODULE_OPTIONS
    ),
    Contradiction(
        "semantic_head_dim",
        "--semantic_position rope",
        lambda a: a.semantic_position == "rope" and a.semantic_head_dim % 4 != 0,
        "half of a head is for rows and half for columns, so it has to be a multiple of 4",
    ),
    *(
        Contradiction(
            name,
            "--resume_from_checkpoint",
            lambda a: a.resume_from_checkpoint is not None,
            "a checkpoint already holds weights",
        )
        for name in ("lora_weights", "semantic_weights")
    ),
    *(
        Contradiction(
            name,
            f"a --weighting_scheme other than {scheme}",
            lambda a, scheme=scheme: a.weighting_scheme != scheme,
            "its distribution is not drawn from",
        )
        for name, scheme in (("logit_mean", "logit_normal"), ("logit_std", "logit_normal"), ("mode_scale", "mode"))
    ),
    Contradiction(
        "num_train_epochs",
        "--max_train_steps",
        lambda a: a.max_train_steps is not None,
        "both say how long the run is",
    ),
    Contradiction(
        "gradient_checkpointing",
        "a --checkpointing other than full",
        lambda a: a.checkpointing not in (None, "full"),
        "it means full",
    ),
    Contradiction(
        "base_precision",
        "a --mixed_precision other than bf16",
        lambda a: a.base_precision == "fp8x2" and a.mixed_precision in ("no", "fp16"),
        "the second copy of fp8x2 is for products that take bf16; fp8 is half as large",
    ),
    Contradiction("use_8bit_adam", "--optimizer prodigy", lambda a: a.optimizer != "adamw", "it is an AdamW"),
    *(
        Contradiction(name, "--optimizer adamw", lambda a: a.optimizer != "prodigy", "it is Prodigy's")
        for name in ("prodigy_use_bias_correction", "prodigy_safeguard_warmup")
    ),
    *(
        Contradiction(
            name,
            "--optimizer prodigy",
            lambda a, name=name: a.optimizer == "prodigy" and getattr(a, name) != a.learning_rate,
            "it takes one learning rate for all weights",
        )
        for name in ("semantic_learning_rate", "semantic_scale_learning_rate")
    ),
    Contradiction(
        "lr_warmup_steps",
        "--lr_scheduler constant",
        lambda a: a.lr_scheduler == "constant" and a.lr_warmup_steps > 0,
        "constant_with_warmup warms up",
    ),
    Contradiction(
        "lr_warmup_steps",
        "a --max_train_steps that is not larger",
        lambda a: a.max_train_steps is not None and a.lr_warmup_steps >= a.max_train_steps,
        "the run would end before it is warm",
    ),
    *(
        Contradiction(
            name,
            f"a --lr_scheduler other than {scheduler}",
            lambda a, scheduler=scheduler: a.lr_scheduler != scheduler,
            "no other takes it",
        )
        for name, scheduler in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial"))
    ),
    *(
        Contradiction(
            name,
            "--semantic_position direct",
            lambda a: a.semantic_position == "direct",
            "there are no heads where nothing is attended to",
        )
        for name in HEAD_OPTIONS
    ),
    Contradiction("cache_root", "--no-cache_latents", lambda a: not a.cache_latents, "nothing is kept"),
    *(
        Contradiction(
            name,
            "without --validation_steps or --push_to_hub",
            lambda a: a.validation_steps is None and not a.push_to_hub,
            "nothing would be painted",
        )
        for name in ("num_validation_images", "validation_inference_steps", "validation_guidance_scale")
    ),
    *(
        Contradiction(name, "without --push_to_hub", lambda a: not a.push_to_hub, "nothing would be pushed")
        for name in ("hub_strategy", "hub_private_repo")
    ),
    Contradiction(
        "hub_strategy",
        "a --checkpointing_steps above --max_train_steps",
        lambda a: a.hub_strategy != "end" and a.checkpointing_steps > (a.max_train_steps or math.inf),
        "there would be no checkpoint to push",
    ),
    Contradiction("logging_dir", "--report_to none", lambda a: a.report_to == "none", "nothing is logged there"),
]


def check_data_args(args: argparse.Namespace) -> None:
    args.width = args.resolution if args.width is None else args.width
    for name, size in (("--resolution", args.resolution), ("--width", args.width)):
        if size <= 0 or size % 16:
            raise ValueError(f"{name} has to be a positive multiple of 16 but is {size}.")
    if (args.dataset_name is None) == (args.train_data_dir is None):
        raise ValueError("Pass exactly one of --dataset_name and --train_data_dir.")
    views = [args.visible_column, args.target_column, args.semantic_column]
    if any(views) and not all(views):
        raise ValueError("--visible_column, --target_column and --semantic_column have to be passed together.")
    if args.target_column and args.target_column in (args.visible_column, args.semantic_column):
        raise ValueError(f"--target_column {args.target_column} is what is to be painted and cannot be shown as well.")
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise ValueError(f"--max_train_samples has to be at least 1 but is {args.max_train_samples}.")


def check_args(args: argparse.Namespace, passed: set[str]) -> None:
    """
    Refuses what contradicts, before anything is loaded, and fills in the defaults that follow from other options.

    Args:
        args (`argparse.Namespace`):
            All options.
        passed (`set[str]`):
            Those of them that were passed.

    Raises:
        `ValueError`: with the option's name, what came and what is accepted.
    """
    if args.hub_token is not None:
        raise ValueError(
            "--hub_token is not taken, by any name, as command lines are seen by others: log in with `hf auth login` or"
            " set HF_TOKEN."
        )
    del args.hub_token
    for contradiction in CONTRADICTIONS:
        if contradiction.option in passed and contradiction.holds(args):
            raise ValueError(str(contradiction))
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} has to be a finite number but is {value}.")
        if isinstance(value, (int, float)) and value < 0 and name != "logit_mean":
            raise ValueError(f"--{name} has to be at least 0 but is {value}.")
    for name in ("adam_beta1", "adam_beta2"):
        if getattr(args, name) >= 1:
            raise ValueError(f"--{name} has to be below 1 but is {getattr(args, name)}.")
    for name in ("adam_epsilon", "max_grad_norm", "logit_std"):
        if getattr(args, name) == 0:
            raise ValueError(f"--{name} has to be above 0 but is 0.")
    if args.mode_scale > 2 / (math.pi - 2):
        # Beyond it the density of https://huggingface.co/papers/2403.03206 is none, and timesteps leave (0, 1).
        raise ValueError(f"--mode_scale has to be within [0, 2 / (pi - 2) = 1.75] but is {args.mode_scale}.")
    if args.seed >= 2**32:
        raise ValueError(f"--seed has to be below 2 ** 32 but is {args.seed}.")
    check_data_args(args)
    if args.validation_steps is not None and args.train_data_dir is not None and Path(args.train_data_dir).is_dir():
        listed = any(Path(args.train_data_dir, f"metadata.{form}").is_file() for form in ("jsonl", "csv", "parquet"))
        if not listed and Path(args.output_dir).resolve().is_relative_to(Path(args.train_data_dir).resolve()):
            raise ValueError(
                f"--output_dir {args.output_dir} cannot lie in --train_data_dir {args.train_data_dir}: without a metadata"
                " file, a later run would take what this one paints for data."
            )
    for name in ("caption_dropout", "semantic_dropout", "lora_dropout", "fusion_alpha"):
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"--{name} has to be within [0, 1] but is {getattr(args, name)}.")
    for name in (
        "rank",
        "train_batch_size",
        "num_train_epochs",
        "gradient_accumulation_steps",
        "semantic_num_layers",
        "semantic_num_heads",
        "semantic_head_dim",
        "checkpointing_steps",
        "max_bad_steps",
        "num_validation_images",
        "validation_inference_steps",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} has to be at least 1 but is {getattr(args, name)}.")
    for name in ("max_train_steps", "checkpoints_total_limit", "validation_steps", "lora_alpha"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} has to be at least 1 but is {getattr(args, name)}.")
    if args.max_sequence_length is None:
        args.max_sequence_length = "auto" if args.fast else 512
    if args.max_sequence_length != "auto" and not 1 <= args.max_sequence_length <= 512:
        raise ValueError(
            f"--max_sequence_length has to be `auto` or within [1, 512] but is {args.max_sequence_length}."
        )
    if args.timestep_shift not in ("resolution", "none"):
        try:
            valid = float(args.timestep_shift) > 0 and math.isfinite(float(args.timestep_shift))
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(
                f"--timestep_shift has to be `resolution`, `none` or a positive number but is {args.timestep_shift!r}."
            )
    if args.gradient_checkpointing:
        args.checkpointing = "full"
    if not args.fast:
        args.base_precision = args.base_precision or "bf16"
        args.checkpointing = args.checkpointing or "none"
        args.attention_backend = args.attention_backend or "native"
    args.lora_alpha = args.lora_alpha or args.rank
    if args.semantic_learning_rate is None:
        args.semantic_learning_rate = args.learning_rate
    if args.semantic_scale_learning_rate is None:
        # Prodigy finds the step size itself and knows one rate only.
        factor = 1 if args.optimizer == "prodigy" else 10
        args.semantic_scale_learning_rate = factor * args.semantic_learning_rate


# -- Read -------------------------------------------------------------------------------------------------------------


def load_rows(args: argparse.Namespace, split: str = "train") -> "datasets.Dataset":
    """The rows of a split, with their pictures still undecoded."""
    # Only here: it is slow to import, and rows may come from elsewhere.
    import datasets

    datasets.utils.logging.set_verbosity_error()
    kwargs = {"split": split, "cache_dir": args.cache_dir}
    if args.train_data_dir is not None:
        try:
            rows = datasets.load_dataset("imagefolder", data_dir=args.train_data_dir, **kwargs)
        # A missing folder, a metadata file that is none, a name in it without its picture: each has its own error.
        except Exception as error:
            raise ValueError(
                f"--train_data_dir {args.train_data_dir} has to be a folder of pictures with a `metadata.jsonl`, but:"
                f" {error.__cause__ or error}"
            ) from error
    elif os.path.isdir(args.dataset_name):
        folder = Path(args.dataset_name)
        for builder, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar"), ("imagefolder", "metadata.jsonl")):
            files = sorted(str(path) for path in folder.rglob(pattern))
            if files:
                break
        else:
            raise ValueError(
                f"--dataset_name {args.dataset_name} has to hold *.parquet, *.tar (webdataset) or metadata.jsonl files"
                " but holds none."
            )
        source = {"data_dir": str(folder)} if builder == "imagefolder" else {"data_files": {"train": files}}
        try:
            rows = datasets.load_dataset(builder, **source, **kwargs)
        except Exception as error:
            raise ValueError(
                f"--dataset_name {folder} has to hold rows in {builder} files, but: {error.__cause__ or error}"
            ) from error
    else:
        try:
            rows = datasets.load_dataset(args.dataset_name, args.dataset_config_name, **kwargs)
        except Exception as error:
            raise ValueError(f"--dataset_name {args.dataset_name} cannot be loaded: {error}") from error
    if args.max_train_samples is not None:
        rows = rows.select(range(min(args.max_train_samples, len(rows))))
    if len(rows) == 0:
        raise ValueError("The data set has no rows.")

    columns = [args.visible_column, args.target_column, args.semantic_column]
    columns = columns if all(columns) else [args.image_column]
    if args.caption_column is None and "text" in rows.column_names:
        args.caption_column = "text"
    if args.caption_column is None and args.instance_prompt is None:
        raise ValueError(f"Pass --caption_column (one of {rows.column_names}) or --instance_prompt.")
    for column in filter(None, (*columns, args.caption_column)):
        if column not in rows.column_names:
            raise ValueError(f"Column `{column}` is not in the data set, which has {rows.column_names}.")
    for column in columns:
        try:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        # Arrow's errors are of many kinds.
        except Exception as error:
            raise ValueError(
                f"Column `{column}` has to hold pictures but holds {rows.features[column]}: {error}"
            ) from error
    return rows


def picture_bytes(cell: dict | None) -> bytes:
    if cell is None:
        raise ValueError("has no picture")
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def decode_picture(data: bytes) -> PIL.Image.Image:
    with warnings.catch_warnings():
        # A picture made to explode in memory is an error, not a warning.
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        picture = PIL.Image.open(io.BytesIO(data))
        refuse_deep(picture)
        # In place, which keeps what the file says of its frames.
        PIL.ImageOps.exif_transpose(picture, in_place=True)
        return to_rgb(picture)


def cut_triptych(pictures: list[PIL.Image.Image]) -> list[PIL.Image.Image]:
    """The visible, target and semantic view of one triptych, or of three pictures, all of one size."""
    if len(pictures) == 1:
        (triptych,) = pictures
        width, remainder = divmod(triptych.width, 3)
        if remainder or width == 0:
            raise ValueError(f"is {triptych.width} pixels wide, which does not part into three equal panels")
        pictures = [triptych.crop((i * width, 0, (i + 1) * width, triptych.height)) for i in range(3)]
    if len({picture.size for picture in pictures}) > 1:
        sizes = ", ".join(f"{name} {picture.width}x{picture.height}" for name, picture in zip(PANELS, pictures))
        raise ValueError(f"has views of different sizes ({sizes})")
    return pictures


class TriptychDataset(torch.utils.data.Dataset):
    """Rows as views `(3, height, width)` in [0, 1] and a caption. Decodes a row when it is asked for."""

    def __init__(self, rows: "datasets.Dataset", args: argparse.Namespace):
        self.rows = rows
        views = [args.visible_column, args.target_column, args.semantic_column]
        self.columns = views if all(views) else [args.image_column]
        self.caption_column, self.instance_prompt = args.caption_column, args.instance_prompt
        self.height, self.width = args.resolution, args.width
        self.check()

    def __len__(self) -> int:
        return len(self.rows)

    def data(self, index: int) -> list[bytes]:
        row = self.rows[index]
        return [picture_bytes(row[column]) for column in self.columns]

    def caption(self, index: int) -> str:
        caption = self.rows[index][self.caption_column] if self.caption_column else None
        caption = self.instance_prompt if caption is None else caption
        if not isinstance(caption, str) or not (caption.strip() or self.instance_prompt == ""):
            raise ValueError(f"has no caption in `{self.caption_column}` (found {caption!r})")
        return caption

    def views(self, index: int, flip: bool = False) -> dict[str, torch.Tensor]:
        pictures = cut_triptych([decode_picture(data) for data in self.data(index)])
        views = {}
        for name, picture in zip(PANELS, pictures):
            if picture.size != (self.width, self.height):
                # Labels must not be blended.
                resample = PIL.Image.Resampling.NEAREST if name == "semantic" else PIL.Image.Resampling.LANCZOS
                picture = picture.resize((self.width, self.height), resample)
            picture = PIL.ImageOps.mirror(picture) if flip else picture
            views[name] = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return views

    def check(self) -> None:
        """Reads every row once, so that a bad one stops the run before anything is loaded on the accelerator."""
        problems = []
        for index in tqdm(range(len(self)), desc="Checking rows", disable=None, leave=False):
            try:
                cut_triptych([decode_picture(data) for data in self.data(index)])
                self.caption(index)
            # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error, DecompressionBomb...
            except Exception as error:
                problems.append(f"row {index}: {type(error).__name__}: {error}")
        if problems:
            listed = "\n  ".join(problems[:50])
            more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
            raise ValueError(f"{len(problems)} of {len(self)} rows cannot be used:\n  {listed}{more}")


# -- Encode -----------------------------------------------------------------------------------------------------------


def load_encoders(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> FluxFillSemanticPipeline:
    """The pipeline without its transformer: training encodes with the code that inference encodes with."""
    try:
        pipeline = FluxFillSemanticPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            transformer=None,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype=dtype,
            use_safetensors=True,
            semantic_mode=args.semantic_mode,
            fusion_alpha=args.fusion_alpha,
        )
    # transformers does not say which file.
    except safetensors.SafetensorError as error:
        source = Path(args.pretrained_model_name_or_path)
        damaged = ", ".join(str(path) for path in sorted(source.rglob("*.safetensors")) if not has_whole_head(path))
        raise ValueError(
            f"--pretrained_model_name_or_path {source} holds a damaged file ({damaged or 'of a text encoder'}): {error}"
        ) from error
    for component in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        component.requires_grad_(False).eval()
    # With a cache they come when it is filled.
    return pipeline if args.cache_latents else pipeline.to(device)


def bring_when_used(pipeline: FluxFillSemanticPipeline, device: torch.device) -> None:
    """
    Has hooks bring the encoders to the device as they are used, until `put_away`: whole in turns, or, where the device
    has no room for one of them, that one layer by layer. The encodings are the same.
    """
    names = ("text_encoder", "text_encoder_2", "vae")
    sizes = {name: parameter_bytes(getattr(pipeline, name)) for name in names}
    free, limit = device_memory(device)
    streamed = [name for name in names if sizes[name] > limit]
    if not streamed:
        # In turns: together they would need more than a quantised transformer does.
        pipeline.enable_model_cpu_offload(device=device)
        return
    for name in streamed:
        logger.info(
            f"The pipeline's {name} is streamed through {device} layer by layer, which is slower: it has"
            f" {sizes[name] / 2**30:.1f} GiB, and of {free / 2**30:.1f} GiB that are free, room for"
            f" {max(0, limit) / 2**30:.1f} GiB"
        )
    # As `enable_model_cpu_offload` starts, too: hooks bring weights back to where they found them.
    pipeline.remove_all_hooks()
    pipeline.to("cpu", silence_dtype_warnings=True)
    # Accelerate's hooks, which `remove_all_hooks` knows, on these alone: they cost the VAE, which is small, much time.
    for name in names:
        if name in streamed:
            cpu_offload(getattr(pipeline, name), device)
        else:
            getattr(pipeline, name).to(device)


def put_away(pipeline: FluxFillSemanticPipeline) -> None:
    """Once all is encoded: the text encoders are gone, and the VAE waits on the CPU for paintings."""
    pipeline.remove_all_hooks()
    pipeline.vae.to("cpu")
    pipeline.text_encoder = pipeline.text_encoder_2 = None


def parameter_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def has_whole_head(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, framework="pt"):
            return True
    except (safetensors.SafetensorError, OSError):
        return False


def longest_prompt(tokenizer: transformers.PreTrainedTokenizerBase, dataset: TriptychDataset) -> int:
    """T5 tokens of the longest caption, up to a multiple of 16, which kernels like, and to the 512 that FLUX knows."""
    captions = {dataset.caption(index) for index in range(len(dataset))}
    longest = max(len(tokenizer(caption, truncation=True, max_length=512).input_ids) for caption in captions)
    return min(512, -(-longest // 16) * 16)


def fingerprint(model: torch.nn.Module) -> str:
    """Tells two frozen models apart without reading all of their gigabytes: names, shapes and first values."""
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        first = parameter.flatten()[:64].to(device="cpu", dtype=torch.float64)
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}{first.tolist()}".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Draws:
    """What chance decides for one sample before it is read. `position` counts the samples of the whole run."""

    position: int
    index: int
    flip: bool
    drop_caption: bool
    drop_map: bool


def seed_of(*parts) -> int:
    """A 63-bit seed made of its parts, independent for every different tuple of them."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def count_image_tokens(pipeline: FluxFillSemanticPipeline, args: argparse.Namespace) -> int:
    """Of the whole canvas."""
    patch, panels = pipeline._patch_size, len(SEMANTIC_MODES[args.semantic_mode].panels)
    return panels * (args.resolution // patch) * (args.width // patch)


class Encoder:
    """Encodes samples, and with a cache keeps each encoding in a file of its own, named by all that it depends on."""

    def __init__(self, pipeline: FluxFillSemanticPipeline, dataset: TriptychDataset, args: argparse.Namespace):
        self.pipeline, self.dataset, self.args = pipeline, dataset, args
        self.mode = SEMANTIC_MODES[args.semantic_mode]
        self.folder = Path(args.cache_root or Path(args.output_dir, "cache"))
        # Pixels along a token's side: 16 with FLUX's own VAE.
        self.patch = pipeline._patch_size
        for name, size in (("--resolution", args.resolution), ("--width", args.width)):
            if size % self.patch:
                raise ValueError(f"{name} has to be a multiple of {self.patch} with this VAE but is {size}.")
        # The mask depends on the geometry alone.
        self.mask = pipeline.prepare_diptych(torch.zeros(1, 3, args.resolution, args.width))[1]
        self.picture_hashes = {}
        if args.cache_latents:
            vae = pipeline.vae
            # Moments are as the VAE gives them, but the map's tokens are scaled already.
            scaling = (vae.config.shift_factor, vae.config.scaling_factor)
            self.latent_key = (fingerprint(vae), *scaling, args.resolution, args.width, self.mode, args.fusion_alpha)
            text_encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
            vocabularies = [sorted(t.get_vocab().items()) for t in (pipeline.tokenizer, pipeline.tokenizer_2)]
            words = hashlib.sha256(repr(vocabularies).encode()).hexdigest()
            self.prompt_key = (*map(fingerprint, text_encoders), words, args.max_sequence_length)

    @property
    def image_tokens(self) -> int:
        return count_image_tokens(self.pipeline, self.args)

    # What is encoded

    @torch.no_grad()
    def encode_views(self, views: dict[str, torch.Tensor], drop_map: bool = False) -> dict[str, torch.Tensor]:
        """Batched views -> VAE posteriors of the diptych and the masked diptych, and one panel of semantic tokens."""
        on_canvas = views["semantic"] if self.mode.map_on_canvas and not drop_map else None
        diptych, mask = self.pipeline.prepare_diptych(views["visible"], views["target"], on_canvas)
        moments, masked_moments = self.pipeline.encode_moments(diptych, mask)
        encoded = {"moments": moments, "masked_moments": masked_moments}
        if self.mode.attends:
            encoded["semantic"] = self.pipeline.encode_semantic(views["semantic"])
        return encoded

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
            prompts, prompts, max_sequence_length=self.args.max_sequence_length
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    # Where it is kept

    def _file(self, *key) -> Path:
        return self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.safetensors"

    def latent_file(self, index: int, flip: bool, drop_map: bool) -> Path:
        # Once a run: steps find their file without reading the pictures again.
        if index not in self.picture_hashes:
            self.picture_hashes[index] = [hashlib.sha256(data).hexdigest() for data in self.dataset.data(index)]
        return self._file(*self.picture_hashes[index], self.latent_key, flip, drop_map and self.mode.map_on_canvas)

    def prompt_file(self, prompt: str) -> Path:
        return self._file(prompt, self.prompt_key)

    def fill_cache(self, accelerator: Accelerator) -> None:
        """Encodes what no earlier run did, shared out over the processes."""
        args = self.args
        flips = (False, True) if args.random_flip else (False,)
        drops = (False, True) if args.semantic_dropout and self.mode.map_on_canvas else (False,)
        # All prompts first: text encoders and VAE take turns on the device once. One picture or prompt at a time: that
        # needs least memory, and no encoding depends on what was encoded with it.
        prompts = {self.dataset.caption(index) for index in range(len(self.dataset))} | {""}
        jobs = {self.prompt_file(p): functools.partial(self.encode_prompts, [p]) for p in sorted(prompts)}
        for index in range(len(self.dataset)):
            for flip in flips:
                for drop_map in drops:
                    jobs[self.latent_file(index, flip, drop_map)] = functools.partial(
                        self._encode_sample, index, flip, drop_map
                    )

        missing = [path for path in jobs if not is_whole(path)]
        logger.info(f"Encodings: {len(jobs) - len(missing)} found in {self.folder}, {len(missing)} to make")
        with explained_write_errors("--cache_root"):
            self.folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            remove_leftovers(self.folder)
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        # All ranks have to know what is missing before one of them makes it.
        accelerator.wait_for_everyone()
        if mine:
            bring_when_used(self.pipeline, accelerator.device)
        for path in tqdm(mine, desc="Encoding", disable=not accelerator.is_local_main_process):
            encoded = {name: tensor[0].contiguous().cpu() for name, tensor in jobs[path]().items()}
            save = functools.partial(safetensors.torch.save_file, encoded, metadata={"crc32": checksum(encoded)})
            with explained_write_errors("--cache_root", "What is encoded already is kept."):
                write_atomically(path, save)
        accelerator.wait_for_everyone()

    def _encode_sample(self, index: int, flip: bool, drop_map: bool) -> dict[str, torch.Tensor]:
        views = self.dataset.views(index, flip)
        return self.encode_views({name: view[None] for name, view in views.items()}, drop_map)

    def read(self, draws: Draws) -> dict[str, torch.Tensor]:
        """One sample, encoded if the run keeps a cache, as views and caption otherwise."""
        prompt = "" if draws.drop_caption else self.dataset.caption(draws.index)
        if not self.args.cache_latents:
            return {"draws": draws, "views": self.dataset.views(draws.index, draws.flip), "prompt": prompt}
        latents = read_encoding(self.latent_file(draws.index, draws.flip, draws.drop_map))
        return {"draws": draws, "encoded": latents | read_encoding(self.prompt_file(prompt))}

    def encode_batch(self, samples: list[dict], device: torch.device) -> dict[str, torch.Tensor]:
        """Read samples -> batched encodings on the device, from the cache or made now."""
        if self.args.cache_latents:
            names = samples[0]["encoded"]
            return {n: torch.stack([sample["encoded"][n] for sample in samples]).to(device) for n in names}
        encoded = []
        for sample in samples:
            views = {name: view[None] for name, view in sample["views"].items()}
            encoded.append(
                self.encode_views(views, sample["draws"].drop_map) | self.encode_prompts([sample["prompt"]])
            )
        return {name: torch.cat([e[name] for e in encoded]).to(device) for name in encoded[0]}


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), value)
    return str(value)


def read_encoding(path: Path) -> dict[str, torch.Tensor]:
    """
    What was written to the file.

    Raises:
        `ValueError`: where it is not there, or holds anything else.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            found = (file.metadata() or {}).get("crc32")
    except (safetensors.SafetensorError, OSError) as error:
        damage = f"{type(error).__name__}: {error}"
    else:
        if tensors and found == checksum(tensors):
            return tensors
        damage = "its content is not what was written"
    # The encoders are gone by the time that steps read.
    raise ValueError(
        f"The encoding {path} was damaged while the run was under way ({damage}). The next start makes it anew: go on"
        " with --resume_from_checkpoint latest."
    )


def is_whole(path: Path) -> bool:
    """Whether an encoding is there and holds what was written."""
    if not path.exists():
        return False
    try:
        read_encoding(path)
    except ValueError:
        logger.warning(f"{path} is damaged and made anew")
        return False
    return True


@contextlib.contextmanager
def explained_write_errors(option: str, kept: str = ""):
    """Says of a full disk or a read-only folder which option leads elsewhere, and what is not lost."""
    try:
        yield
    # Safetensors wraps the system's error in one of its own.
    except (OSError, safetensors.SafetensorError) as error:
        raise RuntimeError(
            f"Writing failed: {error}. Make room, or write elsewhere with {option}. {kept}".rstrip()
        ) from error


def flush_to_disk(path: Path) -> None:
    """A file's content, or a folder's names."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomically(path: Path, write) -> None:
    """Writes beside and renames: the file is there whole or not at all, also with two writers."""
    # Process numbers repeat across the machines that may share a cache.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(beside)
        flush_to_disk(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed runs left of `write_atomically`: files that nobody has written to for a day."""
    for path in folder.glob(".*.safetensors.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 24 * 60 * 60:
                path.unlink()


class RunSampler(torch.utils.data.Sampler):
    """
    This process's micro-batches of `Draws`, without end. Sample number p of the run is the same, with the same draws,
    however many processes, micro-batches and restarts the run is made of.
    """

    def __init__(self, num_rows: int, args: argparse.Namespace, process_index: int, num_processes: int, start: int):
        self.num_rows, self.args, self.start = num_rows, args, start
        self.process_index, self.num_processes = process_index, num_processes
        self.epoch, self.permutation = None, None

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.args.seed, "epoch", epoch))
            self.epoch, self.permutation = epoch, torch.randperm(self.num_rows, generator=generator).tolist()
        return self.permutation[place]

    def draws(self, position: int) -> Draws:
        chance = random.Random(seed_of(self.args.seed, "read", position))
        flip, drop_caption, drop_map = chance.random(), chance.random(), chance.random()
        return Draws(
            position=position,
            index=self._row(position),
            flip=self.args.random_flip and flip < 0.5,
            drop_caption=drop_caption < self.args.caption_dropout,
            drop_map=drop_map < self.args.semantic_dropout,
        )

    def __iter__(self):
        size = self.args.train_batch_size
        first = self.start + self.process_index * size
        while True:
            yield [self.draws(position) for position in range(first, first + size)]
            first += self.num_processes * size


class SampleReader(torch.utils.data.Dataset):
    """What the data loader's workers call: `Draws` in, sample out."""

    def __init__(self, encoder: Encoder):
        # Without the pipeline: workers read, they do not encode.
        self.encoder = copy.copy(encoder)
        self.encoder.pipeline = None

    def __len__(self) -> int:
        return len(self.encoder.dataset)

    def __getitem__(self, draws: Draws) -> dict:
        return self.encoder.read(draws)


# -- Noise ------------------------------------------------------------------------------------------------------------


def timestep_shift_factor(args: argparse.Namespace, scheduler: FlowMatchEulerDiscreteScheduler, tokens: int) -> float:
    """The factor s of t' = s t / (1 + (s - 1) t), by which inference moves its timesteps towards noise at this size."""
    if args.timestep_shift == "none":
        return 1.0
    if args.timestep_shift != "resolution":
        return float(args.timestep_shift)
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return config.shift
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(config[name] for name in names))
    return mu if config.time_shift_type == "linear" else math.exp(mu)


def draw_noise(
    x_0: torch.Tensor, generators: list[torch.Generator], shift: float, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_0 `(batch, tokens, 64)` -> noise x_1 of its shape, t `(batch,)` in (0, 1), and x_t = (1 - t) x_0 + t x_1."""
    density = [
        compute_density_for_timestep_sampling(
            weighting_scheme=args.weighting_scheme,
            batch_size=1,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
            generator=generator,
        )
        for generator in generators
    ]
    t = torch.cat(density).to(device=x_0.device, dtype=torch.float32)
    t = shift * t / (1 + (shift - 1) * t)
    x_1 = randn_tensor(x_0.shape, generator=generators, device=x_0.device, dtype=torch.float32)
    weight = t[:, None, None]
    x_t = ((1 - weight) * x_0.float() + weight * x_1).to(x_0.dtype)
    return x_1, t, x_t


# -- Attend and predict -----------------------------------------------------------------------------------------------


class SemanticFillModel(torch.nn.Module):
    """All that is trained, as one module, so that one wrapper of any engine holds it."""

    def __init__(self, transformer: FluxTransformer2DModel, semantic_attention: SemanticAttentionModel | None):
        super().__init__()
        self.transformer = transformer
        self.semantic_attention = semantic_attention

    def scales(self) -> list[float]:
        return [] if self.semantic_attention is None else self.semantic_attention.scales()

    def attend(
        self,
        hidden_states: torch.Tensor,
        semantic_tokens: torch.Tensor,
        positions: torch.Tensor,
        keep_map: torch.Tensor,
    ) -> torch.Tensor:
        """Enhances the transformer's input `(batch, tokens, 384)`; samples whose map was dropped stay as they are."""
        enhanced = self.semantic_attention.enhance(hidden_states, semantic_tokens, positions)
        return torch.where(keep_map[:, None, None], enhanced, hidden_states)

    def forward(
        self,
        x_t: torch.Tensor,
        x_cond: torch.Tensor,
        t: torch.Tensor,
        prompt_embeds: torch.Tensor,
        pooled_prompt_embeds: torch.Tensor,
        img_ids: torch.Tensor,
        guidance: torch.Tensor | None,
        semantic_tokens: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        keep_map: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The predicted velocity `(batch, tokens, 64)`."""
        hidden_states = torch.cat((x_t, x_cond), dim=-1)
        if self.semantic_attention is not None:
            hidden_states = self.attend(hidden_states, semantic_tokens, positions, keep_map)
        log_shapes(x_t=x_t, x_t_enhanced=hidden_states[..., : x_t.shape[-1]], hidden_states=hidden_states)
        return self.transformer(
            hidden_states=hidden_states,
            timestep=t,
            guidance=guidance,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=img_ids.new_zeros(prompt_embeds.shape[1], 3),
            img_ids=img_ids,
            return_dict=False,
        )[0]


# The first steps tell the shapes of the batch's way; nothing is formatted after them.
_shape_log = {"enabled": False}


def log_shapes(**tensors: torch.Tensor) -> None:
    if _shape_log["enabled"] and not torch.compiler.is_compiling():
        for name, tensor in tensors.items():
            logger.debug(f"{name}: {tuple(tensor.shape)}")


# -- Compare ----------------------------------------------------------------------------------------------------------


def compare(
    pred: torch.Tensor, x_0: torch.Tensor, x_1: torch.Tensor, t: torch.Tensor, scheme: str, region: torch.Tensor | None
) -> torch.Tensor:
    """Weighted mean squared error to the velocity x_1 - x_0, over all tokens or those of the indices `region`."""
    error = (pred.float() - (x_1.float() - x_0.float())) ** 2
    if region is not None:
        error = error[:, region]
    return (compute_loss_weighting_for_sd3(scheme, sigmas=t)[:, None, None] * error).mean()


@dataclass
class Step:
    """The way of one batch, from read samples to their loss, for a run's geometry and objective."""

    encoder: Encoder
    args: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    shift: float
    guidance_embeds: bool

    def __post_init__(self):
        args, mode = self.args, SEMANTIC_MODES[self.args.semantic_mode]
        patch = self.encoder.patch
        self.rows, self.columns, self.panels = args.resolution // patch, args.width // patch, len(mode.panels)
        self.mask = self.encoder.mask.to(self.device)
        self.positions = panel_positions(self.rows, self.columns, self.panels, self.device)
        self.region = None
        if args.loss_region == "target":
            panel = torch.arange(self.panels).repeat_interleave(self.columns).repeat(self.rows)
            # Indices: a boolean mask would have the host wait for the device in every micro-step.
            self.region = (panel == mode.panels.index("target")).nonzero().flatten().to(self.device)
        self.stream = None
        if self.device.type == "cuda":
            # Copies from the host would wait for all that the stream of the passes still holds.
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def __call__(self, model: torch.nn.Module, samples: list[dict]) -> torch.Tensor:
        return self.loss(model, self.prepare(samples))

    def prepare(self, samples: list[dict]) -> dict[str, torch.Tensor | None]:
        """Read samples, encoded and noised: what `loss` takes. On a GPU it does not wait for what is under way there."""
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            return self._encode_and_noise(samples)

    def _encode_and_noise(self, samples: list[dict]) -> dict[str, torch.Tensor | None]:
        draws = [sample["draws"] for sample in samples]
        generators = [torch.Generator().manual_seed(seed_of(self.args.seed, "step", d.position)) for d in draws]
        pipeline = self.encoder.pipeline

        encoded = self.encoder.encode_batch(samples, self.device)
        moments = (encoded["moments"], encoded["masked_moments"])
        x_0, x_cond, img_ids = pipeline.encode_diptych(None, self.mask, moments, generators, self.dtype)
        x_1, t, x_t = draw_noise(x_0, generators, self.shift, self.args)
        batch = {
            "x_0": x_0,
            "x_1": x_1,
            "x_t": x_t,
            "x_cond": x_cond,
            "t": t,
            "prompt_embeds": encoded["prompt_embeds"].to(self.dtype),
            "pooled_prompt_embeds": encoded["pooled_prompt_embeds"].to(self.dtype),
            "img_ids": img_ids,
            "guidance": torch.full_like(t, self.args.guidance_scale) if self.guidance_embeds else None,
        }
        if "semantic" in encoded:
            tokens = lay_under_panels(encoded["semantic"], self.rows, self.columns, self.panels)
            batch["semantic_tokens"] = tokens.to(self.dtype)
            batch["keep_map"] = torch.tensor([not d.drop_map for d in draws], device=self.device)
        return batch

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor | None]) -> torch.Tensor:
        """Attends, predicts and compares."""
        if self.stream is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_stream(self.stream)
            for tensor in filter(torch.is_tensor, batch.values()):
                tensor.record_stream(stream)
        inputs = dict(batch)
        x_0, x_1, t = inputs.pop("x_0"), inputs.pop("x_1"), inputs["t"]
        if "semantic_tokens" in inputs:
            inputs["positions"] = self.positions
        if _shape_log["enabled"]:
            view = (len(t), 3, self.args.resolution, self.args.width)
            for name in PANELS:
                logger.debug(f"{name}_img: {view}")
            logger.debug(f"diptych: {(*view[:3], self.panels * view[3])}")
            log_shapes(x_0=x_0, **{name: batch[name] for name in ("x_cond", "semantic_tokens") if name in batch})
        return compare(model(**inputs), x_0, x_1, t, self.args.weighting_scheme, self.region)


# -- Model and optimizer ----------------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> SemanticFillModel:
    """The frozen transformer in `dtype` with a LoRA, and the module; what is trained is in float32."""
    transformer = FluxTransformer2DModel.from_pretrained(
        args.pretrained_model_name_or_path,
        subfolder="transformer",
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        dtype=dtype,
        use_safetensors=True,
        quantization_config=FrozenLinearConfig.of(args.base_precision, device),
    )
    return add_trained_parts(transformer.to(device), args)


def add_trained_parts(transformer: FluxTransformer2DModel, args: argparse.Namespace) -> SemanticFillModel:
    """A loaded transformer, frozen, with its LoRA and the module, checkpointed and compiled as the run wants it."""
    device = transformer.device
    transformer.requires_grad_(False)
    if args.attention_backend != "native":
        transformer.set_attention_backend(args.attention_backend)
    targets = args.lora_layers.split(",") if args.lora_layers else LORA_TARGETS
    lora_config = LoraConfig(
        r=args.rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        init_lora_weights="gaussian",
        target_modules=[target.strip() for target in targets],
    )
    if args.fused_lora:
        # PEFT's only way to a layer class of one's own; its forward is all that differs.
        lora_config._register_custom_module(LORA_LAYERS)
    transformer.add_adapter(lora_config)
    semantic_attention = None
    if SEMANTIC_MODES[args.semantic_mode].attends:
        if args.semantic_weights:
            semantic_attention = load_semantic_attention(args.semantic_weights, args.cache_dir)
        else:
            semantic_attention = SemanticAttentionModel(
                in_channels=transformer.out_channels,
                num_layers=args.semantic_num_layers,
                num_heads=args.semantic_num_heads,
                head_dim=args.semantic_head_dim,
                position=args.semantic_position,
                injection=args.semantic_injection,
            )
        # Loaded models come in evaluation mode, made ones in training mode.
        semantic_attention.to(device).requires_grad_(True).train()
    model = SemanticFillModel(transformer.train(), semantic_attention)
    # PEFT gives adapters the dtype of their base; steps as small as a learning rate vanish in bfloat16.
    cast_training_params(model, dtype=torch.float32)
    if args.lora_weights:
        # Only now, or its weights would be rounded to that dtype.
        load_lora(transformer, args.lora_weights, args.cache_dir)
    CHECKPOINTING[args.checkpointing](transformer, preserve_rng_state=args.lora_dropout > 0)
    if args.compile:
        transformer.compile_repeated_blocks(options=compiler_options(args.fused_lora))
    return model


def load_semantic_attention(source: str, cache_dir: str | None) -> SemanticAttentionModel:
    """The module of a trained folder or Hub repository, or of the `semantic_attention` folder itself."""
    errors = []
    for subfolder in (SEMANTIC_SUBFOLDER, ""):
        try:
            return SemanticAttentionModel.from_pretrained(
                source, subfolder=subfolder, cache_dir=cache_dir, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, safetensors.SafetensorError) as error:
            errors.append(str(error))
    raise ValueError(f"--semantic_weights {source} holds no trained module: {errors[0]}")


def load_lora(transformer: FluxTransformer2DModel, source: str | os.PathLike, cache_dir: str | None = None) -> None:
    """Puts a LoRA of a folder or Hub repository in place, which has to have the rank, alpha and layers of this run."""
    try:
        weights, metadata = FluxFillSemanticPipeline.lora_state_dict(
            str(source),
            weight_name=LORA_WEIGHT_NAME_SAFE,
            use_safetensors=True,
            cache_dir=cache_dir,
            return_lora_metadata=True,
        )
    # A damaged file is an error of safetensors, which does not name it.
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{source} holds no trained LoRA: {error}") from error
    config = transformer.peft_config["default"]
    rank = next((weight.shape[0] for name, weight in weights.items() if ".lora_A." in name), None)
    # Without metadata diffusers takes the rank for alpha.
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


def parameter_groups(model: SemanticFillModel, args: argparse.Namespace) -> list[dict]:
    """LoRA, module and the module's gates, each with its own learning rate."""
    groups = {"lora": [], "module": [], "scale": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "lora" if name.startswith("transformer.") else "scale" if name.endswith(".scale") else "module"
            groups[kind].append(parameter)
    rates = {
        "lora": args.learning_rate,
        "module": args.semantic_learning_rate,
        "scale": args.semantic_scale_learning_rate,
    }
    return [{"params": params, "lr": rates[kind], "name": kind} for kind, params in groups.items() if params]


def build_optimizer(groups: list[dict], args: argparse.Namespace) -> torch.optim.Optimizer:
    kwargs = {
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }
    try:
        if args.optimizer == "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(
                groups,
                lr=args.learning_rate,
                use_bias_correction=args.prodigy_use_bias_correction,
                safeguard_warmup=args.prodigy_safeguard_warmup,
                **kwargs,
            )
        if args.use_8bit_adam:
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, **kwargs)
    except ImportError as error:
        raise ImportError(
            f"This optimizer needs a package that is not installed: `pip install {error.name}`."
        ) from error
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, fused=on_gpu or None, **kwargs)


# -- Save and resume --------------------------------------------------------------------------------------------------


def save_weights(
    model: SemanticFillModel, weights: dict[str, torch.Tensor], folder: Path, args: argparse.Namespace
) -> None:
    """LoRA and module as inference loads them, in the float32 they are trained in, from `Engine.weights`."""
    lora, module = ({k.removeprefix(p): w for k, w in weights.items() if k.startswith(p)} for p in PARTS)
    semantic_attention = None
    if model.semantic_attention is not None:
        semantic_attention = SemanticAttentionModel.from_config(model.semantic_attention.config)
        semantic_attention.load_state_dict(module)
    FluxFillSemanticPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model.transformer, state_dict=lora),
        semantic_attention=semantic_attention,
        semantic_mode=args.semantic_mode,
        fusion_alpha=args.fusion_alpha,
        max_sequence_length=args.max_sequence_length,
        **_collate_lora_metadata({"transformer": model.transformer}),
    )


def split_tensors(tree, prefix: str, tensors: dict[str, torch.Tensor]):
    """A nested state as JSON, its tensors moved to `tensors` and named in their places. Nothing is ever pickled."""
    if isinstance(tree, torch.Tensor):
        tensors[prefix] = tree.detach().cpu().contiguous().clone()
        return {"__tensor__": prefix}
    if isinstance(tree, dict):
        return {"__dict__": [[k, split_tensors(v, f"{prefix}.{k}", tensors)] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return [split_tensors(v, f"{prefix}.{i}", tensors) for i, v in enumerate(tree)]
    return tree


def join_tensors(tree, tensors: dict[str, torch.Tensor]):
    if isinstance(tree, dict) and "__tensor__" in tree:
        return tensors[tree["__tensor__"]]
    if isinstance(tree, dict):
        return {k: join_tensors(v, tensors) for k, v in tree["__dict__"]}
    return [join_tensors(v, tensors) for v in tree] if isinstance(tree, list) else tree


def fixed_options(model: SemanticFillModel, args: argparse.Namespace) -> dict:
    """What a run that goes on cannot change: the shape of what is trained, and whose the optimizer's state is."""
    names = ("semantic_mode", "rank", "lora_alpha", "lora_layers", "optimizer", "use_8bit_adam")
    fixed = {name: getattr(args, name) for name in names}
    if model.semantic_attention is not None:
        # As it is: that of --semantic_weights has its own.
        fixed |= {name: model.semantic_attention.config[name.removeprefix("semantic_")] for name in MODULE_OPTIONS}
    return fixed


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(
    model: SemanticFillModel, weights: dict[str, torch.Tensor], state: dict, args: argparse.Namespace
) -> Path:
    """Writes a whole checkpoint beside its place and renames it; only then do the oldest ones go."""
    output_dir = Path(args.output_dir)
    folder = output_dir / f"{CHECKPOINT_PREFIX}-{state['step']}"
    beside, before = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("part", "old"))
    for path in (beside, before):
        shutil.rmtree(path, ignore_errors=True)
    try:
        with explained_write_errors("--output_dir", GO_ON):
            save_weights(model, weights, beside, args)
            tensors = {}
            described = split_tensors(state, "state", tensors)
            safetensors.torch.save_file(tensors, beside / "training_state.safetensors")
            (beside / "training_state.json").write_text(json.dumps(described))
            (beside / "options.json").write_text(json.dumps(fixed_options(model, args)))
            files = sorted(path for path in beside.rglob("*") if path.is_file())
            manifest = {path.relative_to(beside).as_posix(): [path.stat().st_size, file_hash(path)] for path in files}
            (beside / "manifest.json").write_text(json.dumps(manifest, indent=2))
            for path in (beside, *beside.rglob("*")):
                flush_to_disk(path)
            if folder.exists():
                os.replace(folder, before)
            os.replace(beside, folder)
            flush_to_disk(output_dir)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(before, ignore_errors=True)
    if args.checkpoints_total_limit is not None:
        others = [path for path in list_checkpoints(output_dir) if path != folder]
        # Those behind this step are of a run that was given up: damaged, or another checkpoint was gone on from.
        others.sort(key=lambda path: checkpoint_step(path) < state["step"])
        for old in others[: max(0, len(others) + 1 - args.checkpoints_total_limit)]:
            # Renamed first, so that no half of it is ever found.
            gone = old.with_name(f".{old.name}.gone")
            os.replace(old, gone)
            shutil.rmtree(gone)
            logger.info(f"Removed {old}")
    logger.info(f"Saved {folder}")
    return folder


def checkpoint_step(path: Path) -> int:
    return int(path.name.rsplit("-")[-1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints from the oldest to the newest."""
    found = [path for path in output_dir.glob(f"{CHECKPOINT_PREFIX}-*") if path.name.rsplit("-")[-1].isdecimal()]
    return sorted(found, key=checkpoint_step)


def checkpoint_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or `None`."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        needed = {LORA_WEIGHT_NAME_SAFE, "options.json", "training_state.json", "training_state.safetensors"}
        lacking = needed - set(manifest)
        if lacking:
            return f"manifest.json does not name {sorted(lacking)}"
        for name, (size, digest) in manifest.items():
            if (folder / name).stat().st_size != size or file_hash(folder / name) != digest:
                return f"{name} is not what was written"
    # A damaged manifest may be any other JSON.
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint to go on from: `latest` is the newest undamaged one, a path or repository is taken or refused."""
    if args.resume_from_checkpoint is None:
        return None
    if args.resume_from_checkpoint != "latest":
        path = Path(args.resume_from_checkpoint)
        path = path if path.is_dir() else Path(args.output_dir, path.name)
        if not path.is_dir() and is_hub_id(args.resume_from_checkpoint):
            path = download_checkpoint(args.resume_from_checkpoint, args.cache_dir)
        damage = checkpoint_damage(path)
        if damage:
            raise ValueError(
                f"--resume_from_checkpoint {args.resume_from_checkpoint} is no whole checkpoint: {damage}."
            )
        return path
    for path in reversed(list_checkpoints(Path(args.output_dir))):
        damage = checkpoint_damage(path)
        if damage is None:
            return path
        logger.warning(f"Skipping the damaged checkpoint {path}: {damage}")
    logger.info(f"No checkpoint in {args.output_dir}: starting from step 0")
    return None


def check_resumed(checkpoint: Path, args: argparse.Namespace) -> None:
    """Refuses to go on from a checkpoint with options that its state does not fit, before anything is loaded."""

    def spelled(name, value) -> str:
        return (
            f"without --{name}"
            if value in (None, False)
            else f"with --{name} {'' if value is True else value}".strip()
        )

    for name, value in json.loads((checkpoint / "options.json").read_text()).items():
        wanted = vars(args).get(name, value)
        if wanted != value:
            raise ValueError(
                f"--resume_from_checkpoint: {checkpoint} was trained {spelled(name, value)}, so that a run"
                f" {spelled(name, wanted)} cannot go on from it, but can start from its weights with --lora_weights and"
                " --semantic_weights."
            )


def is_hub_id(name: str) -> bool:
    """Whether `name`, which may be a path as well, can be a repository `user/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not os.path.exists(name)


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


def load_checkpoint(folder: Path, model: SemanticFillModel) -> dict:
    """Puts the weights in place and returns the training state."""
    load_lora(model.transformer, folder)
    if model.semantic_attention is not None:
        path = folder / SEMANTIC_SUBFOLDER / SAFETENSORS_WEIGHTS_NAME
        model.semantic_attention.load_state_dict(safetensors.torch.load_file(path))
    tensors = safetensors.torch.load_file(folder / "training_state.safetensors")
    return join_tensors(json.loads((folder / "training_state.json").read_text()), tensors)


def resume_optimizer(
    engine: Engine, optimizer: torch.optim.Optimizer, lr_scheduler: torch.optim.lr_scheduler.LambdaLR, state: dict
) -> None:
    """Puts the states of optimizer and schedule in place; rates and other settings are those of this run."""
    rates, names = lr_scheduler.base_lrs, ("initial_lr", "betas", "eps", "weight_decay")
    settings = [{name: group[name] for name in names} for group in lr_scheduler.optimizer.param_groups]
    engine.load_optimizer(optimizer, state["optimizer"])
    lr_scheduler.load_state_dict(state["lr_scheduler"])
    lr_scheduler.base_lrs = rates
    factors = [factor(lr_scheduler.last_epoch) for factor in lr_scheduler.lr_lambdas]
    lr_scheduler._last_lr = [rate * factor for rate, factor in zip(rates, factors)]
    for group, setting, rate in zip(lr_scheduler.optimizer.param_groups, settings, lr_scheduler.get_last_lr()):
        group |= setting | {"lr": rate}


def save_result(
    model: SemanticFillModel,
    weights: dict[str, torch.Tensor],
    loss: float,
    samples: list[Path],
    args: argparse.Namespace,
) -> list[str]:
    """
    Writes what the run was made for into the output folder and returns the names of these files. Each of them is there
    whole or as it was before, the model card the last.
    """
    output_dir = Path(args.output_dir)
    beside = output_dir / ".result.part"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with explained_write_errors("--output_dir", GO_ON):
            save_weights(model, weights, beside, args)
            code = single_file_pipeline().encode()
            (beside / "pipeline.py").write_bytes(code)
            save_model_card(beside / "README.md", args, loss, samples, code)
            files = sorted(path for path in beside.rglob("*") if path.is_file())
            files.sort(key=lambda path: path.name == "README.md")
            for path in files:
                flush_to_disk(path)
            for path in files:
                place = output_dir / path.relative_to(beside)
                place.parent.mkdir(exist_ok=True)
                os.replace(path, place)
            flush_to_disk(output_dir)
            return [path.relative_to(beside).as_posix() for path in files]
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# -- Validate, publish ------------------------------------------------------------------------------------------------


@torch.no_grad()
def paint_samples(
    model: SemanticFillModel, encoder: Encoder, step: int, engine: Engine, args: argparse.Namespace
) -> PIL.Image.Image | None:
    """A picture of visible | map | painted | target rows, drawn with the pipeline and the live weights."""
    accelerator = engine.accelerator
    # Sharded weights take every process; one of them keeps the picture.
    if not (accelerator.is_main_process or engine.joint_forward):
        return None
    source = encoder.pipeline
    components = {k: v for k, v in source.components.items() if k not in ("transformer", "semantic_attention")}
    if args.cache_latents:
        components |= {"text_encoder": None, "text_encoder_2": None}
    pipeline = FluxFillSemanticPipeline(
        **components,
        transformer=model.transformer,
        semantic_attention=model.semantic_attention,
        semantic_mode=args.semantic_mode,
        fusion_alpha=args.fusion_alpha,
    )
    pipeline.set_progress_bar_config(disable=True)
    vae_device = source.vae.device
    source.vae.to(accelerator.device)
    model.eval()
    rows = []
    try:
        for index in range(min(args.num_validation_images, len(encoder.dataset))):
            views, caption = encoder.dataset.views(index), encoder.dataset.caption(index)
            if args.cache_latents:
                prompt = read_encoding(encoder.prompt_file(caption))
                prompt = {name: tensor[None].to(accelerator.device) for name, tensor in prompt.items()}
            else:
                prompt = encoder.encode_prompts([caption])
            with engine.autocast():
                painted = pipeline(
                    image=views["visible"],
                    semantic_image=views["semantic"] if args.semantic_mode != "none" else None,
                    num_inference_steps=args.validation_inference_steps,
                    guidance_scale=args.validation_guidance_scale,
                    max_sequence_length=args.max_sequence_length,
                    generator=torch.Generator().manual_seed(args.seed),
                    output_type="pt",
                    **prompt,
                ).images[0]
            rows += [views["visible"], views["semantic"], painted.float().cpu(), views["target"]]
    finally:
        model.train()
        source.vae.to(vae_device)
    pictures = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(torch.stack(rows)))
    grid = make_image_grid(pictures, rows=len(pictures) // 4, cols=4)
    if not accelerator.is_main_process:
        return None
    folder = Path(args.output_dir, "samples")
    with explained_write_errors("--output_dir", GO_ON):
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"step-{step:06d}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")
        elif tracker.name == "wandb":
            import wandb

            tracker.log({"validation": wandb.Image(grid)}, step=step)
    return grid


def single_file_pipeline() -> str:
    """
    The pipeline and its module as the source of one file, so that `custom_pipeline="user/repo"` works whatever the
    repository is called: the dynamic loader breaks relative imports where the name holds a dot.
    """
    import pipeline_flux_fill_semantic
    import semantic_attention

    module = Path(semantic_attention.__file__).read_text()
    pipeline = Path(pipeline_flux_fill_semantic.__file__).read_text()
    (branch,) = (
        node
        for node in ast.parse(pipeline).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "__package__"
    )
    lines = pipeline.splitlines(keepends=True)
    return "".join((*lines[: branch.lineno - 1], module, "\n\n", *lines[branch.end_lineno :]))


def save_model_card(path: Path, args: argparse.Namespace, loss: float, samples: list[Path], code: bytes) -> None:
    repo = args.hub_model_id or Path(args.output_dir).resolve().name
    guided = "semantic_image=semantic_map, " if args.semantic_mode != "none" else ""
    widgets = "\n\n".join(f"![{sample.stem}](samples/{sample.name})" for sample in samples[-1:])
    options = "\n".join(f"- `{name}`: `{value}`" for name, value in public_config(args).items())
    base = args.pretrained_model_name_or_path
    on_hub = is_hub_id(base)
    by_flux = base.startswith("black-forest-labs/FLUX.1")
    description = f"""
# Semantic fill: {repo}

A LoRA{" and a semantic cross-attention module" if SEMANTIC_MODES[args.semantic_mode].attends else ""} for
{f"[{base}](https://huggingface.co/{base})" if on_hub else f"`{Path(base).name}`"}: it paints a second view of a scene
beside the first, in the mode `{args.semantic_mode}`. Trained for {args.max_train_steps} steps; the last step's loss was {loss:.4f}.

{f"visible, map, painted, target:{chr(10) * 2}{widgets}" if widgets else ""}

## Use

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    "{base if on_hub else Path(base).name}", custom_pipeline="{repo}", trust_remote_code=True, dtype=torch.bfloat16
).to("cuda")
pipe.load_lora_weights("{repo}")
painted = pipe(
    prompt={json.dumps(args.instance_prompt or "...", ensure_ascii=False)}, image=visible, {guided}max_sequence_length={args.max_sequence_length}
).images[0]
```

`trust_remote_code=True` runs `pipeline.py` of this repository (sha256
`{hashlib.sha256(code).hexdigest()}`).

## Training

<details><summary>All arguments</summary>

{options}

</details>

Versions: torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}, peft
{peft.__version__}.

## Limits

The map steers only what it was trained to steer, at sizes near the training resolution of {args.width}x{args.resolution}
pixels a view. The licence of the base model holds for what is made with it.
"""
    tags = ["image-to-image", "diffusers-training", "diffusers", "lora", "flux", "semantic-fill"]
    data = ModelCardData(
        # The Hub refuses a card that names a folder as its model or data set.
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        datasets=[args.dataset_name] if args.dataset_name and not os.path.isdir(args.dataset_name) else None,
        license="other",
        license_name=FLUX_LICENSE if by_flux else "as-base-model",
        license_link=FLUX_LICENSE_LINK if by_flux else None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=tags,
        instance_prompt=args.instance_prompt,
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{description}").save(path)


def public_config(args: argparse.Namespace) -> dict:
    """The arguments as trackers and cards may show them: of a folder or file of this machine its name only."""
    paths = ("dir", "root", "name_or_path", "weights", "dataset_name", "resume_from_checkpoint")
    return {
        name: Path(value).name if isinstance(value, str) and name.endswith(paths) and not is_hub_id(value) else value
        for name, value in vars(args).items()
    }


def open_repo(args: argparse.Namespace) -> str:
    """Makes the repository or finds it, before training, so that a missing token or right costs nothing."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        return create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id
    except Exception as error:
        raise RuntimeError(
            f"--push_to_hub cannot write to {name}: {error}. Log in with `hf auth login` or set HF_TOKEN to a token"
            " with the right to write. Nothing was trained yet."
        ) from error


def push_checkpoint(folder: Path, args: argparse.Namespace) -> None:
    """Makes a checkpoint the one that the Hub repository holds, in one commit. A failure is told and costs nothing."""
    try:
        upload_folder(
            repo_id=args.hub_model_id,
            folder_path=folder,
            path_in_repo=HUB_CHECKPOINT,
            delete_patterns="*",
            commit_message=folder.name,
        )
        logger.info(f"Pushed {folder} to {args.hub_model_id}")
    except Exception as error:
        logger.warning(f"{folder} is saved, but the upload to {args.hub_model_id} failed: {error}. Training goes on.")


def push_to_hub(repo_id: str, files: list[str], args: argparse.Namespace) -> None:
    """Uploads these files of the output folder, and nothing else that may lie there."""
    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=args.output_dir,
            commit_message="Semantic fill training",
            allow_patterns=files,
        )
    except Exception as error:
        # Without --include it would upload checkpoints and cache too.
        command = ["hf", "upload", repo_id, str(args.output_dir), "."]
        command += [part for file in files for part in ("--include", file)]
        raise RuntimeError(
            f"Training is done and saved in {args.output_dir}, but the upload to {repo_id} failed: {error}. Upload it"
            f" with `{shlex.join(command)}`."
        ) from error


# -- Run --------------------------------------------------------------------------------------------------------------


def log_scales(scales: list[float], level: int, digits: int) -> None:
    for layer, scale in enumerate(scales):
        logger.log(level, f"Layer {layer} scale: {scale:.{digits}f}")


def samples_a_step(accelerator: Accelerator, args: argparse.Namespace) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


def announce(model: SemanticFillModel, args: argparse.Namespace) -> None:
    logger.info(f"Semantic mode: {args.semantic_mode}")
    module = model.semantic_attention
    if module is not None:
        logger.info(f"Using Cross-Attention with {len(module.layers)} layers, {module.layers[0].num_heads} heads")
        count = sum(parameter.numel() for parameter in module.parameters())
        logger.info(f"Added {count} semantic cross-attention parameters to optimizer")
    if args.attention_backend == CUDNN and not args.compile:
        logger.warning(
            f"--attention_backend {CUDNN} without --compile: with torch 2.11 the process crashed, or gradients were not"
            " finite (benchmarks/RESULTS.md). Pass --compile, or leave it out."
        )


def setup(args: argparse.Namespace) -> Accelerator:
    """Accelerator, logging, seed and output folder."""
    logging_dir = Path(args.output_dir, args.logging_dir)
    accelerator = Accelerator(
        # As a plugin, since of the plain number accelerate would take its environment variable's instead.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=str(logging_dir)),
        kwargs_handlers=[DDP_OPTIONS],
    )
    find_engine(accelerator, args)
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S")
    logging.getLogger(__name__).setLevel(args.log_level.upper())
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    # Its backward crashes in torch 2.11, or gives NaN; flash attention takes over.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return accelerator


def claim_output_dir(args: argparse.Namespace) -> filelock.FileLock:
    """Makes the output folder and locks it: held by this process until released, whatever ends the process."""
    folder = Path(args.output_dir)
    lock = filelock.FileLock(folder / ".lock")
    with explained_write_errors("--output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ValueError(f"--output_dir {folder} is in use by another run.") from None
    # What a killed run left: a checkpoint that was making way for its successor goes back.
    for path in folder.glob(f".{CHECKPOINT_PREFIX}-*.old"):
        if not (folder / path.stem[1:]).exists():
            os.replace(path, folder / path.stem[1:])
    for path in (*folder.glob(f".{CHECKPOINT_PREFIX}-*.*"), *folder.glob(".result.part")):
        shutil.rmtree(path, ignore_errors=True)
    if args.resume_from_checkpoint is None and list_checkpoints(folder):
        lock.release()
        raise ValueError(
            f"--output_dir {folder} holds checkpoints of an earlier run. Go on with it by --resume_from_checkpoint"
            " latest, or pass another folder."
        )
    return lock


@contextlib.contextmanager
def explained_out_of_memory(pipeline: FluxFillSemanticPipeline, args: argparse.Namespace):
    """Adds to the error which flags would make room."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = 512 if args.max_sequence_length == "auto" else args.max_sequence_length
        tokens = count_image_tokens(pipeline, args) + text
        encoders = [] if args.cache_latents else (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
        size = sum(map(parameter_bytes, encoders))
        raise torch.OutOfMemoryError(f"{error}\n{memory_advice(args, tokens, size)}") from error


def train(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    step_fn: Step,
    dataset: TriptychDataset,
    first_step: int,
    samples_seen: int,
    args: argparse.Namespace,
) -> float:
    """Optimizer steps from `first_step` to `args.max_train_steps`; returns the last step's loss."""
    engine = find_engine(accelerator, args)
    bare = engine.bare(model)
    sampler = RunSampler(len(dataset), args, accelerator.process_index, accelerator.num_processes, samples_seen)
    loader = torch.utils.data.DataLoader(
        SampleReader(step_fn.encoder), batch_sampler=sampler, collate_fn=list, num_workers=args.dataloader_num_workers
    )
    # Here, since it draws from the stream that dropout is seeded in.
    samples = iter(loader)
    bad_steps, skipped, loss = 0, 0, math.nan
    bar = tqdm(
        total=args.max_train_steps,
        initial=first_step,
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    )
    with (
        StopSignals() as stop,
        contextlib.closing(prepared_batches(step_fn, samples)) as batches,
        contextlib.ExitStack() as stack,
    ):
        for step in range(first_step + 1, args.max_train_steps + 1):
            if step == first_step + 3:
                # By now all is built and compiled. Looked through again by every full collection, it would hold up a step
                # for as long as the step itself takes, and every other process with it.
                gc.collect()
                gc.freeze()
                stack.callback(gc.unfreeze)
            _shape_log["enabled"] = step <= first_step + 2 and logger.isEnabledFor(logging.DEBUG)
            losses = []
            for micro_step in range(args.gradient_accumulation_steps):
                # Dropout too is a function of the place in the run, so a resumed run repeats it.
                torch.manual_seed(seed_of(args.seed, "dropout", step, micro_step, accelerator.process_index))
                with engine.accumulate(model, last=micro_step == args.gradient_accumulation_steps - 1):
                    micro_loss = step_fn.loss(model, next(batches))
                    engine.backward(model, micro_loss)
                    losses.append(micro_loss.detach())
            if _shape_log["enabled"]:
                log_scales(bare.scales(), logging.DEBUG, digits=6)
            # The one place of a step where the host waits for the device, and processes for each other.
            gradient_norm = engine.clip(model, args.max_grad_norm)
            loss, gradient_norm, signal_number = engine.gather(torch.stack(losses).mean(), gradient_norm, stop.number)
            finite = math.isfinite(loss) and math.isfinite(gradient_norm)
            engine.step(model, optimizer, finite)
            if finite:
                lr_scheduler.step()
                bad_steps = 0
            elif engine.settle_scale(lower=math.isfinite(loss)):
                # Too large a scale of fp16's gradients, of which a run finds out by trying.
                skipped += 1
                logger.info(f"Step {step} skipped: its gradients overflowed, their scale is lowered")
            else:
                bad_steps, skipped = bad_steps + 1, skipped + 1
                # Of all processes.
                rows = [sampler.draws(samples_seen + i).index for i in range(samples_a_step(accelerator, args))]
                logger.warning(f"Step {step} skipped: loss {loss}, gradient norm {gradient_norm}, rows {rows}")
            samples_seen += samples_a_step(accelerator, args)

            rates = lr_scheduler.get_last_lr()
            scales = bare.scales()
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", lr=rates[0], **({"scale": f"{scales[0]:.4f}"} if scales else {}))
            logs = {"loss": loss, "lr": rates[0], "gradient_norm": gradient_norm, "skipped_steps": skipped}
            accelerator.log(logs | {f"scale/layer_{i}": scale for i, scale in enumerate(scales)}, step=step)
            if step % 100 == 0:
                logger.info(f"[Step {step}] Loss: {loss:.4f}")
                log_scales(scales, logging.INFO, digits=3)

            too_bad = bad_steps >= args.max_bad_steps
            # Of any process: all of them have to stop after the same step.
            stopped = int(signal_number)
            # A skipped step changed nothing, so the weights after it are good too.
            if step % args.checkpointing_steps == 0 or stopped or too_bad:
                weights, state = engine.weights(bare), {"step": step, "samples_seen": samples_seen, "loss": loss}
                state["optimizer"] = engine.optimizer_state(optimizer)
                state["lr_scheduler"] = lr_scheduler.state_dict()
                if accelerator.scaler is not None:
                    state["scaler"] = accelerator.scaler.state_dict()
                if accelerator.is_main_process:
                    folder = save_checkpoint(bare, weights, state, args)
                    if args.hub_strategy == "every_checkpoint":
                        push_checkpoint(folder, args)
                accelerator.wait_for_everyone()
            if args.validation_steps and step % args.validation_steps == 0:
                paint_samples(bare, step_fn.encoder, step, engine, args)
                accelerator.wait_for_everyone()
            if too_bad:
                raise RuntimeError(
                    f"{bad_steps} steps in a row had a loss or gradient that is not finite, the last on rows {rows}."
                    f" Nothing of them was applied: checkpoint-{step} holds the last good weights. Lower --learning_rate,"
                    " or look at these rows, and go on with --resume_from_checkpoint latest."
                )
            if stopped:
                logger.info(f"Stopped by {stopped} at step {step}. Go on with --resume_from_checkpoint latest.")
                raise SystemExit(128 + stopped)
    bar.close()
    return loss


def prepared_batches(step_fn: Step, samples: Iterator[list[dict]]) -> Iterator[dict]:
    """Batches as `Step.loss` takes them; on a GPU the next one is made in a thread while a step has its passes."""
    if step_fn.stream is None:
        yield from map(step_fn.prepare, samples)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:

        def prepare():
            return step_fn.prepare(next(samples))

        following = pool.submit(prepare)
        while True:
            batch, following = following.result(), pool.submit(prepare)
            yield batch


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a stop after the current step. A second one ends the run at once."""

    def __enter__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _note(self, number, frame):
        self.number = number
        signal.signal(number, self.before[number])

    def __exit__(self, *exc):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def main(args: argparse.Namespace) -> None:
    accelerator = setup(args)
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    dtype = dtypes.get(accelerator.mixed_precision, torch.float32)

    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.callback(claim_output_dir(args).release)
        repo_id = None
        if args.push_to_hub and accelerator.is_main_process:
            repo_id = args.hub_model_id = open_repo(args)

        # Read
        with accelerator.main_process_first():
            rows = load_rows(args)
        # All at once: NCCL gives up on processes that wait for another for ten minutes.
        dataset = TriptychDataset(rows, args)
        if args.instance_prompt and args.caption_column and None not in dataset.rows[args.caption_column]:
            raise ValueError(
                f"--instance_prompt is for samples without a caption, but all {len(dataset)} have one in"
                f" `{args.caption_column}`. Leave it out, or take that column out of the data."
            )
        if args.max_train_steps is None:
            args.max_train_steps = args.num_train_epochs * math.ceil(len(dataset) / samples_a_step(accelerator, args))
            if 0 < args.max_train_steps <= args.lr_warmup_steps:
                raise ValueError(
                    f"--lr_warmup_steps {args.lr_warmup_steps} has to be below the {args.max_train_steps} steps that"
                    f" --num_train_epochs {args.num_train_epochs} makes."
                )
        checkpoint = find_checkpoint(args)
        if checkpoint:
            check_resumed(checkpoint, args)

        # Encode, with the encoders alone on the accelerator
        pipeline = load_encoders(args, accelerator.device, dtype)
        stack.enter_context(explained_out_of_memory(pipeline, args))
        if args.max_sequence_length == "auto":
            args.max_sequence_length = longest_prompt(pipeline.tokenizer_2, dataset)
            logger.info(f"Prompts are {args.max_sequence_length} tokens long, as the longest in the data")
        encoder = Encoder(pipeline, dataset, args)
        if args.cache_latents:
            encoder.fill_cache(accelerator)
            put_away(pipeline)
            free_memory()

        # Model, optimizer, schedule
        tokens = encoder.image_tokens
        if args.fast:
            # The processes may differ in free memory but must not differ in precision.
            text_and_image = tokens + args.max_sequence_length
            plan, reason = broadcast_object_list([*choose_plan(args, text_and_image, accelerator.device, dtype)])
            vars(args).update(vars(plan))
            logger.info(f"--fast chose {plan}: {reason}")
        set_seed(args.seed)
        engine = find_engine(accelerator, args)
        model = build_model(args, engine.home, dtype)
        state = load_checkpoint(checkpoint, model) if checkpoint else {"step": 0, "samples_seen": 0, "loss": math.nan}
        announce(model, args)
        engine.shard(model)
        optimizer = build_optimizer(parameter_groups(model, args), args)
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        model, optimizer = engine.prepare(model, optimizer)
        if checkpoint:
            resume_optimizer(engine, optimizer, lr_scheduler, state)
            logger.info(f"Resuming from {checkpoint} at step {state['step']}")
        step_fn = Step(
            encoder=encoder,
            args=args,
            device=accelerator.device,
            dtype=dtype,
            shift=timestep_shift_factor(args, pipeline.scheduler, tokens),
            guidance_embeds=engine.bare(model).transformer.config.guidance_embeds,
        )
        if "scaler" in state and accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        if accelerator.is_main_process:
            config = {
                k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in public_config(args).items()
            }
            accelerator.init_trackers("semantic-fill", config=config)
        logger.info(
            f"{len(dataset)} samples, {samples_a_step(accelerator, args)} a step, {args.max_train_steps} steps, timestep shift"
            f" {step_fn.shift:.3f}, {tokens} image tokens"
        )

        loss = train(
            accelerator,
            model,
            optimizer,
            lr_scheduler,
            step_fn,
            dataset,
            state["step"],
            state["samples_seen"],
            args,
        )
        if state["step"] >= args.max_train_steps:
            loss = state["loss"]

        bare = engine.bare(model)
        weights = engine.weights(bare)
        # Model cards show samples.
        if args.max_train_steps % args.validation_steps if args.validation_steps else args.push_to_hub:
            try:
                paint_samples(bare, encoder, args.max_train_steps, engine, args)
            except torch.OutOfMemoryError as error:
                logger.warning(f"No samples are painted, for want of memory: {error}")
        if accelerator.is_main_process:
            samples = sorted(Path(args.output_dir, "samples").glob("step-*.png"))
            files = save_result(bare, weights, loss, samples, args)
            if repo_id is not None:
                push_to_hub(repo_id, [*files, *(f"samples/{sample.name}" for sample in samples)], args)
        # The others have nothing left to do, but must not take the process group down while the first still saves.
        accelerator.wait_for_everyone()
        accelerator.end_training()


if __name__ == "__main__":
    main(parse_args())
