# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""How much of a step is kept for backward, how much memory a step needs, and the choice that `--fast` makes for a GPU."""

import functools
import math
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from semantic_fill.compiler import CUDNN, cudnn_attends
from semantic_fill.lora import NARROW
from semantic_fill.precision import BLOCKS, PRECISIONS, blocks_of
from semantic_fill.streaming import WeightStream


# -- Checkpointing -----------------------------------------------------------------------------------------------------

aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten._scaled_mm.default, aten._int_mm.default}
ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}


def keep_products(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    """The policy of selective checkpointing: results of attention and of long matrix products are kept."""
    second = 2 if op is aten.addmm.default else 1
    keep = op in ATTENTION or (op in PRODUCTS and args[second].shape[-2] > NARROW)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def draws(transformer: FluxTransformer2DModel) -> bool:
    """Whether blocks draw random numbers. Only then is the random state kept: a CUDA graph cannot capture its reading."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in transformer.modules())


def checkpoint_products(transformer: FluxTransformer2DModel) -> None:
    """Selective checkpointing, inside each block, so that a compiled block contains it too."""
    random = draws(transformer)

    # One method for each class of blocks: a closure over each block would be compiled once for each.
    @functools.cache
    def checkpointed(cls):
        plain = cls.forward

        def forward(self, *args, **kwargs):
            # Without gradients nothing is recomputed, and a checkpoint would not let attention keep its keys and values.
            if not torch.is_grad_enabled():
                return plain(self, *args, **kwargs)
            context_fn = functools.partial(create_selective_checkpoint_contexts, keep_products)
            block = functools.partial(plain, self)
            options = {"use_reentrant": False, "preserve_rng_state": random, "context_fn": context_fn}
            return checkpoint(block, *args, **options, **kwargs)

        return forward

    for block in blocks_of(transformer):
        block.forward = types.MethodType(checkpointed(type(block)), block)


def offload_blocks(transformer: FluxTransformer2DModel) -> None:
    """Full checkpointing that keeps the blocks' inputs in the CPU's memory until backward."""

    def offloaded(block, hidden_states, encoder_hidden_states, *shared):
        # The text tokens are offloaded too, however few: they are a view that would keep a block's whole output alive.
        # The embeddings that all blocks share stay on the device, since they would be copied once for each block.
        def forward(hidden_states, encoder_hidden_states):
            return block(hidden_states, encoder_hidden_states, *shared)

        # Only pinned memory can be copied without the host waiting.
        with save_on_cpu(pin_memory=hidden_states.is_cuda):
            return checkpoint(forward, hidden_states, encoder_hidden_states, use_reentrant=False)

    transformer.enable_gradient_checkpointing(offloaded)


def stream_blocks(transformer: FluxTransformer2DModel) -> None:
    """`offload_blocks`, and the weights of a quantized base are in the CPU's memory too."""
    offload_blocks(transformer)
    WeightStream(transformer)


def checkpoint_share(transformer: FluxTransformer2DModel, share: float) -> None:
    """Full checkpointing of the first blocks: backward recomputes them last, when nothing of the others is kept anymore."""
    blocks = blocks_of(transformer)
    checkpointed = set(blocks[: math.ceil(share * len(blocks))])
    random = draws(transformer)

    def forward(block, *args):
        if block not in checkpointed:
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=random)

    transformer.enable_gradient_checkpointing(forward)


CHECKPOINTING = {
    "none": lambda transformer: None,
    "selective": checkpoint_products,
    "full": functools.partial(checkpoint_share, share=1.0),
    "offload": offload_blocks,
    "stream": stream_blocks,
}


def set_checkpointing(transformer: FluxTransformer2DModel, checkpointing: str | float) -> None:
    """Sets what backward recomputes: one of `CHECKPOINTING`, or a share of the blocks, between 0 and 1."""
    if isinstance(checkpointing, str):
        CHECKPOINTING[checkpointing](transformer)
    else:
        checkpoint_share(transformer, checkpointing)


