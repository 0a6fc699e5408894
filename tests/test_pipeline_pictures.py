# Copyright 2026 The Semantic Fill authors. Licensed under the Apache License, Version 2.0.
"""The one reader of pictures, alone and behind the arguments of a call."""

import io
import struct

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from helpers import encode_picture, png_of_zeros
from pipeline_helpers import make_pipe, paint, picture, to_pil, trained_like

from pipeline_flux_fill_semantic import read_picture, require_8bit


RED = PIL.Image.new("RGB", (4, 4), (250, 10, 10))


def profile(swap: bool = False) -> bytes:
    """The ICC profile of sRGB. With `swap`, red and green change their roles."""
    data = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    if not swap:
        return data
    tags = {
        data[at : at + 4]: struct.unpack(">II", data[at + 4 : at + 12]) for at in range(132, 132 + 12 * data[131], 12)
    }
    swapped = bytearray(data)
    for here, there in ((b"rXYZ", b"gXYZ"), (b"gXYZ", b"rXYZ")):
        (start, length), (other, _) = tags[here], tags[there]
        swapped[start : start + length] = data[other : other + length]
    return bytes(swapped)


def oriented(image: PIL.Image.Image, orientation: int = 6) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return encode_picture(image, exif=exif)


# -- What is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_colors_stay_what_they_look_like(mode):
    color = (255, 0, 0)
    image = PIL.Image.new("RGB", (4, 4), color)
    if mode == "LAB":
        srgb, lab = PIL.ImageCms.createProfile("sRGB"), PIL.ImageCms.createProfile("LAB")
        image = PIL.ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    elif mode == "PA":
        image = image.convert("P").convert("PA")
    else:
        image = image.convert(mode)
    assert image.mode == mode
    read = read_picture(image)
    # 8 bits of LAB are coarse.
    near = 6 if mode == "LAB" else 2
    assert read.mode == "RGB" and np.abs(np.subtract(read.getpixel((0, 0)), color)).max() <= near


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_gray_pictures(mode):
    white, black = (read_picture(PIL.Image.new("L", (4, 4), level).convert(mode)) for level in (255, 0))
    assert white.getpixel((1, 1)) == (255,) * 3 and black.getpixel((1, 1)) == (0,) * 3


def test_transparent_places_are_laid_over_mid_gray():
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0] = 255
    pixels[0, :, 3] = 0, 255, 51
    image = PIL.Image.fromarray(pixels)
    for source in (image, encode_picture(image), encode_picture(image, "WEBP", lossless=True)):
        read = read_picture(source)
        assert [read.getpixel((x, 0)) for x in range(2)] == [(128, 128, 128), (255, 0, 0)]
        assert read.getpixel((2, 0)) == (153, 102, 102)
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    read = read_picture(encode_picture(palette, transparency=0))
    assert [read.getpixel((x, 0)) for x in range(2)] == [(128, 128, 128), (0, 255, 0)]


def test_bytes_paths_and_pictures_are_read_alike(tmp_path):
    image = to_pil(picture(1))
    file = tmp_path / "a.png"
    file.write_bytes(encode_picture(image))
    for source in (image, encode_picture(image), str(file), file):
        read = read_picture(source)
        assert read.mode == "RGB" and np.array_equal(np.asarray(read), np.asarray(image)) and read is not image


def test_orientation_is_applied():
    image = to_pil(picture(1))
    upright = np.asarray(image.transpose(PIL.Image.Transpose.ROTATE_270))
    data = oriented(image)
    opened = PIL.Image.open(io.BytesIO(data))
    assert np.array_equal(np.asarray(read_picture(data)), upright)
    assert np.array_equal(np.asarray(read_picture(opened)), upright)
    # The picture itself is left as it was, and reading it twice gives the same.
    assert opened.size == image.size and np.array_equal(np.asarray(read_picture(opened)), upright)
    assert np.array_equal(np.asarray(read_picture(read_picture(opened))), upright)


def test_color_profiles_are_converted_to_srgb():
    assert read_picture(encode_picture(RED, icc_profile=profile(swap=True))).getpixel((0, 0)) == (10, 250, 10)
    transparent = RED.copy()
    transparent.putalpha(0)
    assert read_picture(encode_picture(transparent, icc_profile=profile(swap=True))).getpixel((0, 0)) == (
        128,
        128,
        128,
    )
    # What is sRGB already, damaged, or made for other channels changes nothing, not even by rounding.
    image = to_pil(picture(1))
    gray = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("LAB")).tobytes()
    for data in (profile(), b"no profile", gray):
        assert np.array_equal(np.asarray(read_picture(encode_picture(image, icc_profile=data))), np.asarray(image))
    assert read_picture(encode_picture(RED.convert("L"), icc_profile=profile(swap=True))).getpixel((0, 0)) == (82,) * 3


def test_a_photograph_with_further_views_of_itself_is_not_animated():
    data = encode_picture(RED, "MPO", save_all=True, append_images=[RED])
    opened = PIL.Image.open(io.BytesIO(data))
    assert opened.n_frames == 2 and read_picture(data).size == read_picture(opened).size == (4, 4)


# -- What is refused --------------------------------------------------------------------------------------------------

FRAMES = [PIL.Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 100, 200)]


