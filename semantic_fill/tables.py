# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Samples in tables: parquet or webdataset files of one split, and data sets of the Hub.

Only here names decide: which files belong to a split follows from the card's `data_files`, or else from their names.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from semantic_fill.options import DataOptions
from semantic_fill.sources import SPLITS, Source, as_captions, list_folder, read_text, walk


class TableSource(Source):
    """
    Rows of a table, whose pictures are cells.

    Args:
        rows (`datasets.Dataset` or a list of dictionaries):
            Rows with undecoded pictures, `{"bytes": ..., "path": ...}`.
        options (`DataOptions`):
            The columns of pictures and captions.
    """

    def __init__(self, rows: Any, options: DataOptions):
        self.rows, self.columns = rows, picture_columns(options)
        self.caption_column = options.caption_column or ("text" if "text" in rows[0] else None)
        self.problems, self.left_out = [], []

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"row {index}"

    def captions(self, index: int) -> Sequence[Any]:
        return as_captions(self.rows[index][self.caption_column]) if self.caption_column else []

    def pictures(self, index: int) -> list[bytes]:
        row = self.rows[index]
        cells = [row[column] for column in self.columns]
        if None in cells:
            raise ValueError("has no picture")
        # A cell may name a file of this machine instead of holding it, which no data set has reason to do.
        if any(cell.get("bytes") is None for cell in cells):
            raise ValueError(f"names a file instead of holding a picture ({[cell.get('path') for cell in cells]})")
        return [cell["bytes"] for cell in cells]


def picture_columns(options: DataOptions) -> list[str]:
    """The columns of the three views, or the one column of whole triptychs."""
    if options.visible_column and options.target_column and options.semantic_column:
        return [options.visible_column, options.target_column, options.semantic_column]
    return [options.image_column]


def load_table(options: DataOptions, cache_dir: str | None = None) -> TableSource:
    """
    The rows of `--dataset_name` that belong to `--train_split`, with their pictures still undecoded.

    Raises:
        `ValueError`: if they cannot be loaded, there are none, or a column is missing or holds no pictures.
    """
    # The import is slow, and folders do not need it.
    import datasets

    datasets.utils.logging.set_verbosity_error()
    name, split = options.dataset_name or "", options.train_split
    try:
        if os.path.isdir(name):
            builder, files = find_tables(Path(name), split)
            # The library reads paths as patterns.
            files = {split: [glob.escape(str(path)) for path in files]}
            rows: Any = datasets.load_dataset(builder, data_files=files, split=split, cache_dir=cache_dir)
        else:
            rows = datasets.load_dataset(name, options.dataset_config_name, split=split, cache_dir=cache_dir)
    # The library raises errors of many kinds.
    except Exception as error:
        raise ValueError(f"--dataset_name {name} cannot be loaded: {error.__cause__ or error}") from error
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
    return TableSource(rows, options)


def find_tables(folder: Path, split: str) -> tuple[str, list[Path]]:
    """
    The kind and the files of one split in a local copy of a data set.

    The card's `data_files` decide. Without them the names do, `train-00000-of-00002.parquet` or `train/0.parquet`. Files
    whose names tell of no split belong to `train`.

    Raises:
        `ValueError`: if there are no such files. The message names the splits that exist.
    """
    for builder, ending in (("parquet", ".parquet"), ("webdataset", ".tar")):
        files = sorted(path for path in walk(folder) if path.suffix == ending)
        if files:
            break
    else:
        raise ValueError("the folder has to hold *.parquet or *.tar (webdataset) files but holds none")
    by_split: dict[str, list[Path]] = {}
    listed = _card_data_files(folder)
    for path in files:
        name = path.relative_to(folder)
        if listed:
            owner = next((s for s, patterns in listed.items() if any(name.match(p) for p in patterns)), None)
        else:
            parts = (*name.parent.parts, name.stem)
            owner = next((s for part in parts for s in SPLITS if re.match(rf"{s}(?![a-z])", part, re.I)), "train")
            # A split of another name is recognized by the Hub's way to number files.
            owner = m[1] if (m := re.fullmatch(r"(.+)-\d{5}-of-\d{5}", name.stem)) else owner
        if owner is not None:
            by_split.setdefault(owner, []).append(path)
    if split not in by_split:
        raise ValueError(f"--train_split {split} is not in the folder, which has {sorted(by_split)}")
    return builder, by_split[split]


def _card_data_files(folder: Path) -> dict[str, list[str]]:
    """The patterns of each split that the card of a data set lists in its first configuration."""
    card = folder / "README.md"
    head = re.match(r"---\n(.*?)\n---", read_text(card), re.DOTALL) if card.is_file() else None
    try:
        configs = (yaml.safe_load(head[1]) or {}).get("configs") if head else None
        entries = configs[0].get("data_files") if configs else None
        if isinstance(entries, str):
            return {"train": [entries]}
        return {e["split"]: [e["path"]] if isinstance(e["path"], str) else list(e["path"]) for e in entries or ()}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{card} lists `data_files` in a form that is not understood: {error}") from error


def load_source(options: DataOptions, pairs: bool = False, cache_dir: str | None = None) -> Source:
    """The samples that the options name. `pairs` allows samples without a semantic view."""
    if options.train_data_dir is not None:
        return list_folder(Path(options.train_data_dir), options, pairs)
    return load_table(options, cache_dir)
