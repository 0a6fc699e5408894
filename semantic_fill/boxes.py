# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Whether annotated objects stand out in a painting: how much brighter their boxes are than what surrounds them.

A metric of whole pictures, such as PSNR, hardly sees a person of 20 by 8 pixels. This one looks at the boxes of objects
alone, so it tells whether a painting shows what its map says, also with another sample's map or with none.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch

from semantic_fill.captions import read_text
from semantic_fill.data import TriptychDataset
from semantic_fill.sampling import wrong_maps, wrong_name


# A box of fewer pixels is too small to tell it from noise.
LEAST_PIXELS = 60
# Gray levels, out of 255, from which on a box stands out.
STANDS_OUT = 15
# The surroundings reach out by half the box, and by this many pixels at least.
LEAST_MARGIN = 4


@dataclass(frozen=True)
class Box:
    """
    An object: its class, its edges left, top, right and bottom in pixels, of which the last two are outside, and the
    group that it is reported in, such as `"night, target only"`, besides its class.
    """

    name: str
    edges: tuple[float, float, float, float]
    group: str = ""

    def touches(self, other: "Box") -> bool:
        (left, top, right, bottom), (x0, y0, x1, y1) = self.edges, other.edges
        return left < x1 and x0 < right and top < y1 and y0 < bottom

    def fitted(self, size: tuple[int, int], to: tuple[int, int]) -> "Box":
        """The box in a picture of width and height `size` that is scaled and cropped about its center to `to`."""
        scale = max(to[0] / size[0], to[1] / size[1])
        margins = [(scale * old - new) / 2 for old, new in zip(size, to)]
        left, top, right, bottom = (scale * edge - margins[i % 2] for i, edge in enumerate(self.edges))
        return replace(self, edges=(left, top, right, bottom))


def read_boxes(path: str | Path) -> dict[str, list[Box]]:
    """
    Boxes by the name of their picture without its ending. Each line of the file is a JSON object with `file_name`,
    `boxes`, and optionally `time`, such as `"night"`, which groups them. Each box is an object with `class`, `box`
    `[left, top, right, bottom]` in pixels, and optionally `also_labelled_in_visible`, which is false for objects that are
    annotated in the target view alone.

    Raises:
        `ValueError`: if the file is no such list. The message names the line.
    """
    scenes: dict[str, list[Box]] = {}
    for number, line in enumerate(read_text(Path(path)).splitlines(), 1):
        try:
            scene = json.loads(line)
            boxes = []
            for entry in scene["boxes"]:
                left, top, right, bottom = map(float, entry["box"])
                if not (left < right and top < bottom):
                    raise ValueError(f"the box {entry['box']} is empty")
                views = {True: "both views", False: "target only", None: None}[entry.get("also_labelled_in_visible")]
                group = ", ".join(filter(None, (scene.get("time"), views)))
                boxes.append(Box(str(entry["class"]), (left, top, right, bottom), group))
            scenes[str(PurePosixPath(scene["file_name"]).with_suffix(""))] = boxes
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--boxes {path}, line {number} has to be an object with `file_name` and `boxes`, each of them with"
                f" `class` and `box` [left, top, right, bottom], but: {type(error).__name__}: {error}."
            ) from error
    return scenes


def contrasts(picture: torch.Tensor, boxes: Sequence[Box]) -> list[float]:
    """
    The mean gray level of each box less that of its surroundings, or NaN for boxes that are too small or have none. The
    surroundings are the box enlarged by half its width and height on each side, without all of `boxes`.

    Args:
        picture (`torch.Tensor` of shape `(3, height, width)`): A picture in 8 bits.
    """
    gray = picture.float().mean(dim=0)
    free = torch.ones_like(gray, dtype=torch.bool)
    places = [[max(0, round(edge)) for edge in box.edges] for box in boxes]
    for left, top, right, bottom in places:
        free[top:bottom, left:right] = False
    found = []
    for left, top, right, bottom in places:
        inside = gray[top:bottom, left:right]
        x, y = (max(LEAST_MARGIN, math.ceil(side / 2)) for side in (right - left, bottom - top))
        around = (slice(max(0, top - y), bottom + y), slice(max(0, left - x), right + x))
        ring = gray[around][free[around]]
        large = inside.numel() >= LEAST_PIXELS and ring.numel() >= LEAST_PIXELS // 2
        found.append((inside.mean() - ring.mean()).item() if large else math.nan)
    return found


