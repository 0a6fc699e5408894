# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Moving averages of LoRA and module: what they are, what is measured and kept of them, and that a resume repeats them."""

import json

import pytest
import torch
from helpers import LORA_FILE, MODULE_FILE, arguments, assemble, assert_same_weights, run, weights_of, write_files

from semantic_fill import validation
from semantic_fill.averages import AVERAGE, COUNT, averaged
from semantic_fill.checkpoints import checkpoint_damage
from semantic_fill.training_state import check_optimizer_state


DECAY = 0.3


@pytest.fixture(scope="module")
def runs(base_folder, triptych_folder, tmp_path_factory):
    """A run without averages and two with them, of which the second one is resumed, and the options of the latter."""
    folder = tmp_path_factory.mktemp("averages")
    more = "--max_train_steps 6 --checkpointing_steps 1 --learning_rate 1e-2 --lora_dropout 0.3".split()
    more += ["--cache_root", folder / "cache"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "paint_samples", lambda run: None)
        plain = run(base_folder, folder / "plain", *more, data=triptych_folder)
        held_out = write_files(folder / "held out", {f"{seed}.png": seed for seed in (100, 101, 102)})
        more += ["--ema_decay", DECAY, "--validation_data_dir", held_out, "--instance_prompt", "x"]
        more += ["--validation_steps", 3, "--keep_best"]
        out = run(base_folder, folder / "out", *more, data=triptych_folder)
        more += ["--resume_from_checkpoint", out / "checkpoint-3"]
        resumed = run(base_folder, folder / "resumed", *more, data=triptych_folder)
    return plain, out, resumed, more


def test_the_result_holds_the_average_of_all_steps(runs):
    plain, out, _, _ = runs
    found = list(map(json.loads, (out / "validation.jsonl").read_text().splitlines()))
    best = min(found, key=lambda row: row["loss"])["step"]
    for file in (LORA_FILE, MODULE_FILE):
        averages = weights_of(out / "checkpoint-1", file)
        for step in range(2, 7):
            decay = min(DECAY, step / (9 + step))
            for name, value in weights_of(out / f"checkpoint-{step}", file).items():
                averages[name] = decay * averages[name] + (1 - decay) * value
            if step == best:
                torch.testing.assert_close(weights_of(out / "best", file), dict(averages), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(weights_of(out, file), averages, rtol=1e-5, atol=1e-8)
    # Training does not notice.
    assert_same_weights(out / "checkpoint-6", plain)
    assert "- weights: moving averages with a decay of 0.3, and the last ones in `checkpoint-6/`\n" in (
        out / "README.md"
    ).read_text(encoding="utf-8")


def test_the_averages_and_the_last_weights_are_measured(runs, base_folder, triptych_folder, tmp_path):
    _, out, _, more = runs
    found = json.loads((out / "validation.jsonl").read_text().splitlines()[-1])
    continued = assemble(
        arguments(base_folder, tmp_path, *more, data=triptych_folder), checkpoint=out / "checkpoint-6"
    )
    measure = continued.held_out.measure
    assert measure(continued.model, ("right",)) == {"loss": found["not_averaged"]}
    with averaged(continued):
        assert measure(continued.model) == {name: found[name] for name in ("loss", "wrong_map", "no_map", "map_worth")}
    assert measure(continued.model, ("right",)) == {"loss": found["not_averaged"]} != {"loss": found["loss"]}
    assert continued.held_out.plan.forwards == 4


def test_a_resumed_run_has_the_same_averages(runs, base_folder, triptych_folder, tmp_path):
    _, out, resumed, more = runs
    assert (resumed / "validation.jsonl").read_text() == (out / "validation.jsonl").read_text()
    assert_same_weights(resumed, out)
    assert_same_weights(resumed / "best", out / "best")
    # A run that goes on without averages leaves those of its checkpoint alone.
    more = [option for option in more if option not in ("--ema_decay", DECAY)]
    continued = assemble(
        arguments(base_folder, tmp_path, *more, data=triptych_folder), checkpoint=out / "checkpoint-6"
    )
    weights = continued.engine.weights(continued.model)
    before = {name: value.clone() for name, value in weights.items()}
    with averaged(continued):
        assert all(torch.equal(value, before[name]) for name, value in weights.items())


@pytest.mark.parametrize("value", [-1, 0.5, "1", None])
def test_a_checkpoint_whose_averages_cannot_be_is_refused(runs, base_folder, triptych_folder, tmp_path, value):
    _, out, _, more = runs
    continued = assemble(
        arguments(base_folder, tmp_path, *more, data=triptych_folder), checkpoint=out / "checkpoint-6"
    )
    assert checkpoint_damage(out / "checkpoint-6") is None
    state = continued.optimizer.state_dict()
    state["state"][0] |= {COUNT: value}
    with pytest.raises(ValueError, match="holds the state of another optimizer"):
        check_optimizer_state(state, continued.optimizer, out)
    assert state["state"][0][AVERAGE].shape == continued.optimizer.param_groups[0]["params"][0].shape
