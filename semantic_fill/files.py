# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Writing files so that a killed run or a full disk never leaves half of one, and telling a path from a Hub repository.

Everything here knows files only, which is why every other module may import it.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.logging import get_logger
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


logger = get_logger(__name__)

# The names that `write_atomically` gives to files until they are complete.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")
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


@contextlib.contextmanager
def ornament(what: str) -> Iterator[None]:
    """Turns an error into a warning, for what a run can do without."""
    try:
        yield
    except Exception as error:
        logger.warning(f"{what} failed, and the run goes on without it: {type(error).__name__}: {error}")


# Safetensors creates files that their owner alone can read. The system tells its default only while it is being changed.
UMASK = os.umask(0)
os.umask(UMASK)


def flush_to_disk(path: Path) -> None:
    """Gives a file the mode that new files have here, and forces its content, or the names in a folder, to the disk."""
    is_file = path.is_file()
    if is_file:
        path.chmod(0o666 & ~UMASK)
    # Windows cannot open folders, and flushes only what can be written.
    windows = os.name == "nt"
    if windows and not is_file:
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_own_folder(path: Path) -> bool:
    """Whether a path is a folder and no link to one. What a link leads to is never changed."""
    return path.is_dir() and not path.is_symlink()


def remove(path: Path) -> None:
    """Removes a file or folder of ours, and of a link the link alone. What is not there or resists is left."""
    if is_own_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def new_folder(place: Path) -> Iterator[Path]:
    """
    The path of a new hidden folder beside a place, `.NAME.part-` and random digits, to fill and then rename. It is removed
    where filling it fails.
    """
    # Whoever put a folder or a link at a name that can be foretold could add files to what is written.
    partial = place.with_name(f".{place.name}.part-{uuid.uuid4().hex}")
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):
            flush_to_disk(path)
    except BaseException:
        remove(partial)
        raise


def replace_folder(place: Path, write: Callable[[Path], Any]) -> None:
    """
    Has `write` fill a new folder, then renames it to `place`. A process that is killed leaves the old folder, the new one,
    or between two renames the old one as `.NAME.old`.

    Raises:
        `RuntimeError`: if there is a file or a link at `place`, which this run did not make.
    """
    replaced = place.with_name(f".{place.name}.old")
    with new_folder(place) as partial:
        write(partial)
    if os.path.lexists(place) and not is_own_folder(place):
        remove(partial)
        raise RuntimeError(f"{place} is no folder of this run. It stays as it is; move it away.")
    if place.exists():
        remove(replaced)
        os.replace(place, replaced)
    os.replace(partial, place)
    flush_to_disk(place.parent)
    remove(replaced)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
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


def remove_temporary_files(folder: Path, age: float = 0.0) -> None:
    """Removes what killed runs left of `write_atomically`: files that nobody has written to for `age` seconds."""
    for path in folder.glob(".*"):
        with contextlib.suppress(OSError):
            if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime >= age:
                path.unlink()


def file_stamp(files: Sequence[Path]) -> str | None:
    """
    What changes when files do, or `None` if one of them is missing. Tools that copy files may keep their size and
    `st_mtime`, but not `st_ctime`.
    """
    try:
        return " ".join(f"{s.st_size},{s.st_mtime_ns},{s.st_ctime_ns}" for s in map(os.stat, files))
    except OSError:
        return None


class FileMemory:
    """
    What was found out about files, kept for later runs while the files stay the same.

    Args:
        path (`Path`, *optional*): File to keep it in. Without one, nothing is remembered.
        version (`str`): What the findings depend on beside the files. Those of another version are forgotten.
    """

    def __init__(self, path: Path | None, version: str):
        self.path, self.version, self.entries = path, version, {}
        self.changed, self.saved = False, time.monotonic()
        with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
            found = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
            self.entries = dict(found["entries"]) if found.get("version") == version else {}

    def get(self, key: str, stamp: str | None) -> Any:
        """What was found out about `key` while it had this stamp, or `None`."""
        with contextlib.suppress(ValueError, TypeError):
            known, value = self.entries[key] if key in self.entries else (None, None)
            return value if stamp is not None and known == stamp else None

    def put(self, key: str, stamp: str | None, value: Any) -> None:
        """
        Remembers a value that can be written as JSON. The key is the path of a file, relative to the memory's folder or
        absolute, and after a null character what else tells it from other keys.
        """
        if stamp is not None and self.get(key, stamp) != value:
            self.entries[key], self.changed = (stamp, value), True

    def save(self, wait: float = 0.0) -> None:
        """
        Writes what is new, if the last time is `wait` seconds ago, and forgets files that are gone. That it cannot be
        written costs only time at the next start.
        """
        if self.path is None or not self.changed or time.monotonic() - self.saved < wait:
            return
        files = {key: key.partition("\0")[0] for key in self.entries}
        gone = {file for file in set(files.values()) if not os.path.exists(self.path.parent / file)}
        self.entries = {key: entry for key, entry in self.entries.items() if files[key] not in gone}
        text = json.dumps({"version": self.version, "entries": self.entries})
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda path: path.write_text(text, encoding="utf-8"))
        self.changed, self.saved = False, time.monotonic()


