# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The way of a batch, against the independent reference, and what training does to the parameters."""

import argparse
import contextlib
import gc
import json
import logging
import threading
from pathlib import Path

import datasets
import PIL.Image
import pytest
import reference
import safetensors.torch
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ROOT, draw_triptych, reference_layers, write_triptychs
from diffusers import FluxFillPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5TokenizerFast

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline


LORA_FILE = "pytorch_lora_weights.safetensors"
MODULE_FILE = "semantic_attention/diffusion_pytorch_model.safetensors"


def arguments(base_folder, output_dir, *more, data=None, resolution=32):
    options = f"--pretrained_model_name_or_path {base_folder} --output_dir {output_dir} --resolution {resolution}"
    options += " --rank 4 --max_sequence_length 16 --train_batch_size 2 --report_to none --mixed_precision no"
    options += f" --train_data_dir {data}" if data else ""
    return trainer.parse_args([*options.split(), *map(str, more)])


def fresh_state() -> None:
    """Accelerate's state is a singleton, so each run starts with a fresh one."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(*args, **kwargs) -> Path:
    """A whole run in this process."""
    fresh_state()
    parsed = arguments(*args, **kwargs)
    trainer.main(parsed)
    return Path(parsed.output_dir)


def build(args, dtype=torch.float32):
    """Model, step function and samples of a run, without its loop."""
    device = torch.device("cpu")
    dataset = trainer.TriptychDataset(trainer.load_rows(args), args)
    pipeline = trainer.load_encoders(args, device, dtype)
    encoder = trainer.Encoder(pipeline, dataset, args)
    torch.manual_seed(0)
    model = trainer.build_model(args, device, dtype)
    tokens = encoder.mask.shape[-2] * encoder.mask.shape[-1] // 256
    shift = trainer.timestep_shift_factor(args, pipeline.scheduler, tokens)
    guidance_embeds = model.transformer.config.guidance_embeds
    step = trainer.Step(encoder, args, device, dtype, shift, guidance_embeds)
    draws = next(iter(trainer.RunSampler(len(dataset), args, 0, 1, 0)))
    return model, step, [encoder.read(d) for d in draws]


def test_collections_look_past_what_was_built_while_steps_run(base_folder, triptych_folder, tmp_path, monkeypatch):
    frozen, loss = [], trainer.Step.loss

    def watched(step, *args):
        frozen.append(gc.get_freeze_count() > 0)
        return loss(step, *args)

    monkeypatch.setattr(trainer.Step, "loss", watched)
    run(base_folder, tmp_path, "--max_train_steps", 4, data=triptych_folder)
    assert frozen == [False, False, True, True]
    assert gc.get_freeze_count() == 0


def weights_of(folder, file=LORA_FILE):
    return safetensors.torch.load_file(Path(folder, file))


def assert_same_weights(a, b):
    for file in (LORA_FILE, MODULE_FILE):
        first, second = weights_of(a, file), weights_of(b, file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("region", ["diptych", "target"])
@pytest.mark.parametrize("height, width", [(32, 32), (48, 64)])
@pytest.mark.parametrize("position", ["none", "rope"])
def test_step_equals_reference(base_folder, tmp_path, height, width, position, region):
    data = write_triptychs(tmp_path / "data", 2, height, width)
    more = ["--width", width, "--semantic_position", position, "--loss_region", region, "--no-cache_latents"]
    args = arguments(base_folder, tmp_path / "out", *more, data=data, resolution=height)
    model, step, samples = build(args)
    for layer in model.semantic_attention.layers:
        torch.nn.init.normal_(layer.scale, std=0.3)
    # The reference takes the posterior's mode; a posterior without spread makes the trainer's draw the same.
    vae, encode_moments = step.encoder.pipeline.vae, step.encoder.pipeline.encode_moments

    def without_spread(diptych, mask):
        return tuple(
            torch.cat([m.chunk(2, 1)[0], torch.full_like(m.chunk(2, 1)[1], -30)], 1)
            for m in encode_moments(diptych, mask)
        )

    step.encoder.pipeline.encode_moments = without_spread
    seen = {}

    def keep(module, positional, kwargs):
        seen.update(kwargs)

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    inner = {}
    model.transformer.register_forward_pre_hook(lambda m, a, kwargs: inner.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        loss = step(model, samples)
    handle.remove()

    triptychs = [PIL.Image.open(data / f"{s['draws'].index:03d}.png") for s in samples]
    pixels = torch.stack(
        [torch.tensor(list(t.convert("RGB").tobytes())).view(height, 3 * width, 3) for t in triptychs]
    )
    visible, target, semantic = reference.cut_triptych(pixels.permute(0, 3, 1, 2) / 127.5 - 1)
    diptych = reference.make_diptych(visible, target)
    mask = reference.make_mask(diptych)
    with torch.no_grad():
        x_0 = reference.pack(reference.encode_image(vae, diptych))
        x_cond = reference.condition(vae, diptych, mask)
        tokens = reference.encode_semantic(vae, semantic)
    rows, columns = height // 16, width // 16
    torch.testing.assert_close(seen["x_cond"], x_cond, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen["semantic_tokens"], tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen["img_ids"], reference.image_ids(rows, 2 * columns))

    # x_t = (1 - t) x_0 + t x_1 gives the noise that the step drew.
    t = seen["t"]
    assert ((t > 0) & (t < 1)).all()
    x_1 = (seen["x_t"] - (1 - t)[:, None, None] * x_0) / t[:, None, None]
    assert 0.7 < x_1.std() < 1.3
    layers = reference_layers(model.semantic_attention)
    positions = reference.panel_positions(rows, columns) if position == "rope" else None
    with torch.no_grad():
        enhanced = reference.enhance(seen["x_t"], tokens, layers, positions=positions)
        torch.testing.assert_close(inner["hidden_states"], torch.cat([enhanced, x_cond], 2), atol=1e-4, rtol=1e-4)
        pred = reference.predict(
            model.transformer,
            enhanced,
            x_cond,
            t,
            seen["prompt_embeds"],
            seen["pooled_prompt_embeds"],
            seen["img_ids"],
            guidance=1.0,
        )
        expected = reference.loss(pred, x_0, x_1, rows, columns, region)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    assert not torch.equal(seen["x_t"], enhanced)


class NoWaiting(TorchDispatchMode):
    """Refuses what has the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a boolean mask"
        assert func not in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("region", ["diptych", "target"])
