"""The Triton launch of keep_tokens: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from attention_checks import poisoned
from dvit_kernels.keep_tokens import launch_keep_tokens
from kernel_helpers import EMULATED, EMULATED_FLOAT32, LARGE, QUICK, WHERE, collected, needs_loops, run_guarded
from token_reduction_checks import bits, check_kept, make_attention, make_tokens

from dvit_infer.ops.choices import Choices, using
from dvit_infer.ops.keep_tokens import keep_tokens
from dvit_infer.ops.layer_norm import block_stats
from dvit_infer.ops.prune_tokens import select_tokens_ref

pytestmark = needs_loops

ROWS = WHERE + EMULATED_FLOAT32 if WHERE == EMULATED else WHERE
OUTPUTS = ("kept_ptr", "index_ptr")

# B, N, P, C, H, K: tails of rows and channels, one program that sums and several, ranks by counting and by radix.
SHAPES = [
    pytest.param(2, 50, 1, 160, 3, 35, marks=QUICK),
    (3, 2, 0, 64, 1, 1),
    (1, 3, 5, 40, 2, 2),
    (3, 31, 2, 64, 6, 1),
    pytest.param(1, 196, 1, 768, 12, 138, marks=LARGE),
    pytest.param(65, 20, 1, 300, 2, 7, marks=LARGE),
    pytest.param(1, 300, 1, 64, 2, 100, marks=LARGE),
    pytest.param(1, 520, 0, 64, 1, 450, marks=LARGE),
]


def run(*given) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = run_guarded(collected(launch_keep_tokens, *given), OUTPUTS)
    return tuple(outputs[name].cpu() for name in OUTPUTS)


@pytest.mark.parametrize(("b", "n", "p", "c", "heads", "k"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_kept_tokens_and_the_fused_row(device, dtype, b, n, p, c, heads, k):
    x, attention = make_tokens(b, p + n, c, dtype), make_attention(b, heads, p + n)
    given = poisoned(x.to(device), attention.to(device))
    for fuse in (True, False):
        check_kept(x, attention, k, p, fuse, *run(*given, k, p, fuse))


@pytest.mark.parametrize(("b", "c"), [(2, 128), pytest.param(64, 384, marks=LARGE), pytest.param(2, 256, marks=LARGE)])
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_statistics_of_the_rows_that_stay(device, dtype, b, c):
    """By parts of 128 channels, of the rounded values; one program or two sum them. The result is as without."""
    x, attention = make_tokens(b, 22, c, dtype) + 30, make_attention(b, 3, 22)
    for fuse in (True, False):
        given = (*poisoned(x.to(device), attention.to(device)), 9, 1, fuse)
        stats = torch.empty(b * (10 + fuse), c // 128, 2, device=device)
        outputs = run_guarded(collected(launch_keep_tokens, *given, stats), (*OUTPUTS, "stats_ptr"))
        kept = outputs["kept_ptr"].cpu()
        assert torch.equal(kept, run(*given)[0])
        expected = block_stats(kept.double(), 128).float()
        torch.testing.assert_close(outputs["stats_ptr"].cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_ties_and_nan(device, dtype):
    """Ties go to the lower position, NaN ranks last, and kept rows are copied bit by bit."""
    nan, inf = float("nan"), float("inf")
    for n in (33, 257):
        odd = torch.tensor([0.5, 0.5, -0.0, 0.0, inf, nan])
        attention = odd[torch.randint(6, (3, 1, n), generator=torch.Generator().manual_seed(n))].expand(-1, 2, -1)
        attention = attention.contiguous()
        attention[1], attention[2] = 0.25, nan
        x = make_tokens(3, n, 64, dtype)
        bits(x)[:, :, :2] = torch.tensor([0x7FC1, -1] if dtype != torch.float32 else [0x7FC00001, -1])
        kept, index = run(x.to(device), attention.to(device), n // 2, 0, False)
        assert torch.equal(index, select_tokens_ref(attention.mean(dim=1), n // 2))
        assert torch.equal(bits(kept), bits(torch.stack([x[i, index[i]] for i in range(3)])))


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_any_strides_and_the_same_bits_again(device, dtype):
    wide, attention = make_tokens(4, 26, 64, dtype), make_attention(2, 3, 26)
    views = (wide[::2, :13, :32], wide[:2, ::2, 1:], wide[:2, :13, ::2], wide.transpose(0, 1)[:2, :4])
    for x in views:
        weights = attention[..., ::2][..., : x.shape[1]].to(device)
        expected = run(x.contiguous().to(device), weights.contiguous(), 2, 1, True)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(run(x.to(device), weights, 2, 1, True), expected, strict=True))


def test_a_dropped_token_alone_reaches_the_fused_row():
    """A kept row of NaN does not, whatever its weight."""
    x, attention = make_tokens(1, 12, 64), make_attention(1, 2, 12)
    index = launch_keep_tokens(x, attention, 4, 1, True)[1]
    expected = launch_keep_tokens(x, attention, 4, 1, True)[0][:, -1]
    x[0, 0] = x[0, 1 + index[0, 2]] = float("nan")
    assert torch.equal(launch_keep_tokens(x, attention, 4, 1, True)[0][:, -1], expected)


def test_no_images():
    kept, index = launch_keep_tokens(torch.zeros(0, 9, 64), torch.zeros(0, 2, 9), 3, 1, True)
    assert (kept.shape, index.shape) == ((0, 5, 64), (0, 3))


@pytest.mark.parametrize(("n", "heads", "k"), [(1025, 2, 3), (9, 65, 3), (9, 2, 9), (9, 2, 0)])
def test_sizes_beyond_the_kernel_are_refused(n, heads, k):
    with pytest.raises(ValueError, match=f"{k} of {n} tokens behind 1, {heads} heads"):
        launch_keep_tokens(torch.zeros(1, n + 1, 8), torch.zeros(1, heads, n + 1), k, 1, True)


@pytest.mark.interpreter
def test_the_op_runs_the_kernel_where_it_is_chosen(monkeypatch):
    x, attention = make_tokens(2, 20, 64), make_attention(2, 3, 20)
    expected = launch_keep_tokens(x, attention, 4, 1, True)
    monkeypatch.setattr("dvit_infer.ops.keep_tokens.keep_tokens_ref", None)
    with using(Choices()):
        assert all(torch.equal(a, b) for a, b in zip(keep_tokens(x, attention, 4), expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("b", "n", "c", "k"), [(256, 196, 768, 137), (1, 196, 384, 137), (3, 576, 768, 403)])
def test_sizes_of_models(b, n, c, k, dtype):
    x, attention = make_tokens(b, n + 1, c, dtype), make_attention(b, c // 64, n + 1)
    kept, index = run(x.cuda(), attention.cuda(), k, 1, True)
    some = [0, b - 1]
    check_kept(x[some], attention[some], k, 1, True, kept[some], index[some])
