# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""A folder of forty kinds of pictures and names: what a run encodes is, pixel for pixel, what plain Pillow reads."""

import io
import json
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import PIL.PngImagePlugin
from helpers import arguments, assemble, draw_triptych, pixels_of

from semantic_fill.encoding import Encoder
from semantic_fill.views import PANELS


TRANSPOSE = PIL.Image.Transpose
# What brings a picture with this EXIF orientation upright.
UPRIGHT = {
    1: None,
    2: TRANSPOSE.FLIP_LEFT_RIGHT,
    3: TRANSPOSE.ROTATE_180,
    4: TRANSPOSE.FLIP_TOP_BOTTOM,
    5: TRANSPOSE.TRANSPOSE,
    6: TRANSPOSE.ROTATE_270,
    7: TRANSPOSE.TRANSVERSE,
    8: TRANSPOSE.ROTATE_90,
}
NAMES = [
    "plain", "two words", "ünï 数据", "🎨", "e\u0301", "train-1", "test_2", "val.3", "training/4", "dev.eval", "set[1]", "q*",
    "what?", "50% #1 a::b", "a\\b", "{x},y;z", "~$HOME", "-rf", "new\nline", "tab\t", " lead", "trail ", "UPPER", "dots...",
    "v1.5.2", "semi;colon", "quote'\"", "amp&lt;", "a=b", "(1)", "plus+minus-", "x" * 120, "deep/er/and/deeper", "nul",
    "not-utf-8-\udce9", "@home", "!bang", "^caret", "comma,", "1e5", "NA", "null", "#hash", "`tick`", "|pipe|", "<angle>",
    "metadata", "visible", "c:d", "%s %d", "\\n", "．dot", "\u202eright", "zero\u200bwidth",
]  # fmt: skip


def swapped_profile() -> bytes:
    """An sRGB profile that takes red for green and green for red."""
    data = bytearray(PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes())
    red, green = data.index(b"rXYZ"), data.index(b"gXYZ")
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


def on_gray(picture: PIL.Image.Image) -> PIL.Image.Image:
    gray = PIL.Image.new("RGBA", picture.size, (128, 128, 128, 255))
    return PIL.Image.alpha_composite(gray, picture.convert("RGBA")).convert("RGB")


class Kinds:
    """Writes pictures of a triptych, each with what plain Pillow makes of it."""

    def __init__(self, folder: Path):
        self.folder, self.expected = folder, {}
        self.triptych = draw_triptych(0)
        # An alpha channel of stripes: opaque, half transparent and transparent.
        self.alpha = PIL.Image.fromarray(np.tile(np.repeat([255, 128, 0], 32).astype(np.uint8), (32, 1)))

    def write(self, ending: str, picture: PIL.Image.Image, expected: PIL.Image.Image | None = None, **options) -> None:
        """Without an `expected` picture, it is what a file of this format holds, which may lose something."""
        path = self.folder / f"{NAMES[len(self.expected)]}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **options)
        if expected is None:
            with PIL.Image.open(path) as stored:
                expected = stored.convert("RGB")
        self.expected[path.relative_to(self.folder).as_posix()] = expected

    def write_modes(self) -> None:
        rgb, alpha = self.triptych, self.alpha
        self.write(".png", rgb, rgb)
        for mode in ("L", "1"):
            self.write(".png", rgb.convert(mode), rgb.convert(mode).convert("RGB"))
        palette = rgb.quantize(16)
        self.write(".png", palette, palette.convert("RGB"))
        self.write(".gif", palette)
        self.write(".bmp", palette, palette.convert("RGB"))
        # The color of one entry is transparent.
        see_through = palette.copy()
        see_through.info["transparency"] = 3
        self.write(".png", see_through, on_gray(see_through))
        keyed = rgb.copy()
        keyed.info["transparency"] = rgb.getpixel((0, 0))
        self.write(".png", keyed, on_gray(keyed))
        for mode in ("RGBA", "LA"):
            picture = rgb.convert(mode)
            picture.putalpha(alpha)
            self.write(".png", picture, on_gray(picture))
            self.write(".tiff", picture, on_gray(picture))
        picture = rgb.convert("RGBA")
        self.write(".png", picture, rgb)
        picture.putalpha(alpha)
        self.write(".webp", picture, on_gray(picture), lossless=True, exact=True)
        self.write(".tif", rgb.convert("CMYK"))
        self.write(".tif", to_lab(rgb))
        self.write(".tif", rgb, compression="jpeg")
        self.write(".jpg", rgb.convert("CMYK"))
        self.write(".jpeg", rgb.convert("L"))

    def write_formats(self) -> None:
        rgb = self.triptych
        for ending in (".bmp", ".ppm", ".tga", ".tif"):
            self.write(ending, rgb, rgb)
        self.write(".pgm", rgb.convert("L"), rgb.convert("L").convert("RGB"))
        self.write(".pbm", rgb.convert("1"), rgb.convert("1").convert("RGB"))
        self.write(".TIFF", rgb, rgb, compression="tiff_lzw")
        self.write(".webp", rgb, rgb, lossless=True)
        self.write(".jp2", rgb, rgb, irreversible=False)
        self.write(".webp", rgb, quality=80)
        self.write(".avif", rgb, quality=80)
        self.write(".JPG", rgb, progressive=True, quality=90)
        self.write(".jfif", rgb, format="JPEG", subsampling=0)
        # A photograph of a phone has a second view of itself behind it.
        self.write(".mpo", rgb, append_images=[draw_triptych(1)], save_all=True)
        # The ending is not what the file is.
        self.write(".jpg", rgb, rgb, format="PNG")

    def write_orientations(self) -> None:
        backward = {5: TRANSPOSE.TRANSPOSE, 6: TRANSPOSE.ROTATE_90, 8: TRANSPOSE.ROTATE_270}
        for number, upright in UPRIGHT.items():
            exif = PIL.Image.Exif()
            exif[0x0112] = number
            turned = self.triptych if upright is None else self.triptych.transpose(backward.get(number, upright))
            again = turned if upright is None else turned.transpose(upright)
            assert again.tobytes() == self.triptych.tobytes()
            self.write(".png", turned, self.triptych, exif=exif)
            if number in (3, 6):
                self.write(".webp", turned, self.triptych, exif=exif, lossless=True)
                stored = io.BytesIO()
                turned.save(stored, "JPEG", quality=95)
                expected = PIL.Image.open(stored).convert("RGB").transpose(upright)
                self.write(".jpg", turned, expected, exif=exif, quality=95)

    def write_profiles(self) -> None:
        srgb = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB"))
        swapped = swapped_profile()
        profile = PIL.ImageCms.ImageCmsProfile(io.BytesIO(swapped))
        converted = PIL.ImageCms.profileToProfile(self.triptych, profile, srgb, outputMode="RGB")
        assert converted.getpixel((40, 5)) != self.triptych.getpixel((40, 5))
        self.write(".png", self.triptych, converted, icc_profile=swapped)
        self.write(".png", self.triptych, self.triptych, icc_profile=srgb.tobytes())
        self.write(".png", self.triptych, self.triptych, icc_profile=b"no profile")

    def write_sizes(self) -> None:
        """Views of another size are scaled, and of another shape cropped about their center first."""
        for width, height in ((64, 64), (48, 32), (32, 64), (16, 16), (35, 35)):
            noise = PIL.Image.effect_noise((3 * width, height), 90).convert("RGB")
            side = min(width, height)
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
            expected = PIL.Image.new("RGB", (96, 32))
            for index in range(3):
                resample = PIL.Image.Resampling.NEAREST if index == 2 else PIL.Image.Resampling.LANCZOS
                view = noise.crop((index * width, 0, (index + 1) * width, height))
                expected.paste(view.resize((32, 32), resample, box=box), (32 * index, 0))
            self.write(".png", noise, expected)


