"""LayerNorm, linear, GELU and residual as one op against the modules in eager PyTorch: the linears of DeiT-S."""

import pytest
import torch
from torch.nn import functional as F

from dvit_infer.ops.linear import linear, row_sums

EPS = 1e-6
# in, out, LayerNorm before, activation after, residual added
LINEARS = {
    "qkv": (384, 1152, True, "none", False),
    "proj": (384, 384, False, "none", True),
    "fc1": (384, 1536, True, "gelu", False),
    "fc2": (1536, 384, False, "none", True),
}


@pytest.mark.parametrize("tokens", [197, 68])
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("runtime", ["eager", "op"])
def test_linear(tokens, name, runtime, device, dtype, batch, timed):
    dim_in, dim_out, norm, activation, has_residual = LINEARS[name]
    generator = torch.Generator().manual_seed(tokens)
    shapes = (batch, tokens, dim_in), (dim_out, dim_in), (dim_out,), (batch, tokens, dim_out)
    x, weight, bias, residual = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
    weight = weight / dim_in**0.5
    weight_sum = row_sums(weight) if norm else None

    def eager(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, bias, residual = tensors
        y = F.linear(F.layer_norm(x, (dim_in,), eps=EPS) if norm else x, weight, bias)
        y = F.gelu(y) if activation == "gelu" else y
        return residual + y if has_residual else y

    def op(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, bias, residual = tensors
        added = residual if has_residual else None
        return linear(x, weight, bias, added, weight_sum, None, EPS, activation)[0]

    tensors = x, weight, bias, residual
    candidates = {"eager": eager, "op": op}
    expected = eager(*(t.float() for t in tensors))
    row = {"op": f"linear, {name}", "runtime": runtime, "batch": batch, "shape": [tokens, dim_in, dim_out]}
    timed(lambda: candidates[runtime](*tensors), expected, f"linear, {name}, {tokens} tokens", **row)