def test_the_loss_does_not_wait_for_the_device(base_folder, triptych_folder, tmp_path, region):
    args = arguments(base_folder, tmp_path, "--loss_region", region, "--no-cache_latents", data=triptych_folder)
    model, step, samples = build(args)
    batch = step.prepare(samples)
    with NoWaiting():
        step.loss(model, batch).backward()


@pytest.mark.parametrize("option, expected", [("none", 0.25), ("3.0", 0.5), ("resolution", None)])
def test_timestep_shift_is_that_of_inference(base_folder, option, expected):
    args = arguments(base_folder, "unused", "--timestep_shift", option, data="unused")
    scheduler = FluxFillPipeline.from_pretrained(base_folder).scheduler
    shift = trainer.timestep_shift_factor(args, scheduler, tokens=2048)
    shifted = shift * 0.25 / (1 + (shift - 1) * 0.25)
    if expected is None:
        expected = reference.shift_timestep(torch.tensor(0.25, dtype=torch.float64), 2048).item()
    assert shifted == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("settings", [{}, {"time_shift_type": "linear"}, {"use_dynamic_shifting": False}])
def test_timestep_shift_is_that_of_the_scheduler(base_folder, settings):
    args = arguments(base_folder, "unused", data="unused")
    scheduler = FluxFillPipeline.from_pretrained(base_folder).scheduler
    scheduler = type(scheduler).from_config(scheduler.config, **settings)
    config = scheduler.config
    mu = calculate_shift(
        2048, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=[0.25], mu=mu)
    shift = trainer.timestep_shift_factor(args, scheduler, tokens=2048)
    assert shift * 0.25 / (1 + (shift - 1) * 0.25) == pytest.approx(scheduler.sigmas[0].item(), rel=1e-6)


