"""Whether a way of running a model computes the reference's function, told from its logits."""

from dataclasses import dataclass

import torch

from dvit_infer.models.vit.reference import EvalOutput
from dvit_infer.parity.verification import MARGIN, MOST_RMS, RMS_FACTOR

# Of the logits' rms. float32: the largest error; rounding is far below, another function far above. Reduced dtypes:
# the rms error of half of the images, where it is not more than RMS_FACTOR times plain PyTorch's own.
SAME_MAX, SAME_RMS = 1e-3, 0.05
# Reduced dtypes choose other tokens at near ties, which costs plain PyTorch as much; MOST_RMS is beyond that.


@dataclass(frozen=True)
class Expected:
    """What a function should give for some images.

    Attributes:
        reference: the reference's answers in float32.
        plain: plain PyTorch's logits in the dtype of the ways, by its own choice of tokens.
        plain_given: the same with the reference's kept sets given.
    """

    reference: EvalOutput
    plain: torch.Tensor
    plain_given: torch.Tensor


def check_exact(logits: torch.Tensor, given: torch.Tensor | None, expected: Expected, dtype: torch.dtype) -> str | None:
    """How far a way is from the reference, if too far for the same function; None where it is not.

    Args:
        logits: (B, K) float32, by the way's own choice of tokens.
        given: the same with the reference's kept sets given; None: the way cannot be given any.
    """
    right = expected.reference.logits
    scale = right.square().mean().sqrt()
    if not all(torch.isfinite(x).all() for x in (logits, given) if x is not None):
        return "NaN or Inf"
    if dtype == torch.float32:
        clear = is_clear(expected.reference)
        compared = [(logits - right)[clear], *([] if given is None else [given - right])]
        error = max(((x.abs().max() / scale).item() for x in compared if x.numel()), default=0.0)
        return None if error <= SAME_MAX else f"error {error:.1e} of the logits' rms"
    found = [(logits, expected.plain)]
    if given is not None:  # arithmetic alone, of which plain PyTorch's error is far smaller
        found.append((given, expected.plain_given))
    for ours, plain in found:
        error, rounding = (_typical_error(x, right) for x in (ours, plain))
        if not error <= min(MOST_RMS, max(SAME_RMS, RMS_FACTOR * rounding)):
            return f"rms error {error:.1e} of the logits' rms"
    return None


def check_approximate(logits: torch.Tensor, right: torch.Tensor) -> str | None:
    """How far a way that only approximates is from the reference, if nothing is alike; None where much is."""
    error, scale = (logits - right).square().mean().sqrt().item(), right.square().mean().sqrt().item()
    return None if error <= MOST_RMS * scale else f"rms error {error / scale:.1e} of the logits' rms"


def is_clear(right: EvalOutput) -> torch.Tensor:
    """(B,) whether all of an image's cuts are clear: rounding in float32 keeps the same tokens."""
    return (right.margin > MARGIN).all(dim=1)


def unchecked(expected: Expected, dtype: torch.dtype) -> bool:
    """Whether these images say nothing of a way that cannot be given kept sets."""
    return dtype == torch.float32 and not is_clear(expected.reference).any()


def _typical_error(logits: torch.Tensor, right: torch.Tensor) -> float:
    """The median over images of the rms error, over the rms of the right logits."""
    errors = (logits - right).square().mean(dim=1).sqrt()
    return (errors.median() / right.square().mean().sqrt()).item()
