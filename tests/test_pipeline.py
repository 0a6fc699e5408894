# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The pipeline against `FluxFillPipeline` and the reference, and every way in which it is used."""

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import reference as ref
import safetensors.torch
import torch
from conftest import ROOT
from diffusers import FirstBlockCacheConfig, FluxFillPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model_state_dict
from test_semantic_attention import reference_layers, trained_like

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline
from semantic_attention import SemanticAttentionModel


LORA_FILE = "pytorch_lora_weights.safetensors"
STEPS = 2


def make_pipe(base, cls=FluxFillSemanticPipeline, own: bool = False, **kwargs):
    """A pipeline over the base's very modules, or over copies where the test changes them."""
    components = {name: copy.deepcopy(part) if own else part for name, part in base.components.items()}
    pipe = cls(**components, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int, height: int = 32, width: int = 48, batch: int = 1) -> torch.Tensor:
    """`(batch, 3, height, width)` in [0, 1], of values that a PIL image can hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator).float() / 255


def to_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray((pixels[0].movedim(0, -1) * 255).round().byte().numpy())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def paint(pipe, image=None, prompt="a hill", **kwargs):
    """One short call; the pictures as tensors unless asked otherwise."""
    defaults = {"num_inference_steps": STEPS, "max_sequence_length": 16, "output_type": "pt", "generator": seeded()}
    if kwargs.get("prompt_embeds") is not None:
        prompt = None
    return pipe(prompt=prompt, image=picture(1) if image is None else image, **(defaults | kwargs)).images


def fill(pipe, canvas: torch.Tensor, mask: torch.Tensor, **kwargs):
    """`FluxFillPipeline` itself on a canvas made by hand."""
    height, width = canvas.shape[-2:]
    return paint(pipe, canvas, mask_image=mask, height=height, width=width, **kwargs)


def diptych_of(visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    canvas = ref.make_diptych(visible, visible)
    return canvas, ref.make_mask(canvas[:1])


@contextlib.contextmanager
def watched(transformer):
    """Collects, for each step, the tokens that the pipeline passes and those that the transformer really works on."""
    passed, fed = [], []
    # Registered before the pipeline's own hook, so this one sees what comes into it.
    handles = [
        transformer.register_forward_pre_hook(lambda _, a, kw: passed.append(kw["hidden_states"]), with_kwargs=True),
        transformer.x_embedder.register_forward_pre_hook(lambda _, a: fed.append(a[0])),
    ]
    try:
        yield passed, fed
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def posterior_mode(monkeypatch):
    """The VAE's draws take its mode, as the reference does."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def differs(a: torch.Tensor, b: torch.Tensor, by: float = 1e-3) -> bool:
    return (a.float() - b.float()).abs().max().item() > by


# -- Nothing changes where the map is left out ------------------------------------------------------------------------


@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
@pytest.mark.parametrize("case", ["no module", "no map", "scale 0", "untrained"])
def test_equals_fill_pipeline_bit_for_bit(base, case, num_images_per_prompt):
    visible = picture(1)
    kwargs = {"num_images_per_prompt": num_images_per_prompt, "output_type": "latent"}
    expected = fill(base, *diptych_of(visible), **kwargs)
    module = {"no module": None, "untrained": SemanticAttentionModel()}.get(case, trained_like())
    if case in ("scale 0", "untrained"):
        kwargs |= {"semantic_image": picture(2), "semantic_scale": 0 if case == "scale 0" else 1.0}
    images = paint(make_pipe(base, semantic_attention=module), visible, return_diptych=True, **kwargs)
    assert images.shape == (num_images_per_prompt, 2 * 3 * 2, 64)
    assert torch.equal(images, expected)


@pytest.mark.parametrize("case", ["no module", "scale 0", "untrained"])
def test_fills_a_mask_as_fill_pipeline_does(base, case):
    image, mask = to_pil(picture(1)), to_pil((picture(3) > 0.5).float())
    size = {"mask_image": mask, "height": 48, "width": 32, "num_images_per_prompt": 2}
    expected = paint(base, image, **size)
    module = {"no module": None, "untrained": SemanticAttentionModel()}.get(case, trained_like())
    extra = {} if module is None else {"semantic_image": picture(2), "semantic_scale": float(case == "untrained")}
    assert torch.equal(paint(make_pipe(base, semantic_attention=module), image, **size, **extra), expected)


