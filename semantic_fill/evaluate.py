# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Paints a data set with trained weights and measures how near the paintings come to the targets.

Every sample is painted with its own semantic map (`right`), with another sample's (`wrong`) and without one (`none`), from
the same noise: what the right map gains over the other two is what the guidance is worth. The figures go to
`evaluation.json` and, as a table, to `evaluation.md`; `evaluation.png` shows the first samples.

    pip install "semantic-fill[evaluate]"
    python -m semantic_fill.evaluate --pretrained_model_name_or_path black-forest-labs/FLUX.1-Fill-dev \\
      --trained user/my-semantic-fill --train_data_dir held_out --output_dir evaluation
"""

import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import PIL.ImageDraw
import PIL.ImageOps
import torch
import torch.nn.functional as F
import torchmetrics
import transformers
from diffusers.utils import make_image_grid
from huggingface_hub import EvalResult
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
from tqdm.auto import tqdm

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline
from semantic_fill.command_line import parse_options
from semantic_fill.data import TriptychDataset, load_rows, read_palette, seed_of
from semantic_fill.files import is_hub_id
from semantic_fill.options import DataOptions, ModelOptions, option
from semantic_fill.publish import add_to_model_card


logger = logging.getLogger(__name__)

MAPS = ("right", "wrong", "none")
# Name -> how it is written, digits, and whether more is better.
METRICS = {
    "psnr": ("PSNR (dB)", 2, True),
    "ssim": ("SSIM", 4, True),
    "lpips": ("LPIPS", 4, False),
    "fid": ("FID", 2, False),
    "kid": ("KID", 5, False),
    "miou": ("mIoU", 4, True),
}
# KID draws subsets. Its authors use subsets of 1000 pictures, for data sets of many thousands.
KID_SUBSET = 100
# A target is no label map of the palette if this share of it lies farther from every color, out of 255.
PALETTE_TOLERANCE, PALETTE_SHARE = 32, 0.05
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(ModelOptions, DataOptions):
    """Evaluation"""

    trained: str = option(help="What the trainer wrote: a folder, a checkpoint in it, or a Hub repository.")
    split: str = option("train", help="Split of the data set. A folder of pictures is all `train`.")
    maps: tuple[str, ...] | None = option(None, choices=MAPS, help="Default: all that have an effect.")
    semantic_scale: float = option(1.0, at_least=-math.inf, help="Strength of the guidance.")
    num_inference_steps: int = option(28, at_least=1, help="Denoising steps.")
    guidance_scale: float = option(30.0, help="Guidance scale.")
    seed: int = option(0, help="The noise of a sample follows from it and from the sample's row alone.")
    batch_size: int = option(4, at_least=1, help="Samples painted at once.")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", help="Device to paint and measure on.")
    dtype: str = option(None, choices=DTYPES, help="Default: bfloat16, or float32 on a CPU.")
    offload: bool = option(False, help="Keep only the model that is at work on the device.")
    metrics: tuple[str, ...] = option(None, choices=METRICS, help="Default: all, but mIoU only with --palette.")
    palette: str | None = option(None, help="JSON file of the classes' colors, where targets are label maps.")
    inception_weights: str | None = option(None, help="File of torch-fidelity's Inception. Default: it is fetched.")
    fid_model: str = option("inception", help="FID's network: inception, or a model such as facebook/dinov2-base.")
    output_dir: str = option("evaluation", help="Folder for figures, table and picture.")
    grid_rows: int = option(8, at_least=1, help="Samples in the picture.")
    update_model_card: bool = option(False, help="Write figures and picture into the model card of --trained.")

    def __post_init__(self):
        super().__post_init__()
        self._set_defaults(
            metrics=tuple(name for name in METRICS if name != "miou" or self.palette),
            dtype="float32" if torch.device(self.device).type == "cpu" else "bfloat16",
        )
        # These would otherwise show only after the base model is loaded, or after everything is painted.
        if not os.path.isdir(self.trained) and not is_hub_id(self.trained):
            raise ValueError(f"--trained {self.trained} is neither a folder nor a repository user/name.")
        if "miou" in self.metrics and self.palette is None:
            raise ValueError("--metrics miou needs the --palette of the targets.")
        card = Path(self.trained, "README.md")
        if self.update_model_card and not is_hub_id(self.trained) and not card.is_file():
            raise ValueError(f"--update_model_card needs {card}, which is not there. A checkpoint has none.")


def parse_args(arguments: list[str] | None = None) -> EvaluationOptions:
    return parse_options(EvaluationOptions, __doc__, sys.argv[1:] if arguments is None else arguments)


# -- Paint ------------------------------------------------------------------------------------------------------------


def load_pipeline(options: EvaluationOptions) -> FluxFillSemanticPipeline:
    pipeline = FluxFillSemanticPipeline.from_pretrained(
        options.pretrained_model_name_or_path, dtype=getattr(torch, options.dtype), **options.loading
    )
    pipeline.load_lora_weights(options.trained, cache_dir=options.cache_dir)
    if options.offload:
        pipeline.enable_model_cpu_offload(device=options.device)
    else:
        pipeline.to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def map_of(dataset: TriptychDataset, index: int, kind: str) -> torch.Tensor:
    """The map `(3, height, width)` to paint a sample with. A wrong one is that of the next sample with another map."""
    own = dataset.views(index)["semantic"]
    if kind == "right":
        return own
    for offset in range(1, len(dataset)):
        other = dataset.views((index + offset) % len(dataset))["semantic"]
        if not torch.equal(own, other):
            return other
    raise ValueError("A wrong map is another sample's, but all samples have the same one. Pass --maps right none.")


@torch.no_grad()
def paint(
    pipeline: FluxFillSemanticPipeline, dataset: TriptychDataset, kind: str, options: EvaluationOptions
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields painted and target views batch by batch, `(batch, 3, height, width)` in 8 bits as they would be saved."""
    for start in tqdm(range(0, len(dataset), options.batch_size), desc=f"Painting, {kind} map", disable=None):
        indices = range(start, min(start + options.batch_size, len(dataset)))
        views = [dataset.views(index) for index in indices]
        output: Any = pipeline(
            prompt=[dataset.caption(index) for index in indices],
            image=torch.stack([view["visible"] for view in views]),
            semantic_image=None if kind == "none" else torch.stack([map_of(dataset, i, kind) for i in indices]),
            semantic_scale=options.semantic_scale,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            generator=[torch.Generator().manual_seed(seed_of(options.seed, "evaluate", index)) for index in indices],
            output_type="pt",
        )
        yield to_bytes(output.images.float().cpu()), to_bytes(torch.stack([view["target"] for view in views]))


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures * 255).round().to(torch.uint8)


