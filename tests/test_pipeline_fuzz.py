# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Arguments of the pipeline at random: a `ValueError` names a wrong one before a step is made, and unusual ones are taken."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import draw_triptych, encode_picture, png_of_zeros
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline_flux_fill_semantic import FluxFillSemanticPipeline
from semantic_attention import SemanticAttentionModel


def fuzz(examples: int):
    """The same examples in each run of the tests."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=health)


NAN = float("nan")
CUT = encode_picture(draw_triptych(0))[:200]


def pictures() -> st.SearchStrategy:
    """Anything but a picture of 32 x 32. Each example makes it anew, because reading a damaged file changes it."""
    return st.sampled_from(
        [
            lambda: PIL.Image.open(io.BytesIO(CUT)),
            lambda: PIL.Image.new("RGB", (0, 0)),
            lambda: PIL.Image.new("I;16", (32, 32)),
            lambda: PIL.Image.open(io.BytesIO(png_of_zeros(32, 32, 16))),
            lambda: PIL.Image.new("RGB", (33, 32)),
            lambda: np.zeros((32, 32, 3), np.complex64),
            lambda: np.full((32, 32, 3), 2.0),
            lambda: np.array([["a"]]),
            lambda: np.array(None),
            lambda: np.zeros((32, 32, 4)),
            lambda: np.zeros((0, 32, 3)),
            lambda: torch.full((3, 32, 32), NAN),
            lambda: torch.zeros(2, 32),
            lambda: torch.zeros(3, 48, 0),
            lambda: [torch.zeros(3, 32, 32), torch.zeros(3, 48, 32)],
            lambda: [],
            lambda: "picture.png",
            lambda: 3,
        ]
    ).map(lambda make: make())


# The arguments that the stock pipeline does not have, and `image`, which it reads otherwise.
ARGUMENTS = {
    "image": pictures(),
    "semantic_image": pictures(),
    "semantic_scale": st.sampled_from([NAN, float("inf"), "1", [1.0], None, torch.ones(2), 1j]),
}


@pytest.fixture(scope="module")
def pipe(base) -> FluxFillSemanticPipeline:
    module = SemanticAttentionModel()
    torch.nn.init.ones_(module.layers[0].scale)
    pipe = FluxFillSemanticPipeline(**base.components, semantic_attention=module.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, **changes):
    picture = torch.zeros(3, 32, 32)
    arguments = {"prompt": "x", "image": picture, "semantic_image": picture, "num_inference_steps": 1}
    return pipe(**arguments | {"max_sequence_length": 16, "output_type": "latent"} | changes)


@pytest.fixture
def no_step(pipe, monkeypatch):
    def step(*args, **kwargs):
        raise AssertionError("a step was made")

    monkeypatch.setattr(pipe.transformer, "forward", step)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_are_named_before_any_step(pipe, no_step, name):
    @fuzz(25)
    @given(value=ARGUMENTS[name])
    def check(value):
        with pytest.raises(ValueError) as error:
            call(pipe, **{name: value})
        assert name in str(error.value)

    check()


@fuzz(20)
@given(
    prompt=st.one_of(st.just(""), st.just("x" * 10_000), st.text(max_size=30)),
    seed=st.integers(0, 2**32),
    scale=st.floats(-2, 2),
    mode=st.sampled_from(["RGB", "RGBA", "CMYK", "L", "P"]),
)
def test_unusual_arguments_are_taken(pipe, prompt, seed, scale, mode):
    picture = draw_triptych(0).crop((0, 0, 32, 32)).convert(mode)
    generator = torch.Generator().manual_seed(seed)
    more = {"prompt": prompt, "semantic_scale": scale, "image": picture, "semantic_image": picture}
    assert call(pipe, generator=generator, **more).images.isfinite().all()
