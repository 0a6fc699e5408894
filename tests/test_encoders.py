# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""How the encoders take turns on the device or are streamed through it, and how long the prompts are that they encode."""

import copy
import json
import types

import accelerate
import pytest
import safetensors
import torch
import torch.nn as nn
from helpers import LORA_FILE, arguments, assert_same_weights, fresh_state, read_dataset, run, write_triptychs
from transformers import T5Config, T5EncoderModel

from pipeline_flux_fill_semantic import SEMANTIC_METADATA_KEY, FluxFillSemanticPipeline
from semantic_fill import encoding
from semantic_fill.encoding import Encoder, count_tokens, load_encoders, longest_prompt, offload_encoders
from semantic_fill.memory import parameter_bytes


# -- Memory -------------------------------------------------------------------------------------------------------------


def test_encoders_take_turns_on_the_device(base_folder, triptych_folder, tmp_path, monkeypatch):
    """As a run fills its cache, hooks move one model to the device, and the previous one away for it."""
    moves = []
    pre_forward = accelerate.hooks.CpuOffload.pre_forward

    def note_move(hook, module, *args, **kwargs):
        before = hook.prev_module_hook
        moves.append((type(module).__name__, before and type(before.model).__name__))
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", note_move)
    run(base_folder, tmp_path, "--max_train_steps", 1, data=triptych_folder)
    # Two captions and the empty one, then three pictures for each of six rows. T5, by far the largest, moves once.
    assert moves == 3 * [("CLIPTextModel", None), ("T5EncoderModel", "CLIPTextModel")] + 18 * [
        ("AutoencoderKL", "T5EncoderModel")
    ]


@pytest.fixture
def large_t5(base):
    """A T5 that is larger than the other encoders together, as FLUX's is."""
    torch.manual_seed(0)
    config = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 512,
        "num_layers": 8,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    t5 = T5EncoderModel(T5Config(vocab_size=base.text_encoder_2.config.vocab_size, **config)).eval()
    assert parameter_bytes([t5]) > parameter_bytes([base.text_encoder, base.vae])
    return t5


@pytest.fixture
def fill(large_t5, base_folder, triptych_folder, tmp_path, monkeypatch):
    """Fills a cache as a run does on a device with so much room. Returns what was written, and the pipeline."""

    def fill(room):
        monkeypatch.setattr(encoding, "device_memory", lambda device: (2 * room, room))
        options = arguments(base_folder, tmp_path, data=triptych_folder)
        fresh_state()
        accelerator = accelerate.Accelerator(cpu=True)
        pipeline = load_encoders(options, torch.float32)
        pipeline.text_encoder_2 = copy.deepcopy(large_t5)
        dataset = read_dataset(options)
        encoder = Encoder(pipeline, dataset, options.max_sequence_length, tmp_path / str(room))
        encoder.fill_cache(accelerator, encoder.specs())
        return {path.name: path.read_bytes() for path in encoder.folder.glob("*.safetensors")}, pipeline

    return fill


def test_what_does_not_fit_the_device_is_streamed_with_the_same_result(base, large_t5, fill, monkeypatch, caplog):
    size = parameter_bytes([large_t5])
    # How much of T5 is on the device whenever one of its layers computes.
    present, t5_layers = [], {}
    forward = nn.Linear.forward

    def forward_and_note(layer, x):
        if id(layer) in t5_layers:
            weights = t5_layers[id(layer)].parameters()
            present.append(sum(weight.numel() * weight.element_size() for weight in weights if not weight.is_meta))
        return forward(layer, x)

    def offload_and_note(pipeline, device):
        offload_encoders(pipeline, device)
        t5_layers.clear()
        t5_layers.update({id(module): pipeline.text_encoder_2 for module in pipeline.text_encoder_2.modules()})

    monkeypatch.setattr(nn.Linear, "forward", forward_and_note)
    monkeypatch.setattr(encoding, "offload_encoders", offload_and_note)
    with caplog.at_level("INFO", "semantic_fill"):
        fitting, _ = fill(size)
        assert set(present) == {size} and "streamed" not in caplog.text
        present.clear()
        streamed, pipeline = fill(size - 1)
    linear = [module for module in pipeline.text_encoder_2.modules() if isinstance(module, nn.Linear)]
    # Two captions and the empty one.
    largest = max(parameter_bytes([layer]) for layer in linear)
    assert len(present) == 3 * len(linear) and max(present) == largest < size / 10
    (message,) = [record.message for record in caplog.records if "streamed" in record.message]
    assert "text_encoder_2 is streamed through cpu layer by layer" in message
    assert not any(p.is_meta for part in (pipeline.text_encoder, pipeline.vae) for p in part.parameters())
    # Two files of each sample and one of each prompt. A byte makes the difference, and only to where the weights are.
    assert len(fitting) == 15 and streamed == fitting
    pipeline.remove_all_hooks()
    originals = {"text_encoder": base.text_encoder, "text_encoder_2": large_t5, "vae": base.vae}
    for name, original in originals.items():
        part = getattr(pipeline, name)
        assert not any(hasattr(module, "_hf_hook") for module in part.modules())
        after, before = part.state_dict(), original.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    # Where there is no room at all, all of them are streamed.
    everything, pipeline = fill(-1)
    assert everything == fitting
    assert all(p.is_meta for part in (pipeline.text_encoder, pipeline.vae) for p in part.parameters())


