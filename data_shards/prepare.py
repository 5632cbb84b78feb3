"""A user's image file to the picture files of a shard: upright, 8-bit, and free of everything but pixels.

JPEG and PNG files that are 8-bit grey or RGB keep their compressed pixels byte for byte; only the segments and chunks
that can carry identifiers (EXIF, XMP, comments, text, thumbnails, bytes behind the end) are cut out. All else becomes
PNG, which loses nothing. What is burned into the pixels stays.
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from data_shards.dicom import decode_dicom, is_dicom
from data_shards.writer import Pixels
from mdnet_dist.errors import InputError
from mdnet_dist.images import decode_image, decode_mask, encode_jpeg, encode_mask, encode_png

MAX_FILE_BYTES = 1 << 30

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Tables, frames, scans, restart intervals and line counts: all that decoding needs.
_JPEG_KEPT = {*range(0xC0, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD} - {0xC8}
_PNG_KEPT = (b"IHDR", b"IDAT", b"IEND")  # and so neither palette nor transparency: such files are converted
# A marker inside or behind compressed data: not a stuffed zero byte, not a restart marker, not a fill byte.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def prepare_pixels(
    image_path: Path, mask_path: Path | None, where: str, max_side_px: int | None = None, *, nameless: bool = False
) -> Pixels:
    """Read an image file, and its mask where it has one, and turn them into what a shard stores.

    Args:
        image_path: JPEG, PNG, TIFF, WebP or DICOM.
        mask_path: PNG or TIFF, zero outside; of the image's size as it is seen, upright.
        where: for messages.
        max_side_px: shrink larger images, so that their longer side has this many pixels.
        nameless: messages do not name the files.

    Raises:
        InputError: a file that cannot be read or decoded, or a mask of another size.
    """
    raw = _read(image_path, where, "image" if nameless else None)
    dicom = is_dicom(raw) or image_path.suffix.lower() == ".dcm"
    image = decode_dicom(raw, where) if dicom else decode_image(raw, where, keep_grey=True)
    shown = "mask" if nameless or mask_path is None else f"mask {mask_path.name}"
    mask = None
    if mask_path is not None:
        mask = decode_mask(_read(mask_path, where, shown if nameless else None), f"{where}: {shown}")
    if mask is not None and mask.shape != (image.height, image.width):
        raise InputError(
            f"{where}: {shown} is {mask.shape[1]} x {mask.shape[0]} pixels and its "
            f"image {image.width} x {image.height}; both must be the same size"
        )
    mask_png = None if mask is None else encode_mask(mask)
    if max_side_px is not None and max(image.size) > max_side_px:
        scale = max_side_px / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
        if mask is not None:
            mask_png = encode_mask(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        if raw.startswith(b"\xff\xd8"):
            return Pixels(image=encode_jpeg(image), extension="jpg", mask=mask_png)
        return Pixels(image=encode_png(image), extension="png", mask=mask_png)
    bare, extension = (strip_jpeg(raw), "jpg") if raw.startswith(b"\xff\xd8") else (strip_png(raw), "png")
    if bare is None or dicom or (bare != raw and not _shows(bare, image, where)):
        bare, extension = encode_png(image), "png"
    return Pixels(image=bare, extension=extension, mask=mask_png)


def open_image(path: Path) -> Image.Image:
    """A user's image file as the RGB pixels that training would see of it, had it been imported.

    Raises:
        InputError: a file that cannot be read or decoded.
    """
    where = str(path)
    raw = _read(path, "image")
    dicom = is_dicom(raw) or path.suffix.lower() == ".dcm"
    return decode_dicom(raw, where).convert("RGB") if dicom else decode_image(raw, where)


def strip_jpeg(raw: bytes) -> bytes | None:
    """A grey or YCbCr/RGB JPEG without its metadata; its compressed pixels are copied.

    JFIF and Adobe segments decide how colours are read: they stay, cut to the fields that do so.

    Returns:
        The bare file, or None where the file is of another kind (CMYK) or its structure is not clear.
    """
    pieces = [b"\xff\xd8"]
    at = 2
    while True:
        while raw[at : at + 2] == b"\xff\xff":  # fill bytes
            at += 1
        if len(raw) < at + 4 and raw[at : at + 2] != b"\xff\xd9":
            return None
        if raw[at] != 0xFF:
            return None
        marker = raw[at + 1]
        if marker == 0xD9:  # end of image
            return b"".join([*pieces, b"\xff\xd9"])
        length = int.from_bytes(raw[at + 2 : at + 4], "big")
        segment = raw[at : at + 2 + length]
        if length < 2 or len(segment) < 2 + length:
            return None
        at += 2 + length
        payload = segment[4:]
        if marker == 0xE0 and payload.startswith(b"JFIF\0") and len(payload) >= 14:
            pieces.append(b"\xff\xe0\x00\x10" + payload[:12] + b"\0\0")  # the zeros: no thumbnail
        elif marker == 0xEE and payload.startswith(b"Adobe") and len(payload) >= 12:
            pieces.append(b"\xff\xee\x00\x0e" + payload[:12])
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            continue  # application data and comments
        elif marker not in _JPEG_KEPT:
            return None
        else:
            # Start of frame: its sixth byte is the number of components.
            is_frame = marker <= 0xCF and marker not in (0xC4, 0xCC)
            if is_frame and payload[5:6] not in (b"\x01", b"\x03"):
                return None
            pieces.append(segment)
        if marker == 0xDA:  # start of scan: compressed data follow, without a length
            end = _JPEG_MARKER.search(raw, at)
            if end is None:
                return None
            pieces.append(raw[at : end.start()])
            at = end.start()


def strip_png(raw: bytes) -> bytes | None:
    """An 8-bit grey or RGB PNG without its ancillary chunks; its compressed pixels are copied.

    Returns:
        The bare file, or None where the file is of another kind or its structure is not clear.
    """
    bit_depth, colour_type = raw[24:25], raw[25:26]
    if not raw.startswith(_PNG_SIGNATURE) or bit_depth != b"\x08" or colour_type not in (b"\x00", b"\x02"):
        return None
    pieces = [_PNG_SIGNATURE]
    at = len(_PNG_SIGNATURE)
    while at + 12 <= len(raw):
        end = at + 12 + int.from_bytes(raw[at : at + 4], "big")
        kind = raw[at + 4 : at + 8]
        if kind == b"tRNS" or end > len(raw):
            return None
        if kind in _PNG_KEPT:
            pieces.append(raw[at:end])
        if kind == b"IEND":
            return b"".join(pieces)
        at = end
    return None


def _shows(bare: bytes, image: Image.Image, where: str) -> bool:
    """Whether the bare file decodes to the very picture: not so where an orientation was cut out, for example."""
    try:
        stored = decode_image(bare, where, keep_grey=True)
    except InputError:
        return False
    return stored.mode == image.mode and stored.size == image.size and stored.tobytes() == image.tobytes()


def _read(path: Path, where: str, shown: str | None = None) -> bytes:
    """Args: shown: the file in messages, instead of its name."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise InputError(
                f"{where}: {shown or path.name} has {size:,} bytes, more than the {MAX_FILE_BYTES:,} that are read"
            )
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{where}: {shown or path} cannot be read ({error.strerror})") from error
