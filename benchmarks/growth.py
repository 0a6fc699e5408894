# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Time and memory of a training step against resolution, batch and layers of the module, at FLUX's true size.

    python benchmarks/growth.py --minutes 3 --output growth.json

Each row has the whole step and, measured by itself, forward and backward of the module. The plot shows how both grow
with the image tokens. Nothing in the module may grow faster than the transformer's own attention, which is quadratic.
"""

import argparse
import math
import statistics
from pathlib import Path

import torch
from measurement import free, peak_gib, timed
from train_speed import Bench
from train_speed import parse_args as speed_args

from pipeline_flux_fill_semantic import panel_positions
from semantic_attention import SemanticAttentionModel


def module_alone(bench: Bench, layers: int, batch: int) -> dict:
    """Forward and backward of the module by itself, and the memory that they add."""
    device, side = bench.device, bench.args.resolution // 16
    torch.manual_seed(0)
    module = SemanticAttentionModel(num_layers=layers, position="rope").to(device)
    tokens = [torch.randn(batch, bench.image_tokens, 64, device=device, dtype=bench.dtype) for _ in range(2)]
    positions = panel_positions(side, side, 2, device)

    def forward_and_backward() -> None:
        with torch.autocast(device.type, bench.dtype):
            module(*tokens, positions).float().sum().backward()

    # The first call of a process allocates for all that follow.
    forward_and_backward()
    free(device)
    before = peak_gib(device)
    times = [1e3 * timed(forward_and_backward, device)[1] for _ in range(7)]
    return {"module ms": statistics.median(times[2:]), "module GiB": peak_gib(device) - before}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("growth.json"))
    parser.add_argument("--minutes", type=float, default=8.0, help="No row is begun after so many.")
    parser.add_argument("--shape", choices=["flux", "test"], default="flux")
    parser.add_argument("--precision", default="bf16", help="--base_precision of all rows.")
    parser.add_argument("--steps", type=int, default=3)
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)
    resolutions = (512, 768, 1024) if args.shape == "flux" else (32, 48, 64)
    # (resolution, batch, layers): one of them grows, the others stay at the first row's.
    cases = [(resolution, 1, 1) for resolution in resolutions]
    cases += [(resolutions[0], batch, 1) for batch in (2, 4, 8)]
    cases += [(resolutions[0], 1, layers) for layers in (2, 4, 8)]
    bench = None
    for resolution, batch, layers in cases:
        bench = next_bench(bench, resolution, args)
        options = [f"--base_precision={args.precision}", "--checkpointing=full", f"--semantic_num_layers={layers}"]

        def measure(bench=bench, options=options, batch=batch, layers=layers):
            alone = module_alone(bench, layers, batch)
            return bench.trainer(*options, f"--train_batch_size={batch}") | alone

        facts = {"resolution": resolution, "batch": batch, "layers": layers}
        bench.add_row("x".join(map(str, (resolution, batch, layers))), measure, **facts)
    print(bench.report.table())
    plot([row for row in bench.report.rows if "module ms" in row], args.output.with_suffix(".png"))


def next_bench(bench: Bench | None, resolution: int, args: argparse.Namespace) -> Bench:
    """The bench of a resolution, with the report and the clock of the one before."""
    if bench is not None and bench.args.resolution == resolution:
        return bench
    options = f"--shape {args.shape} --minutes {args.minutes} --steps {args.steps} --warm_up 2 --batch 1"
    following = Bench(speed_args([*options.split(), f"--resolution={resolution}", f"--output={args.output}"]))
    if bench is not None:
        following.report, following.start = bench.report, bench.start
    return following


def plot(rows: list[dict], path: Path) -> None:
    # Imported last, so that a machine without matplotlib still measures.
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    grown = [row for row in rows if row["batch"] == row["layers"] == 1]
    tokens = [row["image tokens"] for row in grown]
    for axis, names, unit in ((axes[0], ("ms/step", "module ms"), "ms"), (axes[1], ("peak GiB", "module GiB"), "GiB")):
        for name in names:
            values = [row[name] for row in grown]
            if all(math.isfinite(value) and value > 0 for value in values) and values:
                axis.loglog(tokens, values, marker="o", label=name)
                if name.startswith("module"):
                    quadratic = [values[0] * (n / tokens[0]) ** 2 for n in tokens]
                    axis.loglog(tokens, quadratic, linestyle=":", color="gray", label="quadratic")
        axis.set_xticks(tokens, tokens)
        axis.set_xticks([], minor=True)
        axis.set_xlabel("image tokens")
        axis.set_ylabel(unit)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(parse_args())
