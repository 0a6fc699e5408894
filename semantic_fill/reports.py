# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What a run says: its start-up lines, its steps and validations, its summary, and what would help when memory runs out."""

import contextlib
import logging
import signal
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from semantic_fill.compiler import CUDNN
from semantic_fill.encoding import Encoder
from semantic_fill.engines import Engine
from semantic_fill.memory import Plan, Workload, choose_plan, empty_transformer, memory_advice, parameter_bytes
from semantic_fill.options import Options
from semantic_fill.sampling import ResumableBatchSampler
from semantic_fill.training_state import TrainingState, loss_labels, worth_labels
from semantic_fill.views import VIEWS


logger = get_logger(__name__)


def announce(model, options: Options) -> None:
    """
    Logs how the map enters.

    Args:
        model (`SemanticFillModel`): Before it is sharded or wrapped.
    """
    logger.info(f"Semantic mode: {options.semantic_mode}")
    if options.visible_attention != "joint":
        logger.info(f"Visible attention: {options.visible_attention}")
    for line in [] if model.semantic_attention is None else model.semantic_attention.describe():
        logger.info(line)
    if options.optimizer == "prodigy" and options.learning_rate < 0.1:
        logger.warning(
            f"--learning_rate {options.learning_rate:g} is a factor of the rate that Prodigy estimates, so hardly anything"
            " is learned. Leave it out, or pass 1."
        )
    if options.attention_backend == CUDNN and not options.compile:
        logger.warning(
            f"--attention_backend {CUDNN} without --compile: with torch 2.11 the process crashed, or gradients were not"
            " finite (benchmarks/RESULTS.md). Pass --compile, or leave it out."
        )


def announce_run(run, samples_per_step: int) -> None:
    """Logs how long a `Run` is, and what its steps are like."""
    options, encoder, tokens = run.options, run.encoder, run.encoder.image_tokens
    logger.info(
        f"{len(encoder.dataset)} samples, {samples_per_step} a step, {options.max_train_steps} steps, timestep shift"
        f" {run.objective.shift(tokens):.3f}, {tokens} image tokens"
    )
    if run.held_out is None:
        logger.info(
            "No samples are held out: losses and paintings are of samples that are trained on. To see whether the run"
            " learns more than these, pass --validation_fraction 0.1, or --validation_data_dir with other samples."
        )
    elif options.validation_steps is None:
        logger.info("The held-out loss is measured at the end. Pass --validation_steps to follow it")
    if options.compile and options.aspect_buckets:
        # Blocks see tokens in a row, so shapes of as many tokens share a graph.
        lengths = {layout.image_tokens for layout in encoder.used_layouts()}
        logger.info(f"The blocks are compiled for {len(lengths)} numbers of image tokens")


def log_scales(model, level: int, digits: int) -> None:
    """Logs the gates of a `SemanticFillModel`. With several maps each says which map it is for."""
    for layer, scale in model.scales().items():
        # With several maps, a line begins with the name of one.
        name = layer.capitalize() if layer.startswith("layer ") else layer
        logger.log(level, f"{name} scale: {scale:.{digits}f}")


def log_step(run, bar: tqdm, norm: float, skipped: int) -> None:
    """Reports a step of a `Run` to the progress bar, the trackers and, every 100 steps, the log."""
    step, loss, rate = run.state.step, run.state.loss, run.lr_scheduler.get_last_lr()[0]
    model = run.engine.unwrap(run.model)
    scales = model.scales()
    bar.update()
    logs = {"loss": loss, "lr": rate, "gradient_norm": norm, "skipped_steps": skipped}
    # Prodigy multiplies the rate by its estimate of the distance to the solution.
    if (distance := run.optimizer.param_groups[0].get("d")) is not None:
        logs["d*lr"] = rate = distance * rate
    shown = {"loss": f"{loss:.4f}", "lr": rate} | ({"scale": f"{next(iter(scales.values())):.4f}"} if scales else {})
    validations = run.state.validations
    for name in ("loss", *worth_labels(validations[-1], "")) if validations else ():
        if validations[-1].get(name) is not None:
            shown[{"loss": "held_out"}.get(name, name)] = f"{validations[-1][name]:.4f}"
    bar.set_postfix(shown)
    run.engine.accelerator.log(logs | {f"scale/{n.replace(' ', '_')}": s for n, s in scales.items()}, step=step)
    if step % 100 == 0:
        logger.info(f"[Step {step}] Loss: {loss:.4f}")
        log_scales(model, logging.INFO, digits=3)


def log_validation(run) -> None:
    """Reports the held-out figures of a `Run`'s last validation to the log and the trackers."""
    found = run.state.validations[-1]
    labels = loss_labels(found)
    losses = {words: found[name] for name, words in labels.items()}
    if not losses:
        return
    shown = {words: "not finite" if loss is None else f"{loss:.4f}" for words, loss in losses.items()}
    line = ", ".join(f"{loss} ({words})" for words, loss in shown.items()) if len(shown) > 1 else shown["right map"]
    logger.info(f"[Step {found['step']}] Held-out loss: {line}")
    names = (*labels, *worth_labels(found, ""))
    values = {f"held_out/{name}": found[name] for name in names if found[name] is not None}
    run.engine.accelerator.log(values, step=found["step"])


