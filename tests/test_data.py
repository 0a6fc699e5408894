# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What a sample becomes, what the check finds, and what a run says about its data."""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from helpers import (
    arguments,
    assemble,
    draw_triptych,
    encode_picture,
    load_data,
    pixels_of,
    read_dataset,
    run,
    sample_names,
    write_files,
    write_triptychs,
)

import train_semantic_fill_lora as trainer
from semantic_fill import checks
from semantic_fill import data as data_module
from semantic_fill.checks import check_samples
from semantic_fill.files import FileMemory
from semantic_fill.options import DataOptions
from semantic_fill.sources import list_folder


def rewrite(folder, change) -> None:
    """Passes the list of a folder's rows through a function that changes it."""
    path = folder / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("\n".join(map(json.dumps, rows)))


# -- Views ------------------------------------------------------------------------------------------------------------


SHAPES = [(48, 32), (30, 48), (96, 32), (24, 40), (40, 40), (100, 37), (33, 32)]


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("form", ["triptych", "folders"])
def test_views_of_another_shape_are_cropped_alike(tmp_path, size, form):
    """Nothing is squashed: the views are what plain Pillow crops about the center of each."""
    triptych = PIL.Image.effect_noise((3 * size[0], size[1]), 90).convert("RGB")
    views = [triptych.crop((i * size[0], 0, (i + 1) * size[0], size[1])) for i in range(3)]
    names = ("visible", "target", "semantic")
    if form == "triptych":
        write_files(tmp_path / "data", {"1.png": encode_picture(triptych)})
    else:
        write_files(tmp_path / "data", {f"{name}/1.png": encode_picture(view) for name, view in zip(names, views)})
    dataset = read_dataset(train_data_dir=str(tmp_path / "data"), instance_prompt="a", resolution=32)
    for name, view in zip(names, views):
        # The largest part of the run's shape about the center, then the size of the run.
        scale = min(size)
        left, top = (size[0] - scale) / 2, (size[1] - scale) / 2
        resample = PIL.Image.Resampling.NEAREST if name == "semantic" else PIL.Image.Resampling.LANCZOS
        expected = view.resize((32, 32), resample, box=(left, top, left + scale, top + scale))
        assert np.array_equal(pixels_of(dataset.views(0)[name]), np.asarray(expected)), name
        flipped = dataset.views(0, flip=True)[name]
        assert np.array_equal(pixels_of(flipped), np.asarray(PIL.ImageOps.mirror(expected))), name


def test_a_map_keeps_its_colors_and_a_circle_stays_round(tmp_path):
    draw = PIL.Image.new("L", (120, 40))
    circle = PIL.Image.radial_gradient("L").resize((40, 40)).point(lambda value: 255 * (value < 140))
    draw.paste(circle, (40, 0))
    triptych = PIL.Image.new("L", (360, 40))
    for index in range(3):
        triptych.paste(draw, (120 * index, 0))
    write_files(tmp_path / "data", {"1.png": encode_picture(triptych)})
    views = read_dataset(train_data_dir=str(tmp_path / "data"), instance_prompt="a").views(0)
    assert set(views["semantic"].unique().tolist()) == {0.0, 1.0}
    assert len(views["target"].unique()) > 2
    inside = views["semantic"][0] > 0
    assert inside.any(0).sum() == inside.any(1).sum() and torch.equal(inside, inside.T)


def test_what_is_cropped_and_enlarged_is_counted(tmp_path):
    sizes = {
        "1": (64, 64),
        "2": (128, 64),
        "3": (48, 96),
        "4": (32, 32),
        "5": (640, 640),
        "6": (128, 64),
        "7": (64, 63),
    }
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        noise = PIL.Image.effect_noise((3 * width, height), 90).convert("RGB")
        write_files(tmp_path / "data", {f"{name}.png": encode_picture(noise)})
    summary = read_dataset(train_data_dir=str(tmp_path / "data"), resolution=64, instance_prompt="a hill").summary()
    assert summary == (
        "7 samples, 1 captions (7 samples have --instance_prompt), views of 6 sizes (2 of 128x64, 1 of 64x64, 1 of 48x96,"
        " 1 of 32x32) brought to 64x64: 4 cropped (by up to 50.0%), 3 enlarged. 0 other files left out"
    )


