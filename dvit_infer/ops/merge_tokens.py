"""merge_tokens: match tokens by their keys, and average the most similar ones into their matches (Bolya et al. 2023).

Deciding is apart from moving: `match_tokens_ref` returns the output row of every token, `average_rows_ref` moves them.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F


class Matches(NamedTuple):
    """The matches of the patch tokens in even rows of x with those in odd rows.

    Attributes:
        order: (B, E) the first ones' indices among themselves, by falling similarity.
        similarity: (B, E) float32, in that order.
        match: (B, E) indices of their matches among those in odd rows, in that order.
        second: (B, E) float32 similarity to the next best match, in that order; minus infinity if there is none.
    """

    order: torch.Tensor
    similarity: torch.Tensor
    match: torch.Tensor
    second: torch.Tensor


def find_matches_ref(keys: torch.Tensor, num_prefix: int) -> Matches:
    """Match each patch token in an even row of x with the most similar one in an odd row, by cosine similarity.

    The lower index wins between equals. Keys of length 0 are similar to none: 0.

    Args:
        keys: (B, P+N, D) float32, N > 1.
        num_prefix: P; these tokens are not matched.
    """
    patches = F.normalize(keys[:, num_prefix:].float(), dim=-1, eps=1e-30)
    even, odd = patches[:, num_prefix % 2 :: 2], patches[:, 1 - num_prefix % 2 :: 2]
    scores = even @ odd.transpose(1, 2)
    best, match = scores.max(dim=2)
    second = scores.scatter(2, match[..., None], -torch.inf).amax(dim=2)
    similarity, order = best.sort(dim=1, descending=True, stable=True)
    return Matches(order, similarity, match.gather(1, order), second.gather(1, order))


def match_tokens_ref(keys: torch.Tensor, merge: int, num_prefix: int = 1) -> torch.Tensor:
    """Return the output row of every token, (B, P+N) int64, when the `merge` most similar matches are merged.

    Prefix tokens stay in front; the tokens in even rows that are not merged follow, ascending, or without prefix tokens
    by falling similarity, as in the official code; then come those in odd rows, ascending.
    """
    return rows_of_matches(find_matches_ref(keys, num_prefix), keys.shape[1], merge, num_prefix)


def rows_of_matches(matches: Matches, tokens: int, merge: int, num_prefix: int) -> torch.Tensor:
    """Return the output rows (B, P+N) int64 of P+N = `tokens` tokens; see `match_tokens_ref`."""
    order, p = matches.order, num_prefix
    b, evens = order.shape
    merged, left = order[:, :merge], order[:, merge:]
    left = left.sort(dim=1).values if p else left
    odd_start = p + evens - merge

    def ascending(start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end, device=order.device).expand(b, -1)

    rows = torch.cat([ascending(0, p), order.new_empty(b, tokens - p)], dim=1)
    even, odd = rows[:, p + p % 2 :: 2], rows[:, p + 1 - p % 2 :: 2]
    odd.copy_(ascending(odd_start, tokens - merge))
    even.scatter_(1, merged, odd_start + matches.match[:, :merge])
    even.scatter_(1, left, ascending(p, odd_start))
    return rows


def average_rows_ref(
    x: torch.Tensor, sizes: torch.Tensor | None, rows: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the tokens that share an output row, weighted by their sizes.

    Averages are computed in float32 and rounded once; a token alone in its row is a bit-equal copy.

    Args:
        x: (B, T, C).
        sizes: (B, T) float32, the number of patches in each token; None: 1.
        rows: (B, T) int64, the output row of every token, from 0 to count - 1; every row has one.
        count: the number of output rows.

    Returns:
        The averages (B, count, C) in x's dtype, and their sizes (B, count) float32.
    """
    sizes = x.new_ones(x.shape[:2], dtype=torch.float32) if sizes is None else sizes
    wide = torch.promote_types(x.dtype, torch.float32)
    total = sizes.new_zeros(len(x), count).scatter_add(1, rows, sizes)
    share = (sizes / total.gather(1, rows)).to(wide)
    wanted = torch.zeros(len(x), count, x.shape[2], dtype=wide, device=x.device)
    y = wanted.scatter_add(1, rows[..., None].expand_as(x), x.to(wide) * share[..., None])
    return y.to(x.dtype), total


def merge_tokens_ref(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor | None, merge: int, num_prefix: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the op in plain PyTorch; arguments as `merge_tokens`."""
    rows = match_tokens_ref(keys, merge, num_prefix)
    return (*average_rows_ref(x, sizes, rows, x.shape[1] - merge), rows)
