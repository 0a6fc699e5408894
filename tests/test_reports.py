# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What a run says: its start-up lines, the shapes of a batch, its steps, and what trackers get."""

import logging
import re

import pytest
from helpers import arguments, assemble, fresh_state, run, weights_of, write_triptychs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import SEMANTIC_MODES


LOGGERS = ("train_semantic_fill_lora", "semantic_fill")


def messages_of(caplog) -> list[str]:
    return [
        record.getMessage().removeprefix("[RANK 0] ")
        for record in caplog.records
        if record.name.split(".")[0] in LOGGERS
    ]


START = {
    "cross_attention": [
        "Using Cross-Attention with 1 layers, 8 heads",
        "Added 33088 semantic cross-attention parameters to optimizer",
    ],
    "projection": ["Using a projection with 1 layers", "Added 4224 semantic projection parameters to optimizer"],
}


@pytest.mark.parametrize("mode", SEMANTIC_MODES)
def test_start_up_lines(base_folder, triptych_folder, tmp_path, caplog, mode):
    for name in LOGGERS:
        caplog.set_level(logging.INFO, logger=name)
    assembled = assemble(arguments(base_folder, tmp_path, "--semantic_mode", mode, data=triptych_folder))
    messages = messages_of(caplog)
    start = messages.index(f"Semantic mode: {mode}")
    assert messages[start + 1 :] == START.get(mode, [])
    # The number is that of the parameters that the optimizer has beside the LoRA's.
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in assembled.optimizer.param_groups}
    added = int(re.findall(r"Added (\d+) ", "\n".join([*messages, "Added 0 "]))[0])
    assert added == groups.get("module", 0) + groups.get("scale", 0)


def test_start_up_lines_of_other_sizes(base_folder, triptych_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="semantic_fill")
    more = "--semantic_num_layers 2 --semantic_num_heads 4 --semantic_head_dim 8"
    assemble(arguments(base_folder, tmp_path, *more.split(), data=triptych_folder))
    assert "Using Cross-Attention with 2 layers, 4 heads" in messages_of(caplog)
    # Queries, keys, values and output, two norms and the gate.
    assert f"Added {2 * (4 * 64 * 32 + 4 * 64 + 64)} semantic cross-attention parameters to optimizer" in caplog.text


SHAPES = """
visible_img: (2, 3, 32, 48)
target_img: (2, 3, 32, 48)
semantic_img: (2, 3, 32, 48)
diptych: (2, 3, 32, 96)
x_0: (2, 12, 64)
x_cond: (2, 12, 320)
semantic_tokens: (2, 12, 64)
x_t: (2, 12, 64)
x_t_enhanced: (2, 12, 64)
hidden_states: (2, 12, 384)
""".strip().splitlines()


@pytest.mark.parametrize("mode", ["cross_attention", "projection", "in_context"])
def test_shapes_of_the_first_two_steps(base_folder, tmp_path, caplog, mode):
    more = ["--log_level", "debug", "--width", 48, "--max_train_steps", 3, "--semantic_mode", mode]
    for name in LOGGERS:
        caplog.set_level(logging.DEBUG, logger=name)
    run(base_folder, tmp_path / "out", *more, data=write_triptychs(tmp_path / "data", 6, 32, 48))
    # Only debug messages, so that nothing of this is said without being asked for.
    records = [r for r in caplog.records if r.name == "semantic_fill.reports" and r.levelno == logging.DEBUG]
    said = [record.getMessage().removeprefix("[RANK 0] ") for record in records]
    expected = SHAPES
    if mode == "in_context":
        # A third panel, and no tokens of the map.
        expected = [line.replace("96", "144").replace(" 12,", " 18,") for line in SHAPES if "semantic_tok" not in line]
    else:
        expected = [*SHAPES, "Layer 0 scale: 0.000000"]
    assert said[: len(expected)] == expected
    assert [line for line in said[len(expected) :] if "scale" not in line] == [e for e in expected if "scale" not in e]
    gates = [line for line in said if "scale" in line]
    assert len(gates) == (0 if mode == "in_context" else 2)
    assert all(re.fullmatch(r"Layer 0 scale: \d\.\d{6}", gate) for gate in gates)
    # The first step opens the gate.
    assert mode == "in_context" or float(gates[1].split(": ")[1]) > 0


