# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Causal attention of prompt and visible view: the same as one masked forward, trained in one step and painted with once."""

import copy
import json
import threading
import weakref

import accelerate
import convert_lora
import pytest
import safetensors.torch
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from helpers import LORA_FILE
from pipeline_helpers import Trained, differs, make_pipe, paint, picture, seeded, trained_like

from pipeline_flux_fill_semantic import panel_positions, read_trained_settings, tile_across_panels
from semantic_attention import (
    SemanticAttentionModel,
    SemanticProjectionModel,
    causal_forward,
    forget_visible,
    join_panels,
    show_condition,
    split_panels,
    use_causal_attention,
)
from semantic_fill.precision import blocks_of, quantize_blocks


ROWS, COLUMNS, TEXT = 2, 3, 4
CAUSAL = {"visible_attention": "causal", "semantic_mode": "none"}


# -- The plain forward ------------------------------------------------------------------------------------------------


class PerToken(torch.Tensor):
    """An embedding `(batch, tokens, channels)` that stands where FLUX's blocks expect one for all tokens."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.unsqueeze):
            # The dimension of the tokens, which is there already.
            return args[0]
        if function in (torch.Tensor.chunk, torch.chunk):
            return super().__torch_function__(function, types, args[:2], {"dim": -1})
        result = super().__torch_function__(function, types, args, kwargs or {})
        # What comes of other activations is one of them.
        others = [
            arg for arg in args if isinstance(arg, torch.Tensor) and not isinstance(arg, cls | torch.nn.Parameter)
        ]
        return result.as_subclass(torch.Tensor) if others else result


def inputs_of(base, batch: int = 2) -> dict:
    """A transformer's inputs for a diptych."""
    torch.manual_seed(0)
    config, tokens = base.transformer.config, 2 * ROWS * COLUMNS
    return {
        "hidden_states": torch.randn(batch, tokens, config.in_channels),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 3.0),
        "pooled_projections": torch.randn(batch, config.pooled_projection_dim),
        "encoder_hidden_states": torch.randn(batch, TEXT, config.joint_attention_dim),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(float(ROWS)), torch.arange(2.0 * COLUMNS)),
        "return_dict": False,
    }


def masked_forward(transformer, inputs: dict) -> torch.Tensor:
    """
    FLUX's own forward over the prompt and the whole diptych, with an attention mask and a timestep for each token: prompt
    and visible view see each other alone, at t = 0, and the target sees everything.
    """
    seen = torch.arange(2 * COLUMNS).lt(COLUMNS).repeat(ROWS)
    is_kept = torch.cat((torch.ones(TEXT, dtype=torch.bool), seen))
    mask = ~is_kept[:, None] | is_kept[None]
    embed, t = transformer.time_text_embed, inputs["timestep"]
    more = (inputs["guidance"] * 1000, inputs["pooled_projections"])
    at_t, at_zero = embed(t * 1000, *more), embed(torch.zeros_like(t), *more)
    temb = torch.where(is_kept[None, :, None], at_zero[:, None], at_t[:, None])
    parts = {"norm1_context": slice(0, TEXT), "norm1": slice(TEXT, None), "norm": slice(None)}

    def choose(part):
        def hook(module, args, kwargs):
            return args[:1], {"emb": temb[:, part].as_subclass(PerToken)}

        return hook

    handles = [
        getattr(block, name).register_forward_pre_hook(choose(part), with_kwargs=True)
        for block in blocks_of(transformer)
        for name, part in parts.items()
        if hasattr(block, name)
    ]
    last = temb[:, TEXT:].as_subclass(PerToken)
    handles.append(transformer.norm_out.register_forward_pre_hook(lambda _, args: (args[0], last)))
    try:
        return transformer(**inputs, joint_attention_kwargs={"attention_mask": mask[None, None]})[0]
    finally:
        for handle in handles:
            handle.remove()


def target_gradients(transformer, velocity: torch.Tensor, shown: torch.Tensor) -> dict[str, torch.Tensor]:
    target = split_panels(velocity, COLUMNS)[1]
    wanted = {"input": shown} | dict(transformer.named_parameters())
    loss = (target * torch.linspace(-1, 1, target.numel()).view_as(target)).sum()
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)))


