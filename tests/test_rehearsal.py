# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What cannot work on this machine is refused before data are read or a model is loaded, and what can work is not."""

import json
import shutil
import sys

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from helpers import arguments, assemble, run

import train_semantic_fill_lora as trainer
from semantic_fill import rehearsal
from semantic_fill.precision import PRECISIONS


def start(base_folder, tmp_path, *more) -> None:
    """Starts a run up to its data, which is not there."""
    run(base_folder, tmp_path / "out", *more, data=tmp_path / "gone")


REACHES_ITS_DATA = "--train_data_dir .*gone has to be a folder of pictures, but there is no such folder"


def test_a_base_that_cannot_be_loaded_is_named_with_a_way_out(tmp_path):
    for base in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=f"(?s)--pretrained_model_name_or_path {base} cannot .* `hf auth login`"):
            start(base, tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--lora_layers attn.nothing", "--lora_layers names 'attn.nothing', which match no linear layer"),
        (
            "--lora_layers attn.to_q,attn.to_kk,attn.to_vv",
            "--lora_layers names 'attn.to_kk', 'attn.to_vv', which match",
        ),
        # A name is no ending of any name, and a norm takes no LoRA.
        ("--lora_layers to_q,o_k", "--lora_layers names 'o_k', which match"),
        ("--lora_layers attn.to_q,", "--lora_layers names '', which match"),
        ("--lora_layers to_q,norm1", "--lora_layers names 'norm1', which match"),
        # The package is missing, there is no such kernel, or it has no backward.
        (
            "--attention_backend flash",
            r"--attention_backend flash cannot work on this machine \(cpu\): .*install `flash-attn",
        ),
        ("--attention_backend _native_cudnn", r"--attention_backend _native_cudnn and .* cannot work on this machine"),
        ("--attention_backend flex", r"--attention_backend flex and .* cannot work .* not support backward on CPU"),
        ("--mixed_precision fp16", "--mixed_precision fp16 needs gradients to be scaled"),
        ("--lora_weights gone", "gone holds no trained LoRA"),
        ("--semantic_weights gone", "--semantic_weights gone holds no trained module"),
        ("--report_to wandb", "--report_to wandb needs a package: `pip install wandb`"),
        ("--report_to comet_ml", "--report_to comet_ml needs a package: `pip install comet_ml`"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(base_folder, tmp_path, options, message):
    with pytest.raises((ValueError, ImportError), match=message):
        start(base_folder, tmp_path, *options.split())
    # No model of this process uses another attention afterwards.
    assert _AttentionBackendRegistry.get_active_backend()[0].value == "native"


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--fast",
        "--optimizer prodigy --mixed_precision bf16",
        "--use_8bit_adam --checkpointing offload",
        "--attention_backend _native_math --lora_layers to_q,transformer_blocks.0.ff.net.2 --checkpointing selective",
        "--semantic_mode none --report_to all",
        *(f"--base_precision {name} --mixed_precision bf16" for name in PRECISIONS),
    ],
)
def test_what_can_work_is_not_refused(base_folder, tmp_path, options):
    with pytest.raises(ValueError, match=REACHES_ITS_DATA):
        start(base_folder, tmp_path, *options.split())
    assert _AttentionBackendRegistry.get_active_backend()[0].value == "native"


@pytest.mark.parametrize(
    "options, package, named",
    [
        ("--optimizer prodigy", "prodigyopt", "--optimizer prodigy cannot work .*`pip install prodigyopt`"),
        ("--use_8bit_adam", "bitsandbytes", "--use_8bit_adam .*`pip install bitsandbytes`"),
        ("--base_precision nf4", "bitsandbytes", "--base_precision nf4 cannot work .*`pip install bitsandbytes`"),
    ],
)
def test_missing_packages_are_named_at_the_start(base_folder, tmp_path, monkeypatch, options, package, named):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=named):
        start(base_folder, tmp_path, *options.split())


def test_attention_without_a_backward_is_refused(base_folder, tmp_path, monkeypatch):
    """Some kernels compute forward only, and what stands before them would not learn."""
    registry = _AttentionBackendRegistry._backends
    for name, function in registry.items():
        if name.value == "_native_math":
            monkeypatch.setitem(registry, name, lambda *args, f=function, **kwargs: f(*args, **kwargs).detach())
    with pytest.raises(ValueError, match="--attention_backend _native_math and .* no gradient reaches .*to_q.*lora_"):
        start(base_folder, tmp_path, "--attention_backend", "_native_math")


def test_weights_that_do_not_fit_are_refused_at_the_start(base_folder, triptych_folder, tmp_path, caplog):
    out = run(
        base_folder, tmp_path / "trained", "--max_train_steps", 1, "--checkpointing_steps", 1, data=triptych_folder
    )
    for options, message in (
        (("--lora_weights", out, "--rank", 8), "--rank is 8 .*: pass --rank 4 --lora_alpha 4"),
        (("--lora_weights", out, "--lora_layers", "attn.to_q"), "does not fit --lora_layers"),
        (
            ("--semantic_weights", out, "--semantic_mode", "projection"),
            "but --semantic_mode needs a SemanticProjection",
        ),
        (("--resume_from_checkpoint", out / "checkpoint-1", "--rank", 8), "--rank"),
    ):
        with pytest.raises(ValueError, match=message):
            run(base_folder, tmp_path / "out", *options, data=tmp_path / "gone")
    for options, forgotten in (
        (("--lora_weights", out), True),
        (("--lora_weights", out, "--semantic_weights", out), False),
        (("--lora_weights", out, "--semantic_mode", "none"), False),
        (("--resume_from_checkpoint", out / "checkpoint-1"), False),
    ):
        caplog.clear()
        with pytest.raises(ValueError, match=REACHES_ITS_DATA):
            run(base_folder, tmp_path / "out", *options, data=tmp_path / "gone")
        assert (f"To start from both, pass --semantic_weights {out} too" in caplog.text) == forgotten


def test_a_base_that_is_quantized_already_is_refused(base_folder, tmp_path):
    base = shutil.copytree(base_folder, tmp_path / "base")
    config = base / "transformer" / "config.json"
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantized))
    with pytest.raises(ValueError, match=r"base holds a transformer that is quantized already \(bitsandbytes\)"):
        start(str(base), tmp_path)


def test_a_machine_that_cannot_compile(base_folder, tmp_path, monkeypatch):
    def no_compiler(function):
        def fail(*args):
            raise RuntimeError("Failed to find C compiler")

        return fail

    monkeypatch.setattr(rehearsal.torch, "compile", no_compiler)
    with pytest.raises(ValueError, match="--compile cannot work on this machine .*: Failed to find C compiler"):
        start(base_folder, tmp_path, "--compile")


def test_a_rehearsal_leaves_no_trace(base_folder, triptych_folder, tmp_path, monkeypatch):
    options = arguments(base_folder, tmp_path / "out", "--lora_dropout", 0.5, data=triptych_folder)
    weights = []
    for rehearse in (trainer.rehearse, lambda *args: None):
        monkeypatch.setattr(trainer, "rehearse", rehearse)
        model = assemble(options).model
        weights.append({name: p.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
