# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""LoRAs from any place and any tool load, and LoRAs are saved, as `FluxFillPipeline` loads and saves them."""

import inspect
import shutil

import pytest
import safetensors.torch
import torch
from adapter_helpers import LORA_FILE, assert_acts, folder_of, load
from diffusers import FluxFillPipeline
from pipeline_helpers import differs, diptych_of, fill, make_pipe, paint, picture, trained_like

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_attention import read_header


def kohya_lora() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prefix = "lora_unet_double_blocks_0_img_attn_qkv"
    weights = {"lora_down.weight": (2, 32), "lora_up.weight": (96, 2)}
    lora = {f"{prefix}.{name}": torch.randn(shape, generator=generator) for name, shape in weights.items()}
    return lora | {f"{prefix}.alpha": torch.tensor(1.0)}


def xlabs_lora() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prefix = "double_blocks.0.processor.qkv_lora1"
    return {
        f"{prefix}.down.weight": torch.randn(2, 32, generator=generator),
        f"{prefix}.up.weight": torch.randn(96, 2, generator=generator),
    }


def control_lora() -> dict[str, torch.Tensor]:
    """As BFL's control LoRAs are after diffusers has renamed them: with norms, and on the layer that sees the input."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x_embedder.lora_A.weight": (2, 384), "x_embedder.lora_B.weight": (32, 2)}
    shapes["transformer_blocks.0.attn.norm_q.weight"] = (16,)
    return {f"transformer.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def lora_with_alphas() -> dict:
    """With numbers among the weights, as some tools keep alphas in memory."""
    lora: dict = {name: weight for name, weight in control_lora().items() if "lora" in name}
    return lora | {"transformer.x_embedder.lora_A.weight.alpha": 8.0}


@pytest.mark.parametrize("make", [kohya_lora, xlabs_lora, control_lora, lora_with_alphas])
@pytest.mark.parametrize("form", ["state dict", "file", "folder", "folder and name"])
def test_loras_of_other_tools_load_as_in_fill_pipeline(base, loras, tmp_path, make, form):
    tensors = {name: torch.as_tensor(weight) for name, weight in make().items()}
    safetensors.torch.save_file(tensors, tmp_path / "style.safetensors")
    source = {"state dict": make(), "file": tmp_path / "style.safetensors"}.get(form, tmp_path)
    kwargs = {"weight_name": "style.safetensors"} if form == "folder and name" else {}
    # Neither a module that lies in the same folder nor the pipeline's own has to do with it.
    loras["a"].module.save_pretrained(tmp_path / "semantic_attention")
    own = trained_like(5)
    pipe, stock = make_pipe(base, own=True, semantic_attention=own), make_pipe(base, FluxFillPipeline, own=True)
    before = paint(pipe, return_diptych=True)
    for each in (pipe, stock):
        each.load_lora_weights(source, "style", **kwargs)
    painted = paint(pipe, return_diptych=True)
    assert torch.equal(painted, fill(stock, *diptych_of(picture(1)))) and differs(painted, before, 1e-4)
    assert not pipe.semantic_adapters and pipe.semantic_attention is own and pipe.get_active_adapters() == ["style"]
    pipe.unload_lora_weights()
    assert torch.equal(paint(pipe, return_diptych=True), before)


@pytest.mark.parametrize("form", ["file", "another name", "subfolder", "no metadata", "a name that says pickle"])
def test_trained_loras_load_from_any_place(base, loras, expected, tmp_path, form):
    folder = tmp_path / "sub" if form == "subfolder" else tmp_path
    shutil.copytree(folder_of(loras["p"]), folder, dirs_exist_ok=True)
    source, kwargs = folder, {}
    if form == "file":
        source = folder / LORA_FILE
    elif form == "another name":
        (folder / LORA_FILE).rename(folder / "own.safetensors")
    elif form == "subfolder":
        source, kwargs = tmp_path, {"subfolder": "sub"}
    elif form == "no metadata":
        config = lora_config(folder / LORA_FILE)
        safetensors.torch.save_file(safetensors.torch.load_file(folder / LORA_FILE), folder / LORA_FILE, config)
    elif form == "a name that says pickle":
        (folder / LORA_FILE).rename(folder / "own.bin")
        kwargs = {"weight_name": "own.bin"}
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(source, **kwargs)
    assert pipe.config.semantic_mode == "projection"
    assert_acts(pipe, expected, {"p": 1})


def lora_config(file) -> dict[str, str]:
    """What diffusers itself keeps in a LoRA file's metadata."""
    with safetensors.safe_open(file, framework="pt") as weights:
        return {name: text for name, text in weights.metadata().items() if name != "semantic_fill"}


