"""Image and mask files of any mode, and hostile ones."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mdnet_dist.errors import InputError
from mdnet_dist.images import decode_image, decode_mask, encode_jpeg, encode_mask, encode_png, scale_to_8_bit

GREY = np.array([[0, 50, 100], [150, 200, 255]], dtype=np.uint8)
COLOUR = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_name, **options)
    return buffer.getvalue()


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def palette_image(transparent: int | None = None) -> bytes:
    """Three entries: red, green, blue."""
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    return encoded(image, "PNG", **({} if transparent is None else {"transparency": transparent}))


def with_alpha(mode: str) -> bytes:
    """A row of one colour: opaque, half transparent, wholly transparent."""
    alpha = np.array([[255, 128, 0]], dtype=np.uint8)
    channels = {"LA": [np.full((1, 3), 100, np.uint8)], "RGBA": [np.full((1, 3), v, np.uint8) for v in (100, 0, 200)]}
    return encoded(Image.merge(mode, [Image.fromarray(band) for band in (*channels[mode], alpha)]), "PNG")


# Half of 100 and half of white, in the rounding of 128/255: 100*128/255 + 255*127/255 = 177.2, 0 -> 127, 200 -> 227.4
MODES = {
    "1": (encoded(Image.fromarray(GREY > 120), "PNG"), three(np.where(GREY > 120, 255, 0))),
    "L": (encoded(Image.fromarray(GREY), "PNG"), three(GREY)),
    "RGB": (encoded(Image.fromarray(COLOUR), "PNG"), COLOUR),
    "RGB WebP": (encoded(Image.fromarray(COLOUR), "WEBP", lossless=True), COLOUR),
    "RGB TIFF": (encoded(Image.fromarray(COLOUR), "TIFF"), COLOUR),
    "RGB TIFF LZW": (encoded(Image.fromarray(COLOUR), "TIFF", compression="tiff_lzw"), COLOUR),
    "P": (palette_image(), np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]])),
    "P transparent": (palette_image(1), np.array([[[255, 0, 0], [255, 255, 255], [0, 0, 255]]])),
    "LA": (with_alpha("LA"), three(np.array([[100, 177, 255]]))),
    "RGBA": (with_alpha("RGBA"), np.array([[[100, 0, 200], [177, 127, 227], [255, 255, 255]]])),
    "RGB with a transparent colour": (
        encoded(Image.fromarray(np.array([[[9, 9, 9], [1, 2, 3]]], dtype=np.uint8)), "PNG", transparency=(1, 2, 3)),
        np.array([[[9, 9, 9], [255, 255, 255]]]),
    ),
    "16-bit PNG": (
        encoded(Image.fromarray(np.array([[1000, 2000, 3000]], dtype=np.uint16)), "PNG"),
        three(np.array([[0, 128, 255]])),
    ),
    "16-bit TIFF": (
        encoded(Image.fromarray(np.array([[40000, 50000, 60000]], dtype=np.uint16)), "TIFF"),
        three(np.array([[0, 128, 255]])),
    ),
    "32-bit TIFF": (
        encoded(Image.fromarray(np.array([[-500, 0, 500]], dtype=np.int32)), "TIFF"),
        three(np.array([[0, 128, 255]])),
    ),
    "float TIFF": (
        encoded(Image.fromarray(np.array([[0.0, 0.25, np.inf, np.nan, 1.0]], dtype=np.float32)), "TIFF"),
        three(np.array([[0, 64, 255, 0, 255]])),
    ),
    "one value": (encoded(Image.fromarray(np.full((2, 2), 777, np.uint16)), "PNG"), np.zeros((2, 2, 3))),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_8_bit_rgb(mode: str) -> None:
    raw, expected = MODES[mode]
    image = decode_image(raw, "x")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1  # Pillow rounds transparency its own way


@pytest.mark.parametrize("mode", ["1", "L", "LA", "16-bit PNG", "float TIFF"])
def test_grey_stays_grey_on_request(mode: str) -> None:
    raw, expected = MODES[mode]
    image = decode_image(raw, "x", keep_grey=True)
    assert image.mode == "L"
    assert np.abs(np.asarray(image).astype(int) - expected[..., 0]).max() <= 1


def test_cmyk_jpeg() -> None:
    ink = np.zeros((8, 8, 4), dtype=np.uint8)
    ink[..., 0] = 255  # all cyan: no red
    red, green, blue = np.asarray(decode_image(encoded(Image.fromarray(ink, "CMYK"), "JPEG"), "x"))[4, 4]
    assert red < 20 and green > 235 and blue > 235


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(format_name: str, orientation: int) -> None:
    # EXIF 2.3, tag 274: where the stored row 0 and column 0 are seen.
    seen = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.transpose(1, 0, 2),
        6: np.rot90(COLOUR, -1),
        7: np.rot90(COLOUR, 2).transpose(1, 0, 2),
        8: np.rot90(COLOUR, 1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    options: dict[str, object] = {"tiffinfo": {274: orientation}} if format_name == "TIFF" else {"exif": exif}
    if format_name == "WEBP":
        options["lossless"] = True
    raw = encoded(Image.fromarray(COLOUR), format_name, **options)
    assert np.array_equal(np.asarray(decode_image(raw, "x")), seen)
    if format_name != "WEBP":
        assert np.array_equal(decode_mask(raw, "x"), seen.any(axis=2))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not a JPEG, PNG, TIFF or WebP"),
        (b"GIF89a" + bytes(100), "not a JPEG, PNG, TIFF or WebP"),
        (encoded(Image.fromarray(GREY), "BMP"), "not a JPEG, PNG, TIFF or WebP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a JPEG, PNG, TIFF or WebP"),
        (b"\xff\xd8\xff" + bytes(50), "does not decode"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "does not decode"),
        (b"II*\0" + bytes(50), "does not decode"),
        (b"RIFF\x20\0\0\0WEBP" + bytes(50), "does not decode"),
    ],
)
def test_other_files_are_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"shard 3, sample k: .*{reason}"):
        decode_image(raw, "shard 3, sample k")


@pytest.mark.parametrize(
    ("format_name", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("TIFF", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_truncated_files_are_refused_wherever_they_end(format_name: str, options: dict[str, object]) -> None:
    raw = encoded(Image.fromarray(COLOUR), format_name, **options)
    decode_image(raw, "x")
    for end in range(0, len(raw), 7):
        with pytest.raises(InputError):
            decode_image(raw[:end], "x")


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 12_000, 200_000, 2**31 - 1])
def test_bombs_are_refused_by_their_pixels(side: int) -> None:
    # Few bytes, many pixels. Some sizes lie beyond Pillow's own limits for warning and for refusing.
    with pytest.raises(InputError, match="more than the 67,108,864 that are read"):
        decode_image(png_header(side, side), "x")
    with pytest.raises(InputError, match="more than the 67,108,864 that are read"):
        decode_mask(png_header(side, side), "x")
    with pytest.raises(InputError, match="6 pixels, more than the 5"):
        decode_image(encoded(Image.fromarray(GREY), "PNG"), "x", max_pixels=5)


VALID = [
    encoded(Image.fromarray(COLOUR), "JPEG"),
    encoded(Image.fromarray(COLOUR), "JPEG", progressive=True),
    encoded(Image.fromarray(COLOUR), "PNG"),
    encoded(Image.fromarray(COLOUR), "TIFF"),
    encoded(Image.fromarray(COLOUR), "WEBP"),
]


@settings(max_examples=400, deadline=None)
@given(
    raw=st.sampled_from(VALID),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=6),
    end=st.integers(0, 3000),
)
def test_damaged_files_end_in_the_documented_error(raw: bytes, changes: list[tuple[int, int]], end: int) -> None:
    damaged = bytearray(raw[: max(end, 40)])
    for place, value in changes:
        damaged[place % len(damaged)] = value
    for decode in (decode_image, decode_mask):
        try:
            decode(bytes(damaged), "x", max_pixels=1 << 20)
        except InputError as error:
            assert str(error).startswith("x: ")


MASK = np.array([[True, False, True], [False, False, True]])


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(MASK),
        Image.fromarray(np.where(MASK, 255, 0).astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray(np.where(MASK, 40_000, 0).astype(np.uint16)),
        Image.fromarray(np.where(MASK, 3, 0).astype(np.int32)),
        Image.fromarray(np.where(MASK[..., None], [0, 0, 9], 0).astype(np.uint8)),
        Image.fromarray(np.where(MASK[..., None], [9, 0, 0, 255], [0, 0, 0, 255]).astype(np.uint8)),
        Image.fromarray(np.where(MASK[..., None], [9, 9, 9, 1], [9, 9, 9, 0]).astype(np.uint8)),
        Image.fromarray(np.where(MASK[..., None], [9, 255], [0, 255]).astype(np.uint8), "LA"),
    ],
    ids=["1", "L 255", "L 1", "16-bit labels", "32-bit labels", "RGB", "RGBA opaque", "RGBA by alpha", "LA"],
)
@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_masks_of_every_mode(image: Image.Image, format_name: str) -> None:
    if image.mode == "I" and format_name == "PNG":
        image = image.convert("I;16")
    assert np.array_equal(decode_mask(encoded(image, format_name), "x"), MASK)


def test_palette_mask_counts_entries_not_colours() -> None:
    assert decode_mask(palette_image(), "x").tolist() == [[False, True, True]]


@pytest.mark.parametrize("format_name", ["JPEG", "WEBP"])
def test_blurred_masks_are_refused(format_name: str) -> None:
    with pytest.raises(InputError, match=f"must be PNG or TIFF, .* this is {format_name}"):
        decode_mask(encoded(Image.fromarray(GREY), format_name), "x")


def test_encoders_keep_pixels_and_nothing_else() -> None:
    image = Image.fromarray(COLOUR)
    image.info["comment"] = "Jane Roe"
    image.info["exif"] = b"Exif\0\0Jane Roe"
    for raw in (encode_png(image), encode_jpeg(image)):
        assert b"Jane" not in raw
        assert decode_image(raw, "x").size == image.size
    assert np.array_equal(np.asarray(decode_image(encode_png(image), "x")), COLOUR)
    mask = encode_mask(MASK)
    assert np.array_equal(decode_mask(mask, "x"), MASK)
    assert set(np.asarray(Image.open(io.BytesIO(mask))).flat) == {0, 255}


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_scaling_keeps_order_and_reaches_both_ends(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    finite = array[np.isfinite(array)]
    if finite.size == 0:
        with pytest.raises(ValueError, match="finite"):
            scale_to_8_bit(array)
        return
    scaled = scale_to_8_bit(array)
    kept = scaled[np.isfinite(array)].astype(int)
    assert (np.diff(kept[np.argsort(finite, kind="stable")]) >= 0).all()
    if finite.min() < finite.max():
        assert kept.min() == 0 and kept.max() == 255
    else:
        assert not scaled[np.isfinite(array) | np.isnan(array)].any()
