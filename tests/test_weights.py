# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Weights to start from: they are loaded as they were saved, and what cannot be used is refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxFillPipeline
from helpers import LORA_FILE, MODULE_FILE, arguments, run, weights_of

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline, read_trained_settings
from semantic_fill.encoding import load_encoders


WITH_MODULE = [name for name, mode in SEMANTIC_MODES.items() if mode.module_class is not None]


def build(options, dtype: torch.dtype = torch.float32):
    return trainer.build_model(trainer.load_transformer(options, torch.device("cpu"), dtype), options)


@pytest.fixture(scope="module")
def one_step(base_folder, triptych_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one_step") / "out"
    return run(base_folder, out, "--max_train_steps", 1, data=triptych_folder)


@pytest.mark.parametrize("mode", WITH_MODULE)
def test_weights_to_start_from_are_not_rounded(base_folder, triptych_folder, tmp_path, mode):
    more = ["--semantic_mode", mode]
    out = run(base_folder, tmp_path / "first", *more, "--max_train_steps", 1, data=triptych_folder)
    more += ["--lora_weights", out, "--semantic_weights", out]
    options = arguments(base_folder, tmp_path / "second", *more, data=triptych_folder)
    model = build(options, torch.bfloat16)
    loaded = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = {f"{name.replace('.weight', '.default.weight')}": weight for name, weight in weights_of(out).items()}
    saved |= {f"semantic_attention.{name}": weight for name, weight in weights_of(out, MODULE_FILE).items()}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())


def test_results_and_checkpoints_record_how_they_were_trained(base_folder, triptych_folder, tmp_path):
    more = "--resolution 48 --width 32 --semantic_mode pixel_fusion --fusion_alpha 0.3 --max_train_steps 1"
    out = run(base_folder, tmp_path, *more.split(), "--checkpointing_steps", 1, data=triptych_folder)
    said = {"semantic_mode": "pixel_fusion", "fusion_alpha": 0.3, "max_sequence_length": 16, "height": 48, "width": 32}
    assert read_trained_settings(out) == read_trained_settings(out / "checkpoint-1") == said


def test_a_module_has_its_own_configuration(base_folder, triptych_folder, tmp_path):
    more = "--semantic_num_layers 2 --semantic_num_heads 2 --semantic_position none --max_train_steps 1"
    out = run(base_folder, tmp_path, *more.split(), data=triptych_folder)
    for source in (out, out / "semantic_attention"):
        module = build(
            arguments(base_folder, "unused", "--semantic_weights", source, data="unused")
        ).semantic_attention
        assert (module.config.num_layers, module.config.num_heads, module.config.position) == (2, 2, "none")
        assert module.training and all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize(
    "more, message",
    [
        ("--rank 8", "has rank 4 and alpha 4, but --rank is 8 and --lora_alpha 8: pass --rank 4 --lora_alpha 4"),
        ("--lora_alpha 8", "has rank 4 and alpha 4, but --rank is 4 and --lora_alpha 8: pass --rank 4 --lora_alpha 4"),
        ("--lora_layers attn.to_q", "does not fit --lora_layers: missing .*, unexpected .*to_k"),
    ],
)
def test_a_lora_of_another_shape_is_refused(base_folder, one_step, more, message):
    options = arguments(base_folder, "unused", "--lora_weights", one_step, *more.split(), data="unused")
    with pytest.raises(ValueError, match=message):
        build(options)


def test_a_module_of_another_kind_is_refused(base_folder, one_step):
    more = ["--semantic_mode", "projection", "--semantic_weights", one_step]
    with pytest.raises(ValueError, match="holds a SemanticAttentionModel, but .* needs a SemanticProjectionModel"):
        build(arguments(base_folder, "unused", *more, data="unused"))


@pytest.mark.parametrize("option", ["--lora_weights", "--semantic_weights"])
def test_a_folder_without_weights_is_named(base_folder, tmp_path, option):
    with pytest.raises(ValueError, match=f"{tmp_path} holds no trained"):
        build(arguments(base_folder, "unused", option, tmp_path, data="unused"))


@pytest.mark.parametrize("file", [LORA_FILE, MODULE_FILE])
def test_damaged_weights_to_start_from_are_named(base_folder, one_step, tmp_path, file):
    folder = tmp_path / "start"
    shutil.copytree(one_step, folder)
    with open(folder / file, "r+b") as opened:
        opened.write(b"\xff")
    option = "--lora_weights" if file == LORA_FILE else "--semantic_weights"
    with pytest.raises(ValueError, match=f"{folder} holds no trained"):
        build(arguments(base_folder, "unused", option, folder, data="unused"))
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    with pytest.raises((OSError, ValueError), match=str(folder / file)):
        pipe.load_lora_weights(folder)
    assert pipe.semantic_attention is None and not pipe.get_active_adapters()


@pytest.mark.parametrize("folder", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_damaged_file_of_the_base_is_named(base_folder, tmp_path, folder):
    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    (file,) = (base / folder).glob("*.safetensors")
    with open(file, "r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    options = arguments(base, "unused", data="unused")
    with pytest.raises((OSError, ValueError), match=str(file)):
        load_encoders(options, torch.float32)
        build(options)


def test_a_base_is_loaded_without_its_transformer_where_it_only_encodes(base_folder):
    pipeline = load_encoders(arguments(base_folder, "unused", data="unused"), torch.bfloat16)
    assert pipeline.transformer is None and pipeline.vae.dtype == pipeline.text_encoder_2.dtype == torch.bfloat16
    stock = FluxFillPipeline.from_pretrained(base_folder)
    assert pipeline.components.keys() - stock.components.keys() == {"semantic_attention"}
