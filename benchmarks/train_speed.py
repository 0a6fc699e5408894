# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Training at FLUX.1-Fill-dev's true size: the diffusers recipe against this trainer, in one run, in turns.

    python benchmarks/train_speed.py --minutes 5 --output train_speed.json
    python benchmarks/train_speed.py --rounds 3 --row="--fast" --row="--compile --checkpointing full --train_batch_size 1"

The baseline is what diffusers' FLUX LoRA scripts do: eager, gradient checkpointing, PEFT's LoRA layers in bf16, and T5,
CLIP and the VAE in every step. The trainer is run by its own `train`, with the options that a user would pass. Both get
the same batch, rank, canvas and prompt length. `--rows` names groups of rows. `--row` times options of your own.
"""

import argparse
import functools
import io
import json
import re
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import flux_shape
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.attention_dispatch import attention_backend
from flux_shape import build_encoders, build_transformer
from measurement import (
    Report,
    StepTracker,
    assemble,
    describe,
    find_device,
    free,
    fresh_state,
    gemm_peak,
    markdown,
    peak_gib,
    step_figures,
    timed,
)
from peft import LoraConfig

import train_semantic_fill_lora as trainer
from semantic_fill.lora import LORA_TARGETS
from semantic_fill.tables import TableSource


CAPTION = "a thermal photograph of a street at night, the warm parts bright"
SAME_TOKENS = "--max_sequence_length=512"
# What makes a step fast: its name, the options that turn it on where all others are off, and the one that turns it off
# where they are on. cuDNN's attention is no choice for eager blocks.
SETTINGS = [
    ("cached encodings", "--cache_latents", "--no-cache_latents"),
    ("LoRA layers", "--fused_lora", "--no-fused_lora"),
    ("less checkpointing", "--checkpointing=selective", "--checkpointing=full"),
    ("fp8", "--base_precision=fp8", "--base_precision=bf16"),
    ("compile", "--compile", "--no-compile"),
    ("cuDNN's attention", "--compile --attention_backend=_native_cudnn", "--attention_backend=native"),
    ("prompts as long as the data's", "--max_sequence_length=auto", SAME_TOKENS),
]
NO_SETTING = ["--checkpointing=full", SAME_TOKENS, "--no-cache_latents", "--no-fused_lora"]
KINDS = {
    "attention": ("flash", "fmha", "attention", "attn"),
    "GEMM": ("gemm", "cutlass", "nvjet", "cublas", "xmma", "_mm", "matmul"),
    "quantization": ("quant", "amax", "float8", "kgemm_4bit", "dequant"),
    "copies": ("memcpy", "memset"),
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("train_speed.json"))
    parser.add_argument("--minutes", type=float, default=8.0, help="No row is begun after so many.")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2, help="How often each group of rows is run, row by row.")
    parser.add_argument("--rows", default="speed,memory,settings", help="Which groups, in this order.")
    parser.add_argument(
        "--row",
        action="append",
        metavar="OPTIONS",
        help='Options of the trainer, as in --row="--fast --rank 8". Such rows replace --rows.',
    )
    return parse_sizes(parser, arguments)


def parse_sizes(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options of a parser, and what a step computes and how many are timed."""
    parser.add_argument("--only", default="", help="A regular expression: rows whose names it finds.")
    parser.add_argument("--shape", choices=["flux", "test"], default="flux")
    parser.add_argument("--resolution", type=int, help="Pixels of one panel. Default: 512, or 32 with --shape test.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="Timed steps of a row, after --warm_up.")
    parser.add_argument("--warm_up", type=int, default=3, help="Steps before them, at least 1.")
    args = parser.parse_args(arguments)
    args.resolution = args.resolution or (512 if args.shape == "flux" else 32)
    return args


@dataclass(frozen=True)
class Row:
    name: str
    measure: Callable[..., dict]
    profile: bool = False


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args, self.start = args, time.perf_counter()
        self.device = find_device()
        self.dtype = torch.bfloat16
        self.folder = tempfile.TemporaryDirectory()
        config = Path(self.folder.name, "transformer", "config.json")
        config.parent.mkdir()
        shape = {"_class_name": "FluxTransformer2DModel"} | flux_shape.transformer_config(args.shape)
        config.write_text(json.dumps(shape))
        self.image_tokens = 2 * (args.resolution // 16) ** 2
        self.report = Report(args.output, describe(self.device))
        self.pictures = noise_rows(4, args.resolution)
        self.gemm_peak = gemm_peak(self.device, self.dtype)
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

    def add_row(self, name: str, measure: Callable[[], dict], **facts) -> None:
        """Measures one row. A failure is a row too, and costs no other."""
        if self.time_left() <= 0:
            self.report.add(row=name, **facts, result="no time left")
            return
        free(self.device)
        start = time.perf_counter()
        try:
            # A row that chooses another backend leaves it to the process.
            with attention_backend("native"):
                result = measure()
        except torch.OutOfMemoryError:
            result = {"result": f"out of memory beyond {peak_gib(self.device):.1f} GiB"}
        except Exception as error:
            traceback.print_exc()
            result = {"result": f"{type(error).__name__}: {str(error)[:200]}"}
        self.report.add(row=name, **facts, **result, minutes=(time.perf_counter() - start) / 60)

    def figures(self, seconds: list[float], batch: int, image_tokens: int, text_tokens: int, **more) -> dict:
        figures = step_figures(seconds, batch, self.device)
        return (
            figures
            | {
                "of bf16 floor": self.floor(image_tokens, text_tokens) * figures["samples/s"],
                "image tokens": image_tokens,
                "text tokens": text_tokens,
            }
            | more
        )

    # -- The baseline ---------------------------------------------------------------------------------------------------

    def baseline(self, profile: str | None = None) -> dict:
        args, device, dtype, batch = self.args, self.device, self.dtype, self.args.batch
        pipeline = build_encoders(args.shape, device, dtype)
        transformer = build_transformer(args.shape, "bf16", device, dtype)
        transformer.requires_grad_(False).train().enable_gradient_checkpointing()
        transformer.add_adapter(
            LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
        )
        parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
        fresh_state()
        torch.backends.cuda.enable_cudnn_sdp(False)
        accelerator = Accelerator(mixed_precision="bf16")
        optimizer = torch.optim.AdamW(parameters)
        transformer, optimizer = accelerator.prepare(transformer, optimizer)
        config = accelerator.unwrap_model(transformer).config
        pixels = torch.rand(batch, 3, args.resolution, 2 * args.resolution)
        mask = pipeline.prepare_diptych(torch.zeros(1, 3, args.resolution, args.resolution))[1].to(device)
        encoding = []

        @torch.no_grad()
        def encode() -> tuple:
            prompt = pipeline.encode_prompt([CAPTION] * batch, [CAPTION] * batch, max_sequence_length=512)
            return *prompt[:2], *pipeline.encode_diptych(pixels, mask, dtype=dtype)

        def step() -> None:
            (prompt_embeds, pooled, x_0, x_cond, img_ids), seconds = timed(encode, device)
            encoding.append(seconds)
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

        seconds = [timed(step, device)[1] for _ in range(args.warm_up + args.steps)][args.warm_up :]
        encoding_ms = 1e3 * statistics.median(encoding)
        result = self.figures(seconds, batch, self.image_tokens, 512, **{"encoding ms": encoding_ms})
        if profile and device.type == "cuda":
            profiles = []
            for with_host in (False, True):
                with make_profiler(with_host) as profiler:
                    step()
                profiles.append(profiler)
            self.report.note(**{f"profile {profile}": breakdown(*profiles, args.rank)})
        return result

    # -- The trainer ----------------------------------------------------------------------------------------------------

    def options(self, *more: str, steps: int) -> trainer.Options:
        fixed = {
            "pretrained_model_name_or_path": self.folder.name,
            "output_dir": Path(self.folder.name, "out"),
            # One of the data options is required. The rows are made here.
            "dataset_name": "noise",
            "resolution": self.args.resolution,
            "rank": self.args.rank,
            "train_batch_size": self.args.batch,
            "max_train_steps": steps,
            "checkpointing_steps": steps + 1,
            "report_to": "none",
            "mixed_precision": "bf16",
            "dataloader_num_workers": 2 if self.args.shape == "flux" else 0,
        }
        return trainer.parse_args([*(f"--{name}={value}" for name, value in fixed.items()), *more])

    def trainer(self, *more: str, profile: str | None = None) -> dict:
        """One run of the trainer with the options `more`."""
        device, dtype, warm_up, notes = self.device, self.dtype, self.args.warm_up, {}
        steps = warm_up + self.args.steps
        profiled = 2 if profile and device.type == "cuda" else 0
        options = self.options(*more, steps=steps + profiled)

        def load_transformer(options: trainer.Options, device: torch.device, dtype: torch.dtype):
            if options.cache_latents:
                notes["encoding GiB"] = peak_gib(device)
            free(device)
            # Each row's options make graphs of their own, and a block with too many of them is not compiled.
            if self.compiled != options:
                torch._dynamo.reset()
                self.compiled = options
            return build_transformer(self.args.shape, options.base_precision, device, dtype)

        pipeline = build_encoders(self.args.shape, device, dtype)
        if options.cache_latents:
            # The trainer loads them to the CPU.
            pipeline.to("cpu")
            free(device)
        tracker = ProfilingTracker(steps) if profiled else StepTracker()
        source = TableSource(self.pictures, options)
        run = assemble(options, tracker, source=source, pipeline=pipeline, load_transformer=load_transformer)
        notes["loading GiB"] = peak_gib(device)
        options, encoder = run.options, run.encoder
        notes["flags"] = f"{options.base_precision} {options.checkpointing}{' compile' if options.compile else ''}"
        trainer.train(run)
        notes["first step s"] = run.stopwatch.steps[0]
        seconds = tracker.seconds(warm_up)[: self.args.steps]
        tokens = encoder.image_tokens, encoder.max_sequence_length
        result = self.figures(seconds, options.train_batch_size, *tokens, **notes)
        if profiled:
            found = breakdown(*tracker.profiles, options.rank)
            self.report.note(**{f"profile {profile}": found})
            result["idle ms"] = found["ms a step"]["idle"]
            result["busy ms"] = sum(found["ms a step"].values()) - result["idle ms"]
        return result

    def fast(self, *more: str, profile: str | None = None) -> dict:
        """`--fast`, and where its estimate was too low for the card, the next less hungry checkpointing."""
        for fallback in ([], ["--checkpointing=selective"], ["--checkpointing=full"]):
            try:
                result = self.trainer("--fast", *more, *fallback, profile=profile)
                return result | ({"fallback": fallback[0]} if fallback else {})
            except torch.OutOfMemoryError as error:
                if fallback == ["--checkpointing=full"]:
                    raise
                print(f"out of memory with --fast {fallback}: {error}", flush=True)
            free(self.device)

    # -- The rows -------------------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[Row]]:
        def trained(name: str, *options: str, **more) -> Row:
            return Row(name, functools.partial(self.trainer, *options), **more)

        def fast(name: str, *options: str, **more) -> Row:
            return Row(name, functools.partial(self.fast, *options), **more)

        in_little_memory = [("full", precision) for precision in ("bf16", "nf4", "int8", "fp8")]
        in_little_memory += [("offload", precision) for precision in ("bf16", "nf4")]
        return {
            "speed": [
                Row("baseline", self.baseline, profile=True),
                fast("--fast, 512 text tokens", SAME_TOKENS, profile=True),
            ],
            "memory": [
                trained(
                    f"batch 1, {precision}, {checkpointing} checkpointing, compiled",
                    *("--compile", SAME_TOKENS, "--train_batch_size=1"),
                    *(f"--base_precision={precision}", f"--checkpointing={checkpointing}"),
                    profile=True,
                )
                for checkpointing, precision in in_little_memory
            ],
            "attention": [
                fast(f"--fast, {backend}", SAME_TOKENS, f"--attention_backend={backend}", profile=True)
                for backend in ("native", "_flash_3", "flash")
            ],
            "settings": [
                trained("no setting", *NO_SETTING),
                *(trained(f"{name} alone", *NO_SETTING, *on.split()) for name, on, _ in SETTINGS),
                fast("all settings (--fast)", profile=True),
                *(
                    fast(f"all but {name}", SAME_TOKENS, off)
                    for name, _, off in SETTINGS
                    # Without this one, the row is that of `speed`.
                    if off != SAME_TOKENS
                ),
            ],
            "modes": [
                fast(f"--fast, --semantic_mode {mode}", SAME_TOKENS, f"--semantic_mode={mode}")
                for mode in ("none", "projection", "cross_attention", "in_context")
            ],
        }

    def chosen_rows(self) -> list[list[Row]]:
        if self.args.row:
            rows = {text: functools.partial(self.trainer, *text.split()) for text in self.args.row}
            return [[Row(text, measure, profile=True) for text, measure in rows.items()]]
        groups = self.groups()
        groups = [groups[name] for name in self.args.rows.split(",")]
        return [[row for row in group if re.search(self.args.only, row.name)] for group in groups]

    def medians(self) -> list[dict]:
        """Each row's median over its turns of the time of a step, and its highest peak of memory."""
        turns = {}
        for row in self.report.rows:
            if "ms/step" in row:
                turns.setdefault(row["row"], []).append(row)
        return [
            {
                "row": name,
                "turns": len(rows),
                **{key: statistics.median(row[key] for row in rows) for key in ("samples/s", "ms/step")},
                "peak GiB": max(row["peak GiB"] for row in rows),
            }
            for name, rows in turns.items()
        ]


# -- Profiles ---------------------------------------------------------------------------------------------------------


class ProfilingTracker(StepTracker):
    """Also profiles the two steps after the first `steps`."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.profiles = steps, []

    def log(self, values, step=None, **kwargs):
        super().log(values, step, **kwargs)
        done = len(self.times) - self.steps
        if done < 0:
            return
        torch.cuda.synchronize()
        if done > 0:
            self.profiles[-1].stop()
        if done < 2:
            # The host's events slow it down, which adds idle time, so the first step goes without them.
            self.profiles.append(make_profiler(with_host=done == 1))
            self.profiles[-1].start()


def make_profiler(with_host: bool) -> torch.profiler.profile:
    activities = torch.profiler.ProfilerActivity
    return torch.profiler.profile(activities=[activities.CUDA] + [activities.CPU] * with_host, record_shapes=with_host)


def device_kernels(profiler: torch.profiler.profile) -> list:
    kernels = (e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sorted((e for e in kernels if not e.is_user_annotation), key=lambda e: e.time_range.start)


def breakdown(plain: torch.profiler.profile, with_host: torch.profiler.profile, rank: int) -> dict:
    """Milliseconds of a step by kind of kernel, the kernels that take most, and where the device waits longest."""
    kernels, gaps, busy_until = {}, [], None
    kinds = dict.fromkeys(("GEMM", "LoRA", "attention", "quantization", "elementwise", "copies", "idle"), 0.0)
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
        candidates = ("quantization",) if own else ("attention", "GEMM", "quantization", "copies")
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


def noise_rows(count: int, resolution: int) -> list[dict]:
    """Rows of a data set whose pictures are noise."""
    return [{"image": {"bytes": picture(i, resolution), "path": None}, "text": CAPTION} for i in range(count)]


def main(args: argparse.Namespace) -> None:
    bench = Bench(args)
    for group in bench.chosen_rows():
        for turn in range(1, args.rounds + 1):
            for row in group:
                profile = {"profile": row.name} if row.profile and turn == 1 else {}
                bench.add_row(row.name, functools.partial(row.measure, **profile), turn=turn)
    print(json.dumps(bench.report.about | bench.report.more, indent=1))
    print(bench.report.table())
    medians = bench.medians()
    bench.report.note(medians=medians)
    print(f"\nMedians over the turns:\n\n{markdown(medians)}")


if __name__ == "__main__":
    main(parse_args())