def test_a_trained_module_changes_the_picture(base):
    module = SemanticAttentionModel()
    torch.nn.init.constant_(module.layers[0].scale, 0.5)
    pipe = make_pipe(base, semantic_attention=module)
    without = paint(pipe, output_type="latent")
    guided = paint(pipe, semantic_image=picture(2), output_type="latent")
    assert differs(guided, without)
    assert differs(paint(pipe, semantic_image=picture(3), output_type="latent"), guided, by=1e-4)
    assert differs(paint(pipe, semantic_image=picture(2), semantic_scale=0.3, output_type="latent"), guided)


# -- What is injected -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(32, 48), (64, 16)])
@pytest.mark.parametrize("position", ["none", "rope"])
def test_a_whole_call_equals_the_reference(base, posterior_mode, height, width, position):
    visible, semantic = picture(1, height, width), picture(2, height, width)
    rows, columns = height // 16, width // 16
    module = trained_like(num_layers=2, position=position)
    pipe = make_pipe(base, semantic_attention=module)
    with watched(pipe.transformer) as (passed, fed):
        latents = paint(
            pipe, visible, semantic_image=semantic, semantic_scale=0.8, output_type="latent", return_diptych=True
        )

    canvas, mask = diptych_of(visible * 2 - 1)
    x_cond = ref.condition(pipe.vae, canvas, mask)
    semantic_tokens = ref.encode_semantic(pipe.vae, semantic * 2 - 1)
    positions = ref.panel_positions(rows, columns) if position == "rope" else None
    prompt_embeds, pooled_prompt_embeds, _ = pipe.encode_prompt("a hill", max_sequence_length=16)
    x_1 = ref.pack(torch.randn(1, 16, 2 * rows, 4 * columns, generator=seeded()))

    def enhance(x):
        return ref.enhance(x, semantic_tokens, reference_layers(module), positions=positions, strength=0.8)

    def predict(x, t):
        ids = ref.image_ids(rows, 2 * columns)
        return ref.predict(pipe.transformer, x, x_cond, t, prompt_embeds, pooled_prompt_embeds, ids, guidance=30.0)

    close = {"rtol": 1e-4, "atol": 1e-4}
    assert len(passed) == len(fed) == STEPS
    for before, after in zip(passed, fed):
        torch.testing.assert_close(before[..., 64:], x_cond, **close)
        assert torch.equal(after[..., 64:], before[..., 64:])
        torch.testing.assert_close(after[..., :64], enhance(before[..., :64]), **close)
        assert differs(after[..., :64], before[..., :64], by=0.1)
    torch.testing.assert_close(passed[0][..., :64], x_1)
    sigmas = ref.inference_sigmas(STEPS, rows * 2 * columns)
    torch.testing.assert_close(latents, ref.sample(x_1, sigmas, enhance, predict), **close)


@torch.no_grad()
def test_encode_diptych_equals_what_the_transformer_gets(base):
    pipe = make_pipe(base)
    visible = picture(1, batch=2)
    with watched(pipe.transformer) as (passed, _):
        paint(pipe, visible)
    canvas, mask = pipe.prepare_diptych(visible)
    # A call draws the canvas's latent, the noise and the masked canvas's latent, all of one shape.
    generator = seeded()
    first = torch.randn(2, 16, 4, 12, generator=generator)
    _, x_cond, img_ids = pipe.encode_diptych(canvas, mask, generator=generator)
    assert torch.equal(x_cond, passed[0][..., 64:])
    assert torch.equal(img_ids, ref.image_ids(2, 6))

    moments = pipe.encode_moments(canvas, mask)
    x_0, _, _ = pipe.encode_diptych(None, mask, moments=moments, generator=seeded())
    mean, logvar = moments[0].chunk(2, dim=1)
    expected = (mean + (0.5 * logvar).exp() * first - 0.1159) * 0.3611
    torch.testing.assert_close(x_0, ref.pack(expected))
    again, *_ = pipe.encode_diptych(canvas, mask, generator=seeded())
    assert torch.equal(again, x_0)


