"""Input tensors: check, move and normalise images."""

from collections.abc import Sequence

import torch

from dvit_infer.config import Config


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is dense, strided, not quantised, and has data."""
    return tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta and not tensor.is_quantized


def check_images(images: torch.Tensor, config: Config) -> None:
    """Raise ValueError unless `images` is (B, 3, H, W) of the config's size, B >= 1, in uint8 or floating point."""
    if not isinstance(images, torch.Tensor) or not is_plain(images):
        raise ValueError(f"images: a dense tensor with data is expected, not a {type(images).__name__}")
    height, width = config.image_size
    expected = f"(B, 3, {height}, {width}) in uint8 or floating point is expected"
    if images.ndim != 4 or images.shape[0] < 1 or tuple(images.shape[1:]) != (3, height, width):
        raise ValueError(f"images: shape {tuple(images.shape)}; {expected}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images: dtype {images.dtype}; {expected}")


def prepare(images: torch.Tensor, config: Config, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return checked images for the graph: on its device, normalised if they are uint8, in its dtype."""
    images = images.to(device)
    if images.dtype == torch.uint8:
        images = normalise(images, config.mean, config.std)
    return images.to(dtype).contiguous()


def normalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Convert uint8 (B, 3, H, W) to float32, normalised by the channels' mean and deviation."""
    means, stds = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (mean, std))
    return (images.float() / 255 - means) / stds
