# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Triptychs: where rows come from, how a row becomes three views and a caption, and in which order samples are drawn.

A sample's row and random choices are functions of the seed and of the sample's position in the run. So resuming, and any
number of processes, repeats exactly the same samples, which no sampler of PyTorch or accelerate promises.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps
import torch
from tqdm.auto import tqdm

from pipeline_flux_fill_semantic import read_picture
from semantic_fill.options import DataOptions


if TYPE_CHECKING:
    import datasets

PANELS = ("visible", "target", "semantic")
Prepared = TypeVar("Prepared")


# -- Rows -------------------------------------------------------------------------------------------------------------


def load_rows(options: DataOptions, split: str = "train", cache_dir: str | None = None) -> "datasets.Dataset":
    """
    The rows of a split, with their pictures still undecoded.

    Raises:
        `ValueError`: if the source cannot be read, has no rows, or a column is missing or holds no pictures.
    """
    # The import is slow, and rows may come from elsewhere.
    import datasets

    datasets.utils.logging.set_verbosity_error()
    kwargs: dict[str, Any] = {"split": split, "cache_dir": cache_dir}
    name = options.dataset_name or ""
    if options.train_data_dir is not None:
        source, builder = f"--train_data_dir {options.train_data_dir}", "imagefolder"
        kwargs["data_dir"] = options.train_data_dir
        expected = "has to be a folder of pictures with a `metadata.jsonl`"
    elif os.path.isdir(name):
        source, expected = f"--dataset_name {name}", "has to hold *.parquet, *.tar (webdataset) or metadata.jsonl"
        for builder, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar"), ("imagefolder", "metadata.jsonl")):
            files = sorted(str(path) for path in Path(name).rglob(pattern))
            if files:
                break
        else:
            raise ValueError(f"{source} {expected} files but holds none.")
        kwargs |= {"data_dir": name} if builder == "imagefolder" else {"data_files": {"train": files}}
    else:
        source, expected = f"--dataset_name {name}", "has to be a data set that can be loaded"
        builder, kwargs["name"] = name, options.dataset_config_name
    try:
        rows = datasets.load_dataset(builder, **kwargs)
    # A missing folder, a broken metadata file and a missing picture each have an error of their own.
    except Exception as error:
        raise ValueError(f"{source} {expected}, but: {error.__cause__ or error}") from error
    if options.max_train_samples is not None:
        rows = rows.select(range(min(options.max_train_samples, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{source} has no rows.")
    for column in filter(None, (*picture_columns(options), options.caption_column)):
        if column not in rows.column_names:
            raise ValueError(f"Column `{column}` is not in the data set, which has {rows.column_names}.")
    for column in picture_columns(options):
        try:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        # Arrow raises errors of many kinds.
        except Exception as error:
            raise ValueError(
                f"Column `{column}` has to hold pictures but holds {rows.features[column]}: {error}"
            ) from error
    return rows


def picture_columns(options: DataOptions) -> list[str]:
    """The columns of the three views, or the one column of whole triptychs."""
    if options.visible_column and options.target_column and options.semantic_column:
        return [options.visible_column, options.target_column, options.semantic_column]
    return [options.image_column]


def cut_triptych(pictures: Sequence[PIL.Image.Image]) -> dict[str, PIL.Image.Image]:
    """
    The views by their names in `PANELS`, all of one size, from one triptych or from three pictures.

    Raises:
        `ValueError`: with a reason that reads after the name of the sample.
    """
    if len(pictures) == 1:
        (triptych,) = pictures
        width, remainder = divmod(triptych.width, 3)
        if remainder or width == 0:
            raise ValueError(f"is {triptych.width} pixels wide, which cannot be divided into three equal panels")
        pictures = [triptych.crop((i * width, 0, (i + 1) * width, triptych.height)) for i in range(3)]
    if len({picture.size for picture in pictures}) > 1:
        sizes = ", ".join(f"{name} {picture.width}x{picture.height}" for name, picture in zip(PANELS, pictures))
        raise ValueError(f"has views of different sizes ({sizes})")
    return dict(zip(PANELS, pictures, strict=True))


def read_triptychs(folder: Path) -> list[dict[str, PIL.Image.Image]]:
    """The views of each triptych that the `metadata.jsonl` of a folder lists, for those who need neither size nor text."""
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    names = [json.loads(line)["file_name"] for line in lines if line.strip()]
    return [cut_triptych([read_picture(folder / name)]) for name in names]


def read_palette(path: str | Path) -> dict[str, tuple[int, int, int]]:
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


class TriptychDataset(torch.utils.data.Dataset):
    """
    Rows as views `(3, height, width)` in [0, 1] and a caption. A row is decoded each time it is asked for.

    Args:
        rows (`datasets.Dataset` or a list of dictionaries):
            Rows with undecoded pictures, `{"bytes": ..., "path": ...}`, as `load_rows` gives them.
        options (`DataOptions`):
            Columns, captions and size.

    Raises:
        `ValueError`: if rows cannot be used. All of them are read once, so that this stops a run before a model is
            loaded.
    """

    def __init__(self, rows: "datasets.Dataset | list[dict]", options: DataOptions):
        self.rows, self.columns = rows, picture_columns(options)
        self.height, self.width = options.resolution, options.width or options.resolution
        self.instance_prompt = options.instance_prompt
        self.caption_column = options.caption_column or ("text" if "text" in rows[0] else None)
        if self.caption_column is None and self.instance_prompt is None:
            raise ValueError(f"Pass --caption_column (one of {list(rows[0])}) or --instance_prompt.")
        self.check()

    def __len__(self) -> int:
        return len(self.rows)

    def picture_bytes(self, index: int) -> list[bytes]:
        """The encoded pictures of a row, one or three."""
        row = self.rows[index]
        cells = [row[column] for column in self.columns]
        if None in cells:
            raise ValueError("has no picture")
        return [Path(c["path"]).read_bytes() if c.get("bytes") is None else c["bytes"] for c in cells]

    def caption(self, index: int) -> str:
        caption = self.rows[index][self.caption_column] if self.caption_column else None
        caption = self.instance_prompt if caption is None else caption
        if not isinstance(caption, str) or not (caption.strip() or self.instance_prompt == ""):
            raise ValueError(f"has no caption in `{self.caption_column}` (found {caption!r})")
        return caption

    def views(self, index: int, flip: bool = False) -> dict[str, torch.Tensor]:
        views = {}
        for name, picture in self._pictures(index).items():
            if picture.size != (self.width, self.height):
                # The colors of a semantic map are labels, which must not be blended.
                resample = PIL.Image.Resampling.NEAREST if name == "semantic" else PIL.Image.Resampling.LANCZOS
                picture = picture.resize((self.width, self.height), resample)
            picture = PIL.ImageOps.mirror(picture) if flip else picture
            views[name] = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return views

    def _pictures(self, index: int) -> dict[str, PIL.Image.Image]:
        return cut_triptych([read_picture(data) for data in self.picture_bytes(index)])

    def check(self) -> None:
        problems = []
        for index in tqdm(range(len(self)), desc="Checking rows", disable=None, leave=False):
            try:
                self._pictures(index)
                self.caption(index)
            # Pillow raises whatever its decoders raise: OSError, SyntaxError, struct.error and others.
            except Exception as error:
                problems.append(f"row {index}: {type(error).__name__}: {error}")
        if problems:
            listed = "\n  ".join(problems[:50])
            more = f"\n  ... and {len(problems) - 50} more" if len(problems) > 50 else ""
            raise ValueError(f"{len(problems)} of {len(self)} rows cannot be used:\n  {listed}{more}")


# -- Order ------------------------------------------------------------------------------------------------------------


def seed_of(*parts) -> int:
    """A 63-bit seed made of its parts, independent for every different tuple of them."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class SampleSpec:
    """What is decided at random for one sample before it is read. `position` counts the samples of the whole run."""

    position: int
    index: int
    flip: bool
    drop_caption: bool
    drop_map: bool


class ResumableBatchSampler(torch.utils.data.Sampler):
    """
    Endless micro-batches of `SampleSpec` for one process.

    Args:
        num_rows, batch_size, seed (`int`):
            Rows of the data, samples in a micro-batch, and the seed of all draws.
        flip, drop_caption, drop_map (`float`):
            Probabilities in [0, 1].
        process_index, num_processes (`int`):
            This process among those that share the run.
        start (`int`):
            Samples that the run has used before.
        accumulation_steps (`int`):
            Micro-batches in an optimizer step.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int = 0,
        flip: float = 0.0,
        drop_caption: float = 0.0,
        drop_map: float = 0.0,
        process_index: int = 0,
        num_processes: int = 1,
        start: int = 0,
        accumulation_steps: int = 1,
    ):
        self.num_rows, self.batch_size, self.seed, self.start = num_rows, batch_size, seed, start
        self.flip, self.drop_caption, self.drop_map = flip, drop_caption, drop_map
        self.process_index, self.num_processes = process_index, num_processes
        self.samples_per_step = batch_size * accumulation_steps * num_processes
        self.epoch, self.permutation = None, []

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.num_rows)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", epoch))
            self.epoch, self.permutation = epoch, torch.randperm(self.num_rows, generator=generator).tolist()
        return self.permutation[place]

    def spec(self, position: int) -> SampleSpec:
        """The sample at a position of the run, whichever process takes it."""
        chance = random.Random(seed_of(self.seed, "read", position))
        flip, drop_caption, drop_map = chance.random(), chance.random(), chance.random()
        return SampleSpec(
            position=position,
            index=self._row(position),
            flip=flip < self.flip,
            drop_caption=drop_caption < self.drop_caption,
            drop_map=drop_map < self.drop_map,
        )

    def rows_before(self, position: int) -> list[int]:
        """The rows of the optimizer step that ends before a position of the run, of all processes."""
        return [self.spec(p).index for p in range(position - self.samples_per_step, position)]

    def __iter__(self) -> Iterator[list[SampleSpec]]:
        first = self.start + self.process_index * self.batch_size
        while True:
            yield [self.spec(position) for position in range(first, first + self.batch_size)]
            first += self.num_processes * self.batch_size


def prefetch(
    prepare: Callable[[list[dict]], Prepared], samples: Iterator[list[dict]], device: torch.device
) -> Generator[Prepared]:
    """
    The results of `prepare` for endless samples. On a GPU a thread prepares the next result while the current one is
    used, on a stream of its own: copies from the host would otherwise wait for everything that the main stream still
    computes. The results have their tensors in `vars`.
    """
    if device.type != "cuda":
        yield from map(prepare, samples)
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def prepare_next() -> tuple[Prepared, Any]:
        with torch.cuda.stream(stream):
            return prepare(next(samples)), stream.record_event()

    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(prepare_next)
        while True:
            (result, ready), following = following.result(), pool.submit(prepare_next)
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            for tensor in filter(torch.is_tensor, vars(result).values()):
                tensor.record_stream(current)
            yield result
