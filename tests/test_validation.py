# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The picture of validation samples: which views it shows, and where."""

import numpy as np
import PIL.Image
from helpers import draw_triptych, run

from semantic_fill.paintings import draw_sheet


def test_cells_have_the_size_of_the_largest_picture_and_small_ones_are_enlarged():
    def cell(size, color, note=""):
        return PIL.Image.new("RGB", size, color), note

    rows = [
        {"a": cell((16, 24), "red"), "c": cell((32, 8), "lime")},
        {"a": cell((8, 8), "blue"), "b": cell((16, 24), "red", "a note"), "c": cell((1, 1), "lime")},
    ]
    sheet = np.asarray(draw_sheet(rows))
    # Cells of 32x24 three times as large, below the names of the columns, each above the place of its note.
    assert sheet.shape == (16 + 2 * (72 + 16), 3 * 96, 3)
    first, second = sheet[16:104], sheet[104:]
    assert (first[:72, :48] == [255, 0, 0]).all() and (first[:24, 192:] == [0, 255, 0]).all()
    assert (first[:, 96:192] == 255).all() and (first[72:] == 255).all()
    assert (second[:24, :24] == [0, 0, 255]).all() and (second[:72, 96:144] == [255, 0, 0]).all()
    assert (second[:3, 192:195] == [0, 255, 0]).all() and (second[3:, 192:] == 255).all()
    assert (second[72:, 96:192] < 255).any() and (second[72:, :96] == 255).all()
    assert all((sheet[:16, left : left + 96] < 255).any() for left in (0, 96, 192))


def test_what_the_longest_row_lacks_comes_last():
    red, lime = ((PIL.Image.new("RGB", (96, 96), color), "") for color in ("red", "lime"))
    sheet = np.asarray(draw_sheet([{"a": red, "c": lime}, {"a": red, "b": red}]))
    assert sheet.shape == (16 + 2 * 96, 3 * 96, 3)
    assert (sheet[16:112, 96:192] == [0, 255, 0]).all() and (sheet[112:, 192:] == [255, 0, 0]).all()


def test_samples_of_several_shapes_are_shown_in_their_own(base_folder, tmp_path):
    data, shapes = tmp_path / "data", [(32, 64), (64, 32)]
    data.mkdir()
    for index, (height, width) in enumerate(shapes):
        draw_triptych(index, height, width).save(data / f"{index}.png")
    more = "--instance_prompt x --aspect_buckets --max_train_steps 1 --train_batch_size 1 --validation_steps 1"
    more += " --validation_inference_steps 1 --num_validation_images 2"
    out = run(base_folder, tmp_path / "out", *more.split(), data=data, resolution=48)
    sheet = np.asarray(PIL.Image.open(out / "samples" / "step-000001.png"))
    # The columns are visible view, map, the paintings with it and without one, and the target. Neither sample has a wrong
    # map, because no other one has its size. Cells of 64x64 are twice as large, under a title and above their notes.
    assert sheet.shape == (16 + 2 * (128 + 16), 5 * 128, 3)
    for row, (height, width) in enumerate(shapes):
        views = np.split(np.asarray(draw_triptych(row, height, width)), 3, axis=1)
        cells = sheet[16 + 144 * row : 144 * (row + 1)]
        painted, unguided = [cells[::2, left : left + 128 : 2][:height, :width] for left in (256, 384)]
        for left, view in ((0, views[0]), (128, views[2]), (512, views[1])):
            assert np.array_equal(cells[::2, left : left + 128 : 2][:height, :width], view)
        # The gate is still nearly closed.
        assert painted.std() > 0 and abs(painted.astype(int) - unguided).max() < 64
        assert (sheet[144 * (row + 1) : 144 * (row + 1) + 16, 256:384] < 255).any()
