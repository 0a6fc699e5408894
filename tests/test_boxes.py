# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Boxes that stand out from their surroundings, and how far pictures are displaced."""

import json

import pytest
import torch
from helpers import ROOT

from semantic_fill.boxes import Box, BoxFigures, contrasts, read_boxes


def picture(*bright: tuple[int, int, int, int], value: int = 80) -> torch.Tensor:
    """Boxes of a gray value on a ground of 20, of 64 by 64 pixels."""
    pixels = torch.full((3, 64, 64), 20, dtype=torch.uint8)
    for left, top, right, bottom in bright:
        pixels[:, top:bottom, left:right] = value
    return pixels


def test_a_box_against_its_surroundings():
    first, second = (10, 10, 18, 30), (18, 10, 26, 30)
    boxes = [Box("person", first), Box("person", second)]
    # A bright neighbor is no surroundings.
    assert contrasts(picture(first, second), boxes) == [60, 60]
    assert contrasts(picture(first), boxes) == [60, 0]
    # Half of this box is bright, and the other half lies in its surroundings' color.
    assert contrasts(picture((10, 10, 18, 20)), boxes[:1]) == [30]


def test_boxes_that_cannot_be_judged():
    small, all_of_it = Box("person", (5, 5, 10, 15)), Box("car", (0, 0, 64, 64))
    assert all(value != value for value in contrasts(picture(), [small, all_of_it]))
    figures = BoxFigures()
    figures.add(picture(), picture(), [small, all_of_it])
    assert figures.summary() == {}


def test_figures_by_class_and_group():
    first, second, car = (5, 5, 15, 15), (30, 5, 40, 15), (5, 30, 25, 40)
    boxes = [Box("person", first, "night, target only"), Box("person", second, "night, both views"), Box("car", car)]
    painted, target = picture(first, car, value=34), picture(first, second)
    figures = BoxFigures()
    figures.add(painted, target, boxes)

    def row(count: int, *values: float) -> dict:
        columns = ("painted_difference", "painted_share", "target_difference", "target_share")
        return {"count": count} | dict(zip(columns, values, strict=True))

    assert figures.summary() == {
        "own": {
            "car": row(1, 14, 0, 0, 0),
            "person": row(2, 7, 0, 60, 1),
            "person, night, both views": row(1, 0, 0, 60, 1),
            "person, night, target only": row(1, 14, 0, 60, 1),
        }
    }
    # With another sample's map, its boxes are judged too, and the own ones only where they touch none of these.
    figures = BoxFigures()
    figures.add(painted, target, boxes, [Box("person", (12, 5, 22, 15))])
    found = figures.summary()
    assert set(found["own"]) == {"car", "person", "person, night, both views"} and found["own"]["person"]["count"] == 1
    assert found["map"]["person"]["count"] == 1 and 0 < found["map"]["person"]["painted_difference"] < 14


def test_boxes_of_a_file(tmp_path):
    path = tmp_path / "boxes.jsonl"
    person = {"class": "person", "box": [1, 2, 3, 4], "also_labelled_in_visible": False}
    rows = [
        {"file_name": "a.b/0.webp", "time": "night", "boxes": [person, {"class": "car", "box": [0, 0, 9.5, 9]}]},
        {"file_name": "1.webp", "boxes": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scenes = read_boxes(path)
    assert scenes == {
        "a.b/0": [Box("person", (1, 2, 3, 4), "night, target only"), Box("car", (0, 0, 9.5, 9), "night")],
        "1": [],
    }
    # Twice the size, with 16 of its 128 columns cut off on each side.
    assert Box("car", (10, 10, 20, 20)).fitted((64, 48), (96, 96)).edges == (4, 20, 24, 40)
    for wrong in (
        '{"file_name": "1.webp"}',
        '{"file_name": "1", "boxes": [{"class": "car", "box": [3, 0, 3, 9]}]}',
        "[]",
        "x",
    ):
        path.write_text(json.dumps(rows[1]) + "\n" + wrong)
        with pytest.raises(ValueError, match="line 2 has to be an object with `file_name` and `boxes`"):
            read_boxes(path)


def test_displacement_of_a_picture(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from alignment import alignment

    blobs = torch.rand(2, 1, 14, 16, generator=torch.Generator().manual_seed(0))
    original = torch.nn.functional.interpolate(blobs, scale_factor=8).expand(-1, 3, -1, -1) * 255
    # The negative has the same edges, moved by 3 pixels to the right and 2 up.
    moved = torch.roll(255 - original, (-2, 3), (2, 3))
    found = alignment(moved, original)
    assert (found["right"], found["down"]) == (pytest.approx(3, abs=0.2), pytest.approx(-2, abs=0.2))
    assert found["distance"] == pytest.approx(13**0.5, abs=0.3) and found["clear_windows"] > 0.9
    assert alignment(torch.zeros_like(original), original) == {"clear_windows": 0.0}


def test_streets_of_the_ablation(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from thermal import Streets, street_tables

    places = [(4, 4, 14, 14), (30, 4, 40, 14), (8, 8, 18, 18), (30, 30, 40, 40)]
    rows = [
        {
            "file_name": f"{index}.webp",
            "time": ("night", "day")[index % 2],
            "boxes": [{"class": "person", "box": place, "also_labelled_in_visible": False}],
        }
        for index, place in enumerate(places)
    ]
    (tmp_path / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    streets = Streets(tmp_path, ["0", "1", "2", "3"])
    assert streets.others() == [2, 3, 0, 1]
    target = torch.stack([picture(place) for place in places])
    # Paintings show the other scene's person, those of the day more weakly.
    painted = torch.stack([picture(places[other], value=80 - 50 * (other % 2)) for other in streets.others()])
    right, wrong = (streets.judge(painted, target, target, shown) for shown in (None, streets.others()))
    assert wrong["map"]["person, night, target only"]["painted_share"] == 1
    assert wrong["map"]["person, day, target only"]["painted_difference"] == 10
    # By night the two persons touch, so the paintings do not tell whether the scene's own one is gone.
    assert set(wrong["own"]) == {"person", "person, day, target only"}
    assert wrong["own"]["person"] == right["own"]["person, day, target only"]
    assert wrong["own"]["person"]["painted_share"] == 0 and wrong["own"]["person"]["target_share"] == 1

    tables = street_tables({"projection": [{"right": right, "wrong": wrong}] * 2, "none": [{"right": right}]})
    assert "| projection | 0.00 | 1.00 |  |  |  |" in tables and "| none |  |  |  |  | 0.00 |" in tables
    assert "| the thermal image itself | 60.0 (1.00) |  () | 60.0 (1.00) |  () |" in tables