def fingerprint(model: torch.nn.Module, memory: FileMemory | None = None) -> str:
    """
    A hash of all of a frozen model's weights and settings.

    Args:
        memory (`FileMemory`, *optional*):
            Keeps the hash for as long as the model's files are unchanged, which spares reading gigabytes at every start.
            Only for weights that are those of the files.
    """
    # diffusers and transformers note where a model was loaded from, each in its own way.
    folder = getattr(model, "name_or_path", None) or getattr(model.config, "_name_or_path", None) or ""
    files = [Path(folder, "config.json"), *sorted(Path(folder).glob("*.safetensors"))]
    key, stamp = f"{os.path.abspath(folder)}\0{getattr(model, 'dtype', None)}", file_stamp(files)
    found = None if memory is None else memory.get(key, stamp)
    if isinstance(found, str):
        return found
    settings: Any = model.config
    settings = settings.to_diff_dict() if hasattr(settings, "to_diff_dict") else settings
    # Versions and where a model was loaded from make no difference.
    about = sorted((k, repr(v)) for k, v in settings.items() if not k.startswith(("_", "transformers_version")))
    digest = hashlib.sha256(repr(about).encode())
    for name, parameter in model.state_dict().items():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    if memory is not None:
        memory.put(key, stamp, digest.hexdigest())
    return digest.hexdigest()


def weights_sample(folder: Path, variant: str | None = None) -> str | None:
    """
    A hash of 4 KiB at each of 256 places in every file of weights in a folder, or `None` if there is none. To hash all of a
    transformer's weights takes a minute. Whoever trains on, or merges a LoRA, changes them in nearly all places.
    """
    # Another variant may lie beside the one that is used.
    pattern, dots = ("*.safetensors", 1) if variant is None else (f"*.{variant}*.safetensors", 2)
    files = [path for path in sorted(folder.glob(pattern)) if path.name.count(".") == dots]
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            for place in range(256):
                file.seek(size * place // 256)
                digest.update(file.read(4096))
    return digest.hexdigest() if files else None


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides which tokens a tokenizer makes of a prompt."""
    rules = tokenizer.backend_tokenizer
    # Each call sets both anew, so what the last one left tells nothing.
    rules.no_truncation()
    rules.no_padding()
    return hashlib.sha256(repr((rules.to_str(), tokenizer.model_max_length)).encode()).hexdigest()


def printable(text: str) -> str:
    """A text on one line, whose characters can all be written and shown. Names of files may hold any others."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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


# -- Encodings -------------------------------------------------------------------------------------------------------


def has_header(path: Path) -> bool:
    """Whether the beginning of a safetensors file can be read."""
    try:
        with safetensors.safe_open(path, framework="pt"):
            return True
    except (safetensors.SafetensorError, OSError):
        return False


def checksum(tensors: dict[str, torch.Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, value)
    return str(value)


def read_encoding(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of an encoding.

    Raises:
        `ValueError`: if the file is missing or is not what was written.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            found = (file.metadata() or {}).get("crc32")
    except (safetensors.SafetensorError, OSError) as error:
        damage = f"{type(error).__name__}: {error}"
    else:
        if tensors and found == checksum(tensors):
            return tensors
        damage = "its content is not what was written"
    # A run cannot mend this itself, because its encoders are released by the time that steps read.
    raise ValueError(
        f"The encoding {path} was damaged while the run was under way ({damage}). The next start encodes it again:"
        " continue with --resume_from_checkpoint latest."
    )


def write_encoding(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save = functools.partial(safetensors.torch.save_file, tensors, metadata={"crc32": checksum(tensors)})
    write_atomically(path, save)


def is_intact(path: Path) -> bool:
    """Whether an encoding exists and is what was written."""
    if not path.exists():
        return False
    try:
        read_encoding(path)
    except ValueError:
        logger.warning(f"{path} is damaged and is encoded again")
        return False
    return True
