"""Rotary position embeddings of patches (Su et al. 2021) on two axes: their tables, and the rotation."""

import math

import torch

from dvit_infer.models.vit.body import ViT


def rope_tables(
    body: ViT, grid: tuple[int, int], freqs: torch.Tensor | None = None, periods: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sines and cosines for every patch of a grid, in float32.

    Half of a head's frequencies turn with the row and half with the column (EVA02: Fang et al. 2023; DINOv3: Simeoni et
    al. 2025); with "mixed" each turns with both (Heo et al. 2024).

    Args:
        body: the facts of the model.
        grid: patches down and across.
        freqs: (2, depth, heads, head size / 2), for "mixed".
        periods: (head size / 4,), in place of those by `rope_theta`.

    Returns:
        Two tensors of (N, head size), for "mixed" of (depth, heads, N, head size), with each frequency twice, in the
        order in which `rotate` pairs channels.
    """
    axes = _coordinates(body, grid)
    if body.rope == "mixed":
        assert freqs is not None
        angles = axes[0][:, None] * freqs[0].float()[..., None, :] + axes[1][:, None] * freqs[1].float()[..., None, :]
    else:
        count = body.head_dim // 4
        if body.rope == "centered":
            steps = 2.0 * torch.arange(count, dtype=torch.float32) / (body.head_dim // 2)
            periods = body.rope_theta**steps if periods is None else periods.float()
            angles = torch.cat([2 * math.pi * axis[:, None] / periods for axis in axes], dim=1)
        else:
            bands = 1.0 / body.rope_theta ** (torch.arange(count, dtype=torch.float32) / count)
            angles = torch.cat([axis[:, None] * bands for axis in axes], dim=1)
    twice = torch.cat([angles, angles], dim=-1) if body.rope_half else angles.repeat_interleave(2, dim=-1)
    return twice.sin(), twice.cos()


def _coordinates(body: ViT, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both coordinates (N,) of every patch, row by row, in the order of the frequencies."""
    axes = []
    for count in grid:
        at = torch.arange(count, dtype=torch.float32)
        if body.rope == "centered":
            at = 2.0 * ((at + 0.5 + body.rope_offset) / count) - 1.0
        else:
            at = at + body.rope_offset
            at = at / count * body.rope_ref if body.rope_ref else at
        axes.append(at)
    rows, columns = (axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij"))
    return (columns, rows) if body.rope_xy else (rows, columns)


def rotate(x: torch.Tensor, sin: torch.Tensor, cos: torch.Tensor, half: bool) -> torch.Tensor:
    """Rotate pairs of channels of (..., head size): x * cos + (x turned by a right angle) * sin, rounded once.

    Args:
        x: queries or keys.
        sin, cos: float32, of the same shape or broadcast.
        half: whether channel i is paired with i + half of the channels, not with its neighbour.
    """
    if half:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    return (x * cos + turned * sin).to(x.dtype)
