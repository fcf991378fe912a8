"""keep_tokens: keep the patch tokens to which the class token attends most, and fuse the others (Liang et al. 2022).

Deciding is apart from moving: scores choose by `prune_tokens.select_tokens_ref`, `fuse_rows_ref` moves. On CUDA one
Triton launch replaces both (dvit_kernels/keep_tokens.py). `torch.ops.dvit.keep_tokens` exists once this module is
imported.
"""

import math

import torch

from dvit_infer.ops.choices import DTYPES, runs_triton
from dvit_infer.ops.fallback import by_kernel, check_close, some_of
from dvit_infer.ops.layer_norm import stats_fault
from dvit_infer.ops.prune_tokens import gather_tokens_ref, select_tokens_ref
from dvit_infer.ops.registration import register

OP = "dvit::keep_tokens"


def keep_tokens_ref(
    x: torch.Tensor, attention: torch.Tensor, num_keep: int, num_prefix: int = 1, fuse: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep each image's `num_keep` patch tokens with the highest attention of the class token; fuse the others.

    A token's score is the mean of its weights over heads, in float32; for equal scores the lower position wins, NaN
    ranks last. The fused row is the sum of the other tokens weighted by their scores, in float32 and not normalised, as
    in the official code (Liang et al. 2022, section 3.2).

    Args:
        x: (B, P+N, C) tokens in float32, float16 or bfloat16, any strides.
        attention: (B, H, P+N) float32, the class token's weights for all tokens, such as those that
            `attention_with_signal` leaves.
        num_keep: the number of the N patch tokens to keep, 1 to N, with `fuse` to N-1.
        num_prefix: the number P of leading tokens (class, distillation, registers), always kept.
        fuse: whether a last row holds the fused tokens.

    Returns:
        kept (B, P+num_keep, C), with `fuse` (B, P+num_keep+1, C): prefix rows first, then bit-equal copies of the kept
        rows in ascending position, then the fused row; index (B, num_keep) int64, their positions among the N.

    Raises:
        ValueError: a shape, a dtype, a device or a count is invalid.
        RuntimeError: on backward.
    """
    score = attention[..., num_prefix:].mean(dim=1)
    index = select_tokens_ref(score, num_keep)
    return fuse_rows_ref(x, score, index, num_prefix, fuse), index


def fuse_rows_ref(
    x: torch.Tensor, score: torch.Tensor, index: torch.Tensor, num_prefix: int, fuse: bool = True
) -> torch.Tensor:
    """Return the prefix tokens, the patch tokens at `index`, and with `fuse` the sum of the others weighted by score.

    Args:
        x: (B, P+N, C).
        score: (B, N) float32; the sum is not normalised, and computed in float32.
        index: (B, k) int64.
        num_prefix: P.
        fuse: whether to return the sum, (B, P+k+1, C) then; else (B, P+k, C).
    """
    kept = gather_tokens_ref(x, index, num_prefix)
    if not fuse:
        return kept
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = score.scatter(1, index, 0.0).to(wide)
    fused = weight[:, None] @ x[:, num_prefix:].to(wide)
    return torch.cat([kept, fused.to(x.dtype)], dim=1)


def _check(x: torch.Tensor, attention: torch.Tensor, num_keep: int, num_prefix: int, fuse: bool) -> None:
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise ValueError(f"keep_tokens: x is {_found(x)}; (B, P+N, C) in float32, float16 or bfloat16 is expected")
    expected = (x.shape[0], attention.shape[1] if attention.ndim > 1 else 0, x.shape[1])
    if tuple(attention.shape) != expected or expected[1] < 1 or attention.dtype != torch.float32:
        shape = f"({x.shape[0]}, H, {x.shape[1]})"
        raise ValueError(f"keep_tokens: attention is {_found(attention)}; {shape} in torch.float32 is expected")
    if attention.device != x.device:
        raise ValueError(f"keep_tokens: attention is on {attention.device}, x is on {x.device}")
    if num_prefix < 0:
        raise ValueError(f"keep_tokens: num_prefix is {num_prefix}, 0 or more is expected")
    most = max(0, x.shape[1] - num_prefix - fuse)
    if not 1 <= num_keep <= most:
        raise ValueError(f"keep_tokens: num_keep is {num_keep}, from 1 to {most} patch tokens can be kept")


def _found(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def backend_of(device: torch.device, n: int, heads: int) -> str:
    """Return the backend of the op for N patch tokens and a number of heads on a device: 'Triton' or 'PyTorch'."""
    if not runs_triton(device, "keep_tokens"):
        return "PyTorch"
    from dvit_kernels.keep_tokens import supports

    return "Triton" if supports(n, heads) else "PyTorch"


def _run(
    x: torch.Tensor, attention: torch.Tensor, num_keep: int, num_prefix: int = 1, fuse: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    return _with_stats(x, attention, num_keep, num_prefix, fuse, stats=False)[0]


def keep_tokens_with_stats(
    x: torch.Tensor, attention: torch.Tensor, num_keep: int, num_prefix: int = 1, fuse: bool = True
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Return the result of `keep_tokens`, and statistics of the rows that stay for a linear that normalises them.

    None: they would take a launch of their own. Arguments are as for `keep_tokens`. It is no op of PyTorch's.
    """
    return _with_stats(x, attention, num_keep, num_prefix, fuse, stats=True)


def _with_stats(
    x: torch.Tensor, attention: torch.Tensor, num_keep: int, num_prefix: int, fuse: bool, stats: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    _check(x, attention, num_keep, num_prefix, fuse)

    def plain() -> tuple[tuple[torch.Tensor, torch.Tensor], None]:
        return keep_tokens_ref(x, attention, num_keep, num_prefix, fuse), None

    if backend_of(x.device, x.shape[1] - num_prefix, attention.shape[1]) == "PyTorch":
        return plain()

    def kernel() -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
        from dvit_kernels.keep_tokens import BLOCK_C, launch_keep_tokens  # here: Triton takes a while to import

        rows, c = x.shape[0] * (num_prefix + num_keep + fuse), x.shape[2]
        leaves = stats and c % BLOCK_C == 0
        left = x.new_empty(rows, c // BLOCK_C, 2, dtype=torch.float32) if leaves else None
        return launch_keep_tokens(x, attention, num_keep, num_prefix, fuse, left), left

    def fault(result: tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]) -> str | None:
        moved, left = result
        return (
            _fault(x, attention, num_prefix, fuse, *moved) or (left is not None and stats_fault(moved[0], left)) or None
        )

    return by_kernel("keep_tokens", x.device, kernel, plain, fault, (x, attention, num_keep, num_prefix, fuse, stats))


def _fault(
    x: torch.Tensor, attention: torch.Tensor, num_prefix: int, fuse: bool, kept: torch.Tensor, index: torch.Tensor
) -> str | None:
    """Check the kernel's result in a few images.

    Scores are rounded, so tokens near the cut may change places: a kept token may score less than the best dropped one
    by a few roundings of the largest score.
    """
    some = some_of(x)
    kept, index, x, attention = kept[some], index[some], x[some], attention[some]
    n, num_keep = x.shape[1] - num_prefix, index.shape[1]
    if index.numel() and (index.min() < 0 or index.max() >= n or (index.diff(dim=1) <= 0).any()):
        return f"gives wrong results: the kept tokens are not ascending positions from 0 to {n - 1}"
    if not torch.equal(kept[:, : num_prefix + num_keep], gather_tokens_ref(x, index, num_prefix)):
        return "gives wrong results: kept rows are not exact copies"
    score = attention[..., num_prefix:].double().mean(dim=1)
    if num_keep < n and len(x):
        stays = torch.zeros_like(score, dtype=torch.bool).scatter_(1, index, True)
        lowest, highest = (score.masked_fill(~stays, math.inf).amin(1), score.masked_fill(stays, -math.inf).amax(1))
        lost = (highest - lowest).max().item()
        if lost > 8 * torch.finfo(torch.float32).eps * score.abs().max().item():
            return f"gives wrong results: a dropped token scores {lost:.1e} more than a kept one"
    if not fuse:
        return None
    plain = fuse_rows_ref(x, score.float(), index, num_prefix)[:, -1]
    return check_close(kept[:, -1], plain, fuse_rows_ref(x.double(), score, index, num_prefix)[:, -1])


def _fake(
    x: torch.Tensor, attention: torch.Tensor, num_keep: int, num_prefix: int = 1, fuse: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, attention, num_keep, num_prefix, fuse)
    kept = x.new_empty(x.shape[0], num_prefix + num_keep + fuse, x.shape[2])
    return kept, x.new_empty(x.shape[0], num_keep, dtype=torch.int64)


_ADVICE = "Which tokens stay is a hard choice: train with the reference model."
keep_tokens = register(OP, keep_tokens_ref, _run, _fake, _ADVICE)
