"""The op: attention and its signal against float64, masked keys, what does not fit, registration."""

import pytest
import torch
from attention_inputs import INF, exact, make_bias, make_pair_bias, make_qkv
from kernel_helpers import DTYPES, ONE_DTYPE
from token_reduction_checks import make_sizes

from dvit_infer.ops.attention import attention, attention_with_signal
from dvit_infer.ops.attention_signal import SIGNALS


def exact_weights(q, k, scale, bias, pair_bias):
    """The weights of query row 0 in float64: attention to an identity instead of v, head by head."""
    b, n, heads, _ = k.shape
    v = torch.eye(n).double()[None, :, None].expand(b, n, heads, n)
    return exact(q, k, v, scale, bias, pair_bias=pair_bias)[:, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "m", "n", "heads", "groups"),
    [(3, 20, 20, 2, 0), (1, 1, 17, 3, 0), (4, 5, 9, 1, 2), (2, 1, 1, 1, 2), (0, 5, 5, 2, 0)],
)
def test_result_and_signal(b, m, n, heads, groups, dtype):
    q, k, v = make_qkv(b, m, n, heads, 32, dtype)
    for bias in (None, make_bias(b, n)):
        for pair_bias in (None, make_pair_bias(heads, m, n, groups)):
            out, weights = attention_with_signal(q, k, v, None, bias, "class_attention", pair_bias)
            assert torch.equal(out, attention(q, k, v, None, bias, pair_bias=pair_bias))
            assert (weights.shape, weights.dtype) == ((b, heads, n), torch.float32)
            expected = exact_weights(q, k, 32**-0.5, bias, pair_bias)
            torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)
            again, means = attention_with_signal(q, k, v, None, bias, "mean_keys", pair_bias)
            assert torch.equal(again, out)
            assert (means.shape, means.dtype) == ((b, n, 32), torch.float32)
            torch.testing.assert_close(means.double(), k.double().mean(dim=2), rtol=0, atol=1e-6)


def test_a_class_token_that_sees_no_key_weighs_none():
    q, k, v = make_qkv(2, 4, 4, 2, 32, torch.float32)
    bias = torch.zeros(2, 4)
    bias[1] = -INF
    weights = attention_with_signal(q, k, v, 0.2, bias, "class_attention")[1]
    assert (weights[1] == 0).all()
    torch.testing.assert_close(weights[0].sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("leaves", SIGNALS)
def test_the_bias_may_be_the_logarithm_of_sizes(leaves):
    q, k, v = make_qkv(2, 9, 9, 2, 32, torch.float16)
    sizes, pair_bias = make_sizes(2, 9), make_pair_bias(2, 9, 9)
    for given in ((leaves, None), (leaves, pair_bias)):
        expected = attention_with_signal(q, k, v, 0.2, sizes.log(), *given)
        assert all(map(torch.equal, attention_with_signal(q, k, v, 0.2, sizes, *given, log_bias=True), expected))
        dense = attention_with_signal(q, k, v, 0.2, None, *given)
        assert all(map(torch.equal, attention_with_signal(q, k, v, 0.2, None, *given, log_bias=True), dense))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ONE_DTYPE)
@pytest.mark.parametrize("leaves", SIGNALS)
def test_opcheck(leaves, dtype, device):
    q, k, v = (x.to(device) for x in make_qkv(2, 9, 9, 2, 32, dtype))
    bias, pair_bias = make_bias(2, 9).to(device), make_pair_bias(2, 9, 9).to(device)
    for given in ((None, leaves), (bias, leaves), (bias, leaves, pair_bias), (bias.exp(), leaves, None, True)):
        torch.library.opcheck(torch.ops.dvit.attention_with_signal.default, (q, k, v, 0.2, *given))


def test_schema_is_the_published_one():
    assert str(torch.ops.dvit.attention_with_signal.default._schema) == (
        "dvit::attention_with_signal(Tensor q, Tensor k, Tensor v, float scale, Tensor? bias, str leaves, "
        "Tensor? pair_bias=None, bool log_bias=False) -> (Tensor, Tensor)"
    )


def test_backward_says_that_there_is_no_gradient():
    q, k, v = make_qkv(1, 4, 4, 1, 32, torch.float32)
    with pytest.raises(RuntimeError, match="no gradient"):
        attention_with_signal(q.requires_grad_(), k, v, None, None, "mean_keys")[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaves": "values"}, "leaves is 'values'; class_attention or mean_keys is expected"),
        ({"q": torch.zeros(2, 0, 2, 32)}, "q has no queries"),
        ({"k": torch.zeros(2, 6, 3, 32)}, "k is"),
        ({"bias": torch.zeros(2, 5)}, "bias is"),
        ({"scale": 0.0}, "scale is 0"),
        ({"pair_bias": torch.zeros(2, 6, 5)}, "pair_bias is"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    dense = torch.zeros(2, 6, 2, 32)
    arguments = {"q": dense, "k": dense, "v": dense, "scale": 0.2, "bias": None, "leaves": "mean_keys"} | change
    with pytest.raises(ValueError, match=message):
        attention_with_signal(**arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match=message):
        attention_with_signal(**arguments)
