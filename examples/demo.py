# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The whole idea on real pictures, on a laptop: a gray hillshade becomes satellite colors, guided by a land-water map.

The demo cuts triptychs, trains a LoRA without and a LoRA with the semantic module on Eurasia, Africa and Oceania, paints
the Americas, and leaves a page and the figures in the output folder.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import queue
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


# Threads that wait for each other in a busy loop take the cores that the others need as soon as anything else runs. The
# libraries read this when they are loaded, here and in the trainer.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import earth
import numpy as np
import PIL.Image
import torch
from demo_page import draw_page
from skimage.metrics import structural_similarity
from small_flux_fill import build_pipeline
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm.auto import tqdm
from train_base import gradient_energy, psnr

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.data import read_triptychs
from semantic_fill.page import draw_chart, thin_out


logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
TRAINED_BASE = ROOT / "examples" / "base"
MAX_SEQUENCE_LENGTH = 32
# What is painted: name -> whether the module paints, and which map it is shown.
PAINTINGS = {"without map": (False, None), "right map": (True, "semantic"), "wrong map": (True, "other")}
# What the demo does, and the share of the time that each takes.
STAGES = {
    "Cutting triptychs out of the Earth": 0.03,
    "Training a LoRA without map and, beside it, a LoRA with the module": 0.77,
    "Painting held-out views": 0.2,
}
# How many trainings and paintings run at once, with the cores shared out among them. The threads of one computation wait
# for each other hundreds of times a second, which takes long while other programs compute.
AT_ONCE = 2


class Stages:
    """Says what begins, and how long the rest takes if it is as slow as what is done."""

    def __init__(self):
        self.start, self.begun = time.monotonic(), 0

    def begin(self) -> None:
        names, done = list(STAGES), sum([*STAGES.values()][: self.begun])
        # Too little is measured before the first training.
        rest = self.minutes() * (1 - done) / done if done > 0.1 else None
        left = "about five minutes in all" if rest is None else f"about {rest:.0f} minutes left"
        logger.info(f"\n[{self.begun + 1} of {len(names)}] {names[self.begun]}, {left}")
        self.begun += 1

    def minutes(self) -> float:
        return (time.monotonic() - self.start) / 60


def training_options(mode: str, base: Path, folder: Path, args: argparse.Namespace) -> list[str]:
    """The trainer's options, with the paths of the base and of the demo's folder as they come."""
    options = f"""
        --resolution {args.resolution} --max_sequence_length {MAX_SEQUENCE_LENGTH} --semantic_mode {mode}
        --max_train_steps {args.steps} --train_batch_size {args.batch_size} --rank {args.rank} --mixed_precision no
        --learning_rate {args.learning_rate} --lr_scheduler cosine --lr_warmup_steps {min(10, args.steps // 10)}
        --semantic_learning_rate {args.semantic_learning_rate}
        --semantic_scale_learning_rate {args.semantic_scale_learning_rate} --seed {args.seed}
        --checkpointing_steps {args.steps} --loss_region target --overwrite_output_dir
    """
    paths = ["--pretrained_model_name_or_path", base, "--train_data_dir", folder / "train"]
    paths += ["--output_dir", folder / mode, "--cache_root", folder / "cache"]
    return [*map(str, paths), *options.split()]


def train(base: Path, threads: int, args: argparse.Namespace) -> None:
    """Both trainings at once. The first writes what it says to a file, because two progress bars would mix."""
    environment = {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    # Else glibc returns memory to the system after each layer and asks for it again, which takes an eighth of the time.
    environment |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**30))
    with contextlib.ExitStack() as stack:
        runs = {}
        for mode in modes(args):
            # The trainer replaces what it made itself. Curves of an earlier demo would be drawn into those of this one.
            shutil.rmtree(args.output_dir / mode / "logs" / "semantic-fill", ignore_errors=True)
            # This is what `accelerate launch --cpu` runs, which takes seconds to find that out.
            command = [sys.executable, ROOT / "train_semantic_fill_lora.py"]
            command += training_options(mode, base, args.output_dir, args)
            log = stack.enter_context(open(log_file(args), "w")) if mode == modes(args)[0] else None
            runs[mode] = stack.enter_context(
                subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
            )
            # If this process is interrupted, or one training fails, the other one ends too.
            stack.callback(runs[mode].terminate)
        for mode, run in reversed(runs.items()):
            if run.wait():
                raise RuntimeError(f"The training of {mode} failed. What it said is above or in {log_file(args)}.")


