"""What tests of patch_embedding share: its inputs, and the convolution that it replaces."""

import torch
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_images(b: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(b * height + width)
    if dtype == torch.uint8:
        return torch.randint(0, 256, (b, channels, height, width), generator=generator, dtype=torch.uint8)
    return torch.randn(b, channels, height, width, generator=generator).to(dtype)


def make_weights(c: int, channels: int, p: int, num_prefix: int, n: int) -> tuple[torch.Tensor, ...]:
    """weight, bias, prefix, pos_embed in float32."""
    generator = torch.Generator().manual_seed(c + p)
    shapes = ((c, channels, p, p), (c,), (1, num_prefix, c), (1, num_prefix + n, c))
    weight, *others = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight / (channels * p * p) ** 0.5, *others


def convolved(
    images: torch.Tensor, weights: tuple[torch.Tensor, ...], dtype: torch.dtype, normalise: bool = False
) -> torch.Tensor:
    """The tokens as PyTorch's layers make them in `dtype`, in float64 from what they are given in float32."""
    if normalise:
        to_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        mean, std = (images.new_tensor(v, dtype=to_dtype)[:, None, None] for v in (MEAN, STD))
        images = (images.to(to_dtype) / 255 - mean) / std
    weight, bias, prefix, pos_embed = (w.to(images.device, dtype) for w in weights)
    patches = F.conv2d(images.to(dtype), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([prefix.expand(len(images), -1, -1), patches], dim=1) + pos_embed
