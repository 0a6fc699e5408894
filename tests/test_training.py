# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""A training step against the independent reference, what it does to the parameters, and what a run leaves."""

import gc
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import reference
import safetensors
import torch
from diffusers import FluxFillPipeline
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from helpers import (
    LORA_FILE,
    MODULE_FILE,
    ROOT,
    arguments,
    assemble,
    assert_same_weights,
    first_batch,
    projection_layers,
    reference_layers,
    run,
    spoil,
    weights_of,
    write_triptychs,
)
from torch.utils._python_dispatch import TorchDispatchMode

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline
from semantic_fill.options import Options


# Each kind of module with its options.
MODULES = {
    "none": ["--semantic_position", "none"],
    "rope": ["--semantic_position", "rope"],
    "projection": ["--semantic_mode", "projection"],
}
WITH_MODULE = [name for name, mode in SEMANTIC_MODES.items() if mode.module_class is not None]


def open_gates(module) -> None:
    for layer in module.layers:
        torch.nn.init.normal_(layer.scale, std=0.3)


# -- One step ---------------------------------------------------------------------------------------------------------


def read_pixels(folder: Path, samples: list[dict], height: int, width: int) -> torch.Tensor:
    """The triptychs of samples, `(batch, 3, height, 3 * width)` in [-1, 1], without the project's own reader."""
    files = [folder / f"{sample['spec'].index:03d}.png" for sample in samples]
    rows = [torch.from_numpy(np.array(PIL.Image.open(file).convert("RGB"))) for file in files]
    assert {row.shape for row in rows} == {(height, 3 * width, 3)}
    return torch.stack(rows).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("region", ["diptych", "target"])
@pytest.mark.parametrize("height, width", [(32, 32), (48, 64)])
@pytest.mark.parametrize("kind", MODULES)
def test_step_equals_reference(base_folder, tmp_path, posterior_mode, height, width, kind, region):
    data = write_triptychs(tmp_path / "data", 2, height, width)
    more = ["--width", width, *MODULES[kind], "--loss_region", region, "--no-cache_latents", "--guidance_scale", 2.5]
    assembled = assemble(arguments(base_folder, tmp_path / "out", *more, data=data, resolution=height))
    model, module = assembled.model, assembled.model.semantic_attention
    layers = projection_layers(module) if kind == "projection" else reference_layers(module)
    assert len(layers) == 1
    open_gates(module)
    for name, parameter in model.transformer.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)

    samples = next(trainer.read_samples(assembled)[1])
    batch = assembled.make_batch(samples)
    loss = trainer.compare(model(batch), batch, assembled.objective)
    gradients = torch.autograd.grad(loss, [weight for layer in layers for weight in layer.values()])

    vae = assembled.encoder.pipeline.vae
    visible, target, semantic = reference.cut_triptych(read_pixels(data, samples, height, width))
    diptych = reference.make_diptych(visible, target)
    with torch.no_grad():
        x_0 = reference.pack(reference.encode_image(vae, diptych))
        x_cond = reference.condition(vae, diptych, reference.make_mask(diptych))
        tokens = reference.encode_semantic(vae, semantic)
    rows, columns = height // 16, width // 16
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(batch.x_0, x_0, **close)
    torch.testing.assert_close(batch.x_cond, x_cond, **close)
    torch.testing.assert_close(batch.semantic_tokens, tokens, **close)
    torch.testing.assert_close(batch.img_ids, reference.image_ids(rows, 2 * columns))
    assert ((batch.t > 0) & (batch.t < 1)).all() and 0.7 < batch.x_1.std() < 1.3
    torch.testing.assert_close(batch.x_t, reference.add_noise(x_0, batch.x_1, batch.t), **close)

    x_t_enhanced, x_cond_enhanced = batch.x_t, x_cond
    if kind == "projection":
        x_cond_enhanced = reference.project(x_cond, tokens, layers)
    else:
        positions = reference.panel_positions(rows, columns) if kind == "rope" else None
        x_t_enhanced = reference.enhance(batch.x_t, tokens, layers, positions=positions)
    hidden_states = torch.cat([x_t_enhanced, x_cond_enhanced], dim=2)
    torch.testing.assert_close(model.attend(batch), hidden_states, **close)
    assert not torch.allclose(hidden_states, torch.cat([batch.x_t, x_cond], dim=2), atol=1e-2)
    text = (batch.prompt_embeds, batch.pooled_prompt_embeds)
    prediction = reference.predict(
        model.transformer, x_t_enhanced, x_cond_enhanced, batch.t, *text, batch.img_ids, guidance=2.5
    )
    expected = reference.loss(prediction, x_0, batch.x_1, rows, columns, region)
    torch.testing.assert_close(loss, expected, **close)
    expected_gradients = torch.autograd.grad(expected, [weight for layer in layers for weight in layer.values()])
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(gradient, wanted, atol=1e-4 * wanted.abs().max().item(), rtol=1e-3)


