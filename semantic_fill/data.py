# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Triptychs: how a sample becomes views of one size and a caption, and the check of all samples before a run.

The check decodes every picture once, in threads, and is shared among the processes of a run. It remembers what it found
while the files stay unchanged, so that a second start over a large data set takes seconds.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from pipeline_flux_fill_semantic import read_picture
from semantic_fill.files import FileMemory
from semantic_fill.options import DataOptions, Options
from semantic_fill.sources import Source, list_folder
from semantic_fill.tables import load_source


logger = get_logger(__name__)

PANELS = ("visible", "target", "semantic")
# Panels of this much difference in shape count as alike.
SHAPE_TOLERANCE = 0.02
# A map whose values are all below this is taken for label numbers.
LABEL_LIMIT = 64
# Findings and encodings of pictures that were read by other rules are made anew.
READER_VERSION = "2"
Palette = dict[str, tuple[int, int, int]]


# -- Views ------------------------------------------------------------------------------------------------------------


def cut_triptych(pictures: Sequence[PIL.Image.Image], panels: int = 3) -> dict[str, PIL.Image.Image]:
    """
    The views by their names in `PANELS`, all of one size, from one picture of `panels` views or from one picture a view.

    Raises:
        `ValueError`: with a reason that reads after the name of the sample.
    """
    if len(pictures) == 1:
        (canvas,) = pictures
        width, remainder = divmod(canvas.width, panels)
        if remainder or width == 0:
            number = {2: "two", 3: "three"}[panels]
            raise ValueError(f"is {canvas.width} pixels wide, which cannot be divided into {number} equal panels")
        pictures = [canvas.crop((i * width, 0, (i + 1) * width, canvas.height)) for i in range(panels)]
    if len({picture.size for picture in pictures}) > 1:
        sizes = ", ".join(f"{name} {picture.width}x{picture.height}" for name, picture in zip(PANELS, pictures))
        raise ValueError(f"has views of different sizes ({sizes})")
    return dict(zip(PANELS, pictures))


def count_panels(size: tuple[int, int], shape: float, pairs: bool) -> int:
    """
    How many views stand side by side in a picture.

    Args:
        size (`tuple[int, int]`): Width and height of the picture.
        shape (`float`): Width over height of a panel of this run.
        pairs (`bool`): Whether two views are accepted.

    Raises:
        `ValueError`: if the picture is a diptych where three views are needed.
    """

    def difference(panels: int) -> float:
        return abs(math.log(size[0] / panels / size[1] / shape))

    if pairs:
        return 2 if difference(2) <= difference(3) else 3
    if difference(2) <= SHAPE_TOLERANCE < difference(3):
        raise ValueError(
            f"is {size[0]}x{size[1]} pixels, which are two panels of this run's shape. Three views are needed, or"
            " --semantic_mode none. If it does hold three, pass their shape with --resolution and --width"
        )
    return 3


def read_triptychs(folder: Path) -> list[dict[str, PIL.Image.Image]]:
    """The views of each triptych that the `metadata.jsonl` of a folder lists, for those who need neither size nor text."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(line)["file_name"] for line in lines if line.strip()]
    return [cut_triptych([read_picture(folder / name)]) for name in names]


def read_palette(path: str | Path) -> Palette:
    """
    Names and colors of classes from a JSON object, or from a list whose names are 0, 1 and so on. A color is
    `[red, green, blue]` of 0 to 255, `"#ff0000"` or `"red"`.

    Raises:
        `ValueError`: if the file is no such palette.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"))
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


def color_labels(labels: PIL.Image.Image, palette: Palette) -> PIL.Image.Image:
    """
    A map of label numbers, all channels alike, in the colors of a palette.

    Raises:
        `ValueError`: if a label has no color. The reason reads after the name of the sample.
    """
    numbers = np.asarray(labels)[..., 0]
    colors = np.zeros((256, 3), np.uint8)
    for number in np.unique(numbers):
        if str(number) not in palette:
            raise ValueError(f"has the label {number}, which has no color in --palette")
        colors[number] = palette[str(number)]
    return PIL.Image.fromarray(colors[numbers])


# -- The check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What the check found out about a sample: size of a view, number of views, labels, and hashes."""

    width: int
    height: int
    panels: int
    # Whether the semantic view has one channel and small values only.
    labels: bool
    # SHA-256 of each picture as it is stored.
    digests: tuple[str, ...]
    # SHA-256 of the visible view's pixels.
    content: str


