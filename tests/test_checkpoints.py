# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: a continued run equals an undisturbed one, what a checkpoint fits, which are kept, and older ones."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from helpers import (
    LORA_FILE,
    MODULE_FILE,
    arguments,
    assert_same_weights,
    intact_checkpoints,
    run,
    weights_of,
)

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_attention import file_hash
from semantic_fill import checkpoints
from semantic_fill.checkpoints import checkpoint_damage, claim_output_dir, find_checkpoint
from semantic_fill.files import list_files, write_atomically
from semantic_fill.training_state import check_optimizer_state, join_tensors, read_state, split_tensors


MODULES = {
    "none": ["--semantic_position", "none"],
    "rope": ["--semantic_position", "rope"],
    "projection": ["--semantic_mode", "projection"],
}
# Everything that is drawn at random, and a schedule that depends on the step.
RANDOM = "--lora_dropout 0.1 --random_flip --caption_dropout 0.3 --semantic_dropout 0.3 --lr_scheduler linear".split()
RESUME = ["--resume_from_checkpoint", "latest"]


# -- Continuing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODULES)
def test_resume_is_bit_identical(base_folder, triptych_folder, tmp_path, kind):
    # 4 steps of 2 samples end in the middle of the second epoch of 6.
    options = [*MODULES[kind], *RANDOM, "--checkpointing_steps", 4, "--max_train_steps", 8]
    expected = run(base_folder, tmp_path / "expected", *options, data=triptych_folder)
    moved = {**weights_of(expected), **weights_of(expected, MODULE_FILE)}
    assert all(weight.abs().max() > 0 for name, weight in moved.items() if "lora_B" in name or "scale" in name)
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(expected / "checkpoint-4", out / "checkpoint-4")
    assert_same_weights(expected, run(base_folder, out, *options, *RESUME, data=triptych_folder))
    # The states of optimizer and schedule, and how far the run is, are the same too.
    for name in ("training_state.json", "training_state.safetensors", "options.json"):
        first, second = (folder / "checkpoint-8" / name for folder in (expected, out))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_longer_run_goes_on_from_the_end_of_a_run(base_folder, triptych_folder, tmp_path):
    # A run ends with a checkpoint, although none is due.
    more = ["--checkpointing_steps", 3, "--max_train_steps"]
    expected = run(base_folder, tmp_path / "expected", *more, 4, data=triptych_folder)
    out = run(base_folder, tmp_path / "out", *more, 2, data=triptych_folder)
    assert intact_checkpoints(out) == [2]
    assert_same_weights(expected, run(base_folder, out, *more, 4, *RESUME, data=triptych_folder))
    # There is nothing left to train, and the result is saved once more.
    (out / LORA_FILE).unlink()
    assert_same_weights(expected, run(base_folder, out, *more, 4, *RESUME, data=triptych_folder))


@pytest.mark.parametrize("batch_sizes, steps", [((1, 6), (6, 6 + 2)), ((4, 1), (2, 2 + 10)), ((2, 2), (3, 9))])
def test_epochs_count_samples_that_came_in_other_batches(base_folder, triptych_folder, tmp_path, batch_sizes, steps):
    # 6 samples come once, and then twice more. More processes or fewer would do the same as other batches.
    for batch_size, epochs, last in zip(batch_sizes, (1, 3), steps):
        more = ["--num_train_epochs", epochs, "--train_batch_size", batch_size, *(RESUME if epochs > 1 else ())]
        out = run(base_folder, tmp_path, *more, data=triptych_folder)
        assert intact_checkpoints(out)[-1] == last


def test_prodigy_resumes(base_folder, triptych_folder, tmp_path):
    options = "--optimizer prodigy --learning_rate 1.0 --checkpointing_steps 2 --max_train_steps".split()
    expected = run(base_folder, tmp_path / "expected", *options, 4, data=triptych_folder)
    out = run(base_folder, tmp_path / "out", *options, 2, data=triptych_folder)
    run(base_folder, out, *options, 4, *RESUME, data=triptych_folder)
    assert_same_weights(expected, out)
    with pytest.raises(AssertionError):
        assert_same_weights(expected, expected / "checkpoint-2")


