"""Write reductions as operators: which tokens stay, and where those that stay were.

No operator here writes to places that it computes and adds there, which runtimes do in any order or slowly: dropped
tokens are left out by a gather, and merged ones are averaged by a product with a matrix of their shares.
"""

from typing import Generic

import torch

from dvit_infer.graph.reductions import Prune, Reduce
from dvit_infer.operators.builder import Builder, V
from dvit_infer.operators.prune_tokens import packed_by_name, scores, select
from dvit_infer.reduction.route import PredictorRoute
from dvit_infer.reduction.tome import Merge


def keep(to: Builder[V], node: Prune, x: V, index: V | None) -> tuple[V, V]:
    """Emit the tokens that remain, and their positions (B, k) among the patches: `index`, or by attention."""
    score = None
    if index is None or node.fused is not None:
        assert to.signal is not None
        with to.exactly():
            score = to.reduce("ReduceMean", to.part(to.signal, 2, node.num_prefix, node.tokens), 1)
    if index is None:
        assert score is not None
        with to.exactly():
            index = select(to, score, to.ints(node.num_keep), node.name)
    if node.rows is not None:
        return x, index
    patches = to.tokens(x, node.num_prefix, node.tokens)
    parts = [to.rows_of(patches, index)]
    if node.num_prefix:
        parts.insert(0, to.tokens(x, 0, node.num_prefix))
    if node.fused is not None:
        assert score is not None
        zero = to.emit("Mul", to.tokens(score, 0, node.num_keep), to.number(0.0))
        weights = to.emit("ScatterElements", score, index, zero, axis=1)
        parts.append(to.emit("MatMul", to.in_dtype(to.emit("Unsqueeze", weights, to.ints(1))), patches))
    return to.emit("Concat", *parts, axis=1, out=node.name), index


def merge(to: Builder[V], node: Merge, x: V, rows: V | None) -> tuple[V, V]:
    """Emit the tokens that remain, and the row of every token among them (B, P+n): `rows`, or by mean keys."""
    if rows is None:
        with to.exactly():
            rows = match(to, node)
    if node.rows is not None:
        return x, rows
    with to.exactly():
        columns, sizes = rows, to.sizes
        if to.pads_to_even and node.tokens % 2:  # a token of size 0
            x, columns = to.emit("Pad", x, to.ints(0, 0, 0, 0, 1, 0)), to.emit("Pad", rows, to.ints(0, 0, 0, 1))
            ones = to.weight(f"ones/{node.tokens}", (torch.arange(node.tokens + 1) < node.tokens).float()[None])
            sizes = ones if sizes is None else to.emit("Pad", sizes, to.ints(0, 0, 0, 1))
        numbers = to.weight(f"rows/{node.left}", torch.arange(node.left)[:, None])
        shares = to.emit("Equal", to.emit("Unsqueeze", columns, to.ints(1)), numbers)  # (B, left, P+n)
        sizes = to.number(1.0) if sizes is None else to.emit("Unsqueeze", sizes, to.ints(1))
        shares = to.emit("Where", shares, sizes, to.number(0.0))
        total = to.reduce("ReduceSum", shares, 2, keepdims=1)
        shares = to.emit("Div", shares, total)
        to.sizes = to.emit("Reshape", total, to.ints(0, node.left))
    return to.emit("MatMul", to.in_dtype(shares), x, out=node.name), rows


