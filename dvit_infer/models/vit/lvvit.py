"""LV-ViT (Jiang et al. 2021, 'All Tokens Matter') and DynamicViT on it (Rao et al. 2021)."""

from typing import Any

import torch
from torch import nn

from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.reference import VisionTransformer


class ConvStem(nn.Module):
    """Three convolutions with BatchNorm at half the image size, then the patch projection."""

    def __init__(self, patch_size: int, stem_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem_dim, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem_dim)
        self.conv2 = nn.Conv2d(stem_dim, stem_dim, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem_dim)
        self.conv3 = nn.Conv2d(stem_dim, stem_dim, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(stem_dim)
        self.proj = nn.Conv2d(stem_dim, embed_dim, kernel_size=patch_size // 2, stride=patch_size // 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(images)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.bn3(self.conv3(x)).relu()
        out: torch.Tensor = self.proj(x)
        return out


class LVViT(VisionTransformer):
    """LV-ViT: class-token logits plus half of the largest auxiliary logit among the surviving patches, per class."""

    token_loss = "kl"

    def __init__(self, body: ViT, *, num_classes: int, **trunk: Any) -> None:
        super().__init__(body, **trunk)
        self.patch_embed = ConvStem(body.patch_size, body.stem_dim, body.embed_dim)
        self.head = nn.Linear(body.embed_dim, num_classes)
        self.aux_head = nn.Linear(body.embed_dim, num_classes)

    def pool(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        return x[:, 0]

    def classify(self, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(pooled)
        best: torch.Tensor = self.aux_head(x[:, 1:]).amax(dim=1)
        return logits + 0.5 * best

    def train_logits(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(x[:, 0])
        if not self.distil_features:  # the auxiliary head learns from the teacher's
            return logits
        aux: torch.Tensor = self.aux_head(x[:, 1:])
        best = aux.masked_fill(mask[..., None] == 0, -torch.inf).amax(dim=1)
        return logits + 0.5 * torch.where(mask.any(dim=1, keepdim=True), best, 0.0)

    def patch_outputs(self, x: torch.Tensor) -> torch.Tensor:
        if self.distil_features:
            return x[:, 1:]
        out: torch.Tensor = self.aux_head(x[:, 1:])
        return out
