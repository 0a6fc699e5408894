#!/usr/bin/env python
# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Paints a data set with trained weights and says how near the paintings come to the targets.

Every sample is painted with its own semantic map (`right`), with another sample's (`wrong`) and without one (`none`), from
the same noise: what the right map gains over the other two is what the guidance is worth. The figures go to
`evaluation.json` and, as a table, to `evaluation.md`; `evaluation.png` shows the first samples.

    python -m evaluate_semantic_fill --pretrained_model_name_or_path black-forest-labs/FLUX.1-Fill-dev \\
      --trained user/my-semantic-fill --train_data_dir held_out --output_dir evaluation
"""

import argparse
import functools
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import PIL.ImageColor
import PIL.ImageDraw
import torch
import torch.nn.functional as F
import transformers
from diffusers.utils import make_image_grid
from huggingface_hub import EvalResult, ModelCard, upload_file
from torch import nn
from tqdm.auto import tqdm

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline
from train_semantic_fill_lora import (
    TriptychDataset,
    add_data_arguments,
    check_data_args,
    is_hub_id,
    load_rows,
    seed_of,
)


try:
    import torchmetrics
    from torchmetrics.classification import MulticlassJaccardIndex
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
except ImportError as error:
    raise ImportError(
        'The evaluation needs torchmetrics: `pip install "semantic-fill[evaluate]"` or `pip install torchmetrics`.'
    ) from error


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
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
# KID draws subsets; the authors' number of pictures in each is 1000, for data sets of many thousands.
KID_SUBSET = 100
# A target whose pixels lie farther from every colour of the palette, out of 255, is no label map of it.
PALETTE_TOLERANCE, PALETTE_SHARE = 32, 0.05
CARD_START, CARD_END = "<!-- evaluation: start -->", "<!-- evaluation: end -->"


# -- Arguments --------------------------------------------------------------------------------------------------------


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate_semantic_fill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", required=True, help="FLUX.1 Fill: a folder or a Hub repository.")
    add("--revision", help="Revision of the model on the Hub.")
    add("--variant", help="Variant of the model's files, e.g. fp16.")
    add("--cache_dir", help="Where downloaded models and data sets are kept.")
    add("--trained", required=True, help="What the trainer wrote: a folder, a checkpoint in it, or a Hub repository.")
    add_data_arguments(parser)
    add("--split", default="train", help="Split of the data set. A folder of pictures is all `train`.")

    add("--maps", nargs="+", choices=MAPS, help="Default: all that the weights' mode knows.")
    add("--semantic_scale", type=float, default=1.0)
    add("--num_inference_steps", type=int, default=28)
    add("--guidance_scale", type=float, default=30.0)
    add("--seed", type=int, default=0, help="The noise of a sample depends on it and on the sample's row alone.")
    add("--batch_size", type=int, default=4)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="Default: bfloat16, on a CPU float32.")
    add("--offload", action="store_true", help="Keep on the device only the model that is at work.")

    add("--metrics", nargs="+", choices=list(METRICS), help="Default: all; mIoU where there is a --palette.")
    add(
        "--palette", type=Path, help="JSON object or list of the colours of the classes, where targets are label maps."
    )
    add("--lpips_weights", type=Path, help=f"torchvision's AlexNet, where it cannot be fetched from {ALEXNET_URL}")
    add("--inception_weights", type=Path, help="torch-fidelity's Inception, where it cannot be fetched.")
    add(
        "--fid_model",
        default="inception",
        help="What FID and KID see with: `inception`, or a transformers vision model such as facebook/dinov2-base.",
    )

    add("--output_dir", type=Path, default=Path("evaluation"))
    add("--grid_rows", type=int, default=8, help="Samples in the picture.")
    add("--update_model_card", action="store_true", help="Write figures and picture into the card of --trained.")
    args = parser.parse_args(input_args)
    try:
        check_data_args(args)
        for name in ("batch_size", "num_inference_steps", "grid_rows"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name} has to be at least 1 but is {getattr(args, name)}.")
        if not os.path.isdir(args.trained) and not is_hub_id(args.trained):
            raise ValueError(f"--trained {args.trained} is neither a folder nor a repository user/name.")
        if args.metrics and "miou" in args.metrics and args.palette is None:
            raise ValueError("--metrics miou needs the --palette of the targets.")
        for name in ("palette", "lpips_weights", "inception_weights"):
            path = getattr(args, name)
            if path is not None and not path.is_file():
                raise ValueError(f"--{name} {path} is no file.")
        card = Path(args.trained, "README.md")
        # A checkpoint has none.
        if args.update_model_card and not is_hub_id(args.trained) and not card.is_file():
            raise ValueError(f"--update_model_card needs {card}, which is not there.")
    except ValueError as error:
        parser.error(str(error))
    args.metrics = args.metrics or [name for name in METRICS if name != "miou" or args.palette]
    args.dtype = args.dtype or ("float32" if torch.device(args.device).type == "cpu" else "bfloat16")
    return args


def read_palette(path: Path) -> dict[str, tuple[int, int, int]]:
    """Class -> colour from a JSON object or list; a colour is [red, green, blue] of 0 to 255, "#ff0000" or "red"."""
    data = json.loads(path.read_text())
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    palette = {}
    for name, colour in pairs:
        rgb = PIL.ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else tuple(colour)
        if len(rgb) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in rgb):
            raise ValueError(
                f"--palette {path} gives {name} the colour {colour}: [red, green, blue] of 0 to 255 is due."
            )
        palette[str(name)] = rgb
    if len(palette) < 2 or len(set(palette.values())) < len(palette):
        raise ValueError(
            f"--palette {path} has to give two or more classes a colour of their own, but gives {palette}."
        )
    return palette


# -- Paint ------------------------------------------------------------------------------------------------------------


def load_pipeline(args: argparse.Namespace) -> FluxFillSemanticPipeline:
    pipeline = FluxFillSemanticPipeline.from_pretrained(
        args.pretrained_model_name_or_path,
        revision=args.revision,
        variant=args.variant,
        cache_dir=args.cache_dir,
        use_safetensors=True,
        dtype=getattr(torch, args.dtype),
    )
    pipeline.load_lora_weights(args.trained, cache_dir=args.cache_dir, use_safetensors=True)
    if args.offload:
        pipeline.enable_model_cpu_offload(device=args.device)
    else:
        pipeline.to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def choose_maps(mode: str, count: int, args: argparse.Namespace) -> list[str]:
    """The kinds of maps to paint with, in the order of `MAPS`."""
    known = ["none"] if mode == "none" else list(MAPS)
    asked = [name for name in MAPS if name in (args.maps or known)]
    if not set(asked) <= set(known):
        raise ValueError(
            f"--maps {' '.join(args.maps)}: {args.trained} was trained in the mode `{mode}`, without maps."
        )
    if "wrong" in asked and count < 2:
        raise ValueError(
            "A wrong map is another sample's, but the data set has one sample only. Pass --maps right none."
        )
    return asked


def map_of(dataset: TriptychDataset, index: int, kind: str) -> torch.Tensor:
    """The map `(3, height, width)` to paint a sample with. The wrong one is that of the next sample with another map."""
    own = dataset.views(index)["semantic"]
    if kind == "right":
        return own
    for offset in range(1, len(dataset)):
        other = dataset.views((index + offset) % len(dataset))["semantic"]
        if not torch.equal(own, other):
            return other
    raise ValueError("All samples have the same semantic map, so none of them is wrong. Pass --maps right none.")


@torch.no_grad()
def paint(
    pipeline: FluxFillSemanticPipeline, dataset: TriptychDataset, kind: str, args: argparse.Namespace
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Painted and target views, batch by batch, `(batch, 3, height, width)` in 8 bits as they would be saved."""
    for start in tqdm(range(0, len(dataset), args.batch_size), desc=f"Painting, {kind} map", disable=None):
        indices = range(start, min(start + args.batch_size, len(dataset)))
        views = [dataset.views(index) for index in indices]
        semantic = None if kind == "none" else torch.stack([map_of(dataset, index, kind) for index in indices])
        painted = pipeline(
            prompt=[dataset.caption(index) for index in indices],
            image=torch.stack([view["visible"] for view in views]),
            semantic_image=semantic,
            semantic_scale=args.semantic_scale,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(seed_of(args.seed, "evaluate", index)) for index in indices],
            output_type="pt",
        ).images
        targets = torch.stack([view["target"] for view in views])
        yield to_bytes(painted.float().cpu()), to_bytes(targets)


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures * 255).round().to(torch.uint8)


