# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Which samples are drawn for training, in which order and how, and which ones validation takes; preparing batches ahead.

A sample's row and random choices are functions of the seed and of the sample's position in the run. So resuming, and any
number of processes, repeats exactly the same samples, which no sampler of PyTorch or accelerate promises.
"""

import copy
import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.logging import get_logger

from pipeline_flux_fill_semantic import SEMANTIC_MODES
from semantic_fill.data import TriptychDataset
from semantic_fill.options import Options


logger = get_logger(__name__)

# Kinds of maps that a sample is looked at with: its own, another sample's, or none.
MAPS = ("right", "wrong", "none")
# Validation takes less than one forward pass in so many that training takes.
TRAINING_SHARE = 20
# More rows say more than more timesteps, unless there are only few rows.
USUAL_TIMESTEPS, MOST_TIMESTEPS = 4, 16
Prepared = TypeVar("Prepared")


def seed_of(*parts) -> int:
    """A 63-bit seed made of its parts, independent for every different tuple of them."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class SampleSpec:
    """What is decided at random for one sample before it is read. `position` counts the samples of the whole run."""

    position: int
    index: int
    flip: bool
    drop_caption: bool
    drop_map: bool
    # A random number in [0, 1) that chooses among the captions of a sample.
    caption: float = 0.0
    # The sample whose map takes the place of its own, for validation.
    map_index: int | None = None


def count_steps(groups: list[int], samples_per_step: int, epochs: int) -> int:
    """Optimizer steps that visit every row so many times, if all samples of a step are of one group."""
    return sum(math.ceil(epochs * count / samples_per_step) for count in Counter(groups).values())


class ResumableBatchSampler(torch.utils.data.Sampler):
    """
    Endless micro-batches of `SampleSpec` for one process.

    Args:
        groups (`list[int]`):
            The group of each row of the data. All samples of an optimizer step are of one group.
        batch_size, seed (`int`):
            Samples in a micro-batch, and the seed of all draws.
        flip, drop_caption, drop_map (`float`):
            Probabilities in [0, 1].
        process_index, num_processes (`int`):
            This process among those that share the run.
        start (`int`):
            Samples that the run has used before.
        accumulation_steps (`int`):
            Micro-batches in an optimizer step.
    """

    def __init__(
        self,
        groups: list[int],
        batch_size: int,
        seed: int = 0,
        flip: float = 0.0,
        drop_caption: float = 0.0,
        drop_map: float = 0.0,
        process_index: int = 0,
        num_processes: int = 1,
        start: int = 0,
        accumulation_steps: int = 1,
    ):
        self.groups, self.batch_size, self.seed, self.start = groups, batch_size, seed, start
        self.flip, self.drop_caption, self.drop_map = flip, drop_caption, drop_map
        self.process_index, self.num_processes = process_index, num_processes
        self.samples_per_step = batch_size * accumulation_steps * num_processes
        self.rows = {group: [row for row, g in enumerate(groups) if g == group] for group in sorted(set(groups))}
        # The epoch whose steps are known, its first step, and the order of each group's rows.
        self.epoch, self.steps, self.first_step, self.orders = None, [], 0, {}

    def _row(self, position: int) -> int:
        """Each group is an endless stream of its rows, shuffled anew each time that all of them have come."""
        step, place = divmod(position, self.samples_per_step)
        group, earlier = self._group(step) if len(self.rows) > 1 else (self.groups[0], step)
        rows = self.rows[group]
        visit, place = divmod(earlier * self.samples_per_step + place, len(rows))
        if self.orders.get(group, (None,))[0] != visit:
            parts = ("epoch", visit, group) if len(self.rows) > 1 else ("epoch", visit)
            generator = torch.Generator().manual_seed(seed_of(self.seed, *parts))
            self.orders[group] = (visit, torch.randperm(len(rows), generator=generator).tolist())
        return rows[self.orders[group][1][place]]

    def _group(self, step: int) -> tuple[int, int]:
        """The group of an optimizer step, and how many steps of this group come before it."""
        if self.epoch is None or not self.first_step <= step < self.first_step + len(self.steps):

            def before(epoch: int) -> int:
                return count_steps(self.groups, self.samples_per_step, epoch)

            # Filling up steps adds less than one step of each group, so the epoch is one of a few.
            self.epoch = max(0, step - len(self.rows)) * self.samples_per_step // len(self.groups)
            while before(self.epoch + 1) <= step:
                self.epoch += 1
            self.first_step, self.steps = before(self.epoch), []
            for group, rows in self.rows.items():
                first, last = (math.ceil(e * len(rows) / self.samples_per_step) for e in (self.epoch, self.epoch + 1))
                self.steps += [(group, earlier) for earlier in range(first, last)]
            generator = torch.Generator().manual_seed(seed_of(self.seed, "steps", self.epoch))
            self.steps = [self.steps[i] for i in torch.randperm(len(self.steps), generator=generator).tolist()]
        return self.steps[step - self.first_step]

    def spec(self, position: int) -> SampleSpec:
        """The sample at a position of the run, whichever process takes it."""
        chance = random.Random(seed_of(self.seed, "read", position))
        flip, drop_caption, drop_map, caption = (chance.random() for _ in range(4))
        return SampleSpec(
            position=position,
            index=self._row(position),
            flip=flip < self.flip,
            drop_caption=drop_caption < self.drop_caption,
            drop_map=drop_map < self.drop_map,
            caption=caption,
        )

    def rows_before(self, position: int) -> list[int]:
        """The rows of the optimizer step that ends before a position of the run, of all processes."""
        return [self.spec(p).index for p in range(position - self.samples_per_step, position)]

    def __iter__(self) -> Iterator[list[SampleSpec]]:
        first = self.start + self.process_index * self.batch_size
        while True:
            yield [self.spec(position) for position in range(first, first + self.batch_size)]
            first += self.num_processes * self.batch_size


