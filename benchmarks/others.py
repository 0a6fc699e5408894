# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Training at FLUX.1-Fill-dev's true size with other trainers' own code, beside this one, in one run on one card.

    git clone https://github.com/Nerogar/OneTrainer
    git clone https://github.com/kohya-ss/sd-scripts
    python benchmarks/others.py --onetrainer OneTrainer --sd_scripts sd-scripts --output others.json
    python benchmarks/others.py --only "batch 1"    # a regular expression: rows whose names it finds

Each row is a process of its own. All have random weights, the same canvas and prompt length, LoRA of the same rank on
attention and feed-forward, and latents and prompts that were encoded beforehand. A step is forward, loss, backward,
clipping, AdamW and reading the loss. Preparation, LoRA, forward, loss and optimizer of the others are the functions that
their own training loops call. Only the loops, which read files, are written out here. What differs:

- This trainer runs as a whole, with its data loader and its module for the map.
- sd-scripts trains no Fill. Its first layer takes the 64 channels of FLUX.1-dev instead of 384, 0.02 % of a step less.
- On a CPU nothing of OneTrainer is quantized or compiled, because its 8-bit products are kernels for GPUs.

The others also import packages for data loading and for other models, which no step uses. Of these, `STAND_INS` need not
be installed. Calling anything of a stand-in raises, so none can do a part of the work. What has to be installed is
`bitsandbytes`, `parse` and `torchvision` for OneTrainer, and `einops`, `voluptuous` and `torchvision` for sd-scripts. A
row whose checkout or packages are missing says so, and costs no other row.
"""

import argparse
import contextlib
import dataclasses
import importlib.abc
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import flux_shape
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from measurement import ROOT, Report, describe, find_device, free, peak_gib, step_figures, timed
from train_speed import SAME_TOKENS, Bench, parse_sizes
from train_speed import parse_args as parse_speed_args


STAND_INS = ["av", "cv2", "gguf", "imagesize", "mgds", "toml"]
FIGURES = ["ms/step", "samples/s", "spread", "peak GiB"]


class Work:
    """The model's shape, and batches of noise in it: `(batch, ...)` in bfloat16."""

    def __init__(self, args: argparse.Namespace, batch: int, device: torch.device):
        self.config = flux_shape.transformer_config(args.shape)
        self.resolution, self.rank, self.batch, self.device = args.resolution, args.rank, batch, device

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.batch, *shape, device=self.device, dtype=torch.bfloat16)

    def latents(self, channels: int) -> torch.Tensor:
        """A diptych's latents before packing, twice as wide as high."""
        return self.noise(channels, self.resolution // 8, self.resolution // 4)

    def prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What CLIP and T5 make of prompts of 512 tokens."""
        return self.noise(self.config["pooled_projection_dim"]), self.noise(512, self.config["joint_attention_dim"])


# -- The trainers -----------------------------------------------------------------------------------------------------
# The others' functions prepare a model and return its step, which returns the loss.


def onetrainer(work: Work, checkout: Path, weights: str, fastest: bool) -> Callable[[], float]:
    """A step of `GenericTrainer` with `FluxLoRASetup`, from the preset for FLUX.1-dev or with what is fastest."""
    # It finds its own modules by paths relative to the working directory.
    os.chdir(checkout)
    from modules.model.FluxModel import FluxModel
    from modules.modelSetup.FluxLoRASetup import FluxLoRASetup
    from modules.util.config.TrainConfig import TrainConfig
    from modules.util.enum.AttentionMechanism import AttentionMechanism
    from modules.util.enum.DataType import DataType
    from modules.util.enum.ModelType import ModelType
    from modules.util.optimizer_util import change_optimizer
    from modules.util.quantization_util import replace_linear_with_quantized_layers
    from modules.util.TrainProgress import TrainProgress

    on_gpu = work.device.type == "cuda"
    preset = json.loads(Path("training_presets/Flux Dev.1/#flux LoRA.json").read_text())
    config = TrainConfig.default_values()
    # It takes its own presets for configurations of its current version, too.
    config.from_dict(preset | {"__version": config.config_version})
    config.model_type = ModelType.FLUX_FILL_DEV_1
    config.train_device, config.temp_device = str(work.device), "cpu"
    config.batch_size = work.batch
    # Its window does this when AdamW is chosen. Without it, AdamW is not fused.
    config.optimizer = change_optimizer(config)
    config.lora_rank, config.lora_alpha = work.rank, float(work.rank)
    # Its own name for attention and feed-forward leaves out the text stream's and the output of the single blocks.
    config.layer_filter = "attn,ff.net,ff_context.net,proj_mlp,proj_out"
    config.transformer.weight_dtype = DataType[weights if on_gpu else "BFLOAT_16"]
    if fastest and on_gpu:
        config.compile, config.attention_mechanism = True, AttentionMechanism.CUDNN
    config.transformer.gradient_checkpointing = not fastest

    with init_empty_weights():
        transformer = FluxTransformer2DModel.from_config(work.config)
        kept = transformer._keep_in_fp32_modules or []
        replace_linear_with_quantized_layers(transformer, config.transformer.weight_dtype, kept, config.quantization)
    model = FluxModel(config.model_type)
    model.transformer = flux_shape.materialize(transformer, work.device, torch.bfloat16)
    model.noise_scheduler = FlowMatchEulerDiscreteScheduler(**flux_shape.SCHEDULER)
    # A step reads two numbers of the VAE.
    model.vae = torch.nn.Identity()
    model.vae.config = flux_shape.VAE
    model.train_config = config
    setup = FluxLoRASetup(work.device, torch.device("cpu"), False)
    setup.setup_optimizations(model, config)
    setup.setup_model(model, config)
    setup.setup_train_device(model, config)
    parameters, progress = list(model.parameters.parameters()), TrainProgress()

    def step() -> float:
        pooled, prompts = work.prompts()
        batch = {
            "latent_image": work.latents(16),
            "latent_conditioning_image": work.latents(16),
            # The mask of a latent pixel is that of its 8 x 8 pixels.
            "latent_mask": work.latents(64),
            "text_encoder_1_pooled_state": pooled,
            "text_encoder_2_hidden_state": prompts,
            "loss_weight": torch.ones(work.batch, device=work.device),
        }
        loss = setup.calculate_loss(model, batch, setup.predict(model, batch, config, progress), config)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad_norm)
        model.optimizer.step()
        model.optimizer.zero_grad(set_to_none=True)
        setup.after_optimizer_step(model, config, progress)
        progress.next_step(work.batch)
        return loss.item()

    return step


def sd_scripts(work: Work, checkout: Path, fp8: bool) -> Callable[[], float]:
    """A step of `flux_train_network.py` with gradient checkpointing, as in its documentation's example."""
    # It was written for transformers 4, and a pipeline of SD 1 that it imports asks for a class that is gone.
    transformers.CLIPFeatureExtractor = make_stand_in("CLIPFeatureExtractor")
    import flux_train_network
    from library import train_util
    from library.flux_models import Flux, configs
    from networks import lora_flux

    options = "--network_train_unet_only --gradient_checkpointing --sdpa --cache_latents --cache_text_encoder_outputs"
    options += " --mixed_precision bf16 --learning_rate 1e-4 --optimizer_type AdamW --optimizer_args fused=True"
    options += " --timestep_sampling flux_shift --model_prediction_type raw --guidance_scale 1"
    args = flux_train_network.setup_parser().parse_args(options.split())
    trainer = flux_train_network.FluxNetworkTrainer()
    accelerator = train_util.prepare_accelerator(args)
    config = work.config
    params = dataclasses.replace(
        configs["dev"].params,
        vec_in_dim=config["pooled_projection_dim"],
        context_in_dim=config["joint_attention_dim"],
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        num_heads=config["num_attention_heads"],
        depth=config["num_layers"],
        depth_single_blocks=config["num_single_layers"],
        axes_dim=list(config["axes_dims_rope"]),
    )
    with init_empty_weights(include_buffers=False):
        flux = Flux(params)
    flux_shape.materialize(flux, work.device, torch.bfloat16).requires_grad_(False)
    # By default it also trains the modulation, which this trainer does not.
    kept = dict.fromkeys(("img_mod_dim", "txt_mod_dim", "single_mod_dim"), 0)
    network = lora_flux.create_network(1.0, work.rank, work.rank, None, [], flux, **kept)
    network.apply_to([], flux, False, True)
    flux.enable_gradient_checkpointing()
    network.enable_gradient_checkpointing()
    parameters, _ = network.prepare_optimizer_params_with_multiple_te_lrs(None, None, args.learning_rate)
    *_, optimizer = train_util.get_optimizer(args, parameters)
    flux.to(torch.float8_e4m3fn if fp8 else torch.bfloat16)
    flux = trainer.prepare_unet_with_accelerator(args, accelerator, flux)
    network, optimizer = accelerator.prepare(network, optimizer)
    flux.train()
    network.prepare_grad_etc([], flux)
    network.on_epoch_start([], flux)
    scheduler = trainer.get_noise_scheduler(args, accelerator.device)

    def step() -> float:
        positions = torch.zeros(work.batch, 512, 3, device=work.device)
        batch = {
            "latents": work.latents(16),
            "text_encoder_outputs_list": [*work.prompts(), positions, None],
            "loss_weights": torch.ones(work.batch, device=work.device),
        }
        models = {"text_encoders": [], "unet": flux, "network": network, "vae": None, "noise_scheduler": scheduler}
        unused = dict.fromkeys(("vae_dtype", "text_encoding_strategy", "tokenize_strategy"))
        loss = trainer.process_batch(
            batch,
            **models,
            **unused,
            weight_dtype=torch.bfloat16,
            accelerator=accelerator,
            args=args,
            train_text_encoder=False,
        )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.get_trainable_params(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure_ours(batch: int, args: argparse.Namespace) -> dict:
    """The row that `train_speed.py` makes of `--fast`."""
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--{name}={getattr(args, name)}" for name in ("shape", "rank", "resolution", "steps", "warm_up")]
        bench = Bench(parse_speed_args([*given, f"--batch={batch}", f"--output={folder}/speed.json"]))
        result = bench.fast(SAME_TOKENS)
    return {name: result[name] for name in (*FIGURES, "flags")}


# -- Stand-ins --------------------------------------------------------------------------------------------------------


class StandIn(type):
    """The type of what is taken from a package that is not installed. It can be subclassed, but not called."""

    def __getattr__(cls, name: str):
        return make_stand_in(name)

    def __call__(cls, *args, **kwargs):
        if cls.__module__ == "stand_in":
            raise RuntimeError(f"{cls.__name__} of a package that is not installed was called")
        return super().__call__(*args, **kwargs)


def make_stand_in(name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return StandIn(name, (), {"__module__": "stand_in"})


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Comes after all other finders, so that it finds none of `STAND_INS` that is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = make_stand_in
        return module

    def exec_module(self, module):
        pass


# -- Rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the table. `option` names the option with the checkout, and `prepare` makes its step; ours has neither."""

    name: str
    batch: int
    option: str | None = None
    prepare: Callable[..., Callable[[], float]] | None = None

    def checkout(self, args: argparse.Namespace) -> Path | None:
        return getattr(args, self.option) if self.option else ROOT


# A run can end before the last row, so those that matter most come first.
OT, SD = "onetrainer", "sd_scripts"
FP8, INT8 = (partial(onetrainer, weights=f"{name}_W8A8", fastest=True) for name in ("FLOAT", "INT"))
NF4 = partial(onetrainer, weights="NFLOAT_4", fastest=False)
ROWS = [
    Row("this trainer, --fast, batch 4", 4),
    Row("OneTrainer, fp8 W8A8, compiled, cuDNN, batch 4", 4, OT, FP8),
    Row("sd-scripts, bf16, checkpointed, batch 4", 4, SD, partial(sd_scripts, fp8=False)),
    Row("OneTrainer, its NF4 preset, batch 1", 1, OT, NF4),
    Row("sd-scripts, fp8 base, checkpointed, batch 1", 1, SD, partial(sd_scripts, fp8=True)),
    Row("this trainer, --fast, batch 1", 1),
    Row("OneTrainer, fp8 W8A8, compiled, cuDNN, batch 1", 1, OT, FP8),
    Row("OneTrainer, int8 W8A8, compiled, cuDNN, batch 4", 4, OT, INT8),
]


def read_commit(folder: Path) -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout[:7]
    return "unknown"


def time_steps(step: Callable[[], float], batch: int, args: argparse.Namespace, device: torch.device) -> dict:
    free(device)
    seconds, losses = [], []
    for _ in range(args.warm_up + args.steps):
        loss, second = timed(step, device)
        losses.append(loss)
        seconds.append(second)
    if not torch.tensor(losses).isfinite().all():
        raise RuntimeError(f"the losses are {losses}")
    figures = step_figures(seconds[args.warm_up :], batch, device)
    return {name: figures[name] for name in FIGURES}


def measure(row: Row, args: argparse.Namespace) -> dict:
    """Measures one row in this process. A failure is a result too."""
    device = find_device()
    checkout = row.checkout(args)
    # The process that starts the rows leaves the device alone, so each of them describes it.
    result = {"about": describe(device), "commit": read_commit(checkout)}
    try:
        if row.prepare is None:
            return result | measure_ours(row.batch, args)
        sys.path.insert(0, str(checkout))
        sys.meta_path.append(StandInFinder())
        torch.manual_seed(0)
        step = row.prepare(Work(args, row.batch, device), checkout)
        return result | time_steps(step, row.batch, args, device)
    except torch.OutOfMemoryError:
        return result | {"result": f"out of memory beyond {peak_gib(device):.1f} GiB"}
    except Exception as error:
        traceback.print_exc()
        return result | {"result": f"{type(error).__name__}: {str(error)[:200]}"}


def measure_in_process(row: Row, args: argparse.Namespace, seconds: float) -> dict:
    """`measure` in a process of its own, for at most so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, *sys.argv, f"--only=^{re.escape(row.name)}$", f"--result={result}"]
        # The largest rows fill a card of 80 GiB, so all get the allocator that wastes least.
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
        try:
            code = subprocess.run(command, env=environment, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            return {"result": f"stopped after {seconds:.0f} s"}
        return json.loads(result.read_text()) if result.exists() else {"result": f"exit code {code}"}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onetrainer", type=Path, help="A checkout of github.com/Nerogar/OneTrainer.")
    parser.add_argument("--sd_scripts", type=Path, help="A checkout of github.com/kohya-ss/sd-scripts.")
    parser.add_argument("--output", type=Path, default=Path("others.json"))
    parser.add_argument("--minutes", type=float, default=20.0, help="No row is begun or goes on after so many.")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parse_sizes(parser, arguments)
    for name in (OT, SD):
        setattr(args, name, getattr(args, name) and getattr(args, name).resolve())
    return args


def main(args: argparse.Namespace, measure_row: Callable[..., dict] = measure_in_process) -> None:
    end, report = time.perf_counter() + args.minutes * 60, Report(args.output, {})
    for row in ROWS:
        if not re.search(args.only, row.name):
            continue
        checkout, left = row.checkout(args), end - time.perf_counter()
        if checkout is None or not checkout.is_dir():
            result = {"result": f"no checkout: --{row.option} is {checkout}"}
        elif left <= 0:
            result = {"result": "no time left"}
        else:
            result = measure_row(row, args, left)
        report.about = result.pop("about", report.about) | {"command": " ".join(sys.argv)}
        report.add(row=row.name, **result)
    print(json.dumps(report.about, indent=1))
    print(report.table())


if __name__ == "__main__":
    options = parse_args()
    if options.result:
        (only_row,) = (row for row in ROWS if re.search(options.only, row.name))
        options.result.write_text(json.dumps(measure(only_row, options)))
        # Threads of the others and workers of the compiler are not waited for.
        sys.stdout.flush()
        os._exit(0)
    main(options)
