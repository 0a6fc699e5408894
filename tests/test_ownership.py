# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What belongs to a run: nothing else is deleted, moved or uploaded, and a result is the old one or the new one."""

import os
import shutil
import signal
import stat
from pathlib import Path

import convert_lora
import pytest
import safetensors.torch
import torch
from accelerate.state import PartialState
from helpers import LORA_FILE, MODULE_FILE, arguments, run
from pipeline_helpers import Trained, make_pipe

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_attention import SemanticAttentionModel, load_semantic_module
from semantic_fill import files, publish
from semantic_fill.checkpoints import StopSignals, claim_output_dir, find_checkpoint, list_checkpoints
from semantic_fill.publish import own_files, save_result
from semantic_fill.training_state import TrainingState, check_same_samples, refuse_untrained


OVERWRITE, RESUME = ["--overwrite_output_dir"], ["--resume_from_checkpoint", "latest"]


def claim(out: Path, *more) -> None:
    PartialState()
    claim_output_dir(arguments("unused", out, *more, data="unused")).release()


# -- Output folder ----------------------------------------------------------------------------------------------------


def test_folders_of_other_names_are_never_ours(tmp_path):
    """Names that only begin like those of a run's own folders, and links by the very names."""
    out, other = tmp_path / "out", tmp_path / "other"
    names = [
        "checkpoint-best-1",
        "checkpoint-my-notes-2",
        "checkpoint-1.bak",
        "checkpoint-01",
        "checkpoint--1",
        "xcheckpoint-1",
    ]
    names += [".checkpoint-notes.old", ".checkpoint-1.keep", ".result.mine", ".checkpoint-x.part"]
    for name in names:
        (out / name).mkdir(parents=True)
        (out / name / "mine").touch()
    other.mkdir()
    (other / "mine").touch()
    (out / ".result.part").symlink_to(other)
    (out / ".checkpoint-3.part").symlink_to(other)
    (out / "checkpoint-9").mkdir()
    assert list_checkpoints(out) == [out / "checkpoint-9"]
    (out / "samples").mkdir()
    for name in ("step-000001.png", "step-1.png", "mine.png"):
        (out / "samples" / name).touch()
    claim(out, *OVERWRITE)
    assert all((out / name / "mine").is_file() for name in names) and (other / "mine").is_file()
    assert not list_checkpoints(out) and not (out / ".result.part").is_symlink()
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["mine.png", "step-1.png"]


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_checkpoint_name_that_is_no_folder_stops_the_run_at_its_start(tmp_path, kind):
    out = tmp_path / "out"
    out.mkdir()
    if kind == "link":
        (tmp_path / "other").mkdir()
        (out / "checkpoint-2").symlink_to(tmp_path / "other")
    else:
        (out / "checkpoint-2").write_text("mine")
    with pytest.raises(ValueError, match="checkpoint-2 is no folder, but has the name of a checkpoint"):
        claim(out, *OVERWRITE)
    # One that came later stays as well.
    with pytest.raises(RuntimeError, match="checkpoint-2 is no folder of this run. It stays as it is"):
        files.replace_folder(out / "checkpoint-2", Path.mkdir)
    assert os.path.lexists(out / "checkpoint-2") and {path.name for path in out.iterdir()} <= {"checkpoint-2", ".lock"}


def test_a_folder_with_an_earlier_run_has_to_be_overwritten_by_name(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-4").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run. Continue it with --resume"):
        claim(out)
    claim(out, *RESUME)
    claim(out, *OVERWRITE, *RESUME)
    assert list_checkpoints(out)
    claim(out, *OVERWRITE)
    assert not list_checkpoints(out)
    claim(out)
    (out / LORA_FILE).touch()
    for more in ([], RESUME):
        with pytest.raises(
            ValueError, match="holds the result of an earlier run. Pass another folder, or --overwrite"
        ):
            claim(out, *more)
    # The earlier result stays until the new one takes its place.
    claim(out, *OVERWRITE)
    assert (out / LORA_FILE).exists()


@pytest.mark.parametrize("named", ["/nonexistent/other/checkpoint-1", "other/checkpoint-1", "./checkpoint-1"])
def test_another_runs_checkpoint_is_not_looked_for_here(tmp_path, named):
    (tmp_path / "checkpoint-1").mkdir()
    PartialState()
    with pytest.raises(ValueError, match=f"{named} is no"):
        find_checkpoint(arguments("unused", tmp_path, "--resume_from_checkpoint", named, data="unused"))


