"""Node kinds, each with its shapes, MACs and bytes for one image.

MACs are counted as in fvcore and in the papers: convolutions, linears and matrix products; a normalisation counts 5 per
element, 4 without gain and shift (a BatchNorm 2); activations, softmax and sums count none.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch

Weights = Mapping[str, torch.Tensor]
# What attention leaves for the reduction behind it, in float32: the weights with which the first token attends,
# (B, heads, P+N), or with which a token would whose query is the mean of the patches'; the mean over heads of the keys,
# (B, P+N, D), as they are compared.
Signal = Literal["", "class_attention", "pooled_attention", "mean_keys"]
PLACES = ("sin", "cos", "pair_bias")  # weights of Attention that say where tokens are, for all patches of an image


@dataclass(frozen=True, kw_only=True)
class Node(ABC):
    """One step of the graph.

    Attributes:
        name: its place in the model, such as `blocks.3.attn`.
        equals: the tensor of the reference model that its output equals, as `module:in` or `module:out`.
        weights: its tensors, by name.
        folded: what has been folded into the weights, for the table.
    """

    kind: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()  # names of weights that several nodes may hold together
    name: str
    equals: str
    weights: dict[str, torch.Tensor] = field(repr=False)
    folded: tuple[str, ...] = ()

    @property
    @abstractmethod
    def in_shape(self) -> tuple[int, ...]:
        """The shape of the input for one image, without the batch dimension."""

    @property
    @abstractmethod
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output for one image, without the batch dimension."""

    @property
    @abstractmethod
    def macs(self) -> int:
        """The number of MACs for one image."""

    @property
    def keeps_x(self) -> bool:
        """Whether its output is its input, as its result lies beside it, or it only chooses."""
        return False

    def bytes_moved(self, batch: int, itemsize: int) -> int:
        """Return the least bytes read and written: input and output once per image, weights once per batch."""
        activations = math.prod(self.in_shape) + math.prod(self.out_shape)
        return batch * activations * itemsize + sum(w.numel() * w.element_size() for w in self.weights.values())

    def to(self, device: torch.device, dtype: torch.dtype, copy: bool = True) -> Self:
        """Return a copy with weights on `device`, in `dtype`: its own, or if not `copy` the same where they are so."""
        return self.with_weights(lambda w: w.to(device, dtype, copy=copy))

    def for_all_rows(self) -> Self:
        """Return the node with all rows computed, also those that a head does not read."""
        return self

    def folded_for(self, dtype: torch.dtype) -> Self:
        """Return the node with what only it can fold, for a graph that runs in `dtype`; most have nothing."""
        return self

    def with_weights(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(self, weights={name: change(w) for name, w in self.weights.items()})


def norm_macs(weights: Weights, rows: int, dim: int, name: str = "norm") -> int:
    """Return the MACs of a LayerNorm of rows, with gain and shift or without."""
    return rows * dim * (5 if f"{name}.weight" in weights else 4)


@dataclass(frozen=True, kw_only=True)
class Convolution(Node):
    """Convolution with padding, BatchNorm unless folded, ReLU (LV-ViT's stem)."""

    kind = "convolution"
    image: tuple[int, int]  # input height and width
    stride: int
    eps: float

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.weights["weight"].shape[1], *self.image

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.weights["weight"].shape[0], self.image[0] // self.stride, self.image[1] // self.stride

    @property
    def macs(self) -> int:
        norm = 2 if "bn.weight" in self.weights else 0
        return math.prod(self.out_shape) * (math.prod(self.weights["weight"].shape[1:]) + norm)


@dataclass(frozen=True, kw_only=True)
class Embed(Node):
    """Patch projection, prefix tokens in front, position embedding added."""

    kind = "embed"
    image: tuple[int, int]  # input height and width

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.weights["weight"].shape[1], *self.image

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.weights["pos_embed"].shape[1:])

    @property
    def num_prefix(self) -> int:
        return self.weights["prefix"].shape[1]

    @property
    def macs(self) -> int:
        return (self.out_shape[0] - self.num_prefix) * self.weights["weight"].numel()


@dataclass(frozen=True, kw_only=True)
class TokenNode(Node):
    """A node whose input is (tokens, dim), prefix tokens first."""

    tokens: int

    @property
    @abstractmethod
    def dim(self) -> int:
        """The number of channels of a token."""

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.tokens, self.dim


@dataclass(frozen=True, kw_only=True)
class Norm(TokenNode):
    """LayerNorm of every token (CLIP's before the blocks)."""

    kind = "norm"
    eps: float

    @property
    def dim(self) -> int:
        return self.weights["norm.weight"].shape[0]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.in_shape

    @property
    def macs(self) -> int:
        return 5 * self.tokens * self.dim


