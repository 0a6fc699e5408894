# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
import pytest
import reference as ref
import torch
from conftest import reference_layers

from pipeline_flux_fill_semantic import lay_under_panels, panel_positions
from semantic_attention import SEMANTIC_POSITIONS, SemanticAttentionModel


SIZES = [(2, 3), (4, 2)]  # token rows and columns of one panel


def trained_like(seed: int = 0, **config) -> SemanticAttentionModel:
    """A module whose every parameter is away from where it starts."""
    torch.manual_seed(seed)
    model = SemanticAttentionModel(**config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, rows * 2 * columns, 64, generator=generator, dtype=dtype)
    tokens = torch.randn(2, rows * columns, 64, generator=generator, dtype=dtype)
    return x_t, lay_under_panels(tokens, rows, columns, 2), panel_positions(rows, columns, 2)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, 33088),
        ({"head_dim": 8}, 4 * 64 * 64 + 2 * 128 + 64),
        ({"num_layers": 3}, 3 * 33088),
        ({"position": "rope"}, 33088),
        ({"position": "aligned"}, 2 * 64 * 128 + 128 + 64),
        ({"position": "direct"}, 64 * 64 + 64 + 64),
    ],
)
def test_number_of_parameters(config, expected):
    assert SemanticAttentionModel(**config).num_parameters() == expected


def test_scale_starts_at_exactly_zero():
    model = SemanticAttentionModel(num_layers=2)
    assert model.scales() == [0.0, 0.0]
    x_t, semantic_tokens, _ = inputs(2, 3)
    assert torch.equal(model(x_t, semantic_tokens), x_t)


def test_scales_are_mean_absolute_gates():
    model = SemanticAttentionModel(num_layers=2)
    torch.nn.init.constant_(model.layers[1].scale[:32], -0.5)
    assert model.scales() == [0.0, 0.25]


@pytest.mark.parametrize("rows, columns", SIZES)
def test_layout_equals_reference(rows, columns):
    tokens = torch.randn(2, rows * columns, 64)
    expected = ref.lay_under_both_panels(tokens, rows, columns)
    assert torch.equal(lay_under_panels(tokens, rows, columns, 2), expected)
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
def test_direct_layers_add_the_latents_of_the_own_place(num_layers):
    model = SemanticAttentionModel(num_layers=num_layers, position="direct").double()
    x_t, semantic_tokens, _ = inputs(2, 3, torch.float64)
    assert torch.equal(model(x_t, semantic_tokens), x_t)
    for layer in model.layers:
        layer.scale.fill_(0.5)
    # The map itself, before anything is learnt but the gate.
    torch.testing.assert_close(model(x_t, semantic_tokens), x_t + num_layers * 0.5 * semantic_tokens)

    model = trained_like(num_layers=num_layers, position="direct").double()
    expected = x_t
    for layer in model.layers:
        weights = dict(layer.named_parameters())
        update = torch.einsum("btc,dc->btd", semantic_tokens, weights["linear.weight"]) + weights["linear.bias"]
        expected = expected + 0.7 * weights["scale"] * update
    torch.testing.assert_close(model(x_t, semantic_tokens, semantic_scale=0.7), expected, rtol=1e-12, atol=1e-12)
    (maps,) = model.attention_maps(x_t, semantic_tokens)
    assert torch.equal(maps, torch.eye(12).expand(2, 1, -1, -1))
    with pytest.raises(ValueError, match='With `position="direct"`, `semantic_tokens` has to hold one token for each'):
        model(x_t, semantic_tokens[:, :6])


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [1, 2])
def test_aligned_attention_equals_reference(num_layers):
    model = trained_like(num_layers=num_layers, position="aligned").double()
    x_t, semantic_tokens, _ = inputs(2, 3, torch.float64)
    expected = x_t
    for layer in model.layers:
        norm = layer.norm_semantic
        normed = ref.layer_norm(semantic_tokens, norm.weight, norm.bias, norm.eps)
        expected = expected + 0.5 * layer.scale * (normed @ layer.to_v.weight.T @ layer.to_out.weight.T)
    torch.testing.assert_close(model(x_t, semantic_tokens, semantic_scale=0.5), expected, rtol=1e-12, atol=1e-12)
    maps = torch.cat(list(model.attention_maps(x_t, semantic_tokens, tokens=[5, 2], chunk_size=1)), dim=2)
    assert torch.equal(maps, torch.eye(12)[[5, 2]].expand(2, 8, 2, 12))


