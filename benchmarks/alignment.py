# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""How far a painting lies beside its photograph, in pixels: phase correlation of their edges, in windows.

The two are pictures of different kinds, so their gradients are compared and not their values. `ablation.py` takes the same
figures for the target, because a painting can be no better aligned than the data are.
"""

import torch
import torch.nn.functional as F


WINDOW = 64
# Displacements that are looked for, in pixels, in each direction.
REACH = 8
# Of photographs and thermal images of other scenes, nine out of ten windows have lower peaks than this.
LEAST_PEAK = 0.02


def edges(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures `(batch, 3, height, width)` -> the root of their smoothed gradients' length `(batch, height, width)`."""
    gray = F.pad(pictures.float().mean(dim=1, keepdim=True), (2, 2, 2, 2), mode="replicate")
    gray = F.avg_pool2d(gray, 3, stride=1)
    x, y = gray[..., 1:-1, 2:] - gray[..., 1:-1, :-2], gray[..., 2:, 1:-1] - gray[..., :-2, 1:-1]
    return torch.hypot(x, y)[:, 0].sqrt()


def windows(maps: torch.Tensor) -> torch.Tensor:
    """Maps `(batch, height, width)` -> overlapping windows `(batch, windows, 64, 64)` of mean 0 that fade to their edges."""
    cut = maps.unfold(1, WINDOW, WINDOW // 2).unfold(2, WINDOW, WINDOW // 2).flatten(1, 2)
    fade = torch.hann_window(WINDOW, periodic=False, device=maps.device)
    fade = fade[:, None] * fade
    return (cut - (cut * fade).sum(dim=(-2, -1), keepdim=True) / fade.sum()) * fade


def displacements(pictures: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How far the edges of pictures lie from those of others, in each window.

    Args:
        pictures, others (`torch.Tensor` of shape `(batch, 3, height, width)`): Pictures of the same scenes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Pixels to the right and down `(batch, windows, 2)`, and the height of the
        correlation's peak `(batch, windows)`, which is low where the pictures share no edges.
    """
    ours, theirs = (torch.fft.rfft2(windows(edges(x))) for x in (pictures, others))
    cross = ours * theirs.conj()
    # Fine frequencies are mostly noise.
    down, right = torch.fft.fftfreq(WINDOW)[:, None], torch.fft.rfftfreq(WINDOW)
    weight = torch.exp(-(down**2 + right**2) / (2 * 0.12**2)).to(cross.device)
    surface = torch.fft.fftshift(torch.fft.irfft2(cross / (cross.abs() + 1e-9) * weight), dim=(-2, -1))
    peak, place = middle(surface, REACH).flatten(-2).max(dim=-1)
    side = 2 * REACH + 1
    offsets = []
    # A parabola through the peak and its neighbors tells parts of a pixel.
    around, row, column = middle(surface, REACH + 1).flatten(-2), place // side + 1, place % side + 1
    for position, step in ((column, 1), (row, side + 2)):
        index = row * (side + 2) + column
        before, after = (around.gather(-1, (index + d)[..., None])[..., 0] for d in (-step, step))
        part = (before - after) / (2 * (before - 2 * peak + after)).clamp(max=-1e-9)
        offsets.append(position - 1 - REACH + part.clamp(-0.5, 0.5))
    return torch.stack(offsets, dim=-1), peak


def middle(surface: torch.Tensor, reach: int) -> torch.Tensor:
    inside = slice(WINDOW // 2 - reach, WINDOW // 2 + reach + 1)
    return surface[..., inside, inside]


def alignment(pictures: torch.Tensor, others: torch.Tensor) -> dict[str, float]:
    """
    Over all windows in which the pictures share edges: the share that they are of all windows, the median displacement to
    the right and down, and the median distance, in pixels.
    """
    offset, peak = displacements(pictures, others)
    clear = peak >= LEAST_PEAK
    figures = {"clear_windows": clear.float().mean().item()}
    if clear.any():
        offset = offset[clear]
        right, down = offset.median(dim=0).values.tolist()
        figures |= {"right": right, "down": down, "distance": offset.norm(dim=-1).median().item()}
    return figures
