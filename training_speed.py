# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""How much of a step is kept for its backward pass, and the choice that `--fast` makes for a GPU."""

import argparse
import functools
import math
import subprocess
import sys
import types
from dataclasses import dataclass, replace

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from base_precision import BLOCKS, PRECISIONS


# -- Checkpointing -----------------------------------------------------------------------------------------------------

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default}
ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}
# A product with one side this short, a LoRA's rank, takes no longer than reading and writing the others.
NARROW = 128


def keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """The policy of selective checkpointing: results of attention and of long matrix products are kept."""
    second = 2 if op is aten.addmm.default else 1
    keep = op in ATTENTION or (op in PRODUCTS and args[second].shape[-2] > NARROW)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_products(transformer: FluxTransformer2DModel, preserve_rng_state: bool) -> None:
    """Selective checkpointing, inside each block, so that a compiled block holds it too."""

    # One method a class of blocks: as a closure over each block it would be compiled for each.
    @functools.cache
    def checkpointed(cls):
        plain = cls.forward

        def forward(self, *args, **kwargs):
            return checkpoint(
                functools.partial(plain, self),
                *args,
                use_reentrant=False,
                preserve_rng_state=preserve_rng_state,
                context_fn=functools.partial(create_selective_checkpoint_contexts, keep_products),
                **kwargs,
            )

        return forward

    for blocks in BLOCKS:
        for block in getattr(transformer, blocks):
            block.forward = types.MethodType(checkpointed(type(block)), block)


