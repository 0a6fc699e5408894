# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The views of a scene in pictures: how a triptych is cut, which shapes a run may have, and the colors of label maps.

Trainer, evaluation, page, demo and `make_triptychs.py` all cut and color by these functions.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageColor

from pipeline_flux_fill_semantic import LABEL_LIMIT
from semantic_attention import SINGLE_MAP
from semantic_fill.captions import read_text


# The views beside the maps. With one map, `PANELS` are all views.
VIEWS = ("visible", "target")
PANELS = (*VIEWS, *SINGLE_MAP)
NUMBERS = dict(enumerate("no one two three four five six seven eight nine ten".split()))
# Panels of this much difference in shape count as alike.
SHAPE_TOLERANCE = 0.02
# A third of a picture that is narrower than a view of the run by more than this factor is no view, but part of one.
NARROWEST = 2.2
Palette = dict[str, tuple[int, int, int]]


def cut_triptych(
    pictures: Sequence[PIL.Image.Image | None], panels: int = 3, maps: Sequence[str] = SINGLE_MAP
) -> dict[str, PIL.Image.Image]:
    """
    The views by their names, all of one size, from one picture of `panels` views or from one picture a view, which is
    `None` for a map that is missing. Behind the views of `VIEWS` come the maps by their names.

    Raises:
        `ValueError`: with a reason that reads after the name of the sample.
    """
    if len(pictures) == 1:
        canvas: Any = pictures[0]
        width, remainder = divmod(canvas.width, panels)
        if remainder or width == 0:
            number = NUMBERS.get(panels, panels)
            raise ValueError(f"is {canvas.width} pixels wide, which cannot be divided into {number} equal panels")
        pictures = [canvas.crop((i * width, 0, (i + 1) * width, canvas.height)) for i in range(panels)]
    views = {name: picture for name, picture in zip((*VIEWS, *maps), pictures) if picture is not None}
    if len({picture.size for picture in views.values()}) > 1:
        sizes = ", ".join(f"{name} {picture.width}x{picture.height}" for name, picture in views.items())
        raise ValueError(f"has views of different sizes ({sizes}). examples/make_triptychs.py brings them to one size")
    return views


def count_panels(size: tuple[int, int], shape: float | None, pairs: bool, views: int = 3) -> int:
    """
    How many views stand side by side in a picture.

    Args:
        size (`tuple[int, int]`): Width and height of the picture.
        shape (`float`, *optional*): Width over height of a panel of this run, if there is but one.
        pairs (`bool`): Whether two views are accepted.
        views (`int`): How many views a sample of this run has with all its maps.

    Raises:
        `ValueError`: if the picture is one view or two where all are needed, or nothing tells whether it is two or all.
    """
    if shape is None:
        return 2 if pairs else views
    number = NUMBERS.get(views, str(views))
    # How much wider than a view of this run each part would be, for so many parts.
    wider = {panels: math.log(size[0] / panels / size[1] / shape) for panels in (1, 2, views)}
    alike = [panels for panels, width in wider.items() if abs(width) <= SHAPE_TOLERANCE]
    shown = f"is {size[0]}x{size[1]} pixels"
    hint = "pass the shape of a view with --resolution and --width, or the views in the folders visible, target and semantic"
    if pairs:
        # Only one of the numbers may fit the shape, or divide the width.
        fitting = [n for n in (2, views) if n in alike] or [n for n in (2, views) if size[0] % n == 0] or [2]
        if len(fitting) > 1:
            raise ValueError(f"{shown}, which can be two views or {number}: {hint}")
        return fitting[0]
    if views not in alike and (alike or wider[views] < -math.log(NARROWEST)):
        found = {1: "is one view", 2: "are two views"}[(alike or [1])[0]]
        raise ValueError(
            f"{shown}, which by the shape of this run {found} and not {number}. {number.capitalize()} views are needed,"
            f" or two with --semantic_mode none. If it does hold {number}, {hint}"
        )
    return views


def bucket_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """
    Heights and widths of about the same area, multiples of 16, for the shapes 1:2, 9:16, 2:3, 3:4, 1:1, 4:3, 3:2, 16:9
    and 2:1.
    """
    sizes = {}
    for ratio in (1 / 2, 9 / 16, 2 / 3, 3 / 4, 1, 4 / 3, 3 / 2, 16 / 9, 2):
        h = max(16, round(math.sqrt(height * width / ratio) / 16) * 16)
        sizes[h, max(16, round(height * width / h / 16) * 16)] = None
    return list(sizes)


def read_palette(path: str | Path) -> Palette:
    """
    Names and colors of classes from a JSON object, or from a list whose names are 0, 1 and so on. A color is
    `[red, green, blue]` of 0 to 255, `"#ff0000"` or `"red"`.

    Raises:
        `ValueError`: if the file is no such palette.
    """
    try:
        data = json.loads(read_text(Path(path)))
        pairs = data.items() if isinstance(data, dict) else enumerate(data)
        palette = {
            str(name): PIL.ImageColor.getrgb(color)[:3] if isinstance(color, str) else tuple(color)
            for name, color in pairs
        }
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--palette {path} has to hold a JSON object or list of colors, but: {error}") from error
    for name, color in palette.items():
        if len(color) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in color):
            raise ValueError(f"--palette {path}: the color of {name} has to be [red, green, blue] but is {color}.")
    if not palette:
        raise ValueError(f"--palette {path} holds no color.")
    return palette


def find_labels(semantic: PIL.Image.Image) -> list[int] | None:
    """The different values of a map that has one channel and few values, so that they may be label numbers; else `None`."""
    pixels = np.asarray(semantic)
    if (pixels != pixels[..., :1]).any():
        return None
    numbers = np.flatnonzero(np.bincount(pixels[..., 0].ravel())).tolist()
    return numbers if len(numbers) <= LABEL_LIMIT else None


def are_labels(found: Sequence[list[int] | None]) -> bool:
    """
    Whether maps hold label numbers, by what `find_labels` found in each of them. A single map of small values may be dark
    by chance. Where all of them are, they hold numbers.
    """
    return len(found) > 0 and all(numbers is not None and numbers[-1] < LABEL_LIMIT for numbers in found)


def color_labels(numbers: np.ndarray, palette: Palette) -> PIL.Image.Image:
    """
    The map of label numbers `(height, width)` in the colors of a palette.

    Raises:
        `ValueError`: if a label has no color. The reason reads after the name of the sample.
    """
    present, places = np.unique(numbers, return_inverse=True)
    for number in present:
        if str(number) not in palette:
            raise ValueError(f"has the label {number}, which has no color in --palette")
    colors = np.array([palette[str(number)] for number in present], np.uint8)
    return PIL.Image.fromarray(colors[places.reshape(numbers.shape)])