# -- Measure ----------------------------------------------------------------------------------------------------------


class LPIPS(nn.Module):
    """
    Learned perceptual distance (https://huggingface.co/papers/1801.03924), version 0.1 with AlexNet, of the backbone
    in torchvision's file and of the weights that torchmetrics brings. Own code because torchmetrics' metric, whose values
    it has, gets the backbone from torchvision alone: not from a file, and not without a torchvision that fits torch.
    """

    def __init__(self, backbone: dict[str, torch.Tensor]):
        super().__init__()
        pool = functools.partial(nn.MaxPool2d, kernel_size=3, stride=2)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(), pool()),
            *(nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(), pool()),
            *(nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU()),
            *(nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU()),
        )
        self.load_state_dict({name: weight for name, weight in backbone.items() if name.startswith("features.")})
        folder = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models"
        linear = torch.load(folder / "alex.pth", map_location="cpu", weights_only=True)
        for layer in range(5):
            self.register_buffer(f"linear_{layer}", linear[f"lin{layer}.model.1.weight"])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.eval().requires_grad_(False)

    def normed_features(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        found, x = [], (2 * pictures - 1 - self.shift) / self.scale
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / torch.sqrt(1e-8 + (x**2).sum(dim=1, keepdim=True)))
        return found

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Two `(batch, 3, height, width)` in [0, 1] -> `(batch,)`."""
        pairs = zip(self.normed_features(first), self.normed_features(second))
        distances = [F.conv2d((a - b) ** 2, getattr(self, f"linear_{i}")) for i, (a, b) in enumerate(pairs)]
        return sum(distance.mean(dim=(1, 2, 3)) for distance in distances)


class VisionFeatures(nn.Module):
    """Pictures `(batch, 3, height, width)` in 8 bits -> the first token `(batch, channels)` of a vision transformer."""

    def __init__(self, name: str, cache_dir: str | None):
        super().__init__()
        self.model = transformers.AutoModel.from_pretrained(name, cache_dir=cache_dir, use_safetensors=True)
        self.num_features = self.model.config.hidden_size
        # ImageNet's, which DINOv2 and its kin are trained with.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        size = self.model.config.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        pixels = F.interpolate(pictures.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.model(pixel_values=(pixels - self.mean) / self.std).last_hidden_state[:, 0]


def load_lpips(args: argparse.Namespace) -> LPIPS:
    if args.lpips_weights is not None:
        return LPIPS(torch.load(args.lpips_weights, map_location="cpu", weights_only=True))
    fetch = functools.partial(torch.hub.load_state_dict_from_url, ALEXNET_URL, map_location="cpu", progress=False)
    return LPIPS(fetch(check_hash=True, weights_only=True))


def load_features(args: argparse.Namespace) -> nn.Module:
    if args.fid_model != "inception":
        return VisionFeatures(args.fid_model, args.cache_dir)
    from torchmetrics.image.fid import NoTrainInceptionV3

    if args.inception_weights is not None:
        # torch-fidelity unpickles its file whatever is in it: a file that passes here holds tensors only.
        torch.load(args.inception_weights, map_location="cpu", weights_only=True)
    path = None if args.inception_weights is None else str(args.inception_weights)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=path)
    network.num_features = 2048
    return network


def load_networks(args: argparse.Namespace) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The networks that metrics look through, and of each metric that has to be left out the reason."""
    networks, absent = {}, {}
    for names, load, given, advice in (
        (("lpips",), load_lpips, args.lpips_weights, "--lpips_weights takes a file"),
        (
            ("fid", "kid"),
            load_features,
            args.inception_weights if args.fid_model == "inception" else args.fid_model,
            "--inception_weights takes a file, --fid_model another network",
        ),
    ):
        wanted = [name for name in names if name in args.metrics]
        if not wanted:
            continue
        try:
            networks[names[0]] = load(args).to(args.device)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if given is not None:
                raise ValueError(f"{given} is no network for {' and '.join(wanted)}: {reason}") from error
            # Without a connection or a package the other figures are still worth having.
            absent |= dict.fromkeys(wanted, f"its network could not be fetched ({reason}); {advice}")
            logger.warning(f"{', '.join(wanted)} left out: {absent[wanted[0]]}")
    return networks, absent


