# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""A rehearsal of a run: what cannot work on this machine is refused before anything is encoded.

The whole model is put together without memory, on the meta device, which tells whether layers and weights fit. Then a
transformer of two narrow blocks takes one step on the run's own device, with its precision, attention and optimizer. So no
list has to say what works where: the libraries do.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import FluxTransformer2DModel

from pipeline_flux_fill_semantic import SEMANTIC_MODES, panel_positions, read_trained_settings
from semantic_fill.compiler import CUDNN
from semantic_fill.memory import empty_transformer
from semantic_fill.options import Options
from semantic_fill.precision import PRECISIONS, quantize_blocks
from semantic_fill.weights import load_weights


logger = get_logger(__name__)

# The narrowest transformer with the heads of the base.
NARROW = {
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 1,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
}


def rehearse(
    options: Options,
    accelerator: Accelerator,
    dtype: torch.dtype,
    build_model: Callable[[FluxTransformer2DModel, Options], Any],
    build_optimizer: Callable[[Any, Options], torch.optim.Optimizer],
    checkpoint: Path | None = None,
) -> None:
    """
    Raises:
        `ValueError`: if the base, the layers, the weights to start from, or options do not work together on this
            machine. The message names them.
    """
    source = options.pretrained_model_name_or_path
    try:
        empty = empty_transformer(source, options.revision, options.cache_dir)
    except OSError as error:
        # diffusers says the same for a wrong path, a missing login and a machine without a network.
        raise ValueError(
            f"--pretrained_model_name_or_path {source} cannot be loaded: {error} It has to be a folder of a FLUX.1 Fill as"
            " diffusers saves it, or a Hub repository that this machine can reach. For"
            " black-forest-labs/FLUX.1-Fill-dev, accept its license on its page and log in with `hf auth login`."
        ) from error
    quantized = empty.config.get("quantization_config")
    if quantized:
        raise ValueError(
            f"--pretrained_model_name_or_path {source} holds a transformer that is quantized already"
            f" ({quantized.get('quant_method')}), which cannot be trained on here. Pass the original, and --base_precision"
            f" {' or '.join(name for name, kind in PRECISIONS.items() if kind)} to quantize it."
        )
    # What --fast chooses works, and compiling two blocks would take longer than it tells.
    decided = {"base_precision": "bf16", "checkpointing": "none", "attention_backend": "native"}
    decided = {name: getattr(options, name) or default for name, default in decided.items()}
    options = replace(options, **decided, compile=bool(options.compile))
    with torch.device("meta"), warnings.catch_warnings():
        # Weights are compared with the model and not copied.
        warnings.filterwarnings("ignore", message=".*is a no-op")
        whole = build_model(empty, replace(options, attention_backend="native", compile=False))
        if checkpoint is not None:
            load_weights(checkpoint, whole)
    if options.lora_weights and whole.semantic_attention is not None and not options.semantic_weights:
        mode = read_trained_settings(options.lora_weights, cache_dir=options.cache_dir).get("semantic_mode", "none")
        if SEMANTIC_MODES[mode].module_class is not None:
            logger.warning(
                f"--lora_weights {options.lora_weights} was trained with a module, but the run starts with a new one. To"
                f" start from both, pass --semantic_weights {options.lora_weights} too."
            )
    narrow = replace(options, compile=False, lora_layers=None, lora_weights=None, semantic_weights=None)
    device = accelerator.device
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            f"--mixed_precision fp16 needs gradients to be scaled, which accelerate does not do on {device}."
        )
    if options.attention_backend == CUDNN and device.type == "cuda":
        # It has crashed the process in blocks that are not compiled.
        narrow = replace(narrow, attention_backend="native")
    with torch.device("cpu"):
        transformer: Any = FluxTransformer2DModel.from_config({**empty.config, **NARROW})
    try:
        # diffusers' own `to` warns of a dtype.
        transformer = torch.nn.Module.to(transformer, device, dtype)
        _take_step(transformer, narrow, accelerator, build_model, build_optimizer)
    finally:
        if narrow.attention_backend != "native":
            # diffusers would take the backend for all models from now on.
            transformer.set_attention_backend("native")
    if options.compile:
        with _blame(options, device, "compile"):
            torch.compile(torch.neg)(torch.ones(16, device=device))


def _take_step(transformer: Any, options: Options, accelerator: Accelerator, build_model, build_optimizer) -> None:
    device, dtype = transformer.device, transformer.dtype
    with _blame(options, device, "base_precision"):
        quantize_blocks(transformer, options.base_precision)
    with _blame(options, device, "attention_backend"):
        model = build_model(transformer, options)
    with _blame(options, device, "optimizer", "use_8bit_adam"):
        optimizer = build_optimizer(model, options)
    config, text_tokens = transformer.config, 16
    with _blame(options, device, "attention_backend", "base_precision", "checkpointing"):
        ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(8.0)).to(device, dtype)
        maps = () if model.semantic_attention is None else model.semantic_attention.maps
        channels = transformer.out_channels
        shapes = {
            "x_t": (1, len(ids), channels),
            "x_cond": (1, len(ids), config.in_channels - channels),
            "semantic_tokens": (1, *([len(maps)] if len(maps) > 1 else []), len(ids), channels),
            "prompt_embeds": (1, text_tokens, config.joint_attention_dim),
            "pooled_prompt_embeds": (1, config.pooled_projection_dim),
        }
        tensors = {name: torch.randn(shape).to(device, dtype) for name, shape in shapes.items()}
        t = torch.full((1,), 0.5).to(device, dtype)
        guidance, keep_map = t if config.guidance_embeds else None, torch.ones(1, len(maps), dtype=torch.bool)
        canvas = {"img_ids": ids, "columns": 4, "positions": panel_positions(4, 4, 2, device=device)}
        # What the model reads of a batch.
        batch = SimpleNamespace(t=t, guidance=guidance, keep_map=keep_map.to(device), **tensors, **canvas)
        with accelerator.autocast():
            velocity = model(batch)
        velocity.float().square().mean().backward()
        # Some kernels of attention have no backward, and what comes before them would not learn.
        lora = {name: p for name, p in model.transformer.named_parameters() if p.requires_grad}
        idle = [name for name, parameter in lora.items() if parameter.grad is None]
        if idle or not velocity.isfinite().all():
            raise ValueError(f"no gradient reaches {idle[0]}" if idle else "the result is not finite")
    with _blame(options, device, "optimizer", "use_8bit_adam"):
        optimizer.step()


@contextlib.contextmanager
def _blame(options: Options, device: torch.device, *names: str) -> Iterator[None]:
    """Names the options that an error comes from."""
    try:
        yield
    # Libraries raise errors of all kinds where something is missing.
    except Exception as error:
        missing = error.name.split(".")[0] if isinstance(error, ImportError) and error.name else None
        reason = f"it needs a package, `pip install {missing}`" if missing else error
        values = {name: getattr(options, name) for name in names}
        chosen = [f"--{n}" if value is True else f"--{n} {value}" for n, value in values.items() if value is not False]
        raise ValueError(f"{' and '.join(chosen)} cannot work on this machine ({device.type}): {reason}") from error
