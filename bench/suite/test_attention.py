"""Attention against plain matrix products and PyTorch's own: the lengths of DeiT-S/0.7."""

import pytest
import torch
from torch.nn import functional as F

from dvit_infer.ops.attention import attention

HEADS, HEAD_DIM = 6, 64
SCALE = HEAD_DIM**-0.5


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return (((q * SCALE) @ k.transpose(-2, -1)).softmax(dim=-1) @ v).transpose(1, 2)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE).transpose(1, 2)


@pytest.mark.parametrize("tokens", [197, 138, 97, 68])
@pytest.mark.parametrize("runtime", ["eager", "sdpa", "op"])
def test_attention(tokens, runtime, device, dtype, batch, timed):
    shape = batch, tokens, 3, HEADS, HEAD_DIM
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(tokens)).to(device, dtype)
    q, k, v = qkv.unbind(2)
    candidates = {"eager": plain, "sdpa": sdpa, "op": lambda q, k, v: attention(q, k, v, SCALE)}
    expected = plain(*(t.float() for t in (q, k, v)))
    row = {"op": "attention", "runtime": runtime, "batch": batch, "shape": [tokens, HEADS, HEAD_DIM]}
    timed(lambda: candidates[runtime](q, k, v), expected, f"attention, {tokens} tokens", **row)
