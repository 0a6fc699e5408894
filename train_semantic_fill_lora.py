#!/usr/bin/env python
# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Trains a LoRA on FLUX.1 Fill and a module for a semantic map together, from triptychs (visible | target | semantic).

    accelerate launch train_semantic_fill_lora.py --pretrained_model_name_or_path black-forest-labs/FLUX.1-Fill-dev \\
        --train_data_dir triptychs --output_dir trained

Options can also stand in a YAML file: `accelerate launch train_semantic_fill_lora.py run.yaml`.

One batch goes through read, encode, noise, attend, predict and compare. This file holds what a researcher would change:
the model, the noise, the loss, the optimizer and the loop. What they call is in the package `semantic_fill`.
"""

import contextlib
import functools
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from diffusers.training_utils import (
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline
from semantic_attention import SemanticModel, causal_forward, show_condition, use_causal_attention
from semantic_fill import reports
from semantic_fill.averages import averaged
from semantic_fill.checkpoints import Checkpointer, StopSignals, claim_output_dir, find_checkpoint
from semantic_fill.command_line import parse_options
from semantic_fill.compiler import compile_blocks, start_workers
from semantic_fill.data import load_datasets
from semantic_fill.encoding import Encoder, encode_datasets
from semantic_fill.engines import Engine, find_engine, frozen_garbage
from semantic_fill.files import ornament
from semantic_fill.lora import add_lora
from semantic_fill.memory import set_checkpointing
from semantic_fill.options import ObjectiveOptions, Options
from semantic_fill.page import painted_samples, write_page
from semantic_fill.process import setup
from semantic_fill.publish import open_repo, push_checkpoint, push_to_hub, replace_card, save_result, tracker_config
from semantic_fill.quantizer import FrozenLinearConfig
from semantic_fill.rehearsal import rehearse
from semantic_fill.sampling import count_steps, plan_validation, prefetch, read_samples, seed_of
from semantic_fill.sources import Source
from semantic_fill.summary import Stopwatch, describe_run, summarize
from semantic_fill.training_state import TrainingState, check_same_base, check_same_samples, refuse_untrained
from semantic_fill.validation import HeldOut, extra_files, is_due, stops_early, validate
from semantic_fill.weights import load_lora, load_module, load_weights


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


# -- Batch: read -> encode -> noise -----------------------------------------------------------------------------------


@dataclass
class Batch:
    """
    The inputs of a forward pass, and what its prediction is compared with. B is the batch size, N the number of image
    tokens on the canvas (2048 at 512 pixels, 3072 with a third panel) and T the number of text tokens.
    """

    x_0: torch.Tensor  # [B, N, 64] packed latents of the canvas
    x_1: torch.Tensor  # [B, N, 64] noise
    x_t: torch.Tensor  # [B, N, 64] (1 - t) x_0 + t x_1
    t: torch.Tensor  # [B] timesteps in (0, 1)
    x_cond: torch.Tensor  # [B, N, 320] packed latents of the masked canvas, and its mask
    img_ids: torch.Tensor  # [N, 3] row and column of each image token
    prompt_embeds: torch.Tensor  # [B, T, 4096]
    pooled_prompt_embeds: torch.Tensor  # [B, 768]
    guidance: torch.Tensor | None  # [B], None for a transformer without guidance embedding
    size: tuple[int, int]  # height and width of a view in pixels
    columns: int  # columns of a panel in tokens
    semantic_tokens: torch.Tensor | None = None  # [B, N, 64], of M maps [B, M, N, 64], None for a mode without module
    positions: torch.Tensor | None = None  # [N, 2] row and column of each token within its panel
    keep_map: torch.Tensor | None = None  # [B, M] False for samples that are trained without their map
    loss_tokens: torch.Tensor | None = None  # indices of the image tokens that the loss is taken over, None for all


@dataclass(frozen=True)
class Objective:
    """
    What noise and loss depend on, fixed for a run.

    Args:
        options (`ObjectiveOptions`): Distribution of the timesteps, region and weight of the loss, seed.
        scheduler (`FlowMatchEulerDiscreteScheduler`): The scheduler of inference.
        guidance_embeds (`bool`): Whether the transformer takes a guidance scale.
    """

    options: ObjectiveOptions
    scheduler: FlowMatchEulerDiscreteScheduler
    guidance_embeds: bool

    def shift(self, image_tokens: int) -> float:
        """
        The factor s of t' = s t / (1 + (s - 1) t), which moves timesteps towards noise. With `--timestep_shift resolution`
        it is the one that inference uses for so many tokens.
        """
        shift, config = self.options.timestep_shift, self.scheduler.config
        if shift == "none":
            return 1.0
        if shift != "resolution":
            return float(shift)
        if not config["use_dynamic_shifting"]:
            return config["shift"]
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(image_tokens, *(config[name] for name in names))
        return mu if config["time_shift_type"] == "linear" else math.exp(mu)


def draw_timesteps(generators: list[torch.Generator], options: ObjectiveOptions) -> torch.Tensor:
    """A timestep in (0, 1) of each generator, before timesteps are shifted."""
    density = [
        compute_density_for_timestep_sampling(
            weighting_scheme=options.weighting_scheme,
            batch_size=1,
            logit_mean=options.logit_mean,
            logit_std=options.logit_std,
            mode_scale=options.mode_scale,
            generator=generator,
        )
        for generator in generators
    ]
    return torch.cat(density)


def add_noise(
    x_0: torch.Tensor,
    generators: list[torch.Generator],
    objective: Objective,
    timesteps: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Noise for latents.

    Args:
        x_0 (`torch.Tensor` of shape `(batch, tokens, 64)`): Packed latents.
        generators (`list[torch.Generator]`): One for each sample, on the CPU.
        timesteps (`torch.Tensor` of shape `(batch,)`, *optional*): Before their shift. Default: they are drawn.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Noise x_1 of the same shape in float32, timesteps t `(batch,)`
        in (0, 1), and x_t = (1 - t) x_0 + t x_1 in the dtype of x_0.
    """
    t = draw_timesteps(generators, objective.options) if timesteps is None else timesteps
    t = t.to(device=x_0.device, dtype=torch.float32)
    shift = objective.shift(x_0.shape[1])
    t = shift * t / (1 + (shift - 1) * t)
    x_1 = randn_tensor(x_0.shape, generator=generators, device=x_0.device, dtype=torch.float32)
    weight = t[:, None, None]
    x_t = ((1 - weight) * x_0.float() + weight * x_1).to(x_0.dtype)
    return x_1, t, x_t