def test_new_files_have_the_modes_of_the_umask(tmp_path):
    for name, mode in (("a", 0o600), ("b", 0o777)):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(mode)
        files.flush_to_disk(tmp_path / name)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~files.UMASK


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_saved_and_converted_loras_have_the_modes_of_the_umask(tmp_path, umask):
    lora = {"lora_A.weight": torch.ones(1, 3072), "lora_B.weight": torch.ones(3072, 1)}
    lora = {f"transformer_blocks.0.attn.to_q.{name}": weight for name, weight in lora.items()}
    before = os.umask(umask)
    try:
        module = SemanticAttentionModel()
        FluxFillSemanticPipeline.save_lora_weights(tmp_path, lora, semantic_attention=module)
        convert_lora.convert_file(tmp_path / LORA_FILE, tmp_path / "kohya.safetensors")
        convert_lora.convert_file(tmp_path / "kohya.safetensors", tmp_path / "back.safetensors")
    finally:
        os.umask(before)
    written = files.list_files(tmp_path)
    assert len(written) == 5 and {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~umask}


# -- Result -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(base, tmp_path_factory):
    """Two trained folders, which stand for the weights of two runs."""
    return [Trained(base, tmp_path_factory.mktemp(f"result{seed}"), seed=seed).folder for seed in (0, 1)]


@pytest.fixture
def save(monkeypatch, tmp_path):
    """Saves a trained folder as the result of a run."""
    PartialState()

    def save(folder: Path, **more) -> list[str]:
        monkeypatch.setattr(
            publish, "save_weights", lambda model, weights, place, options: shutil.copytree(folder, place)
        )
        options = arguments(
            "unused", tmp_path / "out", "--max_train_steps", 1, *more.get("options", ()), data="unused"
        )
        return save_result(None, {}, 0.5, [], options)

    (tmp_path / "out").mkdir()
    return save


class Killed(BaseException):
    """Ends a run as a kill does: nothing handles it."""


def weights_found(out: Path) -> tuple[bytes, bytes]:
    """What painting with a folder would load."""
    pipe_file = Path(publish.semantic_attention.resolve_file(str(out), "", LORA_FILE, {}))
    module = load_semantic_module(out, subfolder="semantic_attention")
    return pipe_file.read_bytes(), b"".join(p.detach().numpy().tobytes() for p in module.parameters())


