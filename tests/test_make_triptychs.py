# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Triptychs out of three folders, palette maps and COCO panoptic files, all of them real files."""

import json
import shlex
from pathlib import Path

import make_triptychs
import numpy as np
import PIL.Image
import pytest
from datasets import load_dataset
from helpers import ROOT, environment, png_of_zeros
from quick_python import run_python

from semantic_fill.views import color_labels


RED, BLUE = (200, 30, 30), (20, 40, 220)


def noise(seed: int, width: int = 96, height: int = 64) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def labels(width: int = 96, height: int = 64) -> np.ndarray:
    """Label 3 on the left half, 7 on the right."""
    return np.where(np.arange(width) < width // 2, 3, 7)[None].repeat(height, 0).astype(np.uint8)


@pytest.fixture
def data(tmp_path):
    """Folders of two samples, `a` and `sub/b`, with flat two-colored maps."""
    for index, name in enumerate(("a", "sub/b")):
        for folder, picture, ending in (
            ("visible", noise(index), "jpg"),
            ("target", noise(index + 10), "png"),
            ("semantic", color_labels(labels(), {"3": RED, "7": BLUE}), "png"),
        ):
            path = tmp_path / folder / f"{name}.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    return tmp_path


def run(data: Path, *extra: str) -> int:
    folders = [f"--{view}_dir={data / view}" for view in ("visible", "target", "semantic")]
    return make_triptychs.main([*folders, f"--output_dir={data / 'out'}", "--resolution=32", *extra])


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def panels(data: Path, name: str) -> list[np.ndarray]:
    return np.split(np.asarray(PIL.Image.open(data / "out" / name)), 3, axis=1)


def test_three_folders(data):
    options = ["--prompt=a map", "--resolution=32", "--output_dir=out"]
    options += [f"--{view}_dir={view}" for view in ("visible", "target", "semantic")]
    done = run_python(make_triptychs.__file__, *options, cwd=data, env=environment(data))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["2 triptychs in out"]
    assert read_lines(data / "out" / "metadata.jsonl") == [
        {"file_name": "a.png", "text": "a map"},
        {"file_name": "sub/b.png", "text": "a map"},
    ]
    assert (data / "out" / "skipped.jsonl").read_text() == ""
    visible, target, semantic = panels(data, "sub/b.png")
    assert visible.shape == target.shape == semantic.shape == (32, 32, 3)
    # The center 64 x 64 of 96 x 64, halved.
    expected = PIL.Image.open(data / "target" / "sub" / "b.png").resize((32, 32), 1, box=(16, 0, 80, 64))
    assert np.array_equal(target, np.asarray(expected))
    assert np.array_equal(semantic[:, :16], np.broadcast_to(RED, (32, 16, 3)))
    assert np.array_equal(semantic[:, 16:], np.broadcast_to(BLUE, (32, 16, 3)))


def test_the_output_loads_as_an_image_folder(data):
    assert run(data, "--prompt=x", "--width=48") == 0
    rows = load_dataset("imagefolder", data_dir=str(data / "out"), split="train", cache_dir=str(data / "cache"))
    assert sorted(rows.column_names) == ["image", "text"] and len(rows) == 2
    assert rows[0]["image"].size == (144, 32)


@pytest.mark.parametrize("mode", ["own palette", "P", "L", "I;16"])
def test_label_maps(data, mode, capsys):
    arguments = ["--prompt=x"]
    for name in ("a", "sub/b"):
        array = labels().astype(np.uint16) if mode == "I;16" else labels()
        picture = PIL.Image.fromarray(array)
        if mode in ("own palette", "P"):
            picture = picture.convert("P")
            picture.putpalette([0, 0, 0] * 3 + [*RED] + [0, 0, 0] * 3 + [*BLUE])
        picture.save(data / "semantic" / f"{name}.png")
    if mode != "own palette":
        arguments.append(f"--palette={data / 'palette.json'}")
        # A PNG with a palette of its own has its own colors.
        colors = {"3": list(RED), "7": "#1428dc"} if mode != "P" else {"3": "lime", "7": "cyan"}
        (data / "palette.json").write_text(json.dumps(colors))
    assert run(data, *arguments) == 0
    said = f"{data / 'palette.json'} is not used, because the maps hold colors and no label numbers"
    assert (said in capsys.readouterr().out) == (mode == "P")
    semantic = panels(data, "a.png")[2]
    assert np.array_equal(np.unique(semantic.reshape(-1, 3), axis=0), sorted([RED, BLUE]))
    assert (semantic[:, :16] == RED).all()


def write_panoptic(data: Path, color: bool = True) -> Path:
    """Segments 66051 (category 3) and 9 (category 7), with a stripe of nothing; PNGs named by image id."""
    annotations, images = [], []
    for image_id, name in enumerate(("a", "sub/b")):
        (data / "semantic" / f"{name}.png").unlink()
        ids = np.where(labels() == 3, 66051, 9)
        ids[:, -20:] = 0
        png = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)
        PIL.Image.fromarray(png).save(data / "semantic" / f"{image_id:04d}.png")
        info = [{"id": 66051, "category_id": 3}, {"id": 9, "category_id": 7}]
        annotations.append({"image_id": image_id, "file_name": f"{image_id:04d}.png", "segments_info": info})
        images.append({"id": image_id, "file_name": f"{name}.jpg"})
    categories = [{"id": 3, "name": "sky", "color": list(RED)}, {"id": 7, "name": "sea", "color": list(BLUE)}]
    if not color:
        categories = [{"id": category["id"]} for category in categories]
    path = data / "panoptic.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.mark.parametrize("colors", ["file", "palette", "voc"])