# -- The choice of --fast ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a step runs. The fields are named as the options."""

    base_precision: str
    checkpointing: str | float
    compile: bool
    attention_backend: str = "native"

    def __str__(self):
        return (
            f"--base_precision {self.base_precision} --checkpointing {self.checkpointing}"
            f" --{'' if self.compile else 'no-'}compile --attention_backend {self.attention_backend}"
        )


@dataclass(frozen=True)
class Workload:
    """
    What a step computes, as far as its memory depends on it.

    Args:
        transformer (`FluxTransformer2DModel`): Only its sizes are read, so it may be on the meta device.
        image_tokens, text_tokens (`int`): Tokens of one sample.
        dtype (`torch.dtype`): What the run computes in.
        batch_size, rank, use_8bit_adam, ema_decay, visible_attention, visible_gradients: As the options of these names.
            With Prodigy `use_8bit_adam` is `None`.
    """

    transformer: FluxTransformer2DModel
    image_tokens: int
    text_tokens: int
    dtype: torch.dtype
    batch_size: int
    rank: int
    use_8bit_adam: bool | None
    ema_decay: float | None
    visible_attention: str = "joint"
    visible_gradients: bool = True

    @property
    def seen_tokens(self) -> int:
        """Tokens of the first of two passes, whose keys and values the second attends to."""
        return 0 if self.visible_attention == "joint" else self.image_tokens // 2 + self.text_tokens

    @property
    def attentions(self) -> list[tuple[int, int]]:
        """Numbers of queries and of keys of each attention that gradients go through."""
        every, seen = self.image_tokens + self.text_tokens, self.seen_tokens
        first = [(seen, seen)] if seen and self.visible_gradients else []
        return [*first, (every - seen, every)]

    @property
    def tokens(self) -> int:
        """Tokens of all that gradients go through. If two passes have any, the second computes a prompt too."""
        queries = sum(queries for queries, _ in self.attentions)
        return queries + self.text_tokens * (len(self.attentions) - 1)


# Of the precisions whose products are equally fast, the more precise first. Each then recomputes as few blocks as it can.
TO_FULL = ("none", *(share / 10 for share in range(1, 10)), "full")
PLANS = [
    Plan("fp8x2", "none", compile=True),
    *(Plan(precision, some, compile=True) for precision in ("fp8", "bf16", "int8", "nf4") for some in TO_FULL),
    *(Plan("nf4", some, compile=True) for some in ("offload", "stream")),
]
# Bytes kept for each token, block and channel of the transformer's width, compiled and eager, measured at FLUX's shape in
# bfloat16 (benchmarks/RESULTS.md). Of full's bytes, offload moves two to the CPU, which are the blocks' inputs.
KEPT_BYTES = {"none": (35.3, 37), "selective": (24, 25), "full": (2.1, 2.1)}
KEPT_BYTES |= dict.fromkeys(("offload", "stream"), (0.1, 0.1))
# Bytes for each image token while the VAE decodes a painting in bfloat16, and for each weight that is being quantized.
PAINTING_BYTES, QUANTIZING_BYTES = 0.95 * 2**20, 6
# Bytes of the optimizer's states for each trained number: two of AdamW, in 32 or by `use_8bit_adam` 8 bits, four of Prodigy.
STATE_BYTES = {False: 8, True: 2, None: 16}
# The allocator cannot use all gaps between tensors that come and go: a share of all memory, and some more, of which up to
# 0.4 GiB come with CUDA graphs.
GAPS, GAP_BYTES = 0.03, 0.9 * 2**30
# The CUDA context and the kernels of libraries and compiler (benchmarks/RESULTS.md), and the part of them that is there
# before --fast looks what is free.
PROCESS_BYTES, STARTED_BYTES = 0.85 * 2**30, 0.7 * 2**30
# Text encoders and VAE leave this much free.
SPARE_SHARE, SPARE_BYTES = 0.06, 2**30


def device_memory(device: torch.device) -> tuple[float, float]:
    """Bytes that are free, and bytes that an encoder may have. Infinite on devices other than CUDA."""
    if device.type != "cuda":
        return math.inf, math.inf
    # Memory that the allocator holds without a tensor in it is free as well.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return free, free * (1 - SPARE_SHARE) - SPARE_BYTES


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process held at most: of the GPU, or without one of main memory. `None` where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    # Windows has no such module.
    except ImportError:
        return None
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parameter_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Bytes of the modules' parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def linears_of(blocks: Iterable[torch.nn.Module]) -> list[torch.nn.Linear]:
    return [module for block in blocks for module in block.modules() if isinstance(module, torch.nn.Linear)]


