# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Commands that the documents show: each names a program of this repository, and options that its parser takes."""

import re
import runpy
import shlex
import sys

import pytest
from helpers import ROOT


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md")),
    ROOT / "examples" / "base" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAM = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:accelerate launch (?:--\S+ (?!\S*\.py)\S+ )*|python (?:-m )?)([a-z]\S+)(.*)$", re.DOTALL
)


def find_commands(text: str) -> list[str]:
    """Lines of code blocks, with the lines that continue them, and code within sentences."""
    blocks = re.findall(r"^```(?:bash|shell|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"^    ((?:accelerate|python) .*(?:\n      +\S.*)*)$", text, re.MULTILINE)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
    sentences = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    inside = re.findall(r"(?<!`)`((?:accelerate launch|python) [^`]+)`", sentences)
    return [" ".join(line.split()) for line in [*lines, *inside] if PROGRAM.match(line.strip())]


COMMANDS = sorted({command for path in DOCUMENTS for command in find_commands(path.read_text(encoding="utf-8"))})


def test_commands_are_found():
    assert len(COMMANDS) > 40
    text = "a\n```bash\npython examples/earth.py \\\n  --seed 1  # why\nls\n```\nor `python b.py` so"
    assert find_commands(text) == ["python examples/earth.py --seed 1 # why", "python b.py"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_its_program_takes(command, tmp_path, monkeypatch, capsys):
    program, options = PROGRAM.match(command).groups()
    words = [word for word in shlex.split(options, comments=True) if word != "..."]
    path = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
    assert path.is_file()
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    module = runpy.run_path(str(path))
    if program == "train_semantic_fill_lora.py" and "..." in command:
        source = [] if "--dataset_name" in words else ["--train_data_dir", "data"]
        words = ["--pretrained_model_name_or_path", "base", *source, *words]
    # Some programs look at once whether the files are there that they are to read.
    for word in words:
        if re.fullmatch(r"\w[\w-]*", word):
            (tmp_path / word).mkdir(exist_ok=True)
        elif re.fullmatch(r"\w+\.jsonl?", word):
            (tmp_path / word).write_text("{}")
    (tmp_path / "run.yaml").write_text("{pretrained_model_name_or_path: base, train_data_dir: data}")
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.chdir(tmp_path)
    if "--help" in words:
        with pytest.raises(SystemExit, match="^0$"):
            module["parse_args"]()
    elif "parse_args" in module:
        module["parse_args"]()
