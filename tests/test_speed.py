# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What makes training fast or small: precisions of the base, LoRA layers, checkpointing, prompt length, --fast."""

import collections
import contextlib
import copy
import json
import re
import types

import accelerate
import peft.tuners.lora
import pytest
import safetensors
import torch
import torch.nn as nn
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from conftest import ROOT
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from peft import LoraConfig
from test_training import LORA_FILE, arguments, assert_same_weights, build, fresh_state, run, weights_of
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5EncoderModel

import base_precision
import lora_products
import train_semantic_fill_lora as trainer
import training_speed
from base_precision import LORA_LAYERS, PRECISIONS, FrozenLinear, FrozenLinearConfig, quantise_blocks
from pipeline_flux_fill_semantic import SEMANTIC_METADATA_KEY, FluxFillSemanticPipeline
from training_engines import Engine
from training_speed import Plan, choose_plan


QUANTISED = [name for name, cls in PRECISIONS.items() if cls is not None]
# Relative error of one product with normally distributed factors: half a step of the format, averaged.
ERRORS = {"fp8": 0.05, "fp8x2": 0.05, "int8": 0.02, "nf4": 0.12}


def relative_error(got, expected):
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def quantised_linear(precision, linear):
    frozen = PRECISIONS[precision](linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    frozen.quantise(linear.weight.detach())
    frozen.bias = linear.bias
    return frozen


# -- Precisions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTISED)
def test_product_and_gradient(precision):
    torch.manual_seed(0)
    linear = nn.Linear(256, 128).bfloat16()
    frozen = quantised_linear(precision, linear)
    x = torch.randn(3, 20, 256, dtype=torch.bfloat16, requires_grad=True)
    out, expected = frozen(x), linear(x)
    grad = torch.randn_like(out)
    assert out.dtype == torch.bfloat16 and out.shape == expected.shape
    assert relative_error(out, expected) < ERRORS[precision]
    gradients = [torch.autograd.grad(y, x, grad)[0] for y in (out, expected)]
    assert relative_error(*gradients) < ERRORS[precision]
    stored = [
        tensor
        for name, tensor in (*frozen.named_parameters(), *frozen.named_buffers())
        if name in ("weight", "columns")
    ]
    assert sum(tensor.nbytes for tensor in stored) == linear.weight.numel() * frozen.bits // 8
    assert not any(parameter.requires_grad for parameter in frozen.parameters() if parameter is not frozen.bias)


@pytest.mark.parametrize("precision", ["fp8", "fp8x2", "int8"])
def test_each_row_has_its_scale(precision):
    torch.manual_seed(0)
    sizes = torch.logspace(-4, 4, 32)
    linear = nn.Linear(64, 32, bias=False).bfloat16()
    x = (torch.randn(32, 64) * sizes[:, None]).bfloat16().requires_grad_()
    grad = (torch.randn(32, 32) * sizes[:, None]).bfloat16()

    def errors(dim):
        out, expected = quantised_linear(precision, linear)(x), linear(x)
        pairs = (out, expected), (torch.autograd.grad(y, x, grad)[0] for y in (out, expected))
        return [((got - want).float().norm(dim=dim) / want.float().norm(dim=dim)).max() for got, want in pairs]

    # One scale for all would lose the small ones.
    assert max(errors(dim=1)) < 2 * ERRORS[precision]
    linear.weight.data *= sizes.bfloat16()[:, None]
    x, grad = torch.randn_like(x).requires_grad_(), torch.randn_like(grad) / sizes.bfloat16()
    assert errors(dim=0)[0] < 2 * ERRORS[precision] and errors(dim=1)[1] < 2 * ERRORS[precision]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("columns", [48, 64, 256])
def test_nf4_is_restored_to_the_bit(columns, compiled):
    torch.manual_seed(0)
    linear = nn.Linear(columns, 80, bias=False, dtype=torch.bfloat16)
    # Blocks of 64 go over the ends of rows. bitsandbytes reads them right where they are the rows.
    packed, state = quantize_4bit(linear.weight.detach().view(-1, 64), quant_type="nf4", compress_statistics=True)
    expected = dequantize_4bit(packed, state).view(80, columns)
    layer = quantised_linear("nf4", linear)
    x = torch.eye(columns, dtype=torch.bfloat16, requires_grad=True)
    out = (torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer)(x)
    assert torch.equal(out.detach(), expected.t())
    (gradient,) = torch.autograd.grad(out, x, torch.eye(columns, 80, dtype=torch.bfloat16))
    rows = min(columns, 80)
    assert torch.equal(gradient[:rows], expected[:rows]) and not gradient[rows:].any()


@pytest.mark.parametrize("precision", QUANTISED)
def test_compiled_layers_keep_no_restored_weight(precision):
    torch.manual_seed(0)
    layers = [quantised_linear(precision, nn.Linear(64, 64, dtype=torch.bfloat16)) for _ in range(2)]
    x = torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = torch.compile(nn.Sequential(*layers), fullgraph=True)(x)
    assert kept and all(tensor.numel() < 64 * 64 for tensor in kept if tensor.dtype.itemsize > 1)
    out.sum().backward()
    assert x.grad.abs().max() > 0


def test_fp8_multiplies_in_fp8(monkeypatch):
    products = []
    scaled_mm = torch._scaled_mm
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda a, b, *args, **kw: products.append((a, b)) or scaled_mm(a, b, *args, **kw)
    )
    frozen = quantised_linear("fp8", nn.Linear(64, 32).bfloat16())
    frozen(torch.randn(4, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert [(a.dtype, b.dtype) for a, b in products] == [(torch.float8_e4m3fn,) * 2] * 2
    # In another dtype, or where the hardware has no such product, the weight is restored instead.
    frozen(torch.randn(4, 64, requires_grad=True)).sum().backward()
    assert len(products) == 2


@pytest.mark.parametrize("precision", QUANTISED)
def test_loading_quantises_each_layer_as_it_comes(base, base_folder, precision, monkeypatch):
    cls, order = PRECISIONS[precision], []
    quantise = cls.quantise

    def watched(self, weight):
        order.append((weight.shape, sum(m.weight.device.type == "meta" for m in watched.model if m is not self)))
        quantise(self, weight)

    replace = base_precision.replace_linears
    watched.model = []
    monkeypatch.setattr(
        base_precision,
        "replace_linears",
        lambda *args: [watched.model.append(frozen) or (old, frozen) for old, frozen in replace(*args)],
    )
    monkeypatch.setattr(cls, "quantise", watched)
    loaded = FluxTransformer2DModel.from_pretrained(
        base_folder,
        subfolder="transformer",
        dtype=torch.bfloat16,
        quantization_config=FrozenLinearConfig.of(precision, "cpu"),
    )
    layers = [module for module in loaded.modules() if isinstance(module, FrozenLinear)]
    # While the first was quantised, no other weight had arrived; while the last was, all had.
    assert [waiting for _, waiting in order] == list(range(len(layers) - 1, -1, -1))
    in_blocks = [m for name in base_precision.BLOCKS for m in getattr(loaded, name).modules()]
    assert all(isinstance(module, FrozenLinear) for module in in_blocks if isinstance(module, nn.Linear))
    assert not isinstance(loaded.x_embedder, FrozenLinear) and loaded.dtype == torch.bfloat16

    in_place = copy.deepcopy(base.transformer).bfloat16()
    quantise_blocks(in_place, precision)
    expected, got = in_place.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_unknown_precision(base):
    with pytest.raises(ValueError, match="`precision` has to be one of .* but is 'fp3'"):
        quantise_blocks(base.transformer, "fp3")


@pytest.mark.parametrize("precision", QUANTISED)
def test_loss_and_lora_gradients_stay_near(base_folder, triptych_folder, tmp_path, precision):
    results = {}
    for name in ("bf16", precision):
        more = ["--base_precision", name, "--mixed_precision", "bf16", "--no-cache_latents"]
        args = arguments(base_folder, tmp_path / name, *more, data=triptych_folder)
        model, step, samples = build(args, torch.bfloat16)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16):
            loss = step(model, samples)
        loss.backward()
        gradients = [p.grad.flatten() for n, p in model.named_parameters() if "lora_" in n]
        assert all(g.dtype == torch.float32 for g in gradients)
        results[name] = loss.item(), torch.cat(gradients)
    (loss, gradients), (expected_loss, expected_gradients) = results[precision], results["bf16"]
    assert loss == pytest.approx(expected_loss, rel=0.01)
    assert (
        torch.cosine_similarity(gradients, expected_gradients, dim=0)
        > {"fp8": 0.98, "fp8x2": 0.98, "int8": 0.99, "nf4": 0.93}[precision]
    )


def test_train_save_resume_with_a_quantised_base(base_folder, triptych_folder, tmp_path):
    options = ["--base_precision", "nf4", "--checkpointing", "selective", "--use_8bit_adam", "--learning_rate", 1e-2]
    out = run(
        base_folder, tmp_path, *options, "--max_train_steps", 2, "--checkpointing_steps", 1, data=triptych_folder
    )
    saved = weights_of(out)
    assert all(weight.dtype == torch.float32 for weight in saved.values())
    assert any(weight.abs().max() > 1e-3 for name, weight in saved.items() if "lora_B" in name)
    whole = weights_of(out / "checkpoint-1")
    run(
        base_folder,
        tmp_path,
        *options,
        "--max_train_steps",
        2,
        "--resume_from_checkpoint",
        "checkpoint-1",
        data=triptych_folder,
    )
    again = weights_of(out)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert not all(torch.equal(whole[name], again[name]) for name in saved)
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(str(out))


def test_encoders_take_turns_on_the_device(base_folder, triptych_folder, tmp_path, monkeypatch):
    """Which model a hook moves to the device, and which one away for it, as a run fills its cache."""
    moves = []
    pre_forward = accelerate.hooks.CpuOffload.pre_forward

    def watched(hook, module, *args, **kwargs):
        before = hook.prev_module_hook
        moves.append((type(module).__name__, before and type(before.model).__name__))
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", watched)
    run(base_folder, tmp_path, "--max_train_steps", 1, data=triptych_folder)
    # Two captions and the empty one, then three pictures for each of six rows: T5, by far the largest, goes once.
    assert moves == 3 * [("CLIPTextModel", None), ("T5EncoderModel", "CLIPTextModel")] + 18 * [
        ("AutoencoderKL", "T5EncoderModel")
    ]


def size_of(model):
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.fixture
def large_t5(base):
    """Larger than the other encoders together, as FLUX's is."""
    torch.manual_seed(0)
    config = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 512,
        "num_layers": 8,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    t5 = T5EncoderModel(T5Config(vocab_size=base.text_encoder_2.config.vocab_size, **config)).eval()
    assert size_of(t5) > size_of(base.text_encoder) + size_of(base.vae)
    return t5


@pytest.fixture
def fill(large_t5, base_folder, triptych_folder, tmp_path, monkeypatch):
    """Fills a cache as a run on a device with so much room does: what it wrote, and the pipeline."""

    def fill(room):
        monkeypatch.setattr(trainer, "device_memory", lambda device: (2 * room, room))
        args = arguments(base_folder, tmp_path, "--cache_root", tmp_path / str(room), data=triptych_folder)
        fresh_state()
        accelerator = accelerate.Accelerator(cpu=True)
        pipeline = trainer.load_encoders(args, accelerator.device, torch.float32)
        pipeline.text_encoder_2 = copy.deepcopy(large_t5)
        encoder = trainer.Encoder(pipeline, trainer.TriptychDataset(trainer.load_rows(args), args), args)
        encoder.fill_cache(accelerator)
        return {path.name: path.read_bytes() for path in encoder.folder.iterdir()}, pipeline

    return fill


def test_what_does_not_fit_the_device_is_streamed_with_the_same_result(base, large_t5, fill, monkeypatch, caplog):
    size = size_of(large_t5)
    # How much of T5 is there whenever one of its layers computes.
    there = []
    forward = nn.Linear.forward

    def watched(layer, x):
        if layer in watched.layers:
            there.append(sum(p.numel() * p.element_size() for p in watched.t5.parameters() if not p.is_meta))
        return forward(layer, x)

    def watch(pipeline, device):
        bring_when_used(pipeline, device)
        watched.t5, watched.layers = pipeline.text_encoder_2, set(pipeline.text_encoder_2.modules())

    bring_when_used = trainer.bring_when_used
    monkeypatch.setattr(nn.Linear, "forward", watched)
    monkeypatch.setattr(trainer, "bring_when_used", watch)
    with caplog.at_level("INFO", "train_semantic_fill_lora"):
        whole, _ = fill(size)
        assert set(there) == {size} and "streamed" not in caplog.text
        there.clear()
        streamed, pipeline = fill(size - 1)
    linear = [module for module in pipeline.text_encoder_2.modules() if isinstance(module, nn.Linear)]
    # Two captions and the empty one.
    assert len(there) == 3 * len(linear) and max(there) == max(map(size_of, linear)) < size / 10
    (message,) = [record.message for record in caplog.records if "streamed" in record.message]
    assert "text_encoder_2 is streamed through cpu layer by layer" in message
    assert not any(p.is_meta for part in (pipeline.text_encoder, pipeline.vae) for p in part.parameters())
    # A byte makes the difference, and only to where the weights are.
    assert len(whole) == 9 and streamed == whole
    pipeline.remove_all_hooks()
    originals = {"text_encoder": base.text_encoder, "text_encoder_2": large_t5, "vae": base.vae}
    for name, original in originals.items():
        part = getattr(pipeline, name)
        assert not any(hasattr(module, "_hf_hook") for module in part.modules())
        after, before = part.state_dict(), original.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    # Where there is no room at all, all of them are.
    everything, pipeline = fill(-1)
    assert everything == whole
    assert all(p.is_meta for part in (pipeline.text_encoder, pipeline.vae) for p in part.parameters())


def test_a_run_that_streams_its_encoders_trains_the_same(base_folder, triptych_folder, tmp_path, monkeypatch):
    whole = run(base_folder, tmp_path / "whole", "--max_train_steps", 1, data=triptych_folder)
    offloaded = []
    monkeypatch.setattr(trainer, "device_memory", lambda device: (0, 0))
    monkeypatch.setattr(trainer, "cpu_offload", lambda *args: offloaded.append(accelerate.cpu_offload(*args)))
    streamed = run(base_folder, tmp_path / "streamed", "--max_train_steps", 1, data=triptych_folder)
    assert_same_weights(whole, streamed)
    assert [type(part).__name__ for part in offloaded] == ["CLIPTextModel", "T5EncoderModel", "AutoencoderKL"]
    assert not any(hasattr(module, "_hf_hook") for module in offloaded[-1].modules())


@pytest.mark.parametrize(
    "device, gibibytes, dtype, streamed",
    [
        ("cuda", 7.6, torch.bfloat16, True),
        ("cuda", 11.6, torch.bfloat16, False),
        ("cuda", 15.5, torch.float32, True),
        ("cuda", 22, torch.float32, False),
        ("cpu", 0, torch.float32, False),
    ],
)
def test_whether_t5_is_streamed_is_a_matter_of_bytes(monkeypatch, device, gibibytes, dtype, streamed):
    """FLUX's T5, of 8.9 GiB in bf16, on cards of 8, 12, 16 and 24 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gibibytes * 2**30), 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    config = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **config)).to(dtype)
    asked = []
    monkeypatch.setattr(trainer, "cpu_offload", lambda part, device: asked.append(part))
    small = types.SimpleNamespace(parameters=lambda: [], to=lambda device: None)
    pipeline = types.SimpleNamespace(
        text_encoder=small,
        text_encoder_2=t5,
        vae=small,
        enable_model_cpu_offload=lambda device: asked.append("turns"),
        remove_all_hooks=lambda: None,
        to=lambda *args, **kwargs: None,
    )
    # The log needs one.
    fresh_state()
    accelerate.PartialState()
    trainer.bring_when_used(pipeline, torch.device(device))
    assert asked == ([t5] if streamed else ["turns"])


# -- LoRA layers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lora_pair():
    """The same LoRA as PEFT's layer and as the trainer's."""
    layers = []
    for custom in (None, LORA_LAYERS):
        torch.manual_seed(0)
        model = nn.Sequential(collections.OrderedDict(proj=nn.Linear(32, 48)))
        config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, target_modules=["proj"])
        if custom:
            config._register_custom_module(custom)
        layers.append(peft.inject_adapter_in_model(config, model).proj)
    assert type(layers[1]) is base_precision.MasterWeightLora
    return layers


def test_lora_layer_computes_what_peft_does(lora_pair):
    x = torch.randn(2, 5, 32, requires_grad=True)
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
    seen, casts = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                seen.append({arg.dtype for arg in args if isinstance(arg, torch.Tensor)})
            if func is torch.ops.aten._to_copy.default and args[0].shape == (2, 5, 32):
                casts.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Watch():
        out = lora_pair[1](torch.randn(2, 5, 32))
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    # Base, down, up with its sum; and in backward what the two LoRA weights and the inner values need.
    assert len(seen) == 6 and all(dtypes == {torch.bfloat16} for dtypes in seen)
    assert lora_pair[1].lora_A.default.weight.grad.dtype == torch.float32
    # The input is cast once, for the base and the LoRA.
    assert casts == [torch.float32]


def joined_backend(calls):
    """A backend that only joins products and notes how many each graph had before and has after."""

    def compiler(module, _):
        def count():
            return len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default))

        before = count()
        lora_products.JoinLoraProducts()(module.graph)
        module.graph.lint()
        module.recompile()
        calls.append((before, count()))
        return make_boxed_func(module.forward)

    # The partitioner of torch's own compiler, which finds what is computed twice.
    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)


def test_joined_products_are_fewer_and_change_no_gradient(base_folder, triptych_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lora_products, "NARROW", 4)
    expected, _ = gradients_with("none", base_folder, triptych_folder, tmp_path)
    calls = []
    got, _ = gradients_with("none", base_folder, triptych_folder, tmp_path, backend=joined_backend(calls))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6)
    # Forward: Q, K and V of either stream, and Q, K, V and the feed-forward of the single block go down as one. Backward:
    # the same for the gradients of what they went down by, and of what they read where it has one: prompts have none.
    saved = sorted(before - after for before, after in calls)
    assert saved == [3, 4, 6, 6]


def test_joined_products_leave_alone_what_needs_another():
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
        compiled = torch.compile(function, backend=joined_backend(calls), fullgraph=True)
        for got, expected in zip(compiled(*inputs), function(*inputs)):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert calls == [(2, 2), (2, 2)]
    torch.compiler.reset()


@pytest.mark.parametrize("options, joins", [((), True), (("--no-fused_lora",), False)])
def test_fused_lora_chooses_layers_and_compiler_pass(
    base_folder, triptych_folder, tmp_path, monkeypatch, options, joins
):
    compiled = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **kwargs: compiled.append((type(module).__name__, kwargs))
    )
    options = ("--compile", "--no-cache_latents", *options)
    model = build(arguments(base_folder, tmp_path, *options, data=triptych_folder))[0]
    assert {name for name, _ in compiled} == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    for _, kwargs in compiled:
        passed = kwargs["options"].get("post_grad_custom_pre_pass")
        assert isinstance(passed, lora_products.JoinLoraProducts) if joins else passed is None
    layers = {type(module) for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert layers == {base_precision.MasterWeightLora if joins else peft.tuners.lora.Linear}


@torch._dynamo.config.patch(optimize_ddp=True)
def test_compiled_blocks_stay_whole_under_ddp(base_folder, triptych_folder, tmp_path, monkeypatch):
    # Gradients of more than a MiB a block, where DDP's buckets would cut it.
    options = ("--compile", "--no-cache_latents", "--rank", 4096)
    args = arguments(base_folder, tmp_path, *options, data=triptych_folder)
    compiled = []

    def backend(module, _):
        compiled.append(module)
        return module.forward

    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: compile_module(module, backend=backend))
    torch.compiler.reset()
    model, step, samples = build(args)
    model, _ = Engine(accelerate.Accelerator(), args).prepare(model, torch.optim.SGD(model.parameters()))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        step(torch.nn.parallel.DistributedDataParallel(model), samples)
    finally:
        torch.distributed.destroy_process_group()
        torch.compiler.reset()
    blocks = len(model.transformer.transformer_blocks) + len(model.transformer.single_transformer_blocks)
    assert len(compiled) == blocks == 2


# -- Checkpointing ------------------------------------------------------------------------------------------------------


class CountProducts(TorchDispatchMode):
    """Forward products over a sum longer than the LoRA's rank, and attentions."""

    def __init__(self):
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.attentions += "scaled_dot_product" in name and "backward" not in name
        self.products += name in ("addmm", "mm") and args[-1].shape[-2] > 4
        return func(*args, **(kwargs or {}))


def gradients_with(checkpointing, base_folder, data, out, *more, backend=None, watch=None):
    args = arguments(base_folder, out, "--checkpointing", checkpointing, "--no-cache_latents", *more, data=data)
    model, step, samples = build(args)
    if backend:
        for blocks in base_precision.BLOCKS:
            for block in getattr(model.transformer, blocks):
                block.compile(backend=backend, fullgraph=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    before_backward = watch(model.transformer) if watch else lambda: None
    torch.manual_seed(0)
    loss = step(model, samples)
    before_backward()
    # Under such a mode compiled blocks would be computed again eagerly, and keep other tensors than they did.
    with contextlib.nullcontext() if backend else CountProducts() as count:
        loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, count


def test_checkpointing_changes_what_is_computed_again_and_no_gradient(
    base_folder, triptych_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(training_speed, "NARROW", 4)
    results = {
        name: gradients_with(name, base_folder, triptych_folder, tmp_path) for name in training_speed.CHECKPOINTING
    }
    expected, without = results["none"]
    for name, (gradients, _) in results.items():
        assert all(torch.equal(gradients[n], expected[n]) for n in expected), name
    # Two blocks: one attention each, 6 + 2 + 4 and 5 LoRA layers whose base products are long, and the modulations.
    for name in ("full", "offload"):
        assert results[name][1].attentions == 2 and results[name][1].products - without.products >= 17
    assert results["selective"][1].attentions == 0
    assert results["selective"][1].products == without.products


@pytest.mark.parametrize("checkpointing", ["selective", "full", "offload"])
def test_checkpointing_with_compiled_blocks(base_folder, triptych_folder, tmp_path, checkpointing):
    expected, _ = gradients_with("none", base_folder, triptych_folder, tmp_path)
    got, _ = gradients_with(checkpointing, base_folder, triptych_folder, tmp_path, backend="aot_eager")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", ["selective", "full", "offload"])
def test_dropout_is_drawn_again_as_it_was(base_folder, triptych_folder, tmp_path, checkpointing):
    more = (base_folder, triptych_folder, tmp_path, "--lora_dropout", 0.5)
    expected, _ = gradients_with("none", *more)
    got, _ = gradients_with(checkpointing, *more)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("checkpointing", ["full", "offload"])
def test_offload_leaves_no_block_input_on_the_device(
    base_folder, triptych_folder, tmp_path, monkeypatch, checkpointing, backend
):
    """Here the device is a CPU too: the hooks are made to copy, as they do from a GPU, and what is left is counted."""
    pinned, inputs, copied = [], [], []

    class Save(save_on_cpu):
        def __init__(self, pin_memory):
            pinned.append(pin_memory)
            super().__init__(pin_memory=True)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: copied.append(tensor.shape) or pack(tensor)

    def watch(transformer):
        around = transformer._gradient_checkpointing_func

        def noted(block, *args):
            inputs.extend((tokens.shape, StorageWeakRef(tokens.untyped_storage())) for tokens in args[:2])
            return around(block, *args)

        transformer._gradient_checkpointing_func = noted

        def before_backward():
            left = sum(not storage.expired() for _, storage in inputs)
            # Text and image tokens of two blocks.
            assert len(inputs) == 4 and left == (0 if checkpointing == "offload" else 4)

        return before_backward

    expected, _ = gradients_with("none", base_folder, triptych_folder, tmp_path)
    monkeypatch.setattr(training_speed, "save_on_cpu", Save)
    more = {"backend": backend, "watch": watch}
    got, _ = gradients_with(checkpointing, base_folder, triptych_folder, tmp_path, **more)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    # Nothing else is copied: the embeddings are the same for all blocks. Only a GPU takes from pinned memory.
    tokens = [shape for shape, _ in inputs] if checkpointing == "offload" else []
    assert sorted(shape for shape in copied if shape.numel()) == sorted(tokens) and not any(pinned)


def test_gradient_checkpointing_is_full(base_folder):
    args = arguments(base_folder, "out", "--gradient_checkpointing", "--train_data_dir", "d")
    assert args.checkpointing == "full"
    assert arguments(base_folder, "out", "--train_data_dir", "d").checkpointing == "none"


def test_attention_backend_reaches_every_block(base_folder, triptych_folder, tmp_path):
    args = arguments(
        base_folder, tmp_path, "--attention_backend", "_native_math", "--no-cache_latents", data=triptych_folder
    )
    model = build(args)[0]
    backends = {processor._attention_backend for processor in model.transformer.attn_processors.values()}
    assert {backend.value for backend in backends} == {"_native_math"}


# -- Prompt length ------------------------------------------------------------------------------------------------------


def test_prompts_as_long_as_the_longest_and_painting_uses_the_same(
    base_folder, triptych_folder, tmp_path, monkeypatch
):
    out = run(base_folder, tmp_path, "--max_train_steps", 1, "--max_sequence_length", "auto", data=triptych_folder)
    # "caption 0" is 9 letters, the mark before it, and the end: up to 16.
    with safetensors.safe_open(out / LORA_FILE, "pt") as file:
        assert json.loads(file.metadata()[SEMANTIC_METADATA_KEY])["max_sequence_length"] == 16
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    pipe.set_progress_bar_config(disable=True)
    lengths = []
    encode = pipe._get_t5_prompt_embeds
    monkeypatch.setattr(
        pipe, "_get_t5_prompt_embeds", lambda **kw: lengths.append(kw["max_sequence_length"]) or encode(**kw)
    )
    image = torch.rand(1, 3, 32, 32)

    def paint(**more):
        pipe(
            "x", image=image, semantic_image=image if more.pop("guided", True) else None, num_inference_steps=1, **more
        )

    paint(guided=False)
    pipe.load_lora_weights(str(out))
    paint()
    paint(max_sequence_length=32)
    pipe.unload_lora_weights()
    paint(guided=False)
    assert lengths == [512, 16, 32, 512]


def test_longest_prompt(base):
    class Captions(list):
        caption = list.__getitem__

    for captions, expected in ((["a", "b" * 30], 32), (["b" * 31], 48), (["a" * 2000], 512)):
        assert trainer.longest_prompt(base.tokenizer_2, Captions(captions)) == expected


# -- The choice of --fast -----------------------------------------------------------------------------------------------


FLUX_FILL = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 384,
    "out_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "pooled_projection_dim": 768,
}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU of so many free GiB, as far as the choice asks, and FLUX.1-Fill-dev's shape on disk."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(FLUX_FILL))

    def choose(gibibytes, *options, capability=(9, 0), batch=4, cudnn=False):
        monkeypatch.setattr(training_speed, "cudnn_attends", lambda *shape: cudnn)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gibibytes * 2**30, 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        args = arguments(tmp_path, "out", "--rank", 16, "--fast", *options, "--train_data_dir", "d")
        args.train_batch_size = batch
        return choose_plan(args, 2560, torch.device("cuda", 0), torch.bfloat16)

    return choose


def test_fast_takes_what_fits(gpu):
    assert gpu(139)[0] == Plan("fp8x2", "none", True)
    assert gpu(78)[0] == Plan("fp8", "none", True)
    assert gpu(22, batch=1)[0] == Plan("fp8", "full", True)
    assert gpu(12, batch=1)[0] == Plan("nf4", "full", True)
    assert gpu(9.5, batch=1)[0] == Plan("nf4", "offload", True)
    plan, reason = gpu(4, batch=1)
    assert plan == Plan("nf4", "offload", True) and "nothing fits" in reason
    # An older GPU multiplies no fp8, and its attention is not tried.
    plan, reason = gpu(139, capability=(8, 0), cudnn=True)
    assert plan == Plan("bf16", "none", True) and "no fp8 products" in reason


def test_what_tensors_hold_is_not_free(monkeypatch):
    """As the encoders do with --no-cache_latents, while the allocator keeps another GiB for later."""
    for name, gibibytes in (("memory_reserved", 11), ("memory_allocated", 10)):
        monkeypatch.setattr(torch.cuda, name, lambda device, gibibytes=gibibytes: gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * 2**30, 0))
    assert training_speed.device_memory(torch.device("cuda", 0))[0] == 13 * 2**30


def test_fast_takes_cudnn_attention_where_it_works(gpu):
    assert gpu(78, cudnn=True)[0] == Plan("fp8", "none", True, "_native_cudnn")
    for options in (["--attention_backend", "native"], ["--no-compile"]):
        assert gpu(78, *options, cudnn=True)[0].attention_backend == "native"


@pytest.mark.parametrize("options, warned", [([], True), (["--compile"], False)])
def test_cudnn_attention_layer_by_layer_is_warned_of(base_folder, caplog, options, warned):
    args = arguments(
        base_folder, "out", "--attention_backend", training_speed.CUDNN, *options, "--train_data_dir", "d"
    )
    fresh_state()
    trainer.Accelerator(cpu=True)
    trainer.announce(types.SimpleNamespace(semantic_attention=None), args)
    assert ("--compile" in caplog.text) == warned


def test_a_trial_of_cudnn_that_dies_is_no_error():
    # There is no GPU at that place.
    assert not training_speed.cudnn_attends((1, 16, 2, 16), torch.device("cuda", 99), torch.bfloat16)


def test_fast_leaves_what_was_passed(gpu):
    assert gpu(139, "--base_precision", "nf4", "--checkpointing", "full", "--no-compile")[0] == Plan(
        "nf4", "full", False
    )
    assert gpu(78, "--base_precision", "bf16")[0].base_precision == "bf16"


@pytest.mark.parametrize(
    "plan, tokens, gibibytes, options",
    [
        (Plan("bf16", "full", False), 4 * 2560, 28.8, []),
        (Plan("bf16", "none", False), 4 * 2560, 83.2, []),
        (Plan("bf16", "full", True), 4 * 2560, 27.7, []),
        (Plan("bf16", "none", True), 4 * 2560, 71.9, []),
        (Plan("bf16", "none", True), 4 * 2176, 64.6, []),
        (Plan("bf16", "full", False), 2560, 24.5, []),
        (Plan("fp8", "none", True), 4 * 2560, 72.1, []),
        (Plan("fp8x2", "none", True), 4 * 2128, 73.1, []),
        (Plan("fp8x2", "none", True), 4 * 2560, 83.2, []),
        (Plan("fp8x2", "full", True), 4 * 2560, 28.1, []),
        (Plan("fp8", "full", True), 2560, 12.9, ["--use_8bit_adam"]),
        (Plan("nf4", "offload", True), 2560, 6.9, ["--use_8bit_adam"]),
        (Plan("bf16", "full", True), 2560, 23.9, ["--use_8bit_adam"]),
        (Plan("int8", "full", True), 2560, 13.0, ["--use_8bit_adam"]),
        (Plan("nf4", "full", True), 2560, 7.53, ["--use_8bit_adam"]),
    ],
)
def test_estimate_agrees_with_what_was_measured(gpu, tmp_path, plan, tokens, gibibytes, options):
    args = arguments(tmp_path, "out", "--rank", 16, "--train_data_dir", "d", *options)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(FLUX_FILL)
    estimate = training_speed.estimate_peak(plan, transformer, tokens, args) / 2**30
    assert estimate == pytest.approx(gibibytes, rel=0.08)


def test_what_the_readme_says_of_cards_is_the_estimate(gpu, tmp_path):
    table = re.findall(
        r"^\| (\d+)[^|]* \| (\d) \| `([^`]*)`[^|]* \| ([\d.]+) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert [int(card) for card, *_ in table] == [8, 12, 16, 24, 48, 80, 141]
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(FLUX_FILL)
    for _, batch, flags, gibibytes in table:
        options = ["--rank", 16, "--mixed_precision", "bf16", "--train_data_dir", "d", *flags.split()]
        args = arguments(tmp_path, "out", *options)
        plan = Plan(args.base_precision, args.checkpointing, args.compile)
        estimate = training_speed.estimate_peak(plan, transformer, int(batch) * 2560, args) / 2**30
        assert f"{estimate:.1f}" == gibibytes, flags


def test_fast_run_says_what_it_chose(base_folder, triptych_folder, tmp_path, caplog):
    with caplog.at_level("INFO", "train_semantic_fill_lora"):
        run(base_folder, tmp_path, "--fast", "--max_train_steps", 1, data=triptych_folder)
    (message,) = [record.message for record in caplog.records if "--fast chose" in record.message]
    assert (
        "--base_precision bf16 --checkpointing none --no-compile --attention_backend native: cpu gains nothing"
        in message
    )


# -- The recipe of the README -------------------------------------------------------------------------------------------


def test_fast_recipe_paints_nearly_the_same(base, base_folder, triptych_folder, tmp_path):
    out = run(base_folder, tmp_path, "--max_train_steps", 2, "--learning_rate", 1e-2, data=triptych_folder)
    components = copy.deepcopy({name: part for name, part in base.components.items()})
    pipe = FluxFillSemanticPipeline(**components).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(out))
    view = torch.rand(1, 3, 32, 32)

    def paint():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "output_type": "pt", "generator": generator}
        return pipe("a hill", image=view, semantic_image=view, **options).images.float()

    slow = paint()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.semantic_attention is not None
    assert not any(isinstance(module, peft.tuners.lora.LoraLayer) for module in pipe.transformer.modules())
    assert (paint() - slow).abs().mean() < 0.01
    quantise_blocks(pipe.transformer, "fp8")
    assert any(isinstance(module, FrozenLinear) for module in pipe.transformer.modules())
    in_fp8 = paint()
    assert 0 < (in_fp8 - slow).abs().mean() < 0.02
    # A threshold that everything is under skips the other blocks from the second step on.
    calls = []
    block = pipe.transformer.single_transformer_blocks[0]
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    block.norm.register_forward_hook(lambda *_: calls.append(1))
    paint()
    assert len(calls) == 1
