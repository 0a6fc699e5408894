# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Trained LoRAs as adapters among others: their modules come, act, weigh and go with them."""

import copy
import inspect
import shutil

import pytest
import safetensors.torch
import torch
from diffusers import FirstBlockCacheConfig, FluxFillPipeline
from peft import LoraConfig, get_peft_model_state_dict
from pipeline_helpers import Trained, differs, diptych_of, fill, make_pipe, paint, picture, trained_like, watched

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_attention import SemanticProjectionModel, read_header


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


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory):
    """`a` and `b` attend, `p` projects, `c` has the map on its canvas, `n` uses none, and `o` is an ordinary LoRA."""
    folder = tmp_path_factory.mktemp("loras")
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


@pytest.fixture(scope="module")
def expected(base, loras):
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


# -- What the adapters' methods do to the modules ---------------------------------------------------------------------


def fuse(pipe, *names, **kwargs):
    pipe.fuse_lora(components=["transformer", "text_encoder"], adapter_names=list(names), **kwargs)


def reload(pipe, name, loras, **kwargs):
    pipe.load_lora_weights(folder_of(loras), adapter_name=name, **kwargs)


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
    [({"a": 0.5}, ""), ({"a": 0.5, "n": 1}, ""), ({"c": 1}, ""), ({"a": 0.5}, "fuse"), ({"p": 1.5}, "fuse, unload")],
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


# -- Any LoRA ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="at least one of"):
        FluxFillSemanticPipeline.save_lora_weights(tmp_path)


def test_no_pickle_is_written_or_read(base, loras, tmp_path):
    layers = safetensors.torch.load_file(folder_of(loras["n"]) / LORA_FILE)
    layers = {name.removeprefix("transformer."): weight for name, weight in layers.items()}
    FluxFillSemanticPipeline.save_lora_weights(tmp_path / "safe", layers, safe_serialization=False)
    file = tmp_path / "safe" / "pytorch_lora_weights.bin"
    assert safetensors.torch.load_file(file).keys() == {f"transformer.{name}" for name in layers}
    pipe = make_pipe(base, own=True)
    for stock_or_ours in (pipe, make_pipe(base, FluxFillPipeline, own=True)):
        stock_or_ours.load_lora_weights(file)
    FluxFillPipeline.save_lora_weights(tmp_path, layers, safe_serialization=False)
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
