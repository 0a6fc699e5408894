# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Each kind of block is compiled once, and the next process finds what the compiler made."""

import ast
import copy
import importlib
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from diffusers import FluxTransformer2DModel
from helpers import ROOT, arguments, assemble
from quick_python import run_python
from torch._inductor import async_compile

import train_semantic_fill_lora as trainer
from semantic_fill import memory
from semantic_fill.compiler import CACHE_VARIABLE, compile_blocks, keep_compiled_code
from semantic_fill.lora import add_lora
from semantic_fill.memory import set_checkpointing
from semantic_fill.views import bucket_sizes


@pytest.fixture
def several_blocks(base) -> Any:
    """A transformer of three blocks of either kind, with a LoRA that is not zero."""
    torch.manual_seed(0)
    config = {**base.transformer.config, "num_layers": 3, "num_single_layers": 3}
    transformer: Any = FluxTransformer2DModel.from_config(config)
    transformer.requires_grad_(False)
    add_lora(transformer, rank=4, alpha=4)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return transformer


def gradients_of(transformer: Any, batch_size: int = 2) -> dict[str, torch.Tensor]:
    config, ids = transformer.config, torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(8.0))
    generator = torch.Generator().manual_seed(0)
    velocity = transformer(
        hidden_states=torch.randn(batch_size, len(ids), config.in_channels, generator=generator),
        encoder_hidden_states=torch.randn(batch_size, 6, config.joint_attention_dim, generator=generator),
        pooled_projections=torch.randn(batch_size, config.pooled_projection_dim, generator=generator),
        timestep=torch.tensor([0.3, 0.6])[:batch_size],
        guidance=torch.ones(batch_size) if config.guidance_embeds else None,
        txt_ids=torch.zeros(6, 3),
        img_ids=ids,
    ).sample
    transformer.zero_grad()
    if velocity.requires_grad:
        velocity.square().mean().backward()
    return {name: p.grad for name, p in transformer.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.fixture
def graphs(monkeypatch) -> list:
    """The graphs that are compiled. Each is run as it is."""
    found, compile_module = [], nn.Module.compile

    def backend(graph, inputs):
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", lambda module, options, **kwargs: compile_module(module, backend=backend, **kwargs)
    )
    return found


@pytest.mark.parametrize("checkpointing", ["none", "full", 0.5])
def test_each_kind_of_block_is_compiled_once(several_blocks, graphs, checkpointing):
    several_blocks.train()
    expected = gradients_of(several_blocks)
    set_checkpointing(several_blocks, checkpointing)
    compile_blocks(several_blocks, fused_lora=True)
    for _ in range(2):
        got = gradients_of(several_blocks)
    assert len(graphs) == 2 and expected.keys() == got.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    # Validation and painting take no gradients, and need a graph of each kind without.
    with torch.no_grad():
        gradients_of(several_blocks)
    assert len(graphs) == 4


def test_a_validation_before_the_first_step_changes_no_graph_of_training(several_blocks, graphs):
    """A resumed run validates single samples first. Shapes that are not fixed would cost each of its steps time."""
    compile_blocks(several_blocks, fused_lora=True)
    with torch.no_grad():
        gradients_of(several_blocks, batch_size=1)
    gradients_of(several_blocks.train())
    inputs = [node.meta["example_value"] for graph in graphs for node in graph.graph.find_nodes(op="placeholder")]
    sizes = [size for value in inputs if isinstance(value, torch.Tensor) for size in value.shape]
    assert len(graphs) == 4 and sizes and all(type(size) is int for size in sizes)


def test_the_compiler_takes_all_shapes_of_buckets(base, graphs):
    """With selective checkpointing both kinds of block have one forward, whose graphs are counted together."""
    transformer = copy.deepcopy(base.transformer).requires_grad_(False)
    add_lora(transformer, rank=4, alpha=4)
    set_checkpointing(transformer, "selective")
    compile_blocks(transformer, fused_lora=True)
    gradients_of(transformer.train())
    with torch.no_grad():
        gradients_of(transformer.eval(), batch_size=1)
    assert len(graphs) == 4 <= torch._dynamo.config.recompile_limit / len(bucket_sizes(512, 512))


def test_a_version_of_torch_without_the_settings_of_its_cache(several_blocks, graphs, monkeypatch):
    name = "autograd_cache_allow_custom_autograd_functions"
    monkeypatch.delitem(importlib.import_module("torch._functorch.config")._config, name)
    compile_blocks(several_blocks, fused_lora=True)
    assert gradients_of(several_blocks) and len(graphs) == 2


