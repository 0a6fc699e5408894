# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Micro-steps as CUDA graphs. Without a GPU a stand-in repeats the work of what would be captured."""

import dataclasses
import itertools
import types
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from helpers import arguments, assert_same_weights, draw_triptych, fresh_state, run

import train_semantic_fill_lora as trainer
from semantic_fill import graphs
from semantic_fill.engines import Engine, find_engine
from semantic_fill.graphs import Graphs
from semantic_fill.precision import PRECISIONS


# All that is drawn at random, accumulation, and prompts that are dropped.
VARIED = (
    "--lora_dropout 0.1 --random_flip --caption_dropout 0.3 --semantic_dropout 0.5 --gradient_accumulation_steps 2"
)
VARIED = [
    *VARIED.split(),
    "--instance_prompt",
    "a street",
    "--semantic_scale_learning_rate",
    0.1,
    "--learning_rate",
    1e-3,
]


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    label: str
    y: torch.Tensor | None = None


@pytest.fixture(scope="module")
def two_shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    for index, (height, width) in enumerate([(64, 64), (48, 80)] * 3):
        draw_triptych(index, height, width).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def captured(monkeypatch) -> list:
    """The inputs of all micro-steps that were captured. In place of a graph, the micro-step is run by each replay."""
    found = []

    def capture(micro_step, inputs, pool):
        found.append(inputs)
        loss = torch.zeros((), device=next(iter(graphs.tensors_of(inputs).values())).device)
        return types.SimpleNamespace(replay=lambda: loss.copy_(micro_step(inputs))), loss

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "end_capture", lambda pool: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return found


def squares(batch: Pair) -> torch.Tensor:
    return (batch.x**2).sum()


def test_each_shape_is_captured_and_fed_by_copies(captured):
    step, seen = Graphs(), []

    def micro_step(batch):
        seen.append(batch)
        return squares(batch)

    first, second = Pair(torch.tensor([1.0]), "a"), Pair(torch.tensor([2.0]), "a")
    wide, other = Pair(torch.tensor([1.0, 2.0]), "a"), Pair(torch.tensor([3.0]), "b")
    with_y = Pair(torch.tensor([4.0]), "a", torch.zeros(1))
    batches = [first, wide, second, first, second, wide, other, with_y, other, first]
    losses = [step(micro_step, batch) for batch in batches]
    # No replay overwrites the loss of an earlier one.
    assert [loss.item() for loss in losses] == [1, 5, 4, 1, 4, 5, 9, 16, 9, 1]
    # A shape that is new has the memory of the others.
    assert [inputs.x.tolist() for inputs in captured] == [[1], [1, 2], [3], [1]] and captured[0] is captured[3]
    # The caller's tensors are never used themselves, so that those of the first batch stay in place.
    assert not {batch.x.data_ptr() for batch in batches} & {batch.x.data_ptr() for batch in seen}
    assert (first.x, second.x) == (1, 2)


def test_gradients_are_dropped_where_the_first_graph_makes_them(captured):
    happened = []
    step = Graphs(lambda: happened.append("dropped"))

    def micro_step(batch):
        happened.append("run")
        return squares(batch)

    for size in (1, 1, 1, 2, 2, 1):
        step(micro_step, Pair(torch.ones(size), "a"))
    first_graph = ["dropped", "run"]
    # A shape that is new frees the graphs. The second graph then adds to the gradients of the first, which exist.
    assert happened == ["dropped", "run", *first_graph, "run", "dropped", "run", *first_graph, "run"]


def test_released_graphs_are_captured_again(captured):
    step = Graphs()
    batch = Pair(torch.ones(3), "a")
    for _ in range(3):
        step(squares, batch)
    step.release()
    assert step(squares, Pair(torch.full((3,), 2.0), "a")) == 12 and len(captured) == 2
    assert captured[0] is captured[1]