class SampleReader(torch.utils.data.Dataset):
    """What the data loader's workers call: a `SampleSpec` in, a sample read by an `Encoder` out."""

    def __init__(self, encoder):
        # Workers read and never encode, so they get no copy of the pipeline.
        self.encoder = copy.copy(encoder)
        self.encoder.pipeline = None

    def __len__(self) -> int:
        return len(self.encoder.dataset)

    def __getitem__(self, spec: SampleSpec) -> dict:
        return self.encoder.read(spec)


def read_samples(run) -> tuple[ResumableBatchSampler, Iterator[list[dict]]]:
    """The order of a `Run`'s samples from its state on, and the samples read by the data loader."""
    options, accelerator = run.options, run.engine.accelerator
    sampler = ResumableBatchSampler(
        run.encoder.dataset.groups(),
        options.train_batch_size,
        options.seed,
        flip=0.5 if options.random_flip else 0.0,
        drop_caption=options.caption_dropout,
        drop_map=options.semantic_dropout,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        start=run.state.samples_seen,
        accumulation_steps=options.gradient_accumulation_steps,
    )
    loader = torch.utils.data.DataLoader(
        SampleReader(run.encoder), batch_sampler=sampler, collate_fn=list, num_workers=options.dataloader_num_workers
    )
    return sampler, iter(loader)


def prefetch(
    prepare: Callable[[list[dict]], Prepared], samples: Iterator[list[dict]], device: torch.device
) -> Generator[Prepared]:
    """
    The results of `prepare` for endless samples. On a GPU a thread prepares the next result while the current one is
    used, on a stream of its own: copies from the host would otherwise wait for everything that the main stream still
    computes. The results have their tensors in `vars`.
    """
    if device.type != "cuda":
        yield from map(prepare, samples)
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def prepare_next() -> tuple[Prepared, Any]:
        with torch.cuda.stream(stream):
            return prepare(next(samples)), stream.record_event()

    with ThreadPoolExecutor(max_workers=1) as pool:
        following = pool.submit(prepare_next)
        while True:
            (result, ready), following = following.result(), pool.submit(prepare_next)
            current = torch.cuda.current_stream(device)
            current.wait_event(ready)
            for tensor in filter(torch.is_tensor, vars(result).values()):
                tensor.record_stream(current)
            yield result


