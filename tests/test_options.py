# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The command line: what contradicts is refused with a sentence, before anything is loaded."""

import argparse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_semantic_fill_lora as trainer


REQUIRED = "--pretrained_model_name_or_path unused --train_data_dir unused"
# For each row of the table: a command line with only that contradiction in it, and the option or the other left out.
EXAMPLES = {
    ("revision", "a local --pretrained_model_name_or_path"): "--pretrained_model_name_or_path . --revision r",
    ("dataset_config_name", "--train_data_dir"): "--dataset_config_name c",
    ("dataset_config_name", "a local --dataset_name"): "--dataset_name . --dataset_config_name c",
    ("image_column", "--visible_column"): "--image_column i --visible_column v --target_column t --semantic_column s",
    ("fusion_alpha", "a --semantic_mode other than pixel_fusion"): "--fusion_alpha 0.5",
    **{
        (f"semantic_{name}", "a --semantic_mode other than cross_attention"): (
            f"--semantic_mode in_context --semantic_{name} {value}"
        )
        for name, value in (
            ("num_layers", 1),
            ("num_heads", 8),
            ("head_dim", 16),
            ("position", "none"),
            ("injection", "noise"),
            ("weights", "w"),
            ("learning_rate", 0.1),
            ("scale_learning_rate", 0.1),
        )
    },
    ("semantic_dropout", "--semantic_mode none"): "--semantic_mode none --semantic_dropout 0.1",
    **{
        (f"semantic_{name}", "--semantic_weights"): f"--semantic_weights w --semantic_{name} {value}"
        for name, value in (
            ("num_layers", 1),
            ("num_heads", 8),
            ("head_dim", 16),
            ("position", "none"),
            ("injection", "noise"),
        )
    },
    ("semantic_head_dim", "--semantic_position rope"): "--semantic_position rope --semantic_head_dim 6",
    ("lora_weights", "--resume_from_checkpoint"): "--resume_from_checkpoint latest --lora_weights w",
    ("semantic_weights", "--resume_from_checkpoint"): "--resume_from_checkpoint latest --semantic_weights w",
    ("logit_mean", "a --weighting_scheme other than logit_normal"): "--weighting_scheme mode --logit_mean 0.1",
    ("logit_std", "a --weighting_scheme other than logit_normal"): "--weighting_scheme none --logit_std 1.0",
    ("mode_scale", "a --weighting_scheme other than mode"): "--mode_scale 1.0",
    ("num_train_epochs", "--max_train_steps"): "--max_train_steps 8 --num_train_epochs 1",
    ("gradient_checkpointing", "a --checkpointing other than full"): "--checkpointing none --gradient_checkpointing",
    ("base_precision", "a --mixed_precision other than bf16"): "--mixed_precision fp16 --base_precision fp8x2",
    ("use_8bit_adam", "--optimizer prodigy"): "--optimizer prodigy --use_8bit_adam",
    ("prodigy_use_bias_correction", "--optimizer adamw"): "--no-prodigy_use_bias_correction",
    ("prodigy_safeguard_warmup", "--optimizer adamw"): "--prodigy_safeguard_warmup",
    ("semantic_learning_rate", "--optimizer prodigy"): "--optimizer prodigy --semantic_learning_rate 0.1",
    ("semantic_scale_learning_rate", "--optimizer prodigy"): "--optimizer prodigy --semantic_scale_learning_rate 0.1",
    ("lr_warmup_steps", "--lr_scheduler constant"): "--lr_warmup_steps 1",
    ("lr_warmup_steps", "a --max_train_steps that is not larger"): (
        "--lr_scheduler linear --max_train_steps 5 --lr_warmup_steps 5"
    ),
    ("lr_num_cycles", "a --lr_scheduler other than cosine_with_restarts"): "--lr_scheduler cosine --lr_num_cycles 2",
    ("lr_power", "a --lr_scheduler other than polynomial"): "--lr_power 2.0",
    ("cache_root", "--no-cache_latents"): "--no-cache_latents --cache_root c",
    ("semantic_num_heads", "--semantic_position direct"): "--semantic_num_heads 4 --semantic_position direct",
    ("semantic_head_dim", "--semantic_position direct"): "--semantic_head_dim 8 --semantic_position direct",
    ("num_validation_images", "without --validation_steps or --push_to_hub"): "--num_validation_images 1",
    ("validation_inference_steps", "without --validation_steps or --push_to_hub"): "--validation_inference_steps 1",
    ("validation_guidance_scale", "without --validation_steps or --push_to_hub"): "--validation_guidance_scale 1.0",
    ("hub_strategy", "without --push_to_hub"): "--hub_strategy every_checkpoint",
    ("hub_private_repo", "without --push_to_hub"): "--hub_private_repo",
    ("hub_strategy", "a --checkpointing_steps above --max_train_steps"): (
        "--push_to_hub --max_train_steps 5 --hub_strategy every_checkpoint"
    ),
    ("logging_dir", "--report_to none"): "--report_to none --logging_dir l",
}