def checkpoint_blocks(transformer: FluxTransformer2DModel, preserve_rng_state: bool) -> None:
    """Full checkpointing, around each block, compiled or not."""

    def around(block, *args):
        return checkpoint(block.__call__, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    transformer.enable_gradient_checkpointing(around)


def offload_blocks(transformer: FluxTransformer2DModel, preserve_rng_state: bool) -> None:
    """Full checkpointing whose block inputs wait for the backward pass on the CPU."""

    def around(block, hidden_states, encoder_hidden_states, *shared):
        # Text tokens go too, however few: they are a view that would keep the whole of a block's output. The embeddings
        # that all blocks share are not among the arguments, and so stay: they would be copied once a block.
        def forward(hidden_states, encoder_hidden_states):
            return block(hidden_states, encoder_hidden_states, *shared)

        # Only pinned memory is copied without the host waiting.
        with save_on_cpu(pin_memory=hidden_states.is_cuda):
            return checkpoint(
                forward,
                hidden_states,
                encoder_hidden_states,
                use_reentrant=False,
                preserve_rng_state=preserve_rng_state,
            )

    transformer.enable_gradient_checkpointing(around)


CHECKPOINTING = {
    "none": lambda transformer, preserve_rng_state: None,
    "selective": checkpoint_products,
    "full": checkpoint_blocks,
    "offload": offload_blocks,
}


def compiler_options(fused_lora: bool) -> dict:
    """`options` of `torch.compile` for the blocks."""
    if not fused_lora:
        return {}
    # Here, since the compiler is slow to import.
    from lora_products import JoinLoraProducts

    return {"post_grad_custom_pre_pass": JoinLoraProducts()}


# -- The choice of --fast ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    base_precision: str
    checkpointing: str
    compile: bool
    attention_backend: str = "native"

    def __str__(self):
        return (
            f"--base_precision {self.base_precision} --checkpointing {self.checkpointing}"
            f" --{'' if self.compile else 'no-'}compile --attention_backend {self.attention_backend}"
        )


# Fastest first.
PLANS = [
    Plan(precision, checkpointing, compile=True)
    for precision, checkpointing in (
        ("fp8x2", "none"),
        ("fp8", "none"),
        ("fp8", "selective"),
        ("bf16", "none"),
        ("bf16", "selective"),
        ("fp8", "full"),
        ("bf16", "full"),
        ("int8", "full"),
        ("nf4", "full"),
        ("nf4", "offload"),
    )
]
# Kept bytes for each token, block and channel of the transformer's width, as measured at FLUX's shape
# (benchmarks/RESULTS.md), compiled and eager. Offloading takes away the two bytes of full's that are block inputs.
KEPT_BYTES = {"none": (29, 37), "selective": (24, 25), "full": (2.1, 2.1), "offload": (0.1, 0.1)}
# What the compiler keeps beside that where products are in fp8 and nothing is computed again.
FP8_KEPT_BYTES = 6.3
# What the estimate leaves free: the CUDA context grows, and the allocator cannot use every gap.
SPARE_SHARE, SPARE_BYTES = 0.06, 2**30


def device_memory(device: torch.device) -> tuple[float, float]:
    """Bytes that are free, and how many of them may be planned with. Without end where the device is no CUDA device."""
    if device.type != "cuda":
        return math.inf, math.inf
    # What the allocator holds without a tensor in it is free as well.
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + held
    return free, free * (1 - SPARE_SHARE) - SPARE_BYTES


def estimate_peak(plan: Plan, transformer: FluxTransformer2DModel, tokens: int, args: argparse.Namespace) -> float:
    """
    Bytes that a training step allocates at its peak.

    Args:
        plan (`Plan`):
            How the step runs.
        transformer (`FluxTransformer2DModel`):
            For its sizes alone: may be on the meta device.
        tokens (`int`):
            Image and text tokens of a whole micro-batch.
        args (`argparse.Namespace`):
            `rank` and `use_8bit_adam` of the run.
    """
    blocks = [block for name in BLOCKS for block in getattr(transformer, name)]
    linears = [m for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    frozen = sum(linear.weight.numel() for linear in linears)
    rest = sum(parameter.numel() for parameter in transformer.parameters()) - frozen
    precision = PRECISIONS[plan.base_precision]
    # Modulation has no LoRA by default, but counting it is what a longer --lora_layers would need.
    lora = args.rank * sum(linear.in_features + linear.out_features for linear in linears)
    # Weight, gradient and the optimizer's two moments.
    trained = lora * (4 + 4 + (2 if args.use_8bit_adam else 8))
    width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    kept = KEPT_BYTES[plan.checkpointing][0 if plan.compile else 1]
    if plan.compile and plan.checkpointing == "none" and plan.base_precision.startswith("fp8"):
        kept += FP8_KEPT_BYTES
    kept *= tokens * len(blocks) * width
    # While a block is computed again, it keeps what it would without checkpointing.
    again = KEPT_BYTES["none"][0 if plan.compile else 1] * tokens * width * 2 * (plan.checkpointing != "none")
    # A scale for each row hardly counts; the quantised scales of nf4 are an eighth of a bit a weight.
    bits = 16 if precision is None else precision.bits * 1.04
    return frozen * bits / 8 + 2 * rest + trained + kept + again


def empty_transformer(args: argparse.Namespace) -> FluxTransformer2DModel:
    """The run's transformer without its weights, on the meta device."""
    config = FluxTransformer2DModel.load_config(
        args.pretrained_model_name_or_path,
        subfolder="transformer",
        revision=args.revision,
        cache_dir=args.cache_dir,
    )
    with init_empty_weights():
        return FluxTransformer2DModel.from_config(config)


CUDNN = "_native_cudnn"
CUDNN_TRIAL = """
import sys, torch, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
*shape, dtype, device = sys.argv[1:]
shape, options = tuple(map(int, shape)), {"dtype": getattr(torch, dtype), "device": device}
inputs = [torch.randn(shape, **options).transpose(1, 2).requires_grad_() for _ in range(3)]
out_grad = torch.randn(shape, **options).transpose(1, 2)
grads = {}
for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*inputs)
    grads[backend] = torch.autograd.grad(out, inputs, out_grad)
for ours, theirs in zip(*grads.values()):
    assert (ours - theirs).float().norm() < 0.02 * theirs.float().norm()
"""


def cudnn_attends(shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> bool:
    """
    Whether cuDNN's attention, the fastest there is from compute capability 9.0 on, gets through a backward pass and
    agrees with another kernel. Versions of it crash at some shapes, which ends the process: the trial has one of its own.

    Args:
        shape (`tuple[int, int, int, int]`):
            Batch, tokens, heads and channels of a head.
    """
    where = [*map(str, shape), str(dtype).removeprefix("torch."), str(device)]
    try:
        trial = subprocess.run([sys.executable, "-c", CUDNN_TRIAL, *where], capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return False
    return trial.returncode == 0


def choose_plan(args: argparse.Namespace, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Plan, str]:
    """
    The fastest of `PLANS` that fits the free memory of the device, with what the run fixed itself taken as it is.

    Args:
        args (`argparse.Namespace`):
            `base_precision`, `checkpointing`, `compile` and `attention_backend` are fixed where they are not `None`.
        tokens (`int`):
            Image and text tokens of one sample.
        device, dtype:
            Where the run computes, and in which dtype.

    Returns:
        `tuple[Plan, str]`: the choice and its reason.
    """

    def fixed(plan: Plan) -> Plan:
        given = {name: getattr(args, name) for name in vars(plan)}
        return Plan(**(vars(plan) | {name: value for name, value in given.items() if value is not None}))

    if device.type != "cuda":
        return fixed(Plan("bf16", "none", compile=False)), f"{device.type} gains nothing from the others"
    major, minor = torch.cuda.get_device_capability(device)
    multiplies_fp8 = (major, minor) >= (8, 9) and dtype == torch.bfloat16
    free, limit = device_memory(device)
    transformer = empty_transformer(args)
    tried = []
    for plan in dict.fromkeys(map(fixed, PLANS)):
        if plan.base_precision.startswith("fp8") and not multiplies_fp8 and args.base_precision is None:
            continue
        peak = estimate_peak(plan, transformer, args.train_batch_size * tokens, args)
        tried.append(f"{plan} about {peak / 2**30:.1f} GiB")
        if peak <= limit:
            break
    config = transformer.config
    shape = (args.train_batch_size, tokens, config.num_attention_heads, config.attention_head_dim)
    # Layer by layer it has crashed where the trial, and compiled blocks, went well (benchmarks/RESULTS.md).
    if args.attention_backend is None and plan.compile and major >= 9 and cudnn_attends(shape, device, dtype):
        plan = replace(plan, attention_backend=CUDNN)
    products = "fp8 products" if multiplies_fp8 else f"no fp8 products (compute capability {major}.{minor}, {dtype})"
    verdict = "" if peak <= limit else "; nothing fits, this needs least"
    return plan, f"{free / 2**30:.1f} GiB are free, {products}{verdict}. Looked at: {'; '.join(tried)}"


# -- Out of memory -----------------------------------------------------------------------------------------------------


def memory_advice(args: argparse.Namespace, tokens: int, encoders: int) -> str:
    """
    What would make room: flags that the run does not use yet, the one that saves most first.

    Args:
        args (`argparse.Namespace`):
            The run's.
        tokens (`int`):
            Image and text tokens of one sample.
        encoders (`int`):
            Bytes of the text encoders and the VAE that stay on the device beside the transformer.

    Returns:
        `str`: a sentence and a line for each flag, with what it saves by the estimate of `--fast`.
    """
    transformer = empty_transformer(args)
    now = Plan(args.base_precision or "bf16", args.checkpointing or "none", bool(args.compile))

    def peak(plan: Plan = now, batch: int = args.train_batch_size, **changed) -> float:
        return estimate_peak(plan, transformer, batch * tokens, argparse.Namespace(**vars(args) | changed))

    savings = {f"--checkpointing {name}": peak() - peak(replace(now, checkpointing=name)) for name in CHECKPOINTING}
    savings |= {f"--base_precision {name}": peak() - peak(replace(now, base_precision=name)) for name in PRECISIONS}
    accumulated = args.train_batch_size * args.gradient_accumulation_steps
    savings[f"--train_batch_size 1 --gradient_accumulation_steps {accumulated}"] = peak() - peak(batch=1)
    if args.optimizer == "adamw":
        savings["--use_8bit_adam"] = peak() - peak(use_8bit_adam=True)
    savings["--cache_latents"] = 0 if args.cache_latents else encoders
    lines = [
        f"  {flags}: about {saved / 2**30:.2f} GiB"
        for flags, saved in sorted(savings.items(), key=lambda item: -item[1])
        if saved > 0
    ]
    if not lines:
        return "Every flag that saves memory is in use: lower --resolution, --max_sequence_length or --rank."
    return f"Of about {(peak() + encoders) / 2**30:.2f} GiB that a step takes, these flags save:\n" + "\n".join(lines)
