# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Encodings: what they depend on, their cache on disk, and the token grid of the canvas."""

import logging
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from helpers import (
    MODULE_FILE,
    arguments,
    assemble,
    assert_same_weights,
    first_batch,
    fresh_state,
    read_dataset,
    run,
    weights_of,
    write_triptychs,
)
from transformers import T5TokenizerFast

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import SEMANTIC_MODES
from semantic_fill.encoding import Encoder, load_encoders
from semantic_fill.files import checksum, is_intact, read_encoding, write_atomically
from semantic_fill.sampling import SampleReader, SampleSpec


FIRST = SampleSpec(position=0, index=0, flip=False, drop_caption=False, drop_maps=())


def make_encoder(options, cache_dir=None) -> Encoder:
    return Encoder(load_encoders(options, torch.float32), read_dataset(options), 16, cache_dir)


def encodings(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# -- Encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SEMANTIC_MODES)
def test_cached_encodings_are_those_that_are_made_when_needed(base_folder, triptych_folder, tmp_path, mode):
    options = arguments(base_folder, tmp_path, "--semantic_mode", mode, data=triptych_folder)
    specs = [
        SampleSpec(
            position=n, index=n % 3, flip=bool(n & 1), drop_caption=bool(n & 2), drop_maps=("semantic",) * (n // 4)
        )
        for n in range(8)
    ]
    batches = []
    for cache_dir in (None, tmp_path / "cache"):
        encoder = make_encoder(options, cache_dir)
        if cache_dir is not None:
            fresh_state()
            encoder.fill_cache(Accelerator(cpu=True), encoder.specs(flips=True, dropped_maps=True))
            # 6 pictures, mirrored too, with and without their map where it lies on the canvas, else beside it, and 3 prompts.
            assert len(encodings(cache_dir)) == 12 * (1 + SEMANTIC_MODES[mode].uses_map) + 3
        reader = SampleReader(encoder)
        generators = [torch.Generator().manual_seed(spec.position) for spec in specs]
        samples = [reader[spec] for spec in specs]
        batches.append(encoder.encode_batch(samples, generators, torch.device("cpu"), torch.float32))
    made, cached = batches
    assert made.keys() == cached.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, cached[name], atol=1e-5, rtol=1e-5, msg=name)
    # Samples 2 and 6 have lost their captions.
    assert torch.equal(made["prompt_embeds"][2], made["prompt_embeds"][6])
    assert not torch.equal(made["prompt_embeds"][0], made["prompt_embeds"][2])
    if SEMANTIC_MODES[mode].module_class is not None:
        assert made["keep_map"].tolist() == [[True]] * 4 + [[False]] * 4
    else:
        assert "keep_map" not in made and "semantic_tokens" not in made


@pytest.mark.parametrize("mode", ["pixel_fusion", "in_context"])
def test_a_dropped_map_leaves_no_trace_on_the_canvas(base_folder, triptych_folder, tmp_path, mode):
    encoder = make_encoder(arguments(base_folder, tmp_path, "--semantic_mode", mode, data=triptych_folder))
    views = {name: view[None] for name, view in encoder.dataset.views(0).items()}
    other = views | {"semantic": 1 - views["semantic"]}
    with_map, with_other = encoder.encode_views(views), encoder.encode_views(other)
    dropped, other_dropped = (
        encoder.encode_views(views, drop_maps=("semantic",)),
        encoder.encode_views(other, drop_maps=("semantic",)),
    )
    for name in ("moments", "masked_moments"):
        assert not torch.equal(with_map[name], with_other[name]) and not torch.equal(with_map[name], dropped[name])
        assert torch.equal(dropped[name], other_dropped[name])


def test_another_scaling_or_tokenizer_is_another_encoding(base_folder, triptych_folder, tmp_path):
    """The weights, the picture and the prompt are the same."""
    options = arguments(base_folder, tmp_path, data=triptych_folder)
    dataset = read_dataset(options)
    pipeline = load_encoders(options, torch.float32)
    views = {name: view[None] for name, view in dataset.views(0).items()}

    def made():
        encoder = Encoder(pipeline, dataset, 16, tmp_path)
        files = *encoder.sample_files(FIRST), encoder.prompt_file("a b")
        return files, encoder.encode_views(views), encoder.encode_prompts(["a b"])["prompt_embeds"]

    first = made()
    assert made()[0] == first[0]
    pipeline.vae.register_to_config(scaling_factor=0.5)
    second = made()
    assert not torch.equal(first[1]["semantic"], second[1]["semantic"])
    assert torch.equal(first[1]["moments"], second[1]["moments"])
    assert [a == b for a, b in zip(first[0], second[0])] == [False, False, True]
    pipeline.tokenizer_2 = T5TokenizerFast(
        vocab=[(piece, -float(i)) for i, piece in enumerate(["<pad>", "</s>", "<unk>", "▁", "b", "a"])], extra_ids=0
    )
    third = made()
    assert not torch.equal(second[2], third[2])
    assert [a == b for a, b in zip(second[0], third[0])] == [True, True, False]
    # The same words, cut elsewhere.
    pipeline.tokenizer.model_max_length = 8
    assert made()[0][-1] != third[0][-1]
    pipeline.tokenizer.backend_tokenizer.normalizer = None
    assert made()[0][-1] != third[0][-1]


def test_a_variant_has_encodings_of_its_own(base_folder, triptych_folder, tmp_path):
    base, found = tmp_path / "base", {}
    shutil.copytree(base_folder, base)
    for path in [path for path in base.rglob("*.safetensors")]:
        weights = {name: weight * 1.5 for name, weight in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(weights, path.with_suffix(".other.safetensors"), metadata={"format": "pt"})
    for place, variant in (("shared", None), ("shared", "other"), ("own", "other")):
        more = ["--cache_root", tmp_path / place, *(["--variant", variant] if variant else [])]
        encoder = assemble(arguments(base, tmp_path / "out", *more, data=triptych_folder)).encoder
        found[place, variant] = encoder.read(FIRST)["encoded"]
    plain, shared, own = found.values()
    assert all(torch.equal(shared[name], own[name]) and not torch.equal(plain[name], own[name]) for name in own)


def test_another_weight_mode_or_size_is_another_encoding(base_folder, triptych_folder, tmp_path):
    options = {
        "plain": ["--semantic_mode", "none"],
        "in_context": ["--semantic_mode", "in_context"],
        "fusion": ["--semantic_mode", "pixel_fusion"],
        "more fusion": ["--semantic_mode", "pixel_fusion", "--fusion_alpha", 0.6],
        "wider": ["--semantic_mode", "none", "--width", 64],
    }
    encoders = {
        name: make_encoder(arguments(base_folder, tmp_path, *more, data=triptych_folder), tmp_path)
        for name, more in options.items()
    }
    assert len({file for encoder in encoders.values() for file in encoder.sample_files(FIRST)}) == len(encoders)
    assert len({encoder.prompt_file("a") for encoder in encoders.values()}) == 1
    plain = encoders["plain"]
    before = plain.sample_files(FIRST).keys(), plain.prompt_file("a")
    for model in (plain.pipeline.vae, plain.pipeline.text_encoder_2):
        next(model.parameters()).data.add_(1)
    changed = Encoder(plain.pipeline, plain.dataset, 16, tmp_path)
    assert changed.sample_files(FIRST).keys().isdisjoint(before[0]) and changed.prompt_file("a") != before[1]
    longer = Encoder(plain.pipeline, plain.dataset, 32, tmp_path)
    assert longer.prompt_file("a") != changed.prompt_file("a")


# -- The cache --------------------------------------------------------------------------------------------------------


def test_modes_share_what_they_have_in_common(base_folder, triptych_folder, tmp_path, caplog):
    """Another mode, and another picture's map, are encoded with what is there."""
    caplog.set_level(logging.INFO, logger="semantic_fill")
    # The canvas alone; its map too; nothing more; the wrong maps of validation; a canvas of its own.
    runs = {"none": 6, "projection": 6, "cross_attention": 0, "pixel_fusion": 6}
    for mode, made in runs.items():
        caplog.clear()
        encoder = make_encoder(
            arguments(base_folder, tmp_path, "--semantic_mode", mode, data=triptych_folder), tmp_path
        )
        fresh_state()
        encoder.fill_cache(Accelerator(cpu=True), encoder.specs())
        # The first one also makes 3 prompts.
        assert f"{made + 3 * (mode == 'none')} to make" in caplog.text
        if mode == "projection":
            caplog.clear()
            encoder.fill_cache(
                Accelerator(cpu=True), [replace(spec, wrong_map=("semantic", 5)) for spec in encoder.specs()]
            )
            assert "0 to make" in caplog.text


def test_cache_is_reused_and_mended(base_folder, triptych_folder, tmp_path, caplog):
    more = "--overwrite_output_dir --random_flip --caption_dropout 0.3 --semantic_dropout 0.3 --max_train_steps"
    expected = run(base_folder, tmp_path / "expected", *more.split(), 4, data=triptych_folder)
    out = tmp_path / "out"
    caplog.set_level(logging.INFO, logger="semantic_fill")
    run(base_folder, out, *more.split(), 1, data=triptych_folder)
    files = encodings(out / "cache")
    # 6 pictures and their maps, each mirrored too; 2 captions and the empty one.
    assert len(files) == 27
    files[0].write_bytes(b"no safetensors")
    caplog.clear()
    assert_same_weights(expected, run(base_folder, out, *more.split(), 4, data=triptych_folder))
    assert "26 found" in caplog.text and f"{files[0]} is damaged and is encoded again" in caplog.text
    # A longer prompt is another encoding.
    caplog.clear()
    more = ["--overwrite_output_dir", "--max_train_steps", 1, "--max_sequence_length", 8]
    run(base_folder, out, *more, data=triptych_folder)
    assert "12 found" in caplog.text and "3 to make" in caplog.text


def test_without_cache_the_same_is_learned(base_folder, triptych_folder, tmp_path):
    weights = []
    for flag in ("--cache_latents", "--no-cache_latents"):
        more = ["--max_train_steps", 3, "--random_flip", flag]
        out = run(base_folder, tmp_path / flag, *more, data=triptych_folder)
        weights.append(weights_of(out, MODULE_FILE))
    assert any(weight.abs().max() > 0 for name, weight in weights[0].items() if name.endswith("scale"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("damage", ["head", "content", "gone"])
def test_an_encoding_damaged_under_way_is_named(base_folder, triptych_folder, tmp_path, monkeypatch, damage):
    build_optimizer, cache = trainer.build_optimizer, tmp_path / "cache"

    def damage_and_build(*args):
        for path in encodings(cache):
            content = bytearray(path.read_bytes())
            content[{"head": 0, "content": -1, "gone": 0}[damage]] ^= 1
            path.write_bytes(content)
            if damage == "gone":
                path.unlink()
        return build_optimizer(*args)

    more = ["--cache_root", cache, "--max_train_steps", 1]
    with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
        patch.setattr(trainer, "build_optimizer", damage_and_build)
        run(base_folder, tmp_path / "out", *more, data=triptych_folder)
    (path,) = re.findall(r"The encoding (\S+) was damaged while the run was under way", str(error.value))
    assert Path(path).parent == cache and "continue with --resume_from_checkpoint latest" in str(error.value)
    run(base_folder, tmp_path / "out", *more, "--resume_from_checkpoint", "latest", data=triptych_folder)


def test_leftovers_of_killed_runs_go_after_a_day(base_folder, triptych_folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # Nothing tidies up, as after a kill.
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        write_atomically(cache / "a.safetensors", lambda path: path.write_bytes(b"half"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        write_atomically(cache / "checked.json", lambda path: path.write_bytes(b"half"))
    left = list(cache.iterdir())
    assert len(left) == 2
    others = [cache / "b.safetensors", cache / ".hidden", cache / f".b.safetensors.{'0' * 32}"]
    for path in others:
        path.write_bytes(b"of others")
    long_ago = time.time() - 25 * 60 * 60
    for path in (*left, *others[:2]):
        os.utime(path, (long_ago, long_ago))
    run(base_folder, tmp_path / "out", "--cache_root", cache, "--max_train_steps", 1, data=triptych_folder)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_flipped_bit_in_an_encoding_is_seen(tmp_path, caplog):
    tensors = {"a": torch.arange(8, dtype=torch.bfloat16), "b": torch.zeros(3)}
    path = tmp_path / "encoding.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"crc32": checksum(tensors)})
    assert is_intact(path)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in read_encoding(path).items())
    content = bytearray(path.read_bytes())
    PartialState()
    for place in (0, 9, len(content) - 1):
        damaged = content.copy()
        damaged[place] ^= 1
        path.write_bytes(damaged)
        assert not is_intact(path)
    assert caplog.text.count(f"{path} is damaged") == 3
    assert not is_intact(tmp_path / "missing")


# -- The token grid ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", SEMANTIC_MODES)
def test_tokens_know_their_panel(base_folder, tmp_path, mode):
    data = write_triptychs(tmp_path / "data", 1, 32, 48)
    more = ["--width", 48, "--semantic_mode", mode]
    encoder = make_encoder(arguments(base_folder, tmp_path, *more, data=data))
    panels = 3 if mode == "in_context" else 2
    (layout,) = encoder.used_layouts()
    # Two rows of three columns in each panel.
    assert encoder.image_tokens == layout.image_tokens == 6 * panels
    for panel in range(panels):
        first_row = [3 * panel, 3 * panel + 1, 3 * panel + 2]
        assert layout.tokens_of(panel).tolist() == first_row + [3 * panels + token for token in first_row]
    views = {name: view[None] for name, view in encoder.dataset.views(0).items()}
    latents = encoder.encode_views(views)["moments"]
    assert latents.shape[-2] * latents.shape[-1] // 4 == encoder.image_tokens


@pytest.fixture(scope="module")
def finer(base, tmp_path_factory) -> str:
    """The tiny FLUX Fill with a VAE whose latents are 4 times smaller than the picture instead of 8."""
    folder = tmp_path_factory.mktemp("finer")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = type(base.vae).from_config(base.vae.config, **blocks, block_out_channels=(8, 8, 16))
    transformer = type(base.transformer).from_config(
        base.transformer.config, in_channels=2 * 64 + 4 * 4**2, out_channels=64, guidance_embeds=False
    )
    type(base)(**{**base.components, "vae": vae, "transformer": transformer}).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("mode", SEMANTIC_MODES)
def test_another_factor_of_the_vae_and_no_guidance_embedding(finer, triptych_folder, tmp_path, mode, caplog):
    caplog.set_level(logging.INFO, logger="train_semantic_fill_lora")
    options = ["--max_train_steps", 1, "--loss_region", "target", "--semantic_mode", mode]
    options += ["--validation_steps", 1, "--validation_inference_steps", 1, "--num_validation_images", 1]
    out = run(finer, tmp_path, *options, data=triptych_folder)
    assert (out / "samples" / "step-000001.png").is_file()
    # A panel of 32x32 pixels has 4x4 tokens of 8x8.
    assert f"{16 * len(SEMANTIC_MODES[mode].panels)} image tokens" in caplog.text


def test_a_coarser_vae_needs_larger_multiples(base, triptych_folder, tmp_path):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
    vae = type(base.vae).from_config(base.vae.config, **blocks, block_out_channels=(8, 8, 8, 16, 16))
    type(base)(**{**base.components, "vae": vae}).save_pretrained(tmp_path / "coarser")
    with pytest.raises(ValueError, match="have to be multiples of 32 with this VAE but are .48, 48"):
        make_encoder(arguments(tmp_path / "coarser", tmp_path, data=triptych_folder, resolution=48))


def test_the_data_loader_gets_no_copy_of_the_encoders(base_folder, triptych_folder, tmp_path):
    """Workers read alone, and with them a batch is the same."""
    more = ["--random_flip", "--dataloader_num_workers"]
    batches = []
    for workers in (0, 2):
        assembled = assemble(arguments(base_folder, tmp_path, *more, workers, data=triptych_folder))
        assert SampleReader(assembled.encoder).encoder.pipeline is None and assembled.encoder.pipeline is not None
        batches.append(first_batch(assembled))
    assert torch.equal(batches[0].x_t, batches[1].x_t) and torch.equal(batches[0].x_cond, batches[1].x_cond)