def parse(options: str) -> argparse.Namespace:
    required = REQUIRED.split()[:2] if "--dataset_name" in options else REQUIRED.split()
    return trainer.parse_args([*required, *options.split()])


@pytest.mark.parametrize("row", trainer.CONTRADICTIONS, ids=lambda row: f"{row.option}, {row.other}")
def test_every_contradiction_is_refused(row, capsys):
    options = EXAMPLES[row.option, row.other]
    with pytest.raises(SystemExit) as stop:
        parse(options)
    assert stop.value.code == 2 and f"error: {row}\n" in capsys.readouterr().err
    # Without the option itself nothing is wrong: it takes two.
    words = options.split()
    start = words.index(f"--{row.option}") if f"--{row.option}" in words else words.index(f"--no-{row.option}")
    end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
    parse(" ".join(words[:start] + words[end:]))


def test_every_example_is_in_the_table():
    assert set(EXAMPLES) == {(row.option, row.other) for row in trainer.CONTRADICTIONS}
    assert len(EXAMPLES) == len(trainer.CONTRADICTIONS)


@pytest.mark.parametrize("options", ["--optimizer prodigy --semantic_learning_rate 1e-4", "--checkpointing full"])
def test_what_says_the_same_twice_is_accepted(options):
    parse(f"{options} --gradient_checkpointing")


@pytest.mark.parametrize(
    "options, message",
    [
        ("--learning_rate nan", "--learning_rate has to be a finite number but is nan"),
        ("--max_grad_norm 0", "--max_grad_norm has to be above 0"),
        ("--adam_beta2 1", "--adam_beta2 has to be below 1 but is 1.0"),
        ("--max_grad_norm -1", "--max_grad_norm has to be at least 0 but is -1.0"),
        ("--seed -1", "--seed has to be at least 0 but is -1"),
        (
            "--weighting_scheme mode --mode_scale 8",
            "--mode_scale has to be within [0, 2 / (pi - 2) = 1.75] but is 8.0",
        ),
        (f"--seed {2**32}", "--seed has to be below 2 ** 32"),
        ("--width 0", "--width has to be a positive multiple of 16 but is 0"),
        ("--lora_alpha 0", "--lora_alpha has to be at least 1 but is 0"),
        ("--lr_scheduler piecewise_constant", "argument --lr_scheduler: invalid choice"),
        (
            "--train_data_dir . --output_dir ./out/x --validation_steps 1",
            "--output_dir ./out/x cannot lie in --train_data_dir .",
        ),
        (
            "--visible_column a --target_column b --semantic_column b",
            "--target_column b is what is to be painted and cannot be shown as well",
        ),
        ("--max_sequence_length long", "argument --max_sequence_length"),
    ],
)
def test_values_that_cannot_be_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def numbers() -> st.SearchStrategy[str]:
    return st.one_of(
        st.integers(-2, 2**33).map(str),
        st.floats().map(str),
        st.sampled_from(["", "none", "auto", "1e999", "0x10", "latest"]),
    )


def some_options() -> st.SearchStrategy[list[str]]:
    """Any of the parser's options, with any value."""
    found = []

    def keep(parser, args=None, namespace=None):
        found.append(parser)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        trainer.parse_args([])
    option = []
    for action in found[0]._actions:
        # The help ends the process with success.
        if not action.option_strings or action.dest == "help":
            continue
        names = st.sampled_from(action.option_strings)
        if action.nargs == 0:
            option.append(names.map(lambda name: [name]))
        elif action.choices is not None:
            values = st.sampled_from([*map(str, action.choices), "other"])
            option.append(st.tuples(names, values).map(lambda pair: [f"{pair[0]}={pair[1]}"]))
        else:
            option.append(st.tuples(names, numbers()).map(lambda pair: [f"{pair[0]}={pair[1]}"]))
    return st.lists(st.one_of(option), max_size=6).map(lambda parts: sum(parts, []))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(options=some_options())
def test_any_command_line_is_taken_or_refused_with_a_sentence(options):
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser, "_print_message", lambda self, message, file=None: errors.append(message)
        )
        try:
            args = trainer.parse_args([*REQUIRED.split(), *options])
        except SystemExit as stop:
            assert stop.code == 2 and "error: " in errors[-1] and "--" in errors[-1].split("error: ")[1]
        else:
            assert args.width % 16 == 0 and args.lora_alpha >= 1 and args.semantic_learning_rate is not None