def test_coco_panoptic(data, colors):
    arguments = ["--prompt=x", f"--panoptic_json={write_panoptic(data, color=colors == 'file')}"]
    expected = {"file": (RED, BLUE), "palette": ((1, 2, 3), (4, 5, 6)), "voc": ((128, 128, 0), (128, 128, 128))}[
        colors
    ]
    if colors == "palette":
        (data / "palette.json").write_text('{"3": [1, 2, 3], "7": [4, 5, 6]}')
        arguments.append(f"--palette={data / 'palette.json'}")
    assert run(data, *arguments) == 0
    semantic = panels(data, "sub/b.png")[2]
    assert (semantic[:, :16] == expected[0]).all() and (semantic[:, 16:29] == expected[1]).all()
    assert (semantic[:, 31] == 0).all()


# Files of some editors start with a byte order mark.
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("form", ["txt", "json", "jsonl", "csv"])
def test_captions(data, form, encoding):
    if form == "txt":
        path = data / "captions"
        (path / "sub").mkdir(parents=True)
        (path / "a.txt").write_text("first, “quoted”\n", encoding=encoding)
        (path / "sub" / "b.txt").write_text("second\n")
    else:
        path = data / f"captions.{form}"
        text = {
            "json": json.dumps({"a": "first, “quoted”", "sub/b.jpg": "second"}),
            "jsonl": '{"file_name": "a.jpg", "text": "first, “quoted”"}\n\n{"file_name": "sub/b", "text": "second"}',
            "csv": 'file_name,text\na.jpg,"first, “quoted”"\nsub/b.jpg,second\n',
        }[form]
        path.write_text(text, encoding=encoding)
    assert run(data, f"--captions={path}") == 0
    rows = read_lines(data / "out" / "metadata.jsonl")
    assert [row["text"] for row in rows] == ["first, “quoted”", "second"]


def test_several_captions_of_a_picture(data):
    (data / "captions.json").write_text('{"a": ["one", " two ", ""], "sub/b": ["three"]}')
    assert run(data, f"--captions={data / 'captions.json'}") == 0
    assert [row["text"] for row in read_lines(data / "out" / "metadata.jsonl")] == [["one", "two"], "three"]


def test_lines_of_a_text_are_captions(data):
    for name in ("visible/a", "visible/sub/b"):
        (data / f"{name}.txt").write_text("one\n\n  two\n")
    assert run(data, f"--captions={data / 'visible'}", "--caption_lines") == 0
    assert [row["text"] for row in read_lines(data / "out" / "metadata.jsonl")] == [["one", "two"]] * 2


def test_captions_without_pictures_are_named(data, capsys):
    (data / "captions.json").write_text('{"a": "x", "sub/b": "y", "sub/c": "z"}')
    assert run(data, f"--captions={data / 'captions.json'}") == 0
    (row,) = read_lines(data / "out" / "skipped.jsonl")
    assert (row["name"], row["reason"]) == ("sub/c", "caption without a picture")
    assert "  1 caption without a picture" in capsys.readouterr().out


def test_prompt_stands_in_for_a_missing_caption(data):
    (data / "captions.json").write_text('{"a": "mine", "sub/b": "  "}')
    assert run(data, f"--captions={data / 'captions.json'}", "--prompt=theirs") == 0
    assert [row["text"] for row in read_lines(data / "out" / "metadata.jsonl")] == ["mine", "theirs"]


