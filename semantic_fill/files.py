# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Writing files so that a killed run or a full disk never leaves half of one, and telling a path from a Hub repository.

Everything here knows files only, which is why every other module may import it.
"""

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


CHECKPOINTS_REMAIN = "Earlier checkpoints are intact: continue with --resume_from_checkpoint latest."


@contextlib.contextmanager
def explain_write_errors(option: str, hint: str = "") -> Iterator[None]:
    """Turns a full disk or a read-only folder into an error that names the `option` to write elsewhere with."""
    try:
        yield
    # Safetensors wraps the system's error in one of its own.
    except (OSError, safetensors.SafetensorError) as error:
        message = f"Writing failed: {error}. Free some space, or write elsewhere with {option}. {hint}"
        raise RuntimeError(message.rstrip()) from error


def flush_to_disk(path: Path) -> None:
    """Forces the content of a file, or the names in a folder, out of the system's cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """
    Has `write` fill a temporary file, then renames it to `path`. Readers see all of the file or none of it, also when
    two processes write it at once.
    """
    # A random name, because process ids repeat across machines that share a disk.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(temporary)
        flush_to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def is_hub_id(name: str) -> bool:
    """Whether `name` can be a repository `user/name`, and is not a path that exists."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not os.path.exists(name)
