# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The picture of validation samples: which views it shows, and where."""

import numpy as np
import PIL.Image
from helpers import draw_triptych, run

from semantic_fill.validation import tile_pictures


def test_cells_have_the_size_of_the_largest_picture():
    colors = [
        PIL.Image.new("RGB", size, color) for size, color in (((2, 3), "red"), ((4, 1), "lime"), ((1, 1), "blue"))
    ]
    grid = np.asarray(tile_pictures([*colors, colors[0]], columns=2))
    assert grid.shape == (6, 8, 3)
    assert (grid[:3, :2] == [255, 0, 0]).all() and (grid[:1, 4:] == [0, 255, 0]).all()
    assert (grid[3:4, :1] == [0, 0, 255]).all() and (grid[3:, 4:6] == [255, 0, 0]).all()
    assert (grid > 0).any(axis=-1).sum() == 6 + 4 + 1 + 6


def test_samples_of_several_shapes_are_shown_in_their_own(base_folder, tmp_path):
    data, shapes = tmp_path / "data", [(32, 64), (64, 32)]
    data.mkdir()
    for index, (height, width) in enumerate(shapes):
        draw_triptych(index, height, width).save(data / f"{index}.png")
    more = "--instance_prompt x --aspect_buckets --max_train_steps 1 --train_batch_size 1 --validation_steps 1"
    more += " --validation_inference_steps 1 --num_validation_images 2"
    out = run(base_folder, tmp_path / "out", *more.split(), data=data, resolution=48)
    sheet = np.asarray(PIL.Image.open(out / "samples" / "step-000001.png"))
    assert sheet.shape == (2 * 64, 4 * 64, 3)
    for row, (height, width) in enumerate(shapes):
        views = np.split(np.asarray(draw_triptych(row, height, width)), 3, axis=1)
        # The columns are visible view, map, painting and target.
        for column, view in ((0, views[0]), (1, views[2]), (3, views[1])):
            assert np.array_equal(sheet[64 * row :, 64 * column :][:height, :width], view)
        painting = sheet[64 * row :, 128:][:height, :width]
        assert painting.std() > 0
