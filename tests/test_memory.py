# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""What is kept for backward, the estimate of a step's memory, the choice of `--fast`, and the advice after running out."""

import contextlib
import functools
import json
import re
import types
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from helpers import ROOT, arguments, assemble, first_loss, fresh_state, gradients, run
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from semantic_fill import memory, reports
from semantic_fill.engines import Engine, FSDP2Engine
from semantic_fill.memory import (
    CHECKPOINTING,
    Plan,
    Workload,
    choose_plan,
    estimate_parts,
    estimate_peak,
    memory_advice,
)
from semantic_fill.reports import announce, explain_out_of_memory


# -- Checkpointing ------------------------------------------------------------------------------------------------------


class CountProducts(TorchDispatchMode):
    """Counts attentions, and forward products over a sum that is longer than the LoRA's rank."""

    def __init__(self):
        super().__init__()
        self.products = self.attentions = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.attentions += "scaled_dot_product" in name and "backward" not in name
        self.products += name in ("addmm", "mm", "_int_mm") and args[-1].shape[-2] > 4
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gradients_with(base_folder, triptych_folder, tmp_path):
    """Returns the gradients of a batch with a way of checkpointing, and what backward computed for them."""

    def gradients_with(checkpointing, *more, backend=None, watch=None):
        options = ("--checkpointing", checkpointing, "--no-cache_latents", *more)
        built = assemble(arguments(base_folder, tmp_path, *options, data=triptych_folder))
        before_backward = watch(built.model.transformer) if watch else lambda: None
        loss = first_loss(built, backend)
        before_backward()
        # Under such a mode compiled blocks would be computed again eagerly, and keep other tensors than they did.
        with contextlib.nullcontext() if backend else CountProducts() as count:
            loss.backward()
        return gradients(built), count

    return gradients_with


def test_checkpointing_changes_what_is_recomputed_and_no_gradient(gradients_with, monkeypatch):
    monkeypatch.setattr(memory, "NARROW", 4)
    results = {name: gradients_with(name) for name in (*CHECKPOINTING, 0.4)}
    expected, without = results["none"]
    for name, (found, _) in results.items():
        assert all(torch.equal(found[n], expected[n]) for n in expected), name
    # Two blocks: one attention each, 6 + 2 + 4 and 5 LoRA layers whose base products are long, and the modulations.
    for name in ("full", "offload", "stream"):
        assert results[name][1].attentions == 2 and results[name][1].products - without.products >= 17
    # A share of the blocks, rounded up: one of the two.
    assert results[0.4][1].attentions == 1
    assert without.products < results[0.4][1].products < results["full"][1].products
    assert results["selective"][1].attentions == 0
    assert results["selective"][1].products == without.products


def test_selective_checkpointing_keeps_products_of_integers(gradients_with, monkeypatch):
    monkeypatch.setattr(memory, "NARROW", 4)
    options = "--base_precision", "int8mm", "--mixed_precision", "bf16"
    (expected, without), (got, count) = (gradients_with(name, *options) for name in ("none", "selective"))
    assert count.products == without.products > 0
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("checkpointing", ["selective", "full", "offload", 0.5])
def test_checkpointing_with_compiled_blocks(gradients_with, checkpointing):
    expected, _ = gradients_with("none")
    got, _ = gradients_with(checkpointing, backend="aot_eager")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("checkpointing", ["selective", "full", "offload", 0.5])
def test_recomputing_repeats_dropout(gradients_with, checkpointing):
    expected, _ = gradients_with("none", "--lora_dropout", 0.5)
    got, _ = gradients_with(checkpointing, "--lora_dropout", 0.5)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    # Dropout does something: without it, the gradients are others.
    without, _ = gradients_with(checkpointing)
    assert not all(torch.equal(got[name], without[name]) for name in expected)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("checkpointing", ["full", "offload"])
