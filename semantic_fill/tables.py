# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Samples in tables: parquet or webdataset files of one split, and data sets of the Hub.

Only here names decide: which files belong to a split follows from the card's `data_files`, or else from their names.
"""

import contextlib
import dataclasses
import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml
from fsspec.utils import glob_translate

from semantic_fill.captions import as_captions, read_text
from semantic_fill.files import file_stamp
from semantic_fill.options import DataOptions, Options
from semantic_fill.sources import (
    IGNORED_NAMES,
    METADATA,
    PICTURE_ENDINGS,
    SPLITS,
    Source,
    list_folder,
    needed,
    picture_columns,
)
from semantic_fill.walk import walk


BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


class TableSource(Source):
    """
    Rows of a table, whose pictures are cells.

    Args:
        rows (`datasets.Dataset` or a list of dictionaries):
            Rows with undecoded pictures, `{"bytes": ..., "path": ...}`.
        options (`DataOptions`):
            The columns of pictures and captions, and the prompt of samples without a caption.
        left_out (`Sequence[str]`):
            Files beside the tables.
    """

    def __init__(self, rows: Any, options: DataOptions, left_out: Sequence[str] = ()):
        self.rows, self.options, self.columns = rows, options, picture_columns(options)
        self.maps = options.semantic_maps
        self.problems, self.left_out, self.instance_prompt = [], list(left_out), options.instance_prompt
        column = options.caption_column or ("text" if "text" in rows[0] else None)
        is_table = hasattr(rows, "column_names")
        # A table reads one column without reading the pictures beside it.
        self.cells = None if column is None else list(rows[column] if is_table else (row[column] for row in rows))
        files = [Path(file["filename"]) for file in rows.cache_files] if is_table else []
        self.stamps = file_stamp(files) or None
        paths = [os.path.abspath(path) for path in files]
        about = hashlib.sha256(repr((self.columns, options.train_split, paths)).encode()).hexdigest()
        self.prefix = "\0".join((*paths[:1], about))

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index}"

    def pictures(self, index: int) -> Sequence[bytes | None]:
        row = self.rows[index]
        cells = [row[column] for column in self.columns]
        if None in needed(cells):
            raise ValueError("has no picture")
        # A cell may name a file of this machine instead of holding it, which no data set has reason to do.
        if any(cell and cell.get("bytes") is None for cell in cells):
            paths = [cell and cell.get("path") for cell in cells]
            raise ValueError(
                f"names a file instead of holding a picture ({paths}). Pass a folder of pictures as --train_data_dir"
            )
        return [cell and cell["bytes"] for cell in cells]

    def own_captions(self, index: int) -> Sequence[Any]:
        captions = as_captions(self.cells[index]) if self.cells is not None else []
        return [caption.removeprefix("\ufeff") if isinstance(caption, str) else caption for caption in captions]

    def key(self, index: int) -> str:
        return f"{self.prefix} {index}"

    def stamp(self, index: int) -> str | None:
        return self.stamps

    def head(self, count: int) -> "TableSource":
        is_table = hasattr(self.rows, "column_names")
        rows = self.rows.select(range(min(count, len(self)))) if is_table else self.rows[:count]
        return TableSource(rows, self.options, self.left_out)


def load_table(options: DataOptions, cache_dir: str | None = None) -> TableSource:
    """
    The rows of `--dataset_name` that belong to `--train_split`, with their pictures still undecoded.

    Raises:
        `ValueError`: if they cannot be loaded, there are none, or a column is missing or holds no pictures.
    """
    # The import is slow, and folders do not need it.
    import datasets
    from datasets.config import HF_DATASETS_CACHE

    name, files, left_out, local = options.dataset_name or "", [], [], {}
    if os.path.isdir(name):
        try:
            builder, files, left_out = find_tables(Path(name), options.train_split, options.dataset_config_name)
        except ValueError as error:
            raise ValueError(f"--dataset_name {name} cannot be loaded: {error}") from error
        files = plain_paths(files, Path(cache_dir or HF_DATASETS_CACHE))
        # The library has its own rules for the names of splits.
        local = {
            "path": builder,
            "data_files": {"train": [glob.escape(str(path)) for path in files]},
            "split": "train",
        }
    wanted = local or {"path": name, "name": options.dataset_config_name, "split": options.train_split}
    try:
        rows: Any = datasets.load_dataset(**wanted, cache_dir=cache_dir)
    # The library raises errors of many kinds.
    except Exception as error:
        reason = error.__cause__ or error
        if isinstance(reason, UnicodeError) and local:
            reason = f"{_find_undecodable(files)} is not encoded as UTF-8: {reason}"
        raise ValueError(f"--dataset_name {name} cannot be loaded: {reason}") from error
    if len(rows) == 0:
        raise ValueError(f"--dataset_name {name} has no rows.")
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
    # Pictures in other columns would be decoded with each row.
    used = {*picture_columns(options), options.caption_column or "text"}
    return TableSource(rows.select_columns([name for name in rows.column_names if name in used]), options, left_out)


def _find_undecodable(files: list[Path]) -> str:
    """The text in an archive that is not UTF-8, which the library does not name."""
    for path in files:
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith((".txt", ".json")) else None
                try:
                    (content.read() if content else b"").decode()
                except UnicodeError:
                    return f"{member.name} in {path}"
    return "a text"


def plain_paths(files: list[Path], cache_dir: Path) -> list[Path]:
    """
    The same files by paths in which `datasets` finds nothing to interpret. It reads others as patterns, variables or
    chains of addresses, so that such paths become links in its cache.
    """
    files = [Path(os.path.abspath(path)) for path in files]
    if all(re.fullmatch(r"[^*?\[\]{}$~%]*", str(path)) and "::" not in str(path) for path in files):
        return files
    links = []
    for path in files:
        link = cache_dir / "links" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(path)
        links.append(link)
    return links


def group_tables(folder: Path, config: str | None = None) -> tuple[dict[str, list[Path]], list[str]]:
    """
    The tables of each split in a local copy of a data set, and the files that belong to none.

    The card's `data_files` decide. Without them the names do: `train-00000-of-00002.parquet`, `train/0.parquet` or
    `my_train.tar`. Files whose names tell of no split belong to `train`.

    Args:
        config (`str`, *optional*): Name of a configuration in the card.

    Raises:
        `ValueError`: if there are no tables, tables of two kinds, or the card does not tell what belongs where.
    """
    patterns = _card_data_files(folder, config)
    splits: dict[str, list[Path]] = {}
    others = []
    for path in sorted(walk(folder)):
        name = path.relative_to(folder)
        owners = []
        if path.suffix in BUILDERS and not path.name.startswith(".") and path.name not in METADATA:
            if not path.is_file():
                raise ValueError(f"{name} is no regular file")
            owners = [split_of(name)]
            if patterns:
                owners = [s for s, regexes in patterns.items() if any(r.match(name.as_posix()) for r in regexes)]
        if len(owners) > 1:
            raise ValueError(f"the card lists {name} for the splits {' and '.join(owners)}")
        if owners:
            splits.setdefault(owners[0], []).append(path)
        elif path.name not in IGNORED_NAMES:
            others.append(name.as_posix())
    if not splits:
        hint = " Pass a folder of pictures as --train_data_dir." if _holds_pictures(others) else ""
        raise ValueError(f"the folder has to hold *.parquet or *.tar (webdataset) files but holds none.{hint}")
    return splits, others


def find_tables(folder: Path, split: str, config: str | None = None) -> tuple[str, list[Path], list[str]]:
    """
    The kind and the files of one split in a local copy of a data set, and all other files in it.

    Raises:
        `ValueError`: as [`group_tables`], or if there are no such files. The message names the splits that exist.
    """
    splits, others = group_tables(folder, config)
    split = split if split in splits else SPLITS.get(split, split)
    if split not in splits:
        raise ValueError(f"--train_split {split} is not in the folder, which has {', '.join(splits)}")
    files = splits.pop(split)
    endings = {path.suffix for path in files}
    if len(endings) > 1:
        raise ValueError(f"the split {split} has files of two kinds, such as {files[0]} and {files[-1]}")
    others += [path.relative_to(folder).as_posix() for paths in splits.values() for path in paths]
    return BUILDERS[endings.pop()], files, sorted(others)


def split_of(name: PurePath) -> str:
    """The split that the path of a file inside its data set tells. Words in the names of folders count first."""

    def word_of(text: str) -> str | None:
        return next((SPLITS[word] for word in re.split(r"[-._ 0-9]+", text.lower()) if word in SPLITS), None)

    told = next(filter(None, map(word_of, name.parent.parts)), None)
    # The Hub numbers files this way, whatever the name of their split.
    numbered = re.match(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}", name.stem)
    if told is None and numbered:
        return SPLITS.get(numbered[1], numbered[1])
    return told or word_of(name.stem) or "train"


def _card_data_files(folder: Path, config: str | None) -> dict[str, list[re.Pattern]]:
    """The paths of each split as the configuration in a data set's card lists them, and nothing if it lists none."""
    card = folder / "README.md"
    head = re.match(r"---\n(.*?)\n---", read_text(card), re.DOTALL) if card.is_file() else None
    try:
        entries = ((yaml.safe_load(head[1]) if head else None) or {}).get("configs") or []
        configs = {entry["config_name"]: entry for entry in entries}
        defaults = [n for n, entry in configs.items() if len(configs) == 1 or n == "default" or entry.get("default")]
        name = config or next(iter(defaults), None)
        if name not in configs and (config or configs):
            names = ", ".join(configs) or "none"
            raise ValueError(f"--dataset_config_name has to name a configuration of {card}, which has {names}")
        entry = configs.get(name, {})
        listed = entry.get("data_files") or ()
        listed = [listed] if isinstance(listed, str) else listed
        if not listed and "data_dir" in entry:
            raise ValueError(
                f"{card} has `data_dir` without `data_files`, which does not tell what belongs to a split"
            )
        patterns: dict[str, list[re.Pattern]] = {}
        for item in listed:
            item = {"split": "train", "path": item} if isinstance(item, str) else item
            for path in [item["path"]] if isinstance(item["path"], str) else item["path"]:
                path = os.path.normpath(os.path.join(entry.get("data_dir") or "", path))
                patterns.setdefault(item["split"], []).append(re.compile(glob_translate(path)))
        return patterns
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{card} lists `data_files` in a form that is not understood: {error}") from error


