# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""Rows at random: they are used, or a `ValueError` names each of them before a step is made."""

import datasets
import PIL.Image
import pytest
from helpers import draw_triptych, encode_picture, png_of_zeros, read_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from semantic_fill.options import DataOptions
from semantic_fill.tables import TableSource


def fuzz(examples: int):
    """The same examples in each run of the tests."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=health)


def bomb() -> bytes:
    """A PNG file of a billion pixels by its header, which would be small if they were all alike."""
    return png_of_zeros(60_000, 20_000)


@st.composite
def good_pictures(draw):
    triptych = draw_triptych(draw(st.integers(0, 9)), height=8 * draw(st.integers(1, 5)))
    mode = draw(st.sampled_from(["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"]))
    forms = {"CMYK": ["TIFF", "JPEG"], "YCbCr": ["JPEG"]}.get(mode, ["PNG", "TIFF"])
    return encode_picture(triptych.convert(mode), draw(st.sampled_from(forms)))


@st.composite
def bad_pictures(draw):
    content = encode_picture(draw_triptych(draw(st.integers(0, 9))))
    kinds = ["cut", "noise", "empty", "no pixels", "panels", "16 bit", "float", "animated", "bomb", "no cell"]
    kind = draw(st.sampled_from(kinds))
    if kind == "cut":
        # The last 12 bytes of a PNG file hold nothing of the picture.
        return content[: draw(st.integers(0, len(content) - 20))]
    if kind == "noise":
        return draw(st.binary(max_size=64))
    if kind == "panels":
        return encode_picture(PIL.Image.new("RGB", (draw(st.sampled_from([1, 2, 95, 97])), 32)))
    if kind == "animated":
        frames = [draw_triptych(seed) for seed in range(2)]
        form = draw(st.sampled_from(["GIF", "PNG", "WEBP", "TIFF"]))
        return encode_picture(frames[0], form, save_all=True, append_images=frames[1:])
    if kind == "16 bit" and draw(st.booleans()):
        # Pillow writes the first alone: gray, RGB, gray with alpha, RGBA.
        color_type = draw(st.sampled_from([0, 2, 4, 6]))
        return png_of_zeros(96, 32, 16, color_type)
    if kind == "16 bit":
        return encode_picture(PIL.Image.new("I;16", (96, 32)), draw(st.sampled_from(["PNG", "TIFF"])))
    if kind == "float":
        value = draw(st.sampled_from([0.5, float("nan"), float("inf")]))
        return encode_picture(PIL.Image.new("F", (96, 32), value), "TIFF")
    if kind == "no pixels":
        return png_of_zeros(*draw(st.sampled_from([(0, 32), (96, 0), (0, 0)])))
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
def test_rows_are_used_or_named(rows):
    columns = {"image": [picture for (picture, _), _ in rows], "text": [caption for _, (caption, _) in rows]}
    bad = {index for index, ((_, picture), (_, caption)) in enumerate(rows) if not (picture and caption)}
    check_rows(columns, bad)


def check_rows(columns: dict[str, list], bad: set[int], **options: str) -> None:
    """Rows of encoded pictures and captions are used, or those in `bad` are named."""
    options = DataOptions(train_data_dir="unused", resolution=32, caption_column="text", **options)
    texts, names = columns["text"], [name for name in columns if name != "text"]
    cells = {n: [None if data is None else {"bytes": data, "path": None} for data in columns[n]] for n in names}
    features = datasets.Features(
        dict.fromkeys(names, datasets.Image(decode=False)) | {"text": datasets.Value("string")}
    )
    source = TableSource(datasets.Dataset.from_dict(cells | {"text": texts}, features=features), options)
    if bad:
        with pytest.raises(ValueError) as error:
            read_dataset(options, source)
        lines = str(error.value).splitlines()
        assert lines[0] == f"{len(bad)} samples cannot be used:" and len(lines) == len(bad) + 1
        assert {int(line.split(":")[0].removeprefix("  row ")) for line in lines[1:]} == bad
    else:
        dataset = read_dataset(options, source)
        for index in range(len(texts)):
            views = dataset.views(index)
            assert all(view.shape == (3, 32, 32) and 0 <= view.min() <= view.max() <= 1 for view in views.values())
            assert dataset.caption(index) == texts[index]


NAMES = ("photo", "thermal", "map")


@fuzz(40)
@given(
    rows=st.lists(
        st.lists(
            # A row is used if its three pictures have one size.
            st.one_of(
                st.sampled_from([32, 32, 48]).map(
                    lambda side: (encode_picture(PIL.Image.new("RGB", (side, side))), side)
                ),
                st.sampled_from(
                    [
                        (data, 0)
                        for data in (b"", None, bomb(), png_of_zeros(0, 32), encode_picture(draw_triptych(0))[:99])
                    ]
                ),
            ),
            min_size=3,
            max_size=3,
        ),
        min_size=1,
        max_size=4,
    )
)
def test_views_of_three_pictures_are_used_or_named(rows):
    columns = {name: [row[i][0] for row in rows] for i, name in enumerate(NAMES)} | {"text": ["a"] * len(rows)}
    bad = {index for index, row in enumerate(rows) if len({side for _, side in row}) > 1 or row[0][1] == 0}
    names = dict(zip(("visible_column", "target_column", "semantic_column"), NAMES))
    check_rows(columns, bad, **names)
