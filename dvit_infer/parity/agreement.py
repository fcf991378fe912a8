"""Check by its logits that a candidate computes the same function as the reference model."""

from dataclasses import dataclass

import torch

from dvit_infer.models.reference import EvalOutput
from dvit_infer.parity.verification import MARGIN, MOST_RMS, RMS_FACTOR

# Tolerances relative to the logits' rms. float32: the largest error; rounding is far below, another function far above.
# Reduced dtypes: the median of the images' rms errors; RMS_FACTOR times plain PyTorch's is allowed too.
SAME_MAX, SAME_RMS = 1e-3, 0.05
# Reduced dtypes choose other tokens at near ties, and so does plain PyTorch; MOST_RMS is the limit in any case.


@dataclass(frozen=True)
class Expected:
    """The expected outputs for some images.

    Attributes:
        reference: the reference's outputs in float32.
        plain: plain PyTorch's logits in the dtype of the candidates, with its own choice of tokens.
        plain_given: the same with the reference's kept sets given.
    """

    reference: EvalOutput
    plain: torch.Tensor
    plain_given: torch.Tensor


def check_exact(logits: torch.Tensor, given: torch.Tensor | None, expected: Expected, dtype: torch.dtype) -> str | None:
    """Return the error of a candidate if it is too large for the same function, else None.

    Args:
        logits: (B, K) float32, with the candidate's own choice of tokens.
        given: the same with the reference's kept sets given; None: the candidate accepts none.
    """
    target = expected.reference.logits
    scale = target.square().mean().sqrt()
    if not all(torch.isfinite(x).all() for x in (logits, given) if x is not None):
        return "NaN or Inf"
    if dtype == torch.float32:
        clear = is_clear(expected.reference)
        compared = [(logits - target)[clear], *([] if given is None else [given - target])]
        error = max(((x.abs().max() / scale).item() for x in compared if x.numel()), default=0.0)
        return None if error <= SAME_MAX else f"error {error:.1e} of the logits' rms"
    found = [(logits, expected.plain)]
    if given is not None:  # arithmetic alone, in which plain PyTorch's error is far smaller
        found.append((given, expected.plain_given))
    for ours, plain in found:
        error, rounding = (_typical_error(x, target) for x in (ours, plain))
        if not error <= min(MOST_RMS, max(SAME_RMS, RMS_FACTOR * rounding)):
            return f"rms error {error:.1e} of the logits' rms"
    return None


def check_approximate(logits: torch.Tensor, target: torch.Tensor) -> str | None:
    """Return the error of a candidate that only approximates the reference if it exceeds `MOST_RMS`, else None."""
    error, scale = (logits - target).square().mean().sqrt().item(), target.square().mean().sqrt().item()
    return None if error <= MOST_RMS * scale else f"rms error {error / scale:.1e} of the logits' rms"


def is_clear(reference: EvalOutput) -> torch.Tensor:
    """Return (B,) whether all cuts of an image are clear: rounding in float32 cannot change the kept tokens."""
    return (reference.margin > MARGIN).all(dim=1)


def unchecked(expected: Expected, dtype: torch.dtype) -> bool:
    """Return whether these images cannot check a candidate that accepts no kept sets."""
    return dtype == torch.float32 and not is_clear(expected.reference).any()


def _typical_error(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Return the median over images of the rms error, relative to the rms of the expected logits."""
    errors = (logits - target).square().mean(dim=1).sqrt()
    return (errors.median() / target.square().mean().sqrt()).item()
