# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The LoRA's layers compute what PEFT's do, and compiled blocks join their products without changing a gradient."""

import sys

import peft.tuners.lora
import pytest
import torch
import torch.nn as nn
from diffusers import FluxTransformer2DModel
from helpers import LORA_FILE, arguments, assemble, first_loss, gradients, run
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import pattern_matcher
from torch.utils._python_dispatch import TorchDispatchMode

from semantic_fill import lora
from semantic_fill.lora import LORA_TARGETS, MasterWeightLora, add_lora, compiler_options


# -- Layers -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora_pair(base) -> list[peft.tuners.lora.Linear]:
    """One layer of the same LoRA as PEFT makes it and as the trainer makes it."""
    layers = []
    for fused in (False, True):
        transformer = FluxTransformer2DModel.from_config(base.transformer.config)
        transformer.load_state_dict(base.transformer.state_dict())
        transformer.requires_grad_(False)
        add_lora(transformer, rank=4, alpha=6, fused=fused)
        # It has more outputs than inputs, so that no test takes one for the other.
        layer = transformer.single_transformer_blocks[0].proj_mlp
        torch.manual_seed(0)
        for half in (layer.lora_A, layer.lora_B):
            nn.init.normal_(half.default.weight)
        layers.append(layer)
    assert [type(layer) for layer in layers] == [peft.tuners.lora.Linear, MasterWeightLora]
    return layers


def test_lora_layer_computes_what_peft_does(lora_pair):
    x = torch.randn(2, 5, lora_pair[0].in_features, requires_grad=True)
    results = []
    for layer in lora_pair:
        out = layer(x)
        trained = [layer.lora_A.default.weight, layer.lora_B.default.weight]
        results.append([out, *torch.autograd.grad((out**2).sum(), [x, *trained])])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for layer in lora_pair:
        layer.enable_adapters(False)
    assert torch.equal(lora_pair[0](x), lora_pair[1](x))


def test_lora_layer_computes_in_bf16_with_float32_weights(lora_pair):
    layer, seen, casts = lora_pair[1], [], []
    shape = (2, 5, layer.in_features)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.append({arg.dtype for arg in args if isinstance(arg, torch.Tensor)})
            if func is torch.ops.aten._to_copy.default and args[0].shape == shape:
                casts.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Watch():
        out = layer(torch.randn(shape))
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    # The base, down, and up with its sum; in backward what the two LoRA weights and the inner values need.
    assert len(seen) == 6 and all(dtypes == {torch.bfloat16} for dtypes in seen)
    assert layer.lora_A.default.weight.grad.dtype == torch.float32
    # The input is cast once, for the base and the LoRA together.
    assert casts == [torch.float32]


def test_every_target_is_a_layer_of_both_kinds_of_blocks(base):
    transformer = FluxTransformer2DModel.from_config(base.transformer.config)
    add_lora(transformer, rank=4, alpha=4)
    adapted = [name for name, module in transformer.named_modules() if isinstance(module, MasterWeightLora)]
    assert {target for target in LORA_TARGETS if any(name.endswith(target) for name in adapted)} == set(LORA_TARGETS)
    # 12 layers of a double block, 5 of a single one, and the transformer's last layer.
    blocks = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    assert len(adapted) == 12 * blocks[0] + 5 * blocks[1] + 1 and "proj_out" in adapted


# -- Joined products ----------------------------------------------------------------------------------------------------


def joining_backend(calls: list[tuple[int, int]]):
    """A backend that only joins products. It notes how many products each graph had before and has after."""
    join = compiler_options(fused_lora=True)["post_grad_custom_pre_pass"]

    def compiler(module, _):
        def count():
            return len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default))

        before = count()
        join(module.graph)
        module.graph.lint()
        module.recompile()
        calls.append((before, count()))
        return make_boxed_func(module.forward)

    # The partitioner of torch's own compiler, which finds what is computed twice.
    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)


