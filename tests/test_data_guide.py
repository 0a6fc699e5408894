# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""docs/data.md shows trees of files, commands and messages. Each tree is made, read by its command, and compared."""

import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from accelerate import Accelerator
from datasets import Dataset, Image
from helpers import ROOT, draw_triptych, encode_picture, fresh_state, png_of_zeros, write_files

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import SEMANTIC_MODES
from semantic_fill.data import load_datasets
from semantic_fill.sources import PICTURE_ENDINGS
from semantic_fill.views import bucket_sizes


GUIDE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```text\n(.*?)```\n\n```bash\n(.*?)```", GUIDE, re.DOTALL)


# -- Trees ------------------------------------------------------------------------------------------------------------


def read_tree(text: str) -> dict[str, str]:
    """The files of a tree by path, with what stands beside them. Lines that only continue it belong to the file above."""
    files, folder, name = {}, "", ""
    for line in text.splitlines():
        inside, path, note = re.fullmatch(r"(  )?(\S+)? *(.*)", line).groups()
        if line.startswith(" " * 10):
            files[name] += "\n" + line.strip()
        elif path.endswith("/"):
            folder = path
        else:
            name = (folder if inside else "") + path
            files[name] = note
    return files


def draw_view(seed: int) -> PIL.Image.Image:
    return draw_triptych(seed).crop((32, 0, 64, 32))


def make_file(name: str, note: str, seed: int):
    """The content of a file in a tree."""
    path = Path(name)
    if path.suffix == ".parquet":
        rows = {"image": [encode_picture(draw_triptych(seed + i)) for i in (0, 1)], "text": ["a street", "a bridge"]}
        buffer = io.BytesIO()
        Dataset.from_dict({"image": [{"bytes": data} for data in rows["image"]], "text": rows["text"]}).cast_column(
            "image", Image()
        ).to_parquet(buffer)
        return buffer.getvalue()
    if path.suffix == ".tar":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for member, data in (("0001.png", encode_picture(draw_triptych(seed))), ("0001.txt", b"a street")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return buffer.getvalue()
    if path.suffix not in PICTURE_ENDINGS:
        return note
    if note == "label numbers":
        picture = PIL.Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32) % 3)
    elif note == "two views":
        picture = draw_triptych(seed).crop((0, 0, 64, 32))
    elif note == "one view" or re.search("(^|/)(visible|target|semantic)", name):
        picture = draw_view(seed)
    else:
        picture = draw_triptych(seed)
    return encode_picture(picture, {".jpg": "JPEG", ".webp": "WEBP"}.get(path.suffix, "PNG"))


