# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Holds memory of the GPU so that so many GiB are free, and records how much is, until its input ends.

    python benchmarks/hold.py 11.5

Prints a line of JSON at the beginning, `free`, and one at the end: `peak`, the most bytes that other processes had in use
since, and the same by second. With 0 GiB nothing is held.
"""

import json
import sys
import threading
import time

import torch


def free_bytes() -> int:
    return torch.cuda.mem_get_info()[0]


def main(gib: float) -> None:
    held, ended = [], threading.Event()
    # The allocator takes 20 MiB for a small tensor, so the last few stay free.
    while gib and (surplus := free_bytes() - int(gib * 2**30)) > 2**25:
        held.append(torch.empty(min(surplus, 2**30), dtype=torch.uint8, device="cuda"))
    start = least = free_bytes()
    print(json.dumps({"free": start}), flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    # Which second had the peak shows what it is the peak of.
    seconds: dict[int, float] = {}
    while not ended.wait(0.003):
        least, second = min(least, free := free_bytes()), int(time.time())
        seconds[second] = max(seconds.get(second, 0), (start - free) / 2**30)
    print(json.dumps({"peak": start - least, "GiB by second": seconds}), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