@pytest.mark.parametrize(
    "size, resolution, said",
    [
        ((192, 96), 64, "is 192x96 pixels, which by the shape of this run are two views and not three"),
        (
            (96, 96),
            32,
            "is 96x96 pixels, which by the shape of this run is one view and not three. Three views are needed",
        ),
        ((96, 72), 32, "is 96x72 pixels, which by the shape of this run is one view and not three"),
        ((97, 32), 32, "is 97 pixels wide, which cannot be divided into three equal panels"),
    ],
)
def test_what_is_no_triptych_is_refused(tmp_path, size, resolution, said):
    write_files(tmp_path / "data", {"1.png": encode_picture(PIL.Image.effect_noise(size, 90).convert("RGB"))})
    with pytest.raises(ValueError) as error:
        read_dataset(train_data_dir=str(tmp_path / "data"), resolution=resolution, instance_prompt="a")
    assert f"  1.png: {said}" in str(error.value)
    # Whoever has single views is told what to call their folders.
    assert "divided" in said or "or the views in the folders visible, target and semantic" in str(error.value)


def test_a_triptych_of_a_shape_that_is_passed_is_none_of_another(tmp_path):
    """192x96 pixels are two views of 96x96, but with --width three of 64x96."""
    write_files(tmp_path / "data", {"1.png": encode_picture(PIL.Image.effect_noise((192, 96), 90).convert("RGB"))})
    options = {"train_data_dir": str(tmp_path / "data"), "resolution": 96, "width": 64, "instance_prompt": "a"}
    assert read_dataset(**options).views(0)["target"].shape == (3, 96, 64)


@pytest.mark.parametrize(
    "size, views",
    [((64, 32), 2), ((96, 32), 3), ((128, 32), 2), ((192, 64), 3), ((99, 64), 3), ((63, 32), 2), ((192, 32), None)],
)
def test_two_views_or_three_are_told_and_not_guessed(tmp_path, size, views):
    write_files(tmp_path / "data", {"1.png": encode_picture(PIL.Image.effect_noise(size, 90).convert("RGB"))})
    options = {"train_data_dir": str(tmp_path / "data"), "instance_prompt": "a", "pairs": True}
    if size == (63, 32):
        # It nearly has the shape of two views, but cannot be cut into equal ones.
        with pytest.raises(ValueError, match="is 63 pixels wide, which cannot be divided into two equal panels"):
            read_dataset(**options)
    elif views is None:
        with pytest.raises(
            ValueError, match="1.png: is 192x32 pixels, which can be two views or three: pass the shape"
        ):
            read_dataset(**options)
    else:
        dataset = read_dataset(**options)
        assert len(dataset.views(0)) == views
        assert dataset.summary().startswith("1 samples (1 without a map)" if views == 2 else "1 samples, ")


# -- Captions ---------------------------------------------------------------------------------------------------------


def test_one_of_several_captions_is_drawn_for_each_visit(base_folder, tmp_path):
    """What is drawn follows from the seed and the place in the run, so from no number of processes."""
    data = write_triptychs(tmp_path / "data", 4)
    captions = [["a", "b", "c"], ["d"], ["e", "f"], ["g", "h", "i", "j"]]
    rewrite(data, lambda rows: [row.update(text=texts) for row, texts in zip(rows, captions)])

    def drawn(processes: int, start: int = 0, seed: int = 0) -> list[str]:
        options = arguments(base_folder, tmp_path / "out", "--seed", seed, "--no-cache_latents", data=data)
        assembled = assemble(options)
        parts = []
        for rank in range(processes):
            sampler, _ = trainer.read_samples(assembled)
            sampler.process_index, sampler.num_processes = rank, processes
            sampler.start, sampler.batch_size = start, 4 // processes
            batches = iter(sampler)
            parts.append([next(batches) for _ in range(12)])
        specs = [spec for step in zip(*parts) for part in step for spec in part]
        return [assembled.encoder.read(spec)["prompt"] for spec in specs]

    single = drawn(1)
    assert single == drawn(2) == drawn(4) and single[8:] == drawn(1, start=8)[: len(single) - 8]
    assert set(single) == {caption for texts in captions for caption in texts} and single != drawn(1, seed=1)