def read_by_command(command: str, *more: str):
    """The data sets of a command of the guide, for views of 32x32 pixels."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == ["accelerate", "launch", "train_semantic_fill_lora.py"] and words[-1] == "..."
    options = ["--pretrained_model_name_or_path=unused", "--output_dir=out", "--cache_dir=downloads"]
    options = trainer.parse_args([*options, "--resolution=32", *words[3:-1], *more])
    fresh_state()
    return load_datasets(options, Accelerator(cpu=True), not SEMANTIC_MODES[options.semantic_mode].uses_map)


@pytest.mark.parametrize("tree, command", EXAMPLES, ids=[tree.split("\n")[0].strip("/") for tree, _ in EXAMPLES])
def test_every_tree_is_read_by_its_command(tree, command, tmp_path, monkeypatch):
    files = read_tree(tree)
    write_files(tmp_path, {name: make_file(name, note, 10 * i) for i, (name, note) in enumerate(files.items())})
    monkeypatch.chdir(tmp_path)
    train, held_out = read_by_command(command)
    data = [train] if held_out is None else [train, held_out]

    left_out = {name.partition("/")[2] for name, note in files.items() if note == "left out"}
    assert {name for dataset in data for name in dataset.source.left_out} == left_out
    pictures = {name for name in files if Path(name).suffix in PICTURE_ENDINGS}
    tables = [name for name, note in files.items() if name.endswith((".parquet", ".tar")) and note != "left out"]
    if tables:
        assert len(train) == sum(2 if name.endswith(".parquet") else 1 for name in tables)
    else:
        used = [path for dataset in data for index in range(len(dataset)) for path in dataset.source.files(index)]
        assert sorted(used) == sorted(map(Path, pictures))
    # Every caption that stands in a tree can be drawn.
    shown = {"a street"} if tables else set()
    for name, note in files.items():
        if name.endswith(".txt"):
            shown |= set(note.split("\n"))
        for line in note.split("\n") if name.endswith(".jsonl") else ():
            text = json.loads(line)["text"]
            shown |= set(text if isinstance(text, list) else [text])
    found = set().union(*(dataset.all_captions() for dataset in data))
    assert shown <= found and found - shown <= {"a street", "a bridge"}
    for dataset in data:
        views = [dataset.views(index) for index in range(len(dataset))]
        panels = {"visible", "target"} | (set() if "none" in command else set(dataset.maps))
        assert all(view.keys() == panels and view["visible"].shape == (3, 32, 32) for view in views)


def test_every_form_has_a_tree():
    assert len(EXAMPLES) == GUIDE.count("```text") == 11
    assert [tree.split("\n")[0] for tree, _ in EXAMPLES].count("triptychs/") == 2


def test_held_out_samples_are_those_of_their_folder(tmp_path, monkeypatch):
    ((tree, command),) = [example for example in EXAMPLES if "--validation_data_dir" in example[1]]
    files = read_tree(tree)
    write_files(tmp_path, {name: make_file(name, note, 10 * i) for i, (name, note) in enumerate(files.items())})
    monkeypatch.chdir(tmp_path)
    train, held_out = read_by_command(command)
    assert (train.all_captions(), held_out.all_captions()) == ({"a street"}, {"a bridge at night"})


def test_label_numbers_get_the_colors_of_the_palette(tmp_path, monkeypatch):
    ((tree, command),) = [example for example in EXAMPLES if "--palette" in example[1]]
    files = read_tree(tree)
    write_files(tmp_path, {name: make_file(name, note, 10 * i) for i, (name, note) in enumerate(files.items())})
    monkeypatch.chdir(tmp_path)
    semantic = (read_by_command(command)[0].views(0)["semantic"] * 255).round().byte()
    assert semantic[:, 0, :3].T.tolist() == [[0, 0, 0], [220, 20, 60], [0, 128, 0]]


# -- What is said -----------------------------------------------------------------------------------------------------


def test_the_line_about_the_data(tmp_path, monkeypatch):
    (line,) = re.findall(r"^    Data: (.*)$", GUIDE, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    sizes = [(512, 512), (512, 512), (640, 480)]
    for index, (width, height) in enumerate(sizes):
        picture = draw_triptych(index).resize((3 * width, height))
        write_files(Path("data"), {f"{index}.png": encode_picture(picture), f"{index}.txt": f"caption {index}"})
    write_files(Path("data"), {"notes.md": "notes"})
    command = "accelerate launch train_semantic_fill_lora.py --train_data_dir data ..."
    assert read_by_command(command, "--resolution=512")[0].summary() == line
    assert Path("out", "left_out.txt").read_text() == "notes.md\n"


def test_the_shapes_of_aspect_buckets():
    sizes = [f"{width}x{height}" for height, width in bucket_sizes(512, 512)]
    assert f"{', '.join(sizes[:-1])} and {sizes[-1]}" in " ".join(GUIDE.split())


def triptychs(count: int = 1, **texts) -> dict:
    return {f"{index:04d}.png": index for index in range(1, count + 1)} | texts


def view(seed: int = 0, size: tuple[int, int] = (32, 32)) -> bytes:
    return encode_picture(draw_view(seed).resize(size))


def views(number: str = "0001", **pictures: bytes) -> dict:
    return {f"{name}/{number}.png": pictures.get(name, view(seed)) for seed, name in enumerate(PANELS)}


PANELS = ("visible", "target", "semantic")
STREET = {"0001.txt": "a street"}
ROW = '{"file_name": "0001.png", "text": "a street"}\n'
TABLE = {"--dataset_name": "my_data", "--train_split": "test"}
NUMBERS = encode_picture(PIL.Image.fromarray(np.arange(32 * 32, dtype=np.uint8).reshape(32, 32) % 3))
FRAMES = [draw_triptych(0), draw_triptych(1)]
PROMPT = {"--instance_prompt": "a street"}
# The files and options with which each row of the guide's table comes about.
FAULTS = {
    "a folder with `train/` and `test/` side by side": ({"train/1.png": 1, "test/2.png": 2}, PROMPT),
    "a folder without pictures": ({"notes.md": "notes"}, PROMPT),
    "two of the three folders": ({"visible/1.png": view(), "target/1.png": view()}, PROMPT),
    "a split that is not there": ({"train.parquet": make_file("train.parquet", "", 0)}, TABLE),
    "a picture without a caption": (triptychs(), {}),
    "a caption without a picture": (triptychs() | STREET | {"0002.txt": "a bridge"}, {}),
    "metadata of a picture that is not there": (
        triptychs() | {"metadata.jsonl": ROW + ROW.replace("0001", "0002")},
        {},
    ),
    "a picture that the metadata leaves out": (triptychs(2) | {"metadata.jsonl": ROW}, {}),
    "different captions in two places": (triptychs() | {"metadata.jsonl": ROW, "0001.txt": "a road"}, {}),
    "two pictures for one text": (triptychs() | STREET | {"0001.jpg": 2}, {}),
    "a view without its partners": (views() | {"visible/0002.png": view(7)}, PROMPT),
    "a link to a file elsewhere": ({"0001.png": Path("elsewhere.png")}, PROMPT),
    "text that is not UTF-8": (triptychs() | {"0001.txt": "Zürich".encode("cp1252")}, PROMPT),
    "a damaged metadata file": (triptychs() | {"metadata.jsonl": ROW + "{file_name"}, {}),
    "two views where three are needed": ({"0001.png": encode_picture(draw_view(0).resize((64, 32)))}, PROMPT),
    "a width that three does not divide": ({"0001.png": encode_picture(draw_view(0).resize((100, 32)))}, PROMPT),
    "views of different sizes": (views(visible=view(0, (64, 32))), PROMPT),
    "more than 8 bits": ({"0001.png": png_of_zeros(96, 32, bits=16)}, PROMPT),
    "an animation": (
        {"0001.gif": encode_picture(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])},
        PROMPT,
    ),
    "a damaged picture": ({"0001.png": encode_picture(draw_triptych(0))[:60]}, PROMPT),
    "label numbers without a palette": (views(semantic=NUMBERS), PROMPT),
    "labels without a color": (
        views(semantic=NUMBERS) | {"palette.json": '["black", "red"]'},
        PROMPT | {"--palette": "my_data/palette.json"},
    ),
}
SAID = dict(re.findall(r"^\| (.+) \| `(.+)` \|$", GUIDE.partition("## What is refused")[2], re.MULTILINE))


def test_all_sentences_are_tried():
    assert SAID.keys() == FAULTS.keys()


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_said(fault, tmp_path, monkeypatch):
    files, options = FAULTS[fault]
    monkeypatch.chdir(tmp_path)
    links = {name: target for name, target in files.items() if isinstance(target, Path)}
    write_files(Path("my_data"), {name: content for name, content in files.items() if name not in links})
    for name, target in links.items():
        write_files(tmp_path, {target: 1})
        Path("my_data", name).symlink_to(tmp_path / target)
    options = {"--train_data_dir": "my_data"} | options if "--dataset_name" not in options else options
    command = f"accelerate launch train_semantic_fill_lora.py {shlex.join(sum(options.items(), ()))} ..."
    with pytest.raises(ValueError) as error:
        read_by_command(command)
    expected = ".*".join(map(re.escape, SAID[fault].split("...")))
    assert any(re.fullmatch(rf"(.*: )?{expected}", line.strip()) for line in str(error.value).splitlines()), (
        error.value
    )


def test_a_list_of_what_cannot_be_used(tmp_path, monkeypatch):
    (listed,) = re.findall(r"^    (\d+ samples cannot be used:\n(?:      .*\n)+)", GUIDE, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    wide = encode_picture(draw_view(0).resize((1000, 320)))
    write_files(Path("my_data"), {"0000.png": 1, "0000.txt": "a street", "0001.txt": "a street", "0002.png": wide})
    command = "accelerate launch train_semantic_fill_lora.py --train_data_dir my_data --instance_prompt x ..."
    with pytest.raises(ValueError) as error:
        read_by_command(command)
    assert [line.strip() for line in str(error.value).splitlines()] == [line.strip() for line in listed.splitlines()]
