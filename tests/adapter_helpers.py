# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What the tests of adapters share: LoRAs of all kinds, pipelines that load them, and what those have to paint."""

import copy

import torch
from diffusers import FluxFillPipeline
from peft import LoraConfig, get_peft_model_state_dict
from pipeline_helpers import Trained, differs, make_pipe, paint, picture


LORA_FILE = "pytorch_lora_weights.safetensors"
MAP = {"semantic_image": picture(2)}


def ordinary_lora(base, folder, seed: int = 7):
    """A LoRA that `FluxFillPipeline` itself saved, on the transformer and on CLIP."""
    pipe = make_pipe(base, FluxFillPipeline, own=True)
    layers = {}
    for part, targets in (("transformer", ["to_q", "to_k"]), ("text_encoder", ["q_proj", "v_proj"])):
        model = getattr(pipe, part)
        torch.manual_seed(seed)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets))
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
    FluxFillPipeline.save_lora_weights(folder, **layers)
    return folder


def make_loras(base, folder) -> dict:
    """`a` and `b` attend, `p` projects, `c` has the map on its canvas, `n` uses none, and `o` is an ordinary LoRA."""
    modes = {"a": "cross_attention", "b": "cross_attention", "p": "projection", "c": "in_context", "n": "none"}
    trained = {
        name: Trained(base, folder / name, seed=seed, semantic_mode=mode)
        for seed, (name, mode) in enumerate(modes.items())
    }
    return trained | {"o": ordinary_lora(base, folder / "o")}


def folder_of(lora):
    return getattr(lora, "folder", lora)


def load(base, loras, names: str, **kwargs):
    """A pipeline with these adapters, each under its own name, of which the last one is active."""
    pipe = make_pipe(base, own=True, **kwargs)
    for name in names:
        pipe.load_lora_weights(folder_of(loras[name]), adapter_name=name)
    return pipe


def make_expected(base, loras):
    """Paints with some LoRAs as `FluxFillPipeline` loads them, and with at most one module, which no LoRA brought."""
    known = {}

    def paint_with(weights: dict[str, float], with_map: bool) -> torch.Tensor:
        key = (*sorted(weights.items()), with_map)
        if key not in known:
            trained = {name: loras[name] for name in weights if name != "o"}
            modules = {name: each.module for name, each in trained.items() if each.module is not None}
            modes = {each.semantic_mode for each in trained.values()} - {"none"}
            assert len(modules) <= 1 and len(modes) <= 1
            module = None
            for name, module in modules.items():
                module = copy.deepcopy(module)
                for layer in module.layers:
                    layer.scale.data *= weights[name]
            pipe = make_pipe(base, own=True, semantic_attention=module, semantic_mode=next(iter(modes), "none"))
            for name in weights:
                FluxFillPipeline.load_lora_weights(pipe, folder_of(loras[name]), adapter_name=name)
            if weights:
                pipe.set_adapters(list(weights), list(weights.values()))
            assert not pipe.semantic_adapters
            known[key] = paint(pipe, return_diptych=True, **(MAP if with_map and modes else {}))
        return known[key]

    return paint_with


def assert_acts(pipe, expected, weights: dict[str, float], tolerance: float = 1e-4) -> None:
    for kwargs in ({}, MAP):
        if kwargs and "n" in weights and len(weights) == 1:
            continue
        painted = paint(pipe, return_diptych=True, **kwargs)
        assert not differs(painted, expected(weights, bool(kwargs)), tolerance), (weights, list(kwargs))


def reload(pipe, name, loras, **kwargs):
    pipe.load_lora_weights(folder_of(loras), adapter_name=name, **kwargs)
