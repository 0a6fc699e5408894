# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""`make_triptychs.py` and the trainer see the same pixels in the same pictures, whatever their kind and name."""

import json
import os
from pathlib import Path

import make_triptychs
import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest

from semantic_fill.checks import check_samples
from semantic_fill.data import TriptychDataset, read_triptychs
from semantic_fill.options import DataOptions
from semantic_fill.tables import load_source


VIEWS = ("visible", "target", "semantic")
COLORS = [[200, 30, 30], [20, 40, 220], [240, 240, 10]]


def noise(seed: int, width: int = 64, height: int = 64) -> PIL.Image.Image:
    """Noise of blocks of 8 pixels, which JPEG keeps."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return PIL.Image.fromarray(blocks).resize((width, height), PIL.Image.Resampling.NEAREST)


def swapped_profile() -> bytes:
    """An sRGB profile whose red and green primaries have changed places."""
    data = bytearray(PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes())
    for index in range(int.from_bytes(data[128:132], "big")):
        entry = 132 + 12 * index
        tag = bytes(data[entry : entry + 4])
        if tag in (b"rXYZ", b"gXYZ"):
            data[entry : entry + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}[tag]
    return bytes(data)


def turned(picture: PIL.Image.Image, path: Path, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif, quality=95)


def translucent(picture: PIL.Image.Image) -> PIL.Image.Image:
    picture = picture.convert("RGBA")
    picture.putalpha(PIL.Image.linear_gradient("L").resize(picture.size))
    return picture


def indexed_with_a_clear_color(picture: PIL.Image.Image, path: Path) -> None:
    picture.quantize(16).save(path, transparency=3)


# Kind of picture -> ending, and how a picture is saved as that.
KINDS = {
    "upright": ("jpg", lambda picture, path: turned(picture, path, 1)),
    "mirrored": ("jpg", lambda picture, path: turned(picture, path, 2)),
    "quarter turn": ("jpg", lambda picture, path: turned(picture, path, 6)),
    "turned png": ("png", lambda picture, path: turned(picture, path, 8)),
    "profile": ("png", lambda picture, path: picture.save(path, icc_profile=swapped_profile())),
    "damaged profile": ("png", lambda picture, path: picture.save(path, icc_profile=b"no profile")),
    "cmyk": ("jpg", lambda picture, path: picture.convert("CMYK").save(path, quality=95)),
    "gray": ("jpeg", lambda picture, path: picture.convert("L").save(path)),
    "gray with alpha": ("png", lambda picture, path: translucent(picture).convert("LA").save(path)),
    "alpha": ("webp", lambda picture, path: translucent(picture).save(path, lossless=True)),
    "indexed": ("png", lambda picture, path: picture.quantize(16).save(path)),
    "indexed and clear": ("png", indexed_with_a_clear_color),
    "bilevel": ("png", lambda picture, path: picture.convert("1").save(path)),
    "mpo": ("jpg", lambda picture, path: picture.save(path, "MPO", save_all=True, append_images=[noise(99)])),
    "bmp": ("bmp", lambda picture, path: picture.save(path)),
    "tiff": ("TIFF", lambda picture, path: picture.save(path)),
    "avif": ("avif", lambda picture, path: picture.save(path, quality=100)),
    "ppm": ("ppm", lambda picture, path: picture.save(path)),
    "gif": ("gif", lambda picture, path: picture.save(path)),
    "jpeg 2000": ("jp2", lambda picture, path: picture.save(path)),
    "tga": ("tga", lambda picture, path: picture.save(path)),
}


def make(data: Path, *more: str, output: str = "out") -> Path:
    folders = [f"--{view}_dir={data / view}" for view in VIEWS]
    arguments = [*folders, f"--output_dir={data.parent / output}", "--resolution=32", "--prompt=x", "--upscale", *more]
    assert make_triptychs.main(arguments) == 0
    return data.parent / output


def as_trained(folder: Path, palette: Path | None = None) -> dict[str, dict[str, np.ndarray]]:
    """The views of a folder by sample, as a run trains on them."""
    options = DataOptions(
        train_data_dir=str(folder), resolution=32, instance_prompt="x", palette=palette and str(palette)
    )
    source = load_source(options)
    dataset = TriptychDataset(source, options, check_samples(source, 1.0, pairs=False))
    samples = {}
    for row in range(len(dataset)):
        views = {
            name: (view * 255).round().byte().permute(1, 2, 0).numpy() for name, view in dataset.views(row).items()
        }
        # Three folders have no ending in their samples' names.
        samples[source.name(row).removesuffix(".png")] = views
    return samples


def assert_same(made: dict, direct: dict) -> None:
    assert made.keys() == direct.keys() and len(made) > 0
    for name, views in direct.items():
        for view, pixels in views.items():
            assert np.array_equal(made[name][view], pixels), (name, view)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (96, 64), (16, 16)])
def test_every_kind_of_picture(tmp_path, size):
    for number, (kind, (ending, save)) in enumerate(KINDS.items()):
        for place, view in enumerate(VIEWS):
            folder = tmp_path / "data" / view
            folder.mkdir(parents=True, exist_ok=True)
            save(noise(3 * number + place, *size), folder / f"{kind}.{ending}")
    made, direct = as_trained(make(tmp_path / "data")), as_trained(tmp_path / "data")
    assert made.keys() == KINDS.keys()
    assert_same(made, direct)
    # Not only do they agree: a turned photograph is turned, and a profile changes colors.
    stored = np.asarray(PIL.Image.open(tmp_path / "data" / "visible" / "profile.png").resize((32, 32), 1))
    if size == (32, 32):
        assert (direct["profile"]["visible"] != stored).any()
        mirrored = np.asarray(noise(3 * list(KINDS).index("mirrored"), *size))[:, ::-1].astype(int)
        assert np.abs(direct["mirrored"]["visible"] - mirrored).mean() < 12


def write_label_maps(data: Path, kind: str) -> Path:
    """Two samples whose maps hold the labels 0, 1 and 255. Returns their palette."""
    for index in range(2):
        for view in VIEWS:
            (data / view).mkdir(parents=True, exist_ok=True)
            noise(index).save(data / view / f"{index}.png")
        labels = np.array([0, 1, 255], np.uint8)[np.random.default_rng(index).integers(0, 3, (48, 64))]
        picture = PIL.Image.fromarray(labels)
        if kind == "RGB":
            picture = picture.convert("RGB")
        elif kind == "turned":
            picture = picture.transpose(PIL.Image.Transpose.ROTATE_90)
        for view in VIEWS[:2]:
            noise(index, 64, 48).save(data / view / f"{index}.png")
        path = data / "semantic" / f"{index}.png"
        turned(picture, path, 6) if kind == "turned" else picture.save(path)
    palette = data.parent / "palette.json"
    palette.write_text(json.dumps(dict(zip(("0", "1", "255"), COLORS))))
    return palette


@pytest.mark.parametrize("kind", ["L", "RGB", "turned"])
def test_label_numbers(tmp_path, kind):
    palette = write_label_maps(tmp_path / "data", kind)
    made = as_trained(make(tmp_path / "data", f"--palette={palette}"))
    direct = as_trained(tmp_path / "data", palette)
    assert_same(made, direct)
    for views in direct.values():
        assert {tuple(color) for color in views["semantic"].reshape(-1, 3)} == {tuple(color) for color in COLORS}
    # The page reads them alike.
    colors = {name: tuple(color) for name, color in zip(("0", "1", "255"), COLORS)}
    for views in read_triptychs(tmp_path / "data", colors):
        assert {tuple(c) for c in np.asarray(views["semantic"]).reshape(-1, 3)} == {tuple(color) for color in COLORS}


def test_label_numbers_without_a_palette_are_refused_alike(tmp_path, capsys):
    palette = write_label_maps(tmp_path / "data", "L")
    for index in range(2):
        path = tmp_path / "data" / "semantic" / f"{index}.png"
        # Without the label 255, all values are small.
        PIL.Image.fromarray(np.asarray(PIL.Image.open(path)) % 255).save(path)
    with pytest.raises(SystemExit, match="2"):
        make(tmp_path / "data")
    assert "hold label numbers" in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()
    for read in (as_trained, read_triptychs):
        with pytest.raises(ValueError, match="hold label numbers.*--palette"):
            read(tmp_path / "data")
    assert_same(as_trained(make(tmp_path / "data", f"--palette={palette}")), as_trained(tmp_path / "data", palette))
    # One map with colors tells that the others are dark by chance.
    noise(5, 64, 48).save(tmp_path / "data" / "semantic" / "1.png")
    assert_same(as_trained(make(tmp_path / "data", output="dark")), as_trained(tmp_path / "data"))


def test_names(tmp_path):
    data, names = (
        tmp_path / "data",
        ["a.b.c", "[x] *?", "50% #1", "train", "sub/val/ü", " spaced ", "-dash", "new\nline"],
    )
    # A name whose bytes are no text.
    names.append(os.fsdecode(b"caf\xe9"))
    for place, view in enumerate(VIEWS):
        for seed, name in enumerate(names):
            path = data / view / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(3 * seed + place).save(path)
        # A linked folder, an ending in capitals, and what other systems leave behind.
        (tmp_path / "elsewhere" / view).mkdir(parents=True)
        noise(70 + place).save(tmp_path / "elsewhere" / view / "linked.PNG")
        (data / view / "link").symlink_to(tmp_path / "elsewhere" / view)
        (data / view / "._a.png").write_bytes(b"no picture")
    made, direct = as_trained(make(data)), as_trained(data)
    assert direct.keys() == {*names, "link/linked"}
    assert_same(made, direct)
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {row["file_name"] for row in rows} == {f"{name}.png" for name in direct}