def test_a_kill_at_any_rename_leaves_the_old_result_or_the_new_one(base, results, save, tmp_path, monkeypatch):
    out, rename, seen = tmp_path / "out", os.replace, set()
    old, new = (weights_found(folder) for folder in results)
    assert old[0] != new[0] and old[1] != new[1]
    for count in range(1, 100):
        shutil.rmtree(out)
        out.mkdir()
        save(results[0])
        left = [count]

        def rename_or_die(source, target, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            rename(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", rename_or_die)
            # A kill lets nothing be cleaned up.
            patch.setattr(files, "remove", lambda path: None)
            try:
                save(results[1])
                ended = True
            except Killed:
                ended = False
        found = weights_found(out)
        assert found in (old, new)
        seen.add(found == new)
        if not ended:
            make_pipe(base, own=True).load_lora_weights(out)
        # The next run completes it, and leaves nothing behind.
        claim(out, *OVERWRITE)
        assert weights_found(out) == found and found[0] == (out / LORA_FILE).read_bytes()
        assert {path.name for path in out.iterdir() if path.name.startswith(".")} <= {".lock"}
        if ended:
            break
    assert seen == {False, True} and count > 6


def test_a_result_without_a_module_leaves_no_module_of_an_earlier_one(results, save, tmp_path):
    save(results[0])
    (tmp_path / "out" / "semantic_attention" / "mine").touch()
    without = shutil.copytree(results[1], tmp_path / "without", ignore=lambda *_: ["semantic_attention"])
    names = save(without)
    assert not (tmp_path / "out" / MODULE_FILE).exists() and MODULE_FILE not in names
    assert (tmp_path / "out" / "semantic_attention" / "mine").exists()


def test_links_in_the_place_of_a_result_are_replaced_and_not_followed(results, save, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text("mine")
    (other / "config.json").write_text("mine")
    for name in ("README.md", ".result"):
        (tmp_path / "out" / name).symlink_to(other / "README.md" if name == "README.md" else other)
    (tmp_path / "out" / "semantic_attention").symlink_to(other)
    names = save(results[0])
    assert {path.name: path.read_text() for path in other.iterdir()} == {"README.md": "mine", "config.json": "mine"}
    assert own_files(tmp_path / "out", names) == names and "mine" not in (tmp_path / "out" / "README.md").read_text()


def test_a_card_that_cannot_be_written_costs_no_weights(results, save, tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    monkeypatch.setattr(publish, "save_model_card", fail)
    names = save(results[0])
    assert (tmp_path / "out" / LORA_FILE).is_file() and "README.md" not in names
    assert "The model card failed, and the run goes on without it: UnicodeEncodeError" in caplog.text


def test_only_regular_files_of_the_run_are_uploaded(tmp_path):
    PartialState()
    out = tmp_path / "out"
    (out / "samples").mkdir(parents=True)
    (tmp_path / "private").write_text("private")
    (out / "own").touch()
    (out / "link").symlink_to(tmp_path / "private")
    (out / "inside").symlink_to(out / "own")
    os.mkfifo(out / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "step-000001.png").touch()
    (out / "more").symlink_to(tmp_path / "folder")
    names = ["own", "link", "inside", "pipe", "missing", "more/step-000001.png", "../private", "samples"]
    assert own_files(out, names) == ["own"]


def test_what_the_card_did_not_write_is_escaped(results, save, tmp_path):
    prompt = 'x"\n```\n<script>alert(1)</script>\n# heading \x1b[31m`code`'
    save(results[0], options=["--instance_prompt", prompt])
    text = (tmp_path / "out" / "README.md").read_text().partition("\n---\n")[2]
    assert "<script>" not in text and "\n# heading" not in text and "\x1b" not in text and text.count("```") == 2
    code = text.partition("```python\n")[2].partition("```")[0]
    call = next(line for line in code.splitlines() if "prompt=" in line)
    assert eval(call.strip().removeprefix("prompt=").partition(", image=")[0]) == prompt


# -- Endings ----------------------------------------------------------------------------------------------------------


def test_a_closed_terminal_stops_like_sigterm_unless_it_is_ignored():
    before = signal.getsignal(signal.SIGHUP)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP
    assert signal.getsignal(signal.SIGHUP) == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_without_one_applied_step_has_no_result():
    layer = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    refuse_untrained(TrainingState(), schedule)
    with pytest.raises(RuntimeError, match="None of the 3 steps had a finite loss"):
        refuse_untrained(TrainingState(step=3), schedule)
    optimizer.step()
    schedule.step()
    refuse_untrained(TrainingState(step=3), schedule)


@pytest.mark.parametrize(
    "seed, samples, named",
    [
        (0, "a", None),
        (1, "a", "--seed was 0 and is 1"),
        (0, "b", "the samples, their order or their captions are others"),
    ],
)
def test_other_samples_or_another_seed_are_named(tmp_path, monkeypatch, caplog, seed, samples, named):
    PartialState()
    saved = TrainingState(step=1, samples_seen=2, loss=1.0, seed=0, samples="a")
    monkeypatch.setattr("semantic_fill.training_state.read_state", lambda folder: ({}, saved))
    more = ["--seed", seed, *RESUME]
    if named is None:
        assert check_same_samples(tmp_path, samples, arguments("unused", tmp_path, *more, data="unused")) is saved
        return
    with pytest.raises(ValueError, match=f"{named}. Pass --allow_changed_data"):
        check_same_samples(tmp_path, samples, arguments("unused", tmp_path, *more, data="unused"))
    more.append("--allow_changed_data")
    check_same_samples(tmp_path, samples, arguments("unused", tmp_path, *more, data="unused"))
    assert named in caplog.text


def test_another_base_is_named(base_folder, triptych_folder, tmp_path, caplog):
    base, cache = shutil.copytree(base_folder, tmp_path / "base"), tmp_path / "cache"

    def train(base, steps, *more):
        more = ["--max_train_steps", steps, "--cache_root", cache, "--checkpointing_steps", 1, *more]
        return run(base, tmp_path / "out", *more, data=triptych_folder)

    train(base, 1)
    moved = shutil.copytree(base, tmp_path / "moved")
    # Another variant beside the weights is not what a run loads.
    (moved / "transformer" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"")
    train(moved, 2, *RESUME)
    (file,) = Path(base, "transformer").glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: 1.01 * weight for name, weight in weights.items()}, file)
    said = "the weights of the base's transformer are others"
    with pytest.raises(ValueError, match=f"{said}. Pass --allow_changed_data"):
        train(base, 3, *RESUME)
    train(base, 3, *RESUME, "--allow_changed_data")
    assert f"{said}. The run continues" in caplog.text
