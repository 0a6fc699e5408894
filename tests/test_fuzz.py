# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Bad input, at random: refused by a `ValueError` that names the row or the argument, before a step is made."""

import io
import struct
import zlib

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import draw_triptych, write_triptychs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import arguments

import train_semantic_fill_lora as trainer
from pipeline_flux_fill_semantic import FluxFillSemanticPipeline, to_rgb


def fuzz(examples: int):
    """The same examples in each run of the tests."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=health)


# -- Rows --------------------------------------------------------------------------------------------------------------


def encoded(picture: PIL.Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width: int = 60_000, height: int = 20_000) -> bytes:
    """The head of a PNG file, of a billion pixels at first, which would be small if they were all alike."""
    return png(width, height, 8, 2, bytes(1000))


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@st.composite
def good_pictures(draw):
    triptych = draw_triptych(draw(st.integers(0, 9)), height=8 * draw(st.integers(1, 5)))
    mode = draw(st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"]))
    forms = {"CMYK": ["TIFF", "JPEG"], "YCbCr": ["JPEG"]}.get(mode, ["PNG", "TIFF"])
    return encoded(triptych.convert(mode), draw(st.sampled_from(forms)))


@st.composite
def bad_pictures(draw):
    whole = encoded(draw_triptych(draw(st.integers(0, 9))))
    kinds = ["cut", "noise", "empty", "no pixels", "panels", "16 bit", "float", "animated", "bomb", "no cell"]
    kind = draw(st.sampled_from(kinds))
    if kind == "cut":
        # The last 12 bytes of a PNG file hold nothing of the picture.
        return whole[: draw(st.integers(0, len(whole) - 20))]
    if kind == "noise":
        return draw(st.binary(max_size=64))
    if kind == "panels":
        return encoded(PIL.Image.new("RGB", (draw(st.sampled_from([1, 2, 95, 97])), 32)))
    if kind == "animated":
        frames = [draw_triptych(seed) for seed in range(2)]
        form = draw(st.sampled_from(["GIF", "PNG", "WEBP", "TIFF"]))
        return encoded(frames[0], form, save_all=True, append_images=frames[1:])
    if kind == "16 bit" and draw(st.booleans()):
        # Grey, RGB, grey with alpha, RGBA: Pillow writes only the first.
        colour_type, channels = draw(st.sampled_from([(0, 1), (2, 3), (4, 2), (6, 4)]))
        return png(96, 32, 16, colour_type, (b"\0" + bytes(96 * channels * 2)) * 32)
    if kind == "16 bit":
        return encoded(PIL.Image.new("I;16", (96, 32)), draw(st.sampled_from(["PNG", "TIFF"])))
    if kind == "float":
        value = draw(st.sampled_from([0.5, float("nan"), float("inf")]))
        return encoded(PIL.Image.new("F", (96, 32), value), "TIFF")
    if kind == "no pixels":
        return bomb(*draw(st.sampled_from([(0, 32), (96, 0), (0, 0)])))
    return {"empty": b"", "bomb": bomb(), "no cell": None}[kind]


good_captions = st.one_of(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip), st.just("x" * 10_000)
)
bad_captions = st.sampled_from([None, "", "  ", "\n"])


@fuzz(60)
@given(
    rows=st.lists(
        st.tuples(
            st.one_of(good_pictures().map(lambda p: (p, True)), bad_pictures().map(lambda p: (p, False))),
            st.one_of(good_captions.map(lambda c: (c, True)), bad_captions.map(lambda c: (c, False))),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_rows_are_used_or_named(rows, base_folder):
    columns = {"image": [picture for (picture, _), _ in rows], "text": [caption for _, (caption, _) in rows]}
    bad = {index for index, ((_, picture), (_, caption)) in enumerate(rows) if not (picture and caption)}
    args = arguments(base_folder, "unused", "--caption_column", "text", data="unused")
    check_rows(columns, bad, args)


def check_rows(columns: dict[str, list], bad: set[int], args) -> None:
    """Rows of encoded pictures and captions are used, or those in `bad` are named."""
    texts, names = columns["text"], [name for name in columns if name != "text"]
    cells = {n: [None if data is None else {"bytes": data, "path": None} for data in columns[n]] for n in names}
    features = datasets.Features(
        dict.fromkeys(names, datasets.Image(decode=False)) | {"text": datasets.Value("string")}
    )
    table = datasets.Dataset.from_dict(cells | {"text": texts}, features=features)
    if bad:
        with pytest.raises(ValueError) as error:
            trainer.TriptychDataset(table, args)
        lines = str(error.value).splitlines()
        assert lines[0] == f"{len(bad)} of {len(texts)} rows cannot be used:"
        assert {int(line.split(":")[0].removeprefix("  row ")) for line in lines if line.startswith("  row ")} == bad
    else:
        dataset = trainer.TriptychDataset(table, args)
        for index in range(len(texts)):
            views = dataset.views(index)
            assert all(view.shape == (3, 32, 32) and 0 <= view.min() <= view.max() <= 1 for view in views.values())
            assert dataset.caption(index) == texts[index]


NAMES = ("photo", "thermal", "map")


@fuzz(40)
@given(
    rows=st.lists(
        st.lists(
            # Sizes that are used are those of all three.
            st.one_of(
                st.sampled_from([32, 32, 48]).map(lambda side: (encoded(PIL.Image.new("RGB", (side, side))), side)),
                st.sampled_from(
                    [(data, 0) for data in (b"", None, bomb(), bomb(0, 32), encoded(draw_triptych(0))[:99])]
                ),
            ),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_views_of_three_pictures_are_used_or_named(rows, base_folder):
    columns = {name: [row[i][0] for row in rows] for i, name in enumerate(NAMES)} | {"text": ["a"] * len(rows)}
    bad = {index for index, row in enumerate(rows) if len({side for _, side in row}) > 1 or row[0][1] == 0}
    options = [
        word for pair in zip(("--visible_column", "--target_column", "--semantic_column"), NAMES) for word in pair
    ]
    check_rows(columns, bad, arguments(base_folder, "unused", "--caption_column", "text", *options, data="unused"))


def test_a_decompression_bomb_is_refused_by_its_head():
    with pytest.raises(PIL.Image.DecompressionBombError):
        trainer.decode_picture(bomb())
    # Between one and two times the limit Pillow only warns.
    with pytest.raises(PIL.Image.DecompressionBombWarning):
        trainer.decode_picture(bomb(10_000, 10_000))


PICTURE = {"bytes": encoded(draw_triptych(0)), "path": None}


@pytest.mark.parametrize(
    "columns, more, named",
    [
        ({"image": [1, 2], "text": ["a", "b"]}, [], "Column `image` has to hold pictures but holds"),
        ({"image": ["no such file"] * 2, "text": ["a", "b"]}, [], "row 0: FileNotFoundError"),
        ({"picture": [1, 2], "text": ["a", "b"]}, [], "Column `image` is not in the data set"),
        ({"image": [None, None], "caption": ["a", "b"]}, [], "Pass --caption_column"),
        ({"image": [None, None], "text": ["a", "b"]}, ["--caption_column", "c"], "Column `c` is not in the data set"),
        ({"image": [None, None], "text": ["a", "b"]}, [], "row 1: ValueError: has no picture"),
        (
            {"image": [PICTURE, PICTURE], "text": [["a"], ["b"]]},
            [],
            "row 1: ValueError: has no caption in `text` (found",
        ),
        ({"image": [PICTURE, PICTURE], "text": [1, 2]}, [], "row 1: ValueError: has no caption in `text` (found 2)"),
        ({"image": [], "text": []}, [], "has to hold rows in parquet files, but"),
    ],
)
def test_columns_that_are_missing_or_of_another_type(base_folder, tmp_path, columns, more, named):
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    args = arguments(base_folder, "unused", "--dataset_name", tmp_path, "--cache_dir", tmp_path / "hf", *more)
    with pytest.raises(ValueError) as error:
        trainer.TriptychDataset(trainer.load_rows(args), args)
    assert named in str(error.value)


@pytest.mark.parametrize("fault", ["missing", "empty", "no metadata", "no picture", "no JSON"])
def test_folders_that_hold_no_triptychs(base_folder, tmp_path, fault):
    data = tmp_path / "data"
    if fault != "missing":
        data.mkdir()
    if fault not in ("missing", "empty"):
        write_triptychs(data, 2)
    if fault == "no metadata":
        (data / "metadata.jsonl").unlink()
    if fault == "no picture":
        (data / "001.png").unlink()
    if fault == "no JSON":
        (data / "metadata.jsonl").write_text("{")
    args = arguments(base_folder, "unused", "--cache_dir", tmp_path / "hf", data=data)
    with pytest.raises(ValueError, match="--train_data_dir|--caption_column|row 1: FileNotFoundError"):
        trainer.TriptychDataset(trainer.load_rows(args), args)


def test_a_data_set_that_cannot_be_had_is_named(base_folder, tmp_path):
    args = arguments(base_folder, "unused", "--dataset_name", "user/none", "--cache_dir", tmp_path)
    with pytest.raises(ValueError, match="--dataset_name user/none cannot be loaded: "):
        trainer.load_rows(args)


def test_pictures_are_converted_as_they_look():
    red = PIL.Image.new("RGB", (4, 4), (255, 0, 0))
    for mode in ("CMYK", "P", "RGBA"):
        assert to_rgb(red.convert(mode)).getpixel((0, 0)) == (255, 0, 0), mode
    clear = PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (128, 128, 128)
    # A photograph with a second view of itself is not animated.
    buffer = io.BytesIO()
    red.save(buffer, "MPO", save_all=True, append_images=[red])
    assert PIL.Image.open(buffer).n_frames == 2 and trainer.decode_picture(buffer.getvalue()).size == (4, 4)


# -- Arguments of the pipeline -----------------------------------------------------------------------------------------


NAN = float("nan")
WRONG = st.sampled_from([0.5, -1, "x", b"x", [], [None], {}, object(), NAN, float("inf"), torch.tensor(1.0)])
CUT = encoded(draw_triptych(0))[:200]


def pictures() -> st.SearchStrategy:
    """What is no picture of 32 x 32, made anew for each example: reading a damaged file changes it."""
    return st.sampled_from(
        [
            lambda: PIL.Image.open(io.BytesIO(CUT)),
            lambda: PIL.Image.new("RGB", (0, 0)),
            lambda: PIL.Image.new("I;16", (32, 32)),
            lambda: PIL.Image.open(io.BytesIO(png(32, 32, 16, 2, (b"\0" + bytes(32 * 6)) * 32))),
            lambda: PIL.Image.new("RGB", (33, 32)),
            lambda: np.zeros((32, 32, 3), np.complex64),
            lambda: np.full((32, 32, 3), 2.0),
            lambda: np.array([["a"]]),
            lambda: np.array(None),
            lambda: np.zeros((32, 32, 4)),
            lambda: np.zeros((0, 32, 3)),
            lambda: torch.full((3, 32, 32), NAN),
            lambda: torch.zeros(3, 32, 32, dtype=torch.bool),
            lambda: torch.zeros(2, 32),
            lambda: torch.zeros(3, 48, 0),
            lambda: [torch.zeros(3, 32, 32), torch.zeros(3, 48, 32)],
            lambda: [],
            lambda: "picture.png",
            lambda: 3,
        ]
    ).map(lambda make: make())


def tensors(*shape: int) -> st.SearchStrategy:
    right = torch.zeros(shape)
    wrong = [right / 0, right.to(torch.int64), right[0], right[..., :-1], right[:0], right.tolist()]
    return st.one_of(st.sampled_from(wrong), WRONG.filter(lambda value: not isinstance(value, torch.Tensor)))


NO_TEXT = st.sampled_from([3, [], [None], ["a", 1], b"a", ("a",), {"a": 1}, NAN])
NO_COUNT = st.sampled_from([0, -1, 1.5, "2", True, NAN, [2]])
NO_NUMBER = st.sampled_from([NAN, float("inf"), -0.5, "1", [1.0], object()])
ARGUMENTS = {
    "prompt": NO_TEXT,
    "prompt_2": NO_TEXT,
    "image": pictures(),
    "semantic_image": pictures(),
    "semantic_scale": st.sampled_from([NAN, float("inf"), "1", [1.0]]),
    "num_inference_steps": NO_COUNT,
    "num_images_per_prompt": NO_COUNT,
    "max_sequence_length": st.sampled_from([0, -1, 513, 1.5, "2"]),
    "strength": st.one_of(NO_NUMBER, st.just(1.5)),
    "guidance_scale": NO_NUMBER,
    "sigmas": st.sampled_from([[], [NAN], ["a"], 3, "abc"]),
    "latents": tensors(1, 8, 64),
    "generator": st.sampled_from([3, "seed", [None, 3], [torch.Generator()] * 3]),
    "output_type": st.sampled_from(["PIL", 3, b"pt"]),
    "joint_attention_kwargs": st.sampled_from([3, "a", [1]]),
    "callback_on_step_end_tensor_inputs": st.sampled_from([["x"], 3]),
}


@pytest.fixture(scope="module")
def pipe(base) -> FluxFillSemanticPipeline:
    module = trainer.SemanticAttentionModel()
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


@pytest.mark.parametrize("name", ["image", "mask_image"])
def test_wrong_pictures_to_fill_are_named_before_any_step(pipe, no_step, name):
    right = {"image": torch.zeros(1, 3, 32, 32), "mask_image": torch.ones(1, 1, 32, 32), "height": 32, "width": 32}

    @fuzz(25)
    @given(value=st.sampled_from([torch.full((1, 3, 32, 32), NAN), np.array([["a"]]), "a.png", 3, [], {}]))
    def check(value):
        with pytest.raises(ValueError, match=f"`{name}`"):
            call(pipe, **right | {name: value})

    check()


@pytest.mark.parametrize("name, shape", [("prompt_embeds", (1, 16, 32)), ("pooled_prompt_embeds", (1, 32))])
def test_wrong_embeddings_are_named_before_any_step(pipe, no_step, name, shape):
    right = {"prompt": None, "prompt_embeds": torch.zeros(1, 16, 32), "pooled_prompt_embeds": torch.zeros(1, 32)}

    @fuzz(25)
    @given(value=tensors(*shape))
    def check(value):
        with pytest.raises(ValueError, match=name):
            call(pipe, **right | {name: value})

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
