# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What a process of a run needs before it works: accelerate, logging, and switches of torch and its compiler."""

import logging
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

from semantic_fill.compiler import keep_compiled_code
from semantic_fill.engines import DDP_OPTIONS
from semantic_fill.options import Options


# Warnings of libraries that tell a user nothing: the start of the logger's name, of the message, and why.
NOISE = (
    # The trainer offers these backends by its own option, and tries them before it encodes.
    ("diffusers.models", "Attention backends are an experimental feature"),
    # FLUX takes one vector from CLIP, whatever the prompt's length. What T5 cuts is counted once for all captions.
    ("diffusers.pipelines.flux", "The following part of your input was truncated"),
    ("transformers.tokenization", "Token indices sequence length is longer"),
)


def is_news(record: logging.LogRecord) -> bool:
    """A filter for the loggers of libraries that leaves out `NOISE`."""
    return not any(record.name.startswith(name) and record.msg.startswith(text) for name, text in NOISE)


def show_library_warnings() -> None:
    """Has the libraries that load models show their warnings, but for those that are noise."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_warning()
        for handler in logging.getLogger(library.__name__).handlers:
            handler.addFilter(is_news)


def require_tracker(name: str) -> None:
    """
    Raises:
        `ImportError`: if the package of a tracker is missing. Accelerate would log nowhere.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    if name not in ("none", *available) and (name != "all" or not available):
        package = "tensorboard" if name == "all" else name
        raise ImportError(f"--report_to {name} needs a package: `pip install {package}`, or pass --report_to none.")


def setup(options: Options, log_with: GeneralTracker | None = None) -> Accelerator:
    """The accelerator, and logging. A tracker of the caller's own takes the place of `--report_to`."""
    if log_with is None:
        require_tracker(options.report_to)
    logging_dir = str(Path(options.output_dir, options.logging_dir))
    accelerator = Accelerator(
        # A plugin, because an environment variable of accelerate would override the plain number.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=options.gradient_accumulation_steps),
        mixed_precision=options.mixed_precision,
        log_with=log_with or (None if options.report_to == "none" else options.report_to),
        project_config=ProjectConfiguration(project_dir=options.output_dir, logging_dir=logging_dir),
        kwargs_handlers=[DDP_OPTIONS],
    )
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S")
    logging.getLogger("semantic_fill").setLevel(options.log_level.upper())
    show_library_warnings()
    keep_compiled_code()
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    # In torch 2.11 the backward of cuDNN's attention crashes or gives NaN. Flash attention takes over.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return accelerator