def shell_commands(base: Path, args: argparse.Namespace) -> str:
    """What makes the page, and the trainings alone, for a shell in the repository."""
    base = base.relative_to(ROOT) if base.is_relative_to(ROOT) else Path(base.name)
    folder = Path(args.output_dir.name)
    demo = f"python examples/demo.py --semantic_mode {args.semantic_mode} --output_dir {shlex.quote(folder.name)}"
    trainer = ["accelerate", "launch", "--cpu", "train_semantic_fill_lora.py"]
    trainings = [shlex.join(trainer + training_options(mode, base, folder, args)) for mode in modes(args)]
    wrap = textwrap.TextWrapper(80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(" \\\n".join(wrap.wrap(command)) for command in (demo, *trainings))


def log_file(args: argparse.Namespace) -> Path:
    return args.output_dir / f"{modes(args)[0]}.log"


def modes(args: argparse.Namespace) -> tuple[str, str]:
    return "none", args.semantic_mode


def load_painter(base: Path, args: argparse.Namespace) -> FluxFillSemanticPipeline:
    """The base with both LoRAs, of which `set_adapters` chooses one."""
    # PEFT asks whether a second LoRA is meant to be there.
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    pipeline = FluxFillSemanticPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    for mode in modes(args):
        pipeline.load_lora_weights(args.output_dir / mode, adapter_name=mode)
    return pipeline


def paint(painters: list, views: list[dict], args: argparse.Namespace) -> dict[str, list[PIL.Image.Image]]:
    """Paints the views in each way of `PAINTINGS`, always from the same noise. Each pipeline has a thread of its own."""
    free, starts = queue.SimpleQueue(), range(0, len(views), args.batch_size)
    for painter in painters:
        free.put(painter)

    def paint_batch(job: tuple[str, int]) -> list[PIL.Image.Image]:
        (has_module, which_map), start = PAINTINGS[job[0]], job[1]
        batch, painter = views[start : start + args.batch_size], free.get()
        try:
            painter.set_adapters(modes(args)[has_module])
            return painter(
                prompt=earth.PROMPT,
                image=[view["visible"] for view in batch],
                semantic_image=[view[which_map] for view in batch] if which_map else None,
                num_inference_steps=args.num_inference_steps,
                max_sequence_length=MAX_SEQUENCE_LENGTH,
                generator=[torch.Generator().manual_seed(args.seed + start + i) for i in range(len(batch))],
            ).images
        finally:
            free.put(painter)

    jobs, columns = list(itertools.product(PAINTINGS, starts)), {name: [] for name in PAINTINGS}
    with ThreadPoolExecutor(len(painters)) as threads:
        painted = tqdm(threads.map(paint_batch, jobs), desc="Painting", total=len(jobs))
        for (name, _), pictures in zip(jobs, painted):
            columns[name] += pictures
    return columns


def water_iou(picture: PIL.Image.Image, target: PIL.Image.Image) -> float:
    """IoU of the water that two satellite pictures show: where blue is above red."""
    a, b = (pixels[..., 2] > pixels[..., 0] for pixels in map(np.asarray, (picture, target)))
    return (a & b).sum() / max(1, (a | b).sum())


def measure(painted: list[PIL.Image.Image], targets: list[PIL.Image.Image]) -> dict[str, float]:
    ours, theirs = (torch.tensor(np.stack(pictures)).movedim(-1, 1) / 255 for pictures in (painted, targets))
    pairs = [(np.asarray(picture), np.asarray(target)) for picture, target in zip(painted, targets)]
    return {
        "PSNR, dB": psnr(ours, theirs),
        "SSIM": float(np.mean([structural_similarity(b, a, channel_axis=2) for a, b in pairs])),
        "water IoU": float(np.mean([water_iou(a, b) for a, b in zip(painted, targets)])),
        "gradient energy": gradient_energy(ours, theirs),
    }


def find_best(columns: dict[str, list[PIL.Image.Image]]) -> int:
    """The view in which the right map gains most over a wrong one."""

    def error(name: str) -> np.ndarray:
        views = zip(columns[name], columns["target"])
        return np.array([((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean() for a, b in views])

    return int(np.argmax(np.log(error("wrong map") / error("right map"))))


def draw_charts(args: argparse.Namespace) -> str:
    """Losses and scale of both runs in HTML."""
    losses, scales = {}, {}
    for mode in modes(args):
        events = EventAccumulator(str(args.output_dir / mode / "logs" / "semantic-fill")).Reload()
        for curves, tag in ((losses, "loss"), (scales, "scale/layer_0")):
            if tag in events.Tags()["scalars"]:
                found = events.Scalars(tag)
                curves[mode] = thin_out([event.step for event in found], [event.value for event in found], points=20)
    return draw_chart("Loss, mean of parts", losses) + draw_chart("Scale of the module", scales)


def draw_attention(pipeline, view: dict, args: argparse.Namespace) -> dict[str, PIL.Image.Image]:
    """Where in the map the middle of the painting looks, half-way through denoising."""
    middle = args.resolution / 2
    seen = pipeline.semantic_attention_maps(
        prompt=earth.PROMPT,
        image=view["visible"],
        semantic_image=view["semantic"],
        num_inference_steps=args.num_inference_steps,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=torch.Generator().manual_seed(args.seed),
        points=[(middle, middle)],
        steps=[args.num_inference_steps // 2],
    )
    return {"map": view["semantic"], "painted": seen.images[0], "attention": seen.overlay(view["semantic"])}


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"))
    parser.add_argument(
        "--base", type=Path, help="FLUX Fill to start from. Default: examples/base, or random weights."
    )
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--num_train", type=int, default=256)
    parser.add_argument("--num_test", type=int, default=24)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--semantic_learning_rate", type=float, default=3e-3)
    parser.add_argument("--semantic_scale_learning_rate", type=float, default=3e-2)
    parser.add_argument("--semantic_mode", default="projection", choices=("projection", "cross_attention"))
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stages = Stages()
    args.output_dir = args.output_dir.resolve()
    is_demo = (args.output_dir / "train" / "metadata.jsonl").is_file()
    for name in modes(args):
        if (args.output_dir / name).exists() and not is_demo:
            raise ValueError(f"{args.output_dir / name} is not of an earlier demo. Choose another --output_dir.")
    stages.begin()
    for split, count in (("train", args.num_train), ("test", args.num_test)):
        earth.write_split(args.output_dir / split, split, count, args.resolution, args.seed)
    base = args.base or (TRAINED_BASE if TRAINED_BASE.is_dir() else args.output_dir / "base")
    if not base.is_dir():
        logger.info("No trained base: painting will be noise, made with random weights")
        build_pipeline("demo", args.seed).save_pretrained(base)
    threads = max(1, torch.get_num_threads() // AT_ONCE)
    stages.begin()
    train(base, threads, args)

    stages.begin()
    torch.set_num_threads(threads)
    painters = [load_painter(base, args) for _ in range(AT_ONCE)]
    views = read_triptychs(args.output_dir / "test")
    views = [view | {"other": other["semantic"]} for view, other in zip(views, views[1:] + views[:1])]
    columns = {name: [view[name] for view in views] for name in ("visible", "semantic", "target", "other")}
    columns |= paint(painters, views, args)

    metrics = {name: measure(columns[name], columns["target"]) for name in PAINTINGS}
    best = find_best(columns)
    # A projection has no attention to show.
    attention = draw_attention(painters[0], views[best], args) if args.semantic_mode == "cross_attention" else {}
    page = draw_page(columns, best, metrics, draw_charts(args), attention, shell_commands(base, args))
    (args.output_dir / "index.html").write_text(page, encoding="utf-8")
    metrics_file = {"figures": metrics, "minutes": stages.minutes()}
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics_file, indent=2))
    for name, row in metrics.items():
        logger.info(f"{name:12s} " + "  ".join(f"{key} {value:6.3f}" for key, value in row.items()))
    logger.info(f"Done in {stages.minutes():.1f} minutes: see {args.output_dir / 'index.html'}")


if __name__ == "__main__":
    main(parse_args())
