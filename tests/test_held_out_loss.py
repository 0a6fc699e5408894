# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The held-out loss: what it measures, what it costs, that it changes nothing, what is kept by it and what it shows."""

import html.parser
import io
import json
import re

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import PartialState
from helpers import ROOT, arguments, assemble, assert_same_weights, draw_triptych, run, write_triptychs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import SEMANTIC_MODES, FluxFillSemanticPipeline
from semantic_fill import page, sampling, validation
from semantic_fill.sampling import plan_validation
from semantic_fill.training_state import TrainingState


def write_with_maps(folder, seeds, replace_map):
    """Triptychs whose maps are what `replace_map` makes of all triptychs, each `(height, 3, width, 3)`, and a place."""
    folder.mkdir()
    triptychs = [np.array(draw_triptych(seed)).reshape(32, 3, 32, 3) for seed in seeds]
    for index, triptych in enumerate(triptychs):
        triptych = triptych.copy()
        triptych[:, 2] = replace_map(triptychs, index)
        PIL.Image.fromarray(triptych.reshape(32, 96, 3)).save(folder / f"{index:03d}.png")
    return folder


def own_map(triptychs, index):
    return triptychs[index][:, 2]


def next_map(triptychs, index):
    return triptychs[(index + 1) % len(triptychs)][:, 2]


class Zeros(torch.nn.Module):
    """A model that predicts zeros."""

    def forward(self, batch):
        return torch.zeros_like(batch.x_0)


@pytest.fixture
def without_paintings(monkeypatch):
    monkeypatch.setattr(validation, "paint_samples", lambda run: None)
    monkeypatch.setattr(validation, "write_page", lambda *args: None)


# -- What is measured -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Options of a cache that runs share, and of little to train on."""
    return ["--cache_root", tmp_path_factory.mktemp("cache"), "--max_train_samples", 2]


# The projection stands for both kinds of modules.
@pytest.mark.parametrize("mode", sorted(SEMANTIC_MODES.keys() - {"cross_attention"}))
def test_a_wrong_map_is_that_of_another_sample_and_none_is_none(base_folder, triptych_folder, tmp_path, cache, mode):
    """The loss with a wrong map is that with the right map of data whose maps were exchanged."""
    # 3 maps of 3 samples at 2 timesteps are 18 of the 20 forward passes that one validation may have.
    more = [*cache, "--semantic_mode", mode, "--max_train_steps", 250, "--instance_prompt", "x"]
    more.append("--validation_data_dir")

    def measure(name, replace_map, *others):
        held_out = write_with_maps(tmp_path / name, range(100, 103), replace_map)
        options = arguments(base_folder, tmp_path / "out", *more, held_out, *others, data=triptych_folder)
        assembled = assemble(options)
        generator = torch.Generator().manual_seed(0)
        for parameter_name, parameter in assembled.model.named_parameters():
            if ".lora_B." in parameter_name or parameter_name.endswith(".scale"):
                torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        return assembled, assembled.held_out.measure(assembled.model)

    assembled, found = measure("own", own_map)
    assert all(module.training for module in assembled.model.modules() if hasattr(module, "lora_A"))
    assert found == assembled.held_out.measure(assembled.model)
    if mode == "none":
        assert list(found) == ["loss"]
        return
    assert list(found) == ["loss", "wrong_map", "no_map", "map_worth"]
    assert found["map_worth"] == found["wrong_map"] - found["loss"] and found["map_worth"] != 0
    assert found["wrong_map"] == pytest.approx(measure("exchanged", next_map)[1]["loss"], rel=1e-6)
    if mode != "pixel_fusion":
        assert measure("uncached", own_map, "--no-cache_latents")[1] == pytest.approx(found, rel=1e-4, abs=1e-5)
    if mode == "pixel_fusion":
        # The visible view, blended with itself.
        neutral = measure("neutral", lambda triptychs, index: triptychs[index][:, 0])[1]["loss"]
    elif mode == "in_context":
        neutral = measure("neutral", lambda triptychs, index: 128)[1]["loss"]
    else:
        torch.nn.init.zeros_(assembled.model.semantic_attention.layers[0].scale)
        neutral = assembled.held_out.measure(assembled.model)["loss"]
    assert found["no_map"] == pytest.approx(neutral, rel=1e-3 if mode == "in_context" else 1e-6)
    assert found["no_map"] != pytest.approx(found["loss"], rel=1e-4)


