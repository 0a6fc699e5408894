# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Held-out data: which samples they are, what is painted of them, and that nothing of them is trained on."""

import numpy as np
import PIL.Image
import pytest
from helpers import (
    draw_triptych,
    encode_picture,
    load_data,
    pixels_of,
    run,
    sample_names,
    write_files,
    write_triptychs,
)

from semantic_fill.data import TriptychDataset


def contents(dataset: TriptychDataset) -> set[bytes]:
    return {pixels_of(dataset.views(index)["visible"]).tobytes() for index in range(len(dataset))}


def test_a_fraction_is_chosen_by_the_content_of_pictures(tmp_path):
    data = write_triptychs(tmp_path / "data", 60)
    train, held_out = load_data(tmp_path, data, "--validation_fraction", 0.3)
    assert len(train) + len(held_out) == 60 and 8 <= len(held_out) <= 28
    assert not contents(train) & contents(held_out)
    assert train.all_captions() == held_out.all_captions() == {"caption 0", "caption 1"}
    # Other names, another order, other captions and another format move none across.
    other = tmp_path / "other"
    for path in sorted(data.glob("*.png")):
        name = f"{97 * int(path.stem) % 60:03d}"
        write_files(other / name, {f"{name}.webp": b"", f"{name}.txt": f"something else {name}"})
        PIL.Image.open(path).save(other / name / f"{name}.webp", lossless=True)
    # New rows move none either, and equal pictures stay on one side.
    for seed in range(60, 80):
        draw_triptych(seed).save(other / f"new {seed}.png")
    for path in sorted(data.glob("*.png")):
        (other / f"again {path.name}").write_bytes(path.read_bytes())
    train_more, held_out_more = load_data(tmp_path, other, "--validation_fraction", 0.3, "--instance_prompt", "a")
    assert len(train_more) + len(held_out_more) == 140
    assert contents(train) <= contents(train_more) and contents(held_out) <= contents(held_out_more)
    assert not contents(train_more) & contents(held_out_more)
    # A larger fraction holds out the same and more.
    assert contents(held_out) < contents(load_data(tmp_path, data, "--validation_fraction", 0.6)[1])
    # The number of samples to train on is counted without them.
    few, same = load_data(tmp_path, data, "--validation_fraction", 0.3, "--max_train_samples", 5)
    assert sample_names(few) == sample_names(train)[:5] and sample_names(same) == sample_names(held_out)


def test_a_fraction_that_holds_out_none_or_all_is_refused(tmp_path):
    data = write_triptychs(tmp_path / "data", 3)
    with pytest.raises(
        ValueError, match="--validation_fraction 0.0001 holds out none of 3 samples. Pass a larger share"
    ):
        load_data(tmp_path, data, "--validation_fraction", 0.0001)
    with pytest.raises(ValueError, match="All samples are held out, or show a view of one"):
        load_data(tmp_path, data, "--validation_fraction", 0.9999)


def test_equal_targets_never_stand_on_both_sides(tmp_path, caplog):
    """A target that is held out is not trained on either, whatever visible view it stands beside."""
    data, views = tmp_path / "data", ("visible", "target", "semantic")
    for index in range(40):
        pictures = dict(zip(views, (draw_triptych(index).crop((32 * i, 0, 32 * i + 32, 32)) for i in range(3))))
        # Each second target is one color, which tells nothing, and the others show one of five scenes.
        target = draw_triptych(index % 10 + 100).crop((32, 0, 64, 32))
        pictures["target"] = PIL.Image.new("RGB", (32, 32), "black") if index % 2 else target
        write_files(data, {f"{view}/{index:02d}.png": encode_picture(pictures[view]) for view in views})
    train, held_out = load_data(tmp_path, data, "--validation_fraction", 0.15, "--instance_prompt", "a")

    def targets(dataset):
        return {pixels_of(dataset.views(i)["target"]).tobytes() for i in range(len(dataset))} - {bytes(32 * 32 * 3)}

    assert targets(train) and targets(held_out) and not targets(train) & targets(held_out)
    left_out = 40 - len(train) - len(held_out)
    assert left_out > 0 and f"{left_out} samples are not trained on, because the held-out data shows" in caplog.text
    # Samples whose target is black are all used.
    assert sum(index % 2 for index in (*train.indices, *held_out.indices)) == 20
    # The same holds for held-out data of its own.
    write_files(tmp_path / "other", {f"{view}/1.png": (data / view / "00.png").read_bytes() for view in views})
    draw_triptych(99).crop((0, 0, 32, 32)).save(tmp_path / "other" / "visible" / "1.png")
    train, _ = load_data(tmp_path, data, "--validation_data_dir", tmp_path / "other", "--instance_prompt", "a")
    assert train.indices == [index for index in range(40) if index % 10]


