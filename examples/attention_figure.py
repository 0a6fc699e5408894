# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Draws where painted places look in the semantic map, with the weights of a demo that trained a cross-attention.

    python examples/demo.py --semantic_mode cross_attention
    python examples/attention_figure.py --demo_dir demo --output docs/attention.png

Each row shows a held-out view: hillshade, painting, and the attention over the map of one point on each of --classes,
half-way through denoising and averaged over the heads, with its share by class.
"""

import argparse
import io
from pathlib import Path

import earth
import matplotlib
import numpy as np
import PIL.Image
import torch
from demo import MAX_SEQUENCE_LENGTH, TRAINED_BASE
from demo_page import save_small

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.data import read_triptychs


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def point_on(semantic: PIL.Image.Image, name: str) -> tuple[int, int] | None:
    """The middle of the token that holds most pixels of a class. Among equals it is the one nearest to the center."""
    here = (np.asarray(semantic) == earth.PALETTE[name]).all(axis=-1)
    rows, columns = (side // 16 for side in here.shape)
    count = here.reshape(rows, 16, columns, 16).sum(axis=(1, 3))
    if count.max() == 0:
        return None
    distance = np.hypot(*(np.mgrid[:rows, :columns] - np.array([rows - 1, columns - 1])[:, None, None] / 2))
    row, column = np.unravel_index(np.lexsort((distance.ravel(), -count.ravel()))[0], count.shape)
    return int(column) * 16 + 8, int(row) * 16 + 8


def draw_figure(pipeline, views: list[dict], classes: list[str], steps: int, seed: int) -> PIL.Image.Image:
    columns = 2 + len(classes)
    figure, axes = plt.subplots(
        len(views), columns, figsize=(2.1 * columns, 2.5 * len(views)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    colors = {color: name for name, color in earth.PALETTE.items()}
    for row, view in zip(axes, views):
        points = {name: point for name in classes if (point := point_on(view["semantic"], name)) is not None}
        seen = pipeline.semantic_attention_maps(
            prompt=earth.PROMPT,
            image=view["visible"],
            semantic_image=view["semantic"],
            num_inference_steps=steps,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(seed),
            points=list(points.values()),
            steps=[steps // 2],
        )
        row[0].imshow(view["visible"])
        row[0].set_title("hillshade", fontsize=8)
        row[1].imshow(seen.images[0])
        row[1].set_title("painted", fontsize=8)
        mass = seen.class_mass(view["semantic"], colors)
        for index, (name, (x, y)) in enumerate(points.items()):
            row[1].plot(x, y, "wo", markersize=5, markeredgecolor="black")
            # The name stands on the side that has room for it.
            left = x > view["visible"].width / 2
            row[1].annotate(
                name,
                (x, y),
                (-5 if left else 5, 4),
                textcoords="offset points",
                horizontalalignment="right" if left else "left",
                color="white",
                fontsize=7,
            )
            axis = row[2 + classes.index(name)]
            enlarged = view["semantic"].resize((512, 512), PIL.Image.Resampling.NEAREST)
            axis.imshow(seen.overlay(enlarged, point=index))
            shares = sorted(((share[0, 0, index], each) for each, share in mass.items()), reverse=True)
            looks = ", ".join(f"{each} {share:.0%}" for share, each in shares[:2] if share >= 0.005)
            axis.set_title(f"{name} looks at\n{looks}", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    return PIL.Image.open(buffer).convert("RGB")


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--demo_dir", type=Path, default=Path("demo"), help="Folder that examples/demo.py wrote.")
    add("--base", type=Path, help="Base of the weights. Default: examples/base, or the one in --demo_dir.")
    add("--weights", type=Path, help="Trained weights of a cross-attention. Default: cross_attention in --demo_dir.")
    add("--output", type=Path, default=Path("docs/attention.png"))
    add("--views", type=int, nargs="+", default=[0, 2], help="Held-out views to show, counted from 0.")
    add("--classes", nargs="+", default=["ocean", "land", "river"], choices=earth.PALETTE)
    add("--num_inference_steps", type=int, default=20)
    add("--seed", type=int, default=0)
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    base = args.base or (TRAINED_BASE if TRAINED_BASE.is_dir() else args.demo_dir / "base")
    pipeline = FluxFillSemanticPipeline.from_pretrained(base, dtype=torch.float32, use_safetensors=True)
    pipeline.load_lora_weights(args.weights or args.demo_dir / "cross_attention")
    pipeline.set_progress_bar_config(disable=True)
    views = read_triptychs(args.demo_dir / "test")
    chosen = [views[index] for index in args.views]
    save_small(draw_figure(pipeline, chosen, args.classes, args.num_inference_steps, args.seed), args.output)


if __name__ == "__main__":
    main(parse_args())
