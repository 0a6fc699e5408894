# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The check of all samples before a run: what is wrong with them, and what later steps need to know about each.

It decodes every picture once, in threads, and is shared among the processes of a run. It remembers what it found while
the files stay unchanged, so that a second start over a large data set takes seconds, and one that was interrupted goes on.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import PIL.Image
from accelerate.utils import gather_object, get_cpu_distributed_information
from tqdm.auto import tqdm

from pipeline_flux_fill_semantic import read_picture
from semantic_fill.files import FileMemory, printable
from semantic_fill.sources import Source
from semantic_fill.views import count_panels, cut_triptych, find_labels


# Findings and encodings of pictures that were read by other rules are made anew.
READER_VERSION = "3"
# Processes tell each other what they found after so many samples, and one of them saves it if the last time is long ago.
SAMPLES_BETWEEN_SAVES, SECONDS_BETWEEN_SAVES = 1024, 60


@dataclass(frozen=True)
class Finding:
    """What the check found out about a sample: size of a view, number of views, labels, and hashes."""

    width: int
    height: int
    panels: int
    # For each map that the sample has, the different values if it may hold label numbers, see `find_labels`.
    map_labels: dict[str, list[int] | None]
    # SHA-256 of each picture as it is stored, and nothing for a map that is missing.
    digests: tuple[str, ...]
    # SHA-256 of the visible view's pixels.
    visible: str
    # SHA-256 of the target view's pixels, or nothing for a view of one color, which many scenes may share.
    target: str

    def has_shape(self, shape: float | None, pairs: bool, maps: Sequence[str]) -> bool:
        """Whether a sample would be cut into the same views for other arguments of `inspect`, which are checked alike."""
        canvas = (self.width * self.panels, self.height)
        return len(self.digests) > 1 or count_panels(canvas, shape, pairs, 2 + len(maps)) == self.panels


def inspect(pictures: Sequence[bytes | None], shape: float | None, pairs: bool, maps: Sequence[str]) -> Finding:
    """
    Decodes a sample.

    Raises:
        `ValueError`: with a reason that reads after the name of the sample.
    """
    decoded: list[Any] = [None if data is None else read_picture(data) for data in pictures]
    panels = count_panels(decoded[0].size, shape, pairs, 2 + len(maps)) if len(decoded) == 1 else len(decoded)
    views = cut_triptych(decoded, panels, maps)
    target = views["target"]
    extrema: Any = target.getextrema()
    return Finding(
        *target.size,
        panels,
        map_labels={name: find_labels(views[name]) for name in maps if name in views},
        digests=tuple("" if data is None else hashlib.sha256(data).hexdigest() for data in pictures),
        visible=_pixel_hash(views["visible"]),
        target="" if all(low == high for low, high in extrema) else _pixel_hash(target),
    )


def _pixel_hash(view: PIL.Image.Image) -> str:
    return hashlib.sha256(repr(view.size).encode() + view.tobytes()).hexdigest()


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
    maps = source.maps
    memory = FileMemory(memory_file, f"{READER_VERSION} {[field.name for field in fields(Finding)]} {maps}")

    def check(index: int, known: dict | None) -> Finding | str:
        problems, finding = [], None
        try:
            finding = Finding(**known) if known else None
            if finding is None or not finding.has_shape(shape, pairs, maps):
                finding = inspect(source.pictures(index), shape, pairs, maps)
        # Reading files and decoding them raises errors of many kinds.
        except Exception as error:
            problems.append(str(error))
        try:
            source.captions(index)
        except ValueError as error:
            problems.append(str(error))
        return finding if finding and not problems else f"{source.name(index)}: {'; '.join(problems)}"

    findings: list[Any] = [None] * len(source)
    bar = tqdm(
        total=len(range(rank, len(source), world_size)), desc="Checking samples", disable=rank > 0 or None, leave=False
    )
    # Processes on one machine share its cores.
    threads = max(1, (os.cpu_count() or 1) // get_cpu_distributed_information().local_world_size)
    try:
        with ThreadPoolExecutor(threads) as pool, bar:
            for first in range(0, len(source), SAMPLES_BETWEEN_SAVES):
                last = min(first + SAMPLES_BETWEEN_SAVES, len(source))
                found, unread = [], []
                for index in range(first + rank, last, world_size):
                    # Stamps are taken first, so that a file that changes while it is read is read again by the next run.
                    stamp = source.stamp(index)
                    known = memory.get(source.key(index), stamp)
                    if known is None:
                        unread.append((index, stamp))
                    else:
                        # Handing a known sample to a thread takes longer than its check.
                        found.append((index, stamp, check(index, known)))
                bar.update(len(found))
                for (index, stamp), finding in zip(unread, pool.map(lambda item: check(item[0], None), unread)):
                    found.append((index, stamp, finding))
                    bar.update()
                for index, stamp, finding in gather_object(found) if world_size > 1 else found:
                    findings[index] = finding
                    if isinstance(finding, Finding):
                        memory.put(source.key(index), stamp, vars(finding))
                if rank == 0:
                    memory.save(SECONDS_BETWEEN_SAVES)
    finally:
        if rank == 0:
            memory.save()
    refuse(
        [*source.problems, *(finding for finding in findings if isinstance(finding, str))], "samples cannot be used"
    )
    # Pairs have no map whose labels would matter.
    return [replace(finding, map_labels={}) for finding in findings] if pairs else findings


def refuse(problems: list[str], what: str) -> None:
    """Raises a `ValueError` that names up to 50 problems, if there are any."""
    if problems:
        more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
        listed = "\n  ".join(map(printable, problems[:50]))
        raise ValueError(f"{len(problems)} {what}:\n  {listed}{more}")
