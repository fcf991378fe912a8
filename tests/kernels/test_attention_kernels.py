"""The Triton launch of attention: on a GPU where there is one, in Triton's interpreter elsewhere."""

import itertools

import pytest
import torch
from attention_checks import check, on, poisoned, run_one
from attention_inputs import INF, make_bias, make_pair_bias, make_qkv, make_ragged
from dvit_kernels.attention import AttentionTile, key_chunks, launch_attention
from kernel_helpers import LARGE, QUICK, WHERE, needs_loops

from dvit_infer.ops import attention as op
from dvit_infer.ops.attention import attention, attention_ref
from dvit_infer.ops.choices import Choices, using

pytestmark = needs_loops

# B, M, N, H, D: one token; a tile and a row; two chunks and three; blocks of keys; heads that fill no power of two.
SHAPES = [
    (2, 1, 1, 1, 16),
    (1, 16, 16, 2, 32),
    (2, 17, 17, 2, 64),
    (3, 1, 17, 2, 64),
    (1, 2, 40, 2, 104),
    pytest.param(1, 65, 65, 2, 48, marks=QUICK),
    (1, 40, 33, 1, 60),
    (1, 20, 20, 2, 128),
    pytest.param(1, 70, 130, 1, 64, marks=LARGE),
    pytest.param(1, 18, 130, 1, 104, marks=QUICK),
    pytest.param(1, 33, 197, 1, 64, marks=LARGE),
    pytest.param(1, 5, 257, 1, 64, marks=LARGE),
    pytest.param(1, 20, 321, 1, 20, marks=LARGE),
]
RAGGED = [20, 5, 1, 0, 33]


@pytest.mark.parametrize(("b", "m", "n", "heads", "head_dim"), SHAPES)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_dense(device, dtype, b, m, n, heads, head_dim):
    qkv = poisoned(*on(device, *make_qkv(b, m, n, heads, head_dim, dtype)))
    for bias in (None, *poisoned(make_bias(b, n).to(device))):
        given = (*qkv, head_dim**-0.5, bias)
        check(run_one(*given), given)


# Single passes, with one program a head and with more of them; blocks of keys, with a rest and without.
TILES = [
    *(AttentionTile(32, *chunks) for chunks in ((64,), (32, 16), (32, 32), (16, 16, 16))),
    *(AttentionTile(16, 32, 16, programs=programs) for programs in (1, 2, 5)),
    *(AttentionTile(m, n, num_stages=2) for m, n in ((16, 16), (32, 32))),
    AttentionTile(64, 32, 16, num_warps=8),
]


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_tiles_change_nothing(device, dtype, tile):
    if dtype == torch.float32 and not (tile.chunk_a == 16 and tile.chunk_b == 0):
        pytest.skip("blocks of other sizes would spill")
    for n in (37, 48):
        given = (*poisoned(*on(device, *make_qkv(2, n, n, 1, 32, dtype))), 0.2, None)
        check(run_one(*given, tile=tile), given)


@pytest.mark.parametrize("most", [33, 64, pytest.param(300, marks=LARGE)])
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_ragged(device, dtype, most):
    """Lengths that are below the promised maximum by any amount, none at all among them."""
    *qkv, ends = on(device, *make_ragged(RAGGED, 2, 32, dtype))
    qkv = poisoned(*qkv)
    for bias in (None, *poisoned(make_bias(1, sum(RAGGED))[0].to(device))):
        given = (*qkv, 32**-0.5, bias)
        check(run_one(*given, ends, most), given, ends)


