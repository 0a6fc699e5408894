# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The frozen transformer in fewer bits, and LoRA layers that compute in its dtype.

`PRECISIONS` is the one place that knows the precisions. Each is an `nn.Linear` that holds its weight quantised, sends
gradients to its input and has none itself. The linear layers of the blocks are replaced, 99 % of the parameters of
FLUX; the embeddings and the output projection stay as they are.
"""

import enum
from collections.abc import Callable

import peft.tuners.lora
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin


FP8 = torch.float8_e4m3fn
BLOCKS = ("transformer_blocks", "single_transformer_blocks")


def quantise_rows(rows: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
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
    scaled, scales = quantise_rows(rows, torch.finfo(FP8).max)
    return scaled.to(FP8), scales


class _Fp8Linear(torch.autograd.Function):
    """`x @ weight.T + bias` and the gradient of x, both as fp8 products with one scale a row."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias, columns):
        ctx.save_for_backward(weight, scale, columns)
        rows, row_scales = to_fp8(x.flatten(0, -2))
        out = torch._scaled_mm(
            rows, weight.view(FP8).t(), row_scales, scale.t(), bias, out_dtype=x.dtype, use_fast_accum=True
        )
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        weight, scale, columns = ctx.saved_tensors
        # The weight's scales run along the sum of this product, so they go into the gradient before it is quantised.
        rows, row_scales = to_fp8(grad.flatten(0, -2) * scale.t())
        # The hardware wants both factors contiguous along the sum.
        columns = (weight.t().contiguous() if columns is None else columns).view(FP8).t()
        ones = torch.ones(1, weight.shape[1], dtype=torch.float32, device=grad.device)
        out = torch._scaled_mm(rows, columns, row_scales, ones, out_dtype=grad.dtype, use_fast_accum=True)
        return out.unflatten(0, grad.shape[:-1]), None, None, None, None


