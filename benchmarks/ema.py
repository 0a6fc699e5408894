# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Does an exponential moving average (EMA) of LoRA and module have a lower held-out loss than the last weights?

    python examples/earth.py --output_dir earth
    python benchmarks/emoji.py --output_dir emoji
    python benchmarks/ema.py --steps 200 --batch_size 4 --num_train 200 --num_test 32 --emoji_base examples/base \\
        --output ema.jsonl

The options are those of `ablation.py`. Averages with several decays are kept beside one run, so all figures of a row are of
the same steps, and of the same held-out samples with the right map, timesteps and noise.
"""

import argparse
import dataclasses
import functools
import itertools
import json

import numpy as np
from ablation import PROJECTION, Variant, parse_args, read_output
from cells import build, find_task, options_of
from diffusers.training_utils import EMAModel
from measurement import StepTracker, assemble, markdown

import train_semantic_fill_lora as trainer
from semantic_fill.sampling import ValidationPlan
from semantic_fill.validation import HeldOut


# Small pictures keep it to a quarter of an hour of one core.
SCHEDULES = {name: Variant(f"{PROJECTION} --resolution 64 --lr_scheduler {name}") for name in ("constant", "cosine")}
# The n-th step has a decay of at most n / (9 + n), so in short runs all decays above 0.99 are the same.
DECAYS = (0.9, 0.95, 0.99)
TIMESTEPS = 4


def measure_with(test: trainer.Run, run: trainer.Run, count: int) -> HeldOut:
    """The held-out loss of a run's weights on up to `count` samples that another run would train on."""
    dataset = test.encoder.dataset
    rows = list(range(len(dataset)))[:: -(-len(dataset) // count)]
    return HeldOut(
        test.encoder,
        ValidationPlan(dataset, rows, {}, TIMESTEPS, ("right",)),
        run.engine,
        draw_timesteps=functools.partial(trainer.draw_timesteps, options=run.options),
        make_batch=test.make_batch,
        compare=lambda pred, batch: trainer.compare(pred, batch, run.objective),
    )


def run_cell(task: str, schedule: str, seed: int, test: trainer.Run, args: argparse.Namespace) -> dict:
    """Trains once, and measures the last weights and their averages."""
    run, _ = build(task, SCHEDULES[schedule], seed, args.steps, args, args.num_train)
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    averages = [EMAModel(trained, decay=decay, foreach=True) for decay in DECAYS]
    step = run.engine.step

    def step_and_average(*given) -> None:
        step(*given)
        for average in averages:
            average.step(trained)

    run.engine.step = step_and_average
    trainer.train(run)
    held_out = measure_with(test, run, args.num_test)
    row = {"task": task, "variant": schedule, "seed": seed, "losses": [held_out.measure(run.model)["loss"]]}
    for average in averages:
        average.copy_to(trained)
        row["losses"].append(held_out.measure(run.model)["loss"])
    return row


def table(rows: list[dict]) -> str:
    """A row for each task and schedule. Gains are the least and the most of all seeds, and positive where EMA is better."""
    cells = {}
    for row in rows:
        cells.setdefault((row["task"], row["variant"]), []).append(row["losses"])
    lines = []
    for (task, schedule), losses in cells.items():
        last, *averaged = np.array(losses).T
        line = {"task": task, "schedule": schedule, "held-out loss": f"{last.mean():.4f}"}
        line["spread of the seeds"] = f"{np.ptp(last):.4f}"
        for decay, values in zip(DECAYS, averaged):
            gains = last - values
            line[f"gain of EMA {decay}"] = f"{gains.mean():+.4f} ({gains.min():+.4f} to {gains.max():+.4f})"
        lines.append(line)
    return markdown(lines)


def main(args: argparse.Namespace) -> None:
    there = {(row["task"], row["variant"], row["seed"]) for row in read_output(args.output)}
    for task in args.tasks:
        options = options_of(task, SCHEDULES["constant"], 0, args.steps, args)
        folder = find_task(task, args).folder / "test"
        test = assemble(dataclasses.replace(options, train_data_dir=str(folder)), StepTracker())
        for schedule, seed in itertools.product(SCHEDULES, args.seeds):
            if (task, schedule, seed) not in there:
                row = run_cell(task, schedule, seed, test, args)
                with open(args.output, "a") as file:
                    file.write(json.dumps(row) + "\n")
    print(table(read_output(args.output)))


if __name__ == "__main__":
    main(parse_args())
