# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The nodes for ComfyUI paint what the pipeline paints, and refuse what they cannot use with a sentence."""

import copy
import json
import shutil

import pytest
import safetensors.torch
import torch
from adapter_helpers import LORA_FILE, folder_of
from comfyui_helpers import COMFYUI, Double, RealComfyUI, Vae, pack, to_comfyui, unpack
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import ROOT
from pipeline_helpers import Trained, differs, make_pipe, paint, picture, seeded, trained_like


SIGMAS = torch.tensor([1.0, 0.7, 0.0])
MODULE_FILE = "semantic_attention/diffusion_pytorch_model.safetensors"
CONFIG_FILE = "semantic_attention/config.json"


@pytest.fixture(scope="module")
def root(base, loras):
    """A folder like models/loras: the shared LoRAs by their names, and two more kinds."""
    root = folder_of(loras["a"]).parent
    rope = Trained(base, root / "rope", seed=5)
    rope.module = trained_like(5, position="rope", num_layers=2)
    rope.module.save_pretrained(root / "rope" / "semantic_attention")
    Trained(base, root / "fused", seed=6, semantic_mode="pixel_fusion")
    return root


@pytest.fixture(scope="module", params=["double", "ComfyUI"])
def comfyui(request, base, root):
    if request.param == "double":
        return Double(base, root)
    if not COMFYUI:
        pytest.skip("COMFYUI does not name a checkout of ComfyUI, so only a double of it is tested")
    pytest.importorskip("einops", reason="ComfyUI's requirements are not installed")
    return RealComfyUI(base, root)


@pytest.fixture(scope="module")
def double(base, root):
    return Double(base, root)