def test_what_cannot_be_captured_runs_without(captured, monkeypatch, caplog):
    def refuse(micro_step, inputs, pool):
        try:
            raise RuntimeError("the host waits for the device")
        finally:
            raise RuntimeError("operation failed due to a previous error")

    step = Graphs()
    step(squares, Pair(torch.ones(1), "a"))
    step(squares, Pair(torch.ones(1), "a"))
    monkeypatch.setattr(graphs, "capture", refuse)
    losses = [step(squares, Pair(torch.full((2,), float(n)), label)).item() for label in "ab" for n in range(3)]
    assert losses == [0, 2, 8] * 2
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "the host waits for the device" in record.message
    assert not step.captured and len(captured) == 1


def accelerator_of(device="cuda", kind="NO", precision="bf16"):
    return types.SimpleNamespace(
        device=torch.device(device), distributed_type=DistributedType[kind], mixed_precision=precision
    )


@pytest.mark.parametrize(
    "accelerator, options, expected",
    [
        (accelerator_of(), "--compile", "replayed as CUDA graphs"),
        (accelerator_of(), "--compile --checkpointing full", "replayed as CUDA graphs"),
        (accelerator_of(), "--compile --checkpointing 0.5 --base_precision nf4", "replayed as CUDA graphs"),
        (accelerator_of(), "--compile --lora_dropout 0.1", "replayed as CUDA graphs"),
        (accelerator_of(), "--cuda_graphs", "replayed as CUDA graphs"),
        (accelerator_of(), "", None),
        (accelerator_of(), "--compile --no-cuda_graphs", None),
        (accelerator_of("cpu"), "--compile", "no CUDA device"),
        (accelerator_of(kind="MULTI_GPU"), "--compile", "exchange gradients"),
        (accelerator_of(kind="FSDP"), "--compile", "exchange gradients"),
        (accelerator_of(precision="fp16"), "--compile", "fp16"),
        (accelerator_of(), "--compile --checkpointing offload", "offload"),
        (accelerator_of(), "--compile --checkpointing full --lora_dropout 0.1", "drawn again"),
    ],
)
def test_where_graphs_are_used(caplog, accelerator, options, expected):
    options = arguments("base", "out", *options.split(), data="d")
    engine = Engine(accelerator, options)
    with caplog.at_level("INFO"):
        engine.choose_graphs(options, torch.optim.SGD([torch.zeros(1)]))
    assert (engine.graphs is not None) == bool(expected and expected.startswith("replayed"))
    assert expected in caplog.text if expected else not caplog.records


REPLAYED = [
    [],
    ["--aspect_buckets", "--gradient_accumulation_steps", 1],
    ["--checkpointing", "full", "--ema_decay", 0.9],
]


@pytest.mark.parametrize("more", REPLAYED)
def test_replayed_run_is_bit_identical(base_folder, two_shapes, tmp_path, captured, monkeypatch, more):
    def train(name, steps, *more):
        options = [*VARIED, "--max_train_steps", steps, "--checkpointing_steps", 3, *more]
        options += ["--validation_steps", 4, "--validation_inference_steps", 1, "--num_validation_images", 1]
        options += ["--cache_root", tmp_path / "cache"]
        return run(base_folder, tmp_path / name, *options, data=two_shapes, resolution=64)

    def choose(engine, options, optimizer):
        engine.graphs = engine.make_graphs(optimizer)

    expected = train("plain", 6, *more)
    monkeypatch.setattr(Engine, "choose_graphs", choose)
    whole = train("replayed", 6, *more)
    assert len(captured) > 1
    train("parts", 3, *more)
    parts = train("parts", 6, "--resume_from_checkpoint", "latest", *more)
    assert_same_weights(expected, whole)
    assert_same_weights(expected, parts)


# -- On a GPU -----------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def train_on_gpu(base_folder, data, out, *more, steps=50):
    """A run of `train` in bf16."""
    fresh_state()
    Path(out).mkdir(parents=True, exist_ok=True)
    options = ["--mixed_precision", "bf16", "--max_train_steps", steps, "--validation_inference_steps", 1, *more]
    options = arguments(base_folder, out, *options, data=data)
    built = trainer.assemble(options, find_engine(trainer.setup(options), options))
    trainer.train(built)
    return built