def test_timesteps_are_the_middles_of_equal_parts_of_training_s_distribution(
    base_folder, triptych_folder, tmp_path, cache
):
    more = [*cache, "--max_train_steps", 10000, "--timestep_shift", "none", "--validation_data_dir"]
    more.append(write_triptychs(tmp_path / "held out", 2))
    uniform = torch.arange(1, 32, 2) / 32
    normal = torch.distributions.Normal(0, 1).icdf(uniform).sigmoid()
    for scheme, expected in (("none", uniform), ("logit_normal", normal)):
        options = arguments(base_folder, tmp_path / "out", *more, "--weighting_scheme", scheme, data=triptych_folder)
        held_out = assemble(options).held_out
        assert held_out.plan.timesteps == 16 and held_out.plan.rows == [0, 1]
        torch.testing.assert_close(held_out.timesteps, expected, atol=0.04, rtol=0)
        seen = []
        make_batch = held_out.make_batch
        held_out.make_batch = lambda samples, timesteps: (
            seen.append(make_batch(samples, timesteps=timesteps)) or seen[-1]
        )
        for kind in ("right", "wrong", "none"):
            held_out._loss(lambda batch: batch.x_0, 5, kind)
        # The three differ by the map alone.
        assert all(torch.equal(batch.x_t, seen[0].x_t) and batch.t.item() == held_out.timesteps[5] for batch in seen)


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("mode, maps", [("none", 1), ("projection", 3)])
@pytest.mark.parametrize(
    "samples_per_step, interval, steps",
    [(1, 1, 1), (4, 20, 20), (4, 100, 1000), (7, 333, 334), (64, 1000, 5999), (4, 1000, 100), (4, None, 500)],
)
def test_validation_takes_less_than_5_percent_of_training(
    base_folder, tmp_path, monkeypatch, caplog, rows, mode, maps, samples_per_step, interval, steps
):
    # The logger asks which process this is.
    PartialState()
    caplog.set_level("INFO", logger="semantic_fill")
    monkeypatch.setattr(sampling, "wrong_maps", lambda dataset, rows, name: {row: row + 1 for row in rows})
    often = () if interval is None else ("--validation_steps", interval)

    def plan_of(steps, often=often):
        more = ("--semantic_mode", mode, "--max_train_steps", steps, *often)
        return plan_validation(arguments("x", tmp_path, *more, data=tmp_path / "data"), range(rows), samples_per_step)

    plan = plan_of(steps)
    samples, validations = samples_per_step * steps, len({*range(interval or steps, steps, interval or steps), steps})
    assert plan.forwards == maps * len(plan.rows) * plan.timesteps and len(plan.rows) == len(set(plan.rows))
    small = 20 * validations * plan.forwards < samples
    assert small or plan.forwards == maps
    # It uses most of what it may, unless there are too few rows.
    more = 20 * validations * maps * (len(plan.rows) + 1) * plan.timesteps
    assert 4 * more >= 3 * samples or len(plan.rows) == rows
    # A longer run measures the same.
    assert interval is None or steps < 4 * interval or plan == plan_of(2 * steps + 1)
    assert len({spec.position for spec in plan.specs()}) == len(plan.rows)
    assert max(spec.position for spec in plan.specs()) < 0 <= min(plan.rows) <= max(plan.rows) < rows
    share = f"{validations * plan.forwards / samples:.1%} of training's {samples}"
    assert f"= {plan.forwards} forward passes. {validations} validations take {share}" in caplog.text
    enough = re.search(r"It is below 5% with --validation_steps (\d+) in a run of as many steps", caplog.text)
    assert (enough is None) == small
    if enough is not None:
        enough, least = int(enough[1]), plan_of(int(enough[1]), ("--validation_steps", enough[1]))
        assert 20 * least.forwards < samples_per_step * enough
    assert plan_validation(None, None, samples_per_step) is None


def test_one_map_for_all_has_no_wrong_one(base_folder, triptych_folder, tmp_path, cache, caplog):
    caplog.set_level("INFO", logger="semantic_fill")
    held_out = write_with_maps(tmp_path / "same", range(3), lambda triptychs, index: triptychs[0][:, 2])
    more = [*cache, "--validation_data_dir", held_out, "--instance_prompt", "x"]
    found = assemble(arguments(base_folder, tmp_path / "out", *more, data=triptych_folder)).held_out
    assert list(found.measure(Zeros())) == ["loss", "no_map"]
    assert (
        "There is no wrong map to compare with, because no two held-out samples of one size have different ones"
        in caplog.text
    )


