"""The op: softmax attention against float64, dense and ragged, with hidden keys; what does not fit; registration."""

import pytest
import torch
from attention_inputs import INF, exact, make_bias, make_pair_bias, make_qkv, make_ragged
from kernel_helpers import DTYPES, ONE_DTYPE

from dvit_infer.ops.attention import attention, attention_ref


def worst(dtype: torch.dtype) -> float:
    return {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "m", "n", "heads", "head_dim"),
    [(3, 20, 20, 2, 64), (1, 1, 1, 1, 32), (2, 1, 17, 3, 48), (2, 2, 9, 1, 60), (1, 70, 70, 2, 256), (0, 5, 5, 2, 16)],
)
def test_softmax_attention_of_every_head(b, m, n, heads, head_dim, dtype):
    q, k, v = make_qkv(b, m, n, heads, head_dim, dtype)
    for bias in (None, make_bias(b, n)):
        out = attention(q, k, v, bias=bias)
        assert out.shape == q.shape
        assert out.dtype == dtype
        assert out.is_contiguous()
        error = (out - exact(q, k, v, head_dim**-0.5, bias)).abs()
        assert not error.numel() or error.max() < worst(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_images_do_not_see_each_other(dtype):
    *qkv, ends = make_ragged([20, 5, 1, 0, 33], 2, 32, dtype)
    for bias in (None, make_bias(1, 59)[0]):
        out = attention(*qkv, 0.3, bias, ends, 33)
        assert (out - exact(*qkv, 0.3, bias, ends)).abs().max() < worst(dtype)
        for start, end in ((0, 20), (20, 25), (25, 26), (26, 59)):
            one = attention_ref(
                *(x[None, start:end] for x in qkv), 0.3, None if bias is None else bias[None, start:end]
            )
            assert torch.equal(out[start:end], one[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_that_see_no_key_get_zero(dtype):
    q, k, v = make_qkv(3, 7, 7, 2, 32, dtype)
    bias = make_bias(3, 7)
    bias[1] = -INF
    out = attention(q, k, v, bias=bias)
    assert (out[1] == 0).all()
    assert (out - exact(q, k, v, 32**-0.5, bias)).abs().max() < worst(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "groups", "m", "n"), [(2, 0, 9, 9), (6, 3, 7, 11), (2, 2, 1, 5), (3, 1, 4, 4), (0, 0, 3, 3), (0, 2, 3, 3)]
)
def test_a_bias_per_pair_of_query_and_key(b, groups, m, n, dtype):
    q, k, v = make_qkv(b, m, n, 2, 32, dtype)
    pair_bias = make_pair_bias(2, m, n, groups)
    for bias in (None, make_bias(b, n)):
        out = attention(q, k, v, bias=bias, pair_bias=pair_bias)
        assert out.shape == q.shape
        assert out.dtype == dtype
        assert out.is_contiguous()
        error = (out - exact(q, k, v, 32**-0.5, bias, pair_bias=pair_bias)).abs()
        assert not error.numel() or error.max() < worst(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_query_whose_pairs_are_all_masked_gets_zero(dtype):
    """Also where only the two biases together mask its last key."""
    q, k, v = make_qkv(2, 5, 5, 2, 32, dtype)
    pair_bias, bias = make_pair_bias(2, 5, 5), torch.zeros(2, 5)
    pair_bias[1, 3] = -INF
    pair_bias[0, 2, 1:] = -INF
    bias[1, 0] = -INF
    out = attention(q, k, v, bias=bias, pair_bias=pair_bias)
    assert (out[:, 3, 1] == 0).all()
    assert (out[1, 2, 0] == 0).all()
    assert (out[0, 2, 0] != 0).any()
    assert (out - exact(q, k, v, 32**-0.5, bias, pair_bias=pair_bias)).abs().max() < worst(dtype)


def test_the_exact_result_that_kernels_are_checked_against_is_in_float64():
    q, k, v = make_qkv(2, 5, 5, 2, 32, torch.float64)
    bias, pair_bias = make_bias(2, 5).double(), make_pair_bias(2, 5, 5, 2).double()
    out = attention_ref(q, k, v, 0.2, bias, pair_bias=pair_bias)
    torch.testing.assert_close(out, exact(q, k, v, 0.2, bias, pair_bias=pair_bias), rtol=0, atol=1e-13)


def test_a_bias_is_not_rounded():
    """The logarithm of how many tokens one stands for, as merging needs it, differs by less than bfloat16 holds."""
    q, k, v = make_qkv(1, 30, 30, 1, 32, torch.bfloat16)
    sizes = 100.0 + torch.arange(30) / 8
    out = attention(q, k, v, bias=sizes.log()[None])
    assert (out - exact(q, k, v, 32**-0.5, sizes.log()[None])).abs().max() < worst(torch.bfloat16)


def _arguments(kind: str, dtype: torch.dtype, device: torch.device) -> tuple:
    if kind.startswith("ragged"):
        *qkv, ends = make_ragged([4, 0, 9], 2, 32, dtype)
        bias = make_bias(1, 13)[0] if kind.endswith("bias") else None
        given = (*qkv, 0.2, bias, ends, 9)
    else:
        given = (*make_qkv(2, 1 if "class" in kind else 9, 9, 2, 32, dtype), 0.2)
        given += (make_bias(2, 9),) if kind.endswith("bias") else ()
        given += (None, None, 0, make_pair_bias(2, 9, 9, 2)) if kind.endswith("pairs") else ()
    return tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in given)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("kind", ["dense", "dense class", "dense bias", "dense pairs", "ragged", "ragged bias"])
def test_opcheck(kind, dtype, device):
    torch.library.opcheck(torch.ops.dvit.attention.default, _arguments(kind, dtype, device))


def test_schema_is_the_published_one():
    assert str(torch.ops.dvit.attention.default._schema) == (
        "dvit::attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? bias=None, Tensor? cu_seqlens=None, "
        "int max_tokens=0, Tensor? pair_bias=None) -> Tensor"
    )


class Block(torch.nn.Module):
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        return attention(*(packed * 2).unbind(2)) + 1


@pytest.mark.slow
def test_compile_and_export_give_the_eager_answer():
    block, packed = Block(), torch.randn(3, 11, 3, 2, 32)
    expected = block(packed)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (3, 2):
        torch.testing.assert_close(compiled(packed[:batch]), expected[:batch])
    dynamic = {"packed": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(block, (packed,), dynamic_shapes=dynamic)
    torch.testing.assert_close(exported.module()(packed[:2]), expected[:2])


def test_backward_says_that_there_is_no_gradient():
    q, k, v = make_qkv(1, 4, 4, 1, 32, torch.float32)
    with pytest.raises(RuntimeError, match="no gradient"):
        attention(q.requires_grad_(), k, v).sum().backward()


ENDS = torch.tensor([0, 2, 6], dtype=torch.int32)
ROWS = torch.zeros(6, 2, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 32)}, "q is"),
        ({"q": torch.zeros(2, 6, 2, 32, dtype=torch.float64)}, "q is torch.float64"),
        ({"k": torch.zeros(2, 6, 3, 32)}, "k is"),
        ({"k": torch.zeros(3, 6, 2, 32)}, "k is"),
        ({"k": torch.zeros(2, 6, 2, 32).half()}, "k is torch.float16"),
        ({"k": torch.zeros(2, 0, 2, 32), "v": torch.zeros(2, 0, 2, 32)}, "k has no keys"),
        ({"v": torch.zeros(2, 5, 2, 32)}, "v is"),
        ({"v": torch.zeros(2, 6, 2, 32).bfloat16()}, "v is torch.bfloat16"),
        ({"v": torch.zeros(2, 6, 2, 32, device="meta")}, "v is on meta"),
        ({"scale": 0.0}, "scale is 0"),
        ({"scale": INF}, "scale is inf"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"bias": torch.zeros(2, 5)}, "bias is"),
        ({"bias": torch.zeros(2, 6).half()}, "bias is torch.float16"),
        ({"pair_bias": torch.zeros(2, 6, 5)}, "pair_bias is"),
        ({"pair_bias": torch.zeros(2, 6, 6).half()}, "pair_bias is torch.float16"),
        ({"pair_bias": torch.zeros(6, 6)}, "pair_bias is"),
        ({"pair_bias": torch.zeros(3, 2, 6, 6)}, r"pair_bias is .*\(2, 6, 6\) .* G divides 2"),
        ({"pair_bias": torch.zeros(0, 2, 6, 6)}, "pair_bias is"),
        ({"pair_bias": torch.zeros(1, 2, 2, 6, 6)}, "pair_bias is"),
        ({"pair_bias": torch.zeros(2, 6, 6, device="meta")}, "pair_bias is on meta"),
        (
            {"q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens": ENDS, "max_tokens": 6, "pair_bias": torch.zeros(2, 6, 6)},
            "pair_bias is for dense batches",
        ),
        ({"cu_seqlens": ENDS, "max_tokens": 6}, "q is"),
        ({"q": ROWS, "k": ROWS, "v": ROWS}, "q is"),
        ({"q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens": ENDS}, "max_tokens is 0"),
        ({"q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens": ENDS.long(), "max_tokens": 6}, "cu_seqlens is torch.int64"),
        ({"q": ROWS, "k": ROWS[1:], "v": ROWS[1:], "cu_seqlens": ENDS, "max_tokens": 6}, "k is"),
        (
            {"q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens": ENDS, "max_tokens": 6, "bias": ROWS[None, :, 0, 0]},
            "bias is",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    dense = torch.zeros(2, 6, 2, 32)
    arguments = {"q": dense, "k": dense, "v": dense} | change
    with pytest.raises(ValueError, match=message):
        attention(**arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        attention(**arguments)
