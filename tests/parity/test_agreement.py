"""Whether a candidate computes the reference's function: errors that must be found, and mere rounding."""

import pytest
import torch

from dvit_infer.models.reference import EvalOutput
from dvit_infer.parity.agreement import Expected, check_exact, unchecked

CLEAR, TIED = 0.1, 0.0


def expected_of(margins: list[float], rounding: float = 0.0, flips: float = 0.0) -> Expected:
    """Logits (B, 10) of rms 1; plain PyTorch's are off by `rounding`, by its own choice of tokens by `flips` more."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(len(margins), 10, generator=generator)
    noise = torch.randn(len(margins), 10, generator=generator)
    reference = EvalOutput(logits, [], torch.tensor(margins)[:, None])
    return Expected(reference, logits + (rounding + flips) * noise, logits + rounding * noise)


def test_float32_is_compared_where_the_choice_is_clear():
    expected = expected_of([CLEAR, TIED])
    logits = expected.reference.logits.clone()
    assert check_exact(logits, None, expected, torch.float32) is None
    logits[1] += 1.0  # another choice at a tie
    assert check_exact(logits, None, expected, torch.float32) is None
    logits[0] += 0.01
    assert "error" in check_exact(logits, None, expected, torch.float32)


def test_where_nothing_is_clear_given_sets_are_compared_or_it_is_not_known():
    expected = expected_of([TIED, TIED])
    off = expected.reference.logits + 1.0
    assert check_exact(off, None, expected, torch.float32) is None
    assert unchecked(expected, torch.float32)
    assert check_exact(off, expected.reference.logits, expected, torch.float32) is None
    assert "error" in check_exact(off, off, expected, torch.float32)
    assert not unchecked(expected_of([TIED, CLEAR]), torch.float32)
    assert not unchecked(expected, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_never_passes(dtype, bad):
    expected = expected_of([TIED, CLEAR])
    logits = expected.reference.logits.clone()
    logits[0, 3] = bad
    assert check_exact(logits, None, expected, dtype) == "NaN or Inf"
    assert check_exact(expected.reference.logits, logits, expected, dtype) == "NaN or Inf"


def test_reduced_dtypes_may_be_as_far_off_as_plain_pytorch():
    expected = expected_of([CLEAR] * 4, rounding=0.01, flips=0.2)
    flipped = expected.reference.logits + 0.3 * torch.ones(4, 10)
    assert check_exact(flipped, expected.plain_given, expected, torch.bfloat16) is None
    assert "rms error" in check_exact(
        flipped, expected.reference.logits * 1.2, expected, torch.bfloat16
    )  # 20% off in arithmetic
    assert "rms error" in check_exact(
        -expected.reference.logits, None, expected, torch.bfloat16
    )  # no choice of tokens explains that


def test_however_far_off_plain_pytorch_is_nonsense_is_found_out():
    expected = expected_of([CLEAR] * 4, rounding=1.0, flips=1.0)
    assert "rms error" in check_exact(expected.reference.logits.flip(0), None, expected, torch.float16)
