"""The family's reference model."""

from collections.abc import Sequence

import torch
from torch import nn

from dvit_infer.models.reference import EvalOutput, Reference
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.layers import Block


class MeanViTModel(Reference):
    """Patches, blocks, LayerNorm, mean of the patches, head.

    `stages` are pairs of block and number of tokens kept, `choose` a reduction's.
    """

    def __init__(self, *, patch_size, embed_dim, depth, num_heads, mlp_dim, num_patches, num_classes, stages, choose):
        super().__init__()
        self.stages, self.choose = stages, choose
        self.patchify = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.positions = nn.Parameter(torch.zeros(1, num_patches, embed_dim))
        body = ViT(patch_size, embed_dim, depth, num_heads, mlp_dim, eps=1e-6)
        self.layers = nn.ModuleList(Block(body) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def evaluate(self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None = None) -> EvalOutput:
        x = self.patchify(images).flatten(2).transpose(1, 2) + self.positions
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        chosen, margins = [], []
        for i, layer in enumerate(self.layers):
            for s, (block, keep) in enumerate(self.stages):
                if block == i:
                    index, margin = self.choose(x, s, keep, ())
                    if kept is not None:
                        index = torch.searchsorted(positions.contiguous(), kept[s].contiguous())
                    x = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
                    positions = positions.gather(1, index)
                    chosen.append(positions)
                    margins.append(margin)
            x = layer(x)
        margin = torch.stack(margins, dim=1) if margins else x.new_empty(len(x), 0)
        return EvalOutput(self.head(self.norm(x).mean(dim=1)), chosen, margin)