def noise_for(canvas_width: int, batch: int, height: int = 32) -> torch.Tensor:
    return torch.randn(batch, 16, height // 8, canvas_width // 8, generator=seeded(9))


def by_pipeline(base, adapters, noise, visible, semantic=None, **kwargs) -> torch.Tensor:
    """The latents that the pipeline ends with, of the whole canvas."""
    pipe = make_pipe(base, own=True)
    # The sigmas as they are given.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    for name, (lora, _) in adapters.items():
        pipe.load_lora_weights(copy.copy(lora), adapter_name=name)
    if adapters:
        pipe.set_adapters(list(adapters), [weight for _, weight in adapters.values()])
    call = {"latents": pack(noise), "sigmas": SIGMAS[:-1].tolist(), "output_type": "latent", "return_diptych": True}
    tokens = paint(pipe, visible, semantic_image=semantic, guidance_scale=30.0, **call, **kwargs)
    return unpack(tokens, *noise.shape[-2:])


def conditioning(base, prompt: str = "a hill"):
    with torch.no_grad():
        text, pooled, _ = base.encode_prompt(prompt, None, max_sequence_length=16)
    return [[text, {"pooled_output": pooled, "guidance": 30.0}]]


def to_image(pixels):
    return None if pixels is None else pixels.movedim(1, -1)


def prepare(comfyui, base, model, fill, visible, semantic=None, size=(0, 0), scale=1.0, **kwargs):
    node = comfyui.nodes.SemanticFillConditioning()
    given = {"positive": conditioning(base), "negative": conditioning(base), "vae": Vae(base.vae)} | kwargs
    images = {"visible": to_image(visible), "semantic": to_image(semantic)}
    return node.prepare(fill, model, **given, **images, height=size[0], width=size[1], scale=scale)


def by_nodes(comfyui, base, name, noise, visible, semantic=None, strength=1.0, cfg=1.0, **kwargs) -> torch.Tensor:
    model, fill, _ = comfyui.nodes.LoadSemanticFill().load(comfyui.model(), f"{name}/{LORA_FILE}", strength=strength)
    model, positive, negative, latent = prepare(comfyui, base, model, fill, visible, semantic, **kwargs)
    assert latent["samples"].shape == noise.shape
    return comfyui.sample(model, noise, positive, negative, latent, SIGMAS, cfg)


# -- Equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["a", "rope", "p", "c", "fused", "n"])
def test_nodes_paint_what_the_pipeline_paints(comfyui, base, root, posterior_mode, name, batch):
    visible, semantic = picture(1, batch=batch), None if name == "n" else picture(2, batch=batch)
    noise = noise_for(144 if name == "c" else 96, batch)
    expected = by_pipeline(base, {"x": (root / name, 1.0)}, noise, visible, semantic)
    painted = by_nodes(comfyui, base, name, noise, visible, semantic)
    torch.testing.assert_close(painted, expected, rtol=1e-4, atol=1e-4)
    if semantic is not None:
        # Without the map they paint the same as each other, and something else.
        plain = by_nodes(comfyui, base, name, noise, visible)
        assert differs(plain, painted, 1e-2)
        torch.testing.assert_close(
            plain, by_pipeline(base, {"x": (root / name, 1.0)}, noise, visible), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("mode", ["projection", "in_context"])
def test_several_maps_are_named(comfyui, base, root, posterior_mode, mode):
    if not (root / f"two_{mode}").exists():
        Trained(base, root / f"two_{mode}", 7, mode, semantic_maps=["land", "rivers"])
    name, add = f"two_{mode}", comfyui.nodes.SemanticFillMap().add
    noise, scale = noise_for(192 if mode == "in_context" else 96, 1), 1.0 if mode == "in_context" else 0.4
    (one,) = add("rivers", to_image(picture(3)), scale)
    (both,) = add("land", to_image(picture(2)), 1.0, one)
    for maps, shown in ((both, [picture(2), picture(3)]), (one, {"rivers": picture(3)})):
        scales = {"semantic_scale": {"rivers": scale}}
        expected = by_pipeline(base, {"x": (root / name, 1.0)}, noise, picture(1), shown, **scales)
        painted = by_nodes(comfyui, base, name, noise, picture(1), maps=maps)
        torch.testing.assert_close(painted, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="takes the maps land, rivers: connect them to `maps`"):
        by_nodes(comfyui, base, name, noise, picture(1), picture(2))
    with pytest.raises(ValueError, match="takes the maps land, rivers, but `maps` has lakes"):
        by_nodes(comfyui, base, name, noise, picture(1), maps=add("lakes", to_image(picture(2)), 1.0)[0])
    with pytest.raises(ValueError, match="Two maps are called land"):
        add("land", to_image(picture(2)), 1.0, both)


def test_one_map_serves_several_pictures_and_sizes_are_made_equal(comfyui, base, root, posterior_mode, caplog):
    visible, semantic = picture(1, 40, 72, batch=2), picture(2, 24, 36)
    noise = noise_for(128, 2, height=48)
    size = {"height": 48, "width": 64}
    expected = by_pipeline(base, {"x": (root / "p", 1.0)}, noise, visible, semantic, **size)
    painted = by_nodes(comfyui, base, "p", noise, visible, semantic, size=(48, 64))
    torch.testing.assert_close(painted, expected, rtol=1e-4, atol=1e-4)
    for name in ("image", "visible"):
        assert f"`{name}` is 72x40 pixels and is squashed to 64x48" in caplog.text
    for name in ("semantic_image", "semantic"):
        assert f"`{name}` is 36x24 pixels and is squashed to 64x48" in caplog.text
    caplog.clear()
    # A photograph of 3:2 at the nearest multiples of 16.
    prepare(comfyui, base, *load(comfyui, f"p/{LORA_FILE}")[:2], picture(1, 43, 64), size=(64, 96))
    assert "squashed" not in caplog.text


@pytest.mark.parametrize("name", ["a", "p"])
def test_strength_and_scale_weigh_the_module_as_the_pipelines_do(comfyui, base, root, posterior_mode, name):
    noise, views = noise_for(96, 1), (picture(1), picture(2))
    expected = by_pipeline(base, {"x": (root / name, 0.5)}, noise, *views, semantic_scale=1.6)
    painted = by_nodes(comfyui, base, name, noise, *views, strength=0.5, scale=1.6)
    torch.testing.assert_close(painted, expected, rtol=1e-4, atol=1e-4)
    unguided = by_nodes(comfyui, base, name, noise, *views, scale=0.0)
    torch.testing.assert_close(unguided, by_nodes(comfyui, base, name, noise, views[0]), rtol=1e-4, atol=1e-4)


def test_both_prompts_see_the_map(comfyui, base, posterior_mode):
    noise, views = noise_for(96, 2), (picture(1, batch=2), picture(2, batch=2))
    once = by_nodes(comfyui, base, "a", noise, *views)
    # With one prompt on both sides, guidance away from it changes nothing.
    twice = by_nodes(comfyui, base, "a", noise, *views, cfg=3.0)
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-4)


def test_beside_another_lora_and_the_model_stays_as_it_was(comfyui, base, root, posterior_mode):
    noise, views = noise_for(96, 1), (picture(1), picture(2))
    bare = comfyui.model()
    other = safetensors.torch.load_file(root / "o" / LORA_FILE)
    other = {key: weight for key, weight in other.items() if key.startswith("transformer.")}
    with_other, _ = comfyui.load_lora(bare, None, other, 0.7, 0.0)
    trained, fill, _ = comfyui.nodes.LoadSemanticFill().load(with_other, f"a/{LORA_FILE}")
    prepared = prepare(comfyui, base, trained, fill, *views)
    adapters = {"x": (other, 0.7), "y": (root / "a", 1.0)}
    expected = by_pipeline(base, adapters, noise, *views)
    torch.testing.assert_close(
        comfyui.sample(prepared[0], noise, *prepared[1:], SIGMAS), expected, rtol=1e-4, atol=1e-4
    )
    # Another map takes the place of the first.
    again = prepare(comfyui, base, prepared[0], fill, *views)
    torch.testing.assert_close(comfyui.sample(again[0], noise, *again[1:], SIGMAS), expected, rtol=1e-4, atol=1e-4)
    for model, active in ((trained, adapters), (with_other, {"x": adapters["x"]}), (bare, {})):
        unguided = comfyui.sample(model, noise, *prepared[1:], SIGMAS)
        wanted = by_pipeline(base, active, noise, views[0])
        torch.testing.assert_close(unguided, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_in_fp8_is_guided_too(comfyui, base, posterior_mode):
    if comfyui.name == "double":
        pytest.skip("only ComfyUI itself keeps weights in fp8")
    noise, views = noise_for(96, 1), (picture(1), picture(2))
    trained, fill, _ = comfyui.nodes.LoadSemanticFill().load(
        comfyui.model(dtype=torch.float8_e4m3fn), f"p/{LORA_FILE}"
    )
    assert trained.model.diffusion_model.img_in.weight.dtype == torch.float8_e4m3fn
    painted = []
    for semantic in (views[1], None):
        prepared = prepare(comfyui, base, trained, fill, views[0], semantic)
        painted.append(comfyui.sample(prepared[0], noise, *prepared[1:], SIGMAS))
    exact = by_nodes(comfyui, base, "p", noise, *views)
    assert (painted[0] - exact).abs().mean() < 0.5 * (painted[1] - exact).abs().mean()


def test_cut_target(double):
    canvas = torch.arange(6.0).expand(2, 4, 6)[..., None].expand(-1, -1, -1, 3)
    fill = double.nodes.SemanticFill
    for mode, columns in (("projection", [3, 4, 5]), ("in_context", [2, 3])):
        (cut,) = double.nodes.SemanticFillCutTarget().cut(fill(semantic_mode=mode), canvas)
        assert cut.shape == (2, 4, len(columns), 3) and cut[0, 0, :, 0].tolist() == columns


def test_alphas_of_all_kinds(double):
    lora = {f"transformer.{layer}.lora_A.weight": torch.ones(4, 8) for layer in ("x.to_q", "y.to_q", "to_q", "proj")}
    config = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"x.to_q": 2, "^to_q": 3}}
    alphas = double.nodes.add_alphas(lora, config)
    found = {key.removesuffix(".alpha"): alpha.item() for key, alpha in alphas.items() if key.endswith("alpha")}
    assert found == {"transformer.x.to_q": 2, "transformer.y.to_q": 8, "transformer.to_q": 3, "transformer.proj": 8}
    rooted = double.nodes.add_alphas(lora, {"transformer.lora_alpha": 8, "transformer.use_rslora": True})
    assert rooted["transformer.proj.alpha"] == 16


