"""The trunk that DeiT and LV-ViT share: embed, blocks with pruning between them, head."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from dvit_infer.models.reference import EvalOutput, Reference, TrainOutput
from dvit_infer.models.vit.layers import Block

# (patches (B, N, C), stage, keep, score_predictor) -> indices (B, keep), ascending, and the gap (B,) at the cut
Choose = Callable[[torch.Tensor, int, int, Sequence[nn.Module]], tuple[torch.Tensor, torch.Tensor]]


class VisionTransformer(Reference):
    """A vision transformer whose patch tokens are dropped before the blocks `prune_at`.

    Args:
        num_patches: the number N of patch tokens at the image size it is built for.
        num_prefix: 1, or 2 with a distillation token; these are never dropped.
        layer_scale: whether the blocks' branches are scaled by channel.
        no_embed_class: whether the position embedding has no rows for the prefix tokens.
        prune_at: one block index per stage; empty to run dense, with or without predictors.
        num_keep: the number of patch tokens kept at each stage.
        choose: chooses them.
        score_predictor: one module per stage, if the weights hold some.
        trainable: whether these modules choose.
    """

    patch_embed: nn.Module

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int,
        num_classes: int,
        num_patches: int,
        num_prefix: int = 1,
        eps: float,
        qkv_bias: bool,
        skip_lam: float = 1.0,
        layer_scale: bool = False,
        no_embed_class: bool = False,
        prune_at: Sequence[int] = (),
        num_keep: Sequence[int] = (),
        choose: Choose | None = None,
        score_predictor: nn.ModuleList | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.choose, self.trainable = choose, trainable
        self.num_prefix = num_prefix
        self.prune_at = tuple(prune_at)
        self.num_keep = tuple(num_keep)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if num_prefix == 2:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.no_embed_class = no_embed_class
        rows = num_patches + (0 if no_embed_class else num_prefix)
        self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_dim, eps, qkv_bias, skip_lam, layer_scale) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        self.head = nn.Linear(embed_dim, num_classes)
        self.score_predictor = score_predictor

    @abstractmethod
    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """(B, P+n, C) tokens after the last norm -> (B, K) logits, in evaluation."""

    @abstractmethod
    def patch_outputs(self, x: torch.Tensor) -> torch.Tensor:
        """(B, P+N, C) tokens after the last norm -> the outputs of every patch that training distils."""

    def train_logits(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, P+N, C) tokens after the last norm, (B, N) mask of those that stay -> (B, K) logits, in training."""
        out: torch.Tensor = self.head(x[:, 0])
        return out

    def prefix_tokens(self) -> list[torch.Tensor]:
        """Return the class token and, if present, the distillation token, (1, 1, C) each."""
        return [self.cls_token, self.dist_token] if self.num_prefix == 2 else [self.cls_token]

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, P+N, C)."""
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        prefix = [token.expand(patches.shape[0], -1, -1) for token in self.prefix_tokens()]
        if self.no_embed_class:
            return torch.cat([*prefix, patches + self.pos_embed], dim=1)
        return torch.cat([*prefix, patches], dim=1) + self.pos_embed

    def evaluate(self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None = None) -> EvalOutput:
        """Run inference: drop tokens at every stage; `kept` overrides the choice."""
        x = self.embed(images)
        b, p = x.shape[0], self.num_prefix  # not len(): an exporter would take it for a constant
        positions = torch.arange(x.shape[1] - p, device=x.device).expand(b, -1)
        all_kept, margins = [], []
        for i, block in enumerate(self.blocks):
            if i in self.prune_at:
                stage = self.prune_at.index(i)
                assert self.choose is not None
                index, margin = self.choose(x[:, p:], stage, self.num_keep[stage], list(self.score_predictor or ()))
                if kept is not None:
                    index = torch.searchsorted(positions.contiguous(), kept[stage].to(x.device).contiguous())
                rows = torch.cat([torch.arange(p, device=x.device).expand(b, -1), index + p], dim=1)
                x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
                positions = positions.gather(1, index)
                all_kept.append(positions)
                margins.append(margin)
            x = block(x)
        margin = torch.stack(margins, dim=1) if margins else x.new_empty(b, 0)
        return EvalOutput(self.classify(self.norm(x)), all_kept, margin)

    def forward_train(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> TrainOutput:
        """Run with dropped tokens masked out of attention and decisions drawn by Gumbel-softmax (Rao et al. 2021, 3.3).

        A model without predictors is a teacher: nothing is masked. Dropout, if any, is up to the trainer.

        Args:
            images: (B, 3, H, W).
            noise: (stages, B, N, 2) float32 Gumbel samples to decide by; None: PyTorch draws them.
        """
        if self.prune_at and not self.trainable:
            raise NotImplementedError("a reduction without predictors cannot be trained")
        x = self.embed(images)
        p = self.num_prefix
        keep = x.new_ones(len(x), x.shape[1] - p, 1)
        policy = None  # before the first predictor nothing is masked
        decisions = []
        for i, block in enumerate(self.blocks):
            if i in self.prune_at:
                stage = self.prune_at.index(i)
                assert self.score_predictor is not None
                scores = self.score_predictor[stage](x[:, p:], keep).log_softmax(dim=-1)
                keep = _decide(scores, None if noise is None else noise[stage])[..., :1] * keep
                policy = torch.cat([keep.new_ones(len(x), p, 1), keep], dim=1)
                decisions.append(keep.squeeze(-1))
            x = block(x, policy)
        x = self.norm(x)
        mask = keep.detach().squeeze(-1)
        return TrainOutput(self.train_logits(x, mask), self.patch_outputs(x), mask, decisions)


def _decide(scores: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """(B, N, 2) log-probabilities -> one-hot decisions whose gradient is the softmax's (Jang et al. 2017, section 2.2).

    With `noise` (B, N, 2), the arithmetic is in float32, also under autocast.
    """
    if noise is None:
        return F.gumbel_softmax(scores, hard=True)
    soft = (scores.float() + noise).softmax(dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())
