"""The base class of reference models: plain PyTorch with the official parameter names, which defines the function."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn


class EvalOutput(NamedTuple):
    """The output of inference.

    logits: (B, K). kept: one (B, k) int64 tensor of original patch positions per stage, ascending; of a model that
    merges tokens (B, N): for every original patch the lowest one of the group that holds it.
    margin: (B, stages) the least gap between scores that rounding would have to close to change what the stage does, as
    that of the last token kept and the first one dropped; inf if it cannot.
    features: (B, D), what the classifier reads, or the embedding of a model without one.
    tokens: (B, P+k, C) after the last norm, if one is applied to all tokens. positions: (B, k) of its patch tokens: of
    a merged one the lowest of its group; None: all, in order.
    """

    logits: torch.Tensor
    kept: list[torch.Tensor]
    margin: torch.Tensor
    features: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    positions: torch.Tensor | None = None


class TrainOutput(NamedTuple):
    """The output of training, as that of the official models.

    pred: (B, K) logits. tokens: (B, N, C) patch features after the last norm or (B, N, K) their auxiliary logits, which
    training distils. mask: (B, N), 1 for the patches that the last stage kept. decisions: one (B, N) tensor per stage.
    """

    pred: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor
    decisions: list[torch.Tensor]


class Reference(nn.Module, ABC):
    """A model of some family.

    Attributes:
        token_loss: how training compares a student's `TrainOutput.tokens` with a teacher's: by mean squared error, or
            by KL divergence if they are logits.
        distil_features: whether training distils features, because the teacher's classes are others: then
            `TrainOutput.tokens` are features, and its `pred` the logits of evaluation, so that all heads learn.
    """

    token_loss: Literal["mse", "kl"] = "mse"
    distil_features: bool = False

    def fuse_attention(self) -> None:
        """Use PyTorch's fused attention from now on, which FLOP counters do not see."""
        for module in self.modules():
            if "fused" in vars(module):
                vars(module)["fused"] = True

    @abstractmethod
    def evaluate(self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None = None) -> EvalOutput:
        """Run inference on images (B, 3, H, W); `kept` overrides the choice of tokens."""

    def forward_train(self, images: torch.Tensor, noise: torch.Tensor | None = None) -> TrainOutput:
        """Run with dropped tokens masked; `noise` (stages, B, N, 2) are the Gumbel samples to decide by."""
        raise NotImplementedError(f"{type(self).__name__} cannot be trained here")

    def forward(
        self,
        images: torch.Tensor,
        return_kept: bool = False,
        kept: Sequence[torch.Tensor] | None = None,
        noise: torch.Tensor | None = None,
    ) -> Any:
        """Return logits (B, K) in evaluation, with the kept positions if requested; a TrainOutput in training.

        `return_kept` and `kept` are for evaluation, `noise` is for training.
        """
        if self.training:
            return self.forward_train(images, noise)
        out = self.evaluate(images, kept)
        return (out.logits, out.kept) if return_kept else out.logits
