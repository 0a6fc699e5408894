# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Triptychs: how a sample becomes views of one size and a caption, and the check of all samples before a run.

The check decodes every picture once, in threads, and is shared among the processes of a run. It remembers what it found
while the files stay unchanged, so that a second start over a large data set takes seconds.
"""

import hashlib
import math
import os
from collections import Counter
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
from semantic_fill.views import (
    LABEL_LIMIT,
    SHAPE_TOLERANCE,
    Palette,
    are_labels,
    bucket_sizes,
    color_labels,
    count_panels,
    cut_triptych,
    find_labels,
    read_palette,
)


logger = get_logger(__name__)

# Findings and encodings of pictures that were read by other rules are made anew.
READER_VERSION = "3"


# -- The check --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What the check found out about a sample: size of a view, number of views, labels, and hashes."""

    width: int
    height: int
    panels: int
    # The different values of a semantic view that may hold label numbers, see `find_labels`.
    labels: list[int] | None
    # SHA-256 of each picture as it is stored.
    digests: tuple[str, ...]
    # SHA-256 of the visible view's pixels.
    content: str


def inspect(pictures: list[bytes], shape: float | None, pairs: bool) -> Finding:
    """
    Decodes a sample.

    Raises:
        `ValueError`: with a reason that reads after the name of the sample.
    """
    decoded = [read_picture(data) for data in pictures]
    panels = count_panels(decoded[0].size, shape, pairs) if len(decoded) == 1 else len(decoded)
    views = cut_triptych(decoded, panels)
    labels = find_labels(views["semantic"]) if "semantic" in views and not pairs else None
    visible = views["visible"]
    content = hashlib.sha256(repr(visible.size).encode() + visible.tobytes()).hexdigest()
    digests = tuple(hashlib.sha256(data).hexdigest() for data in pictures)
    return Finding(*visible.size, panels, labels, digests, content)


def check_samples(
    source: Source,
    shape: float | None,
    pairs: bool,
    memory_file: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
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
    memory = FileMemory(memory_file, f"{READER_VERSION} {shape} {pairs}")
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


def choose_label_colors(source: Source, findings: list[Finding], palette: Palette | None) -> Palette | None:
    """
    The colors of the labels in all semantic maps, or `None` for maps that hold colors themselves.

    Raises:
        `ValueError`: if the maps hold label numbers that have no colors. The message names up to 50 of the samples.
    """
    found = [finding.labels for finding in findings]
    if palette is None:
        if are_labels(found):
            raise ValueError(
                f"All semantic maps have one channel and values below {LABEL_LIMIT}: they hold label numbers, which are"
                " nearly black as colors. Pass their colors with --palette."
            )
        return None
    # A palette of numbers says that gray values are labels, also 255, which often marks places without a label.
    if not found or None in found or not (are_labels(found) or any(name.isdecimal() for name in palette)):
        return None
    problems = []
    for index, labels in enumerate(found):
        missing = [str(label) for label in labels or () if str(label) not in palette]
        if missing:
            problems.append(f"{source.name(index)}: {', '.join(missing)}")
    if problems:
        more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
        listed = "\n  ".join(problems[:50])
        raise ValueError(f"{len(problems)} samples have labels without a color in --palette:\n  {listed}{more}")
    return palette


def read_triptychs(folder: Path, palette: Palette | None = None) -> list[dict[str, PIL.Image.Image]]:
    """
    The views of all samples of a folder, in a form of --train_data_dir, for those who need neither size nor text.

    Raises:
        `ValueError`: if samples cannot be used, or maps hold label numbers that have no colors.
    """
    source = list_folder(folder, DataOptions(train_data_dir=str(folder), instance_prompt=""))
    findings = check_samples(source, None, pairs=False)
    palette = choose_label_colors(source, findings, palette)
    samples = [cut_triptych([read_picture(data) for data in source.pictures(i)]) for i in range(len(source))]
    for views in samples:
        if palette is not None:
            views["semantic"] = color_labels(np.asarray(views["semantic"])[..., 0], palette)
    return samples


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
        self.sizes = (
            bucket_sizes(options.resolution, options.width)
            if options.aspect_buckets
            else [(options.resolution, options.width)]
        )
        self.instance_prompt = options.instance_prompt
        self._groups = self.groups()
        palette = None if options.palette is None else read_palette(options.palette)
        self.palette = choose_label_colors(source, findings, palette)
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

    def groups(self) -> list[int]:
        """For each sample, which of `sizes` it is brought to."""
        shapes = [math.log(width / height) for height, width in self.sizes]
        findings = [self.findings[index] for index in self.indices]
        ratios = [math.log(finding.width / finding.height) for finding in findings]
        return [min(range(len(shapes)), key=lambda i: abs(shapes[i] - ratio)) for ratio in ratios]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width that a sample's views are brought to."""
        return self.sizes[self._groups[index]]

    def all_captions(self) -> set[str]:
        return {caption for index in range(len(self)) for caption in self.captions(index)}

    def digests(self, index: int) -> tuple:
        """What the views depend on: the stored pictures, and how they are read."""
        palette = None if self.palette is None else tuple(sorted(self.palette.items()))
        return (*self.findings[self.indices[index]].digests, READER_VERSION, palette)

    def views(self, index: int, flip: bool = False) -> dict[str, torch.Tensor]:
        """The views by their names in `PANELS`. The semantic one is missing from pairs."""
        (height, width), index = self.size(index), self.indices[index]
        pictures = [read_picture(data) for data in self.source.pictures(index)]
        views = {}
        for name, picture in cut_triptych(pictures, self.findings[index].panels).items():
            if name == "semantic" and self.palette is not None:
                picture = color_labels(np.asarray(picture)[..., 0], self.palette)
            # The colors of a semantic map are labels, which must not be blended.
            resample = PIL.Image.Resampling.NEAREST if name == "semantic" else PIL.Image.Resampling.LANCZOS
            if picture.size != (width, height):
                picture = PIL.ImageOps.fit(picture, (width, height), resample)
            picture = PIL.ImageOps.mirror(picture) if flip else picture
            views[name] = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return views

    def summary(self) -> str:
        """One line about the data: samples, captions, sizes, and what was done to them."""
        findings = [self.findings[index] for index in self.indices]
        sizes = Counter((finding.width, finding.height) for finding in findings)
        shown = ", ".join(f"{count} of {width}x{height}" for (width, height), count in sizes.most_common(4))
        pairs = [(finding, self.sizes[group]) for finding, group in zip(findings, self._groups)]
        cropped = sum(abs(math.log(f.width * h / f.height / w)) > SHAPE_TOLERANCE for f, (h, w) in pairs)
        enlarged = sum(f.width < w or f.height < h for f, (h, w) in pairs)
        used = Counter(f"{w}x{h}" for _, (h, w) in pairs)
        target = ", ".join(used) if len(used) < 4 else f"{len(used)} shapes"
        colored = "" if self.palette is None else ", maps colored by --palette"
        return (
            f"{len(self)} samples, {len(self.all_captions())} captions, views of {len(sizes)} sizes ({shown}) brought to"
            f" {target}: {cropped} cropped, {enlarged} enlarged{colored}. {len(self.source.left_out)} other"
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
    shape = None if options.aspect_buckets else options.width / options.resolution
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
