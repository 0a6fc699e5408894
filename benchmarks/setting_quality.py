# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Does a setting that makes training faster or smaller change what it learns? Real data and the small trained base tell.

    python examples/earth.py --output_dir earth
    python benchmarks/setting_quality.py --data earth/train --output setting_quality.json

Every random draw of a run follows from its seed. So each setting is compared with the reference run of the same seed, and
the difference with the spread of the reference between seeds. The loss is the mean over the last third of the steps.
"""

import argparse
import json
import statistics
import tempfile
import time
import traceback
from pathlib import Path

import torch
from diffusers.models.attention_dispatch import attention_backend
from measurement import ROOT, Report, StepTracker, assemble, describe, find_device, free

import train_semantic_fill_lora as trainer


SETTINGS = {
    "reference": [],
    "peft's LoRA layers": ["--no-fused_lora"],
    "cuDNN's attention compiled": ["--attention_backend=_native_cudnn", "--compile"],
    "fp8": ["--base_precision=fp8"],
    "fp8x2": ["--base_precision=fp8x2"],
    "int8": ["--base_precision=int8"],
    "int8mm": ["--base_precision=int8mm"],
    "nf4": ["--base_precision=nf4"],
    "prompts as long as the longest": ["--max_sequence_length=auto"],
    "8-bit Adam": ["--use_8bit_adam"],
    "selective checkpointing": ["--checkpointing=selective"],
    "full checkpointing": ["--checkpointing=full"],
    "offload": ["--checkpointing=offload"],
    "compiled": ["--compile"],
    "compiled with peft's LoRA layers": ["--compile", "--no-fused_lora"],
    "fp8 compiled": ["--base_precision=fp8", "--compile"],
    "fp8x2 compiled": ["--base_precision=fp8x2", "--compile"],
}


def train(setting: str, seed: int, folder: str, args: argparse.Namespace) -> float:
    """The mean loss of the last third of a run's steps."""
    options = {
        "pretrained_model_name_or_path": args.base,
        "output_dir": folder,
        "train_data_dir": args.data,
        "max_train_samples": args.samples,
        "resolution": args.resolution,
        "max_sequence_length": args.max_sequence_length,
        "train_batch_size": args.batch,
        "max_train_steps": args.steps,
        "checkpointing_steps": args.steps + 1,
        "learning_rate": 1e-3,
        "semantic_scale_learning_rate": 1e-2,
        "rank": 16,
        "seed": seed,
        "mixed_precision": "bf16",
        "report_to": "none",
        "log_level": "warning",
    }
    tracker = StepTracker()
    options = trainer.parse_args([*(f"--{name}={value}" for name, value in options.items()), *SETTINGS[setting]])
    trainer.train(assemble(options, tracker))
    return statistics.mean(tracker.losses[-len(tracker.losses) // 3 :])


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder of triptychs, as --train_data_dir.")
    parser.add_argument("--base", default=str(ROOT / "examples" / "base"))
    parser.add_argument("--output", type=Path, default=Path("setting_quality.json"))
    parser.add_argument("--settings", default=",".join(SETTINGS), help="The reference is always among them.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument(
        "--max_sequence_length",
        type=int,
        default=128,
        help="T5 tokens of a prompt, but for the setting that changes it.",
    )
    parser.add_argument("--samples", type=int, default=64, help="Train on the first samples, up to this number.")
    parser.add_argument("--minutes", type=float, default=30.0, help="No run is begun after so many.")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    device = find_device()
    report = Report(args.output, describe(device) | {"steps": args.steps})
    start, reference = time.perf_counter(), {}
    names = ["reference", *(name for name in args.settings.split(",") if name != "reference")]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            losses = {}
            for seed in range(args.seeds):
                if time.perf_counter() - start > 60 * args.minutes:
                    break
                free(device)
                torch._dynamo.reset()
                try:
                    # A setting that chooses another backend leaves it to the process.
                    with attention_backend("native"):
                        losses[seed] = train(name, seed, folder, args)
                except Exception as error:
                    traceback.print_exc()
                    report.add(setting=name, result=f"{type(error).__name__}: {str(error)[:200]}")
                    break
            if name == "reference":
                reference = losses
            if losses:
                differences = [loss - reference[seed] for seed, loss in losses.items()]
                spread = max(reference.values()) - min(reference.values())
                report.add(
                    setting=name,
                    loss=f"{statistics.mean(losses.values()):.4f}",
                    seeds=len(losses),
                    **{
                        "largest difference, same seed": f"{max(differences, key=abs):+.4f}",
                        "spread of the reference": f"{spread:.4f}",
                        "within it": max(map(abs, differences)) <= spread,
                    },
                )
    print(json.dumps(report.about, indent=1))
    print(report.table())


if __name__ == "__main__":
    main(parse_args())