@pytest.fixture
def transformer(base):
    """A copy whose biases and norms are away from where they start, so that all of them matter."""
    transformer = copy.deepcopy(base.transformer)
    torch.manual_seed(1)
    for parameter in transformer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return transformer


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_two_passes_equal_one_masked_forward(base, transformer, backend):
    inputs = inputs_of(base)
    shown = show_condition(inputs.pop("hidden_states"), COLUMNS).requires_grad_()
    expected = masked_forward(transformer, inputs | {"hidden_states": shown})
    gradients = target_gradients(transformer, expected, shown)
    plain = transformer(**inputs | {"hidden_states": shown})[0]
    use_causal_attention(transformer)
    # Calls without a view are FLUX's own.
    assert torch.equal(transformer(**inputs | {"hidden_states": shown})[0], plain)
    if backend is not None:
        transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    with torch.no_grad():
        (alone,) = causal_forward(transformer, shown, COLUMNS, visible_gradients=False, **inputs)
    torch.testing.assert_close(*(split_panels(v, COLUMNS)[1] for v in (alone, expected)), rtol=1e-4, atol=1e-5)
    (velocity,) = causal_forward(transformer, hidden_states=shown, columns=COLUMNS, **inputs)
    torch.testing.assert_close(*(split_panels(v, COLUMNS)[1] for v in (velocity, expected)), rtol=1e-4, atol=1e-5)
    assert not split_panels(velocity, COLUMNS)[0].any() and differs(velocity, plain)
    found = target_gradients(transformer, velocity, shown)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=lambda text: f"{name}: {text}")
    # The visible view matters, also to the gradients.
    assert split_panels(found["input"], COLUMNS)[0].abs().max() > 1e-3
    assert all(processor.kept for processor in processors_of(transformer))
    forget_visible(transformer)
    assert not any(processor.kept for processor in processors_of(transformer))


# -- Painting ---------------------------------------------------------------------------------------------------------


def make_causal(base, own: bool = False, **kwargs):
    return make_pipe(base, own=own, **CAUSAL | kwargs)


def processors_of(transformer) -> list:
    return [block.attn.processor for block in blocks_of(transformer)]


