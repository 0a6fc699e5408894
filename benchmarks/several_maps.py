# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Two maps of the Earth, neither of which is enough alone: what both together gain, and what each is worth.

    python benchmarks/several_maps.py --jobs 9

One map tells water from land. The other shows four kinds of ground, from dark forests to bright deserts, and goes on under
the water, so it tells nothing of coasts. Each cell (maps, seed) is a run of the trainer with both maps or with one of them.
It paints held-out pictures with the right maps, with each map of another picture in turn, and with none, and measures water
and land apart. Cells are shared out over `--jobs` processes, and are trained as those of `ablation.py`.
"""

import argparse
import functools
import itertools
import json
import logging
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import ablation
import numpy as np
import PIL.Image
import PIL.ImageFilter
from scipy.ndimage import distance_transform_edt
from tqdm.auto import tqdm


sys.path.insert(0, str(ablation.ROOT / "examples"))

import earth  # noqa: E402


logger = logging.getLogger(__name__)

MAPS = ("water", "ground")
VARIANTS = {"both": MAPS, "water": MAPS[:1], "ground": MAPS[1:]}
REGIONS = ("all", "water", "land")
WATER, LAND = (30, 60, 200), (120, 180, 60)
# Kinds of ground, and the brightness of their surroundings in the satellite view that divides them.
GROUND, BRIGHTNESS = ((20, 80, 20), (120, 180, 60), (200, 170, 90), (240, 230, 200)), (48, 70, 100)


# -- Data -------------------------------------------------------------------------------------------------------------


@functools.cache
def draw_maps() -> dict[str, PIL.Image.Image]:
    """Both maps of the whole Earth."""
    whole = earth.load_earth()
    colors = np.asarray(whole.map)
    is_water = np.logical_or(*((colors == earth.PALETTE[name]).all(axis=2) for name in ("ocean", "lake")))
    brightness = np.asarray(whole.satellite.convert("L").filter(PIL.ImageFilter.GaussianBlur(4)))
    # Water takes the kind of the nearest land.
    nearest = distance_transform_edt(is_water, return_distances=False, return_indices=True)
    kinds = np.digitize(brightness, BRIGHTNESS)[tuple(nearest)]
    water = np.where(is_water[..., None], np.uint8(WATER), np.uint8(LAND))
    return {"water": PIL.Image.fromarray(water), "ground": PIL.Image.fromarray(np.array(GROUND, np.uint8)[kinds])}


def write_split(folder: Path, split: str, count: int, size: int, seed: int) -> None:
    """Writes pictures of all views and a metadata file whose columns name them, unless an earlier call has done so."""
    if (folder / "metadata.jsonl").is_file():
        return
    whole, rows = earth.load_earth(), []
    views = {"visible": whole.hillshade, "target": whole.satellite, **draw_maps()}
    for index, box in enumerate(earth.draw_boxes(split, count, seed, size)):
        row = {"text": earth.PROMPT}
        for name, view in views.items():
            # The colors of maps are labels, which must not be blended.
            resample = PIL.Image.Resampling.NEAREST if name in MAPS else PIL.Image.Resampling.LANCZOS
            row[name] = f"{name}/{index:05d}.png"
            (folder / name).mkdir(parents=True, exist_ok=True)
            view.crop(box).resize((size, size), resample).save(folder / row[name])
        rows.append(row)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# -- One cell ---------------------------------------------------------------------------------------------------------


def run_cell(name: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains with the maps of a variant, paints, and measures. A worker imports the libraries once it knows its GPU."""
    import cells
    import torch
    from measurement import StepTracker, assemble, trainer

    columns = f"--visible_column visible --target_column target --semantic_column {','.join(VARIANTS[name])}"
    variant = ablation.Variant(f"--semantic_mode {args.mode} {columns}")
    run = assemble(cells.options_of("earth", variant, seed, args.steps, args), StepTracker())
    # Nothing goes on from a cell.
    run.checkpointer.save = lambda state: None
    trainer.train(run)
    painter, maps = cells.make_painter(run), VARIANTS[name]

    def read(view: str) -> torch.Tensor:
        pictures = [PIL.Image.open(args.earth / "test" / view / f"{index:05d}.png") for index in range(args.num_test)]
        return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2) / 255

    views = {view: read(view) for view in ("visible", "target", *MAPS)}

    @torch.no_grad()
    def paint(shown: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(maps) == 1:
            # One map needs no name.
            shown = {painter.semantic_maps[0]: pictures for pictures in shown.values()}
        painted = []
        for rows in torch.arange(args.num_test).split(32):
            painted.append(
                painter(
                    image=views["visible"][rows],
                    semantic_image={map_name: pictures[rows] for map_name, pictures in shown.items()},
                    num_inference_steps=args.num_inference_steps,
                    max_sequence_length=run.options.max_sequence_length,
                    generator=[torch.Generator().manual_seed(row) for row in rows.tolist()],
                    output_type="pt",
                    **cells.prompt_of(run, len(rows)),
                ).images.float()
            )
        return torch.cat(painted).clamp(0, 1).cpu()

    def psnr(painted: torch.Tensor) -> dict[str, float]:
        error = (painted - views["target"]).square().mean(dim=1)
        is_water = (views["water"] == torch.tensor(WATER)[None, :, None, None] / 255).all(dim=1)
        regions = dict(zip(REGIONS, (torch.ones_like(is_water), is_water, ~is_water)))
        return {region: -10 * error[where].mean().log10().item() for region, where in regions.items()}

    right = {map_name: views[map_name] for map_name in maps}
    kinds = {f"wrong {m}": right | {m: right[m].roll(1, dims=0)} for m in maps}
    figures = {kind: psnr(paint(shown)) for kind, shown in {"right": right, **kinds, "none": {}}.items()}
    scales = run.engine.unwrap(run.model).scales()
    return {
        "variant": name,
        "seed": seed,
        "mode": args.mode,
        "steps": args.steps,
        "figures": figures,
        "scales": scales,
    }


# -- Table ------------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """Markdown: the PSNR in each region, mean and, after ±, the standard deviation over the seeds."""
    lines = [
        f"| trained with | painted with | {' | '.join(f'{r}, dB' for r in REGIONS)} |",
        "| --- " * (2 + len(REGIONS)) + "|",
    ]

    def spread(values: list[float]) -> str:
        return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")

    for variant in VARIANTS:
        cells = [row["figures"] for row in rows if row["variant"] == variant]
        for kind in cells[0] if cells else ():
            shown = [spread([figures[kind][region] for figures in cells]) for region in REGIONS]
            lines.append(f"| {variant} | {kind} | {' | '.join(shown)} |")
    return "\n".join(lines)


# -- Main -------------------------------------------------------------------------------------------------------------


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("several_maps.jsonl"), help="Cells in it are not run again."
    )
    parser.add_argument("--mode", default="projection", help="--semantic_mode of all cells.")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--earth", type=Path, default=Path("several_maps"), help="Folder for the data.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_train", type=int, default=400)
    parser.add_argument("--num_test", type=int, default=64)
    parser.add_argument("--num_inference_steps", type=int, default=8)
    parser.add_argument("--cache_root", type=Path, default=Path("several_maps-cache"), help="Folder for encodings.")
    parser.add_argument("--jobs", type=int, default=1)
    # All else is as in the ablation.
    return argparse.Namespace(**vars(ablation.parse_args([])) | vars(parser.parse_args(args)))


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for split, count in (("train", args.num_train), ("test", args.num_test)):
        write_split(args.earth / split, split, count, 128, seed=0)
    there = {(row["variant"], row["seed"]) for row in ablation.read_output(args.output)}
    # Seed by seed, so that runs that are cut off have the same seeds of all variants.
    cells = [(name, seed) for seed, name in itertools.product(args.seeds, VARIANTS) if (name, seed) not in there]
    devices = ablation.torch.cuda.device_count() if args.device == "cuda" else 0
    context = multiprocessing.get_context("spawn")
    numbers = context.Manager().Queue()
    for number in range(args.jobs):
        numbers.put(number)
    with ProcessPoolExecutor(args.jobs, context, ablation.start_worker, (numbers, devices)) as pool:
        futures = {pool.submit(run_cell, *cell, args): cell for cell in cells}
        for future in tqdm(as_completed(futures), total=len(futures), mininterval=10):
            with open(args.output, "a") as file:
                file.write(json.dumps(future.result()) + "\n")
    print(table(ablation.read_output(args.output)))


if __name__ == "__main__":
    main(parse_args())
