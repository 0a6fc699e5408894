# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The page of the demo, in one file that needs no other, and the README's picture of it:

    python examples/demo_page.py demo/index.html --output docs/demo.png

The picture needs `playwright` and a Chromium, which `playwright install chromium` brings.
"""

import argparse
import contextlib
import html
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image

from semantic_fill.page import draw_table, picture_url, wrap_page


MAX_BYTES = 250_000
MOST_ROWS, PICTURE_ROWS = 8, 3
# The columns of the grid, and what the page calls them.
TITLES = {
    "visible": "visible",
    "semantic": "map",
    "without map": "without map",
    "right map": "painted",
    "wrong map": "wrong map",
    "target": "target",
}

STYLE = """
.row { display: grid; grid-template-columns: repeat(6, 1fr); gap: .5em; margin: .5em 0 }
.large { grid-template-columns: repeat(4, 1fr) }
.row figure, .compare figure { margin: 0 } .row img, .compare img { display: block; width: 100%; max-width: 100% }
.row figcaption { font-size: 13px; line-height: 1.3; color: #555 } .large figcaption { font-size: 16px }
.compare { --x: 50% } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .5em }
.layers { position: relative } .layers img + img { position: absolute; top: 0; clip-path: inset(0 0 0 var(--x)) }
.layers::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--x); border-left: 2px solid #fff }
.compare input { width: 100%; height: 2em; margin: 0 }
@media (max-width: 640px) {
  .row { grid-template-columns: repeat(3, 1fr); margin: 1em 0 } .large { grid-template-columns: repeat(2, 1fr) }
  pre { white-space: pre-wrap } table { white-space: normal } td, th { padding: .25em .4em }
}
"""
PAGE = """<p>The model sees the gray hillshade and the map, and paints the satellite view. It never saw the
Americas: it was trained on Eurasia, Africa and Oceania.</p>
{first}<p><b>Look at the coast.</b> The hillshade goes on under water, so land and sea look alike in it. Only the map tells
them apart, and the painted coast is the map's. The colors of the land are a guess from its relief. Of {count} held-out
pictures, this is the one in which the right map gains most over a
wrong one.</p>
<h2>The right map and a wrong one</h2>
<p>Left of the line is the right map and what it paints, right of it another picture's map. Hillshade and noise are the
same. Move the slider.</p>
<div class="compare"><div class="pair">{layers}</div>
<input type="range" min="0" max="100" value="50" autocomplete="off" aria-label="share of the right map"
oninput="this.parentNode.style.setProperty('--x', this.value + '%')"></div>
<h2>The first held-out pictures</h2>
{rows}<h2>Figures on {count} held-out pictures</h2>
{table}<p>Each figure is a mean over the pictures. Water is where blue is above red. Gradient energy is the mean difference
of neighboring gray pixels, as a share of the targets': paintings that are too soft have less than 1.</p>
<h2>Training</h2><div class="charts">{charts}</div>
{attention}<h2>Commands</h2>
<p>Run them in the repository. The first makes this page; the others are the two trainings alone.</p>
<pre>{commands}</pre>
"""
ATTENTION = """<h2>Where the module looks</h2>
<div class="row large">{figures}</div>
<p>The ring marks a place of the painting, half-way through denoising. The heat is its attention over the map, averaged
over the heads.</p>
"""


def draw_image(picture: PIL.Image.Image, title: str) -> str:
    return f'<img alt="{html.escape(title)}" src="{picture_url(picture)}">'


def draw_row(pictures: dict[str, PIL.Image.Image], kind: str = "row") -> str:
    """Pictures side by side, each over its title."""
    figures = (
        f"<figure>{draw_image(picture, title)}<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, picture in pictures.items()
    )
    return f'<div class="{kind}">{"".join(figures)}</div>\n'


def draw_layers(right: PIL.Image.Image, wrong: PIL.Image.Image, what: str) -> str:
    """Two pictures on each other. The slider moves the line between them."""
    return f'<div class="layers">{draw_image(right, f"right {what}")}{draw_image(wrong, f"wrong {what}")}</div>'


def draw_page(
    columns: dict[str, list[PIL.Image.Image]],
    best: int,
    metrics: dict[str, dict[str, float]],
    charts: str,
    attention: dict[str, PIL.Image.Image],
    commands: str,
) -> str:
    """
    The page as HTML.

    Args:
        columns: the pictures of each name in `TITLES`, one for each held-out view, and as "other" the wrong maps.
        best: the view to open with.
        metrics: figures of each painting, by their names.
        charts: the curves of the training in HTML.
        attention: pictures that show where the module looks, by their titles. There may be none.
        commands: what to run in a shell.
    """
    opening = {TITLES[name]: columns[name][best] for name in ("visible", "semantic", "right map", "target")}
    layers = draw_layers(columns["semantic"][best], columns["other"][best], "map")
    layers += draw_layers(columns["right map"][best], columns["wrong map"][best], "painting")
    count = len(columns["target"])
    rows = [{title: columns[name][i] for name, title in TITLES.items()} for i in range(min(MOST_ROWS, count))]
    names = next(iter(metrics.values()))
    table = draw_table(("", *names), [(name, *(f"{v:.2f}" for v in row.values())) for name, row in metrics.items()])
    body = PAGE.format(
        first=draw_row(opening, "row large"),
        layers=layers,
        rows="".join(map(draw_row, rows)),
        table=table,
        count=count,
        charts=charts,
        attention=ATTENTION.format(figures=draw_row(attention)) if attention else "",
        commands=html.escape(commands),
    )
    return wrap_page("Semantic fill: hillshade to satellite", body, STYLE)


def save_small(picture: PIL.Image.Image, path: Path) -> None:
    """
    Saves a picture as PNG with as many colors as `MAX_BYTES` allow, because everyone who reads a README loads its
    pictures.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for colors in (256, 128, 64, 32):
        # The default method blends colors that few pixels have, such as a map's rivers.
        picture.quantize(colors, method=PIL.Image.Quantize.MAXCOVERAGE, kmeans=3).save(path, "PNG", optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            return
    raise ValueError(f"{path} has {path.stat().st_size} bytes even with {colors} colors. Draw fewer views.")


def find_browser() -> str | None:
    """The Chromium that the variable CHROMIUM names, or one of this machine. Else playwright takes the one that it brings."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A Chromium of playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox does not start for root, and it guards against pages of others only.
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield browser
        browser.close()


def as_picture(shot: bytes) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(shot)).convert("RGB")


def take_picture(page: Path) -> PIL.Image.Image:
    """The large row of a page and the first rows of its grid, as a browser shows them."""
    with open_browser() as browser:
        window = browser.new_page(viewport={"width": 900, "height": 800})
        window.goto(page.resolve().as_uri())
        rows = f"[...document.querySelectorAll('.row')].slice(0, {1 + PICTURE_ROWS})"
        window.evaluate(f"document.body.replaceChildren(...{rows})")
        return as_picture(window.locator("body").screenshot())


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="Page that examples/demo.py wrote.")
    parser.add_argument("--output", type=Path, default=Path("docs/demo.png"))
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    save_small(take_picture(args.page), args.output)


if __name__ == "__main__":
    main(parse_args())
