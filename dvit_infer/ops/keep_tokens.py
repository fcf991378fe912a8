"""keep_tokens: keep the patch tokens to which the class token attends most, and fuse the others (Liang et al. 2022).

Deciding is apart from moving: scores choose by `prune_tokens.select_tokens_ref`, `fuse_rows_ref` moves.
"""

import torch

from dvit_infer.ops.prune_tokens import gather_tokens_ref, select_tokens_ref


def keep_tokens_ref(
    x: torch.Tensor, attention: torch.Tensor, num_keep: int, num_prefix: int = 1, fuse: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op in plain PyTorch; arguments as `keep_tokens`."""
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