@dataclass(frozen=True, kw_only=True)
class NormNode(TokenNode):
    """A node that begins with a LayerNorm.

    Attributes:
        normed: names of the linears that multiply the normalised rows; those that are there have weights.
    """

    normed: ClassVar[tuple[str, ...]]
    eps: float


@dataclass(frozen=True, kw_only=True)
class Branch(NormNode):
    """x + residual_scale * branch(LayerNorm(x)), the branch scaled by channel if there is a weight `gamma`.

    Attributes:
        last: the name of the linear that ends the branch.
        takes_stats: whether statistics of x's rows can serve its LayerNorm.
        leaves_stats: whether it leaves statistics of its output's rows, which the next node normalises.
        has_inner_norm: whether a LayerNorm, with weights `inner_norm` unless they are folded, stands before it.
    """

    last: ClassVar[str]
    takes_stats: ClassVar[bool] = True
    residual_scale: float = 1.0
    leaves_stats: bool = False
    has_inner_norm: bool = False

    @property
    def dim(self) -> int:
        return self.weights[f"{self.last}.weight"].shape[0]


@dataclass(frozen=True, kw_only=True)
class Attention(Branch):
    """x + proj(softmax(scale * q k^T + pair_bias) v) * residual_scale of LayerNorm(x), for the first `rows` rows.

    Queries and keys may be normalised (weights `q_norm`, `k_norm`), then those of patches rotated by their places
    (`sin`, `cos`: (N, D) or (heads, N, D) float32); `pair_bias` (heads, P+N, P+N) float32 is for all patches of an
    image too; a LayerNorm `inner_norm` may stand before `proj`.

    Attributes:
        leaves: what it leaves for the reduction behind it.
        adds_sizes: whether the logarithm of the number of patches in a token is added to the scores of its key.
        unplaced: whether there may be a token without a place, into which others were fused: at position N or more.
    """

    kind = "attention"
    shared = PLACES
    normed = ("qkv", "q", "kv")
    last = "proj"
    rows: int  # query rows: all tokens, or only the prefix tokens in a last block whose head reads no others
    num_heads: int
    scale: float
    num_prefix: int = 0
    rope_half: bool = False
    leaves: Signal = ""
    adds_sizes: bool = False
    unplaced: bool = False

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.rows, self.dim

    def to(self, device: torch.device, dtype: torch.dtype, copy: bool = True) -> Self:
        """Return a copy on `device`; tables of places stay in float32."""
        here = super().to(device, dtype, copy)
        exact = {name: self.weights[name].to(device) for name in PLACES if name in self.weights}  # shared, if there
        return replace(here, weights=here.weights | exact)

    def for_all_rows(self) -> Self:
        return replace(self, rows=self.tokens)

    @property
    def macs(self) -> int:
        n, r, c = self.tokens, self.rows, self.dim
        linears = r * c * c + n * c * 2 * c + r * c * c
        normed = sum(norm_macs(self.weights, rows, c, name) for name, rows in (("q_norm", r), ("k_norm", n)))
        inner = norm_macs(self.weights, r, c, "inner_norm") if self.has_inner_norm else 0
        pooled = n * c if self.leaves == "pooled_attention" else 0
        return norm_macs(self.weights, n, c) + normed * self.has_qk_norm + linears + 2 * r * n * c + inner + pooled

    @property
    def has_qk_norm(self) -> bool:
        return "q_norm.weight" in self.weights


@dataclass(frozen=True, kw_only=True)
class Mlp(Branch):
    """x + fc2(act(fc1(LayerNorm(x)))) * residual_scale.

    In a gated one fc1 returns gate and factor side by side: act(gate) * factor. A LayerNorm `inner_norm` may stand
    before fc2.

    Attributes:
        act: 'gelu' (exact), 'gelu_tanh', 'quick_gelu' or 'silu'.
        gated: whether it is.
        of_branch: whether it reads not x, but the branch that the node before began: x + fc2(act(fc1(LayerNorm(y)))).
    """

    kind = "mlp"
    normed = ("fc1",)
    last = "fc2"
    act: str = "gelu"
    gated: bool = False
    of_branch: bool = False

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.tokens, self.dim

    @property
    def macs(self) -> int:
        hidden = self.weights["fc2.weight"].shape[1]
        linears = self.weights["fc1.weight"].numel() + self.weights["fc2.weight"].numel()
        inner = norm_macs(self.weights, self.tokens, hidden, "inner_norm") if self.has_inner_norm else 0
        return norm_macs(self.weights, self.tokens, self.dim) + self.tokens * linears + inner
