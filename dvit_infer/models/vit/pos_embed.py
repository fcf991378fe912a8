"""Resampling a position embedding to another image size."""

import torch
from torch.nn import functional as F


def resample_pos_embed(
    pos_embed: torch.Tensor, num_prefix: int, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """Resample (1, P + old patches, C) to (1, P + new patches, C) as timm does.

    Bicubic with antialiasing, align_corners False, in float32; the first `num_prefix` rows are left as they are.
    (timm's `resample_abs_pos_embed`; the official DynamicViT resampled bilinearly.)
    """
    if old_grid == new_grid:
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    planes = patches.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    patches = planes.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1)