@pytest.fixture(scope="module")
def finer(base, base_folder, tmp_path_factory):
    """The tiny FLUX Fill with a VAE whose latents are 4 times smaller than the picture instead of 8."""
    folder = tmp_path_factory.mktemp("finer")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = type(base.vae).from_config(base.vae.config, **blocks, block_out_channels=(8, 8, 16))
    transformer = type(base.transformer).from_config(
        base.transformer.config, in_channels=2 * 64 + 4 * 4**2, out_channels=64, guidance_embeds=False
    )
    type(base)(**{**base.components, "vae": vae, "transformer": transformer}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("mode", SEMANTIC_MODES)
def test_another_factor_of_the_vae_and_no_guidance_embedding(finer, triptych_folder, tmp_path, mode, caplog):
    caplog.set_level(logging.INFO, logger="train_semantic_fill_lora")
    options = ["--max_train_steps", 1, "--loss_region", "target", "--semantic_mode", mode]
    options += ["--validation_steps", 1, "--validation_inference_steps", 1, "--num_validation_images", 1]
    out = run(finer, tmp_path, *options, data=triptych_folder)
    assert (out / "samples" / "step-000001.png").is_file()
    # A panel of 32x32 pixels has 4x4 tokens of 8x8.
    assert f"{16 * len(SEMANTIC_MODES[mode].panels)} image tokens" in caplog.text


@pytest.mark.parametrize("mode", SEMANTIC_MODES)
def test_gradients_reach_lora_and_module_only(base_folder, triptych_folder, tmp_path, mode):
    args = arguments(base_folder, tmp_path, "--semantic_mode", mode, "--no-cache_latents", data=triptych_folder)
    model, step, samples = build(args)
    step(model, samples).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    lora = {name for name, _ in model.named_parameters() if ".lora_" in name}
    module = {name for name, _ in model.named_parameters() if name.startswith("semantic_attention.")}
    assert with_gradient == lora | module
    assert bool(module) == SEMANTIC_MODES[mode].attends
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    # LoRA's B matrices and the gate start at zero: they alone have a slope at first.
    moving = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moving == {n for n in lora if ".lora_B." in n} | {n for n in module if n.endswith(".scale")}
    groups = {group["name"]: group["lr"] for group in trainer.parameter_groups(model, args)}
    assert groups == ({"lora": 1e-4, "module": 1e-4, "scale": pytest.approx(1e-3)} if module else {"lora": 1e-4})


@pytest.mark.parametrize(
    "injection, position", [("noise", "none"), ("noise", "rope"), ("condition", "aligned"), ("condition", "direct")]
)
def test_trainer_and_pipeline_inject_the_same(
    base_folder, triptych_folder, tmp_path, monkeypatch, injection, position
):
    # The draws from the VAE's posterior differ.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    more = ["--semantic_injection", injection, "--semantic_position", position]
    args = arguments(base_folder, tmp_path, "--no-cache_latents", *more, data=triptych_folder)
    model, step, samples = build(args)
    torch.nn.init.normal_(model.semantic_attention.layers[0].scale)
    seen, hidden = {}, []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.update(kwargs), with_kwargs=True)
    # Inside the transformer, so after whatever enhances its input.
    model.transformer.x_embedder.register_forward_pre_hook(lambda m, inputs: hidden.append(inputs[0]))
    with torch.no_grad():
        step(model, samples)
    source = step.encoder.pipeline
    pipe = FluxFillSemanticPipeline(**source.components | {"transformer": model.transformer})
    pipe.semantic_attention = model.semantic_attention
    views = [sample["views"] for sample in samples]
    pipe(
        prompt=[sample["prompt"] for sample in samples],
        image=torch.stack([v["visible"] for v in views]),
        semantic_image=torch.stack([v["semantic"] for v in views]),
        latents=seen["x_t"],
        num_inference_steps=1,
        max_sequence_length=16,
        output_type="latent",
    )
    trained, painted = hidden
    torch.testing.assert_close(painted, trained, rtol=1e-4, atol=1e-4)
    plain = torch.cat((seen["x_t"], seen["x_cond"]), dim=-1)
    assert not torch.allclose(painted, plain, atol=1e-2)