def estimate_parts(plan: Plan, workload: Workload) -> dict[str, float]:
    """Bytes of all tensors on the GPU at the peak of each part of a run: `loading`, `training` and `painting`."""
    transformer, itemsize = workload.transformer, workload.dtype.itemsize
    # What is kept was measured with two bytes a number.
    tokens = workload.batch_size * workload.tokens * itemsize / 2
    blocks = blocks_of(transformer)
    linears = linears_of(blocks)
    frozen = sum(linear.weight.numel() for linear in linears)
    rest = sum(parameter.numel() for parameter in transformer.parameters()) - frozen
    precision = PRECISIONS[plan.base_precision]
    # Scales add little: one a row, or an eighth of a bit a weight with nf4.
    bits = 8 * itemsize if precision is None else precision.bits + 0.125
    # Modulation has no LoRA by default. It is counted in case a longer --lora_layers adds one.
    lora = workload.rank * sum(linear.in_features + linear.out_features for linear in linears)
    resident = frozen * bits / 8 + itemsize * rest + lora * 4
    loading = resident
    if precision is not None:
        loading += QUANTIZING_BYTES * max(linear.weight.numel() for linear in linears)
        if plan.checkpointing == "stream":
            # Two blocks of each class are on the GPU.
            pairs = linears_of(block for name in BLOCKS for block in getattr(transformer, name)[:2])
            streamed = frozen - sum(linear.weight.numel() for linear in pairs)
            resident -= streamed * precision.bits / 8
    # A step adds the gradient, and a painting with the averages a copy of the last weights.
    average = 0 if workload.ema_decay is None else lora * 4
    resident += lora * STATE_BYTES[workload.use_8bit_adam] + average
    width = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    eager = not plan.compile
    bytes_of = {name: kept[eager] * tokens * width for name, kept in KEPT_BYTES.items()}
    # The second of two passes copies these to put its own beside them.
    seen = 2 * workload.batch_size * workload.seen_tokens * width * itemsize
    bytes_of["none"] += seen
    # A block that is recomputed keeps for a while what it would keep without checkpointing.
    recomputed = 2 * bytes_of["none"]
    if isinstance(plan.checkpointing, str):
        kept = len(blocks) * bytes_of[plan.checkpointing] + recomputed * (plan.checkpointing != "none")
    else:
        recomputing = math.ceil(plan.checkpointing * len(blocks))
        kept = recomputing * bytes_of["full"]
        # What the other blocks keep is gone before anything is recomputed.
        kept += max((len(blocks) - recomputing) * bytes_of["none"], recomputed)
    if not workload.visible_gradients:
        kept += len(blocks) * seen
    painting = workload.image_tokens * PAINTING_BYTES * itemsize / 2 + average
    return {"loading": loading, "training": resident + lora * 4 + kept, "painting": resident + painting}


def estimate_peak(plan: Plan, workload: Workload) -> float:
    """Bytes that the GPU has to have free before a run begins."""
    parts = estimate_parts(plan, workload)
    # Loading frees hardly anything, so it leaves no gaps.
    later = max(parts["training"], parts["painting"]) * (1 + GAPS) + GAP_BYTES
    return max(parts["loading"], later) + PROCESS_BYTES


def empty_transformer(
    source: str, revision: str | None = None, cache_dir: str | None = None
) -> FluxTransformer2DModel:
    """The transformer of a base model without its weights, on the meta device, for its sizes."""
    config: Any = FluxTransformer2DModel.load_config(
        source, subfolder="transformer", revision=revision, cache_dir=cache_dir
    )
    with init_empty_weights():
        transformer: Any = FluxTransformer2DModel.from_config(config)
    return transformer


