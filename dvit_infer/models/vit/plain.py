"""Plain vision transformers: DeiT (Touvron et al. 2021), DynamicViT on it (Rao et al. 2021), and any other owner's."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.layers import AttentionPool
from dvit_infer.models.vit.reference import VisionTransformer


class PatchEmbed(nn.Module):
    """One convolution with the stride of its kernel."""

    def __init__(self, patch_size: int, embed_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.proj(images)
        return out


class PreLogits(nn.Module):
    """A linear and tanh (the pooler of Hugging Face's ViT)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x).tanh()
        return out


class PlainViT(VisionTransformer):
    """A plain vision transformer: pooling, a classifier if there is one.

    With a distillation token that has a head, logits are the mean of both heads'. Without classes they are the pooled
    row.
    """

    def __init__(self, body: ViT, *, num_classes: int, **trunk: Any) -> None:
        super().__init__(body, **trunk)
        dim = body.embed_dim
        self.patch_embed = PatchEmbed(body.patch_size, dim, bias=not body.no_patch_bias)
        self.num_classes = num_classes
        self.distilled = body.class_tokens == 2 and not body.no_head_dist
        if body.pool.startswith("map"):
            self.attn_pool = AttentionPool(body)
        if body.fc_norm:
            self.fc_norm = nn.LayerNorm(dim, eps=body.eps)
        if body.pre_logits:
            self.pre_logits = PreLogits(dim)
        if num_classes or body.projection:
            read = dim if body.projection else body.pooled_dim
            self.head = nn.Linear(read, num_classes or body.projection, bias=not body.no_head_bias)
        if self.distilled and num_classes:
            self.head_dist = nn.Linear(dim, num_classes)

    def pool(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        y = self._pooled(x, weights)
        y = self.fc_norm(y) if self.body.fc_norm else y
        y = self.pre_logits(y) if self.body.pre_logits else y
        out: torch.Tensor = self.head(y) if self.body.projection else y
        return out

    def _pooled(self, x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        p, pool = self.num_prefix, self.body.pool
        if pool.startswith("map"):
            out: torch.Tensor = self.attn_pool(x[:, p:] if pool == "map" else x)
            return out
        if pool == "token":
            first: torch.Tensor = x[:, :2].mean(dim=1) if self.distilled else x[:, 0]
            return first
        if pool == "token_mean":
            return torch.cat([x[:, 0], _mean(x[:, p:], weights)], dim=1)
        if pool == "mean":
            return _mean(x[:, p:], weights)
        return _mean(x, None if weights is None else F.pad(weights, (p, 0), value=1.0))

    def classify(self, x: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        if not self.num_classes:
            return pooled
        if self.distilled:
            pooled = (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
            return pooled
        out: torch.Tensor = self.head(pooled)
        return out

    def patch_outputs(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.num_prefix :]


def _mean(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """Return the mean of tokens (B, n, C), weighted by (B, n)."""
    if weights is None:
        return x.mean(dim=1)
    share = weights / weights.sum(dim=1, keepdim=True)
    return (x * share[..., None].to(x.dtype)).sum(dim=1)
