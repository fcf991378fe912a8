"""Node kinds of models with maps, each with its shapes, MACs and bytes for one image.

Between nodes a map (H, W) is tokens (B, H * W, C), row by row: channels-last.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from dvit_infer.graph.nodes import Branch, Node, NormNode, norm_macs
from dvit_infer.graph.windows import Windows

Map = tuple[int, int]  # height and width


@dataclass(frozen=True, kw_only=True)
class Stem(Node):
    """Convolution with the stride of its kernel, LayerNorm of every position."""

    kind = "stem"
    image: Map
    eps: float

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.weights["weight"].shape[1], *self.image

    @property
    def out_shape(self) -> tuple[int, ...]:
        dim, _, *kernel = self.weights["weight"].shape
        return (self.image[0] // kernel[0]) * (self.image[1] // kernel[1]), dim

    @property
    def macs(self) -> int:
        tokens, dim = self.out_shape
        return tokens * self.weights["weight"].numel() + norm_macs(self.weights, tokens, dim)


@dataclass(frozen=True, kw_only=True)
class Downsample(NormNode):
    """A map of half the resolution: LayerNorm, and one linear of the 2x2 positions that become one, row by row.

    Odd maps are padded with zeros, or lose their last row or column.

    Attributes:
        map: height and width of the input.
        norms_four: whether the channels of the four are normalised together (Swin), not of each apart (ConvNeXt). The
            weights of the norm are those of four positions either way.
        pads: whether odd maps are padded.
    """

    kind = "downsample"
    normed = ("reduction",)
    map: Map
    norms_four: bool
    pads: bool

    @property
    def dim(self) -> int:
        return self.weights["reduction.weight"].shape[1] // 4

    @property
    def half(self) -> Map:
        """Height and width of the output."""
        more = 1 if self.pads else 0
        return (self.map[0] + more) // 2, (self.map[1] + more) // 2

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.half[0] * self.half[1], self.weights["reduction.weight"].shape[0]

    @property
    def macs(self) -> int:
        left = self.out_shape[0]
        normed = (4 * left if self.norms_four else self.tokens) * self.dim * (5 if "norm.weight" in self.weights else 4)
        return normed + left * self.weights["reduction.weight"].numel()


@dataclass(frozen=True, kw_only=True)
class Depthwise(Node):
    """A depthwise convolution that keeps the map's size: the branch that the MLP behind it reads. x stays."""

    kind = "depthwise"
    map: Map

    @property
    def keeps_x(self) -> bool:
        return True

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.map[0] * self.map[1], self.weights["weight"].shape[0]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.in_shape

    @property
    def macs(self) -> int:
        return self.map[0] * self.map[1] * self.weights["weight"].numel()


@dataclass(frozen=True, kw_only=True)
class WindowAttention(Branch):
    """x + proj(softmax(scale * q k^T + bias) v) of LayerNorm(x) within windows (Liu et al. 2021, section 3.2).

    Weights `bias` (runs, heads, M, M) float32 are the relative position bias of a window's M positions, with the mask
    of each run of windows that are cut alike. Padded positions have queries, keys and values `pad` (3C,): the bias of
    their linear, as zeros are padded behind the LayerNorm.

    Attributes:
        windows: where the positions of each window are.
    """

    kind = "window_attention"
    takes_stats: ClassVar[bool] = False
    normed = ("qkv",)
    last = "proj"
    windows: Windows
    num_heads: int
    scale: float

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.in_shape

    def to(self, device: torch.device, dtype: torch.dtype, copy: bool = True) -> Self:
        """Return a copy on `device`; the relative position bias stays in float32."""
        bias = self.weights["bias"].to(device, copy=True)
        here = super().to(device, dtype, copy)
        return replace(here, weights={**here.weights, "bias": bias})

    @property
    def macs(self) -> int:
        n, c, m = self.tokens, self.dim, self.windows.positions
        return norm_macs(self.weights, n, c) + 4 * n * c * c + 2 * self.windows.count * m * m * c
