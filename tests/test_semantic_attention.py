# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The two semantic modules against the reference, and what becomes of the modules that older versions saved."""

import json

import pytest
import reference as ref
import torch
from helpers import projection_layers, reference_layers
from pipeline_helpers import trained_like, write_old_module

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, panel_positions, tile_across_panels
from semantic_attention import (
    SEMANTIC_POSITIONS,
    SemanticAttentionModel,
    SemanticModel,
    SemanticProjectionModel,
    load_semantic_module,
)


SIZES = [(2, 3), (4, 2)]  # token rows and columns of one panel


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, rows * 2 * columns, 64, generator=generator, dtype=dtype)
    tokens = torch.randn(2, rows * columns, 64, generator=generator, dtype=dtype)
    return x_t, tile_across_panels(tokens, rows, columns, 2), panel_positions(rows, columns, 2)


@pytest.mark.parametrize(
    "model, expected",
    [
        (SemanticAttentionModel(), 33088),
        (SemanticAttentionModel(head_dim=8), 4 * 64 * 64 + 2 * 128 + 64),
        (SemanticAttentionModel(num_layers=3), 3 * 33088),
        (SemanticAttentionModel(position="rope"), 33088),
        (SemanticProjectionModel(), 4224),
        (SemanticProjectionModel(num_layers=2), 2 * 4224),
    ],
)
def test_number_of_parameters(model, expected):
    assert model.num_parameters() == expected


def test_the_lines_of_a_run_s_start():
    assert SemanticAttentionModel().describe() == [
        "Using Cross-Attention with 1 layers, 8 heads",
        "Added 33088 semantic cross-attention parameters to optimizer",
    ]
    assert SemanticProjectionModel().describe() == [
        "Using a projection with 1 layers",
        "Added 4224 semantic projection parameters to optimizer",
    ]
    assert SemanticAttentionModel(num_layers=2, num_heads=4, head_dim=8).describe() == [
        "Using Cross-Attention with 2 layers, 4 heads",
        f"Added {2 * (4 * 64 * 32 + 2 * 128 + 64)} semantic cross-attention parameters to optimizer",
    ]


@pytest.mark.parametrize("model_class", [SemanticAttentionModel, SemanticProjectionModel])
def test_scale_starts_at_exactly_zero(model_class):
    model = model_class(num_layers=2)
    assert model.scales() == [0.0, 0.0]
    hidden_states, (_, semantic_tokens, positions) = torch.randn(2, 12, 384), inputs(2, 3)
    assert torch.equal(model.enhance(hidden_states, semantic_tokens, positions), hidden_states)


@pytest.mark.parametrize("model_class", [SemanticAttentionModel, SemanticProjectionModel])
def test_scales_are_mean_absolute_gates(model_class):
    model = model_class(num_layers=2)
    torch.nn.init.constant_(model.layers[1].scale[:32], -0.5)
    assert model.scales() == [0.0, 0.25]


