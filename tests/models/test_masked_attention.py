"""Masked attention and its gradients equal those of the plain implementation."""

import pytest
import torch

from dvit_infer.models.vit.layers import softmax_with_policy
from dvit_infer.models.vit.masked_attention import masked_attention

SCALE = 0.25
NAMES = ("out", "q", "k", "v", "policy")


def plain(q, k, v, policy):
    return softmax_with_policy((q * SCALE) @ k.transpose(-2, -1), policy) @ v


def fused(q, k, v, policy):
    return masked_attention(q, k, v, policy, SCALE)


def inputs(n, policy, batch=2, heads=3, dim=16):
    """q, k, v as the model hands them over: views of one product."""
    torch.manual_seed(n)
    qkv = 2 * torch.randn(batch, n, 3, heads, dim)
    keep = {
        "all": torch.ones(batch, n, 1),
        "some": (torch.rand(batch, n, 1) < 0.6).float(),
        "none of one": torch.cat([torch.zeros(1, n, 1), torch.ones(batch - 1, n, 1)]),
        "soft": torch.rand(batch, n, 1),
    }[policy]
    return [*qkv.permute(2, 0, 3, 1, 4).unbind(0), keep]


def results(call, given, wanted=(0, 1, 2, 3)):
    """The output and the gradients of those that want one, in float32."""
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(given)]
    out = call(*leaves)
    torch.manual_seed(0)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach().float(), *(x.grad.float() if x.grad is not None else None for x in leaves)]


def check(ours, expected, rtol=1e-5):
    for name, a, b in zip(NAMES, ours, expected, strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max(), name


@pytest.mark.parametrize("policy", ["all", "some", "none of one", "soft"])
@pytest.mark.parametrize("n", [1, 5, 65, 197])
def test_agrees_with_the_plain_way(n, policy):
    given = inputs(n, policy)
    ours, expected = results(fused, given), results(plain, given)
    if n == 1:  # one token attends to itself: the gradients of its score and of its policy are rounding
        assert torch.allclose(ours[0], expected[0], atol=1e-6)
        assert torch.allclose(ours[3], expected[3], atol=1e-6)
    else:
        check(ours, expected)


@pytest.mark.parametrize("gap", [8.0, 14.0, 18.0, 60.0])
@pytest.mark.parametrize("n", [5, 65])
def test_agrees_where_the_largest_score_is_of_a_dropped_key(n, gap):
    """At a gap of about 14 the kept weights sum to about eps, and the gradient through the maximum counts."""
    q, k, v, policy = inputs(n, "some")
    policy[:, :2] = torch.tensor([[1.0], [0.0]])
    q[..., 0], k[..., 0] = 4.0, 0.0
    k[:, :, 1] = 0.0
    k[:, :, 1, 0] = gap
    ours, expected = results(fused, [q, k, v, policy]), results(plain, [q, k, v, policy])
    # At a gap of 60 some gradients are 0 but for rounding.
    largest = max(grad.abs().max() for grad in expected[1:4])
    for name, a, b in zip(NAMES, ours, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(b.abs().max(), largest), name


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 1, 2), (2, 3)])
def test_gives_the_gradients_that_are_wanted_and_no_others(wanted):
    given = inputs(5, "some")
    for name, a, b in zip(NAMES, results(fused, given, wanted), results(plain, given, wanted), strict=True):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).abs().max() <= 1e-5 * b.abs().max(), name


@pytest.mark.parametrize(("dtype", "times"), [(torch.bfloat16, 2), (torch.float16, 3)])
@pytest.mark.parametrize("policy", ["all", "some", "none of one"])
def test_is_about_as_exact_as_the_plain_way_in_short_floats(dtype, times, policy):
    given = inputs(65, policy)
    short = [x.to(dtype) for x in given[:3]] + given[3:]
    expected = results(plain, [x.float() for x in short])
    ours, theirs = results(fused, short), results(lambda *x: plain(*x).to(dtype), short)
    for name, a, b, c in zip(NAMES, ours, theirs, expected, strict=True):
        assert torch.isfinite(a).all(), name
        assert (a - c).abs().max() <= times * (b - c).abs().max() + 1e-6, name


def test_autocast_changes_nothing_inside():
    given = inputs(65, "some")
    expected = results(fused, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(fused, given)
        assert fused(*(x.bfloat16() for x in given[:3]), given[3]).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_are_those_of_finite_differences():
    given = [x.double().requires_grad_() for x in inputs(5, "soft", heads=2, dim=4)]
    assert torch.autograd.gradcheck(fused, given)
