# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Samples in folders of pictures: triptychs, or three folders of views, with captions beside them.

Folders are listed here and not by `datasets`, which infers splits from words in file names, reads names as glob patterns
and drops what it does not understand. Here every picture of a folder is used or named, in the order of its path.
"""

import os
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from semantic_attention import SINGLE_MAP, read_file
from semantic_fill.captions import as_captions, read_captions, read_metadata
from semantic_fill.files import file_stamp
from semantic_fill.options import DataOptions
from semantic_fill.views import NUMBERS, PANELS, VIEWS
from semantic_fill.walk import Inside, walk


# Formats that Pillow reads by itself. PostScript and others, which start another program, are left out.
PICTURE_ENDINGS = frozenset(
    ".avif .bmp .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .mpo .pbm .pgm .png .ppm .tga .tif .tiff .webp".split()
)
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Names of splits as people write them, and as they are called.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# Files that people keep beside pictures. They are no part of the data and not worth a word.
IGNORED_NAMES = frozenset(("Thumbs.db", "desktop.ini", ".DS_Store", "README.md", ".gitattributes"))
LEADS_OUT = "is a link that leads out of the data set's folder. Pass --follow_links to read it"


class Source:
    """Samples before they are decoded. `problems` names what cannot be used, `left_out` files that are no samples."""

    problems: list[str]
    left_out: list[str]
    instance_prompt: str | None
    # Names of the maps, in their order. Of several maps, a sample may lack some.
    maps: tuple[str, ...] = SINGLE_MAP

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What messages call a sample."""
        raise NotImplementedError

    def pictures(self, index: int) -> Sequence[bytes | None]:
        """The encoded pictures of a sample: one triptych, or one for each view, `None` for a map that is missing."""
        raise NotImplementedError

    def own_captions(self, index: int) -> Sequence[Any]:
        """What is stored as captions of a sample, and nothing if it has none."""
        raise NotImplementedError

    def key(self, index: int) -> str:
        """The path of a file of a sample, and after a null character what tells the sample from all others."""
        raise NotImplementedError

    def stamp(self, index: int) -> str | None:
        """What changes when the pictures of a sample change. `None` if nothing is known to."""
        return None

    def head(self, count: int) -> "Source":
        """A source of the first samples."""
        raise NotImplementedError

    def captions(self, index: int) -> list[str]:
        """
        The captions of a sample, which are `instance_prompt` if it has none of its own.

        Raises:
            `ValueError`: with a reason that reads after the name of the sample.
        """
        captions = list(self.own_captions(index))
        if not captions and self.instance_prompt is not None:
            captions = [self.instance_prompt]
        if not captions:
            raise ValueError("has no caption. Name their column with --caption_column, or pass --instance_prompt")
        for caption in captions:
            if not isinstance(caption, str):
                raise ValueError(f"has a caption that is no text ({str(caption)[:100]})")
            try:
                caption.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"has a caption with half a character ({caption[:100]!r})") from error
            if not caption.strip() and self.instance_prompt != "":
                raise ValueError("has an empty caption")
        return captions


# -- Folders of pictures ----------------------------------------------------------------------------------------------


