# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Which files of a data set are read: regular ones inside its folder, up to a size, in formats that Pillow reads itself."""

import copy
import io
import json
import os
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from helpers import draw_triptych, encode_picture, write_files
from make_triptychs import Skip, read_labels

from pipeline_flux_fill_semantic import read_picture
from semantic_attention import open_file, read_file, read_json
from semantic_fill.captions import read_metadata, read_text
from semantic_fill.files import FileMemory, fingerprint
from semantic_fill.options import DataOptions
from semantic_fill.sources import list_folder
from semantic_fill.tables import find_tables
from semantic_fill.views import read_palette


def listed(folder, **more):
    return list_folder(folder, DataOptions(train_data_dir=str(folder), instance_prompt="x", **more))


def test_linked_files_that_lead_out_are_refused_unless_asked_for(tmp_path):
    folder = write_files(tmp_path / "data", {"a.png": 0, "a.txt": "a caption", "sub/b.png": 1})
    write_files(
        tmp_path / "private", {"p.png": 2, "p.txt": "secret", "metadata.jsonl": '{"file_name": "a.png", "text": "x"}'}
    )
    (folder / "inside.png").symlink_to(folder / "a.png")
    (folder / "out.png").symlink_to(tmp_path / "private" / "p.png")
    (folder / "sub" / "b.txt").symlink_to("../../private/p.txt")
    source = listed(folder)
    assert sorted(source.problems) == [
        f"{name}: is a link that leads out of the data set's folder. Pass --follow_links to read it"
        for name in ("out.png", "sub/b.txt")
    ]
    assert [name for name, *_ in source.samples] == ["a.png", "inside.png", "sub/b.png"]
    source = listed(folder, follow_links=True)
    assert not source.problems and [name for name, *_ in source.samples] == [
        "a.png",
        "inside.png",
        "out.png",
        "sub/b.png",
    ]
    # Metadata is a file like others, and names none that a link brings in.
    (folder / "metadata.jsonl").symlink_to(tmp_path / "private" / "metadata.jsonl")
    assert any(problem.startswith("metadata.jsonl: is a link") for problem in listed(folder).problems)
    (folder / "metadata.jsonl").unlink()
    (folder / "odd.picture").symlink_to(tmp_path / "private" / "p.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "odd.picture", "text": "x"}))
    assert "odd.picture: is named by the metadata but is no file in the folder" in listed(folder).problems


def test_a_linked_folder_and_a_snapshot_of_the_hub_are_read(tmp_path):
    """A folder that the user links is data. The cache of the Hub holds links to its blobs."""
    folder = write_files(tmp_path / "data", {"a.png": 0})
    write_files(tmp_path / "elsewhere", {"b.png": 1})
    (tmp_path / "elsewhere" / "c.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert not listed(folder).problems and len(listed(folder)) == 3
    write_files(tmp_path / "cache" / "blobs", {"0123.png": 2})
    snapshot = tmp_path / "cache" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "a.png").symlink_to("../../blobs/0123.png")
    assert not listed(snapshot).problems and len(listed(snapshot)) == 1


@pytest.mark.parametrize(
    "read", [read_file, read_picture, read_text, read_palette, read_metadata, read_json, read_labels]
)
def test_pipes_devices_and_huge_files_are_not_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.parquet")
    # The file has this length, but takes no space.
    (tmp_path / "large.parquet").touch()
    os.truncate(tmp_path / "large.parquet", 2**29 + 1)
    for path, reason in (
        (tmp_path / "pipe.parquet", "is no regular file"),
        (Path("/dev/zero"), "is no regular file"),
        (tmp_path / "large.parquet", "has 536870913 bytes, but at most (536870912|16777216) are accepted"),
    ):
        with pytest.raises((ValueError, Skip), match=reason):
            read(path)


def test_pipes_are_no_tables_and_the_limit_holds_for_what_tables_hold(tmp_path):
    with pytest.raises(ValueError, match="has 11 bytes, but at most 10 are accepted"):
        open_file(b"x" * 11, most=10)
    os.mkfifo(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train.parquet is no regular file"):
        find_tables(tmp_path, "train")


@pytest.mark.parametrize("form", ["EPS", "PDF", "PCX", "ICO", "SGI"])
def test_formats_that_are_not_listed_are_refused(tmp_path, form, monkeypatch):
    data = encode_picture(draw_triptych(0), form)
    # PostScript would start another program.
    monkeypatch.setattr("subprocess.Popen", None)
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        with pytest.raises(ValueError, match="cannot be read as a picture .UnidentifiedImageError"):
            read_picture(source)


@pytest.mark.parametrize(
    "form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "TGA", "PPM", "JPEG2000", "AVIF", "MPO"]
)
def test_formats_that_are_listed_are_read(form):
    data = encode_picture(draw_triptych(0), form)
    with PIL.Image.open(io.BytesIO(data)) as plain:
        assert read_picture(data).tobytes() == plain.convert("RGB").tobytes()


# -- Fingerprints -----------------------------------------------------------------------------------------------------


def test_a_fingerprint_covers_every_value(base):
    weights = base.vae.state_dict()
    before = fingerprint(base.vae)
    assert before == fingerprint(base.vae)
    for name, place in (
        (list(weights)[0], -1),
        (list(weights)[-1], -1),
        (max(weights, key=lambda n: weights[n].numel()), 100),
    ):
        flat = weights[name].flatten()
        value = flat[place].clone()
        with torch.no_grad():
            weights[name].view(-1)[place] = value + 1e-3
            assert fingerprint(base.vae) != before, name
            weights[name].view(-1)[place] = value
    assert fingerprint(base.vae) == before
    text_encoder = copy.deepcopy(base.text_encoder)
    before = fingerprint(text_encoder)
    text_encoder.config.hidden_act = "gelu"
    assert fingerprint(text_encoder) != before


def test_a_fingerprint_is_remembered_while_its_files_stay(base_folder, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(base_folder, subfolder="vae")
    vae.save_pretrained(tmp_path / "vae")
    vae = AutoencoderKL.from_pretrained(tmp_path / "vae")
    memory = FileMemory(tmp_path / "memory.json", "1")
    found = fingerprint(vae, memory)
    memory.save()
    with monkeypatch.context() as patch:
        patch.setattr(vae, "state_dict", None)
        assert fingerprint(vae, FileMemory(tmp_path / "memory.json", "1")) == found
    vae.decoder.conv_out.bias.data += 1
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        # Another file of the same size and time takes the place of this one.
        os.replace(shutil.copy2(tmp_path / "vae" / name, tmp_path / "copy"), tmp_path / "vae" / name)
        assert fingerprint(vae, FileMemory(tmp_path / "memory.json", "1")) == fingerprint(vae) != found
