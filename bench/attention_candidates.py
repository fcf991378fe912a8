"""The attention candidates of `tune.py`: SDPA with each backend, PyTorch's varlen attention, the kernels."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from candidates import PYTORCH, Attention, by
from dvit_kernels.attention import AttentionTile, launch_attention
from launches import copies
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dvit_infer.ops.attention import attention
from dvit_infer.ops.choices import using


def attention_candidates(
    shape: Attention, dtype: torch.dtype, device: torch.device, tiles: Sequence[AttentionTile]
) -> Mapping[str, Sequence[Callable[[], Any]]]:
    """Return the calls of every candidate by name, over buffers that exceed the cache."""
    size = shape.batch, shape.tokens, 3, shape.heads, shape.head_dim
    moved = shape.batch * shape.tokens * 4 * shape.heads * shape.head_dim * dtype.itemsize
    qkv = [torch.randn(*size, device=device, dtype=dtype) for _ in range(copies(moved, device))]
    scale = shape.head_dim**-0.5

    def sdpa(one: torch.Tensor, backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            q, k, v = (t.transpose(1, 2) for t in one.unbind(2))
            return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).contiguous()

    def by_pytorch(one: torch.Tensor) -> torch.Tensor:
        with using(PYTORCH):
            return attention(*one.unbind(2), scale)

    found: dict[str, list[Callable[[], Any]]] = {"pytorch": [functools.partial(by_pytorch, one) for one in qkv]}
    if device.type == "cuda":
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        for name, backend in backends.items():
            found[f"sdpa {name}"] = [functools.partial(sdpa, one, backend) for one in qkv]
        if varlen := _varlen(shape.batch, shape.tokens, device):
            found["varlen"] = [functools.partial(varlen, one.flatten(0, 1)) for one in qkv]
    for tile in tiles:
        found[by(tile)] = [functools.partial(launch_attention, *one.unbind(2), scale, tile=tile) for one in qkv]
    return found


def _varlen(batch: int, n: int, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return torch's attention for ragged batches, if this version has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    lengths = torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=device)

    def run(packed: torch.Tensor) -> torch.Tensor:
        q, k, v = packed.unbind(1)
        return varlen_attn(q, k, v, lengths, lengths, n, n)

    return run
