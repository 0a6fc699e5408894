# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Makes a folder of triptychs (visible | target | semantic) with a `metadata.jsonl`, as --train_data_dir reads it.

Three folders of pictures, matched by their names without the ending:

    python examples/make_triptychs.py --visible_dir photos --target_dir thermal --semantic_dir maps \\
        --prompt "a thermal image" --output_dir triptychs

The trainer also reads three folders of the names `visible`, `target` and `semantic` as they are. This script is for what
it does not take: views of different sizes, folders with gaps, captions in other files, and maps in other forms.

A semantic map may be a picture, which keeps its own colors (a palette PNG those of its palette, as in training). Or it
holds label numbers, of 8 or 16 bits, whose colors --palette gives: a JSON object `{"0": "#000000", "1": [255, 0, 0]}` or
a list. Panoptic segmentations in the COCO format need --panoptic_json. Their categories take the colors of --palette,
else the `color` that the file gives them, else the color map of PASCAL VOC.

Pictures are read, cropped and colored as the trainer does it. What does not match is left out, counted by reason and
listed in `skipped.jsonl`.
"""

import argparse
import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from tqdm import tqdm

from pipeline_flux_fill_semantic import PICTURE_FORMATS, read_picture
from semantic_attention import open_file
from semantic_fill.captions import as_captions, read_metadata, read_text
from semantic_fill.captions import read_captions as read_sidecar
from semantic_fill.files import printable
from semantic_fill.sources import PICTURE_ENDINGS, walk
from semantic_fill.views import Palette, are_labels, color_labels, find_labels, read_palette


class Skip(Exception):
    """Why a sample is left out. The summary counts by `reason`; `detail` says what is wrong with this sample."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


# -- Read -------------------------------------------------------------------------------------------------------------


def list_pictures(folder: Path) -> dict[str, list[Path]]:
    """The pictures below a folder by name, which is the path inside the folder without the ending."""
    found: dict[str, list[Path]] = {}
    for path in sorted(walk(folder)):
        if path.suffix.lower() in PICTURE_ENDINGS and not path.name.startswith(".") and path.is_file():
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return found


def find_picture(name: str, pictures: dict[str, list[Path]], view: str) -> Path:
    paths = pictures.get(name, [])
    if len(paths) != 1:
        detail = ", ".join(path.name for path in paths)
        raise Skip(f"several {view} pictures with one name" if paths else f"no {view} picture", detail)
    return paths[0]


def read_view(path: Path, view: str) -> PIL.Image.Image:
    try:
        return read_picture(path)
    except ValueError as error:
        raise Skip(f"{view} picture cannot be used", f"{path.name} {error}") from error


def read_labels(path: Path) -> np.ndarray:
    """The label numbers [height, width] of a map. They may have 16 bits, which `read_picture` would refuse."""
    try:
        with open_file(path) as file, PIL.Image.open(file, formats=PICTURE_FORMATS) as picture:
            if picture.mode in ("I", "I;16") and getattr(picture, "n_frames", 1) == 1:
                return np.asarray(PIL.ImageOps.exif_transpose(picture)).astype(np.int64)
        pixels = np.asarray(read_picture(path))
        if (pixels != pixels[..., :1]).any():
            raise ValueError("holds colors and no label numbers")
        return pixels[..., 0]
    # Pillow raises what its decoders raise: OSError, SyntaxError, struct.error, DecompressionBombError and others.
    except Exception as error:
        raise Skip("semantic picture cannot be used", f"{path.name} {error}") from error


def read_panoptic_ids(path: Path) -> np.ndarray:
    """The segment ids [height, width] of a COCO panoptic PNG: R + 256 G + 256**2 B."""
    return np.asarray(read_view(path, "semantic")).astype(np.int64) @ np.array([1, 256, 256**2])


def read_label_colors(path: Path) -> Palette:
    """
    The colors of label numbers.

    Raises:
        ValueError: If the file is no palette, or its names are no numbers.
    """
    palette = read_palette(path)
    if not all(name.isdecimal() for name in palette):
        raise ValueError(f"--palette {path} has to name label numbers but names {', '.join(palette)}")
    return palette


