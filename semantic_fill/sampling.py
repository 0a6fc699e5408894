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
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.logging import get_logger

from pipeline_flux_fill_semantic import SEMANTIC_MODES
from semantic_attention import SINGLE_MAP
from semantic_fill.data import TriptychDataset
from semantic_fill.options import Options


logger = get_logger(__name__)

# Kinds of maps that a sample is looked at with: its own, another sample's, or none. Of several maps, each is wrong in turn.
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
    # Names of the maps that the sample does without.
    drop_maps: tuple[str, ...] = ()
    # A random number in [0, 1) that chooses among the captions of a sample.
    caption: float = 0.0
    # The name of a map, and the sample whose map takes the place of its own, for validation.
    wrong_map: tuple[str, int] | None = None


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
            Probabilities in [0, 1]. Each map is dropped by itself.
        process_index, num_processes (`int`):
            This process among those that share the run.
        start (`int`):
            Samples that the run has used before.
        accumulation_steps (`int`):
            Micro-batches in an optimizer step.
        maps (`Sequence[str]`):
            Names of the maps.
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
        maps: Sequence[str] = SINGLE_MAP,
    ):
        self.groups, self.batch_size, self.seed, self.start = groups, batch_size, seed, start
        self.flip, self.drop_caption, self.drop_map, self.maps = flip, drop_caption, drop_map, maps
        self.process_index, self.num_processes = process_index, num_processes
        self.samples_per_step = batch_size * accumulation_steps * num_processes
        self.rows = {group: [row for row, g in enumerate(groups) if g == group] for group in sorted(set(groups))}
        # The epoch whose steps are known, its first step, and the order of each group's rows.
        self.epoch, self.steps, self.first_step, self.orders = None, [], 0, {}

    def _row(self, position: int) -> int:
        """Each group is an endless stream of its rows, shuffled anew each time that all of them have come."""
        group, earlier = self.groups[0], position
        if len(self.rows) > 1:
            # The run may have taken another number of samples in a step before it was resumed.
            step, place = divmod(position - self.start % self.samples_per_step, self.samples_per_step)
            group, steps = self._group(step)
            earlier = steps * self.samples_per_step + place
        rows = self.rows[group]
        visit, place = divmod(earlier, len(rows))
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
        flip, drop_caption, first, caption = (chance.random() for _ in range(4))
        drops = zip(self.maps, (first, *(chance.random() for _ in self.maps[1:])))
        return SampleSpec(
            position=position,
            index=self._row(position),
            flip=flip < self.flip,
            drop_caption=drop_caption < self.drop_caption,
            drop_maps=tuple(name for name, draw in drops if draw < self.drop_map),
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
        maps=run.encoder.dataset.maps,
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
        wrong_maps (`dict[str, dict[int, int]]`): For each map the samples whose map is the wrong one of each row.
        timesteps (`int`): Timesteps of each sample.
        maps (`tuple[str, ...]`): Kinds of maps, from `kinds_of`.
        averages (`bool`): Whether the right map is also measured with weights that are not averaged.
        names (`tuple[str, ...]`): Names of the maps.
    """

    dataset: TriptychDataset
    rows: list[int]
    wrong_maps: dict[str, dict[int, int]]
    timesteps: int
    maps: tuple[str, ...]
    averages: bool = False
    names: tuple[str, ...] = SINGLE_MAP

    @property
    def forwards(self) -> int:
        """Forward passes of one sample."""
        return (len(self.maps) + self.averages) * len(self.rows) * self.timesteps

    def spec(self, place: int, kind: str) -> SampleSpec:
        """The sample at a place among `rows` times `timesteps`. Negative positions are no positions of training."""
        row, name = self.rows[place // self.timesteps], wrong_name(kind, self.names)
        wrong = None if name is None else (name, self.wrong_maps[name][row])
        return SampleSpec(-1 - place, row, False, False, self.names if kind == "none" else (), wrong_map=wrong)

    def specs(self) -> list[SampleSpec]:
        """Everything that has to be encoded."""
        return [self.spec(i * self.timesteps, kind) for i in range(len(self.rows)) for kind in self.maps]


def plan_validation(options: Options, dataset: TriptychDataset | None, samples_per_step: int) -> ValidationPlan | None:
    """As many rows and timesteps of the held-out data as take less than a share of training's forward passes."""
    if dataset is None:
        return None
    maps = kinds_of(options.semantic_maps) if SEMANTIC_MODES[options.semantic_mode].uses_map else ("right",)
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
    others = {name: wrong_maps(dataset, rows, name) for name in (options.semantic_maps if len(maps) > 1 else ())}
    # All kinds are measured on the same rows.
    comparable = [row for row in rows if all(row in found for found in others.values() if found)]
    kept = {name for name, found in others.items() if found and comparable}
    rows = comparable if kept else rows
    maps = tuple(kind for kind in maps if wrong_name(kind, options.semantic_maps) in {None, *kept})
    for name in (name for name in others if name not in kept):
        which = "" if len(others) == 1 else f" of `{name}`"
        logger.info(
            f"There is no wrong map{which} to compare with, because no two held-out samples of one size have different ones"
        )
    plan = ValidationPlan(dataset, rows, others, timesteps, maps, averages, options.semantic_maps)
    taken = validations * plan.forwards
    logger.info(
        f"Held-out loss: {len(maps) + averages} losses x {len(rows)} of {len(dataset)} samples x {timesteps} timesteps ="
        f" {plan.forwards} forward passes. {validations} validations take {taken / samples:.1%} of training's {samples}"
    )
    if taken * TRAINING_SHARE >= samples:
        enough = -(-TRAINING_SHARE * 5 * (len(maps) + averages) // (4 * samples_per_step))
        logger.info(
            f"That is the least that can be measured. It is below {1 / TRAINING_SHARE:.0%} with --validation_steps {enough}"
            " in a run of as many steps."
        )
    return plan


def kinds_of(maps: Sequence[str]) -> tuple[str, ...]:
    """The kinds in `MAPS`. Of several maps each is wrong in turn, with the others right: `wrong land`, `wrong rivers`."""
    wrong = [f"wrong {name}" for name in maps] if len(maps) > 1 else ["wrong"]
    return ("right", *wrong, "none")


def wrong_name(kind: str, maps: Sequence[str]) -> str | None:
    """The name of the map that is wrong in a kind."""
    return maps[0] if kind == "wrong" else kind.removeprefix("wrong ") if kind.startswith("wrong ") else None


def wrong_maps(dataset: TriptychDataset, rows: list[int], name: str) -> dict[int, int]:
    """
    The samples whose maps of a name are the wrong ones of `rows`: for each row the next sample of its size with another
    map. Rows without such a sample, or without a map, are left out.
    """
    found = {}
    for row in rows:
        others = ((row + offset) % len(dataset) for offset in range(1, len(dataset)))
        fitting = (other for other in others if dataset.size(other) == dataset.size(row))
        own = dataset.map_hash(row, name)
        other = next((other for other in fitting if own and dataset.map_hash(other, name) not in (None, own)), None)
        if other is not None:
            found[row] = other
    return found


def maps_of(dataset: TriptychDataset, index: int, kind: str) -> dict[str, torch.Tensor]:
    """
    The maps `(3, height, width)` to paint a sample with, by name. A wrong one is that of the next sample of this size with
    another map.
    """
    views = {} if kind == "none" else dataset.views(index)
    maps, name = {name: views[name] for name in dataset.maps if name in views}, wrong_name(kind, dataset.maps)
    if name in maps:
        others = wrong_maps(dataset, [index], name)
        if not others:
            raise ValueError(
                "A wrong map is another sample's, but all samples have the same one. Pass --maps right none."
            )
        maps[name] = dataset.views(others[index])[name]
    return maps


def group_rows(dataset: TriptychDataset) -> list[list[int]]:
    """The rows that can be in one batch: those with views of one size and the same maps."""
    groups: dict[tuple, list[int]] = {}
    for row in range(len(dataset)):
        maps = [dataset.has_map(row, name) for name in dataset.maps]
        groups.setdefault((dataset.size(row), *maps), []).append(row)
    return list(groups.values())


def batches_of(dataset: TriptychDataset, batch_size: int) -> list[list[int]]:
    """The rows in batches."""
    return [rows[i : i + batch_size] for rows in group_rows(dataset) for i in range(0, len(rows), batch_size)]
