# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What was downloaded is checked before it is acted on, and a load that is refused changes nothing."""

import json
import os
import shutil
from pathlib import Path

import convert_lora
import pytest
import safetensors.torch
import torch
from helpers import LORA_FILE, MODULE_FILE
from pipeline_helpers import Trained, make_pipe, trained_like

from pipeline_flux_fill_semantic import read_trained_settings
from semantic_attention import check_number, file_hash, manifest_damage, parse_json, read_json
from semantic_fill.files import list_files
from semantic_fill.weights import load_module


CONFIG = "semantic_attention/config.json"
# It runs for longer than anyone waits.
ENDLESS = "([a-z_.0-9]+)+!"
DEEP = "[" * 500 + "]" * 500


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    return Trained(base, tmp_path_factory.mktemp("trained"), seed=0)


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """A trained folder of which a test may change anything."""
    return Path(shutil.copytree(trained.folder, tmp_path / "folder"))


@pytest.fixture(scope="module")
def pipe(base):
    """A pipeline with a module, which refused loads have to leave as it is."""
    return make_pipe(base, own=True, semantic_attention=trained_like(5))


def rewrite(file: Path, change=None, **metadata: str) -> None:
    """Changes a safetensors file: its tensors by a function, its metadata by name."""
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() | metadata
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors if change is None else change(tensors), file, metadata=metadata)


def write_lora_config(folder: Path, **changes) -> None:
    with safetensors.safe_open(folder / LORA_FILE, framework="pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    config |= {f"transformer.{name}": value for name, value in changes.items()}
    rewrite(folder / LORA_FILE, lora_adapter_metadata=json.dumps(config))


def refuses(pipe, folder: Path, named: str) -> None:
    """A load is refused with a sentence that names what is wrong, and the pipeline stays as it was."""
    module, mode = pipe.semantic_attention, pipe.config.semantic_mode
    with pytest.raises(ValueError, match=named):
        pipe.load_lora_weights(folder)
    assert pipe.semantic_attention is module and pipe.config.semantic_mode == mode
    assert not getattr(pipe.transformer, "peft_config", None)
    assert not any("lora" in name for name, _ in pipe.transformer.named_modules())


# -- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("target_modules", ENDLESS),
        ("target_modules", [ENDLESS]),
        ("exclude_modules", ENDLESS),
        ("alpha_pattern", {ENDLESS: 1}),
        ("rank_pattern", {ENDLESS: 1}),
        ("rank_pattern", {"to_q": 10**9}),
        ("alpha_pattern", {"to_q": float("nan")}),
        ("alpha_pattern", ["to_q"]),
        ("layers_pattern", ENDLESS),
        ("modules_to_save", ["x_embedder"]),
        ("init_lora_weights", "pissa"),
        ("r", 10**9),
        ("r", "2"),
        ("r", True),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 2),
        ("use_dora", "yes"),
        ("bias", "every"),
        ("of_a_later_version", 3),
    ],
)
def test_a_lora_configuration_is_checked_before_peft_acts_on_it(pipe, folder, field, value):
    write_lora_config(folder, **{field: value})
    refuses(pipe, folder, f"holds a LoRA that cannot be used: `{field}` ")
    with pytest.raises(ValueError, match=f"`{field}` "):
        convert_lora.convert_file(folder / LORA_FILE, folder / "converted.safetensors")
    assert not (folder / "converted.safetensors").exists()


@pytest.mark.parametrize("said", ["[]", "3", '"text"', "{", "[" * 100_000, DEEP])
def test_a_lora_configuration_of_another_shape_is_refused(pipe, folder, said):
    rewrite(folder / LORA_FILE, lora_adapter_metadata=said)
    refuses(pipe, folder, str(folder))


def test_a_field_that_is_empty_or_of_a_later_version_is_no_obstacle(base, folder):
    write_lora_config(folder, of_a_later_version=None, rank_pattern={"^proj_out": 2})
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(folder)
    assert pipe.transformer.peft_config["default_0"].lora_alpha == 8


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda lora: {name: weight * float("inf") for name, weight in lora.items()}, "not finite"),
        (
            lambda lora: {name.replace("blocks", "parts"): w for name, w in lora.items() if "blocks" in name},
            "no layer",
        ),
        (lambda lora: {"unet.lora_A.weight": torch.ones(2, 2), "unet.lora_B.weight": torch.ones(2, 2)}, "no layer"),
        (lambda lora: {n: w[:3].contiguous() if "lora_B" in n else w for n, w in lora.items()}, "does not fit"),
        (lambda lora: {"lora_unet_double_blocks_0_x.lora_down.weight": torch.ones(2, 2)}, "no LoRA that can be read"),
        (lambda lora: {"double_blocks.0.processor.x.down.weight": torch.ones(2, 2)}, "cannot be loaded"),
    ],
)
def test_weights_of_a_lora_that_cannot_be_used_are_refused(pipe, folder, change, named):
    rewrite(folder / LORA_FILE, change)
    refuses(pipe, folder, named)


@pytest.mark.parametrize(
    "said",
    [
        '{"max_sequence_length": "512"}',
        '{"max_sequence_length": -5}',
        '{"max_sequence_length": 1000000000}',
        '{"fusion_alpha": "0.5"}',
        '{"fusion_alpha": 1e999}',
        '{"fusion_alpha": NaN}',
        '{"semantic_mode": ["none"]}',
        '{"semantic_mode": null}',
        '{"height": 1000000000}',
        DEEP,
    ],
)
def test_settings_out_of_range_are_refused(pipe, folder, said):
    rewrite(folder / LORA_FILE, semantic_fill=said)
    refuses(pipe, folder, "holds a damaged file, .*safetensors: ")
    with pytest.raises(ValueError, match="holds a damaged file"):
        read_trained_settings(folder)