def test_every_100_steps_and_what_trackers_get(base_folder, triptych_folder, tmp_path, caplog):
    for name in LOGGERS:
        caplog.set_level(logging.INFO, logger=name)
    more = "--max_train_steps 101 --train_batch_size 1 --report_to tensorboard --semantic_num_layers 2"
    more += " --lr_scheduler linear"
    out = run(base_folder, tmp_path, *more.split(), data=triptych_folder)
    messages = messages_of(caplog)
    assert not any("x_0" in message or "0.000000" in message for message in messages)
    at = [index for index, message in enumerate(messages) if message.startswith("[Step ")]
    assert len(at) == 1
    loss, *scales = messages[at[0] : at[0] + 3]
    assert re.fullmatch(r"\[Step 100\] Loss: [01]\.\d{4}", loss)
    assert all(re.fullmatch(rf"Layer {n} scale: 0\.\d\d\d", scale) for n, scale in enumerate(scales))
    events = EventAccumulator(str(out / "logs" / "semantic-fill"))
    events.Reload()
    names = {"loss", "lr", "gradient_norm", "skipped_steps", "scale/layer_0", "scale/layer_1"}
    assert names <= set(events.Tags()["scalars"])
    series = {name: events.Scalars(name) for name in names}
    assert all([event.step for event in values] == list(range(1, 102)) for values in series.values())
    values = {name: [event.value for event in values] for name, values in series.items()}
    assert f"{values['loss'][99]:.4f}" == loss.split()[-1]
    assert [f"{values[f'scale/layer_{n}'][99]:.3f}" for n in (0, 1)] == [scale.split()[-1] for scale in scales]
    assert values["scale/layer_0"][-1] > values["scale/layer_0"][0] > 0 and set(values["skipped_steps"]) == {0}
    assert values["lr"] == pytest.approx([1e-4 * (1 - step / 101) for step in range(1, 102)], abs=1e-10)


def test_the_last_line_says_where_the_result_is(base_folder, triptych_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="semantic_fill")
    out = run(base_folder, tmp_path / "out", "--max_train_steps", 1, data=triptych_folder)
    page = out / "samples" / "index.html"
    assert messages_of(caplog)[-1] == (
        f"The result is in {out}. {out / 'README.md'} says how to paint with it, and {page} shows curves and paintings in a"
        " browser"
    )


def test_prodigy_learns_by_default_and_logs_its_rate(base_folder, triptych_folder, tmp_path, caplog):
    learned, rates = [], []
    for name, more in (("default", ()), ("small", ("--learning_rate", 1e-4))):
        options = ("--optimizer", "prodigy", "--max_train_steps", 40, "--report_to", "tensorboard", *more)
        out = run(base_folder, tmp_path / name, *options, data=triptych_folder)
        events = EventAccumulator(str(out / "logs" / "semantic-fill"))
        events.Reload()
        rates.append([event.value for event in events.Scalars("d*lr")])
        learned.append(max(w.abs().max().item() for n, w in weights_of(out).items() if "lora_B" in n))
        # The rate itself is that of the schedule.
        scheduled = [event.value for event in events.Scalars("lr")]
        assert scheduled == pytest.approx([more[1] if more else 1.0] * 40)
    # The estimate starts at 1e-6 and grows from step to step.
    assert learned[0] > 1e-5 and 0 < learned[1] < learned[0] / 1000
    assert rates[0][-1] > 2 * rates[0][0] > 0 and max(rates[1]) < 1e-4
    assert caplog.text.count("--learning_rate 0.0001 is a factor of the rate that Prodigy estimates") == 1


def test_warnings_of_libraries_are_shown_but_for_noise(base_folder, tmp_path, caplog):
    fresh_state()
    trainer.setup(arguments(base_folder, tmp_path, data="unused"))
    shown = []
    for name, message in (
        ("diffusers.models.modeling_utils", "Attention backends are an experimental feature and may change."),
        ("diffusers.models.modeling_utils", "The config attributes {'x': 1} were passed, but are not expected."),
        ("diffusers.pipelines.flux.pipeline_flux_fill", "The following part of your input was truncated because"),
        ("transformers.tokenization_utils_base", "Token indices sequence length is longer than the specified"),
        ("transformers.modeling_utils", "Some weights were newly initialized."),
    ):
        logger = logging.getLogger(name)
        root = logging.getLogger(name.split(".")[0])
        record = logger.makeRecord(name, logging.WARNING, "", 0, message, (), None)
        if logger.isEnabledFor(logging.WARNING) and all(handler.filter(record) for handler in root.handlers):
            shown.append(message)
    assert [message.split()[0] for message in shown] == ["The", "Some"]
