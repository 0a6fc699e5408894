# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""
Training runs in processes of their own, forked from a server that has imported the trainer, and what may happen to them
at a chosen moment.

A moment is an operation of one of the `PHASES`. Python's audit events show operations on files, so nothing of the trainer
is replaced. A step shows where its loss is taken.
"""

import collections
import contextlib
import errno
import gc
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

import train_semantic_fill_lora as trainer


# The server imports Pillow's formats once, so that no run has to.
PIL.Image.init()

PHASES = ("encoding", "step", "checkpoint", "result", "card")
MARKS = {"encoding": "/cache/", "checkpoint": ".checkpoint-", "result": ".result.part", "card": ".README.md."}
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Kill:
    """Sends SIGKILL so many seconds after the moment."""

    delay: float = 0.0

    def __call__(self):
        if self.delay:
            # The thread is no daemon, so a run that ends sooner is killed too, before its process is gone.
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Signal:
    number: int
    times: int = 1

    def __call__(self):
        for _ in range(self.times):
            os.kill(os.getpid(), self.number)


@dataclass(frozen=True)
class LimitFileSize:
    """Has the system refuse to write files longer than so many bytes, from the moment on."""

    size: int

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


@dataclass(frozen=True)
class Fail:
    """Lets the operation fail as on a full disk (ENOSPC) or a read-only one (EROFS)."""

    number: int

    def __call__(self):
        raise OSError(self.number, os.strerror(self.number), errno.errorcode[self.number])


@dataclass(frozen=True)
class Meet:
    """Waits until so many runs have reached their moment."""

    folder: str
    runs: int

    def __call__(self):
        Path(self.folder, str(os.getpid())).touch()
        while len(os.listdir(self.folder)) < self.runs:
            time.sleep(0.01)


@dataclass(frozen=True)
class Moment:
    phase: str
    count: int
    action: object


def watch(moment: Moment | None) -> collections.Counter:
    """Counts this process's operations and acts at the moment."""
    seen = collections.Counter()
    busy = threading.local()

    def operation(phase: str) -> None:
        seen[phase] += 1
        if moment is not None and (phase, seen[phase]) == (moment.phase, moment.count):
            # The action itself may open files, which are no operations of the run.
            busy.now = True
            try:
                moment.action()
            finally:
                busy.now = False

    def audit(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree") and not getattr(
            busy, "now", False
        ):
            for phase, mark in MARKS.items():
                if mark in f"{os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, Path)) else ''}":
                    operation(phase)

    compare = trainer.compare

    def compare_at_a_step(*args):
        operation("step")
        return compare(*args)

    trainer.compare = compare_at_a_step
    sys.addaudithook(audit)
    return seen


def train(options: list[str], log: str, moment: Moment | None) -> None:
    """One run, which writes its output to a file, and the number of its operations in each phase to a file beside it."""
    with open(log, "w", buffering=1) as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        # Garbage collections need not search what the server imported.
        gc.freeze()
        seen = watch(moment)
        try:
            trainer.main(trainer.parse_args(options))
        except Exception as error:
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(1)
        finally:
            counts = dict(seen)
    Path(f"{log}.json").write_text(json.dumps(counts))


def context():
    """A context whose first process starts the server. The server has the environment of this process."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*sys.path[:3], os.environ.get("PYTHONPATH"))))
    os.environ.update(ENVIRONMENT)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["forked_runs"])
    return server