def test_a_run_takes_the_step_of_the_reference(base_folder, triptych_folder, tmp_path):
    """The loop: gradients of two micro-batches, clipped together, and one AdamW step with a rate for each group."""
    more = ["--max_train_steps", 1, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 1]
    more += ["--learning_rate", 1e-3, "--semantic_learning_rate", 2e-3, "--max_grad_norm", 0.05]
    options = arguments(base_folder, tmp_path / "expected", *more, data=triptych_folder)
    assembled = assemble(options)
    model, (_, samples) = assembled.model, trainer.read_samples(assembled)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for _ in range(2):
        batch = assembled.make_batch(next(samples))
        (trainer.compare(model(batch), batch, assembled.objective) / 2).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in trained.values()]).norm()
    assert norm > 0.05
    out = run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    found = {f"transformer.{name}": weight for name, weight in weights_of(out).items()}
    found = {name.removeprefix("transformer."): weight for name, weight in found.items()}
    found |= {f"semantic_attention.{name}": weight for name, weight in weights_of(out, MODULE_FILE).items()}
    rates = {"lora": 1e-3, "scale": 2e-2, "module": 2e-3}
    moved = 0
    for name, parameter in trained.items():
        kind = "lora" if ".lora_" in name else "scale" if name.endswith(".scale") else "module"
        gradient = parameter.grad * 0.05 / norm
        # The first step of AdamW with its correction of the bias.
        decayed = before[name] * (1 - rates[kind] * options.adam_weight_decay)
        expected = decayed - rates[kind] * gradient / (gradient.abs() + options.adam_epsilon)
        torch.testing.assert_close(found[name.replace(".default.", ".")], expected, atol=1e-5, rtol=1e-3)
        moved += not torch.equal(expected, before[name])
    assert moved == len(found) == len(trained)