@dataclass
class FolderSource(Source):
    """Samples whose pictures are files: name, paths and captions of each."""

    samples: list[tuple[str, list[Path | None], Sequence[Any]]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    instance_prompt: str | None = None
    follow_links: bool = False
    maps: tuple[str, ...] = SINGLE_MAP

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def files(self, index: int) -> list[Path]:
        return [path for path in self.samples[index][1] if path is not None]

    def pictures(self, index: int) -> Sequence[bytes | None]:
        return [None if path is None else read_file(path) for path in self.samples[index][1]]

    def own_captions(self, index: int) -> Sequence[Any]:
        return self.samples[index][2]

    def key(self, index: int) -> str:
        # No path holds this character.
        return "\0".join(map(os.path.abspath, self.files(index)))

    def stamp(self, index: int) -> str | None:
        return file_stamp(self.files(index))

    def head(self, count: int) -> "FolderSource":
        return replace(self, samples=self.samples[:count])


def needed(views: Sequence[Any]) -> Sequence[Any]:
    """Those of a sample's views that have to be there. Of several maps, a sample may lack some."""
    return views[: len(VIEWS)] if len(views) > len(PANELS) else views


def picture_columns(options: DataOptions) -> list[str]:
    """The columns of the views, or the one column of whole triptychs."""
    if options.visible_column and options.target_column and options.semantic_column:
        return [options.visible_column, options.target_column, *options.semantic_column.split(",")]
    return [options.image_column]


def list_folder(
    folder: Path, options: DataOptions, pairs: bool = False, option: str = "--train_data_dir"
) -> FolderSource:
    """
    The samples of a folder in the order of their paths: a folder for each view with equal names, or triptychs.

    Args:
        pairs (`bool`): Whether a semantic view may be missing.
        option (`str`): The option that names the folder.

    Raises:
        `ValueError`: if there is no such folder, or it holds several splits, views without others or no pictures.
    """
    if not folder.is_dir():
        raise ValueError(f"{option} {folder} has to be a folder of pictures, but there is no such folder.")
    maps = options.semantic_maps
    wanted = [*VIEWS, *(maps if len(maps) == 1 else (f"semantic_{name}" for name in maps))]
    views = [name for name in wanted if (folder / name).is_dir()]
    source = FolderSource(instance_prompt=options.instance_prompt, follow_links=options.follow_links, maps=maps)
    if len(views) < 2 or options.visible_column:
        _list_triptychs(folder, options, source, option)
    else:
        missing = [name for name in (VIEWS if pairs else wanted) if name not in views]
        if missing:
            number = NUMBERS.get(len(wanted), len(wanted))
            hint = "" if pairs else f" All {number} are needed, or two with --semantic_mode none."
            raise ValueError(
                f"{option} {folder} holds {'/ and '.join(views)}/ but no {'/ and no '.join(missing)}/.{hint}"
            )
        _list_views(folder, views, options, source, option)
    if not source.samples and not source.problems:
        tables = any(name.endswith((".parquet", ".tar")) for name in source.left_out)
        hint = " Pass tables as --dataset_name." if tables else ""
        raise ValueError(f"{option} {folder} has to hold pictures but holds none.{hint}")
    return source


def _sort_files(
    folder: Path, root: Path, source: FolderSource, option: str, skip: Sequence[str] = ()
) -> tuple[dict[str, Path], dict[str, Path], list[Path]]:
    """Pictures and text files below a folder by their path inside it, and metadata files. Messages name paths from root."""
    pictures, texts, metadata, inside = {}, {}, [], Inside(root, source.follow_links)
    paths = list(walk(folder, skip))
    for place in {path.parent for path in paths}:
        inside.add(place)
    for path in paths:
        name, ending = path.relative_to(folder).as_posix(), path.suffix.lower()
        if path.name in IGNORED_NAMES:
            continue
        wanted = path.name in METADATA or ending == ".txt" or ending in PICTURE_ENDINGS
        if not wanted or path.name.startswith("."):
            source.left_out.append(path.relative_to(root).as_posix())
        # Reading a pipe would never end, nor would reading some devices.
        elif not path.is_file():
            source.problems.append(f"{path.relative_to(root).as_posix()}: is no regular file")
        elif not inside(path):
            source.problems.append(f"{path.relative_to(root).as_posix()}: {LEADS_OUT}")
        elif path.name in METADATA:
            metadata.append(path)
        else:
            (texts if ending == ".txt" else pictures)[name] = path
    source.left_out.sort()
    folders = {PurePosixPath(name).parent for name in pictures}
    splits: dict[PurePosixPath, set[str]] = {}
    for inner in {outer for inner in folders for outer in (inner, *inner.parents)}:
        if inner.name.lower() in SPLITS:
            splits.setdefault(inner.parent, set()).add(str(folder / inner))
    for found in splits.values():
        if len(found) > 1:
            raise ValueError(
                f"{option} {root} holds several splits side by side. Choose one of them: {' or '.join(sorted(found))}."
            )
    return pictures, dict(sorted(texts.items())), sorted(metadata)


def _composed(name: str) -> str:
    """A name with each accent in one character with its letter. Systems store the same name in either form."""
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    return _composed(posixpath.splitext(name)[0])


def _read_sidecars(texts: dict[str, Path], options: DataOptions, source: FolderSource) -> dict[str, list[str]]:
    """Captions by the stem of their text file."""
    captions: dict[str, list[str]] = {}
    for name, path in texts.items():
        if _stem(name) in captions:
            source.problems.append(f"{name}: is one of two text files for the same picture")
        try:
            captions[_stem(name)] = read_captions(path, options.caption_lines)
        except (ValueError, OSError) as error:
            source.problems.append(f"{name}: {error}")
    return captions


def _metadata_rows(
    folder: Path, files: Iterable[Path], options: DataOptions, source: FolderSource
) -> Iterator[tuple[tuple[str, ...], Sequence[Any]]]:
    """For each metadata row the paths from the folder that it names, and its captions."""
    columns = picture_columns(options) if options.visible_column else []
    for path in files:
        place = path.parent.relative_to(folder)

        def find(cell: str, path: Path = path, place: Path = place) -> str:
            name = os.path.normpath(os.path.join(place, cell))
            if os.path.isabs(name) or name.startswith(".."):
                # This always tells right, but takes longer.
                name = os.path.relpath(path.parent / cell, folder)
            return name.replace(os.sep, "/")

        for row in read_metadata(path):
            cells: list[Any] = [row.get(f"{column}_file_name", row.get(column)) for column in columns]
            cells = cells or [row.get("file_name")]
            optional = slice(len(needed(cells)), None)
            cells[optional] = ["" if cell is None else cell for cell in cells[optional]]
            shown = path.relative_to(folder).as_posix()
            if not all(isinstance(cell, str) for cell in cells):
                wanted = " and ".join(columns) or "file_name"
                source.problems.append(f"{shown}: a row names no picture in {wanted}: {str(row)[:200]}")
                continue
            if options.caption_column and options.caption_column not in row:
                source.problems.append(f"{cells[0]}: has no `{options.caption_column}` in {shown}, but {list(row)}")
            yield tuple(cell and find(cell) for cell in cells), as_captions(row.get(options.caption_column or "text"))


def _merge(
    name: str, first: Sequence[Any] | None, second: Sequence[Any] | None, source: FolderSource
) -> Sequence[Any]:
    """The captions of a sample that may have some in two places."""
    if first and second and list(first) != list(second):
        source.problems.append(f"{name}: has different captions in two places, {str([*first, *second])[:200]}")
    return first or second or []


def _list_triptychs(folder: Path, options: DataOptions, source: FolderSource, option: str) -> None:
    """Samples of one picture each, or with --visible_column of the pictures that a metadata row names."""
    pictures, texts, metadata = _sort_files(folder, folder, source, option)
    if options.visible_column and not metadata:
        raise ValueError(f"--visible_column needs a metadata file in {option} {folder}, which has none.")
    stored, inside = {_composed(name): name for name in pictures}, Inside(folder, options.follow_links)
    named: dict[tuple[str, ...], Sequence[Any]] = {}
    for names, captions in _metadata_rows(folder, metadata, options, source):
        names = tuple(name if name in pictures else stored.get(_composed(name), name) for name in names)
        if names in named:
            source.problems.append(f"{names[0]}: is named twice by the metadata")
        # The metadata may name pictures with other endings.
        unlisted = [name for name in names if name and name not in pictures]
        lacking = [n for n in unlisted if n.startswith("../") or not (folder / n).is_file() or not inside(folder / n)]
        source.problems.extend(f"{name}: is named by the metadata but is no file in the folder" for name in lacking)
        if not lacking:
            named[names] = captions
            pictures.update({name: folder / name for name in names if name})
    used = {name for names in named for name in names}
    samples = sorted(named) if options.visible_column else sorted((name,) for name in pictures)
    stems: dict[str, str] = {}
    sidecars = _read_sidecars(texts, options, source)
    for names in samples:
        name, captions = names[0], named.get(names)
        stem = _stem(name)
        if stems.setdefault(stem, name) != name and stem in sidecars:
            source.problems.append(f"{name}: differs from {stems[stem]} in its ending only, and {stem}.txt fits both")
        if named and captions is None and stem not in sidecars and options.instance_prompt is None:
            source.problems.append(f"{name}: is not named by the metadata and has no caption of its own")
            continue
        captions = _merge(name, captions, sidecars.get(stem), source)
        source.samples.append((name, [pictures[name] if name else None for name in names], captions))
    source.problems.extend(f"{stem}.txt: is a caption without a picture" for stem in sidecars if stem not in stems)
    others = pictures.keys() - used if options.visible_column else set()
    source.left_out[:] = sorted({*source.left_out, *others} - used)


def _list_views(folder: Path, views: list[str], options: DataOptions, source: FolderSource, option: str) -> None:
    """
    Samples of a picture in each of the folders `views`, which all have one name, whatever their endings. Of several maps, a
    sample may lack some.
    """
    found: dict[str, dict[str, Path]] = {view: {} for view in views}
    others, texts, metadata = _sort_files(folder, folder, source, option, skip=views)
    captions: dict[str, Sequence[Any]] = dict(_read_sidecars(texts, options, source))
    for view in views:
        pictures, texts, more_metadata = _sort_files(folder / view, folder, source, option)
        for stem, more in _read_sidecars(texts, options, source).items():
            captions[stem] = _merge(stem, captions.get(stem), more, source)
        for name, path in sorted(pictures.items()):
            if (twin := found[view].setdefault(_stem(name), path)) != path:
                source.problems.append(f"{view}/{name}: differs from {twin.name} in its ending only")
        metadata += more_metadata
    stems = sorted(set().union(*found.values()))
    for (name,), more in _metadata_rows(folder, metadata, options, source):
        # The metadata may stand beside the folders or inside one of them.
        stem = _stem(name.partition("/")[2] if name.partition("/")[0] in views else name)
        captions[stem] = _merge(stem, captions.get(stem), more, source)
    for stem in stems:
        missing = [view for view in needed(views) if stem not in found[view]]
        if missing:
            source.problems.append(f"{stem}: has no {' and no '.join(missing)} picture")
        else:
            source.samples.append((stem, [found[view].get(stem) for view in views], captions.get(stem, [])))
    lacking = sorted(captions.keys() - set(stems))
    source.problems.extend(f"{stem}: has a caption or a metadata row, but there is no picture" for stem in lacking)
    source.left_out[:] = sorted({*source.left_out, *others})