@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_images_do_not_see_each_other(device, dtype):
    """A NaN reaches the rows of its own image and head, and no others."""
    *qkv, ends = on(device, *make_ragged(RAGGED, 2, 32, dtype))
    expected = launch_attention(*qkv, 0.2, None, ends, 33)
    for x in qkv[1:]:
        x[22, 1, 3] = float("nan")
    out = launch_attention(*qkv, 0.2, None, ends, 33)
    assert out[20:25, 1].isnan().any()
    for rows, heads in ((slice(0, 20), slice(0, 2)), (slice(25, 59), slice(0, 2)), (slice(20, 25), slice(0, 1))):
        assert torch.equal(out[rows, heads], expected[rows, heads])
    dense = [x.view(1, 59, 2, 32) for x in qkv]
    assert launch_attention(*dense, 0.2)[0, :, 0].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_any_strides(device, dtype):
    wide = make_qkv(4, 7, 7, 4, 40, dtype)[0].to(device)
    views = (
        wide[::2, :, :2, :32],
        wide[:2, ::2, ::3, :32],
        wide[:2, :, :2, 1:33],  # nothing in it is aligned
        wide[:2, :4, :, :20].transpose(1, 2),
        wide.transpose(0, 1)[:2, :, :2, :32],
        wide[:1, :, :2, :32].expand(2, -1, -1, -1),
        wide[:2, :1, :1, :32].expand(-1, 7, 2, -1),
        wide[:2, ..., ::2],
        wide[:2, :, :2, :35][..., :32],
    )
    for q, (k, v) in itertools.zip_longest(views, ((x, x.flip(1)) for x in views)):
        expected = launch_attention(q.contiguous(), k.contiguous(), v.contiguous(), 0.2)
        out = launch_attention(q, k, v, 0.2)
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        ends = torch.tensor([0, k.shape[1]], dtype=torch.int32, device=device)
        one = launch_attention(q[0], k[0], v[0], 0.2, None, ends, k.shape[1])
        torch.testing.assert_close(one, expected[0], rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_hidden_keys(device, dtype, online):
    """Rows without a key are 0, also where whole blocks are hidden before the first that is not."""
    q, k, v = on(device, *make_qkv(4, 50, 50, 1, 32, dtype))
    bias = make_bias(4, 50)
    bias[1] = -INF
    bias[2, :33] = -INF
    bias[3, 5:] = -INF
    tile = AttentionTile(16, 16, num_stages=2) if online else None
    given = (q, k, v, 0.2, bias.to(device))
    out = run_one(*given, tile=tile)
    assert (out[1] == 0).all()
    check(out, given)


@pytest.mark.parametrize("keys", [40, 300])
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_large_scores(device, dtype, keys):
    """Up to 250, beyond what an exponential takes, rising and falling from block to block."""
    q, k, v = make_qkv(1, 9, keys, 1, 32, dtype)
    steps = torch.linspace(-40, 40, keys)
    for ramp in (steps, -steps, steps.abs()):
        given = *on(device, q.abs(), (k.abs() * ramp[:, None, None]).to(dtype), v), 0.2, None
        out = run_one(*given)
        assert out.isfinite().all()
        check(out, given)


def test_no_images():
    q, k, v = make_qkv(0, 5, 5, 2, 32, torch.float32)
    assert launch_attention(q, k, v, 0.2).shape == (0, 5, 2, 32)
    ends = torch.zeros(1, dtype=torch.int32)
    assert launch_attention(q[:, 0], k[:, 0], v[:, 0], 0.2, None, ends, 5).shape == (0, 2, 32)


@pytest.mark.parametrize("head_dim", [12, 42, 132])
def test_sizes_beyond_the_kernels_are_refused(head_dim):
    with pytest.raises(ValueError, match=f"heads of {head_dim} channels"):
        launch_attention(*make_qkv(1, 4, 4, 1, head_dim, torch.float32), 0.2)


def test_chunks_hold_all_keys_with_the_least_padding():
    for n in range(1, 257):
        chunks = key_chunks(n)
        assert sum(chunks) >= n
        assert sum(chunks) - n < (16 if n <= 112 else 32)
        assert list(chunks) == sorted(chunks, reverse=True)
        assert all(c == 0 or (c >= 16 and c & (c - 1) == 0) for c in chunks)
    known = {1: (16, 0, 0), 68: (64, 16, 0), 97: (64, 32, 16), 138: (128, 16, 0), 197: (128, 64, 16), 256: (256, 0, 0)}
    assert {n: key_chunks(n) for n in known} == known


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.interpreter)])
def test_the_op_goes_the_way_that_was_chosen(device, monkeypatch):
    q, k, v = make_qkv(2, 9, 9, 1, 32, torch.float16)
    kind = {"op": "attention", "dtype": "float16", "size": 2, "queries": 9, "tokens": 9, "head_dim": 32}
    expected = launch_attention(q, k, v, 0.2)
    with using(Choices(({**kind, "by": "pytorch"},))):
        assert torch.equal(attention(q, k, v, 0.2), attention_ref(q, k, v, 0.2))
    monkeypatch.setattr(op, "attention_ref", None)
    with using(Choices(({**kind, "by": "triton", "tile": [16, 16, 0, 0, 4, 1, 1]},))):
        assert torch.equal(attention(q, k, v, 0.2), expected)
    pair_bias = make_pair_bias(1, 9, 9)
    with using(Choices(({**kind, "by": "pytorch"},))):  # a row of its own would be needed
        paired = launch_attention(q, k, v, 0.2, pair_bias=pair_bias)
        assert torch.equal(attention(q, k, v, 0.2, pair_bias=pair_bias), paired)
    with using(Choices(otherwise="pytorch")):  # which would have to read the lengths
        ends = torch.tensor([0, 9], dtype=torch.int32)
        torch.testing.assert_close(attention(q[0], k[0], v[0], 0.2, None, ends, 9), expected[0], rtol=0, atol=2e-3)


