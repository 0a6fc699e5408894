# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the tests share: a tiny FLUX Fill in the real layout, and small real triptychs on disk."""

import json
import os
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]
# Nothing here may look anything up on the real Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import PIL.Image  # noqa: E402
import pytest  # noqa: E402
from diffusers import FluxFillPipeline  # noqa: E402
from small_flux_fill import build_pipeline  # noqa: E402


@pytest.fixture(scope="session")
def base() -> FluxFillPipeline:
    """A tiny FLUX Fill. Shared by all tests: change copies only."""
    pipeline = build_pipeline("test", seed=0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def base_folder(base, tmp_path_factory) -> str:
    """The tiny FLUX Fill as a normal diffusers folder."""
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    return str(folder)


def draw_triptych(seed: int, height: int = 32, width: int = 32) -> PIL.Image.Image:
    """Three different views of one random scene of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    target = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    visible = np.repeat(target.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    semantic = (target > 127).astype(np.uint8) * 255
    return PIL.Image.fromarray(np.concatenate([visible, target, semantic], axis=1))


def write_triptychs(folder: Path, count: int = 6, height: int = 32, width: int = 32) -> Path:
    """An image folder of triptychs with captions, as `--train_data_dir` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        draw_triptych(index, height, width).save(folder / f"{index:03d}.png")
        rows.append({"file_name": f"{index:03d}.png", "text": f"caption {index % 2}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="session")
def triptych_folder(tmp_path_factory) -> str:
    return str(write_triptychs(tmp_path_factory.mktemp("triptychs")))


def reference_layers(model) -> list[dict]:
    """The weights of a `SemanticAttentionModel` under the names of the independent reference."""
    return [
        {
            "norm_x_weight": layer.norm_image.weight,
            "norm_x_bias": layer.norm_image.bias,
            "norm_s_weight": layer.norm_semantic.weight,
            "norm_s_bias": layer.norm_semantic.bias,
            "q_weight": layer.to_q.weight,
            "k_weight": layer.to_k.weight,
            "v_weight": layer.to_v.weight,
            "out_weight": layer.to_out.weight,
            "scale": layer.scale,
        }
        for layer in model.layers
    ]


def assert_ended_well(done, processes: int) -> None:
    """
    A launched run exited with 0. With several gloo processes torch's native shutdown may abort one of them once all of
    its Python is done (https://github.com/pytorch/pytorch/pull/179291): that message, and no Python error of the run's
    own, is let pass, so such a test has to judge by what the run left behind.
    """
    aborted = processes > 1 and "terminate called without an active exception" in done.stderr
    if aborted:
        # The launcher's own traceback ends in ChildFailedError; any other one is the run's.
        assert done.stderr.count("Traceback (most recent call last)") == 1, done.stderr
        assert "ChildFailedError" in done.stderr and "SIGABRT" in done.stderr, done.stderr
    else:
        assert done.returncode == 0, done.stderr
