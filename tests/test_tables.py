# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Parquet and webdataset files: which of them belong to a split, and what their rows hold."""

import io
import json
import os
import tarfile
from pathlib import Path, PurePath

import datasets
import pytest
import torch
from helpers import arguments, draw_triptych, encode_picture, fresh_state, read_dataset, write_files, write_triptychs

from semantic_fill.data import load_datasets
from semantic_fill.options import DataOptions
from semantic_fill.tables import TableSource, find_tables, group_tables, load_table, split_of
from semantic_fill.views import PANELS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The library keeps what it reads in a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def write_parquet(path: Path, seeds, **columns) -> None:
    """Rows of triptychs with their seeds as captions, and more columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seeds = list(seeds)
    columns = {"image": [draw_triptych(seed) for seed in seeds], "text": [str(seed) for seed in seeds]} | columns
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(buffer)
    path.write_bytes(buffer.getvalue())


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shard(path: Path, seeds) -> None:
    members = {}
    for seed in seeds:
        members |= {f"{seed}.png": encode_picture(draw_triptych(seed)), f"{seed}.txt": str(seed).encode()}
    write_tar(path, members)


WEB = {"image_column": "png", "caption_column": "txt"}


def seeds_of(folder, **options) -> list[str]:
    """The captions of a folder's rows, once their pictures are seen to be the triptychs of these seeds."""
    dataset = read_dataset(dataset_name=str(folder), **options)
    for index in range(len(dataset)):
        triptych = draw_triptych(int(dataset.caption(index)))
        expected = torch.tensor(list(triptych.tobytes())).view(32, 96, 3).permute(2, 0, 1) / 255
        views = dataset.views(index)
        torch.testing.assert_close(torch.cat([views[name] for name in PANELS], 2), expected)
    return [dataset.caption(index) for index in range(len(dataset))]


# -- Layouts ----------------------------------------------------------------------------------------------------------


def test_all_layouts_give_the_same_views(tmp_path):
    captions = [f"caption {index % 2}" for index in range(3)]
    write_triptychs(tmp_path / "folder", 3)
    members = {}
    for seed, caption in enumerate(captions):
        members |= {f"{seed}.png": encode_picture(draw_triptych(seed)), f"{seed}.txt": caption.encode()}
    write_tar(tmp_path / "web" / "data.tar", members)
    write_parquet(tmp_path / "parquet" / "train.parquet", range(3), text=captions)
    cut = [[draw_triptych(seed).crop((i * 32, 0, i * 32 + 32, 32)) for seed in range(3)] for i in range(3)]
    rows = datasets.Dataset.from_dict(dict(zip(("photo", "thermal", "map"), cut)) | {"text": captions})
    for name in ("photo", "thermal", "map"):
        rows = rows.cast_column(name, datasets.Image())
    (tmp_path / "columns").mkdir()
    rows.to_parquet(tmp_path / "columns" / "train.parquet")
    columns = {"visible_column": "photo", "target_column": "thermal", "semantic_column": "map"}
    expected = read_dataset(train_data_dir=str(tmp_path / "folder"))
    for folder, options in {"web": WEB, "parquet": {}, "columns": columns}.items():
        dataset = read_dataset(dataset_name=str(tmp_path / folder), **options)
        assert len(dataset) == 3
        for index in range(3):
            for flip in (False, True):
                views, same = dataset.views(index, flip), expected.views(index, flip)
                assert all(torch.equal(views[name], same[name]) for name in PANELS)
            assert dataset.caption(index) == captions[index] == expected.caption(index)


# The same characters as for folders of pictures.
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
    "train[test]",
]


@pytest.mark.parametrize("name", ODD)
def test_any_characters_in_names(tmp_path, name, monkeypatch):
    for other in ("set1", "qq", "runs", "my data 2", "train"):
        write_parquet(tmp_path / other / "train.parquet", [9])
    write_parquet(tmp_path / name / f"{name.replace('test', '')}.parquet", [1, 2])
    write_shard(tmp_path / f"web {name}" / f"train {name.replace('test', '')}.tar", [3, 4])
    monkeypatch.chdir(tmp_path)
    assert seeds_of(tmp_path / name) == seeds_of(f"./{name}") == ["1", "2"]
    assert seeds_of(tmp_path / f"web {name}", **WEB) == ["3", "4"]


