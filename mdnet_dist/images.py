"""Image and mask files to pixels and back. Needs Pillow and numpy; never trusts the bytes it is given.

Only JPEG, PNG, TIFF and WebP are read, each by its own reader class chosen from the first bytes. `Image.open` is not
used: its bomb check warns at a limit of its own before ours can refuse, and it lets other formats in.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from mdnet_dist.errors import InputError

MAX_PIXELS = 1 << 26
"""67 million pixels (8192 x 8192), 200 MB once decoded: larger than a mammogram, smaller than a bomb."""
MAX_SCANS = 64
"""A JPEG file may go over its pixels as often, one of `MAX_PIXELS` at least; progressive ones need about ten scans. A
scan of nothing takes a few bytes, and as long as a full one."""
_BLOCK_PIXELS = 1 << 20  # that are wide numbers at a time

ORIENTATION = 0x0112  # EXIF tag: how the camera was held; 1 is upright
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_ALPHA_MODES = ("LA", "PA", "La", "RGBA", "RGBa")


def decode_image(raw: bytes, where: str, max_pixels: int = MAX_PIXELS, keep_grey: bool = False) -> Image.Image:
    """Decode an image file of any mode to 8-bit RGB, upright.

    Transparent pixels are laid on white. 16-bit and float pictures are scaled so that their own smallest value becomes
    0 and their largest 255. Of several frames or pages the first is read.

    Args:
        raw: the file's bytes.
        where: file, or shard and key, for the error message.
        max_pixels: refuse pictures with more pixels, before decoding any.
        keep_grey: give a grey picture as 8-bit L instead of RGB.

    Raises:
        InputError: not one of the four formats, too many pixels, truncated or damaged.
    """
    try:
        image = _to_grey_or_rgb(_upright(_open(raw, where, max_pixels), raw))
        return image if keep_grey or image.mode == "RGB" else image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files, and each means the same
        raise InputError(f"{where}: the image does not decode ({_reason(error)})") from error


def decode_mask(raw: bytes, where: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.bool_]:
    """Decode a mask file: everything that is not zero is inside.

    8-bit masks, 16-bit label pictures (0 background, k object k), palette pictures (entry 0 is background) and
    coloured ones (black or wholly transparent is background) are read. JPEG and WebP are refused: they blur the edge
    into values that are not zero.

    Returns:
        (height, width), bool.

    Raises:
        InputError: not a PNG or TIFF, too many pixels, truncated or damaged.
    """
    image = _open(raw, where, max_pixels)
    if image.format not in ("PNG", "TIFF"):
        raise InputError(f"{where}: a mask must be PNG or TIFF, which keep every pixel; this is {image.format}")
    try:
        image = _upright(image, raw)
        values = np.asarray(image)
        if values.ndim == 2:
            return values != 0
        if image.mode in _ALPHA_MODES:
            return np.asarray(values[..., :-1].any(axis=2)) & (values[..., -1] != 0)
        return np.asarray(values.any(axis=2))
    except Exception as error:  # as above
        raise InputError(f"{where}: the mask does not decode ({_reason(error)})") from error


def fit_to_square(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """Make an RGB image a square of `size` px, (size, size, 3) uint8, by `DataConfig.fit`."""
    return np.asarray(fit_picture(image, size, fit))


def fit_picture(image: Image.Image, size: int, fit: str) -> Image.Image:
    """As `fit_to_square`, for those that go on with Pillow; a picture that fits already is given back."""
    return _fit(image, size, fit, Image.Resampling.BILINEAR, border=None)


def fit_mask_to_square(mask: np.ndarray, size: int, fit: str) -> np.ndarray:
    """Move a mask (h, w) as `fit_to_square` moves its image: (size, size) bool, outside on the border."""
    grey = _fit(Image.fromarray(mask.astype(np.uint8)), size, fit, Image.Resampling.NEAREST, border=0)
    return np.asarray(grey).astype(bool)


def _fit(image: Image.Image, size: int, fit: str, resampling: Image.Resampling, border: int | None) -> Image.Image:
    width, height = image.size
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if fit != "pad" or width == height:
        return image if image.size == (size, size) else image.resize((size, size), resampling)
    scale = size / max(width, height)
    small = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resampling)
    colour = tuple(np.asarray(small).mean((0, 1)).astype(int).tolist()) if border is None else border
    square = Image.new(image.mode, (size, size), colour)
    square.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return square


def encode_png(image: Image.Image) -> bytes:
    """The image as a PNG file that holds pixels and nothing else."""
    buffer = io.BytesIO()
    _bare(image).save(buffer, format="PNG")
    return buffer.getvalue()


def encode_jpeg(image: Image.Image, quality: int = 95) -> bytes:
    """The image as a JPEG file without metadata; colour at full resolution, because stains differ in colour."""
    buffer = io.BytesIO()
    _bare(image).save(buffer, format="JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def encode_mask(mask: np.ndarray) -> bytes:
    """A (height, width) mask as an 8-bit grey PNG: 0 where it is zero, 255 elsewhere."""
    return encode_png(Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))))


def scale_to_8_bit(values: np.ndarray) -> NDArray[np.uint8]:
    """Scale grey values of any type so that the smallest finite one becomes 0 and the largest 255.

    A picture of one value becomes 0. What is not finite becomes the nearest end of the scale (NaN the lower).

    Raises:
        ValueError: no value is finite.
    """
    rows = max(1, _BLOCK_PIXELS // max(1, values[0].size))
    blocks = [
        slice(start, start + rows) for start in range(0, len(values), rows)
    ]  # in doubles all would be eight times
    low, high = np.inf, -np.inf
    for block in blocks:
        wide = values[block].astype(np.float64)
        finite = wide[np.isfinite(wide)]
        low, high = min(low, finite.min(initial=np.inf)), max(high, finite.max(initial=-np.inf))
    if low > high:
        raise ValueError("no pixel is a finite number")
    scaled = np.zeros(values.shape, dtype=np.uint8)
    for block in blocks if high > low else []:
        wide = np.nan_to_num(values[block].astype(np.float64), nan=low, posinf=high, neginf=low)
        # Halves, because high - low can be more than a float holds.
        scaled[block] = np.rint((wide / 2 - low / 2) / (high / 2 - low / 2) * 255)
    return scaled


def _bare(image: Image.Image) -> Image.Image:
    """A copy without what the image's file said beside its pixels: Pillow would write it into the next file."""
    bare = Image.new(image.mode, image.size)
    bare.paste(image)
    return bare


