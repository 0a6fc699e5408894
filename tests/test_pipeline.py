# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The pipeline against `FluxFillPipeline` and the reference, and what it leaves behind."""

import copy
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import reference as ref
import torch
from diffusers import FirstBlockCacheConfig, FluxFillPipeline
from helpers import projection_layers, reference_layers
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

from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline
from semantic_attention import SemanticAttentionModel, SemanticProjectionModel


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


@torch.no_grad()
def test_a_scale_of_zero_equals_no_map_in_every_mode(base):
    for name, mode in SEMANTIC_MODES.items():
        if mode.uses_map:
            module = None if mode.module_class is None else trained_like(model_class=mode.module_class)
            pipe = make_pipe(base, semantic_attention=module, semantic_mode=name)
            assert torch.equal(paint(pipe, semantic_image=picture(2), semantic_scale=0), paint(pipe)), name


STOCK_CALL = inspect.signature(FluxFillPipeline.__call__).parameters


def test_the_stock_parameters_come_first_in_the_stock_order():
    ours = inspect.signature(FluxFillSemanticPipeline.__call__).parameters
    assert list(ours) == [*STOCK_CALL, "semantic_image", "semantic_scale", "return_diptych"]
    changed = {name for name in STOCK_CALL if ours[name].default != STOCK_CALL[name].default}
    # `None` means the number of tokens that the weights were trained with.
    assert changed == {"max_sequence_length"} and ours["max_sequence_length"].default is None
    own = [(ours[name].default) for name in ("semantic_image", "semantic_scale", "return_diptych")]
    assert own == [None, 1.0, False]


def test_takes_what_fill_pipeline_takes_by_position(base):
    given = {
        "prompt": "a hill",
        "image": to_pil(picture(1)),
        "mask_image": to_pil((picture(3) > 0.5).float()),
        # 40 is no multiple of 16, so the stock pipeline rounds it down.
        "height": 40,
        "width": 48,
        "num_inference_steps": STEPS,
        "output_type": "pt",
        "return_dict": False,
        "max_sequence_length": 16,
    }
    values = [given.get(name, parameter.default) for name, parameter in STOCK_CALL.items() if name != "self"]
    pipe = make_pipe(base, semantic_attention=trained_like())
    results = []
    for each in (base, pipe):
        torch.manual_seed(0)
        results.append(each(*values)[0])
    assert torch.equal(*results) and results[0].shape[-2:] == (32, 48)
    torch.manual_seed(0)
    assert differs(pipe(*values, picture(2))[0], results[0], by=1e-4)


@pytest.mark.parametrize("batch, prompts, num_images_per_prompt", [(2, 4, 1), (2, 2, 2), (1, 2, 2)])
def test_fills_batches_as_fill_pipeline_does(base, batch, prompts, num_images_per_prompt):
    kwargs = {
        "prompt": [f"hill {number}" for number in range(prompts)],
        "image": picture(1, batch=batch),
        "mask_image": (picture(3, batch=batch) > 0.5)[:, :1].float(),
        "height": 32,
        "width": 48,
        "num_images_per_prompt": num_images_per_prompt,
    }
    assert torch.equal(paint(make_pipe(base, semantic_attention=trained_like()), **kwargs), paint(base, **kwargs))


STOCK_CALLS = {
    "a lone width": {"height": None, "width": 32},
    "sizes off the grid": {"height": 40, "width": 57},
    "no size": {"height": 0, "width": 16},
    "one prompt for two pictures": {"image": picture(1, batch=2), "num_images_per_prompt": 2},
    "one mask for two pictures": {"image": picture(1, batch=2), "prompt": ["a hill", "the sea"]},
    "one picture for two prompts": {"prompt": ["a hill", "the sea"], "num_images_per_prompt": 2},
    "lists of batches": {"image": [picture(1), picture(2)], "prompt": ["a hill", "the sea"]},
    "numpy": {"image": picture(1)[0].movedim(0, -1).numpy(), "mask_image": picture(3)[0, 0].numpy()},
    "values from -1": {"image": picture(1) * 2 - 1},
    "no token": {"max_sequence_length": 0},
    "prompt_2, strength and sigmas": {"prompt_2": "the sea", "strength": 0.6, "sigmas": [1.0, 0.7, 0.2]},
    "latents": {"latents": torch.ones(1, 6, 64), "output_type": "latent"},
    "gray masks of many levels": {
        "mask_image": PIL.Image.fromarray(np.arange(48 * 32, dtype=np.int32).reshape(32, 48))
    },
    "masks of 16 bits": {"mask_image": PIL.Image.fromarray(np.arange(48 * 32, dtype=np.uint16).reshape(32, 48))},
}


@pytest.mark.parametrize("name", STOCK_CALLS)
def test_every_call_of_fill_pipeline_gives_the_same(base, name):
    given = {"mask_image": (picture(3) > 0.5)[:, :1].float(), "height": 32, "width": 48, "num_inference_steps": 3}
    given |= STOCK_CALLS[name]
    ours, stock = (paint(each, **given) for each in (make_pipe(base, semantic_attention=trained_like()), base))
    assert torch.equal(ours, stock)