# -- Splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, split",
    {
        "0.parquet": "train",
        "part-3.tar": "train",
        "latest-contest.parquet": "train",
        "data/train-00000-of-00002.parquet": "train",
        "data/train-00000-of-00002-0a1b2c3d.parquet": "train",
        "my_train.parquet": "train",
        "training/0.parquet": "train",
        "test-0.parquet": "test",
        "my-data.test.v2.parquet": "test",
        "TEST/train.parquet": "test",
        "default/eval/0000.parquet": "test",
        "shard val 3.tar": "validation",
        "dev.parquet": "validation",
        "data/train_sft-00000-of-00001.parquet": "train_sft",
        "data/night-00001-of-00003.parquet": "night",
        "street-test-00000-of-00001.parquet": "test",
        "test/night-00000-of-00001.parquet": "test",
        "validation-00000-of-00001.parquet": "validation",
    }.items(),
)
def test_the_split_that_a_name_tells(name, split):
    assert split_of(PurePath(name)) == split


def test_files_of_other_splits_are_never_trained_on(tmp_path):
    folder = tmp_path / "data"
    splits = {"train": [1, 2], "test": [3], "validation": [4], "night": [5]}
    for split, seeds in splits.items():
        for number, seed in enumerate(seeds):
            write_parquet(folder / "data" / f"{split}-{number:05d}-of-{len(seeds):05d}.parquet", [seed])
    write_files(folder, {"README.md": "# Streets", "notes.json": "{}", ".cache/train.parquet": ""})
    for split, seeds in splits.items():
        assert seeds_of(folder, train_split=split) == [str(seed) for seed in seeds]
    # People call splits by more than one name.
    assert seeds_of(folder, train_split="val") == ["4"] and seeds_of(folder, train_split="eval") == ["3"]
    source = load_table(DataOptions(dataset_name=str(folder)))
    others = [f"data/{name}-00000-of-00001.parquet" for name in ("night", "test", "validation")]
    assert source.left_out == [".cache", *others, "notes.json"]
    with pytest.raises(ValueError) as error:
        read_dataset(dataset_name=str(folder), train_split="day")
    missing = "--train_split day is not in the folder, which has night, test, train, validation"
    assert str(error.value) == f"--dataset_name {folder} cannot be loaded: {missing}"


def test_files_without_train_are_not_trained_on(tmp_path):
    write_parquet(tmp_path / "data" / "my_test.parquet", [1])
    with pytest.raises(ValueError, match="--train_split train is not in the folder, which has test"):
        read_dataset(dataset_name=str(tmp_path / "data"))
    write_shard(tmp_path / "web" / "val" / "0.tar", [1])
    with pytest.raises(ValueError, match="--train_split train is not in the folder, which has validation"):
        read_dataset(dataset_name=str(tmp_path / "web"), **WEB)


def test_webdataset_splits(tmp_path):
    write_shard(tmp_path / "data" / "train-000000.tar", [1, 2])
    write_shard(tmp_path / "data" / "train-000001.tar", [3])
    write_shard(tmp_path / "data" / "test-000000.tar", [4])
    assert seeds_of(tmp_path / "data", **WEB) == ["1", "2", "3"]
    assert seeds_of(tmp_path / "data", train_split="test", **WEB) == ["4"]


CARD = "---\nconfigs:\n{}\n---\n# Streets\n"


@pytest.mark.parametrize(
    "configs, split, expected",
    [
        ("- config_name: default\n  data_files: 'b/*.parquet'", "train", ["2", "4"]),
        ("- config_name: c\n  data_files: [b/test.parquet, a.parquet]", "train", ["1", "2"]),
        ("- config_name: c\n  data_files: [{split: train, path: '*.parquet'}]", "train", ["1", "3"]),
        ("- config_name: c\n  data_files: [{split: train, path: '**/*.parquet'}]", "train", ["1", "2", "3", "4"]),
        ("- config_name: c\n  data_files: [{split: train, path: 'b/**'}]", "train", ["2", "4"]),
        ("- config_name: c\n  data_files: [{split: night, path: ['[a].parquet', b/tr*]}]", "night", ["1", "4"]),
        ("- config_name: c\n  data_dir: b\n  data_files: [{split: dev, path: ./test.parquet}]", "dev", ["2"]),
        (
            "- config_name: c\n  data_files: [{split: train, path: a*}, {split: test, path: 'b/*'}]",
            "test",
            ["2", "4"],
        ),
    ],
)
def test_the_card_decides_before_names(tmp_path, configs, split, expected):
    """What the files are called is no matter then."""
    folder = tmp_path / "data [1]"
    for name, seed in {"a.parquet": 1, "b/test.parquet": 2, "test.parquet": 3, "b/train.parquet": 4}.items():
        write_parquet(folder / name, [seed])
    (folder / "README.md").write_text("\ufeff" + CARD.format(configs))
    assert sorted(seeds_of(folder, train_split=split)) == expected


