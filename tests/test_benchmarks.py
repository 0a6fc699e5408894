# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks run, at the size of the tests, and lose no row to another's failure."""

import json
import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def train_speed(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_speed as module

    options = "--shape test --steps 1 --warm_up 1 --rounds 1 --rows speed".split()
    monkeypatch.setattr(sys, "argv", ["train_speed.py", *options, "--output", str(tmp_path / "out.json")])
    return module


def test_rows_of_train_speed(train_speed, tmp_path):
    train_speed.main()
    written = json.loads((tmp_path / "out.json").read_text())
    peer, ours = written["rows"]
    assert peer["row"].startswith("peer") and peer["encoding ms"] > 0
    assert ours["row"].startswith("--fast") and ours["text tokens"] == 512
    # Both did the same work a sample, by which the floor is reckoned.
    for row in written["rows"]:
        assert row["of bf16 floor"] * row["ms/step"] == pytest.approx(peer["of bf16 floor"] * peer["ms/step"])


def test_a_failing_row_costs_no_other(train_speed, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train_speed.Bench, "peer", fail)
    train_speed.main()
    peer, ours = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert "out of memory" in peer["result"] and ours["samples/s"] > 0


def test_flops_of_flux(train_speed):
    assert train_speed.flux_shape.forward_flops("flux", 2048, 512) == pytest.approx(37.7e12, rel=0.01)
