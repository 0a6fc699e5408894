# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Fixtures that all tests share: a tiny FLUX Fill in the real layout, and small real triptychs on disk."""

import gc
import os
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "tests")]
# Nothing here may look anything up on the real Hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nor may a test leave compiled code in the cache of whoever runs it.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "semantic_fill_tests")))

# Imports make a million objects that stay. Garbage collections would search them over and over.
gc.disable()

import pytest  # noqa: E402
from adapter_helpers import make_expected, make_loras  # noqa: E402
from diffusers import FluxFillPipeline  # noqa: E402
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry  # noqa: E402
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # noqa: E402
from helpers import write_triptychs  # noqa: E402
from small_flux_fill import build_pipeline  # noqa: E402


def pytest_collection_finish():
    """All is imported. From now on collections look at what the tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def fresh_libraries():
    """
    Has the compiler forget the shapes that a test has shown it, which would change what later tests compile, and diffusers
    the attention that a test chose, which it takes for all later models.
    """
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True, scope="module")
def collected_models():
    """Frees the models of a file's tests: a model is few objects for a collection that counts them, but much memory."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def base() -> FluxFillPipeline:
    """A tiny FLUX Fill. All tests share it, so they may change copies only."""
    pipeline = build_pipeline("test", seed=0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def base_folder(base, tmp_path_factory) -> str:
    """The tiny FLUX Fill as a normal diffusers folder."""
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def triptych_folder(tmp_path_factory) -> str:
    return str(write_triptychs(tmp_path_factory.mktemp("triptychs")))


@pytest.fixture(scope="session")
def loras(base, tmp_path_factory) -> dict:
    """Trained LoRAs in several modes and an ordinary one, as `make_loras` names them."""
    return make_loras(base, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="session")
def expected(base, loras):
    """What the base paints with some of the LoRAs, found out without adapters."""
    return make_expected(base, loras)


@pytest.fixture
def posterior_mode(monkeypatch):
    """Latents without the random part of the VAE's posterior, as the reference takes them."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
