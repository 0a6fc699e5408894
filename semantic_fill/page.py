# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The page of a run, `samples/index.html`: its curves and its paintings, in one file that needs no other.

It is drawn anew from the run's state at each validation. The demo's page is made of the same parts.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from semantic_attention import name_layers
from semantic_fill.checkpoints import BEST
from semantic_fill.files import write_atomically
from semantic_fill.options import Options
from semantic_fill.training_state import TrainingState, loss_labels, worth_labels


# A curve with more points is drawn as means over equal parts.
MOST_POINTS = 200
# More paintings than these would make the page too large to send.
MOST_SHEETS, SHEET_WIDTH = 12, 1200
# Name -> steps and values.
Curves = dict[str, tuple[Sequence[float], Sequence[float]]]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222 }
h1, h2, p, figcaption { overflow-wrap: anywhere } img { max-width: 100%; height: auto } figure { margin: 1.5em 0 }
pre { background: #f4f4f4; padding: 1em; overflow-x: auto; font-size: 13px }
table { border-collapse: collapse; display: block; overflow-x: auto; white-space: nowrap }
table { margin: 0 } figure { overflow-x: auto } figure img { max-width: max(100%, 600px) }
td, th { padding: .25em .9em; border-bottom: 1px solid #ccc; text-align: right }
td:first-child, th:first-child { text-align: left }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)) }
.charts { gap: 1em; align-items: start }
"""


# -- Parts ------------------------------------------------------------------------------------------------------------


def wrap_page(title: str, body: str, style: str = "") -> str:
    """A whole page of a title, which is text, a body, which is HTML, and rules that its parts have beside `STYLE`."""
    title = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>\n'
        f"<style>{STYLE}{style}</style></head><body>\n<h1>{title}</h1>\n{body}</body></html>\n"
    )


def data_url(kind: str, data: bytes) -> str:
    """An URL that holds a picture of a kind, such as `png`."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture_url(picture: PIL.Image.Image, form: str = "PNG", **options) -> str:
    """A picture as an URL that holds it."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return data_url(form.lower(), buffer.getvalue())


def draw_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts in HTML."""

    def line(kind: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>\n"

    return f"<table>\n{line('th', head)}{''.join(line('td', row) for row in rows)}</table>\n"


def draw_chart(title: str, curves: Curves) -> str:
    """Curves over steps, as a picture in HTML."""
    figure = Figure(figsize=(4.6, 3.4 if len(curves) > 1 else 3), layout="constrained")
    axes = figure.subplots()
    for name, (steps, values) in curves.items():
        few = len(steps) < 30
        axes.plot(steps, values, label=name, marker="." if few else None, linewidth=1.5 if few else 0.8)
    axes.set(title=title, xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        # On the axes it would cover curves.
        figure.legend(fontsize="small", ncols=2, loc="outside lower center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f'<img alt="{html.escape(title)}" src="{data_url("svg+xml", buffer.getvalue())}">\n'


def thin_out(
    steps: Sequence[float], values: Sequence[float], points: int = MOST_POINTS
) -> tuple[list[float], list[float]]:
    """A curve of at most so many points: means over equal parts, without values that are not finite."""
    pairs = [(step, value) for step, value in zip(steps, values) if math.isfinite(value)]
    parts = np.array_split(np.array(pairs, float).reshape(-1, 2), min(points, max(1, len(pairs))))
    means = [part.mean(axis=0).tolist() for part in parts if len(part)]
    return [step for step, _ in means], [value for _, value in means]


# -- The page of a run ------------------------------------------------------------------------------------------------


def curve_of(state: TrainingState, name: str) -> tuple[list[float], list[float]]:
    """One of the figures of the validations, where it was measured."""
    found = [(v["step"], v[name]) for v in state.validations if v.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def run_charts(state: TrainingState, maps: Sequence[str]) -> str:
    """The charts of a run of these maps, those that it has figures for."""
    first = state.step - len(state.losses) + 1
    losses = {"training": thin_out(range(first, state.step + 1), state.losses)}
    found = dict.fromkeys(name for v in state.validations for name in v)
    names = {"training_loss": "training, mean"}
    names |= {n: f"held out, {label}".replace("right map, ", "") for n, label in loss_labels(found).items()}
    names |= {"loss": "held out"}
    losses |= {label: curve_of(state, name) for name, label in names.items()}
    scales = [v["scales"] for v in state.validations]
    layers = dict(zip(name_layers(maps, len(scales[0]) if scales else 0), zip(*scales)))
    steps = [v["step"] for v in state.validations]
    charts = {
        "Loss": losses,
        "What the map is worth (wrong minus right)": {
            label: curve_of(state, name) for name, label in worth_labels(found, "map").items()
        },
        "Scale of the module": {name: (steps, values) for name, values in layers.items()},
    }
    drawn = {title: {n: curve for n, curve in curves.items() if curve[0]} for title, curves in charts.items()}
    return "".join(draw_chart(title, curves) for title, curves in drawn.items() if curves)


def run_table(state: TrainingState) -> str:
    found = dict.fromkeys(name for v in state.validations for name in v)
    last = {"not_averaged": "last weights"}
    names = {"step": "step", "training_loss": "training loss", **loss_labels(found), "loss": "held-out loss"}
    names = {n: head for n, head in names.items() if n not in last} | worth_labels(found, "worth of the map") | last
    names = {name: head for name, head in names.items() if any(v.get(name) is not None for v in state.validations)}
    rows = []
    for v in state.validations:
        cells = [v.get(name) for name in names]
        rows.append(["" if c is None else str(c) if isinstance(c, int) else f"{c:.4f}" for c in cells])
        if v is state.best:
            rows[-1][0] += " (best)"
    return draw_table(list(names.values()), rows)


def sample_file(options: Options, step: int) -> Path:
    """Where the paintings of a step are."""
    return Path(options.output_dir, "samples", f"step-{step:06d}.png")


def painted_samples(options: Options, state: TrainingState) -> list[Path]:
    """The paintings of this run, from the oldest to the newest."""
    files = [sample_file(options, validation["step"]) for validation in state.validations]
    return [path for path in files if path.is_file()]


def draw_run_page(options: Options, state: TrainingState, summary: dict[str, str]) -> str:
    """The page as HTML. A run that is over has a `summary`."""
    mode, best = html.escape(options.semantic_mode), state.best
    body = [f"<p>Mode <code>{mode}</code>, step {state.step} of {options.max_train_steps}.</p>\n"]
    if not any("loss" in validation for validation in state.validations):
        body.append("<p>No samples are held out: everything here is of samples that are trained on.</p>\n")
    if best is not None:
        kept = f" Its weights are in <code>{BEST}/</code>." if best is state.kept else ""
        body.append(f"<p>The lowest held-out loss is {best['loss']:.4f}, of step {best['step']}.{kept}</p>\n")
    body.append(f'<div class="charts">\n{run_charts(state, options.semantic_maps)}</div>\n')
    if summary:
        items = "".join(f"<li>{html.escape(f'{name}: {value}')}</li>\n" for name, value in summary.items())
        body.append(f"<h2>Summary</h2>\n<ul>\n{items}</ul>\n")
    if state.validations:
        body.append(f"<h2>Validations</h2>\n{run_table(state)}<h2>Paintings</h2>\n")
    files = painted_samples(options, state)[::-1]
    # Evenly spread, with the newest and the oldest.
    chosen = {round(i * (len(files) - 1) / (MOST_SHEETS - 1)) for i in range(MOST_SHEETS)} if files else set()
    for path in (files[index] for index in sorted(chosen)):
        with PIL.Image.open(path) as sheet:
            sheet = sheet.convert("RGB")
        sheet.thumbnail((SHEET_WIDTH, 4 * SHEET_WIDTH))
        url = picture_url(sheet, "WEBP", quality=80)
        title = f"Step {int(path.stem.removeprefix('step-'))}"
        body.append(f'<figure><figcaption>{title}</figcaption><img alt="{title}" src="{url}"></figure>\n')
    return wrap_page(f"Semantic fill: {Path(options.output_dir).resolve().name}", "".join(body))


def write_page(options: Options, state: TrainingState, summary: dict[str, str] | None = None) -> None:
    """Writes the page into `samples/`. A run that is over has a `summary`."""
    text, folder = draw_run_page(options, state, summary or {}), Path(options.output_dir, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", lambda path: path.write_text(text, encoding="utf-8"))
