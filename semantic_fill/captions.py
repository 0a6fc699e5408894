# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Text files beside pictures: captions and metadata, in UTF-8 with or without a byte order mark.

`csv` and `json` read them, because table libraries take words such as "NA" and "null" for missing values.
"""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semantic_attention import open_file, read_file


def read_text(path: Path) -> str:
    """
    The content of a text file, with or without a byte order mark.

    Raises:
        `ValueError`: if it is not UTF-8, no regular file, or too large.
    """
    try:
        # Ends of lines become those of this language, as in any text file.
        return io.TextIOWrapper(io.BytesIO(read_file(path)), encoding="utf-8-sig").read()
    except UnicodeError as error:
        raise ValueError(f"{path} is not encoded as UTF-8: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def read_captions(path: Path, lines: bool) -> list[str]:
    """The captions of a text file beside a picture: its whole text, or with `lines` each line that is not empty."""
    text = read_text(path).strip()
    return [line.strip() for line in text.split("\n") if line.strip() or not text] if lines else [text]


def read_metadata(path: Path) -> list[dict]:
    """
    The rows of a metadata file.

    Raises:
        `ValueError`: if the file is damaged. The message names the line.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            with open_file(path) as file:
                return pyarrow.parquet.read_table(file).to_pylist()
        # Arrow raises errors of many kinds.
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    text, rows = read_text(path), []
    if path.suffix == ".csv":
        reader = csv.reader(io.StringIO(text), strict=True)
        try:
            columns = next(reader, [])
            for cells in filter(None, reader):
                if len(cells) != len(columns):
                    raise ValueError(f"has {len(cells)} cells, but the first line has {len(columns)}")
                # A cell that is empty is no value. Every word is one, `NA` and `null` too.
                rows.append({column: cell or None for column, cell in zip(columns, cells)})
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
        return rows
    # Captions may hold other characters that `splitlines` takes for ends of lines.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            if not isinstance(rows[-1], dict):
                raise ValueError(f"{path}, line {number}: has to be a JSON object")
    return rows


def as_captions(value: Any) -> Sequence[Any]:
    """The captions in a cell, which holds one, a list or nothing."""
    return [] if value is None else value if isinstance(value, list) else [value]