def test_the_tiny_flux_is_written_whole(base):
    weights = to_comfyui(base.transformer)
    assert sum(weight.numel() for weight in weights.values()) == base.transformer.num_parameters()
    assert weights["img_in.weight"].shape[1] == 384 and "guidance_in.in_layer.weight" in weights


# -- Files ------------------------------------------------------------------------------------------------------------


def say(**said):
    """Changes what the LoRA file says of its training."""

    def change(folder):
        file = folder / LORA_FILE
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        metadata["semantic_fill"] = json.dumps(json.loads(metadata["semantic_fill"]) | said)
        safetensors.torch.save_file(safetensors.torch.load_file(file), file, metadata=metadata)

    return change


def configure(**changes):
    """Changes the module's configuration."""
    return lambda folder: write_config(folder, json.dumps(json.loads((folder / CONFIG_FILE).read_text()) | changes))


def write_config(folder, text: str) -> None:
    (folder / CONFIG_FILE).write_text(text)


def forget_training(folder) -> None:
    shutil.rmtree(folder / "semantic_attention")
    safetensors.torch.save_file(safetensors.torch.load_file(folder / LORA_FILE), folder / LORA_FILE)


def replace_module(folder) -> None:
    safetensors.torch.save_file({"layers.0.weight": torch.ones(2)}, folder / MODULE_FILE)


