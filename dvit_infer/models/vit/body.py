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
        layer_scale: whether residual branches are scaled by channel (DeiT III).
        no_qkv_bias: whether DeiT's queries, keys and values lack the bias that LV-ViT's never have.
        no_embed_class: whether the prefix tokens have no position of their own (DeiT III).
    """

    num_heads: int
    mlp_dim: int
    eps: float
    num_prefix: int = 1
    stem_dim: int = 0
    skip_lam: float = 1.0
    layer_scale: bool = False
    no_qkv_bias: bool = False
    no_embed_class: bool = False

    @property
    def placed_prefix(self) -> int:
        """The number of prefix tokens in the position embedding."""
        return 0 if self.no_embed_class else self.num_prefix

    def __post_init__(self) -> None:
        if self.depth > _MOST_BLOCKS or self.embed_dim % self.num_heads:
            raise InputError(f"depth: {self.depth} blocks of {self.num_heads} heads are impossible")
