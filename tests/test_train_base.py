# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""`examples/train_base.py`: views from folders, their crops, and parts of a training that go on from one another."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FluxFillPipeline
from train_base import Scenes, main, parse_args, read_views


@pytest.fixture
def scenes(tmp_path, rng):
    """Two scenes of two views, the second of which is the negative of the first, and the same as triptychs."""
    for name in ("visible", "infrared", "triptychs"):
        (tmp_path / name).mkdir()
    for index in range(2):
        view = np.kron(rng.integers(0, 256, (8, 12, 3)), np.ones((4, 4, 1))).astype(np.uint8)
        PIL.Image.fromarray(view).save(tmp_path / "visible" / f"{index}.png")
        PIL.Image.fromarray(255 - view).save(tmp_path / "infrared" / f"{index}.bmp")
        triptych = np.concatenate((view, 255 - view, 0 * view), axis=1)
        PIL.Image.fromarray(triptych).save(tmp_path / "triptychs" / f"{index}.png")
    return tmp_path


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def options(folder, *more):
    shared = f"--train_data_dir {folder} --test_data_dir {folder} --views visible infrared --resolution 32 --width 48"
    return parse_args([*shared.split(), "--output_dir", str(folder / "base"), "--device", "cpu", *more])


def test_folders_and_triptychs_hold_the_same_views(scenes):
    names = ["visible", "infrared"]
    for ours, theirs in zip(read_views(scenes, names), read_views(scenes / "triptychs", names), strict=True):
        assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(ours, theirs, strict=True))


def test_a_view_without_its_scene_is_named(scenes):
    (scenes / "infrared" / "1.bmp").rename(scenes / "infrared" / "2.bmp")
    with pytest.raises(ValueError, match=r"only one holds \['1', '2'\]"):
        read_views(scenes, ["visible", "infrared"])


def test_crops_are_cut_from_all_views_alike(scenes):
    whole = Scenes([scenes], options(scenes), train=False).draw(2)
    assert whole.shape == (2, 2, 3, 32, 48) and not torch.equal(whole[0], whole[1])
    data = Scenes([scenes, scenes], options(scenes, "--crop_share", "0.5"), train=True)
    draws = data.draw(64)
    assert draws.shape == (64, 2, 3, 32, 48)
    # Values beyond [0, 1], which interpolation makes, are cut off in both views alike.
    assert torch.allclose(draws[:, 0], 1 - draws[:, 1], atol=1e-5)
    pictures = torch.cat((whole[:, 0], whole[:, 0].flip(-1)))
    distance = (draws[:, None, 0] - pictures).abs().amax(dim=(2, 3, 4)).amin(dim=1)
    # What is not cropped stays as it was, or is mirrored.
    assert 16 < (distance < 1e-3).sum() < 48


def test_parts_go_on_from_one_another(scenes):
    tiny = "--preset test --no-compile --no-same_view --vae_batch_size 2 --batch_size 2 --pool_size 2".split()
    main(options(scenes, *tiny, "--vae_steps", "1", "--transformer_steps", "0"))
    first = FluxFillPipeline.from_pretrained(scenes / "base", use_safetensors=True)
    base = ("--base", str(scenes / "base"), "--vae_steps", "0", "--transformer_steps", "2", "--span", "0.5", "1")
    main(options(scenes, *tiny, *base))
    second = FluxFillPipeline.from_pretrained(scenes / "base", use_safetensors=True)
    for name, same in (("vae", True), ("transformer", False)):
        weights = [torch.cat([p.flatten() for p in getattr(x, name).parameters()]) for x in (first, second)]
        assert torch.equal(*weights) is same
    card = (scenes / "base" / "README.md").read_text()
    assert "from base on" in card and "2 steps of 2\ndiptychs of 48x32" in card and "infrared to visible PSNR" in card
