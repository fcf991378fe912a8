"""What a method chooses by, and what it decided, in a reference model; deciding is apart from moving the tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from dvit_infer.config import Setting
from dvit_infer.graph.tokens import Tokens, index_of_kept, note_kept, note_merged, rows_of_groups
from dvit_infer.ops.keep_tokens import fuse_rows_ref
from dvit_infer.ops.merge_tokens import average_rows_ref
from dvit_infer.ops.prune_tokens import gather_tokens_ref


class StageInput(NamedTuple):
    """What a method chooses by, at one stage of a reference model.

    Attributes:
        x: (B, P+n, C), the tokens that earlier stages left.
        signal: what the attention before left, as `Tokens.signal`; None: nothing.
        stage: its number, 0-based.
        keep: how many patch tokens remain.
        num_prefix: P.
        num_patches: N, the number of patch tokens before the first stage.
        modules: those in the weights.
        settings: the method's.
    """

    x: torch.Tensor
    signal: torch.Tensor | None
    stage: int
    keep: int
    num_prefix: int
    num_patches: int
    modules: Sequence[nn.Module]
    settings: Mapping[str, Setting]


@dataclass(frozen=True)
class Keep:
    """Pruning.

    Attributes:
        index: (B, k) ascending positions, among the patch tokens, of those that stay.
        gap: (B,) the gap between the scores of the last token kept and the first one dropped, as far as rounding in
            float32 can close it; inf if it cannot.
        score: (B, n) weights with which the others are fused into one more token; None: they are not.
        fused: the position of that token.
    """

    index: torch.Tensor
    gap: torch.Tensor
    score: torch.Tensor | None = None
    fused: int | None = None

    def move(self, tokens: Tokens, num_prefix: int, keep: int, given: torch.Tensor | None = None) -> None:
        """Drop all but `keep` patch tokens; `given` (B, keep) are original positions to keep instead."""
        index = self.index if given is None else index_of_kept(tokens, given)
        if self.score is None:
            tokens.x = gather_tokens_ref(tokens.x, index, num_prefix)
        else:
            tokens.x = fuse_rows_ref(tokens.x, self.score, index, num_prefix)
        note_kept(tokens, index, self.fused)


@dataclass(frozen=True)
class Assign:
    """Merging.

    Attributes:
        rows: (B, P+n) the output row of every token.
        gap: (B,) the least gap between similarities that rounding would have to close to change the rows.
    """

    rows: torch.Tensor
    gap: torch.Tensor

    def move(self, tokens: Tokens, num_prefix: int, keep: int, given: torch.Tensor | None = None) -> None:
        """Merge all into `keep` patch tokens; `given` (B, N) are groups to make instead, as in `Tokens.choices`."""
        rows = self.rows if given is None else rows_of_groups(tokens, given, num_prefix)
        tokens.x, tokens.sizes = average_rows_ref(tokens.x, tokens.sizes, rows, num_prefix + keep)
        note_merged(tokens, rows, num_prefix, keep)
