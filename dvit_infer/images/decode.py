"""Decode an image file to upright 8-bit RGB, safely."""

import contextlib
import functools
import importlib
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from dvit_infer.images.samples import (
    UnclearSamplesError,
    check_bands,
    check_depth,
    eight_bits,
    is_deep,
    stated_white,
    unread_tiff,
)

MAX_PIXELS, MAX_SIDE = (
    89_478_485,
    20_000,
)  # Pillow's own limit, beyond which it only warns; and a limit for extremely elongated images
# Pure pixel formats. Pillow supports others, one of which starts a program (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_HEIF = "HEIF"  # read by pillow-heif, if that is installed
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

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
        ImageFileError: The file does not exist, is no image, is damaged or truncated, has more than `MAX_PIXELS`
            pixels or `MAX_SIDE` a side, which is read from its header before decoding, or has samples or bands of which
            nothing says what they mean.
    """

    def opened() -> IO[bytes]:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ImageFileError(path, "is not a regular file")
        return open(path, "rb")

    return _read(path, opened)


def open_bytes(path: str | Path, content: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image from its bytes, like `open_image`; errors name `path`, and `max_pixels` may be a lower limit."""
    return _read(path, lambda: io.BytesIO(content), min(max_pixels, MAX_PIXELS))


def _read(path: str | Path, opened: Callable[[], IO[bytes]], max_pixels: int = MAX_PIXELS) -> Image.Image:
    try:
        with opened() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about decompression bombs, which are refused, and harmless damage
            try:
                return _decoded(path, file, max_pixels)
            except UnidentifiedImageError:
                raise ImageFileError(path, _unidentified(file)) from None
    except UnclearSamplesError as error:
        raise ImageFileError(path, str(error)) from None
    except Image.DecompressionBombError as error:  # Pillow itself refuses images over twice its limit
        count = re.search(r"\d+ pixels", str(error))
        raise ImageFileError(path, _too_large(count[0] if count else "it")) from None
    except _DAMAGE as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else f"damaged: {error or type(error)}"
        raise ImageFileError(path, said) from None


def _decoded(path: str | Path, file: IO[bytes], max_pixels: int) -> Image.Image:
    with Image.open(file, formats=_formats()) as image:
        width, height = image.size
        if width * height > max_pixels or max(width, height) > MAX_SIDE:
            raise ImageFileError(path, _too_large(f"{width}x{height}", max_pixels))
        check_bands(image)
        white, deep = stated_white(image), is_deep(image)
        image.load()
        rgb = _rgb(image, white)
        if deep:
            check_depth(rgb)
        return _upright(image, rgb)


@functools.cache
def _formats() -> list[str]:
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return [name for name in (*FORMATS, _HEIF) if name in Image.OPEN]


def _unidentified(file: IO[bytes]) -> str:
    """Return why Pillow cannot tell what a file is."""
    file.seek(0)
    start = file.read(12)
    if start[4:8] == b"ftyp":
        if start[8:] in _HEIC_BRANDS:
            return _needs("HEIC", _HEIF, "pillow-heif")
        if start[8:] in (b"avif", b"avis"):
            return _needs("AVIF", "AVIF", "'pillow>=11.3'")
    try:
        tiff = unread_tiff(file)
    except _DAMAGE:
        tiff = None
    return tiff or f"is not a readable image ({', '.join(FORMATS)})"


def _needs(kind: str, plugin: str, package: str) -> str:
    return f"damaged {kind}" if plugin in _formats() else f"is {kind}; to read it, run pip install {package}"


def _too_large(size: str, max_pixels: int = MAX_PIXELS) -> str:
    return f"{size} is a decompression bomb: at most {max_pixels:,} pixels and {MAX_SIDE:,} a side are read"


def _rgb(image: Image.Image, white: int | None) -> Image.Image:
    if image.mode == "F":
        raise UnclearSamplesError("has samples in floating point, of which nothing says what white is")
    deep = image.mode == "I" or image.mode.startswith("I;16")
    return (eight_bits(image, white) if deep else image).convert("RGB")


def _upright(source: Image.Image, image: Image.Image) -> Image.Image:
    """Rotate like `ImageOps.exif_transpose`, which fails if it cannot write the EXIF data back."""
    try:
        method = _UPRIGHT.get(source.getexif().get(_ORIENTATION, 1))
    except _DAMAGE:  # broken EXIF does not mean broken pixels
        method = None
    return image if method is None else image.transpose(method)
