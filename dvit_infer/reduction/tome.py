"""ToMe: merge the most similar tokens of every block (Bolya et al. 2023). It needs no training.

Between attention and MLP, patch tokens in even rows are matched with those in odd rows by the mean over heads of their
keys (bipartite soft matching, section 3), and the most similar ones are averaged into their matches, weighted by the
number of patches in each. Attention adds the logarithm of that number to the scores of a key (section 3, equation 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Setting, Stage
from dvit_infer.errors import InputError
from dvit_infer.graph.nodes import Signal
from dvit_infer.graph.reductions import Reduce
from dvit_infer.graph.tokens import Tokens, note_merged, rows_of_groups
from dvit_infer.ops.merge_tokens import find_matches_ref, rows_of_matches
from dvit_infer.reduction.choices import Assign, StageInput
from dvit_infer.reduction.settings import DECREASING, Known, Trunk, always, fits_all, flag, merge_counts, no_modules

SHARE = 0.8  # of the patches merged by default: the paper's r = 13 of a ViT-S or -B with 196 patches and 12 blocks


# The time that merging takes, in the MACs that the linears of a block do meanwhile, for each token and each channel
# of it. From 57.6, 38.6 and 22.8 million for 197 tokens of 768, 384 and 192 channels, and 21.4, 15.4 and 7.0 million
# for 67 (OpenVINO, float32, batch 1, two threads of a Xeon); on an EPYC 46.0, 28.2 and 16.8, and 11.1, 11.6 and 4.2
# million. In bfloat16 on matrix tiles it is two to three times as many. On a GPU it is not measured yet.
_MACS_PER_TOKEN, _MACS_PER_CHANNEL = 65_000, 280


def _by_default(trunk: Trunk) -> Setting:
    """Return `SHARE` of the patches in equal parts, in the blocks where that saves more time than it takes.

    These are the first ones, as later blocks save less. Where it pays nowhere, it is done all the same, but for a last
    block of which nothing but prefix tokens is read.
    """
    each = max(1, int(SHARE * trunk.num_patches / trunk.depth))
    tokens, schedule = trunk.num_patches, [0] * trunk.depth
    for block in range(trunk.depth):
        if each * _macs_behind(trunk, block) > tokens * (_MACS_PER_TOKEN + _MACS_PER_CHANNEL * trunk.dim):
            schedule[block] = each
            tokens = max(1, tokens - each)
    if not any(schedule):
        schedule = [each] * (trunk.depth - 1) + [each if trunk.reads_patches else 0]
    return each if all(schedule) else tuple(schedule)


def _macs_behind(trunk: Trunk, block: int) -> int:
    """Return the MACs of linears for one token from the MLP of a block on, with MLPs of 4 x the channels."""
    whole = 8 + 12 * (trunk.depth - 1 - block)
    if not trunk.reads_patches:  # the last block needs keys and values alone
        whole -= 10 if block < trunk.depth - 1 else 8
    return whole * trunk.dim**2


SETTINGS: Mapping[str, Known] = {
    "merge": Known(
        _by_default, f"{SHARE:.0%} of the patches in equal parts, where that saves time on a CPU", merge_counts
    ),
    "prop_attn": Known(always(True), "ToMe's default", flag),
}
KEY: str | None = None
MERGES = True
EVERY_BLOCK = True

why_not, modules = fits_all, no_modules


@dataclass(frozen=True, kw_only=True)
class Merge(Reduce):
    """Merges the `merged` most similar tokens into others: the op dvit::merge_tokens.

    Its choice are the rows (B, P+n), among the tokens that remain, of all tokens.

    Attributes:
        key_dim: channels of the mean keys.
    """

    kind = "merge"
    choice_name = "rows"
    key_dim: int

    def bytes_moved(self, batch: int, itemsize: int) -> int:
        return super().bytes_moved(batch, itemsize) + batch * 4 * (self.tokens + self.left)  # sizes

    @property
    def merged(self) -> int:
        return self.tokens - self.num_prefix - self.num_keep

    @property
    def choice_size(self) -> int:
        return self.tokens

    def note(self, tokens: Tokens, choice: torch.Tensor) -> None:
        note_merged(tokens, choice, self.num_prefix, self.num_keep)

    def choice_of(self, tokens: Tokens, given: torch.Tensor) -> torch.Tensor:
        return rows_of_groups(tokens, given, self.num_prefix)

    @property
    def choice_macs(self) -> int:
        patches = self.tokens - self.num_prefix
        return (patches // 2) * (patches - patches // 2) * self.key_dim + self.merged * self.dim


def stages(settings: Mapping[str, Setting], blocks: Sequence[int], num_patches: int) -> tuple[Stage, ...]:
    """Return a stage for every block that merges: at most half of its patch tokens, as ToMe (`utils.parse_r`)."""
    found, tokens = [], num_patches
    for block, count in zip(blocks, _counts(settings["merge"], len(blocks)), strict=True):
        if merged := min(count, tokens // 2):
            tokens -= merged
            found.append(Stage(block, tokens, "after_attention"))
    return tuple(found)


def _counts(merge: Setting, depth: int) -> tuple[int, ...]:
    """Return the number of tokens to merge in every block.

    A decreasing schedule falls in equal steps from twice the mean to none (`utils.parse_r` with inflection -1).
    """
    if isinstance(merge, str):
        mean = int(merge.removesuffix(DECREASING))
        step = -2 * mean / (depth - 1) if depth > 1 else 0.0
        return tuple(int(2 * mean + step * i) for i in range(depth)) if step else (mean,) * depth
    if not isinstance(merge, tuple):
        return (int(merge),) * depth
    if len(merge) != depth:
        raise InputError(f"merge: {len(merge)} numbers are given; the model has {depth} blocks, one for each is needed")
    return tuple(int(count) for count in merge)


def signal(settings: Mapping[str, Setting]) -> Signal:
    return "mean_keys"


def choose(given: StageInput) -> Assign:
    assert given.signal is not None
    p, tokens = given.num_prefix, given.x.shape[1]
    found, merge = find_matches_ref(given.signal, p), tokens - p - given.keep
    similarity = found.similarity
    gaps = [similarity[:, :merge] - found.second[:, :merge]]
    falls = similarity[:, :-1] - similarity[:, 1:]
    # Without prefix tokens the others stay in order of similarity, which the next block's even and odd rows depend on.
    gaps.append(falls[:, merge - 1 : merge] if p else falls[:, merge - 1 :])
    gap = torch.cat([*gaps, similarity.new_full((len(similarity), 1), torch.inf)], dim=1).amin(dim=1)
    return Assign(rows_of_matches(found, tokens, merge, p), gap)


def node(
    stage: int, modules: Sequence[nn.Module], settings: Mapping[str, Setting], num_patches: int, **facts: Any
) -> Merge:
    return Merge(weights={}, **facts)
