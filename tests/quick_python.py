# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""
Python processes that start fast. `run_python` is `subprocess.run([sys.executable, ...])` for tests that need a process
with an environment of its own, a fresh home on the Hub or a fresh import of our code, but not the interpreter's start.

A server imports the large libraries once, and each process is forked from it. It imports none of the libraries that read
the environment when they are imported, so each process reads its own.
"""

import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path


FRESH = ("huggingface_hub", "transformers", "diffusers", "accelerate", "peft", "datasets", "semantic_attention")


@functools.cache
def server() -> subprocess.Popen:
    """The server of this process. It ends with this process, which closes its input."""
    # One thread, because the environment of a process comes too late for torch's threads.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-I", __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def run_python(*arguments, env=None, cwd=None, timeout: int = 300) -> subprocess.CompletedProcess:
    """
    Runs `python` with arguments that begin with `-c`, `-m` or a script, in an environment (default: that of this
    process), and returns its exit code, which is negative for a signal, and the texts that it wrote.
    """
    arguments = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        request = {"arguments": arguments, "env": dict(os.environ if env is None else env)}
        request |= {"cwd": str(cwd or os.getcwd()), "folder": folder, "timeout": timeout}
        process = server()
        print(json.dumps(request), file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, code, out, err)


# -- The server -------------------------------------------------------------------------------------------------------


def serve() -> None:
    gc.disable()
    import matplotlib.figure  # noqa: F401
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch._inductor.compile_fx  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401
        import scipy.stats  # noqa: F401
    assert not sys.modules.keys() & set(FRESH)
    # Garbage collections of the processes need not search what was imported.
    gc.freeze()
    gc.enable()
    # The processes must not write into the pipe on which the answers go.
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            answers.close()
            work(**json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def work(arguments: list[str], env: dict[str, str], cwd: str, folder: str, timeout: int) -> None:
    """Becomes the process that was asked for."""
    signal.alarm(timeout)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{folder}/stdout", os.O_WRONLY | os.O_CREAT),
        (2, f"{folder}/stderr", os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(name, flags), number)
    kind, *rest = arguments
    first = str(Path(kind).resolve().parent) if kind.endswith(".py") else ""
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    try:
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), vars(main))
        elif kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(kind, run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    serve()