def test_offload_leaves_no_block_input_on_the_device(gradients_with, monkeypatch, checkpointing, backend):
    """The device is a CPU here too. So the hooks are made to copy, as they do from a GPU, and what is left is counted."""
    pinned, inputs, copied = [], [], []

    class Save(save_on_cpu):
        def __init__(self, pin_memory):
            pinned.append(pin_memory)
            super().__init__(pin_memory=True)
            pack = self.pack_hook
            self.pack_hook = lambda tensor: copied.append(tensor.shape) or pack(tensor)

    def watch(transformer):
        # The rehearsal of the run copied its own.
        copied.clear()
        checkpointed = transformer._gradient_checkpointing_func

        def note_inputs(block, *args):
            inputs.extend((tokens.shape, StorageWeakRef(tokens.untyped_storage())) for tokens in args[:2])
            return checkpointed(block, *args)

        transformer._gradient_checkpointing_func = note_inputs

        def before_backward():
            left = sum(not storage.expired() for _, storage in inputs)
            # Text and image tokens of two blocks.
            assert len(inputs) == 4 and left == (0 if checkpointing == "offload" else 4)

        return before_backward

    expected, _ = gradients_with("none")
    monkeypatch.setattr(memory, "save_on_cpu", Save)
    got, _ = gradients_with(checkpointing, backend=backend, watch=watch)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-5)
    # Nothing else is copied, as the embeddings are the same for all blocks. Only a GPU takes pinned memory.
    tokens = [shape for shape, _ in inputs] if checkpointing == "offload" else []
    assert sorted(shape for shape in copied if shape.numel()) == sorted(tokens) and not any(pinned)


def test_gradient_checkpointing_is_full():
    assert arguments("base", "out", "--gradient_checkpointing", data="d").checkpointing == "full"
    assert arguments("base", "out", data="d").checkpointing == "none"
    both = ("--gradient_checkpointing", "--checkpointing", "offload")
    assert arguments("base", "out", *both, data="d").checkpointing == "offload"


def test_attention_backend_reaches_every_block(base_folder, triptych_folder, tmp_path):
    options = ("--attention_backend", "_native_math", "--no-cache_latents")
    model = assemble(arguments(base_folder, tmp_path, *options, data=triptych_folder)).model
    backends = {processor._attention_backend for processor in model.transformer.attn_processors.values()}
    assert {backend.value for backend in backends} == {"_native_math"}


# -- The choice of --fast -----------------------------------------------------------------------------------------------


FLUX_FILL = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 384,
    "out_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "pooled_projection_dim": 768,
}
# What an estimate asks the encoder: image and text tokens, here at 512 pixels, and the dtype of the run.
BF16 = types.SimpleNamespace(vae=types.SimpleNamespace(dtype=torch.bfloat16))
FLUX_ENCODER = types.SimpleNamespace(image_tokens=2048, max_sequence_length=512, pipeline=BF16)


