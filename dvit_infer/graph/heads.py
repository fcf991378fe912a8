"""Node kinds after the last block: heads and pooling, each with its shapes, MACs and bytes for one image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from dvit_infer.graph.nodes import Node, NormNode, TokenNode, norm_macs
from dvit_infer.graph.reductions import Reduce

Reads = Literal["prefix", "mean", "all", "prefix and mean"]
Wanted = Literal["logits", "features", "tokens", "feature_map"]
OF_ALL_TOKENS: tuple[Wanted, ...] = ("tokens", "feature_map")  # outputs for which every reduction moves tokens


@dataclass(frozen=True, kw_only=True)
class Head(NormNode):
    """LayerNorm, then the logits of the class token.

    With a distillation token, the mean of both tokens' logits. LV-ViT adds, per class, half of the largest auxiliary
    logit of the patches. Without prefix tokens, the logits of the patches' mean.

    Attributes:
        reads: the rows that it reads: the first prefix tokens, the mean of the patches, or all.
        num_prefix: the number of prefix tokens in its input.
    """

    kind = "head"
    normed = ("head", "head_dist", "aux_head")
    reads: Reads
    num_prefix: int

    @property
    def dim(self) -> int:
        return self.weights["head.weight"].shape[1]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.weights["head.weight"].shape[0],)

    @property
    def last_norm(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Gain and shift of the LayerNorm. They are kept for features when they are folded into the linears."""
        prefix = "kept_norm" if "kept_norm.weight" in self.weights else "norm"
        return self.weights[f"{prefix}.weight"], self.weights[f"{prefix}.bias"]

    @property
    def feature_rows(self) -> slice:
        """The rows whose mean after the LayerNorm are the features of an image."""
        if self.reads == "mean":
            return slice(self.num_prefix, None)
        return slice(0, self.rows if self.reads == "prefix" else 1)

    @property
    def rows(self) -> int:
        """The number of rows that its linears multiply."""
        if self.reads == "prefix":
            return 2 if "head_dist.weight" in self.weights else 1
        return 1 if self.reads == "mean" else self.tokens

    @property
    def macs(self) -> int:
        return norm_macs(self.weights, self.tokens, self.dim) + self.rows * self.weights["head.weight"].numel()

    def bytes_moved(self, batch: int, itemsize: int) -> int:
        kept = [w for name, w in self.weights.items() if name.startswith("kept_norm.")]  # not read for logits
        return super().bytes_moved(batch, itemsize) - sum(w.numel() * w.element_size() for w in kept)


@dataclass(frozen=True, kw_only=True)
class Pool(TokenNode):
    """The row of an image that its classifier reads, or its embedding: tokens are pooled.

    A LayerNorm of all tokens (weights `last_norm`) may stand before it, and behind it a LayerNorm (`fc_norm`), a linear
    with tanh (`pre_logits`), and a linear (`projection`), in this order.

    Attributes:
        reads: the class tokens' mean, the mean of the patches or of all tokens, or the class tokens' mean and the
            patches' side by side.
        class_rows: the number of class tokens that are read: a distillation token may be one of two.
        num_prefix: the number of prefix tokens in its input.
    """

    kind = "pool"
    eps: float
    reads: Reads
    num_prefix: int
    channels: int
    class_rows: int = 1

    @property
    def dim(self) -> int:
        return self.channels

    @property
    def last_norm(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Gain and shift of the LayerNorm of all tokens, if there is one."""
        names = ("last_norm.weight", "last_norm.bias")
        return (self.weights[names[0]], self.weights[names[1]]) if names[0] in self.weights else None

    @property
    def rows(self) -> int:
        """The number of rows that it reads, if these are the first ones."""
        return self.class_rows if self.reads == "prefix" else self.tokens

    @property
    def out_shape(self) -> tuple[int, ...]:
        if "projection.weight" in self.weights:
            return (self.weights["projection.weight"].shape[0],)
        return (self.dim * (2 if self.reads == "prefix and mean" else 1),)

    @property
    def macs(self) -> int:
        w = self.weights
        norms = (self.tokens if "last_norm.weight" in w else 0) + (1 if "fc_norm.weight" in w else 0)
        linears = sum(w[name].numel() for name in ("pre_logits.weight", "projection.weight") if name in w)
        return 5 * norms * self.dim + linears


@dataclass(frozen=True, kw_only=True)
class MapPool(Pool):
    """Pooling by the attention of a learned query, with a norm and an MLP (MAP, Zhai et al. 2022).

    It attends to all tokens but the first `num_prefix`.
    """

    kind = "map_pool"
    reads: Reads = "all"
    num_heads: int
    scale: float
    act: str

    @property
    def macs(self) -> int:
        w, c = self.weights, self.dim
        query = c * c if "q.weight" in w else 0
        read = self.tokens - self.num_prefix
        attention = read * 2 * c * c + 2 * read * c + c * c
        return super().macs + query + attention + 5 * c + w["fc1.weight"].numel() + w["fc2.weight"].numel()


@dataclass(frozen=True, kw_only=True)
class Classify(Node):
    """The logits of a pooled row."""

    kind = "classify"

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.weights["weight"].shape[1],)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self.weights["weight"].shape[0],)

    @property
    def macs(self) -> int:
        return self.weights["weight"].numel()


def nodes_for(nodes: Sequence[Node], output: Wanted, choices: bool = True) -> tuple[list[Node], Head | Pool | None]:
    """Return the nodes that lead to an output, and the node whose last LayerNorm then remains to be applied.

    None: their result is the output. Of a `Head`'s features, the mean of its `feature_rows` is taken after the norm.
    A reduction whose tokens nothing reads is left out, unless its choice is wanted.
    """
    if output not in OF_ALL_TOKENS and not choices:
        nodes = [node for node in nodes if not isinstance(node, Reduce) or node.rows is None]
    if output == "logits":
        return list(nodes), None
    at, reader = next((i, node) for i, node in enumerate(nodes) if isinstance(node, Head | Pool))
    if output == "features" and isinstance(reader, Pool):
        return list(nodes[: at + 1]), None
    body = list(nodes[:at])
    return ([node.for_all_rows() for node in body] if output in OF_ALL_TOKENS else body), reader
