# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Makes folders of photographs, thermal images and class maps of streets by day and night, from the MSRS data set.

    git clone https://github.com/Linfeng-Tang/MSRS
    git clone https://github.com/Lele-3/MSRS-detection-label
    python examples/streets.py --msrs MSRS --labels MSRS-detection-label --output_dir street

The maps are the filled boxes of the annotation of the thermal images: a layout, not a segmentation. `base` holds the frames
of MSRS' `train`, for `train_base.py`. `train` and `test` hold those of its `test`, so that a LoRA is trained on scenes that
its base does not know. The frames of `test` come from stretches of the drives of which no other folder has any.
"""

import argparse
import json
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps

from pipeline_flux_fill_semantic import read_picture
from semantic_fill.boxes import Box


CLASSES = ("person", "bicycle", "car")
COLORS = {"person": (255, 0, 0), "bicycle": (0, 200, 255), "car": (255, 200, 0)}
# First and last frame of the stretches that are held out, by the letter that names night and day.
HELD_OUT = {"N": ((1, 60), (1290, 1376)), "D": ((481, 571), (1540, 1610))}
TIMES = {"N": "night", "D": "day"}
# A box of the photograph's annotation is the same object if it overlaps by this share of both together.
SAME_OBJECT = 0.3


def choose_folder(frame: str, split: str) -> str | None:
    """The folder of a frame such as `"00004N"` of MSRS' split `"train"` or `"test"`, or `None` if it is left out."""
    held_out = any(first <= int(frame[:-1]) <= last for first, last in HELD_OUT[frame[-1]])
    if split == "train":
        return None if held_out else "base"
    return "test" if held_out else "train"


def read_labels(path: Path, size: tuple[int, int], to: tuple[int, int]) -> list[Box]:
    """The boxes of a file of the annotation, in pictures of `size` that are fitted to `to`. Without a file, there are none."""
    boxes = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        number, *shares = line.split()
        x, y, width, height = (float(share) * side for share, side in zip(shares, 2 * size))
        box = Box(CLASSES[int(number)], (x - width / 2, y - height / 2, x + width / 2, y + height / 2)).fitted(
            size, to
        )
        left, top, right, bottom = (round(min(max(edge, 0), side)) for edge, side in zip(box.edges, 2 * to))
        if left < right and top < bottom:
            boxes.append(Box(box.name, (left, top, right, bottom)))
    return boxes


def overlap(a: Box, b: Box) -> float:
    """The area of two boxes' intersection as a share of their union."""
    (left, top, right, bottom), (x0, y0, x1, y1) = a.edges, b.edges
    common = max(0, min(right, x1) - max(left, x0)) * max(0, min(bottom, y1) - max(top, y0))
    return common / ((right - left) * (bottom - top) + (x1 - x0) * (y1 - y0) - common)


def draw_map(boxes: list[Box], size: tuple[int, int]) -> PIL.Image.Image:
    """The boxes filled with the colors of their classes, persons over bicycles over cars."""
    picture = PIL.Image.new("RGB", size)
    draw = PIL.ImageDraw.Draw(picture)
    for box in sorted(boxes, key=lambda box: -CLASSES.index(box.name)):
        left, top, right, bottom = box.edges
        draw.rectangle((left, top, right - 1, bottom - 1), fill=COLORS[box.name])
    return picture


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--msrs", type=Path, required=True, help="Folder of MSRS, with train/vi, train/ir and test.")
    parser.add_argument("--labels", type=Path, required=True, help="Folder of its boxes, with infrared and visible.")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=256, help="Height of a view in pixels.")
    parser.add_argument("--width", type=int, default=336)
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    to, scenes = (args.width, args.resolution), {"base": [], "train": [], "test": []}
    for split in ("train", "test"):
        for path in sorted((args.msrs / split / "vi").glob("*.png")):
            folder = choose_folder(path.stem, split)
            if folder is None:
                continue
            visible, target = read_picture(path), read_picture(args.msrs / split / "ir" / path.name)
            ours, theirs = (
                read_labels(args.labels / kind / split / f"{path.stem}.txt", visible.size, to)
                for kind in ("infrared", "visible")
            )
            views = {"visible": visible, "target": target, "semantic": draw_map(ours, to)}
            for name, view in views.items():
                file = args.output_dir / folder / name / f"{path.stem}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                PIL.ImageOps.fit(view, to, PIL.Image.Resampling.LANCZOS).save(file)
            boxes = [
                {
                    "class": box.name,
                    "box": box.edges,
                    "also_labelled_in_visible": any(
                        box.name == other.name and overlap(box, other) >= SAME_OBJECT for other in theirs
                    ),
                }
                for box in ours
            ]
            scenes[folder].append({"file_name": path.name, "time": TIMES[path.stem[-1]], "boxes": boxes})
    for folder, rows in scenes.items():
        (args.output_dir / folder).mkdir(parents=True, exist_ok=True)
        (args.output_dir / folder / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{args.output_dir / folder}: {len(rows)} scenes, {sum(len(row['boxes']) for row in rows)} boxes")


if __name__ == "__main__":
    main(parse_args())
