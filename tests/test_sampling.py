# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The order of samples and their random choices, which depend on the seed and the place in the run alone, and prefetching."""

import contextlib
import dataclasses
import itertools
import threading
import types

import pytest
import torch

from semantic_fill.sampling import ResumableBatchSampler, prefetch, seed_of


# -- Order ------------------------------------------------------------------------------------------------------------


CHANCES = {"flip": 0.5, "drop_caption": 0.3, "drop_map": 0.2}


def samples(number: int, batch_size: int = 2, **kwargs) -> list:
    """The first samples of one process."""
    sampler = ResumableBatchSampler([0] * 10, batch_size, seed=3, **CHANCES | kwargs)
    return list(itertools.islice(itertools.chain.from_iterable(sampler), number))


def test_every_sample_once_an_epoch_and_the_same_for_any_number_of_processes():
    single = samples(40)
    assert [sample.position for sample in single] == list(range(40))
    epochs = [[sample.index for sample in single[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({*map(tuple, epochs)}) == 4
    for processes, batch_size in ((2, 2), (4, 1), (2, 5), (5, 4)):
        parts = [
            samples(40 // processes, batch_size, process_index=rank, num_processes=processes)
            for rank in range(processes)
        ]
        # In each forward pass the processes take neighboring samples of the run.
        together = [
            sample
            for start in range(0, len(parts[0]), batch_size)
            for part in parts
            for sample in part[start : start + batch_size]
        ]
        assert together == single, processes


@pytest.mark.parametrize("start", [1, 7, 10, 23])
def test_a_restart_goes_on_with_the_same_samples(start):
    assert samples(40 - start, 1, start=start) == samples(40)[start:]


def test_chances_are_those_that_are_passed():
    single = samples(2000)
    for name, chance in CHANCES.items():
        field = "drop_maps" if name == "drop_map" else name
        assert sum(bool(getattr(sample, field)) for sample in single) / 2000 == pytest.approx(chance, abs=0.04)
    never = samples(200, **dict.fromkeys(CHANCES, 0))
    assert not any(sample.flip or sample.drop_caption or sample.drop_maps for sample in never)
    assert all(sample.flip for sample in samples(200, flip=1))


def test_each_map_is_dropped_by_itself():
    single, several = samples(2000), samples(2000, maps=("semantic", "b", "c"))
    for name in ("semantic", "b", "c"):
        assert sum(name in sample.drop_maps for sample in several) / 2000 == pytest.approx(0.2, abs=0.04)
    both = sum(sample.drop_maps == ("b", "c") for sample in several) / 2000
    assert both == pytest.approx(0.8 * 0.2 * 0.2, abs=0.02)
    # With more maps, all other choices are the same.
    for one, more in zip(single, several):
        kept = tuple(name for name in more.drop_maps if name == "semantic")
        assert dataclasses.replace(more, drop_maps=kept) == one


def test_a_number_chooses_among_captions_evenly():
    drawn = [sample.caption for sample in samples(2000)]
    assert 0 <= min(drawn) and max(drawn) < 1 and len(set(drawn)) == 2000
    for third in range(3):
        assert sum(int(3 * number) == third for number in drawn) / 2000 == pytest.approx(1 / 3, abs=0.04)
    # It does not follow the other choices, and a row gets another one in each epoch.
    assert sum(sample.caption for sample in samples(2000) if sample.flip) / 1000 == pytest.approx(0.5, abs=0.05)
    assert len({sample.caption for sample in samples(100) if sample.index == 0}) == 10


def test_the_rows_of_a_step_are_those_of_all_processes():
    sampler = ResumableBatchSampler([0] * 10, 2, seed=3, process_index=1, num_processes=2, accumulation_steps=3)
    assert sampler.rows_before(24) == [sample.index for sample in samples(24)[12:]]


def test_seeds_differ_for_all_different_parts():
    parts = [("a", 1), ("a", 2), ("a", 1, 0), ("a1",), (1, "a"), (0,), (), (0.0,)]
    seeds = {seed_of(*part) for part in parts}
    assert len(seeds) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
    # A resumed run of a later version has to draw what an earlier one drew.
    assert seed_of(0, "step", 5) == 3707774027182759260


# -- Batches ahead ----------------------------------------------------------------------------------------------------


def test_on_a_cpu_a_batch_is_made_when_it_is_needed():
    made = []

    def prepare(number):
        made.append((number, threading.current_thread()))
        return f"batch {number}"

    batches = prefetch(prepare, itertools.count(), torch.device("cpu"))
    assert [next(batches), next(batches)] == ["batch 0", "batch 1"]
    assert made == [(0, threading.main_thread()), (1, threading.main_thread())]


class Recorded(torch.Tensor):
    """A tensor that notes which stream uses it."""

    def record_stream(self, stream):
        self.stream = stream


class Stream:
    """A stream of a GPU that is not there. It notes what it waits for."""

    def __init__(self, *args):
        self.waits, self.events = [], itertools.count()

    def wait_stream(self, stream):
        self.waits.append(stream)

    def wait_event(self, event):
        self.waits.append(event)

    def record_event(self):
        return self, next(self.events)


def test_on_a_gpu_batches_are_made_ahead_in_a_thread(monkeypatch):
    main, side, current = Stream(), Stream(), []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)

    @contextlib.contextmanager
    def stream(used):
        current.append(used)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    made, second_is_made = [], threading.Event()

    def prepare(number):
        assert current == [side]
        made.append((number, threading.current_thread()))
        if number == 1:
            second_is_made.set()
        if number == 3:
            raise ValueError("row 3")
        return types.SimpleNamespace(number=number, x_0=torch.zeros(1).as_subclass(Recorded), guidance=None)

    with contextlib.closing(prefetch(prepare, itertools.count(), torch.device("cuda"))) as batches:
        first = next(batches)
        # It is made although nobody has asked for it.
        assert second_is_made.wait(10)
        assert side.waits == [main] and main.waits == [(side, 0)] and first.x_0.stream is main
        assert [first.number, next(batches).number, next(batches).number] == [0, 1, 2]
        assert main.waits == [(side, 0), (side, 1), (side, 2)]
        with pytest.raises(ValueError, match="row 3"):
            next(batches)
    assert [number for number, _ in made][:4] == [0, 1, 2, 3]
    threads = {thread for _, thread in made}
    assert len(threads) == 1 and threading.main_thread() not in threads and not threads.pop().is_alive()
