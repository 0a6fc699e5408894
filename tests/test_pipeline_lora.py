# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Pipelines and LoRAs that are saved and loaded, as folders and as `custom_pipeline`."""

import ast
import json
import os

import pytest
import safetensors.torch
import torch
from conftest import ROOT
from diffusers import FluxFillPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from pipeline_helpers import (
    Trained,
    differs,
    diptych_of,
    fill,
    make_pipe,
    paint,
    picture,
    trained_like,
    write_old_module,
)
from quick_python import run_python

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline, read_trained_settings
from semantic_attention import SemanticAttentionModel, SemanticProjectionModel


LORA_FILE = "pytorch_lora_weights.safetensors"


# -- Save and load ----------------------------------------------------------------------------------------------------


def test_from_pipe_both_ways(base):
    module = trained_like()
    pipe = FluxFillSemanticPipeline.from_pipe(base, semantic_attention=module, semantic_mode="cross_attention")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer is base.transformer and pipe.semantic_attention is module
    assert differs(paint(pipe, semantic_image=picture(2)), paint(pipe), by=1e-4)
    back = FluxFillPipeline.from_pipe(pipe)
    back.set_progress_bar_config(disable=True)
    assert type(back) is FluxFillPipeline and back.transformer is base.transformer
    assert torch.equal(fill(back, *diptych_of(picture(1))), paint(pipe, return_diptych=True))
    other = FluxFillSemanticPipeline.from_pipe(make_pipe(base, semantic_mode="in_context", fusion_alpha=0.3))
    assert other.semantic_attention is None
    assert (other.config.semantic_mode, other.config.fusion_alpha) == ("in_context", 0.3)


@pytest.mark.parametrize("mode", [name for name, mode in SEMANTIC_MODES.items() if mode.uses_map])
def test_save_pretrained_and_back(base, tmp_path, mode):
    module_class = SEMANTIC_MODES[mode].module_class
    module = None if module_class is None else trained_like(model_class=module_class, num_layers=2)
    pipe = make_pipe(base, semantic_attention=module, semantic_mode=mode, fusion_alpha=0.4)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    expected = [None, None] if module_class is None else ["semantic_attention", module_class.__name__]
    assert index["semantic_attention"] == expected
    loaded = FluxFillSemanticPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.semantic_mode, loaded.config.fusion_alpha) == (mode, 0.4)
    views = {"semantic_image": picture(2)}
    torch.testing.assert_close(paint(loaded, **views), paint(pipe, **views), rtol=1e-4, atol=1e-4)


CUSTOM = """
import sys, torch
from diffusers import DiffusionPipeline
custom, lora, out, *folders = sys.argv[1:]
torch.set_grad_enabled(False)
views = torch.load(out + "/views.pt")
for number, folder in enumerate(folders):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=custom, trust_remote_code=True)
    assert type(pipe).__name__ == "FluxFillSemanticPipeline" and "diffusers_modules" in type(pipe).__module__
    # The first folder is the base.
    if number == 0:
        pipe.load_lora_weights(lora)
    images = pipe("a hill", image=views[0], semantic_image=views[1], num_inference_steps=2, max_sequence_length=16,
                  output_type="pt", generator=torch.Generator().manual_seed(0)).images
    torch.save(images, f"{out}/{number}.pt")
    if number > 0:
        pipe.save_pretrained(f"{out}/again {number}")
"""


def in_one_file() -> str:
    """The two files as one: the module's source stands where the pipeline chooses how to import it."""
    module, pipeline = (
        (ROOT / name).read_text() for name in ("semantic_attention.py", "pipeline_flux_fill_semantic.py")
    )
    (branch,) = (node for node in ast.parse(pipeline).body if isinstance(node, ast.If))
    assert ast.unparse(branch.test) == "TYPE_CHECKING or __package__"
    lines = pipeline.splitlines(keepends=True)
    return "".join((*lines[: branch.lineno - 1], module, "\n\n", *lines[branch.end_lineno :]))


def top_level_names(file: str) -> dict[str, object]:
    """What each name at the top level of a file is: the import that brings it, or the definition itself."""
    names = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.asname and alias.name for alias in node.names}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return names


def test_the_two_files_fit_into_one():
    module, pipeline = map(top_level_names, ("semantic_attention.py", "pipeline_flux_fill_semantic.py"))
    assert {name for name in module.keys() & pipeline.keys() if module[name] != pipeline[name]} == set()
    assert not any(isinstance(of, tuple) and of[0] == "__future__" for of in (*module.values(), *pipeline.values()))
    compile(in_one_file(), "pipeline.py", "exec")


