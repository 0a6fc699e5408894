# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the tests of several semantic maps share: modules, and their updates by the independent reference."""

import reference as ref
import torch
from helpers import projection_layers, reference_layers
from pipeline_helpers import trained_like

from semantic_attention import SemanticAttentionModel, SemanticProjectionModel


MAPS = ("land", "rivers")
KINDS = {"none": SemanticAttentionModel, "rope": SemanticAttentionModel, "projection": SemanticProjectionModel}


def module_of(kind: str, maps=MAPS, num_layers: int = 2):
    position = {} if kind == "projection" else {"position": kind}
    return trained_like(model_class=KINDS[kind], num_layers=num_layers, maps=maps, **position)


def layers_of(module, index: int) -> list[dict]:
    """The reference's weights of one map. Layers stand map by map."""
    found = projection_layers(module) if isinstance(module, SemanticProjectionModel) else reference_layers(module)
    count = len(found) // len(MAPS)
    return found[index * count : (index + 1) * count]


def enhanced_by_reference(kind, module, hidden_states, tokens, strengths, positions):
    """The transformer's input, with maps as (index, tokens, strength)."""
    maps = [(s, layers_of(module, i), strength) for i, (s, strength) in enumerate(zip(tokens, strengths)) if strength]
    x_t, x_cond = hidden_states[..., :64], hidden_states[..., 64:]
    if kind == "projection":
        return torch.cat([x_t, ref.with_maps(x_cond, maps, ref.project)], dim=2)
    places = {"positions": positions if kind == "rope" else None}
    return torch.cat([ref.with_maps(x_t, maps, ref.enhance, **places), x_cond], dim=2)
