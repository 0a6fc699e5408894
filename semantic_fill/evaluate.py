# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Paints a data set with trained weights and measures how near the paintings come to the targets.

Every sample is painted with its own semantic map (`right`), with another sample's (`wrong`) and without one (`none`), from
the same noise: what the right map gains over the other two is what the guidance is worth. Of several maps, each is wrong in
turn. The figures go to
`evaluation.json` and, as a table, to `evaluation.md`; `evaluation.png` shows the first samples.

    pip install "semantic-fill[evaluate]"
    python -m semantic_fill.evaluate --pretrained_model_name_or_path black-forest-labs/FLUX.1-Fill-dev \\
      --trained user/my-semantic-fill --train_data_dir held_out --output_dir evaluation

Views have the size that the weights were trained at, unless you pass --resolution and --width.
"""

import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import torch
import torchmetrics
import transformers
from huggingface_hub import EvalResult
from tqdm.auto import tqdm

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline, read_trained_settings
from semantic_attention import SINGLE_MAP
from semantic_fill.boxes import DatasetBoxes, box_lines
from semantic_fill.checks import check_samples
from semantic_fill.command_line import parse_options
from semantic_fill.data import TriptychDataset
from semantic_fill.files import is_hub_id, printable
from semantic_fill.metrics import METRICS, Figures, MetricOptions, classes_of, load_networks, to_bytes
from semantic_fill.option_fields import check_output_dir, option
from semantic_fill.options import DataOptions, ModelOptions
from semantic_fill.paintings import as_picture, draw_sheet
from semantic_fill.publish import add_to_model_card, as_text
from semantic_fill.sampling import MAPS, batches_of, group_rows, kinds_of, maps_of, seed_of
from semantic_fill.tables import load_source
from semantic_fill.views import Palette, read_palette


logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")
# Weights of earlier versions do not record the size of a view. It was the trainer's default then.
UNRECORDED_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(ModelOptions, DataOptions, MetricOptions):
    """Evaluation"""

    trained: str = option(help="What the trainer wrote: a folder, a checkpoint in it, or a Hub repository.")
    adapters: tuple[str, ...] = option((), help="LoRAs to paint with besides --trained: files, folders, repositories.")
    adapter_weights: tuple[float, ...] = option(
        (), at_least=-math.inf, help="Weights of --trained and of each of --adapters. Default: 1."
    )
    train_split: str = option("train", alias="split", help="Split of --dataset_name. Other splits are never read.")
    resolution: int = option(None, help="Height of a panel in pixels. Default: what the weights were trained at.")
    width: int = option(None, help="Width of a panel. Default: --resolution, or what the weights were trained at.")
    maps: tuple[str, ...] | None = option(None, choices=MAPS, help="Default: all that have an effect.")
    semantic_scale: float = option(
        1.0, at_least=-math.inf, help="Strength of the guidance. 0 drops a map, and maps on the canvas take 0 or 1."
    )
    num_inference_steps: int = option(28, at_least=1, help="Denoising steps.")
    guidance_scale: float = option(30.0, help="Guidance scale.")
    seed: int = option(0, help="The noise of a sample follows from it and from the sample's row alone.")
    batch_size: int = option(4, at_least=1, help="Samples painted at once.")
    device: str = option(
        "cuda" if torch.cuda.is_available() else "cpu",
        help="Device to paint and measure on. Default: cuda, or cpu without a GPU.",
    )
    dtype: str = option(None, choices=DTYPES, help="Default: bfloat16, or float32 on a CPU.")
    offload: bool = option(False, help="Keep only the model that is at work on the device.")
    output_dir: str = option("evaluation", help="Folder for figures, table and picture.")
    grid_rows: int = option(8, at_least=1, help="Samples in the picture.")
    update_model_card: bool = option(False, help="Write figures and picture into the model card of --trained.")

    def __post_init__(self):
        super().__post_init__()
        self._set_defaults(dtype="float32" if torch.device(self.device).type == "cpu" else "bfloat16")
        check_output_dir(self.output_dir, train_data_dir=self.train_data_dir)
        # These would otherwise show only after the base model is loaded, or after everything is painted.
        if not os.path.isdir(self.trained) and not is_hub_id(self.trained):
            raise ValueError(f"--trained {self.trained} is neither a folder nor a repository user/name.")
        for adapter in self.adapters:
            if not os.path.exists(adapter) and not is_hub_id(adapter):
                raise ValueError(f"--adapters {adapter} is neither a file nor a folder nor a repository user/name.")
        if self.adapter_weights and len(self.adapter_weights) != 1 + len(self.adapters):
            raise ValueError(
                f"--adapter_weights has to hold a number for --trained and for each of --adapters, {1 + len(self.adapters)}"
                f" in all, but holds {len(self.adapter_weights)}."
            )
        if "miou" in (self.metrics or ()) and self.palette is None:
            raise ValueError("--metrics miou needs the --palette of the targets.")
        card = Path(self.trained, "README.md")
        if self.update_model_card and not is_hub_id(self.trained) and not card.is_file():
            raise ValueError(f"--update_model_card needs {card}, which is not there. A checkpoint has none.")

    @property
    def loras(self) -> list[tuple[str, float]]:
        """All LoRAs to paint with, and their weights."""
        sources = (self.trained, *self.adapters)
        return list(zip(sources, self.adapter_weights or [1.0] * len(sources)))


def parse_args(arguments: list[str] | None = None) -> EvaluationOptions:
    return parse_options(EvaluationOptions, __doc__, sys.argv[1:] if arguments is None else arguments)


# -- Choose -----------------------------------------------------------------------------------------------------------


def choose_size(options: EvaluationOptions, settings: dict) -> EvaluationOptions:
    """Options with a size: the one that was asked for, or else the one that the weights record."""
    height, width = settings.get("height"), settings.get("width")
    # --resolution alone also sets the width.
    asked = options.width is not None
    options = replace(
        options,
        resolution=options.resolution or height or UNRECORDED_SIZE,
        width=options.width or width or height or UNRECORDED_SIZE,
    )
    view = f"{options.width}x{options.resolution} pixels a view"
    if height is None:
        logger.warning(
            f"{options.trained} does not record the size that it was trained at. Painting at {view}"
            + ("." if asked else "; pass another size with --resolution and --width.")
        )
    elif (options.resolution, options.width) != (height, width):
        logger.warning(f"Painting at {view}, although {options.trained} was trained at {width}x{height}.")
    else:
        logger.info(f"Painting at {view}, the size that {options.trained} was trained at.")
    return options


def choose_mode(options: EvaluationOptions) -> str:
    """
    The mode of the first LoRA that uses a map and has a weight, or else `"none"`.

    Raises:
        `ValueError`: if the data has maps that none of the LoRAs was trained with.
    """
    found = [read_trained_settings(s, cache_dir=options.cache_dir) for s, weight in options.loras if weight != 0]
    found = [settings for settings in found if SEMANTIC_MODES[settings.get("semantic_mode", "none")].uses_map]
    known = {name for settings in found for name in settings.get("semantic_maps", SINGLE_MAP)}
    if found and not known.issuperset(options.semantic_maps):
        raise ValueError(
            f"The data has the maps {', '.join(options.semantic_maps)}, but the weights were trained with"
            f" {', '.join(sorted(known))}."
        )
    return found[0]["semantic_mode"] if found else "none"


def choose_maps(options: EvaluationOptions, mode: str) -> list[str]:
    """
    The kinds of maps to paint with.

    Raises:
        `ValueError`: if one was asked for that the mode has no use for, or a scale.
    """
    uses_map, scale = SEMANTIC_MODES[mode].uses_map, options.semantic_scale
    if not uses_map and scale != 1:
        raise ValueError(f'--semantic_scale {scale:g} has no effect, because `semantic_mode="{mode}"` uses no map.')
    if SEMANTIC_MODES[mode].map_on_canvas and scale not in (0, 1):
        raise ValueError(
            f'--semantic_scale has to be 0 or 1 with `semantic_mode="{mode}"`, which has the map on its canvas, but is'
            f" {scale:g}."
        )
    # A scale of 0 drops the map.
    default = MAPS if uses_map and scale != 0 else ("none",)
    kinds = [kind for kind in kinds_of(options.semantic_maps) if kind.split()[0] in (options.maps or default)]
    if not uses_map and kinds != ["none"]:
        raise ValueError(
            f'--maps {" ".join(kinds)} needs weights that use a map, but `semantic_mode="{mode}"` uses none.'
        )
    return kinds


def choose_metrics(
    options: EvaluationOptions, palette: Palette, dataset: TriptychDataset, rows: list[int]
) -> tuple[list[str], dict[str, str]]:
    """
    The metrics to measure, and why mIoU is none of them although there is a palette.

    Raises:
        `ValueError`: if a metric was asked for that the data does not allow.
    """
    metrics, absent = list(options.metrics or METRICS), {}
    if len(dataset) < 2 and {"fid", "kid"} & set(metrics):
        raise ValueError("FID and KID compare sets, but the data set has one sample: leave them out of --metrics.")
    if "miou" in metrics:
        try:
            if len(set(palette.values())) < len(palette):
                raise ValueError(f"--palette {options.palette} has to give each class a color of its own.")
            if palette:
                classes_of(to_bytes(torch.stack([dataset.views(row)["target"] for row in rows])), palette, rows)
        except ValueError as error:
            # The palette may be there for the maps alone.
            if options.metrics is not None:
                raise
            absent["miou"] = str(error).rstrip(".")
        if not palette:
            metrics.remove("miou")
    return metrics, absent


def load_data(options: EvaluationOptions, pairs: bool) -> TriptychDataset:
    """The samples, read and checked as for training."""
    source = load_source(options, pairs, options.cache_dir)
    if options.max_train_samples is not None:
        source = source.head(options.max_train_samples)
    shape = None if options.aspect_buckets else options.width / options.resolution
    dataset = TriptychDataset(source, options, check_samples(source, shape, pairs))
    logger.info(f"Data: {dataset.summary()}")
    if source.left_out:
        logger.info(f"Left out: {', '.join(map(printable, source.left_out[:50]))}")
    return dataset


# -- Paint ------------------------------------------------------------------------------------------------------------


def load_pipeline(options: EvaluationOptions) -> FluxFillSemanticPipeline:
    pipeline = FluxFillSemanticPipeline.from_pretrained(
        options.pretrained_model_name_or_path, dtype=getattr(torch, options.dtype), **options.loading
    )
    for number, (source, _) in enumerate(options.loras):
        pipeline.load_lora_weights(source, adapter_name=str(number), cache_dir=options.cache_dir)
    pipeline.set_adapters(list(map(str, range(len(options.loras)))), [weight for _, weight in options.loras])
    if options.offload:
        pipeline.enable_model_cpu_offload(device=options.device)
    else:
        pipeline.to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def paint(
    pipeline: FluxFillSemanticPipeline,
    dataset: TriptychDataset,
    kind: str,
    options: EvaluationOptions,
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """
    Yields rows and their painted and target views batch by batch, `(batch, 3, height, width)` in 8 bits as they would be
    saved.
    """
    for rows in tqdm(batches_of(dataset, options.batch_size), desc=f"Painting, {kind} map", disable=None):
        views, maps = [dataset.views(index) for index in rows], [maps_of(dataset, index, kind) for index in rows]
        output: Any = pipeline(
            prompt=[dataset.caption(index) for index in rows],
            image=torch.stack([view["visible"] for view in views]),
            semantic_image={name: torch.stack([each[name] for each in maps]) for name in maps[0]},
            semantic_scale=options.semantic_scale,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[torch.Generator().manual_seed(seed_of(options.seed, "evaluate", index)) for index in rows],
            output_type="pt",
        )
        yield rows, to_bytes(output.images.float().cpu()), to_bytes(torch.stack([view["target"] for view in views]))


# -- Report -----------------------------------------------------------------------------------------------------------


def table(report: dict) -> str:
    """The figures as a markdown table, one row for each kind of map, and under it what could not be measured and why."""
    names = [name for name in METRICS if name in report["settings"]["metrics"]]
    heads = [f"{METRICS[name][0]} {'↑' if METRICS[name][2] else '↓'}" for name in names]
    lines = ["| map | " + " | ".join(heads) + " |", "| --- " * (len(names) + 1) + "|"]
    for kind, figures in report["figures"].items():
        cells = [f"{figures[name]:.{METRICS[name][1]}f}" if name in figures else "absent" for name in names]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    width, height, steps = (report["settings"][name] for name in ("width", "resolution", "num_inference_steps"))
    lines += ["", f"{report['count']} samples of {as_text(report['data'])} at {width}x{height}, {steps} steps."]
    if len(report["adapters"]) > 1 or report["settings"]["adapter_weights"]:
        lines[-1] += (
            f" Painted with {', '.join(f'{name} at weight {weight:g}' for name, weight in report['adapters'])}."
        )
    if report["features"] and {"fid", "kid"} & set(names):
        lines[-1] += f" FID and KID see with {report['features']} and need thousands of samples to be compared."
    lines += [f"{METRICS[name][0]} is absent: {reason}." for name, reason in report["absent"].items()]
    lines += box_lines(report["figures"])
    return "\n".join(lines) + "\n"


def draw_grid(columns: dict[str, list[torch.Tensor]]) -> PIL.Image.Image:
    """8-bit pictures under the names of their columns."""
    rows = zip(*columns.values())
    return draw_sheet([{name: (as_picture(tile / 255), "") for name, tile in zip(columns, row)} for row in rows])


def eval_results(report: dict) -> list[EvalResult]:
    """The Hub shows one figure for each metric, so it gets those of the first kind of map, `right` where there is one."""
    best = next(iter(report["figures"].values()))
    shared = {"task_type": "image-to-image", "dataset_type": report["data"], "dataset_name": report["data"]}
    return [
        EvalResult(metric_type=name, metric_name=METRICS[name][0], metric_value=best[name], **shared)
        for name in METRICS
        if name in best
    ]


# -- Run --------------------------------------------------------------------------------------------------------------


def main(options: EvaluationOptions) -> dict:
    """Paints, measures and writes. Returns what `evaluation.json` holds."""
    settings = read_trained_settings(options.trained, cache_dir=options.cache_dir)
    options, mode = choose_size(options, settings), choose_mode(options)
    kinds, uses_map = choose_maps(options, mode), SEMANTIC_MODES[mode].uses_map
    dataset = load_data(options, pairs=not uses_map)
    batches = batches_of(dataset, options.batch_size)
    palette = read_palette(options.palette) if options.palette else {}
    metrics, absent = choose_metrics(options, palette, dataset, batches[0])
    # If the first sample of a group has no wrong map, none has, and `right` would be painted before that shows.
    for kind, rows in itertools.product((kind for kind in kinds if kind.startswith("wrong")), group_rows(dataset)):
        maps_of(dataset, rows[0], kind)
    boxes, options = DatasetBoxes(options.boxes, dataset), replace(options, metrics=tuple(metrics))
    networks, not_loaded = load_networks(options, options.device, options.cache_dir)
    absent |= not_loaded
    pipeline = load_pipeline(options)

    order = [row for rows in batches for row in rows]
    shown = [dataset.views(row) for row in order[: options.grid_rows]]
    names = ("visible", *(dataset.maps if uses_map else ()), "target")
    columns = {n: [to_bytes(view.get(n, torch.full_like(view["visible"], 0.5))) for view in shown] for n in names}
    metrics = [name for name in metrics if name not in absent]
    figures, samples = {}, {}
    for kind in kinds:
        gathered = Figures(metrics, networks, palette, len(dataset), options.device)
        column = columns["no map" if kind == "none" else f"{kind} map"] = []
        for rows, painted, target in paint(pipeline, dataset, kind, options):
            gathered.add(painted, target, rows)
            boxes.add(kind, rows, painted, target)
            # The clone holds only what is shown. A whole data set of paintings would fill the memory.
            column += painted[: len(shown) - len(column)].clone()
        figures[kind], samples[kind] = gathered.summary(options.seed) | boxes.summary(kind), gathered.samples

    # The table goes into cards, which must not show paths of this machine.
    data = options.dataset_name or options.train_data_dir or ""
    name = Path(data).resolve().name if os.path.isdir(data) else data
    features = options.fid_model if is_hub_id(options.fid_model) else Path(options.fid_model).name
    report = {
        "trained": options.trained,
        # A name of bytes that the machine's encoding does not know cannot be written as it is.
        "data": os.fsencode(name).decode("utf-8", "replace"),
        "adapters": [(Path(source).name, weight) for source, weight in options.loras],
        "semantic_mode": pipeline.config["semantic_mode"],
        "count": len(dataset),
        "figures": figures,
        "absent": absent,
        "features": features if "fid" in networks else None,
        "settings": vars(options),
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, torchmetrics)},
        "samples": samples,
    }
    output_dir = Path(options.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "evaluation.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    (output_dir / "evaluation.md").write_text(table(report), encoding="utf-8")
    picture = output_dir / "evaluation.png"
    draw_grid(columns).save(picture)
    print(table(report))
    if options.update_model_card:
        section = f"## Figures\n\n{table(report)}\n![evaluation](samples/{picture.name})\n"
        add_to_model_card(options.trained, section, eval_results(report), picture)
    return report


def run() -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # The table has arrows, which a terminal of another encoding cannot show.
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue] It is a text stream.
    main(parse_args())


if __name__ == "__main__":
    run()
