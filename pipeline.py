# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Entry for `DiffusionPipeline.from_pretrained(..., custom_pipeline=<this folder>)`.

Names both files, because the dynamic loader copies only what its entry file imports.
"""

from .pipeline_flux_fill_semantic import FluxFillSemanticPipeline  # noqa: F401
from .semantic_attention import SemanticAttentionModel  # noqa: F401