@pytest.fixture
def changed(base, root, tmp_path):
    """Copies a trained folder to models/loras of its own, and changes it."""

    def copy_of(name: str, change):
        change(shutil.copytree(root / name, tmp_path / name))
        return Double(base, tmp_path)

    return copy_of


def load(double, lora: str, **kwargs):
    return double.nodes.LoadSemanticFill().load(double.model(), lora, **kwargs)


def test_loader_offers_loras_and_says_what_they_were_trained_with(changed, tmp_path):
    double = changed("p", say(height=64, width=48, max_sequence_length=24))
    offered = double.nodes.LoadSemanticFill.INPUT_TYPES()["required"]
    assert offered["lora"][0] == [f"p/{LORA_FILE}"] and f"p/{MODULE_FILE}" in offered["module"][0]
    _, fill, length = load(double, f"p/{LORA_FILE}")
    assert (fill.semantic_mode, fill.height, fill.width, length) == ("projection", 64, 48, 24)
    # The two files, without their folder.
    shutil.copy(tmp_path / "p" / LORA_FILE, tmp_path / "lora.safetensors")
    shutil.copy(tmp_path / "p" / MODULE_FILE, tmp_path / "module.safetensors")
    _, again, _ = load(double, "lora.safetensors", module="module.safetensors")
    assert torch.equal(again.module.layers[0]["linear.weight"], fill.module.layers[0]["linear.weight"])


def test_older_weights_of_a_projection(changed):
    double = changed("p", say(semantic_mode="cross_attention"))
    assert load(double, f"p/{LORA_FILE}")[1].semantic_mode == "projection"


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("p", say(semantic_mode="mixing"), "`semantic_mode` 'mixing', but these nodes know"),
        (
            "p",
            say(visible_attention="causal"),
            "was trained with visible_attention='causal', which these nodes do not know",
        ),
        ("p", say(semantic_maps=2), "was trained with semantic_maps=2"),
        ("p", say(fusion_alpha="half"), "was trained with fusion_alpha='half'"),
        ("a", say(semantic_mode="projection"), "needs a module of the kind projection"),
        ("p", lambda folder: shutil.rmtree(folder / "semantic_attention"), "needs its module, but there is no"),
        ("p", forget_training, "was not trained by Semantic Fill. Load it with ComfyUI's own node"),
        ("a", lambda folder: (folder / CONFIG_FILE).unlink(), "needs the `config.json`"),
        ("a", configure(position="aligned"), "position='aligned'"),
        ("a", configure(injection="condition"), "injection='condition'"),
        ("a", replace_module, "is no module for FLUX that these nodes can use"),
        ("a", lambda folder: write_config(folder, "{"), "config.json is damaged"),
        ("a", lambda folder: write_config(folder, "[]"), "has to be a JSON object"),
    ],
)
def test_files_that_cannot_be_used(changed, name, change, named):
    double = changed(name, change)
    with pytest.raises(ValueError, match=named):
        load(double, f"{name}/{LORA_FILE}")


