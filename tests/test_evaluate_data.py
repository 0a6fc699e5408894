# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the evaluation paints: samples read as in training, at the size that the weights record."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors
import safetensors.torch
from helpers import LORA_FILE, ON_CPU, ROOT, draw_triptych, run, write_triptychs

from semantic_fill import evaluate


CAPTION = ["--instance_prompt", "a scene"]


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory) -> Path:
    """Weights that were trained on views of 48x32 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_triptychs(folder / "data", count=2, width=48)
    return run(base_folder, folder / "out", "--width", 48, "--max_train_steps", 1, data=data)


@pytest.fixture(scope="module")
def trained_without_map(base_folder, triptych_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("without_map") / "out"
    return run(base_folder, out, "--semantic_mode", "none", "--max_train_steps", 1, data=triptych_folder)


def forget_size(trained: Path, folder: Path) -> Path:
    """A copy of weights as earlier versions saved them."""
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("cache"))
    file = folder / LORA_FILE
    with safetensors.safe_open(file, framework="pt") as weights:
        metadata = weights.metadata()
    settings = json.loads(metadata["semantic_fill"])
    assert (settings.pop("height"), settings.pop("width")) == (32, 48)
    metadata["semantic_fill"] = json.dumps(settings)
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata=metadata)
    return folder


@pytest.fixture
def evaluated(base_folder, tmp_path, monkeypatch):
    """Evaluates quickly. Returns the report and every view that was painted from, by name."""

    def run_evaluation(trained, data, *more):
        options = ["--pretrained_model_name_or_path", base_folder, "--trained", trained, "--num_inference_steps", 1]
        options += [
            "--output_dir",
            tmp_path / "evaluation",
            "--metrics",
            "psnr",
            *(["--train_data_dir", data] if data else []),
        ]
        dataset, load_data = [], evaluate.load_data
        monkeypatch.setattr(
            evaluate, "load_data", lambda *args, **kwargs: dataset.append(load_data(*args, **kwargs)) or dataset[0]
        )
        report = evaluate.main(evaluate.parse_args([str(option) for option in (*options, *more)]))
        views = [dataset[0].views(row) for row in range(len(dataset[0]))]
        pictures = {
            name: [(view[name] * 255).round().byte().permute(1, 2, 0).numpy() for view in views] for name in views[0]
        }
        return report, pictures

    return run_evaluation


def sheet_size(tmp_path) -> tuple[int, int]:
    return PIL.Image.open(tmp_path / "evaluation" / "evaluation.png").size


# -- Size -------------------------------------------------------------------------------------------------------------


def test_views_have_the_size_that_the_weights_record(evaluated, trained, tmp_path, caplog):
    data = write_triptychs(tmp_path / "data", count=1, height=64, width=96)
    with caplog.at_level(logging.INFO):
        report, pictures = evaluated(trained, data, "--maps", "none")
    assert pictures["target"][0].shape == (32, 48, 3)
    assert (report["settings"]["resolution"], report["settings"]["width"]) == (32, 48)
    assert f"Painting at 48x32 pixels a view, the size that {trained} was trained at." in caplog.messages
    assert "1 samples of data at 48x32, 1 steps." in (tmp_path / "evaluation" / "evaluation.md").read_text()
    # The columns visible, semantic, target and no map are twice as large as the pictures, under a header.
    assert sheet_size(tmp_path) == (4 * 96, 16 + 64)


@pytest.mark.parametrize(
    "asked, size", [("--resolution 64", (64, 64)), ("--width 64", (32, 64)), ("--resolution 16 --width 32", (16, 32))]
)
def test_another_size_has_to_be_asked_for(evaluated, trained, tmp_path, asked, size, caplog):
    data = write_triptychs(tmp_path / "data", count=1, height=size[0], width=size[1])
    _, pictures = evaluated(trained, data, "--maps", "none", *asked.split())
    assert pictures["target"][0].shape[:2] == size
    view = f"{size[1]}x{size[0]}"
    assert f"Painting at {view} pixels a view, although {trained} was trained at 48x32." in caplog.messages


@pytest.mark.parametrize("asked", [True, False])
def test_weights_without_a_size_are_painted_at_the_default(evaluated, trained, tmp_path, monkeypatch, asked, caplog):
    old = forget_size(trained, tmp_path / "old")
    monkeypatch.setattr(evaluate, "UNRECORDED_SIZE", 64)
    data = write_triptychs(tmp_path / "data", count=1)
    _, pictures = evaluated(old, data, "--maps", "none", *(["--resolution", 32] if asked else []))
    assert pictures["target"][0].shape[:2] == ((32, 32) if asked else (64, 64))
    message = f"{old} does not record the size that it was trained at. Painting at"
    if asked:
        assert f"{message} 32x32 pixels a view." in caplog.messages
    else:
        assert f"{message} 64x64 pixels a view; pass another size with --resolution and --width." in caplog.messages


def test_the_default_size_is_that_of_the_trainer(trained, tmp_path):
    options = ["--pretrained_model_name_or_path", "unused", "--trained", str(trained), "--train_data_dir", "unused"]
    chosen = evaluate.choose_size(evaluate.parse_args(options), {})
    assert (chosen.resolution, chosen.width) == (512, 512)


def test_shapes_of_a_bucketed_evaluation(evaluated, trained, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for index, (height, width) in enumerate([(32, 64), (64, 32), (32, 64), (64, 32)]):
        draw_triptych(index, height, width).save(data / f"{index}.png")
    report, pictures = evaluated(trained, data, *CAPTION, "--aspect_buckets", "--resolution", 48, "--batch_size", 4)
    shapes = [picture.shape[:2] for picture in pictures["target"]]
    assert shapes == [(32, 64), (64, 32)] * 2
    for kind in ("right", "wrong", "none"):
        rows = report["samples"][kind]
        # Each batch has one shape, and each figure its own row.
        assert [sample["row"] for sample in rows] == [0, 2, 1, 3]
    assert sheet_size(tmp_path)[0] == 6 * 2 * 64


# -- Data -------------------------------------------------------------------------------------------------------------


def test_views_are_cropped_about_their_center(evaluated, trained, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    triptych = draw_triptych(0, 80, 64)
    triptych.save(data / "0.png")
    _, pictures = evaluated(trained, data, *CAPTION, "--maps", "none")
    for index, (name, method) in enumerate((("visible", 1), ("target", 1), ("semantic", 0))):
        # Of 64x80 pixels, 64x42.67 have the shape of 48x32.
        top = (80 - 64 * 32 / 48) / 2
        view = triptych.crop((64 * index, 0, 64 * (index + 1), 80))
        expected = np.asarray(view.resize((48, 32), method, box=(0, top, 64, 80 - top)))
        assert np.array_equal(pictures[name][0], expected), name


def write_views(folder: Path, names=("visible", "target", "semantic"), count: int = 2) -> Path:
    for index in range(count):
        triptych = draw_triptych(index)
        for place, name in enumerate(names):
            (folder / name).mkdir(parents=True, exist_ok=True)
            triptych.crop((32 * place, 0, 32 * (place + 1), 32)).save(folder / name / f"{index}.png")
    return folder


def test_pairs_are_taken_by_weights_without_map(evaluated, trained, trained_without_map, tmp_path):
    data = write_views(tmp_path / "data", ("visible", "target"))
    report, pictures = evaluated(trained_without_map, data, *CAPTION)
    assert list(report["figures"]) == ["none"] and pictures.keys() == {"visible", "target"}
    assert np.array_equal(pictures["target"][1], np.asarray(draw_triptych(1))[:, 32:64])
    # The columns are visible, target and no map.
    assert sheet_size(tmp_path)[0] == 3 * 96
    # Weights that use a map have no use for pairs, and two panels are no triptych.
    diptychs = tmp_path / "diptychs"
    diptychs.mkdir()
    draw_triptych(0).crop((0, 0, 64, 32)).save(diptychs / "0.png")
    report, pictures = evaluated(trained_without_map, diptychs, *CAPTION)
    assert np.array_equal(pictures["target"][0], np.asarray(draw_triptych(0))[:, 32:64])
    for folder, message in (
        (data, "holds visible/ and target/ but no semantic/"),
        (diptychs, "0.png: is 64x32 pixels, .* two views and not three"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluated(trained, folder, *CAPTION, "--resolution", 32)


def write_labels(folder: Path) -> Path:
    """Three folders whose maps hold the label numbers 0, 1 and 2."""
    write_views(folder)
    for path in (folder / "semantic").iterdir():
        labels = np.random.default_rng(int(path.stem)).integers(0, 3, (32, 32), dtype=np.uint8)
        PIL.Image.fromarray(labels).save(path)
    return folder


def test_label_maps_are_colored_by_the_palette(evaluated, trained_without_map, base_folder, triptych_folder, tmp_path):
    data, colors = write_labels(tmp_path / "data"), [[255, 0, 0], [0, 255, 0], [9, 9, 200]]
    (tmp_path / "palette.json").write_text(json.dumps(colors))
    trained = run(base_folder, tmp_path / "out", "--max_train_steps", 1, data=triptych_folder)
    with pytest.raises(ValueError, match="label numbers.*--palette"):
        evaluated(trained, data, *CAPTION)
    report, pictures = evaluated(trained, data, *CAPTION, "--palette", tmp_path / "palette.json")
    for index, picture in enumerate(pictures["semantic"]):
        labels = np.asarray(PIL.Image.open(data / "semantic" / f"{index}.png"))
        assert np.array_equal(picture, np.array(colors, np.uint8)[labels])
    assert list(report["figures"]) == ["right", "wrong", "none"]


def test_a_palette_for_the_maps_alone_leaves_miou_out(base_folder, trained, tmp_path):
    """The figures that need no network, with a palette that two classes share a color of and that the targets lack."""
    data = write_labels(tmp_path / "data")
    common = ["--pretrained_model_name_or_path", base_folder, "--trained", trained, "--train_data_dir", data, *CAPTION]
    for name, colors, reason in (
        ("shared", ["red", "#ff0000", "blue"], "shared.json has to give each class a color of its own"),
        ("lacking", ["#010203", "#020304", "#030405"], "of the target of row 0 has none of the colors of --palette"),
    ):
        palette = tmp_path / f"{name}.json"
        palette.write_text(json.dumps(colors))
        options = evaluate.parse_args([str(option) for option in (*common, "--palette", palette, "--resolution", 32)])
        dataset = evaluate.load_data(options, pairs=False)
        read = evaluate.read_palette(palette)
        metrics, absent = evaluate.choose_metrics(options, read, dataset, [0, 1])
        assert "miou" in metrics and reason in absent["miou"] and not absent["miou"].endswith(".")


@pytest.mark.parametrize(
    "fault, message",
    [
        ("a picture", "2 samples cannot be used:\n.*a.png.*cannot be read as a picture.*\n.*b.png.*is animated"),
        ("a name", "1 samples cannot be used:\n.*0: has no target picture"),
        ("a caption", "2 samples cannot be used:\n.*0: has no caption"),
        ("an encoding", "0.txt.*is not encoded as UTF-8"),
        ("several splits", "holds several splits side by side"),
    ],
)
def test_bad_data_is_listed_before_a_model_is_loaded(evaluated, trained, tmp_path, monkeypatch, fault, message):
    for name in ("load_pipeline", "load_networks"):
        monkeypatch.setattr(evaluate, name, None)
    data, more = write_views(tmp_path / "data"), list(CAPTION)
    if fault == "a picture":
        data = tmp_path / "bad"
        data.mkdir()
        (data / "a.png").write_bytes(b"no picture")
        frames = [draw_triptych(index) for index in range(2)]
        frames[0].save(data / "b.png", save_all=True, append_images=frames[1:])
    elif fault == "a name":
        (data / "target" / "0.png").unlink()
    elif fault == "a caption":
        more = []
    elif fault == "an encoding":
        (data / "target" / "0.txt").write_bytes("Zürich".encode("cp1252"))
    else:
        for split in ("train", "test"):
            write_triptychs(data / split, count=1)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        evaluated(trained, data, *more)


def test_the_split_of_a_table(evaluated, trained, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    for split, seed in (("train", 0), ("test", 1)):
        rows = {"image": [draw_triptych(seed, 32, 48)], "text": [f"caption of {split}"]}
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    for name in ("--split", "--train_split"):
        more = ["--dataset_name", tmp_path / "data", name, "test", "--maps", "none", "--cache_dir", tmp_path / "hf"]
        _, pictures = evaluated(trained, None, *more)
        assert np.array_equal(pictures["target"][0], np.asarray(draw_triptych(1, 32, 48))[:, 48:96])
    with pytest.raises(ValueError, match="--train_split validation is not in the folder"):
        evaluated(trained, None, "--dataset_name", tmp_path / "data", "--split", "dev", "--cache_dir", tmp_path / "hf")


def test_reports_are_utf8_whatever_the_machine_writes(base_folder, trained, tmp_path):
    """With the encoding ASCII, which can write no arrow."""
    data = write_triptychs(tmp_path / "dätä", count=1, width=48)
    command = [sys.executable, "-m", "semantic_fill.evaluate", "--pretrained_model_name_or_path", base_folder]
    command += ["--trained", trained, "--train_data_dir", data, "--output_dir", tmp_path / "evaluation"]
    command += ["--maps", "none", "--metrics", "psnr", "--num_inference_steps", 1]
    env = ON_CPU | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(part) for part in command], env=env, cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode("ascii", "replace")[-3000:]
    text = (tmp_path / "evaluation" / "evaluation.md").read_text(encoding="utf-8")
    assert "| map | PSNR (dB) ↑ |" in text and "1 samples of dätä" in text
    assert b"| map | PSNR (dB) ? |" in done.stdout