def test_overfits_one_triptych(tmp_path):
    """The trained small base learns one triptych by heart, under fresh noise and timesteps in every step."""
    data = write_triptychs(tmp_path / "data", 1)
    more = ["--learning_rate", "3e-3", "--rank", "32", "--no-cache_latents"]
    args = arguments(ROOT / "examples" / "base", tmp_path / "out", *more, data=data)
    model, step, _ = build(args)
    optimizer = trainer.build_optimizer(trainer.parameter_groups(model, args), args)
    sampler = iter(trainer.RunSampler(1, args, 0, 1, 0))
    losses = []
    for _ in range(60):
        loss = step(model, [step.encoder.read(draws) for draws in next(sampler)])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])
    assert model.semantic_attention.scales()[0] > 0.01


def test_dropped_map_is_no_map(base_folder, triptych_folder, tmp_path):
    args = arguments(base_folder, tmp_path, "--no-cache_latents", data=triptych_folder)
    model, _, _ = build(args)
    torch.nn.init.ones_(model.semantic_attention.layers[0].scale)
    hidden_states, tokens = torch.randn(2, 8, 384), torch.randn(2, 8, 64)
    enhanced = model.attend(hidden_states, tokens, None, torch.tensor([True, False]))
    assert torch.equal(enhanced[1], hidden_states[1]) and not torch.equal(enhanced[0], hidden_states[0])


# -- Whole runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(base_folder, triptych_folder, tmp_path_factory):
    options = "--max_train_steps 8 --lora_dropout 0.1 --random_flip --caption_dropout 0.3 --semantic_dropout 0.3"
    return run(base_folder, tmp_path_factory.mktemp("run") / "out", *options.split(), data=triptych_folder), options


def test_resume_is_bit_identical(base_folder, triptych_folder, tmp_path, undisturbed):
    whole, options = undisturbed
    # 4 steps of 2 samples end in the middle of the second epoch of 6.
    first = options.replace("--max_train_steps 8", "--max_train_steps 4 --checkpointing_steps 4")
    run(base_folder, tmp_path / "out", *first.split(), data=triptych_folder)
    options += " --resume_from_checkpoint latest"
    resumed = run(base_folder, tmp_path / "out", *options.split(), data=triptych_folder)
    assert_same_weights(whole, resumed)
    assert any(weight.abs().max() > 0 for name, weight in weights_of(whole).items() if "lora_B" in name)


def test_prodigy_resumes(base_folder, triptych_folder, tmp_path):
    options = "--optimizer prodigy --learning_rate 1.0 --checkpointing_steps 2 --max_train_steps"
    whole = run(base_folder, tmp_path / "whole", *options.split(), 4, data=triptych_folder)
    out = run(base_folder, tmp_path / "out", *options.split(), 2, data=triptych_folder)
    run(base_folder, out, *options.split(), 4, "--resume_from_checkpoint", "latest", data=triptych_folder)
    assert_same_weights(whole, out)


def test_damaged_checkpoint_is_skipped(base_folder, triptych_folder, tmp_path, undisturbed, caplog):
    whole, options = undisturbed
    first = options.replace("--max_train_steps 8", "--max_train_steps 4 --checkpointing_steps 2")
    out = run(base_folder, tmp_path / "out", *first.split(), data=triptych_folder)
    damaged = out / "checkpoint-4" / LORA_FILE
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    # What a run that was killed while writing leaves behind is no checkpoint.
    (out / ".checkpoint-6.part").mkdir()
    (out / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match="checkpoint-4 is no whole checkpoint"):
        run(base_folder, out, *options.split(), "--resume_from_checkpoint", "checkpoint-4", data=triptych_folder)
    resumed = run(base_folder, out, *options.split(), "--resume_from_checkpoint", "latest", data=triptych_folder)
    assert "checkpoint-4: " in caplog.text and "checkpoint-9" in caplog.text
    assert_same_weights(whole, resumed)