def test_training_does_not_notice(base_folder, triptych_folder, tmp_path, monkeypatch, without_paintings):
    more = ["--max_train_steps", 4, "--random_flip", "--lora_dropout", 0.3, "--semantic_dropout", 0.5]
    plain = run(base_folder, tmp_path / "plain", *more, data=triptych_folder)
    more += ["--validation_data_dir", write_with_maps(tmp_path / "held out", range(100, 103), own_map)]
    more += ["--validation_steps", 1, "--instance_prompt", "x"]
    shown = []
    monkeypatch.setattr(trainer.tqdm, "set_postfix", lambda bar, values: shown.append(values))
    measured = run(base_folder, tmp_path / "measured", *more, data=triptych_folder)
    assert_same_weights(plain, measured)
    # The progress bar shows the figures of the last validation.
    found = list(map(json.loads, (measured / "validation.jsonl").read_text().splitlines()))
    assert len(found) == len(shown) == 4 and "held_out" not in shown[0] and "map_worth" not in shown[0]
    for values, row in zip(shown[1:], found):
        assert values["held_out"] == f"{row['loss']:.4f}"
        assert values["map_worth"] == f"{row['map_worth']:.4f}"


def test_what_the_map_is_worth_tells_runs_apart(tmp_path, without_paintings):
    """One run has maps of other samples."""
    base = ROOT / "examples" / "base"
    more = (
        "--semantic_mode projection --max_train_steps 20 --train_batch_size 4 --learning_rate 3e-3 --instance_prompt x"
    )
    more += f" --loss_region target --cache_root {tmp_path / 'cache'} --validation_data_dir"
    more = [*more.split(), write_with_maps(tmp_path / "held out", range(100, 104), own_map)]
    worth = {}
    for replace_map in (own_map, next_map):
        data = write_with_maps(tmp_path / replace_map.__name__, range(16), replace_map)
        out = run(base, tmp_path / f"{replace_map.__name__} out", *more, data=data)
        (found,) = map(json.loads, (out / "validation.jsonl").read_text().splitlines())
        worth[replace_map] = found["map_worth"]
    assert worth[own_map] > 0.2 and abs(worth[next_map]) < worth[own_map] / 4, worth


# -- The best weights -------------------------------------------------------------------------------------------------

OVERFIT = "--max_train_samples 2 --learning_rate 3e-2 --max_train_steps 200 --instance_prompt x --loss_region target"
OVERFIT += " --validation_steps 3 --checkpointing_steps 3 --early_stopping_patience 1 --keep_best"
OVERFIT += " --validation_inference_steps 1 --num_validation_images 1 --report_to tensorboard"


@pytest.fixture(scope="module")
def overfit(base_folder, triptych_folder, tmp_path_factory):
    """A run that overfits and is stopped: its output folder, its options and its validations."""
    tmp_path = tmp_path_factory.mktemp("overfit")
    held_out = write_with_maps(tmp_path / "held out", range(100, 104), own_map)
    more = [*OVERFIT.split(), "--validation_data_dir", held_out, "--cache_root", tmp_path / "cache"]
    out = run(base_folder, tmp_path / "<b>out & co", *more, data=triptych_folder)
    return out, more, list(map(json.loads, (out / "validation.jsonl").read_text().splitlines()))


def test_an_overfitting_run_is_stopped_and_its_best_weights_are_kept(overfit, base):
    out, _, found = overfit
    losses = [validation["loss"] for validation in found]
    best = losses.index(min(losses))
    assert 3 * (best + 2) == found[-1]["step"] < 200 and [v["step"] for v in found] == list(range(3, 3 * best + 7, 3))
    assert [v["step"] for v in found if v.get("kept")][-1] == found[best]["step"]
    assert_same_weights(out / "best", out / f"checkpoint-{found[best]['step']}")
    assert_same_weights(out, out / f"checkpoint-{found[-1]['step']}")
    with pytest.raises(AssertionError):
        assert_same_weights(out, out / "best")
    pipeline = FluxFillSemanticPipeline(**base.components)
    pipeline.load_lora_weights(out / "best", adapter_name="a")
    # As the card says.
    pipeline.load_lora_weights(out, subfolder="best", adapter_name="b")
    assert pipeline.config["semantic_mode"] == "cross_attention"
    pipeline.unload_lora_weights()


