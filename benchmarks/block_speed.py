# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""One block of each kind of FLUX.1-Fill-dev with its LoRA, compiled, forward and backward: what a step consists of.

    python benchmarks/block_speed.py --precisions fp8,bf16,int8mm --attention_backend _native_cudnn

It takes a minute for each precision, most of which is compiling. A step is 19 double and 38 single blocks, and little
else, so this measures a change of the blocks in less time and memory than `train_speed.py`.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import flux_shape
import torch
from diffusers.training_utils import cast_training_params
from measurement import Report, describe, find_device, free, peak_gib, synchronize, timed
from train_speed import device_kernels, make_profiler

from semantic_fill.lora import add_lora, compiler_options
from semantic_fill.precision import PRECISIONS, blocks_of


# How many blocks of either kind FLUX has, in the order of `blocks_of`.
BLOCKS = {"double": flux_shape.FLUX_FILL["num_layers"], "single": flux_shape.FLUX_FILL["num_single_layers"]}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("block_speed.json"))
    parser.add_argument("--shape", choices=["flux", "test"], default="flux")
    parser.add_argument("--precisions", default="fp8", help=f"Of the frozen base, of {', '.join(PRECISIONS)}.")
    parser.add_argument("--attention_backend", default="native")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--image_tokens", type=int, default=2048)
    parser.add_argument("--text_tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--passes", type=int, default=20, help="Timed forward and backward passes, after four others.")
    return parser.parse_args(arguments)


def kept_bytes(compute: Callable[[], object], weights: Iterable[torch.Tensor]) -> int:
    """Bytes of the floating point tensors that autograd keeps for backward, beside the `weights`."""
    known, kept = {tensor.untyped_storage().data_ptr() for tensor in weights}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return sum(kept.values())


def measure(precision: str, args: argparse.Namespace, device: torch.device) -> dict:
    """
    Milliseconds of a pass through either block, of all blocks of a step, and of the kernels that copy. Bytes that a block
    keeps for backward, for each token and channel of the transformer's width.
    """
    torch.manual_seed(0)
    transformer = flux_shape.build_transformer(
        args.shape, precision, device, torch.bfloat16, num_layers=1, num_single_layers=1
    )
    transformer.requires_grad_(False).train()
    transformer.set_attention_backend(args.attention_backend)
    add_lora(transformer, args.rank, args.rank)
    cast_training_params(transformer, dtype=torch.float32)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    transformer.compile_repeated_blocks(options=compiler_options(fused_lora=True))
    config = transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(args.batch, *shape, device=device, dtype=torch.bfloat16)

    image, text = draw(args.image_tokens, width).requires_grad_(), draw(args.text_tokens, width).requires_grad_()
    out_grads, temb = (draw(args.text_tokens, width), draw(args.image_tokens, width)), draw(width)
    angles = torch.randn(args.image_tokens + args.text_tokens, config["attention_head_dim"], device=device)
    result, step = {}, 0.0
    for (kind, count), block in zip(BLOCKS.items(), blocks_of(transformer), strict=True):

        def forward() -> tuple[torch.Tensor, torch.Tensor]:
            with torch.autocast(device.type, torch.bfloat16):
                return block(image, text, temb, (angles.cos(), angles.sin()))

        def forward_and_backward() -> None:
            for tensor in (image, text, *trained):
                tensor.grad = None
            torch.autograd.backward(forward(), out_grads)

        for _ in range(4):
            forward_and_backward()
        _, seconds = timed(lambda: [forward_and_backward() for _ in range(args.passes)], device)
        result[f"{kind}, ms"] = 1e3 * seconds / args.passes
        step += count * result[f"{kind}, ms"]
        kept = kept_bytes(forward, (*transformer.parameters(), *transformer.buffers()))
        result[f"{kind}, kept bytes"] = kept / (args.batch * (args.image_tokens + args.text_tokens) * width)
        if device.type == "cuda":
            with make_profiler(with_host=False) as profiler:
                forward_and_backward()
                synchronize(device)
            kernels = {}
            for event in device_kernels(profiler):
                milliseconds = (event.time_range.end - event.time_range.start) / 1e3
                kernels[event.name] = kernels.get(event.name, 0) + milliseconds
            result[f"{kind}, busy ms"] = sum(kernels.values())
            result[f"{kind}, copies ms"] = sum(ms for name, ms in kernels.items() if name.startswith("Memcpy"))
    return result | {"blocks of a step, ms": step, "peak GiB": peak_gib(device)}


def main(args: argparse.Namespace) -> None:
    device = find_device()
    report = Report(args.output, describe(device))
    for precision in args.precisions.split(","):
        free(device)
        torch._dynamo.reset()
        report.add(precision=precision, **measure(precision, args, device))
    print(json.dumps(report.about, indent=1))
    print(report.table())


if __name__ == "__main__":
    main(parse_args())
