# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""How near paintings come to their targets: the figures of the evaluation, and the networks that some of them need.

Each figure has a published definition, and most of them come from torchmetrics. A figure whose network cannot be loaded is
absent and its reason is told, because the others are still worth having.
"""

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from semantic_fill.option_fields import OptionGroup, option
from semantic_fill.views import Palette


logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, kw_only=True)
class MetricOptions(OptionGroup):
    """Figures"""

    metrics: tuple[str, ...] | None = option(
        None, choices=METRICS, help="Default: all, but mIoU only where the targets are label maps of --palette."
    )
    inception_weights: str | None = option(None, help="File of torch-fidelity's Inception. Default: it is fetched.")
    boxes: str | None = option(
        None, help="JSON lines of annotated boxes: how they stand out in paintings is measured too."
    )
    fid_model: str = option("inception", help="FID's network: inception, or a model such as facebook/dinov2-base.")


# -- Networks ---------------------------------------------------------------------------------------------------------


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


def load_features(options: MetricOptions, cache_dir: str | None) -> nn.Module:
    if options.fid_model != "inception":
        return VisionFeatures(options.fid_model, cache_dir)
    from torchmetrics.image.fid import NoTrainInceptionV3

    file = options.inception_weights
    if file is not None:
        # torch-fidelity unpickles its file whatever it holds. A file that passes here holds tensors only.
        torch.load(file, map_location="cpu", weights_only=True)
    network = NoTrainInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=file)
    network.num_features = 2048
    return network


def load_networks(
    options: MetricOptions, device: str, cache_dir: str | None = None
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The networks that metrics look through, and for each metric that has to be left out the reason."""
    networks, absent = {}, {}
    given = options.inception_weights if options.fid_model == "inception" else options.fid_model
    for names, load, source, advice in (
        (("lpips",), lambda *_: LearnedPerceptualImagePatchSimilarity("alex", "none", normalize=True), None, ""),
        (("fid", "kid"), load_features, given, "; --inception_weights takes a file, --fid_model another network"),
    ):
        wanted = [name for name in names if name in (options.metrics or METRICS)]
        try:
            if wanted:
                networks[names[0]] = load(options, cache_dir).to(device)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            if source is not None:
                raise ValueError(f"{source} is no network for {' and '.join(wanted)}: {reason}") from error
            # Without a connection or a package, the other figures are still worth having.
            absent |= dict.fromkeys(wanted, f"its network could not be loaded ({reason}){advice}")
            logger.warning(f"{', '.join(wanted)} left out: {absent[wanted[0]]}")
    return networks, absent


# -- Classes ----------------------------------------------------------------------------------------------------------


def nearest_class(pictures: torch.Tensor, colors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit `(batch, 3, height, width)` and `(classes, 3)` -> class of the nearest color, and the distance to it."""
    distances = torch.stack([(pictures.float() - color[:, None, None]).norm(dim=1) for color in colors.float()])
    distance, label = distances.min(dim=0)
    return label, distance


def classes_of(target: torch.Tensor, palette: Palette, rows: list[int]) -> torch.Tensor:
    """
    The classes `(batch, height, width)` of targets that are label maps, counted as in the palette.

    Args:
        target (`torch.Tensor` of shape `(batch, 3, height, width)`): Targets in 8 bits.
        rows (`list[int]`): Their rows in the data, for the message.

    Raises:
        `ValueError`: if a target is no label map.
    """
    label, distance = nearest_class(target, torch.tensor(list(palette.values())))
    for row, share in zip(rows, (distance > PALETTE_TOLERANCE).float().mean(dim=(1, 2)).tolist()):
        if share > PALETTE_SHARE:
            raise ValueError(
                f"{share:.0%} of the target of row {row} has none of the colors of --palette. mIoU is for targets that"
                " are label maps."
            )
    return label


# -- Figures ----------------------------------------------------------------------------------------------------------


def likeness(painted: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
    """PSNR and SSIM `(batch,)` of pictures `(batch, 3, height, width)` in [0, 1]."""
    # Torchmetrics also averages over places where the window of 11 pixels meets mirrored pixels.
    places = structural_similarity_index_measure(painted, target, data_range=1.0, return_full_image=True)[1]
    return {
        "psnr": peak_signal_noise_ratio(painted, target, data_range=1.0, reduction="none", dim=(1, 2, 3)),
        "ssim": places[..., 5:-5, 5:-5].mean(dim=(1, 2, 3)),
    }


def to_bytes(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures * 255).round().to(torch.uint8)


class Figures:
    """Gathers the figures of one kind of map, batch by batch."""

    def __init__(self, metrics: list[str], networks: dict[str, nn.Module], palette: Palette, count: int, device: str):
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
    def add(self, painted: torch.Tensor, target: torch.Tensor, rows: list[int]) -> None:
        """Adds paintings and targets `(batch, 3, height, width)` in 8 bits, which are these rows of the data."""
        ours, theirs = painted.float() / 255, target.float() / 255
        columns = {name: values for name, values in likeness(ours, theirs).items() if name in self.metrics}
        if "lpips" in self.metrics:
            columns["lpips"] = self.networks["lpips"](ours.to(self.device), theirs.to(self.device))
        for metric in self.distances.values():
            metric.update(target.to(self.device), real=True)
            metric.update(painted.to(self.device), real=False)
        if self.classes:
            true = classes_of(target, self.palette, rows)
            found = nearest_class(painted, torch.tensor(list(self.palette.values())))[0]
            for metric in self.classes.values():
                metric.update(found, true)
        lists = [values.reshape(-1).tolist() for values in columns.values()]
        self.samples += [{"row": row} | dict(zip(columns, values)) for row, *values in zip(rows, *lists)]

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