def test_a_resumed_run_has_its_own_rates(base_folder, triptych_folder, tmp_path, monkeypatch):
    out, more = tmp_path / "out", ["--checkpointing_steps", 2, "--lr_scheduler", "linear"]
    run(base_folder, out, "--max_train_steps", 2, *more, data=triptych_folder)
    seen, train = [], trainer.train

    def look(assembled):
        groups = assembled.optimizer.param_groups
        seen.append([(group["lr"], group["weight_decay"], group["name"]) for group in groups])
        assert assembled.lr_scheduler.last_epoch == 2 and assembled.optimizer.state_dict()["state"][0]["step"] == 2
        assert (assembled.state.step, assembled.state.samples_seen) == (2, 4)
        return train(assembled)

    monkeypatch.setattr(trainer, "train", look)
    more += [*RESUME, "--learning_rate", 1e-5, "--adam_weight_decay", 0.5]
    run(base_folder, out, "--max_train_steps", 4, *more, data=triptych_folder)
    # They are half of the longer run's way down.
    rates = [
        (pytest.approx(rate / 2), 0.5, name) for rate, name in ((1e-5, "lora"), (1e-5, "module"), (1e-4, "scale"))
    ]
    assert seen == [rates]
    assert intact_checkpoints(out) == [2, 4]


def test_states_survive_the_way_through_a_file():
    tensors, tree = {}, {"a": [torch.arange(3), (1, 2.5, None)], 0: {"b": torch.ones(()).bfloat16(), "c": "text"}}
    described = json.loads(json.dumps(split_tensors(tree, "state", tensors)))
    joined = join_tensors(described, tensors)
    assert torch.equal(joined["a"][0], tree["a"][0]) and joined["a"][1] == [1, 2.5, None]
    assert joined[0]["b"].dtype == torch.bfloat16 and joined[0]["c"] == "text" and list(joined) == ["a", 0]
    tree["a"][0].add_(1)
    assert torch.equal(joined["a"][0], torch.arange(3))


# -- Damage and limits ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_step(base_folder, triptych_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one_step") / "out"
    return run(base_folder, out, "--max_train_steps", 1, "--checkpointing_steps", 1, data=triptych_folder)


def test_damaged_checkpoint_is_skipped(base_folder, triptych_folder, tmp_path, caplog):
    options = [*RANDOM, "--checkpointing_steps", 2, "--max_train_steps", 6]
    expected = run(base_folder, tmp_path / "expected", *options, data=triptych_folder)
    out = tmp_path / "out"
    out.mkdir()
    for step in (2, 4):
        shutil.copytree(expected / f"checkpoint-{step}", out / f"checkpoint-{step}")
    damaged = out / "checkpoint-4" / LORA_FILE
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    # What a run that was killed while writing leaves behind is no checkpoint.
    (out / ".checkpoint-6.part").mkdir()
    (out / "checkpoint-9").mkdir()
    with pytest.raises(ValueError, match="checkpoint-4 is no intact checkpoint: .* is not what was written"):
        run(base_folder, out, *options, "--resume_from_checkpoint", "checkpoint-4", data=triptych_folder)
    resumed = run(base_folder, out, *options, *RESUME, data=triptych_folder)
    assert "damaged checkpoint " in caplog.text and "checkpoint-4: " in caplog.text and "checkpoint-9" in caplog.text
    assert_same_weights(expected, resumed)


