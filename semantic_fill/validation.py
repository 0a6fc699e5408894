# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Validation: the held-out loss with the right map, another sample's and none, the best weights, and when to stop.

Rows, timesteps and noise are fixed when a run starts, and each forward pass takes one sample, whatever the number of
processes. So two figures differ by the weights alone, and their gap is what the map is worth.
"""

import functools
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger

from semantic_fill import reports
from semantic_fill.averages import averaged
from semantic_fill.checkpoints import BEST
from semantic_fill.encoding import Encoder
from semantic_fill.engines import Engine
from semantic_fill.files import (
    CHECKPOINTS_REMAIN,
    explain_write_errors,
    list_files,
    ornament,
    replace_folder,
    write_atomically,
)
from semantic_fill.options import Options
from semantic_fill.page import painted_samples, write_page
from semantic_fill.paintings import paint_samples
from semantic_fill.sampling import ValidationPlan
from semantic_fill.training_state import WORTH, TrainingState
from semantic_fill.weights import save_weights


logger = get_logger(__name__)

# The held-out loss depends on these. Others, such as the parameters of logit_normal, decide about timesteps alone.
LOSS_OPTIONS = ("seed", "max_sequence_length", "guidance_scale", "weighting_scheme", "timestep_shift", "loss_region")


def figure_of(kind: str) -> str:
    """What the loss of a kind of maps is called in `validation.jsonl`."""
    name = kind.removeprefix("wrong ")
    return {"right": "loss", "wrong": "wrong_map", "none": "no_map"}.get(kind, f"wrong_map_{name}")


# -- Measure ----------------------------------------------------------------------------------------------------------


class HeldOut:
    """
    Measures the held-out loss.

    Args:
        encoder (`Encoder`):
            Of the held-out data.
        plan (`ValidationPlan`):
            What is measured.
        engine (`Engine`):
            The run's engine.
        draw_timesteps (`Callable`):
            Random generators -> as many timesteps of training's distribution, before their shift.
        make_batch (`Callable`):
            Samples of `encoder` and `timesteps` -> a batch.
        compare (`Callable`):
            A prediction and its batch -> the loss.
    """

    def __init__(
        self,
        encoder: Encoder,
        plan: ValidationPlan,
        engine: Engine,
        draw_timesteps: Callable[[list[torch.Generator]], torch.Tensor],
        make_batch: Callable[..., Any],
        compare: Callable[[torch.Tensor, Any], torch.Tensor],
    ):
        self.encoder, self.plan, self.engine = encoder, plan, engine
        self.make_batch, self.compare = make_batch, compare
        # The middles of equal parts of the distribution, whatever distribution it is.
        draws = draw_timesteps([torch.Generator().manual_seed(seed) for seed in range(1000)]).sort().values
        self.timesteps = draws[[(2 * k + 1) * len(draws) // (2 * plan.timesteps) for k in range(plan.timesteps)]]
        self.measured = (plan.dataset.fingerprint(), plan.rows, self.timesteps.tolist())

    def key(self, options: Options) -> int:
        """A checksum of what is measured, and of the options that its loss depends on beside the weights."""
        loss = [getattr(options, name) for name in LOSS_OPTIONS]
        # A number, as all that validations note.
        return zlib.crc32(repr((*self.measured, *loss)).encode())

    @torch.no_grad()
    def measure(self, model, maps: tuple[str, ...] | None = None) -> dict[str, float]:
        """
        The losses by their names from `figure_of`, and with a wrong map `map_worth`, which is the loss of the wrong map minus
        that of the right one. Every process has to call it, and gets the same figures.

        Args:
            model (`SemanticFillModel`): The unwrapped model.
            maps (`tuple[str, ...]`, *optional*): Only these of the plan's kinds of maps.
        """
        accelerator, maps = self.engine.accelerator, maps or self.plan.maps
        places, processes = len(self.plan.rows) * self.plan.timesteps, accelerator.num_processes
        own = range(accelerator.process_index, -(-places // processes) * processes, processes)
        model.eval()
        try:
            # Where there is no sample left for a process it takes one again, because a forward may be a collective.
            losses = [torch.stack([self._loss(model, place % places, kind) for kind in maps]) for place in own]
        finally:
            model.train()
        gathered: Any = accelerator.gather(torch.stack(losses)[None])
        table = gathered.transpose(0, 1).reshape(-1, len(maps))[:places].tolist()
        # An exact sum does not depend on the order.
        figures = {figure_of(kind): math.fsum(column) / places for kind, column in zip(maps, zip(*table))}
        for name in [name for name in figures if name.startswith("wrong_map")]:
            figures[name.replace("wrong_map", WORTH)] = figures[name] - figures["loss"]
        return figures

    def _loss(self, model, place: int, kind: str) -> torch.Tensor:
        sample = self.encoder.read(self.plan.spec(place, kind))
        batch = self.make_batch([sample], timesteps=self.timesteps[[place % self.plan.timesteps]])
        return self.compare(model(batch), batch).float()


# -- Validate ---------------------------------------------------------------------------------------------------------


def is_due(run, last: bool = False) -> bool:
    """Whether a `Run` has not had the validation of its step yet. One that ends here validates for its card."""
    options, state = run.options, run.state
    if state.validations and state.validations[-1]["step"] == state.step:
        return False
    if last and (options.validation_steps or options.push_to_hub or run.held_out is not None):
        return True
    return bool(options.validation_steps and state.step and state.step % options.validation_steps == 0)


def validate(run) -> None:
    """
    Measures, keeps the best weights, paints and draws the page of a `Run`. Every process has to call it. With --ema_decay
    all of this is done with the averaged weights, and one more loss is that of the last ones.

    A checkpoint of the same step comes before, so that nothing here can cost it. A run that continues from there
    validates first.
    """
    run.engine.release_graphs()
    not_averaged = {}
    if run.held_out is not None and run.options.ema_decay is not None:
        with run.stopwatch.part("held-out loss"):
            measured = run.held_out.measure(run.engine.unwrap(run.model), ("right",))
        not_averaged = {"not_averaged": measured["loss"]}
    with averaged(run):
        _validate(run, not_averaged)


def _validate(run, measured: dict[str, float]) -> None:
    options, state, accelerator = run.options, run.state, run.engine.accelerator
    model = run.engine.unwrap(run.model)
    since = state.step - (state.validations[-1]["step"] if state.validations else 0)
    recent = [loss for loss in state.losses[-since:] if math.isfinite(loss)]
    found: dict[str, Any] = {"step": state.step, "training_loss": math.fsum(recent) / len(recent) if recent else None}
    if run.held_out is not None:
        with run.stopwatch.part("held-out loss"):
            measured = run.held_out.measure(model) | measured
        # JSON has no word for what is not a number.
        found |= {name: value if math.isfinite(value) else None for name, value in measured.items()}
        found["held_out"] = run.held_out.key(options)
    state.validations.append(found | {"scales": [*model.scales().values()]})
    if state.validations[-2:] != state.comparable[-2:]:
        logger.warning(
            "Held-out losses before this step were of other samples, timesteps or options: the best one is found anew"
        )
    reports.log_validation(run)
    kept, loss = state.kept, found.get("loss")
    if options.keep_best and loss is not None and (kept is None or loss < kept["loss"]):
        keep_best(run)
    if accelerator.is_main_process:
        path = Path(options.output_dir, "validation.jsonl")
        lines = "".join(f"{json.dumps(validation)}\n" for validation in state.validations)
        with explain_write_errors("--output_dir", CHECKPOINTS_REMAIN):
            write_atomically(path, lambda part: part.write_text(lines, encoding="utf-8"))
    with ornament("Painting validation samples"), run.stopwatch.part("paintings"):
        paint_samples(run)
    if accelerator.is_main_process:
        with ornament("The page of the run"):
            write_page(options, state)
    accelerator.wait_for_everyone()


def keep_best(run) -> None:
    """Replaces the weights in `best/` by those of the last validation. Every process has to call it."""
    options, state, model = run.options, run.state, run.engine.unwrap(run.model)
    weights, found = run.engine.weights(model), state.validations[-1]
    found["kept"] = True
    if run.engine.accelerator.is_main_process:
        with explain_write_errors("--output_dir", CHECKPOINTS_REMAIN):
            replace_folder(
                Path(options.output_dir, BEST), functools.partial(save_weights, model, weights, options=options)
            )
        logger.info(f"{BEST}/ holds the weights of step {state.step}: the lowest held-out loss, {found['loss']:.4f}")


def stops_early(options: Options, state: TrainingState) -> bool:
    """Whether as many validations as `--early_stopping_patience` have not lowered the held-out loss."""
    patience = options.early_stopping_patience
    if patience is None or state.validations_since_best < patience:
        return False
    best = f"{state.best['loss']:.4f} of step {state.best['step']}" if state.best else "any finite loss"
    logger.info(f"Stopped early at step {state.step}: {patience} validations did not come below {best}")
    return True


def extra_files(options: Options, state: TrainingState) -> list[str]:
    """The paintings and the best weights of this run, by their names in the output folder."""
    folder, kept = Path(options.output_dir), list_files(Path(options.output_dir, BEST)) if state.kept else []
    return [path.relative_to(folder).as_posix() for path in (*painted_samples(options, state), *kept)]