def test_checkpoint_limit_holds_after_resume(base_folder, triptych_folder, tmp_path):
    more = ["--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    out = run(base_folder, tmp_path / "out", "--max_train_steps", 3, *more, data=triptych_folder)
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    more += ["--resume_from_checkpoint", "latest"]
    run(base_folder, out, "--max_train_steps", 5, *more, data=triptych_folder)
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}


def test_final_folder(base_folder, triptych_folder, tmp_path):
    more = "--max_train_steps 2 --lora_alpha 8 --lora_layers attn.to_q,attn.to_k --validation_steps 2"
    more += " --validation_inference_steps 1 --num_validation_images 2 --checkpointing_steps 2"
    out = run(base_folder, tmp_path / "out", *more.split(), data=triptych_folder)
    weights = weights_of(out)
    assert weights and all(name.startswith("transformer.") and ".lora_" in name for name in weights)
    assert {name.split(".lora_")[0].split(".", 3)[-1] for name in weights} == {"attn.to_q", "attn.to_k"}
    with safetensors.safe_open(out / LORA_FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["transformer.r"], metadata["transformer.lora_alpha"]) == (4, 8)
    assert set(weights_of(out, MODULE_FILE)) == {
        f"layers.0.{name}"
        for name in (
            "norm_image.weight norm_image.bias norm_semantic.weight norm_semantic.bias scale"
            " to_q.weight to_k.weight to_v.weight to_out.weight"
        ).split()
    }
    assert (out / "checkpoint-2" / "manifest.json").is_file()
    grid = PIL.Image.open(out / "samples" / "step-000002.png")
    assert grid.size == (4 * 32, 2 * 32)
    card = (out / "README.md").read_text()
    assert "load_lora_weights" in card
    compile((out / "pipeline.py").read_text(), "pipeline.py", "exec")
    stock = FluxFillPipeline.from_pretrained(base_folder)
    stock.load_lora_weights(out)
    assert stock.transformer.peft_config["default_0"].lora_alpha == 8


def test_validation_leaves_training_alone(base_folder, triptych_folder, tmp_path, undisturbed):
    whole, options = undisturbed
    options += " --validation_steps 3 --validation_inference_steps 1 --num_validation_images 1"
    assert_same_weights(whole, run(base_folder, tmp_path / "out", *options.split(), data=triptych_folder))


def test_what_a_run_says(base_folder, triptych_folder, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, logger="train_semantic_fill_lora"):
        run(base_folder, tmp_path, "--max_train_steps", 100, "--log_level", "debug", data=triptych_folder)
    messages = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
    assert (
        messages.index("Semantic mode: cross_attention")
        < messages.index("Using Cross-Attention with 1 layers, 8 heads")
        < messages.index("Added 33088 semantic cross-attention parameters to optimizer")
    )
    for name in ("visible_img", "target_img", "semantic_img", "diptych", "x_0", "x_cond", "semantic_tokens", "x_t"):
        assert sum(m.startswith(f"{name}: (2, ") for m in messages) == 2, name
    assert "Layer 0 scale: 0.000000" in messages and "hidden_states: (2, 8, 384)" in messages
    assert any(m.startswith("[Step 100] Loss: 0.") or m.startswith("[Step 100] Loss: 1.") for m in messages)


