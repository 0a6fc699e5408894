# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""diffusers' attention backends at FLUX's training shape: time, error and whether backward survives.

    python benchmarks/attention_backends.py --output attention_backends.json

A broken kernel takes its process down, so each case runs in one of its own. `split` takes query, key, value and the
gradient of the result from wider tensors, as the transformer's blocks hand them over.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


BACKENDS = ("native", "_native_cudnn", "_native_efficient", "flex", "flash", "_flash_3")


def measure(backend: str, layout: str, batch: int, tokens: int, heads: int, head_dim: int) -> dict:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    torch.backends.cuda.enable_cudnn_sdp(False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"device": device, "dtype": torch.bfloat16}
    torch.manual_seed(0)
    if layout == "split":
        wide = torch.randn(batch, tokens, 3, heads, head_dim, **options)
        query, key, value = (part.detach().requires_grad_() for part in wide.unbind(2))
        grad = torch.randn(batch, tokens, 2 * heads * head_dim, **options)[..., : heads * head_dim]
        grad = grad.unflatten(-1, (heads, head_dim))
    else:
        query, key, value = (torch.randn(batch, tokens, heads, head_dim, **options).requires_grad_() for _ in range(3))
        grad = torch.randn(batch, tokens, heads, head_dim, **options)

    def attend(name=backend):
        return dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))

    run = torch.compile(attend) if backend == "flex" else attend
    times = {"forward ms": [], "backward ms": []}
    for _ in range(8):
        for name, function in (("forward ms", run), ("backward ms", lambda: out.backward(grad))):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            result = function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
            out = result if name == "forward ms" else None
        got = query.grad
        query.grad = key.grad = value.grad = None
    attend("_native_efficient" if device == "cuda" else "native").backward(grad)
    error = ((got - query.grad).float().norm() / query.grad.float().norm()).item()
    return {name: statistics.median(t[3:]) for name, t in times.items()} | {"gradient differs by": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("attention_backends.json"))
    parser.add_argument("--shape", default="4,2560,24,128", help="batch,tokens,heads,head_dim")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--case", help="backend,layout: measure this case only, in this process.")
    args = parser.parse_args()
    sizes = [int(number) for number in args.shape.split(",")]
    if args.case:
        print(json.dumps(measure(*args.case.split(","), *sizes)))
        return
    rows = []
    for backend in args.backends.split(","):
        for layout in ("whole", "split"):
            command = [sys.executable, __file__, "--shape", args.shape, "--case", f"{backend},{layout}"]
            row = {"backend": backend, "layout": layout}
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=90)
                last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]
                row |= json.loads(last) if done.returncode == 0 else {"failed": last[-200:]}
            except subprocess.TimeoutExpired:
                row["failed"] = "did not end in 90 s"
            rows.append(row)
            args.output.write_text(json.dumps(rows, indent=1))
            print(row, flush=True)


if __name__ == "__main__":
    main()