@torch.no_grad()
@pytest.mark.parametrize("injection, enhanced_channels", [("noise", slice(0, 64)), ("condition", slice(64, 128))])
def test_injection_enhances_its_channels_alone(injection, enhanced_channels):
    model = trained_like(injection=injection)
    _, semantic_tokens, _ = inputs(2, 3)
    hidden_states = torch.randn(2, 12, 384)
    enhanced = model.enhance(hidden_states, semantic_tokens, semantic_scale=0.5)
    expected = hidden_states.clone()
    expected[..., enhanced_channels] = ref.enhance(
        hidden_states[..., enhanced_channels], semantic_tokens, reference_layers(model), strength=0.5
    )
    torch.testing.assert_close(enhanced, expected)
    assert model.enhance(hidden_states.bfloat16(), semantic_tokens).dtype == torch.bfloat16


@torch.no_grad()
def test_output_keeps_the_dtype_of_the_latents():
    model = trained_like().to(torch.bfloat16)
    x_t, semantic_tokens, _ = inputs(2, 3, torch.bfloat16)
    assert model(x_t, semantic_tokens).dtype == torch.bfloat16


def gradients(model: SemanticAttentionModel, rows: int = 2, columns: int = 3) -> set[str]:
    """Names of the parameters with a gradient other than zero."""
    x_t, semantic_tokens, positions = inputs(rows, columns)
    model(x_t, semantic_tokens, positions).square().mean().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


@pytest.mark.parametrize("position", SEMANTIC_POSITIONS)
def test_only_the_scale_has_a_gradient_at_first(position):
    assert gradients(SemanticAttentionModel(num_layers=2, position=position)) == {"layers.0.scale", "layers.1.scale"}


@pytest.mark.parametrize("position", SEMANTIC_POSITIONS)
def test_every_parameter_has_a_gradient_once_the_scale_has_moved(position):
    model = trained_like(num_layers=2, position=position)
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


@pytest.mark.parametrize(
    "position, injection",
    [("none", "noise"), ("rope", "condition"), ("aligned", "condition"), ("direct", "condition")],
)
def test_save_and_load(tmp_path, position, injection):
    config = {"num_layers": 2, "num_heads": 4, "head_dim": 8, "position": position, "injection": injection}
    model = trained_like(**config)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = SemanticAttentionModel.from_pretrained(tmp_path)
    assert {name: loaded.config[name] for name in config} == config
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "config, named, came",
    [
        ({"num_layers": 0}, "num_layers", "0"),
        ({"num_heads": -1}, "num_heads", "-1"),
        ({"head_dim": 0}, "head_dim", "0"),
        ({"in_channels": 0}, "in_channels", "0"),
        ({"head_dim": 1.5}, "head_dim", "1.5"),
        ({"position": "learnt"}, "position", "learnt"),
        ({"injection": "text"}, "injection", "text"),
        ({"position": "rope", "head_dim": 6}, "head_dim", "6"),
    ],
)
def test_wrong_configurations(config, named, came):
    with pytest.raises(ValueError, match=f"`{named}` has to be .*{came}"):
        SemanticAttentionModel(**config)


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
    "wrong, came", [({"layer": 1}, "1"), ({"layer": -2}, "-2"), ({"chunk_size": 0}, "0"), ({"tokens": [12]}, "12")]
)
def test_wrong_attention_maps(wrong, came):
    x_t, semantic_tokens, _ = inputs(2, 3)
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` has to .*{came}"):
        list(SemanticAttentionModel().attention_maps(x_t, semantic_tokens, **wrong))
