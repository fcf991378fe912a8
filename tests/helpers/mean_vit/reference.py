"""The family's reference model."""

from collections.abc import Sequence

import torch
from torch import nn

from dvit_infer.models.reference import EvalOutput, Reference
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.layers import Block


class MeanViTModel(Reference):
    """Patches, blocks, LayerNorm, mean of the patches, head.

    `begin` begins the stages of a reduction in one forward; None: the model is dense.
    """

    def __init__(self, *, patch_size, embed_dim, depth, num_heads, mlp_dim, num_patches, num_classes, begin):
        super().__init__()
        self.begin = begin
        self.patchify = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.positions = nn.Parameter(torch.zeros(1, num_patches, embed_dim))
        body = ViT(patch_size, embed_dim, depth, num_heads, mlp_dim, eps=1e-6, num_prefix=0, pool="mean")
        self.layers = nn.ModuleList(Block(body) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def evaluate(self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None = None) -> EvalOutput:
        x = self.patchify(images).flatten(2).transpose(1, 2) + self.positions
        progress = None if self.begin is None else self.begin((), kept)
        for i, layer in enumerate(self.layers):
            x = layer(x if progress is None else progress.before(i, x), reducing=progress)
        x = self.norm(x)
        if progress is None:
            return EvalOutput(self.head(x.mean(dim=1)), [], x.new_empty(len(x), 0))
        weights = torch.ones_like(x[:, :, 0]) if progress.weights is None else progress.weights
        share = weights / weights.sum(dim=1, keepdim=True)
        mean = (share.float()[:, None] @ x.float())[:, 0].to(x.dtype)
        return EvalOutput(self.head(mean), progress.kept, torch.stack(progress.margins, dim=1))
