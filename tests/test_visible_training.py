# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Training with causal attention of prompt and visible view: gradients, a whole run, and its options."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers import arguments, assemble, assert_same_weights, first_loss, gradients, run
from pipeline_helpers import differs

from pipeline_flux_fill_semantic import read_trained_settings
from semantic_fill import reports
from semantic_fill.memory import KEPT_BYTES, Plan, estimate_parts
from semantic_fill.paintings import paint_samples
from semantic_fill.precision import blocks_of


@pytest.fixture
def gradients_with(base_folder, triptych_folder, tmp_path, monkeypatch):
    """Returns the gradients of a first batch, whose LoRA is not zero. With `--compile` blocks are compiled for a CPU."""

    def compile_blocks(transformer, **options):
        for block in blocks_of(transformer):
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)

    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", compile_blocks)

    def gradients_with(*more):
        options = ("--visible_attention", "causal", "--semantic_mode", "projection", "--no-cache_latents", *more)
        options += ("--validation_inference_steps", "2", "--num_validation_images", "1")
        built = assemble(arguments(base_folder, tmp_path, *options, data=triptych_folder))
        torch.nn.init.ones_(built.model.semantic_attention.layers[0].scale)
        with torch.autocast("cpu", torch.bfloat16, enabled=built.options.mixed_precision == "bf16"):
            loss = first_loss(built)
        loss.backward()
        if "--compile" in more:
            # Blocks compiled for training paint, too.
            assert paint_samples(built) is not None
        return gradients(built)

    return gradients_with


@pytest.mark.parametrize("options", [(), ("--no-visible_gradients",)])
def test_checkpointing_and_compiling_change_no_gradient(gradients_with, options):
    expected = gradients_with(*options)
    # All that is trained learns, also what only the pass of the prompt goes through, if that has gradients.
    idle = {name for name, gradient in expected.items() if not gradient.any()}
    assert all("add_" in name or "context" in name for name in idle) and bool(idle) == bool(options)
    for name in ("selective", "selective --compile", "full", "0.5", "offload"):
        found = gradients_with("--checkpointing", *name.split(), *options)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda t: f"{name} {key} {t}")


def assert_similar(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Gradients of one direction each, where there are any."""
    for name, gradient in expected.items():
        similar = torch.nn.functional.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0) > 0.9
        assert similar or not gradient.any(), name


@pytest.mark.parametrize("precision", ["fp8", "int8", "int8mm"])
def test_a_quantized_base_takes_a_pass_without_prompt(gradients_with, precision):
    expected = gradients_with("--no-visible_gradients")
    found = gradients_with("--no-visible_gradients", "--base_precision", precision)
    assert_similar(found, expected)


def test_gradients_leave_out_the_visible_pass_on_request(gradients_with):
    """With PEFT's layers, autocast copies float32 weights, first in the pass that has no gradients."""
    both, target = gradients_with(), gradients_with("--no-visible_gradients")
    assert any(differs(both[name], target[name], 1e-5) for name in both)
    in_bf16 = ("--no-visible_gradients", "--mixed_precision", "bf16")
    assert_similar(gradients_with(*in_bf16, "--no-fused_lora"), gradients_with(*in_bf16))


@pytest.mark.parametrize(
    "visible, tokens, attentions",
    [
        # Views of 32 x 32 pixels have 4 tokens each, and the prompt has 16.
        ("joint", 24, [(24, 24)]),
        ("causal", 40, [(20, 20), (4, 24)]),
        ("causal --no-visible_gradients", 4, [(4, 24)]),
    ],
)
def test_fast_counts_both_passes(base_folder, triptych_folder, tmp_path, monkeypatch, visible, tokens, attentions):
    asked = []

    def choose(workload, fixed, device):
        asked.append(workload)
        return Plan("bf16", "none", compile=False), "for a test"

    monkeypatch.setattr(reports, "choose_plan", choose)
    options = ("--fast", "--max_sequence_length", "16", "--visible_attention", *visible.split())
    assemble(arguments(base_folder, tmp_path, *options, data=triptych_folder))
    (workload,) = asked
    assert (workload.tokens, workload.attentions) == (tokens, attentions)
    # One more token to attend to is a key and a value in each of the base's two blocks, with 32 channels in float32, for two
    # samples. They are copied beside the target's, and without gradients also kept.
    longer, one = replace(workload, text_tokens=17), 2 * 32 * 4 * 2
    copies = {"joint": 0, "causal": 1}.get(visible, 2)
    plan = Plan("bf16", "none", compile=False)
    kept = estimate_parts(plan, longer)["training"] - estimate_parts(plan, workload)["training"]
    assert kept == 2 * (one * copies + KEPT_BYTES["none"][1] * 32 * 4 / 2 * 2 * (longer.tokens - workload.tokens))


def test_a_causal_run_paints_goes_on_and_keeps_its_choice(base_folder, triptych_folder, tmp_path):
    options = "--visible_attention causal --semantic_mode projection --validation_steps 2 --num_validation_images 1"
    options = [*options.split(), "--validation_inference_steps", "2", "--checkpointing_steps", "1"]
    straight = run(base_folder, tmp_path / "a", *options, "--max_train_steps", 2, data=triptych_folder)
    assert len(list((straight / "samples").glob("*.png"))) == 1
    stopped = tmp_path / "b"
    shutil.copytree(straight / "checkpoint-1", stopped / "checkpoint-1")
    resume = ["--max_train_steps", 2, "--resume_from_checkpoint", "latest"]
    assert_same_weights(straight, run(base_folder, stopped, *options, *resume, data=triptych_folder))
    assert read_trained_settings(straight)["visible_attention"] == "causal"
    card = (straight / "README.md").read_text()
    assert "`visible_attention`" in card and "paints wrong pictures" in card
    with pytest.raises(ValueError, match="was trained with --visible_attention causal, so a run with --visible_att"):
        run(base_folder, stopped, "--semantic_mode", "projection", *resume, data=triptych_folder)


@pytest.mark.parametrize(
    "options, refused",
    [
        ("--semantic_mode in_context", "it cannot go with --loss_region target with --semantic_mode in_context"),
        ("--loss_region diptych", "it cannot go with --loss_region diptych with --semantic_mode cross_attention"),
    ],
)
def test_options_that_cannot_go_with_causal(options, refused, capsys):
    with pytest.raises(SystemExit):
        arguments("unused", "out", "--visible_attention", "causal", *options.split(), data="unused")
    # The message is broken into lines.
    assert refused in " ".join(capsys.readouterr().err.split())
    assert arguments("unused", "out", "--visible_attention", "causal", data="unused").loss_region == "target"
    assert arguments("unused", "out", data="unused").loss_region == "diptych"