def damage(data: Path, case: str) -> list[str]:
    """Spoils the sample `a` in one way; returns the arguments that go with it."""
    visible, target, semantic = data / "visible" / "a.jpg", data / "target" / "a.png", data / "semantic" / "a.png"
    if case == "no target picture":
        target.unlink()
    elif case == "no visible picture":
        visible.unlink()
    elif case == "no semantic picture":
        semantic.unlink()
    elif case == "several target pictures with one name":
        noise(3).save(target.with_suffix(".jpg"))
    elif case == "visible picture cannot be used: a.jpg cannot be read as a picture":
        visible.write_bytes(visible.read_bytes()[:200])
    elif case == "target picture cannot be used: a.webp is animated (2 frames)":
        target.unlink()
        noise(1).save(target.with_suffix(".webp"), save_all=True, append_images=[noise(2)])
    elif case == "target picture cannot be used: a.png has the mode I;16":
        PIL.Image.fromarray(labels().astype(np.uint16) * 5000).save(target)
    elif case == "target picture cannot be used: a.png has 16 bits per channel":
        target.write_bytes(png_of_zeros(96, 64, bits=16))
    elif case == "views of different shapes":
        noise(1, width=64).save(target)
    elif case == "smaller than the panel":
        for path in (visible, target, semantic):
            noise(1, 30, 20).save(path)
    elif case == "no caption":
        (data / "captions.json").write_text('{"sub/b": "text"}')
        return [f"--captions={data / 'captions.json'}"]
    elif case.startswith("semantic picture cannot be used") or case == "labels without a color":
        (data / "palette.json").write_text("[0, 0, 0, [9, 9, 9], 0, 0, 0, [8, 8, 8]]".replace("0,", '"black",'))
        PIL.Image.fromarray(labels()).save(data / "semantic" / "sub" / "b.png")
        if case == "labels without a color":
            PIL.Image.fromarray(labels() + 1).save(semantic)
        elif "truncated" in case:
            PIL.Image.fromarray(labels()).save(semantic)
            semantic.write_bytes(semantic.read_bytes()[:-40])
        elif "animated" in case:
            semantic.unlink()
            frames = [PIL.Image.fromarray(labels() + i) for i in range(2)]
            frames[0].save(semantic.with_suffix(".tif"), save_all=True, append_images=frames[1:])
        return ["--prompt=x", f"--palette={data / 'palette.json'}"]
    elif case in ("no annotation", "segments without an annotation", "semantic picture outside of its folder"):
        path = write_panoptic(data)
        content = json.loads(path.read_text())
        if case == "no annotation":
            del content["annotations"][0]
        elif case == "semantic picture outside of its folder":
            (data / "semantic" / "0000.png").rename(data / "0000.png")
            content["annotations"][0]["file_name"] = "../0000.png"
        else:
            content["annotations"][0]["segments_info"].pop()
        path.write_text(json.dumps(content))
        return ["--prompt=x", f"--panoptic_json={path}"]
    return ["--prompt=x"]


@pytest.mark.parametrize(
    "case",
    [
        "no target picture",
        "no visible picture",
        "no semantic picture",
        "several target pictures with one name",
        "visible picture cannot be used: a.jpg cannot be read as a picture",
        "target picture cannot be used: a.webp is animated (2 frames)",
        "target picture cannot be used: a.png has the mode I;16",
        "target picture cannot be used: a.png has 16 bits per channel",
        "views of different shapes",
        "smaller than the panel",
        "no caption",
        "semantic picture cannot be used: a.png holds colors and no label numbers",
        "semantic picture cannot be used: a.png cannot be read as a picture (OSError: image file is truncated",
        "semantic picture cannot be used: a.tif is animated (2 frames)",
        "labels without a color",
        "no annotation",
        "segments without an annotation",
        "semantic picture outside of its folder",
    ],
)
def test_what_does_not_match_is_left_out_and_named(data, case, capsys):
    assert run(data, *damage(data, case)) == 0
    assert [row["file_name"] for row in read_lines(data / "out" / "metadata.jsonl")] == ["sub/b.png"]
    (row,) = read_lines(data / "out" / "skipped.jsonl")
    reason = case.split(":")[0]
    assert (row["name"], row["reason"]) == ("a", reason) and row["detail"].startswith(case)
    printed = capsys.readouterr().out.splitlines()
    assert (
        printed[0].startswith("1 triptychs") and printed[1].startswith("1 left out") and printed[2] == f"  1 {reason}"
    )
    assert not (data / "out" / "a.png").exists()


def test_a_photograph_with_further_views_of_itself_is_taken(data):
    photograph = noise(0)
    photograph.save(data / "visible" / "a.jpg", "MPO", save_all=True, append_images=[noise(1)])
    with PIL.Image.open(data / "visible" / "a.jpg") as saved:
        assert saved.format == "MPO" and saved.n_frames == 2
    assert run(data, "--prompt=x") == 0
    assert len(read_lines(data / "out" / "metadata.jsonl")) == 2
    # The first view of the file is the photograph.
    expected = photograph.resize((32, 32), PIL.Image.Resampling.LANCZOS, box=(16, 0, 80, 64))
    assert np.abs(panels(data, "a.png")[0].astype(int) - np.asarray(expected)).mean() < 20


def test_small_pictures_can_be_enlarged(data):
    assert run(data, *damage(data, "smaller than the panel"), "--upscale") == 0
    assert len(read_lines(data / "out" / "metadata.jsonl")) == 2