def test_cache_is_reused_and_mended(base_folder, triptych_folder, tmp_path, undisturbed, caplog):
    whole, options = undisturbed
    out = tmp_path / "out"
    caplog.set_level(logging.INFO, logger="train_semantic_fill_lora")
    run(base_folder, out, *options.replace("_steps 8", "_steps 1").split(), data=triptych_folder)
    files = sorted((out / "cache").iterdir())
    # 6 pictures, each mirrored too; 2 captions and the empty one.
    assert len(files) == 15
    files[0].write_bytes(b"no safetensors")
    caplog.clear()
    assert_same_weights(whole, run(base_folder, out, *options.split(), data=triptych_folder))
    assert "14 found" in caplog.text and "is damaged and made anew" in caplog.text
    # A longer prompt or another size is another encoding.
    caplog.clear()
    run(base_folder, out, "--max_train_steps", 1, "--max_sequence_length", 8, data=triptych_folder)
    assert "6 found" in caplog.text and "3 to make" in caplog.text


def test_another_scaling_or_tokenizer_is_another_encoding(base_folder, triptych_folder, tmp_path):
    """Of the same weights, picture and prompt."""
    args = arguments(base_folder, tmp_path, data=triptych_folder)
    dataset = trainer.TriptychDataset(trainer.load_rows(args), args)
    pipeline = trainer.load_encoders(args, torch.device("cpu"), torch.float32)
    views = {name: view[None] for name, view in dataset.views(0).items()}

    def made():
        encoder = trainer.Encoder(pipeline, dataset, args)
        files = encoder.latent_file(0, False, False), encoder.prompt_file("a b")
        return files, encoder.encode_views(views)["semantic"], encoder.encode_prompts(["a b"])["prompt_embeds"]

    first = made()
    assert made()[0] == first[0]
    pipeline.vae.register_to_config(scaling_factor=0.5)
    second = made()
    assert not torch.equal(first[1], second[1])
    assert first[0][0] != second[0][0] and first[0][1] == second[0][1]
    pipeline.tokenizer_2 = T5TokenizerFast(
        vocab=[(piece, -float(i)) for i, piece in enumerate(["<pad>", "</s>", "<unk>", "▁", "b", "a"])], extra_ids=0
    )
    third = made()
    assert not torch.equal(second[2], third[2])
    assert second[0][0] == third[0][0] and second[0][1] != third[0][1]


def test_without_cache_the_same_is_learnt(base_folder, triptych_folder, tmp_path):
    weights = []
    for flag in ("--cache_latents", "--no-cache_latents"):
        more = ["--max_train_steps", 3, "--random_flip", flag]
        out = run(base_folder, tmp_path / flag, *more, data=triptych_folder)
        weights.append(weights_of(out, MODULE_FILE))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=1e-4)


def test_stops_on_steps_without_finite_gradients(base_folder, triptych_folder, tmp_path, monkeypatch, caplog):
    compare = trainer.compare
    monkeypatch.setattr(trainer, "compare", lambda *args: compare(*args) * float("nan"))
    with pytest.raises(RuntimeError, match="3 steps in a row .* rows"):
        run(base_folder, tmp_path / "out", "--max_train_steps", 9, "--max_bad_steps", 3, data=triptych_folder)
    assert caplog.text.count("skipped: loss nan") == 3


# -- Data --------------------------------------------------------------------------------------------------------------


