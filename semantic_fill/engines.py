# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What differs between one process, DDP and FSDP2, behind one set of methods.

`Engine` is one process or DDP, where every process holds the whole model. `FSDP2Engine` shards weights, gradients and
optimizer states. Both save the same full tensors, so a run continues with the other one and with any number of
processes. FSDP2 is called through PyTorch itself, because accelerate does not offer it on CPUs, where the tests run.
"""

import contextlib
import gc
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from semantic_fill.averages import update_average
from semantic_fill.graphs import Graphs
from semantic_fill.options import Options
from semantic_fill.precision import blocks_of


logger = logging.getLogger(__name__)

# A LoRA's gradients take a millisecond or two to send. Sent in parts during backward, they would compete with its products
# for multiprocessors, and processes would wait for each other once for each part.
DDP_OPTIONS = DistributedDataParallelKwargs(bucket_cap_mb=1024, gradient_as_bucket_view=True, broadcast_buffers=False)


def find_engine(accelerator: Accelerator, options: Options) -> "Engine":
    """
    The engine that the launch file asks for.

    Raises:
        `ValueError`: for an engine, or options with it, that would not train correctly.
    """
    kind = accelerator.distributed_type
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched > accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate finds no accelerators for them and would let each train"
            " alone. On CPUs, set ACCELERATE_USE_CPU=true."
        )
    on_cpus = kind == DistributedType.MULTI_CPU
    if kind == DistributedType.FSDP or on_cpus and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"FSDP is supported in version 2 only: set `fsdp_version: 2`, not {version}.")
        return FSDP2Engine(accelerator, options)
    if kind in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        return Engine(accelerator, options)
    raise ValueError(
        f"Training runs on one process, with DDP or FSDP2, but accelerate is configured for {kind.value}. Run"
        " `accelerate config` or pass `--config_file`."
    )


class Engine:
    """One process or DDP. Every process has to call every method."""

    # Whether weights are sharded, and so forward is a collective that every rank must call.
    forward_is_collective = False

    def __init__(self, accelerator: Accelerator, options: Options):
        self.accelerator = accelerator
        self.accumulation_steps, self.ema_decay = options.gradient_accumulation_steps, options.ema_decay
        self.trained = self.graphs = None

    @property
    def load_device(self) -> torch.device:
        """The device to build the model on."""
        return self.accelerator.device

    def shard(self, model: Any) -> None:
        """Shards the built model in place, before its optimizer is made."""

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, options: Options):
        """Wraps model and optimizer for training with the options that a run has in the end."""
        if options.compile:
            # Dynamo would cut each block in two after the first MiB of its gradients, which are sent later anyway.
            torch._dynamo.config.optimize_ddp = False
        self.choose_graphs(options, optimizer)
        return self.accelerator.prepare(model, optimizer)

    def choose_graphs(self, options: Options, optimizer: torch.optim.Optimizer) -> None:
        """Has micro-steps run as CUDA graphs where the options want it and nothing stands against it."""
        if not (options.compile if options.cuda_graphs is None else options.cuda_graphs):
            return
        obstacles = {
            "the device is no CUDA device": self.accelerator.device.type != "cuda",
            "processes exchange gradients": self.accelerator.distributed_type != DistributedType.NO,
            "fp16 scales the loss differently from step to step": self.accelerator.mixed_precision == "fp16",
            f"--checkpointing {options.checkpointing} copies between devices": options.checkpointing
            in ("offload", "stream"),
            "--lora_dropout is drawn again by checkpointing": options.lora_dropout and options.checkpointing != "none",
        }
        found = [reason for reason, holds in obstacles.items() if holds]
        self.graphs = None if found else self.make_graphs(optimizer)
        logger.info(f"Steps run without CUDA graphs: {found[0]}" if found else "Steps are replayed as CUDA graphs")

    def make_graphs(self, optimizer: torch.optim.Optimizer) -> Graphs:
        """Graphs, which make gradients anew where each micro-step is a step."""
        return Graphs(optimizer.zero_grad) if self.accumulation_steps == 1 else Graphs()

    @staticmethod
    def unwrap(model: Any) -> Any:
        """The model inside what `prepare` wrapped around it."""
        # A launch file may have the whole model compiled.
        model = getattr(model, "_orig_mod", model)
        return getattr(model, "module", model)

    def autocast(self):
        return self.accelerator.autocast()

    @contextlib.contextmanager
    def accumulate(self, model: Any, last: bool) -> Iterator[None]:
        """Wraps forward and backward of a micro-batch. Only the `last` one of a step exchanges gradients."""
        with self.accelerator.accumulate(model):
            yield

    def backward(self, model: torch.nn.Module, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def run(self, micro_step: Callable[[Any], torch.Tensor], batch: Any) -> torch.Tensor:
        """The loss that `micro_step` returns for a batch, by a CUDA graph of it where there can be one."""
        return micro_step(batch) if self.graphs is None else self.graphs(micro_step, batch)

    def release_graphs(self) -> None:
        """Frees the memory of CUDA graphs until the next step."""
        if self.graphs is not None:
            self.graphs.release()

    def clip(self, model: torch.nn.Module, max_norm: float) -> torch.Tensor:
        """Scales gradients down to `max_norm` and returns the norm that they had, over all processes."""
        self.accelerator.unscale_gradients()
        if self.trained is None:
            # There are thousands of modules to search, so the list is made once.
            self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return to_full_tensors(torch.nn.utils.clip_grad_norm_(self.trained, max_norm))

    def gather(self, loss: torch.Tensor, gradient_norm: torch.Tensor, number: int) -> tuple[float, float, int]:
        """The mean loss, the largest gradient norm and the largest `number` of all processes, in one exchange."""
        values = torch.stack([loss.float(), gradient_norm.float(), torch.tensor(float(number), device=loss.device)])
        gathered: Any = self.accelerator.gather(values)
        losses, norms, numbers = gathered.view(-1, len(values)).unbind(dim=1)
        mean_loss, max_norm, max_number = torch.stack([losses.mean(), norms.max(), numbers.max()]).tolist()
        return mean_loss, max_norm, int(max_number)

    def step(self, optimizer: torch.optim.Optimizer, finite: bool) -> None:
        """Applies the gradients if they are `finite`, averages the weights, and clears the gradients."""
        if finite:
            optimizer.step()
            if self.ema_decay is not None:
                update_average(optimizer, self.ema_decay)
        # Graphs add to gradients where those have been before.
        optimizer.zero_grad(set_to_none=self.graphs is None)

    def update_grad_scale(self, lower: bool) -> bool:
        """
        Prepares fp16's gradient scaler for the next step after one that was not applied. Returns whether the scale was
        lowered, which needs `lower` and a scale above 1.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            return False
        scale = scaler.get_scale()
        lower = lower and scale > 1
        scaler.update(None if lower else scale)
        return lower

    def weights(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The trained parameters as full tensors, by their names in the unwrapped `model`."""
        return {n: to_full_tensors(p.detach()) for n, p in model.named_parameters() if p.requires_grad}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """The optimizer's `state_dict` with full tensors."""
        return to_full_tensors(optimizer.state_dict())

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Loads this process's part of an `optimizer_state`."""
        optimizer.load_state_dict(state)


def to_full_tensors(tree: Any) -> Any:
    """A nested state with its shards gathered. A collective, if there are shards."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {k: to_full_tensors(v) for k, v in tree.items()}
    return [to_full_tensors(v) for v in tree] if isinstance(tree, (list, tuple)) else tree


class FSDP2Engine(Engine):
    forward_is_collective = True

    def __init__(self, accelerator: Accelerator, options: Options):
        super().__init__(accelerator, options)
        if options.optimizer != "adamw" or options.use_8bit_adam:
            # Prodigy's step size and the blocks of 8-bit states are computed over whole tensors.
            raise ValueError("FSDP2 shards optimizer states and needs --optimizer adamw without --use_8bit_adam.")
        if options.fast or options.base_precision != "bf16":
            raise ValueError("FSDP2 takes the base in half precision: leave --fast and --base_precision out.")
        if accelerator.mixed_precision == "fp16":
            raise ValueError("FSDP2 does not scale the loss, which --mixed_precision fp16 needs: use bf16.")
        # Each process loads the models that it encodes with. With this setting, which accelerate's launcher has by default,
        # transformers before 5.23 leaves them zero in all processes but the first, whose weights nobody would send.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

    @property
    def load_device(self) -> torch.device:
        # Blocks move to the accelerator one by one, so it never holds the whole model.
        return torch.device("cpu")

    def shard(self, model: Any) -> None:
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        transformer = model.transformer
        for block in blocks_of(transformer):
            fully_shard(block, mesh=mesh)
        # Painting calls these two without the model around them, so they are groups of their own.
        fully_shard(transformer, mesh=mesh)
        if model.semantic_attention is not None:
            fully_shard(model.semantic_attention, mesh=mesh)
        fully_shard(model, mesh=mesh)
        forward = model.forward
        # The first call makes its module the root. Painting does not call this one, and may come before training does.
        model.forward = lambda: None
        model()

        def forward_in_autocast(*args, **kwargs):
            # As with DDP, each weight keeps its own dtype, and what is trained is float32.
            with self.autocast():
                return forward(*args, **kwargs)

        model.forward = forward_in_autocast

    def prepare(self, model, optimizer, options):
        self.choose_graphs(options, optimizer)
        return model, optimizer

    @contextlib.contextmanager
    def accumulate(self, model, last):
        model.set_requires_gradient_sync(last)
        yield

    def backward(self, model, loss: Any):
        (loss / self.accumulation_steps).backward()

    def load_optimizer(self, optimizer, state):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def part(value, parameter):
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                value = value.to(parameter.device)
                # All processes read the same file, so nothing has to be sent.
                return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
            return value

        states = {i: {k: part(v, parameters[i]) for k, v in values.items()} for i, values in state["state"].items()}
        optimizer.load_state_dict({**state, "state": states})


@contextlib.contextmanager
def frozen_garbage() -> Iterator[Callable[[], None]]:
    """
    Returns a function that keeps garbage collection away from the objects that exist when it is called. Each full
    collection would search all that is built and all that is compiled. It would hold up the compiler, and later this process
    and all others for as long as a step takes. Nothing is done in a program that has frozen objects of its own, because they
    would be unfrozen too.
    """
    # Python 3.12 itself keeps a few hundred objects there, those that never end.
    if gc.get_freeze_count() > 1000:
        yield lambda: None
        return

    def freeze() -> None:
        gc.collect()
        gc.freeze()

    try:
        yield freeze
    finally:
        gc.unfreeze()