@pytest.mark.parametrize("after", [0, 1])
def test_a_resumed_run_finds_the_same(overfit, base_folder, triptych_folder, tmp_path, without_paintings, after):
    """It continues elsewhere, from the checkpoint of the best validation or from the last one."""
    out, more, found = overfit
    step = found[after - 2]["step"]
    more = [*more, "--resume_from_checkpoint", out / f"checkpoint-{step}"]
    resumed = run(base_folder, tmp_path / "resumed", *more, data=triptych_folder)
    assert (resumed / "validation.jsonl").read_text() == (out / "validation.jsonl").read_text()
    assert_same_weights(resumed, out)
    assert_same_weights(resumed / "best", out / "best")


def test_the_best_may_come_before_any_that_was_kept():
    validations = [{"step": 1, "loss": 0.2, "kept": True}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.2}]
    state = TrainingState(validations=validations)
    assert (state.best["step"], state.kept["step"], state.validations_since_best) == (1, 1, 2)
    state = TrainingState(validations=[{"step": 2, "loss": None}, {"step": 3}])
    assert (state.best, state.kept, state.validations_since_best) == (None, None, 2)


@pytest.mark.parametrize("option", ["--validation_data_dir", "--loss_region"])
def test_losses_of_another_kind_are_not_compared(
    overfit, base_folder, triptych_folder, tmp_path, without_paintings, caplog, option
):
    out, more, found = overfit
    other = write_with_maps(tmp_path / "held out", range(104, 108), own_map)
    step = found[-1]["step"]
    more = [*more, "--resume_from_checkpoint", out / f"checkpoint-{step}"]
    more += [option, other if option == "--validation_data_dir" else "diptych"]
    resumed = run(base_folder, tmp_path / "resumed", *more, data=triptych_folder)
    lines = list(map(json.loads, (resumed / "validation.jsonl").read_text().splitlines()))
    *before, last = lines[: len(found) - 1]
    first, second = lines[len(found) - 1 :][:2]
    assert [*before, last] == found[:-1] and first["step"] == step
    assert last["held_out"] != first["held_out"] == second["held_out"]
    # However low the losses before were, the first of the new ones is the lowest yet, so the run goes on.
    assert first["kept"] and first["loss"] != found[-1]["loss"]
    assert caplog.text.count("the best one is found anew") == 1
    state = TrainingState(validations=[{"step": 1, "loss": 0.1, "kept": True, "held_out": "a"}])
    state.validations.append({"step": 2, "loss": 0.2, "held_out": "b"})
    assert (state.best["step"], state.kept, state.validations_since_best) == (2, None, 0)


# -- What is shown ----------------------------------------------------------------------------------------------------


def test_the_log_and_the_card_say_it(overfit, base_folder, triptych_folder, tmp_path, caplog, without_paintings):
    out, more, found = overfit
    card = (out / "README.md").read_text()
    best, last = min(found, key=lambda validation: validation["loss"]), found[-1]
    assert f"The weights are those of step {last['step']}, the last one" in card
    assert f"`best/` holds the weights of step {best['step']}, because their held-out loss was the lowest." in card
    for row in (best, last):
        losses = " | ".join(f"{row[name]:.4f}" for name in ("loss", "wrong_map", "no_map", "map_worth"))
        assert f"| {row['step']} | {losses} |\n" in card
    assert "| step | right map | wrong map | no map | what the map is worth |" in card
    assert f"![step-{last['step']:06d}](samples/step-{last['step']:06d}.png)" in card
    for name in ("time to the first step", "compile time", "steps a second", "peak memory"):
        assert re.search(rf"\n- {name}: \d+\.\d", card), name
    assert re.search(r"\n- validations: \d+\.\d s for held-out losses, \d+\.\d s for paintings\n", card)
    assert f"- samples seen: {2 * last['step']}\n" in card
    caplog.set_level("INFO", logger="semantic_fill")
    more = [*more, "--resume_from_checkpoint", out / f"checkpoint-{last['step']}"]
    run(base_folder, tmp_path / "resumed", *more, data=triptych_folder)
    losses = f"{last['loss']:.4f} (right map), {last['wrong_map']:.4f} (wrong map), {last['no_map']:.4f} (no map)"
    assert f"[Step {last['step']}] Held-out loss: {losses}" in caplog.text
    assert (
        f"Stopped early at step {last['step']}: 1 validations did not come below {best['loss']:.4f} of" in caplog.text
    )
    assert f"samples seen {2 * last['step']}" in caplog.text and "No samples are held out" not in caplog.text