@pytest.mark.parametrize("rows, columns", SIZES)
def test_layout_equals_reference(rows, columns):
    tokens = torch.randn(2, rows * columns, 64)
    expected = ref.lay_under_both_panels(tokens, rows, columns)
    assert torch.equal(tile_across_panels(tokens, rows, columns, 2), expected)
    assert torch.equal(panel_positions(rows, columns, 2), ref.panel_positions(rows, columns).float())


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("semantic_scale", [1.0, -0.7])
def test_output_equals_reference_in_float64(rows, columns, num_layers, semantic_scale):
    model = trained_like(num_layers=num_layers).double()
    x_t, semantic_tokens, _ = inputs(rows, columns, torch.float64)
    enhanced = model(x_t, semantic_tokens, semantic_scale=semantic_scale)
    expected = ref.enhance(x_t, semantic_tokens, reference_layers(model), strength=semantic_scale)
    torch.testing.assert_close(enhanced, expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("head_dim", [8, 16])
def test_rotary_positions_equal_reference(rows, columns, num_layers, head_dim):
    model = trained_like(num_layers=num_layers, head_dim=head_dim, position="rope")
    x_t, semantic_tokens, positions = inputs(rows, columns)
    enhanced = model(x_t, semantic_tokens, positions)
    layers = [{name: w.double() for name, w in layer.items()} for layer in reference_layers(model)]
    expected = ref.enhance(x_t.double(), semantic_tokens.double(), layers, positions=positions.double())
    torch.testing.assert_close(enhanced.double(), expected, rtol=1e-5, atol=1e-5)
    without = ref.enhance(x_t.double(), semantic_tokens.double(), layers)
    assert (without - expected).abs().max() > 1e-3  # so that the comparison would see missing positions


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", [(8, 8), (32, 32)])
def test_rotary_attention_starts_at_the_own_place(rows, columns):
    torch.manual_seed(0)
    model = SemanticAttentionModel(position="rope")
    x_t, semantic_tokens, positions = inputs(rows, columns)
    tokens = list(range(0, 2 * rows * columns, 2 * rows * columns // 16))
    maps = torch.cat(list(model.attention_maps(x_t, semantic_tokens, positions, tokens=tokens)), dim=2)
    own_place = (positions[tokens][:, None] == positions[None]).all(dim=2)
    assert own_place.sum() == 2 * len(tokens)  # the map lies under both panels
    assert (maps * own_place).sum(dim=-1).mean() > 0.8
    contents_only = torch.cat(list(SemanticAttentionModel().attention_maps(x_t, semantic_tokens, tokens=tokens)), 2)
    assert (contents_only * own_place).sum(dim=-1).mean() < 0.1


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_projection_starts_as_the_map_itself(num_layers):
    model = SemanticProjectionModel(num_layers=num_layers).double()
    picture, semantic_tokens, _ = inputs(2, 3, torch.float64)
    for layer in model.layers:
        layer.scale.fill_(0.5)
    torch.testing.assert_close(model(picture, semantic_tokens), picture + num_layers * 0.5 * semantic_tokens)


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", SIZES)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_channels_that_each_model_enhances(rows, columns, num_layers):
    _, semantic_tokens, positions = inputs(rows, columns, torch.float64)
    hidden_states = torch.randn(2, rows * 2 * columns, 384, dtype=torch.float64)
    x_t, x_cond = hidden_states[..., :64], hidden_states[..., 64:]
    attention = trained_like(num_layers=num_layers).double()
    x_t_enhanced = ref.enhance(x_t, semantic_tokens, reference_layers(attention), strength=0.7)
    projection = trained_like(model_class=SemanticProjectionModel, num_layers=num_layers).double()
    x_cond_enhanced = ref.project(x_cond, semantic_tokens, projection_layers(projection), strength=0.7)
    for model, expected in ((attention, (x_t_enhanced, x_cond)), (projection, (x_t, x_cond_enhanced))):
        enhanced = model.enhance(hidden_states, semantic_tokens, positions, semantic_scale=0.7)
        torch.testing.assert_close(enhanced, torch.cat(expected, dim=2), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("model_class", [SemanticAttentionModel, SemanticProjectionModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtypes_of_module_and_input_may_differ(model_class, dtype):
    model = trained_like(model_class=model_class).to(dtype)
    _, semantic_tokens, _ = inputs(2, 3, dtype)
    for of in (torch.float32, torch.bfloat16):
        hidden_states = torch.randn(2, 12, 384, dtype=of)
        enhanced = model.enhance(hidden_states, semantic_tokens)
        start = 64 * (model_class is SemanticProjectionModel)
        before, part, after = enhanced.split((start, 64, 320 - start), dim=2)
        assert enhanced.dtype == of and torch.equal(
            part, model(hidden_states[..., start : start + 64].to(dtype), semantic_tokens).to(of)
        )
        assert torch.equal(
            torch.cat((before, after), 2), torch.cat((hidden_states[..., :start], hidden_states[..., start + 64 :]), 2)
        )


def gradients(model: SemanticModel, rows: int = 2, columns: int = 3) -> set[str]:
    """Names of the parameters with a gradient other than zero."""
    x_t, semantic_tokens, positions = inputs(rows, columns)
    model(x_t, semantic_tokens, positions).square().mean().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


KINDS = [
    {"position": "none"},
    {"position": "rope"},
    {"model_class": SemanticProjectionModel},
]


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_scale_has_a_gradient_at_first(kind):
    kind = dict(kind)
    model = kind.pop("model_class", SemanticAttentionModel)(num_layers=2, **kind)
    assert gradients(model) == {"layers.0.scale", "layers.1.scale"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient_once_the_scale_has_moved(kind):
    model = trained_like(num_layers=2, **kind)
    assert gradients(model) == {name for name, _ in model.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize("position", ["none", "rope"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_attention_maps_equal_the_explicit_softmax(position, layer):
    rows, columns = 2, 3
    model = trained_like(num_layers=2, position=position)
    x_t, semantic_tokens, positions = inputs(rows, columns)
    chunks = list(model.attention_maps(x_t, semantic_tokens, positions, layer=layer, chunk_size=5))
    assert [chunk.shape[2] for chunk in chunks] == [5, 5, 2]
    maps = torch.cat(chunks, dim=2)
    assert maps.shape == (2, 8, 12, 12)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 8, 12))

    layers = reference_layers(model)
    kwargs = {"positions": positions} if position == "rope" else {}
    x = ref.enhance(x_t, semantic_tokens, layers[: layer % 2], **kwargs)
    w = layers[layer]
    q = (ref.layer_norm(x, w["norm_x_weight"], w["norm_x_bias"], 1e-5) @ w["q_weight"].T).unflatten(-1, (8, 16))
    k = ref.layer_norm(semantic_tokens, w["norm_s_weight"], w["norm_s_bias"], 1e-5) @ w["k_weight"].T
    k = k.unflatten(-1, (8, 16))
    if position == "rope":
        q, k = ref.rotate(q, positions), ref.rotate(k, positions)
    expected = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) / 4, dim=-1)
    torch.testing.assert_close(maps, expected)

    some = torch.cat(list(model.attention_maps(x_t, semantic_tokens, positions, layer=layer, tokens=[7, 1])), dim=2)
    torch.testing.assert_close(some, maps[:, :, [7, 1]])


# -- Save and load ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"num_layers": 2, "num_heads": 4, "head_dim": 8, "position": "none"},
        {"num_layers": 2, "num_heads": 4, "head_dim": 8, "position": "rope"},
        {"num_layers": 2, "model_class": SemanticProjectionModel},
    ],
)
def test_save_and_load(tmp_path, config):
    model = trained_like(**config)
    config = {name: value for name, value in config.items() if name != "model_class"}
    model.save_pretrained(tmp_path / "module")
    names = {path.name for path in (tmp_path / "module").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    for loaded in (
        load_semantic_module(tmp_path / "module"),
        load_semantic_module(tmp_path, subfolder="module", dtype=torch.float32),
        type(model).from_pretrained(tmp_path / "module"),
    ):
        assert type(loaded) is type(model)
        assert {name: loaded.config[name] for name in config} == config
        assert model.state_dict().keys() == loaded.state_dict().keys()
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert load_semantic_module(tmp_path, "module", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert type(type(model).from_config(model.config)) is type(model)


LOADERS = [
    load_semantic_module,
    SemanticAttentionModel.from_pretrained,
    SemanticProjectionModel.from_pretrained,
    lambda folder: SemanticAttentionModel.from_config(SemanticAttentionModel.load_config(folder)),
]


@torch.no_grad()
@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("injection", ["noise", None])
@pytest.mark.parametrize("position", SEMANTIC_POSITIONS)
def test_old_attention_on_the_noise_loads_as_it_was(tmp_path, caplog, load, injection, position):
    weights = write_old_module(tmp_path, position=position, injection=injection)
    model = load(tmp_path)
    assert type(model) is SemanticAttentionModel and model.config.position == position
    assert model.state_dict().keys() == weights.keys() and "ignored" not in caplog.text
    model.load_state_dict(weights)
    hidden_states, (_, semantic_tokens, positions) = torch.randn(2, 12, 384), inputs(2, 3)
    expected = ref.enhance(
        hidden_states[..., :64],
        semantic_tokens,
        reference_layers(model),
        positions=positions if position == "rope" else None,
    )
    enhanced = model.enhance(hidden_states, semantic_tokens, positions)
    torch.testing.assert_close(enhanced, torch.cat((expected, hidden_states[..., 64:]), 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("load", LOADERS)
def test_an_old_direct_module_on_the_condition_becomes_a_projection(tmp_path, caplog, load):
    weights = write_old_module(tmp_path / "old", position="direct", injection="condition")
    model = load(tmp_path / "old")
    assert type(model) is SemanticProjectionModel and len(model.layers) == 2 and "ignored" not in caplog.text
    assert model.state_dict().keys() == weights.keys()
    if load is not LOADERS[-1]:
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    model.load_state_dict(weights)
    hidden_states, (_, semantic_tokens, _) = torch.randn(2, 12, 384), inputs(2, 3)
    expected = ref.project(hidden_states[..., 64:], semantic_tokens, projection_layers(model))
    torch.testing.assert_close(
        model.enhance(hidden_states, semantic_tokens), torch.cat((hidden_states[..., :64], expected), 2)
    )
    # Saved again, it names its own class and nothing of the old config.
    model.save_pretrained(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert {k: v for k, v in config.items() if k not in ("_diffusers_version", "_name_or_path")} == {
        "_class_name": "SemanticProjectionModel",
        "in_channels": 64,
        "num_layers": 2,
    }
    assert type(load_semantic_module(tmp_path / "new")) is SemanticProjectionModel


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "changes, named",
    [
        ({"position": "aligned"}, "position='aligned'"),
        ({"position": "aligned", "injection": "condition"}, "position='aligned'"),
        ({"position": "direct"}, "injection='noise'"),
        ({"position": "direct", "injection": None}, "position='direct'"),
        ({"position": "none", "injection": "condition"}, "injection='condition'"),
        ({"position": "rope", "injection": "condition"}, "injection='condition'"),
        ({"position": "rope", "injection": "text"}, "injection='text'"),
        ({"_class_name": "SemanticMixer"}, "'SemanticMixer'"),
    ],
)
def test_what_no_longer_exists_is_refused_by_name(tmp_path, load, changes, named):
    write_old_module(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"(?s){named}.*[Cc]ommit bd5985d can still use"):
        load(tmp_path)


def test_old_modules_in_a_saved_pipeline_folder(base, tmp_path):
    pipe = FluxFillSemanticPipeline(**base.components, semantic_attention=SemanticAttentionModel())
    pipe.save_pretrained(tmp_path)
    weights = write_old_module(tmp_path / "semantic_attention", position="direct", injection="condition")
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["semantic_attention"] == ["semantic_attention", "SemanticAttentionModel"]
    loaded = FluxFillSemanticPipeline.from_pretrained(tmp_path)
    assert type(loaded.semantic_attention) is SemanticProjectionModel
    assert loaded.config.semantic_mode == "projection"
    assert all(torch.equal(weights[name], v) for name, v in loaded.semantic_attention.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["semantic_attention"] == ["semantic_attention", "SemanticProjectionModel"]
    assert (
        type(FluxFillSemanticPipeline.from_pretrained(tmp_path / "again").semantic_attention)
        is SemanticProjectionModel
    )
    write_old_module(tmp_path / "semantic_attention", position="aligned")
    with pytest.raises(ValueError, match="position='aligned'.*bd5985d"):
        FluxFillSemanticPipeline.from_pretrained(tmp_path)


# -- Wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, named, came",
    [
        ({"num_layers": 0}, "num_layers", "0"),
        ({"num_heads": -1}, "num_heads", "-1"),
        ({"head_dim": 0}, "head_dim", "0"),
        ({"in_channels": 0}, "in_channels", "0"),
        ({"head_dim": 1.5}, "head_dim", "1.5"),
        ({"num_layers": 10**9}, "num_layers", "1000000000"),
        ({"position": "direct"}, "position", "direct"),
        ({"position": "rope", "head_dim": 6}, "head_dim", "6"),
    ],
)
def test_wrong_configurations(config, named, came):
    with pytest.raises(ValueError, match=f"`{named}` has to be .*{came}"):
        SemanticAttentionModel(**config)
    if named in ("in_channels", "num_layers"):
        with pytest.raises(ValueError, match=f"`{named}` has to be .*{came}"):
            SemanticProjectionModel(**config)


@pytest.mark.parametrize(
    "changes, named, came",
    [
        ({"hidden_states": torch.zeros(2, 12, 63)}, "hidden_states", "63"),
        ({"hidden_states": torch.zeros(12, 64)}, "hidden_states", "12, 64"),
        ({"semantic_tokens": torch.zeros(2, 12, 16)}, "semantic_tokens", "16"),
        ({"semantic_tokens": torch.zeros(3, 12, 64)}, "semantic_tokens", "3"),
        ({"positions": None}, "positions", "None"),
        ({"positions": torch.zeros(12, 3)}, "positions", "12, 3"),
        ({"semantic_tokens": torch.zeros(2, 6, 64)}, "positions", "6 semantic tokens"),
    ],
)
def test_wrong_inputs(changes, named, came):
    x_t, semantic_tokens, positions = inputs(2, 3)
    kwargs = {"hidden_states": x_t, "semantic_tokens": semantic_tokens, "positions": positions} | changes
    model = SemanticAttentionModel(position="rope")
    for call in (model, lambda **kwargs: list(model.attention_maps(**kwargs))):
        with pytest.raises(ValueError, match=f"`{named}` has to .*{came}"):
            call(**kwargs)


@pytest.mark.parametrize(
    "changes, named, came",
    [
        ({"hidden_states": torch.zeros(2, 12, 63)}, "hidden_states", "63"),
        ({"semantic_tokens": torch.zeros(3, 12, 64)}, "semantic_tokens", "3"),
        ({"semantic_tokens": torch.zeros(2, 6, 64)}, "semantic_tokens", "6"),
        # torch would broadcast a single token to all places.
        ({"semantic_tokens": torch.zeros(2, 1, 64)}, "semantic_tokens", "1"),
    ],
)
def test_wrong_inputs_of_a_projection(changes, named, came):
    x_t, semantic_tokens, _ = inputs(2, 3)
    with pytest.raises(ValueError, match=f"`{named}` has to .*{came}"):
        SemanticProjectionModel()(**{"hidden_states": x_t, "semantic_tokens": semantic_tokens} | changes)


@pytest.mark.parametrize("wrong", [{"layer": 1}, {"layer": -2}, {"tokens": [12]}])
def test_attention_maps_of_what_does_not_exist(wrong):
    x_t, semantic_tokens, _ = inputs(2, 3)
    with pytest.raises(IndexError, match="out of"):
        list(SemanticAttentionModel().attention_maps(x_t, semantic_tokens, **wrong))
