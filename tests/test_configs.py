# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The accelerate launch files, read by accelerate's own launcher, and what is refused of the engines that they ask for.

`test_processes.py` starts each of them.
"""

import types
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from test_training import arguments

from training_engines import find_engine


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
ENGINES = {
    "one_gpu": (DistributedType.NO, prepare_simple_launcher_cmd_env),
    "ddp": (DistributedType.MULTI_GPU, prepare_multi_gpu_env),
    "fsdp2": (DistributedType.FSDP, prepare_multi_gpu_env),
    "deepspeed_zero2": (DistributedType.DEEPSPEED, prepare_deepspeed_cmd_env),
}


def launch_environment(path: Path) -> dict[str, str]:
    """What `accelerate launch --config_file path` would put into the environment of its processes."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args.nondefault = {"config_file"}
    args, _, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""  # what the launcher adds for DeepSpeed's own configuration
    made = ENGINES[path.stem][1](args)
    return made[1] if isinstance(made, tuple) else made


def test_every_config_is_known():
    assert {path.stem for path in CONFIGS} == set(ENGINES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_read(path):
    config = load_config_from_file(str(path))  # raises on a key that it does not know
    assert config.distributed_type == ENGINES[path.stem][0]
    assert (config.num_processes == 1) == (path.stem == "one_gpu")
    assert launch_environment(path)["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize(
    "kind, environment, precision, options, message",
    [
        ("FSDP", {"FSDP_VERSION": "1"}, "bf16", "", "set `fsdp_version: 2`, not 1"),
        ("DEEPSPEED", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "bf16", "", "set `zero_stage: 2`, not 3"),
        ("MEGATRON_LM", {}, "bf16", "", "accelerate is configured for MEGATRON_LM"),
        *(
            (kind, {"FSDP_VERSION": "2"}, precision, options, f"{name} {message}")
            for kind, name in (("FSDP", "FSDP2"), ("DEEPSPEED", "DeepSpeed ZeRO-2"))
            for precision, options, message in (
                ("bf16", "--optimizer prodigy", "shares optimizer states out"),
                ("bf16", "--use_8bit_adam", "shares optimizer states out"),
                ("bf16", "--fast", "takes the base in half precision"),
                ("bf16", "--base_precision nf4", "takes the base in half precision"),
                ("fp16", "", "does not scale the loss"),
            )
        ),
    ],
)
def test_engines_that_would_not_train_right_are_refused(monkeypatch, kind, environment, precision, options, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    accelerator = types.SimpleNamespace(
        distributed_type=DistributedType[kind], num_processes=2, mixed_precision=precision, device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=message):
        find_engine(accelerator, arguments("unused", "unused", *options.split(), data="unused"))


def test_processes_that_do_not_find_one_another_are_refused(monkeypatch):
    """What accelerate makes of the file for several GPUs where there is none: single runs, one beside the other."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = types.SimpleNamespace(distributed_type=DistributedType.NO, num_processes=1)
    with pytest.raises(ValueError, match="2 processes were launched, but .* set ACCELERATE_USE_CPU=true"):
        find_engine(alone, arguments("unused", "unused", data="unused"))
