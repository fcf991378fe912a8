"""merge_tokens: match tokens by their keys, and average the most similar ones into their matches (Bolya et al. 2023).

Deciding is apart from moving: `match_tokens_ref` returns the output row of every token, `average_rows_ref` moves them.
On CUDA two Triton launches replace both (dvit_kernels/merge_tokens.py). `torch.ops.dvit.merge_tokens` exists once this
module is imported.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from dvit_infer.ops.choices import DTYPES, runs_triton
from dvit_infer.ops.fallback import by_kernel, check_close, some_of
from dvit_infer.ops.layer_norm import stats_fault
from dvit_infer.ops.registration import register

OP = "dvit::merge_tokens"
_NEAR = 1e-5  # similarities closer than this may be ordered either way, as they are rounded


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

    The lower index wins between equals. Keys of length 0 are similar to none: 0; so are, in a kernel, those whose
    squares underflow. Keys of NaN are the least similar.

    Args:
        keys: (B, P+N, D) float32, N > 1.
        num_prefix: P; these tokens are not matched.
    """
    patches = F.normalize(keys[:, num_prefix:].float(), dim=-1, eps=1e-30)
    even, odd = patches[:, num_prefix % 2 :: 2], patches[:, 1 - num_prefix % 2 :: 2]
    scores = even @ odd.transpose(1, 2)
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
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
    nothing = torch.full((len(x), count, x.shape[2]), -0.0, dtype=wide, device=x.device)  # plus -0.0 it stays -0.0
    y = nothing.scatter_add(1, rows[..., None].expand_as(x), x.to(wide) * share[..., None])
    return y.to(x.dtype), total


def merge_tokens_ref(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor | None, merge: int, num_prefix: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the `merge` patch tokens that are most similar to one of the others into their matches.

    Patch tokens in even rows of x are matched with those in odd rows by the cosine similarity of their keys, in
    float32; the lower index wins between equals (Bolya et al. 2023, section 3). Prefix tokens are not matched.

    Args:
        x: (B, P+N, C) tokens in float32, float16 or bfloat16, any strides.
        keys: (B, P+N, D) float32, such as the attention's keys averaged over heads.
        sizes: (B, P+N) float32, the number of patches in each token; None: 1.
        merge: the number of tokens to merge, from 1 to N // 2.
        num_prefix: the number P of leading tokens (class, distillation, registers).

    Returns:
        merged (B, P+N-merge, C) in x's dtype: prefix rows first, then the unmerged tokens of even rows, ascending
        (without prefix rows by falling similarity), then those of odd rows, ascending, as averages weighted by size; a
        token alone in its row is a bit-equal copy; sizes (B, P+N-merge) float32; rows (B, P+N) int64, the output row
        of every token.

    Raises:
        ValueError: a shape, a dtype, a device or a count is invalid.
        RuntimeError: on backward.
    """
    rows = match_tokens_ref(keys, merge, num_prefix)
    return (*average_rows_ref(x, sizes, rows, x.shape[1] - merge), rows)


def _check(x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor | None, merge: int, num_prefix: int) -> None:
    if x.ndim != 3 or x.dtype not in DTYPES:
        raise ValueError(f"merge_tokens: x is {_found(x)}; (B, P+N, C) in float32, float16 or bfloat16 is expected")
    rows = tuple(x.shape[:2])
    if keys.ndim != 3 or tuple(keys.shape[:2]) != rows or keys.shape[2] < 1 or keys.dtype != torch.float32:
        raise ValueError(f"merge_tokens: keys is {_found(keys)}; {(*rows, 'D')} in torch.float32 is expected")
    if sizes is not None and (tuple(sizes.shape) != rows or sizes.dtype != torch.float32):
        raise ValueError(f"merge_tokens: sizes is {_found(sizes)}; {rows} in torch.float32 is expected")
    for name, tensor in (("keys", keys), ("sizes", sizes)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"merge_tokens: {name} is on {tensor.device}, x is on {x.device}")
    if num_prefix < 0:
        raise ValueError(f"merge_tokens: num_prefix is {num_prefix}, 0 or more is expected")
    most = max(0, (x.shape[1] - num_prefix) // 2)
    if not 1 <= merge <= most:
        raise ValueError(f"merge_tokens: merge is {merge}, from 1 to {most} of the patch tokens can be merged")


def _found(x: torch.Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}"


def backend_of(device: torch.device, n: int, key_dim: int) -> str:
    """Return the backend of the op for N patch tokens with keys of D channels on a device: 'Triton' or 'PyTorch'."""
    if not runs_triton(device, "merge_tokens"):
        return "PyTorch"
    from dvit_kernels.merge_tokens import supports

    return "Triton" if supports(n, key_dim) else "PyTorch"


def _run(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor | None, merge: int, num_prefix: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _with_stats(x, keys, sizes, merge, num_prefix, stats=False)[0]


def merge_tokens_with_stats(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor | None, merge: int, num_prefix: int = 1
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Return the result of `merge_tokens`, and statistics of the merged rows for a linear that normalises them.

    None: they would take a launch of their own. Arguments are as for `merge_tokens`. It is no op of PyTorch's.
    """
    return _with_stats(x, keys, sizes, merge, num_prefix, stats=True)


def _with_stats(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor | None, merge: int, num_prefix: int, stats: bool
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:
    _check(x, keys, sizes, merge, num_prefix)

    def plain() -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], None]:
        return merge_tokens_ref(x, keys, sizes, merge, num_prefix), None

    if backend_of(x.device, x.shape[1] - num_prefix, keys.shape[2]) == "PyTorch":
        return plain()

    def kernel() -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:
        from dvit_kernels.merge_tokens import MAX_BLOCK, launch_merge_tokens  # here: Triton takes a while to import

        b, tokens, c = x.shape
        leaves = stats and c <= MAX_BLOCK
        left = x.new_empty(b * (tokens - merge), 1, 2, dtype=torch.float32) if leaves else None
        return launch_merge_tokens(x, keys, sizes, merge, num_prefix, left), left

    def fault(result: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]) -> str | None:
        moved, left = result
        return _fault(x, keys, sizes, num_prefix, *moved) or (left is not None and stats_fault(moved[0], left)) or None

    return by_kernel("merge_tokens", x.device, kernel, plain, fault, (x, keys, sizes, merge, num_prefix, stats))