def read_captions(path: Path, lines: bool = False) -> dict[str, list[str]]:
    """
    Name -> captions from a folder of .txt files, a .json object, or a .csv or .jsonl of `file_name` and `text`.

    Args:
        lines (`bool`): Whether each line of a .txt file is a caption of its own.

    Raises:
        ValueError: If the file has another form, or names a picture twice. The message names all text files that cannot
            be read.
    """
    if path.is_dir():
        pairs, problems = [], []
        for file in sorted(file for file in walk(path) if file.suffix.lower() == ".txt" and file.is_file()):
            try:
                pairs.append((file.relative_to(path).as_posix(), read_sidecar(file, lines)))
            except ValueError as error:
                problems.append(printable(str(error)))
        if problems:
            raise ValueError("\n".join(problems))
    elif path.suffix.lower() == ".json":
        data = read_json(path)
        if not isinstance(data, dict):
            raise ValueError(f"{path} has to hold a JSON object of names and captions")
        pairs = [(name, as_captions(value)) for name, value in data.items()]
    elif path.suffix.lower() in (".csv", ".jsonl"):
        rows = read_metadata(path)
        if not all(isinstance(row.get("file_name"), str) and "text" in row for row in rows):
            raise ValueError(f"{path} has to have the columns `file_name` and `text` in every row")
        pairs = [(row["file_name"], as_captions(row["text"])) for row in rows]
    else:
        raise ValueError(f"{path} has to be a folder of .txt files or a .json, .jsonl or .csv file")
    captions: dict[str, list[str]] = {}
    for file_name, texts in pairs:
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path} has to hold texts as captions, but that of {file_name} is {str(texts)[:100]}")
        # A caption may name a picture with or without its ending.
        name = Path(file_name)
        name = name.with_suffix("") if name.suffix.lower() in PICTURE_ENDINGS | {".txt"} else name
        if (
            captions.setdefault(name.as_posix(), stripped := [text.strip() for text in texts if text.strip()])
            is not stripped
        ):
            raise ValueError(f"{path} has to name each picture once but names {name.as_posix()} twice")
    return captions


def read_json(path: Path):
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


# -- Color ------------------------------------------------------------------------------------------------------------


def voc_color(label: int) -> tuple[int, int, int]:
    """
    The color of a label in PASCAL VOC's map. Its bits, from the lowest on, become in turn the highest free bit of R, G and
    B.
    """
    channels = [0, 0, 0]
    for bit in range(24):
        channels[bit % 3] |= (label >> bit & 1) << 7 - bit // 3
    return tuple(channels)


def color(labels: np.ndarray, palette: Palette) -> PIL.Image.Image:
    """The picture of label numbers [height, width] in the colors of a palette."""
    try:
        return color_labels(labels, palette)
    except ValueError as error:
        raise Skip("labels without a color", str(error)) from error


def readable(names: Iterable[str], read: Callable[[str], Any]) -> Iterator[Any]:
    """What can be read, in turn."""
    for name in names:
        with contextlib.suppress(Skip):
            yield read(name)


def hold_labels(maps: Iterable[PIL.Image.Image]) -> bool:
    """Whether all maps hold label numbers, as the trainer tells it. The first that does not ends it."""
    some = False
    for semantic in maps:
        labels = find_labels(semantic)
        if not are_labels([labels]):
            return False
        # Maps that are all black hold nothing that colors would tell.
        some = some or labels != [0]
    return some


