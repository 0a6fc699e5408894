# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Training at FLUX.1-Fill-dev's true size: the diffusers recipe against this trainer, in one run, in turns.

    python benchmarks/train_speed.py --minutes 5 --output train_speed.json

The peer is what diffusers' FLUX LoRA scripts do: eager, gradient checkpointing, PEFT's LoRA layers in bf16, T5, CLIP
and the VAE in every step. This trainer is run by its own `train`, with the options that a user would pass. Both get the
same batch, rank, canvas and prompt length. Then each lever alone, and all but it, as far as the minutes reach.
"""

import argparse
import io
import json
import re
import statistics
import tempfile
import time
import traceback
from pathlib import Path

import flux_shape
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers.models.attention_dispatch import attention_backend
from flux_shape import Report, build_encoders, build_transformer, describe, free, peak_gib, synchronise
from peft import LoraConfig
from training_speed import choose_plan

import train_semantic_fill_lora as trainer


CAPTION = "a thermal photograph of a street at night, the warm parts bright"
# What makes a step fast: name, the options that turn it on where all others are off, and the one that turns it off where
# they are on. cuDNN's attention is no choice for eager blocks.
LEVERS = [
    ("cached encodings", "--cache_latents", "--no-cache_latents"),
    ("LoRA layers", "--fused_lora", "--no-fused_lora"),
    ("less checkpointing", "--checkpointing=selective", "--checkpointing=full"),
    ("fp8", "--base_precision=fp8", "--base_precision=bf16"),
    ("compile", "--compile", "--no-compile"),
    ("cuDNN's attention", "--compile --attention_backend=_native_cudnn", "--attention_backend=native"),
    ("prompts as long as the data's", "--max_sequence_length=auto", "--max_sequence_length=512"),
]
KINDS = {
    "attention": ("flash", "fmha", "attention", "attn"),
    "GEMM": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "_mm", "matmul"),
    "quantisation": ("quant", "amax", "float8", "kgemm_4bit", "dequant"),
    "copies": ("memcpy", "memset"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("train_speed.json"))
    parser.add_argument("--minutes", type=float, default=8.0, help="No row is begun after so many.")
    parser.add_argument("--shape", choices=["flux", "test"], default="flux")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resolution", type=int, help="Of one panel. Default: 512, or 32 with --shape test.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="Timed steps of a round, after --warm_up.")
    parser.add_argument("--warm_up", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="Turns of peer and trainer.")
    parser.add_argument("--rows", default="speed,memory,levers", help="Which groups, in this order.")
    parser.add_argument("--only", default="", help="A regular expression: rows whose names it finds.")
    args = parser.parse_args()
    args.resolution = args.resolution or (512 if args.shape == "flux" else 32)
    return args


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args, self.start = args, time.perf_counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16
        self.folder = tempfile.TemporaryDirectory()
        config = Path(self.folder.name, "transformer", "config.json")
        config.parent.mkdir()
        shape = {"_class_name": "FluxTransformer2DModel"} | flux_shape.transformer_config(args.shape)
        config.write_text(json.dumps(shape))
        self.image_tokens = 2 * (args.resolution // 16) ** 2
        self.report = Report(args.output, describe(self.device))
        self.rows = [
            {"image": {"bytes": picture(i, args.resolution), "path": None}, "text": CAPTION} for i in range(4)
        ]
        self.gemm_peak = flux_shape.gemm_peak(self.device, self.dtype)
        self.flops, self.compiled = {}, None
        self.report.note(gemm_tflops=self.gemm_peak / 1e12)

    def floor(self, image_tokens: int, text_tokens: int) -> float:
        """Seconds a sample: the base's products forward and, for the input's gradient, once more, at the bf16 peak."""
        tokens = image_tokens, text_tokens
        if tokens not in self.flops:
            self.flops[tokens] = flux_shape.forward_flops(self.args.shape, *tokens)
        return 2 * self.flops[tokens] / self.gemm_peak

    def time_left(self) -> float:
        return self.args.minutes * 60 - (time.perf_counter() - self.start)

    def row(self, name: str, measure, *args, **kwargs) -> dict | None:
        """One row, whatever happens in it: a failure is a row too, and costs no other."""
        if self.time_left() <= 0:
            self.report.add(row=name, result="no time left")
            return None
        free(self.device)
        start = time.perf_counter()
        try:
            # A row that chooses another one leaves it to the process.
            with attention_backend("native"):
                result = measure(*args, **kwargs)
        except torch.OutOfMemoryError:
            result = {"result": f"out of memory beyond {peak_gib(self.device):.1f} GiB"}
        except Exception as error:
            traceback.print_exc()
            result = {"result": f"{type(error).__name__}: {str(error)[:200]}"}
        self.report.add(row=name, **result, minutes=(time.perf_counter() - start) / 60)
        return result

    def figures(self, seconds: list[float], batch: int, image_tokens: int, text_tokens: int, **more) -> dict:
        second = statistics.median(seconds)
        spread = (max(seconds) - min(seconds)) / second
        floor = self.floor(image_tokens, text_tokens) * batch / second
        return {
            "samples/s": batch / second,
            "ms/step": 1e3 * second,
            "spread": spread,
            "peak GiB": peak_gib(self.device),
            "of bf16 floor": floor,
            "image tokens": image_tokens,
            "text tokens": text_tokens,
        } | more

    # -- The peer -------------------------------------------------------------------------------------------------------

    def peer(self, batch: int, encode: bool = True, profile: bool = False) -> dict:
        args, device, dtype = self.args, self.device, self.dtype
        pipeline = build_encoders(args.shape, device, dtype)
        transformer = build_transformer(args.shape, "bf16", device, dtype)
        transformer.requires_grad_(False).train().enable_gradient_checkpointing()
        transformer.add_adapter(
            LoraConfig(
                r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=trainer.LORA_TARGETS
            )
        )
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        accelerator = fresh_accelerator()
        optimizer = torch.optim.AdamW(parameters)
        transformer, optimizer = accelerator.prepare(transformer, optimizer)
        config = accelerator.unwrap_model(transformer).config
        pixels = torch.rand(batch, 3, args.resolution, 2 * args.resolution)
        mask = pipeline.prepare_diptych(torch.zeros(1, 3, args.resolution, args.resolution))[1].to(device)
        encoded, encoding = None, []

        def step():
            nonlocal encoded
            synchronise(device)
            start = time.perf_counter()
            if encode or encoded is None:
                with torch.no_grad():
                    prompt = pipeline.encode_prompt([CAPTION] * batch, [CAPTION] * batch, max_sequence_length=512)
                    encoded = *prompt[:2], pipeline.encode_diptych(pixels, mask, dtype=dtype)
                synchronise(device)
            encoding.append(time.perf_counter() - start)
            prompt_embeds, pooled, (x_0, x_cond, img_ids) = encoded
            x_1, t = torch.randn_like(x_0), torch.rand(batch, device=device)
            x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * x_1
            with accelerator.accumulate(transformer):
                pred = transformer(
                    hidden_states=torch.cat((x_t.to(dtype), x_cond), dim=-1),
                    timestep=t,
                    guidance=torch.ones_like(t) if config.guidance_embeds else None,
                    pooled_projections=pooled,
                    encoder_hidden_states=prompt_embeds,
                    txt_ids=img_ids.new_zeros(prompt_embeds.shape[1], 3),
                    img_ids=img_ids,
                    return_dict=False,
                )[0]
                loss = F.mse_loss(pred.float(), (x_1 - x_0).float())
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            loss.item()
            synchronise(device)
            return time.perf_counter() - start

        seconds = [step() for _ in range(args.warm_up - 1 + args.steps)][args.warm_up - 1 :]
        result = self.figures(
            seconds, batch, self.image_tokens, 512, **{"encoding ms": 1e3 * statistics.median(encoding)}
        )
        if profile:
            self.profile("peer", step)
        return result

    # -- The trainer ----------------------------------------------------------------------------------------------------

    def options(self, *more, batch: int | None = None) -> argparse.Namespace:
        fixed = {
            "pretrained_model_name_or_path": self.folder.name,
            "output_dir": Path(self.folder.name, "out"),
            "train_data_dir": self.folder.name,
            "resolution": self.args.resolution,
            "rank": self.args.rank,
            "train_batch_size": batch or self.args.batch,
            "report_to": "none",
            "mixed_precision": "bf16",
            "dataloader_num_workers": 2,
        }
        return trainer.parse_args([*(f"--{name}={value}" for name, value in fixed.items()), *more])

    def trainer(self, *more, batch: int | None = None, profile: str | None = None) -> dict:
        device, dtype = self.device, self.dtype
        args = self.options(*more, batch=batch)
        args.caption_column = "text"
        accelerator = fresh_accelerator()
        dataset = trainer.TriptychDataset(self.rows, args)
        pipeline = build_encoders(self.args.shape, device, dtype)
        if args.max_sequence_length == "auto":
            args.max_sequence_length = trainer.longest_prompt(pipeline.tokenizer_2, dataset)
        encoder = trainer.Encoder(pipeline, dataset, args)
        image_tokens = encoder.image_tokens
        notes = {}
        if args.cache_latents:
            pipeline.to("cpu")
            free(device)
            encoder.fill_cache(accelerator)
            notes["encoding GiB"] = peak_gib(device)
            trainer.put_away(pipeline)
        free(device)
        if args.fast:
            plan, reason = choose_plan(args, image_tokens + args.max_sequence_length, device, dtype)
            vars(args).update(vars(plan))
            self.report.note(fast=f"{plan}: {reason}")
        # Shapes that change would make the compiler go over to dynamic ones, which no run has.
        if (compiled := str(args)) != self.compiled:
            torch._dynamo.reset()
            self.compiled = compiled
        notes["flags"] = f"{args.base_precision} {args.checkpointing}{' compile' if args.compile else ''}"
        transformer = build_transformer(self.args.shape, args.base_precision, device, dtype)
        model = trainer.add_trained_parts(transformer, args)
        notes["loading GiB"] = peak_gib(device)
        optimizer = trainer.build_optimizer(trainer.parameter_groups(model, args), args)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        shift = trainer.timestep_shift_factor(args, pipeline.scheduler, image_tokens)
        step = trainer.Step(encoder, args, device, dtype, shift, model.transformer.config.guidance_embeds)
        model, optimizer = accelerator.prepare(model, optimizer)
        profiled = 2 if profile and device.type == "cuda" else 0
        args.max_train_steps = self.args.warm_up + self.args.steps + 1 + profiled
        clock = Clock(step, profile_from=self.args.warm_up + self.args.steps + 1 if profiled else None)
        trainer.train(accelerator, model, optimizer, scheduler, clock, dataset, 0, 0, args)
        seconds = clock.seconds(self.args.warm_up, self.args.steps)
        result = self.figures(seconds, args.train_batch_size, image_tokens, args.max_sequence_length, **notes)
        if profiled:
            clock.stop_profile()
            self.report.note(**{f"profile {profile}": breakdown(*clock.profiles, self.args.rank)})
        return result

    def fast(self, *more, **kwargs) -> dict:
        """`--fast`, and where its estimate was too low for the card, the next less hungry checkpointing."""
        for fallback in ([], ["--checkpointing=selective"], ["--checkpointing=full"]):
            try:
                return self.trainer("--fast", *more, *fallback, **kwargs) | (
                    {"fallback": fallback[0]} if fallback else {}
                )
            except torch.OutOfMemoryError as error:
                if fallback == ["--checkpointing=full"]:
                    raise
                print(f"out of memory with --fast {fallback}: {error}", flush=True)
            free(self.device)

    def profile(self, name: str, step) -> None:
        if self.device.type != "cuda":
            return
        profiles = []
        for with_host in (False, True):
            with make_profiler(with_host) as profiler:
                step()
            profiles.append(profiler)
        self.report.note(**{f"profile {name}": breakdown(*profiles, self.args.rank)})


class Clock:
    """Stands before a `Step` and notes when each loss is asked for: from one to the next is a whole optimizer step."""

    def __init__(self, step, profile_from: int | None = None):
        self.step, self.profile_from, self.calls, self.profiles = step, profile_from, [], []
        # The host's events slow it down and so add idle time: a step without them, then one with.
        self.with_host = [] if profile_from is None else [False, True]

    def __getattr__(self, name):
        return getattr(self.step, name)

    def loss(self, model, batch):
        if self.profile_from is not None and len(self.calls) >= self.profile_from:
            self.stop_profile()
            if self.with_host:
                self.profiles.append(make_profiler(self.with_host.pop(0)))
                self.profiles[-1].start()
        # The host has just read the last step's loss, so the device is through with its passes.
        self.calls.append(time.perf_counter())
        return self.step.loss(model, batch)

    def stop_profile(self) -> None:
        if self.profiles and len(self.calls) - self.profile_from == len(self.profiles):
            torch.cuda.synchronize()
            self.profiles[-1].stop()

    def seconds(self, first: int, count: int) -> list[float]:
        return [b - a for a, b in zip(self.calls[first:], self.calls[first + 1 : first + 1 + count])]


def make_profiler(with_host: bool) -> torch.profiler.profile:
    activities = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activities.CUDA] + [activities.CPU] * with_host, record_shapes=with_host)


def device_kernels(profiler: torch.profiler.profile) -> list:
    kernels = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sorted((e for e in kernels if not e.is_user_annotation), key=lambda e: e.time_range.start)


def breakdown(plain: torch.profiler.profile, with_host: torch.profiler.profile, rank: int) -> dict:
    """Milliseconds of a step by kind of kernel, the kernels that take most, and where the device waits longest."""
    kernels, gaps, busy_until = {}, [], None
    kinds = dict.fromkeys(("GEMM", "LoRA", "attention", "quantisation", "elementwise", "copies", "idle"), 0.0)
    for event in device_kernels(plain):
        start, end = event.time_range.start, event.time_range.end
        if busy_until is None:
            first = busy_until = start
        elif start > busy_until:
            kinds["idle"] += (start - busy_until) / 1e3
            gaps.append(((start - busy_until) / 1e3, (busy_until - first) / 1e3, event.name[:80]))
        busy_until = max(busy_until, end)
        kernels[event.name] = kernels.get(event.name, 0) + (end - start) / 1e3
    for name, milliseconds in kernels.items():
        lowered = name.lower()
        # The compiler names a kernel after the operations that it fused, products in front of them included.
        own = lowered.startswith(("triton", "void at::native", "vectorized"))
        candidates = ("quantisation",) if own else ("attention", "GEMM", "quantisation", "copies")
        kind = next((k for k in candidates if any(part in lowered for part in KINDS[k])), "elementwise")
        kinds[kind] += milliseconds
    # Only the host knows the shapes.
    for event in with_host.key_averages(group_by_input_shape=True):
        if event.key in ("aten::mm", "aten::addmm"):
            shapes = [shape for shape in event.input_shapes if len(shape) == 2]
            if any(rank in shape for shape in shapes):
                milliseconds = event.self_device_time_total / 1e3
                kinds["LoRA"] += milliseconds
                kinds["GEMM"] -= milliseconds
    top = sorted(kernels.items(), key=lambda item: -item[1])[:25]
    return {
        "ms a step": kinds,
        "kernels": {name[:160]: milliseconds for name, milliseconds in top},
        "gaps (ms, ms into the step, kernel after)": sorted(gaps, reverse=True)[:12],
        "gaps": len(gaps),
    }


def picture(seed: int, resolution: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (resolution, 3 * resolution, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def fresh_accelerator() -> Accelerator:
    """What the trainer's `setup` does for a run, here for each of several in one process."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return Accelerator(mixed_precision="bf16")