class NoWaiting(TorchDispatchMode):
    """Refuses what has the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:
            assert not any(index is not None and index.dtype == torch.bool for index in args[1]), "a boolean mask"
        assert func not in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("region", ["diptych", "target"])
@pytest.mark.parametrize("kind", MODULES)
def test_the_loss_does_not_wait_for_the_device(base_folder, triptych_folder, tmp_path, kind, region):
    more = ["--loss_region", region, *MODULES[kind]]
    assembled = assemble(arguments(base_folder, tmp_path, *more, data=triptych_folder))
    batch = first_batch(assembled)
    with NoWaiting():
        trainer.compare(assembled.model(batch), batch, assembled.objective).backward()
    with pytest.raises(AssertionError), NoWaiting():
        assembled.model.scales()


@pytest.mark.parametrize("option, expected", [("none", 0.25), ("3.0", 0.5), ("resolution", None)])
def test_timestep_shift_is_that_of_inference(base, option, expected):
    options = Options(pretrained_model_name_or_path="unused", train_data_dir="unused", timestep_shift=option)
    shift = trainer.Objective(options, base.scheduler, guidance_embeds=True).shift(image_tokens=2048)
    shifted = shift * 0.25 / (1 + (shift - 1) * 0.25)
    if expected is None:
        expected = reference.shift_timestep(torch.tensor(0.25, dtype=torch.float64), 2048).item()
    assert shifted == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("settings", [{}, {"time_shift_type": "linear"}, {"use_dynamic_shifting": False}])
def test_timestep_shift_is_that_of_the_scheduler(base, settings):
    scheduler = type(base.scheduler).from_config(base.scheduler.config, **settings)
    config = scheduler.config
    mu = calculate_shift(
        2048, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    scheduler.set_timesteps(sigmas=[0.25], mu=mu)
    options = Options(pretrained_model_name_or_path="unused", train_data_dir="unused", timestep_shift="resolution")
    shift = trainer.Objective(options, scheduler, guidance_embeds=True).shift(image_tokens=2048)
    assert shift * 0.25 / (1 + (shift - 1) * 0.25) == pytest.approx(scheduler.sigmas[0].item(), rel=1e-6)


def test_timesteps_follow_their_distribution_and_are_shifted(base):
    def draw(shift: float, **options):
        options |= {"pretrained_model_name_or_path": "unused", "train_data_dir": "unused", "timestep_shift": shift}
        generators = [torch.Generator().manual_seed(seed) for seed in range(2000)]
        objective = trainer.Objective(Options(**options), base.scheduler, guidance_embeds=True)
        _, t, _ = trainer.add_noise(torch.zeros(2000, 1, 1), generators, objective)
        assert ((t > 0) & (t < 1)).all()
        return t

    t = draw(1.0, logit_mean=0.5, logit_std=2.0)
    assert t.logit().mean().item() == pytest.approx(0.5, abs=0.15) and t.logit().std().item() == pytest.approx(
        2, abs=0.1
    )
    torch.testing.assert_close(draw(3.0, logit_mean=0.5, logit_std=2.0), 3 * t / (1 + 2 * t))
    uniform = draw(1.0, weighting_scheme="none").sort().values
    torch.testing.assert_close(uniform, torch.linspace(0, 1, 2000), atol=0.04, rtol=0)


def test_each_sample_has_noise_of_its_own_place_in_the_run(base_folder, triptych_folder, tmp_path):
    """Whichever batch a sample comes in, its noise and timestep are the same, and no other sample has them."""
    options = arguments(base_folder, tmp_path, "--no-cache_latents", data=triptych_folder)
    assembled = assemble(options)
    samples = [sample for _, batch in zip(range(3), trainer.read_samples(assembled)[1]) for sample in batch]
    together = assembled.make_batch(samples)
    alone = [assembled.make_batch([sample]) for sample in samples]
    assert len(samples) == 6 and len({t.item() for t in together.t}) == 6
    for index, batch in enumerate(alone):
        assert torch.equal(batch.x_1[0], together.x_1[index]) and torch.equal(batch.t[0], together.t[index])
    assert len({noise.sum().item() for noise in together.x_1}) == 6


@pytest.mark.parametrize("mode", WITH_MODULE)
def test_dropped_map_is_no_map(base_folder, triptych_folder, tmp_path, mode):
    assembled = assemble(arguments(base_folder, tmp_path, "--semantic_mode", mode, data=triptych_folder))
    torch.nn.init.ones_(assembled.model.semantic_attention.layers[0].scale)
    batch = first_batch(assembled)
    batch.keep_map = torch.tensor([[True], [False]])
    plain, enhanced = torch.cat((batch.x_t, batch.x_cond), dim=-1), assembled.model.attend(batch)
    assert torch.equal(enhanced[1], plain[1]) and not torch.equal(enhanced[0], plain[0])


# -- Parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SEMANTIC_MODES)
def test_gradients_reach_lora_and_module_only(base_folder, triptych_folder, tmp_path, mode):
    more = ["--semantic_mode", mode, "--no-cache_latents"]
    assembled = assemble(arguments(base_folder, tmp_path, *more, data=triptych_folder))
    model, batch = assembled.model, first_batch(assembled)
    trainer.compare(model(batch), batch, assembled.objective).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    lora = {name for name, _ in model.named_parameters() if ".lora_" in name}
    module = {name for name, _ in model.named_parameters() if name.startswith("semantic_attention.")}
    assert lora and with_gradient == lora | module
    assert bool(module) == (mode in WITH_MODULE)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    # LoRA's B matrices and the gate start at zero: they alone have a slope at first.
    moving = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moving == {n for n in lora if ".lora_B." in n} | {n for n in module if n.endswith(".scale")}
    encoders = (assembled.encoder.pipeline.vae, assembled.encoder.pipeline.text_encoder_2)
    assert not any(p.requires_grad for encoder in encoders for p in encoder.parameters())


@pytest.mark.parametrize("mode", SEMANTIC_MODES)
def test_each_group_has_its_learning_rate(base_folder, triptych_folder, tmp_path, mode):
    more = ["--semantic_mode", mode]
    assembled = assemble(arguments(base_folder, tmp_path, *more, data=triptych_folder))
    names = {id(parameter): name for name, parameter in assembled.model.named_parameters()}

    def rates(optimizer):
        for group in optimizer.param_groups:
            parts = {"lora" if ".lora_" in n else n.split(".")[-1] for n in (names[id(p)] for p in group["params"])}
            kind = next((kind for kind in ("lora", "scale") if kind in parts), "module")
            assert group["name"] == kind and (kind == "module" or parts == {kind})
        return {group["name"]: group["lr"] for group in optimizer.param_groups}

    wanted = {"lora": 1e-4, "module": 1e-4, "scale": pytest.approx(1e-3)}
    more += ["--learning_rate", 0.1, "--semantic_learning_rate", 0.2, "--semantic_scale_learning_rate", 0.3]
    changed = {"lora": 0.1, "module": 0.2, "scale": 0.3}
    if mode not in WITH_MODULE:
        wanted, changed = {"lora": 1e-4}, {"lora": 0.1}
    assert rates(assembled.optimizer) == wanted
    options = arguments(base_folder, tmp_path, *more, data=triptych_folder)
    assert rates(trainer.build_optimizer(assembled.model, options)) == changed


def test_overfits_one_triptych(tmp_path):
    """The trained small base learns one triptych by heart, under fresh noise and timesteps in every step."""
    data = write_triptychs(tmp_path / "data", 1)
    more = ["--learning_rate", "3e-3", "--rank", "32"]
    assembled = assemble(arguments(ROOT / "examples" / "base", tmp_path / "out", *more, data=data))
    losses, (_, samples) = [], trainer.read_samples(assembled)
    for _ in range(60):
        batch = assembled.make_batch(next(samples))
        loss = trainer.compare(assembled.model(batch), batch, assembled.objective)
        loss.backward()
        assembled.optimizer.step()
        assembled.optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.35 * sum(losses[:20])
    assert assembled.model.scales()["layer 0"] > 0.01


# -- Trainer and pipeline ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODULES)
def test_trainer_and_pipeline_inject_the_same(base_folder, triptych_folder, tmp_path, posterior_mode, kind):
    more = ["--no-cache_latents", *MODULES[kind]]
    assembled = assemble(arguments(base_folder, tmp_path, *more, data=triptych_folder))
    model = assembled.model
    torch.nn.init.normal_(model.semantic_attention.layers[0].scale)
    samples = next(trainer.read_samples(assembled)[1])
    batch, hidden = assembled.make_batch(samples), []
    # Inside the transformer, so after whatever enhances its input.
    model.transformer.x_embedder.register_forward_pre_hook(lambda m, inputs: hidden.append(inputs[0]))
    with torch.no_grad():
        model(batch)
    source = assembled.encoder.pipeline
    pipe = FluxFillSemanticPipeline(
        **source.components | {"transformer": model.transformer, "semantic_attention": model.semantic_attention},
        semantic_mode=assembled.options.semantic_mode,
    )
    views = [sample["views"] for sample in samples]
    pipe(
        prompt=[sample["prompt"] for sample in samples],
        image=torch.cat([v["visible"] for v in views]),
        semantic_image=torch.cat([v["semantic"] for v in views]),
        latents=batch.x_t,
        num_inference_steps=1,
        max_sequence_length=16,
        output_type="latent",
    )
    trained, painted = hidden
    torch.testing.assert_close(painted, trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(painted, torch.cat((batch.x_t, batch.x_cond), dim=-1), atol=1e-2)


@pytest.mark.parametrize("mode", SEMANTIC_MODES)
def test_results_load_into_the_pipeline(base_folder, triptych_folder, tmp_path, mode):
    more = "--max_train_steps 2 --lora_alpha 8 --semantic_learning_rate 0.05 --fusion_alpha 0.3 --semantic_mode"
    out = run(base_folder, tmp_path / "out", *more.split(), mode, data=triptych_folder)
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(out)
    (adapter,) = pipe.get_active_adapters()
    assert pipe.config.semantic_mode == mode and pipe.transformer.peft_config[adapter].lora_alpha == 8
    assert mode != "pixel_fusion" or pipe.config.fusion_alpha == 0.3
    loaded, saved = pipe.transformer.state_dict(), weights_of(out)
    for name, weight in saved.items():
        name = name.removeprefix("transformer.").replace(".weight", f".{adapter}.weight")
        assert torch.equal(loaded[name], weight)
    if mode in WITH_MODULE:
        module = pipe.semantic_attention.state_dict()
        assert module.keys() == weights_of(out, MODULE_FILE).keys() and pipe.semantic_attention.scales()[0] > 0
        assert all(torch.equal(module[name], weight) for name, weight in weights_of(out, MODULE_FILE).items())
    else:
        assert pipe.semantic_attention is None and not (out / MODULE_FILE).exists()
    pipe.set_progress_bar_config(disable=True)
    views = torch.rand(2, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def paint(**kwargs):
        generator = torch.Generator().manual_seed(0)
        more = {"num_inference_steps": 1, "output_type": "pt", "generator": generator}
        return pipe("a hill", image=views[0], **more | kwargs).images

    if mode != "none":
        assert not torch.equal(paint(semantic_image=views[1]), paint())
    assert paint().isfinite().all()


# -- Whole runs -------------------------------------------------------------------------------------------------------


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
    names = "norm_image.weight norm_image.bias norm_semantic.weight norm_semantic.bias scale"
    names += " to_q.weight to_k.weight to_v.weight to_out.weight"
    assert set(weights_of(out, MODULE_FILE)) == {f"layers.0.{name}" for name in names.split()}
    assert json.loads((out / "semantic_attention" / "config.json").read_text())["position"] == "rope"
    assert (out / "checkpoint-2" / "manifest.json").is_file()
    grid = PIL.Image.open(out / "samples" / "step-000002.png")
    # Two rows of the visible view, the map, three paintings and the target.
    assert grid.width > 6 * 32 and grid.height > 2 * 32
    assert "load_lora_weights" in (out / "README.md").read_text()
    compile((out / "pipeline.py").read_text(), "pipeline.py", "exec")
    stock = FluxFillPipeline.from_pretrained(base_folder)
    stock.load_lora_weights(out)
    assert stock.transformer.peft_config["default_0"].lora_alpha == 8


def test_validation_leaves_training_alone(base_folder, triptych_folder, tmp_path):
    more = "--max_train_steps 5 --lora_dropout 0.1 --random_flip --caption_dropout 0.3 --semantic_dropout 0.3".split()
    expected = run(base_folder, tmp_path / "expected", *more, data=triptych_folder)
    more += "--validation_steps 2 --validation_inference_steps 1 --num_validation_images 1".split()
    assert_same_weights(expected, run(base_folder, tmp_path / "out", *more, data=triptych_folder))
    assert len(list((tmp_path / "out" / "samples").glob("*.png"))) == 3


def test_collections_look_past_what_was_built_while_steps_run(base_folder, triptych_folder, tmp_path, monkeypatch):
    # The tests froze what they imported.
    gc.unfreeze()
    frozen, compare = [], trainer.compare
    monkeypatch.setattr(trainer, "compare", lambda *a: frozen.append(gc.get_freeze_count()) or compare(*a))
    run(base_folder, tmp_path / "out", "--max_train_steps", 4, data=triptych_folder)
    # Before the first step what is built, and before the third what was compiled. Some of it ends.
    assert min(frozen) > 1000 and frozen[0] >= frozen[1] < frozen[2] >= frozen[3]
    assert gc.get_freeze_count() < 1000
    # What a program froze before is still frozen after a run in it.
    gc.freeze()
    count = gc.get_freeze_count()
    run(base_folder, tmp_path / "again", "--max_train_steps", 4, data=triptych_folder)
    assert gc.get_freeze_count() > count / 2


@pytest.mark.parametrize("mode", ["cross_attention", "none"])
def test_a_launch_file_that_compiles_the_whole_model(base_folder, triptych_folder, tmp_path, monkeypatch, mode):
    options = ["--max_train_steps", 1, "--semantic_mode", mode]
    plain = run(base_folder, tmp_path / "plain", *options, data=triptych_folder)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = run(base_folder, tmp_path / "compiled", *options, data=triptych_folder)
    # This compares the names too.
    torch.testing.assert_close(weights_of(compiled), weights_of(plain), atol=1e-6, rtol=1e-4)


def test_accumulation_is_that_of_the_options(base_folder, triptych_folder, tmp_path, monkeypatch):
    options = ["--max_train_steps", 2, "--gradient_accumulation_steps", 2]
    expected = run(base_folder, tmp_path / "plain", *options, data=triptych_folder)
    # It comes from the shell or from accelerate's launcher.
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    assert_same_weights(expected, run(base_folder, tmp_path / "out", *options, data=triptych_folder))


def test_epochs_are_as_long_as_the_data(base_folder, triptych_folder, tmp_path):
    # 6 samples come three times, 4 in a step, and two fill up the last step.
    more = ["--num_train_epochs", 3, "--train_batch_size", 4]
    assembled = assemble(arguments(base_folder, tmp_path, *more, data=triptych_folder))
    assert assembled.options.max_train_steps == 5


def test_a_warm_up_as_long_as_the_epochs_is_refused_before_a_model_is_loaded(
    base_folder, triptych_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("semantic_fill.encoding.load_encoders", None)
    # 6 samples are 3 steps an epoch.
    more = ["--num_train_epochs", 2, "--lr_scheduler", "linear", "--lr_warmup_steps"]
    with pytest.raises(ValueError, match="--lr_warmup_steps 6 has to be below the 6 steps of the run"):
        run(base_folder, tmp_path / "out", *more, 6, data=triptych_folder)
    # A shorter one gets as far as the encoders, which are not there.
    with pytest.raises(TypeError):
        run(base_folder, tmp_path / "out", *more, 5, data=triptych_folder)


def test_stops_on_steps_without_finite_gradients(base_folder, triptych_folder, tmp_path, monkeypatch, caplog):
    spoil(monkeypatch, {step: lambda loss: loss * float("nan") for step in range(1, 10)})
    with pytest.raises(RuntimeError, match=r"3 steps in a row .* rows \[\d, \d\]"):
        run(base_folder, tmp_path / "out", "--max_train_steps", 9, "--max_bad_steps", 3, data=triptych_folder)
    assert caplog.text.count("skipped: loss nan") == 3