def test_a_load_that_fails_changes_nothing(base, loras, expected, tmp_path):
    pipe = load(base, loras, "ab")
    pipe.set_adapters("a", 0.5)
    weights = safetensors.torch.load_file(folder_of(loras["o"]) / LORA_FILE)
    name = next(name for name in weights if name.startswith("text_encoder.") and "lora_B" in name)
    # The transformer's part is loaded before this one fails.
    weights[name] = torch.zeros(7, 2)
    with pytest.raises(RuntimeError):
        pipe.load_lora_weights(weights, adapter_name="broken")
    assert pipe.get_list_adapters()["transformer"] == ["a", "b"]
    assert_acts(pipe, expected, {"a": 0.5})


# -- Saving as FluxFillPipeline saves ---------------------------------------------------------------------------------


def test_saves_what_fill_pipeline_saves(base, tmp_path):
    layers = {"transformer_lora_layers": {"proj_out.lora_A.weight": torch.ones(2, 32)}}
    layers["text_encoder_lora_layers"] = {"q_proj.lora_A.weight": torch.ones(2, 32)}
    configs = {"transformer_lora_adapter_metadata": {"r": 2, "target_modules": {"proj_out"}}}
    configs["text_encoder_lora_adapter_metadata"] = {"r": 3}
    for pipeline_class in (FluxFillPipeline, FluxFillSemanticPipeline):
        pipeline_class.save_lora_weights(tmp_path / pipeline_class.__name__, **layers, **configs)
    files = [tmp_path / each.__name__ / LORA_FILE for each in (FluxFillPipeline, FluxFillSemanticPipeline)]
    # Only the order of the metadata may differ.
    assert read_header(files[0]) == read_header(files[1]) and [*files[1].parent.iterdir()] == [files[1]]
    stock_order = list(inspect.signature(FluxFillPipeline.save_lora_weights).parameters)
    assert (
        list(inspect.signature(FluxFillSemanticPipeline.save_lora_weights).parameters)[: len(stock_order)]
        == stock_order
    )
    written = []
    FluxFillSemanticPipeline.save_lora_weights(
        tmp_path, **layers, weight_name="x", save_function=lambda weights, path: written.append((len(weights), path))
    )
    assert written == [(2, f"{tmp_path}/x")]
    with pytest.raises(ValueError, match="`save_function` has to be None"):
        FluxFillSemanticPipeline.save_lora_weights(tmp_path, **layers, semantic_mode="none", save_function=torch.save)
    with pytest.raises(ValueError, match="`safe_serialization` has to be True"):
        FluxFillSemanticPipeline.save_lora_weights(tmp_path, **layers, semantic_mode="none", safe_serialization=False)
    with pytest.raises(ValueError, match="at least one of"):
        FluxFillSemanticPipeline.save_lora_weights(tmp_path)


def test_pickles_are_written_as_fill_pipeline_writes_them_and_never_read(base, loras, tmp_path):
    layers = safetensors.torch.load_file(folder_of(loras["n"]) / LORA_FILE)
    layers = {name.removeprefix("transformer."): weight for name, weight in layers.items()}
    FluxFillSemanticPipeline.save_lora_weights(tmp_path / "ours", layers, safe_serialization=False)
    FluxFillPipeline.save_lora_weights(tmp_path, layers, safe_serialization=False)
    file = tmp_path / "ours" / "pytorch_lora_weights.bin"
    written, stock = (torch.load(folder / file.name, weights_only=True) for folder in (file.parent, tmp_path))
    assert written.keys() == stock.keys() == {f"transformer.{name}" for name in layers}
    assert all(torch.equal(written[name], stock[name]) for name in stock)
    assert {path.name for path in file.parent.iterdir()} == {file.name, LORA_FILE}
    pipe = make_pipe(base, own=True)
    for stock_or_ours in (pipe, make_pipe(base, FluxFillPipeline, own=True)):
        stock_or_ours.load_lora_weights(file)
    # What was read is the safetensors file beside it.
    file.write_bytes(b"no pickle")
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    pickled = {"source": tmp_path / "pytorch_lora_weights.bin"}
    for wrong in (
        pickled,
        {"source": tmp_path, "weight_name": "pytorch_lora_weights.bin"},
        {"source": file, "use_safetensors": False},
    ):
        source = wrong.pop("source")
        for read in (pipe.load_lora_weights, pipe.lora_state_dict):
            with pytest.raises(ValueError, match="`weight_name` has to be a safetensors file"):
                read(source, **wrong)
    with pytest.raises(FileNotFoundError, match="has no 'pytorch_lora_weights.safetensors'"):
        pipe.load_lora_weights(tmp_path)
