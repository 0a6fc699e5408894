# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""`examples/streets.py`: MSRS and its boxes become folders of views that trainer, evaluation and ablation read."""

import numpy as np
import PIL.Image
import pytest
from streets import main, parse_args

from semantic_fill.boxes import read_boxes
from semantic_fill.data import read_triptychs


def test_msrs_becomes_folders_of_views(tmp_path, capsys):
    # In MSRS' own sizes: 640x480 is cropped to the shape of 336x256, whose width is 630 there, and scaled.
    frames = {"train": ("00004N", "00070N", "00500D"), "test": ("00004N", "00600D")}
    for split, names in frames.items():
        for seed, name in enumerate(names):
            for kind, value in (("vi", 40), ("ir", 90)):
                file = tmp_path / "MSRS" / split / kind / f"{name}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                PIL.Image.new("L", (640, 480), value + seed).save(file)
    for kind, lines in (
        # A person of the same place in both, one in thermal alone, and a car behind it that leaves the picture.
        ("infrared", "0 0.5 0.5 0.1 0.2\n0 0.2 0.5 0.05 0.1\n2 0.1 0.5 0.4 0.4\n"),
        ("visible", "0 0.51 0.5 0.1 0.2\n1 0.2 0.5 0.05 0.1\n"),
    ):
        (tmp_path / "labels" / kind / "test").mkdir(parents=True)
        (tmp_path / "labels" / kind / "test" / "00004N.txt").write_text(lines)
    main(parse_args([f"--msrs={tmp_path / 'MSRS'}", f"--labels={tmp_path / 'labels'}", f"--output_dir={tmp_path}"]))
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "1 scenes, 0 boxes",
        "1 scenes, 0 boxes",
        "1 scenes, 3 boxes",
    ]

    boxes = read_boxes(tmp_path / "test" / "boxes.jsonl")
    assert [(box.name, box.group) for box in boxes["00004N"]] == [
        ("person", "night, both views"),
        ("person", "night, target only"),
        ("car", "night, target only"),
    ]
    # 480 pixels of height become 256, and 5 of 640 columns are cut off on each side.
    scale = 256 / 480
    for box, (left, top, right, bottom) in zip(boxes["00004N"], ((288, 192, 352, 288), (112, 216, 144, 264))):
        expected = ((left - 5) * scale, top * scale, (right - 5) * scale, bottom * scale)
        assert box.edges == pytest.approx(expected, abs=0.51)
    assert boxes["00004N"][2].edges[0] == 0
    assert read_boxes(tmp_path / "train" / "boxes.jsonl") == {"00600D": []}

    (views,) = read_triptychs(tmp_path / "test")
    assert {view.size for view in views.values()} == {(336, 256)}
    assert (np.asarray(views["visible"]) == 40).all() and (np.asarray(views["target"]) == 90).all()
    semantic = np.asarray(views["semantic"])
    colors = [tuple(semantic[y, x]) for x, y in ((168, 128), (66, 128), (30, 128), (300, 20))]
    # The second person stands before the car.
    assert colors == [(255, 0, 0), (255, 0, 0), (255, 200, 0), (0, 0, 0)]