def test_masked_image_latents_reach_fill_pipeline(base):
    # diffusers 0.42 accepts them with no picture only and then fails without one; the error is the same here.
    for pipe in (base, make_pipe(base)):
        with pytest.raises(ValueError, match="`image` or `masked_image_latents`"):
            paint(pipe, masked_image_latents=torch.zeros(1, 6, 320))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA"])
def test_masks_keep_their_mode(base, mode):
    image, mask = to_pil(picture(1)), to_pil((picture(3) > 0.5).float()).convert(mode)
    size = {"mask_image": mask, "height": 48, "width": 32}
    assert torch.equal(paint(make_pipe(base), image, **size), paint(base, image, **size))


def test_a_trained_module_changes_the_picture(base):
    module = SemanticAttentionModel()
    torch.nn.init.constant_(module.layers[0].scale, 0.5)
    pipe = make_pipe(base, semantic_attention=module)
    without = paint(pipe, output_type="latent")
    guided = paint(pipe, semantic_image=picture(2), output_type="latent")
    assert differs(guided, without)
    assert differs(paint(pipe, semantic_image=picture(3), output_type="latent"), guided, by=1e-4)
    assert differs(
        paint(pipe, semantic_image=picture(2), semantic_scale=np.float32(0.3), output_type="latent"), guided
    )


# -- What is injected -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("height, width", [(32, 48), (64, 16)])
@pytest.mark.parametrize("kind", ["none", "rope", "projection"])
def test_a_whole_call_equals_the_reference(base, posterior_mode, height, width, kind):
    visible, semantic = picture(1, height, width), picture(2, height, width)
    rows, columns = height // 16, width // 16
    if kind == "projection":
        module = trained_like(model_class=SemanticProjectionModel, num_layers=2)
    else:
        module = trained_like(num_layers=2, position=kind)
    pipe = make_pipe(base, semantic_attention=module)
    with watched(pipe.transformer) as (passed, fed):
        latents = paint(
            pipe, visible, semantic_image=semantic, semantic_scale=0.8, output_type="latent", return_diptych=True
        )

    canvas, mask = diptych_of(visible * 2 - 1)
    x_cond = ref.condition(pipe.vae, canvas, mask)
    semantic_tokens = ref.encode_semantic(pipe.vae, semantic * 2 - 1)
    positions = ref.panel_positions(rows, columns) if kind == "rope" else None
    prompt_embeds, pooled_prompt_embeds, _ = pipe.encode_prompt("a hill", max_sequence_length=16)
    x_1 = ref.pack(torch.randn(1, 16, 2 * rows, 4 * columns, generator=seeded()))

    x_cond_enhanced = x_cond
    if kind == "projection":
        x_cond_enhanced = ref.project(x_cond, semantic_tokens, projection_layers(module), strength=0.8)

    def enhance(x):
        if kind == "projection":
            return x
        return ref.enhance(x, semantic_tokens, reference_layers(module), positions=positions, strength=0.8)

    def predict(x, t):
        ids = ref.image_ids(rows, 2 * columns)
        return ref.predict(
            pipe.transformer, x, x_cond_enhanced, t, prompt_embeds, pooled_prompt_embeds, ids, guidance=30.0
        )

    close = {"rtol": 1e-4, "atol": 1e-4}
    assert len(passed) == len(fed) == STEPS
    for before, after in zip(passed, fed):
        torch.testing.assert_close(before[..., 64:], x_cond, **close)
        torch.testing.assert_close(after[..., 64:], x_cond_enhanced, **close)
        torch.testing.assert_close(after[..., :64], enhance(before[..., :64]), **close)
        same, changed = (slice(0, 64), slice(64, 128)) if kind == "projection" else (slice(64, 384), slice(0, 64))
        assert torch.equal(after[..., same], before[..., same]) and differs(
            after[..., changed], before[..., changed], 0.1
        )
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


def test_two_threads_paint_with_one_transformer(base):
    pipes = [make_pipe(base, semantic_attention=trained_like(seed)) for seed in (0, 1)]
    # A scheduler counts the steps of one call.
    pipes[1].register_modules(scheduler=copy.deepcopy(base.scheduler))
    expected = [paint(pipe, semantic_image=picture(2)) for pipe in pipes]
    step = threading.Barrier(2, timeout=60)

    def meet(*args):
        step.wait()
        return {}

    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(paint, p, semantic_image=picture(2), callback_on_step_end=meet) for p in pipes]
    for call, picture_alone in zip(calls, expected):
        assert not differs(call.result(), picture_alone)


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


def test_a_compiled_module_is_saved_as_what_it_is(base, tmp_path):
    pipe = make_pipe(base, semantic_attention=torch.compile(trained_like(), backend="eager"))
    pipe.save_pretrained(tmp_path)
    saved = FluxFillSemanticPipeline.from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    assert not differs(paint(saved, semantic_image=picture(2)), paint(pipe, semantic_image=picture(2)))


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