# -- Measure ----------------------------------------------------------------------------------------------------------


class VisionFeatures(nn.Module):
    """Pictures `(batch, 3, height, width)` in 8 bits -> the first token `(batch, channels)` of a vision transformer."""

    def __init__(self, name: str, cache_dir: str | None):
        super().__init__()
        self.model = transformers.AutoModel.from_pretrained(name, cache_dir=cache_dir, use_safetensors=True)
        self.num_features = self.model.config.hidden_size
        # DINOv2 and its relatives are trained with ImageNet's mean and deviation.
        self.mean = nn.Buffer(torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.std = nn.Buffer(torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        size = self.model.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        pixels = F.interpolate(pictures.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.model(pixel_values=(pixels - self.mean) / self.std).last_hidden_state[:, 0]


def load_features(options: EvaluationOptions) -> nn.Module:
    if options.fid_model != "inception":
        return VisionFeatures(options.fid_model, options.cache_dir)
    from torchmetrics.image.fid import NoTrainInceptionV3

    file = options.inception_weights
    if file is not None:
        # torch-fidelity unpickles its file whatever it holds. A file that passes here holds tensors only.
        torch.load(file, map_location="cpu", weights_only=True)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
    network.num_features = 2048
    return network


def load_networks(options: EvaluationOptions) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The networks that metrics look through, and for each metric that has to be left out the reason."""
    networks, absent = {}, {}
    given = options.inception_weights if options.fid_model == "inception" else options.fid_model
    for names, load, source, advice in (
        (("lpips",), lambda _: LearnedPerceptualImagePatchSimilarity("alex", "none", normalize=True), None, ""),
        (("fid", "kid"), load_features, given, "; --inception_weights takes a file, --fid_model another network"),
    ):
        wanted = [name for name in names if name in options.metrics]
        try:
            if wanted:
                networks[names[0]] = load(options).to(options.device)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if source is not None:
                raise ValueError(f"{source} is no network for {' and '.join(wanted)}: {reason}") from error
            # Without a connection or a package, the other figures are still worth having.
            absent |= dict.fromkeys(wanted, f"its network could not be loaded ({reason}){advice}")
            logger.warning(f"{', '.join(wanted)} left out: {absent[wanted[0]]}")
    return networks, absent


def nearest_class(pictures: torch.Tensor, colors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit `(batch, 3, height, width)` and `(classes, 3)` -> class of the nearest color, and the distance to it."""
    distances = torch.stack([(pictures.float() - color[:, None, None]).norm(dim=1) for color in colors.float()])
    distance, label = distances.min(dim=0)
    return label, distance


class Figures:
    """Gathers the figures of one kind of map, batch by batch."""

    def __init__(self, metrics: list[str], networks: dict[str, nn.Module], palette: dict, count: int, device: str):
        self.metrics, self.networks, self.palette, self.device = metrics, networks, palette, device
        self.samples: list[dict[str, float]] = []
        self.distances, self.classes = {}, {}
        if "fid" in metrics:
            self.distances["fid"] = FrechetInceptionDistance(networks["fid"]).to(device)
        if "kid" in metrics:
            subset_size = min(count, KID_SUBSET)
            self.distances["kid"] = KernelInceptionDistance(networks["fid"], subset_size=subset_size).to(device)
        if "miou" in metrics:
            # The mean is over the classes that painting or target show.
            self.classes = {name: MulticlassJaccardIndex(len(palette), average=name) for name in ("macro", "none")}

    @torch.no_grad()
    def add(self, painted: torch.Tensor, target: torch.Tensor) -> None:
        first, columns = len(self.samples), {}
        ours, theirs = painted.float() / 255, target.float() / 255
        if "psnr" in self.metrics:
            columns["psnr"] = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
        if "ssim" in self.metrics:
            # Torchmetrics also averages over places where the window of 11 pixels meets mirrored pixels.
            places = structural_similarity_index_measure(ours, theirs, data_range=1.0, return_full_image=True)[1]
            columns["ssim"] = places[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
        if "lpips" in self.metrics:
            columns["lpips"] = self.networks["lpips"](ours.to(self.device), theirs.to(self.device))
        for metric in self.distances.values():
            metric.update(target.to(self.device), real=True)
            metric.update(painted.to(self.device), real=False)
        if self.classes:
            self._add_classes(painted, target, first)
        rows = range(first, first + len(painted))
        lists = [values.reshape(-1).tolist() for values in columns.values()]
        self.samples += [{"row": row} | dict(zip(columns, values)) for row, *values in zip(rows, *lists)]

    def _add_classes(self, painted: torch.Tensor, target: torch.Tensor, first: int) -> None:
        colors = torch.tensor(list(self.palette.values()))
        true, distance = nearest_class(target, colors)
        for row, share in enumerate((distance > PALETTE_TOLERANCE).float().mean(dim=(1, 2)).tolist(), first):
            if share > PALETTE_SHARE:
                raise ValueError(
                    f"{share:.0%} of the target of row {row} has none of the colors of --palette. mIoU is for targets"
                    " that are label maps."
                )
        for metric in self.classes.values():
            metric.update(nearest_class(painted, colors)[0], true)

    def summary(self, seed: int) -> dict:
        """Means over the samples, and the figures of the whole set. KID draws its subsets by the seed."""
        names = [name for name in self.samples[0] if name != "row"]
        found: dict = {name: math.fsum(sample[name] for sample in self.samples) / len(self.samples) for name in names}
        if "fid" in self.distances:
            found["fid"] = self.distances["fid"].compute().item()
        if "kid" in self.distances:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                found["kid"], found["kid_std"] = (value.item() for value in self.distances["kid"].compute())
        if self.classes:
            found["miou"] = self.classes["macro"].compute().item()
            found["iou"] = dict(zip(self.palette, self.classes["none"].compute().tolist()))
        return found


# -- Report -----------------------------------------------------------------------------------------------------------


def table(report: dict) -> str:
    """The figures as a markdown table, one row for each kind of map, and under it what could not be measured and why."""
    names = [name for name in METRICS if name in report["settings"]["metrics"]]
    heads = [f"{METRICS[name][0]} {'↑' if METRICS[name][2] else '↓'}" for name in names]
    lines = ["| map | " + " | ".join(heads) + " |", "| --- " * (len(names) + 1) + "|"]
    for kind, figures in report["figures"].items():
        cells = [f"{figures[name]:.{METRICS[name][1]}f}" if name in figures else "absent" for name in names]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += ["", f"{report['count']} samples of {report['data']}, {report['settings']['num_inference_steps']} steps."]
    if report["features"] and {"fid", "kid"} & set(names):
        lines[-1] += f" FID and KID see with {report['features']} and need thousands of samples to be compared."
    lines += [f"{METRICS[name][0]} is absent: {reason}." for name, reason in report["absent"].items()]
    return "\n".join(lines) + "\n"


def draw_grid(columns: dict[str, list[torch.Tensor]]) -> PIL.Image.Image:
    """8-bit pictures under the names of their columns. Small ones are enlarged."""
    tiles = [PIL.Image.fromarray(tile.permute(1, 2, 0).numpy()) for row in zip(*columns.values()) for tile in row]
    factor, header = -(-96 // tiles[0].width), 16
    tiles = [PIL.ImageOps.scale(tile, factor, PIL.Image.Resampling.NEAREST) for tile in tiles]
    grid = make_image_grid(tiles, rows=len(tiles) // len(columns), cols=len(columns))
    sheet = PIL.Image.new("RGB", (grid.width, grid.height + header), "white")
    sheet.paste(grid, (0, header))
    for index, name in enumerate(columns):
        PIL.ImageDraw.Draw(sheet).text((index * tiles[0].width + 2, 2), name, fill="black")
    return sheet


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
    palette = read_palette(options.palette) if options.palette else {}
    if len(set(palette.values())) < len(palette):
        raise ValueError(f"--palette {options.palette} has to give each class a color of its own, but is {palette}.")
    dataset = TriptychDataset(load_rows(options, options.split, options.cache_dir), options)
    if len(dataset) < 2 and {"fid", "kid"} & set(options.metrics):
        raise ValueError("FID and KID compare sets, but the data set has one sample: leave them out of --metrics.")
    networks, absent = load_networks(options)
    pipeline = load_pipeline(options)
    mode = pipeline.config["semantic_mode"]
    uses_map = SEMANTIC_MODES[mode].uses_map
    kinds = [name for name in MAPS if name in (options.maps or (MAPS if uses_map else ("none",)))]
    if "wrong" in kinds:
        # If the first sample has no wrong map, none has, and `right` would be painted before that shows.
        map_of(dataset, 0, "wrong")

    shown = [dataset.views(index) for index in range(min(options.grid_rows, len(dataset)))]
    names = ("visible", "semantic", "target") if uses_map else ("visible", "target")
    columns = {name: [to_bytes(view[name]) for view in shown] for name in names}
    metrics = [name for name in options.metrics if name not in absent]
    figures, samples = {}, {}
    for kind in kinds:
        gathered = Figures(metrics, networks, palette, len(dataset), options.device)
        column = columns["no map" if kind == "none" else f"{kind} map"] = []
        for painted, target in paint(pipeline, dataset, kind, options):
            gathered.add(painted, target)
            # The clone holds only what is shown. A whole data set of paintings would fill the memory.
            column += painted[: len(shown) - len(column)].clone()
        figures[kind], samples[kind] = gathered.summary(options.seed), gathered.samples

    # The table goes into cards, which must not show paths of this machine.
    data = options.dataset_name or options.train_data_dir or ""
    features = options.fid_model if is_hub_id(options.fid_model) else Path(options.fid_model).name
    report = {
        "trained": options.trained,
        "data": Path(data).resolve().name if os.path.isdir(data) else data,
        "semantic_mode": mode,
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
    (output_dir / "evaluation.json").write_text(json.dumps(report, indent=2))
    (output_dir / "evaluation.md").write_text(table(report))
    picture = output_dir / "evaluation.png"
    draw_grid(columns).save(picture)
    print(table(report))
    if options.update_model_card:
        section = f"## Figures\n\n{table(report)}\n![evaluation](samples/{picture.name})\n"
        add_to_model_card(options.trained, section, eval_results(report), picture)
    return report


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse_args())
