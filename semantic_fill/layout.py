# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The canvas of a run: what is on it, and in tokens, which lies on which panel and at which place of it."""

from typing import Any

import torch

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, panel_positions
from semantic_attention import SINGLE_MAP
from semantic_fill.options import Options


def canvas_settings(options: Options) -> dict[str, Any]:
    """The arguments with which a pipeline encodes and paints the canvas of a run."""
    return {
        "semantic_mode": options.semantic_mode,
        "fusion_alpha": options.fusion_alpha,
        "semantic_maps": None if options.semantic_maps == SINGLE_MAP else options.semantic_maps,
        "visible_attention": options.visible_attention,
    }


class Layout:
    """The canvas for views of one size: its tokens `rows`, `columns` of a panel and `panels`, its mask and positions."""

    def __init__(self, pipeline: FluxFillSemanticPipeline, height: int, width: int, panels: int):
        patch = pipeline.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"--resolution and --width have to be multiples of {patch} with this VAE but are {(height, width)}."
            )
        self.size = (height, width)
        self.rows, self.columns, self.panels = height // patch, width // patch, panels
        self.mask = pipeline.prepare_diptych(torch.zeros(1, 3, height, width))[1]
        self.positions = panel_positions(self.rows, self.columns, panels)

    @property
    def image_tokens(self) -> int:
        """Number of image tokens on the whole canvas."""
        return self.rows * self.columns * self.panels

    def tokens_of(self, panel: int) -> torch.Tensor:
        """Indices of the image tokens that lie on a panel."""
        panels = torch.arange(self.panels).repeat_interleave(self.columns).repeat(self.rows)
        # Indices, because with a boolean mask the host would wait for the device in every step.
        return (panels == panel).nonzero().flatten()

    def to(self, device: torch.device) -> "Layout":
        self.mask, self.positions = self.mask.to(device), self.positions.to(device)
        return self
