# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Triptychs of Microsoft's Fluent emoji (MIT): black glyph | 3D render | map of color regions.

The three views come out of npm packages, which `npm pack` fetches. The map is the flat icon with each pixel's color
replaced by the nearest of the palette below, so it says where a red region is but not which red. Food and animals are
held out as whole categories, so that variants of one emoji stay together.
"""

import argparse
import io
import json
import logging
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm.auto import tqdm


logger = logging.getLogger(__name__)

PACKAGES = {
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "glyph": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
}
HELD_OUT = ("Food & Drink", "Animals & Nature")
PROMPT = "glyph to 3d"
PALETTE = {
    "white": (255, 255, 255),
    "black": (40, 40, 40),
    "gray": (150, 150, 150),
    "red": (220, 40, 60),
    "orange": (255, 140, 40),
    "yellow": (255, 210, 50),
    "green": (50, 170, 80),
    "blue": (40, 120, 220),
    "purple": (140, 90, 200),
    "brown": (130, 80, 50),
    "pink": (250, 150, 190),
}


def fetch(folder: Path) -> dict[str, tarfile.TarFile]:
    """Opens the packages' archives, and fetches those that are not in `folder` yet."""
    folder.mkdir(parents=True, exist_ok=True)
    archives = {}
    for name, package in PACKAGES.items():
        file = folder / f"{package.strip('@').replace('/', '-').replace('@', '-')}.tgz"
        if not file.exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        archives[name] = tarfile.open(file)
    return archives


def read_json(archive: tarfile.TarFile, name: str):
    return json.load(archive.extractfile(f"package/{name}"))


def render(icons: dict, name: str, size: int) -> PIL.Image.Image:
    """An icon on white."""
    # Making the triptychs needs it, training on them does not.
    import resvg_py

    icon = icons["icons"][name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    body = icon["body"].replace("currentColor", "#000")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return on_white(PIL.Image.open(io.BytesIO(data)))


def on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    picture = picture.convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def nearest_colors(picture: np.ndarray) -> np.ndarray:
    """Index into `PALETTE` of the color nearest to each pixel of a `(height, width, 3)` picture."""
    colors = np.array(list(PALETTE.values()), np.float32)
    return ((picture[:, :, None].astype(np.float32) - colors) ** 2).sum(-1).argmin(-1)


def color_map(flat: PIL.Image.Image) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.array(list(PALETTE.values()), np.uint8)[nearest_colors(np.asarray(flat))])


def write_splits(output_dir: Path, packages: Path, size: int) -> dict[str, int]:
    """Writes `train` and `test` folders of triptychs with `metadata.jsonl`; returns how many each holds."""
    archives = fetch(packages)
    flat, glyph = (read_json(archives[name], "icons.json") for name in ("flat", "glyph"))
    characters = {name: code for code, name in read_json(archives["flat"], "chars.json").items()}
    renders = {Path(member).stem: member for member in archives["3d"].getnames() if member.endswith(".webp")}
    rows = {"train": [], "test": []}
    for category, names in read_json(archives["glyph"], "metadata.json")["categories"].items():
        split = "test" if category in HELD_OUT else "train"
        (output_dir / split).mkdir(parents=True, exist_ok=True)
        for name in tqdm(sorted(names), desc=category):
            code = characters.get(name)
            # Some file names carry the variation selector.
            file = next((renders[c] for c in (code, f"{code}-fe0f") if c in renders), None)
            if file is None or name not in flat["icons"] or name not in glyph["icons"]:
                continue
            target = on_white(PIL.Image.open(archives["3d"].extractfile(file))).resize((size, size))
            # Regions are found at twice the size. Blended colors would be no labels.
            regions = color_map(render(flat, name, 2 * size)).resize((size, size), PIL.Image.Resampling.NEAREST)
            triptych = PIL.Image.new("RGB", (3 * size, size))
            for column, view in enumerate((render(glyph, name, size), target, regions)):
                triptych.paste(view, (column * size, 0))
            triptych.save(output_dir / split / f"{name}.png")
            rows[split].append({"file_name": f"{name}.png", "text": PROMPT})
    for split, lines in rows.items():
        (output_dir / split / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {split: len(lines) for split, lines in rows.items()}


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("emoji"))
    parser.add_argument("--packages", type=Path, default=Path("emoji/packages"), help="Folder of the npm archives.")
    parser.add_argument("--resolution", type=int, default=96)
    return parser.parse_args(args)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse_args()
    logger.info(write_splits(arguments.output_dir, arguments.packages, arguments.resolution))
