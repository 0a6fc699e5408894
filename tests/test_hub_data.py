# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Data sets on the Hub: the rows of one split, and what is said where there are none."""

import io
import json
import tarfile

import datasets
import pytest
from helpers import ON_CPU, ROOT, draw_triptych, encode_picture
from hub_server import HubServer
from quick_python import run_python


READ = """
import json, sys
sys.path[:0] = {paths}
from helpers import read_dataset
found = []
for options in json.loads(sys.argv[1]):
    try:
        dataset = read_dataset(**options)
        views = [dataset.views(index)["target"].sum().item() for index in range(len(dataset))]
        found.append([dataset.caption(index) for index in range(len(dataset))])
        assert len(set(views)) == len(views)
    except ValueError as error:
        found.append(str(error))
print("found:", json.dumps(found))
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def read(hub, tmp_path):
    """Reads data sets in a process of its own, as on a machine that has none of them: captions, or what is said."""

    def read(*options: dict) -> list:
        code = READ.format(paths=[str(ROOT / "tests"), str(ROOT), str(ROOT / "examples")])
        env = {**hub.environment(tmp_path / "home"), **ON_CPU, "HF_HUB_OFFLINE": "0"}
        done = run_python("-c", code, json.dumps(options), env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.split("found: ")[1])

    return read


def parquet(*seeds: int) -> bytes:
    rows = {"image": [draw_triptych(seed) for seed in seeds], "text": [f"caption {seed}" for seed in seeds]}
    buffer = io.BytesIO()
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(buffer)
    return buffer.getvalue()


def shard(*seeds: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for seed in seeds:
            for name, data in (
                (f"{seed}.png", encode_picture(draw_triptych(seed))),
                (f"{seed}.txt", b"caption %d" % seed),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_one_split_of_a_data_set_on_the_hub(hub, read):
    files = {"train": parquet(1, 2), "test": parquet(3), "night": parquet(4)}
    files = {f"data/{split}-00000-of-00001.parquet": data for split, data in files.items()}
    hub.add_repo("user/tables", files, repo_type="dataset")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: b.parquet\n"
    card += "  - split: test\n    path: a.parquet\n---\n"
    files = {"README.md": card.encode(), "a.parquet": parquet(5), "b.parquet": parquet(6)}
    hub.add_repo("user/card", files, repo_type="dataset")
    hub.add_repo("user/shards", {"train-0.tar": shard(7, 8), "test-0.tar": shard(9)}, repo_type="dataset")
    hub.add_repo("user/tests", {"test.parquet": parquet(10)}, repo_type="dataset")
    web = {"image_column": "png", "caption_column": "txt"}
    found = read(
        {"dataset_name": "user/tables"},
        {"dataset_name": "user/tables", "train_split": "night"},
        {"dataset_name": "user/tables", "train_split": "day"},
        {"dataset_name": "user/card"},
        {"dataset_name": "user/shards", **web},
        {"dataset_name": "user/tests"},
        {"dataset_name": "user/none"},
    )
    expected = [["caption 1", "caption 2"], ["caption 4"], None, ["caption 6"], ["caption 7", "caption 8"], None, None]
    assert [result if isinstance(result, list) else None for result in found] == expected
    assert found[2].startswith("--dataset_name user/tables cannot be loaded: ")
    assert all(split in found[2] for split in ("day", "train", "test", "night"))
    assert "train" in found[5] and "test" in found[5] and found[6].startswith("--dataset_name user/none cannot be")


def test_a_folder_of_pictures_on_the_hub_has_to_be_downloaded(hub, read):
    """The library infers its splits from words in names, and its rows name files."""
    files = {f"{seed}.png": encode_picture(draw_triptych(seed)) for seed in range(2)}
    rows = [{"file_name": name, "text": name} for name in files]
    files["metadata.jsonl"] = "\n".join(map(json.dumps, rows)).encode()
    hub.add_repo("user/pictures", files, repo_type="dataset")
    (said,) = read({"dataset_name": "user/pictures"})
    assert said.startswith("2 samples cannot be used:\n  row 0: names a file instead of holding a picture")
    assert "Pass a folder of pictures as --train_data_dir" in said