@pytest.mark.parametrize(
    "source, reason",
    [
        (encode_picture(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), r"^is animated \(3 frames\)$"),
        (encode_picture(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), r"^is animated \(3 frames\)$"),
        (encode_picture(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), r"^is animated \(3 frames\)$"),
        (png_of_zeros(4, 4, 16, 0), "^has the mode I;16, but only 8 bits"),
        (png_of_zeros(4, 4, 16, 2), "^has 16 bits per channel"),
        (png_of_zeros(4, 4, 16, 4), "^has 16 bits per channel"),
        (png_of_zeros(4, 4, 16, 6), "^has 16 bits per channel"),
        (PIL.Image.new("F", (4, 4)), "^has the mode F"),
        (PIL.Image.new("I", (4, 4)), "^has the mode I"),
        (PIL.Image.new("RGB", (0, 4)), "^is 0x4 pixels$"),
        (encode_picture(to_pil(picture(1)))[:300], "^cannot be read as a picture"),
        (b"no picture", "^cannot be read as a picture"),
        (b"", "^cannot be read as a picture"),
        ("no/such/file.png", "^cannot be read as a picture .*FileNotFoundError"),
        # Pillow itself refuses the first and only warns of the second.
        (png_of_zeros(60_000, 20_000, 8, 2), "^cannot be read as a picture .*DecompressionBombError"),
        (png_of_zeros(10_000, 10_000, 8, 2), "^is 10000x10000 pixels, but at most 89478485 are accepted$"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_refused_and_why(source, reason):
    with pytest.raises(ValueError, match=reason):
        read_picture(source)


def test_more_than_8_bits_are_refused_before_pillow_cuts_them():
    require_8bit(PIL.Image.open(io.BytesIO(encode_picture(RED))))
    with pytest.raises(ValueError, match="^has 16 bits per channel"):
        require_8bit(PIL.Image.open(io.BytesIO(png_of_zeros(4, 4, 16, 2))))


# -- Pictures behind arguments ----------------------------------------------------------------------------------------


def test_arguments_pass_the_reader(base):
    pipe = make_pipe(base, semantic_attention=trained_like())
    image, semantic = to_pil(picture(1)), to_pil(picture(2))
    expected = paint(pipe, image, semantic_image=semantic)
    turned = [
        PIL.Image.open(io.BytesIO(oriented(view.transpose(PIL.Image.Transpose.ROTATE_90))))
        for view in (image, semantic)
    ]
    assert turned[0].size == (32, 48)
    assert torch.equal(paint(pipe, turned[0], semantic_image=turned[1]), expected)
    # In fill mode the mask is brought upright as well.
    mask = to_pil((picture(3) > 0.5).float())
    size = {"height": 32, "width": 48}
    turned_mask = PIL.Image.open(io.BytesIO(oriented(mask.transpose(PIL.Image.Transpose.ROTATE_90))))
    assert torch.equal(
        paint(pipe, turned[0], mask_image=turned_mask, **size), paint(base, image, mask_image=mask, **size)
    )


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "YCbCr", "1"])
def test_a_picture_to_fill_may_have_any_color_model(base, mode):
    image, mask = to_pil(picture(1)).convert(mode), to_pil((picture(3) > 0.5).float())
    size = {"mask_image": mask, "height": 48, "width": 32}
    filled = paint(make_pipe(base), image, **size)
    assert torch.equal(filled, paint(base, read_picture(image), **size))
    assert torch.equal(paint(make_pipe(base), [image], **size | {"mask_image": [mask]}), filled)


@pytest.mark.parametrize("name", ["image", "mask_image", "semantic_image"])
@pytest.mark.parametrize(
    "data, reason",
    [
        (png_of_zeros(48, 32, 16, 2), "has 16 bits"),
        (encode_picture(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "is animated"),
        (encode_picture(to_pil(picture(1)))[:300], "cannot be read"),
    ],
)
def test_a_picture_that_cannot_be_used_is_named(base, name, data, reason):
    pipe = make_pipe(base, semantic_attention=trained_like())
    views = {"image": picture(1), "mask_image": picture(3)[:, :1], "height": 32, "width": 48}
    views |= {name: PIL.Image.open(io.BytesIO(data))}
    with pytest.raises(ValueError, match=f"`{name}` holds a picture that {reason}"):
        paint(pipe, **views)


def test_a_map_of_label_numbers_is_told(base, caplog):
    pipe = make_pipe(base, semantic_attention=trained_like())
    labels = PIL.Image.fromarray(np.arange(32 * 48, dtype=np.uint8).reshape(32, 48) % 7)
    for semantic in (labels, labels.convert("RGB"), [labels]):
        caplog.clear()
        paint(pipe, semantic_image=semantic)
        assert "`semantic_image` holds gray values below 64 alone. If they are label numbers" in caplog.text
    caplog.clear()
    black = PIL.Image.new("RGB", (48, 32))
    for semantic in (black, to_pil(picture(2)), to_pil(picture(2) / 8), picture(2)[:, :1].expand(-1, 3, -1, -1) / 8):
        paint(pipe, semantic_image=semantic)
    assert "label numbers" not in caplog.text


def test_a_path_is_no_argument(base):
    with pytest.raises(ValueError, match="`image` has to be a PIL image.* is or holds str"):
        paint(make_pipe(base), "street.png")