# -- Validation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValidationPlan:
    """
    What is measured at each validation.

    Args:
        dataset (`TriptychDataset`): The held-out samples.
        rows (`list[int]`): Those of them that are measured.
        wrong_maps (`dict[int, int]`): For each of them the sample whose map is its wrong one.
        timesteps (`int`): Timesteps of each sample.
        maps (`tuple[str, ...]`): Kinds of maps, out of `MAPS`.
        averages (`bool`): Whether the right map is also measured with weights that are not averaged.
    """

    dataset: TriptychDataset
    rows: list[int]
    wrong_maps: dict[int, int]
    timesteps: int
    maps: tuple[str, ...]
    averages: bool = False

    @property
    def forwards(self) -> int:
        """Forward passes of one sample."""
        return (len(self.maps) + self.averages) * len(self.rows) * self.timesteps

    def spec(self, place: int, kind: str) -> SampleSpec:
        """The sample at a place among `rows` times `timesteps`. Negative positions are no positions of training."""
        row = self.rows[place // self.timesteps]
        other = self.wrong_maps[row] if kind == "wrong" else None
        return SampleSpec(-1 - place, row, False, False, drop_map=kind == "none", map_index=other)

    def specs(self) -> list[SampleSpec]:
        """Everything that has to be encoded."""
        return [self.spec(i * self.timesteps, kind) for i in range(len(self.rows)) for kind in self.maps]


def plan_validation(options: Options, dataset: TriptychDataset | None, samples_per_step: int) -> ValidationPlan | None:
    """As many rows and timesteps of the held-out data as take less than a share of training's forward passes."""
    if dataset is None:
        return None
    maps = MAPS if SEMANTIC_MODES[options.semantic_mode].uses_map else ("right",)
    steps = options.max_train_steps
    interval = options.validation_steps or steps
    validations, samples = -(-steps // interval), samples_per_step * steps
    # The last validation may follow soon after another one. A fifth is left for it, so that all but short runs measure the
    # same, however long they are.
    share = min(samples - 1, samples_per_step * 4 * interval * validations // 5) // TRAINING_SHARE
    averages = options.ema_decay is not None
    pairs = max(1, share // (validations * (len(maps) + averages)))
    count = min(len(dataset), pairs // min(USUAL_TIMESTEPS, math.isqrt(pairs)))
    timesteps = min(MOST_TIMESTEPS, pairs // count)
    # Neighbors are often alike, so the rows are spread over the data.
    rows = [place * len(dataset) // count for place in range(count)]
    others = wrong_maps(dataset, rows) if "wrong" in maps else {}
    if others:
        rows = [row for row in rows if row in others]
    elif "wrong" in maps:
        maps = ("right", "none")
        logger.info("There is no wrong map to compare with, because all held-out samples have the same one")
    plan = ValidationPlan(dataset, rows, others, timesteps, maps, averages)
    taken = validations * plan.forwards
    logger.info(
        f"Held-out loss: {len(maps) + averages} losses x {len(rows)} of {len(dataset)} samples x {timesteps} timesteps ="
        f" {plan.forwards} forward passes, in {validations} validations {taken / samples:.1%} of training's {samples}"
    )
    if taken * TRAINING_SHARE >= samples:
        enough = -(-TRAINING_SHARE * 5 * (len(maps) + averages) // (4 * samples_per_step))
        logger.info(
            f"That is the least that can be measured. It is below {1 / TRAINING_SHARE:.0%} with --validation_steps {enough}"
            " in a run of as many steps."
        )
    return plan


def wrong_maps(dataset: TriptychDataset, rows: list[int]) -> dict[int, int]:
    """
    The samples whose maps are the wrong ones of `rows`: for each row the next sample of its size with another map. Rows
    without such a sample are left out.
    """
    found = {}
    for row in rows:
        others = ((row + offset) % len(dataset) for offset in range(1, len(dataset)))
        fitting = (other for other in others if dataset.size(other) == dataset.size(row))
        other = next((other for other in fitting if dataset.map_hash(other) != dataset.map_hash(row)), None)
        if other is not None:
            found[row] = other
    return found
