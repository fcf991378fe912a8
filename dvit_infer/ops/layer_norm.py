"""layer_norm and row_stats: LayerNorm over the last dimension (Ba et al. 2016), and its statistics alone.

The statistics are for a product with the normalisation folded into its weights. On CUDA each is one Triton launch
(dvit_kernels/layer_norm.py). `torch.ops.dvit.layer_norm` and `torch.ops.dvit.row_stats` exist once this module is
imported.
"""

import torch
from torch.nn import functional as F

from dvit_infer.ops.choices import DTYPES, runs_triton
from dvit_infer.ops.fallback import by_kernel, check_close, some_of, widened
from dvit_infer.ops.registration import register

OP, STATS_OP = "dvit::layer_norm", "dvit::row_stats"


def layer_norm_ref(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """Normalise rows to mean 0 and variance 1, then scale and shift: LayerNorm, with statistics in float32.

    Args:
        x: (..., C) in float32, float16 or bfloat16, any strides.
        weight, bias: gain and shift (C,), in any floating-point dtype, or None.
        eps: added to the variance, 0 or more.

    Returns:
        (..., C) in x's dtype, contiguous.

    Raises:
        ValueError: a shape, a dtype, a device or eps is invalid.
        RuntimeError: on backward.
    """
    if all(t is None or t.dtype == x.dtype for t in (weight, bias)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps).contiguous()
    gain, shift = (None if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], gain, shift, eps).to(x.dtype).contiguous()


def row_stats_ref(x: torch.Tensor) -> torch.Tensor:
    """Return mean and sum of squared deviations of every row.

    Args:
        x: (..., C) in float32, float16 or bfloat16, any strides.

    Returns:
        (rows, 1, 2) float32: [mean, sum of squared deviations], one part per row. The variance is that sum / C.

    Raises:
        ValueError: a shape or a dtype is invalid.
        RuntimeError: on backward.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # so that the order of the sum does not depend on strides
    rows = rows if x.dtype == torch.float64 else rows.float()
    mean = rows.mean(dim=1, keepdim=True)
    squares = (rows - mean).square().sum(dim=1, keepdim=True)
    return torch.stack([mean, squares], dim=2)


def block_stats(y: torch.Tensor, block: int) -> torch.Tensor:
    """Return mean and sum of squared deviations (rows, C / block, 2) of every part of y's rows (..., C)."""
    parts = y.reshape(-1, y.shape[-1] // block, block)
    parts = parts if y.dtype == torch.float64 else parts.float()
    mean = parts.mean(dim=2)
    return torch.stack([mean, (parts - mean[..., None]).square().sum(dim=2)], dim=2)


def stats_fault(y: torch.Tensor, stats: torch.Tensor) -> str | None:
    """Check statistics that a kernel left of its result's rows (B, n, C), in a few images."""
    some, block = some_of(y), y.shape[-1] // stats.shape[1]
    found = stats.view(*y.shape[:-1], *stats.shape[1:])[some].reshape(-1, *stats.shape[1:])
    return check_close(found, block_stats(y[some], block), block_stats(y[some].double(), block))


def _check_x(name: str, x: torch.Tensor) -> None:
    if x.ndim < 1 or x.dtype not in DTYPES or x.shape[-1] < 1:
        found = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"{name}: x is {found}; (..., C) in float32, float16 or bfloat16 is expected")


def _check(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> None:
    _check_x("layer_norm", x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.ndim != 1 or tensor.shape[0] != x.shape[-1] or not tensor.is_floating_point():
            found = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"layer_norm: {name} is {found}; ({x.shape[-1]},) in a floating-point dtype is expected")
        if tensor.device != x.device:
            raise ValueError(f"layer_norm: {name} is on {tensor.device}, x is on {x.device}")
    if not eps >= 0:
        raise ValueError(f"layer_norm: eps is {eps}, 0 or more is expected")


def backend_of(device: torch.device, c: int, op: str = "layer_norm") -> str:
    """Return the backend of an op for rows of C channels on a device: 'Triton' or 'PyTorch'."""
    if not runs_triton(device, op):
        return "PyTorch"
    from dvit_kernels.layer_norm import supports

    return "Triton" if supports(c) else "PyTorch"


def _run(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    _check(x, weight, bias, eps)
    if backend_of(x.device, x.shape[-1]) == "PyTorch":
        return layer_norm_ref(x, weight, bias, eps)

    def kernel() -> torch.Tensor:
        from dvit_kernels.layer_norm import launch_layer_norm  # here: Triton takes a while to import

        return launch_layer_norm(x, weight, bias, eps)

    def fault(y: torch.Tensor) -> str | None:
        rows = some_of(x)
        few = x[rows], weight, bias, eps
        return check_close(y[rows], layer_norm_ref(*few), layer_norm_ref(*map(widened, few)))

    return by_kernel(
        "layer_norm", x.device, kernel, lambda: layer_norm_ref(x, weight, bias, eps), fault, (x, weight, bias)
    )


def _fake(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    _check(x, weight, bias, eps)
    return x.new_empty(x.shape)


def _run_stats(x: torch.Tensor) -> torch.Tensor:
    _check_x("row_stats", x)
    if backend_of(x.device, x.shape[-1], "row_stats") == "PyTorch":
        return row_stats_ref(x)

    def kernel() -> torch.Tensor:
        from dvit_kernels.layer_norm import launch_row_stats  # here: Triton takes a while to import

        return launch_row_stats(x)

    def fault(stats: torch.Tensor) -> str | None:
        some = some_of(x)
        found = stats.view(*x.shape[:-1], 1, 2)[some].reshape(-1, 1, 2)
        return check_close(found, row_stats_ref(x[some]), row_stats_ref(x[some].double()))

    return by_kernel("row_stats", x.device, kernel, lambda: row_stats_ref(x), fault, (x,))


def _stats_fake(x: torch.Tensor) -> torch.Tensor:
    _check_x("row_stats", x)
    return x.new_empty(x.numel() // x.shape[-1], 1, 2, dtype=torch.float32)


_ADVICE = "Train with torch.nn.LayerNorm."
layer_norm = register(OP, layer_norm_ref, _run, _fake, _ADVICE)
row_stats = register(STATS_OP, row_stats_ref, _run_stats, _stats_fake, _ADVICE)