def test_a_folder_of_its_own_and_none_of_its_pictures_is_trained_on(tmp_path, caplog):
    data = write_triptychs(tmp_path / "data", 6)
    other = tmp_path / "other"
    for view, left in (("visible", 0), ("target", 32), ("semantic", 64)):
        for seed in (2, 90):
            picture = draw_triptych(seed).crop((left, 0, left + 32, 32))
            write_files(other / view, {f"{seed}.bmp": encode_picture(picture, "BMP")})
    write_files(other, {"2.txt": "held out", "90.txt": "held out too", "notes.pdf": ""})
    with caplog.at_level("INFO", "semantic_fill"):
        train, held_out = load_data(tmp_path, data, "--validation_data_dir", other)
    assert sample_names(train) == [f"{index:03d}.png" for index in (0, 1, 3, 4, 5)] and sample_names(held_out) == [
        "2",
        "90",
    ]
    said = "1 samples are not trained on, because the held-out data shows the same visible or target view: 002.png"
    assert said in caplog.text
    assert (tmp_path / "out" / "left_out.txt").read_text() == "notes.pdf\n"
    with pytest.raises(ValueError, match="--validation_data_dir .*gone has to be a folder of pictures"):
        load_data(tmp_path, data, "--validation_data_dir", tmp_path / "gone")
    with pytest.raises(ValueError, match="All samples are held out, or show a view of one"):
        load_data(tmp_path, data, "--validation_data_dir", data)


def test_held_out_samples_are_painted_and_not_trained_on(base_folder, tmp_path):
    data = write_triptychs(tmp_path / "data", 12)
    more = [
        "--validation_fraction",
        0.4,
        "--max_train_steps",
        2,
        "--validation_steps",
        2,
        "--num_validation_images",
        1,
    ]
    out = run(base_folder, tmp_path / "out", *more, "--validation_inference_steps", 1, data=data)
    train, held_out = load_data(tmp_path, data, "--validation_fraction", 0.4)
    painted = np.asarray(PIL.Image.open(out / "samples" / "step-000002.png"))
    # Below the title, three times as large.
    assert np.array_equal(painted[16:112:3, :96:3], pixels_of(held_out.views(0)["visible"]))
    # What is trained on is encoded with its maps, one held-out sample, its own map and a wrong one, and the prompts of all.
    assert len(list((out / "cache").glob("*.safetensors"))) == 2 * len(train) + 3 + 3


def test_validation_data_in_tables(tmp_path):
    import datasets

    tables = tmp_path / "tables"
    tables.mkdir()
    for split, seeds in {"train": (1, 2), "validation": (3,), "test": (4,)}.items():
        rows = {"image": [draw_triptych(seed) for seed in seeds], "text": [f"{split} {seed}" for seed in seeds]}
        rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        rows.to_parquet(tables / f"{split}-00000-of-00001.parquet")
    more = ["--cache_dir", tmp_path / "hf", "--validation_data_dir", tables]
    train, held_out = load_data(tmp_path, write_triptychs(tmp_path / "data", 4), *more)
    assert held_out.all_captions() == {"validation 3"} and len(train) == 3
    (tables / "validation-00000-of-00001.parquet").unlink()
    train, held_out = load_data(tmp_path, None, "--dataset_name", tables, *more)
    assert held_out.all_captions() == {"test 4"} and train.all_captions() == {"train 1", "train 2"}
