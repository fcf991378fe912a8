"""Node kinds of models with maps, on the same primitives as the others, in plain PyTorch.

A map (H, W) is tokens (B, H * W, C), so that all but convolutions and windows work on rows. Rows are gathered by
`F.embedding`, which moves whole ones: on a CPU indexing takes two to five times as long.
"""

import torch
from torch.nn import functional as F

from dvit_infer.backends.primitives import Primitives
from dvit_infer.backends.state import State
from dvit_infer.graph.maps import Depthwise, Downsample, Stem, WindowAttention
from dvit_infer.graph.routes import Route, RoutedMlp
from dvit_infer.graph.windows import Windows
from dvit_infer.ops.route_tokens import branch_rows, order_of


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
            rows = F.embedding(index, torch.cat([rows, w["pad"].to(rows.dtype)[None]]))
        else:
            rows = self.norm_linear(node, "qkv", F.embedding(index, x.reshape(-1, c))[None])[0]
        q, k, v = rows.view(-1, m, 3, heads, c // heads).unbind(2)
        mixed, start = [], 0
        for bias, (_, count) in zip(w["bias"], windows.kinds, strict=True):
            some = slice(start * b, (start + count) * b)
            mixed.append(self.mix(q[some], k[some], v[some], node.scale, pair_bias=bias))
            start += count
        y = torch.cat(mixed) if len(mixed) > 1 else mixed[0]
        self.linear_add(node, "proj", F.embedding(inverse, y.reshape(-1, c)).view(b, n, c), state)

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
            state.order = order_of(node.choice_of(state, state.given[len(state.decided)]), node.tokens)
        else:
            state.order = self.order(node, state.x)
        state.decide(node, state.order[:, : node.num_keep])

    def order(self, node: Route, x: torch.Tensor) -> torch.Tensor:
        """Return all positions (B, N) of maps (B, N, C): those that take the MLPs, then the others, both ascending."""
        return node.order(x)

    def routed_mlp(self, node: RoutedMlp, state: State) -> None:
        source = state.x if state.branch is None else state.branch
        state.branch = None
        self.routed_add(node, source, state)

    def routed_add(self, node: RoutedMlp, source: torch.Tensor, state: State) -> None:
        """Set state.x to x + each branch of its rows of `source` (B, N, C); may write into x, and leave statistics."""
        assert state.order is not None
        w, shape = node.weights, source.shape
        chosen, others = branch_rows(state.order, node.num_keep)
        source, x = source.reshape(-1, shape[-1]), state.x.reshape(-1, shape[-1])
        hidden = self.norm_linear(node, "fc1", F.embedding(chosen, source)[None], activation=node.act)
        slow = self.linear("fc2", hidden, w["fc2.weight"], w["fc2.bias"])[0]
        x.index_add_(0, chosen, slow * w["gamma"] if "gamma" in w else slow)
        rest = F.embedding(others, source)  # even if x is the source: its other rows have not changed
        rest = self.norm_rows(rest, w.get("fast_norm.weight"), w.get("fast_norm.bias"), node.eps)
        fast = self.linear("fast", rest, w["fast.weight"], w["fast.bias"])
        x.index_add_(0, others, fast * w["fast_gamma"] if "fast_gamma" in w else fast)
        state.x = x.view(shape)
