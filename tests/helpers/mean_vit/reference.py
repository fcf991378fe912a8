"""The family's reference model."""

from collections.abc import Sequence

import torch
from torch import nn

from dvit_infer.config import Config
from dvit_infer.models.reference import EvalOutput, Reference
from dvit_infer.models.vit.layers import Block
from dvit_infer.reduction import METHODS


class MeanViTModel(Reference):
    """Patches, blocks, LayerNorm, mean of the patches, head; tokens are dropped by the config's reduction."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        body, self.reduction = config.body, config.reduction
        self.patchify = nn.Conv2d(3, body.embed_dim, body.patch_size, body.patch_size)
        self.positions = nn.Parameter(torch.zeros(1, config.num_patches, body.embed_dim))
        sizes = body.embed_dim, body.num_heads, body.mlp_dim
        self.layers = nn.ModuleList(Block(*sizes, 1e-6, qkv_bias=True, skip_lam=1.0) for _ in range(body.depth))
        self.norm = nn.LayerNorm(body.embed_dim, eps=1e-6)
        self.head = nn.Linear(body.embed_dim, config.num_classes)

    def evaluate(self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None = None) -> EvalOutput:
        x = self.patchify(images).flatten(2).transpose(1, 2) + self.positions
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        chosen, margins = [], []
        for i, layer in enumerate(self.layers):
            for s, stage in enumerate(self.reduction.stages):
                if stage.block == i:
                    index, margin = METHODS[self.reduction.method].choose(x, s, stage.keep, ())
                    if kept is not None:
                        index = torch.searchsorted(positions.contiguous(), kept[s].contiguous())
                    x = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
                    positions = positions.gather(1, index)
                    chosen.append(positions)
                    margins.append(margin)
            x = layer(x)
        margin = torch.stack(margins, dim=1) if margins else x.new_empty(len(x), 0)
        return EvalOutput(self.head(self.norm(x).mean(dim=1)), chosen, margin)


def reference(config: Config) -> MeanViTModel:
    return MeanViTModel(config)
