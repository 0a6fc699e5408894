# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Folders of pictures: every picture in them is used or named, whatever its name, and captions are found where they are."""

import json
import os
from pathlib import Path

import pytest
from helpers import draw_triptych, encode_picture, read_dataset, write_files

import train_semantic_fill_lora as trainer
from semantic_fill.options import DataOptions
from semantic_fill.sources import PICTURE_ENDINGS, FolderSource, list_folder


def listed(folder, pairs: bool = False, **options) -> FolderSource:
    """The samples of a folder that is all right."""
    source = list_folder(Path(folder), DataOptions(**{"train_data_dir": str(folder)} | options), pairs)
    assert source.problems == []
    return source


def names_of(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def captions_of(source) -> dict[str, list]:
    return {source.name(index): list(source.captions(index)) for index in range(len(source))}


def problems_of(folder, pairs: bool = False, **options) -> list[str]:
    return list_folder(Path(folder), DataOptions(**{"train_data_dir": str(folder)} | options), pairs).problems


def refusal(folder, pairs: bool = False, **options) -> str:
    with pytest.raises(ValueError) as error:
        list_folder(Path(folder), DataOptions(**{"train_data_dir": str(folder)} | options), pairs)
    return str(error.value)


def lines(*rows: dict) -> str:
    return "\n".join(map(json.dumps, rows))


# -- Names ------------------------------------------------------------------------------------------------------------

PROMPT = {"instance_prompt": "a hill"}
WORDS = ["a.png", "dev.png", "my test set/1.png", "test_1.png", "train-1.png", "training/eval.png", "val.png"]
# The last one is no UTF-8. A file may have any bytes but "/" and zero in its name.
ODD = [
    "set[1]",
    "q*",
    "run?",
    "my data [v2]",
    "50% #1 a::b",
    " a\nb\t",
    "ünï 数据 🎨",
    "a\\b",
    "{x},~$HOME",
    "-o",
    "x\udcffy",
]


def test_words_in_names_decide_nothing(tmp_path):
    for number, parent in enumerate(("plain", "train", "test", "validation data")):
        folder = write_files(tmp_path / parent, {name: number for name in WORDS})
        assert names_of(listed(folder, **PROMPT)) == WORDS
        assert len(read_dataset(train_data_dir=str(folder), **PROMPT)) == len(WORDS)


@pytest.mark.parametrize("name", ODD)
def test_any_characters_in_names(tmp_path, name, monkeypatch):
    """Also beside a folder that the name would match as a pattern, and given as a path from where the user is."""
    write_files(tmp_path, {f"{other}/{number}.png": 5 for number in range(2) for other in ("set1", "qq", "runs")})
    folder = write_files(tmp_path / name, {f"{name}.png": 0, f"{name}.txt": "one", f"sub {name}/{name}.jpg": 1})
    (folder / f"sub {name}" / "metadata.jsonl").write_text(lines({"file_name": f"{name}.jpg", "text": "two"}))
    monkeypatch.chdir(tmp_path)
    for given in (str(folder), f"./{name}", f"set1/../{name}"):
        options = trainer.parse_args(
            ["--pretrained_model_name_or_path=x", f"--train_data_dir={given}", "--resolution=32"]
        )
        dataset = read_dataset(options)
        captions = {dataset.source.name(index): dataset.caption(index) for index in range(2)}
        assert captions == {f"{name}.png": "one", f"sub {name}/{name}.jpg": "two"}
        assert dataset.views(0)["target"].shape == (3, 32, 32)
    monkeypatch.chdir(folder)
    assert len(listed(".")) == 2


def test_the_order_is_that_of_the_paths(tmp_path):
    names = ["10.png", "2.png", "B.png", "a-b/1.png", "a/1.png", "a/2.png", "a/b/0.png", "é.png"]
    folder = write_files(tmp_path / "data", {name: 0 for name in reversed(names)})
    assert names_of(listed(folder, **PROMPT)) == names
    # The order of the metadata decides nothing.
    (folder / "metadata.jsonl").write_text(lines(*({"file_name": name, "text": name} for name in reversed(names))))
    assert captions_of(listed(folder)) == {name: [name] for name in names}
    assert names_of(listed(folder)) == names


def test_accents_in_either_form_are_the_same_name(tmp_path):
    """macOS, archives and network drives turn one form into the other."""
    one, two = "caf\xe9", "cafe\u0301"
    rows = [{"file_name": f"a/{two}.png", "text": "metadata"}]
    files = {f"a/{one}.png": 0, f"b/{two}.png": 1, f"b/{one}.txt": "beside", "metadata.jsonl": lines(*rows)}
    folder = write_files(tmp_path / "data", files)
    assert captions_of(listed(folder)) == {f"a/{one}.png": ["metadata"], f"b/{two}.png": ["beside"]}
    # Where a folder holds both forms, each is its own picture.
    write_files(folder, {f"a/{two}.png": 2})
    rows.append({"file_name": f"a/{one}.png", "text": "the other"})
    (folder / "metadata.jsonl").write_text(lines(*rows))
    assert captions_of(listed(folder))[f"a/{one}.png"] == ["the other"]


def test_all_formats_of_pictures(tmp_path):
    forms = {"avif", "bmp", "gif", "jpg", "jpeg", "jp2", "mpo", "pgm", "png", "ppm", "tga", "tif", "tiff", "webp"}
    assert {f".{form}" for form in forms} <= PICTURE_ENDINGS
    folder = write_files(tmp_path / "data", {f"{form}.{form}": 0 for form in forms} | {"upper.PNG": 1})
    dataset = read_dataset(train_data_dir=str(folder), **PROMPT)
    assert names_of(dataset.source) == sorted([*(f"{form}.{form}" for form in forms), "upper.PNG"])
    assert all(dataset.views(index)["target"].shape == (3, 32, 32) for index in range(len(dataset)))


def test_other_files_are_named(tmp_path):
    files = {"a.png": 0, "photo.heic": "no picture", "sub/notes.pdf": "", "captions.json": "{}", "._a.png": b"\0\5"}
    folder = write_files(
        tmp_path / "data", files | {".git/a.png": 1, "README.md": "", "Thumbs.db": "", ".DS_Store": ""}
    )
    source = listed(folder, **PROMPT)
    assert names_of(source) == ["a.png"]
    assert source.left_out == ["._a.png", ".git", "captions.json", "photo.heic", "sub/notes.pdf"]
    # The metadata may name a picture of any ending, which is not left out then.
    (folder / "photo.heic").write_bytes(encode_picture(draw_triptych(0)))
    names = [{"file_name": name, "text": "b"} for name in ("a.png", "photo.heic", ".git/a.png")]
    (folder / "metadata.jsonl").write_text(lines(*names))
    source = listed(folder)
    assert names_of(source) == [".git/a.png", "a.png", "photo.heic"]
    assert source.left_out == ["._a.png", ".git", "captions.json", "sub/notes.pdf"]


# -- Links and what is no file ------------------------------------------------------------------------------------------


def test_linked_folders_are_read_once(tmp_path):
    metadata = {"metadata.jsonl": lines({"file_name": "1.png", "text": "here"})}
    folder = write_files(
        tmp_path / "data", {f"x/{name}": content for name, content in {"1.png": 0, **metadata}.items()}
    )
    write_files(tmp_path / "elsewhere", {"1.png": 1, **metadata})
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "c").symlink_to(tmp_path / "elsewhere")
    # Links to what is listed anyway, to the folder itself and to those around it would go round in circles.
    (folder / "a").symlink_to(folder / "x")
    (folder / "x" / "loop").symlink_to(folder)
    (folder / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere" / "back").symlink_to(folder / "x")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    source = listed(folder)
    assert captions_of(source) == {"b/1.png": ["here"], "x/1.png": ["here"]} and source.left_out == ["up"]
    # The folder can be a link itself, and a picture too.
    (tmp_path / "link").symlink_to(folder)
    (folder / "x" / "2.png").symlink_to(tmp_path / "elsewhere" / "1.png")
    assert names_of(listed(tmp_path / "link", **PROMPT)) == ["b/1.png", "x/1.png", "x/2.png"]


def test_what_is_no_file_is_named_and_not_opened(tmp_path):
    folder = write_files(tmp_path / "data", {"a.png": 0})
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "a.txt")
    os.mkfifo(folder / "metadata.csv")
    (folder / "zeros.png").symlink_to("/dev/zero")
    (folder / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (folder / "circle").symlink_to(folder / "circle")
    problems = problems_of(folder, **PROMPT)
    names = ["a.txt", "metadata.csv", "nowhere.png", "pipe.png", "zeros.png"]
    assert sorted(problems) == [f"{name}: is no regular file" for name in names]


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    folder = write_files(tmp_path / "data", {"a/1.png": 0, "b/1.png": 0})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(folder, **PROMPT) == f"{folder / 'b'} cannot be listed: Permission denied"


# -- Splits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first, second", [("train", "test"), ("Train", "VAL"), ("training", "testing"), ("val", "test"), ("train", "eval")]
)
@pytest.mark.parametrize("place", ["", "images/rgb/"])
def test_splits_side_by_side_are_refused(tmp_path, first, second, place):
    folder = write_files(tmp_path / "data", {f"{place}{first}/a/1.png": 0, f"{place}{second}/1.png": 1, "0.png": 2})
    message = refusal(folder, **PROMPT)
    assert f"--train_data_dir {folder} holds several splits side by side" in message
    for name in (first, second):
        path = folder / place / name
        assert str(path) in message and len(listed(path, **PROMPT)) == 1


