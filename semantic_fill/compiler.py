# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Compiled blocks: one graph for each kind of block, and a cache from which the next run takes it.

Compiling takes longer than many steps, so a block must not be compiled twice. `torch.compile` specializes a graph on its
inputs' strides and on whether they require grad. In FLUX, the first block of either kind differs from the others in one of
these, and without the hooks below each kind would be compiled twice. torch's own cache leaves out blocks with autograd
functions or with a chosen attention, so that the next run would trace and differentiate them again.

Beside what is compiled lies what was tried: whether cuDNN's attention, which only compiled blocks take, works here.
"""

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from semantic_fill.lora import compiler_options


# torch's own default is a folder below /tmp that a restart empties and that other users could have made.
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def keep_compiled_code() -> None:
    """
    Has the compiler keep its cache in `~/.cache/semantic_fill/compiled`, unless the environment names another folder. It
    has to be called before anything is compiled.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(caches, "semantic_fill", "compiled")
    # Without a home that can be written to, torch's own folder stays.
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault(CACHE_VARIABLE, str(folder))


def start_workers() -> None:
    """
    Has the compiler start the processes that compile kernels. It would otherwise start them with the first block, and
    compile kernels one by one until they are ready.
    """
    with contextlib.suppress(ImportError):
        from torch._inductor.async_compile import maybe_warm_pool

        maybe_warm_pool()


def describe_gpu(device: torch.device) -> tuple[str, ...]:
    """What decides whether a kernel of a library works: the GPU, its driver and the versions of the libraries."""
    driver = Path("/proc/driver/nvidia/version")
    name = torch.cuda.get_device_name(device) if torch.cuda.is_available() else "none"
    return name, driver.read_text() if driver.exists() else "", torch.__version__, str(torch.backends.cudnn.version())


def remember_success(trial: Callable[[], bool], *facts: str) -> bool:
    """
    Whether a trial succeeds, or has succeeded with the same facts in an earlier run. A file beside the compiled code
    remembers it. A failure is tried again, since it may have had another cause, such as too little memory.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    success = Path(folder or "", f"success-{hashlib.sha256(repr(facts).encode()).hexdigest()}")
    if folder and success.exists():
        return True
    succeeds = trial()
    if folder and succeeds:
        # A file that cannot be written costs the next run its time only.
        with contextlib.suppress(OSError):
            success.parent.mkdir(parents=True, exist_ok=True)
            success.touch()
    return succeeds


CUDNN = "_native_cudnn"
CUDNN_TRIAL = """
import sys, torch, torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
*shape, dtype, device = sys.argv[1:]
batch, queries, keys, heads, channels = map(int, shape)
def random(tokens):
    options = {"dtype": getattr(torch, dtype), "device": device}
    return torch.randn(batch, tokens, heads, channels, **options).transpose(1, 2)
inputs = [random(tokens).requires_grad_() for tokens in (queries, keys, keys)]
out_grad = random(queries)
grads = {}
for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(*inputs)
    grads[backend] = torch.autograd.grad(out, inputs, out_grad)
for ours, theirs in zip(*grads.values()):
    assert (ours - theirs).float().norm() < 0.02 * theirs.float().norm()
"""


def cudnn_attends(shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> bool:
    """
    Whether cuDNN's attention, the fastest from compute capability 9.0 on, survives a backward pass and agrees with
    another kernel. Some of its versions crash the process at some shapes, so the trial runs in a process of its own. It
    takes ten seconds, so a success is remembered.

    Args:
        shape (`tuple[int, int, int, int, int]`): Batch, queries, keys, heads and channels of a head.
    """
    arguments = [*map(str, shape), str(dtype).removeprefix("torch."), str(device)]
    command = [sys.executable, "-c", CUDNN_TRIAL, *arguments]

    def survives() -> bool:
        try:
            return subprocess.run(command, capture_output=True, timeout=120).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    return remember_success(survives, CUDNN_TRIAL, *arguments, *describe_gpu(device))


def cache_autograd() -> None:
    """
    Lets torch's cache hold the derivatives of blocks too, which takes private settings. In a version of torch without them,
    the next run only takes longer to start.

    torch leaves out what its cache may not know by the graph alone. An autograd function is part of the graph with its
    forward and its backward. The two functions that choose attention take constants of the graph, and then follow
    switches of the process, so these switches become a part of the key.
    """
    cuda = torch.backends.cuda
    kinds = ("flash", "mem_efficient", "math", "cudnn")
    switches = " ".join(str(getattr(cuda, f"{kind}_sdp_enabled")()) for kind in kinds)
    names = ("torch.nn.attention._backend_from_string", "torch.nn.attention._sdpa_kernel")
    with contextlib.suppress(ImportError, AttributeError):
        from torch._functorch import config as autograd
        from torch._inductor import config as inductor

        autograd.autograd_cache_allow_custom_autograd_functions = True
        inductor.unsafe_marked_cacheable_functions |= dict.fromkeys(names, switches)


def require_grad(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    """
    A forward hook of the two embedders. The first block's input need not require grad otherwise, while those of the
    others do. Its gradient costs three small products.
    """
    return output.requires_grad_() if torch.is_grad_enabled() else output


def join_streams(module: torch.nn.Module, args: tuple, output: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A forward hook of the last block with two streams. Single blocks return text and image as two parts of one tensor,
    so the first of them gets them in this form too.
    """
    text, image = output
    text, image = torch.cat((text, image), dim=1).split((text.shape[1], image.shape[1]), dim=1)
    return text, image


def compile_blocks(transformer: FluxTransformer2DModel, fused_lora: bool) -> None:
    """
    Has a transformer's blocks compiled when they are first called, each kind once for all of its blocks.

    Each shape has a graph of its own. By default, torch goes over to one for all shapes at the second, which is slower. A
    resumed run would train with that one, because it begins with a validation of single samples.

    Args:
        fused_lora (`bool`): Whether the blocks have the layers of `MasterWeightLora`, whose products are joined.
    """
    cache_autograd()
    for embedder in (transformer.x_embedder, transformer.context_embedder):
        embedder.register_forward_hook(require_grad)
    # A graph of the hook's own would take longer to compile than it saves.
    join: Any = torch.compiler.disable(join_streams)
    for block in transformer.transformer_blocks[-1:]:
        block.register_forward_hook(join)
    # --aspect_buckets has up to nine shapes, each of which has a graph with and one without gradients for both kinds of
    # block, and with --visible_attention causal two more to paint. The kinds are counted together where they have one
    # forward, as with selective checkpointing.
    torch._dynamo.config.recompile_limit = 128
    transformer.compile_repeated_blocks(dynamic=False, options=compiler_options(fused_lora))
