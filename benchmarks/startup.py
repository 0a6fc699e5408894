# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""How long a run takes before its first step, by the number of samples, with made files.

    python benchmarks/startup.py --rows 2000
    python benchmarks/startup.py --rows 100000 --small --form metadata

The first command makes triptychs of 1536x512 pixels, whose decoding takes the time of a first check. The second one makes
tiny triptychs, but really as many as it says, so that a second start over all of them is measured and not extrapolated.
Most files show one of a few scenes, because drawing takes long, but no two of them are equal: each carries its own number
in its bytes. So each has an encoding of its own, as the samples of a real data set do. Their encodings are tiny files that
are made beforehand: how long a VAE takes is no question of start-up. A start is what the trainer does with its data before
it builds the model: it lists, checks, counts the tokens of all captions, and looks after the cache of encodings. The first
one also reads each encoding once. Imports and the loading of the base are left out. They do not depend on the data.

The files were just written, so they come from the system's memory and not from a disk. Seconds of the processor are listed
beside those of the clock, because only they are the same on a machine that does something else meanwhile.
"""

import argparse
import io
import json
import os
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch
from accelerate import Accelerator
from flux_shape import build_encoders
from measurement import Report, describe, fresh_state

import train_semantic_fill_lora as trainer
from semantic_fill.checks import check_samples
from semantic_fill.data import TriptychDataset, load_datasets
from semantic_fill.encoding import Encoder, encode_datasets
from semantic_fill.files import checksum
from semantic_fill.tables import load_source


SCENES = 8
FILES_PER_FOLDER = 1000


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="Triptychs to make, half of them PNG, half JPEG.")
    parser.add_argument("--small", action="store_true", help="Triptychs of 48x16 pixels, all of them PNG.")
    parser.add_argument(
        "--form",
        choices=("metadata", "txt", "parquet"),
        default="metadata",
        help="A folder with one metadata.jsonl or with a .txt for each picture, or parquet files.",
    )
    parser.add_argument(
        "--cores",
        type=int,
        nargs="+",
        default=sorted({1, os.cpu_count() or 1}),
        help="Cores of each check. Starts have the most of them.",
    )
    parser.add_argument("--folder", type=Path, help="Where the files go and stay. Default: a temporary folder.")
    parser.add_argument("--output", type=Path, default=Path("startup.json"))
    return parser.parse_args(arguments)


# -- Files ------------------------------------------------------------------------------------------------------------


def draw_scene(seed: int, size: int) -> PIL.Image.Image:
    """A triptych that compresses about as well as photographs beside a map of flat regions do."""
    generator = np.random.default_rng(seed)
    shapes = np.zeros((size, size, 3))
    for cells in (4, 16, 64):
        noise = PIL.Image.fromarray(generator.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        shapes += np.asarray(noise.resize((size, size), PIL.Image.Resampling.BICUBIC), np.float64) / 3
    grain = generator.normal(0, 3, (2, size, size, 3))
    semantic = (shapes > 127) * 255.0
    views = np.concatenate([shapes + grain[0], 255 - shapes + grain[1], semantic], axis=1)
    return PIL.Image.fromarray(views.clip(0, 255).astype(np.uint8))


def encode(picture: PIL.Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": 92} if form == "JPEG" else {}))
    return buffer.getvalue()


def add_number(data: bytes, number: int) -> bytes:
    """The same picture with a comment inside, so that no other file has the same bytes."""
    comment = b"Comment\0%d" % number
    if data.startswith(b"\x89PNG"):
        chunk = struct.pack(">I", len(comment)) + b"tEXt" + comment + struct.pack(">I", zlib.crc32(b"tEXt" + comment))
        return data[:-12] + chunk + data[-12:]
    return data[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + data[2:]


def make_triptychs(folder: Path, rows: int, small: bool, form: str) -> int:
    """Makes a data set in a form of `--form`. Returns the mean size of a picture in bytes."""
    scenes = [draw_scene(seed, 16 if small else 512) for seed in range(SCENES)]
    forms = ("PNG", "PNG") if small else ("PNG", "JPEG")
    pictures = [(form, encode(scene, form)) for scene in scenes for form in forms]
    metadata, total = [], 0
    for first in range(0, rows, FILES_PER_FOLDER):
        place, cells = folder / f"{first // FILES_PER_FOLDER:04d}", []
        place.mkdir(parents=True)
        for number in range(first, min(first + FILES_PER_FOLDER, rows)):
            ending, data = pictures[number % len(pictures)]
            data, caption = add_number(data, number), f"a street with number {number} at night"
            total += len(data)
            path = place / f"{number:06d}.{ending.lower()}"
            if form == "parquet":
                cells.append({"image": {"bytes": data, "path": path.name}, "text": caption})
                continue
            path.write_bytes(data)
            if form == "txt":
                path.with_suffix(".txt").write_text(caption)
            else:
                metadata.append(json.dumps({"file_name": path.relative_to(folder).as_posix(), "text": caption}))
        if cells:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(cells), place / "0.parquet", row_group_size=100)
    if metadata:
        (folder / "metadata.jsonl").write_text("\n".join(metadata))
    return total // rows


def make_encodings(options: trainer.Options, dataset: TriptychDataset) -> int:
    """Makes a tiny encoding for each sample and caption, in the files where the trainer looks for them."""
    pipeline = build_encoders("test", torch.device("cpu"), torch.float32)
    encoder = Encoder(pipeline, dataset, options.max_sequence_length, Path(options.cache_root))
    paths = {encoder.prompt_file(prompt) for prompt in dataset.all_captions() | {""}}
    paths |= {path for spec in encoder.specs() for path in encoder.sample_files(spec)}
    tensors = {"moments": torch.zeros(4)}
    data = safetensors.torch.save(tensors, metadata={"crc32": checksum(tensors)})
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return len(paths)


# -- Measure ----------------------------------------------------------------------------------------------------------


@contextmanager
def limited_to(cores: int) -> Iterator[None]:
    """Has the threads that are started meanwhile run on so many cores of this machine."""
    # Other systems than Linux have no such call, and measure all cores only.
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start(options: trainer.Options) -> dict[str, float]:
    """The seconds that the trainer takes from its options to its encoder."""
    # Each start is a new process with a new state.
    fresh_state()
    accelerator = Accelerator(cpu=True)
    pipeline = build_encoders("test", torch.device("cpu"), torch.float32)
    times = [time.perf_counter()]
    source = load_source(options, cache_dir=options.cache_dir)
    times.append(time.perf_counter())
    dataset, _ = load_datasets(options, accelerator, source=source)
    times.append(time.perf_counter())
    encode_datasets(options, accelerator, torch.float32, dataset, pipeline=pipeline)
    times.append(time.perf_counter())
    return {name: after - before for name, before, after in zip(("list", "check", "encodings"), times, times[1:])}


def measure(folder: Path, args: argparse.Namespace) -> Report:
    began = time.perf_counter()
    size = make_triptychs(folder / "data", args.rows, args.small, args.form)
    options = trainer.parse_args(
        [
            "--pretrained_model_name_or_path=unused",
            f"--{'dataset_name' if args.form == 'parquet' else 'train_data_dir'}={folder / 'data'}",
            f"--output_dir={folder / 'out'}",
            f"--cache_dir={folder / 'downloads'}",
            f"--resolution={16 if args.small else 512}",
            "--report_to=none",
            "--log_level=error",
        ]
    )
    about = describe(torch.device("cpu")) | {"cores": os.cpu_count(), "bytes of a picture": size}
    report = Report(args.output, about | {"making the files, s": time.perf_counter() - began})

    def add(what: str, cores: int, measured: Callable[[], dict[str, float]]) -> None:
        with limited_to(cores):
            processor = time.process_time()
            seconds = measured()
            processor = time.process_time() - processor
        total = sum(seconds.values())
        row: dict = {"what": what, "rows": args.rows, "cores": cores}
        row |= {f"{name}, s": seconds.get(name, "") for name in ("list", "check", "encodings")}
        row |= {"all, s": total, "processor, s": processor, "rows/s": args.rows / total}
        report.add(**row, **{"100,000 rows, min": total / args.rows * 1e5 / 60})

    source, findings = load_source(options, cache_dir=options.cache_dir), []

    def check() -> dict[str, float]:
        began = time.perf_counter()
        findings[:] = check_samples(source, shape=1.0, pairs=False)
        return {"check": time.perf_counter() - began}

    for cores in args.cores:
        add("check alone", cores, check)
    report.note(encodings=make_encodings(options, TriptychDataset(source, options, findings)))
    for what in ("first start", "second start"):
        add(what, max(args.cores), lambda: start(options))
    return report


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        report = measure(args.folder or Path(temporary), args)
    print(json.dumps(report.about | report.more, indent=1))
    print(report.table())


if __name__ == "__main__":
    main(parse_args())
