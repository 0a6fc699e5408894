# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The LoRA converter: what a converted LoRA adds to every weight is what the original adds."""

import json
import re
import sys
from pathlib import Path

import convert_lora
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import _collate_lora_metadata
from helpers import LORA_FILE, run, weights_of
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, read_trained_settings


WIDTH = 3072  # Diffusers' reader only knows the width of the real FLUX.
ATTENTION = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
ADDED = [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
SHAPES = {name: (WIDTH, WIDTH) for name in ATTENTION + ADDED} | {
    "ff.net.0.proj": (4 * WIDTH, WIDTH),
    "ff.net.2": (WIDTH, 4 * WIDTH),
    "ff_context.net.0.proj": (4 * WIDTH, WIDTH),
    "ff_context.net.2": (WIDTH, 4 * WIDTH),
    "proj_mlp": (4 * WIDTH, WIDTH),
    "proj_out": (WIDTH, 5 * WIDTH),
}
MODULES = [f"transformer_blocks.{block}.{name}" for block in (0, 18) for name in ATTENTION + ADDED + FEED_FORWARD]
MODULES += [
    f"single_transformer_blocks.{block}.{name}"
    for block in (0, 37)
    for name in [*ATTENTION[:3], "proj_mlp", "proj_out"]
]
MODULES.append("proj_out")


def make_lora(modules: list[str], ranks: dict[str, int] | int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state_dict = {}
    for module in modules:
        rank = ranks if isinstance(ranks, int) else ranks[module]
        shapes = (shape for name, shape in SHAPES.items() if module.endswith(f".{name}"))
        rows, columns = (64, WIDTH) if module == "proj_out" else next(shapes)
        state_dict[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        state_dict[f"transformer.{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return state_dict


def delta(state_dict: dict[str, torch.Tensor], module: str, scale: float = 1.0) -> torch.Tensor:
    """The sum that the LoRA adds to a module's outputs for three fixed inputs."""
    down = state_dict[f"transformer.{module}.lora_A.weight"]
    inputs = torch.randn(down.shape[1], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return scale * (state_dict[f"transformer.{module}.lora_B.weight"].double() @ (down.double() @ inputs))


def test_round_trip_gives_the_same_tensors():
    lora = make_lora(MODULES)
    back = convert_lora.to_diffusers(convert_lora.to_kohya(lora))
    assert back.keys() == lora.keys()
    assert all(torch.equal(back[key], lora[key]) for key in lora)


def test_names_and_shapes_are_those_of_the_original_code():
    kohya = convert_lora.to_kohya(make_lora(MODULES))
    assert kohya["lora_unet_double_blocks_18_img_attn_qkv.lora_down.weight"].shape == (6, WIDTH)
    assert kohya["lora_unet_double_blocks_18_img_attn_qkv.lora_up.weight"].shape == (3 * WIDTH, 6)
    assert kohya["lora_unet_single_blocks_37_linear1.lora_up.weight"].shape == (7 * WIDTH, 8)
    assert kohya["lora_unet_single_blocks_37_linear1.alpha"] == 8
    assert kohya["lora_unet_single_blocks_0_linear2.lora_down.weight"].shape == (2, 5 * WIDTH)


# The linear layers of the blocks and the last one in BFL's checkpoint of FLUX.1-Fill-dev, with their shapes. ComfyUI looks
# for "lora_unet_", the name with "_" for "." and without ".weight", then ".lora_up.weight", ".lora_down.weight", ".alpha".
CHECKPOINT = {
    "double_blocks.0.img_attn.proj.weight": (3072, 3072),
    "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
    "double_blocks.0.img_mlp.0.weight": (12288, 3072),
    "double_blocks.0.img_mlp.2.weight": (3072, 12288),
    "double_blocks.0.img_mod.lin.weight": (18432, 3072),
    "double_blocks.0.txt_attn.proj.weight": (3072, 3072),
    "double_blocks.0.txt_attn.qkv.weight": (9216, 3072),
    "double_blocks.0.txt_mlp.0.weight": (12288, 3072),
    "double_blocks.0.txt_mlp.2.weight": (3072, 12288),
    "double_blocks.0.txt_mod.lin.weight": (18432, 3072),
    "single_blocks.37.linear1.weight": (21504, 3072),
    "single_blocks.37.linear2.weight": (3072, 15360),
    "single_blocks.37.modulation.lin.weight": (9216, 3072),
    "final_layer.linear.weight": (64, 3072),
}
COMFYUI = {
    "lora_unet_double_blocks_0_img_attn_proj": "double_blocks.0.img_attn.proj.weight",
    "lora_unet_double_blocks_0_img_attn_qkv": "double_blocks.0.img_attn.qkv.weight",
    "lora_unet_double_blocks_0_img_mlp_0": "double_blocks.0.img_mlp.0.weight",
    "lora_unet_double_blocks_0_img_mlp_2": "double_blocks.0.img_mlp.2.weight",
    "lora_unet_double_blocks_0_img_mod_lin": "double_blocks.0.img_mod.lin.weight",
    "lora_unet_double_blocks_0_txt_attn_proj": "double_blocks.0.txt_attn.proj.weight",
    "lora_unet_double_blocks_0_txt_attn_qkv": "double_blocks.0.txt_attn.qkv.weight",
    "lora_unet_double_blocks_0_txt_mlp_0": "double_blocks.0.txt_mlp.0.weight",
    "lora_unet_double_blocks_0_txt_mlp_2": "double_blocks.0.txt_mlp.2.weight",
    "lora_unet_double_blocks_0_txt_mod_lin": "double_blocks.0.txt_mod.lin.weight",
    "lora_unet_single_blocks_37_linear1": "single_blocks.37.linear1.weight",
    "lora_unet_single_blocks_37_linear2": "single_blocks.37.linear2.weight",
    "lora_unet_single_blocks_37_modulation_lin": "single_blocks.37.modulation.lin.weight",
    "lora_unet_final_layer_linear": "final_layer.linear.weight",
}


def test_keys_are_those_that_comfyui_looks_for():
    modulations = {
        "transformer_blocks.0.norm1.linear": 6 * WIDTH,
        "transformer_blocks.0.norm1_context.linear": 6 * WIDTH,
        "single_transformer_blocks.37.norm.linear": 3 * WIDTH,
    }
    lora = make_lora(
        [module for module in MODULES if re.search(r"^transformer_blocks\.0\.|_blocks\.37\.|^proj_out", module)]
    )
    for module, rows in modulations.items():
        lora[f"transformer.{module}.lora_A.weight"] = torch.ones(2, WIDTH)
        lora[f"transformer.{module}.lora_B.weight"] = torch.ones(rows, 2)
    kohya = convert_lora.to_kohya(lora)
    parts = ("lora_up.weight", "lora_down.weight", "alpha")
    assert kohya.keys() == {f"{layer}.{part}" for layer in COMFYUI for part in parts}
    for layer, weight in COMFYUI.items():
        up, down, alpha = (kohya[f"{layer}.{part}"] for part in parts)
        # What ComfyUI adds to the weight is alpha / down.shape[0] * up @ down.
        assert (up.shape[0], down.shape[1]) == CHECKPOINT[weight] and up.shape[1] == down.shape[0]
        assert alpha.shape == () and alpha == down.shape[0]
    assert convert_lora.to_diffusers(kohya).keys() == lora.keys()


def test_fused_layer_adds_what_its_parts_add():
    lora = make_lora(MODULES)
    kohya = convert_lora.to_kohya(lora)
    inputs = torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for layer, block, parts in (
        ("double_blocks_0_img_attn_qkv", "transformer_blocks.0", ATTENTION[:3]),
        ("double_blocks_0_txt_attn_qkv", "transformer_blocks.0", ADDED[:3]),
        ("single_blocks_0_linear1", "single_transformer_blocks.0", [*ATTENTION[:3], "proj_mlp"]),
    ):
        down, up, alpha = (
            kohya[f"lora_unet_{layer}.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        fused = alpha.item() / down.shape[0] * (up.double() @ (down.double() @ inputs))
        torch.testing.assert_close(fused, torch.cat([delta(lora, f"{block}.{part}") for part in parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_is_kept(dtype):
    lora = {key: weight.to(dtype) for key, weight in make_lora(MODULES).items()}
    back = convert_lora.to_diffusers(convert_lora.to_kohya(lora, {"transformer.lora_alpha": 8, "transformer.r": 2}))
    for module in MODULES:  # A scale of 4 is exact in every floating-point format.
        assert torch.equal(delta(back, module), delta(lora, module, scale=4))


def test_ranks_and_alphas_may_differ_and_parts_may_lack():
    modules = [module for module in MODULES if not module.endswith(("to_v", "add_k_proj"))]
    ranks = {module: 1 + index % 3 for index, module in enumerate(modules)}
    lora = make_lora(modules, ranks)
    metadata = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"to_q": 16, "proj_mlp": 1}}
    back = convert_lora.to_diffusers(convert_lora.to_kohya(lora, metadata))
    for module in modules:
        alpha = 16 if module.endswith("to_q") else 1 if module.endswith("proj_mlp") else 2
        torch.testing.assert_close(
            delta(back, module), delta(lora, module, alpha / ranks[module]), rtol=1e-5, atol=1e-3
        )
    for module in set(MODULES) - set(modules):
        assert delta(back, module).abs().max() == 0


@pytest.mark.parametrize(
    "key, message",
    [
        ("transformer.x_embedder.lora_A.weight", "x_embedder"),
        ("transformer.norm_out.linear.lora_A.weight", "'norm_out.linear'"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector", "lora_magnitude_vector"),
        ("text_encoder.layers.0.lora_A.weight", "text_encoder"),
    ],
)
def test_what_cannot_be_expressed_is_refused(key, message):
    pair = {key: torch.ones(2, 2), key.replace("lora_A", "lora_B"): torch.ones(2, 2)}
    with pytest.raises(ValueError, match=message):
        convert_lora.to_kohya(make_lora(MODULES[:1]) | pair)


def test_half_a_pair_is_refused():
    lora = make_lora(MODULES[:1])
    lora.popitem()
    with pytest.raises(ValueError, match="to_q"):
        convert_lora.to_kohya(lora)


# The place that ComfyUI gives a module of diffusers: the layer of the block, and its first row in widths of the model.
PLACES = {
    "transformer_blocks": {
        "attn.to_q": ("img_attn_qkv", 0),
        "attn.to_k": ("img_attn_qkv", 1),
        "attn.to_v": ("img_attn_qkv", 2),
        "attn.add_q_proj": ("txt_attn_qkv", 0),
        "attn.add_k_proj": ("txt_attn_qkv", 1),
        "attn.add_v_proj": ("txt_attn_qkv", 2),
        "attn.to_out.0": ("img_attn_proj", 0),
        "attn.to_add_out": ("txt_attn_proj", 0),
        "ff.net.0.proj": ("img_mlp_0", 0),
        "ff.net.2": ("img_mlp_2", 0),
        "ff_context.net.0.proj": ("txt_mlp_0", 0),
        "ff_context.net.2": ("txt_mlp_2", 0),
    },
    "single_transformer_blocks": {
        "attn.to_q": ("linear1", 0),
        "attn.to_k": ("linear1", 1),
        "attn.to_v": ("linear1", 2),
        "proj_mlp": ("linear1", 3),
        "proj_out": ("linear2", 0),
    },
}


def test_what_the_trainer_writes_is_converted(base, base_folder, triptych_folder, tmp_path):
    options = ["--max_train_steps", 1, "--learning_rate", "1e-2", "--lora_alpha", 12]
    out = run(base_folder, tmp_path / "out", *options, data=triptych_folder)
    convert_lora.convert_file(out / LORA_FILE, tmp_path / "kohya.safetensors")
    lora, kohya = weights_of(out), load_file(tmp_path / "kohya.safetensors")
    config = base.transformer.config
    width, seen = config.num_attention_heads * config.attention_head_dim, set()
    for key in [key for key in lora if ".lora_A." in key]:
        added = 12 / 4 * lora[key.replace("lora_A", "lora_B")] @ lora[key]
        assert added.abs().max() > 0
        kind, number, part = re.fullmatch(r"transformer\.(\w+)\.(?:(\d+)\.)?(?:(.+)\.)?lora_A\.weight", key).groups()
        layer, first = ("final_layer_linear", 0) if kind == "proj_out" else PLACES[kind][part]
        if number is not None:
            layer = f"{'single' if kind.startswith('single') else 'double'}_blocks_{number}_{layer}"
        seen.add(f"lora_unet_{layer}")
        down, up, alpha = (
            kohya[f"lora_unet_{layer}.{name}"] for name in ("lora_down.weight", "lora_up.weight", "alpha")
        )
        rows = slice(first * width, first * width + len(added))
        torch.testing.assert_close((alpha / down.shape[0] * up @ down)[rows], added)
    assert {key.split(".")[0] for key in kohya} == seen and len(seen) > 10


def saved_lora(folder: Path) -> Path:
    """A LoRA as diffusers saves it, rank 2 and alpha 6, on a transformer of one double block."""
    transformer = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(16, 56, 56),
    )
    transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_k", "to_out.0", "ff.net.2"])
    )
    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        **_collate_lora_metadata({"transformer": transformer}),
    )
    return folder / "pytorch_lora_weights.safetensors"


def test_command_line_there_and_back(tmp_path, monkeypatch):
    source, kohya, back = saved_lora(tmp_path), tmp_path / "kohya.safetensors", tmp_path / "back.safetensors"
    for arguments in ((source, kohya), (kohya, back)):
        monkeypatch.setattr(sys, "argv", ["convert_lora.py", *map(str, arguments)])
        convert_lora.main()
    assert load_file(kohya)["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == 18  # rank 2 x 3 parts, scale 3
    with safe_open(source, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 6
    original, returned = load_file(source), FluxPipeline.lora_state_dict(back)
    modules = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in original}
    assert len(modules) == 4
    for module in modules:
        torch.testing.assert_close(delta(returned, module), delta(original, module, scale=3), rtol=1e-6, atol=1e-6)
    # What diffusers reads out of the kohya file is the same LoRA again.
    for key, weight in FluxPipeline.lora_state_dict(kohya).items():
        assert torch.equal(weight, returned[key])


def test_command_line_refuses(tmp_path, monkeypatch, capsys):
    save_file({"transformer.x_embedder.lora_A.weight": torch.ones(1, 1)}, tmp_path / "a.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors here")
    for source, target, message in (
        ("none.safetensors", "b", "none.safetensors"),
        ("a.safetensors", "a.safetensors", "another file"),
        ("a.safetensors", "b", "x_embedder"),
        ("broken.safetensors", "b", "broken.safetensors"),
    ):
        monkeypatch.setattr(sys, "argv", ["convert_lora.py", str(tmp_path / source), str(tmp_path / target)])
        with pytest.raises(SystemExit, match="2"):
            convert_lora.main()
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_mode_and_prompt_length_are_kept_there_and_back(tmp_path, capsys):
    said = {"semantic_mode": "none", "fusion_alpha": 0.5, "max_sequence_length": 24, "height": 48, "width": 64}
    layers = {
        key.removeprefix("transformer."): weight
        for key, weight in make_lora(["transformer_blocks.0.attn.to_q"]).items()
    }
    FluxFillSemanticPipeline.save_lora_weights(tmp_path, layers, **said)
    for source, target in ((LORA_FILE, "kohya.safetensors"), ("kohya.safetensors", "back.safetensors")):
        convert_lora.convert_file(tmp_path / source, tmp_path / target)
        assert read_trained_settings(tmp_path / target) == said
    assert capsys.readouterr().err == ""
    # Another's LoRA says nothing before and nothing afterwards.
    save_file(make_lora(["transformer_blocks.0.attn.to_q"]), tmp_path / "other.safetensors")
    convert_lora.convert_file(tmp_path / "other.safetensors", tmp_path / "kohya.safetensors")
    assert read_trained_settings(tmp_path / "kohya.safetensors") == {}


def test_the_last_layer_can_be_left_out_for_sd_scripts(tmp_path, monkeypatch, capsys):
    save_file(make_lora(["transformer_blocks.0.attn.to_q", "proj_out"]), tmp_path / "lora.safetensors")
    for more, has_last_layer in (([], True), (["--skip_final_layer"], False)):
        command = [
            "convert_lora.py",
            *map(str, (tmp_path / "lora.safetensors", tmp_path / "kohya.safetensors")),
            *more,
        ]
        monkeypatch.setattr(sys, "argv", command)
        convert_lora.main()
        layers = {key.split(".")[0] for key in load_file(tmp_path / "kohya.safetensors")}
        assert layers == {"lora_unet_double_blocks_0_img_attn_qkv"} | (
            {"lora_unet_final_layer_linear"} if has_last_layer else set()
        )
        warned = "sd-scripts has no place for lora_unet_final_layer_linear" in capsys.readouterr().err
        assert warned == has_last_layer


def test_a_base_of_another_width_is_refused_on_the_way_back():
    lora = {
        "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": torch.ones(2, 32),
        "transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight": torch.ones(128, 2),
    }
    with pytest.raises(ValueError, match="layers have the sizes of FLUX.1, which is 3072 wide"):
        convert_lora.to_diffusers(convert_lora.to_kohya(lora))
