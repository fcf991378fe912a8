"""What tests of the attention launches share: inputs in memory of NaN, guarded outputs, the comparison with float64."""

import torch
from attention_inputs import exact
from dvit_kernels.attention import launch_attention
from kernel_helpers import collected, rms, run_guarded

from dvit_infer.ops.attention import attention_ref

BETWEEN = 4096  # elements of NaN around inputs


def poisoned(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies with the same strides, in memory that is NaN wherever they are not."""
    copies = []
    for x in tensors:
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        memory = torch.full((size + 2 * BETWEEN,), float("nan"), dtype=x.dtype, device=x.device)
        copies.append(memory.as_strided(x.shape, x.stride(), BETWEEN).copy_(x))
    return copies


def on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors there; views of one packed tensor stay such views."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x) for x in tensors]


def check(
    got: torch.Tensor, given: tuple, ends: torch.Tensor | None = None, pair_bias: torch.Tensor | None = None
) -> None:
    """Against float64: at most twice the error of plain PyTorch in the same dtype."""
    expected = exact(*given, ends, pair_bias=pair_bias)
    plain = attention_ref(*given, ends, pair_bias=pair_bias)
    assert rms(got.cpu() - expected) <= 2 * rms(plain.cpu() - expected) + 1e-6


def run_one(*arguments, **named) -> torch.Tensor:
    return run_guarded(collected(launch_attention, *arguments, **named), ["out_ptr"])["out_ptr"]
