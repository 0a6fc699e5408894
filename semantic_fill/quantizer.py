# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Loading a transformer whose weights are quantized one by one as they are read.

diffusers hands a quantizer each tensor as it reads it, so the model never exists in full precision. Registering a
quantizer of our own takes diffusers' private mappings and methods, which all stand here.
"""

import enum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from semantic_fill.precision import PRECISIONS, FrozenLinear, replace_linears


class _Method(str, enum.Enum):
    FROZEN = "frozen_linear"


class FrozenLinearConfig(QuantizationConfigMixin):
    """`quantization_config` for `from_pretrained`: the blocks' linear layers in one of `PRECISIONS`."""

    def __init__(self, precision: str, device: torch.device | str):
        self.quant_method: Any = _Method.FROZEN
        self.precision, self.device = precision, str(device)

    def to_diff_dict(self) -> dict:
        return self.to_dict()

    @classmethod
    def of(cls, precision: str, device: torch.device | str) -> "FrozenLinearConfig | None":
        """The configuration for a precision, or `None` for one that quantizes nothing."""
        return None if PRECISIONS[precision] is None else cls(precision, device)


class FrozenLinearQuantizer(DiffusersQuantizer):
    requires_calibration = False
    quantization_config: Any

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
        layer.quantize(param_value.to(device=target_device, dtype=dtype))

    def get_cuda_warm_up_factor(self):
        # diffusers allocates 2 / factor of the unquantized bytes at once.
        precision: Any = PRECISIONS[self.quantization_config.precision]
        return 2 * 16 // precision.bits

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
