"""Decode an image file to upright 8-bit RGB, safely."""

import os
import re
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS, MAX_SIDE = (
    89_478_485,
    20_000,
)  # Pillow's own limit, beyond which it only warns; and a limit for extremely elongated images
# Pure pixel formats. Pillow supports others, one of which starts a program (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# Errors that Pillow's parsers raise for damaged files; MemoryError and the like are not among them.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError, EOFError),
    *(RuntimeError, struct.error, zlib.error, Image.DecompressionBombError),
)
_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFileError(Exception):
    """An image file cannot be read; the message is one line with path and reason."""

    def __init__(self, path: str | Path, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, " ".join(why.split())

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def open_image(path: str | Path) -> Image.Image:
    """Read an image as 8-bit RGB, rotated by its EXIF orientation; of an animation, the first frame.

    The alpha channel is dropped, not blended with a colour, as in the training of the published models. 16-bit samples
    are scaled to 8 bits; Pillow's `convert` would clip them.

    Raises:
        ImageFileError: The file does not exist, is no image, is damaged or truncated, or has more than `MAX_PIXELS`
            pixels or `MAX_SIDE` a side, which is read from its header before decoding.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageFileError(path, "is no regular file")
        with warnings.catch_warnings():  # about decompression bombs, which are refused below, and harmless damage
            warnings.simplefilter("ignore")
            return _read(path)
    except UnidentifiedImageError:
        raise ImageFileError(path, f"is no image that can be read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:  # Pillow itself refuses images over twice its limit
        count = re.search(r"\d+ pixels", str(error))
        raise ImageFileError(path, _too_large(count[0] if count else "it")) from None
    except _DAMAGE as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else f"damaged: {error or type(error)}"
        raise ImageFileError(path, said) from None


def _read(path: str | Path) -> Image.Image:
    Image.init()
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise ImageFileError(path, _too_large(f"{width}x{height}"))
        image.load()
        return _upright(image, _rgb(path, image))


def _too_large(size: str) -> str:
    return f"{size} is a decompression bomb: at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side are read"


def _rgb(path: str | Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageFileError(path, "has samples in floating point, of which nothing says what white is")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    samples = np.asarray(image).astype(np.int64)
    if samples.min() < 0 or samples.max() > 65535:
        raise ImageFileError(path, "has 32-bit samples, of which nothing says what white is")
    return Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _upright(source: Image.Image, image: Image.Image) -> Image.Image:
    """Rotate like `ImageOps.exif_transpose`, which fails if it cannot write the EXIF data back."""
    try:
        method = _UPRIGHT.get(source.getexif().get(_ORIENTATION, 1))
    except _DAMAGE:  # broken EXIF does not mean broken pixels
        method = None
    return image if method is None else image.transpose(method)