GPU_CASES = {
    "fp8": ["--base_precision", "fp8"],
    "selective": ["--checkpointing", "selective"],
    "accumulation": ["--gradient_accumulation_steps", 2, "--checkpointing", "full"],
    "dropped maps": ["--semantic_dropout", 0.5, "--caption_dropout", 0.5, "--random_flip"],
    "projection": ["--semantic_mode", "projection", "--loss_region", "target"],
    "in_context": ["--semantic_mode", "in_context"],
    "dropout": ["--lora_dropout", 0.3],
    "validations": ["--validation_steps", 10, "--validation_fraction", 0.3],
    "encoded in each step": ["--no-cache_latents", "--dataloader_num_workers", 2],
}


@on_gpu
@pytest.mark.parametrize("case", GPU_CASES)
def test_graphs_compute_what_single_kernels_do(base_folder, triptych_folder, tmp_path, case):
    more = ["--cache_root", tmp_path / "cache", *GPU_CASES[case]]
    alone = train_on_gpu(base_folder, triptych_folder, tmp_path / "alone", *more, steps=24)
    graphs = train_on_gpu(base_folder, triptych_folder, tmp_path / "graphs", *more, "--cuda_graphs", steps=24)
    assert graphs.engine.graphs.captured and alone.engine.graphs is None
    assert graphs.state.losses == alone.state.losses


@on_gpu
@pytest.mark.parametrize(
    "precision, checkpointing", list(zip(PRECISIONS, itertools.cycle(["none", "full", 0.5]))), ids=PRECISIONS
)
def test_compiled_graphs_train_as_eager_runs_do(base_folder, triptych_folder, tmp_path, precision, checkpointing):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    more = ["--cache_root", tmp_path / "cache", "--base_precision", precision, "--checkpointing", checkpointing]
    more += ["--gradient_accumulation_steps", 2, "--semantic_dropout", 0.5]
    eager = train_on_gpu(base_folder, triptych_folder, tmp_path / "eager", *more)
    graphs = train_on_gpu(base_folder, triptych_folder, tmp_path / "graphs", *more, "--compile")
    assert graphs.engine.graphs.captured
    torch.testing.assert_close(graphs.state.losses, eager.state.losses, rtol=1e-3, atol=0)


@on_gpu
def test_graphs_of_two_shapes_and_a_resumed_run(base_folder, two_shapes, tmp_path):
    more = ["--aspect_buckets", "--resolution", 64, *VARIED, "--checkpointing_steps", 8]

    def train(name, steps, *options):
        options = ["--cache_root", tmp_path / "cache", *more, *options]
        return train_on_gpu(base_folder, two_shapes, tmp_path / name, *options, steps=steps)

    alone, graphs = train("alone", 16), train("graphs", 16, "--cuda_graphs")
    assert len(graphs.engine.graphs.captured) == 2
    train("parts", 8, "--cuda_graphs")
    parts = train("parts", 16, "--cuda_graphs", "--resume_from_checkpoint", "latest")
    assert graphs.state.losses == alone.state.losses
    assert parts.state.losses[-8:] == alone.state.losses[-8:]


@on_gpu
def test_a_step_that_waits_for_the_device_falls_back(base_folder, triptych_folder, tmp_path, monkeypatch, caplog):
    compare, clip, allocated = trainer.compare, Engine.clip, []
    more = ["--cache_root", tmp_path / "cache", "--lora_dropout", 0.3]
    expected = train_on_gpu(base_folder, triptych_folder, tmp_path / "plain", *more)

    def waits(*args):
        loss = compare(*args)
        assert loss.item() > 0
        return loss

    def noted_clip(*args):
        allocated.append(torch.cuda.memory_allocated())
        return clip(*args)

    monkeypatch.setattr(trainer, "compare", waits)
    monkeypatch.setattr(Engine, "clip", noted_clip)
    fell_back = train_on_gpu(base_folder, triptych_folder, tmp_path / "waits", *more, "--cuda_graphs")
    assert "because one could not be captured" in caplog.text and fell_back.engine.graphs.given_up
    # The generator draws again, and memory that two streams have used is freed.
    assert fell_back.state.losses == expected.state.losses
    assert max(allocated[30:]) <= max(allocated[10:20])
