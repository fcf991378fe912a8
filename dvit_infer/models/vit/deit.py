"""DeiT (Touvron et al. 2021) and DynamicViT on it (Rao et al. 2021)."""

from typing import Any

import torch
from torch import nn

from dvit_infer.models.vit.reference import VisionTransformer


class PatchEmbed(nn.Module):
    """One convolution with the stride of its kernel."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj(images)
        return out


class DeiT(VisionTransformer):
    """DeiT: logits from the class token; with a distillation token, the mean of both heads' logits."""

    def __init__(
        self,
        *,
        patch_size: int,
        embed_dim: int,
        num_classes: int,
        num_prefix: int = 1,
        qkv_bias: bool = True,
        **trunk: Any,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim, num_classes=num_classes, num_prefix=num_prefix, qkv_bias=qkv_bias, **trunk
        )
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        if num_prefix == 2:
            self.head_dist = nn.Linear(embed_dim, num_classes)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(x[:, 0])
        return (logits + self.head_dist(x[:, 1])) / 2 if self.num_prefix == 2 else logits

    def train_logits(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.classify(x)

    def patch_outputs(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.num_prefix :]
