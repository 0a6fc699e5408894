# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of several GPUs, with gloo processes and the tiny base: its figures have to add up."""

import json
import sys

import pytest
from helpers import ON_CPU, ROOT


def test_figures_add_up(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    output = tmp_path / "scaling.json"
    options = ["--shape", "test", "--output", str(output), "--engines", "fsdp2", "--steps", "5", "--warm_up", "2"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *options, "--batch", "1"])
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    scaling.main(scaling.parse_args())
    report = json.loads(output.read_text())
    one, two = report["rows"]
    assert (one["engine"], one["GPUs"], two["engine"], two["GPUs"]) == ("one_gpu", 1, "fsdp2", 2)
    assert one["samples a step"] == two["samples a step"] == 2
    assert two["efficiency"] == pytest.approx(two["samples/s"] / (2 * one["samples/s"]))
    assert two["peak share"] == pytest.approx(two["peak GiB a GPU"] / one["peak GiB a GPU"])
    losses = report["losses"]
    assert list(losses) == ["one_gpu 1x1x2", "fsdp2 2x1x1"]
    assert len(set(losses["one_gpu 1x1x2"])) == 5
    assert losses["fsdp2 2x1x1"] == pytest.approx(losses["one_gpu 1x1x2"], rel=1e-5)
    assert two["losses apart, most"] < 1e-5
    assert capsys.readouterr().out.splitlines()[-1].startswith("| fsdp2 | 2 | 2 |")