def route(to: Builder[V], node: PredictorRoute, x: V, index: V | None) -> V:
    """Emit the positions (B, k) that take the MLPs: `index`, or by the predictor; note where all others are."""
    if index is None:
        weights = {name: to.own(name, w) for name, w in packed_by_name(node.packed).items()}
        with to.exactly():
            score = scores(to, to.norm(x, node.eps, node.dim), weights, node.name)
            index = select(to, score, to.ints(node.num_keep), node.name)
    count, keep = node.tokens, node.num_keep
    none, one = (torch.full((n,), value, dtype=torch.int64) for n, value in ((count, 0), (keep, 1)))
    zeros = to.for_each(none, x, f"{node.name}/zeros")
    is_chosen = to.emit("ScatterElements", zeros, index, to.for_each(one, x, f"{node.name}/ones"), axis=1)
    before = to.emit("Sub", to.emit("CumSum", is_chosen, to.weight("int/1", torch.tensor(1))), is_chosen)
    behind = to.emit("Sub", to.own("behind", torch.arange(count)[None] + keep), before)
    place = to.emit("Where", to.emit("Equal", is_chosen, to.ints(1)), before, behind)
    order = to.top(place, count, axis=1, largest=0)[1]  # the inverse of a permutation sorts it
    to.routes = index, to.tokens(order, keep, count), place
    return index


def match(to: Builder[V], node: Merge) -> V:
    """Emit the output row of every token (B, P+n); see `ops.merge_tokens.match_tokens_ref`."""
    assert to.signal is not None
    p, tokens, merged = node.num_prefix, node.tokens, node.merged
    first_even, first_odd = p + p % 2, p + 1 - p % 2
    evens, odds = len(range(first_even, tokens, 2)), len(range(first_odd, tokens, 2))
    length = to.emit("Sqrt", to.reduce("ReduceSum", to.emit("Mul", to.signal, to.signal), 2, keepdims=1))
    keys = to.emit("Div", to.signal, to.emit("Max", length, to.number(1e-30)))
    even, odd = (to.part(keys, 1, first, tokens, step=2) for first in (first_even, first_odd))
    scores = to.emit("MatMul", even, to.emit("Transpose", odd, perm=(0, 2, 1)))
    best, found = to.top(scores, 1, axis=2)
    best, found = (to.emit("Reshape", value, to.ints(0, evens)) for value in (best, found))
    order = to.top(best, evens, axis=1)[1]
    rank = to.top(order, evens, axis=1, largest=0)[1]  # the inverse of a permutation sorts it
    is_merged = to.emit("Less", rank, to.ints(merged))
    start = p + evens - merged  # of the rows of odd ones
    if p:
        stays = to.emit("Where", is_merged, to.ints(0), to.ints(1))
        left = to.emit("Add", to.emit("CumSum", stays, to.weight("int/1", torch.tensor(1))), to.ints(p - 1))
    else:
        left = to.emit("Sub", rank, to.ints(merged))
    rows = to.emit("Where", is_merged, to.emit("Add", found, to.ints(start)), left)
    # Tokens in even rows first, then the others, whose rows are known; bring them into the order of x.
    others = torch.cat([torch.arange(p), torch.arange(start, start + odds)])
    together = to.emit("Concat", rows, to.for_each(others, rows, f"{node.name}/others"), axis=1)
    places = [*range(first_even, tokens, 2), *range(p), *range(first_odd, tokens, 2)]
    order_of_x = torch.tensor(places).argsort()
    return to.emit("Gather", together, to.own("order", order_of_x), axis=1, out=f"{node.name}/rows")