def choose_plan(workload: Workload, fixed: dict[str, str | bool | None], device: torch.device) -> tuple[Plan, str]:
    """
    The first of `PLANS` that fits the device's free memory.

    Args:
        workload (`Workload`): What a step computes.
        fixed (`dict`): The fields of `Plan` as the user passed them. `None` leaves the choice to this function.
        device (`torch.device`): Where the run computes.

    Returns:
        `tuple[Plan, str]`: The choice and the reason for it.
    """
    fixed = {name: value for name, value in fixed.items() if value is not None}
    if device.type != "cuda":
        return replace(Plan("bf16", "none", compile=False), **fixed), f"{device.type} gains nothing from the others"
    major, minor = torch.cuda.get_device_capability(device)
    free, _ = device_memory(device)
    limit, dtype = free + STARTED_BYTES, workload.dtype
    unsuited = {name for name, cls in PRECISIONS.items() if cls is not None and not cls.suits(device, dtype)}
    plans = [plan for plan in PLANS if plan.base_precision not in unsuited]
    tried = []
    for plan in dict.fromkeys(replace(plan, **fixed) for plan in plans):
        peak = estimate_peak(plan, workload)
        tried.append(f"{plan} about {peak / 2**30:.1f} GiB")
        if peak <= limit:
            break
    config = workload.transformer.config
    heads = config["num_attention_heads"], config["attention_head_dim"]
    shapes = [(workload.batch_size, *tokens, *heads) for tokens in workload.attentions]
    # Eager blocks have crashed where the trial and compiled blocks were fine (benchmarks/RESULTS.md).
    if "attention_backend" not in fixed and plan.compile and major >= 9:
        if all(cudnn_attends(shape, device, dtype) for shape in shapes):
            plan = replace(plan, attention_backend=CUDNN)
    products = f"no fp8 products (compute capability {major}.{minor}, {dtype})" if unsuited else "fp8 products"
    verdict = "" if peak <= limit else "; nothing fits, so this is what needs least"
    return plan, f"{free / 2**30:.1f} GiB are free, {products}{verdict}. Needed: {'; '.join(tried[:-3:-1])}"


# -- Out of memory ----------------------------------------------------------------------------------------------------


def memory_advice(
    plan: Plan, workload: Workload, accumulation_steps: int, encoder_bytes: float = 0, sharded: bool = False
) -> str:
    """
    What a step needs, and a line for each flag with what it saves by the estimate of `--fast`, the most effective first.

    Args:
        plan (`Plan`), workload (`Workload`): What the run does now.
        accumulation_steps (`int`): Forward passes in an optimizer step.
        encoder_bytes (`float`): Bytes of the encoders that stay on the device without --cache_latents.
        sharded (`bool`): Whether processes share the weights, as with FSDP2, which refuses the flags that shrink these.
    """
    peak = estimate_peak(plan, workload)

    def saved(plan: Plan = plan, workload: Workload = workload) -> float:
        return peak - estimate_peak(plan, workload)

    smaller = f"--train_batch_size 1 --gradient_accumulation_steps {workload.batch_size * accumulation_steps}"
    savings = {smaller: saved(workload=replace(workload, batch_size=1)), "--cache_latents": encoder_bytes}
    savings |= {f"--checkpointing {name}": saved(replace(plan, checkpointing=name)) for name in CHECKPOINTING}
    savings["--mixed_precision bf16"] = saved(workload=replace(workload, dtype=torch.bfloat16))
    if not sharded:
        savings |= {f"--base_precision {name}": saved(replace(plan, base_precision=name)) for name in PRECISIONS}
        if workload.use_8bit_adam is not None:
            savings["--use_8bit_adam"] = saved(workload=replace(workload, use_8bit_adam=True))
    ordered = sorted(savings.items(), key=lambda item: -item[1])
    lines = [f"  {flags}: about {saved / 2**30:.2f} GiB" for flags, saved in ordered if saved > 0]
    if not lines:
        return "Every flag that saves memory is in use: lower --resolution, --max_sequence_length or --rank."
    where = " on a GPU alone" if sharded else ""
    need = f"A step needs about {(peak + encoder_bytes) / 2**30:.2f} GiB{where}. These flags save:"
    return "\n".join([need, *lines])
