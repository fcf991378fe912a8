"""One picture: a file becomes 8-bit RGB the right way up, and that becomes what a model of its family was tested on."""

import os
import re
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dvit_infer.config import Config
from dvit_infer.errors import InputError

MAX_PIXELS, MAX_SIDE = 89_478_485, 20_000  # Pillow's own limit, beyond which it only warns; and one for slivers
# Formats that are nothing but pixels. Pillow knows others, one of which starts a program (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_ASPECT = 8  # of the part of a picture that is resized, over the part that is kept

# What a damaged file makes Pillow's parsers raise; not what says that this process is in trouble.
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


class PictureError(Exception):
    """A picture that cannot be read: one line, the path and why."""

    def __init__(self, path: str | Path, why: str) -> None:
        super().__init__(path, why)
        self.path, self.why = path, " ".join(why.split())

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def open_picture(path: str | Path) -> Image.Image:
    """A picture in 8-bit RGB, turned as its EXIF says; of an animation the first frame.

    Transparency is dropped, not blended with a colour: that is what the models were trained and published with. 16-bit
    samples are scaled to 8 bits, where Pillow's `convert` would clip them.

    Raises:
        PictureError: there is no such file, it is no picture, it is damaged or cut short, or it has more than
            `MAX_PIXELS` pixels or `MAX_SIDE` a side, which its header says before anything is decoded.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PictureError(path, "is no regular file")
        with warnings.catch_warnings():  # of bombs, which are refused below, and of harmless damage
            warnings.simplefilter("ignore")
            return _read(path)
    except UnidentifiedImageError:
        raise PictureError(path, f"is no picture that can be read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:  # over twice its limit Pillow refuses by itself
        count = re.search(r"\d+ pixels", str(error))
        raise PictureError(path, _too_large(count[0] if count else "it")) from None
    except _DAMAGE as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else f"damaged: {error or type(error)}"
        raise PictureError(path, said) from None


def _read(path: str | Path) -> Image.Image:
    Image.init()
    with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise PictureError(path, _too_large(f"{width}x{height}"))
        picture.load()
        return _upright(picture, _rgb(path, picture))


def _too_large(size: str) -> str:
    return f"{size} is a decompression bomb: at most {MAX_PIXELS:,} pixels and {MAX_SIDE:,} a side are read"


def _rgb(path: str | Path, picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise PictureError(path, "has samples in floating point, of which nothing says what white is")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture.convert("RGB")
    samples = np.asarray(picture).astype(np.int64)
    if samples.min() < 0 or samples.max() > 65535:
        raise PictureError(path, "has 32-bit samples, of which nothing says what white is")
    return Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")


def _upright(source: Image.Image, picture: Image.Image) -> Image.Image:
    """As `ImageOps.exif_transpose`, which fails where it cannot write the EXIF back that it read."""
    try:
        method = _UPRIGHT.get(source.getexif().get(_ORIENTATION, 1))
    except _DAMAGE:  # broken EXIF says nothing against the pixels
        method = None
    return picture if method is None else picture.transpose(method)


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model's input.

    Attributes:
        image_size: (H, W) of the model's pictures.
        crop_pct: what is kept of the resized picture's shorter side, 0.1 to 1.
        warp: resize straight to `image_size` instead, whatever the picture's shape.

    Raises:
        InputError: `crop_pct` is out of range.
    """

    image_size: tuple[int, int]
    crop_pct: float = 0.875
    warp: bool = False

    def __post_init__(self) -> None:
        if not 0.1 <= self.crop_pct <= 1:
            raise InputError(f"crop_pct: {self.crop_pct:g} is not between 0.1 and 1")

    def __str__(self) -> str:
        return f"{self.image_size[0]}x{self.image_size[1]}, {'warped' if self.warp else f'crop {self.crop_pct:g}'}"

    def crop(self, picture: Image.Image) -> Image.Image:
        """The RGB picture, resized (bicubic, antialiased) so that it covers `image_size` / `crop_pct`, and its middle.

        For square sizes torchvision's `Resize(int(S / crop_pct), BICUBIC)` and `CenterCrop(S)`, to the bit, but for
        pictures so elongated that most of them would be resized only to be cut away: they are cut first.
        """
        height, width = self.image_size
        if self.warp:
            return picture.resize((width, height), Image.Resampling.BICUBIC)
        rows, columns = int(height / self.crop_pct), int(width / self.crop_pct)
        picture = _shortened(picture, rows, columns)
        if picture.height * columns <= picture.width * rows:
            size = rows * picture.width // picture.height, rows
        else:
            size = columns, columns * picture.height // picture.width
        resized = picture.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return resized.crop((left, top, left + width, top + height))

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """`crop` as (3, H, W) uint8."""
        return np.ascontiguousarray(np.asarray(self.crop(picture)).transpose(2, 0, 1))


def _shortened(picture: Image.Image, rows: int, columns: int) -> Image.Image:
    """The middle of a picture, at most `MAX_ASPECT` times as elongated as `rows` x `columns`."""
    width = min(picture.width, max(1, MAX_ASPECT * columns * picture.height // rows))
    height = min(picture.height, max(1, MAX_ASPECT * rows * picture.width // columns))
    if (width, height) == picture.size:
        return picture
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def preprocess_for(config: Config) -> Preprocess:
    """What the model says of itself, else what its family was evaluated with.

    DynamicViT (Rao et al. 2021, `datasets.py`) takes crops of 0.875 for all its models, and at 384 pixels and more
    warps without cropping; DeiT 0.875; LV-ViT (token labeling, `models/lvvit.py`) 0.9 for T and S, 1.0 for M and L.
    """
    if config.crop_pct is not None:
        return Preprocess(config.image_size, config.crop_pct)
    if config.prune_at:
        return Preprocess(config.image_size, warp=min(config.image_size) >= 384)
    if config.family == "lvvit":
        return Preprocess(config.image_size, 0.9 if config.depth <= 16 else 1.0)
    return Preprocess(config.image_size)