def test_splits_in_the_folders_of_views_are_refused(tmp_path):
    files = {f"{view}/{split}/1.png": 0 for view in ("visible", "target", "semantic") for split in ("train", "test")}
    folder = write_files(tmp_path / "data", files)
    message = refusal(folder, **PROMPT)
    assert f"{folder / 'visible' / 'test'} or {folder / 'visible' / 'train'}" in message


def test_one_split_or_one_without_pictures_is_no_choice(tmp_path):
    folder = write_files(tmp_path / "data", {"train/1.png": 0, "other/1.png": 1, "test/list.json": "[]"})
    source = listed(folder, **PROMPT)
    assert names_of(source) == ["other/1.png", "train/1.png"] and source.left_out == ["test/list.json"]


# -- Text files beside pictures -----------------------------------------------------------------------------------------


def test_sidecars_come_before_the_instance_prompt(tmp_path):
    files = {"1.png": 0, "1.txt": "first\n", "sub/2.JPG": b"", "sub/2.TXT": " second line\r\nand third ", "3.png": 1}
    folder = write_files(tmp_path / "data", files)
    expected = {"1.png": ["first"], "3.png": ["a hill"], "sub/2.JPG": ["second line\nand third"]}
    assert captions_of(listed(folder, **PROMPT)) == expected
    source = listed(folder)
    with pytest.raises(ValueError, match="has no caption"):
        source.captions(1)


