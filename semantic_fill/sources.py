# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Samples in folders of pictures: triptychs, or three folders of views, with captions beside them.

Folders are listed here and not by `datasets`, which infers splits from words in file names, reads names as glob patterns
and drops what it does not understand. Here every picture of a folder is used or named, in the order of its path.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from semantic_fill.options import DataOptions
from semantic_fill.views import PANELS


# Formats that Pillow reads by itself. PostScript and others, which start another program, are left out.
PICTURE_ENDINGS = frozenset(
    ".avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .ppm .tga .tif .tiff .webp".split()
)
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
# Files that people keep beside pictures. They are no part of the data and not worth a word.
IGNORED_NAMES = frozenset(("Thumbs.db", "desktop.ini", ".DS_Store", "README.md", ".gitattributes"))


class Source:
    """Samples before they are decoded. `problems` names what cannot be used, `left_out` files that are no pictures."""

    problems: list[str]
    left_out: list[str]

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What messages call a sample."""
        raise NotImplementedError

    def captions(self, index: int) -> Sequence[Any]:
        """The captions of a sample, none if it has none of its own."""
        raise NotImplementedError

    def files(self, index: int) -> list[Path] | None:
        """The pictures as files, one triptych or a picture for each view; `None` if they are no files."""
        return None

    def pictures(self, index: int) -> list[bytes]:
        """The encoded pictures of a sample."""
        return [path.read_bytes() for path in self.files(index) or ()]


# -- Folders of pictures ----------------------------------------------------------------------------------------------


@dataclass
class FolderSource(Source):
    """Samples whose pictures are files."""

    samples: list[tuple[str, list[Path], Sequence[Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def captions(self, index: int) -> Sequence[Any]:
        return self.samples[index][2]

    def files(self, index: int) -> list[Path]:
        return self.samples[index][1]


def walk(folder: Path) -> Iterator[Path]:
    """All files below a folder in the order of their paths. Linked folders are followed, each of them once."""
    seen = set()
    for place, names, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (Path(place, name) for name in files)


def read_text(path: Path) -> str:
    """
    The content of a text file, with or without a byte order mark.

    Raises:
        `ValueError`: if it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise ValueError(f"{path} is not encoded as UTF-8: {error}") from error


def read_captions(path: Path, lines: bool) -> list[str]:
    """The captions of a text file beside a picture: its whole text, or with `lines` each line that is not empty."""
    text = read_text(path)
    return [line.strip() for line in text.splitlines() if line.strip()] if lines else [text.strip()]


