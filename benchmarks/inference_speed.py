# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Painting at FLUX.1-Fill-dev's true size: FluxFillPipeline against this pipeline, and the fast recipe.

    python benchmarks/inference_speed.py --minutes 4 --output inference_speed.json

Both get the same transformer, VAE, canvas, steps and prompt embeddings, in turns, so they differ in the guidance alone.
The recipe is the README's: LoRA fused, blocks in fp8 and compiled, FirstBlockCache. A random model paints no picture, so
the small trained base (`--shape base`) compares the recipe's picture with that of the slow way. It also tells which steps a
cache leaves out, and `--replay` leaves out the same ones at FLUX's size. *Causal* paints as weights of `--visible_attention
causal` do, which compute prompt and visible view once. Its whole gain shows with several `--pictures`.
"""

import argparse
import json
import re
import statistics
import time
import traceback
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig, FluxFillPipeline
from diffusers.hooks.first_block_cache import FBCHeadBlockHook
from diffusers.image_processor import VaeImageProcessor
from flux_shape import build_scheduler, build_transformer, build_vae
from measurement import ROOT, Report, describe, find_device, free, peak_gib, timed
from peft import LoraConfig

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, read_picture
from semantic_attention import SemanticAttentionModel
from semantic_fill.lora import LORA_TARGETS
from semantic_fill.precision import quantize_blocks
from semantic_fill.views import cut_triptych


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("inference_speed.json"))
    parser.add_argument("--minutes", type=float, default=8.0, help="No row is begun after so many.")
    parser.add_argument("--shape", choices=["flux", "test", "base"], default="flux")
    parser.add_argument(
        "--resolution", type=int, help="Pixels of one panel. Default: 512, or 64 with the small shapes."
    )
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--pictures", type=int, default=1, help="Pictures painted in one call.")
    parser.add_argument("--rounds", type=int, default=3, help="Turns of the two pipelines.")
    parser.add_argument("--thresholds", default="0.03,0.06,0.1", help="Thresholds of FirstBlockCache.")
    parser.add_argument("--only", default="", help="A regular expression: rows whose names it finds are timed.")
    parser.add_argument("--picture", type=Path, help="A triptych to paint, for --shape base.")
    parser.add_argument("--prompt", default="hillshade to satellite", help="For --shape base.")
    parser.add_argument(
        "--replay",
        type=Path,
        help="Report of a run with --shape base: caches leave out the steps that they left out there.",
    )
    parser.add_argument("--lora", type=Path, help="A trained folder. Default: a LoRA and a module of random weights.")
    args = parser.parse_args(arguments)
    args.resolution = args.resolution or (512 if args.shape == "flux" else 64)
    return args


# In the order of their turns.
PAINTERS = ("FluxFillPipeline", "without map", "guided", "causal")


class CacheDecisions:
    """
    Records in which steps FirstBlockCache lets all blocks run. With `replayed`, decisions of another painting replace its
    own ones, which it still makes.
    """

    def __init__(self):
        self.taken, self.replayed = [], None
        plain = FBCHeadBlockHook._should_compute_remaining_blocks

        @torch.compiler.disable
        def decide(hook, residual: torch.Tensor) -> bool:
            computed = plain(hook, residual)
            if hook.state_manager.context.name == "visible":
                # It is no step.
                return computed
            if self.replayed is not None:
                computed = bool(self.replayed[len(self.taken) % len(self.replayed)])
            self.taken.append(int(computed))
            return computed

        FBCHeadBlockHook._should_compute_remaining_blocks = decide


class Painter:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = find_device()
        self.dtype = torch.bfloat16
        torch.manual_seed(0)
        if args.shape == "base":
            loaded = DiffusionPipeline.from_pretrained(ROOT / "examples" / "base", dtype=self.dtype).to(self.device)
            self.transformer, scheduler, vae = loaded.transformer, loaded.scheduler, loaded.vae
        else:
            scheduler, vae = build_scheduler(args.shape), build_vae(args.shape, self.device, self.dtype)
            self.transformer = build_transformer(args.shape, "bf16", self.device, self.dtype)
        config = self.transformer.config
        if args.shape == "base":
            *embeds, _ = loaded.encode_prompt(args.prompt, args.prompt, max_sequence_length=32)
        else:
            sizes = (1, 512, config.joint_attention_dim), (1, config.pooled_projection_dim)
            embeds = [torch.randn(size, device=self.device, dtype=self.dtype) for size in sizes]
        self.prompt = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), embeds))
        self.module = SemanticAttentionModel(position="rope").to(self.device, self.dtype)
        for layer in self.module.layers:
            torch.nn.init.constant_(layer.scale, 0.1)
        panels = torch.rand(3, 1, 3, args.resolution, args.resolution)
        if args.picture:
            views = list(cut_triptych([read_picture(args.picture)]).values())
            panels = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(views))[:, None]
        self.visible, _, self.map = panels
        # The prompts are encoded already.
        text = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        kept = {"scheduler": scheduler, "vae": vae, "transformer": self.transformer} | text
        self.ours = FluxFillSemanticPipeline(**kept, semantic_attention=self.module)
        self.causal = FluxFillSemanticPipeline(**kept, semantic_attention=self.module, visible_attention="causal")
        self.theirs = FluxFillPipeline(**kept)
        for pipeline in (self.ours, self.causal, self.theirs):
            pipeline.set_progress_bar_config(disable=True)

    def paint(self, who: str) -> tuple[torch.Tensor, float]:
        """Picture and seconds of one of PAINTERS."""
        args = self.args
        same = self.prompt | {
            "num_inference_steps": args.steps,
            "num_images_per_prompt": args.pictures,
            "guidance_scale": 30.0,
            "output_type": "pt",
            "generator": torch.Generator().manual_seed(0),
        }

        def paint():
            if who != "FluxFillPipeline":
                pipeline = self.causal if who == "causal" else self.ours
                return pipeline(image=self.visible, semantic_image=None if who == "without map" else self.map, **same)
            canvas, mask = self.ours.prepare_diptych(self.visible)
            size = {"height": args.resolution, "width": 2 * args.resolution}
            return self.theirs(image=canvas, mask_image=mask, **size, **same)

        painted, seconds = timed(paint, self.device)
        return painted.images, seconds

    def add_lora(self) -> None:
        if self.args.lora:
            self.ours.load_lora_weights(str(self.args.lora))
            return
        config = LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
        self.transformer.add_adapter(config)
        generator = torch.Generator(self.device).manual_seed(0)
        for name, parameter in self.transformer.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01, generator=generator)
        self.transformer.requires_grad_(False)

    def compile(self) -> None:
        # Earlier compiled calls are dropped, because the blocks may have changed.
        torch._dynamo.reset()
        self.transformer.compile_repeated_blocks()


def turns(painter: Painter, report: Report, name: str, rounds: int, painters: tuple[str, ...]) -> dict:
    """
    Medians of painting in turns, and of what each takes more than the first one in the same turn. The clocks change by
    more than that from turn to turn. The first turn warms up.
    """
    free(painter.device)
    seconds = {who: [] for who in painters}
    for _ in range(rounds + 1):
        for who in painters:
            seconds[who].append(painter.paint(who)[1])
    medians = {who: statistics.median(times[1:]) for who, times in seconds.items()}
    first, *others = painters
    row = {"row": name} | {f"{who}, s": median for who, median in medians.items()}
    for who in others:
        each = [100 * (a / b - 1) for a, b in zip(seconds[who][1:], seconds[first][1:])]
        row[f"{who}, %"] = statistics.median(each)
        row[f"{who}, each turn"] = " ".join(f"{percent:+.2f}" for percent in each)
    report.add(**row, **{"peak GiB": peak_gib(painter.device)})
    return row


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return (-10 * torch.log10(((a.float() - b.float()) ** 2).mean())).item()


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    start = time.perf_counter()
    torch._dynamo.config.recompile_limit = 64
    decisions, replayed = CacheDecisions(), {}
    if args.replay is not None:
        computed = json.loads(args.replay.read_text())["computed"]
        replayed = {float(threshold): steps for threshold, steps in computed.items()}
    painter = Painter(args)
    report = Report(args.output, describe(painter.device))

    def attempt(name, step):
        """Whether a step of the recipe went well. If it did not, what follows is measured without it."""
        if time.perf_counter() - start > 60 * args.minutes:
            report.add(row=name, result="no time left")
            return False
        try:
            step()
            return True
        except Exception as error:
            traceback.print_exc()
            report.add(row=name, result=f"{type(error).__name__}: {str(error)[:200]}")
            return False

    def measure(name, rounds=args.rounds, painters=PAINTERS):
        """The row of this name, which is empty unless `--only` finds it."""
        return turns(painter, report, name, rounds, painters) if re.search(args.only, name) else {}

    eager = {}

    def with_lora():
        painter.add_lora()
        if args.shape == "base":
            painter.slow = painter.paint("guided")[0]
        measure("eager, LoRA not fused", rounds=1, painters=("guided",))

    def compare(name):
        row = measure(name, rounds=max(1, args.rounds - 1), painters=("guided", "causal"))
        if not row:
            return
        if eager:
            report.rows[-1]["times eager FluxFillPipeline"] = eager["FluxFillPipeline, s"] / row["guided, s"]
        if args.shape == "base":
            report.rows[-1]["PSNR dB"] = psnr(painter.paint("guided")[0], painter.slow)
        report.save()

    def fused():
        painter.ours.fuse_lora()
        # This removes PEFT's layers. The fused weights and the module stay.
        painter.ours.unload_lora_weights()
        compare("LoRA fused")

    def in_fp8():
        quantize_blocks(painter.transformer, "fp8")
        painter.compile()
        compare("LoRA fused, fp8, compiled")

    def cached(threshold):
        def step():
            painter.transformer.disable_cache() if painter.transformer.is_cache_enabled else None
            painter.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
            painter.compile()
            decisions.taken, decisions.replayed = [], replayed.get(threshold)
            compare(f"LoRA fused, fp8, compiled, FirstBlockCache {threshold}")
            if computed := decisions.taken[-args.steps :]:
                report.rows[-1] |= {"steps computed": f"{sum(computed)} of {args.steps}"}
                report.note(computed=report.more.get("computed", {}) | {threshold: computed})

        return step

    attempt("eager", lambda: eager.update(measure("eager")))
    if attempt("LoRA", with_lora) and attempt("LoRA fused", fused):
        painter.transformer.compile_repeated_blocks()
        attempt("compiled", lambda: measure("compiled"))
        attempt("fp8", in_fp8)
        for threshold in map(float, args.thresholds.split(",")):
            attempt(f"FirstBlockCache {threshold}", cached(threshold))
    print(json.dumps(report.about, indent=1))
    print(report.table())


if __name__ == "__main__":
    main(parse_args())
