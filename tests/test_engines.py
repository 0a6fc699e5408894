# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The launch files as accelerate's own launcher reads them, and what engines refuse, shard, save and leave in one piece.

`test_processes.py` starts each launch file.
"""

import contextlib
import os
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from helpers import LORA_FILE, MODULE_FILE, ROOT, arguments, assemble, first_batch, fresh_state, run, weights_of
from torch.distributed.tensor import DTensor

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill.engines import FSDP2Engine, find_engine
from semantic_fill.paintings import paint_samples


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
ENGINES = {
    "one_gpu": (DistributedType.NO, prepare_simple_launcher_cmd_env),
    "ddp": (DistributedType.MULTI_GPU, prepare_multi_gpu_env),
    "fsdp2": (DistributedType.FSDP, prepare_multi_gpu_env),
}


def launch_environment(path: Path) -> dict[str, str]:
    """What `accelerate launch --config_file path` puts into the environment of its processes."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args.nondefault = {"config_file"}
    args, _, _ = _validate_launch_command(args)
    prepared = ENGINES[path.stem][1](args)
    return prepared[1] if isinstance(prepared, tuple) else prepared


def accelerator_of(kind: str, precision: str = "bf16", processes: int = 2) -> types.SimpleNamespace:
    """What `find_engine` asks of an accelerator."""
    return types.SimpleNamespace(
        distributed_type=DistributedType[kind],
        num_processes=processes,
        mixed_precision=precision,
        device=torch.device("cpu"),
    )


def test_every_config_is_known():
    assert {path.stem for path in CONFIGS} == set(ENGINES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_read(path, monkeypatch):
    # Accelerate raises on a key that it does not know.
    config = load_config_from_file(str(path))
    assert config.distributed_type == ENGINES[path.stem][0]
    assert (config.num_processes == 1) == (path.stem == "one_gpu")
    environment = launch_environment(path)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, environment.get(name, ""))
    # What the launcher sets is what the trainer finds its engine by.
    engine = find_engine(accelerator_of(config.distributed_type.name), arguments("unused", "unused", data="unused"))
    assert isinstance(engine, FSDP2Engine) == (path.stem == "fsdp2")
    # Every process has its own text encoders, though the launcher sets it otherwise.
    if isinstance(engine, FSDP2Engine):
        assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


FSDP2 = {"FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    "kind, environment, precision, options, message",
    [
        ("FSDP", {"FSDP_VERSION": "1"}, "bf16", "", "set `fsdp_version: 2`, not 1"),
        ("DEEPSPEED", {}, "bf16", "", "with DDP or FSDP2, but accelerate is configured for DEEPSPEED"),
        ("MEGATRON_LM", {}, "bf16", "", "accelerate is configured for MEGATRON_LM"),
        ("FSDP", FSDP2, "bf16", "--optimizer prodigy", "FSDP2 shards optimizer states"),
        ("FSDP", FSDP2, "bf16", "--use_8bit_adam", "FSDP2 shards optimizer states"),
        ("FSDP", FSDP2, "bf16", "--fast", "FSDP2 takes the base in half precision"),
        ("FSDP", FSDP2, "bf16", "--base_precision nf4", "FSDP2 takes the base in half precision"),
        ("FSDP", FSDP2, "fp16", "", "FSDP2 does not scale the loss"),
    ],
)
def test_engines_that_would_not_train_right_are_refused(monkeypatch, kind, environment, precision, options, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        find_engine(accelerator_of(kind, precision), arguments("unused", "unused", *options.split(), data="unused"))


def test_processes_that_do_not_find_one_another_are_refused(monkeypatch):
    """Where there is no GPU, accelerate makes single runs beside each other of the file for several GPUs."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but .* set ACCELERATE_USE_CPU=true"):
        find_engine(accelerator_of("NO", processes=1), arguments("unused", "unused", data="unused"))


@contextlib.contextmanager
def process_group():
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        # A run that ends has destroyed it already.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


CAUSAL = "projection --visible_attention causal"


@pytest.mark.parametrize(
    "mode", ["cross_attention", "projection", "in_context", CAUSAL, f"{CAUSAL} --no-visible_gradients"]
)
def test_fsdp2_trains_and_saves_what_one_process_does(base_folder, triptych_folder, tmp_path, mode):
    more = ["--max_train_steps", 3, "--checkpointing_steps", 2, "--learning_rate", 1e-2]
    more += ["--semantic_mode", *mode.split()]
    more += ["--cache_root", tmp_path / "cache", "--validation_inference_steps", 1, "--num_validation_images", 1]
    expected = run(base_folder, tmp_path / "one", *more, data=triptych_folder)
    options = arguments(base_folder, tmp_path / "sharded", *more, data=triptych_folder)
    fresh_state()
    with process_group():
        sharded = trainer.assemble(options, FSDP2Engine(Accelerator(cpu=True), options))
        assert all(isinstance(parameter, DTensor) for parameter in sharded.model.parameters())
        # A run that continues may paint first.
        paint_samples(sharded)
        trainer.train(sharded)
        trainer.finish(sharded, None)
    files = [LORA_FILE] if mode == "in_context" else [LORA_FILE, MODULE_FILE]
    for folder in (Path(), Path("checkpoint-2")):
        for file in files:
            wanted, got = (weights_of(place / folder, file) for place in (expected, tmp_path / "sharded"))
            assert wanted.keys() == got.keys()
            for name in wanted:
                torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6)
    FluxFillSemanticPipeline.from_pretrained(base_folder).load_lora_weights(tmp_path / "sharded")


@torch._dynamo.config.patch(optimize_ddp=True)
def test_compiled_blocks_stay_whole_under_ddp(base_folder, triptych_folder, tmp_path, monkeypatch):
    compiled = []

    def backend(module, _):
        compiled.append(module)
        return module.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compile_module(module, backend=backend))
    torch.compiler.reset()
    # Blocks have more than a MiB of gradients, after which DDP's buckets would cut them in two.
    options = ("--compile", "--no-cache_latents", "--rank", 4096)
    built = assemble(arguments(base_folder, tmp_path, *options, data=triptych_folder))
    try:
        with process_group():
            torch.nn.parallel.DistributedDataParallel(built.model)(first_batch(built))
    finally:
        torch.compiler.reset()
    transformer = built.model.transformer
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    assert len(compiled) == blocks == 2
