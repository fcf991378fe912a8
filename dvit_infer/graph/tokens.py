"""The tokens that travel through a model while a reduction drops or merges some, and where they came from."""

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Tokens:
    """Tokens, and where they came from.

    Attributes:
        x: tokens (B, P+n, C), prefix tokens first.
        positions: (B, n) original positions of x's patch tokens: of a merged token the lowest of its patches, of the
            one fused in stage j, N + j. None: all N, in order.
        sizes: (B, P+n) float32, the number of patches merged into each token; None: 1.
        holders: (B, N) which of the n patch tokens holds each original patch; None: nothing has merged.
        signal: what the attention before left for a choice, (B, heads, P+n) weights or (B, P+n, D) mean keys.
        choices: what each stage so far kept, (B, k) original positions, or the groups that its merges made: for every
            original patch the lowest one of the group that holds it, (B, N).
        last: (B, N+1, C) for every original patch the token that held it when it was last noted (`note_last`), and a
            row for those of no patch; None: nobody asks.
    """

    x: torch.Tensor
    positions: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    holders: torch.Tensor | None = None
    signal: torch.Tensor | None = None
    choices: list[torch.Tensor] = field(default_factory=list)
    last: torch.Tensor | None = None


def note_kept(tokens: Tokens, index: torch.Tensor, fused: int | None = None) -> None:
    """Note that the patch tokens at `index` (B, k) remain, and behind them one with the position `fused`."""
    kept = index if tokens.positions is None else tokens.positions.gather(1, index)
    tokens.choices.append(kept)
    tokens.positions = kept if fused is None else torch.cat([kept, kept.new_full((len(kept), 1), fused)], dim=1)


def index_of_kept(tokens: Tokens, kept: torch.Tensor) -> torch.Tensor:
    """Return where the patches at original positions (B, k), ascending, are among the patch tokens."""
    return kept if tokens.positions is None else torch.searchsorted(tokens.positions.contiguous(), kept.contiguous())


def note_merged(tokens: Tokens, rows: torch.Tensor, num_prefix: int, num_keep: int) -> None:
    """Note that each token went to its row of `rows` (B, P+n), and that `num_keep` patch tokens remain."""
    rows = rows[:, num_prefix:] - num_prefix
    positions, holders = tokens.positions, tokens.holders
    if positions is None or holders is None:
        positions = holders = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    lowest = positions.new_full((len(rows), num_keep), holders.shape[1])
    tokens.positions = lowest.scatter_reduce(1, rows, positions, "amin")
    tokens.holders = rows.gather(1, holders)
    tokens.choices.append(tokens.positions.gather(1, tokens.holders))


def note_last(tokens: Tokens) -> None:
    """Write patch tokens to the rows of `tokens.last` whose patches they hold: before some are dropped, and at the end.

    What was dropped before stays there as it was then. A fused token holds no patch.
    """
    last, positions = tokens.last, tokens.positions
    assert last is not None
    num_patches = last.shape[1] - 1
    patches = tokens.x[:, -(num_patches if positions is None else positions.shape[1]) :]
    if tokens.holders is not None:
        last[:, :-1] = patches.gather(1, tokens.holders[..., None].expand(-1, -1, last.shape[2]))
    elif positions is not None:
        last.scatter_(1, positions.clamp(max=num_patches)[..., None].expand_as(patches), patches)
    else:
        last[:, :-1] = patches


def rows_of_groups(tokens: Tokens, groups: torch.Tensor, num_prefix: int) -> torch.Tensor:
    """Return the output row of every token (B, P+n) when the original patches are merged into `groups` (B, N).

    Output rows are in ascending order of the groups.
    """
    b, n = groups.shape
    label = groups if tokens.positions is None else groups.gather(1, tokens.positions)
    rank = groups.new_zeros(b, n).scatter(1, label, 1).cumsum(dim=1) - 1
    prefix = torch.arange(num_prefix, device=groups.device).expand(b, -1)
    return torch.cat([prefix, rank.gather(1, label) + num_prefix], dim=1)
