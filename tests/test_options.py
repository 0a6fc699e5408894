# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Options: their values, defaults and rules, on the command line, in a YAML file, and as the objects that functions get."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_semantic_fill_lora as trainer
from semantic_fill.command_line import build_parser, parse_options
from semantic_fill.option_fields import OptionGroup, option
from semantic_fill.options import DataOptions, Options


REQUIRED = {"pretrained_model_name_or_path": "unused", "train_data_dir": "unused"}
FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def parse(options: str) -> Options:
    """The options of a command line, which may name another source than the required ones do."""
    source = [] if "--dataset_name" in options else ["--train_data_dir", "unused"]
    return trainer.parse_args(["--pretrained_model_name_or_path", "unused", *source, *options.split()])


def refusal(capsys, arguments: list[str]) -> str:
    """The message with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        trainer.parse_args(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.split("error: ")[1]


# -- Fields -----------------------------------------------------------------------------------------------------------


def test_every_option_has_a_help_text_in_its_group():
    text = " ".join(build_parser(Options, "About.").format_help().split())
    assert len(FIELDS) > 80
    for name, field in FIELDS.items():
        words = field.metadata["help"]
        assert len(words) > 10 and words[0].isupper() or words.startswith(("`", "tensorboard")), name
        assert words.endswith((".", ")")) and f"--{name}" in text and " ".join(words.split()) in text, name
    groups = [group.__doc__ for group in Options.__bases__]
    assert len(groups) == 8
    assert [text.index(f" {title}: --") for title in groups] == sorted(text.index(f" {title}: --") for title in groups)


def test_help_tells_every_default_once():
    text = " ".join(build_parser(Options, None).format_help().split())
    assert "Rank of the LoRA. Default: 16. " in text and "or webdataset files. --dataset_config_name" in text
    assert "or a Hub repository. Required." in text and "PEFT's own layers. Default: yes." in text
    assert "from zero. Default: 0. " in text
    for action in build_parser(Options, None)._actions:
        assert (action.help or "").count("Default:") <= 1, action.dest


def test_the_error_of_a_wrong_command_line_stands_below_few_lines(capsys):
    with pytest.raises(SystemExit):
        trainer.parse_args(["--rank", "0"])
    assert len(capsys.readouterr().err.splitlines()) < 4


def test_a_parsed_command_line_equals_the_object_with_the_same_values():
    parsed = parse("--rank 8 --no-fused_lora --compile --timestep_shift 3 --max_sequence_length auto")
    values = {"rank": 8, "fused_lora": False, "compile": True, "timestep_shift": 3.0, "max_sequence_length": "auto"}
    assert parsed == Options(**REQUIRED, **values)
    assert type(parsed.timestep_shift) is float and parse("--max_sequence_length 8").max_sequence_length == 8


def test_options_never_change():
    options = Options(**REQUIRED)
    for name in FIELDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, name, getattr(options, name))
    longer = dataclasses.replace(options, max_train_steps=7)
    assert (longer.max_train_steps, options.max_train_steps) == (7, None)
    # A new object is checked like the first.
    with pytest.raises(ValueError, match="--rank has to be at least 1 but is 0"):
        dataclasses.replace(options, rank=0)


def test_a_group_can_stand_alone():
    data = DataOptions(train_data_dir="data", resolution=64)
    assert data.width == 64 and not hasattr(data, "rank")
    assert {name for group in Options.__bases__ for name in vars(group).get("__annotations__", {})} == set(FIELDS)


@pytest.mark.parametrize(
    "passed, expected",
    [
        ("", {"width": 512, "lora_alpha": 16, "max_sequence_length": 512, "semantic_position": "rope"}),
        ("", {"semantic_learning_rate": 1e-4, "semantic_scale_learning_rate": pytest.approx(1e-3)}),
        ("", {"base_precision": "bf16", "checkpointing": "none", "compile": False, "attention_backend": "native"}),
        ("--resolution 256 --rank 8 --output_dir o", {"width": 256, "lora_alpha": 8, "cache_root": "o/cache"}),
        ("--resolution 256 --width 64 --rank 8 --lora_alpha 4", {"width": 64, "lora_alpha": 4}),
        ("--learning_rate 0.5", {"semantic_learning_rate": 0.5, "semantic_scale_learning_rate": 5.0}),
        ("--semantic_learning_rate 0.5", {"learning_rate": 1e-4, "semantic_scale_learning_rate": 5.0}),
        ("--semantic_scale_learning_rate 0.5", {"semantic_learning_rate": 1e-4, "semantic_scale_learning_rate": 0.5}),
        ("--optimizer prodigy", {"learning_rate": 1, "semantic_learning_rate": 1, "semantic_scale_learning_rate": 1}),
        ("--optimizer prodigy --learning_rate 2", {"semantic_learning_rate": 2, "semantic_scale_learning_rate": 2}),
        ("--gradient_checkpointing", {"checkpointing": "full"}),
        ("--gradient_checkpointing --checkpointing offload", {"checkpointing": "offload"}),
        ("--fast", {"base_precision": None, "checkpointing": None, "compile": None, "attention_backend": None}),
        ("--fast --no-compile --gradient_checkpointing", {"compile": False, "checkpointing": "full"}),
        ("--fast", {"max_sequence_length": "auto"}),
        ("--fast --max_sequence_length 77", {"max_sequence_length": 77}),
    ],
)
def test_defaults_that_follow_from_other_options(passed, expected):
    options = parse(passed)
    assert {name: getattr(options, name) for name in expected} == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ("--learning_rate nan", "--learning_rate has to be a finite number but is nan"),
        ("--learning_rate inf", "--learning_rate has to be a finite number but is inf"),
        ("--learning_rate fast", "argument --learning_rate: invalid float value: 'fast'"),
        ("--learning_rate -1", "--learning_rate has to be at least 0 but is -1.0"),
        ("--max_grad_norm 0", "--max_grad_norm has to be above 0 but is 0.0"),
        ("--max_grad_norm -1", "--max_grad_norm has to be at least 0 but is -1.0"),
        ("--adam_beta2 1", "--adam_beta2 has to be below 1 but is 1.0"),
        ("--caption_dropout 2", "--caption_dropout has to be at most 1 but is 2.0"),
        # Nothing of the LoRA, or of the module, would ever be trained.
        ("--lora_dropout 1", "--lora_dropout has to be below 1 but is 1.0"),
        ("--semantic_dropout 1", "--semantic_dropout has to be below 1 but is 1.0"),
        ("--weighting_scheme mode --mode_scale 8", "--mode_scale has to be at most 1.75194 but is 8.0"),
        ("--seed -1", "--seed has to be at least 0 but is -1"),
        (f"--seed {2**32}", f"--seed has to be below 4.29497e+09 but is {2**32}"),
        ("--rank 0", "--rank has to be at least 1 but is 0"),
        ("--rank 1.5", "argument --rank: invalid int value: '1.5'"),
        ("--lora_alpha 0", "--lora_alpha has to be at least 1 but is 0"),
        ("--width 0", "--width has to be a positive multiple of 16 but is 0"),
        ("--resolution 100", "--resolution has to be a positive multiple of 16 but is 100"),
        ("--timestep_shift fast", "argument --timestep_shift: invalid resolution or none or float value: 'fast'"),
        ("--timestep_shift nan", "--timestep_shift has to be a finite number but is nan"),
        ("--timestep_shift 0", "--timestep_shift has to be above 0 but is 0.0"),
        ("--max_sequence_length 513", "--max_sequence_length has to be at most 512 but is 513"),
        ("--max_sequence_length long", "argument --max_sequence_length: invalid auto or int value: 'long'"),
        ("--lr_scheduler piecewise_constant", "argument --lr_scheduler: invalid choice: 'piecewise_constant'"),
        ("--semantic_position aligned", "argument --semantic_position: invalid choice: 'aligned'"),
        ("--semantic_injection condition", "unknown options: --semantic_injection"),
        ("--report_to tensorbord", "argument --report_to: invalid choice: 'tensorbord'"),
        ("--ran 4", "unknown options: --ran"),
        ("--max-train-steps 4", "unknown options: --max-train-steps. Did you mean --max_train_steps?"),
        ("--max_train_step=4", "unknown options: --max_train_step. Did you mean --max_train_steps?"),
        ("--fast true", "unknown options: values that belong to none. A switch such as --push_to_hub takes no value"),
    ],
)
def test_values_that_cannot_be_are_refused(options, message, capsys):
    arguments = [f"--{name}={value}" for name, value in REQUIRED.items()]
    assert refusal(capsys, [*arguments, *options.split()]).startswith(message)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rank": 0}, "--rank has to be at least 1 but is 0"),
        ({"learning_rate": float("nan")}, "--learning_rate has to be a finite number"),
        ({"semantic_mode": "aligned"}, "--semantic_mode has to be one of cross_attention, projection, .* 'aligned'"),
        ({"resolution": 24}, "--resolution has to be a positive multiple of 16"),
    ],
)
def test_an_object_is_checked_like_a_command_line(values, message):
    with pytest.raises(ValueError, match=message):
        Options(**REQUIRED, **values)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--train_data_dir", "d"], "these options are required: --pretrained_model_name_or_path."),
        (["--pretrained_model_name_or_path", "m"], "Pass exactly one of --dataset_name and --train_data_dir."),
    ],
)
def test_what_is_required(arguments, message, capsys):
    assert refusal(capsys, arguments) == f"{message}\n"


# -- Rules ------------------------------------------------------------------------------------------------------------

# For each rule: what is refused, the start of the message, and the same with one part left out or changed.
RULES = [
    ("--dataset_name n --train_data_dir d", "Pass exactly one of --dataset_name and --train_data_dir", ""),
    (
        "--visible_column v --semantic_column s",
        "--visible_column, --target_column and --semantic_column have to be passed together",
        "--visible_column v --semantic_column s --target_column t",
    ),
    (
        "--visible_column a --target_column b --semantic_column b",
        "--target_column b is what is painted, so no other view can show it",
        "--visible_column a --target_column b --semantic_column a",
    ),
    (
        "--resume_from_checkpoint latest --lora_weights w",
        "--lora_weights and --semantic_weights cannot go with --resume_from_checkpoint",
        "--lora_weights w",
    ),
    (
        "--resume_from_checkpoint latest --semantic_weights w",
        "--lora_weights and --semantic_weights cannot go with --resume_from_checkpoint",
        "--resume_from_checkpoint latest",
    ),
    (
        "--semantic_position rope --semantic_head_dim 6",
        "--semantic_head_dim has to be a multiple of 4 with --semantic_position rope",
        "--semantic_position none --semantic_head_dim 6",
    ),
    (
        "--optimizer prodigy --semantic_learning_rate 0.1",
        "--optimizer prodigy takes one learning rate for all weights but got [0.1, 1.0]",
        "--optimizer prodigy --semantic_learning_rate 0.1 --learning_rate 0.1",
    ),
    (
        "--optimizer prodigy --semantic_scale_learning_rate 0.2",
        "--optimizer prodigy takes one learning rate for all weights but got [0.2, 1.0]",
        "--semantic_scale_learning_rate 0.2",
    ),
    (
        "--lr_scheduler linear --max_train_steps 5 --lr_warmup_steps 5",
        "--lr_warmup_steps 5 has to be below the 5 steps of the run",
        "--lr_scheduler linear --max_train_steps 6 --lr_warmup_steps 5",
    ),
    (
        "--validation_data_dir v --validation_fraction 0.1",
        "--validation_data_dir and --validation_fraction cannot go together",
        "--validation_data_dir v --validation_fraction 0",
    ),
    (
        "--keep_best --validation_fraction 0.1",
        "--keep_best needs --validation_steps, and --validation_data_dir or --validation_fraction",
        "--keep_best --validation_fraction 0.1 --validation_steps 5",
    ),
    (
        "--early_stopping_patience 2 --validation_steps 5",
        "--early_stopping_patience needs --validation_steps, and --validation_data_dir or --validation_fraction",
        "--early_stopping_patience 2 --validation_steps 5 --validation_data_dir v",
    ),
    (
        "--train_data_dir . --output_dir ./out/x",
        "--output_dir out/x cannot lie in --train_data_dir .",
        "--train_data_dir configs --output_dir ./out/x",
    ),
]


@pytest.mark.parametrize("options, message, accepted", RULES, ids=[message for _, message, _ in RULES])
def test_every_rule_takes_two(options, message, accepted, capsys):
    required = [f"--{name}={value}" for name, value in REQUIRED.items()]
    assert refusal(capsys, [*required, *options.split()]).startswith(message)
    parse(accepted)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["train_data_dir", "validation_data_dir"])
def test_no_folder_of_pictures_may_hold_the_output(tmp_path, name, listed):
    """A list of its pictures does not help: a picture that it does not name is a problem."""
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "link").symlink_to(data)
    if listed:
        (data / "metadata.jsonl").touch()
    for inside in (data, data / "a" / "b", tmp_path / "link" / "out"):
        with pytest.raises(ValueError, match=f"--output_dir .* cannot lie in --{name}"):
            Options(**REQUIRED | {name: str(data), "output_dir": str(inside)})
    Options(**REQUIRED | {name: str(data), "output_dir": str(tmp_path / "data-out")})


@pytest.mark.parametrize(
    "options",
    [
        "--semantic_mode none --semantic_dropout 0.1 --fusion_alpha 0.1 --semantic_num_heads 2",
        "--max_train_steps 8 --num_train_epochs 3",
        "--hub_strategy every_checkpoint --hub_private_repo --num_validation_images 1",
        "--no-cache_latents --cache_root c --lr_power 2 --logit_mean 1 --weighting_scheme none",
    ],
)
def test_an_option_without_effect_is_no_error(options):
    parse(options)


# -- YAML -------------------------------------------------------------------------------------------------------------


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


BASE_YAML = "pretrained_model_name_or_path: unused\ntrain_data_dir: unused\n"


@pytest.mark.parametrize("form", ["{}", "--config {}", "--config={}"])
def test_a_yaml_file_stands_for_options(tmp_path, form):
    text = BASE_YAML + "max_train_steps: 20\nrank: 8\nrandom_flip: true\nfused_lora: false\nrevision:\ncompile: null\n"
    words = form.format(write_yaml(tmp_path, text)).split()
    expected = parse("--max_train_steps 20 --rank 8 --random_flip --no-fused_lora")
    assert trainer.parse_args(words) == expected
    # The command line takes precedence, before and after the file's name.
    more = ["--max_train_steps", "50", "--no-random_flip"]
    expected = dataclasses.replace(expected, max_train_steps=50, random_flip=False)
    assert trainer.parse_args([*words, *more]) == trainer.parse_args([*more, *words]) == expected


def test_values_in_yaml_mean_what_they_mean_on_the_command_line(tmp_path):
    # YAML itself reads the first as false, the second as text, the others as 8, 10, false, a date and a number.
    text = "mixed_precision: no\nlearning_rate: 1e-4\nrank: 010\nseed: 1_0\ninstance_prompt: off\n"
    text += "revision: 2026-11-26\nhub_model_id: 1.50\noutput_dir: 'a b'\nlora_layers: -x=y\n"
    options = trainer.parse_args([write_yaml(tmp_path, BASE_YAML + text)])
    assert (options.mixed_precision, options.learning_rate, options.rank, options.seed) == ("no", 1e-4, 10, 10)
    assert (options.instance_prompt, options.revision, options.hub_model_id) == ("off", "2026-11-26", "1.50")
    assert (options.output_dir, options.lora_layers) == ("a b", "-x=y")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lists(OptionGroup):
    """Lists"""

    names: tuple[str, ...] = option(("a",), help="Names.")
    sizes: tuple[int, ...] | None = option(None, help="Sizes.")


def test_lists_in_yaml_mean_what_they_mean_on_the_command_line(tmp_path):
    path = write_yaml(tmp_path, "names: [no, 1e-4]\nsizes:\n  - 3\n  - 4\n")
    from_file = parse_options(Lists, None, [path])
    assert from_file == parse_options(Lists, None, ["--names", "no", "1e-4", "--sizes", "3", "4"])
    assert (list(from_file.names), list(from_file.sizes)) == (["no", "1e-4"], [3, 4])
    assert list(parse_options(Lists, None, [path, "--sizes", "5"]).sizes) == [5]
    with pytest.raises(SystemExit):
        parse_options(Lists, None, [write_yaml(tmp_path, "sizes: [3, x]")])


@pytest.mark.parametrize(
    "text, message",
    [
        ("ranks: 8", "unknown options in {path}: --ranks"),
        ("rank: many", "argument --rank: invalid int value: 'many'"),
        ("rank: 0", "--rank has to be at least 1 but is 0"),
        ("rank: 8.0", "argument --rank: invalid int value: '8.0'"),
        ("rank: [8, 9]", "unknown options in {path}: values that belong to none"),
        ("rank: {a: 8}", "rank in {path} has to be a single value or a list"),
        ("rank: [[8]]", "rank in {path} has to be a single value or a list"),
        ("semantic_mode: other", "argument --semantic_mode: invalid choice: 'other'"),
        ("random_flip: yes", "random_flip in {path} has to be true or false"),
        ("random_flip: 1", "random_flip in {path} has to be true or false"),
        ("random_flip: [true]", "random_flip in {path} has to be true or false"),
        ("optimizer: prodigy\nsemantic_learning_rate: 2", "--optimizer prodigy takes one learning rate"),
        ("config: other.yaml", "{path} cannot name another file with `config`"),
        ("- rank", "--config {path} has to hold a mapping of option names to values"),
        ("rank", "--config {path} has to hold a mapping of option names to values"),
        ("rank: [", "--config {path} cannot be read: while parsing"),
        ("rank: !!python/object/apply:os.mkdir [made]", "argument --rank: invalid int value: 'made'"),
    ],
)
def test_wrong_yaml_is_refused_with_a_sentence(tmp_path, text, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_yaml(tmp_path, text)
    required = [f"--{name}={value}" for name, value in REQUIRED.items()]
    assert refusal(capsys, [path, *required]).startswith(message.replace("{path}", path))
    assert not Path("made").exists()


def test_a_yaml_file_that_is_missing_or_no_text(tmp_path, capsys):
    missing = str(tmp_path / "missing.yaml")
    assert refusal(capsys, [missing]).startswith(f"--config {missing} cannot be read: ")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "bytes.yaml cannot be read: " in refusal(capsys, ["--config", str(tmp_path / "bytes.yaml")])
    assert "Pass one YAML file" in refusal(capsys, [missing, "--config", missing])
    assert trainer.parse_args([write_yaml(tmp_path, ""), *(f"--{k}={v}" for k, v in REQUIRED.items())]) == parse("")


# -- Values that are not printed --------------------------------------------------------------------------------------

SECRET = "hf_planted_secret"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--hub_token", SECRET], "unknown options: --hub_token. Tokens are not taken here: use `hf auth login` or"),
        ([f"--token={SECRET}"], "unknown options: --token. Tokens are not taken here"),
        (["--hub_key", SECRET, "--rank", "0"], "unknown options: --hub_key."),
        (["--push_to_hub", SECRET], "unknown options: values that belong to none."),
        ([SECRET, "a.yaml"], "unknown options: values that belong to none."),
        (["-t", SECRET], "unknown options: values that belong to none."),
    ],
)
def test_the_value_of_an_unknown_option_is_not_printed(words, message, capsys):
    required = [f"--{name}={value}" for name, value in REQUIRED.items()]
    for arguments in ([*required, *words], [*words, *required]):
        with pytest.raises(SystemExit):
            trainer.parse_args(arguments)
        printed = "".join(capsys.readouterr())
        assert SECRET not in printed and f"error: {message}" in printed


def test_the_value_of_an_unknown_option_in_yaml_is_not_printed(tmp_path, capsys):
    for text in (f"hub_token: {SECRET}", f"hub_token: [{SECRET}]"):
        path = write_yaml(tmp_path, text)
        assert refusal(capsys, [path]).startswith(f"unknown options in {path}: --hub_token. Tokens are not")
    assert SECRET not in refusal(capsys, [write_yaml(tmp_path, f"hub_token: {{a: {SECRET}}}")])


# -- Any command line -------------------------------------------------------------------------------------------------


def numbers() -> st.SearchStrategy[str]:
    return st.one_of(
        st.integers(-2, 2**33).map(str),
        st.floats().map(str),
        st.sampled_from(["", "none", "auto", "1e999", "0x10", "latest"]),
    )


def some_options() -> st.SearchStrategy[list[tuple[str, str]]]:
    """Any of the options, with any value; for switches it is `true` or `false`."""
    pairs = []
    for action in build_parser(Options, None)._actions:
        # Help ends the process with success, and a configuration is a file.
        if action.dest in ("help", "config", "config_file"):
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            values = st.sampled_from(["true", "false"])
        elif action.choices is not None:
            values = st.sampled_from([*action.choices, "other"])
        else:
            values = numbers()
        pairs.append(st.tuples(st.just(action.dest), values))
    return st.lists(st.one_of(pairs), max_size=6, unique_by=lambda pair: pair[0])


def parse_or_refuse(arguments: list[str]) -> Options | None:
    """The options, or `None` for a refusal with a sentence about one of them."""
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser, "_print_message", lambda self, message, file=None: errors.append(message)
        )
        try:
            return trainer.parse_args(arguments)
        except SystemExit as stop:
            assert stop.code == 2 and "error: " in errors[-1] and "--" in errors[-1].split("error: ")[1]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(pairs=some_options())
def test_any_command_line_is_taken_or_refused_with_a_sentence(pairs, tmp_path_factory):
    switches = {"true": "--{}", "false": "--no-{}"}
    words = [switches[v].format(n) if v in switches else f"--{n}={v}" for n, v in pairs]
    required = [f"--{name}={value}" for name, value in REQUIRED.items() if name not in dict(pairs)]
    options = parse_or_refuse([*required, *words])
    if options is not None:
        assert options.width % 16 == 0 and options.lora_alpha >= 1 and options.semantic_learning_rate is not None
    # The same in a file, quoted where it is text.
    lines = [f"{name}: {value if value in switches else json.dumps(value)}" for name, value in pairs]
    path = write_yaml(tmp_path_factory.getbasetemp(), "\n".join(lines))
    assert parse_or_refuse([path, *required]) == options