def _fault(
    x: torch.Tensor,
    keys: torch.Tensor,
    sizes: torch.Tensor | None,
    num_prefix: int,
    merged: torch.Tensor,
    merged_sizes: torch.Tensor,
    rows: torch.Tensor,
) -> str | None:
    """Check the kernels' result in a few images.

    Similarities are rounded, so nearly equal ones may change places: rows are held against the similarities of the
    matches that they state, not against those that PyTorch chooses.
    """
    some, count = some_of(x), merged.shape[1]
    x, keys, merged, merged_sizes, rows = x[some], keys[some], merged[some], merged_sizes[some], rows[some]
    sizes = None if sizes is None else sizes[some]
    if rows.numel() and (rows.min() < 0 or rows.max() >= count):
        return f"gives wrong results: an output row is not from 0 to {count - 1}"
    if (lost := _lost(keys, rows, count, num_prefix)) is None:
        return "gives wrong results: the output rows do not follow from any matches"
    if lost > _NEAR:
        return f"gives wrong results: a match is {lost:.1e} less similar than one that was left out"
    sizes = torch.ones_like(rows, dtype=torch.float32) if sizes is None else sizes
    plain, total = average_rows_ref(x, sizes, rows, count)
    exact, _ = average_rows_ref(x.double(), sizes.double(), rows, count)
    if not torch.allclose(merged_sizes, total, rtol=1e-5):
        return "gives wrong results: sizes are not the sums of those merged"
    return check_close(merged, plain, exact)


def _lost(keys: torch.Tensor, rows: torch.Tensor, count: int, num_prefix: int) -> float | None:
    """Return how much similarity the matches that `rows` state lack; None if there are no such matches."""
    p, merge = num_prefix, keys.shape[1] - count
    matches = find_matches_ref(keys.double(), p)
    evens = matches.order.shape[1]
    odd_start = p + evens - merge
    # Order, then matches, by which the reference would give these rows: what goes first, then what stays.
    best = matches.similarity.new_empty(matches.similarity.shape).scatter_(1, matches.order, matches.similarity)
    even = rows[:, p + p % 2 :: 2]
    goes = even >= odd_start
    if (goes.sum(dim=1) != merge).any():
        return None
    order = torch.where(goes, -1, even).sort(dim=1, stable=True).indices
    match = (even - odd_start).clamp(min=0).gather(1, order)
    stated = Matches(order, match.float(), match, match.float())
    if not torch.equal(rows, rows_of_matches(stated, keys.shape[1], merge, p)):
        return None
    patches = F.normalize(keys[:, p:].double(), dim=-1, eps=1e-30)
    ours, odd = patches[:, p % 2 :: 2].gather(1, _wide(order, patches)), patches[:, 1 - p % 2 :: 2]
    chosen = (ours * odd.gather(1, _wide(match, patches))).sum(dim=-1)[:, :merge]
    ideal, found = best.gather(1, order), order[:, merge:]
    losses = [(ideal[:, :merge] - chosen).max()]
    if found.shape[1]:
        losses.append((ideal[:, merge:].amax(dim=1) - ideal[:, :merge].amin(dim=1)).max())
        if p == 0 and found.shape[1] > 1:
            losses.append(ideal[:, merge:].diff(dim=1).max())
    return max(loss.item() for loss in losses)


def _wide(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return index[..., None].expand(-1, -1, like.shape[2])


def _fake(
    x: torch.Tensor, keys: torch.Tensor, sizes: torch.Tensor | None, merge: int, num_prefix: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _check(x, keys, sizes, merge, num_prefix)
    b, tokens, c = x.shape
    merged_sizes = x.new_empty(b, tokens - merge, dtype=torch.float32)
    return x.new_empty(b, tokens - merge, c), merged_sizes, x.new_empty(b, tokens, dtype=torch.int64)


merge_tokens = register(
    OP, merge_tokens_ref, _run, _fake, "Which tokens merge is a hard choice: train the model without merging."
)