@pytest.mark.parametrize("caption", ["NA", "null", "ünï 数据", "two\u2028lines", "a, b", '"quoted"'])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_captions_are_taken_as_they_are(tmp_path, caption, bom, form):
    if form == "txt":
        files = {"1.txt": bom + caption}
    elif form == "jsonl":
        files = {"metadata.jsonl": bom + json.dumps({"file_name": "1.png", "text": caption}, ensure_ascii=False)}
    else:
        files = {"metadata.csv": bom + 'file_name,text\n1.png,"' + caption.replace('"', '""') + '"\n'}
    folder = write_files(tmp_path / "data", {"1.png": 0} | files)
    assert captions_of(listed(folder)) == {"1.png": [caption]}


def test_half_a_character_is_no_text(tmp_path):
    """JSON can hold what no encoder of prompts takes."""
    files = {"1.png": 0, "metadata.jsonl": '{"file_name": "1.png", "text": "a \\ud83c b"}'}
    with pytest.raises(ValueError) as error:
        read_dataset(train_data_dir=str(write_files(tmp_path / "data", files)))
    assert r"1.png: has a caption with half a character ('a \ud83c b')" in str(error.value)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
@pytest.mark.parametrize("name", ["1.txt", "metadata.jsonl", "metadata.csv"])
def test_text_that_is_not_utf_8_is_named(tmp_path, encoding, name):
    folder = write_files(tmp_path / "data", {"1.png": 0, name: "file_name,text é".encode(encoding)})
    try:
        said = str(problems_of(folder))
    except ValueError as error:
        said = str(error)
    assert str(folder / name) in said and "is not encoded as UTF-8" in said


@pytest.mark.parametrize("text", ["", "\ufeff", " \n\t\n"])
@pytest.mark.parametrize("options", [{}, PROMPT, {"caption_lines": True}, {"caption_lines": True} | PROMPT])
def test_an_empty_sidecar_is_no_caption(tmp_path, text, options):
    """Whoever wrote the file may have meant another one, so that not even --instance_prompt takes its place."""
    folder = write_files(tmp_path / "data", {"1.png": 0, "1.txt": text})
    source = listed(folder, **options)
    with pytest.raises(ValueError, match="has an empty caption"):
        source.captions(0)
    assert listed(folder, instance_prompt="").captions(0) == [""]


def test_each_line_can_be_a_caption(tmp_path):
    folder = write_files(tmp_path / "data", {"1.png": 0, "1.txt": "\ufeffone\r\n\n  two \nthree\u2028four"})
    assert captions_of(listed(folder, caption_lines=True)) == {"1.png": ["one", "two", "three\u2028four"]}
    assert captions_of(listed(folder)) == {"1.png": ["one\n\n  two \nthree\u2028four"]}