def to_lab(picture: PIL.Image.Image) -> PIL.Image.Image:
    srgb, lab = PIL.ImageCms.createProfile("sRGB"), PIL.ImageCms.createProfile("LAB")
    return PIL.ImageCms.applyTransform(picture, PIL.ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))


def test_what_is_trained_on_is_what_plain_pillow_reads(base_folder, tmp_path, monkeypatch):
    kinds = Kinds(tmp_path / "data")
    for write in (
        kinds.write_modes,
        kinds.write_formats,
        kinds.write_orientations,
        kinds.write_profiles,
        kinds.write_sizes,
    ):
        write()
    assert len(kinds.expected) >= 40 and len({Path(name).suffix for name in kinds.expected}) >= 15
    for index, name in enumerate(kinds.expected):
        if index % 2:
            (tmp_path / "data" / name).with_suffix(".txt").write_text(f"\ufeffcaption {index}", encoding="utf-8")
        else:
            line = json.dumps({"file_name": name, "text": f"caption {index}"})
            with open(tmp_path / "data" / "metadata.jsonl", "a") as file:
                file.write(line + "\n")

    encoded, read_views = {}, Encoder._views

    def note_views(self, spec):
        views = read_views(self, spec)
        encoded[self.dataset.source.name(spec.index)] = views
        return views

    monkeypatch.setattr(Encoder, "_views", note_views)
    assembled = assemble(arguments(base_folder, tmp_path / "out", data=tmp_path / "data"))
    # Files that are equal byte for byte have one encoding.
    dataset = assembled.encoder.dataset
    assert [dataset.source.name(index) for index in range(len(dataset))] == sorted(kinds.expected)
    assert encoded.keys() <= kinds.expected.keys() and len(encoded) >= 40
    for index in range(len(dataset)):
        name = dataset.source.name(index)
        expected = np.asarray(kinds.expected[name])
        assert dataset.captions(index) == [f"caption {list(kinds.expected).index(name)}"]
        read = [dataset.views(index)] + ([{n: v[0] for n, v in encoded[name].items()}] if name in encoded else [])
        for views in read:
            got = np.concatenate([pixels_of(views[panel]) for panel in PANELS], axis=1)
            assert np.array_equal(got, expected), (name, np.abs(got.astype(int) - expected).max())
