"""ConvNeXt and DynamicConvNeXt in plain PyTorch, with the official parameter names; maps are channels-last."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dvit_infer.models.convnext.body import ConvNeXt
from dvit_infer.models.reference import EvalOutput, Reference

Begin = Callable[[Sequence[nn.Module], Sequence[torch.Tensor] | None], Any]


class MapConv(nn.Conv2d):
    """A convolution of maps (B, H, W, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PointConv(nn.Conv2d):
    """A convolution with a 1x1 kernel, on rows (..., C)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class Block(nn.Module):
    """x + gamma * (linear, GELU, linear of the LayerNorm of a depthwise convolution of x).

    Of a block with a second branch, positions that do not take the MLP get fast_path_gamma * fast_path(convolution).
    """

    def __init__(self, body: ConvNeXt, dim: int, is_fast: bool) -> None:
        super().__init__()
        self.dwconv = MapConv(dim, dim, body.kernel, padding=body.kernel // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=body.eps)
        self.pwconv1 = nn.Linear(dim, body.mlp_ratio * dim)
        self.pwconv2 = nn.Linear(body.mlp_ratio * dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim))
        if is_fast:
            self.fast_path = nn.Sequential(nn.LayerNorm(dim, eps=body.eps), nn.Linear(dim, dim))
            self.fast_path_gamma = nn.Parameter(torch.ones(dim))

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.gamma * self.pwconv2(F.gelu(self.pwconv1(self.norm(x))))
        return out

    def forward(self, x: torch.Tensor, routing: Any = None) -> torch.Tensor:
        """(B, H, W, C) -> the same; `routing` says which positions take the MLP."""
        y = self.dwconv(x)
        if routing is None:
            return x + self._mlp(y)
        branch = routing(y.flatten(1, 2), self._mlp, lambda rows: self.fast_path_gamma * self.fast_path(rows))
        out: torch.Tensor = x + branch.view_as(x)
        return out


class ConvNeXtModel(Reference):
    """A ConvNeXt.

    Args:
        body: its facts.
        num_classes: K; 0: it has no head.
        begin: begins the stages of a reduction in one forward; None: the model is dense.
        score_predictor: the predictors in the weights, if there are some.
    """

    def __init__(
        self,
        body: ConvNeXt,
        *,
        num_classes: int,
        begin: Begin | None = None,
        score_predictor: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.body, self.begin, dims = body, begin, body.dims
        size = body.stem_size
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(MapConv(3, dims[0], size, size), nn.LayerNorm(dims[0], eps=body.eps))]
        )
        for dim, wider in itertools.pairwise(dims):
            self.downsample_layers.append(nn.Sequential(nn.LayerNorm(dim, eps=body.eps), MapConv(dim, wider, 2, 2)))
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(body, dim, stage == 2 and i >= body.first_fast) for i in range(depth))
            for stage, (dim, depth) in enumerate(zip(dims, body.depths, strict=True))
        )
        self.norm = nn.LayerNorm(dims[-1], eps=body.eps)
        if num_classes:
            self.head = nn.Linear(dims[-1], num_classes)
        self.num_classes = num_classes
        self.score_predictor = score_predictor

    def evaluate(self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None = None) -> EvalOutput:
        x = images.permute(0, 2, 3, 1)
        routing = None if self.begin is None else self.begin(list(self.score_predictor or ()), kept)
        for number, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = downsample(x)
            for i, block in enumerate(stage.children()):
                if routing is None or number != 2 or i < self.body.first_fast:
                    x = block(x)
                    continue
                routing.before(i, x.flatten(1, 2))
                x = block(x, routing)
        tokens = x.flatten(1, 2)
        pooled = self.norm(tokens.mean(dim=1))
        logits = self.head(pooled) if self.num_classes else pooled
        if routing is None:
            return EvalOutput(logits, [], x.new_empty(x.shape[0], 0), pooled, tokens)
        return EvalOutput(logits, routing.kept, torch.stack(routing.margins, dim=1), pooled, tokens)
