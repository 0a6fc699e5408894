# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of several GPUs, with gloo processes and the tiny base: its figures have to add up."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ON_CPU, ROOT


def test_figures_add_up(tmp_path):
    output = tmp_path / "scaling.json"
    command = [sys.executable, ROOT / "benchmarks" / "scaling.py", "--shape", "test", "--output", output]
    command += ["--engines", "fsdp2", "--steps", "5", "--warm_up", "2", "--batch", "1"]
    done = subprocess.run(
        list(map(str, command)), env=os.environ | ON_CPU, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
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
    assert done.stdout.splitlines()[-1].startswith("| fsdp2 | 2 | 2 |")
