"""Write prune_tokens as operators: score, keep the best, gather their rows (Rao et al. 2021, section 3.2)."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from dvit_infer.operators.builder import Builder, V

INPUTS = ("w1", "b1", "w2_own", "w2_mean", "b2", "w3", "b3", "w4", "b4")


def packed_by_name(packed: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the weights of `ops.prune_tokens.pack_predictor`, without the row sums; matrices become (in, out)."""
    w1, _, *others = packed
    return {name: w.t() if w.ndim == 2 else w for name, w in zip(INPUTS, (w1, *others), strict=True)}


def prune_tokens(
    to: Builder[V], x: V, weights: Mapping[str, V], norm: Callable[[V], V], num_keep: V, num_prefix: V
) -> tuple[V, V]:
    """Emit the kept tokens (B, P+num_keep, C) and their ascending positions among the N patches, (B, num_keep) int64.

    Of equal scores the lower position wins, -0.0 equals 0.0, NaN ranks last.

    Args:
        x: (B, P+N, C), prefix tokens first; they stay in front.
        weights: by the names in `INPUTS`, the matrices in the builder's dtype, the rest in float32.
        norm: emits the predictor's LayerNorm of (B, N, C), whose gain and shift are folded.
        num_keep, num_prefix: int64 (1,).
    """
    end = to.weight("end", torch.tensor([np.iinfo(np.int64).max]))
    prefix = to.emit("Slice", x, to.ints(0), num_prefix, to.ints(1), out="prefix")
    patches = to.emit("Slice", x, num_prefix, end, to.ints(1), out="patches")
    with to.exactly():
        score = scores(to, norm(patches), weights)
        index = select(to, score, num_keep)
    return to.emit("Concat", prefix, to.rows_of(patches, index), axis=1, out="kept_x"), index


def scores(to: Builder[V], normed: V, weights: Mapping[str, V], stem: str = "") -> V:
    """Emit (B, N) float32, the difference of the keep and drop logits; `stem` is the prefix of its name."""
    w = weights
    hidden = to.dense(normed, w["w1"], w["b1"], "gelu")
    # The mean half is equal for all tokens of an image, so its part of the layer is computed once.
    own, averaged = to.halves(hidden)
    mean = to.reduce("ReduceMean", to.float32(averaged), 1, keepdims=1)
    shared = to.dense(mean, to.float32(w["w2_mean"]), w["b2"], exact=True)
    second = to.emit("Add", to.emit("MatMul", own, w["w2_own"]), to.in_dtype(shared))
    third = to.dense(to.activate(second, "gelu"), w["w3"], w["b3"], "gelu")
    last = to.emit("MatMul", to.float32(third), w["w4"])
    return to.emit("Add", last, w["b4"], out=f"{stem}/score" if stem else "score")


def select(to: Builder[V], score: V, num_keep: V, stem: str = "") -> V:
    """Emit index (B, num_keep): the smallest of 0 - score, so -0.0 equals 0.0; NaN ranks behind even -inf.

    `stem` is the prefix of the names of its values.
    """

    def constant(name: str, value: float) -> V:
        return to.weight(name, torch.tensor([value], dtype=torch.float32))

    descending = to.emit("Sub", constant("no_score", 0.0), score)
    finite = to.emit("Min", descending, constant("lowest", torch.finfo(torch.float32).max))
    nan_key = constant("nan_key", torch.inf)
    key = to.emit("Where", to.emit("IsNaN", score), nan_key, finite)
    # Equal values: the lower index first. The second one brings them into ascending order.
    names = [f"{stem}/{name}" if stem else name for name in ("best_key", "best", "index", "order")]
    _, best = to.emit_all("TopK", key, num_keep, outs=(names[0], names[1]), axis=1, largest=0, sorted=1)
    return to.emit_all("TopK", best, num_keep, outs=(names[2], names[3]), axis=1, largest=0, sorted=1)[0]
