"""The facts of a plain vision transformer. Does not import torch."""

from dataclasses import dataclass

from dvit_infer.config import Body
from dvit_infer.errors import InputError

_MOST_BLOCKS = 1000


@dataclass(frozen=True)
class ViT(Body):
    """A plain vision transformer: patches, equal blocks, a head.

    Attributes:
        eps: for every LayerNorm in the blocks and for the last one.
        num_prefix: class token, and distillation token if present: never pruned.
        stem_dim: channels of LV-ViT's convolutional stem; 0: patches are projected directly.
        skip_lam: residual branches are divided by this (LV-ViT).
    """

    num_heads: int
    mlp_dim: int
    eps: float
    num_prefix: int = 1
    stem_dim: int = 0
    skip_lam: float = 1.0

    def __post_init__(self) -> None:
        if self.depth > _MOST_BLOCKS or self.embed_dim % self.num_heads:
            raise InputError(f"depth: {self.depth} blocks of {self.num_heads} heads are impossible")
