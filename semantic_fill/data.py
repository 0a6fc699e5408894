# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Triptychs: how a sample becomes views of one size and a caption, and which samples a run trains on and holds out."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from pipeline_flux_fill_semantic import LABEL_LIMIT, read_picture
from semantic_attention import SINGLE_MAP
from semantic_fill.checks import READER_VERSION, Finding, check_samples, refuse
from semantic_fill.files import printable
from semantic_fill.options import DataOptions, Options
from semantic_fill.sources import Source, list_folder
from semantic_fill.tables import TableSource, load_held_out, load_source
from semantic_fill.views import (
    Palette,
    are_labels,
    bucket_sizes,
    color_labels,
    cut_triptych,
    read_palette,
)


logger = get_logger(__name__)


def choose_label_colors(
    source: Source,
    findings: list[Finding],
    palette: Palette | None,
    others: Sequence[Finding] = (),
    name: str = SINGLE_MAP[0],
) -> Palette | None:
    """
    The colors of the labels in all semantic maps of a name, or `None` for maps that hold colors themselves.

    Raises:
        `ValueError`: if the maps hold label numbers that have no colors. The message names up to 50 of the samples.
    """
    found = [finding.map_labels[name] for finding in (*findings, *others) if name in finding.map_labels]
    what = "" if source.maps == SINGLE_MAP else f" of `{name}`"
    if palette is None:
        # Maps that are all black hold nothing that colors would tell.
        if are_labels(found) and any(labels != [0] for labels in found):
            raise ValueError(
                f"All semantic maps{what} have one channel and values below {LABEL_LIMIT}: they hold label numbers, which are"
                " nearly black as colors. Pass their colors with --palette."
            )
        return None
    # A palette of numbers says that gray values are labels, also 255, which often marks places without a label.
    if not found or None in found or not (are_labels(found) or any(name.isdecimal() for name in palette)):
        return None
    problems = []
    for index, finding in enumerate(findings):
        missing = [str(label) for label in finding.map_labels.get(name) or () if str(label) not in palette]
        if missing:
            problems.append(f"{source.name(index)}: {', '.join(missing)}")
    refuse(problems, "samples have labels without a color in --palette")
    return palette


def read_triptychs(
    folder: Path, palette: Palette | None = None, option: str = "--train_data_dir", semantic_panels: str | None = None
) -> list[dict]:
    """
    The views of all samples of a folder, in a form of --train_data_dir, for those who need neither size nor text. Maps of
    label numbers take the colors of the palette, and messages call the folder by the option.

    Raises:
        `ValueError`: if samples cannot be used, or maps hold label numbers that have no colors.
    """
    options = DataOptions(train_data_dir=str(folder), instance_prompt="", semantic_panels=semantic_panels)
    source = list_folder(folder, options, option=option)
    findings, samples = check_samples(source, None, pairs=False), []
    palettes = {name: choose_label_colors(source, findings, palette, name=name) for name in source.maps}
    for index, finding in enumerate(findings):
        samples.append(cut_sample(source, index, finding.panels))
        for name in palettes.keys() & samples[-1].keys():
            if (colors := palettes[name]) is not None:
                samples[-1][name] = color_labels(np.asarray(samples[-1][name])[..., 0], colors)
    return samples


