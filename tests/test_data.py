# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Triptychs: the sources of rows, what a row becomes, which rows are refused, and the order of samples."""

import contextlib
import io
import itertools
import json
import tarfile
import threading
import types

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from helpers import draw_triptych, encode_picture, run, write_triptychs

import train_semantic_fill_lora as trainer
from semantic_fill.data import (
    PANELS,
    ResumableBatchSampler,
    TriptychDataset,
    cut_triptych,
    load_rows,
    prefetch,
    read_palette,
    seed_of,
)
from semantic_fill.options import DataOptions


def read(**options) -> TriptychDataset:
    """A data set with views of 32 x 32 pixels."""
    options = DataOptions(**{"resolution": 32} | options)
    return TriptychDataset(load_rows(options), options)


def rewrite(folder, change) -> None:
    """Passes the list of a folder's rows through a function that changes it."""
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("\n".join(map(json.dumps, rows)))


# -- Sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "columns", "parquet", "webdataset", "listed"])
def test_data_layouts_give_the_same_views(tmp_path, layout):
    triptychs = [draw_triptych(seed) for seed in range(3)]
    expected = [torch.tensor(list(t.tobytes())).view(32, 96, 3).permute(2, 0, 1) / 255 for t in triptychs]
    folder, captions = tmp_path / "data", [f"caption {index % 2}" for index in range(3)]
    options = {"dataset_name": str(folder)}
    if layout in ("folder", "listed"):
        write_triptychs(folder, 3)
        options = {"train_data_dir": str(folder)} if layout == "folder" else options
    elif layout == "webdataset":
        folder.mkdir()
        with tarfile.open(folder / "data.tar", "w") as tar:
            for index, (triptych, caption) in enumerate(zip(triptychs, captions)):
                for suffix, content in (("png", encode_picture(triptych)), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{index}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        options |= {"image_column": "png", "caption_column": "txt"}
    else:
        folder.mkdir()
        cut = [[t.crop((i * 32, 0, i * 32 + 32, 32)) for t in triptychs] for i in range(3)]
        columns = {"image": triptychs} if layout == "parquet" else dict(zip(("photo", "thermal", "map"), cut))
        rows = datasets.Dataset.from_dict(columns | {"text": captions})
        for name in columns:
            rows = rows.cast_column(name, datasets.Image())
        rows.to_parquet(folder / "train.parquet")
        if layout == "columns":
            options |= {"visible_column": "photo", "target_column": "thermal", "semantic_column": "map"}
    dataset = read(**options)
    assert len(dataset) == 3
    for index in range(3):
        views = dataset.views(index)
        torch.testing.assert_close(torch.cat([views[name] for name in PANELS], 2), expected[index])
        assert dataset.caption(index) == captions[index]
        flipped = dataset.views(index, flip=True)
        assert all(torch.equal(flipped[name], views[name].flip(2)) for name in PANELS)


def test_only_the_first_rows_where_so_many_are_asked_for(triptych_folder):
    assert [len(read(train_data_dir=triptych_folder, max_train_samples=n)) for n in (2, 6, 100)] == [2, 6, 6]


def test_rows_can_be_a_list():
    pictures = [encode_picture(draw_triptych(seed)) for seed in range(2)]
    rows = [{"image": {"bytes": picture, "path": None}, "text": "a"} for picture in pictures]
    dataset = TriptychDataset(rows, DataOptions(train_data_dir="unused", resolution=32))
    assert len(dataset) == 2 and not torch.equal(dataset.views(0)["target"], dataset.views(1)["target"])


PICTURE = {"bytes": encode_picture(draw_triptych(0)), "path": None}


@pytest.mark.parametrize(
    "columns, options, named",
    [
        ({"image": [1, 2], "text": ["a", "b"]}, {}, "Column `image` has to hold pictures but holds"),
        ({"image": ["no such file"] * 2, "text": ["a", "b"]}, {}, "row 0: FileNotFoundError"),
        ({"picture": [1, 2], "text": ["a", "b"]}, {}, "Column `image` is not in the data set, which has ['picture', "),
        ({"image": [None, None], "caption": ["a", "b"]}, {}, "Pass --caption_column (one of ['image', 'caption'])"),
        ({"image": [None] * 2, "text": ["a", "b"]}, {"caption_column": "c"}, "Column `c` is not in the data set"),
        ({"image": [None, None], "text": ["a", "b"]}, {}, "row 1: ValueError: has no picture"),
        ({"image": [PICTURE] * 2, "text": [["a"], ["b"]]}, {}, "row 1: ValueError: has no caption in `text` (found"),
        ({"image": [PICTURE, PICTURE], "text": [1, 2]}, {}, "row 1: ValueError: has no caption in `text` (found 2)"),
        ({"image": [], "text": []}, {}, "has to hold *.parquet, *.tar (webdataset) or metadata.jsonl, but"),
    ],
)
def test_columns_that_are_missing_or_of_another_type(tmp_path, columns, options, named):
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError) as error:
        options = DataOptions(dataset_name=str(tmp_path), **options)
        TriptychDataset(load_rows(options, cache_dir=str(tmp_path / "hf")), options)
    assert named in str(error.value)