LENGTHS = [(197, 197), (138, 138), (97, 97), (68, 68), (1, 68), (577, 577), (1025, 1025)]
# Queries, keys, head size, dtype: every length of the models, every other head size, float32; each is one to compile.
SIZES = [
    *((m, n, 64, dtype) for m, n in LENGTHS for dtype in (torch.float16, torch.bfloat16)),
    *((197, 197, head_dim, torch.bfloat16) for head_dim in (32, 48, 60, 72, 80, 88, 96, 104, 128)),
    *((n, n, 104, torch.float16) for n in (68, 577)),
    *((n, n, head_dim, torch.float32) for n, head_dim in ((197, 64), (577, 104))),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "head_dim", "dtype"), SIZES)
def test_sizes_of_models(m, n, head_dim, dtype):
    qkv = poisoned(*on("cuda", *make_qkv(3, m, n, 3, head_dim, dtype)))
    for bias in (None, make_bias(3, n).cuda()):
        given = (*qkv, head_dim**-0.5, bias)
        check(run_one(*given), given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ragged_without_waiting(dtype):
    """A captured graph, which no read of the lengths could be in, takes other lengths when it runs again."""
    lengths = [197, 5, 138, 68, 1, 0, 97, 0]
    *qkv, ends = on("cuda", *make_ragged(lengths, 6, 64, dtype))
    given = (*qkv, 0.125, None)
    attention(*given, ends, 197)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*given, ends, 197)
    for again in (lengths, [68, 197, 0, 1, 97, 138, 0, 5]):
        ends.copy_(torch.tensor([0, *again]).cumsum(0))
        graph.replay()
        check(out, given, ends)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [3, 256])
def test_the_op_on_cuda_runs_the_kernel(batch, monkeypatch):
    q, k, v = on("cuda", *make_qkv(batch, 197, 197, 6, 64, torch.bfloat16))
    expected = attention_ref(q, k, v, 0.125)
    monkeypatch.setattr(op, "attention_ref", None)
    with using(Choices()):
        torch.testing.assert_close(attention(q, k, v), expected, rtol=2e-2, atol=2e-2)