def test_joined_products_are_fewer_and_change_no_gradient(base_folder, triptych_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "NARROW", 4)
    calls, found = [], []
    for backend in (None, joining_backend(calls)):
        built = assemble(arguments(base_folder, tmp_path, "--no-cache_latents", data=triptych_folder))
        first_loss(built, backend).backward()
        found.append(gradients(built))
    expected, got = found
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    # Forward: Q, K and V of either stream, and Q, K, V and the feed-forward of the single block, each become one
    # projection down. Backward: the same for the gradients of these projections' matrices, and for the gradient of what
    # they read where it has one. Prompts have none.
    saved = sorted(before - after for before, after in calls)
    assert saved == [3, 4, 6, 6]


def test_joined_products_leave_alone_what_depends_on_another():
    """Narrow products of one factor where one needs the other's result, and a sum that is also used by itself."""
    calls = []

    def chained(x, a, b):
        low = x @ a
        return low, x @ (b * low.mean())

    def shared(x, a, y, b):
        first = x @ a
        total = first + y @ b
        return first, total, total.sum()

    x, a, b = torch.randn(40, 40), torch.randn(40, 4), torch.randn(40, 4)
    rows = torch.randn(40, 4), torch.randn(4, 40), torch.randn(40, 4), torch.randn(4, 40)
    for function, inputs in ((chained, (x, a, b)), (shared, rows)):
        compiled = torch.compile(function, backend=joining_backend(calls), fullgraph=True)
        for got, expected in zip(compiled(*inputs), function(*inputs)):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert calls == [(2, 2), (2, 2)]
    torch.compiler.reset()


def test_the_compilers_cache_knows_the_pass_by_its_code_and_its_limit(monkeypatch):
    first, again = (compiler_options(fused_lora=True)["post_grad_custom_pre_pass"].uuid() for _ in range(2))
    monkeypatch.setattr(lora, "NARROW", 4)
    assert first == again != compiler_options(fused_lora=True)["post_grad_custom_pre_pass"].uuid()


# -- Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, joins", [((), True), (("--no-fused_lora",), False)])
def test_fused_lora_chooses_layers_and_compiler_pass(
    base_folder, triptych_folder, tmp_path, monkeypatch, options, joins
):
    compiled = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **kwargs: compiled.append((type(module).__name__, kwargs))
    )
    options = ("--compile", "--no-cache_latents", *options)
    model = assemble(arguments(base_folder, tmp_path, *options, data=triptych_folder)).model
    assert {name for name, _ in compiled} == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    for _, kwargs in compiled:
        passed = kwargs["options"].get("post_grad_custom_pre_pass")
        assert callable(passed) if joins else passed is None
    layers = {type(module) for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert layers == {MasterWeightLora if joins else peft.tuners.lora.Linear}


@pytest.mark.parametrize("lost", ["a module", "a function"])
def test_without_a_private_part_of_torch_a_run_joins_nothing_and_says_so(
    base_folder, triptych_folder, tmp_path, monkeypatch, caplog, lost
):
    if lost == "a module":
        monkeypatch.setitem(sys.modules, "torch._inductor.custom_graph_pass", None)
    else:
        monkeypatch.delattr(pattern_matcher, "stable_topological_sort")
    with caplog.at_level("WARNING", "semantic_fill"):
        without = compiler_options(fused_lora=True)
    assert "LoRA products are not joined" in caplog.text
    assert without == compiler_options(fused_lora=False)
    # The run itself goes on.
    passed, compile_module = [], nn.Module.compile

    def compile_fast(module, options, **kwargs):
        passed.append(options)
        return compile_module(module, backend="eager", **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compile_fast)
    out = run(base_folder, tmp_path / "out", "--compile", "--max_train_steps", 1, data=triptych_folder)
    torch.compiler.reset()
    assert passed and all(options == without for options in passed)
    assert (out / LORA_FILE).is_file()
