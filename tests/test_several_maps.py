# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Several semantic maps in one module: each has its own weights and gate, and one map alone is as it always was."""

import json

import pytest
import reference as ref
import torch
from pipeline_helpers import Trained, differs, make_pipe, paint, picture, trained_like, watched
from several_maps_helpers import KINDS, MAPS, enhanced_by_reference, module_of

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, read_trained_settings
from semantic_attention import SemanticProjectionModel, load_semantic_module


# -- The module -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_updates_equal_the_reference(kind):
    module = module_of(kind).double()
    generator = torch.Generator().manual_seed(1)
    hidden_states, tokens = (
        torch.randn(*shape, 12, width, generator=generator, dtype=torch.float64)
        for shape, width in (((2,), 384), ((2, 2), 64))
    )
    positions = ref.panel_positions(2, 3)

    def expected(*strengths):
        return enhanced_by_reference(kind, module, hidden_states, tokens.unbind(1), strengths, positions)

    close = {"rtol": 1e-6, "atol": 1e-6}  # the frequencies of rotary positions are float32
    for scale, strengths in (
        (0.7, (0.7, 0.7)),
        ([0.5, -1.0], (0.5, -1.0)),
        ([0.0, 1.0], (0, 1)),
        ([1.0, 0.0], (1, 0)),
    ):
        found = module.enhance(hidden_states, tokens, positions.float(), scale)
        torch.testing.assert_close(found, expected(*strengths), **close)
    keep = torch.tensor([[True, False], [False, False]])
    found = module.enhance(hidden_states, tokens, positions.float(), keep_map=keep)
    torch.testing.assert_close(found[0], expected(1, 0)[0], **close)
    assert torch.equal(found[1], hidden_states[1])
    assert differs(expected(1, 1), expected(1, 0), 0.1) and differs(expected(1, 1), expected(0, 1), 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_one_map_are_as_before_and_those_of_several_name_them(tmp_path, kind):
    one, two = module_of(kind, maps=("semantic",)), module_of(kind)
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[1].pop("maps") == ["land", "rivers"] and configs[0] == configs[1]
    assert one.maps == ("semantic",) and list(one.named_scales()) == ["layer 0", "layer 1"]
    loaded = load_semantic_module(tmp_path / "two")
    assert loaded.maps == MAPS and type(loaded) is type(two)
    assert list(loaded.named_scales()) == ["land layer 0", "land layer 1", "rivers layer 0", "rivers layer 1"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), two.state_dict().values()))
    assert two.num_parameters() == 2 * one.num_parameters()
    assert two.describe()[0] == f"{one.describe()[0]} for each of the maps land, rivers"


@pytest.mark.parametrize(
    "maps, message",
    [
        ([], "a list of 1 to 16 names"),
        ("land", "a list of 1 to 16 names"),
        (["land"] * 2, "different names"),
        (["a/b"], "holds 'a/b'"),
        (["target"], "holds 'target'"),
        ([1], "holds 1"),
    ],
)
def test_names_that_cannot_be_are_refused(tmp_path, maps, message):
    with pytest.raises(ValueError, match=message):
        SemanticProjectionModel(maps=maps)
    SemanticProjectionModel().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"maps": maps}))
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        load_semantic_module(tmp_path)


def test_a_config_of_more_maps_than_weights_is_refused(tmp_path):
    SemanticProjectionModel(maps=MAPS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"maps": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match="`num_layers` is 1 for each of 3 maps, but the weights are of 2 layers"):
        load_semantic_module(tmp_path)


# -- Painting ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_equals_the_reference(base, posterior_mode, kind):
    module = module_of(kind)
    pipe = make_pipe(base, semantic_attention=module)
    assert pipe.semantic_maps == MAPS
    land, rivers = picture(2), picture(3)
    tokens = [ref.encode_semantic(pipe.vae, semantic * 2 - 1) for semantic in (land, rivers)]
    calls = [
        ({"semantic_image": {"rivers": rivers, "land": land}}, (1, 1)),
        ({"semantic_image": [land, rivers]}, (1, 1)),
        ({"semantic_image": [land, rivers], "semantic_scale": {"rivers": 0.4}}, (1, 0.4)),
        ({"semantic_image": [land, rivers], "semantic_scale": 0.8}, (0.8, 0.8)),
        ({"semantic_image": {"rivers": rivers}}, (0, 1)),
        ({"semantic_image": [land, None]}, (1, 0)),
        ({"semantic_image": [land, rivers], "semantic_scale": {"land": 0}}, (0, 1)),
    ]
    for kwargs, strengths in calls:
        with watched(pipe.transformer) as (passed, fed):
            paint(pipe, **kwargs)
        expected = enhanced_by_reference(kind, module, passed[0], tokens, strengths, ref.panel_positions(2, 3))
        torch.testing.assert_close(fed[0], expected, rtol=1e-4, atol=1e-4)
    plain = paint(pipe)
    assert torch.equal(paint(pipe, semantic_image={}), plain)
    assert torch.equal(paint(pipe, semantic_image=[land, rivers], semantic_scale=0), plain)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"semantic_image": {"lakes": 1}}, "`semantic_image` has to name maps out of land, rivers, .*names 'lakes'"),
        ({"semantic_image": {}, "semantic_scale": {"x": 1}}, "`semantic_scale` has to name maps out of land, rivers"),
        (
            {"semantic_image": picture(2)},
            "a dict of the maps land, rivers or a list of 2 in this order, but is one map",
        ),
        ({"semantic_image": [picture(2)]}, "but is a list of 1"),
        (
            {"semantic_image": {}, "semantic_scale": {"land": float("nan")}},
            "`semantic_scale` has to be a finite number",
        ),
        ({"semantic_image": {"rivers": picture(2, 16, 16)}}, '`semantic_image\\["rivers"\\]` has to be as large'),
    ],
)
def test_maps_that_do_not_fit_are_refused(base, kwargs, message):
    with pytest.raises(ValueError, match=message):
        paint(make_pipe(base, semantic_attention=module_of("projection")), **kwargs)