def test_texts_and_pictures_without_each_other(tmp_path):
    folder = write_files(tmp_path / "data", {"1.png": 0, "2.txt": "lost", "3.png": 1, "3.jpg": 1, "3.txt": "which?"})
    assert problems_of(folder, **PROMPT) == [
        "3.png: differs from 3.jpg in its ending only, and 3.txt fits both",
        "2.txt: is a caption without a picture",
    ]
    with pytest.raises(ValueError) as error:
        read_dataset(train_data_dir=str(folder))
    said = str(error.value).splitlines()
    assert said[0].startswith("3 ") and "  2.txt: is a caption without a picture" in said
    assert any(line.startswith("  1.png: has no caption") for line in said)
    (folder / "1.txt").write_text("one")
    (folder / "1.TXT").write_text("two")
    assert "1.txt: is one of two text files for the same picture" in problems_of(folder)
    (folder / "1.TXT").unlink()
    # Without a caption between them they are two pictures.
    (folder / "3.txt").unlink()
    (folder / "2.txt").unlink()
    assert names_of(listed(folder, **PROMPT)) == ["1.png", "3.jpg", "3.png"]


# -- Metadata -----------------------------------------------------------------------------------------------------------


def test_metadata_of_every_folder_and_form(tmp_path):
    import pyarrow
    import pyarrow.parquet

    files = {
        "0.png": 0,
        "a/1.png": 1,
        "b/c/2.png": 2,
        "d/3.png": 3,
        "metadata.jsonl": lines({"file_name": "0.png", "text": ["one", "two"]}) + "\n\n",
        "a/metadata.csv": 'text,file_name\n"with, a comma\nand a line",./1.png\n',
        "b/metadata.jsonl": lines({"file_name": "c/2.png", "text": "below", "more": 1}),
    }
    folder = write_files(tmp_path / "data", files)
    pyarrow.parquet.write_table(
        pyarrow.table({"file_name": ["3.png"], "text": ["table"]}), folder / "d/metadata.parquet"
    )
    expected = {"0.png": ["one", "two"], "a/1.png": ["with, a comma\nand a line"], "b/c/2.png": ["below"]}
    assert captions_of(listed(folder)) == expected | {"d/3.png": ["table"]}
    # A path from the root is fine where it leads into the folder.
    (folder / "d/metadata.parquet").unlink()
    (folder / "d/metadata.jsonl").write_text(lines({"file_name": str(folder / "d/3.png"), "text": "absolute"}))
    assert captions_of(listed(folder)) == expected | {"d/3.png": ["absolute"]}


def test_an_empty_cell_is_no_caption_but_every_word_is(tmp_path):
    words = ["NA", "N/A", "null", "NULL", "nan", "None", "true", "1", ""]
    rows = "".join(f"{index}.png,{word}\n" for index, word in enumerate(words))
    files = {f"{index}.png": 0 for index in range(len(words))} | {"metadata.csv": f"file_name,text\n{rows}"}
    folder = write_files(tmp_path / "data", files)
    captions = [captions for captions in captions_of(listed(folder, **PROMPT)).values()]
    assert captions == [[word] for word in words[:-1]] + [["a hill"]]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("metadata.jsonl", '{"file_name": "1.png", "text": "a"}\n{"file_name"', "line 2: "),
        ("metadata.jsonl", '\n\n["1.png"]', "line 3: has to be a JSON object"),
        ("metadata.jsonl", "[" * 100_000, "line 1: "),
        ("metadata.csv", "file_name,text\n1.png,a, b\n", "line 2: has 3 cells, but the first line has 2"),
        ("metadata.csv", "file_name,text,more\n1.png,a,b\n1.png,a\n", "line 3: has 2 cells, but the first line has 3"),
        ("metadata.csv", 'file_name,text\n1.png,"a\n1.png,b\n', "line 3: unexpected end of data"),
        ("metadata.csv", f"file_name,text\n1.png,{'a' * 200_000}\n", "line 2: field larger than field limit"),
        ("metadata.parquet", "no table", "cannot be read: "),
    ],
)
def test_damaged_metadata_is_named(tmp_path, name, content, said):
    folder = write_files(tmp_path / "data", {"1.png": 0, name: content})
    message = refusal(folder, **PROMPT)
    assert message.startswith(str(folder / name)) and said in message