class BoxFigures:
    """Gathers how boxes stand out in paintings and in their targets, picture by picture."""

    def __init__(self):
        self.found: dict[str, dict[str, list[tuple[float, float]]]] = {}

    def add(
        self, painted: torch.Tensor, target: torch.Tensor, boxes: Sequence[Box], shown: Sequence[Box] | None = None
    ) -> None:
        """
        Adds a painting and its target.

        Args:
            painted, target (`torch.Tensor` of shape `(3, height, width)`): Pictures in 8 bits.
            boxes (`Sequence[Box]`): The sample's own boxes.
            shown (`Sequence[Box]`, *optional*):
                Those of the map that it was painted with, if that was another sample's. The sample's own boxes are then
                judged only where they touch none of them.
        """
        boxes = [box for box in boxes if not any(box.touches(other) for other in shown or ())]
        judged = {"own": boxes} | ({} if shown is None else {"map": shown})
        # No box is surroundings of another one.
        together = [box for part in judged.values() for box in part]
        pairs = zip(contrasts(painted, together), contrasts(target, together))
        for part, (box, pair) in zip((part for part in judged for _ in judged[part]), zip(together, pairs)):
            if not math.isnan(pair[0]):
                for name in dict.fromkeys((box.name, ", ".join(filter(None, (box.name, box.group))))):
                    self.found.setdefault(part, {}).setdefault(name, []).append(pair)

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """
        For the sample's `own` boxes and those of the `map` of another one, for each class, and each class and group: the
        number of boxes, the mean difference from their surroundings in gray levels and the share that stands out by 15 or
        more, in the paintings and in the targets.
        """
        summary: dict = {}
        for part, groups in self.found.items():
            summary[part] = {}
            for name, pairs in sorted(groups.items()):
                figures: dict[str, float] = {"count": len(pairs)}
                for column, values in zip(("painted", "target"), zip(*pairs)):
                    figures[f"{column}_difference"] = sum(values) / len(values)
                    figures[f"{column}_share"] = sum(value >= STANDS_OUT for value in values) / len(values)
                summary[part][name] = figures
        return summary


# -- Evaluation -------------------------------------------------------------------------------------------------------


class DatasetBoxes:
    """
    The boxes of a data set's samples, at the size of its views.

    Args:
        path (`str`, *optional*): A file for `read_boxes`. Without one, nothing is judged.

    Raises:
        `ValueError`: if a sample is missing from the file.
    """

    def __init__(self, path: str | None, dataset: TriptychDataset):
        self.dataset, self.boxes, self.figures = dataset, [], {}
        scenes = {} if path is None else read_boxes(path)
        missing = []
        for row in range(len(dataset) if path is not None else 0):
            index = dataset.indices[row]
            name, finding = dataset.source.name(index), dataset.findings[index]
            found = scenes.get(name, scenes.get(str(PurePosixPath(name).with_suffix(""))))
            if found is None:
                missing.append(name)
                continue
            size, (height, width) = (finding.width, finding.height), dataset.size(row)
            self.boxes.append([box.fitted(size, (width, height)) for box in found])
        if missing:
            raise ValueError(
                f"--boxes {path} has no line for {len(missing)} samples, such as {', '.join(missing[:5])}."
            )

    def add(self, kind: str, rows: list[int], painted: torch.Tensor, target: torch.Tensor) -> None:
        """Adds paintings and targets `(batch, 3, height, width)` in 8 bits of rows that were painted with a kind of map."""
        for row, *pictures in zip(rows if self.boxes else (), painted, target):
            # A row that lacks a map, or has the only one, has no wrong one.
            name = wrong_name(kind, self.dataset.maps)
            other = None if name is None else wrong_maps(self.dataset, [row], name).get(row)
            shown = None if other is None else self.boxes[other]
            self.figures.setdefault(kind, BoxFigures()).add(*pictures, self.boxes[row], shown)

    def summary(self, kind: str) -> dict:
        return {"boxes": self.figures[kind].summary()} if self.boxes else {}


def box_lines(figures: dict[str, dict]) -> list[str]:
    """Lines of markdown about the boxes in the figures of each kind of map."""
    lines = [
        "",
        "| map | boxes | number | gray levels above surroundings | the target's | stand out | the target's |",
        "| --- " * 7 + "|",
    ]
    for kind, found in figures.items():
        for part, groups in found.get("boxes", {}).items():
            for name, values in groups.items():
                shown = f"{name} of the wrong map" if part == "map" else name
                cells = [f"{values[f'{who}_difference']:.1f}" for who in ("painted", "target")]
                cells += [f"{values[f'{who}_share']:.0%}" for who in ("painted", "target")]
                lines.append(f"| {kind} | {shown} | {values['count']} | {' | '.join(cells)} |")
    return lines if len(lines) > 3 else []
