# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The frozen transformer in fewer bits: less memory, and with fp8 and int8mm faster products.

`PRECISIONS` is the one place that knows the precisions. Each is an `nn.Linear` that holds a quantized weight and sends
gradients to its input; the weight itself is not trained. The linear layers of the blocks are replaced, which hold 99 %
of FLUX's parameters. The embeddings and the output projection stay in the dtype of the run.

No library serves here: torchao and bitsandbytes quantize a layer's forward pass, while training a LoRA also needs the
product that sends gradients through the frozen weight to be quantized, compiled and recomputed under checkpointing.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel


FP8 = torch.float8_e4m3fn
# A product of int8 on a GPU takes more rows than this.
INT8_ROWS = 16
BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def blocks_of(transformer: FluxTransformer2DModel) -> list[Any]:
    """All blocks in the order in which a forward pass calls them."""
    return [block for name in BLOCKS for block in getattr(transformer, name)]


def quantize_rows(rows: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Scales each row so that its largest value becomes `largest`.

    Args:
        rows (`torch.Tensor` of shape `(rows, columns)`):
            Any floating dtype.
        largest (`float`):
            The largest number of the target format.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the scaled rows in float32 and their scales `(rows, 1)` in float32, so
        that `rows = scaled * scales`.
    """
    scales = (rows.abs().amax(dim=-1, keepdim=True).float() / largest).clamp(min=1e-12)
    return rows.float() / scales, scales


def to_fp8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` to e4m3, whose largest number is 448."""
    scaled, scales = quantize_rows(rows, torch.finfo(FP8).max)
    return scaled.to(FP8), scales


def fp8_product(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `(scale_a * a) @ (scale_b * b).T + bias` for fp8 `a` `(m, k)` and `b` `(n, k)`, with scales `(m, 1)` and `(1, n)`.
    Like a stored weight, `b` comes as uint8 bytes.

    `_scaled_mm` is private. Its public successor, `torch.nn.functional.scaled_mm`, takes private enums itself and is not
    in all versions of torch that are supported here.
    """
    return torch._scaled_mm(a, b.view(FP8).t(), scale_a, scale_b, bias, out_dtype=dtype, use_fast_accum=True)


def to_int8(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` to int8, from -127 to 127."""
    scaled, scales = quantize_rows(rows, 127)
    return scaled.round().to(torch.int8), scales


def int8_product(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    `fp8_product` for int8, summed in int32. A compiler fuses the scales into what follows.

    `_int_mm` is private, and torch has no public product of int8. On a GPU it takes more than `INT8_ROWS` rows, and
    sizes `k` and `n` that are multiples of 8.
    """
    out = torch._int_mm(a, b.t()) * scale_a * scale_b
    return (out if bias is None else out + bias).to(dtype)


# How input and gradient are quantized for a weight of this dtype, and the product with it.
EIGHT_BITS = {torch.uint8: (to_fp8, fp8_product), torch.int8: (to_int8, int8_product)}


class _EightBitLinear(torch.autograd.Function):
    """`x @ weight.T + bias` and the gradient of x, both as products of 8 bits with one scale a row."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias, columns):
        ctx.save_for_backward(weight, scale, columns)
        quantize, product = EIGHT_BITS[weight.dtype]
        rows, row_scales = quantize(x.flatten(0, -2))
        return product(rows, weight, row_scales, scale.t(), x.dtype, bias).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        weight, scale, columns = ctx.saved_tensors
        quantize, product = EIGHT_BITS[weight.dtype]
        # This product sums over the weight's rows, so their scales have to be applied to the gradient beforehand.
        rows, row_scales = quantize(grad.flatten(0, -2) * scale.t())
        # The hardware needs both factors contiguous along the dimension that is summed over. For int8 in the other order
        # there is a kernel, which takes several times as long as both together.
        columns = weight.t().contiguous() if columns is None else columns
        ones = torch.ones(1, weight.shape[1], dtype=torch.float32, device=grad.device)
        out = product(rows, columns, row_scales, ones, grad.dtype)
        return out.unflatten(0, grad.shape[:-1]), None, None, None, None


class _WeightOnlyLinear(torch.autograd.Function):
    """
    `x @ weight.T + bias` with a weight that is dequantized for the product and once more for the gradient, and never kept.

    A compiler would merge two equal dequantizations into one and keep its result from forward to backward. So backward
    writes it with one more dimension, which makes it a different expression.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, bias):
        ctx.save_for_backward(weight, scale)
        return F.linear(x, restore_rows(weight, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        weight, scale = ctx.saved_tensors
        return grad @ restore_rows(weight[None], scale[None], grad.dtype)[0], None, None, None


class _Nf4Linear(torch.autograd.Function):
    """`_WeightOnlyLinear` for weights that `restore_nf4` dequantizes."""

    @staticmethod
    def forward(ctx, x, packed, scales, values, scale_values, scale_scales, scale_offset, bias):
        ctx.save_for_backward(packed, scales, values, scale_values, scale_scales, scale_offset)
        weight = restore_nf4(packed, scales, values, scale_values, scale_scales, scale_offset, x.dtype)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        packed, scales, values, scale_values, scale_scales, scale_offset = ctx.saved_tensors
        stored = packed[None], scales[None], values, scale_values, scale_scales, scale_offset
        return grad @ restore_nf4(*stored, grad.dtype)[0], None, None, None, None, None, None, None


def restore_rows(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Dequantizes int8 or fp8 (stored as uint8 bytes) `(..., rows, columns)` with one scale a row `(..., rows, 1)`."""
    weight = weight.view(FP8).to(dtype) if weight.dtype == torch.uint8 else weight
    return weight * scale.to(dtype)


def restore_nf4(
    packed: torch.Tensor,
    scales: torch.Tensor,
    values: torch.Tensor,
    scale_values: torch.Tensor,
    scale_scales: torch.Tensor,
    scale_offset: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """
    Dequantizes NormalFloat weights as bitsandbytes' `dequantize_4bit` does, in operations that a compiler can fuse into
    one kernel.

    Args:
        packed (`torch.uint8` of shape `(..., rows, columns / 2)`):
            Two indices into `values` a byte, the first in the upper half.
        scales (`torch.uint8` of shape `(..., blocks)`):
            An index into `scale_values` for each block of the weight, row by row.
        values (`torch.float32` of shape `(16,)`):
            The numbers of the format.
        scale_values (`torch.float32` of shape `(256,)`):
            The numbers of the scales' format.
        scale_scales (`torch.float32` of shape `(ceil(blocks / 256),)`):
            One for each 256 scales.
        scale_offset (`torch.float32` without dimensions):
            Added to every scale.

    Returns:
        `torch.Tensor` of shape `(..., rows, columns)` and the dtype.
    """
    blocks = scales.shape[-1]
    scales = scale_values[scales.int()] * scale_scales.repeat_interleave(256)[:blocks] + scale_offset
    halves = torch.arange(4, -1, -4, dtype=torch.int32, device=packed.device)
    indices = (packed[..., None] >> halves) & 15
    weight = values[indices].view(*scales.shape, -1) * scales[..., None]
    return weight.view(*packed.shape[:-1], -1).to(dtype)


class FrozenLinear(nn.Linear):
    """
    A linear layer with a quantized weight.

    `weight` holds integers, so that neither PEFT nor `.to(dtype)` mistakes it for a floating point weight. `bias` is
    unchanged.
    """

    bits: int

    def __init__(self, in_features: int, out_features: int, bias: bool, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.requires_grad_(False)

    @classmethod
    def suits(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a device multiplies inputs of a dtype as it should. Elsewhere a weight is dequantized first."""
        return True

    def quantize(self, weight: torch.Tensor) -> None:
        """Stores a weight `(out_features, in_features)` quantized, on the device that it is on."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not x.numel():
            # The target's pass of `causal_forward` has no prompt, and not every kernel takes no rows.
            return x.new_empty(*x.shape[:-1], self.out_features)
        return self.product(x, None if self.bias is None else self.bias.to(x.dtype))

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError


class Int8Linear(FrozenLinear):
    """8-bit integers with one scale an output channel, dequantized to the dtype of the input for each product."""

    bits = 8

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", None, persistent=False)

    def quantize(self, weight: torch.Tensor) -> None:
        rows, self.scale = to_int8(weight)
        self.weight = nn.Parameter(rows, requires_grad=False)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _WeightOnlyLinear.apply(x, self.weight, self.scale, bias)


class Int8ProductLinear(Int8Linear):
    """
    `Int8Linear` whose input and gradient are quantized too, row by row, so that both products run in int8.

    Modulation has a row a sample, too few for such a product. There the weight is dequantized.
    """

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x[..., 0].numel() > INT8_ROWS:
            return _EightBitLinear.apply(x, self.weight, self.scale, bias, None)
        return super().product(x, bias)


class Fp8Linear(Int8Linear):
    """
    8-bit floats (e4m3) with one scale an output channel.

    Where the hardware multiplies fp8, input and gradient are quantized too, row by row, and both products run in fp8.
    Elsewhere the weight is dequantized for each product.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("columns", None, persistent=False)

    @classmethod
    def suits(cls, device: torch.device, dtype: torch.dtype) -> bool:
        # With one scale a row, `_scaled_mm` can only write bfloat16, and on CPUs it knows them from torch 2.12 on.
        if device.type == "cuda":
            return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 9)
        return dtype == torch.bfloat16 and (device.type != "cpu" or torch.__version__ >= "2.12")

    def quantize(self, weight: torch.Tensor) -> None:
        rows, self.scale = to_fp8(weight)
        self.weight = nn.Parameter(rows.view(torch.uint8), requires_grad=False)
        # Compiled code does not ask the device.
        self.multiplies = self.suits(weight.device, torch.bfloat16)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.multiplies and x.dtype == torch.bfloat16:
            return _EightBitLinear.apply(x, self.weight, self.scale, bias, self.columns)
        return _WeightOnlyLinear.apply(x, self.weight, self.scale, bias)


class Fp8TwiceLinear(Fp8Linear):
    """fp8 with the weight stored in both orders, so that backward need not transpose it. It is as large as bf16."""

    bits = 16

    def quantize(self, weight: torch.Tensor) -> None:
        super().quantize(weight)
        self.columns = self.weight.detach().t().contiguous()


class Nf4Linear(FrozenLinear):
    """bitsandbytes' 4-bit NormalFloat (https://huggingface.co/papers/2305.14314) in blocks of 64, scales quantized."""

    bits = 4

    def quantize(self, weight: torch.Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        self.quant_state: Any
        packed, self.quant_state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        state = self.quant_state
        # Inside compiled blocks our own dequantization is as fast, and spares the host bitsandbytes' Python. On a CPU,
        # bitsandbytes also ends a block of scales at the end of each row, where the weight's blocks do not end.
        if torch.compiler.is_compiling() or self.in_features % state.blocksize:
            tables = state.code, state.state2.code, state.state2.absmax, state.offset
            return _Nf4Linear.apply(x, self.weight.view(self.out_features, -1), state.absmax, *tables, bias)
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.weight.t(), quant_state=state, bias=bias)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.weight.device.type != "meta":
            self.quant_state.to(self.weight.device)
        return self


PRECISIONS: dict[str, type[FrozenLinear] | None] = {
    "bf16": None,
    "fp8": Fp8Linear,
    "fp8x2": Fp8TwiceLinear,
    "int8": Int8Linear,
    "int8mm": Int8ProductLinear,
    "nf4": Nf4Linear,
}


def replace_linears(transformer: FluxTransformer2DModel, precision: str) -> list[tuple[nn.Linear, FrozenLinear]]:
    """Replaces the blocks' linear layers by empty ones of a precision. Returns pairs of old and new layers."""
    cls: Any = PRECISIONS[precision]
    replaced = []
    for block in blocks_of(transformer):
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                # The hardware's products need rows of a multiple of 16 bytes.
                if type(child) is nn.Linear and child.in_features % 16 == 0 and child.out_features % 16 == 0:
                    sizes = (child.in_features, child.out_features, child.bias is not None)
                    frozen = cls(*sizes, device="meta", dtype=child.weight.dtype)
                    setattr(parent, name, frozen)
                    replaced.append((child, frozen))
    if not replaced:
        raise ValueError(f"No layer of the transformer can be quantized to {precision}: no width is a multiple of 16.")
    return replaced


def quantize_blocks(transformer: FluxTransformer2DModel, precision: str) -> None:
    """
    Quantizes a transformer in place, layer by layer, on the device that it is on.

    Args:
        transformer (`FluxTransformer2DModel`):
            A transformer without LoRA layers. Fuse and unload a LoRA first.
        precision (`str`):
            One of `PRECISIONS`; `"bf16"` changes nothing.

    Raises:
        `ValueError`: if the precision is unknown.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` has to be one of {tuple(PRECISIONS)} but is {precision!r}.")
    if PRECISIONS[precision] is None:
        return
    for linear, frozen in replace_linears(transformer, precision):
        frozen.bias = linear.bias
        frozen.quantize(linear.weight.detach())
        frozen.train(linear.training).requires_grad_(False)
        # Frees the old weight before the next one is quantized.
        del linear.weight, linear.bias
