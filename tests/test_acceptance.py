# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The acceptance run in its small form: the tiny base and a small data set, both from the local Hub."""

import io
import subprocess
from pathlib import Path

import acceptance
import datasets
import numpy as np
import PIL.Image
import pytest
from helpers import ON_CPU, ROOT
from hub_server import HubServer
from quick_python import run_python


# Runs all parts in one process, because each process imports the libraries anew.
CLIENT = """
import sys
sys.path[:0] = {paths}
import acceptance
import train_semantic_fill_lora as trainer
from semantic_fill import evaluate

def run_here(program, *options):
    options = list(map(str, options))
    if program == "-m":
        evaluate.main(evaluate.parse_args(options[1:]))
    else:
        trainer.main(trainer.parse_args(options))

acceptance.run_program = run_here
assert acceptance.main(acceptance.parse_args(sys.argv[1:]))
"""


def rows(count: int) -> datasets.Dataset:
    """Photographs with noise, and their maps of two colors, in the columns of the default data set."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 48, 40, 3), dtype=np.uint8)
    maps = np.where(noise[:, :1, :, :1] > 127, 255, 0).astype(np.uint8) * np.ones((1, 48, 1, 3), np.uint8)
    columns = {"imageA": maps, "imageB": noise}
    return datasets.Dataset.from_dict({name: list(map(PIL.Image.fromarray, found)) for name, found in columns.items()})


def test_the_small_form_of_all_parts(base_folder, tmp_path):
    buffer = io.BytesIO()
    rows(6).to_parquet(buffer)
    options = "--resolution 32 --steps 2 --rank 2 --num_test 2 --num_inference_steps 1 --output_dir acceptance".split()
    with HubServer() as hub:
        hub.add_repo("huggan/facades", {"data/train-00000-of-00001.parquet": buffer.getvalue()}, repo_type="dataset")
        files = (path for path in Path(base_folder).rglob("*") if path.is_file())
        files = {path.relative_to(base_folder).as_posix(): path.read_bytes() for path in files}
        hub.add_repo("black-forest-labs/FLUX.1-Fill-dev", files)
        env = hub.environment(tmp_path / "home") | ON_CPU
        code = CLIENT.format(paths=[str(ROOT / "examples"), str(ROOT)])
        done = run_python("-c", code, *options, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "imageA has fewer colors than imageB, so it is the map" in done.stdout
    folder = tmp_path / "acceptance"
    for split, numbers in (("train", [1, 2, 4, 5]), ("test", [0, 3])):
        for view in ("visible", "target", "semantic"):
            names = [f"{number:05d}.png" for number in numbers]
            assert sorted(path.name for path in (folder / split / view).iterdir()) == names
    report = (folder / "report.md").read_text()
    assert report in done.stdout and "FAILED" not in report
    none, projection = report.split("### ")[1:]
    for part in (none, projection):
        for said in ("- time to the first step: ", "- peak memory: ", "- samples seen: ", "- minutes to evaluate: "):
            assert part.count(said) == 1, part
    assert none.count("| none |") == 1 and "| right |" not in none and "(right map)" in projection
    assert all(projection.count(f"| {name} |") == 1 for name in ("right", "wrong", "none"))


def test_a_part_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(acceptance, "load_dataset", lambda name, split: rows(2))
    called = []

    def run_program(*command):
        called.append(command)
        raise subprocess.CalledProcessError(137, "train")

    monkeypatch.setattr(acceptance, "run_program", run_program)
    args = acceptance.parse_args(["--output_dir", str(tmp_path), "--num_test", "1"])
    assert not acceptance.main(args)
    report = (tmp_path / "report.md").read_text()
    assert [command[command.index("--semantic_mode") + 1] for command in called] == ["none", "projection"]
    assert report.count("FAILED: CalledProcessError: Command 'train' returned non-zero exit status 137") == 2


def test_programs_that_fail_are_noticed():
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        acceptance.run_program("-c", "raise SystemExit(3)")


@pytest.mark.parametrize("count", [0, 2])
def test_the_number_of_held_out_rows_is_checked(tmp_path, monkeypatch, count):
    monkeypatch.setattr(acceptance, "load_dataset", lambda name, split: rows(2))
    args = acceptance.parse_args(["--output_dir", str(tmp_path), f"--num_test={count}"])
    with pytest.raises(ValueError, match=f"--num_test has to be between 1 and 1 but is {count}"):
        acceptance.write_views(args)