def read_metadata(path: Path) -> list[dict]:
    """
    The rows of a metadata file.

    Raises:
        `ValueError`: if the file is damaged. The message names the line.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    text = read_text(path)
    if path.suffix == ".csv":
        # A cell that is empty is no value. Every word is one, `NA` and `null` too.
        return [{k: v or None for k, v in row.items()} for row in csv.DictReader(io.StringIO(text))]
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{path}, line {number}: has to be a JSON object")
    return rows


def list_folder(folder: Path, options: DataOptions, pairs: bool = False) -> FolderSource:
    """
    The samples of a folder: three folders of views with equal names, or triptychs.

    Args:
        pairs (`bool`): Whether a semantic view may be missing.

    Raises:
        `ValueError`: if there is no such folder, or it holds several splits or no pictures.
    """
    if not folder.is_dir():
        raise ValueError(f"--train_data_dir {folder} has to be a folder of pictures, but there is no such folder.")
    splits = [name for name in SPLITS if (folder / name).is_dir()]
    if "train" in splits and len(splits) > 1:
        paths = " or ".join(str(folder / name) for name in splits)
        raise ValueError(f"--train_data_dir {folder} holds several splits side by side. Pass one of them: {paths}.")
    views = [name for name in PANELS if (folder / name).is_dir()]
    if set(views) >= ({"visible", "target"} if pairs else set(PANELS)):
        source = _list_views(folder, views, options)
    else:
        source = _list_triptychs(folder, options)
    if not source.samples and not source.problems:
        raise ValueError(f"--train_data_dir {folder} has to hold pictures but holds none.")
    return source


def _sort_files(folder: Path, source: FolderSource) -> tuple[dict[str, Path], dict[str, Path], list[Path]]:
    """Pictures, text files and metadata files below a folder, the first two by their path inside it."""
    pictures, texts, metadata = {}, {}, []
    for path in walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.name in METADATA:
            metadata.append(path)
        elif path.suffix.lower() == ".txt":
            texts[name] = path
        elif path.suffix.lower() in PICTURE_ENDINGS and not path.name.startswith("."):
            pictures[name] = path
        elif path.name not in IGNORED_NAMES:
            source.left_out.append(name)
    return dict(sorted(pictures.items())), texts, sorted(metadata)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _sidecars(texts: dict[str, Path], stems: set[str], lines: bool, source: FolderSource) -> dict[str, list[str]]:
    """Captions by the stem of their picture. A text without a picture is a problem."""
    captions = {}
    for name, path in sorted(texts.items()):
        if _stem(name) not in stems:
            source.problems.append(f"{name}: is a caption without a picture")
            continue
        try:
            captions[_stem(name)] = read_captions(path, lines)
        except ValueError as error:
            source.problems.append(f"{name}: {error}")
    return captions


def _read_all_metadata(folder: Path, files: Iterable[Path]) -> list[tuple[Path, dict]]:
    """All metadata rows, each with the folder that its names are relative to."""
    return [(path.parent, row) for path in files for row in read_metadata(path)]


def as_captions(value: Any) -> Sequence[Any]:
    """The captions in a cell, which holds one, a list or nothing."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _list_triptychs(folder: Path, options: DataOptions) -> FolderSource:
    source = FolderSource()
    pictures, texts, metadata = _sort_files(folder, source)
    rows = _read_all_metadata(folder, metadata)
    caption_column = options.caption_column or "text"
    columns = [options.visible_column, options.target_column, options.semantic_column]
    named: dict[str, Sequence[Any]] = {}
    for place, row in rows:
        if all(columns):
            names: list[Any] = [row.get(f"{column}_file_name", row.get(column)) for column in columns]
        else:
            names = [row.get("file_name")]
        if not all(isinstance(name, str) for name in names):
            source.problems.append(f"{place.relative_to(folder)}: a metadata row names no picture: {str(row)[:200]}")
            continue
        paths = [Path(os.path.normpath(place / name)) for name in names]
        missing = [str(n) for n, p in zip(names, paths) if not p.is_file() or not p.is_relative_to(folder)]
        if missing:
            source.problems.append(f"{', '.join(missing)}: is named by the metadata but is no file in the folder")
            continue
        if options.caption_column and options.caption_column not in row:
            source.problems.append(
                f"{names[0]}: has no `{options.caption_column}` in the metadata, which has {list(row)}"
            )
        captions = as_captions(row.get(caption_column))
        if all(columns):
            source.samples.append((names[0], paths, captions))
            continue
        name = paths[0].relative_to(folder).as_posix()
        if name in named:
            source.problems.append(f"{name}: is named twice by the metadata")
        pictures.setdefault(name, paths[0])
        named[name] = captions
    if all(columns):
        if not rows:
            raise ValueError(f"--visible_column needs a metadata file in --train_data_dir {folder}, which has none.")
        return source
    sidecars = _sidecars(texts, {_stem(name) for name in pictures}, options.caption_lines, source)
    stems: dict[str, str] = {}
    for name, path in sorted(pictures.items()):
        if (twin := stems.setdefault(_stem(name), name)) != name and _stem(name) in sidecars:
            source.problems.append(f"{name}: differs from {twin} in its ending only, so their caption is ambiguous")
        captions = named.get(name) or sidecars.get(_stem(name), [])
        if rows and name not in named and not captions and options.instance_prompt is None:
            source.problems.append(f"{name}: is not named by the metadata and has no caption of its own")
            continue
        source.samples.append((name, [path], captions))
    return source


def _list_views(folder: Path, views: list[str], options: DataOptions) -> FolderSource:
    source = FolderSource()
    texts: dict[str, Path] = {}
    found: dict[str, dict[str, Path]] = {view: {} for view in views}
    metadata = [folder / name for name in METADATA if (folder / name).is_file()]
    texts |= {path.name: path for path in folder.glob("*.txt")}
    for view in views:
        pictures, more_texts, more_metadata = _sort_files(folder / view, source)
        texts, metadata = texts | more_texts, metadata + more_metadata
        for name, path in pictures.items():
            if (twin := found[view].setdefault(_stem(name), path)) != path:
                source.problems.append(f"{view}/{name}: differs from {twin.name} in its ending only")
    stems = sorted(set().union(*found.values()))
    captions: dict[str, Sequence[Any]] = dict(_sidecars(texts, set(stems), options.caption_lines, source))
    for place, row in _read_all_metadata(folder, metadata):
        stem = _stem(str(row.get("file_name", "")))
        if stem not in stems:
            source.problems.append(f"{row.get('file_name')}: is named by the metadata but is no picture")
        elif options.caption_column and options.caption_column not in row:
            source.problems.append(f"{stem}: has no `{options.caption_column}` in the metadata, which has {list(row)}")
        else:
            captions[stem] = as_captions(row.get(options.caption_column or "text"))
    for stem in stems:
        missing = [view for view in views if stem not in found[view]]
        if missing:
            source.problems.append(f"{stem}: has no {' and no '.join(missing)} picture")
        else:
            source.samples.append((stem, [found[view][stem] for view in views], captions.get(stem, [])))
    return source
