"""Resampling a position embedding to another image size, by the rule of the file's owner."""

from typing import Any

import torch
from torch.nn import functional as F

RULES = {
    "timm": "bicubic with antialiasing, as timm",
    "huggingface": "bicubic without antialiasing, as Hugging Face; with it for DINOv2 with registers",
    "meta": "bicubic, by the factor of (n + 0.1) patches, as DINOv2; with registers by size and with antialiasing",
    "big_vision": "bilinear, as big_vision",
    "siglip2": "bilinear with antialiasing, as SigLIP2",
    "torchvision": "bicubic, corner to corner, as torchvision",
}


def resample_pos_embed(
    pos_embed: torch.Tensor,
    num_prefix: int,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    rule: str = "timm",
    registers: bool = False,
) -> torch.Tensor:
    """Resample (1, P + old patches, C) to (1, P + new patches, C), in float32, by a rule of `RULES`.

    The first `num_prefix` rows are left as they are; `registers`: the model has some. The rules are those of timm's
    `resample_abs_pos_embed`, transformers' and DINOv2's `interpolate_pos_encoding`, big_vision's `resample_posemb`, and
    torchvision's `interpolate_embeddings`. The official DynamicViT resampled bilinearly.
    """
    if old_grid == new_grid:
        return pos_embed
    prefix, patches = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    planes = patches.float().reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    planes = F.interpolate(planes, **_arguments(rule, registers, old_grid, new_grid))
    patches = planes.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([prefix, patches], dim=1)


def _arguments(rule: str, registers: bool, old: tuple[int, int], new: tuple[int, int]) -> dict[str, Any]:
    if rule == "torchvision":
        return {"size": new, "mode": "bicubic", "align_corners": True}
    if rule == "meta" and not registers:
        return {"scale_factor": tuple((n + 0.1) / o for n, o in zip(new, old, strict=True)), "mode": "bicubic"}
    mode = "bilinear" if rule in ("big_vision", "siglip2") else "bicubic"
    antialias = rule in ("timm", "siglip2") or (registers and rule in ("huggingface", "meta"))
    return {"size": new, "mode": mode, "antialias": antialias}
