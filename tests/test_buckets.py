# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Training on several shapes: which there are, which samples get which, and what does not depend on how a run is cut."""

import collections
import json

import pytest
import torch
from helpers import MODULE_FILE, arguments, assemble, assert_same_weights, draw_triptych, run, weights_of

import train_semantic_fill_lora as trainer
from semantic_fill.sampling import ResumableBatchSampler, count_steps
from semantic_fill.views import bucket_sizes


GROUPS = [0] * 5 + [1] * 3 + [2] * 9
# Height and width of a panel, and the shape that it is nearest to.
PANELS = {(64, 64): (64, 64), (48, 80): (48, 80), (80, 48): (80, 48), (40, 64): (48, 80), (32, 32): (64, 64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for index, (height, width) in enumerate([*PANELS, *PANELS]):
        draw_triptych(index, height, width).save(folder / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "text": f"caption {index % 2}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def options_of(base_folder, output_dir, folder, *more):
    return arguments(base_folder, output_dir, "--aspect_buckets", *more, data=folder, resolution=64)


def test_shapes_have_about_one_area_and_whole_tokens():
    for height, width in ((512, 512), (256, 336), (768, 768)):
        sizes = bucket_sizes(height, width)
        assert len(sizes) >= 7 and (height, width) in [*sizes, (256, 336)]
        for h, w in sizes:
            assert h % 16 == w % 16 == 0 and 0.4 < w / h < 2.5
            assert h * w == pytest.approx(height * width, rel=0.1)


def drawn(num_processes: int, batch_size: int, steps: int, start: int = 0, seed: int = 3):
    samplers = [
        iter(
            ResumableBatchSampler(GROUPS, batch_size, seed, process_index=i, num_processes=num_processes, start=start)
        )
        for i in range(num_processes)
    ]
    return [[spec for sampler in samplers for spec in next(sampler)] for _ in range(steps)]


def test_a_step_has_one_shape_and_epochs_are_epochs():
    assert [count_steps(GROUPS, 4, epochs) for epochs in (0, 1, 2, 4, 8)] == [0, 2 + 1 + 3, 3 + 2 + 5, 5 + 3 + 9, 34]
    steps = drawn(1, 4, 34)
    for step in steps:
        assert len({GROUPS[spec.index] for spec in step}) == 1
    for epochs in (1, 2, 3, 8):
        counts = collections.Counter(spec.index for step in steps[: count_steps(GROUPS, 4, epochs)] for spec in step)
        # Only what fills up the last step of a group comes once more.
        assert set(counts) == set(range(len(GROUPS))) and min(counts.values()) == epochs
        assert sum(counts.values()) - epochs * len(GROUPS) < 4 * 3
    first, second = ([s.index for step in steps[a:b] for s in step] for a, b in ((0, 6), (6, 12)))
    assert first != second
    # Steps of many more samples than there are.
    assert count_steps(GROUPS, 100, 1) == count_steps(GROUPS, 100, 10) == 3
    assert collections.Counter(GROUPS[step[0].index] for step in drawn(1, 100, 34)) == {0: 10, 1: 6, 2: 18}


def test_samples_do_not_depend_on_processes_or_restarts():
    one = drawn(1, 4, 10)
    assert drawn(2, 2, 10) == one and drawn(4, 1, 10) == one
    assert drawn(1, 4, 6, start=16) == one[4:]
    assert drawn(1, 4, 10, seed=4) != one


def test_one_group_is_drawn_as_without_groups():
    sampler = ResumableBatchSampler([0] * 7, 3, 5)
    order = [spec.index for _, batch in zip(range(7), sampler) for spec in batch]
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))


def test_each_sample_gets_the_nearest_shape(base_folder, folder, tmp_path):
    built = assemble(options_of(base_folder, tmp_path / "out", folder, "--max_train_steps", 1))
    dataset = built.encoder.dataset
    assert [dataset.size(i) for i in range(len(dataset))] == [*PANELS.values(), *PANELS.values()]
    for index in range(len(dataset)):
        assert {view.shape[1:] for view in dataset.views(index).values()} == {dataset.size(index)}
    assert "brought to 64x64, 80x48, 48x80: 2 cropped (by up to 4.0%), 4 enlarged" in dataset.summary()


@pytest.mark.parametrize("cached", [True, False])
def test_batches_follow_their_shape(base_folder, folder, tmp_path, cached):
    more = ["--loss_region", "target", "--max_train_steps", 8, "--cache_latents" if cached else "--no-cache_latents"]
    built = assemble(options_of(base_folder, tmp_path / "out", folder, *more))
    sizes = set()
    samples = trainer.read_samples(built)[1]
    for _ in range(6):
        batch = built.make_batch(next(samples))
        height, width = batch.size
        sizes.add(batch.size)
        tokens = height // 16 * 2 * width // 16
        assert batch.x_0.shape[1] == batch.x_cond.shape[1] == batch.semantic_tokens.shape[1] == len(batch.positions)
        assert batch.x_0.shape[1] == tokens and len(batch.loss_tokens) == tokens // 2
        loss = trainer.compare(built.model(batch), batch, built.objective)
        assert torch.isfinite(loss)
    assert len(sizes) == 3


def test_resume_is_bit_identical(base_folder, folder, tmp_path):
    def train(name, steps, *more):
        options = ["--aspect_buckets", "--max_train_steps", steps, "--checkpointing_steps", 2, *more]
        options += ["--semantic_scale_learning_rate", 0.1]
        return run(base_folder, tmp_path / name, *options, data=folder, resolution=64)

    whole = train("whole", 6)
    train("parts", 2)
    parts = train("parts", 6, "--resume_from_checkpoint", "latest")
    assert_same_weights(whole, parts)
    assert any(weight.abs().max() > 0 for name, weight in weights_of(whole, MODULE_FILE).items() if "scale" in name)


def test_a_run_continues_with_another_number_of_samples_in_a_step(base_folder, folder, tmp_path):
    for step in drawn(1, 4, 10, start=6):
        assert len({GROUPS[spec.index] for spec in step}) == 1
    whole = drawn(2, 2, 10, start=6)
    assert whole == drawn(1, 4, 10, start=6) and drawn(1, 4, 8, start=14) == whole[2:]
    more = ["--aspect_buckets", "--train_batch_size"]
    out = run(base_folder, tmp_path, *more, 2, "--max_train_steps", 3, data=folder, resolution=64)
    more += [4, "--max_train_steps", 9, "--resume_from_checkpoint", "latest"]
    assert (run(base_folder, out, *more, data=folder, resolution=64) / "checkpoint-9").is_dir()


def test_epochs_visit_every_shape(base_folder, folder, tmp_path):
    built = assemble(options_of(base_folder, tmp_path / "out", folder, "--num_train_epochs", 2))
    # Four, four and two rows of a shape, with two in a step.
    assert built.options.max_train_steps == 2 * (2 + 2 + 1)
    more = ["--num_train_epochs", 3, "--gradient_accumulation_steps", 4]
    built = assemble(options_of(base_folder, tmp_path / "out", folder, *more))
    # Twelve, twelve and six visits, with eight in a step.
    assert built.options.max_train_steps == 2 + 2 + 1


def test_compiled_blocks_have_a_graph_for_each_shape(base_folder, folder, tmp_path, caplog):
    torch._dynamo.reset()
    graphs = collections.Counter()
    compile_repeated_blocks = trainer.FluxTransformer2DModel.compile_repeated_blocks

    def counting(transformer, **kwargs):
        assert kwargs.pop("dynamic") is False

        def backend(graph, inputs):
            graphs[tuple(graph.code)] += 1
            return graph.forward

        kwargs.pop("options")
        return compile_repeated_blocks(transformer, backend=backend, dynamic=False, **kwargs)

    trainer_class = trainer.FluxTransformer2DModel
    trainer_class.compile_repeated_blocks = counting
    try:
        with caplog.at_level("INFO"):
            run(
                base_folder,
                tmp_path / "out",
                *("--aspect_buckets", "--compile", "--max_train_steps", 8),
                data=folder,
                resolution=64,
            )
    finally:
        trainer_class.compile_repeated_blocks = compile_repeated_blocks
    # There are two kinds of blocks. Upright and lying panels have as many tokens.
    assert sum(graphs.values()) == 2 * 2
    assert "compiled for 2 numbers of image tokens" in caplog.text
