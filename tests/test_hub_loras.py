# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""LoRAs of all kinds from the Hub: trained ones with their modules, and those of others under names of their own."""

import safetensors.torch
import torch
from helpers import ROOT
from hub_server import HubServer
from pipeline_helpers import Trained
from quick_python import run_python


CLIENT = """
import sys
from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, read_trained_settings
pipe = FluxFillSemanticPipeline.from_pretrained(sys.argv[1])
pipe.load_lora_weights("user/style", adapter_name="style")
assert not pipe.semantic_adapters and pipe.semantic_attention is None
pipe.load_lora_weights("user/trained", adapter_name="trained")
pipe.load_lora_weights("user/trained", subfolder="old", weight_name="own.safetensors", adapter_name="old")
assert pipe.get_list_adapters() == {"transformer": ["style", "trained", "old"]}, pipe.get_list_adapters()
modes = {name: (a.semantic_mode, a.module is not None) for name, a in pipe.semantic_adapters.items()}
assert modes == {"trained": ("projection", True), "old": ("in_context", False)}, modes
assert read_trained_settings("user/style") == read_trained_settings("user/empty") == {}
try:
    pipe.load_lora_weights("user/empty")
except FileNotFoundError as error:
    assert "user/empty" in str(error)
else:
    raise AssertionError("There is nothing to load.")
"""


def test_loras_of_all_kinds_come_from_the_hub(base, base_folder, tmp_path):
    trained = Trained(base, tmp_path / "trained", seed=0, semantic_mode="projection")
    old = Trained(base, tmp_path / "old", seed=1, semantic_mode="in_context")
    style = {
        "transformer.proj_out.lora_A.weight": torch.ones(2, 32),
        "transformer.proj_out.lora_B.weight": torch.ones(64, 2),
    }
    files = {
        p.relative_to(trained.folder).as_posix(): p.read_bytes() for p in trained.folder.rglob("*") if p.is_file()
    }
    (lora,) = old.folder.iterdir()
    with HubServer() as hub:
        hub.add_repo("user/trained", files | {"old/own.safetensors": lora.read_bytes()})
        hub.add_repo("user/style", {"README.md": b"A style.", "style.safetensors": safetensors.torch.save(style)})
        hub.add_repo("user/empty", {"README.md": b"Nothing."})
        done = run_python("-c", CLIENT, base_folder, env=hub.environment(tmp_path) | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
