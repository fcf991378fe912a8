"""Resize and crop a decoded image to a model's input size, as its owner evaluates it."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dvit_infer.config import CROP_MODES, INTERPOLATIONS
from dvit_infer.errors import InputError

MAX_ASPECT = 8  # largest aspect ratio of the resized part, relative to that of the crop


@dataclass(frozen=True)
class Preprocess:
    """The resizing and cropping of images: to `image_size` / `crop_pct`, of which the centre is kept.

    Attributes:
        image_size: (H, W) of the model's input.
        crop_pct: share of the resized image that the crop keeps, of its shorter side or of both; 0.1 to 1.
        crop_mode: "center": the image keeps its aspect ratio, so that its longer side loses more (torchvision, timm).
            "center_floor": the same, with the smaller half of an odd margin always left and above (Hugging Face).
            "squash": both sides are resized to those of the model, so that `crop_pct` 1 keeps all of the image
            (Hugging Face's ViT, DeiT, BEiT and SigLIP; timm's squash; DynamicViT from 384 pixels on).
            timm's "border" is not known.
        interpolation: a filter of Pillow, which smooths as it shrinks (but for "nearest").

    Raises:
        InputError: a value is out of range, or a name is not known.
    """

    image_size: tuple[int, int]
    crop_pct: float = 0.875
    crop_mode: str = "center"
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if not 0.1 <= self.crop_pct <= 1:
            raise InputError(f"crop_pct: {self.crop_pct:g} is not between 0.1 and 1")
        for what, value, known in (
            ("crop_mode", self.crop_mode, CROP_MODES),
            ("interpolation", self.interpolation, INTERPOLATIONS),
        ):
            if value not in known:
                raise InputError(f"{what}: {value!r} is not one of {', '.join(known)}")

    def __str__(self) -> str:
        warped = ["warped"] if self.warp else []
        cropped = [f"crop {self.crop_pct:g}"] if self.crop_pct < 1 or not warped else []
        resized = [self.interpolation] if self.interpolation != "bicubic" else []
        return ", ".join([f"{self.image_size[0]}x{self.image_size[1]}", *warped, *cropped, *resized])

    @property
    def warp(self) -> bool:
        """Whether the aspect ratio of images is ignored."""
        return self.crop_mode == "squash"

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize an RGB image, and crop the centre.

        For square sizes "center" equals torchvision's `Resize(int(S / crop_pct))` and `CenterCrop(S)` bit for bit, and
        "center_floor" transformers' `shortest_edge` and `center_crop`, except for very elongated images, which are
        cropped before resizing.
        """
        height, width = self.image_size
        rows, columns = int(height / self.crop_pct), int(width / self.crop_pct)
        if not self.warp:
            image = _shortened(image, rows, columns)
        size = (columns, rows) if self.warp else _covering(image, rows, columns)
        resized = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = (self._half(side) for side in (size[0] - width, size[1] - height))
        return resized.crop((left, top, left + width, top + height))

    def _half(self, margin: int) -> int:
        return margin // 2 if self.crop_mode == "center_floor" else round(margin / 2)  # torchvision's, to even

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return `crop` as (3, H, W) uint8."""
        return np.ascontiguousarray(np.asarray(self.crop(image)).transpose(2, 0, 1))


def _covering(image: Image.Image, rows: int, columns: int) -> tuple[int, int]:
    """Return (width, height) of the image when resized, in its aspect ratio, to just cover `rows` x `columns`."""
    if image.height * columns <= image.width * rows:
        return rows * image.width // image.height, rows
    return columns, columns * image.height // image.width


def _shortened(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """Crop the centre of an image to at most `MAX_ASPECT` times the aspect ratio of `rows` x `columns`."""
    width = min(image.width, max(1, MAX_ASPECT * columns * image.height // rows))
    height = min(image.height, max(1, MAX_ASPECT * rows * image.width // columns))
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
