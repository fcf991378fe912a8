"""The Triton launches of merge_tokens: on a GPU where there is one, in Triton's interpreter elsewhere."""

import pytest
import torch
from attention_checks import poisoned
from dvit_kernels.merge_tokens import bytes_moved, launch_merge_tokens
from kernel_helpers import EMULATED, EMULATED_FLOAT32, LARGE, QUICK, WHERE, collected, needs_loops, run_guarded
from token_reduction_checks import bits, check_averages, check_rows, make_sizes, make_tokens

from dvit_infer.ops.choices import Choices, using
from dvit_infer.ops.layer_norm import block_stats
from dvit_infer.ops.merge_tokens import merge_tokens, merge_tokens_ref

pytestmark = needs_loops

ROWS = WHERE + EMULATED_FLOAT32 if WHERE == EMULATED else WHERE
OUTPUTS = ("best_ptr", "match_ptr", "merged_ptr", "merged_sizes_ptr", "rows_ptr")

# B, N, P, C, D, merge: blocks of even and odd rows, tails of channels, both orders, ranks by counting and by radix.
SHAPES = [
    pytest.param(2, 49, 1, 96, 32, 12, marks=QUICK),
    (3, 2, 0, 64, 16, 1),
    (1, 3, 1, 40, 24, 1),
    (3, 21, 0, 64, 20, 10),
    (1, 40, 2, 96, 16, 20),
    (3, 31, 5, 64, 16, 1),
    pytest.param(1, 196, 1, 768, 64, 16, marks=LARGE),
    pytest.param(2, 197, 0, 64, 16, 40, marks=LARGE),
    pytest.param(1, 600, 2, 64, 16, 200, marks=LARGE),
    pytest.param(1, 6, 1, 1100, 16, 2, marks=LARGE),
]


def run(*given) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = run_guarded(collected(launch_merge_tokens, *given), OUTPUTS)
    return tuple(outputs[name].cpu() for name in OUTPUTS[2:])


@pytest.mark.parametrize(("b", "n", "p", "c", "d", "merge"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_rows_averages_and_copies(device, dtype, b, n, p, c, d, merge):
    x, keys = make_tokens(b, p + n, c, dtype), make_tokens(b, p + n, d, seed=1)
    for sizes in (None, make_sizes(b, p + n)):
        given = [None if t is None else poisoned(t.to(device))[0] for t in (x, keys, sizes)]
        merged, merged_sizes, rows = run(*given, merge, p)
        check_rows(keys, rows, merge, p)
        check_averages(x, sizes, merged, merged_sizes, rows)


@pytest.mark.parametrize("c", [96, pytest.param(1024, marks=LARGE)])
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_statistics_of_the_merged_rows(device, dtype, c):
    """Of the rounded values, far from zero; the result is the same as without."""
    x, keys, sizes = make_tokens(2, 22, c, dtype) + 30, make_tokens(2, 22, 16, seed=1), make_sizes(2, 22)
    given = [*poisoned(x.to(device), keys.to(device), sizes.to(device)), 8, 1]
    stats = torch.empty(2 * 14, 1, 2, device=device)
    outputs = run_guarded(collected(launch_merge_tokens, *given, stats), (*OUTPUTS, "stats_ptr"))
    merged, *_ = (outputs[name].cpu() for name in OUTPUTS[2:])
    assert torch.equal(merged, run(*given)[0])
    torch.testing.assert_close(outputs["stats_ptr"].cpu(), block_stats(merged.double(), c).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_equal_keys_go_to_the_lower_index(device, dtype):
    """Nearly all tokens merge into one row; the reference agrees, as nothing is rounded between equals."""
    x, keys = make_tokens(2, 90, 64, dtype).to(device), torch.ones(2, 90, 16, device=device)
    keys[1, :50] = -1
    for p in (0, 1):
        merged, sizes, rows = run(x, keys, None, 44, p)
        assert torch.equal(rows, merge_tokens_ref(x, keys, None, 44, p)[2].cpu())
        assert sizes[0].max() == 45
        check_averages(x.cpu(), None, merged, sizes, rows)


@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_odd_keys_and_odd_values(device, dtype):
    """No key of NaN, infinity or length 0 leads out of the rows; rows of one token are copied, NaN bit by bit."""
    nan, inf = float("nan"), float("inf")
    x, keys = make_tokens(4, 42, 64, dtype).to(device), make_tokens(4, 42, 16).to(device)
    bits(x)[:, :2, :2] = torch.tensor([0x7FC1, -1] if dtype != torch.float32 else [0x7FC00001, -1], device=device)
    x[:, 1, 2:5] = torch.tensor([-0.0, inf, -inf])
    keys[0] = nan
    keys[1, ::3] = nan
    keys[2, ::4], keys[2, 1::4] = inf, 0.0
    keys[3] = 0.0
    merged, _, rows = run(x, keys, None, 15, 2)
    assert [set(row) for row in rows.tolist()] == [set(range(27))] * 4
    assert torch.equal(bits(merged[:, :2]), bits(x[:, :2].cpu()))
    assert torch.equal(rows[3], merge_tokens_ref(x, keys, None, 15, 2)[2][3].cpu())


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), ROWS)
def test_any_strides_and_the_same_bits_again(device, dtype):
    wide, keys, sizes = make_tokens(4, 26, 64, dtype), make_tokens(2, 26, 32), make_sizes(2, 26)
    views = (wide[::2, :13, :32], wide[:2, ::2, 1:], wide[:2, :13, ::2], wide.transpose(0, 1)[:2, :4])
    for x in views:
        given = [t.to(device) for t in (x, keys[:, ::2, ::2][:, : x.shape[1]], sizes[:, ::2][:, : x.shape[1]])]
        expected = run(x.contiguous().to(device), given[1].contiguous(), given[2].contiguous(), 1, 1)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(run(*given, 1, 1), expected, strict=True))