@pytest.mark.parametrize("mode", ["none", "projection", "cross_attention"])
def test_painting_sees_the_visible_view_once(base, mode):
    """Each step's velocity is that of both passes together, and the visible view ends without noise."""
    model_class = {"projection": SemanticProjectionModel, "cross_attention": SemanticAttentionModel}.get(mode)
    module = None if model_class is None else trained_like(model_class=model_class)
    pipe = make_causal(base, semantic_mode=mode, semantic_attention=module)
    guide = {} if module is None else {"semantic_image": picture(2)}
    noise, calls, latents = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0)), [], []

    def note(pipe, step, timestep, values):
        latents.append(values["latents"])
        return values

    handle = base.transformer.register_forward_pre_hook(lambda _, a, kw: calls.append(dict(kw)), with_kwargs=True)
    paint(pipe, output_type="latent", num_inference_steps=3, latents=noise, callback_on_step_end=note, **guide)
    handle.remove()
    visible = calls[0].pop("hidden_states")
    assert len(calls) == 4 and visible.shape[1] == 6 and not calls[0]["timestep"].any()
    assert calls[0]["encoder_hidden_states"].shape[1] > 0

    # What is seen is without noise, and enhanced as on the whole diptych.
    clean, mask = visible[..., :64] if mode == "projection" else visible[..., 64:128], visible[..., 128:]
    plain = torch.cat((clean, clean, mask), dim=-1)
    if module is not None:
        tokens = tile_across_panels(pipe.encode_semantic(picture(2)), ROWS, COLUMNS, 2)
        with torch.no_grad():
            plain = module.enhance(join_panels(plain, plain, COLUMNS), tokens, panel_positions(ROWS, COLUMNS, 2))
        plain = split_panels(plain, COLUMNS)[0]
    torch.testing.assert_close(visible, plain)
    transformer, sigmas = copy.deepcopy(base.transformer), pipe.scheduler.sigmas
    use_causal_attention(transformer)
    for i, call in enumerate(calls[1:]):
        whole = join_panels(visible, call.pop("hidden_states"), COLUMNS)
        call["img_ids"] = join_panels(calls[0]["img_ids"][None], call["img_ids"][None], COLUMNS)[0]
        assert call["encoder_hidden_states"].shape[1] == call["txt_ids"].shape[0] == 0 < call["timestep"].min()
        assert call.pop("joint_attention_kwargs") == {"view": "target"}
        call |= {name: calls[0][name] for name in ("encoder_hidden_states", "txt_ids")}
        with torch.no_grad():
            (expected,) = causal_forward(transformer, hidden_states=whole, columns=COLUMNS, **call)
        velocity = (latents[i] - [noise, *latents][i]) / (sigmas[i + 1] - sigmas[i])
        torch.testing.assert_close(*(split_panels(v, COLUMNS)[1] for v in (velocity, expected)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(split_panels(latents[-1], COLUMNS)[0], clean, rtol=1e-4, atol=1e-4)


def test_pictures_of_a_batch_are_painted_as_alone(base):
    pipe = make_causal(base)
    images = torch.cat((picture(1), picture(3)))
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    painted = paint(pipe, images, num_images_per_prompt=2, generator=generators)
    for i, picture_of in enumerate((1, 1, 3, 3)):
        alone = paint(pipe, picture(picture_of), generator=torch.Generator().manual_seed(i))
        assert not differs(painted[[i]], alone, 1e-4)
    assert differs(painted[[0]], painted[[1]])


def test_causal_paints_another_picture_than_joint_and_leaves_no_trace(base):
    joint, pipe = make_pipe(base), make_causal(base)
    before, processors = paint(joint), processors_of(base.transformer)
    assert differs(paint(pipe), before)

    kept = []

    def fail(*args):
        kept.extend(weakref.ref(x) for processor in processors_of(base.transformer) for x in processor.kept)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        paint(pipe, callback_on_step_end=fail)
    assert len(kept) == 4 and not any(tensor() is not None for tensor in kept)
    assert all(now is then for now, then in zip(processors_of(base.transformer), processors))
    assert not base.transformer._forward_hooks and not base.transformer._forward_pre_hooks
    assert torch.equal(paint(joint), before)


def test_caches_of_steps_and_compiled_blocks(base):
    pipe = make_causal(base, own=True)
    plain = paint(pipe, num_inference_steps=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    assert not differs(paint(pipe, num_inference_steps=4), plain, 1e-5)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10))
    skipped = paint(pipe, num_inference_steps=4)
    assert differs(skipped, plain, 1e-5)
    # Nothing of a call is left for the next one.
    assert torch.equal(paint(pipe, num_inference_steps=4), skipped)
    pipe.transformer.compile_repeated_blocks(backend="aot_eager")
    assert not differs(paint(pipe, num_inference_steps=4), skipped, 1e-4)
    pipe.transformer.disable_cache()
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert not differs(paint(pipe, num_inference_steps=4), plain, 1e-4)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    paint(pipe, num_inference_steps=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """A picture of packed latents of one panel."""
    grid = latents.unflatten(1, (ROWS, COLUMNS)).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
    grid = grid.flatten(4, 5).flatten(2, 3) / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        return (vae.decode(grid).sample / 2 + 0.5).clamp(0, 1)


def test_the_vae_sees_the_target_alone(base):
    pipe, target = make_causal(base), picture(4)
    diptych, mask = pipe.prepare_diptych(picture(1), target)
    moments, masked_moments = pipe.encode_moments(diptych, mask)
    with torch.no_grad():
        gray = torch.cat((2 * picture(1) - 1, torch.zeros_like(target)), dim=3)
        expected = [base.vae.encode(x).latent_dist.parameters for x in (2 * target - 1, gray)]
    visible, painted = moments.chunk(2, dim=3)
    torch.testing.assert_close(painted, expected[0])
    torch.testing.assert_close(masked_moments, expected[1])
    assert torch.equal(visible, masked_moments.chunk(2, dim=3)[0])

    latents = paint(pipe, output_type="latent", return_diptych=True)
    panels = split_panels(latents, COLUMNS)
    assert torch.equal(paint(pipe, output_type="latent"), panels[1])
    expected = [decode(base.vae, panel) for panel in panels]
    torch.testing.assert_close(paint(pipe), expected[1])
    torch.testing.assert_close(paint(pipe, return_diptych=True), torch.cat(expected, dim=3))
    pictures = paint(pipe, output_type="pil")
    assert [p.size for p in pictures] == [(expected[1].shape[3], expected[1].shape[2])]


@pytest.mark.parametrize("precision", ["fp8", "int8", "int8mm", "nf4"])
def test_quantized_bases_paint(base, precision):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    pipe = make_causal(base, own=True)
    expected = paint(pipe)
    quantize_blocks(pipe.transformer, precision)
    found = paint(pipe)
    assert differs(found, expected, 1e-6) and not differs(found, expected, 0.1)


def test_offloaded_parts_paint_the_same(base):
    cpu = torch.device("cpu")
    expected = paint(make_causal(base))
    grouped = make_causal(base, own=True)
    grouped.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    streamed = make_causal(base, own=True)
    accelerate.cpu_offload(streamed.transformer, cpu)
    for pipe in (grouped, streamed):
        assert not differs(paint(pipe), expected, 1e-4)


def test_attention_maps_and_settings_of_a_call(base):
    module = trained_like()
    pipe = make_causal(base, semantic_mode="cross_attention", semantic_attention=module)
    call = {"semantic_image": picture(2), "num_inference_steps": 2, "strength": 0.8}
    call["joint_attention_kwargs"] = {"scale": 1.0}
    look = {"image": picture(1), "prompt": "a hill", "output_type": "pt", "max_sequence_length": 16}
    seen = pipe.semantic_attention_maps(points=[(8, 8)], generator=seeded(), **look, **call)
    assert torch.equal(seen.images, paint(pipe, **call))
    assert seen.maps.shape[-2:] == (ROWS, COLUMNS) and abs(seen.maps[0, 0, 0].sum() - 1) < 1e-4


def test_other_threads_are_left_alone_and_wait_for_their_turn(base):
    """A joint painting in the middle of a causal one, and a causal one that begins meanwhile."""
    joint, pipe, other = make_pipe(base), make_causal(base), make_causal(base)
    for each in (joint, other):
        # It knows the step of one painting.
        each.scheduler = copy.deepcopy(base.scheduler)
    expected, apart = paint(joint), paint(pipe)
    painted, threads = [], []

    def meanwhile(pipe, step, timestep, values):
        if not threads:
            threads.extend(threading.Thread(target=lambda p=p: painted.append(paint(p))) for p in (joint, other))
            for thread in threads:
                thread.start()
            threads[0].join()
        return values

    assert torch.equal(paint(pipe, callback_on_step_end=meanwhile), apart)
    threads[1].join()
    assert torch.equal(painted[0], expected) and torch.equal(painted[1], apart)


# -- Adapters ---------------------------------------------------------------------------------------------------------


def test_the_pipeline_follows_a_loras_choice(base, tmp_path):
    causal = Trained(base, tmp_path / "causal", 0, "projection", visible="causal")
    joint = Trained(base, tmp_path / "joint", 1, "projection")
    assert read_trained_settings(causal.folder)["visible_attention"] == "causal"
    assert "visible_attention" not in read_trained_settings(joint.folder)
    pipe = make_pipe(base, own=True)
    plain = paint(pipe)
    for name, trained in (("causal", causal), ("joint", joint)):
        pipe.load_lora_weights(trained.folder, adapter_name=name)
        assert pipe.config.visible_attention == name
        assert not differs(paint(pipe, semantic_image=picture(2)), trained.guided, 1e-4)
    several = Trained(base, tmp_path / "several", 2, "projection", ("roads", "water"), "causal")
    pipe.load_lora_weights(several.folder, adapter_name="several")
    assert not differs(paint(pipe, semantic_image=[picture(2), picture(3)]), several.guided, 1e-4)
    pipe.set_adapters(["causal", "joint"])
    with pytest.raises(ValueError, match=r"different canvases, .*target, causal.* and"):
        paint(pipe)
    pipe.set_adapters("causal")
    canvas = torch.cat((picture(1), picture(1)), dim=3)
    with pytest.raises(ValueError, match='`mask_image` cannot go with `visible_attention="causal"`'):
        paint(pipe, canvas, mask_image=canvas[:, :1].round())
    pipe.save_pretrained(tmp_path / "saved")
    saved = type(pipe).from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    assert not differs(paint(saved, semantic_image=picture(2)), causal.guided, 1e-3)
    pipe.disable_lora()
    assert torch.equal(paint(pipe), plain)
    # What other programs read, they would paint as if it were joint.
    with pytest.raises(ValueError, match='trained with `visible_attention="causal"`. Programs that read'):
        convert_lora.convert_file(causal.folder / LORA_FILE, tmp_path / "converted.safetensors")


def test_choices_that_cannot_be_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"`visible_attention` has to be one of .* but is 'other'"):
        make_causal(base, visible_attention="other")
    with pytest.raises(ValueError, match='needs a canvas of two panels, unlike `semantic_mode="in_context"`'):
        make_causal(base, semantic_mode="in_context")
    trained = Trained(base, tmp_path, 0, "none", visible="causal")
    weights = safetensors.torch.load_file(tmp_path / LORA_FILE)
    said = json.dumps({"semantic_mode": "none", "visible_attention": "once"})
    safetensors.torch.save_file(weights, tmp_path / LORA_FILE, metadata={"format": "pt", "semantic_fill": said})
    with pytest.raises(ValueError, match="`visible_attention` has to be one of .* but is 'once'"):
        make_pipe(base, own=True).load_lora_weights(trained.folder)
    pipe = make_causal(base, own=True)
    pipe.transformer.transformer_blocks[0].attn.set_processor(type("Other", (FluxAttnProcessor,), {})())
    with pytest.raises(ValueError, match="replaces FLUX's own attention processors, but `transformer_blocks.0"):
        paint(pipe)
