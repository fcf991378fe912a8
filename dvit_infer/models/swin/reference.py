"""Swin Transformer and DynamicSwin in plain PyTorch, with the official parameter names."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dvit_infer.models.reference import EvalOutput, Reference
from dvit_infer.models.swin.body import Swin

Begin = Callable[[Sequence[nn.Module], Sequence[torch.Tensor] | None], Any]
_CUT = -100.0  # added to scores of positions that are neighbours only by the shift


class PatchEmbed(nn.Module):
    """One convolution with the stride of its kernel, then a LayerNorm."""

    def __init__(self, size: int, dim: int, eps: float) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, size, size)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, H', W', C)."""
        out: torch.Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return out


class WindowAttention(nn.Module):
    """Attention within windows, with a relative position bias."""

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.scale: float = (dim // num_heads) ** -0.5
        self.fused = False
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self) -> torch.Tensor:
        """Return the bias of every pair of positions of a window, (heads, M, M)."""
        w = self.window
        rows = torch.arange(w, device=self.qkv.weight.device)
        steps = rows[:, None] - rows + w - 1
        index = steps[:, None, :, None] * (2 * w - 1) + steps[None, :, None, :]
        return self.relative_position_bias_table[index.reshape(w * w, w * w)].permute(2, 0, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B * windows, M, C), and (windows, M, M) to add to scores -> the same."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias()[None]
        if mask is not None:
            bias = (bias + mask[:, None]).to(x.dtype).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale)
        else:
            mixed = ((q * self.scale) @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
        out: torch.Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class FastMlp(nn.Module):
    """The branch of the positions that do not take the MLP: LayerNorm, linear."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(nn.LayerNorm(dim, eps=eps), nn.Linear(dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc1(x)
        return out


class Block(nn.Module):
    """Attention within windows, shifted ones in every second block, then an MLP, both pre-norm."""

    def __init__(self, body: Swin, stage: int, shift: int, is_fast: bool) -> None:
        super().__init__()
        dim, self.window, self.shift = body.dims[stage], body.windows[stage], shift
        self.pads = body.pads
        self.norm1 = nn.LayerNorm(dim, eps=body.eps)
        self.attn = WindowAttention(dim, body.heads[stage], self.window)
        self.norm2 = nn.LayerNorm(dim, eps=body.eps)
        self.mlp = Mlp(dim, body.mlp_ratio * dim)
        if is_fast:
            self.fastmlp = FastMlp(dim, body.eps)

    def _mixed(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> the same: windows, attention, and back."""
        (_, height, width, c), w, shift = x.shape, self.window, self.shift
        padding = (0, 0, 0, -width % w, 0, -height % w)
        if self.pads == "before_roll":
            x = F.pad(x, padding)
        x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
        if self.pads == "after_roll":
            x = F.pad(x, padding)
        b, rows, columns, _ = x.shape
        windows = x.view(b, rows // w, w, columns // w, w, c).transpose(2, 3).reshape(-1, w * w, c)
        mask = cut_mask(rows, columns, w, shift).to(x) if shift else None
        windows = self.attn(windows, mask).view(b, rows // w, columns // w, w, w, c)
        x = windows.transpose(2, 3).reshape(b, rows, columns, c)
        if self.pads == "after_roll":
            x = x[:, :height, :width]
        x = torch.roll(x, (shift, shift), (1, 2)) if shift else x
        return x[:, :height, :width]

    def forward(self, x: torch.Tensor, routing: Any = None) -> torch.Tensor:
        """(B, H, W, C) -> the same; `routing` says which positions take the MLP."""
        x = x + self._mixed(self.norm1(x))
        if routing is None:
            out: torch.Tensor = x + self.mlp(self.norm2(x))
            return out
        branch = routing(x.flatten(1, 2), lambda rows: self.mlp(self.norm2(rows)), self.fastmlp)
        out = x + branch.view_as(x)
        return out


def cut_mask(rows: int, columns: int, window: int, shift: int) -> torch.Tensor:
    """Return what is added to scores within shifted windows (windows, M, M): the last window down and across is cut."""

    def parts(size: int) -> torch.Tensor:
        at = torch.arange(size)
        return (at >= size - window).int() + (at >= size - shift).int()

    part = parts(rows)[:, None] * 3 + parts(columns)
    part = part.view(rows // window, window, columns // window, window).transpose(1, 2).reshape(-1, window * window)
    return (part[:, :, None] != part[:, None]).float() * _CUT


class PatchMerging(nn.Module):
    """Four neighbours become one position: LayerNorm and a linear of their channels side by side."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H/2, W/2, 2C)."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        four = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        out: torch.Tensor = self.reduction(self.norm(torch.cat(four, dim=-1)))
        return out


class Stage(nn.Module):
    """Blocks of one resolution, and the merging behind them unless it is the last; the third may have predictors."""

    def __init__(self, body: Swin, number: int, shift: int, predictors: nn.ModuleList | None) -> None:
        super().__init__()
        self.first_fast = body.first_fast if number == 2 else body.depths[number]
        self.blocks = nn.ModuleList(
            Block(body, number, shift if i % 2 else 0, i >= self.first_fast) for i in range(body.depths[number])
        )
        self.downsample = PatchMerging(body.dims[number], body.eps) if number < len(body.depths) - 1 else None
        self.score_predictor = predictors

    def forward(self, x: torch.Tensor, routing: Any = None) -> torch.Tensor:
        """(B, H, W, C) -> (B, H/2, W/2, 2C), or of the last stage the same; `routing` chooses in the third one."""
        for i, block in enumerate(self.blocks):
            if routing is None or i < self.first_fast:
                x = block(x)
                continue
            routing.before(i, x.flatten(1, 2))
            x = block(x, routing)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(Reference):
    """A Swin Transformer.

    Args:
        body: its facts.
        shifts: of the windows of each stage's second blocks.
        num_classes: K; 0: it has no head.
        begin: begins the stages of a reduction in one forward; None: the model is dense.
        score_predictor: the predictors in the weights, if there are some.
    """

    def __init__(
        self,
        body: Swin,
        *,
        shifts: Sequence[int],
        num_classes: int,
        begin: Begin | None = None,
        score_predictor: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.body, self.begin = body, begin
        self.patch_embed = PatchEmbed(body.stem_size, body.dims[0], body.eps)
        self.layers = nn.ModuleList(
            Stage(body, i, shift, score_predictor if i == 2 else None) for i, shift in enumerate(shifts)
        )
        self.norm = nn.LayerNorm(body.dims[-1], eps=body.eps)
        if num_classes:
            self.head = nn.Linear(body.dims[-1], num_classes)
        self.num_classes = num_classes

    def stages(self) -> list[Stage]:
        return [stage for stage in self.layers if isinstance(stage, Stage)]

    def evaluate(self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None = None) -> EvalOutput:
        x = self.patch_embed(images)
        routing = None if self.begin is None else self.begin(list(self.stages()[2].score_predictor or ()), kept)
        for number, stage in enumerate(self.layers):
            x = stage(x, routing if number == 2 else None)
        tokens = self.norm(x).flatten(1, 2)
        pooled = tokens.mean(dim=1)
        logits = self.head(pooled) if self.num_classes else pooled
        if routing is None:
            return EvalOutput(logits, [], x.new_empty(x.shape[0], 0), pooled, tokens)
        return EvalOutput(logits, routing.kept, torch.stack(routing.margins, dim=1), pooled, tokens)