def make_batch(
    samples: list[dict],
    encoder: Encoder,
    objective: Objective,
    device: torch.device,
    dtype: torch.dtype,
    timesteps: torch.Tensor | None = None,
) -> Batch:
    """Encodes read samples and adds noise. Every draw is a function of the seed and the sample's place in the run."""
    seed = objective.options.seed
    generators = [torch.Generator().manual_seed(seed_of(seed, "step", s["spec"].position)) for s in samples]
    encoded = encoder.encode_batch(samples, generators, device, dtype)
    x_1, t, x_t = add_noise(encoded["x_0"], generators, objective, timesteps)
    guidance = torch.full_like(t, objective.options.guidance_scale) if objective.guidance_embeds else None
    layout, loss_tokens = encoder.layout(samples), None
    if objective.options.loss_region == "target":
        loss_tokens = layout.tokens_of(encoder.panels.index("target")).to(device)
    encoded |= {"x_1": x_1, "t": t, "x_t": x_t}
    return Batch(guidance=guidance, size=layout.size, columns=layout.columns, loss_tokens=loss_tokens, **encoded)


# -- Model: attend -> predict -----------------------------------------------------------------------------------------


class SemanticFillModel(torch.nn.Module):
    """
    Everything that is trained in one module, so that one wrapper of DDP or FSDP2 holds it.

    Args:
        transformer (`FluxTransformer2DModel`): Frozen, with a LoRA.
        semantic_attention (`SemanticModel`, *optional*): The module of the semantic mode.
        causal_forward (`Callable`, *optional*): Takes the place of the transformer's forward.
    """

    def __init__(
        self, transformer: Any, semantic_attention: SemanticModel | None, causal_forward: Callable | None = None
    ):
        super().__init__()
        self.transformer, self.semantic_attention = transformer, semantic_attention
        self.causal_forward = causal_forward

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.predict(self.attend(batch), batch)

    def attend(self, batch: Batch) -> torch.Tensor:
        """The transformer's input `[B, N, 384]`, x_t and x_cond, enhanced with the map unless a sample drops it."""
        hidden_states = torch.cat((batch.x_t, batch.x_cond), dim=-1)
        if self.causal_forward is not None:
            hidden_states = show_condition(hidden_states, batch.columns)
        if self.semantic_attention is None or batch.keep_map is None:
            return hidden_states
        maps = {"semantic_tokens": batch.semantic_tokens, "positions": batch.positions, "keep_map": batch.keep_map}
        return self.semantic_attention.enhance(hidden_states, **maps)

    def predict(self, hidden_states: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The predicted velocity `[B, N, 64]`."""
        run = self.transformer
        if self.causal_forward is not None:
            run = functools.partial(self.causal_forward, self.transformer, columns=batch.columns)
        return run(
            hidden_states=hidden_states,
            timestep=batch.t,
            guidance=batch.guidance,
            pooled_projections=batch.pooled_prompt_embeds,
            encoder_hidden_states=batch.prompt_embeds,
            txt_ids=batch.img_ids.new_zeros(batch.prompt_embeds.shape[1], 3),
            img_ids=batch.img_ids,
            return_dict=False,
        )[0]

    def scales(self) -> dict[str, float]:
        """Mean absolute gate of each layer of the module, by the layer's name."""
        return {} if self.semantic_attention is None else self.semantic_attention.named_scales()


# -- Loss: compare ----------------------------------------------------------------------------------------------------


def compare(pred: torch.Tensor, batch: Batch, objective: Objective) -> torch.Tensor:
    """The weighted mean squared error between the predicted velocity and x_1 - x_0."""
    error = (pred.float() - (batch.x_1.float() - batch.x_0.float())) ** 2
    if batch.loss_tokens is not None:
        error = error[:, batch.loss_tokens]
    weight = compute_loss_weighting_for_sd3(objective.options.weighting_scheme, sigmas=batch.t)
    return (weight[:, None, None] * error).mean()


# -- Build ------------------------------------------------------------------------------------------------------------


def load_transformer(options: Options, device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The base's transformer, its blocks quantized as they are read."""
    transformer: Any = FluxTransformer2DModel.from_pretrained(
        options.pretrained_model_name_or_path,
        subfolder="transformer",
        dtype=dtype,
        quantization_config=FrozenLinearConfig.of(options.base_precision, device),
        **options.loading,
    )
    return transformer.to(device)


def build_model(transformer: FluxTransformer2DModel, options: Options) -> SemanticFillModel:
    """Freezes a transformer and adds what is trained in float32. Also sets attention, checkpointing and compilation."""
    transformer.requires_grad_(False)
    causal = None
    if options.visible_attention == "causal":
        use_causal_attention(transformer)
        causal = functools.partial(causal_forward, visible_gradients=options.visible_gradients)
    if options.attention_backend != "native":
        transformer.set_attention_backend(options.attention_backend)
    layers = [layer.strip() for layer in options.lora_layers.split(",")] if options.lora_layers else None
    add_lora(transformer, options.rank, options.lora_alpha, options.lora_dropout, layers, options.fused_lora)
    semantic_attention: Any = None
    module_class = SEMANTIC_MODES[options.semantic_mode].module_class
    if module_class is not None:
        if options.semantic_weights:
            maps = options.semantic_maps
            semantic_attention = load_module(options.semantic_weights, module_class, options.cache_dir, maps)
        else:
            # Each kind of module has options of its own.
            names = inspect.signature(module_class).parameters.keys() - {"in_channels"}
            config = {name: getattr(options, f"semantic_{name}") for name in names}
            semantic_attention = module_class(in_channels=transformer.out_channels, **config)
        # Loaded models come in evaluation mode, new ones in training mode.
        semantic_attention.to(transformer.device).requires_grad_(True).train()
    model = SemanticFillModel(transformer.train(), semantic_attention, causal)
    # PEFT gives adapters the dtype of their base. In bfloat16, updates as small as a learning rate would be lost.
    cast_training_params(model, dtype=torch.float32)
    if options.lora_weights:
        # Before the cast, its weights would be rounded.
        load_lora(transformer, options.lora_weights, options.cache_dir)
    set_checkpointing(transformer, options.checkpointing)
    if options.compile:
        compile_blocks(transformer, options.fused_lora)
    return model


def build_optimizer(model: SemanticFillModel, options: Options) -> torch.optim.Optimizer:
    """The optimizer with groups for LoRA, module and the module's gates, each with its own learning rate."""
    rates = {
        "lora": options.learning_rate,
        "module": options.semantic_learning_rate,
        "scale": options.semantic_scale_learning_rate,
    }
    groups = {kind: {"params": [], "lr": rate, "name": kind} for kind, rate in rates.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "lora" if name.startswith("transformer.") else "scale" if name.endswith(".scale") else "module"
            groups[kind]["params"].append(parameter)
    groups = [group for group in groups.values() if group["params"]]
    kwargs = {
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    if options.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(
            groups,
            lr=options.learning_rate,
            use_bias_correction=options.prodigy_use_bias_correction,
            safeguard_warmup=options.prodigy_safeguard_warmup,
            **kwargs,
        )
    if options.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups, **kwargs)
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, fused=on_gpu or None, **kwargs)


# -- Assemble ---------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run that is put together: all that `train` needs."""

    options: Options
    engine: Engine
    encoder: Encoder
    held_out: HeldOut | None
    objective: Objective
    model: torch.nn.Module  # as the engine wrapped it
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    checkpointer: Checkpointer
    state: TrainingState
    make_batch: Callable[[list[dict]], Batch]
    stopwatch: Stopwatch


def samples_per_step(options: Options, accelerator: Accelerator) -> int:
    return options.train_batch_size * options.gradient_accumulation_steps * accelerator.num_processes


def assemble(
    options: Options,
    engine: Engine,
    source: Source | None = None,
    pipeline: FluxFillSemanticPipeline | None = None,
    encoder: Encoder | None = None,
    load_transformer: Callable[[Options, torch.device, torch.dtype], FluxTransformer2DModel] = load_transformer,
    build_model: Callable[[FluxTransformer2DModel, Options], SemanticFillModel] = build_model,
    checkpoint: Path | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> Run:
    """
    Reads, encodes and builds: everything of a run but its loop. Every process has to call it.

    Args:
        options (`Options`): As they were passed. The run's own options also hold what was found out on the way.
        engine (`Engine`): From `find_engine`.
        source, pipeline, encoder, load_transformer, build_model (*optional*): Taken instead of what `options` names.
        checkpoint (`Path`, *optional*): Checkpoint to continue from, from `find_checkpoint`.
        on_checkpoint (`Callable[[Path], None]`, *optional*): Called on the main process for each checkpoint.
    """
    accelerator, device = engine.accelerator, engine.accelerator.device
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    stopwatch = Stopwatch()
    held_out_data = held_out_encoder = held_out = None
    if pipeline is None and encoder is None:
        rehearse(options, accelerator, dtype, build_model, build_optimizer, checkpoint)
    if encoder is None:
        pairs = not SEMANTIC_MODES[options.semantic_mode].uses_map
        dataset, held_out_data = load_datasets(options, accelerator, pairs, source)
    else:
        dataset = encoder.dataset
    samples, step_size = dataset.fingerprint(), samples_per_step(options, accelerator)
    begun = check_same_samples(checkpoint, samples, options)
    if options.max_train_steps is None:
        # New options are checked again, which may end the run and so comes before the encoding.
        steps = count_steps(dataset.groups(), step_size, options.num_train_epochs)
        # Steps before the checkpoint may have taken more samples or fewer.
        options = replace(options, max_train_steps=steps + begun.step - begun.samples_seen // step_size)
    plan = plan_validation(options, held_out_data, step_size)
    if encoder is None:
        with stopwatch.part("encoding"):
            encoder, held_out_encoder = encode_datasets(options, accelerator, dtype, dataset, plan, pipeline)
    options = replace(options, max_sequence_length=encoder.max_sequence_length)
    if options.fast:
        options = replace(options, **vars(reports.plan_fast(options, encoder, device)))
    if options.compile:
        start_workers()
    set_seed(options.seed)
    with reports.explain_out_of_memory(options, encoder, engine):
        model = build_model(load_transformer(options, engine.load_device, dtype), options)
    if checkpoint is not None:
        load_weights(checkpoint, model)
    reports.announce(model, options)
    guidance_embeds = model.transformer.config["guidance_embeds"]
    engine.shard(model)
    optimizer = build_optimizer(model, options)
    steps = {"num_warmup_steps": options.lr_warmup_steps, "num_training_steps": options.max_train_steps}
    shape = {"num_cycles": options.lr_num_cycles, "power": options.lr_power}
    lr_scheduler = get_scheduler(options.lr_scheduler, optimizer=optimizer, **steps, **shape)
    model, optimizer = engine.prepare(model, optimizer, options)
    checkpointer = Checkpointer(engine, engine.unwrap(model), optimizer, lr_scheduler, options, on_checkpoint)
    state = TrainingState() if checkpoint is None else checkpointer.restore(checkpoint)
    base = check_same_base(checkpoint, state, encoder.pipeline.vae, options)
    state.seed, state.samples, state.base = options.seed, samples, base
    objective = Objective(options, encoder.pipeline.scheduler, guidance_embeds)
    make = functools.partial(make_batch, objective=objective, device=device, dtype=dtype)
    if plan is not None and held_out_encoder is not None:
        held_out = HeldOut(
            held_out_encoder,
            plan,
            engine,
            draw_timesteps=functools.partial(draw_timesteps, options=options),
            make_batch=functools.partial(make, encoder=held_out_encoder),
            compare=lambda pred, batch: compare(pred, batch, objective),
        )
    make = functools.partial(make, encoder=encoder)
    parts = (model, optimizer, lr_scheduler, checkpointer, state, make, stopwatch)
    return Run(options, engine, encoder, held_out, objective, *parts)


# -- Train ------------------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Takes optimizer steps from the run's state to `max_train_steps`. Every process has to call it."""
    options, engine, state, accelerator = run.options, run.engine, run.state, run.engine.accelerator
    sampler, samples = read_samples(run)
    bar = tqdm(
        total=options.max_train_steps, initial=state.step, desc="Steps", disable=not accelerator.is_local_main_process
    )
    first_step, bad_steps, skipped = state.step + 1, 0, 0

    # With --cuda_graphs its kernels alone are repeated, so nothing in Python here may depend on the step.
    def forward_backward(batch: Batch) -> torch.Tensor:
        loss = compare(run.model(batch), batch, run.objective)
        engine.backward(run.model, loss)
        return loss.detach()

    batches = prefetch(run.make_batch, samples, accelerator.device)
    with StopSignals() as stop, contextlib.closing(batches), contextlib.closing(bar), frozen_garbage() as freeze:
        for step in range(first_step, options.max_train_steps + 1):
            if is_due(run):
                validate(run)
            if stops_early(options, state):
                if state.step % options.checkpointing_steps:
                    run.checkpointer.save(state)
                break
            if step in (first_step, first_step + 2):
                freeze()
            run.stopwatch.start_step()
            losses = []
            for micro_step in range(options.gradient_accumulation_steps):
                # Dropout is a function of the place in the run too, so a resumed run repeats it.
                torch.manual_seed(seed_of(options.seed, "dropout", step, micro_step, accelerator.process_index))
                batch, last = next(batches), micro_step == options.gradient_accumulation_steps - 1
                shapes = reports.log_shapes(run, batch) if step < first_step + 2 else contextlib.nullcontext()
                with engine.accumulate(run.model, last), shapes:
                    losses.append(engine.run(forward_backward, batch))
            # Here the host waits for the device, and processes for each other. Once more it waits to report the gates.
            norm = engine.clip(run.model, options.max_grad_norm)
            state.loss, norm, stopped_by = engine.gather(torch.stack(losses).mean(), norm, stop.number)
            finite = math.isfinite(state.loss) and math.isfinite(norm)
            engine.step(run.optimizer, finite)
            state.step, state.samples_seen = step, state.samples_seen + samples_per_step(options, accelerator)
            state.losses.append(state.loss)
            run.stopwatch.end_step()
            if finite:
                run.lr_scheduler.step()
                bad_steps = 0
            else:
                skipped += 1
                # The largest scale of fp16's gradients that does not overflow is found by trying.
                overflowed = engine.update_grad_scale(lower=math.isfinite(state.loss))
                bad_steps += not overflowed
                reports.explain_skipped_step(state, norm, overflowed, sampler)
            reports.log_step(run, bar, norm, skipped)

            given_up = bad_steps >= options.max_bad_steps
            # A skipped step changed nothing, so the weights after it are good too. A longer run goes on from the last.
            if step % options.checkpointing_steps == 0 or step == options.max_train_steps or stopped_by or given_up:
                run.checkpointer.save(state)
            if given_up:
                raise reports.give_up(state, bad_steps, sampler)
            if stopped_by:
                reports.announce_stop(stopped_by, step)
                raise SystemExit(128 + stopped_by)


# -- Main -------------------------------------------------------------------------------------------------------------


def parse_args(arguments: list[str] | None = None) -> Options:
    return parse_options(Options, __doc__, sys.argv[1:] if arguments is None else arguments)


def finish(run: Run, repo_id: str | None) -> None:
    """Saves the result first, because what adorns it may fail; validates once more, and uploads it if there is a `repo_id`."""
    options, engine, accelerator, state = run.options, run.engine, run.engine.accelerator, run.state
    refuse_untrained(state, run.lr_scheduler)
    model, files = engine.unwrap(run.model), []
    with averaged(run):
        weights = engine.weights(model)
        if accelerator.is_main_process:
            files = save_result(model, weights, describe_run(state, {}), painted_samples(options, state), options)
    if is_due(run, last=True):
        with ornament("The last validation"):
            validate(run)
    if accelerator.is_main_process:
        summary = summarize(run)
        with ornament("The model card"):
            replace_card(describe_run(state, summary), painted_samples(options, state), options)
        with ornament("The page of the run"):
            write_page(options, state, summary)
        reports.announce_result(options)
        if repo_id is not None:
            push_to_hub(repo_id, files + extra_files(options, state), options.output_dir)
    # The other processes are done, but must not end the process group while the first one still saves.
    accelerator.wait_for_everyone()
    accelerator.end_training()


def main(options: Options | None = None) -> None:
    """A whole run, of the options of the command line where none are given."""
    options = options or parse_args()
    accelerator = setup(options)
    engine = find_engine(accelerator, options)
    with contextlib.ExitStack() as stack:
        repo_id = on_checkpoint = None
        if accelerator.is_main_process:
            stack.callback(claim_output_dir(options).release)
            if options.push_to_hub:
                repo_id = open_repo(options)
                options = replace(options, hub_model_id=repo_id)
            # A tracker without a login fails here, and not when everything is encoded.
            accelerator.init_trackers("semantic-fill")
            if repo_id is not None and options.hub_strategy == "every_checkpoint":
                on_checkpoint = functools.partial(push_checkpoint, repo_id=repo_id)
        run = assemble(options, engine, checkpoint=find_checkpoint(options), on_checkpoint=on_checkpoint)
        for tracker in accelerator.trackers:
            tracker.store_init_configuration(tracker_config(run.options))
        reports.announce_run(run, samples_per_step(run.options, accelerator))
        with reports.explain_out_of_memory(run.options, run.encoder, engine):
            train(run)
        finish(run, repo_id)


if __name__ == "__main__":
    main()