class _WeightOnlyLinear(torch.autograd.Function):
    """
    `x @ weight.T + bias` with the weight restored for the product, and again for the gradient: it is never kept. A compiler
    takes what is written twice for one and would keep that. In backward it is written with one more dimension.
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
    """The same with a weight that `restore_nf4` restores."""

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
    """A weight of int8 or fp8 (as its bytes, uint8) with one scale a row."""
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
    What bitsandbytes' `dequantize_4bit` gives, as operations that a compiler fuses into one kernel.

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
    A linear layer with a quantised weight. `weight` holds integers, so that neither PEFT nor `.to(dtype)` takes it
    for something to compute with; `bias` is as it was.
    """

    bits: int

    def __init__(self, in_features: int, out_features: int, bias: bool, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.requires_grad_(False)

    def quantise(self, weight: torch.Tensor) -> None:
        """Takes over a weight `(out_features, in_features)`, on the device that it is on."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.product(x, None if self.bias is None else self.bias.to(x.dtype))

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        raise NotImplementedError


class Int8Linear(FrozenLinear):
    """8-bit integers with one scale an output channel, restored to the dtype of the input for each product."""

    bits = 8

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", None, persistent=False)

    def quantise(self, weight: torch.Tensor) -> None:
        scaled, self.scale = quantise_rows(weight, 127)
        self.weight = nn.Parameter(scaled.round().to(torch.int8), requires_grad=False)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _WeightOnlyLinear.apply(x, self.weight, self.scale, bias)


class Fp8Linear(Int8Linear):
    """
    8-bit floats (e4m3) with one scale an output channel. Where the hardware multiplies fp8, input and gradient are
    quantised too, row by row, and both products run in fp8; elsewhere the weight is restored for each product.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("columns", None, persistent=False)

    def quantise(self, weight: torch.Tensor) -> None:
        rows, self.scale = to_fp8(weight)
        self.weight = nn.Parameter(rows.view(torch.uint8), requires_grad=False)
        self.multiplies = not weight.is_cuda or torch.cuda.get_device_capability(weight.device) >= (8, 9)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # `_scaled_mm` writes bfloat16 where its scales are those of rows.
        if self.multiplies and x.dtype == torch.bfloat16:
            return _Fp8Linear.apply(x, self.weight, self.scale, bias, self.columns)
        return _WeightOnlyLinear.apply(x, self.weight, self.scale, bias)


class Fp8TwiceLinear(Fp8Linear):
    """fp8 with the weight stored in both orders, so that backward need not turn it round: as large as bf16."""

    bits = 16

    def quantise(self, weight: torch.Tensor) -> None:
        super().quantise(weight)
        self.columns = self.weight.detach().t().contiguous()


class Nf4Linear(FrozenLinear):
    """bitsandbytes' 4-bit NormalFloat (https://huggingface.co/papers/2305.14314) in blocks of 64, scales quantised."""

    bits = 4

    def quantise(self, weight: torch.Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit

        packed, self.quant_state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        state = self.quant_state
        # Compiled, its kernels are no slower, but every product waits for the host to go through its Python. On a CPU it
        # takes a block that goes over the end of a row for one that ends there.
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
    "nf4": Nf4Linear,
}


def replace_linears(transformer: FluxTransformer2DModel, precision: str) -> list[tuple[nn.Linear, FrozenLinear]]:
    """Puts empty layers of a precision in the place of the blocks' linear ones, and tells which stood where."""
    cls = PRECISIONS[precision]
    replaced = []
    for blocks in BLOCKS:
        for parent in list(getattr(transformer, blocks).modules()):
            for name, child in list(parent.named_children()):
                # The products need rows that are whole 16 bytes.
                if type(child) is nn.Linear and child.in_features % 16 == 0 and child.out_features % 16 == 0:
                    sizes = (child.in_features, child.out_features, child.bias is not None)
                    frozen = cls(*sizes, device="meta", dtype=child.weight.dtype)
                    setattr(parent, name, frozen)
                    replaced.append((child, frozen))
    return replaced


def quantise_blocks(transformer: FluxTransformer2DModel, precision: str) -> None:
    """
    Quantises a transformer in place, layer by layer, wherever it is.

    Args:
        transformer (`FluxTransformer2DModel`):
            Without LoRA, or with a fused one that was unloaded.
        precision (`str`):
            One of `PRECISIONS`; `"bf16"` leaves all as it is.

    Raises:
        `ValueError`: if the precision is none of them.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` has to be one of {tuple(PRECISIONS)} but is {precision!r}.")
    if PRECISIONS[precision] is None:
        return
    for linear, frozen in replace_linears(transformer, precision):
        frozen.bias = linear.bias
        frozen.quantise(linear.weight.detach())
        frozen.train(linear.training).requires_grad_(False)
        # Frees the old weight before the next one is quantised.
        linear.weight = linear.bias = None


# -- Loading: diffusers hands each tensor over as it reads it ----------------------------------------------------------


class _Method(str, enum.Enum):
    FROZEN = "frozen_linear"


class FrozenLinearConfig(QuantizationConfigMixin):
    """`quantization_config` for `from_pretrained`: the blocks' linear layers in one of `PRECISIONS`."""

    def __init__(self, precision: str, device: torch.device | str):
        self.quant_method, self.precision, self.device = _Method.FROZEN, precision, str(device)

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    @classmethod
    def of(cls, precision: str, device: torch.device | str) -> "FrozenLinearConfig | None":
        """`None`, which loads as usual, for a precision that quantises nothing."""
        return None if PRECISIONS[precision] is None else cls(precision, device)


class FrozenLinearQuantizer(DiffusersQuantizer):
    requires_calibration = False

    def update_device_map(self, device_map):
        return device_map or {"": self.quantization_config.device}

    def _process_model_before_weight_loading(self, model, **kwargs):
        replace_linears(model, self.quantization_config.precision)

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model

    def check_if_quantized_param(self, model, param_value, param_name, state_dict, **kwargs) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), FrozenLinear)

    def create_quantized_param(self, model, param_value, param_name, target_device, *args, dtype=None, **kwargs):
        layer = model.get_submodule(param_name.rpartition(".")[0])
        layer.quantise(param_value.to(device=target_device, dtype=dtype))

    def get_cuda_warm_up_factor(self):
        # diffusers allocates 2 / factor of the unquantised bytes at once.
        return 2 * 16 // PRECISIONS[self.quantization_config.precision].bits

    @property
    def supports_parallel_loading(self) -> bool:
        # One layer at a time is what keeps the peak low.
        return False

    @property
    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


auto.AUTO_QUANTIZER_MAPPING[_Method.FROZEN.value] = FrozenLinearQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[_Method.FROZEN.value] = FrozenLinearConfig


# -- LoRA --------------------------------------------------------------------------------------------------------------


class MasterWeightLora(peft.tuners.lora.Linear):
    """
    PEFT's layer, with its two products in the dtype of the base and the weights in float32. PEFT casts the input up to
    the weights, autocast casts it down again, and the sum is a step of its own; here one addition ends the product.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.lora_variant or args or kwargs:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        result = self.base_layer(x)
        shape, result = result.shape, result.flatten(0, -2)
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = (layer[name].weight.to(x.dtype) for layer in (self.lora_A, self.lora_B))
                low = F.linear(self.lora_dropout[name](x), down).flatten(0, -2)
                if torch.compiler.is_compiling():
                    # `addmm` would copy the whole result first; a sum becomes part of what follows.
                    result = result + low @ (self.scaling[name] * up).t()
                else:
                    result = torch.addmm(result, low, up.t(), alpha=self.scaling[name])
        return result.view(shape)


LORA_LAYERS: dict[type[nn.Module], Callable] = {nn.Linear: MasterWeightLora}
