# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The frozen base in fewer bits: its products and gradients, how it is loaded, and what training and painting make of it."""

import copy

import peft.tuners.lora
import pytest
import torch
import torch.nn as nn
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from helpers import arguments, assemble, first_loss, gradients, run, weights_of

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_fill import quantizer as quantizer_module
from semantic_fill.precision import BLOCKS, PRECISIONS, FrozenLinear, quantize_blocks
from semantic_fill.quantizer import FrozenLinearConfig


QUANTIZED = [name for name, cls in PRECISIONS.items() if cls is not None]
# Relative error of one product with normally distributed factors: half a step of the format, on average.
ERRORS = {"fp8": 0.05, "fp8x2": 0.05, "int8": 0.02, "int8mm": 0.02, "nf4": 0.12}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def quantized_linear(precision: str, linear: nn.Linear) -> FrozenLinear:
    frozen = PRECISIONS[precision](linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    frozen.quantize(linear.weight.detach())
    frozen.bias = linear.bias
    return frozen


# -- One layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED)
def test_product_and_gradient(precision):
    torch.manual_seed(0)
    linear = nn.Linear(256, 128).bfloat16()
    frozen = quantized_linear(precision, linear)
    x = torch.randn(3, 20, 256, dtype=torch.bfloat16, requires_grad=True)
    out, expected = frozen(x), linear(x)
    grad = torch.randn_like(out)
    assert out.dtype == torch.bfloat16 and out.shape == expected.shape
    assert relative_error(out, expected) < ERRORS[precision]
    input_gradients = [torch.autograd.grad(y, x, grad)[0] for y in (out, expected)]
    assert relative_error(*input_gradients) < ERRORS[precision]
    tensors = (*frozen.named_parameters(), *frozen.named_buffers())
    stored = [tensor for name, tensor in tensors if name in ("weight", "columns")]
    assert sum(tensor.nbytes for tensor in stored) == linear.weight.numel() * frozen.bits // 8
    assert not any(parameter.requires_grad for parameter in frozen.parameters() if parameter is not frozen.bias)


@pytest.mark.parametrize("precision", ["fp8", "fp8x2", "int8", "int8mm"])
def test_each_row_has_its_scale(precision):
    torch.manual_seed(0)
    sizes = torch.logspace(-4, 4, 32)
    linear = nn.Linear(64, 32, bias=False).bfloat16()
    x = (torch.randn(32, 64) * sizes[:, None]).bfloat16().requires_grad_()
    grad = (torch.randn(32, 32) * sizes[:, None]).bfloat16()

    def errors(dim):
        out, expected = quantized_linear(precision, linear)(x), linear(x)
        pairs = (out, expected), (torch.autograd.grad(y, x, grad)[0] for y in (out, expected))
        return [((got - want).float().norm(dim=dim) / want.float().norm(dim=dim)).max() for got, want in pairs]

    # With one scale for the whole tensor, the small rows would be lost.
    assert max(errors(dim=1)) < 2 * ERRORS[precision]
    linear.weight.data *= sizes.bfloat16()[:, None]
    x, grad = torch.randn_like(x).requires_grad_(), torch.randn_like(grad) / sizes.bfloat16()
    assert errors(dim=0)[0] < 2 * ERRORS[precision] and errors(dim=1)[1] < 2 * ERRORS[precision]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("columns", [48, 64, 256])
def test_nf4_is_restored_to_the_bit(columns, compiled):
    torch.manual_seed(0)
    linear = nn.Linear(columns, 80, bias=False, dtype=torch.bfloat16)
    # Blocks of 64 cross the ends of rows. bitsandbytes reads them correctly where they are the rows.
    packed, state = quantize_4bit(linear.weight.detach().view(-1, 64), quant_type="nf4", compress_statistics=True)
    expected = dequantize_4bit(packed, state).view(80, columns)
    layer = quantized_linear("nf4", linear)
    x = torch.eye(columns, dtype=torch.bfloat16, requires_grad=True)
    out = (torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer)(x)
    assert torch.equal(out.detach(), expected.t())
    (gradient,) = torch.autograd.grad(out, x, torch.eye(columns, 80, dtype=torch.bfloat16))
    rows = min(columns, 80)
    assert torch.equal(gradient[:rows], expected[:rows]) and not gradient[rows:].any()


@pytest.mark.parametrize("precision", QUANTIZED)
def test_compiled_layers_compute_the_same_and_keep_no_restored_weight(precision):
    torch.manual_seed(0)
    layers = nn.Sequential(*(quantized_linear(precision, nn.Linear(64, 64, dtype=torch.bfloat16)) for _ in range(2)))
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(32, 64, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = torch.compile(layers, fullgraph=True)(x)
    assert kept and all(tensor.numel() < 64 * 64 for tensor in kept if tensor.dtype.itemsize > 1)
    expected = layers(x)
    pairs = (out, expected), [torch.autograd.grad(y, x, grad)[0] for y in (out, expected)]
    # A value that lies halfway between two of the format may be rounded to either.
    assert all(relative_error(got, want) < 0.02 for got, want in pairs)


@pytest.mark.parametrize("precision, name", [("fp8", "_scaled_mm"), ("int8mm", "_int_mm")])
def test_both_products_are_of_8_bits(precision, name, monkeypatch):
    if not PRECISIONS[precision].suits(torch.device("cpu"), torch.bfloat16):
        pytest.skip("this torch multiplies no fp8 on a CPU")
    products = []
    product = getattr(torch, name)
    monkeypatch.setattr(torch, name, lambda a, b, *args, **kw: products.append((a, b)) or product(a, b, *args, **kw))
    frozen = quantized_linear(precision, nn.Linear(64, 32).bfloat16())
    frozen(torch.randn(17, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    dtype = {"fp8": torch.float8_e4m3fn, "int8mm": torch.int8}[precision]
    assert [(a.dtype, b.dtype) for a, b in products] == [(dtype,) * 2] * 2
    # In another dtype than bfloat16 or for fewer rows than the hardware takes, the weight is dequantized instead.
    x = torch.randn(17, 64) if precision == "fp8" else torch.randn(16, 64, dtype=torch.bfloat16)
    frozen(x.requires_grad_()).sum().backward()
    assert len(products) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_products_are_those_of_the_nearest_integers(dtype):
    torch.manual_seed(0)
    linear = nn.Linear(48, 32).to(dtype)
    frozen = quantized_linear("int8mm", linear)
    x = torch.randn(2, 20, 48, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 20, 32, dtype=dtype)

    def nearest(rows):
        """Integers from -127 to 127 and the size of one, for each row."""
        unit = rows.double().abs().amax(-1, keepdim=True) / 127
        return (rows.double() / unit).round(), unit

    (weight, weight_unit), (rows, unit) = nearest(linear.weight.detach()), nearest(x.detach())
    expected = (rows @ weight.t()) * unit * weight_unit.t() + linear.bias.detach().double()
    out = frozen(x)
    assert out.dtype == dtype
    # Numbers that lie so near to half a unit that float32 rounds them the other way are rare.
    rounding = max(1e-3, torch.finfo(dtype).eps)
    assert relative_error(out.detach(), expected) < rounding
    rows, unit = nearest(grad.double() * weight_unit.t())
    (got,) = torch.autograd.grad(out, x, grad)
    assert got.dtype == dtype
    assert relative_error(got, (rows @ weight) * unit) < rounding


# -- The base -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED)
def test_loading_quantizes_each_layer_as_it_comes(base, base_folder, precision, monkeypatch):
    cls, order, frozen_layers = PRECISIONS[precision], [], []
    quantize, replace_linears = cls.quantize, quantizer_module.replace_linears

    def quantize_and_note(self, weight):
        waiting = sum(layer.weight.device.type == "meta" for layer in frozen_layers if layer is not self)
        order.append(waiting)
        quantize(self, weight)

    def replace_and_note(*args):
        pairs = replace_linears(*args)
        frozen_layers.extend(frozen for _, frozen in pairs)
        return pairs

    monkeypatch.setattr(quantizer_module, "replace_linears", replace_and_note)
    monkeypatch.setattr(cls, "quantize", quantize_and_note)
    loaded = FluxTransformer2DModel.from_pretrained(
        base_folder,
        subfolder="transformer",
        dtype=torch.bfloat16,
        quantization_config=FrozenLinearConfig.of(precision, "cpu"),
    )
    layers = [module for module in loaded.modules() if isinstance(module, FrozenLinear)]
    # While the first layer was quantized, no other weight had arrived. While the last one was, all had.
    assert order == list(range(len(layers) - 1, -1, -1))
    in_blocks = [m for name in BLOCKS for m in getattr(loaded, name).modules()]
    assert all(isinstance(module, FrozenLinear) for module in in_blocks if isinstance(module, nn.Linear))
    assert not isinstance(loaded.x_embedder, FrozenLinear) and loaded.dtype == torch.bfloat16

    in_place = copy.deepcopy(base.transformer).bfloat16()
    quantize_blocks(in_place, precision)
    expected, got = in_place.state_dict(), loaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_unknown_precision(base):
    with pytest.raises(ValueError, match="`precision` has to be one of .* but is 'fp3'"):
        quantize_blocks(base.transformer, "fp3")


# -- Training and painting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED)
def test_loss_and_lora_gradients_stay_near(base_folder, triptych_folder, tmp_path, precision):
    results = {}
    for name in ("bf16", precision):
        more = ["--base_precision", name, "--mixed_precision", "bf16", "--no-cache_latents"]
        built = assemble(arguments(base_folder, tmp_path / name, *more, data=triptych_folder))
        loss = first_loss(built)
        loss.backward()
        lora = {n: gradient for n, gradient in gradients(built).items() if "lora_" in n}
        assert all(gradient.dtype == torch.float32 for gradient in lora.values())
        results[name] = loss.item(), torch.cat([gradient.flatten() for gradient in lora.values()])
    (loss, got), (expected_loss, expected) = results[precision], results["bf16"]
    assert loss == pytest.approx(expected_loss, rel=0.01)
    least = {"fp8": 0.98, "fp8x2": 0.98, "int8": 0.99, "int8mm": 0.99, "nf4": 0.93}[precision]
    assert torch.cosine_similarity(got, expected, dim=0) > least


def test_train_save_resume_with_a_quantized_base(base_folder, triptych_folder, tmp_path):
    options = ["--base_precision", "nf4", "--checkpointing", "selective", "--use_8bit_adam", "--learning_rate", 1e-2]
    options += ["--max_train_steps", 2]
    out = run(base_folder, tmp_path, *options, "--checkpointing_steps", 1, data=triptych_folder)
    saved, first = weights_of(out), weights_of(out / "checkpoint-1")
    assert all(weight.dtype == torch.float32 for weight in saved.values())
    assert any(weight.abs().max() > 1e-3 for name, weight in saved.items() if "lora_B" in name)
    run(base_folder, tmp_path, *options, "--resume_from_checkpoint", "checkpoint-1", data=triptych_folder)
    again = weights_of(out)
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert not all(torch.equal(first[name], again[name]) for name in saved)
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(str(out))


def test_fast_recipe_paints_nearly_the_same(base, base_folder, triptych_folder, tmp_path):
    """The recipe of the README: fuse the LoRA, quantize the base, and cache the first block."""
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
    quantize_blocks(pipe.transformer, "fp8")
    assert any(isinstance(module, FrozenLinear) for module in pipe.transformer.modules())
    in_fp8 = paint()
    assert 0 < (in_fp8 - slow).abs().mean() < 0.02
    # With a threshold that everything is below, all blocks but the first are skipped from the second step on.
    calls = []
    block = pipe.transformer.single_transformer_blocks[0]
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    block.norm.register_forward_hook(lambda *_: calls.append(1))
    paint()
    assert len(calls) == 1