def test_configurations_of_a_card(tmp_path):
    folder = tmp_path / "data"
    write_parquet(folder / "day.parquet", [1])
    write_parquet(folder / "night.parquet", [2])
    two = "- config_name: day\n  data_files: day.parquet\n- config_name: night\n  data_files: night.parquet"
    (folder / "README.md").write_text(CARD.format(two))
    with pytest.raises(
        ValueError, match="--dataset_config_name has to name a configuration of .*, which has day, night"
    ):
        read_dataset(dataset_name=str(folder))
    with pytest.raises(ValueError, match="which has day, night"):
        read_dataset(dataset_name=str(folder), dataset_config_name="dusk")
    assert seeds_of(folder, dataset_config_name="night") == ["2"]
    (folder / "README.md").write_text(CARD.format(two + "\n  default: true"))
    assert seeds_of(folder) == ["2"]


@pytest.mark.parametrize(
    "configs, said",
    [
        ("- data_files: [{split: train}]", "in a form that is not understood"),
        ("- config_name: a\n  data_files: [{split: train}]", "in a form that is not understood"),
        ("nothing", "in a form that is not understood"),
        ("- {", "in a form that is not understood"),
        ("- config_name: a\n  data_dir: b", "has `data_dir` without `data_files`"),
        (
            "- config_name: a\n  data_files: [{split: train, path: '*'}, {split: test, path: 'a*'}]",
            "the card lists a.parquet for the splits train and test",
        ),
        ("- config_name: a\n  data_files: [{split: train, path: gone}]", "has to hold"),
    ],
)
def test_a_card_that_cannot_be_followed(tmp_path, configs, said):
    write_parquet(tmp_path / "data" / "a.parquet", [1])
    (tmp_path / "data" / "README.md").write_text(CARD.format(configs))
    with pytest.raises(ValueError) as error:
        read_dataset(dataset_name=str(tmp_path / "data"))
    assert said in str(error.value)