@pytest.fixture
def flux_folder(tmp_path):
    """FLUX.1-Fill-dev's configuration on disk, without weights."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(FLUX_FILL))
    return tmp_path


@functools.cache
def empty_flux():
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(FLUX_FILL)


def flux_workload(tokens=2560, dtype=torch.bfloat16, **more):
    options = {"batch_size": 4, "rank": 16, "use_8bit_adam": False, "ema_decay": None} | more
    return Workload(empty_flux(), 2048, tokens - 2048, dtype, **options)


@pytest.fixture
def choose(flux_folder, monkeypatch):
    """The choice for a GPU with so many free GiB, as far as the choice asks."""

    def choose(gibibytes, *more, capability=(9, 0), batch=4, cudnn=False, dtype=torch.bfloat16):
        monkeypatch.setattr(memory, "cudnn_attends", lambda *shape: cudnn)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gibibytes * 2**30, 0))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        more = ("--rank", 16, "--fast", "--train_batch_size", batch, *more)
        options = arguments(flux_folder, "out", *more, data="d")
        fixed = {name: getattr(options, name) for name in Plan.__dataclass_fields__}
        workload = replace(reports.workload(options, FLUX_ENCODER), dtype=dtype)
        return choose_plan(workload, fixed, torch.device("cuda", 0))

    return choose


def test_fast_takes_what_fits(choose):
    assert choose(139)[0] == Plan("fp8x2", "none", True)
    assert choose(78)[0] == Plan("fp8", "none", True)
    # On smaller cards as few blocks as possible are recomputed, and what it would take to recompute fewer is said.
    assert choose(70)[0] == Plan("fp8", 0.1, True)
    plan, reason = choose(46.2)
    assert plan == Plan("fp8", 0.5, True) and "--checkpointing 0.5 " in reason and "--checkpointing 0.4 " in reason
    assert choose(12, batch=1)[0] == Plan("nf4", 0.9, True)
    assert choose(7.1, batch=1)[0] == Plan("nf4", "stream", True)
    plan, reason = choose(4, batch=1)
    assert plan == Plan("nf4", "stream", True) and "nothing fits" in reason
    # An older GPU does not multiply fp8, and its attention is not tried.
    plan, reason = choose(139, capability=(8, 0), cudnn=True)
    assert plan == Plan("bf16", "none", True) and "no fp8 products" in reason


def test_what_tensors_hold_is_not_free(monkeypatch):
    """With --no-cache_latents the encoders hold memory, and the allocator keeps another GiB for later."""
    for name, gibibytes in (("memory_reserved", 11), ("memory_allocated", 10)):
        monkeypatch.setattr(torch.cuda, name, lambda device, gibibytes=gibibytes: gibibytes * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * 2**30, 0))
    assert memory.device_memory(torch.device("cuda", 0))[0] == 13 * 2**30


def test_fast_takes_cudnn_attention_where_it_works(choose):
    assert choose(78, cudnn=True)[0] == Plan("fp8", "none", True, "_native_cudnn")
    for options in (["--attention_backend", "native"], ["--no-compile"]):
        assert choose(78, *options, cudnn=True)[0].attention_backend == "native"


@pytest.mark.parametrize("options, warned", [([], True), (["--compile"], False)])
def test_cudnn_attention_without_compilation_is_warned_of(caplog, options, warned):
    options = arguments("base", "out", "--attention_backend", memory.CUDNN, *options, data="d")
    fresh_state()
    Accelerator(cpu=True)
    announce(types.SimpleNamespace(semantic_attention=None), options)
    assert ("--compile" in caplog.text) == warned


def test_a_trial_of_cudnn_that_dies_is_no_error():
    # There is no GPU of this number.
    assert not memory.cudnn_attends((1, 16, 16, 2, 16), torch.device("cuda", 99), torch.bfloat16)


def test_fast_leaves_what_was_passed(choose):
    passed = ("--base_precision", "nf4", "--checkpointing", "full", "--no-compile")
    assert choose(139, *passed)[0] == Plan("nf4", "full", False)
    assert choose(78, "--base_precision", "bf16")[0].base_precision == "bf16"


def test_fast_run_says_what_it_chose(base_folder, triptych_folder, tmp_path, caplog):
    with caplog.at_level("INFO", "train_semantic_fill_lora"):
        run(base_folder, tmp_path, "--fast", "--max_train_steps", 1, data=triptych_folder)
    (message,) = [record.message for record in caplog.records if "--fast chose" in record.message]
    flags = "--base_precision bf16 --checkpointing none --no-compile --attention_backend native"
    assert f"{flags}: cpu gains nothing" in message


# -- The estimate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, batch_size, tokens, use_8bit_adam, gibibytes",
    [
        (Plan("bf16", "full", False), 4, 2560, False, 28.8),
        (Plan("bf16", "none", False), 4, 2560, False, 83.2),
        (Plan("bf16", "full", True), 4, 2560, False, 27.7),
        (Plan("bf16", "full", False), 1, 2560, False, 24.5),
        (Plan("fp8", "none", True), 4, 2560, False, 72.1),
        (Plan("fp8", 0.3, True), 4, 2560, False, 53.0),
        (Plan("fp8", "full", True), 4, 2560, False, 17.0),
        (Plan("fp8x2", "none", True), 4, 2128, False, 73.1),
        (Plan("fp8x2", "none", True), 4, 2560, False, 83.2),
        (Plan("fp8x2", "full", True), 4, 2560, False, 28.1),
        (Plan("fp8", "full", True), 1, 2560, True, 12.9),
        (Plan("nf4", "offload", True), 1, 2560, True, 6.9),
        (Plan("bf16", "full", True), 1, 2560, True, 23.9),
        (Plan("int8", "full", True), 1, 2560, True, 13.0),
        (Plan("nf4", "full", True), 1, 2560, True, 7.53),
    ],
)
def test_estimate_agrees_with_what_was_measured(plan, batch_size, tokens, use_8bit_adam, gibibytes):
    estimate = (
        estimate_parts(plan, flux_workload(tokens, batch_size=batch_size, use_8bit_adam=use_8bit_adam))["training"]
        / 2**30
    )
    assert estimate == pytest.approx(gibibytes, rel=0.08)


@pytest.mark.parametrize("visible_gradients, gibibytes", [(True, 96.4), (False, 55.2)])
def test_estimate_agrees_with_what_was_measured_of_causal_runs(visible_gradients, gibibytes):
    workload = flux_workload(visible_attention="causal", visible_gradients=visible_gradients)
    estimate = estimate_parts(Plan("fp8x2", "none", True), workload)["training"] / 2**30
    assert estimate == pytest.approx(gibibytes, rel=0.03)


@pytest.mark.parametrize(
    "plan, batch_size, use_8bit_adam, gibibytes",
    [
        (Plan("nf4", "stream", True), 1, False, 7.15),
        (Plan("nf4", 0.9, True), 1, False, 10.47),
        (Plan("nf4", 0.6, True), 1, True, 14.42),
        # This one ran out of memory, so it needs more.
        (Plan("nf4", 0.5, True), 1, True, 15.38),
        (Plan("fp8", "full", True), 4, False, 19.64),
        (Plan("fp8", 0.5, True), 4, False, 45.47),
    ],
)
def test_estimate_is_enough_for_the_cards_that_were_measured(plan, batch_size, use_8bit_adam, gibibytes):
    workload = flux_workload(batch_size=batch_size, use_8bit_adam=use_8bit_adam)
    estimate = estimate_peak(plan, workload) / 2**30
    assert gibibytes < estimate < 1.15 * gibibytes


def test_the_documented_table_of_cards_is_the_estimate(flux_folder):
    pages = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    row = r"^\| (\d+)[^|]* \| (\d) \| `([^`]*)`[^|]* \| ([\d.]+) \| ([\d.]*)"
    table = re.findall(row, "\n".join(pages), re.MULTILINE)
    assert {8, 12, 16, 24, 48, 80} <= {int(card) for card, *_ in table}
    for card, batch, flags, gibibytes, measured in table:
        more = ("--rank", 16, "--mixed_precision", "bf16", "--train_batch_size", batch, *flags.split())
        options = arguments(flux_folder, "out", *more, data="d")
        plan = Plan(options.base_precision, options.checkpointing, options.compile)
        estimate = estimate_peak(plan, reports.workload(options, FLUX_ENCODER)) / 2**30
        assert f"{estimate:.1f}" == gibibytes and float(measured or 0) <= estimate < int(card), flags


@pytest.mark.parametrize("more", ["", "--ema_decay 0.9", "--optimizer prodigy", "--optimizer prodigy --ema_decay 0.9"])
def test_the_estimate_counts_what_the_optimizer_keeps(base_folder, triptych_folder, tmp_path, more):
    options = arguments(base_folder, tmp_path, "--no-cache_latents", *more.split(), data=triptych_folder)
    built = assemble(options)
    first_loss(built).backward()
    built.engine.step(built.optimizer, finite=True)
    states = [value for state in built.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    trained = [parameter for group in built.optimizer.param_groups for parameter in group["params"]]
    kept, weights = (sum(tensor.nbytes for tensor in tensors) for tensors in (states, trained))
    workload, plan = reports.workload(built.options, built.encoder), Plan("bf16", "none", False)
    with_lora, without = (estimate_parts(plan, replace(workload, rank=rank)) for rank in (4, 0))
    # Loading has the weights alone, and a step their gradients and the optimizer's states too.
    training, loading = (with_lora[part] - without[part] for part in ("training", "loading"))
    assert training / loading == pytest.approx((2 * weights + kept) / weights, rel=0.02)


def test_the_estimate_of_a_base_in_float32(choose):
    full = Plan("bf16", "full", False)
    half, whole = (estimate_parts(full, flux_workload(dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    # A base that is not quantized is in the dtype of the run, and so is what is kept and painted.
    assert whole["loading"] > 11.9e9 * 4 and whole["training"] > 1.9 * half["training"]
    assert choose(47)[0].base_precision == "fp8" and choose(47, dtype=torch.float32)[0].base_precision == "int8"
    flags = flags_in(memory_advice(full, flux_workload(dtype=torch.float32), accumulation_steps=1))
    assert flags["--mixed_precision bf16"] > 24 and "--mixed_precision bf16" not in flags_in(
        memory_advice(full, flux_workload(), accumulation_steps=1)
    )


# -- Out of memory ------------------------------------------------------------------------------------------------------


def flags_in(advice: str) -> dict[str, float]:
    """Flags and GiB, in the order of the advice."""
    return {flags: float(saved) for flags, saved in re.findall(r"^  (--.*): about ([\d.]+) GiB$", advice, re.M)}


def test_memory_advice_names_flags_that_exist_and_what_they_save():
    default = Plan("bf16", "none", compile=False)
    flags = flags_in(memory_advice(default, flux_workload(), accumulation_steps=3, encoder_bytes=10 * 2**30))
    saved = list(flags.values())
    assert saved == sorted(saved, reverse=True) and flags["--cache_latents"] == 10
    expected = {f"--checkpointing {name}" for name in CHECKPOINTING if name != "none"}
    assert expected | {"--base_precision nf4", "--use_8bit_adam"} <= set(flags) and "--checkpointing none" not in flags
    # The bits of 11.8 billion weights.
    assert flags["--base_precision nf4"] == pytest.approx(11.8e9 * (16 - 4) / 8 / 2**30, rel=0.05)
    # The flags are accepted, and as many samples are in a step as before.
    accepted = arguments("base", "out", "--no-cache_latents", *" ".join(flags).split(), data="d")
    assert (accepted.train_batch_size, accepted.gradient_accumulation_steps) == (1, 12)
    # What a flag saves is the difference of two estimates.
    full = estimate_peak(default, flux_workload()) - estimate_peak(Plan("bf16", "full", False), flux_workload())
    assert flags["--checkpointing full"] == pytest.approx(full / 2**30, abs=0.01)


def test_memory_advice_leaves_out_what_a_run_does_already():
    everything = Plan("nf4", "stream", compile=True)
    least = flux_workload(batch_size=1, use_8bit_adam=True)
    assert "Every flag that saves memory is in use" in memory_advice(everything, least, accumulation_steps=1)
    # Another optimizer has no states of 8 bits.
    prodigy = flux_workload(batch_size=1, use_8bit_adam=None)
    assert "--use_8bit_adam" not in memory_advice(Plan("bf16", "none", False), prodigy, accumulation_steps=1)


def test_with_fsdp2_the_advice_names_no_flag_that_it_refuses(flux_folder):
    options = arguments(flux_folder, "out", "--no-cache_latents", data="d")
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2"), torch.nn.Linear(1, 1))
    encoder = types.SimpleNamespace(**vars(FLUX_ENCODER) | {"pipeline": types.SimpleNamespace(**parts)})
    parts["vae"].dtype = torch.bfloat16
    flags = {}
    for engine in (Engine, FSDP2Engine):
        with pytest.raises(torch.OutOfMemoryError) as error, explain_out_of_memory(options, encoder, engine):
            raise torch.OutOfMemoryError("no room")
        flags[engine] = flags_in(str(error.value)).keys()
    refused = {name.split()[0] for name in flags[Engine] - flags[FSDP2Engine]}
    assert refused == {"--base_precision", "--use_8bit_adam"} and "--checkpointing full" in flags[FSDP2Engine]
