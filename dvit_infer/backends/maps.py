"""Node kinds of models with maps, on the same primitives as the others, in plain PyTorch.

A map (H, W) is tokens (B, H * W, C), so that all but convolutions and windows work on rows.
"""

import torch
from torch.nn import functional as F

from dvit_infer.backends.primitives import Primitives
from dvit_infer.backends.state import State
from dvit_infer.graph.maps import Depthwise, Downsample, Stem, WindowAttention
from dvit_infer.graph.routes import Route, RoutedMlp, order_of
from dvit_infer.graph.windows import Windows


class MapNodes(Primitives):
    """The methods of these kinds."""

    def __init__(self) -> None:
        self._windows: dict[Windows, tuple[torch.Tensor, torch.Tensor]] = {}

    def stem(self, node: Stem, state: State) -> None:
        w = node.weights
        x = F.conv2d(state.x, w["weight"], w["bias"], stride=w["weight"].shape[-1])
        state.x = self.norm_rows(x.flatten(2).transpose(1, 2), w["norm.weight"], w["norm.bias"], node.eps)

    def downsample(self, node: Downsample, state: State) -> None:
        w, x, (height, width), (rows, columns) = node.weights, state.x, node.map, node.half
        x = x.view(len(x), height, width, -1)
        if not node.norms_four:
            gain, shift = (w[name][: x.shape[-1]] if name in w else None for name in ("norm.weight", "norm.bias"))
            x = self.norm_rows(x, gain, shift, node.eps)
        x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))  # by less than 0: what is over is left out
        x = x.reshape(len(x), rows, 2, columns, 2, -1).transpose(2, 3)
        four = x.reshape(len(x), rows * columns, -1)
        if node.norms_four:
            state.x = self.norm_linear(node, "reduction", four)
        else:
            state.x = self.linear("reduction", four, w["reduction.weight"], w.get("reduction.bias"))

    def depthwise(self, node: Depthwise, state: State) -> None:
        w = node.weights
        maps = state.x.reshape(len(state.x), *node.map, -1).permute(0, 3, 1, 2)  # channels-last, and stays so
        padding, groups = w["weight"].shape[-1] // 2, len(w["weight"])
        y = F.conv2d(maps, w["weight"], w["bias"], padding=padding, groups=groups)
        state.branch = y.permute(0, 2, 3, 1).flatten(1, 2)

    def window_attention(self, node: WindowAttention, state: State) -> None:
        x, windows, w = state.x, node.windows, node.weights
        (b, n, c), m, heads = x.shape, windows.positions, node.num_heads
        index, inverse = self._rows_of(windows, b, x.device)
        if windows.is_padded:
            rows = self.norm_linear(node, "qkv", x).reshape(-1, 3 * c)
            rows = torch.cat([rows, w["pad"].to(rows.dtype)[None]])[index]
        else:
            rows = self.norm_linear(node, "qkv", x.reshape(-1, c)[index][None])[0]
        q, k, v = rows.view(-1, m, 3, heads, c // heads).unbind(2)
        mixed, start = [], 0
        for bias, (_, count) in zip(w["bias"], windows.kinds, strict=True):
            some = slice(start * b, (start + count) * b)
            mixed.append(self.mix(q[some], k[some], v[some], node.scale, pair_bias=bias))
            start += count
        y = torch.cat(mixed) if len(mixed) > 1 else mixed[0]
        self.linear_add(node, "proj", y.reshape(-1, c)[inverse].view(b, n, c), state)

    def _rows_of(self, windows: Windows, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of maps viewed as (B * H * W, C) that are in windows, and the way back.

        Windows of all images that are cut alike are together: rows are those of the first window of each image, then
        those of the second. A padded position is the row behind all others.
        """
        if windows not in self._windows:
            self._windows[windows] = windows.index.to(device), windows.inverse.to(device)
        index, inverse = self._windows[windows]
        n, m = len(inverse), windows.positions
        images = torch.arange(batch, device=device)
        rows = index[:, None] + (images * n)[:, None]  # (windows, B, M)
        if windows.is_padded:
            rows = torch.where(index[:, None] == n, batch * n, rows)
        back = (inverse // m * (batch * m) + inverse % m) + (images * m)[:, None]
        return rows.flatten(), back.flatten()

    def route(self, node: Route, state: State) -> None:
        if state.given is not None:
            index = node.choice_of(state, state.given[len(state.decided)])
        else:
            index = self.select_route(node, state.x)
        state.order = order_of(index, node.tokens)
        state.decide(node, index)

    def routed_mlp(self, node: RoutedMlp, state: State) -> None:
        """Rows of both branches lie together, so that each linear runs once; their results are added in place."""
        assert state.order is not None
        source = state.x if state.branch is None else state.branch
        state.branch = None
        (b, n, c), k, w = source.shape, node.num_keep, node.weights
        rows = state.order + (torch.arange(b, device=source.device) * n)[:, None]
        chosen, others = rows[:, :k].flatten(), rows[:, k:].flatten()
        flat = source.reshape(-1, c)
        hidden = self.norm_linear(node, "fc1", flat[chosen][None], activation=node.act)
        slow = self.linear("fc2", hidden, w["fc2.weight"], w["fc2.bias"])[0]
        if "gamma" in w:
            slow = slow * w["gamma"]
        x = state.x.reshape(-1, c).index_add(0, chosen, slow)
        fast = self.fast_linear(node, flat[others][None])[0]
        state.x = x.index_add_(0, others, fast).view(b, n, c)

    def fast_linear(self, node: RoutedMlp, x: torch.Tensor) -> torch.Tensor:
        """Return the other branch of a routed MLP for rows (1, n, C)."""
        w = node.weights
        y = self.norm_rows(x, w.get("fast_norm.weight"), w.get("fast_norm.bias"), node.eps)
        y = self.linear("fast", y, w["fast.weight"], w["fast.bias"])
        return y * w["fast_gamma"] if "fast_gamma" in w else y

    def select_route(self, node: Route, x: torch.Tensor) -> torch.Tensor:
        """Return the positions (B, k), ascending, that take the MLPs."""
        return node.select(x)