@pytest.mark.parametrize("fault", ["missing", "empty", "no metadata", "no picture", "no JSON"])
def test_folders_that_hold_no_triptychs(tmp_path, fault):
    data = tmp_path / "data"
    if fault != "missing":
        data.mkdir()
    if fault not in ("missing", "empty"):
        write_triptychs(data, 2)
    if fault == "no metadata":
        (data / "metadata.jsonl").unlink()
    if fault == "no picture":
        (data / "001.png").unlink()
    if fault == "no JSON":
        (data / "metadata.jsonl").write_text("{")
    options = DataOptions(train_data_dir=str(data), resolution=32)
    with pytest.raises(ValueError, match="--train_data_dir|--caption_column|row 1: FileNotFoundError"):
        TriptychDataset(load_rows(options, cache_dir=str(tmp_path / "hf")), options)


def test_a_data_set_that_cannot_be_had_is_named(tmp_path):
    with pytest.raises(ValueError, match="--dataset_name user/none has to be a data set that can be loaded, but: "):
        load_rows(DataOptions(dataset_name="user/none"), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=rf"--dataset_name {tmp_path} has to hold .* files but holds none"):
        load_rows(DataOptions(dataset_name=str(tmp_path)))


# -- Rows -------------------------------------------------------------------------------------------------------------