def test_a_run_that_streams_its_encoders_trains_the_same(base_folder, triptych_folder, tmp_path, monkeypatch):
    fitting = run(base_folder, tmp_path / "fitting", "--max_train_steps", 1, data=triptych_folder)
    offloaded = []
    monkeypatch.setattr(encoding, "device_memory", lambda device: (0, 0))
    monkeypatch.setattr(encoding, "cpu_offload", lambda *args: offloaded.append(accelerate.cpu_offload(*args)))
    streamed = run(base_folder, tmp_path / "streamed", "--max_train_steps", 1, data=triptych_folder)
    assert_same_weights(fitting, streamed)
    assert [type(part).__name__ for part in offloaded] == ["CLIPTextModel", "T5EncoderModel", "AutoencoderKL"]
    assert not any(hasattr(module, "_hf_hook") for module in offloaded[-1].modules())


@pytest.mark.parametrize(
    "device, gibibytes, dtype, streamed",
    [
        ("cuda", 7.6, torch.bfloat16, True),
        ("cuda", 11.6, torch.bfloat16, False),
        ("cuda", 15.5, torch.float32, True),
        ("cuda", 22, torch.float32, False),
        ("cpu", 0, torch.float32, False),
    ],
)
def test_whether_t5_is_streamed_depends_on_bytes(monkeypatch, device, gibibytes, dtype, streamed):
    """FLUX's T5 has 8.9 GiB in bf16. The cards have 8, 12, 16 and 24 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(gibibytes * 2**30), 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    config = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **config)).to(dtype)
    asked = []
    monkeypatch.setattr(encoding, "cpu_offload", lambda part, device: asked.append(part))
    small = types.SimpleNamespace(parameters=lambda: [], to=lambda device: None)
    pipeline = types.SimpleNamespace(
        text_encoder=small,
        text_encoder_2=t5,
        vae=small,
        enable_model_cpu_offload=lambda device: asked.append("turns"),
        remove_all_hooks=lambda: None,
        to=lambda *args, **kwargs: None,
    )
    # Accelerate's loggers need a state.
    fresh_state()
    accelerate.PartialState()
    offload_encoders(pipeline, torch.device(device))
    assert asked == ([t5] if streamed else ["turns"])


# -- Prompt length ------------------------------------------------------------------------------------------------------


def test_prompts_as_long_as_the_longest_and_painting_uses_the_same(base_folder, tmp_path, monkeypatch):
    data = write_triptychs(tmp_path / "data", 2)
    metadata = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(metadata.replace("caption 0", "a longer caption"))
    more = ("--max_train_steps", 1, "--max_sequence_length", "auto")
    out = run(base_folder, tmp_path / "out", *more, data=data)
    # The tiny tokenizer takes a token for each of the 16 letters, the mark before them and the end: rounded up, 32.
    with safetensors.safe_open(out / LORA_FILE, "pt") as file:
        assert json.loads(file.metadata()[SEMANTIC_METADATA_KEY])["max_sequence_length"] == 32
    pipe = FluxFillSemanticPipeline.from_pretrained(base_folder)
    pipe.set_progress_bar_config(disable=True)
    lengths = []
    encode = pipe._get_t5_prompt_embeds
    monkeypatch.setattr(
        pipe, "_get_t5_prompt_embeds", lambda **kw: lengths.append(kw["max_sequence_length"]) or encode(**kw)
    )
    image = torch.rand(1, 3, 32, 32)

    def paint(guided=True, **more):
        pipe("x", image=image, semantic_image=image if guided else None, num_inference_steps=1, **more)

    paint(guided=False)
    pipe.load_lora_weights(str(out))
    paint()
    paint(max_sequence_length=48)
    pipe.unload_lora_weights()
    paint(guided=False)
    assert lengths == [512, 32, 48, 512]


def test_longest_prompt(base):
    for captions, expected in ((["a", "b" * 30], 32), (["b" * 31], 48), (["a" * 2000], 512)):
        # The tiny tokenizer takes a token for each letter, the mark before them and the end.
        lengths = count_tokens(base.tokenizer_2, captions)
        assert lengths == {caption: len(caption) + 2 for caption in captions}
        assert longest_prompt(lengths.values()) == expected


def test_captions_that_are_cut_are_counted_and_the_longest_is_shown(base_folder, tmp_path, caplog):
    data = write_triptychs(tmp_path / "data", 4)
    captions = ["short", "a" * 14, "b" * 15, "c" * 20]
    rows = [{"file_name": f"{index:03d}.png", "text": caption} for index, caption in enumerate(captions)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with caplog.at_level("INFO", "semantic_fill"):
        run(base_folder, tmp_path / "cut", "--max_train_steps", 1, data=data)
    said = [record.getMessage() for record in caplog.records if "--max_sequence_length" in record.getMessage()]
    # Two tokens are no letters, so that 14 letters just fit into 16.
    assert len(said) == 1 and "2 of 4 captions are longer than the 16 tokens" in said[0]
    assert f"The longest has 22 tokens: {'c' * 20!r}" in said[0]
    caplog.clear()
    with caplog.at_level("INFO", "semantic_fill"):
        more = ("--max_train_steps", 1, "--max_sequence_length", "auto")
        run(base_folder, tmp_path / "fitting", *more, data=data)
    assert "longer than" not in caplog.text and "Prompts are 32 tokens long" in caplog.text
    # No prompt of FLUX has more than 512, so these two are cut even where the data decides.
    rows = [{"file_name": f"{index:03d}.png", "text": "xyxy"[index] * 600} for index in range(4)]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    caplog.clear()
    with caplog.at_level("INFO", "semantic_fill"):
        run(base_folder, tmp_path / "long", *more, data=data)
    assert "2 of 2 captions are longer than the 512 tokens" in caplog.text