def inspect(pictures: list[bytes], shape: float, pairs: bool) -> Finding:
    """
    Decodes a sample.

    Raises:
        `ValueError`: with a reason that reads after the name of the sample.
    """
    decoded = [read_picture(data) for data in pictures]
    panels = count_panels(decoded[0].size, shape, pairs) if len(decoded) == 1 else len(decoded)
    views = cut_triptych(decoded, panels)
    labels = False
    if "semantic" in views:
        pixels = np.asarray(views["semantic"])
        labels = bool(pixels.max() < LABEL_LIMIT and (pixels == pixels[..., :1]).all())
    visible = views["visible"]
    content = hashlib.sha256(repr(visible.size).encode() + visible.tobytes()).hexdigest()
    digests = tuple(hashlib.sha256(data).hexdigest() for data in pictures)
    return Finding(*visible.size, panels, labels, digests, content)


def check_samples(
    source: Source, shape: float, pairs: bool, memory_file: Path | None = None, rank: int = 0, world_size: int = 1
) -> list[Finding]:
    """
    Decodes every sample of a source. With several processes each decodes a share, and all of them have to call this.

    Args:
        shape, pairs: As in [`count_panels`].
        memory_file (`Path`, *optional*): File that keeps the findings about unchanged files for later runs.
        rank, world_size (`int`): This process among all.

    Raises:
        `ValueError`: if samples cannot be used. The message names up to 50 of them with the reasons.
    """
    memory = FileMemory(memory_file, f"{READER_VERSION} {shape:.4f} {pairs}")
    findings: list[Any] = [None] * len(source)
    for index in range(len(source)):
        files = source.files(index)
        if files is not None and (known := memory.get(files)) is not None:
            findings[index] = Finding(**known | {"digests": tuple(known["digests"])})

    def check(index: int) -> tuple[int, Finding | str]:
        try:
            return index, inspect(source.pictures(index), shape, pairs)
        # Reading files and decoding them raises errors of many kinds.
        except Exception as error:
            return index, f"{source.name(index)}: {error}"

    todo = [index for index, finding in enumerate(findings) if finding is None]
    own = todo[rank::world_size]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(tqdm(pool.map(check, own), total=len(own), desc="Checking samples", disable=None, leave=False))
    for index, finding in gather_object(found) if world_size > 1 else found:
        findings[index] = finding
        if isinstance(finding, Finding) and source.files(index) is not None:
            memory.put(source.files(index) or [], vars(finding))
    if rank == 0:
        memory.save()
    problems = [*source.problems, *(finding for finding in findings if isinstance(finding, str))]
    if problems:
        listed = "\n  ".join(problems[:50])
        more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise ValueError(f"{len(problems)} samples cannot be used:\n  {listed}{more}")
    return findings


# -- Data sets --------------------------------------------------------------------------------------------------------


