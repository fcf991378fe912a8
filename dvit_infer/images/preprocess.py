"""A decoded image cut to the size of a model's input, as its family was evaluated."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dvit_infer.config import Config
from dvit_infer.errors import InputError

MAX_ASPECT = 8  # of the part of an image that is resized, over the part that is kept


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model's input.

    Attributes:
        image_size: (H, W) of the model's images.
        crop_pct: what is kept of the resized image's shorter side, 0.1 to 1.
        warp: resize straight to `image_size` instead, whatever the image's shape.

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
        """The RGB image, resized (bicubic, antialiased) so that it covers `image_size` / `crop_pct`, and its middle.

        For square sizes torchvision's `Resize(int(S / crop_pct), BICUBIC)` and `CenterCrop(S)`, to the bit, but for
        images so elongated that most of them would be resized only to be cut away: they are cut first.
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
        """`crop` as (3, H, W) uint8."""
        return np.ascontiguousarray(np.asarray(self.crop(image)).transpose(2, 0, 1))


def _shortened(image: Image.Image, rows: int, columns: int) -> Image.Image:
    """The middle of an image, at most `MAX_ASPECT` times as elongated as `rows` x `columns`."""
    width = min(image.width, max(1, MAX_ASPECT * columns * image.height // rows))
    height = min(image.height, max(1, MAX_ASPECT * rows * image.width // columns))
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


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