def test_metadata_and_pictures_without_each_other(tmp_path):
    outside = write_files(tmp_path, {"secret.png": 5}) / "secret.png"
    rows = [
        {"file_name": "1.png", "text": "a"},
        {"file_name": "1.png", "text": "again"},
        {"file_name": "gone.png", "text": "a"},
        {"file_name": "../secret.png", "text": "a"},
        {"file_name": str(outside), "text": "a"},
        {"file_name": "sub", "text": "a"},
        {"text": "a"},
        {"file_name": 7},
    ]
    folder = write_files(tmp_path / "data", {"1.png": 0, "sub/2.png": 1, "metadata.jsonl": lines(*rows)})
    lost = [f"{name}: is named by the metadata but is no file in the folder" for name in ("gone.png", "sub")]
    lost += ["../secret.png: is named by the metadata but is no file in the folder"] * 2
    problems = problems_of(folder)
    assert sorted(problems) == sorted(
        [
            *lost,
            "1.png: is named twice by the metadata",
            "metadata.jsonl: a row names no picture in file_name: {'text': 'a'}",
            "metadata.jsonl: a row names no picture in file_name: {'file_name': 7}",
            "sub/2.png: is not named by the metadata and has no caption of its own",
        ]
    )


def test_a_caption_column_has_to_be_there(tmp_path):
    rows = [{"file_name": "1.png", "prompt": "a", "text": "b"}, {"file_name": "2.png", "text": "c"}]
    folder = write_files(tmp_path / "data", {"1.png": 0, "2.png": 1, "metadata.jsonl": lines(*rows)})
    assert captions_of(listed(folder)) == {"1.png": ["b"], "2.png": ["c"]}
    (problem,) = problems_of(folder, caption_column="prompt", **PROMPT)
    assert problem == "2.png: has no `prompt` in metadata.jsonl, but ['file_name', 'text']"
    (folder / "metadata.jsonl").write_text(lines(rows[0], rows[1] | {"prompt": None}))
    assert captions_of(listed(folder, caption_column="prompt", **PROMPT)) == {"1.png": ["a"], "2.png": ["a hill"]}


def test_captions_in_two_places_have_to_agree(tmp_path):
    rows = [{"file_name": f"{index}.png", "text": "a"} for index in range(2)] + [{"file_name": "2.png"}]
    files = {"0.png": 0, "1.png": 1, "2.png": 2, "3.png": 3, "metadata.jsonl": lines(*rows)}
    folder = write_files(tmp_path / "data", files | {"1.txt": "a", "2.txt": "b", "3.txt": "c"})
    assert list(captions_of(listed(folder)).values()) == [["a"], ["a"], ["b"], ["c"]]
    (folder / "1.txt").write_text("another")
    assert problems_of(folder) == ["1.png: has different captions in two places, ['a', 'another']"]


def test_columns_of_three_pictures(tmp_path):
    columns = {f"{view}_column": view for view in ("visible", "target", "semantic")}
    rows = [{f"{view}_file_name": f"{view}/{i}.png" for view in ("visible", "target", "semantic")} for i in (1, 0)]
    rows[1] = {view: rows[1][f"{view}_file_name"] for view in ("visible", "target", "semantic")} | {"text": "from row"}
    files = {f"{view}/{i}.png": i for view in ("visible", "target", "semantic") for i in range(3)}
    folder = write_files(tmp_path / "data", files | {"metadata.jsonl": lines(*rows), "visible/1.txt": "beside"})
    source = listed(folder, **columns)
    assert captions_of(source) == {"visible/0.png": ["from row"], "visible/1.png": ["beside"]}
    assert [[path.parent.name for path in source.files(i)] for i in range(2)] == [
        ["visible", "target", "semantic"]
    ] * 2
    assert source.left_out == ["semantic/2.png", "target/2.png", "visible/2.png"]
    (folder / "target/1.txt").write_text("beside another view")
    assert problems_of(folder, **columns) == ["target/1.txt: is a caption without a picture"]
    (folder / "metadata.jsonl").unlink()
    assert "--visible_column needs a metadata file" in refusal(folder, **columns)


# -- Folders without samples --------------------------------------------------------------------------------------------


def test_folders_that_hold_no_pictures(tmp_path):
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "tables", {"train.parquet": "", "metadata.jsonl": ""})
    assert refusal(tmp_path / "gone").endswith("has to be a folder of pictures, but there is no such folder.")
    assert refusal(tmp_path / "empty") == f"--train_data_dir {tmp_path / 'empty'} has to hold pictures but holds none."
    assert refusal(tmp_path / "tables").endswith("holds none. Pass tables as --dataset_name.")
    (tmp_path / "empty" / "1.txt").write_text("a")
    assert problems_of(tmp_path / "empty") == ["1.txt: is a caption without a picture"]
