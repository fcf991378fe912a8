"""The Triton launch of attention with a bias for each pair of query and key."""

import pytest
import torch
from attention_checks import check, on, poisoned, run_one
from attention_inputs import INF, make_bias, make_pair_bias, make_qkv, make_ragged
from dvit_kernels.attention import AttentionTile, launch_attention
from kernel_helpers import LARGE, QUICK, WHERE, needs_loops

pytestmark = needs_loops

# B, groups, M, N, H, D: the windows of Swin; a tile and a row; blocks of keys with a rest and without; one query.
PAIRS = [
    pytest.param(4, 2, 49, 49, 2, 32, marks=(QUICK, LARGE)),
    pytest.param(2, 0, 65, 64, 1, 48, marks=LARGE),
    (3, 3, 2, 40, 2, 104),
    (3, 1, 1, 17, 2, 64),
    pytest.param(2, 0, 33, 130, 2, 64, marks=(QUICK, LARGE)),
    (1, 0, 20, 144, 1, 32),
    pytest.param(2, 2, 18, 100, 1, 128, marks=LARGE),
    (1, 0, 20, 33, 1, 60),
]


@pytest.mark.parametrize(("b", "groups", "m", "n", "heads", "head_dim"), PAIRS)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_a_bias_per_pair(device, dtype, b, groups, m, n, heads, head_dim):
    """With the bias per key and without, in memory that is NaN around the pairs."""
    qkv = poisoned(*on(device, *make_qkv(b, m, n, heads, head_dim, dtype)))
    [pair_bias] = poisoned(make_pair_bias(heads, m, n, groups).to(device))
    for bias in (None, *poisoned(make_bias(b, n).to(device))):
        given = (*qkv, head_dim**-0.5, bias)
        check(run_one(*given, pair_bias=pair_bias), given, pair_bias=pair_bias)


@pytest.mark.parametrize(
    "tile",
    [
        None,
        pytest.param(AttentionTile(16, 16, num_stages=2), marks=LARGE),
        pytest.param(AttentionTile(32, 32, 16, programs=2), marks=LARGE),
    ],
)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_masked_pairs(device, dtype, tile):
    """Windows of a shifted grid: whole blocks of keys hidden before the first that is not; rows without a key are 0."""
    if dtype == torch.float32 and tile is not None and tile.chunk_a > 16:
        pytest.skip("blocks of other sizes would spill")
    q, k, v = on(device, *make_qkv(4, 40, 40, 2, 32, dtype))
    window = torch.arange(40) // 20
    masks = torch.stack([torch.zeros(40, 40), torch.where(window[:, None] == window, 0.0, -INF)])
    pair_bias = (masks[:, None] + torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(1))).to(device)
    pair_bias[0, 1, 7] = -INF
    given = (q, k, v, 0.2, None)
    out = run_one(*given, pair_bias=pair_bias, tile=tile)
    assert (out[::2, 7, 1] == 0).all()
    check(out, given, pair_bias=pair_bias)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_any_strides_of_a_pair_bias(device, dtype):
    q, k, v = on(device, *make_qkv(4, 9, 9, 2, 32, dtype))
    wide = make_pair_bias(4, 20, 20, 4).to(device)
    views = (
        wide[:, :2, :9, :9],
        wide[0, ::2, ::2, 1:10][:, :9],  # nothing in it is aligned
        wide[::2, :2, :9, :9],
        wide[:2, :1, :9, :9].expand(-1, 2, -1, -1),  # a mask for all heads
        wide[0, :2, :9, :9].transpose(1, 2),
        wide[:2, :2, :1, :9].expand(-1, -1, 9, -1),
        wide[:1, :2, :9, ::2][..., :9],
    )
    for view in views:
        expected = launch_attention(q, k, v, 0.2, pair_bias=view.contiguous())
        torch.testing.assert_close(launch_attention(q, k, v, 0.2, pair_bias=view), expected, rtol=0, atol=0)


def test_a_ragged_batch_with_a_bias_per_pair_is_refused():
    *qkv, ends = make_ragged([4, 2], 1, 32, torch.float32)
    with pytest.raises(ValueError, match="pair_bias is for dense batches"):
        launch_attention(*qkv, 0.2, None, ends, 4, make_pair_bias(1, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "groups", "m", "n", "head_dim"),
    [(128, 64, 49, 49, 32), (8, 4, 144, 144, 32), (3, 0, 197, 197, 64), (3, 0, 577, 577, 64), (2, 2, 784, 196, 96)],
)
def test_pairs_of_models(b, groups, m, n, head_dim, dtype):
    qkv = poisoned(*on("cuda", *make_qkv(b, m, n, 3, head_dim, dtype)))
    pair_bias = make_pair_bias(3, m, n, groups).cuda()
    for bias in (None, make_bias(b, n).cuda()):
        given = (*qkv, head_dim**-0.5, bias)
        check(run_one(*given, pair_bias=pair_bias), given, pair_bias=pair_bias)