def nearest_class(pictures: torch.Tensor, palette: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit `(batch, 3, height, width)` and `(classes, 3)` -> class of the nearest colour, and the distance to it."""
    distances = torch.stack([(pictures.float() - colour[:, None, None]).norm(dim=1) for colour in palette.float()])
    distance, label = distances.min(dim=0)
    return label, distance


class Figures:
    """Gathers what one kind of map gives, batch by batch."""

    def __init__(self, networks: dict[str, nn.Module], palette: dict | None, count: int, args: argparse.Namespace):
        self.networks, self.args = networks, args
        self.wanted = [name for name in args.metrics if name not in ("fid", "kid") or "fid" in networks]
        self.samples: list[dict[str, float]] = []
        self.distances, self.classes, self.palette = {}, None, None
        if "fid" in self.wanted:
            self.distances["fid"] = FrechetInceptionDistance(networks["fid"])
        if "kid" in self.wanted:
            self.distances["kid"] = KernelInceptionDistance(networks["fid"], subset_size=min(count, KID_SUBSET))
        for metric in self.distances.values():
            metric.to(args.device)
        if "miou" in self.wanted:
            self.names, self.palette = list(palette), torch.tensor(list(palette.values()))
            # The mean is over the classes that painting or target show.
            self.classes = {
                average: MulticlassJaccardIndex(len(palette), average=average) for average in ("macro", "none")
            }

    @torch.no_grad()
    def add(self, painted: torch.Tensor, target: torch.Tensor) -> None:
        first = len(self.samples)
        ours, theirs = painted.float() / 255, target.float() / 255
        values = {}
        if "psnr" in self.wanted:
            values["psnr"] = peak_signal_noise_ratio(ours, theirs, data_range=1.0, reduction="none", dim=(1, 2, 3))
        if "ssim" in self.wanted:
            # Its window has 11 pixels; torchmetrics averages over places too where that meets mirrored pixels.
            places = structural_similarity_index_measure(ours, theirs, data_range=1.0, return_full_image=True)[1]
            values["ssim"] = places[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
        if "lpips" in self.wanted and "lpips" in self.networks:
            values["lpips"] = self.networks["lpips"](ours.to(self.args.device), theirs.to(self.args.device)).cpu()
        for metric in self.distances.values():
            metric.update(target.to(self.args.device), real=True)
            metric.update(painted.to(self.args.device), real=False)
        if self.classes is not None:
            true, distance = nearest_class(target, self.palette)
            strange = (distance > PALETTE_TOLERANCE).float().mean(dim=(1, 2))
            for index, share in enumerate(strange.tolist()):
                if share > PALETTE_SHARE:
                    raise ValueError(
                        f"--palette {self.args.palette}: {share:.0%} of the target of row {first + index} have none of"
                        " its colours. mIoU is for targets that are label maps."
                    )
            for metric in self.classes.values():
                metric.update(nearest_class(painted, self.palette)[0], true)
        columns = {name: value.reshape(-1).tolist() for name, value in values.items()}
        self.samples += [
            {"row": first + i} | {name: column[i] for name, column in columns.items()} for i in range(len(painted))
        ]

    def summary(self) -> dict:
        """Means over the samples, and what is of the whole set."""
        found = {name: math.fsum(s[name] for s in self.samples) / len(self.samples) for name in self.samples[0]}
        del found["row"]
        if "fid" in self.distances:
            found["fid"] = self.distances["fid"].compute().item()
        if "kid" in self.distances:
            with torch.random.fork_rng(devices=[]):
                # Its subsets are drawn from the global stream.
                torch.manual_seed(self.args.seed)
                found["kid"], found["kid_std"] = (value.item() for value in self.distances["kid"].compute())
        if self.classes is not None:
            found["miou"] = self.classes["macro"].compute().item()
            found["iou"] = dict(zip(self.names, self.classes["none"].compute().tolist()))
        return found


# -- Report -----------------------------------------------------------------------------------------------------------


def table(report: dict) -> str:
    """The figures as a markdown table, one row a kind of map, and under it what could not be measured and why."""
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
    """8-bit pictures under the names of their columns, small ones enlarged."""
    tiles = [tile for row in zip(*columns.values()) for tile in row]
    enlarged = -(-96 // tiles[0].shape[-1])
    tiles = [tile.repeat_interleave(enlarged, dim=1).repeat_interleave(enlarged, dim=2) for tile in tiles]
    pictures = [PIL.Image.fromarray(np.asarray(tile.permute(1, 2, 0))) for tile in tiles]
    grid = make_image_grid(pictures, rows=len(pictures) // len(columns), cols=len(columns))
    header = 16
    sheet = PIL.Image.new("RGB", (grid.width, grid.height + header), "white")
    sheet.paste(grid, (0, header))
    for index, name in enumerate(columns):
        PIL.ImageDraw.Draw(sheet).text((index * pictures[0].width + 2, 2), name, fill="black")
    return sheet


def update_model_card(report: dict, picture: Path, args: argparse.Namespace) -> None:
    """Puts figures and picture into the card of the trained folder or repository, in place of earlier ones."""
    on_hub = is_hub_id(args.trained)
    path = Path(args.trained, "README.md")
    card = ModelCard.load(args.trained if on_hub else path)
    section = f"{CARD_START}\n## Figures\n\n{table(report)}\n![evaluation](samples/{picture.name})\n{CARD_END}\n"
    before = re.compile(re.escape(CARD_START) + ".*?" + re.escape(CARD_END) + "\n", re.DOTALL)
    if before.search(card.text):
        card.text = before.sub(lambda _: section, card.text)
    else:
        # Before the arguments, which are long.
        head, training, rest = card.text.partition("## Training\n")
        card.text = f"{head}{section}\n{training}{rest}"
    # The Hub shows one figure a metric: that of the map which painting is meant to be done with.
    best = next(iter(report["figures"].values()))
    card.data.model_name = args.trained if on_hub else Path(args.trained).resolve().name
    card.data.eval_results = [
        EvalResult(
            task_type="image-to-image",
            dataset_type=report["data"],
            dataset_name=report["data"],
            metric_type=name,
            metric_name=METRICS[name][0],
            metric_value=best[name],
        )
        for name in METRICS
        if name in best
    ]
    if on_hub:
        message = "Evaluation"
        upload_file(
            repo_id=args.trained,
            path_or_fileobj=picture,
            path_in_repo=f"samples/{picture.name}",
            commit_message=message,
        )
        card.push_to_hub(args.trained, commit_message=message)
    else:
        (path.parent / "samples").mkdir(exist_ok=True)
        (path.parent / "samples" / picture.name).write_bytes(picture.read_bytes())
        card.save(path)


# -- Run --------------------------------------------------------------------------------------------------------------


def main(args: argparse.Namespace) -> dict:
    """Paints, measures, writes; returns what `evaluation.json` holds."""
    palette = read_palette(args.palette) if args.palette else None
    dataset = TriptychDataset(load_rows(args, args.split), args)
    if len(dataset) < 2 and {"fid", "kid"} & set(args.metrics):
        raise ValueError(
            "FID and KID compare sets, but the data set has one sample only: leave them out of --metrics."
        )
    pipeline = load_pipeline(args)
    mode = pipeline.config.semantic_mode
    kinds = choose_maps(mode, len(dataset), args)
    networks, absent = load_networks(args)

    shown = range(min(args.grid_rows, len(dataset)))
    views = [dataset.views(index) for index in shown]
    columns = {
        name: [to_bytes(view[key]) for view in views] for name, key in (("visible", "visible"), ("map", "semantic"))
    }
    if not SEMANTIC_MODES[mode].attends and not SEMANTIC_MODES[mode].map_on_canvas:
        del columns["map"]
    columns["target"] = [to_bytes(view["target"]) for view in views]
    figures, samples = {}, {}
    for kind in kinds:
        gathered = Figures(networks, palette, len(dataset), args)
        for painted, target in paint(pipeline, dataset, kind, args):
            gathered.add(painted, target)
            column = columns.setdefault("no map" if kind == "none" else f"{kind} map", [])
            # Copies of what is shown alone: a whole data set of paintings would fill the memory.
            column += painted[: len(shown) - len(column)].clone()
        figures[kind], samples[kind] = gathered.summary(), gathered.samples

    # The table goes into cards, which are no place for paths of this machine.
    data = args.dataset_name or args.train_data_dir
    features = args.fid_model if is_hub_id(args.fid_model) else Path(args.fid_model).name
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {
        "trained": args.trained,
        "data": data if args.dataset_name and not os.path.isdir(data) else Path(data).resolve().name,
        "semantic_mode": mode,
        "count": len(dataset),
        "figures": figures,
        "absent": absent,
        "features": features if "fid" in networks else None,
        "settings": settings,
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, transformers, torchmetrics)},
        "samples": samples,
    }
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "evaluation.json").write_text(json.dumps(report, indent=2))
    (args.output_dir / "evaluation.md").write_text(table(report))
    picture = args.output_dir / "evaluation.png"
    draw_grid(columns).save(picture)
    print(table(report))
    if args.update_model_card:
        update_model_card(report, picture, args)
    return report


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(parse_args())
