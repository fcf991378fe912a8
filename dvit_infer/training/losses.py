"""The training losses (Rao et al. 2021, section 3.4, and the official `losses.py`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from dvit_infer.models.reference import TrainOutput

TokenLoss = Literal["mse", "kl"]


@dataclass(frozen=True)
class Objective:
    """The weighted sum of four losses.

    Attributes:
        ratios: target share of patches kept at each stage, r, r**2, r**3; empty: there are no predictors.
        token_loss: 'mse' of features (DeiT) or 'kl' of auxiliary logits (LV-ViT), on the patches the last stage kept.
        per_image: whether each image has to keep that share; if False, only the batch has to on average (the official
            `dynamic` loss).
        cross_entropy, ratio, logits, tokens: weights of the terms; with `logits` 0 the teacher's logits are not read,
            and may be of other classes.
    """

    ratios: tuple[float, ...]
    token_loss: TokenLoss = "mse"
    per_image: bool = True
    cross_entropy: float = 1.0
    ratio: float = 2.0
    logits: float = 0.5
    tokens: float = 0.5


@dataclass(frozen=True)
class Losses:
    """The outcome for the images of all processes; scalars.

    Attributes:
        total: the weighted sum. In one process its gradient is this process's part of the whole gradient: the parts of
            all processes add up to it.
        ratio: summed over the stages; the total takes their mean.
        kept: (stages,) share of the patches that every stage kept.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    ratio: torch.Tensor
    logits: torch.Tensor
    tokens: torch.Tensor
    kept: torch.Tensor

    def parts(self) -> torch.Tensor:
        """Return (5 + stages,): total, cross-entropy, ratio, logits, tokens and the kept shares, without gradient."""
        scalars = torch.stack([self.total, self.cross_entropy, self.ratio, self.logits, self.tokens])
        return torch.cat([scalars, self.kept]).detach()


def losses(
    objective: Objective,
    out: TrainOutput,
    teacher: TrainOutput,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    all_reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> Losses:
    """Compute the losses: cross-entropy, keep ratios, and distances from the teacher's logits and patch tokens.

    Args:
        out, teacher: outputs of the student in training and of its dense counterpart.
        targets: (B,) classes or (B, K) soft targets.
        weights: (B,) 1, or 0 for an image to be ignored; None: all count.
        all_reduce: sums a vector over all processes. Means are taken over all of them, so the losses do not depend on
            the distribution of images.
    """
    pred = out.pred.float()
    counts = pred.new_ones(len(pred)) if weights is None else weights
    log_pred = pred.log_softmax(dim=-1)
    entropy = F.cross_entropy(pred, targets, reduction="none")
    if objective.logits:
        wanted = teacher.pred.float().log_softmax(dim=-1)
        logits = F.kl_div(log_pred, wanted, reduction="none", log_target=True).sum(dim=-1)
    else:
        logits = torch.zeros_like(entropy)
    mask = out.mask.float() * counts[:, None]
    tokens = _token_distances(objective.token_loss, out.tokens.float(), teacher.tokens.float())
    kept = [decision.float().mean(dim=1) for decision in out.decisions]
    off = [(share - ratio) ** 2 for share, ratio in zip(kept, objective.ratios, strict=True)]
    rows = torch.stack([torch.ones_like(counts), entropy, logits, *kept, *off])
    rows = torch.where(counts > 0, rows, 0.0)  # not a product: an ignored NaN must stay ignored
    local = torch.cat([rows.sum(dim=1), torch.stack([mask.sum(), torch.where(mask > 0, tokens, 0.0).sum()])])
    # The value covers all processes, the gradient only this one's part.
    sums = local + (all_reduce(local.detach()) - local.detach())
    images = sums[0].detach().clamp(min=1)
    stages = len(kept)
    shares = sums[3 : 3 + stages] / images
    if objective.per_image:
        ratio = sums[3 + stages : 3 + 2 * stages].sum() / images
    else:
        ratio = ((shares - shares.new_tensor(objective.ratios)) ** 2).sum()
    parts = sums[1] / images, ratio, sums[2] / images, sums[-1] / sums[-2].detach().clamp(min=1)
    scales = objective.cross_entropy, objective.ratio / max(1, stages), objective.logits, objective.tokens
    total = torch.stack([scale * part for scale, part in zip(scales, parts, strict=True)]).sum()
    return Losses(total, parts[0], parts[1], parts[2], parts[3], shares.detach())


def _token_distances(kind: TokenLoss, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Return the distance of each token, (B, N), for two tensors (B, N, C)."""
    if kind == "mse":
        return (ours - theirs).square().mean(dim=-1)
    return F.kl_div(ours.log_softmax(dim=-1), theirs.log_softmax(dim=-1), reduction="none", log_target=True).sum(dim=-1)