def test_a_setting_of_a_later_version_is_named_and_ignored(folder, caplog):
    rewrite(folder / LORA_FILE, semantic_fill='{"semantic_mode": "none", "later": 1}')
    assert read_trained_settings(folder) == {"semantic_mode": "none"}


# -- Module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_layers", 10**9),
        ("num_layers", 4096),
        ("num_layers", "1"),
        ("num_layers", 1.5),
        ("num_heads", 4096),
        ("head_dim", -1),
        ("in_channels", 32),
        ("_class_name", ["SemanticAttentionModel"]),
        ("position", 3),
    ],
)
def test_a_module_configuration_is_compared_with_the_weights_first(pipe, folder, field, value):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {field: value}))
    refuses(pipe, folder, f"{folder}.*(`{field}`|does not fit its config.json)")
    with pytest.raises(ValueError, match="holds no trained module that can be used"):
        load_module(str(folder), object)


@pytest.mark.parametrize("content", ["[]", "{", DEEP, "[" * 100_000, b"\xff", b" " * (16 * 2**20 + 1)])
def test_a_module_configuration_of_another_shape_is_refused(pipe, folder, content):
    (folder / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(pipe, folder, str(folder / CONFIG))


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda module: {n: w for n, w in module.items() if "to_q" not in n}, "'layers.0.to_q.weight' has to have"),
        (lambda module: module | {"more": torch.ones(1)}, "'more' has to have the shape None"),
        (lambda module: module | {"layers.0.scale": torch.ones(3)}, "'layers.0.scale' has to have the shape"),
        (
            lambda module: module | {"layers.0.scale": torch.full((64,), float("nan"))},
            "not finite, in 'layers.0.scale'",
        ),
    ],
)
def test_weights_of_a_module_that_do_not_fit_it_are_refused(pipe, folder, change, named):
    rewrite(folder / MODULE_FILE, change)
    refuses(pipe, folder, f"{folder / MODULE_FILE}.*{named}")


def test_weights_beside_the_module_do_not_take_its_place(base, trained, folder):
    safetensors.torch.save_file({"other": torch.ones(1)}, folder / Path(MODULE_FILE).name)
    pipe = make_pipe(base, own=True)
    pipe.load_lora_weights(folder)
    assert torch.equal(pipe.semantic_attention.layers[0].scale, trained.module.layers[0].scale)


# -- JSON and manifests -----------------------------------------------------------------------------------------------


def test_json_is_bounded(tmp_path):
    assert parse_json("[" * 32 + "]" * 32, "x") is not None and parse_json('{"a": [1, null, "b"]}', "x")
    for text in (
        "[" * 33 + "]" * 33,
        '{"a":' * 40 + "1" + "}" * 40,
        "[" * 100_000,
        "1" * 10_000,
        " " * (16 * 2**20 + 1),
    ):
        with pytest.raises(ValueError, match="^x "):
            parse_json(text, "x")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"^{path} "):
            read_json(path)


@pytest.mark.parametrize("value", [None, True, "1", [], float("nan"), float("inf"), 0, 7, 10**400])
def test_numbers_are_bounded(value):
    with pytest.raises(ValueError, match="`x` has to be "):
        check_number("x", value, least=1, most=6)
    assert check_number("x", 1.5, least=1, most=6) == 1.5
    with pytest.raises(ValueError, match="whole number"):
        check_number("x", 1.5, whole=True)


def write_manifest(folder: Path, **more) -> None:
    (folder / "manifest.json").unlink(missing_ok=True)
    files = {path.relative_to(folder).as_posix(): path for path in list_files(folder)}
    manifest = {name: [path.stat().st_size, file_hash(path)] for name, path in files.items()}
    (folder / "manifest.json").write_text(json.dumps(manifest | more))


@pytest.mark.parametrize("file", [LORA_FILE, MODULE_FILE, CONFIG])
def test_a_checkpoint_is_verified_where_it_is_painted_with(base, folder, file):
    write_manifest(folder)
    assert manifest_damage(folder, set()) is None
    make_pipe(base, own=True).load_lora_weights(folder)
    if file == CONFIG:
        (folder / file).write_text((folder / file).read_text() + " ")
    else:
        rewrite(folder / file, lambda weights: {name: weight + 1 for name, weight in weights.items()})
    refuses(make_pipe(base, own=True), folder, f"{folder} is damaged: {file} is not what was written")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[file]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refuses(make_pipe(base, own=True), folder, f"{folder} is damaged: manifest.json does not name {file}")


@pytest.mark.parametrize("name", ["/dev/zero", "../outside", "a/../../outside", "pipe", "missing", "a\0b"])
def test_a_manifest_names_regular_files_of_its_folder_only(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "outside").write_text("x")
    os.mkfifo(folder / "pipe")
    (folder / "manifest.json").write_text(json.dumps({name: [1, file_hash(tmp_path / "outside")]}))
    assert name in manifest_damage(folder, set())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": 3}', '{"a": [1]}', DEEP, "[" * 100_000])
def test_a_manifest_of_another_shape_is_damage(tmp_path, content):
    (tmp_path / "a").write_text("x")
    (tmp_path / "manifest.json").write_text(content)
    assert manifest_damage(tmp_path, {"a"}) is not None


def test_a_checkpoint_in_the_cache_of_the_hub_is_made_of_links(tmp_path, folder):
    write_manifest(folder)
    snapshot = tmp_path / "snapshot"
    for path in list_files(folder):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert manifest_damage(snapshot, {LORA_FILE}) is None
