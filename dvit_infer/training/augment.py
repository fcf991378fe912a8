"""Augmentation of training images; all random numbers come from the image's own generator."""

import functools
import importlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from dvit_infer.errors import InputError


def has_torchvision() -> bool:
    """Return whether torchvision can be imported; one built for another torch cannot."""
    try:
        importlib.import_module("torchvision.transforms.v2")
    except (ImportError, RuntimeError, OSError):
        return False
    return True


@dataclass(frozen=True)
class Augmentation:
    """A random crop, resized, and a flip; with torchvision also RandAugment and erasing.

    Attributes:
        image_size: (H, W) of the result.
        scale: smallest share of the image's area that a crop keeps (Szegedy et al. 2015, section 6); 1: no crop, the
            whole image is resized.
        flip: probability of a horizontal flip.
        randaugment: magnitude, 0 to 30, of two operations (Cubuk et al. 2020); 0: none.
        erase: probability of erasing a rectangle (Zhong et al. 2020) with the colour `fill`.
        torchvision: whether to use it (`has_torchvision`).

    Raises:
        InputError: A number is out of range.
    """

    image_size: tuple[int, int]
    scale: float = 0.08
    flip: float = 0.5
    randaugment: int = 9
    erase: float = 0.25
    fill: tuple[int, int, int] = (124, 116, 104)
    torchvision: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise InputError(f"scale: {self.scale:g} is no share of an image; a number above 0, at most 1, is expected")
        for name in ("flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: {getattr(self, name):g} is no probability")
        if not 0 <= self.randaugment <= 30:
            raise InputError(f"randaugment: {self.randaugment} is no magnitude from 0 to 30")

    def __str__(self) -> str:
        done = ["the whole image" if self.scale == 1 else f"random resized crop from {100 * self.scale:g}%"]
        if self.flip:
            done.append("flip")
        more = [f"RandAugment {self.randaugment}"] if self.randaugment else []
        more += [f"erasing {self.erase:g}"] if self.erase else []
        if self.torchvision and more:
            return f"{', '.join(done + more)} (torchvision)"
        missed = f" (torchvision cannot be imported: no {' and no '.join(more)})" if more else ""
        return ", ".join(done) + missed

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Return an augmented RGB image as (3, H, W) uint8."""
        if self.torchvision and (self.randaugment or self.erase):
            return self._by_torchvision(image, rng)
        height, width = self.image_size
        box = None if self.scale == 1 else _crop(image.width, image.height, self.scale, rng)
        resized = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
        if rng.random() < self.flip:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))

    def _by_torchvision(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        # torchvision draws from torch's global CPU generator: seed it from the image's generator, then restore it.
        # `torch.manual_seed` would also seed the GPUs' generators, which are not restored.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(1 << 63)))
            out: np.ndarray = _transforms(self)(image).numpy()
        return np.ascontiguousarray(out)


def _crop(width: int, height: int, scale: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a crop with at least `scale` of the area and an aspect of 3:4 to 4:3."""
    for _ in range(10):
        area = width * height * rng.uniform(scale, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    # No crop fitted, as in an elongated image: take the largest central one.
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@functools.lru_cache(maxsize=4)
def _transforms(wanted: Augmentation) -> Any:
    v2: Any = importlib.import_module("torchvision.transforms.v2")
    bicubic = v2.InterpolationMode.BICUBIC
    if wanted.scale == 1:
        steps: list[Any] = [v2.Resize(list(wanted.image_size), bicubic)]
    else:
        steps = [v2.RandomResizedCrop(list(wanted.image_size), (wanted.scale, 1.0), interpolation=bicubic)]
    steps.append(v2.RandomHorizontalFlip(wanted.flip))
    if wanted.randaugment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=wanted.randaugment, fill=list(wanted.fill)))
    steps.append(v2.PILToTensor())
    if wanted.erase:
        steps.append(v2.RandomErasing(wanted.erase, value=list(wanted.fill)))
    return v2.Compose(steps)
