# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Which files lie in the folder of a data set: those below it and below the folders that it links, each of them once."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath


def walk(folder: Path, skip: Sequence[str] = ()) -> Iterator[Path]:
    """
    All files below a folder, and the hidden folders, which are not entered. Linked folders are followed, each of them
    once, but not where they lead to what is listed anyway.

    Args:
        skip (`Sequence[str]`): Folders right inside `folder` to leave out.

    Raises:
        `ValueError`: if a folder cannot be listed.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed: {error.strerror}") from error

    root, seen = PurePath(os.path.realpath(folder)), set()
    for place, names, files in os.walk(folder, followlinks=True, onerror=fail):
        real = PurePath(os.path.realpath(place))
        listed, around = real in seen, False
        if os.path.islink(place) and Path(place) != folder:
            inside = real.relative_to(root).parts if real.is_relative_to(root) else (".",)
            listed = listed or not any(part.startswith(".") for part in inside)
            around = root.is_relative_to(real)
        if listed or around:
            names.clear()
            yield from () if listed else (Path(place),)
            continue
        seen.add(real)
        hidden = [name for name in names if name.startswith(".")]
        yield from (Path(place, name) for name in (*files, *hidden))
        left = {*hidden, *skip} if Path(place) == folder else set(hidden)
        names[:] = sorted(set(names) - left)


class Inside:
    """
    Tells whether a file belongs to a data set. A link to a file may lead into the data set's folder, into a folder that it
    links, or into the cache of huggingface_hub that it lies in. Elsewhere it would choose which other files are read.

    Args:
        root (`Path`): The data set's folder.
        allow_all (`bool`): Whether links may lead anywhere.
    """

    def __init__(self, root: Path, allow_all: bool):
        real = Path(os.path.realpath(root))
        self.roots, self.allow_all = {str(real)}, allow_all
        if real.parent.name == "snapshots":
            self.roots.add(str(real.parent.parent / "blobs"))

    def add(self, folder: str | os.PathLike) -> None:
        """Takes a folder that the data set links as one of its own."""
        self.roots.add(os.path.realpath(folder))

    def __call__(self, path: Path) -> bool:
        if self.allow_all or not path.is_symlink():
            return True
        target = PurePath(os.path.realpath(path))
        return any(str(folder) in self.roots for folder in target.parents)