# Nothing here needs a kernel of the compiler's own, which would take seconds to build.
BLOCK = """
import sys
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from semantic_fill import lora
from semantic_fill.compiler import cache_autograd

factor = 1

class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return grad @ (weight if factor > 1 else weight.t()), None

def block(x, weight):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*[Product.apply(x, weight)] * 3)

def found():
    torch._dynamo.reset()
    counters.clear()
    cache_autograd()
    x, weight = torch.ones(1, 1, 16, 16, requires_grad=True), torch.ones(16, 16)
    torch.compile(block, options=lora.compiler_options(fused_lora=True))(x, weight).sum().backward()
    seen = counters["aot_autograd"]
    return [seen["autograd_cache_hit"], seen["autograd_cache_miss"], seen["autograd_cache_bypass"]]

results = {"first": found(), "again": found()}
if len(sys.argv) > 1:
    factor = 2
    results["another backward"] = found()
    lora.NARROW, factor = 64, 1
    results["another pass over the graph"] = found()
    lora.NARROW = 128
    torch.backends.cuda.enable_cudnn_sdp(False)
    results["other attention"] = found()
    torch.backends.cuda.enable_cudnn_sdp(True)
    results["as at first"] = found()
print(results)
"""


def test_another_process_finds_the_derivatives_of_a_block(tmp_path):
    env = os.environ | {CACHE_VARIABLE: str(tmp_path), "PYTHONPATH": str(ROOT)}
    results = []
    for rank, more in ((0, []), (1, ["more"])):
        done = run_python("-c", BLOCK, *more, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        assert done.returncode == 0, done.stderr
        results.append(ast.literal_eval(done.stdout.splitlines()[-1]))
    hit, miss = [1, 0, 0], [0, 1, 0]
    assert results[0] == {"first": miss, "again": hit}
    # The key of an entry holds what the graph's code does not show.
    changed = dict.fromkeys(("another backward", "another pass over the graph", "other attention"), miss)
    assert results[1] == {"first": hit, "again": hit} | changed | {"as at first": hit}


@pytest.mark.parametrize("options, started", [(["--compile"], 1), ([], 0)])
def test_compiled_runs_start_the_compilers_processes_before_the_model_is_loaded(
    base_folder, triptych_folder, tmp_path, monkeypatch, options, started
):
    happened = []

    def load_transformer(*args):
        happened.append("loads")
        return trainer.load_transformer(*args)

    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: happened.append("starts"))
    assemble(arguments(base_folder, tmp_path, *options, data=triptych_folder), load_transformer=load_transformer)
    assert happened == ["starts"] * started + ["loads"]


def test_compiled_code_lies_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv(CACHE_VARIABLE, "elsewhere")
    keep_compiled_code()
    assert os.environ[CACHE_VARIABLE] == "elsewhere"
    monkeypatch.delenv(CACHE_VARIABLE)
    keep_compiled_code()
    folder = Path(os.environ[CACHE_VARIABLE])
    assert folder == tmp_path / "caches" / "semantic_fill" / "compiled" and folder.is_dir()
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_compiled_code()
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / ".cache" / "semantic_fill" / "compiled")


def test_without_a_home_torchs_own_folder_stays(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv(CACHE_VARIABLE)
    keep_compiled_code()
    assert CACHE_VARIABLE not in os.environ


def test_a_trial_that_succeeded_is_not_repeated(tmp_path, monkeypatch):
    commands, codes = [], [1, 0]

    def run(command, **kwargs):
        commands.append(command)
        return subprocess.CompletedProcess(command, codes.pop(0) if codes else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "compiled"))
    trial = (2, 16, 16, 2, 16), torch.device("cuda", 0), torch.bfloat16
    # The failure is tried again, and the success is not.
    assert [memory.cudnn_attends(*trial) for _ in range(4)] == [False, True, True, True] and len(commands) == 2
    # Each of these could crash where the other did not.
    assert memory.cudnn_attends((2, 8, 16, 2, 16), *trial[1:]) and len(commands) == 3
    assert memory.cudnn_attends(*trial[:2], torch.float16) and len(commands) == 4
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 99999)
    assert memory.cudnn_attends(*trial) and len(commands) == 5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    assert memory.cudnn_attends(*trial) and len(commands) == 6
    monkeypatch.delenv(CACHE_VARIABLE)
    assert memory.cudnn_attends(*trial) and len(commands) == 7
