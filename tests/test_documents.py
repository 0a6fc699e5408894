# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""
Commands that the documents show. Each names a program of this repository and options that its parser takes, and each is
run in a small form: here, or by the tests of its program. `NOT_RUN` says which are not, and why.
"""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from helpers import ROOT, fresh_state, run, write_files, write_triptychs


DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md")),
    ROOT / "examples" / "base" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PROGRAM = re.compile(
    r"^(?:[A-Z_]+=\S+ )*(?:accelerate launch (?:--\S+ (?!\S*\.py)\S+ )*|python (?:-m )?)([a-z]\S+)(.*)$", re.DOTALL
)

# What makes a command small: its program -> options that take the place of the command's own.
SMALL = {
    "train_semantic_fill_lora.py": "--pretrained_model_name_or_path {base} --resolution 32 --max_sequence_length 16"
    " --rank 2 --max_train_steps 1 --train_batch_size 1 --validation_inference_steps 1 --report_to none"
    " --overwrite_output_dir",
    "semantic_fill.evaluate": "--pretrained_model_name_or_path {base} --trained trained --metrics psnr"
    " --num_inference_steps 1",
    "examples/earth.py": "--output_dir cut --resolution 32 --num_train 2 --num_test 2",
    "benchmarks/ema.py": "--tasks earth --earth_base {base} --steps 2 --batch_size 1 --num_train 2 --num_test 2 --seeds 0",
    "benchmarks/growth.py": "--shape test --steps 1 --minutes 0.05",
}
# These need the Hub.
DROPPED = {"--push_to_hub"}
# Programs whose commands are run in a small form by other tests.
RUN_BY = {
    "examples/acceptance.py": "test_acceptance.py",
    "examples/app.py": "test_app.py",
    "examples/attention_figure.py": "test_attention_maps.py",
    "examples/convert_lora.py": "test_convert_lora.py",
    "examples/demo.py": "test_demo.py",
    "examples/demo_page.py": "test_demo.py",
    "examples/make_triptychs.py": "test_make_triptychs.py",
    "examples/screenshots.py": "test_demo.py",
    "examples/streets.py": "test_streets.py",
    "examples/train_base.py": "test_train_base.py",
    "benchmarks/ablation.py": "test_benchmarks.py",
    "benchmarks/block_speed.py": "test_benchmarks.py",
    "benchmarks/cards.py": "test_benchmarks.py",
    "benchmarks/others.py": "test_others.py",
    "benchmarks/scaling.py": "test_scaling.py",
    "benchmarks/setting_quality.py": "test_benchmarks.py",
    "benchmarks/startup.py": "test_benchmarks.py",
    "benchmarks/train_speed.py": "test_benchmarks.py",
}
NOT_RUN = {
    "benchmarks/attention_backends.py": "it compares backends of CUDA",
    "benchmarks/buckets.py": "it starts two processes for each run",
    "benchmarks/emoji.py": "it downloads its pictures",
    "benchmarks/several_maps.py": "it starts processes; test_benchmarks.py runs its cells",
    "benchmarks/inference_speed.py": "it compiles for minutes; test_benchmarks.py runs its painter and its caches",
}


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


def split_command(command: str) -> tuple[str, list[str]]:
    """The program of a command and its options."""
    program, options = PROGRAM.match(command).groups()
    return program, shlex.split(options, comments=True)


def is_run_here(command: str) -> bool:
    """test_data_guide.py reads the data of commands with `...`, each from the files that the guide shows."""
    program, options = split_command(command)
    return program in SMALL and "..." not in options and "--help" not in options


def test_every_command_is_run_or_there_is_a_reason():
    programs = {split_command(command)[0] for command in COMMANDS}
    assert programs == SMALL.keys() | RUN_BY.keys() | NOT_RUN.keys()
    assert len(SMALL | RUN_BY | NOT_RUN) == len(SMALL) + len(RUN_BY) + len(NOT_RUN)
    for program, file in RUN_BY.items():
        text, name = (ROOT / "tests" / file).read_text(), Path(program).stem
        assert re.search(rf"\b{name}\.(main\(|__file__)|from {name} import .*\bmain\b", text), program


@pytest.fixture(scope="module")
def folder(base_folder, tmp_path_factory):
    """A folder with the data and the weights that commands name."""
    folder = tmp_path_factory.mktemp("commands")
    # Pictures of another shape are no copies of those that are trained on.
    sizes = {"my_triptychs": 32, "held_out": 32, "earth/train": 32, "earth/test": 48, "street/test": 32}
    for name, width in sizes.items():
        write_triptychs(folder / name, count=3, width=width)
    boxes = [{"class": "person", "box": [4, 4, 14, 14]}]
    scenes = [{"file_name": path.name, "boxes": boxes} for path in (folder / "street/test").glob("*.png")]
    (folder / "street" / "test" / "boxes.jsonl").write_text("\n".join(map(json.dumps, scenes)))
    run(base_folder, folder / "trained", "--max_train_steps", 1, data=folder / "my_triptychs")
    # As docs/training.md shows it.
    text = (ROOT / "docs" / "training.md").read_text()
    (folder / "run.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    return folder


@pytest.mark.parametrize("command", [command for command in COMMANDS if is_run_here(command)])
def test_a_command_runs_in_its_small_form(command, base_folder, folder, monkeypatch):
    program, options = split_command(command)
    options = [word for word in options if word not in DROPPED] + SMALL[program].format(base=base_folder).split()
    path = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
    for name in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / name))
    monkeypatch.setattr(sys, "argv", [str(path), *options])
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    fresh_state()
    module = runpy.run_path(str(path))
    module["main"](module["parse_args"]())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} != before


def test_the_tutorial_paints_with_the_base_that_it_names(tmp_path, monkeypatch):
    """Its text encoders are stored in bfloat16 and its VAE in float32."""
    data, trained = tmp_path / "earth" / "test", tmp_path / "trained"
    write_files(data, {"00000.png": 1, "00000.txt": "a satellite picture"})
    for name in ("examples", "pipeline_flux_fill_semantic.py", "semantic_attention.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    run(ROOT / "examples" / "base", trained, "--max_train_steps", 1, "--semantic_mode", "projection", data=data)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("num_inference_steps=16", "num_inference_steps=1"), "tutorial.md", "exec"), {})
    assert (tmp_path / "painted.png").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_its_program_takes(command, tmp_path, monkeypatch, capsys):
    program, words = split_command(command)
    words = [word for word in words if word != "..."]
    path = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
    assert path.is_file()
    for folder in ("examples", "benchmarks"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    try:
        module = runpy.run_path(str(path))
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        pytest.skip('the page needs gradio: pip install "semantic-fill[app]"')
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