def test_trackers_get_the_figures_and_the_paintings(overfit):
    out, _, found = overfit
    events = EventAccumulator(str(out / "logs" / "semantic-fill"), {"images": 0})
    events.Reload()
    for name in ("loss", "wrong_map", "no_map", "map_worth"):
        logged = {event.step: event.value for event in events.Scalars(f"held_out/{name}")}
        assert logged == pytest.approx({row["step"]: row[name] for row in found}, rel=1e-6)
    paintings = {event.step: event.encoded_image_string for event in events.Images("validation")}
    assert list(paintings) == [row["step"] for row in found]
    for step, data in paintings.items():
        saved = PIL.Image.open(out / "samples" / f"step-{step:06d}.png")
        assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(data))), np.asarray(saved))


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_everything_and_escapes_it(overfit):
    out, _, found = overfit
    shown = Page((out / "samples" / "index.html").read_text(encoding="utf-8"))
    assert "b" not in shown.tags and "Semantic fill: <b>out & co" in shown.text
    assert shown.links and all(link.startswith("data:image/") for link in shown.links)
    assert sum("svg" in link for link in shown.links) == 3
    assert sum("webp" in link for link in shown.links) == len(found)
    for row in found:
        assert f"Step {row['step']}" in shown.text and f"{row['map_worth']:.4f}" in shown.text
    assert "peak memory" in shown.text


def test_a_long_run_has_a_small_page(tmp_path, monkeypatch):
    options = arguments("x", tmp_path, "--max_train_steps", 50000, data=tmp_path / "data")
    (tmp_path / "samples").mkdir()
    validations = [
        {"step": step, "training_loss": 0.1, "loss": 0.2, "scales": [0.1]} for step in range(500, 50001, 500)
    ]
    for row in validations:
        PIL.Image.new("RGB", (2400, 40)).save(tmp_path / "samples" / f"step-{row['step']:06d}.png")
    losses = [float("nan"), *np.linspace(1, 0, 49999).tolist()]
    text = page.draw_run_page(options, TrainingState(50000, losses=losses, validations=validations), {})
    shown = Page(text)
    assert sum("webp" in link for link in shown.links) == 12 and len(text) < 500_000
    assert "Step 500" in shown.text and "Step 50000" in shown.text
    steps, values = page.thin_out(range(1, 50001), losses)
    assert len(steps) == 200 and values == sorted(values, reverse=True) and np.isfinite(values).all()


@pytest.mark.parametrize("function", ["paint_samples", "write_page"])
def test_an_ornament_that_fails_costs_no_result(base_folder, triptych_folder, tmp_path, monkeypatch, caplog, function):
    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(validation, function, fail)
    more = ["--max_train_steps", 1, "--validation_steps", 1, "--validation_inference_steps", 1]
    out = run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    assert (out / "README.md").is_file() and "goes on without it: OSError: the disk is full" in caplog.text


def test_the_result_is_saved_before_the_last_validation(base_folder, triptych_folder, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def check(run):
        # A run that is killed here has its result, with a card.
        assert_same_weights(tmp_path / "out", tmp_path / "out" / "checkpoint-1")
        assert "No held-out loss was measured" in (tmp_path / "out" / "README.md").read_text()
        raise Killed

    monkeypatch.setattr(trainer, "validate", check)
    more = ["--max_train_steps", 1, "--validation_steps", 1, "--validation_fraction", 0.5]
    with pytest.raises(Killed):
        run(base_folder, tmp_path / "out", *more, data=triptych_folder)


def test_without_held_out_data_a_run_says_so_once(base_folder, triptych_folder, tmp_path, caplog, without_paintings):
    caplog.set_level("INFO", logger="semantic_fill")
    run(base_folder, tmp_path, "--max_train_steps", 2, "--validation_steps", 1, data=triptych_folder)
    assert caplog.text.count("No samples are held out: losses and paintings are of samples that are trained on") == 1
    assert "--validation_fraction 0.1" in caplog.text and "Held-out loss" not in caplog.text
    assert "No held-out loss was measured." in (tmp_path / "README.md").read_text()
    assert [list(json.loads(line)) for line in (tmp_path / "validation.jsonl").read_text().splitlines()] == [
        ["step", "training_loss", "scales"]
    ] * 2
