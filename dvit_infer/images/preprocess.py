"""Resize and crop a decoded image to a model's input size, as its family was evaluated."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dvit_infer.errors import InputError

MAX_ASPECT = 8  # largest aspect ratio of the resized part, relative to that of the crop


@dataclass(frozen=True)
class Preprocess:
    """The resizing and cropping of images.

    Attributes:
        image_size: (H, W) of the model's input.
        crop_pct: share of the resized image's shorter side that the crop keeps, 0.1 to 1.
        warp: resize to `image_size` without cropping, ignoring the image's aspect ratio.

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

    def crop(self, image: Image.Image) -> Image.Image:
        """Resize an RGB image (bicubic, antialiased) to cover `image_size` / `crop_pct`, and crop the centre.

        For square sizes this equals torchvision's `Resize(int(S / crop_pct), BICUBIC)` and `CenterCrop(S)` bit for
        bit, except for very elongated images, which are cropped before resizing.
        """
        height, width = self.image_size
        if self.warp:
            return image.resize((width, height), Image.Resampling.BICUBIC)
        rows, columns = int(height / self.crop_pct), int(width / self.crop_pct)
        image = _shortened(image, rows, columns)
        if image.height * columns <= image.width * rows:
            size = rows * image.width // image.height, rows
        else:
            size = columns, columns * image.height // image.width
        resized = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return resized.crop((left, top, left + width, top + height))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return `crop` as (3, H, W) uint8."""
        return np.ascontiguousarray(np.asarray(self.crop(image)).transpose(2, 0, 1))


def _shortened(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """Crop the centre of an image to at most `MAX_ASPECT` times the aspect ratio of `rows` x `columns`."""
    width = min(image.width, max(1, MAX_ASPECT * columns * image.height // rows))
    height = min(image.height, max(1, MAX_ASPECT * rows * image.width // columns))
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
