"""attention_with_signal: attention that leaves a signal for token reduction, for dense batches.

On CUDA it is the launch of `attention` (dvit_kernels/attention.py), which writes the signal on the way; elsewhere plain
PyTorch computes it beside the result. The public function is in attention.py.
"""

import math

import torch

from dvit_infer.ops.attention import attention_ref, check_attention, few_images, supported
from dvit_infer.ops.choices import Choice, choices_for
from dvit_infer.ops.fallback import by_kernel, check_close, widened
from dvit_infer.ops.registration import register

OP = "dvit::attention_with_signal"
SIGNALS = ("class_attention", "mean_keys")


def attention_with_signal_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    leaves: str,
    pair_bias: torch.Tensor | None = None,
    log_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op in plain PyTorch; arguments as `attention_with_signal`."""
    bias = bias.log() if log_bias and bias is not None else bias
    out = attention_ref(q, k, v, scale, bias, pair_bias=pair_bias)
    signal = mean_keys_ref(k) if leaves == "mean_keys" else class_attention_ref(q, k, scale, bias, pair_bias)
    return out, signal


def mean_keys_ref(k: torch.Tensor) -> torch.Tensor:
    """(B, N, H, D) -> (B, N, D): the mean over heads, in float32 (float64 for float64 keys)."""
    return k.mean(dim=2, dtype=torch.promote_types(k.dtype, torch.float32))


def class_attention_ref(
    q: torch.Tensor, k: torch.Tensor, scale: float, bias: torch.Tensor | None, pair_bias: torch.Tensor | None
) -> torch.Tensor:
    """Return the weights of query row 0, (B, H, N) in float32; 0 if all of its keys are masked."""
    wide = torch.promote_types(q.dtype, torch.float32)
    first, keys = q[:, :1].transpose(1, 2).to(wide), k.permute(0, 2, 3, 1).to(wide)
    scores = (first @ keys)[:, :, 0] * scale
    if bias is not None:
        scores = scores + bias[:, None]
    if pair_bias is not None:
        row = pair_bias[..., 0, :]
        scores = scores + (row if row.ndim == 2 else row.repeat(len(q) // len(row), 1, 1))
    return scores.softmax(dim=-1).masked_fill((scores == -math.inf).all(dim=-1, keepdim=True), 0.0)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    leaves: str,
    pair_bias: torch.Tensor | None = None,
) -> None:
    if leaves not in SIGNALS:
        raise ValueError(f"attention_with_signal: leaves is {leaves!r}; {' or '.join(SIGNALS)} is expected")
    check_attention(q, k, v, scale, bias, pair_bias=pair_bias)
    if q.shape[1] < 1:
        raise ValueError("attention_with_signal: q has no queries")


def choose(device: torch.device, dtype: torch.dtype, heads: int, queries: int, tokens: int, head_dim: int) -> Choice:
    """Return the choice for a dense batch on a device; `heads` counts those of all its images.

    Its rows are its own: PyTorch's attention leaves no signal, which takes it launches more.
    """
    if not supported(device, head_dim, "attention_with_signal"):
        return Choice("pytorch")
    kind = {"queries": queries, "tokens": tokens, "head_dim": head_dim}
    return choices_for(device).of("attention with signal", dtype, heads, **kind)


def _run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    leaves: str,
    pair_bias: torch.Tensor | None = None,
    log_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v, scale, bias, leaves, pair_bias)
    call = (q, k, v, scale, bias, leaves, pair_bias, log_bias)
    heads, head_dim = q.shape[2:]
    choice = choose(q.device, q.dtype, len(q) * heads, q.shape[1], k.shape[1], head_dim)
    if choice.by == "pytorch":
        return attention_with_signal_ref(*call)

    def kernel() -> tuple[torch.Tensor, torch.Tensor]:
        from dvit_kernels.attention import AttentionTile, launch_attention_with_signal  # here: Triton imports slowly

        return launch_attention_with_signal(*call, tile=AttentionTile(*choice.tile) if choice.tile else None)

    def fault(result: tuple[torch.Tensor, torch.Tensor]) -> str | None:
        few_q, few_k, few_v, few_bias, few_pairs, some = few_images(q, k, v, bias, pair_bias)
        few = (few_q, few_k, few_v, scale, few_bias, leaves, few_pairs, log_bias)
        plain, exact = attention_with_signal_ref(*few), attention_with_signal_ref(*map(widened, few))
        faults = (check_close(result[i][some], plain[i], exact[i]) for i in range(2))
        return next((text for text in faults if text), None)

    return by_kernel(
        "attention_with_signal", q.device, kernel, lambda: attention_with_signal_ref(*call), fault, (*call, choice)
    )


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    leaves: str,
    pair_bias: torch.Tensor | None = None,
    log_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(q, k, v, scale, bias, leaves, pair_bias)
    b, n, heads, head_dim = k.shape
    shape = (b, heads, n) if leaves == "class_attention" else (b, n, head_dim)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


register(OP, attention_with_signal_ref, _run, _fake, "Train with torch.nn.functional.scaled_dot_product_attention.")