def announce_stop(number: int, step: int) -> None:
    """Logs that a signal ended the run, by its name: SIGINT is Ctrl-C."""
    name = signal.Signals(number).name
    logger.info(f"Stopped by {name} at step {step}. Continue with --resume_from_checkpoint latest.")


def announce_result(options: Options) -> None:
    """Logs where the result is, after all that was said on the way, so that nobody has to look for it."""
    folder, page = options.output_dir, Path(options.output_dir, "samples", "index.html")
    shown = f", and {page} shows curves and paintings in a browser" if page.is_file() else ""
    logger.info(f"The result is in {folder}. {Path(folder, 'README.md')} says how to paint with it{shown}")


def explain_skipped_step(state: TrainingState, norm: float, overflowed: bool, sampler: ResumableBatchSampler) -> None:
    """Logs why a step was not applied."""
    if overflowed:
        logger.info(f"Step {state.step} skipped: its gradients overflowed, their scale is lowered")
    else:
        rows = sampler.rows_before(state.samples_seen)
        logger.warning(f"Step {state.step} skipped: loss {state.loss}, gradient norm {norm}, rows {rows}")


def give_up(state: TrainingState, bad_steps: int, sampler: ResumableBatchSampler) -> RuntimeError:
    """The error that ends a run after `--max_bad_steps`."""
    return RuntimeError(
        f"{bad_steps} steps in a row had a loss or gradient that is not finite, the last on rows"
        f" {sampler.rows_before(state.samples_seen)}. None of them was applied: checkpoint-{state.step} holds the last good"
        " weights. Lower --learning_rate, or look at these rows, and continue with --resume_from_checkpoint latest."
    )


@contextlib.contextmanager
def log_shapes(run, batch) -> Iterator[None]:
    """Logs the shapes of a `Batch` on its way through the model of a `Run`, and the scales, where debug is enabled."""
    if not logger.isEnabledFor(logging.DEBUG):
        yield
        return
    model, (height, width) = run.engine.unwrap(run.model), batch.size
    shapes: dict[str, tuple] = {
        f"{name}_img": (len(batch.t), 3, height, width) for name in (*VIEWS, *run.encoder.maps)
    }
    shapes["diptych"] = (len(batch.t), 3, height, len(run.encoder.panels) * width)
    for name in ("x_0", "x_cond", "semantic_tokens", "x_t"):
        if getattr(batch, name) is not None:
            shapes[name] = tuple(getattr(batch, name).shape)

    def add_inputs(transformer, args, kwargs):
        batch_size, tokens, channels = kwargs["hidden_states"].shape
        shapes["x_t_enhanced"] = (batch_size, tokens, batch.x_t.shape[-1])
        shapes["hidden_states"] = (batch_size, tokens, channels)

    handle = model.transformer.register_forward_pre_hook(add_inputs, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    for name, shape in shapes.items():
        logger.debug(f"{name}: {shape}")
    log_scales(model, logging.DEBUG, digits=6)


def workload(options: Options, encoder: Encoder) -> Workload:
    return Workload(
        empty_transformer(options.pretrained_model_name_or_path, options.revision, options.cache_dir),
        encoder.image_tokens,
        encoder.max_sequence_length,
        encoder.pipeline.vae.dtype,
        options.train_batch_size,
        options.rank,
        options.use_8bit_adam if options.optimizer == "adamw" else None,
        options.ema_decay,
        options.visible_attention,
        options.visible_gradients,
    )


def plan_fast(options: Options, encoder: Encoder, device: torch.device) -> Any:
    """The choice of `--fast`, made by one process: they may differ in free memory but not in precision."""
    fixed = {field.name: getattr(options, field.name) for field in fields(Plan)}
    plan, reason = broadcast_object_list(list(choose_plan(workload(options, encoder), fixed, device)))
    logger.info(f"--fast chose {plan}: {reason}")
    return plan


@contextlib.contextmanager
def explain_out_of_memory(options: Options, encoder: Encoder, engine: Engine) -> Iterator[None]:
    """Adds to an out-of-memory error which flags would save memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        pipeline = encoder.pipeline
        kept = [] if options.cache_latents else [pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2]
        plan = Plan(options.base_precision, options.checkpointing, bool(options.compile))
        steps, kept_bytes = options.gradient_accumulation_steps, parameter_bytes(kept)
        advice = memory_advice(plan, workload(options, encoder), steps, kept_bytes, engine.forward_is_collective)
        raise torch.OutOfMemoryError(f"{error}\n{advice}") from error
