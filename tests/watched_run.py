# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The trainer as one of several processes, which notes what it draws, encodes, sends, logs and writes.

    accelerate launch ... tests/watched_run.py FOLDER FAULTS OPTIONS...

leaves `FOLDER/rank0.json` and so on. Faults are JSON, `[[rank, number of the loss from 1, kind], ...]`: "nan",
"SIGTERM" to this process, or "Ctrl-C", which a launcher gets. What other processes are to wait for takes its time.
"""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train_semantic_fill_lora as trainer
import training_engines


NOTES = ("noise", "rows", "losses", "encoded", "reductions", "logged", "norms", "written", "times")
seen = {name: [] for name in NOTES}
reductions = 0


def note_writes(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        seen["written"].append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename"):
        seen["written"].append(str(arguments[0]))


def counted(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        global reductions
        reductions += 1
        return function(*args, **kwargs)

    return call


def watched(owner, name, note, slowly=False):
    function = getattr(owner, name)

    def call(*args, **kwargs):
        if slowly:
            time.sleep(0.3)
        result = function(*args, **kwargs)
        note(result, *args, **kwargs)
        return result

    setattr(owner, name, call)


def note_time(event):
    seen["times"].append([event, time.time()])


def with_faults(compare, faults):
    count = 0

    def call(*args):
        nonlocal count
        count += 1
        loss = compare(*args)
        if faults.get(count) == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        if faults.get(count) == "Ctrl-C":
            os.kill(os.getppid(), signal.SIGINT)
        return loss * float("nan") if faults.get(count) == "nan" else loss

    return call


def note_rows(batch, step, samples):
    seen["rows"] += [sample["draws"].position for sample in samples]


def note_encoding(result, encoder, index, *args):
    seen["encoded"].append(index)
    note_time("encoded")


def note_prompts(result, encoder, prompts):
    seen["encoded"] += prompts


def note_backward(result, *args):
    seen["reductions"].append(reductions)


def note_log(result, accelerator, values, **kwargs):
    seen["logged"].append(values["loss"])
    seen["norms"].append(values["gradient_norm"])


def hook_ddp(prepared, *args):
    if isinstance(prepared[0], torch.nn.parallel.DistributedDataParallel):
        prepared[0].register_comm_hook(None, counted(allreduce_hook))


def main() -> None:
    folder, faults, *options = sys.argv[1:]
    # FSDP2 shares gradients by one of these, as PyTorch's version has it; DDP's reducer is reached by its hook alone.
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        if hasattr(dist, name):
            setattr(dist, name, counted(getattr(dist, name)))
    watched(training_engines.Engine, "prepare", hook_ddp)
    for engine in (training_engines.Engine, training_engines.FSDP2Engine):
        watched(engine, "backward", note_backward)
    watched(trainer, "draw_noise", lambda drawn, *args: seen["noise"].append(drawn[0].sum(dim=(1, 2)).tolist()))
    # Once a micro-step, before anything else of it.
    watched(trainer.Encoder, "encode_batch", lambda *args: note_time("step"))
    watched(trainer.Step, "prepare", note_rows)
    watched(trainer.Step, "loss", lambda loss, *args: seen["losses"].append(loss.item()))
    rank = int(os.environ["RANK"])
    watched(trainer.Encoder, "_encode_sample", note_encoding, slowly=rank == 1)
    watched(trainer.Encoder, "encode_prompts", note_prompts)
    watched(trainer, "save_checkpoint", lambda *args: note_time("checkpoint"), slowly=True)
    watched(trainer, "save_result", lambda *args: note_time("result"), slowly=True)
    watched(Accelerator, "log", note_log)
    trainer.compare = with_faults(trainer.compare, {call: kind for at, call, kind in json.loads(faults) if at == rank})
    sys.addaudithook(note_writes)
    args = trainer.parse_args(options)
    # A launcher ends all processes with the first, which would cost the notes.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        trainer.main(args)
    finally:
        note_time("end")
        inside = (str(Path(args.output_dir)), str(Path(args.cache_root)))
        seen["written"] = sorted({path for path in seen["written"] if path.startswith(inside)})
        Path(folder, f"rank{rank}.json").write_text(json.dumps(seen))


main()
