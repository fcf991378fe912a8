"""Synthetic images, deterministic by seed."""

from __future__ import annotations

import numpy as np
import torch

from dvit_infer.config import IMAGENET_MEAN, IMAGENET_STD


def image(batch: int, size: int | tuple[int, int] = 224, seed: int = 0) -> np.ndarray:
    """Return `batch` normalised images, (B, 3, H, W) float32: smooth blobs plus noise."""
    h, w = (size, size) if isinstance(size, int) else size
    rng = np.random.Generator(np.random.PCG64(104729 + seed))
    yy, xx = np.mgrid[0:h, 0:w].astype(np.float32)
    out = 0.3 * rng.standard_normal((batch, 3, h, w), dtype=np.float32)
    for b in range(batch):
        for _ in range(6):
            cy, cx = rng.uniform(0, h), rng.uniform(0, w)
            s = rng.uniform(0.05, 0.25) * min(h, w)
            bump = np.exp(-((yy - cy) ** 2 + (xx - cx) ** 2) / (2 * s * s)).astype(np.float32)
            out[b] += bump * rng.standard_normal((3, 1, 1)).astype(np.float32) * 2
    return out.astype(np.float32)


def sample_images(batch: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Return synthetic normalised images, (B, 3, H, W) float32: smooth blobs and noise, deterministic by seed."""
    return torch.from_numpy(image(batch, size, seed))


def sample_uint8_images(batch: int, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Return the images of `sample_images` as (B, 3, H, W) uint8, by ImageNet's mean and deviation."""
    means, stds = (torch.tensor(v).view(1, -1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((sample_images(batch, size, seed) * stds + means) * 255).round().clamp(0, 255).to(torch.uint8)
