# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the page share: its arguments, files to upload, and a visitor who sends anything."""

import contextlib
import json
import uuid
from argparse import Namespace
from pathlib import Path

import app
import httpx
import PIL.Image
import pytest
from helpers import png_of_zeros


SIZE, STEPS, PROMPT = 64, 2, "a hill"


def page_arguments(base_folder: str, **given) -> Namespace:
    args = app.parse_args(["--base", base_folder, "--resolution", str(SIZE), "--num_inference_steps", str(STEPS)])
    return Namespace(**(vars(args) | given))


def write_uploads(folder: Path) -> Path:
    """Files, most of which are no usable pictures."""
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("this is no picture")
    (folder / "text.txt").write_text("this is no picture")
    (folder / "huge.png").write_bytes(png_of_zeros(10000, 9000))
    (folder / "bomb.png").write_bytes(png_of_zeros(30000, 30000))
    (folder / "large.png").write_bytes(png_of_zeros(8000, 5001))
    with open(folder / "heavy.png", "wb") as file:
        file.truncate(app.MAX_UPLOAD_BYTES + 1)
    PIL.Image.new("I;16", (9, 9)).save(folder / "deep.png")
    PIL.Image.new("RGB", (90, 70), "red").save(folder / "good.png")
    return folder


@contextlib.contextmanager
def serve_page(base_folder: str, samples=(), weights: str | None = None, **limits):
    """Serves the page in this process, with other limits than its own."""
    with pytest.MonkeyPatch.context() as patch:
        # Serving changes these for the whole process.
        patch.setenv("GRADIO_TEMP_DIR", "unused")
        patch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", PIL.Image.MAX_IMAGE_PIXELS)
        for name, value in limits.items():
            patch.setattr(app, name, value)
        painter = app.Painter(page_arguments(base_folder, weights=weights, prompt=PROMPT))
        with app.serve(painter, list(samples), quiet=True) as page:
            yield Namespace(painter=painter, url=page.local_url)


class Visitor:
    """A session of its own that sends anything."""

    def __init__(self, server):
        self.url, self.session = f"{server.url}gradio_api/", {"session_hash": uuid.uuid4().hex}
        functions = httpx.get(f"{server.url}config", timeout=60).json()["dependencies"]
        self.functions = {function["api_name"]: function["id"] for function in functions}

    def send(self, path: Path) -> httpx.Response:
        with open(path, "rb") as file:
            return httpx.post(f"{self.url}upload", files={"files": file}, timeout=60)

    def join(self, function: str, *data, place: str = "queue/join") -> httpx.Response:
        request = {"data": data, "fn_index": self.functions[function], **self.session}
        return httpx.post(f"{self.url}{place}", json=request, timeout=60)

    def answer(self) -> list[dict]:
        """All that the server says, once it has done what this session asked for."""
        text = httpx.get(f"{self.url}queue/data", params=self.session, timeout=120).text
        return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]

    def call(self, function: str, *data) -> tuple[list, str]:
        """What a function returns and what it warns of."""
        assert self.join(function, *data).status_code == 200
        said = self.answer()
        (done,) = (each for each in said if each["msg"] == "process_completed")
        return done["output"].get("data"), " ".join(each["log"] for each in said if each["msg"] == "log")

    def give(self, path: Path, function: str = "upload") -> tuple[str, list, str]:
        """The path of an upload on the server, and what a function makes of it."""
        (stored,) = self.send(path).json()
        return stored, *self.call(function, {"path": stored, "meta": {"_type": "gradio.FileData"}})
