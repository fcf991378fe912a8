"""The samples of an image: which bands it has, and which value is white where they have more than 8 bits."""

import struct
from typing import IO, Any

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

_SAMPLES_PER_PIXEL, _PHOTOMETRIC, _EXTRA, _S_MAX, _BITS = 277, 262, 338, 341, 258  # TIFF tags
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}  # bands of grey, RGB, palette, mask, CMYK, YCbCr, Lab
_ALPHA = (1, 2)
_12_BITS = 4095


class UnclearSamplesError(Exception):
    """Nothing says how to turn an image's samples into 8-bit RGB; the message says why."""


def check_bands(image: Image.Image) -> None:
    """Raise UnclearSamplesError if a TIFF has bands beside its colours and alpha: Pillow would drop them."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        bands, extra = int(tags.get(_SAMPLES_PER_PIXEL, 1)), _values(tags.get(_EXTRA))
        colours = _COLOURS.get(int(tags.get(_PHOTOMETRIC, 1)), bands)
        if bands > colours + 1 or (extra and extra[0] not in _ALPHA):
            raise UnclearSamplesError(f"has {bands} bands: which of them are red, green and blue is not certain")


def unread_tiff(file: IO[bytes]) -> str | None:
    """Return what a TIFF is that Pillow cannot read: its bands and bits; None if the file is none."""
    file.seek(0)
    header = file.read(8)
    if header[:4] not in (b"II*\0", b"MM\0*"):
        return None
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    bands, bits = tags.get(_SAMPLES_PER_PIXEL, 1), sorted(set(_values(tags.get(_BITS, 1))))
    return f"is a TIFF of {bands} band{'s' * (bands != 1)} of {' and '.join(map(str, bits))} bits, which is not read"


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Return whether colours are stored in 16 bits, of which Pillow keeps the upper 8. To be asked before loading."""
    return image.mode[0] not in "IF" and any(";16" in str(tile[3]) for tile in image.tile)


def check_depth(image: Image.Image) -> None:
    """Raise UnclearSamplesError if an image, loaded from 16-bit colours, has only values that 12 bits would have."""
    highest = max(high for _, high in np.array(image.convert("RGB").getextrema()).tolist())
    if 0 < highest <= _12_BITS >> 8:
        raise UnclearSamplesError(f"has 16-bit samples below {highest + 1 << 8}, {_NO_WHITE} (12 bits in 16?)")


_NO_WHITE = "of which nothing says what white is"


def stated_white(image: ImageFile.ImageFile) -> int | None:
    """Return the sample that is white, if the file says so by more than its number of bits.

    That is TIFF's SMaxSampleValue, a TIFF of fewer than 16 bits, or PNG's chunk sBIT. To be asked before loading.
    """
    if image.mode[0] != "I":
        return None
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        highest, bits = _values(image.tag_v2.get(_S_MAX)), _values(image.tag_v2.get(_BITS, 1))
        if highest:
            return int(highest[0])
        return (1 << bits[0]) - 1 if bits[0] < 16 else None
    if image.format == "PNG" and image.fp is not None:
        significant = _significant_bits(image.fp)
        return (1 << significant[0]) - 1 if significant and 0 < significant[0] < 16 else None
    return None


def eight_bits(image: Image.Image, white: int | None) -> Image.Image:
    """Scale a loaded greyscale image of 16 or 32 bits (Pillow's modes I;16 and I) to 8 bits, mode L.

    Args:
        white: as `stated_white` returns it. PNG's standard has samples scaled up to 16 bits and sBIT only tell how many
            of them count, but many writers leave 12 bits as they are; so it is white unless a sample is larger.

    Raises:
        UnclearSamplesError: Samples have 32 bits, or 16 of which only 12 are used, and no white is stated.
    """
    samples = np.asarray(image).astype(np.int64)
    highest = int(samples.max())
    if image.format == "TIFF" and image.mode == "I" and white is None:
        raise UnclearSamplesError(f"has 32-bit samples, or signed ones, {_NO_WHITE}")
    if image.format in ("TIFF", "PNG") and white is None and 0 < highest <= _12_BITS:
        raise UnclearSamplesError(f"has 16-bit samples up to {highest}, {_NO_WHITE} (12 bits in 16?)")
    if white is None or (image.format == "PNG" and highest > white):
        white = 65535
    if white < 1 or samples.min() < 0 or highest > white:
        raise UnclearSamplesError(f"has samples from {int(samples.min())} to {highest}, but white is {white}")
    return Image.fromarray(((samples * 255 + white // 2) // white).astype(np.uint8))


def _significant_bits(file: IO[bytes]) -> bytes:
    """Return the content of a PNG's chunk sBIT, which Pillow skips; empty if there is none."""
    before, found = file.tell(), b""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", head)
        if kind == b"sBIT":
            found = file.read(min(size, 4))
        if kind in (b"sBIT", b"IDAT"):
            break
        file.seek(size + 4, 1)  # its content and checksum
    file.seek(before)
    return found


def _values(value: Any) -> tuple[Any, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)