def cut_sample(source: Source, index: int, panels: int) -> dict[str, PIL.Image.Image]:
    """The views of a sample by their names, as they are stored."""
    pictures = [None if data is None else read_picture(data) for data in source.pictures(index)]
    return cut_triptych(pictures, panels, source.maps)


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
        others (`Sequence[Finding]`):
            Findings about other data of the run. All maps of a run together tell whether they hold label numbers.

    Raises:
        `ValueError`: if the semantic maps hold label numbers that have no colors.
    """

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        findings: list[Finding],
        indices: list[int] | None = None,
        others: Sequence[Finding] = (),
    ):
        self.source, self.findings = source, findings
        self.indices = list(range(len(source))) if indices is None else indices
        self.sizes = (
            bucket_sizes(options.resolution, options.width)
            if options.aspect_buckets
            else [(options.resolution, options.width)]
        )
        self._groups, self._map_hashes = self.groups(), {}
        palette, self.maps = None if options.palette is None else read_palette(options.palette), source.maps
        self.palettes = {name: choose_label_colors(source, findings, palette, others, name) for name in self.maps}

    def __len__(self) -> int:
        return len(self.indices)

    def captions(self, index: int) -> list[str]:
        """All captions of a sample, one of which is drawn for each visit."""
        return self.source.captions(self.indices[index])

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
        palettes = [palette and tuple(sorted(palette.items())) for palette in self.palettes.values()]
        return (*self.findings[self.indices[index]].digests, READER_VERSION, *palettes)

    def fingerprint(self) -> str:
        """A hash of all samples in their order: stored pictures, how they are read, and captions."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(repr((self.digests(index), self.size(index), self.captions(index))).encode())
        return digest.hexdigest()

    def has_map(self, index: int, name: str) -> bool:
        """Whether a sample has a map."""
        return name in self.findings[self.indices[index]].map_labels

    def map_hash(self, index: int, name: str) -> bytes | None:
        """A hash of the pixels of a sample's map, which is read once. `None` where it is missing."""
        if index not in self._map_hashes:
            views = self.views(index)
            pixels = {name: views[name].numpy().tobytes() for name in self.maps if name in views}
            self._map_hashes[index] = {name: hashlib.sha256(data).digest() for name, data in pixels.items()}
        return self._map_hashes[index].get(name)

    def views(self, index: int, flip: bool = False) -> dict[str, torch.Tensor]:
        """The views by their names: `visible`, `target` and the maps that the sample has. Pairs have none."""
        (height, width), index = self.size(index), self.indices[index]
        views = {}
        for name, picture in cut_sample(self.source, index, self.findings[index].panels).items():
            palette = self.palettes.get(name)
            if palette is not None:
                picture = color_labels(np.asarray(picture)[..., 0], palette)
            # The colors of a semantic map are labels, which must not be blended.
            resample = PIL.Image.Resampling.NEAREST if name in self.maps else PIL.Image.Resampling.LANCZOS
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
        shapes = [(finding, self.sizes[group]) for finding, group in zip(findings, self._groups)]
        kept = [min(f.width * h / f.height / w, f.height * w / f.width / h) for f, (h, w) in shapes]
        cropped = sum(f.width * h != f.height * w for f, (h, w) in shapes)
        loss = f" (by up to {1 - min(kept):.1%})" if cropped else ""
        enlarged = sum(f.width < w or f.height < h for f, (h, w) in shapes)
        used = Counter(f"{w}x{h}" for _, (h, w) in shapes)
        target = ", ".join(used) if len(used) < 4 else f"{len(used)} shapes"
        colored = ", maps colored by --palette" if any(self.palettes.values()) else ""
        pairs = sum(finding.panels == 2 for finding in findings)
        lacking = [f"{pairs} without a map"] if pairs else []
        for name in self.maps if len(self.maps) > 1 else ():
            missing = sum(name not in finding.map_labels for finding in findings)
            lacking += [f"{missing} without `{name}`"] if missing and not pairs else []
        lacking = ", ".join(lacking)
        prompted = sum(not self.source.own_captions(index) for index in self.indices)
        return (
            f"{len(self)} samples{f' ({lacking})' if lacking else ''}, {len(self.all_captions())} captions"
            f"{f' ({prompted} samples have --instance_prompt)' if prompted else ''}, views of {len(sizes)} sizes ({shown})"
            f" brought to {target}: {cropped} cropped{loss}, {enlarged} enlarged{colored}."
            f" {len(self.source.left_out)} other files left out"
        )


