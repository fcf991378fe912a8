"""The op rotary_attention: its reference against float64, bad input, registration."""

import pytest
import torch
from attention_inputs import make_bias, make_qkv
from rotary_inputs import exact_rotary, make_norms, make_places, make_tables

from dvit_infer.ops.attention import attention
from dvit_infer.ops.rotary_attention import rotary_attention


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(("m", "n"), [(9, 9), (2, 9), (1, 1)])
def test_the_reference(m, n, by_head):
    q, k, v = make_qkv(2, m, n, 3, 32, torch.float32)
    tables, bias = make_tables(*([3] * by_head), 5, head_dim=32), make_bias(2, n)
    for positions in (None, make_places(2, n - 1, n + 2)):
        for norms in (None, make_norms(32)):
            given = (q, k, v, 0.2, bias, *tables, positions, 1, norms)
            torch.testing.assert_close(rotary_attention(*given).double(), exact_rotary(*given), rtol=0, atol=2e-6)
    assert torch.equal(rotary_attention(q, k, v, 0.2, bias), attention(q, k, v, 0.2, bias))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, device):
    qkv = [x.to(device) for x in make_qkv(2, 9, 9, 2, 32, dtype)]
    sin, cos = (x.to(device) for x in make_tables(8, head_dim=32))
    named = {"positions": make_places(2, 8, 8).to(device), "num_prefix": 1, "norms": make_norms(32).to(device)}
    torch.library.opcheck(torch.ops.dvit.rotary_attention.default, (*qkv, 0.2, None, sin, cos), named)


def test_schema_is_the_published_one():
    assert str(torch.ops.dvit.rotary_attention.default._schema) == (
        "dvit::rotary_attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? bias=None, Tensor? sin=None, "
        "Tensor? cos=None, Tensor? positions=None, int num_prefix=0, Tensor? norms=None, "
        "float eps=9.9999999999999995e-07) -> Tensor"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 7, 2, 32)}, "q has 7 rows, k 6"),
        ({"k": torch.zeros(2, 6, 3, 32)}, "attention: k is"),
        ({"bias": torch.zeros(2, 5)}, "attention: bias is"),
        ({"cos": None}, "sin and cos go together"),
        ({"sin": torch.zeros(5, 16)}, r"sin is torch.float32 of shape \(5, 16\)"),
        ({"cos": torch.zeros(3, 5, 32)}, r"cos is .* \(P, 32\) or \(2, P, 32\) in torch.float32 is expected"),
        ({"cos": torch.zeros(4, 32)}, "one even head size"),
        ({"num_prefix": 7}, "num_prefix is 7; 0 to 6"),
        ({"positions": torch.zeros(2, 5, dtype=torch.int32)}, "positions is torch.int32"),
        ({"positions": torch.zeros(2, 6, dtype=torch.int64)}, r"positions is .* \(2, 5\) in torch.int64 is expected"),
        ({"norms": torch.zeros(2, 32)}, "norms is"),
        ({"norms": torch.zeros(2, 2, 32, device="meta")}, "norms is on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    dense, table = torch.zeros(2, 6, 2, 32), torch.zeros(5, 32)
    arguments = {"q": dense, "k": dense, "v": dense, "scale": 0.2, "sin": table, "cos": table, "num_prefix": 1}
    with pytest.raises(ValueError, match=message):
        rotary_attention(**(arguments | change))


def test_backward_says_that_there_is_no_gradient():
    q, k, v = make_qkv(1, 4, 4, 1, 32, torch.float32)
    with pytest.raises(RuntimeError, match="no gradient"):
        rotary_attention(q.requires_grad_(), k, v, 0.2).sum().backward()