class TriptychDataset(torch.utils.data.Dataset):
    """
    Samples as views `(3, height, width)` in [0, 1] and captions. A sample is decoded each time it is asked for.

    Views of another shape than the run's are scaled and cropped about their center, all views of a sample alike.

    Args:
        source (`Source`):
            The samples, from `load_source`.
        options (`DataOptions`):
            Size, captions and palette.
        findings (`list[Finding]`):
            What `check_samples` found out.
        indices (`list[int]`, *optional*):
            Which samples of the source belong to this data set. Default: all.

    Raises:
        `ValueError`: if captions are missing, or the semantic maps hold label numbers and there is no palette.
    """

    def __init__(
        self, source: Source, options: DataOptions, findings: list[Finding], indices: list[int] | None = None
    ):
        self.source, self.findings = source, findings
        self.indices = list(range(len(source))) if indices is None else indices
        self.height, self.width = options.resolution, options.width
        self.instance_prompt = options.instance_prompt
        # A single map of small values may be dark by chance. Where all of them are, they hold numbers.
        self.palette = None
        if findings and all(finding.labels for finding in findings):
            if options.palette is None:
                raise ValueError(
                    f"All semantic maps have one channel and values below {LABEL_LIMIT}: they hold label numbers, which"
                    " are nearly black as colors. Pass their colors with --palette."
                )
            self.palette = read_palette(options.palette)
        problems = []
        for index in range(len(self)):
            try:
                self.captions(index)
            except ValueError as error:
                problems.append(f"{source.name(self.indices[index])}: {error}")
        if problems:
            more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
            listed = "\n  ".join(problems[:50])
            raise ValueError(
                f"{len(problems)} of {len(self)} samples have no usable caption. Name their column with --caption_column,"
                f" or pass --instance_prompt:\n  {listed}{more}"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, one of which is drawn for each visit."""
        captions = self.source.captions(self.indices[index])
        captions = list(captions) or ([] if self.instance_prompt is None else [self.instance_prompt])
        if not captions:
            raise ValueError("has no caption")
        for caption in captions:
            if not isinstance(caption, str) or not (caption.strip() or self.instance_prompt == ""):
                raise ValueError(f"has a caption that is no text ({caption!r})")
        return captions

    def caption(self, index: int, draw: float = 0.0) -> str:
        """The caption of a sample for a random number in [0, 1)."""
        captions = self.captions(index)
        return captions[int(draw * len(captions))]

    def all_captions(self) -> set[str]:
        return {caption for index in range(len(self)) for caption in self.captions(index)}

    def digests(self, index: int) -> tuple:
        """What the views depend on: the stored pictures, and how they are read."""
        palette = None if self.palette is None else tuple(sorted(self.palette.items()))
        return (*self.findings[self.indices[index]].digests, READER_VERSION, palette)

    def views(self, index: int, flip: bool = False) -> dict[str, torch.Tensor]:
        """The views by their names in `PANELS`. The semantic one is missing from pairs."""
        index = self.indices[index]
        pictures = [read_picture(data) for data in self.source.pictures(index)]
        views = {}
        for name, picture in cut_triptych(pictures, self.findings[index].panels).items():
            if name == "semantic" and self.palette is not None:
                picture = color_labels(picture, self.palette)
            # The colors of a semantic map are labels, which must not be blended.
            resample = PIL.Image.Resampling.NEAREST if name == "semantic" else PIL.Image.Resampling.LANCZOS
            if picture.size != (self.width, self.height):
                picture = PIL.ImageOps.fit(picture, (self.width, self.height), resample)
            picture = PIL.ImageOps.mirror(picture) if flip else picture
            views[name] = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return views

    def summary(self) -> str:
        """One line about the data: samples, captions, sizes, and what was done to them."""
        findings = [self.findings[index] for index in self.indices]
        sizes = Counter((finding.width, finding.height) for finding in findings)
        shown = ", ".join(f"{count} of {width}x{height}" for (width, height), count in sizes.most_common(4))
        shape = self.width / self.height
        cropped = sum(abs(math.log(f.width / f.height / shape)) > SHAPE_TOLERANCE for f in findings)
        enlarged = sum(f.width < self.width or f.height < self.height for f in findings)
        return (
            f"{len(self)} samples, {len(self.all_captions())} captions, views of {len(sizes)} sizes ({shown}) brought to"
            f" {self.width}x{self.height}: {cropped} cropped, {enlarged} enlarged. {len(self.source.left_out)} other"
            " files left out"
        )


def load_datasets(
    options: Options, accelerator: Accelerator, pairs: bool = False, source: Source | None = None
) -> tuple[TriptychDataset, TriptychDataset | None]:
    """
    The data to train on, and the held-out data if there is any. Every process has to call it.

    Which samples `--validation_fraction` holds out follows from the pixels of their visible views alone. So new rows and
    other file names move none across, and equal pictures never stand on both sides.

    Args:
        pairs (`bool`): Whether samples without a semantic view are accepted.
        source (`Source`, *optional*): Samples instead of those that the options name.
    """
    if source is None:
        # The first process prepares tables for all.
        with accelerator.main_process_first():
            source = load_source(options, pairs, options.cache_dir)
    memory_file, processes = (
        Path(options.cache_root, "checked.json"),
        (accelerator.process_index, accelerator.num_processes),
    )
    shape = options.width / options.resolution
    findings = check_samples(source, shape, pairs, memory_file, *processes)
    held_out, held_out_contents = None, set()
    if options.validation_data_dir is not None:
        other = list_folder(Path(options.validation_data_dir), options, pairs)
        held_out = TriptychDataset(other, options, check_samples(other, shape, pairs, memory_file, *processes))
        held_out_contents = {finding.content for finding in held_out.findings}
    elif options.validation_fraction:
        limit = options.validation_fraction * 16**16
        chosen = [index for index, finding in enumerate(findings) if int(finding.content[:16], 16) < limit]
        if not chosen:
            raise ValueError(
                f"--validation_fraction {options.validation_fraction} holds out none of {len(source)} samples."
            )
        held_out = TriptychDataset(source, options, findings, chosen)
        held_out_contents = {findings[index].content for index in chosen}
    train = [index for index, finding in enumerate(findings) if finding.content not in held_out_contents]
    if not train:
        raise ValueError("All samples are held out, so none is left to train on.")
    dataset = TriptychDataset(source, options, findings, train[: options.max_train_samples])
    logger.info(f"Data: {dataset.summary()}")
    if held_out is not None:
        logger.info(f"Held out: {held_out.summary()}")
    if source.left_out and accelerator.is_main_process:
        path = Path(options.output_dir, "left_out.txt")
        path.write_text("\n".join(source.left_out) + "\n", encoding="utf-8")
        logger.info(f"{path} lists the files that were left out")
    return dataset, held_out