def test_a_card_without_configurations_leaves_it_to_names(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", [1])
    write_parquet(tmp_path / "data" / "test.parquet", [2])
    for card in ("# Streets\n", "---\nlicense: mit\n---\n", "---\n---\n", ""):
        (tmp_path / "data" / "README.md").write_text(card)
        assert seeds_of(tmp_path / "data") == ["1"]


def test_tables_of_two_kinds(tmp_path):
    folder = tmp_path / "data"
    write_parquet(folder / "train.parquet", [1])
    write_shard(folder / "test.tar", [2])
    assert find_tables(folder, "train")[0] == "parquet" and find_tables(folder, "test")[0] == "webdataset"
    write_shard(folder / "train.tar", [3])
    with pytest.raises(ValueError, match="the split train has files of two kinds, such as .*parquet and .*tar"):
        read_dataset(dataset_name=str(folder))


def test_folders_without_tables(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as error:
        read_dataset(dataset_name=str(tmp_path / "empty"))
    assert str(error.value).endswith("the folder has to hold *.parquet or *.tar (webdataset) files but holds none.")
    write_triptychs(tmp_path / "pictures", 1)
    with pytest.raises(ValueError, match="holds none. Pass a folder of pictures as --train_data_dir"):
        read_dataset(dataset_name=str(tmp_path / "pictures"))
    with pytest.raises(ValueError, match="--dataset_name user/none cannot be loaded: "):
        read_dataset(dataset_name="user/none")
    (tmp_path / "empty" / "train.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=f"--dataset_name {tmp_path}/empty cannot be loaded: "):
        read_dataset(dataset_name=str(tmp_path / "empty"))


# -- Rows -------------------------------------------------------------------------------------------------------------


def test_rows_can_be_a_list():
    pictures = [encode_picture(draw_triptych(seed)) for seed in range(2)]
    rows = [{"image": {"bytes": picture, "path": None}, "text": "a"} for picture in pictures]
    options = DataOptions(train_data_dir="unused", resolution=32)
    dataset = read_dataset(options, TableSource(rows, options))
    assert len(dataset) == 2 and not torch.equal(dataset.views(0)["target"], dataset.views(1)["target"])
    assert len(TableSource(rows, options).head(1)) == 1


PICTURE = {"bytes": encode_picture(draw_triptych(0)), "path": None}


@pytest.mark.parametrize(
    "columns, options, named",
    [
        ({"image": [1, 2], "text": ["a", "b"]}, {}, "Column `image` has to hold pictures but holds"),
        ({"image": ["no such file"] * 2, "text": ["a", "b"]}, {}, "row 0: names a file instead of holding a picture"),
        ({"picture": [1, 2], "text": ["a", "b"]}, {}, "Column `image` is not in the data set, which has ['picture', "),
        (
            {"image": [PICTURE] * 2, "caption": ["a", "b"]},
            {},
            "row 1: has no caption. Name their column with --caption",
        ),
        ({"image": [None] * 2, "text": ["a", "b"]}, {"caption_column": "c"}, "Column `c` is not in the data set"),
        ({"image": [None, None], "text": ["a", "b"]}, {}, "row 1: has no picture"),
        ({"image": [None, None], "text": ["a", ""]}, {}, "row 1: has no picture; has an empty caption"),
        ({"image": [PICTURE] * 2, "text": [{"a": 1}] * 2}, {}, "row 1: has a caption that is no text ({'a': 1})"),
        ({"image": [PICTURE, PICTURE], "text": [1, 2]}, {}, "row 1: has a caption that is no text (2)"),
        ({"image": [PICTURE, PICTURE], "text": ["a", None]}, {}, "row 1: has no caption"),
        ({"image": [], "text": []}, {}, "cannot be loaded"),
    ],
)
def test_columns_that_are_missing_or_of_another_type(tmp_path, columns, options, named):
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError) as error:
        read_dataset(dataset_name=str(tmp_path / "data"), **options)
    assert named in str(error.value)


def test_rows_that_name_files_of_this_machine_are_refused(tmp_path):
    """Such a row would be painted beside and pushed."""
    draw_triptych(0).save(tmp_path / "private.png")
    os.mkfifo(tmp_path / "pipe.png")
    cells = [{"bytes": None, "path": str(tmp_path / name)} for name in ("private.png", "pipe.png")]
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict({"image": [PICTURE, *cells], "text": ["a"] * 3})
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError) as error:
        read_dataset(dataset_name=str(tmp_path / "data"))
    said = str(error.value).splitlines()
    assert said[0] == "2 samples cannot be used:" and "row 0" not in str(error.value)
    assert said[1].startswith(f"  row 1: names a file instead of holding a picture (['{tmp_path}/private.png']). Pass")


def test_captions_of_rows(tmp_path):
    captions = [["one", "two"], ["\ufeffthree"], []]
    write_parquet(tmp_path / "data" / "train.parquet", range(3), prompts=captions, text=["NA", "null", ""])
    dataset = read_dataset(dataset_name=str(tmp_path / "data"), caption_column="prompts", instance_prompt="a hill")
    assert [dataset.captions(index) for index in range(3)] == [["one", "two"], ["three"], ["a hill"]]
    assert dataset.source.captions(0) is not None and dataset.all_captions() == {"one", "two", "three", "a hill"}
    dataset = read_dataset(dataset_name=str(tmp_path / "data"), instance_prompt="")
    assert [dataset.caption(index) for index in range(3)] == ["NA", "null", ""]


def test_a_sidecar_in_a_shard_may_have_a_bom(tmp_path):
    picture = encode_picture(draw_triptych(0))
    write_tar(tmp_path / "data" / "0.tar", {"a.png": picture, "a.txt": "\ufeffé".encode()})
    assert read_dataset(dataset_name=str(tmp_path / "data"), **WEB).caption(0) == "é"
    write_tar(tmp_path / "cp1252" / "0.tar", {"a.png": picture, "a.txt": b"", "b.png": picture, "b.txt": b"\xe9"})
    with pytest.raises(ValueError, match=rf"b.txt in {tmp_path}/cp1252/0.tar is not encoded as UTF-8: "):
        read_dataset(dataset_name=str(tmp_path / "cp1252"), **WEB)


def test_pictures_in_other_columns_are_not_looked_at(tmp_path):
    (tmp_path / "data").mkdir()
    rows = datasets.Dataset.from_dict(
        {"image": [PICTURE] * 2, "preview": [{"bytes": b"no picture", "path": None}] * 2}
    )
    rows = rows.add_column("text", ["a", "b"])
    features = rows.features.copy()
    features["preview"] = features["image"] = datasets.Image()
    rows.cast(features).to_parquet(tmp_path / "data" / "train.parquet")
    assert len(read_dataset(dataset_name=str(tmp_path / "data"))) == 2


# -- Later starts -------------------------------------------------------------------------------------------------------


def test_a_later_start_decodes_no_row_of_an_unchanged_table(tmp_path, monkeypatch):
    from accelerate import Accelerator

    data, looked_at = tmp_path / "data", []
    write_parquet(data / "train.parquet", range(4))
    pictures = TableSource.pictures
    monkeypatch.setattr(TableSource, "pictures", lambda self, index: looked_at.append(index) or pictures(self, index))

    def start(*more) -> list[int]:
        fresh_state()
        looked_at.clear()
        options = arguments("unused", tmp_path / "out", "--dataset_name", data, *more)
        found = load_datasets(options, Accelerator(cpu=True))[0]
        assert [found.caption(index) for index in range(len(found))] == [str(seed) for seed in range(4)][: len(found)]
        return sorted(looked_at)

    assert start() == [0, 1, 2, 3] and start() == []
    assert start("--max_train_samples", 2) == []
    # Other columns or another table are other pictures.
    write_parquet(data / "train.parquet", [0, 1, 2, 3], other=["x"] * 4)
    assert start() == [0, 1, 2, 3] and start() == []
    # Another split has other pictures in its rows.
    write_parquet(data / "test.parquet", range(4))
    assert start("--train_split", "test") == [0, 1, 2, 3] and start() == []


def test_rows_of_other_slices_and_columns_are_remembered_apart(tmp_path):
    """On the Hub a split may be a part, such as `train[2:]`, of a table that is stored as a whole."""
    write_parquet(tmp_path / "data" / "train.parquet", range(4), other=[draw_triptych(seed) for seed in range(4)])
    rows = load_table(DataOptions(dataset_name=str(tmp_path / "data"))).rows
    options = [{"train_split": "train[:2]"}, {"train_split": "train[2:]"}, {"image_column": "text"}]
    sources = [TableSource(rows, DataOptions(dataset_name="user/data", **more)) for more in options]
    keys = {source.key(index) for source in sources for index in range(4)}
    assert len(keys) == 12 and len({source.stamp(0) for source in sources}) == 1


def test_only_the_first_rows_where_so_many_are_asked_for(tmp_path):
    from accelerate import Accelerator

    write_parquet(tmp_path / "data" / "train.parquet", range(6))
    for count, expected in ((2, 2), (6, 6), (100, 6)):
        fresh_state()
        more = ("--dataset_name", tmp_path / "data", "--max_train_samples", count)
        train, _ = load_datasets(arguments("unused", tmp_path / "out", *more), Accelerator(cpu=True))
        assert [train.caption(index) for index in range(len(train))] == [str(seed) for seed in range(expected)]


def test_tables_are_grouped_in_the_order_of_their_paths(tmp_path):
    for name in ("b/train.parquet", "a/train-10.parquet", "a/train-2.parquet", "test.parquet"):
        write_files(tmp_path / "data", {name: json.dumps(name)})
    splits, others = group_tables(tmp_path / "data")
    assert {
        split: [str(path.relative_to(tmp_path / "data")) for path in paths] for split, paths in splits.items()
    } == {
        "train": ["a/train-10.parquet", "a/train-2.parquet", "b/train.parquet"],
        "test": ["test.parquet"],
    }
    assert others == []
