"""How the values of a tensor are put in another order; each raises ValueError for a shape that does not fit."""

import math

import torch


def row(tensor: torch.Tensor) -> torch.Tensor:
    """Return a token (C,) or (..., C) as (1, 1, C)."""
    if tensor.dim() == 0 or tensor.numel() != tensor.shape[-1]:
        raise ValueError("one token is expected")
    return tensor.reshape(1, 1, -1)


def table(tensor: torch.Tensor) -> torch.Tensor:
    """Return positions (N, C), (1, N, C) or (rows, columns, C) as (1, N, C)."""
    if tensor.dim() not in (2, 3):
        raise ValueError("a table of positions is expected")
    return tensor.reshape(1, -1, tensor.shape[-1])


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a matrix (in, out) as (out, in)."""
    if tensor.dim() != 2:
        raise ValueError("a matrix is expected")
    return tensor.transpose(0, 1)


def patches(tensor: torch.Tensor) -> torch.Tensor:
    """Return a linear (C, p*p*3), of pixels in the order row, column, channel, as a convolution (C, 3, p, p)."""
    if tensor.dim() != 2:
        return tensor
    side = math.isqrt(tensor.shape[1] // 3)
    if tensor.shape[1] != 3 * side * side:
        raise ValueError("rows of p*p*3 numbers are expected, for square patches of three channels")
    return tensor.reshape(-1, side, side, 3).permute(0, 3, 1, 2)


def flax_patches(tensor: torch.Tensor) -> torch.Tensor:
    """Return a convolution (p, p, 3, C), or a linear (p*p*3, C), as (C, 3, p, p)."""
    if tensor.dim() == 2:
        return patches(tensor.transpose(0, 1))
    if tensor.dim() != 4:
        raise ValueError("four dimensions are expected")
    return tensor.permute(3, 2, 0, 1)


def from_heads(tensor: torch.Tensor) -> torch.Tensor:
    """Return a projection (C, heads, channels) to heads as (heads * channels, C)."""
    if tensor.dim() != 3:
        raise ValueError("width, heads and channels are expected")
    return tensor.flatten(1).transpose(0, 1)


def to_width(tensor: torch.Tensor) -> torch.Tensor:
    """Return a projection (heads, channels, C) from heads as (C, heads * channels)."""
    if tensor.dim() != 3:
        raise ValueError("heads, channels and width are expected")
    return tensor.flatten(0, 1).transpose(0, 1)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return a bias (heads, channels) as (heads * channels,)."""
    return tensor.reshape(-1)