# -- Calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("a", {"model": {"image_model": "flux", "in_channels": 16}}, "`model` has to be a FLUX.1 Fill.* with 16"),
        ("a", {"model": {"image_model": "sd3", "in_channels": 96}}, "`model` has to be a FLUX.1 Fill.*sd3"),
        ("a", {"size": (40, 48)}, "multiples of 16 but are 48 and 40"),
        ("a", {"visible": picture(1, 40, 40)}, "multiples of 16 but are 40 and 40"),
        ("a", {"visible": picture(1, batch=2), "semantic": picture(2, batch=3)}, "holds 2 pictures but `semantic` 3"),
        ("c", {"scale": 0.5}, "`scale` has to be 0 or 1 but is 0.5"),
        ("n", {}, "trained without a map"),
        ("a", {"vae": "of 4 channels"}, "`vae` has to be that of FLUX"),
    ],
)
def test_calls_that_cannot_be_used(double, base, name, change, named):
    call = {"visible": picture(1), "semantic": picture(2)} | change
    if "vae" in change:
        call["vae"] = type("Vae", (), {"encode": lambda self, pixels: torch.zeros(1, 4, 4, 4)})()
    _, fill, _ = load(double, f"{name}/{LORA_FILE}")
    with pytest.raises(ValueError, match=named):
        prepare(double, base, double.model(**call.pop("model", {})), fill, **call)


def test_a_latent_of_another_size_is_refused(double, base):
    model, fill, _ = load(double, f"a/{LORA_FILE}")
    model, positive, negative, latent = prepare(double, base, model, fill, picture(1), picture(2))
    positive = copy.deepcopy(positive)
    positive[0][1] |= {"concat_latent_image": torch.zeros(1, 16, 4, 8), "concat_mask": torch.zeros(1, 1, 32, 64)}
    with pytest.raises(ValueError, match=r"The map is for 1 latents of \(4, 12\), but 1 of \(4, 8\) are sampled"):
        double.sample(model, noise_for(64, 1), positive, negative, latent, SIGMAS)


# -- The example ------------------------------------------------------------------------------------------------------


def test_the_example_workflow_fits_the_nodes(double):
    workflow = json.loads((ROOT / "comfyui" / "example_workflows" / "semantic_fill_api.json").read_text())
    used = set()
    for node in workflow.values():
        node_class = double.nodes.NODE_CLASS_MAPPINGS.get(node["class_type"])
        if node_class is None:
            continue
        used.add(node["class_type"])
        inputs = node_class.INPUT_TYPES()
        kinds = inputs["required"] | inputs.get("optional", {})
        assert inputs["required"].keys() <= node["inputs"].keys() <= kinds.keys()
        for name, value in node["inputs"].items():
            source = workflow[value[0]] if isinstance(value, list) else None
            source_class = source and double.nodes.NODE_CLASS_MAPPINGS.get(source["class_type"])
            if source_class is not None:
                assert source_class.RETURN_TYPES[value[1]] == kinds[name][0]
    # One map needs no name.
    used.add("SemanticFillMap")
    assert used == set(double.nodes.NODE_CLASS_MAPPINGS) == set(double.nodes.NODE_DISPLAY_NAME_MAPPINGS)
    # The canvas of the sampler's schedule is that of the views.
    prepared, schedule = workflow["11"]["inputs"], workflow["12"]["inputs"]
    assert (schedule["width"], schedule["height"]) == (2 * prepared["width"], prepared["height"])
