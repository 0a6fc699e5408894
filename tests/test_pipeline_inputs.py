# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What a call takes and gives: batches, sizes, kinds of pictures, modes, and calls that are refused."""

import numpy as np
import pytest
import reference as ref
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pipeline_helpers import (
    STEPS,
    differs,
    diptych_of,
    fill,
    make_pipe,
    paint,
    picture,
    seeded,
    to_pil,
    trained_like,
    watched,
)

from pipeline_flux_fill_semantic import SEMANTIC_MODES
from semantic_attention import SemanticAttentionModel, SemanticProjectionModel


# -- Batches, sizes, kinds of pictures, outputs -----------------------------------------------------------------------


@pytest.mark.parametrize("semantic_mode", [name for name, mode in SEMANTIC_MODES.items() if mode.uses_map])
@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
def test_a_batch_equals_its_singles(base, semantic_mode, num_images_per_prompt):
    module_class = SEMANTIC_MODES[semantic_mode].module_class
    module = None if module_class is None else trained_like(model_class=module_class)
    pipe = make_pipe(base, semantic_attention=module, semantic_mode=semantic_mode)
    prompts, images, maps = ["a hill", "the sea at night"], picture(1, batch=2), picture(2, batch=2)
    kwargs = {"output_type": "latent", "return_diptych": True}

    def single(seed, prompt, image, semantic):
        return paint(
            pipe, images[[image]], prompts[prompt], semantic_image=maps[[semantic]], generator=seeded(seed), **kwargs
        )

    together = paint(
        pipe,
        images,
        prompts,
        semantic_image=maps,
        num_images_per_prompt=num_images_per_prompt,
        generator=[seeded(seed) for seed in range(2 * num_images_per_prompt)],
        **kwargs,
    )
    assert len(together) == 2 * num_images_per_prompt
    close = 2e-5
    for seed, latents in enumerate(together):
        of = seed // num_images_per_prompt
        torch.testing.assert_close(latents[None], single(seed, of, of, of), rtol=0, atol=close)
        # A wrong prompt, picture or map would show.
        for wrong in ((1 - of, of, of), (of, 1 - of, of), (of, of, 1 - of)):
            assert differs(latents[None], single(seed, *wrong), by=2 * close)