def test_bad_rows_are_listed(base_folder, tmp_path):
    data = write_triptychs(tmp_path / "data", 6)
    whole = (data / "000.png").read_bytes()
    (data / "001.png").write_bytes(whole[: len(whole) // 2])
    PIL.Image.new("RGB", (97, 32)).save(data / "002.png")
    PIL.Image.new("I;16", (96, 32)).save(data / "003.png")
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    rows[4]["text"] = ""
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError) as error:
        args = arguments(base_folder, tmp_path, data=data)
        trainer.TriptychDataset(trainer.load_rows(args), args)
    message = str(error.value)
    assert message.startswith("4 of 6 rows cannot be used")
    for part in ("row 1: ", "row 2: ValueError: is 97 pixels wide", "row 3: ", "row 4: ValueError: has no caption"):
        assert part in message
    assert "row 0" not in message and "row 5" not in message


def test_an_instance_prompt_that_no_sample_uses_is_refused(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "load_encoders", None)
    data = write_triptychs(tmp_path / "data", 2)
    prompt = ["--instance_prompt", "a hill"]
    with pytest.raises(ValueError, match="--instance_prompt is for samples without a caption, but all 2 .* `text`"):
        run(base_folder, tmp_path / "out", *prompt, data=data)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    rows[1]["text"] = None
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # On to the encoders, which are not there.
    with pytest.raises(TypeError):
        run(base_folder, tmp_path / "out", *prompt, data=data)


def test_a_warm_up_as_long_as_the_epochs_is_refused_before_a_model_is_loaded(
    base_folder, triptych_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(trainer, "load_encoders", None)
    # 6 samples are 3 steps an epoch.
    more = ["--num_train_epochs", 2, "--lr_scheduler", "linear", "--lr_warmup_steps", 6]
    with pytest.raises(ValueError, match="--lr_warmup_steps 6 has to be below the 6 steps that --num_train_epochs 2"):
        run(base_folder, tmp_path / "out", *more, data=triptych_folder)


@pytest.mark.parametrize("layout", ["columns", "parquet", "webdataset"])
def test_data_layouts_give_the_same_views(base_folder, tmp_path, layout):
    triptychs = [draw_triptych(seed) for seed in range(3)]
    expected = [torch.tensor(list(t.tobytes())).view(32, 96, 3).permute(2, 0, 1) / 255 for t in triptychs]
    folder = tmp_path / "data"
    folder.mkdir()
    more = []
    if layout == "webdataset":
        import io
        import tarfile

        with tarfile.open(folder / "data.tar", "w") as tar:
            for index, triptych in enumerate(triptychs):
                buffer = io.BytesIO()
                triptych.save(buffer, "PNG")
                for suffix, content in (("png", buffer.getvalue()), ("txt", f"caption {index}".encode())):
                    info = tarfile.TarInfo(f"{index}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        more = ["--image_column", "png", "--caption_column", "txt"]
    else:
        cut = [[t.crop((i * 32, 0, i * 32 + 32, 32)) for t in triptychs] for i in range(3)]
        columns = {"image": triptychs} if layout == "parquet" else dict(zip(("photo", "thermal", "map"), cut))
        columns |= {"text": [f"caption {i}" for i in range(3)]}
        rows = datasets.Dataset.from_dict(columns)
        for name in columns:
            rows = rows if name == "text" else rows.cast_column(name, datasets.Image())
        rows.to_parquet(folder / "train.parquet")
        if layout == "columns":
            more = ["--visible_column", "photo", "--target_column", "thermal", "--semantic_column", "map"]
    args = arguments(base_folder, tmp_path, "--dataset_name", folder, *more)
    dataset = trainer.TriptychDataset(trainer.load_rows(args), args)
    for index in range(3):
        views = dataset.views(index)
        torch.testing.assert_close(torch.cat([views[name] for name in trainer.PANELS], 2), expected[index])
        assert dataset.caption(index) == f"caption {index}"
        flipped = dataset.views(index, flip=True)
        assert all(torch.equal(flipped[name], views[name].flip(2)) for name in trainer.PANELS)


def test_every_sample_once_an_epoch_and_the_same_for_any_number_of_processes(base_folder):
    args = arguments(base_folder, "unused", data="unused")
    one = iter(trainer.RunSampler(10, args, 0, 1, 0))
    first, second = (iter(trainer.RunSampler(10, args, rank, 2, 0)) for rank in (0, 1))
    single = sum((next(one) for _ in range(10)), [])
    double = sum((next(first) + next(second) for _ in range(5)), [])
    assert single == double
    assert sorted(d.index for d in single[:10]) == sorted(d.index for d in single[10:]) == list(range(10))
    assert [d.index for d in single[:10]] != [d.index for d in single[10:]]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--train_data_dir d --dataset_name n", "exactly one of --dataset_name and --train_data_dir"),
        ("", "exactly one of --dataset_name and --train_data_dir"),
        ("--train_data_dir d --resolution 100", "--resolution has to be a positive multiple of 16 but is 100"),
        ("--train_data_dir d --timestep_shift fast", "--timestep_shift has to be"),
        ("--train_data_dir d --timestep_shift nan", "--timestep_shift has to be"),
        ("--train_data_dir d --caption_dropout 2", "--caption_dropout has to be within"),
        ("--train_data_dir d --rank 0", "--rank has to be at least 1"),
        ("--train_data_dir d --visible_column v", "passed together"),
        ("--train_data_dir d --max_sequence_length 513", "--max_sequence_length has to be `auto` or within"),
    ],
)
def test_wrong_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.parse_args(["--pretrained_model_name_or_path", "unused", *options.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_batches_are_made_ahead_in_a_thread_on_a_gpu():
    made, errors = [], {3: ValueError("row 3")}

    def prepare(samples):
        made.append((samples, threading.current_thread()))
        if samples in errors:
            raise errors[samples]
        return f"batch {samples}"

    step = argparse.Namespace(stream=None, prepare=prepare)
    batches = trainer.prepared_batches(step, iter(range(5)))
    assert [next(batches), next(batches)] == ["batch 0", "batch 1"]
    # Without a GPU nothing is made before it is needed.
    assert made == [(0, threading.main_thread()), (1, threading.main_thread())]

    made.clear()
    step.stream = object()
    with contextlib.closing(trainer.prepared_batches(step, iter(range(5)))) as batches:
        assert [next(batches), next(batches), next(batches)] == ["batch 0", "batch 1", "batch 2"]
        with pytest.raises(ValueError, match="row 3"):
            next(batches)
    assert [samples for samples, _ in made][:4] == [0, 1, 2, 3]
    threads = {thread for _, thread in made}
    assert len(threads) == 1 and threading.main_thread() not in threads and not threads.pop().is_alive()


def test_a_lora_to_start_from_is_not_rounded(base_folder, triptych_folder, tmp_path):
    out = run(base_folder, tmp_path / "first", "--max_train_steps", 1, data=triptych_folder)
    args = arguments(base_folder, tmp_path / "second", "--lora_weights", out, data=triptych_folder)
    model = trainer.build_model(args, torch.device("cpu"), torch.bfloat16)
    loaded = {name: p for name, p in model.named_parameters() if "lora_" in name}
    saved = {name.replace(".weight", ".default.weight"): weight for name, weight in weights_of(out).items()}
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


@pytest.mark.parametrize("mode", ["cross_attention", "none"])
def test_a_launch_file_that_compiles_the_whole_model(base_folder, triptych_folder, tmp_path, monkeypatch, mode):
    options = ["--max_train_steps", 1, "--semantic_mode", mode]
    plain = run(base_folder, tmp_path / "plain", *options, data=triptych_folder)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = run(base_folder, tmp_path / "compiled", *options, data=triptych_folder)
    # Of the same names too.
    torch.testing.assert_close(weights_of(compiled), weights_of(plain), atol=1e-6, rtol=1e-4)


def test_accumulation_is_that_of_the_options(base_folder, triptych_folder, tmp_path, monkeypatch):
    options = ["--max_train_steps", 2, "--gradient_accumulation_steps", 2]
    expected = run(base_folder, tmp_path / "plain", *options, data=triptych_folder)
    # Of the shell, or of accelerate's launcher.
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    assert_same_weights(expected, run(base_folder, tmp_path / "out", *options, data=triptych_folder))


def test_no_process_waits_while_another_checks_the_rows(base_folder, triptych_folder, tmp_path, monkeypatch):
    waiting, during = [], []

    @contextlib.contextmanager
    def main_process_first(accelerator):
        waiting.append(True)
        yield
        waiting.clear()

    check = trainer.TriptychDataset.check
    monkeypatch.setattr(trainer.Accelerator, "main_process_first", main_process_first)
    monkeypatch.setattr(trainer.TriptychDataset, "check", lambda self: during.append(bool(waiting)) or check(self))
    run(base_folder, tmp_path, "--max_train_steps", 1, data=triptych_folder)
    assert during == [False]