def test_one_map_takes_its_name_too(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    assert pipe.semantic_maps == ("semantic",) and "semantic_maps" not in pipe.config
    same = paint(pipe, semantic_image={"semantic": picture(2)}, semantic_scale={"semantic": 0.5})
    assert torch.equal(same, paint(pipe, semantic_image=picture(2), semantic_scale=0.5))


def test_each_map_has_a_panel_in_context(base):
    pipe = make_pipe(base, semantic_mode="in_context", semantic_maps=["land", "rivers"])
    land, rivers = picture(2), picture(3)
    canvas, mask = pipe.prepare_diptych(picture(1), picture(4), {"rivers": rivers, "land": land})
    assert torch.equal(canvas, torch.cat([picture(1), picture(4), land, rivers], dim=3))
    assert mask.shape[3] == 4 * 48 and mask[..., 48:96].all() and mask.sum() == 32 * 48
    without, _ = pipe.prepare_diptych(picture(1), picture(4), {"rivers": rivers})
    assert torch.equal(without[..., 96:144], torch.full_like(land, 0.5)) and torch.equal(without[..., 144:], rivers)
    assert paint(pipe, semantic_image=[land, rivers], return_diptych=True).shape[3] == 4 * 48
    painted = paint(pipe, semantic_image=[land, rivers])
    assert painted.shape == (1, 3, 32, 48) and differs(painted, paint(pipe, semantic_image=[land, None]))
    with pytest.raises(ValueError, match="takes one map"):
        make_pipe(base, semantic_mode="pixel_fusion", semantic_maps=["land", "rivers"])


@torch.no_grad()
def test_attention_maps_look_in_the_named_map(base):
    module = module_of("rope", num_layers=1)
    pipe = make_pipe(base, semantic_attention=module)
    look = {"points": [(8, 8)], "semantic_image": [picture(2), picture(3)], "image": picture(1), "prompt": "a hill"}
    look |= {"max_sequence_length": 16, "num_inference_steps": 2, "output_type": "pt", "steps": [0]}

    def maps(**kwargs):
        return pipe.semantic_attention_maps(generator=torch.Generator().manual_seed(0), **look | kwargs).maps

    for index, name in enumerate(MAPS):
        alone = trained_like(position="rope")
        alone.layers[0].load_state_dict(module.layers[index].state_dict())
        one = make_pipe(base, semantic_attention=alone)
        expected = one.semantic_attention_maps(
            generator=torch.Generator().manual_seed(0), **look | {"semantic_image": look["semantic_image"][index]}
        )
        torch.testing.assert_close(torch.tensor(maps(semantic_map=name)), torch.tensor(expected.maps))
    assert (maps() == maps(semantic_map="land")).all()
    with pytest.raises(ValueError, match="`semantic_map` has to be one of land, rivers, .* but is 'lakes'"):
        maps(semantic_map="lakes")
    with pytest.raises(ValueError, match="nothing attends to a map"):
        maps(semantic_map="rivers", semantic_image={"land": picture(2)})


@pytest.mark.parametrize("mode", ["projection", "in_context"])
def test_trained_weights_and_saved_pipelines_keep_the_names(base, tmp_path, mode):
    trained = Trained(base, tmp_path / "lora", 0, mode, semantic_maps=["land", "rivers"])
    assert read_trained_settings(trained.folder)["semantic_maps"] == MAPS
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(trained.folder, adapter_name="a")
    assert pipe.semantic_maps == MAPS
    maps = {"semantic_image": [picture(2), picture(3)]}
    assert not differs(paint(pipe, **maps), trained.guided, 1e-4)
    pipe.save_pretrained(tmp_path / "saved")
    saved = FluxFillSemanticPipeline.from_pretrained(tmp_path / "saved")
    assert saved.semantic_maps == MAPS and not differs(paint(saved, **maps), trained.guided, 1e-4)
    # The same call works while the adapter is switched off.
    pipe.disable_lora()
    assert not differs(paint(pipe, **maps), paint(make_pipe(base)), 1e-5)
    # Other adapters do not inherit the names.
    Trained(base, tmp_path / "other", 1, "projection")
    pipe.enable_lora()
    pipe.load_lora_weights(tmp_path / "other", adapter_name="b")
    pipe.set_adapters("b")
    assert pipe.semantic_maps == ("semantic",)
    if mode == "projection":
        pipe.set_adapters(["a", "b"])
        assert pipe.semantic_maps == (*MAPS, "semantic")
        three = dict(zip(pipe.semantic_maps, (picture(2), picture(3), picture(4))))
        assert differs(paint(pipe, semantic_image=three), paint(pipe, **{"semantic_image": {"semantic": picture(4)}}))