def test_one_prompt_and_one_map_serve_a_batch(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    images, semantic = picture(1, batch=2), picture(2)
    one = paint(pipe, images, semantic_image=semantic, prompt_2="hills")
    both = paint(pipe, images, ["a hill"] * 2, semantic_image=semantic.repeat(2, 1, 1, 1), prompt_2=["hills"] * 2)
    assert one.shape == (2, 3, 32, 48) and torch.equal(one, both)
    assert paint(pipe, images[:1], semantic_image=picture(2, batch=2)).shape == (2, 3, 32, 48)
    assert paint(pipe, images[:1], ["a hill", "the sea"], semantic_image=semantic).shape == (2, 3, 32, 48)


@torch.no_grad()
def test_prompt_embeddings_in_place_of_a_prompt(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    prompt_embeds, pooled_prompt_embeds, _ = pipe.encode_prompt("a hill", max_sequence_length=16)
    given = {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
    assert torch.equal(paint(pipe, semantic_image=picture(2), **given), paint(pipe, semantic_image=picture(2)))


@pytest.mark.parametrize("height, width", [(16, 16), (16, 80), (64, 32)])
def test_any_multiple_of_16(base, height, width):
    pipe = make_pipe(base, semantic_attention=trained_like(position="rope"))
    views = {"image": picture(1, height, width), "semantic_image": picture(2, height, width)}
    assert paint(pipe, **views).shape == (1, 3, height, width)
    assert paint(pipe, **views, return_diptych=True).shape == (1, 3, height, 2 * width)


@pytest.mark.parametrize("size", [{}, {"height": 48, "width": 32}])
def test_pil_numpy_and_tensors_give_the_same(base, size):
    pipe = make_pipe(base, semantic_attention=trained_like())
    views = picture(1), picture(2)
    kinds = {
        "tensor": lambda view: view,
        "tensor without batch": lambda view: view[0],
        "numpy": lambda view: view.movedim(1, -1).numpy(),
        "numpy without batch": lambda view: view[0].movedim(0, -1).numpy(),
        "PIL": to_pil,
        "list of PIL": lambda view: [to_pil(view)],
        "list of tensors": lambda view: [view[0]],
    }
    results = {
        name: paint(pipe, make(views[0]), semantic_image=make(views[1]), **size) for name, make in kinds.items()
    }
    expected = results["tensor"]
    assert expected.shape[-2:] == (size.get("height", 32), size.get("width", 48))
    assert [name for name, result in results.items() if not torch.equal(result, expected)] == []


def test_resizing_keeps_the_colors_of_a_map(base, monkeypatch):
    pipe = make_pipe(base, semantic_attention=trained_like())
    palette = to_pil((picture(2) > 0.5).float()).convert("P")
    encoded = []
    encode = pipe.encode_semantic
    monkeypatch.setattr(pipe, "encode_semantic", lambda semantic: encoded.append(semantic) or encode(semantic))
    paint(pipe, picture(1), semantic_image=palette, height=80, width=112)
    assert encoded[0].shape == (1, 3, 80, 112)
    colors = {tuple(color) for color in encoded[0][0].flatten(1).T.tolist()}
    assert colors == {tuple(c / 255 for c in color) for _, color in palette.convert("RGB").getcolors()}


def test_one_side_can_be_resized_alone(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    views = {"image": picture(1), "semantic_image": picture(2)}
    wider = paint(pipe, **views, width=64)
    assert torch.equal(wider, paint(pipe, **views, width=64, height=32)) and wider.shape[-2:] == (32, 64)
    assert paint(pipe, **views, height=48).shape[-2:] == (48, 48)


def test_maps_go_with_the_pictures_to_fill(base, monkeypatch):
    # The stock pipeline draws the posterior's samples for two pictures and the noise for four.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe = make_pipe(base, semantic_attention=trained_like())
    images, maps, masks = (picture(seed, batch=2) for seed in (1, 2, 3))
    masks = (masks > 0.5)[:, :1].float()
    given = {"height": 32, "width": 48, "output_type": "latent"}
    together = paint(
        pipe,
        images,
        mask_image=masks,
        semantic_image=maps,
        num_images_per_prompt=2,
        generator=[seeded(seed) for seed in range(4)],
        **given,
    )
    # The stock pipeline repeats several pictures as whole batches.
    for seed, of in enumerate([0, 1, 0, 1]):
        alone = paint(
            pipe, images[[of]], mask_image=masks[[of]], semantic_image=maps[[of]], generator=seeded(seed), **given
        )
        torch.testing.assert_close(together[[seed]], alone, rtol=0, atol=2e-5)


def test_output_types(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    results = {
        kind: paint(pipe, semantic_image=picture(2), output_type=kind) for kind in ("pt", "np", "pil", "latent")
    }
    assert results["pt"].shape == (1, 3, 32, 48)
    assert np.array_equal(results["np"], results["pt"].movedim(1, -1).numpy())
    assert [image.size for image in results["pil"]] == [(48, 32)]
    assert np.array_equal(np.asarray(results["pil"][0]), (results["np"][0] * 255).round().astype(np.uint8))

    whole = {
        kind: paint(pipe, semantic_image=picture(2), output_type=kind, return_diptych=True)
        for kind in ("pt", "np", "pil", "latent")
    }
    assert torch.equal(ref.target_half(whole["pt"]), results["pt"])
    assert np.array_equal(whole["np"][:, :, 48:], results["np"])
    assert np.array_equal(np.asarray(whole["pil"][0])[:, 48:], np.asarray(results["pil"][0]))
    assert results["latent"].shape == (1, 6, 64)
    assert torch.equal(ref.unpack(whole["latent"], 2, 6)[..., 6:], ref.unpack(results["latent"], 2, 3))
    as_tuple = pipe(
        "a hill",
        image=picture(1),
        semantic_image=picture(2),
        num_inference_steps=STEPS,
        max_sequence_length=16,
        generator=seeded(),
        output_type="pt",
        return_dict=False,
    )
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], results["pt"])


def test_given_latents_are_the_start(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    latents = torch.randn(1, 12, 64, generator=seeded(5))
    with watched(pipe.transformer) as (passed, _):
        paint(pipe, semantic_image=picture(2), latents=latents)
    assert torch.equal(passed[0][..., :64], latents)


@torch.no_grad()
@pytest.mark.parametrize("with_map", [True, False])
@pytest.mark.parametrize("semantic_mode", list(SEMANTIC_MODES))
def test_semantic_modes(base, semantic_mode, with_map):
    visible, semantic = picture(1), picture(2)
    mode = SEMANTIC_MODES[semantic_mode]
    pipe = make_pipe(base, semantic_mode=semantic_mode, fusion_alpha=0.25)
    given = {"semantic_image": semantic} if with_map and mode.map_on_canvas else {}
    canvas, mask = {
        "cross_attention": lambda: diptych_of(visible),
        "projection": lambda: diptych_of(visible),
        "none": lambda: diptych_of(visible),
        "pixel_fusion": lambda: (
            ref.make_diptych(0.75 * visible + 0.25 * semantic if with_map else visible, visible),
            diptych_of(visible)[1],
        ),
        "in_context": lambda: (
            torch.cat([visible, visible, semantic if with_map else torch.full_like(visible, 0.5)], dim=3),
            torch.cat([torch.zeros(1, 1, 32, 48), torch.ones(1, 1, 32, 48), torch.zeros(1, 1, 32, 48)], dim=3),
        ),
    }[semantic_mode]()
    expected = fill(base, canvas, mask)
    torch.testing.assert_close(paint(pipe, **given, return_diptych=True), expected)
    torch.testing.assert_close(paint(pipe, **given), expected[..., 48:96])
    latents = paint(pipe, **given, return_diptych=True, output_type="latent")
    target = paint(pipe, **given, output_type="latent")
    columns = 3 * len(mode.panels)
    assert torch.equal(ref.unpack(target, 2, 3), ref.unpack(latents, 2, columns)[..., 6:12])


# -- Wrong calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, named, came",
    [
        ({"semantic_mode": "both"}, "semantic_mode", "both"),
        ({"fusion_alpha": 1.5}, "fusion_alpha", "1.5"),
        ({"max_sequence_length": 0}, "max_sequence_length", "0"),
        ({"semantic_attention": torch.nn.Linear(1, 1)}, "semantic_attention", "Linear"),
        ({"semantic_attention": SemanticAttentionModel(in_channels=32)}, "semantic_attention", "32"),
        (
            {"semantic_attention": SemanticAttentionModel(), "semantic_mode": "projection"},
            "semantic_attention",
            "SemanticAttentionModel",
        ),
    ],
)
def test_wrong_pipelines(base, wrong, named, came):
    with pytest.raises(ValueError, match=f"`{named}` has to .*{came}"):
        make_pipe(base, **wrong)


NAN = torch.full((1, 3, 32, 48), float("nan"))


@pytest.mark.parametrize(
    "wrong, named, came",
    [
        ({"image": "street.png"}, "image", "str"),
        ({"image": []}, "image", r"\[\]|empty"),
        ({"image": picture(1)[:, :1]}, "image", "1, 1, 32, 48"),
        ({"image": np.zeros((1, 3, 32, 48), np.float32)}, "image", "48"),
        ({"image": picture(1) * 255}, "image", "255"),
        ({"image": picture(1) * 2 - 1}, "image", "-1"),
        ({"image": NAN}, "image", "nan"),
        ({"image": picture(1, 32, 40)}, "image", "40x32"),
        ({"image": [picture(1), picture(1, 32, 32)]}, "image", "48x32"),
        ({"image": picture(1, batch=3), "prompt": ["a", "b"]}, "image", "3"),
        ({"semantic_image": 7}, "semantic_image", "int"),
        ({"semantic_image": NAN}, "semantic_image", "nan"),
        ({"semantic_image": np.zeros((32, 48, 3), np.uint8) + 7}, "semantic_image", "7"),
        ({"semantic_image": picture(2, 48, 48)}, "semantic_image", "48x48"),
        ({"semantic_image": picture(2, batch=2), "prompt": ["a", "b", "c"]}, "semantic_image", "2"),
        ({"semantic_scale": float("nan")}, "semantic_scale", "nan"),
        ({"semantic_scale": "1"}, "semantic_scale", "'1'"),
        ({"height": 40, "width": 48}, "image", "48x40"),
        ({"height": 32, "width": 40}, "image", "40x32"),
        ({"strength": 1.2}, "strength", "1.2"),
        ({"prompt": 3}, "prompt", "int"),
        ({"prompt": None}, "prompt", "prompt_embeds"),
    ],
)
def test_wrong_calls(base, wrong, named, came):
    pipe = make_pipe(base, semantic_attention=trained_like())
    kwargs = {"semantic_image": picture(2)} | wrong
    with pytest.raises(ValueError, match=rf"(?s)\b{named}\b.*({came})"):
        paint(pipe, **kwargs)
    assert len(pipe.transformer._forward_pre_hooks) == 0


def test_no_picture(base):
    with pytest.raises(ValueError, match="`image` has to be .* None"):
        make_pipe(base)("a hill")


def test_a_map_without_a_module(base):
    with pytest.raises(ValueError, match="`semantic_image` was passed.*`semantic_attention`"):
        paint(make_pipe(base), semantic_image=picture(2))


@pytest.mark.parametrize(
    "semantic_mode, wrong, named",
    [
        ("none", {"semantic_image": picture(2)}, "semantic_image"),
        ("pixel_fusion", {"mask_image": picture(3)[:, :1], "semantic_image": picture(2)}, "mask_image"),
        ("in_context", {"mask_image": picture(3)[:, :1], "semantic_image": picture(2)}, "mask_image"),
        ("in_context", {"semantic_scale": 0.5, "semantic_image": picture(2)}, "semantic_scale"),
        ("pixel_fusion", {"semantic_scale": 2, "semantic_image": picture(2)}, "semantic_scale"),
    ],
)
def test_wrong_calls_in_other_modes(base, semantic_mode, wrong, named):
    with pytest.raises(ValueError, match=f"`{named}`") as error:
        paint(make_pipe(base, semantic_mode=semantic_mode), **wrong)
    assert f'`semantic_mode="{semantic_mode}"`' in str(error.value)


def test_a_projection_sets_its_mode(base):
    pipe = make_pipe(base, semantic_attention=SemanticProjectionModel())
    assert pipe.config.semantic_mode == "projection"
    assert make_pipe(base, semantic_attention=SemanticAttentionModel()).config.semantic_mode == "cross_attention"
