"""The op: kept tokens against a float64 ranking, rows bit by bit, the fused row, ties, odd values, registration."""

import pytest
import torch
from kernel_helpers import DTYPES, ONE_DTYPE
from token_reduction_checks import check_kept, make_attention, make_tokens

from dvit_infer.ops.keep_tokens import keep_tokens
from dvit_infer.ops.prune_tokens import select_tokens_ref


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "n", "p", "heads", "k"),
    [(3, 20, 1, 3, 14), (1, 2, 1, 1, 1), (2, 3, 0, 2, 2), (3, 31, 2, 6, 1), (2, 30, 5, 4, 29), (1, 196, 1, 12, 138)],
)
def test_kept_tokens_and_the_fused_row(b, n, p, heads, k, dtype, fuse):
    x, attention = make_tokens(b, p + n, 24, dtype), make_attention(b, heads, p + n)
    kept, index = keep_tokens(x, attention, k, p, fuse)
    check_kept(x, attention, k, p, fuse, kept, index)


def test_all_tokens_may_be_kept_where_none_is_fused():
    x = make_tokens(2, 9, 8)
    kept, index = keep_tokens(x, make_attention(2, 3, 9), 8, 1, False)
    assert torch.equal(kept, x)
    assert index.tolist() == [list(range(8))] * 2


def test_ties_go_to_the_lower_position_and_nan_goes_first():
    attention = torch.full((2, 3, 10), 0.1)
    attention[1, 0, 3] = float("nan")
    x = make_tokens(2, 10, 8)
    _, index = keep_tokens(x, attention, 5)
    assert index.tolist() == [[0, 1, 2, 3, 4], [0, 1, 3, 4, 5]]
    assert torch.equal(index, select_tokens_ref(attention[..., 1:].mean(dim=1), 5))


def test_any_strides_and_the_same_bits_again():
    wide, attention = make_tokens(4, 26, 32, torch.float16), make_attention(2, 3, 26)
    views = (wide[::2, :13], wide[:2, ::2], wide[:2, :13, 8:24], wide[:2, :13, ::2], wide.transpose(0, 1)[:2, :4])
    for x in views:
        weights = attention[..., ::2][..., : x.shape[1]]
        expected = keep_tokens(x.contiguous(), weights.contiguous(), 2)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(keep_tokens(x, weights, 2), expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("p", [0, 1, 2, 5])
def test_opcheck(p, dtype, device):
    x, attention = make_tokens(2, p + 12, 24, dtype).to(device), make_attention(2, 3, p + 12).to(device)
    for fuse in (True, False):
        torch.library.opcheck(torch.ops.dvit.keep_tokens.default, (x, attention, 5, p, fuse))


def test_schema_is_the_published_one():
    assert str(torch.ops.dvit.keep_tokens.default._schema) == (
        "dvit::keep_tokens(Tensor x, Tensor attention, int num_keep, int num_prefix=1, bool fuse=True) -> "
        "(Tensor, Tensor)"
    )


def test_backward_says_that_there_is_no_gradient():
    x = make_tokens(1, 9, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        keep_tokens(x, make_attention(1, 2, 9), 3)[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_keep": 0}, "num_keep is 0, from 1 to 7"),
        ({"num_keep": 8}, "num_keep is 8, from 1 to 7"),
        ({"num_keep": 9, "fuse": False}, "num_keep is 9, from 1 to 8"),
        ({"num_prefix": -1}, "num_prefix is -1"),
        ({"num_prefix": 9}, "from 1 to 0"),
        ({"x": torch.zeros(9, 8)}, "x is"),
        ({"x": torch.zeros(1, 9, 8, dtype=torch.float64)}, "x is torch.float64"),
        ({"attention": torch.zeros(1, 9)}, "attention is"),
        ({"attention": torch.zeros(9)}, "attention is"),
        ({"attention": torch.zeros(1, 3, 8)}, "attention is"),
        ({"attention": torch.zeros(1, 0, 9)}, "attention is"),
        ({"attention": torch.zeros(1, 3, 9).half()}, "attention is torch.float16"),
        ({"attention": torch.zeros(1, 3, 9, device="meta")}, "attention is on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"x": torch.zeros(1, 9, 8), "attention": torch.zeros(1, 3, 9), "num_keep": 2} | change
    with pytest.raises(ValueError, match=message):
        keep_tokens(**arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        keep_tokens(**arguments)
