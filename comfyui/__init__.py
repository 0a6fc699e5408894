# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Semantic Fill for ComfyUI. ComfyUI finds the nodes here."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS


__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
