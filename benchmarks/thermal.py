# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The ablation's task of streets at night: thermal images of photographs, judged by whether persons stand out in them.

`boxes.jsonl` of the held-out scenes, in the form of `semantic_fill.boxes`, says where persons are and at what time of day.
`docs/data.md` tells how to get the data.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from alignment import alignment

from semantic_fill.boxes import BoxFigures, read_boxes


GROUPS = ("night, target only", "night, both views", "day, target only", "day, both views")


class Streets:
    """The held-out scenes of a folder, by the names of their pictures in the order of the paintings."""

    def __init__(self, folder: Path, names: Sequence[str]):
        boxes = read_boxes(folder / "boxes.jsonl")
        self.boxes = [boxes[name] for name in names]
        scenes = [json.loads(line) for line in (folder / "boxes.jsonl").read_text().splitlines()]
        times = {Path(scene["file_name"]).stem: scene["time"] for scene in scenes}
        self.times = np.array([times[name] for name in names])

    def others(self) -> list[int]:
        """For each scene, the one whose map is its wrong one: of the same time of day and, as far as can be, another place."""
        others = np.arange(len(self.times))
        for time in set(self.times):
            rows = np.flatnonzero(self.times == time)
            others[rows] = np.roll(rows, -(len(rows) // 2))
        return others.tolist()

    def judge(
        self, painted: torch.Tensor, target: torch.Tensor, visible: torch.Tensor, shown: list[int] | None = None
    ) -> dict:
        """
        How boxes stand out, and how paintings are aligned with the photographs by day and night.

        Args:
            painted, target, visible (`torch.Tensor` of shape `(batch, 3, height, width)`): Pictures in 8 bits.
            shown (`list[int]`, *optional*): The scenes whose maps were shown, if they were others.
        """
        figures = BoxFigures()
        for index, boxes in enumerate(self.boxes):
            figures.add(painted[index], target[index], boxes, None if shown is None else self.boxes[shown[index]])
        found: dict = figures.summary()
        for time in sorted(set(self.times)):
            rows = torch.from_numpy(self.times == time)
            found[f"alignment, {time}"] = alignment(painted[rows], visible[rows])
            found[f"target's alignment, {time}"] = alignment(target[rows], visible[rows])
        return found


def street_tables(variants: dict[str, list[dict]]) -> str:
    """
    Markdown: for persons in thermal only at night, the share that stands out with each kind of map; then all four groups
    with the right map; then the alignment. A cell is the mean over the seeds.

    Args:
        variants (`dict[str, list[dict]]`): The rows of the ablation's output by variant.
    """

    def mean(cells: list[dict], *path: str, digits: int = 2) -> str:
        values = []
        for found in cells:
            for key in path:
                found = found.get(key, {})
            values += [found] if isinstance(found, (int, float)) else []
        return f"{np.mean(values):.{digits}f}" if values else ""

    shares = [
        "| persons of night that stand out | right map | the wrong map's | own, wrong map | own, empty map | own, no map |",
        "| --- " * 6 + "|",
    ]
    groups = [
        "| gray levels above surroundings (share that stands out) | " + " | ".join(GROUPS) + " |",
        "| --- " * (1 + len(GROUPS)) + "|",
    ]
    places = [
        "| pixels from the photograph's edges: right, down, distance (share of windows) | day | night |",
        "| --- " * 3 + "|",
    ]
    night = f"person, {GROUPS[0]}"
    kinds = (("right", "own"), ("wrong", "map"), ("wrong", "own"), ("empty", "own"), ("without", "own"))

    def add(name: str, cells: list[dict], column: str, alignment: str) -> None:
        # A variant without a map paints once.
        seen = kinds if "wrong" in cells[0] else [("wrong", "none")] * 4 + [("right", "own")]
        values = [mean(cells, *kind, night, f"{column}_share") for kind in seen]
        shares.append(f"| {name} | " + " | ".join(values) + " |")
        path = [("right", "own", f"person, {group}") for group in GROUPS]
        values = [
            f"{mean(cells, *p, f'{column}_difference', digits=1)} ({mean(cells, *p, f'{column}_share')})" for p in path
        ]
        groups.append(f"| {name} | " + " | ".join(values) + " |")
        path = [("right", f"{alignment}, {time}") for time in ("day", "night")]
        values = [
            ", ".join(mean(cells, *p, key, digits=1) for key in ("right", "down", "distance"))
            + f" ({mean(cells, *p, 'clear_windows')})"
            for p in path
        ]
        places.append(f"| {name} | " + " | ".join(values) + " |")

    for name, cells in variants.items():
        add(name, cells, "painted", "alignment")
    # Variants without a map have fewer kinds.
    every = max(variants.values(), key=lambda cells: len(cells[0]))
    add("the thermal image itself", every, "target", "target's alignment")
    return "\n\n".join("\n".join(lines) for lines in (shares, groups, places))
