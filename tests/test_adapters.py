# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Trained LoRAs as adapters among others: their modules come, act, weigh and go with them."""

import pytest
import safetensors.torch
import torch
from adapter_helpers import LORA_FILE, MAP, assert_acts, folder_of, load, reload
from diffusers import FirstBlockCacheConfig
from pipeline_helpers import differs, make_pipe, paint, picture, trained_like, watched

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_attention import SemanticProjectionModel


# -- What the adapters' methods do to the modules ---------------------------------------------------------------------


def fuse(pipe, *names, **kwargs):
    pipe.fuse_lora(components=["transformer", "text_encoder"], adapter_names=list(names), **kwargs)


# What is loaded, what is done, and what acts then.
OPERATIONS = {
    "the last one is active": ("ab", lambda pipe, loras: None, {"b": 1}),
    "an ordinary LoRA takes over": ("ao", lambda pipe, loras: None, {"o": 1}),
    "switch back": ("ab", lambda pipe, loras: pipe.set_adapters("a"), {"a": 1}),
    "switch between modes": ("pan", lambda pipe, loras: pipe.set_adapters("p"), {"p": 1}),
    "to a canvas of three panels": ("ac", lambda pipe, loras: None, {"c": 1}),
    "and back": ("ac", lambda pipe, loras: pipe.set_adapters("a"), {"a": 1}),
    "a weight": ("a", lambda pipe, loras: pipe.set_adapters("a", 0.5), {"a": 0.5}),
    "a weight above one": ("p", lambda pipe, loras: pipe.set_adapters(["p"], [1.5]), {"p": 1.5}),
    "a weight for each part": ("a", lambda pipe, loras: pipe.set_adapters("a", {"transformer": 0.5}), {"a": 0.5}),
    "beside an ordinary LoRA": ("ao", lambda pipe, loras: pipe.set_adapters(["a", "o"], [0.5, 2.0]), {"a": 0.5, "o": 2}),
    "beside one without a map": ("an", lambda pipe, loras: pipe.set_adapters(["n", "a"]), {"a": 1, "n": 1}),
    "no weight": ("a", lambda pipe, loras: pipe.set_adapters("a", 0.0), {}),
    "no weight beside another": ("ab", lambda pipe, loras: pipe.set_adapters(["a", "b"], [0.0, 1.0]), {"b": 1}),
    "disable": ("ab", lambda pipe, loras: pipe.disable_lora(), {}),
    "disable and enable": ("a", lambda pipe, loras: (pipe.disable_lora(), pipe.enable_lora()), {"a": 1}),
    "disable the transformer's": ("a", lambda pipe, loras: pipe.transformer.disable_lora(), {}),
    "delete an inactive one": ("ab", lambda pipe, loras: pipe.delete_adapters("a"), {"b": 1}),
    "delete one of two": ("ab", lambda pipe, loras: (pipe.set_adapters(["a", "b"]), pipe.delete_adapters(["a"])), {"b": 1}),
    "load again after deleting": (
        "a", lambda pipe, loras: (pipe.delete_adapters("a"), reload(pipe, "a", loras["p"])), {"p": 1}
    ),
    "a deleted name for an ordinary LoRA": (
        "a", lambda pipe, loras: (pipe.delete_adapters("a"), reload(pipe, "a", loras["o"])), {"o": 1}
    ),
    "fuse": ("a", lambda pipe, loras: fuse(pipe, "a"), {"a": 1}),
    "fuse with a weight": ("a", lambda pipe, loras: (pipe.set_adapters("a", 0.5), fuse(pipe, "a")), {"a": 0.5}),
    "fuse with a scale": ("a", lambda pipe, loras: fuse(pipe, "a", lora_scale=0.5), {"a": 0.5}),
    "fuse another than the active one": ("ab", lambda pipe, loras: fuse(pipe, "a"), {"a": 1}),
    "fuse and switch": ("ab", lambda pipe, loras: (fuse(pipe, "a"), pipe.set_adapters("b")), {"a": 1}),
    "fuse and set a weight": ("a", lambda pipe, loras: (fuse(pipe, "a"), pipe.set_adapters("a", 0.2)), {"a": 1}),
    "fuse and disable": ("a", lambda pipe, loras: (fuse(pipe, "a"), pipe.disable_lora()), {}),
    "unfuse and switch": (
        "ab", lambda pipe, loras: (fuse(pipe, "a"), pipe.unfuse_lora(), pipe.set_adapters("b", 0.5)), {"b": 0.5}
    ),
    "fuse and unload": ("ab", lambda pipe, loras: (fuse(pipe, "a"), pipe.unload_lora_weights()), {"a": 1}),
    "fuse, unload, unload": (
        "p", lambda pipe, loras: (fuse(pipe, "p"), pipe.unload_lora_weights(), pipe.unload_lora_weights()), {"p": 1}
    ),
    "fuse, delete, unfuse": (
        "ab", lambda pipe, loras: (fuse(pipe, "a"), pipe.delete_adapters("a"), pipe.unfuse_lora(), pipe.set_adapters("b", 0.0)), {"a": 1}
    ),
    "an ordinary LoRA on a fused one": (
        "a", lambda pipe, loras: (fuse(pipe, "a"), pipe.unload_lora_weights(), reload(pipe, "a", loras["o"])), {"a": 1, "o": 1}
    ),
    "hotswap": ("a", lambda pipe, loras: reload(pipe, "a", loras["b"], hotswap=True), {"b": 1}),
    "hotswap to another mode": ("a", lambda pipe, loras: reload(pipe, "a", loras["p"], hotswap=True), {"p": 1}),
    "hotswap to three panels": ("a", lambda pipe, loras: reload(pipe, "a", loras["c"], hotswap=True), {"c": 1}),
    "hotswap resets the weight": (
        "a", lambda pipe, loras: (pipe.set_adapters("a", 0.5), reload(pipe, "a", loras["b"], hotswap=True)), {"b": 1}
    ),
    "unload": ("ab", lambda pipe, loras: pipe.unload_lora_weights(), {}),
    "unload and load": ("a", lambda pipe, loras: (pipe.unload_lora_weights(), reload(pipe, "a", loras["p"])), {"p": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_painting_is_that_of_what_is_active(base, loras, expected, name):
    names, operate, weights = OPERATIONS[name]
    pipe = load(base, loras, names)
    operate(pipe, loras)
    if pipe.semantic_adapters:
        assert_acts(pipe, expected, weights)
    else:
        assert not differs(paint(pipe, return_diptych=True), expected(weights, False), 1e-4)
        with pytest.raises(ValueError, match="the pipeline has no `semantic_attention`"):
            paint(pipe, **MAP)


@torch.no_grad()
def test_updates_of_two_modules_add_up(base, loras):
    pipe = load(base, loras, "ap")
    pipe.set_adapters(["a", "p"], [0.5, 2.0])
    for scale in (1.0, 0.8):
        with watched(pipe.transformer) as (passed, fed):
            paint(pipe, semantic_scale=scale, **MAP)
        tokens = pipe.encode_semantic(MAP["semantic_image"])
        tokens = tokens.unflatten(1, (2, 1, 3)).expand(-1, -1, 2, -1, -1).flatten(1, 3)
        attend, project = loras["a"].module, loras["p"].module
        expected = passed[0].clone()
        expected[..., :64] = attend(passed[0][..., :64], tokens, semantic_scale=0.5 * scale)
        expected[..., 64:128] = project(passed[0][..., 64:128], tokens, semantic_scale=2.0 * scale)
        torch.testing.assert_close(fed[0], expected, rtol=1e-4, atol=1e-4)
    # Two of one kind change the same channels.
    pipe = load(base, loras, "ab")
    pipe.set_adapters(["a", "b"], [0.5, 2.0])
    with watched(pipe.transformer) as (passed, fed):
        paint(pipe, **MAP)
    x = passed[0][..., :64]
    updates = [loras[name].module(x, tokens, semantic_scale=weight) - x for name, weight in (("a", 0.5), ("b", 2.0))]
    torch.testing.assert_close(fed[0][..., :64], x + sum(updates), rtol=1e-4, atol=1e-4)
    assert torch.equal(fed[0][..., 64:], passed[0][..., 64:])


@pytest.mark.parametrize("names", ["ca", "cn", "pc"])
def test_different_canvases_cannot_act_together(base, loras, names):
    pipe = load(base, loras, names)
    pipe.set_adapters(list(names))
    with pytest.raises(ValueError, match="different canvases.*visible | target | semantic.*`set_adapters`"):
        paint(pipe)
    pipe.set_adapters(list(names), [0.0, 1.0])
    paint(pipe)


def test_a_scale_of_the_call_weighs_lora_and_module(base, loras, expected):
    pipe = load(base, loras, "a")
    for scale in (0.5, 0.0):
        painted = paint(pipe, return_diptych=True, joint_attention_kwargs={"scale": scale}, **MAP)
        assert not differs(painted, expected({"a": scale} if scale else {}, True), 1e-4)
    # PEFT merges with the weight of that moment, so the scale of a call no longer counts.
    fuse(pipe, "a")
    painted = paint(pipe, return_diptych=True, joint_attention_kwargs={"scale": 0.5}, **MAP)
    assert not differs(painted, expected({"a": 1}, True), 1e-4)


def test_settings_belong_to_the_adapter(base, loras, tmp_path):
    weights = safetensors.torch.load_file(folder_of(loras["n"]) / LORA_FILE)
    layers = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    said = {"semantic_mode": "none", "max_sequence_length": 24, "height": 48, "width": 64}
    FluxFillSemanticPipeline.save_lora_weights(tmp_path, layers, **said)
    pipe = load(base, loras, "a", max_sequence_length=16)
    pipe.load_lora_weights(tmp_path, adapter_name="short")
    adapter = pipe.semantic_adapters["short"]
    assert {name: getattr(adapter, name) for name in said} == said
    assert (pipe.config.semantic_mode, pipe.config.max_sequence_length) == ("none", 24)
    pipe.set_adapters(["short", "a"])
    assert pipe.config.max_sequence_length == 512
    pipe.disable_lora()
    assert (pipe.config.semantic_mode, pipe.config.max_sequence_length) == ("cross_attention", 16)
    assert pipe.get_active_adapters() == ["short", "a"] and pipe.get_list_adapters() == {"transformer": ["a", "short"]}


# -- What no LoRA brought ---------------------------------------------------------------------------------------------


def test_the_pipelines_own_module_stays(base, loras, expected):
    own = trained_like(5, model_class=SemanticProjectionModel)
    pipe = make_pipe(base, own=True, semantic_attention=own, max_sequence_length=16)
    before = paint(pipe, **MAP)
    reload(pipe, "a", loras["a"])
    assert pipe.semantic_attention is not own and pipe.components["semantic_attention"] is own
    assert_acts(pipe, expected, {"a": 1})
    reload(pipe, "o", loras["o"])
    assert pipe.semantic_attention is own and differs(paint(pipe, **MAP), before)
    pipe.unload_lora_weights()
    assert pipe.semantic_attention is own and torch.equal(paint(pipe, **MAP), before)
    assert (pipe.config.semantic_mode, pipe.config.max_sequence_length) == ("projection", 16)


def test_the_pipelines_own_module_moves_while_an_adapter_acts(base, loras):
    own = trained_like(5, model_class=SemanticProjectionModel)
    pipe = load(base, loras, "a", semantic_attention=own)
    assert pipe.to(torch.float64) is pipe and pipe.semantic_attention is not own
    assert own.dtype == pipe.semantic_attention.dtype == pipe.transformer.dtype == torch.float64


def test_every_fused_lora_keeps_its_module(base, loras):
    pipe = load(base, loras, "bpa")
    for others in ("bp", "p"):
        pipe.fuse_lora(adapter_names=["a"])
        pipe.delete_adapters(["a"])
        pipe.delete_adapters(list(others))
        for name in "pa":
            reload(pipe, name, loras[name])
    assert sum(adapter.is_permanent for adapter in pipe.semantic_adapters.values()) == 2


def test_pipelines_that_share_a_transformer_share_its_adapters(base, loras, expected):
    pipe = load(base, loras, "ab", semantic_mode="in_context")
    other = FluxFillSemanticPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert_acts(other, expected, {"b": 1})
    other.set_adapters("a")
    for each in (pipe, other):
        assert_acts(each, expected, {"a": 1})
    other.unload_lora_weights()
    for each in (pipe, other):
        assert each.semantic_attention is None and each.config.semantic_mode == "in_context"


@pytest.mark.parametrize(
    "weights, how",
    [
        ({"a": 0.5}, ""),
        ({"a": 0.5, "n": 1}, ""),
        ({"c": 1}, ""),
        ({"a": 0.5}, "fuse"),
        ({"p": 1.5}, "fuse, unload"),
    ],
)
def test_a_saved_pipeline_paints_the_same(base, loras, expected, tmp_path, weights, how):
    pipe = load(base, loras, "".join(weights) + "b")
    pipe.set_adapters(list(weights), list(weights.values()))
    if "fuse" in how:
        pipe.fuse_lora()
    if "unload" in how:
        pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "saved")
    assert_acts(pipe, expected, weights)
    saved = FluxFillSemanticPipeline.from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    assert not saved.semantic_adapters and saved.config.semantic_mode == pipe.config.semantic_mode
    assert_acts(saved, expected, weights, tolerance=1e-3)
    # It is the pipeline's own module from now on.
    before = paint(saved, **MAP)
    reload(saved, "b", loras["b"])
    saved.unload_lora_weights()
    assert torch.equal(paint(saved, **MAP), before)


def test_a_pipeline_whose_adapters_were_deleted_is_saved_as_if_it_never_had_any(base, loras, expected, tmp_path):
    pipe = load(base, loras, "a")
    pipe.delete_adapters("a")
    pipe.save_pretrained(tmp_path)
    saved = FluxFillSemanticPipeline.from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    assert not differs(paint(saved, return_diptych=True), expected({}, False), 1e-4)


def test_two_modules_cannot_be_saved(base, loras, tmp_path):
    pipe = load(base, loras, "ap")
    pipe.set_adapters(["a", "p"])
    with pytest.raises(ValueError, match="A saved pipeline has one module, but 2 act"):
        pipe.save_pretrained(tmp_path / "saved")


# -- Beside other parts of the pipeline -------------------------------------------------------------------------------


def test_maps_show_the_active_adapter(base, loras):
    call = {"points": [(20, 12)], "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "pt"}
    views = {"prompt": "a hill", "image": picture(1), **MAP}

    def maps_of(pipe):
        return pipe.semantic_attention_maps(generator=torch.Generator().manual_seed(0), **views, **call)

    pipe = load(base, loras, "ab")
    pipe.set_adapters("a", 0.5)
    seen, alone = maps_of(pipe), load(base, loras, "a")
    alone.set_adapters("a", 0.5)
    assert (seen.maps == maps_of(alone).maps).all() and torch.equal(seen.images, paint(pipe, **MAP))
    pipe.set_adapters(["a", "b"])
    assert torch.equal(maps_of(pipe).images, paint(pipe, **MAP))
    pipe.disable_lora()
    with pytest.raises(ValueError, match="needs a pipeline with a `SemanticAttentionModel`"):
        maps_of(pipe)


def test_modules_follow_the_transformer(base, loras):
    pipe = load(base, loras, "ab")
    expected = paint(pipe, **MAP)
    pipe.to(torch.bfloat16)
    pipe.set_adapters("a")
    assert paint(pipe, **MAP).dtype == torch.bfloat16
    assert {adapter.module.dtype for adapter in pipe.semantic_adapters.values()} == {torch.bfloat16}
    offloaded = load(base, loras, "a")
    offloaded.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    reload(offloaded, "b", loras["b"])
    assert not differs(paint(offloaded, **MAP), expected, 1e-4)


def test_switching_with_a_cache_and_compiled_blocks(base, loras, expected):
    pipe = load(base, loras, "ap")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-6))
    for name in "ap":
        pipe.set_adapters(name)
        assert_acts(pipe, expected, {name: 1})
    pipe.transformer.disable_cache()
    pipe.enable_lora_hotswap(target_rank=4, check_compiled="ignore")
    pipe.transformer.compile_repeated_blocks(backend="eager")
    pipe.set_adapters("a", 0.5)
    assert_acts(pipe, expected, {"a": 0.5})