@pytest.mark.parametrize("form", ["two files", "one file", "two files beside the installed ones"])
def test_as_custom_pipeline(base, base_folder, trained, tmp_path, form):
    custom = ROOT / "pipeline_flux_fill_semantic.py"
    if form == "one file":
        custom = tmp_path / "hub" / "pipeline.py"
        custom.parent.mkdir()
        custom.write_text(in_one_file())
    saved = {}
    for model_class in (SemanticAttentionModel, SemanticProjectionModel):
        pipe = make_pipe(base, semantic_attention=trained_like(3, model_class=model_class))
        folder = tmp_path / model_class.__name__
        pipe.save_pretrained(folder)
        saved[str(folder)] = paint(pipe, semantic_image=picture(2))
    torch.save([picture(1), picture(2)], tmp_path / "views.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    # Then the process holds each class twice.
    first = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import semantic_attention" if "installed" in form else ""
    options = (custom, trained.folder, tmp_path, base_folder, *saved)
    done = run_python("-c", first + CUSTOM, *options, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.load(tmp_path / "0.pt"), trained.guided, **close)
    for number, painted in enumerate(saved.values(), start=1):
        torch.testing.assert_close(torch.load(tmp_path / f"{number}.pt"), painted, **close)
        again = FluxFillSemanticPipeline.from_pretrained(tmp_path / f"again {number}")
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(paint(again, semantic_image=picture(2)), painted, **close)


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    return Trained(base, tmp_path_factory.mktemp("lora"), seed=0)


@pytest.fixture(scope="module")
def other(base, tmp_path_factory):
    return Trained(base, tmp_path_factory.mktemp("other"), seed=1)


def close_to(images, expected, tolerance=1e-4) -> bool:
    return not differs(images, expected, tolerance)


def is_plain(pipe) -> bool:
    return pipe.semantic_attention is None and not getattr(pipe.transformer, "peft_config", None)


def test_lora_and_module_come_and_go(base, trained):
    pipe = make_pipe(base, own=True)
    before = paint(pipe, return_diptych=True)
    assert differs(trained.plain, before)
    pipe.load_lora_weights(trained.folder)
    assert close_to(paint(pipe, return_diptych=True), trained.plain)
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)
    assert differs(trained.guided, trained.plain[..., 48:])
    state = pipe.semantic_attention.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in trained.module.state_dict().items())
    pipe.unload_lora_weights()
    assert is_plain(pipe)
    assert torch.equal(paint(pipe, return_diptych=True), before)
    pipe.load_lora_weights(str(trained.folder), adapter_name="again")
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)


def test_a_lora_folder_holds_what_the_design_says(trained):
    files = {path.relative_to(trained.folder).as_posix() for path in trained.folder.rglob("*") if path.is_file()}
    module = {"semantic_attention/config.json", "semantic_attention/diffusion_pytorch_model.safetensors"}
    assert files == {LORA_FILE} | module
    with safetensors.safe_open(trained.folder / LORA_FILE, framework="pt") as weights:
        metadata, keys = weights.metadata(), list(weights.keys())
    assert all(key.startswith("transformer.") and "lora_" in key for key in keys)
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (2, 8)
    assert json.loads(metadata["semantic_fill"])["semantic_mode"] == "cross_attention"


def test_fill_pipeline_loads_the_same_lora(base, trained):
    stock = make_pipe(base, FluxFillPipeline, own=True)
    stock.load_lora_weights(trained.folder)
    assert close_to(fill(stock, *diptych_of(picture(1))), trained.plain)


def test_fuse_and_unfuse(base, trained):
    pipe = make_pipe(base, own=True)
    before = paint(pipe, return_diptych=True)
    pipe.load_lora_weights(trained.folder)
    pipe.fuse_lora()
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)
    pipe.unfuse_lora()
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)
    pipe.unload_lora_weights()
    assert is_plain(pipe) and close_to(paint(pipe, return_diptych=True), before)


def test_unloading_a_fused_lora_keeps_the_module(base, trained):
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(trained.folder)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not getattr(pipe.transformer, "peft_config", None)
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)


def test_two_adapters(base, trained, other):
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(trained.folder, adapter_name="first")
    pipe.load_lora_weights(other.folder, adapter_name="second")
    pipe.set_adapters("second")
    assert close_to(paint(pipe, semantic_image=picture(2)), other.guided)
    pipe.set_adapters("first")
    assert close_to(paint(pipe, return_diptych=True), trained.plain)
    pipe.set_adapters(["first", "second"], adapter_weights=[0.5, 0.5])
    mixed = paint(pipe, return_diptych=True)
    assert differs(mixed, trained.plain) and differs(mixed, other.plain)
    pipe.unload_lora_weights()
    assert is_plain(pipe)


