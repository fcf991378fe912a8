"""The op: matches against brute force in float64, averages, copies bit by bit, ties, odd values, registration."""

import pytest
import torch
from kernel_helpers import DTYPES, ONE_DTYPE
from token_reduction_checks import bits, check_averages, check_rows, make_sizes, make_tokens

from dvit_infer.ops.merge_tokens import merge_tokens

# B, N, P, merge: both parities of N and P, the fewest tokens, one merged and as many as can be.
SHAPES = [
    (3, 20, 1, 5),
    (1, 21, 1, 10),
    (3, 2, 0, 1),
    (3, 2, 1, 1),
    (2, 3, 0, 1),
    (2, 3, 5, 1),
    (1, 21, 0, 1),
    (3, 22, 0, 11),
    (2, 31, 2, 15),
    (2, 30, 5, 1),
    (1, 196, 1, 16),
]


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "p", "merge"), SHAPES)
def test_matches_of_brute_force_and_averages(b, n, p, merge, dtype, sized):
    x, keys = make_tokens(b, p + n, 24, dtype), make_tokens(b, p + n, 16, seed=1)
    sizes = make_sizes(b, p + n) if sized else None
    merged, merged_sizes, rows = merge_tokens(x, keys, sizes, merge, p)
    assert merged.shape == (b, p + n - merge, 24)
    assert merged.dtype == dtype
    assert rows.dtype == torch.int64
    check_rows(keys, rows, merge, p)
    check_averages(x, sizes, merged, merged_sizes, rows)
    assert torch.equal(rows[:, :p], torch.arange(p).expand(b, -1))


def test_equal_keys_go_to_the_lower_index():
    x, keys = make_tokens(2, 11, 8), torch.ones(2, 11, 4)
    _, sizes, rows = merge_tokens(x, keys, None, 3, 1)  # the first three in even rows, 2, 4 and 6, go to row 1
    assert rows.tolist() == [[0, 3, 3, 4, 3, 5, 3, 6, 1, 7, 2]] * 2
    assert sizes.tolist() == [[1, 1, 1, 4, 1, 1, 1, 1]] * 2


def test_what_stays_without_prefix_tokens_is_by_falling_similarity():
    angles = torch.tensor([0.5, 0.0, 0.1, 2.0, 0.3, 4.0, 0.2, 5.0])  # of 0, 2, 4, 6 to the nearest odd one: 0
    keys = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    rows = merge_tokens(make_tokens(1, 8, 8), keys, None, 1, 0)[2]
    assert rows.tolist() == [[2, 3, 3, 4, 1, 5, 0, 6]]


def test_a_key_of_length_0_is_similar_to_none():
    keys = make_tokens(1, 9, 4).abs()
    keys[:, 2] = 0
    rows = merge_tokens(make_tokens(1, 9, 8), keys, None, 3, 1)[2]
    assert rows[0, 2] == 1  # all others in even rows, whose similarities are above 0, merge


def test_nan_keys_stay_within_the_rows():
    keys = make_tokens(3, 13, 4)
    keys[0, 4] = keys[1] = keys[2, 5, 1] = float("nan")
    rows = merge_tokens(make_tokens(3, 13, 8), keys, None, 4, 1)[2]
    assert [set(row) for row in rows.tolist()] == [set(range(9))] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_values_alone_in_their_rows_are_copied(dtype):
    x, keys = make_tokens(1, 9, 8, dtype), make_tokens(1, 9, 4)
    x[0, :2, :4] = torch.tensor([-0.0, 0.0, float("inf"), -float("inf")])
    x[0, 0, 5] = float("nan")
    merged, _, _ = merge_tokens(x, keys, make_sizes(1, 9) / 3, 1, 2)
    assert torch.equal(bits(merged[0, :2, :5]), bits(x[0, :2, :5]))
    assert merged[0, 0, 5].isnan()
    assert merged[0, 1:].isfinite().sum() == 7 * 8 - 2


def test_any_strides_and_the_same_bits_again():
    wide, keys, sizes = make_tokens(4, 26, 32, torch.float16), make_tokens(2, 26, 32), make_sizes(2, 26)
    views = (wide[::2, :13], wide[:2, ::2], wide[:2, :13, 8:24], wide[:2, :13, ::2], wide.transpose(0, 1)[:2, :4])
    for x in views:
        tokens = x.shape[1]
        given = (keys[:, ::2, ::2][:, :tokens], sizes[:, ::2][:, :tokens], 1, 1)
        expected = merge_tokens(x.contiguous(), *(t.contiguous() for t in given[:2]), 1, 1)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(merge_tokens(x, *given), expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("p", [0, 1, 2, 5])
def test_opcheck(p, dtype, device):
    x, keys = make_tokens(2, p + 12, 24, dtype).to(device), make_tokens(2, p + 12, 8, seed=1).to(device)
    for sizes in (None, make_sizes(2, p + 12).to(device)):
        torch.library.opcheck(torch.ops.dvit.merge_tokens.default, (x, keys, sizes, 4, p))


def test_schema_is_the_published_one():
    assert str(torch.ops.dvit.merge_tokens.default._schema) == (
        "dvit::merge_tokens(Tensor x, Tensor keys, Tensor? sizes, int merge, int num_prefix=1) -> "
        "(Tensor, Tensor, Tensor)"
    )


def test_backward_says_that_there_is_no_gradient():
    x = make_tokens(1, 9, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        merge_tokens(x, make_tokens(1, 9, 4), None, 2)[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge": 0}, "merge is 0, from 1 to 4"),
        ({"merge": 5}, "merge is 5, from 1 to 4"),
        ({"num_prefix": -1}, "num_prefix is -1"),
        ({"num_prefix": 8}, "merge is 2, from 1 to 0"),
        ({"x": torch.zeros(9, 8)}, "x is"),
        ({"x": torch.zeros(1, 9, 8, dtype=torch.float64)}, "x is torch.float64"),
        ({"keys": torch.zeros(1, 8, 4)}, "keys is"),
        ({"keys": torch.zeros(1, 9, 0)}, "keys is"),
        ({"keys": torch.zeros(1, 9, 4).half()}, "keys is torch.float16"),
        ({"keys": torch.zeros(1, 9, 4, device="meta")}, "keys is on meta"),
        ({"sizes": torch.zeros(1, 8)}, "sizes is"),
        ({"sizes": torch.zeros(1, 9).long()}, "sizes is torch.int64"),
        ({"sizes": torch.zeros(1, 9, device="meta")}, "sizes is on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"x": torch.zeros(1, 9, 8), "keys": torch.zeros(1, 9, 4), "sizes": None, "merge": 2} | change
    with pytest.raises(ValueError, match=message):
        merge_tokens(**arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        merge_tokens(**arguments)
