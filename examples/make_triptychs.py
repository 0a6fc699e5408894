# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Makes a folder of triptychs (visible | target | semantic) with a `metadata.jsonl`, as --train_data_dir reads it.

Three folders of pictures, matched by their names without the ending:

    python examples/make_triptychs.py --visible_dir photos --target_dir thermal --semantic_dir maps \\
        --prompt "a thermal image" --output_dir triptychs

A semantic map may be a picture, which keeps its own colors (a palette PNG those of its palette). Or it holds label
numbers, whose colors --palette gives: a JSON object `{"0": "#000000", "1": [255, 0, 0]}` or a list. Panoptic
segmentations in the COCO format need --panoptic_json. Their categories take the colors of --palette, else the `color`
that the file gives them, else the color map of PASCAL VOC.

Every view is cropped about its center to the panel's shape and resized, the semantic one without mixing colors. What does
not match is left out, counted by reason and listed in `skipped.jsonl`.
"""

import argparse
import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
from tqdm import tqdm

from pipeline_flux_fill_semantic import read_picture
from semantic_fill.views import read_palette


ENDINGS = {".png", ".jpg", ".jpeg", ".mpo", ".webp", ".bmp", ".tif", ".tiff"}
Palette = dict[int, tuple[int, int, int]]


class Skip(Exception):
    """Why a sample is left out. The summary counts by `reason`; `detail` says what is wrong with this sample."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


# -- Read -------------------------------------------------------------------------------------------------------------


def list_pictures(folder: Path) -> dict[str, list[Path]]:
    """The pictures below a folder by name, which is the path inside the folder without the ending."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in ENDINGS and path.is_file():
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
    """
    The label numbers [height, width] of a map in the mode P, L, 1, I or I;16. They are the picture's own values, which
    `read_picture` would turn into colors.
    """
    try:
        with PIL.Image.open(path) as picture:
            if picture.mode not in ("P", "L", "1", "I", "I;16"):
                raise ValueError(f"has the mode {picture.mode}, which holds colors and no labels")
            if getattr(picture, "n_frames", 1) > 1:
                raise ValueError(f"is animated ({picture.n_frames} frames)")
            return np.asarray(PIL.ImageOps.exif_transpose(picture)).astype(np.int64)
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
    return {int(name): color for name, color in palette.items()}


def read_captions(path: Path) -> dict[str, str]:
    """
    Name -> caption from a folder of .txt files, a .json object, or a .csv or .jsonl of `file_name` and `text`.

    Raises:
        ValueError: If the file has another form.
    """
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        pairs = [(file.relative_to(path).as_posix(), file.read_text(encoding="utf-8")) for file in files]
    elif path.suffix.lower() == ".json":
        data = read_json(path)
        if not isinstance(data, dict) or not all(isinstance(text, str) for text in data.values()):
            raise ValueError(f"{path} has to hold a JSON object of names and captions")
        pairs = list(data.items())
    elif path.suffix.lower() in (".csv", ".jsonl"):
        is_csv = path.suffix.lower() == ".csv"
        try:
            with path.open(encoding="utf-8", newline="") as file:
                lines = csv.DictReader(file) if is_csv else map(json.loads, filter(str.strip, file))
                rows = [dict(line) for line in lines]
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not all(isinstance(row.get(column), str) for row in rows for column in ("file_name", "text")):
            raise ValueError(f"{path} has to have the columns `file_name` and `text` in every row")
        pairs = [(row["file_name"], row["text"]) for row in rows]
    else:
        raise ValueError(f"{path} has to be a folder of .txt files or a .json, .jsonl or .csv file")
    endings = ENDINGS | {".txt"}
    named = ((Path(name), text.strip()) for name, text in pairs)
    # A caption may name a picture with or without its ending.
    return {
        (name.with_suffix("") if name.suffix.lower() in endings else name).as_posix(): text for name, text in named
    }


def read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
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


def color_labels(labels: np.ndarray, palette: Palette) -> PIL.Image.Image:
    """The RGB picture of label numbers [height, width]."""
    present, inverse = np.unique(labels, return_inverse=True)
    missing = [int(label) for label in present if int(label) not in palette]
    if missing:
        raise Skip("labels without a color", ", ".join(map(str, missing[:10])))
    colors = np.array([palette[int(label)] for label in present], dtype=np.uint8)
    return PIL.Image.fromarray(colors[inverse.reshape(labels.shape)])


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
        palette = {label: tuple(category.get("color") or voc_color(label)) for label, category in categories.items()}

    def read(name: str) -> PIL.Image.Image:
        if name not in segments:
            raise Skip("no annotation")
        file_name, categories_of = segments[name]
        path = folder / file_name
        if not path.is_file():
            raise Skip("no semantic picture", file_name)
        ids = read_panoptic_ids(path)
        unknown = sorted(set(np.unique(ids).tolist()) - set(categories_of) - {0})
        if unknown:
            raise Skip("segments without an annotation", ", ".join(map(str, unknown[:10])))
        missing = sorted(set(categories_of.values()) - set(palette))
        if missing:
            raise Skip("labels without a color", ", ".join(map(str, missing[:10])))
        # The id 0 marks places that nobody labeled.
        colors = {0: (0, 0, 0)} | {segment: palette[category] for segment, category in categories_of.items()}
        return color_labels(ids, colors)

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
    captions = read_captions(args.captions) if args.captions else {}
    visible, target = list_pictures(args.visible_dir), list_pictures(args.target_dir)
    if args.panoptic_json:
        read_semantic = panoptic_reader(args.panoptic_json, args.semantic_dir, palette)
        names = visible.keys() | target.keys()
    else:
        semantic = list_pictures(args.semantic_dir)
        names = visible.keys() | target.keys() | semantic.keys()

        def read_semantic(name: str) -> PIL.Image.Image:
            path = find_picture(name, semantic, "semantic")
            return read_view(path, "semantic") if palette is None else color_labels(read_labels(path), palette)

    rows, skipped = [], []
    for name in tqdm(sorted(names), desc="Triptychs", disable=None):
        try:
            text = captions.get(name) or args.prompt
            if text is None:
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
        rows.append({"file_name": f"{name}.png", "text": text})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for file_name, lines in (("metadata.jsonl", rows), ("skipped.jsonl", skipped)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (args.output_dir / file_name).write_text(text, encoding="utf-8")
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
