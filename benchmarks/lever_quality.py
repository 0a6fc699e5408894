# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Does what makes training fast or small change what it learns? Each lever on the small trained base, real data.

    python examples/earth.py --output_dir earth
    python benchmarks/lever_quality.py --data earth/train --output lever_quality.json

Every draw of a run follows from its seed, so a lever is compared with the reference run of the same seed, and that
difference with the spread of the reference between seeds. The loss is the mean over the last third of the steps.
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
from flux_shape import ROOT, Report, describe, free
from train_speed import fresh_accelerator

import train_semantic_fill_lora as trainer


LEVERS = {
    "reference": [],
    "peft's LoRA layers": ["--no-fused_lora"],
    "cuDNN's attention compiled": ["--attention_backend=_native_cudnn", "--compile"],
    "fp8": ["--base_precision=fp8"],
    "fp8x2": ["--base_precision=fp8x2"],
    "int8": ["--base_precision=int8"],
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


class Recorder:
    """Stands before a `Step` and keeps each loss."""

    def __init__(self, step):
        self.step, self.losses = step, []

    def __getattr__(self, name):
        return getattr(self.step, name)

    def loss(self, model, batch):
        loss = self.step.loss(model, batch)
        self.losses.append(loss.detach())
        return loss


def run(lever: str, seed: int, rows: list, folder: str, bench: argparse.Namespace) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    options = {
        "pretrained_model_name_or_path": bench.base,
        "output_dir": folder,
        "train_data_dir": bench.data,
        "resolution": bench.resolution,
        "max_sequence_length": bench.max_sequence_length,
        "train_batch_size": bench.batch,
        "max_train_steps": bench.steps,
        "learning_rate": 1e-3,
        "semantic_scale_learning_rate": 1e-2,
        "rank": 16,
        "seed": seed,
        "mixed_precision": "bf16",
        "report_to": "none",
    }
    args = trainer.parse_args([*(f"--{name}={value}" for name, value in options.items()), *LEVERS[lever]])
    args.caption_column = "text"
    accelerator = fresh_accelerator()
    trainer.set_seed(seed)
    dataset = trainer.TriptychDataset(rows, args)
    pipeline = trainer.load_encoders(args, device, dtype)
    if args.max_sequence_length == "auto":
        args.max_sequence_length = trainer.longest_prompt(pipeline.tokenizer_2, dataset)
    encoder = trainer.Encoder(pipeline, dataset, args)
    encoder.fill_cache(accelerator)
    trainer.set_seed(seed)
    model = trainer.build_model(args, device, dtype)
    optimizer = trainer.build_optimizer(trainer.parameter_groups(model, args), args)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    shift = trainer.timestep_shift_factor(args, pipeline.scheduler, encoder.image_tokens)
    step = Recorder(trainer.Step(encoder, args, device, dtype, shift, model.transformer.config.guidance_embeds))
    model, optimizer = accelerator.prepare(model, optimizer)
    trainer.train(accelerator, model, optimizer, scheduler, step, dataset, 0, 0, args)
    losses = torch.stack(step.losses).float().tolist()
    return statistics.mean(losses[-len(losses) // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Folder of triptychs with a metadata.jsonl.")
    parser.add_argument("--base", default=str(ROOT / "examples" / "base"))
    parser.add_argument("--output", type=Path, default=Path("lever_quality.json"))
    parser.add_argument("--levers", default=",".join(LEVERS), help="The reference is always among them.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--max_sequence_length", type=int, default=128, help="Of all but the lever of the prompts.")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=30.0, help="No run is begun after so many.")
    args = parser.parse_args()
    lines = (args.data / "metadata.jsonl").read_text().splitlines()[: args.samples]
    rows = [json.loads(line) for line in lines]
    rows = [{"image": {"bytes": None, "path": str(args.data / row["file_name"])}, "text": row["text"]} for row in rows]
    torch._dynamo.config.recompile_limit = 64
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(args.output, describe(device) | {"steps": args.steps})
    start, reference = time.perf_counter(), {}
    names = ["reference", *(name for name in args.levers.split(",") if name != "reference")]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            losses = {}
            for seed in range(args.seeds):
                if time.perf_counter() - start > 60 * args.minutes:
                    break
                free(device)
                torch._dynamo.reset()
                try:
                    # A lever that chooses another one leaves it to the process.
                    with attention_backend("native"):
                        losses[seed] = run(name, seed, rows, folder, args)
                except Exception as error:
                    traceback.print_exc()
                    report.add(lever=name, result=f"{type(error).__name__}: {str(error)[:200]}")
                    break
            if name == "reference":
                reference = losses
            if losses:
                differences = [loss - reference[seed] for seed, loss in losses.items()]
                spread = max(reference.values()) - min(reference.values())
                report.add(
                    lever=name,
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
    main()
