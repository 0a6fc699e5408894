# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The wheel and the sdist: what they hold, and that the wheel alone trains and paints from another folder."""

import ast
import contextlib
import email
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


MODULES = {"pipeline_flux_fill_semantic.py", "semantic_attention.py", "train_semantic_fill_lora.py"}
PACKAGE = {f"semantic_fill/{path.name}" for path in (ROOT / "semantic_fill").glob("*.py")} | {"semantic_fill/py.typed"}
BUILD = "import setuptools.build_meta as backend; backend.build_sdist('dist'); backend.build_wheel('dist')"

# Calls the installed commands one after the other in one process, and says where their code came from.
RUN = """
import json, runpy, sys
for sys.argv in json.loads(sys.argv[1]):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
print(sys.modules["train_semantic_fill_lora"].__file__, sys.modules["semantic_fill"].__file__, sep="|")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist and the wheel, built from a copy, because a build leaves files behind."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    for folder in ("semantic_fill", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("[!.]*"):
        if path.is_file():
            shutil.copy(path, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (sdist,), (wheel,) = (list((source / "dist").glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    return sdist, wheel


def test_the_wheel_holds_what_runs_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == MODULES | PACKAGE


def test_the_sdist_holds_what_builds_the_wheel(built):
    with tarfile.open(built[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    names = {name for name in names if name and "egg-info" not in name}
    texts = {"README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md"}
    made = {"PKG-INFO", "setup.cfg", "semantic_fill"}
    assert names == MODULES | PACKAGE | texts | made | {
        "setup.py",
        "pyproject.toml",
        "requirements.txt",
        "MANIFEST.in",
    }


@pytest.fixture(scope="module")
def metadata(built):
    with zipfile.ZipFile(built[1]) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(file.read(name))


def test_the_version_is_the_newest_of_the_changelog(metadata):
    newest = re.findall(r"^## (\d\S*) - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    nodes = re.search(r'^version = "(.*)"$', (ROOT / "comfyui" / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert metadata["Version"] == newest == nodes


def imported_packages(*paths: Path) -> set[str]:
    """Top-level names of all that files import, without Python's own modules."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


# What is imported -> the distribution that brings it, where their names differ.
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "skimage": "scikit-image", "resvg_py": "resvg-py"}
DISTRIBUTIONS |= {"huggingface_hub": "huggingface-hub", "mpl_toolkits": "basemap-data"}
# These come with datasets, transformers, torchmetrics or gradio.
BROUGHT = {"fsspec", "pyarrow", "scipy", "tokenizers", "starlette", "fastapi"}
# Modules of other trainers, which benchmarks/others.py finds in the checkouts that it is given.
IN_CHECKOUTS = {"modules", "library", "networks", "flux_train_network"}


def test_what_is_imported_is_required_or_in_an_extra(metadata):
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    always = {canonicalize_name(r.name) for r in required if r.marker is None}
    extras = {canonicalize_name(r.name) for r in required if r.marker is not None}
    installed = [*map(ROOT.joinpath, MODULES), *(ROOT / "semantic_fill").glob("*.py")]
    others = [*(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    own = {path.stem for path in (*installed, *others)} | {"semantic_fill"}
    for paths, allowed in ((installed, always | {"bitsandbytes", "prodigyopt", "wandb"}), (others, always | extras)):
        used = {DISTRIBUTIONS.get(name, name) for name in imported_packages(*paths) - own - BROUGHT - IN_CHECKOUTS}
        assert used <= allowed
    # torchmetrics imports the last two, for LPIPS and FID.
    assert {"bitsandbytes", "prodigyopt", "wandb", "torchvision", "torch-fidelity"} <= extras


def test_what_is_installed_is_what_the_extras_ask_for(metadata):
    """Extras that this machine has not installed are left out, but never those of the tests."""
    seen = set()
    for requirement in map(Requirement, metadata.get_all("Requires-Dist")):
        with contextlib.suppress(PackageNotFoundError):
            assert requirement.specifier.contains(version(requirement.name)), requirement
            seen.add(str(requirement))
    for text in metadata.get_all("Requires-Dist"):
        assert text in seen or Requirement(text).marker is not None and 'extra == "test"' not in text, text


def test_the_image_gets_what_makes_the_wheel():
    copied = " ".join(re.findall(r"^COPY (.*) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)).split()
    assert all((ROOT / name).exists() for name in copied)
    assert {*MODULES, "semantic_fill", "setup.py", "pyproject.toml", "requirements.txt", "README.md"} <= set(copied)
    # Docker sends nothing else than these to the builder.
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in sent) for name in copied)


def test_the_wheel_alone_trains_and_evaluates(built, base_folder, triptych_folder, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, built[1]]
    subprocess.run(install, check=True, capture_output=True)

    sizes = ("--resolution", 32, "--max_sequence_length", 16)
    paths = ("--pretrained_model_name_or_path", base_folder, "--train_data_dir", triptych_folder)
    train = ("semantic-fill-train", *paths, *sizes, "--rank", 4, "--max_train_steps", 1, "--report_to", "none")
    trained = elsewhere / "semantic-fill-lora"
    maps = ("--maps", "right", "--num_inference_steps", 1)
    evaluate = ("semantic-fill-evaluate", "--trained", trained, *paths, *maps)
    calls = [[str(site / "bin" / name), *map(str, options)] for name, *options in (train, evaluate)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(calls)],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (trained / "pytorch_lora_weights.safetensors").is_file()
    assert (elsewhere / "evaluation" / "evaluation.json").is_file()
    # It ran what was installed and not this checkout.
    assert all(path.startswith(str(site)) for path in done.stdout.splitlines()[-1].split("|"))