def test_all_captions_are_encoded_and_trained_with(base_folder, tmp_path):
    data = write_triptychs(tmp_path / "data", 2)
    rewrite(data, lambda rows: rows[0].update(text=["one", "two", "three"]))
    (data / "metadata.jsonl").write_text((data / "metadata.jsonl").read_text().splitlines()[0])
    (data / "001.txt").write_text("four\nfive\n")
    out = run(base_folder, tmp_path / "out", "--max_train_steps", 3, "--caption_lines", data=data)
    # Two pictures and their maps, five captions and the empty one.
    assert len(list((out / "cache").glob("*.safetensors"))) == 10


# -- The check --------------------------------------------------------------------------------------------------------


def test_bad_samples_are_listed(tmp_path):
    data = write_triptychs(tmp_path / "data", 7)
    content = (data / "000.png").read_bytes()
    (data / "001.png").write_bytes(content[: len(content) // 2])
    PIL.Image.new("RGB", (97, 32)).save(data / "002.png")
    PIL.Image.new("I;16", (96, 32)).save(data / "003.png")
    (data / "005.png").write_bytes(b"")
    rewrite(data, lambda rows: (rows[4].update(text=""), rows[5].update(text=None)))
    with pytest.raises(ValueError) as error:
        read_dataset(train_data_dir=str(data))
    first, *lines = str(error.value).splitlines()
    assert first == "5 samples cannot be used:"
    assert [line.split(": ")[0] for line in lines] == [f"  00{number}.png" for number in range(1, 6)]
    for line, part in zip(
        lines, ("cannot be read", "is 97 pixels wide", "mode I;16", "has an empty caption", "read as")
    ):
        assert part in line
    assert "; has no caption. Name their column with --caption_column" in lines[-1]


def test_fifty_problems_and_their_number(tmp_path):
    data = tmp_path / "data"
    write_files(data, {f"{number:03d}.png": "" for number in range(60)} | {f"{number}.txt": "" for number in range(3)})
    write_files(data, {"100\n\x1b[31m.png": ""})
    with pytest.raises(ValueError) as error:
        read_dataset(train_data_dir=str(data), instance_prompt="a")
    lines = str(error.value).splitlines()
    assert lines[0] == "64 samples cannot be used:" and lines[-1] == "  ... and 14 more" and len(lines) == 52
    # No name of a file breaks the list, or reaches the terminal as a command.
    (data / "0.txt").rename(data / "0\n\x1b[31m.txt")
    with pytest.raises(ValueError) as error:
        read_dataset(train_data_dir=str(data), instance_prompt="a")
    assert r"  0\n\x1b[31m.txt: is a caption without a picture" in str(error.value).splitlines()


def test_bad_data_stops_a_run_before_a_model_is_loaded(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("semantic_fill.encoding.load_encoders", None)
    data = write_triptychs(tmp_path / "data", 3)
    (data / "001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1 samples cannot be used:\n  001.png: cannot be read as a picture"):
        run(base_folder, tmp_path / "out", data=data)


def test_a_second_start_opens_no_picture_and_a_changed_one_is_checked_again(tmp_path):
    data = write_triptychs(tmp_path / "data", 5)
    opened = []
    watching = True

    def note(event, values):
        # An opener opens a second time, without a mode.
        if watching and event == "open" and values[1] and str(values[0]).startswith(str(data)):
            opened.append(Path(values[0]).name)

    sys.addaudithook(note)

    def start(*more) -> list[str]:
        opened.clear()
        load_data(tmp_path, data, *more)
        return sorted(set(opened) - {"metadata.jsonl"})

    pictures = [f"{index:03d}.png" for index in range(5)]
    try:
        assert start() == pictures and len(opened) == 6
        assert start() == [] and start("--max_train_samples", 3) == []
        draw_triptych(9).save(data / "001.png")
        (data / "003.png").touch()
        assert start() == ["001.png", "003.png"] and start() == []
        # What was found out serves runs of other shapes and modes.
        assert start("--width", 64) == start("--semantic_mode", "none") == start("--aspect_buckets") == []
        with pytest.raises(ValueError, match="000.png: is 96x32 pixels, which by the shape of this run are two views"):
            start("--width", 48)
        # Where the pictures are cut into other views, they are read again.
        assert opened == ["metadata.jsonl"]
        assert start("--width", 48, "--semantic_mode", "none") == pictures and start() == pictures
        # Damage to what is remembered costs time and nothing else.
        for damage in ("", "[]", "{}", '{"version": 1}', "\udcff"):
            (tmp_path / "out" / "cache" / "checked.json").write_bytes(damage.encode(errors="surrogateescape"))
            assert start() == pictures and start() == []
        # Pictures that are gone are forgotten, and the rest of the folder is not.
        memory = tmp_path / "out" / "cache" / "checked.json"
        (data / "004.png").rename(data / "005.png")
        (data / "metadata.jsonl").write_text((data / "metadata.jsonl").read_text().replace("004.png", "005.png"))
        assert start() == ["005.png"] and sorted(json.loads(memory.read_text())["entries"]) == [
            str(data / name) for name in ("000.png", "001.png", "002.png", "003.png", "005.png")
        ]
        # A picture that goes bad later is found.
        (data / "002.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match="002.png: cannot be read"):
            start()
    finally:
        watching = False


def test_an_interrupted_check_goes_on_where_it_was(tmp_path, monkeypatch):
    data = write_triptychs(tmp_path / "data", 9)
    source, memory = list_folder(data, DataOptions(train_data_dir=str(data))), tmp_path / "checked.json"
    monkeypatch.setattr(checks, "SAMPLES_BETWEEN_SAVES", 2)
    # As with a machine of one core, so that samples are read in their order.
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 1)
    inspect, save, read, stop_at = checks.inspect, FileMemory.save, [], 7

    def interrupted(*args):
        read.append(args)
        if len(read) == stop_at:
            raise KeyboardInterrupt
        return inspect(*args)

    monkeypatch.setattr(checks, "inspect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_samples(source, 1.0, False, memory)
    assert len(json.loads(memory.read_text())["entries"]) == 6
    # A kill leaves what was saved a while ago.
    memory.unlink()
    monkeypatch.setattr(checks, "SECONDS_BETWEEN_SAVES", 0)
    monkeypatch.setattr(FileMemory, "save", lambda self, *wait: save(self, *wait) if wait else None)
    read.clear()
    with pytest.raises(KeyboardInterrupt):
        check_samples(source, 1.0, False, memory)
    read.clear()
    stop_at = None
    assert len(check_samples(source, 1.0, False, memory)) == 9 and len(read) == 3


def test_processes_on_one_machine_share_its_cores(tmp_path, monkeypatch):
    data = write_triptychs(tmp_path / "data", 2)
    source, threads = list_folder(data, DataOptions(train_data_dir=str(data))), []
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 12)
    pool = checks.ThreadPoolExecutor
    monkeypatch.setattr(checks, "ThreadPoolExecutor", lambda count: threads.append(count) or pool(count))
    for processes in (1, 4, 16):
        # The launcher says so.
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        check_samples(source, 1.0, False)
    assert threads == [12, 3, 1]


def test_what_cannot_be_remembered_is_no_problem(tmp_path):
    data = write_triptychs(tmp_path / "data", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cache").write_text("a file, so that no folder of this name can be made")
    assert len(load_data(tmp_path, data)[0]) == 2


def test_each_of_several_processes_checks_a_share_and_knows_all(tmp_path, monkeypatch):
    """What one process has found out before is no matter for the shares of the others."""
    data = write_triptychs(tmp_path / "data", 7)
    source = list_folder(data, DataOptions(train_data_dir=str(data)))
    expected = check_samples(source, 1.0, False)
    found, memory = [], tmp_path / "checked.json"
    for remembered in (False, True):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(checks, "gather_object", lambda share: shares.append(share) or share)
            # The first process may not know yet what the others do.
            check_samples(source, 1.0, False, memory if rank or remembered else None, rank, 3)
        assert sorted(index for share in shares for index, *_ in share) == list(range(7))
        found = [item for share in shares for item in share]
        for rank in range(3):
            monkeypatch.setattr(checks, "gather_object", lambda share: found)
            together = check_samples(source, 1.0, False, memory, rank, 3)
            assert [finding.visible for finding in together] == [finding.visible for finding in expected]


def test_no_process_waits_while_another_checks(base_folder, triptych_folder, tmp_path, monkeypatch):
    waiting, during = [], []

    @contextlib.contextmanager
    def main_process_first(accelerator):
        waiting.append(True)
        yield
        waiting.clear()

    check = data_module.check_samples
    monkeypatch.setattr(trainer.Accelerator, "main_process_first", main_process_first)
    monkeypatch.setattr(data_module, "check_samples", lambda *args: during.append(bool(waiting)) or check(*args))
    run(base_folder, tmp_path, "--max_train_steps", 1, data=triptych_folder)
    assert during == [False]


# -- Label numbers ------------------------------------------------------------------------------------------------------


def write_labels(folder: Path, maps: list[np.ndarray], mode="L") -> Path:
    for index, numbers in enumerate(maps):
        view = draw_triptych(index).crop((0, 0, 32, 32))
        files = {
            "visible": view,
            "target": view,
            "semantic": PIL.Image.fromarray(numbers.astype(np.uint8)).convert(mode),
        }
        write_files(folder, {f"{name}/{index}.png": encode_picture(picture) for name, picture in files.items()})
    return folder


def test_label_numbers_are_refused_or_colored(tmp_path, caplog):
    maps = [np.kron(np.array([[0, 1], [7, number]]), np.ones((16, 16))) for number in (7, 3)]
    data = write_labels(tmp_path / "data", maps)
    with pytest.raises(ValueError, match="All semantic maps have one channel and values below 64.* --palette"):
        load_data(tmp_path, data, "--instance_prompt", "a")
    palette = tmp_path / "classes.json"
    palette.write_text('{"0": "black", "1": [255, 0, 0], "7": "#0000ff"}')
    with pytest.raises(ValueError, match="1 samples have labels without a color in --palette:\n  1: 3$"):
        load_data(tmp_path, data, "--instance_prompt", "a", "--palette", palette)
    palette.write_text('["black", [255, 0, 0], "lime", "lime", "lime", "lime", "lime", "#0000ff"]')
    dataset, _ = load_data(tmp_path, data, "--instance_prompt", "a", "--palette", palette)
    colors = pixels_of(dataset.views(1)["semantic"])
    corners = [tuple(colors[place].tolist()) for place in ((0, 0), (0, 31), (31, 0), (31, 31))]
    assert corners == [(0, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert "maps colored by --palette" in dataset.summary()


def test_maps_are_judged_together(tmp_path, caplog):
    """One dark map is dark by chance. Held-out maps belong to the run's maps as well."""
    black = write_labels(tmp_path / "black", [np.zeros((32, 32))] * 2)
    assert load_data(tmp_path, black, "--instance_prompt", "a")[0].palettes == {"semantic": None}
    dark, bright = np.full((32, 32), 5), np.tile(np.arange(32) * 8, (32, 1))
    data = write_labels(tmp_path / "data", [dark, bright])
    assert load_data(tmp_path, data, "--instance_prompt", "a")[0].palettes == {"semantic": None}
    held_out = write_labels(tmp_path / "held out", [np.full((32, 32), 6)])
    more = ["--instance_prompt", "a", "--validation_data_dir", held_out]
    assert [part.palettes["semantic"] for part in load_data(tmp_path, data, *more)] == [None, None]
    colored = write_labels(tmp_path / "colored", [dark], mode="RGB")
    for index, name in enumerate(("semantic", "target", "visible")):
        draw_triptych(7).crop((0, 0, 32, 32)).save(colored / name / "9.png")
    (tmp_path / "classes.json").write_text('["red"]')
    write_files(colored, {"semantic/9.png": encode_picture(draw_triptych(7).crop((32, 0, 64, 32)))})
    load_data(tmp_path, colored, "--instance_prompt", "a", "--palette", tmp_path / "classes.json")
    assert "classes.json is not used, because the maps hold colors and no label numbers" in caplog.text


def test_a_palette_colors_the_encodings_too(base_folder, tmp_path):
    data = write_labels(tmp_path / "data", [np.kron(np.eye(2), np.ones((16, 16)))])
    keys = set()
    for colors in ('["red", "lime"]', '["red", "blue"]'):
        (tmp_path / "classes.json").write_text(colors)
        more = ["--instance_prompt", "a", "--palette", tmp_path / "classes.json", "--max_train_steps", 1]
        run(base_folder, tmp_path / str(len(keys)), *more, "--cache_root", tmp_path / "cache", data=data)
        keys |= {path.name for path in (tmp_path / "cache").glob("*.safetensors")}
    # One picture and its map in two colorings, the prompt and the empty one.
    assert len(keys) == 6


# -- What is said -------------------------------------------------------------------------------------------------------


def test_a_run_says_what_its_data_are_and_lists_what_it_leaves_out(tmp_path, caplog):
    data = write_triptychs(tmp_path / "data", 4)
    write_files(data, {"photo.heic": "", "é\n.pdf": "", "x\udcff.doc": ""})
    with caplog.at_level("INFO", "semantic_fill"):
        load_data(tmp_path, data)
    said = [record.getMessage() for record in caplog.records]
    summary = "4 samples, 2 captions, views of 1 sizes (4 of 32x32) brought to 32x32: 0 cropped, 0 enlarged."
    assert f"Data: {summary} 3 other files left out" in [line.removeprefix("[RANK 0] ") for line in said]
    left_out = tmp_path / "out" / "left_out.txt"
    assert any(f"{left_out} lists the 3 files that were left out" in line for line in said)
    assert left_out.read_text(encoding="utf-8").splitlines() == ["photo.heic", r"x\udcff.doc", r"é\n.pdf"]
    # The list of an earlier start does not stay.
    for path in [path for path in data.iterdir() if path.suffix in (".heic", ".pdf", ".doc")]:
        path.unlink()
    load_data(tmp_path, data)
    assert not left_out.exists()


def test_only_the_first_samples_where_so_many_are_asked_for(tmp_path, triptych_folder):
    for count, expected in ((2, 2), (6, 6), (100, 6)):
        train, _ = load_data(tmp_path, triptych_folder, "--max_train_samples", count)
        assert sample_names(train) == [f"{index:03d}.png" for index in range(expected)]
    # Those behind them are not even looked at.
    data = write_triptychs(tmp_path / "data", 3)
    (data / "002.png").write_bytes(b"no picture")
    assert len(load_data(tmp_path, data, "--max_train_samples", 2)[0]) == 2
