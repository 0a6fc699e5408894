# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""`benchmarks/others.py` measures our row, loses none to another trainer that is missing, and lets no stand-in work."""

import importlib.metadata
import json
import sys

import pytest
import torch
from helpers import ROOT


@pytest.fixture
def others(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import others as module

    # What a row changes in the process that it usually has to itself.
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.chdir(ROOT)
    return module


def test_rows(others, tmp_path):
    """At the size of the tests, with a checkout of one trainer that lacks everything and none of the other."""
    options = (
        f"--shape test --steps 1 --warm_up 1 --only=batch.1$ --onetrainer {tmp_path} --output {tmp_path}/out.json"
    )
    args = others.parse_args(options.split())
    limits = []

    def measure_here(row, args, seconds: float) -> dict:
        limits.append(seconds)
        return others.measure(row, args)

    others.main(args, measure_here)
    report = json.loads((tmp_path / "out.json").read_text())
    rows = {row["row"]: row for row in report["rows"]}
    assert list(rows) == [row.name for row in others.ROWS if row.batch == 1]
    ours = rows.pop("this trainer, --fast, batch 1")
    assert ours["samples/s"] * ours["ms/step"] == pytest.approx(1000) and ours["flags"] == "bf16 none"
    for name, row in rows.items():
        missing = "no checkout: --sd_scripts is None" if "sd-scripts" in name else "No module named 'modules'"
        assert missing in row["result"] and "ms/step" not in row
    assert report["about"]["torch"] == importlib.metadata.version("torch") and 0 < limits[-1] <= 20 * 60
    # A row without a checkout takes no process, and one that comes too late none either.
    assert len(limits) == len([name for name in rows if "sd-scripts" not in name]) + 1
    others.main(others.parse_args([*options.split(), "--minutes=0"]), measure_here)
    late = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {row["result"] for row in late if "sd-scripts" not in row["row"]} == {"no time left"}


def test_timed_steps(others, monkeypatch):
    """A row's time is the median of the steps after the warm-up, and a loss that is no number fails it."""
    args = others.parse_args(["--warm_up=1", "--steps=3"])
    clock = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr(others.time, "perf_counter", lambda: next(clock))
    figures = others.time_steps(lambda: 0.5, 4, args, torch.device("cpu"))
    assert (figures["ms/step"], figures["samples/s"], figures["spread"]) == (2000, 2, 1.5)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="losses are .*nan"):
        others.time_steps(lambda: float("nan"), 4, args, torch.device("cpu"))


def test_stand_ins(others, monkeypatch):
    monkeypatch.setattr(others, "STAND_INS", ["package_of_nobody", "json"])
    sys.meta_path.append(others.StandInFinder())
    from package_of_nobody.part import Base, call

    class Derived(Base):
        def __init__(self, value: call.Kind):
            self.value = value

    assert Derived(3).value == 3
    for unusable in (Base, call, call.Kind):
        with pytest.raises(RuntimeError, match="not installed was called"):
            unusable()
    # What is installed is found before any stand-in, and what is no stand-in stays missing.
    assert sys.modules["json"].loads("1") == 1
    with pytest.raises(ModuleNotFoundError):
        import another_package_of_nobody  # noqa: F401


def test_a_row_in_its_own_process(others, monkeypatch, tmp_path):
    """A process that ends without a result or does not end is a result too."""
    program = tmp_path / "program.py"
    program.write_text("import pathlib, sys, time\nkind = sys.argv[1]\ntime.sleep(60 * (kind == 'slow'))\n"
                       "result = pathlib.Path(sys.argv[-1].removeprefix('--result='))\n"
                       "kind == 'good' and result.write_text('{\"ms/step\": 1}')\nsys.exit(3)\n")  # fmt: skip
    args, row = others.parse_args([]), others.ROWS[0]
    results = {"good": {"ms/step": 1}, "bad": {"result": "exit code 3"}, "slow": {"result": "stopped after 1 s"}}
    for kind, result in results.items():
        monkeypatch.setattr(sys, "argv", [str(program), kind])
        assert others.measure_in_process(row, args, 1 if kind == "slow" else 30) == result