def main() -> None:
    args = parse_args()
    # Rows differ in flags, and each is compiled for itself.
    torch._dynamo.config.recompile_limit = 64
    bench = Bench(args)
    same_tokens = "--max_sequence_length=512"
    compiled = ("--compile", same_tokens)
    none = ["--checkpointing=full", same_tokens, "--no-cache_latents", "--no-fused_lora"]
    groups = {
        "speed": [
            row
            for turn in range(args.rounds)
            for row in (
                (f"peer, turn {turn + 1}", bench.peer, [args.batch], {"profile": turn == 0}),
                (
                    f"--fast, 512 text tokens, turn {turn + 1}",
                    bench.fast,
                    [same_tokens],
                    {"profile": "fast" if turn == 0 else None},
                ),
            )
        ],
        "memory": [
            (
                f"batch 1, {precision}, {name}, compiled",
                bench.trainer,
                [*compiled, f"--base_precision={precision}", f"--checkpointing={name.split()[0]}"],
                {"batch": 1, "profile": f"batch 1, {precision}, {name}"},
            )
            for name, precisions in {
                "full checkpointing": ("bf16", "nf4", "int8", "fp8"),
                "offload": ("bf16", "nf4"),
            }.items()
            for precision in precisions
        ],
        "attention": [
            (
                f"--fast, {backend}",
                bench.fast,
                [same_tokens, f"--attention_backend={backend}"],
                {"profile": f"fast {backend}"},
            )
            for backend in ("native", "_flash_3", "flash")
        ],
        "levers": [
            ("none of the levers", bench.trainer, none, {}),
            *((f"{name} alone", bench.trainer, [*none, *on.split()], {}) for name, on, _ in LEVERS),
            ("all levers (--fast)", bench.fast, [], {"profile": "all levers"}),
            *(
                (f"all but {name}", bench.fast, [same_tokens, off], {})
                for name, _, off in LEVERS
                if off != same_tokens
            ),
        ],
        "modes": [
            (f"--fast, {options}", bench.fast, [same_tokens, *options.split()], {})
            for options in (
                "--semantic_mode none",
                "--semantic_position direct --semantic_injection condition",
                "--semantic_position rope --semantic_injection condition",
                "--semantic_mode in_context",
            )
        ],
    }
    for group in args.rows.split(","):
        for name, measure, positional, named in groups[group]:
            if not re.search(args.only, name):
                continue
            bench.row(name, measure, *positional, **named)
    print(json.dumps(bench.report.about | bench.report.more, indent=1))
    print(bench.report.table())


if __name__ == "__main__":
    main()