def test_a_state_dict_loads_the_lora_only(base, trained):
    module = trained_like(5)
    pipe = make_pipe(base, own=True, semantic_attention=module)
    weights = safetensors.torch.load_file(trained.folder / LORA_FILE)
    pipe.load_lora_weights(weights)
    assert pipe.semantic_attention is module and pipe.transformer.peft_config


@pytest.mark.parametrize("semantic_mode", ["projection", "in_context"])
def test_loaded_modes(base, tmp_path, semantic_mode):
    saved = Trained(base, tmp_path, seed=0, semantic_mode=semantic_mode)
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(tmp_path)
    assert pipe.config.semantic_mode == semantic_mode
    assert (pipe.semantic_attention is None) == (semantic_mode == "in_context")
    assert close_to(paint(pipe, semantic_image=picture(2)), saved.guided)
    pipe.unload_lora_weights()
    assert pipe.config.semantic_mode == "cross_attention" and is_plain(pipe)


def write_metadata(file, **trained_with) -> None:
    """Changes what the LoRA file says of how the map entered."""
    with safetensors.safe_open(file, framework="pt") as weights:
        metadata = weights.metadata()
    metadata["semantic_fill"] = json.dumps(json.loads(metadata["semantic_fill"]) | trained_with)
    safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata=metadata)


def test_weights_say_how_they_were_trained(base, trained, tmp_path):
    said = {"semantic_mode": "none", "fusion_alpha": 0.5, "max_sequence_length": 16, "height": 48, "width": 64}
    layers = safetensors.torch.load_file(trained.folder / LORA_FILE)
    layers = {name.removeprefix("transformer."): weight for name, weight in layers.items()}
    FluxFillSemanticPipeline.save_lora_weights(tmp_path / "sub", layers, weight_name="own.safetensors", **said)
    assert read_trained_settings(tmp_path, subfolder="sub", weight_name="own.safetensors") == said
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(tmp_path, subfolder="sub", weight_name="own.safetensors")
    assert (pipe.config.semantic_mode, pipe.config.max_sequence_length) == ("none", 16)
    # Weights of before the size was recorded, and a folder without weights.
    old = {"semantic_mode": "cross_attention", "fusion_alpha": 0.5, "max_sequence_length": 512}
    assert read_trained_settings(str(trained.folder)) == old
    assert read_trained_settings(tmp_path) == {}
    safetensors.torch.save_file(layers, tmp_path / LORA_FILE)
    assert read_trained_settings(tmp_path) == {}


@pytest.mark.parametrize(
    "said, named",
    [
        ('{"height": "48"}', "`height` has to be a positive whole number but is '48'"),
        ('{"width": 0}', "`width` has to be a positive whole number but is 0"),
        ('{"width": true}', "`width` has to be a positive whole number but is True"),
        ("null", "is no JSON object but None"),
        ('["none"]', "is no JSON object but"),
        ("{", "Expecting property name"),
        ("[" * 100000, "recursion"),
        ('{"semantic_mode": "mixing"}', "`semantic_mode` has to be one of"),
    ],
)
def test_what_weights_cannot_say_is_refused(base, trained, tmp_path, said, named):
    layers = safetensors.torch.load_file(trained.folder / LORA_FILE)
    safetensors.torch.save_file(layers, tmp_path / LORA_FILE, metadata={"semantic_fill": said})
    for read in (read_trained_settings, make_pipe(base).load_lora_weights):
        with pytest.raises(ValueError, match=named):
            read(tmp_path)


def test_old_weights_of_a_direct_module_load_as_a_projection(base, tmp_path):
    saved = Trained(base, tmp_path, seed=0, semantic_mode="projection")
    # As commit bd5985d wrote them: the mode had no name of its own, and neither had the class.
    write_metadata(tmp_path / LORA_FILE, semantic_mode="cross_attention")
    write_old_module(tmp_path / "semantic_attention", num_layers=1, position="direct", injection="condition")
    weights = tmp_path / "semantic_attention" / "diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file(saved.module.state_dict(), weights, metadata={"format": "pt"})
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(tmp_path)
    assert type(pipe.semantic_attention) is SemanticProjectionModel
    assert pipe.config.semantic_mode == "projection"
    assert close_to(paint(pipe, semantic_image=picture(2)), saved.guided)
    assert close_to(paint(pipe, return_diptych=True), saved.plain)