def _open(raw: bytes, where: str, max_pixels: int) -> Any:
    """The image file, its header read and its pixels not."""
    if raw[:3] == b"\xff\xd8\xff":
        reader: Any = JpegImageFile
    elif raw[:8] == b"\x89PNG\r\n\x1a\n":
        reader = PngImageFile
    elif raw[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        reader = TiffImageFile
    elif raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        reader = WebPImageFile
    else:
        raise InputError(f"{where}: not a JPEG, PNG, TIFF or WebP image")
    try:
        with quiet():
            image = reader(io.BytesIO(raw))
        width, height = image.size
        if reader is PngImageFile and raw.rfind(b"IEND") < 0:  # Pillow forgives that where no pixel is missing
            raise EOFError("the file is truncated")
    except Exception as error:  # as above
        raise InputError(f"{where}: the image does not decode ({_reason(error)})") from error
    if width * height > max_pixels:
        raise InputError(
            f"{where}: {width} x {height} = {width * height:,} pixels, more than the {max_pixels:,} that are read"
        )
    scans = len(raw) // 2 if reader is JpegImageFile else 1  # at most: counting takes time
    if scans * width * height > MAX_SCANS * MAX_PIXELS and reader is JpegImageFile:
        scans = raw.count(b"\xff\xda")
    if scans * width * height > MAX_SCANS * MAX_PIXELS:
        raise InputError(f"{where}: {scans:,} scans of {width} x {height} pixels, which would take very long")
    return image


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings from a reader of damaged files, which would take several lines and name nothing of ours.

    One thread at a time: the filters of warnings are the whole process's.
    """
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_QUIET = threading.Lock()


def _upright(image: Any, raw: bytes) -> Any:
    """The image with its pixels read, turned as its file says; only TIFF, animated PNG and EXIF warn."""
    if image.format == "TIFF" or (image.format == "PNG" and b"acTL" in raw):
        with quiet():
            image.load()
    else:
        image.load()
    if "exif" not in image.info and "xmp" not in image.info and "XML:com.adobe.xmp" not in image.info:
        return image  # only these can carry an orientation, and asking costs time
    with quiet():
        return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(ORIENTATION, 1))


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image)
        return on_white.convert("L" if mode in ("LA", "La", "L", "1") else "RGB")
    if mode in ("RGB", "L"):
        return image
    if mode in _DEEP_MODES:
        return Image.fromarray(scale_to_8_bit(np.asarray(image)))
    return image.convert("L" if mode == "1" else "RGB")


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