class Origins(Generic[V]):
    """Follows where the tokens between nodes came from.

    Attributes:
        positions: original positions (B, k) of the remaining patch tokens, as in `graph.tokens`; None: all.
        kept: for each stage what it did, as in `graph.tokens`.
        keeps_dropped: whether the tokens that stages drop are kept, for `on_grid`.
    """

    def __init__(self, to: Builder[V], num_patches: int, is_wanted: bool, keeps_dropped: bool = False) -> None:
        self._to, self._n, self._is_wanted, self.keeps_dropped = to, num_patches, is_wanted, keeps_dropped
        self._left = num_patches
        self._dropped: list[tuple[V, V]] = []  # tokens (B, any, C), and their original positions
        self._holders: V | None = None
        self.positions: V | None = None
        self.kept: list[V] = []

    def note_kept(self, node: Prune, index: V, x: V) -> None:
        """Note that of the tokens x those at `index` remain."""
        to, out = self._to, self._out()
        if self.keeps_dropped:
            self._note_dropped(node, index, x)
        self._left = node.left - node.num_prefix
        if self.positions is None:
            kept = to.emit("Identity", index, out=out)
        else:
            kept = to.emit("GatherElements", self.positions, index, out=out, axis=1)
        self.positions = kept
        if node.fused is not None:
            fused = to.for_each(torch.tensor([node.fused]), index, f"{node.name}/fused")
            self.positions = to.emit("Concat", kept, fused, axis=1)
        self.kept.append(kept)

    def note_routed(self, index: V) -> None:
        self.kept.append(self._to.emit("Identity", index, out=self._out()))

    def _note_dropped(self, node: Prune, index: V, x: V) -> None:
        to, patches = self._to, node.tokens - node.num_prefix
        if patches == node.num_keep:
            return
        all_of_them = to.for_each(torch.ones(patches, dtype=torch.int64), index, f"{node.name}/all")
        goes = to.emit("ScatterElements", all_of_them, index, to.emit("Mul", index, to.ints(0)), axis=1)
        at = to.top(goes, patches - node.num_keep, axis=1)[1]
        rows = to.rows_of(to.tokens(x, node.num_prefix, node.tokens), at)
        positions = at if self.positions is None else to.emit("GatherElements", self.positions, at, axis=1)
        self._dropped.append((rows, positions))

    def on_grid(self, x: V) -> V:
        """Emit for every original patch the token that holds it at last, or did when it was dropped: (B, N, C)."""
        to, last = self._to, torch.iinfo(torch.int64).max
        patches = to.tokens(x, -self._left, last)
        if self._holders is not None:
            return to.rows_of(patches, self._holders)
        if self.positions is None:
            return patches
        rows, positions = zip(*self._dropped, (patches, self.positions), strict=True)
        order = to.top(to.emit("Concat", *positions, axis=1), self._n, axis=1, largest=0)[1]  # fused ones are behind
        return to.rows_of(to.emit("Concat", *rows, axis=1), order)

    def note_merged(self, node: Merge, rows: V) -> None:
        to, p = self._to, node.num_prefix
        rows = to.emit("Sub", to.tokens(rows, p, node.tokens), to.ints(p))
        numbers = to.weight(f"rows/{node.num_keep}", torch.arange(node.num_keep)[:, None])
        same = to.emit("Equal", to.emit("Unsqueeze", rows, to.ints(1)), numbers)  # (B, left, n)
        if self.positions is None:
            positions = to.own("all", torch.arange(self._n)[None, None])
        else:
            positions = to.emit("Unsqueeze", self.positions, to.ints(1))
        lowest = to.reduce("ReduceMin", to.emit("Where", same, positions, to.ints(self._n)), 2)
        self._holders = rows if self._holders is None else to.emit("GatherElements", rows, self._holders, axis=1)
        self.positions, self._left = lowest, node.num_keep
        self.kept.append(to.emit("GatherElements", lowest, self._holders, out=self._out(), axis=1))

    def rows(self, node: Reduce) -> V:
        """Emit the original rows of all tokens that remain, (B, P+k), prefix tokens first; of a fused one, the last."""
        assert self.positions is not None
        to, prefix, width = self._to, node.num_prefix, node.left - node.num_prefix
        positions = self.positions
        if isinstance(node, Prune) and node.fused is not None:
            positions = to.emit("Min", positions, to.ints(self._n))
        if not prefix:
            return positions
        first = to.own("first", torch.tensor([*range(prefix), *[prefix] * width]))
        return to.emit("Add", to.emit("Pad", positions, to.ints(0, prefix, 0, 0)), first)

    def _out(self) -> str | None:
        return f"kept_{len(self.kept)}" if self._is_wanted else None
