# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The trainer as one of several processes, which notes what it reads, draws, encodes, exchanges, logs and writes.

    accelerate launch ... tests/watched_run.py RUNS

RUNS is JSON, `[[folder, faults, options], ...]`, and the runs follow each other. Each leaves `FOLDER/rank0.json` and so
on, and in `FOLDER/log` what its processes say. Faults are `[[rank, number of the loss from 1, kind], ...]`: "nan",
"SIGTERM" to this process, or "Ctrl-C", which the launcher gets; signals are for the last run. What other processes have
to wait for is slowed down.
"""

import functools
import gc
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
from semantic_fill import checkpoints, engines
from semantic_fill.encoding import Encoder


NOTES = ("noise", "rows", "losses", "encoded", "reductions", "logged", "norms", "written", "times", "read", "checked")
seen = {name: [] for name in NOTES}
reductions = 0


def note_files(event, arguments):
    # An opener opens a second time, without a mode.
    if event == "open" and arguments[1]:
        seen["read"].append(str(arguments[0]))
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


def watch(owner, name, note, slowly=False):
    """Has `note` called with the result and the arguments of each call of a function."""
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


def note_rows(batch, samples, **kwargs):
    seen["rows"] += [sample["spec"].position for sample in samples]


def note_views(result, encoder, spec):
    # Held-out samples have no position in training.
    if spec.position >= 0:
        seen["encoded"].append(spec.index)


def note_prompts(result, encoder, prompts):
    seen["encoded"] += prompts


def note_backward(result, *args):
    seen["reductions"].append(reductions)


def note_log(result, accelerator, values, **kwargs):
    # Validations log too.
    if "gradient_norm" in values:
        seen["logged"].append(values["loss"])
        seen["norms"].append(values["gradient_norm"])


def validate_unwatched(run, validate=trainer.validate):
    """What a validation draws, encodes and computes is none of training's."""
    before = {name: len(notes) for name, notes in seen.items() if name != "written"}
    validate(run)
    for name, count in before.items():
        del seen[name][count:]


def hook_ddp(prepared, *args):
    if isinstance(prepared[0], torch.nn.parallel.DistributedDataParallel):
        prepared[0].register_comm_hook(None, counted(allreduce_hook))


def watched_run(folder: str, faults: list, arguments: list[str]) -> None:
    log = os.open(Path(folder, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    # FSDP2 exchanges gradients with one of these, depending on torch's version. DDP's reducer is reached by its hook alone.
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        if hasattr(dist, name):
            setattr(dist, name, counted(getattr(dist, name)))
    watch(engines.Engine, "prepare", hook_ddp)
    for engine in (engines.Engine, engines.FSDP2Engine):
        watch(engine, "backward", note_backward)
    watch(trainer, "add_noise", lambda noise, *args: seen["noise"].append(noise[0].sum(dim=(1, 2)).tolist()))
    # This comes once in a micro-step, before everything else in it.
    watch(Encoder, "encode_batch", lambda *args: note_time("step"))
    watch(trainer, "make_batch", note_rows)
    watch(trainer, "load_datasets", lambda *args: seen["checked"].extend(seen["read"]))
    rank = int(os.environ["RANK"])
    watch(Encoder, "_views", note_views, slowly=rank == 1)
    watch(Encoder, "encode_map", lambda *args: note_time("encoded"))
    watch(Encoder, "encode_prompts", note_prompts)
    watch(checkpoints, "save_checkpoint", lambda *args: note_time("checkpoint"), slowly=True)
    watch(trainer, "save_result", lambda *args: note_time("result"), slowly=True)
    watch(Accelerator, "log", note_log)
    trainer.compare = with_faults(trainer.compare, {call: kind for at, call, kind in faults if at == rank})
    watch(trainer, "compare", lambda loss, *args: seen["losses"].append(loss.item()))
    trainer.validate = validate_unwatched
    sys.addaudithook(note_files)
    options = trainer.parse_args(arguments)
    # A launcher ends all processes when the first one ends, which would cost the notes. The trainer leaves signals alone
    # that it was started to ignore.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        trainer.main(options)
    finally:
        note_time("end")
        inside = (str(Path(options.output_dir)), str(Path(options.cache_root)))
        for name in ("read", "checked"):
            seen[name] = sorted(path for path in seen[name] if path.startswith(str(Path(options.train_data_dir))))
        seen["written"] = sorted({path for path in seen["written"] if path.startswith(inside)})
        Path(folder, f"rank{rank}.json").write_text(json.dumps(seen))


def main() -> None:
    # Garbage collections need not search what was imported.
    gc.freeze()
    *earlier, last = json.loads(sys.argv[1])
    for folder, *run in earlier:
        # Forking a process that has imported everything is faster than starting one, and each run begins alike.
        child = os.fork()
        if not child:
            # The launcher's own store would have them find what the run before left there.
            rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=processes)
            watched_run(folder, *run)
            return
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        # torch may abort a process in its shutdown, with all work done: https://github.com/pytorch/pytorch/pull/179291
        assert ended in (0, -signal.SIGABRT), ended
    watched_run(*last)


main()
