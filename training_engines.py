# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What differs between the ways to train on several processes, behind one set of methods.

`Engine` is one process or DDP, which hold all of the model everywhere. `FSDP2Engine` shares weights, gradients and
optimizer states out, `ZeRO2Engine` the latter two. All of them save the same whole tensors, so a run goes on with any
other engine and number of processes. PyTorch's and DeepSpeed's own functions are called, since accelerate leaves both
engines out on CPUs and steps DeepSpeed's optimizer before a bad gradient can be seen.
"""

import argparse
import contextlib
import math
import os

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, parse_flag_from_env
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


# A LoRA's gradients are sent in a millisecond or two. Sent in parts during backward, they would take multiprocessors from
# its products, and processes would wait for each other part by part.
DDP_OPTIONS = DistributedDataParallelKwargs(bucket_cap_mb=1024, gradient_as_bucket_view=True, broadcast_buffers=False)


def find_engine(accelerator: Accelerator, args: argparse.Namespace) -> "Engine":
    """
    The engine that the launch file asks for.

    Raises:
        `ValueError`: for an engine, or options with it, that would not train right.
    """
    kind = accelerator.distributed_type
    launched = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if launched > accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate finds no accelerators for them and takes each for a run"
            " of its own. On CPUs, set ACCELERATE_USE_CPU=true."
        )
    on_cpus = kind == DistributedType.MULTI_CPU
    if kind == DistributedType.FSDP or on_cpus and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise ValueError(f"FSDP is taken in version 2 only: set `fsdp_version: 2`, not {version}.")
        return FSDP2Engine(accelerator, args)
    if kind == DistributedType.DEEPSPEED or on_cpus and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        if stage != "2":
            raise ValueError(f"DeepSpeed is taken with ZeRO stage 2 only: set `zero_stage: 2`, not {stage}.")
        return ZeRO2Engine(accelerator, args)
    if kind in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        return Engine(accelerator, args)
    raise ValueError(
        "The training runs on one process, with DDP, FSDP2 or DeepSpeed ZeRO-2, but accelerate is configured for"
        f" {kind.value}. Run `accelerate config` or pass `--config_file`."
    )


class Engine:
    """One process or DDP. Every process has to call every method."""

    # Whether a forward takes all processes.
    joint_forward = False

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace):
        self.accelerator, self.args = accelerator, args
        self.trained = None

    @property
    def home(self) -> torch.device:
        """Where the model is to be built."""
        return self.accelerator.device

    def shard(self, model: torch.nn.Module) -> None:
        """Shares the built model out, in place, before it gets its optimizer."""

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        """Model and optimizer as they are to be called."""
        if self.args.compile:
            # Else each block is cut in two after the first MiB of its gradients, which are not sent so early anyway.
            torch._dynamo.config.optimize_ddp = False
        return self.accelerator.prepare(model, optimizer)

    @staticmethod
    def bare(model: torch.nn.Module) -> torch.nn.Module:
        """The model within what `prepare` wrapped around it."""
        # A launch file may name a compiler for the whole model.
        model = getattr(model, "_orig_mod", model)
        return getattr(model, "module", model)

    def autocast(self):
        return self.accelerator.autocast()

    @contextlib.contextmanager
    def accumulate(self, model: torch.nn.Module, last: bool):
        """Around the forward and backward of a micro-batch; only the `last` one of a step shares gradients."""
        with self.accelerator.accumulate(model):
            yield

    def backward(self, model: torch.nn.Module, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: torch.nn.Module, max_norm: float) -> torch.Tensor:
        """Scales the gradients down to `max_norm` and returns the norm that they had, over all processes."""
        self.accelerator.unscale_gradients()
        if self.trained is None:
            # Once: there are thousands of modules to look through.
            self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return whole(torch.nn.utils.clip_grad_norm_(self.trained, max_norm))

    def gather(self, loss: torch.Tensor, gradient_norm: torch.Tensor, number: int) -> tuple[float, float, float]:
        """The mean loss of the processes, their gradient norm and the largest `number` of them, in one exchange."""
        values = torch.stack([loss.float(), gradient_norm.float(), torch.tensor(float(number), device=loss.device)])
        losses, norms, numbers = self.accelerator.gather(values).view(-1, len(values)).unbind(dim=1)
        return tuple(torch.stack([losses.mean(), norms.max(), numbers.max()]).tolist())

    def step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, finite: bool) -> None:
        """Applies the gradients if they are `finite`; they are gone afterwards."""
        if finite:
            optimizer.step()
        optimizer.zero_grad()

    def settle_scale(self, lower: bool) -> bool:
        """
        After a step that was not applied: readies the gradient scaler for the next one. Where `lower`, it lowers the
        scale, unless that is down to 1 and so not to blame. Returns whether it did.
        """
        scaler = self.accelerator.scaler
        if scaler is None:
            return False
        scale = scaler.get_scale()
        lower = lower and scale > 1
        scaler.update(None if lower else scale)
        return lower

    def weights(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What is trained, whole, by its name in the bare `model`."""
        return {n: whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict:
        """The `state_dict` of the optimizer with whole tensors."""
        return whole(optimizer.state_dict())

    def load_optimizer(self, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Takes this process's part of an `optimizer_state`."""
        optimizer.load_state_dict(state)


def whole(tree):
    """A nested state without shards."""
    if isinstance(tree, DTensor):
        return tree.full_tensor()
    if isinstance(tree, dict):
        return {k: whole(v) for k, v in tree.items()}
    return [whole(v) for v in tree] if isinstance(tree, (list, tuple)) else tree


class SharingEngine(Engine):
    """What shares optimizer states out takes an optimizer that works on each number alone."""

    name = None

    def __init__(self, accelerator: Accelerator, args: argparse.Namespace):
        super().__init__(accelerator, args)
        if args.optimizer != "adamw" or args.use_8bit_adam:
            # Prodigy's step size and the blocks of 8-bit states are made of whole tensors.
            raise ValueError(
                f"{self.name} shares optimizer states out and needs --optimizer adamw without --use_8bit_adam."
            )
        if args.fast or args.base_precision != "bf16":
            raise ValueError(f"{self.name} takes the base in half precision: leave --fast and --base_precision out.")
        if accelerator.mixed_precision == "fp16":
            raise ValueError(f"{self.name} does not scale the loss as --mixed_precision fp16 needs: use bf16.")

    def autocast(self):
        # accelerate has none for DeepSpeed, which would cast the weights themselves.
        enabled = self.accelerator.mixed_precision == "bf16"
        return torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=enabled)

    def compute_in_autocast(self, model: torch.nn.Module) -> None:
        """As DDP does: each weight stays in its own dtype, what is trained in float32."""
        forward = model.forward

        def forward_in_autocast(*args, **kwargs):
            with self.autocast():
                return forward(*args, **kwargs)

        model.forward = forward_in_autocast


class FSDP2Engine(SharingEngine):
    name = "FSDP2"
    joint_forward = True

    @property
    def home(self) -> torch.device:
        # Blocks go to the accelerator one by one, so it never holds the whole model.
        return torch.device("cpu")

    def shard(self, model: torch.nn.Module) -> None:
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        transformer = model.transformer
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            fully_shard(block, mesh=mesh)
        # Groups of their own, so that painting can call them without the model around them.
        fully_shard(transformer, mesh=mesh)
        if model.semantic_attention is not None:
            fully_shard(model.semantic_attention, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self.compute_in_autocast(model)

    def prepare(self, model, optimizer):
        return model, optimizer

    @contextlib.contextmanager
    def accumulate(self, model, last):
        model.set_requires_gradient_sync(last)
        yield

    def backward(self, model, loss):
        (loss / self.args.gradient_accumulation_steps).backward()

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


class ZeRO2Engine(SharingEngine):
    name = "DeepSpeed ZeRO-2"

    def prepare(self, model, optimizer):
        import deepspeed

        self.compute_in_autocast(model)
        args = self.args
        config = {
            "train_micro_batch_size_per_gpu": args.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "gradient_clipping": args.max_grad_norm,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        deepspeed.comm.init_distributed(auto_mpi_discovery=False)
        # With no precision of its own configured, it leaves dtypes alone.
        model, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        return model, optimizer

    @contextlib.contextmanager
    def accumulate(self, model, last):
        model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, model, loss):
        model.backward(loss)

    def clip(self, model, max_norm):
        # DeepSpeed itself clips, by the configured norm, as it steps. Its norm of what is not finite is a number.
        optimizer = model.optimizer
        optimizer.check_overflow(partition_gradients=True)
        norm = math.nan if optimizer.overflow else float(optimizer.scaled_global_norm())
        return torch.tensor(norm, device=self.accelerator.device)

    def step(self, model, optimizer, finite):
        if finite:
            # gloo gathers into views, which autograd would refuse.
            with torch.no_grad():
                model.step()
            return
        # What DeepSpeed does after an overflow; it looks for one with scaled losses only.
        optimizer.zero_grad()
        optimizer.micro_step_id = -1
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))

    @staticmethod
    def link_states(optimizer) -> None:
        # DeepSpeed does so once, when the first group of parameters alone has states.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()

    def optimizer_state(self, optimizer):
        from deepspeed.utils import safe_get_full_optimizer_state

        self.link_states(optimizer)
        inner, groups, states = optimizer.optimizer, [], {}
        for group, flat in zip(inner.param_groups, optimizer.bit16_groups, strict=True):
            first = len(states)
            for parameter in flat:
                state = inner.state[group["params"][0]]
                names = [name for name, value in state.items() if value.ndim]
                states[len(states)] = {name: state[name] for name in state if name not in names} | {
                    name: safe_get_full_optimizer_state(parameter, name) for name in names
                }
            groups.append({**group, "params": list(range(first, len(states)))})
        return {"state": states, "param_groups": groups}

    def load_optimizer(self, optimizer, state):
        from deepspeed.utils import safe_set_full_optimizer_state

        inner, place = optimizer.optimizer, 0
        for group, saved, flat in zip(inner.param_groups, state["param_groups"], optimizer.bit16_groups, strict=True):
            group |= {**saved, "params": group["params"]}
            (partition,) = group["params"]
            values = state["state"][saved["params"][0]]
            inner.state[partition] = {k: torch.zeros_like(partition) if v.ndim else v for k, v in values.items()}
        self.link_states(optimizer)
        for group in optimizer.bit16_groups:
            for parameter in group:
                for name, value in state["state"][place].items():
                    if value.ndim:
                        safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
                place += 1