def test_transparent_places_are_gray(data):
    clear = noise(5).convert("RGBA")
    clear.putalpha(0)
    clear.save(data / "target" / "a.png")
    assert run(data, "--prompt=x") == 0
    assert (panels(data, "a.png")[1] == 128).all()


def test_nothing_left_is_a_failure(data, capsys):
    for path in (data / "target").rglob("*.png"):
        path.unlink()
    assert run(data, "--prompt=x") == 1
    assert capsys.readouterr().out.splitlines()[0].startswith("0 triptychs")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--captions and --prompt"),
        (["--prompt= "], "--prompt"),
        (["--prompt=x", "--resolution=100"], "--resolution has to be a positive multiple of 16, got 100"),
        (["--prompt=x", "--width=-16"], "--width"),
        (["--prompt=x", "--palette=none.json"], "--palette has to be a file, got none.json"),
        (["--prompt=x", "--visible_dir=nowhere"], "--visible_dir has to be a folder, got nowhere"),
        (["--prompt=x", "--output_dir={data}/visible"], "--output_dir has to be empty or new"),
        (["--captions=none"], "--captions"),
        (["--captions={data}/visible/a.jpg"], "a.jpg has to be a folder of .txt files"),
        (["--captions={data}/wrong.json"], "wrong.json has to hold texts as captions, but that of a is [1, 2]"),
        (["--captions={data}/list.json"], "list.json has to hold a JSON object of names and captions"),
        (["--captions={data}/twice.json"], "twice.json has to name each picture once but names a twice"),
        (["--captions={data}/texts"], "a.txt is not encoded as UTF-8"),
        (["--captions={data}/wrong.csv"], "wrong.csv has to have the columns"),
        (["--captions={data}/wrong.jsonl"], "wrong.jsonl, line 1: Expecting property name"),
        (
            ["--prompt=x", "--palette={data}/wrong.json"],
            "wrong.json: the color of a has to be [red, green, blue] but is (1, 2)",
        ),
        (["--prompt=x", "--palette={data}/wrong.csv"], "wrong.csv has to hold a JSON object or list of colors"),
        (["--prompt=x", "--palette={data}/names.json"], "names.json has to name label numbers but names sky"),
        (["--prompt=x", "--panoptic_json={data}/wrong.json"], "has to be a COCO panoptic annotation file"),
    ],
)
def test_wrong_arguments_are_refused(data, arguments, message, capsys):
    (data / "wrong.json").write_text('{"a": [1, 2]}')
    (data / "names.json").write_text('{"sky": "blue"}')
    (data / "list.json").write_text('["a"]')
    (data / "twice.json").write_text('{"a.png": "x", "a.jpg": "y"}')
    (data / "texts").mkdir()
    (data / "texts" / "a.txt").write_bytes("Zürich".encode("cp1252"))
    (data / "wrong.csv").write_text("name,caption\na,b\n")
    (data / "wrong.jsonl").write_text("{file_name")
    with pytest.raises(SystemExit, match="2"):
        run(data, *(argument.format(data=data) for argument in arguments))
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not (data / "out").exists()


def test_the_commands_of_the_documentation_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "data.md").read_text().replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("python examples/make_triptychs.py ")]
    assert len(commands) == 4
    for command in commands:
        arguments = shlex.split(command)[2:]
        given = dict(zip(arguments[::2], arguments[1::2]))
        shape = {"width": 768, "height": 1024} if "--width" in given else {"width": 512, "height": 512}
        for seed, view in enumerate(("visible", "target", "semantic")):
            folder = Path(given[f"--{view}_dir"])
            folder.mkdir(exist_ok=True)
            noise(seed, **shape).save(folder / "0001.png")
        if "--palette" in given:
            PIL.Image.fromarray(labels(**shape)).save(folder / "0001.png")
            Path(given["--palette"]).write_text('{"3": "#000000", "7": [220, 20, 60]}')
        if "--panoptic_json" in given:
            ids = np.zeros((512, 512, 3), np.uint8)
            PIL.Image.fromarray(ids + np.uint8([5, 0, 0])).save(folder / "0001.png")
            segments = [{"id": 5, "category_id": 1}]
            annotations = [{"file_name": "0001.png", "image_id": 1, "segments_info": segments}]
            content = {"categories": [{"id": 1, "name": "road"}], "annotations": annotations}
            Path(given["--panoptic_json"]).write_text(json.dumps(content))
        if "--captions" in given:
            Path(given["--captions"]).write_text('{"file_name": "0001.png", "text": "a coast"}')
        assert make_triptychs.main(arguments) == 0, capsys.readouterr().out
        triptych = PIL.Image.open(Path(given["--output_dir"]) / "0001.png")
        assert triptych.size == (3 * int(given.get("--width", 512)), 512)
