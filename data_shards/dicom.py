"""DICOM files to pictures as a viewer would show them. The only file that imports pydicom, an optional dependency.

Only pixels leave this file: no tag is copied. PS3.3 and PS3.5 are parts of the DICOM standard.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from mdnet_dist.errors import InputError
from mdnet_dist.images import MAX_PIXELS, quiet, scale_to_8_bit

DEFLATED = b"1.2.840.10008.1.2.1.99"  # a transfer syntax: the whole data set compressed, of any size once unpacked


def is_dicom(raw: bytes) -> bool:
    """Whether the bytes start as a DICOM file does: 128 bytes of anything, then DICM."""
    return raw[128:132] == b"DICM"


def decode_dicom(raw: bytes, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a single-frame DICOM image to 8-bit L or RGB.

    Grey values go through the modality transform (slope and intercept, or table), then the first window or table of
    interest of the file, or else their own range without padding; MONOCHROME1 is inverted, so that in every picture
    white is what the file calls bright. Palette and YBR pictures become RGB.

    Raises:
        InputError: pydicom is not installed, not a DICOM image, several frames, too many pixels, damaged.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, pixel_array
    except ImportError as error:
        raise InputError(f"{where}: DICOM needs pydicom: pip install 'mdnet_dist[dicom]'") from error
    if DEFLATED in raw[:4096]:
        raise InputError(f"{where}: a deflated DICOM file is not read; save it without that compression")
    try:
        with quiet():  # pydicom warns of each departure from the standard; files are full of them
            data = pydicom.dcmread(io.BytesIO(raw))
            frames = int(data.get("NumberOfFrames") or 1)
            pixels = int(data.Rows) * int(data.Columns) * frames
            if frames == 1 and pixels <= max_pixels:
                values = pixel_array(data)  # YBR becomes RGB here
                if data.PhotometricInterpretation == "PALETTE COLOR":
                    bits = int(data.RedPaletteColorLookupTableDescriptor[2])
                    return _colour(apply_color_lut(values, data), bits)
                if int(data.SamplesPerPixel) == 3:
                    return _colour(values, int(data.BitsStored))
                return _grey(values, data)
    except Exception as error:  # pydicom and its decoders raise nearly anything on damaged files
        reason = str(error) or type(error).__name__
        raise InputError(f"{where}: the DICOM image does not decode ({reason})") from error
    if frames > 1:
        raise InputError(f"{where}: {frames} frames, and one image is one sample; save each frame as a file of its own")
    raise InputError(f"{where}: {pixels:,} pixels, more than the {max_pixels:,} that are read")


def _colour(values: np.ndarray, bits: int) -> Image.Image:
    """(rows, columns, 3) of `bits` significant bits."""
    if bits > 8:
        values = np.rint(values.astype(np.float64) * (255 / (2**bits - 1))).clip(0, 255)
    return Image.fromarray(values.astype(np.uint8))


def _grey(stored: np.ndarray, data: Any) -> Image.Image:
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = apply_modality_lut(stored, data)
    window = _window(data)
    if window is not None:
        shown = np.rint(255 * window_fraction(values.astype(np.float64), *window)).astype(np.uint8)
    elif data.get("VOILUTSequence"):
        largest = 2 ** int(data.VOILUTSequence[0].LUTDescriptor[2]) - 1
        table = apply_voi(values.astype(np.int64), data).astype(np.float64)
        shown = np.rint(255 * (table / largest).clip(0, 1)).astype(np.uint8)
    else:
        shown = scale_to_8_bit(np.where(_padding(stored, data), np.nan, values.astype(np.float64)))
    return Image.fromarray(255 - shown if data.PhotometricInterpretation == "MONOCHROME1" else shown)


def _window(data: Any) -> tuple[float, float, str] | None:
    """Centre, width and function of the file's first window; None where it has none that can be used."""
    centre, width = data.get("WindowCenter"), data.get("WindowWidth")
    if centre is None or width is None:
        return None
    # Each may be one number or several windows.
    centre, width = (value if isinstance(value, (int, float)) else value[0] for value in (centre, width))
    function = str(data.get("VOILUTFunction") or "LINEAR")
    smallest_width = 1.0 if function == "LINEAR" else 1e-12
    return (float(centre), float(width), function) if float(width) >= smallest_width else None


def window_fraction(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Apply a window: 0 at its lower end and below, 1 at its upper end and above (PS3.3 C.11.2.1.2 and .3).

    Args:
        values: grey values after the modality transform, any shape.
        centre, width: in the unit of the values.
        function: LINEAR, LINEAR_EXACT or SIGMOID.

    Raises:
        ValueError: another function.
    """
    if function == "LINEAR":
        # The standard's half: integer values stand for the middle of their unit-wide step.
        if width == 1:
            return np.where(values <= centre - 0.5, 0.0, 1.0)
        return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0.0, 1.0)
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0.0, 1.0)
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -700.0, 700.0)))
    raise ValueError(f"VOI LUT function '{function}'; known: LINEAR, LINEAR_EXACT, SIGMOID")


def _padding(stored: np.ndarray, data: Any) -> np.ndarray:
    """Which stored values are padding around the picture (PS3.3 C.7.5.1.1.2)."""
    value = data.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = data.get("PixelPaddingRangeLimit", value)
    return (stored >= min(value, limit)) & (stored <= max(value, limit))