def test_bad_rows_are_listed(tmp_path):
    data = write_triptychs(tmp_path / "data", 6)
    content = (data / "000.png").read_bytes()
    (data / "001.png").write_bytes(content[: len(content) // 2])
    PIL.Image.new("RGB", (97, 32)).save(data / "002.png")
    PIL.Image.new("I;16", (96, 32)).save(data / "003.png")
    rewrite(data, lambda rows: rows[4].update(text=""))
    with pytest.raises(ValueError) as error:
        read(train_data_dir=str(data))
    message = str(error.value)
    assert message.startswith("4 of 6 rows cannot be used")
    for part in ("row 1: ", "row 2: ValueError: is 97 pixels wide", "row 3: ", "row 4: ValueError: has no caption"):
        assert part in message
    assert "row 0" not in message and "row 5" not in message


def test_a_prompt_for_samples_without_a_caption(tmp_path):
    data = write_triptychs(tmp_path / "data", 3)
    rewrite(data, lambda rows: rows[1].update(text=None))
    with pytest.raises(ValueError, match="row 1: ValueError: has no caption in `text`"):
        read(train_data_dir=str(data))
    dataset = read(train_data_dir=str(data), instance_prompt="a hill")
    assert [dataset.caption(index) for index in range(3)] == ["caption 0", "a hill", "caption 0"]
    # Without any column of captions it serves all, and it may be empty.
    rewrite(data, lambda rows: [row.pop("text") for row in rows])
    assert {read(train_data_dir=str(data), instance_prompt="").caption(index) for index in range(3)} == {""}


def test_views_of_other_sizes_are_resized_and_colors_of_the_map_are_kept(tmp_path):
    data = write_triptychs(tmp_path / "data", 1, height=48, width=80)
    views = read(train_data_dir=str(data), resolution=32, width=64).views(0)
    assert {view.shape for view in views.values()} == {(3, 32, 64)}
    assert set(views["semantic"].unique().tolist()) == {0.0, 1.0}
    original = read(train_data_dir=str(data), resolution=48, width=80).views(0)["target"]
    assert not set(views["target"].unique().tolist()) <= set(original.unique().tolist())


def test_a_triptych_is_cut_from_left_to_right():
    triptych = draw_triptych(0)
    views = cut_triptych([triptych])
    assert tuple(views) == PANELS == ("visible", "target", "semantic")
    assert np.array_equal(np.concatenate([np.asarray(view) for view in views.values()], 1), np.asarray(triptych))
    assert cut_triptych(list(views.values())) == views
    with pytest.raises(ValueError, match="is 97 pixels wide, which cannot be divided into three equal panels"):
        cut_triptych([PIL.Image.new("RGB", (97, 32))])
    with pytest.raises(ValueError, match=r"views of different sizes \(visible 4x4, target 4x5, semantic 4x4\)"):
        cut_triptych([PIL.Image.new("RGB", size) for size in ((4, 4), (4, 5), (4, 4))])


@pytest.mark.parametrize(
    "content, palette",
    [
        ('{"road": [255, 0, 0], "sky": "#0000ff", "car": "lime"}', {"road": (255, 0, 0), "sky": (0, 0, 255)}),
        ('["red", [0, 0, 255]]', {"0": (255, 0, 0), "1": (0, 0, 255)}),
        ("\ufeff[[1, 2, 3]]", {"0": (1, 2, 3)}),
    ],
)
def test_palettes(tmp_path, content, palette):
    (tmp_path / "palette.json").write_text(content)
    read = read_palette(tmp_path / "palette.json")
    assert palette.items() <= read.items() and read.get("car", (0, 255, 0)) == (0, 255, 0)


@pytest.mark.parametrize("content", ["", "3", "{}", "[]", '["no color"]', "[[1, 2]]", "[[1, 2, 256]]", '{"a": 3}'])
def test_what_is_no_palette_is_refused(tmp_path, content):
    (tmp_path / "palette.json").write_text(content)
    with pytest.raises(ValueError, match=f"--palette {tmp_path}"):
        read_palette(tmp_path / "palette.json")


def test_no_process_waits_while_another_checks_the_rows(base_folder, triptych_folder, tmp_path, monkeypatch):
    waiting, during = [], []

    @contextlib.contextmanager
    def main_process_first(accelerator):
        waiting.append(True)
        yield
        waiting.clear()

    check = TriptychDataset.check
    monkeypatch.setattr(trainer.Accelerator, "main_process_first", main_process_first)
    monkeypatch.setattr(TriptychDataset, "check", lambda self: during.append(bool(waiting)) or check(self))
    run(base_folder, tmp_path, "--max_train_steps", 1, data=triptych_folder)
    assert during == [False]


# -- Order ------------------------------------------------------------------------------------------------------------


CHANCES = {"flip": 0.5, "drop_caption": 0.3, "drop_map": 0.2}


def samples(number: int, batch_size: int = 2, **kwargs) -> list:
    """The first samples of one process."""
    sampler = ResumableBatchSampler(10, batch_size, seed=3, **CHANCES | kwargs)
    return list(itertools.islice(itertools.chain.from_iterable(sampler), number))


def test_every_sample_once_an_epoch_and_the_same_for_any_number_of_processes():
    single = samples(40)
    assert [sample.position for sample in single] == list(range(40))
    epochs = [[sample.index for sample in single[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({*map(tuple, epochs)}) == 4
    for processes, batch_size in ((2, 2), (4, 1), (2, 5), (5, 4)):
        parts = [
            samples(40 // processes, batch_size, process_index=rank, num_processes=processes)
            for rank in range(processes)
        ]
        # In each forward pass the processes take neighboring samples of the run.
        together = [
            sample
            for start in range(0, len(parts[0]), batch_size)
            for part in parts
            for sample in part[start : start + batch_size]
        ]
        assert together == single, processes


@pytest.mark.parametrize("start", [1, 7, 10, 23])
def test_a_restart_goes_on_with_the_same_samples(start):
    assert samples(40 - start, 1, start=start) == samples(40)[start:]


def test_chances_are_those_that_are_passed():
    single = samples(2000)
    for name, chance in CHANCES.items():
        assert sum(getattr(sample, name) for sample in single) / 2000 == pytest.approx(chance, abs=0.04)
    never = samples(200, **dict.fromkeys(CHANCES, 0))
    assert not any(sample.flip or sample.drop_caption or sample.drop_map for sample in never)
    assert all(sample.flip for sample in samples(200, flip=1))


def test_the_rows_of_a_step_are_those_of_all_processes():
    sampler = ResumableBatchSampler(10, 2, seed=3, process_index=1, num_processes=2, accumulation_steps=3)
    assert sampler.rows_before(24) == [sample.index for sample in samples(24)[12:]]


def test_seeds_differ_for_all_different_parts():
    parts = [("a", 1), ("a", 2), ("a", 1, 0), ("a1",), (1, "a"), (0,), (), (0.0,)]
    seeds = {seed_of(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    # A resumed run of a later version has to draw what an earlier one drew.
    assert seed_of(0, "step", 5) == 3707774027182759260


# -- Batches ahead ----------------------------------------------------------------------------------------------------


def test_on_a_cpu_a_batch_is_made_when_it_is_needed():
    made = []

    def prepare(number):
        made.append((number, threading.current_thread()))
        return f"batch {number}"

    batches = prefetch(prepare, itertools.count(), torch.device("cpu"))
    assert [next(batches), next(batches)] == ["batch 0", "batch 1"]
    assert made == [(0, threading.main_thread()), (1, threading.main_thread())]


class Recorded(torch.Tensor):
    """A tensor that notes which stream uses it."""

    def record_stream(self, stream):
        self.stream = stream


class Stream:
    """A stream of a GPU that is not there. It notes what it waits for."""

    def __init__(self, *args):
        self.waits, self.events = [], itertools.count()

    def wait_stream(self, stream):
        self.waits.append(stream)

    def wait_event(self, event):
        self.waits.append(event)

    def record_event(self):
        return self, next(self.events)


def test_on_a_gpu_batches_are_made_ahead_in_a_thread(monkeypatch):
    main, side, current = Stream(), Stream(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)

    @contextlib.contextmanager
    def stream(used):
        current.append(used)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    made, second_is_made = [], threading.Event()

    def prepare(number):
        assert current == [side]
        made.append((number, threading.current_thread()))
        if number == 1:
            second_is_made.set()
        if number == 3:
            raise ValueError("row 3")
        return types.SimpleNamespace(number=number, x_0=torch.zeros(1).as_subclass(Recorded), guidance=None)

    with contextlib.closing(prefetch(prepare, itertools.count(), torch.device("cuda"))) as batches:
        first = next(batches)
        # It is made although nobody has asked for it.
        assert second_is_made.wait(10)
        assert side.waits == [main] and main.waits == [(side, 0)] and first.x_0.stream is main
        assert [first.number, next(batches).number, next(batches).number] == [0, 1, 2]
        assert main.waits == [(side, 0), (side, 1), (side, 2)]
        with pytest.raises(ValueError, match="row 3"):
            next(batches)
    assert [number for number, _ in made][:4] == [0, 1, 2, 3]
    threads = {thread for _, thread in made}
    assert len(threads) == 1 and threading.main_thread() not in threads and not threads.pop().is_alive()