def panoptic_reader(annotations: Path, folder: Path, palette: Palette | None) -> Callable[[str], PIL.Image.Image]:
    """
    A function that reads the map with a name from a COCO panoptic annotation file and its folder of PNGs, colored by
    category.

    Raises:
        ValueError: If the annotation file has another form.
    """
    data = read_json(annotations)
    try:
        categories = {category["id"]: category for category in data["categories"]}
        files = {Path(entry["file_name"]).with_suffix("").as_posix(): entry for entry in data["annotations"]}
        # An annotation belongs to the picture with its image id, whose name may differ from that of the PNG.
        names = {image["id"]: Path(image["file_name"]).with_suffix("").as_posix() for image in data.get("images", [])}
        entries = files | {
            names[entry["image_id"]]: entry for entry in files.values() if entry.get("image_id") in names
        }
        segments = {
            name: (entry["file_name"], {segment["id"]: segment["category_id"] for segment in entry["segments_info"]})
            for name, entry in entries.items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{annotations} has to be a COCO panoptic annotation file; {error!r}") from error
    if palette is None:
        palette = {str(i): tuple(category.get("color") or voc_color(i)) for i, category in categories.items()}

    def read(name: str) -> PIL.Image.Image:
        if name not in segments:
            raise Skip("no annotation")
        file_name, categories_of = segments[name]
        path = folder / file_name
        # The annotations may come from anyone, and must not choose which of this machine's files are read.
        if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
            raise Skip("semantic picture outside of its folder", file_name)
        if not path.is_file():
            raise Skip("no semantic picture", file_name)
        ids = read_panoptic_ids(path)
        unknown = sorted(set(np.unique(ids).tolist()) - set(categories_of) - {0})
        if unknown:
            raise Skip("segments without an annotation", ", ".join(map(str, unknown[:10])))
        missing = sorted(set(map(str, categories_of.values())) - set(palette))
        if missing:
            raise Skip("labels without a color", ", ".join(missing[:10]))
        # The id 0 marks places that nobody labeled.
        colors = {"0": (0, 0, 0)} | {str(segment): palette[str(i)] for segment, i in categories_of.items()}
        return color(ids, colors)

    return read


# -- Compose ----------------------------------------------------------------------------------------------------------


def compose(views: dict[str, PIL.Image.Image], height: int, width: int, upscale: bool) -> PIL.Image.Image:
    """A triptych of the views `visible`, `target` and `semantic`, each resized to `height` x `width`."""
    sizes = ", ".join(f"{name} {view.width}x{view.height}" for name, view in views.items())
    ratios = [view.width / view.height for view in views.values()]
    if max(ratios) > 1.01 * min(ratios):
        raise Skip("views of different shapes", sizes)
    if not upscale and any(view.width < width or view.height < height for view in views.values()):
        raise Skip("smaller than the panel", sizes)
    triptych = PIL.Image.new("RGB", (3 * width, height))
    for index, (name, view) in enumerate(views.items()):
        method = PIL.Image.Resampling.NEAREST if name == "semantic" else PIL.Image.Resampling.LANCZOS
        triptych.paste(PIL.ImageOps.fit(view, (width, height), method), (index * width, 0))
    return triptych


def make_triptychs(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """
    Writes the triptychs, `metadata.jsonl` and `skipped.jsonl`, and returns the rows of both files.

    Raises:
        ValueError: If the palette, the captions or the annotations have the wrong form.
    """
    palette = read_label_colors(args.palette) if args.palette else None
    captions = read_captions(args.captions, args.caption_lines) if args.captions else {}
    visible, target = list_pictures(args.visible_dir), list_pictures(args.target_dir)
    if args.panoptic_json:
        read_semantic = panoptic_reader(args.panoptic_json, args.semantic_dir, palette)
        names = visible.keys() | target.keys()
    else:
        semantic = list_pictures(args.semantic_dir)
        names = visible.keys() | target.keys() | semantic.keys()

        def read_semantic(name: str) -> PIL.Image.Image:
            path = find_picture(name, semantic, "semantic")
            return read_view(path, "semantic") if palette is None else color(read_labels(path), palette)

        def read_own_labels(name: str) -> np.ndarray:
            return read_labels(find_picture(name, semantic, "semantic"))

        if palette is None and hold_labels(readable(sorted(names), read_semantic)):
            raise ValueError(
                f"All maps in --semantic_dir {args.semantic_dir} have one channel and small values: they hold label"
                " numbers, which are nearly black as colors. Pass their colors with --palette."
            )
        if palette is not None and not any(True for _ in readable(sorted(names), read_own_labels)):
            print(f"--palette {args.palette} is not used, because the maps hold colors and no label numbers")
            palette = None

    skipped = [
        {"name": name, "reason": "caption without a picture", "detail": "caption without a picture"}
        for name in sorted(captions.keys() - names)
    ]
    rows = []
    for name in tqdm(sorted(names), desc="Triptychs", disable=None):
        try:
            texts = captions.get(name) or ([args.prompt] if args.prompt else [])
            if not texts:
                raise Skip("no caption")
            views = {
                "visible": read_view(find_picture(name, visible, "visible"), "visible"),
                "target": read_view(find_picture(name, target, "target"), "target"),
                "semantic": read_semantic(name),
            }
            triptych = compose(views, args.resolution, args.width or args.resolution, args.upscale)
        except Skip as skip:
            skipped.append({"name": name, "reason": skip.reason, "detail": str(skip)})
            continue
        path = args.output_dir / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        triptych.save(path)
        rows.append({"file_name": f"{name}.png", "text": texts if len(texts) > 1 else texts[0]})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for file_name, lines in (("metadata.jsonl", rows), ("skipped.jsonl", skipped)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        # Names may hold bytes that are no text. Written like this, they are escapes of JSON.
        (args.output_dir / file_name).write_text(text, encoding="utf-8", errors="backslashreplace")
    return rows, skipped


def parse_args(input_args: list[str] | None = None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--visible_dir", type=Path, required=True, help="Folder of the visible views.")
    add("--target_dir", type=Path, required=True, help="Folder of the target views.")
    add("--semantic_dir", type=Path, required=True, help="Folder of the semantic maps.")
    add("--palette", type=Path, help="JSON file with the color of each label number or category id.")
    add("--panoptic_json", type=Path, help="COCO panoptic annotations of the PNGs in --semantic_dir.")
    add("--captions", type=Path, help="Folder of .txt files, or a .json, .jsonl or .csv file of names and captions.")
    add("--caption_lines", action="store_true", help="Each line of a .txt file is a caption of its own.")
    add("--prompt", help="Caption of every triptych that has none in --captions.")
    add("--resolution", type=int, default=512, help="Height of a panel in pixels, and its width unless --width.")
    add("--width", type=int, help="Width of a panel in pixels. Default: the resolution.")
    add(
        "--upscale",
        action="store_true",
        help="Enlarge pictures that are smaller than a panel. Without it they are left out.",
    )
    add("--output_dir", type=Path, required=True, help="Folder to write to, which has to be empty or new.")
    args = parser.parse_args(input_args)

    for name in ("visible_dir", "target_dir", "semantic_dir"):
        if not getattr(args, name).is_dir():
            parser.error(f"--{name} has to be a folder, got {getattr(args, name)}")
    for name in ("palette", "panoptic_json"):
        if getattr(args, name) is not None and not getattr(args, name).is_file():
            parser.error(f"--{name} has to be a file, got {getattr(args, name)}")
    if args.captions is not None and not args.captions.exists():
        parser.error(f"--captions has to be a folder or file, got {args.captions}")
    if args.captions is None and not (args.prompt or "").strip():
        parser.error("one of --captions and --prompt has to be given, and --prompt cannot be empty")
    for name in ("resolution", "width"):
        value = getattr(args, name)
        if value is not None and (value <= 0 or value % 16):
            parser.error(f"--{name} has to be a positive multiple of 16, got {value}")
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        parser.error(f"--output_dir has to be empty or new, got {args.output_dir}")
    return parser, args


def main(input_args: list[str] | None = None) -> int:
    """Runs the command line. The exit status is 1 if no triptych was made."""
    parser, args = parse_args(input_args)
    try:
        rows, skipped = make_triptychs(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{len(rows)} triptychs in {args.output_dir}")
    if skipped:
        print(f"{len(skipped)} left out (see {args.output_dir / 'skipped.jsonl'}):")
        for reason, count in Counter(row["reason"] for row in skipped).most_common():
            print(f"  {count} {reason}")
    return 0 if rows else 1


if __name__ == "__main__":
    raise SystemExit(main())