@pytest.mark.parametrize(
    "old, mode, named",
    [
        ({"position": "aligned"}, "cross_attention", "position='aligned'.*bd5985d"),
        ({"position": "none", "injection": "condition"}, "cross_attention", "injection='condition'.*bd5985d"),
        ({"position": "none"}, "projection", "`semantic_attention` has to be a `SemanticProjectionModel`"),
        ({"position": "none"}, "mixing", "`semantic_mode` has to be one of"),
    ],
)
def test_weights_that_cannot_be_used_change_nothing(base, trained, tmp_path, old, mode, named):
    (tmp_path / LORA_FILE).write_bytes((trained.folder / LORA_FILE).read_bytes())
    write_metadata(tmp_path / LORA_FILE, semantic_mode=mode)
    write_old_module(tmp_path / "semantic_attention", **old)
    module = trained_like(5)
    pipe = make_pipe(base, own=True, semantic_attention=module)
    with pytest.raises(ValueError, match=named):
        pipe.load_lora_weights(tmp_path)
    assert pipe.semantic_attention is module and pipe.config.semantic_mode == "cross_attention"
    assert not getattr(pipe.transformer, "peft_config", None)


def test_a_lora_without_module_changes_nothing(base, trained, tmp_path):
    (tmp_path / LORA_FILE).write_bytes((trained.folder / LORA_FILE).read_bytes())
    module = trained_like(5)
    for pipe in (make_pipe(base, own=True), make_pipe(base, own=True, semantic_attention=module)):
        before = pipe.semantic_attention
        with pytest.raises(ValueError, match="`pretrained_model_name_or_path_or_dict` has to .*semantic_attention"):
            pipe.load_lora_weights(tmp_path)
        assert pipe.semantic_attention is before and not getattr(pipe.transformer, "peft_config", None)


@pytest.mark.parametrize("fault", ["shape", "file"])
def test_a_load_that_fails_midway_changes_nothing(base, trained, tmp_path, fault):
    trained.module.save_pretrained(tmp_path / "semantic_attention")
    weights = safetensors.torch.load_file(trained.folder / LORA_FILE)
    if fault == "shape":
        name = next(name for name in weights if "lora_B" in name)
        weights[name] = torch.zeros(7, weights[name].shape[1])
        safetensors.torch.save_file(weights, tmp_path / LORA_FILE)
    module = trained_like(5)
    pipe = make_pipe(base, own=True, semantic_attention=module)
    before = paint(pipe, semantic_image=picture(2))
    with pytest.raises((RuntimeError, ValueError, OSError)):
        pipe.load_lora_weights(tmp_path)
    assert pipe.semantic_attention is module and not getattr(pipe.transformer, "peft_config", None)
    assert torch.equal(paint(pipe, semantic_image=picture(2)), before)


def test_other_processes_save_nothing(trained, tmp_path):
    layers = {"lora_A": torch.zeros(1)}
    FluxFillSemanticPipeline.save_lora_weights(
        tmp_path / "out", layers, semantic_attention=trained.module, is_main_process=False
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"semantic_mode": "cross_attention"}, "semantic_attention"),
        ({"semantic_mode": "none", "semantic_attention": SemanticAttentionModel()}, "semantic_attention"),
        ({"semantic_mode": "projection", "semantic_attention": SemanticAttentionModel()}, "semantic_attention"),
        ({"semantic_attention": SemanticProjectionModel()}, "semantic_attention"),
        ({"semantic_mode": "both"}, "semantic_mode"),
        # Nobody could load such a file.
        ({"semantic_mode": "pixel_fusion", "fusion_alpha": 2}, "fusion_alpha"),
        ({"semantic_mode": "none", "max_sequence_length": 0}, "max_sequence_length"),
        ({"semantic_mode": "none", "height": 0}, "height"),
    ],
)
def test_wrong_saves(tmp_path, wrong, named):
    with pytest.raises(ValueError, match=f"`{named}` has to be "):
        FluxFillSemanticPipeline.save_lora_weights(tmp_path / "out", {"lora_A": torch.zeros(1)}, **wrong)
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_no_folder_is_named(base, tmp_path):
    # A name that could be a repository's is looked for on the Hub.
    with pytest.raises(
        ValueError, match="`pretrained_model_name_or_path_or_dict` has to be a folder.*no/such/folder'"
    ):
        make_pipe(base).load_lora_weights(tmp_path / "no/such/folder")


def test_a_hub_out_of_reach_is_not_a_missing_module(base, tmp_path):
    with pytest.raises(LocalEntryNotFoundError):
        make_pipe(base).load_lora_weights("user/not-cached", cache_dir=str(tmp_path), local_files_only=True)