def test_at_most_half_as_many_bytes_again_as_reading_x_and_writing_the_result():
    """By the formula, with keys of 64 channels: in DeiT-S and ViT-B at 224 pixels, in each layer, and at 384."""
    for c in (384, 768):
        for tokens, merge in [*((197 - 16 * layer, 16) for layer in range(11)), (577, 23)]:
            least = 256 * (tokens + tokens - merge) * c * 2
            assert bytes_moved(256, tokens, c, 64, merge, 2) < (1.25 if c == 384 else 1.15) * least
    [match, move] = collected(launch_merge_tokens, *(torch.zeros(2, 197, c) for c in (64, 32)), None, 16, 1)
    arguments = [t for launch in (match, move) for t in launch.arguments.values() if isinstance(t, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in arguments) == bytes_moved(2, 197, 64, 32, 16, 4) - 2 * 4 * 165


def test_no_images():
    merged, sizes, rows = launch_merge_tokens(torch.zeros(0, 9, 64), torch.zeros(0, 9, 16), None, 3, 1)
    assert (merged.shape, sizes.shape, rows.shape) == ((0, 6, 64), (0, 6), (0, 9))


@pytest.mark.parametrize(
    ("n", "d", "merge", "p"), [(2049, 8, 3, 1), (9, 257, 3, 1), (9, 8, 5, 1), (9, 8, 0, 1), (1, 8, 1, 1)]
)
def test_sizes_beyond_the_kernels_are_refused(n, d, merge, p):
    with pytest.raises(ValueError, match=f"{merge} of {n} tokens behind {p}, keys of {d} channels"):
        launch_merge_tokens(torch.zeros(1, n + p, 8), torch.zeros(1, n + p, d), None, merge, p)


@pytest.mark.interpreter
def test_the_op_runs_the_kernels_where_they_are_chosen(monkeypatch):
    x, keys = make_tokens(2, 20, 64), make_tokens(2, 20, 16, seed=1)
    expected = launch_merge_tokens(x, keys, None, 4, 1)
    monkeypatch.setattr("dvit_infer.ops.merge_tokens.merge_tokens_ref", None)
    with using(Choices()):
        assert all(torch.equal(a, b) for a, b in zip(merge_tokens(x, keys, None, 4), expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("b", "tokens", "c", "merge"), [(256, 197, 768, 16), (1, 197, 384, 16), (3, 577, 768, 23)])
def test_sizes_of_models(b, tokens, c, merge, dtype):
    x, keys = make_tokens(b, tokens, c, dtype), make_tokens(b, tokens, 64, seed=1)
    merged, sizes, rows = run(x.cuda(), keys.cuda(), None, merge, 1)
    some = [0, b - 1]
    check_rows(keys[some], rows[some], merge, 1)
    check_averages(x[some], None, merged[some], sizes[some], rows[some])