def _holds_pictures(names: Sequence[str]) -> bool:
    return any(PurePath(name).suffix.lower() in PICTURE_ENDINGS for name in names)


def load_source(options: DataOptions, pairs: bool = False, cache_dir: str | None = None) -> Source:
    """The samples that the options name. `pairs` allows samples without a semantic view."""
    if options.train_data_dir is not None:
        return list_folder(Path(options.train_data_dir), options, pairs)
    return load_table(options, cache_dir)


def load_held_out(options: Options, pairs: bool = False) -> Source:
    """
    The samples of `--validation_data_dir`. Of tables it takes the only split, or else `validation` or `test`.

    Raises:
        `ValueError`: as [`list_folder`] and [`load_table`].
    """
    folder = Path(options.validation_data_dir or "")
    names = [path.name for path in walk(folder)] if folder.is_dir() else []
    if _holds_pictures(names) or not any(PurePath(name).suffix in BUILDERS for name in names):
        return list_folder(folder, options, pairs, "--validation_data_dir")
    splits = group_tables(folder)[0]
    split = next((name for name in ("validation", "test") if name in splits and len(splits) > 1), next(iter(splits)))
    held_out = dataclasses.replace(options, train_data_dir=None, dataset_name=str(folder), train_split=split)
    return load_table(held_out, options.cache_dir)