def load_datasets(
    options: Options, accelerator: Accelerator, pairs: bool = False, source: Source | None = None
) -> tuple[TriptychDataset, TriptychDataset | None]:
    """
    The data to train on, and the held-out data if there is any. Every process has to call it.

    Which samples `--validation_fraction` holds out follows from the pixels of their visible views alone. So new rows and
    other file names move none across. Samples with a held-out visible or target view are not trained on, so equal pictures
    never stand on both sides.

    Args:
        pairs (`bool`): Whether samples without a semantic view are accepted.
        source (`Source`, *optional*): Samples instead of those that the options name.
    """
    if source is None:
        source = _load(accelerator, lambda: load_source(options, pairs, options.cache_dir))
    if options.max_train_samples and not options.validation_data_dir and not options.validation_fraction:
        source = source.head(options.max_train_samples)
    shape, memory_file = options.width / options.resolution, Path(options.cache_root, "checked.json")
    process = (accelerator.process_index, accelerator.num_processes)
    how = (None if options.aspect_buckets else shape, pairs, memory_file, *process)
    findings = check_samples(source, *how)
    held_out, chosen, shown = None, set(), []
    if options.validation_data_dir is not None:
        other = _load(accelerator, lambda: load_held_out(options, pairs))
        shown = check_samples(other, *how)
        held_out = TriptychDataset(other, options, shown, others=findings)
    elif options.validation_fraction:
        limit = options.validation_fraction * 16**16
        chosen = {index for index, finding in enumerate(findings) if int(finding.visible[:16], 16) < limit}
        if not chosen:
            raise ValueError(
                f"--validation_fraction {options.validation_fraction} holds out none of {len(source)} samples. Pass a larger share."
            )
        shown = [findings[index] for index in sorted(chosen)]
        held_out = TriptychDataset(source, options, findings, sorted(chosen))
    pictures = {picture for finding in shown for picture in (finding.visible, finding.target) if picture}
    train = [index for index, f in enumerate(findings) if f.visible not in pictures and f.target not in pictures]
    if not train:
        raise ValueError("All samples are held out, or show a view of one that is, so none is left to train on.")
    others = held_out.findings if held_out is not None else []
    dataset = TriptychDataset(source, options, findings, train[: options.max_train_samples], others)
    logger.info(f"Data: {dataset.summary()}")
    if held_out is not None:
        logger.info(f"Held out: {held_out.summary()}")
    twins = [source.name(index) for index in sorted(set(range(len(source))) - chosen - set(train))]
    if twins:
        logger.warning(
            f"{len(twins)} samples are not trained on, because the held-out data shows the same visible or target view:"
            f" {', '.join(map(printable, twins[:50]))}"
        )
    if options.palette is not None and not any(dataset.palettes.values()) and not pairs:
        logger.warning(f"--palette {options.palette} is not used, because the maps hold colors and no label numbers")
    if accelerator.is_main_process:
        _write_left_out(Path(options.output_dir, "left_out.txt"), [dataset, *([held_out] if held_out else [])])
    return dataset, held_out


def _load(accelerator: Accelerator, load: Callable[[], Source]) -> Source:
    """A source for all processes: folders are listed by one of them, tables are opened by the others once it is done."""
    own: Any = None
    if accelerator.is_main_process:
        try:
            own = load()
        except (ValueError, OSError) as error:
            own = error
    (shared,) = broadcast_object_list([None if isinstance(own, TableSource) else own])
    if isinstance(shared, Exception):
        raise shared
    return own or shared or load()


def _write_left_out(path: Path, datasets: list[TriptychDataset]) -> None:
    names = dict.fromkeys(name for dataset in datasets for name in dataset.source.left_out)
    try:
        path.unlink(missing_ok=True)
        if names:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(map(printable, names)) + "\n", encoding="utf-8")
            logger.info(f"{path} lists the {len(names)} files that were left out")
    # The list is no part of the run.
    except OSError as error:
        logger.warning(f"{path} cannot be written: {error}")
