# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What several test files share: small triptychs, runs in this process and in processes of their own, and comparisons."""

import contextlib
import io
import itertools
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

import train_semantic_fill_lora as trainer
from semantic_fill.checkpoints import checkpoint_damage, checkpoint_step, list_checkpoints
from semantic_fill.checks import check_samples
from semantic_fill.data import TriptychDataset, load_datasets
from semantic_fill.engines import find_engine
from semantic_fill.options import DataOptions
from semantic_fill.sources import Source
from semantic_fill.tables import load_source


ROOT = Path(__file__).parent.parent
LORA_FILE = "pytorch_lora_weights.safetensors"
MODULE_FILE = "semantic_attention/diffusion_pytorch_model.safetensors"
ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


# -- Data -------------------------------------------------------------------------------------------------------------


def draw_triptych(seed: int, height: int = 32, width: int = 32) -> PIL.Image.Image:
    """Three different views of one random scene of colored blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    target = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    visible = np.repeat(target.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    semantic = (target > 127).astype(np.uint8) * 255
    return PIL.Image.fromarray(np.concatenate([visible, target, semantic], axis=1))


def write_triptychs(folder: Path, count: int = 6, height: int = 32, width: int = 32) -> Path:
    """An image folder of triptychs with captions, as `--train_data_dir` reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        draw_triptych(index, height, width).save(folder / f"{index:03d}.png")
        rows.append({"file_name": f"{index:03d}.png", "text": f"caption {index % 2}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_files(folder: Path, files: dict) -> Path:
    """Files by their path inside a folder: texts, bytes, or numbers for triptychs of their own in the file's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            draw_triptych(content).save(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def encode_picture(picture: PIL.Image.Image, form: str = "PNG", **options) -> bytes:
    """A picture file."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def png_of_zeros(width: int, height: int, bits: int = 8, color_type: int = 2) -> bytes:
    """A PNG file of a kind that Pillow does not write. Only the header of a huge one holds its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    rows = bytes(min(height * (1 + width * channels * bits // 8), 10**6))
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def read_dataset(options: DataOptions | None = None, source: Source | None = None, pairs=False, **more):
    """The checked data of options, or of `more` with views of 32x32 pixels. A `source` takes the place of what they name."""
    options = DataOptions(**{"resolution": 32} | more) if options is None else options
    source = load_source(options, pairs) if source is None else source
    return TriptychDataset(source, options, check_samples(source, options.width / options.resolution, pairs))


# -- Runs in this process ---------------------------------------------------------------------------------------------


def arguments(base_folder, output_dir, *more, data=None, resolution=32):
    """The options of a small run."""
    options = ["--pretrained_model_name_or_path", base_folder, "--output_dir", output_dir, "--resolution", resolution]
    options += "--rank 4 --max_sequence_length 16 --train_batch_size 2 --report_to none --mixed_precision no".split()
    options += ["--train_data_dir", data] if data else []
    return trainer.parse_args([str(option) for option in (*options, *more)])


def fresh_state() -> None:
    """Resets accelerate's state, which is a singleton."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(*args, **kwargs) -> Path:
    """A whole run in this process. Returns its output folder."""
    fresh_state()
    options = arguments(*args, **kwargs)
    trainer.main(options)
    return Path(options.output_dir)


def assemble(options, **kwargs) -> trainer.Run:
    """A run without its loop."""
    fresh_state()
    accelerator = Accelerator(cpu=True, mixed_precision=options.mixed_precision)
    return trainer.assemble(options, find_engine(accelerator, options), **kwargs)


def first_batch(run: trainer.Run) -> trainer.Batch:
    return run.make_batch(next(trainer.read_samples(run)[1]))


def first_loss(run: trainer.Run, backend=None) -> torch.Tensor:
    """
    The loss of a run's first batch, with a LoRA that is not zero, so that all that is trained has a gradient. A `backend`
    of `torch.compile` compiles the transformer's blocks.
    """
    transformer = run.engine.unwrap(run.model).transformer
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    if backend is not None:
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.compile(backend=backend, fullgraph=True)
    batch = first_batch(run)
    # Dropout draws from the global generator.
    torch.manual_seed(0)
    return trainer.compare(run.model(batch), batch, run.objective)


def gradients(run: trainer.Run) -> dict[str, torch.Tensor]:
    """The gradients of everything that is trained, by name."""
    return {name: p.grad for name, p in run.engine.unwrap(run.model).named_parameters() if p.requires_grad}


def spoil(monkeypatch, spoiled: dict) -> None:
    """Passes a run's losses, counted from 1, through functions."""
    compare, count = trainer.compare, itertools.count(1)

    def spoiled_compare(*args):
        return spoiled.get(next(count), lambda loss: loss)(compare(*args))

    monkeypatch.setattr(trainer, "compare", spoiled_compare)


def load_data(tmp_path, data, *more, resolution=32):
    """The data sets of a run's start in `tmp_path / "out"`: what is trained on, and what is held out."""
    fresh_state()
    options = arguments("unused", tmp_path / "out", *more, data=data, resolution=resolution)
    return load_datasets(options, Accelerator(cpu=True), pairs=options.semantic_mode == "none")


def sample_names(dataset: TriptychDataset) -> list[str]:
    return [dataset.source.name(index) for index in dataset.indices]


def pixels_of(view: torch.Tensor) -> np.ndarray:
    """A view `(3, height, width)` in [0, 1] as a picture's values."""
    return (view * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


# -- Runs in processes of their own -----------------------------------------------------------------------------------


def script(base_folder, data, output_dir, *more) -> list[str]:
    """The trainer's script and the options of a small run."""
    options = f"--mixed_precision no --pretrained_model_name_or_path {base_folder} --train_data_dir {data}"
    options += f" --output_dir {output_dir} --resolution 32 --rank 4 --max_sequence_length 16 --report_to none"
    return [str(ROOT / "train_semantic_fill_lora.py"), *options.split(), *map(str, more)]


def environment(tmp_path, **more):
    return os.environ | ON_CPU | {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)} | more


# -- Pages --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_browser():
    """A Chromium. Without playwright or a Chromium the test is skipped."""
    import demo_page

    pytest.importorskip("playwright.sync_api", reason="the pages are tested with playwright")
    if demo_page.find_browser() is None:
        pytest.skip("no Chromium on this machine: install one, or name it in the variable CHROMIUM")
    with demo_page.open_browser() as browser:
        yield browser


# -- Weights and checkpoints --------------------------------------------------------------------------------------------


def weights_of(folder, file=LORA_FILE) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(folder, file))


def assert_same_weights(a, b) -> None:
    """LoRA and module of two trained folders are equal bit for bit."""
    for file in (LORA_FILE, MODULE_FILE):
        first, second = weights_of(a, file), weights_of(b, file)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), file


def intact_checkpoints(out: Path) -> list[int]:
    """The steps of everything in a folder that is called a checkpoint, each of which is intact."""
    found = list_checkpoints(out)
    assert [checkpoint_damage(path) for path in found] == [None] * len(found)
    return [checkpoint_step(path) for path in found]


def reference_layers(model) -> list[dict]:
    """The weights of a `SemanticAttentionModel` under the names of the independent reference."""
    return [
        {
            "norm_x_weight": layer.norm_image.weight,
            "norm_x_bias": layer.norm_image.bias,
            "norm_s_weight": layer.norm_semantic.weight,
            "norm_s_bias": layer.norm_semantic.bias,
            "q_weight": layer.to_q.weight,
            "k_weight": layer.to_k.weight,
            "v_weight": layer.to_v.weight,
            "out_weight": layer.to_out.weight,
            "scale": layer.scale,
        }
        for layer in model.layers
    ]


def projection_layers(model) -> list[dict]:
    """The weights of a `SemanticProjectionModel` under the names of the independent reference."""
    return [{"weight": layer.linear.weight, "bias": layer.linear.bias, "scale": layer.scale} for layer in model.layers]