@torch.no_grad()
def test_encoding_a_map_takes_nothing_from_the_random_stream(base):
    pipe = make_pipe(base)
    before = torch.get_rng_state()
    tokens = pipe.encode_semantic(picture(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(tokens, ref.pack(ref.encode_image(pipe.vae, picture(2) * 2 - 1)))


@torch.no_grad()
def test_a_mask_with_a_map_attends_place_by_place(base):
    module = trained_like(position="rope")
    pipe = make_pipe(base, semantic_attention=module)
    semantic = picture(2)
    with watched(pipe.transformer) as (passed, fed):
        images = paint(
            pipe, mask_image=(picture(3) > 0.5)[:, :1].float(), semantic_image=semantic, height=32, width=48
        )
    assert images.shape == (1, 3, 32, 48)
    tokens = ref.pack(ref.encode_image(pipe.vae, semantic * 2 - 1))
    positions = torch.tensor([[row, column] for row in range(2) for column in range(3)])
    expected = ref.enhance(passed[0][..., :64], tokens, reference_layers(module), positions=positions)
    torch.testing.assert_close(fed[0][..., :64], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_strength_below_one_starts_from_the_visible_view(base, posterior_mode):
    pipe = make_pipe(base, semantic_attention=trained_like())
    with watched(pipe.transformer) as (passed, _):
        paint(pipe, semantic_image=picture(2), strength=0.5, num_inference_steps=4)
    assert len(passed) == 2
    x_0 = ref.pack(ref.encode_image(pipe.vae, diptych_of(picture(1) * 2 - 1)[0]))
    x_1 = ref.pack(torch.randn(1, 16, 4, 12, generator=seeded()))
    sigma = ref.inference_sigmas(4, 12)[2].float()
    torch.testing.assert_close(passed[0][..., :64], ref.add_noise(x_0, x_1, sigma[None]), rtol=1e-4, atol=1e-4)


def test_a_callback_sees_and_changes_x_t_itself(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    with watched(pipe.transformer) as (passed, fed):
        latents = paint(
            pipe, semantic_image=picture(2), callback_on_step_end=look, output_type="latent", return_diptych=True
        )
    assert torch.equal(seen[0], passed[1][..., :64]) and differs(seen[0], fed[1][..., :64])
    assert torch.equal(seen[-1], latents)

    with watched(pipe.transformer) as (passed, fed):
        paint(pipe, semantic_image=picture(2), callback_on_step_end=lambda *a: {"latents": torch.ones_like(seen[0])})
    assert torch.equal(passed[1][..., :64], torch.ones_like(seen[0])) and differs(fed[1][..., :64], seen[0])


# -- Batches, sizes, kinds of pictures, outputs -----------------------------------------------------------------------


@pytest.mark.parametrize("semantic_mode", ["cross_attention", "pixel_fusion", "in_context"])
@pytest.mark.parametrize("num_images_per_prompt", [1, 2])
def test_a_batch_equals_its_singles(base, semantic_mode, num_images_per_prompt):
    module = trained_like() if SEMANTIC_MODES[semantic_mode].attends else None
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


def test_resizing_keeps_the_colours_of_a_map(base, monkeypatch):
    pipe = make_pipe(base, semantic_attention=trained_like())
    palette = to_pil((picture(2) > 0.5).float()).convert("P")
    encoded = []
    encode = pipe.encode_semantic
    monkeypatch.setattr(pipe, "encode_semantic", lambda semantic: encoded.append(semantic) or encode(semantic))
    paint(pipe, picture(1), semantic_image=palette, height=80, width=112)
    assert encoded[0].shape == (1, 3, 80, 112)
    colours = {tuple(colour) for colour in encoded[0][0].flatten(1).T.tolist()}
    assert colours == {tuple(c / 255 for c in colour) for _, colour in palette.convert("RGB").getcolors()}


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
        picture(1),
        picture(2),
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


# -- Nothing is left behind -------------------------------------------------------------------------------------------


def test_the_hook_goes_with_the_call(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    hooks = pipe.transformer._forward_pre_hooks
    inside = []

    def fail(*args):
        inside.append(len(hooks))
        raise RuntimeError("stop here")

    first = paint(pipe, semantic_image=picture(2))
    assert len(hooks) == 0
    with pytest.raises(RuntimeError, match="stop here"):
        paint(pipe, semantic_image=picture(2), callback_on_step_end=fail)
    assert inside == [1] and len(hooks) == 0
    assert torch.equal(paint(pipe, semantic_image=picture(2)), first)
    assert torch.equal(paint(pipe, return_diptych=True), fill(base, *diptych_of(picture(1))))


# -- Offloading, compilation, caching, dtypes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offload", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offload(base, offload):
    module = trained_like()
    expected = paint(make_pipe(base, semantic_attention=module), semantic_image=picture(2))
    pipe = make_pipe(base, own=True, semantic_attention=copy.deepcopy(module))
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **offload)
    assert torch.equal(paint(pipe, semantic_image=picture(2)), expected)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("enable", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_cpu_offload(base, enable):
    module = trained_like()
    expected = paint(make_pipe(base, semantic_attention=module), semantic_image=picture(2))
    pipe = make_pipe(base, own=True, semantic_attention=copy.deepcopy(module))
    getattr(pipe, enable)()
    for _ in range(2):
        torch.testing.assert_close(paint(pipe, semantic_image=picture(2)).cpu(), expected, rtol=0, atol=1e-2)


def test_compiled_blocks(base):
    pipe = make_pipe(base, own=True, semantic_attention=trained_like())
    expected = paint(pipe, semantic_image=picture(2))
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        pipe.semantic_attention.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(paint(pipe, semantic_image=picture(2)), expected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_first_block_cache(base):
    pipe = make_pipe(base, own=True, semantic_attention=trained_like())
    expected = paint(pipe, semantic_image=picture(2), num_inference_steps=4)
    runs = []
    pipe.transformer.single_transformer_blocks[0].attn.register_forward_hook(lambda *a: runs.append(1))
    paint(pipe, semantic_image=picture(2), num_inference_steps=4)
    assert len(runs) == 4
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(paint(pipe, semantic_image=picture(2), num_inference_steps=4), expected)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    runs.clear()
    cached = paint(pipe, semantic_image=picture(2), num_inference_steps=4)
    assert len(runs) == 1 and cached.isfinite().all()


def test_a_call_that_was_cut_off_leaves_nothing_in_the_cache(base):
    pipe = make_pipe(base, own=True)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    expected = paint(pipe)

    def interrupt(*args):
        raise KeyboardInterrupt

    # Of the same size its residual would be taken for this picture's, of another it would not fit.
    for batch in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            paint(pipe, picture(2, batch=batch), callback_on_step_end=interrupt)
        assert torch.equal(paint(pipe), expected)


def test_a_float32_module_in_a_bfloat16_pipeline(base):
    module = trained_like()
    pipe = make_pipe(base, own=True).to(torch.bfloat16)
    pipe.register_modules(semantic_attention=module)
    with watched(pipe.transformer) as (passed, fed):
        images = paint(pipe, semantic_image=picture(2))
    assert passed[0].dtype == fed[0].dtype == torch.bfloat16 and module.dtype == torch.float32
    assert differs(fed[0][..., :64], passed[0][..., :64], by=0.1)
    assert images.isfinite().all()


# -- Save and load ----------------------------------------------------------------------------------------------------


def test_from_pipe_both_ways(base):
    module = trained_like()
    pipe = FluxFillSemanticPipeline.from_pipe(base, semantic_attention=module, semantic_mode="cross_attention")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer is base.transformer and pipe.semantic_attention is module
    assert differs(paint(pipe, semantic_image=picture(2)), paint(pipe), by=1e-4)
    back = FluxFillPipeline.from_pipe(pipe)
    back.set_progress_bar_config(disable=True)
    assert type(back) is FluxFillPipeline and back.transformer is base.transformer
    assert torch.equal(fill(back, *diptych_of(picture(1))), paint(pipe, return_diptych=True))
    other = FluxFillSemanticPipeline.from_pipe(make_pipe(base, semantic_mode="in_context", fusion_alpha=0.3))
    assert other.semantic_attention is None
    assert (other.config.semantic_mode, other.config.fusion_alpha) == ("in_context", 0.3)


@pytest.mark.parametrize("with_module", [True, False])
def test_save_pretrained_and_back(base, tmp_path, with_module):
    module = trained_like(num_layers=2) if with_module else None
    mode = "cross_attention" if with_module else "pixel_fusion"
    pipe = make_pipe(base, semantic_attention=module, semantic_mode=mode, fusion_alpha=0.4)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    expected = ["semantic_attention", "SemanticAttentionModel"] if with_module else [None, None]
    assert index["semantic_attention"] == expected
    loaded = FluxFillSemanticPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert (loaded.config.semantic_mode, loaded.config.fusion_alpha) == (mode, 0.4)
    views = {"semantic_image": picture(2)}
    torch.testing.assert_close(paint(loaded, **views), paint(pipe, **views), rtol=1e-4, atol=1e-4)


CUSTOM = """
import pathlib, sys, torch
from diffusers import DiffusionPipeline
base, custom, lora, saved, out = sys.argv[1:]
torch.set_grad_enabled(False)
views = torch.load(out + "/views.pt")
for name, folder, load in (("lora", base, True), ("saved", saved, False)):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=custom, trust_remote_code=True)
    assert type(pipe).__name__ == "FluxFillSemanticPipeline" and "diffusers_modules" in type(pipe).__module__
    if load:
        pipe.load_lora_weights(lora)
    images = pipe("a hill", *views, num_inference_steps=2, max_sequence_length=16, output_type="pt",
                  generator=torch.Generator().manual_seed(0)).images
    torch.save(images, f"{out}/{name}.pt")
pipe.save_pretrained(out + "/again")
"""


@pytest.mark.parametrize("form", [".", "pipeline.py", "pipeline_flux_fill_semantic.py"])
def test_as_custom_pipeline(base, base_folder, trained, tmp_path, form):
    saved = make_pipe(base, semantic_attention=trained_like(3))
    saved.save_pretrained(tmp_path / "saved")
    views = [picture(1), picture(2)]
    torch.save(views, tmp_path / "views.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", CUSTOM, base_folder, str(ROOT / form), str(trained.folder)]
    done = subprocess.run(
        [*command, str(tmp_path / "saved"), str(tmp_path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.load(tmp_path / "lora.pt"), trained.guided, **close)
    torch.testing.assert_close(torch.load(tmp_path / "saved.pt"), paint(saved, semantic_image=picture(2)), **close)
    again = FluxFillSemanticPipeline.from_pretrained(tmp_path / "again")
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(
        paint(again, semantic_image=picture(2)), paint(saved, semantic_image=picture(2)), **close
    )


# -- LoRA -------------------------------------------------------------------------------------------------------------


class Trained:
    """A LoRA folder, and what its weights paint before they are saved."""

    def __init__(self, base, folder: Path, seed: int, semantic_mode: str = "cross_attention"):
        self.folder = folder
        self.module = trained_like(seed) if SEMANTIC_MODES[semantic_mode].attends else None
        pipe = make_pipe(base, own=True, semantic_attention=self.module, semantic_mode=semantic_mode)
        # The rank is not the alpha, so that a lost alpha shows.
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_out"])
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(config)
        layers = get_peft_model_state_dict(pipe.transformer)
        for name, parameter in pipe.transformer.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.2)
        self.plain = paint(pipe, return_diptych=True)
        self.guided = paint(pipe, semantic_image=None if semantic_mode == "none" else picture(2))
        FluxFillSemanticPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=layers,
            semantic_attention=self.module,
            semantic_mode=semantic_mode,
            transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
        )


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    return Trained(base, tmp_path_factory.mktemp("lora"), seed=0)


@pytest.fixture(scope="module")
def other(base, tmp_path_factory):
    return Trained(base, tmp_path_factory.mktemp("other"), seed=1)


def close_to(images, expected, tolerance=1e-4) -> bool:
    return not differs(images, expected, tolerance)


def is_plain(pipe) -> bool:
    return pipe.semantic_attention is None and not getattr(pipe.transformer, "peft_config", None)


def test_lora_and_module_come_and_go(base, trained):
    pipe = make_pipe(base, own=True)
    before = paint(pipe, return_diptych=True)
    assert differs(trained.plain, before)
    pipe.load_lora_weights(trained.folder)
    assert close_to(paint(pipe, return_diptych=True), trained.plain)
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)
    assert differs(trained.guided, trained.plain[..., 48:])
    state = pipe.semantic_attention.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in trained.module.state_dict().items())
    pipe.unload_lora_weights()
    assert is_plain(pipe)
    assert torch.equal(paint(pipe, return_diptych=True), before)
    pipe.load_lora_weights(str(trained.folder), adapter_name="again")
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)


def test_a_lora_folder_holds_what_the_design_says(trained):
    files = {path.relative_to(trained.folder).as_posix() for path in trained.folder.rglob("*") if path.is_file()}
    module = {"semantic_attention/config.json", "semantic_attention/diffusion_pytorch_model.safetensors"}
    assert files == {LORA_FILE} | module
    with safetensors.safe_open(trained.folder / LORA_FILE, framework="pt") as weights:
        metadata, keys = weights.metadata(), list(weights.keys())
    assert all(key.startswith("transformer.") and "lora_" in key for key in keys)
    adapter = json.loads(metadata["lora_adapter_metadata"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (2, 8)
    assert json.loads(metadata["semantic_fill"])["semantic_mode"] == "cross_attention"


def test_fill_pipeline_loads_the_same_lora(base, trained):
    stock = make_pipe(base, FluxFillPipeline, own=True)
    stock.load_lora_weights(trained.folder)
    assert close_to(fill(stock, *diptych_of(picture(1))), trained.plain)


def test_fuse_and_unfuse(base, trained):
    pipe = make_pipe(base, own=True)
    before = paint(pipe, return_diptych=True)
    pipe.load_lora_weights(trained.folder)
    pipe.fuse_lora()
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)
    pipe.unfuse_lora()
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)
    pipe.unload_lora_weights()
    assert is_plain(pipe) and close_to(paint(pipe, return_diptych=True), before)


def test_unloading_a_fused_lora_keeps_the_module(base, trained):
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(trained.folder)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert not getattr(pipe.transformer, "peft_config", None)
    assert close_to(paint(pipe, semantic_image=picture(2)), trained.guided)


def test_two_adapters(base, trained, other):
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(trained.folder, adapter_name="first")
    pipe.load_lora_weights(other.folder, adapter_name="second")
    pipe.set_adapters("second")
    assert close_to(paint(pipe, semantic_image=picture(2)), other.guided)
    pipe.set_adapters("first")
    assert close_to(paint(pipe, return_diptych=True), trained.plain)
    pipe.set_adapters(["first", "second"], adapter_weights=[0.5, 0.5])
    mixed = paint(pipe, return_diptych=True)
    assert differs(mixed, trained.plain) and differs(mixed, other.plain)
    pipe.unload_lora_weights()
    assert is_plain(pipe)


def test_a_state_dict_loads_the_lora_only(base, trained):
    module = trained_like(5)
    pipe = make_pipe(base, own=True, semantic_attention=module)
    weights = safetensors.torch.load_file(trained.folder / LORA_FILE)
    pipe.load_lora_weights(weights)
    assert pipe.semantic_attention is module and pipe.transformer.peft_config


def test_loaded_modes(base, tmp_path):
    saved = Trained(base, tmp_path, seed=0, semantic_mode="in_context")
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(tmp_path)
    assert pipe.config.semantic_mode == "in_context" and pipe.semantic_attention is None
    assert close_to(paint(pipe, semantic_image=picture(2)), saved.guided)
    pipe.unload_lora_weights()
    assert pipe.config.semantic_mode == "cross_attention" and is_plain(pipe)


def test_a_lora_without_module_changes_nothing(base, trained, tmp_path):
    (tmp_path / LORA_FILE).write_bytes((trained.folder / LORA_FILE).read_bytes())
    module = trained_like(5)
    for pipe in (make_pipe(base, own=True), make_pipe(base, own=True, semantic_attention=module)):
        before = pipe.semantic_attention
        with pytest.raises(ValueError, match="`pretrained_model_name_or_path_or_dict` has to .*semantic_attention"):
            pipe.load_lora_weights(tmp_path)
        assert pipe.semantic_attention is before and not getattr(pipe.transformer, "peft_config", None)


@pytest.mark.parametrize("fault", ["shape", "file"])
def test_a_load_that_fails_midway_changes_nothing(base, trained, tmp_path, fault):
    trained.module.save_pretrained(tmp_path / "semantic_attention")
    weights = safetensors.torch.load_file(trained.folder / LORA_FILE)
    if fault == "shape":
        name = next(name for name in weights if "lora_B" in name)
        weights[name] = torch.zeros(7, weights[name].shape[1])
        safetensors.torch.save_file(weights, tmp_path / LORA_FILE)
    module = trained_like(5)
    pipe = make_pipe(base, own=True, semantic_attention=module)
    before = paint(pipe, semantic_image=picture(2))
    with pytest.raises((RuntimeError, ValueError, OSError)):
        pipe.load_lora_weights(tmp_path)
    assert pipe.semantic_attention is module and not getattr(pipe.transformer, "peft_config", None)
    assert torch.equal(paint(pipe, semantic_image=picture(2)), before)


def test_other_processes_save_nothing(trained, tmp_path):
    layers = {"lora_A": torch.zeros(1)}
    FluxFillSemanticPipeline.save_lora_weights(
        tmp_path / "out", layers, semantic_attention=trained.module, is_main_process=False
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({}, "semantic_attention"),
        ({"semantic_mode": "none", "semantic_attention": SemanticAttentionModel()}, "semantic_attention"),
        ({"semantic_mode": "both"}, "semantic_mode"),
    ],
)
def test_wrong_saves(tmp_path, wrong, named):
    with pytest.raises(ValueError, match=f"`{named}` has to be "):
        FluxFillSemanticPipeline.save_lora_weights(tmp_path / "out", {"lora_A": torch.zeros(1)}, **wrong)
    assert not (tmp_path / "out").exists()


# -- Wrong calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, named, came",
    [
        ({"semantic_mode": "both"}, "semantic_mode", "both"),
        ({"fusion_alpha": 1.5}, "fusion_alpha", "1.5"),
        ({"semantic_attention": torch.nn.Linear(1, 1)}, "semantic_attention", "Linear"),
        ({"semantic_attention": SemanticAttentionModel(in_channels=32)}, "semantic_attention", "32"),
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
        ({"height": 32}, "height", "32"),
        ({"height": 40, "width": 48}, "height", "40"),
        ({"height": 32, "width": 0}, "width", "0"),
        ({"latents": torch.zeros(1, 6, 64)}, "latents", "1, 6, 64"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt", "0"),
        ({"strength": 1.2}, "strength", "1.2"),
        ({"prompt": 3}, "prompt", "but is 3"),
        ({"prompt": None}, "prompt", "prompt_embeds"),
        ({"output_type": "jpg"}, "output_type", "jpg"),
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
        ("pixel_fusion", {"mask_image": picture(3)[:, :1]}, "mask_image"),
        ("in_context", {"mask_image": picture(3)[:, :1]}, "mask_image"),
    ],
)
def test_wrong_calls_in_other_modes(base, semantic_mode, wrong, named):
    with pytest.raises(ValueError, match=f"`{named}` was passed.*{semantic_mode}"):
        paint(make_pipe(base, semantic_mode=semantic_mode), **wrong)


def test_several_masked_pictures_and_images_per_prompt(base):
    masks = picture(3, batch=2)[:, :1]
    with pytest.raises(ValueError, match="`num_images_per_prompt` has to be 1 .* 2 "):
        paint(make_pipe(base), picture(1, batch=2), mask_image=masks, height=32, width=48, num_images_per_prompt=2)


@pytest.mark.parametrize("name", [LORA_FILE, "no/such/folder"])
def test_a_path_that_is_no_folder_is_named(base, tmp_path, name):
    (tmp_path / LORA_FILE).touch()
    # A name that could be a repository's is looked for on the Hub.
    with pytest.raises(ValueError, match=f"`pretrained_model_name_or_path_or_dict` has to be a folder.*{name}'"):
        make_pipe(base).load_lora_weights(tmp_path / name)


def test_a_hub_out_of_reach_is_not_a_missing_module(base, tmp_path):
    with pytest.raises(LocalEntryNotFoundError):
        make_pipe(base).load_lora_weights("user/not-cached", cache_dir=str(tmp_path), local_files_only=True)