@pytest.mark.parametrize("content", ["", "{", "[]", "1", "{}", '{"pytorch_lora_weights.safetensors": 3}'])
def test_a_damaged_manifest_is_no_checkpoint(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert checkpoint_damage(tmp_path) is not None


def test_every_file_of_a_checkpoint_is_watched(one_step, tmp_path):
    source = one_step / "checkpoint-1"
    assert checkpoint_damage(source) is None
    names = [path.relative_to(source) for path in list_files(source)]
    assert len(names) == 7
    for number, name in enumerate(names):
        for change in ("bit", "gone", "longer"):
            folder = tmp_path / f"{number}{change}"
            shutil.copytree(source, folder)
            content = bytearray((folder / name).read_bytes())
            content[len(content) // 2] ^= 1
            if change == "gone":
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(content if change == "bit" else (folder / name).read_bytes() + b"\0")
            assert checkpoint_damage(folder) is not None, (name, change)


def as_downloaded(folder: Path, name: str, content: bytes) -> None:
    """Changes a file of a checkpoint, and the manifest with it, as anyone can who publishes one."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / name).write_bytes(content)
    manifest[name] = [len(content), file_hash(folder / name)]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name, change",
    [
        ("step", -3),
        ("step", "1"),
        ("step", 2**60),
        ("samples_seen", None),
        ("loss", "low"),
        ("optimizer", []),
        ("optimizer", {"__dict__": [["state", 3]]}),
        ("lr_scheduler", None),
        ("lr_scheduler", {"__dict__": [["last_epoch", -1], ["_step_count", 1]]}),
        ("scaler", {"__dict__": [["scale", "NaN"]]}),
        ("more", {"__tensor__": "missing"}),
        ("more", {"__dict__": {"a": 1}}),
        ("more", {"__dict__": [[[], 1]]}),
    ],
)
def test_a_training_state_of_another_shape_is_damage(one_step, tmp_path, name, change):
    folder = shutil.copytree(one_step / "checkpoint-1", tmp_path / "checkpoint-1")
    state = dict(json.loads((folder / "training_state.json").read_text())["__dict__"]) | {name: change}
    as_downloaded(folder, "training_state.json", json.dumps({"__dict__": list(state.items())}).encode())
    assert "training_state.json cannot be used: " in checkpoint_damage(folder)


@pytest.mark.parametrize("content", ["[]", '{"semantic_mode": ["none"]}', '{"semantic_mode": 1}', "{", "[" * 100_000])
@pytest.mark.parametrize("name", ["options.json", "training_state.json"])
def test_json_of_another_shape_is_damage(one_step, tmp_path, name, content):
    folder = shutil.copytree(one_step / "checkpoint-1", tmp_path / "checkpoint-1")
    as_downloaded(folder, name, content.encode())
    assert str(folder / name) in checkpoint_damage(folder)


def test_a_checkpoint_without_its_module_is_damage(one_step, tmp_path):
    folder = shutil.copytree(one_step / "checkpoint-1", tmp_path / "checkpoint-1")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[MODULE_FILE]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint_damage(folder) == f"manifest.json does not name {MODULE_FILE}"


def test_a_checkpoint_changes_no_setting_of_the_optimizer(one_step):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    check_optimizer_state(state, optimizer, one_step)
    first = state["state"][0]
    for wrong in (
        {"param_groups": []},
        {"param_groups": [state["param_groups"][0] | {"params": [0]}]},
        {"param_groups": None},
        {"state": {7: first}},
        {"state": {0: first | {"exp_avg": torch.ones(3, 3)}}},
        {"state": {0: {"step": first["step"]}}},
        {"state": {0: []}},
    ):
        with pytest.raises(ValueError, match="holds the state of another optimizer"):
            check_optimizer_state(state | wrong, optimizer, one_step)


def test_checkpoint_limit_holds_after_resume(base_folder, triptych_folder, tmp_path):
    more = ["--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    out = run(base_folder, tmp_path / "out", "--max_train_steps", 3, *more, data=triptych_folder)
    assert intact_checkpoints(out) == [2, 3]
    run(base_folder, out, "--max_train_steps", 5, *more, *RESUME, data=triptych_folder)
    assert intact_checkpoints(out) == [4, 5]


def test_the_limit_never_removes_the_checkpoint_just_written(base_folder, triptych_folder, tmp_path):
    out, more = tmp_path / "out", ["--checkpointing_steps", 2]
    run(base_folder, out, "--max_train_steps", 6, *more, data=triptych_folder)
    for number in (4, 6):
        (out / f"checkpoint-{number}" / "training_state.json").write_text("{")
    more += ["--checkpoints_total_limit", 1, *RESUME]
    run(base_folder, out, "--max_train_steps", 4, *more, data=triptych_folder)
    assert intact_checkpoints(out) == [4]


def test_a_whole_checkpoint_stands_at_every_moment(one_step, tmp_path, monkeypatch):
    """With room for a single checkpoint, the next is on the disk, whole, before anything of the last one goes."""
    out = tmp_path / "out"
    shutil.copytree(one_step, out)
    options = arguments("unused", out, "--checkpoints_total_limit", 1, data="unused")
    flushed, moments = set(), []

    def save_weights(model, weights, folder, options):
        shutil.copytree(one_step / "checkpoint-1", folder)
        for name in ("manifest.json", "options.json", "training_state.json", "training_state.safetensors"):
            (folder / name).unlink()

    def look(function):
        def call(*args, **kwargs):
            moments.append(intact_checkpoints(out))
            result = function(*args, **kwargs)
            moments.append(intact_checkpoints(out))
            return result

        return call

    def replace(old, new, real=os.replace):
        if Path(new).name == "checkpoint-2":
            # The names in its folders are flushed too.
            assert {path for path in (old, *Path(old).rglob("*"))} == flushed
        real(old, new)

    def fsync(number, real=os.fsync):
        flushed.add(Path(os.readlink(f"/proc/self/fd/{number}")))
        real(number)

    PartialState()
    monkeypatch.setattr(checkpoints, "save_weights", save_weights)
    fixed = json.loads((one_step / "checkpoint-1" / "options.json").read_text())
    monkeypatch.setattr(checkpoints, "fixed_options", lambda *args: fixed)
    monkeypatch.setattr(os, "replace", look(replace))
    monkeypatch.setattr(os, "fsync", look(fsync))
    monkeypatch.setattr(shutil, "rmtree", look(shutil.rmtree))
    state, _ = read_state(one_step / "checkpoint-1", tensors=True)
    state |= {"step": 2, "samples_seen": 4}
    assert checkpoints.save_checkpoint(None, {}, state, options) == out / "checkpoint-2"
    assert out in flushed
    assert [1] in moments and moments[-1] == [2] and [] not in moments and [1, 2] in moments


def test_a_run_killed_between_two_renames_lost_nothing(one_step, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(one_step, out)
    os.replace(out / "checkpoint-1", out / ".checkpoint-1.old")
    for leftover in (".checkpoint-3.part", ".checkpoint-2.gone", ".result.part"):
        shutil.copytree(one_step / "checkpoint-1", out / leftover)
    (out / "samples").mkdir(exist_ok=True)
    for written in ("README.md", "validation.jsonl", "samples/index.html"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            # Nothing tidies up, as after a kill.
            patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
            write_atomically(out / written, lambda path: path.write_bytes(b"half"))
    (out / ".kept").touch()
    claim_output_dir(arguments("unused", out, *RESUME, data="unused")).release()
    assert intact_checkpoints(out) == [1]
    assert {path.name for path in out.rglob(".*")} <= {".lock", ".kept"}


# -- What a checkpoint fits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, before",
    [
        ("--rank 8", "with --rank 4"),
        ("--semantic_position none", "with --semantic_position rope"),
        ("--semantic_num_layers 2", "with --semantic_num_layers 1"),
        ("--semantic_mode none", "with --semantic_mode cross_attention"),
        ("--semantic_mode projection", "with --semantic_mode cross_attention"),
        ("--optimizer prodigy", "with --optimizer adamw"),
        ("--lora_layers attn.to_k", "without --lora_layers"),
        ("--use_8bit_adam", "without --use_8bit_adam"),
    ],
)
def test_what_a_checkpoint_does_not_fit_is_refused_before_a_model_is_loaded(
    base_folder, triptych_folder, one_step, monkeypatch, options, before
):
    monkeypatch.setattr("semantic_fill.encoding.load_encoders", None)
    with pytest.raises(
        ValueError, match=f"checkpoint-1 was trained {before}, so a run with {options} cannot continue from it"
    ):
        run(base_folder, one_step, *RESUME, *options.split(), data=triptych_folder)


def test_another_blend_is_refused_and_its_option_does_nothing_in_other_modes(base_folder, triptych_folder, tmp_path):
    fusion = ["--semantic_mode", "pixel_fusion", "--fusion_alpha"]
    out = run(base_folder, tmp_path / "out", "--max_train_steps", 1, *fusion, 0.3, data=triptych_folder)
    with pytest.raises(
        ValueError, match="was trained with --fusion_alpha 0.3, so a run with --fusion_alpha 0.5 cannot"
    ):
        run(base_folder, out, *RESUME, *fusion, 0.5, data=triptych_folder)
    more = ["--max_train_steps", 1, "--semantic_mode", "none", "--fusion_alpha"]
    out = run(base_folder, tmp_path / "none", *more, 0.3, data=triptych_folder)
    run(base_folder, out, *RESUME, *more, 0.5, data=triptych_folder)


@pytest.mark.parametrize("source", ["checkpoint-1", "absolute", "missing"])
def test_a_checkpoint_can_be_named(one_step, tmp_path, source):
    named = {"absolute": str(one_step / "checkpoint-1")}.get(source, source)
    options = arguments("unused", one_step, "--resume_from_checkpoint", named, data="unused")
    if source == "missing":
        with pytest.raises(ValueError, match="--resume_from_checkpoint missing is no intact checkpoint"):
            find_checkpoint(options)
    else:
        assert find_checkpoint(options) == one_step / "checkpoint-1"


def test_without_a_checkpoint_a_run_starts_from_the_beginning(tmp_path):
    PartialState()
    assert find_checkpoint(arguments("unused", tmp_path, *RESUME, data="unused")) is None
    assert find_checkpoint(arguments("unused", tmp_path, data="unused")) is None


# -- Checkpoints of older versions ------------------------------------------------------------------------------------


def as_an_older_version_wrote_it(checkpoint: Path, position: str, injection: str) -> None:
    """Rewrites options and the module's configuration as they were when the projection was a kind of attention."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    options = json.loads((checkpoint / "options.json").read_text())
    config = json.loads((checkpoint / "semantic_attention" / "config.json").read_text())
    sizes = {"num_layers": config["num_layers"], "num_heads": 8, "head_dim": 16}
    entry = {"position": position, "injection": injection}
    older = {name: value for name, value in options.items() if not name.startswith("semantic_")}
    older |= {"semantic_mode": "cross_attention"} | {f"semantic_{k}": v for k, v in (sizes | entry).items()}
    config = {"_class_name": "SemanticAttentionModel", "in_channels": 64, **sizes, **entry}
    for name, content in (("options.json", older), ("semantic_attention/config.json", config)):
        (checkpoint / name).write_text(json.dumps(content))
        manifest[name] = [(checkpoint / name).stat().st_size, file_hash(checkpoint / name)]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint_damage(checkpoint) is None


# What an older version called each kind, and an option that does not fit it.
OLDER = {"none": ("none", "noise"), "rope": ("rope", "noise"), "projection": ("direct", "condition")}
OTHERS = {
    "none": ("--semantic_position", "rope"),
    "rope": ("--semantic_mode", "projection"),
    "projection": ("--semantic_mode", "cross_attention"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_checkpoint_of_an_older_version_continues(base_folder, triptych_folder, tmp_path, kind):
    options = [*MODULES[kind], *RANDOM, "--checkpointing_steps", 2, "--max_train_steps", 4]
    expected = run(base_folder, tmp_path / "expected", *options, data=triptych_folder)
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(expected / "checkpoint-2", out / "checkpoint-2")
    as_an_older_version_wrote_it(out / "checkpoint-2", *OLDER[kind])
    # Other sizes and modes are still told apart.
    with pytest.raises(ValueError, match="checkpoint-2 was trained with --semantic_num_layers 1"):
        run(base_folder, out, *options, *RESUME, "--semantic_num_layers", 2, data=triptych_folder)
    option, other = OTHERS[kind]
    with pytest.raises(ValueError, match=f"checkpoint-2 was trained with {option} .* with {option} {other} cannot"):
        run(base_folder, out, *options, option, other, *RESUME, data=triptych_folder)
    assert_same_weights(expected, run(base_folder, out, *options, *RESUME, data=triptych_folder))
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    pipe.load_lora_weights(out)
    assert pipe.config.semantic_mode == ("projection" if kind == "projection" else "cross_attention")


@pytest.mark.parametrize(
    "position, injection",
    [
        ("aligned", "noise"),
        ("aligned", "condition"),
        ("direct", "noise"),
        ("none", "condition"),
        ("rope", "condition"),
    ],
)
def test_a_checkpoint_of_a_kind_that_is_gone_is_refused_by_name(
    base_folder, triptych_folder, one_step, tmp_path, monkeypatch, position, injection
):
    monkeypatch.setattr("semantic_fill.encoding.load_encoders", None)
    out = tmp_path / "out"
    shutil.copytree(one_step, out)
    as_an_older_version_wrote_it(out / "checkpoint-1", position, injection)
    for more in ([], MODULES["none"], MODULES["projection"]):
        with pytest.raises(ValueError) as error:
            run(base_folder, out, *more, *RESUME, data=triptych_folder)
        message = str(error.value)
        assert f"with --semantic_position {position} and --semantic_injection {injection}" in message
        assert "no longer exist" in message and "Commit bd5985d can still use it" in message
    # The weights alone are refused alike.
    with pytest.raises(ValueError, match=rf"position='{position}'.*injection='{injection}'.*bd5985d"):
        start = arguments(base_folder, tmp_path / "new", "--semantic_weights", out / "checkpoint-1", data="unused")
        trainer.build_model(trainer.load_transformer(start, torch.device("cpu"), torch.float32), start)
