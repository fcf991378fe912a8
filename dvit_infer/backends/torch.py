"""The PyTorch backend: every node kind in plain PyTorch operators, on any device."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from dvit_infer.graph.graph import Graph
from dvit_infer.graph.nodes import Attention, Convolution, Embed, Head, Mlp, Node, Prune
from dvit_infer.images.tensors import prepare
from dvit_infer.ops import prune_tokens as op

Hook = Callable[[Node, torch.Tensor], None]


class TorchRunner:
    """Runs a graph. What a device does in its own way is a method of its own: norm, linear, add_linear, attend, prune.

    Args:
        graph: what it runs.
        why: it is this one that does, where kernels could be expected; shown with `runtime`.

    Attributes:
        runtime: a description of what runs the model.
        prunes_by: what runs prune_tokens.
        config: the model's.
        device, dtype: of the weights.
        takes_uint8: whether `run` normalises uint8 images itself.
        embeds_apart_from: images of a batch from which a captured forward begins at the tokens, which `embed_into`
            makes of the caller's images: that spares their copy. None: always at the images.
    """

    takes_uint8 = False
    embeds_apart_from: int | None = None

    def __init__(self, graph: Graph, why: str = "") -> None:
        self.config = graph.config
        self.nodes: Sequence[Node] = graph.nodes
        self.device, self.dtype = graph.device, graph.dtype
        by = {op.backend_of(self.device, n.tokens - n.num_prefix, n.dim) for n in graph.nodes if isinstance(n, Prune)}
        self.prunes_by = " and ".join(sorted(by))
        self._runtime = self.describe(f"PyTorch ({why})" if why else "PyTorch", usually="PyTorch")

    @property
    def runtime(self) -> str:
        return self._runtime

    def describe(self, runtime: str, usually: str) -> str:
        """`runtime`, and what runs prune_tokens where that is not what it usually is."""
        return runtime if self.prunes_by in ("", usually) else f"{runtime}, prune_tokens by {self.prunes_by}"

    @property
    def buffer_bytes(self) -> int:
        """What it holds beside the graph's weights, in bytes."""
        return 0

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        kept: Sequence[torch.Tensor] | None = None,
        hook: Hook | None = None,
        return_kept: bool = True,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the graph.

        Args:
            images: (B, 3, H, W) of any device, strides and dtype that `check_images` lets through.
            kept: a stage each, (B, k) original patch positions to keep instead of the predictors' choice.
            hook: called with every node and its output, which holds until the next node runs.
            return_kept: whether the kept positions are wanted; where not, a runner that saves by it returns none.

        Returns:
            Logits (B, K) float32, and the kept original positions, a stage each.
        """
        images = self.prepare(images)
        with as_asked(self.device, self.dtype):
            return self.run(images, kept, hook)

    def check(self, batch: int, dtype: torch.dtype) -> None:
        """Find out, before a forward of so many images of that dtype is captured, that what it runs answers right."""

    def embed_into(self, images: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write what the first node makes of images (B, 3, H, W) into `tokens` (B, P+N, C)."""
        images = self.prepare(images)
        with as_asked(self.device, self.dtype):
            tokens.copy_(getattr(self, self.nodes[0].kind)(self.nodes[0], images))

    def from_tokens(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run what follows the first node; results as those of a call."""
        with as_asked(self.device, self.dtype):
            return self.run(tokens, None, None, self.nodes[1:])

    def release(self) -> None:
        """Give back memory that calls have left to the next; there is none."""

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Images as `run` takes them: on the device, normalised, in the dtype."""
        return prepare(images, self.config, self.device, self.dtype)

    def run(
        self,
        x: torch.Tensor,
        kept: Sequence[torch.Tensor] | None,
        hook: Hook | None,
        nodes: Sequence[Node] | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run all nodes, or the last ones, which are `nodes`, on what those before have made."""
        chosen: list[torch.Tensor] = []
        positions: torch.Tensor | None = None  # original positions of the surviving patches; None: all are there
        for node in self.nodes if nodes is None else nodes:
            if isinstance(node, Prune):
                given = None if kept is None else kept[len(chosen)]
                x, positions = self.prune_to(node, x, positions, given)
                chosen.append(positions)
            else:
                x = getattr(self, node.kind)(node, x)
            if hook is not None:
                hook(node, x)
        return x, chosen

    def prune_to(
        self, node: Prune, x: torch.Tensor, positions: torch.Tensor | None, given: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that stay and their original positions; `positions` are those of x's patches (None: all)."""
        if given is None:
            x, index = self.prune(node, x)
        else:
            index = given if positions is None else torch.searchsorted(positions, given)
            x = op.gather_tokens_ref(x, index, node.num_prefix)
        return x, index if positions is None else positions.gather(1, index)

    def convolution(self, node: Convolution, x: torch.Tensor) -> torch.Tensor:
        w = node.weights
        x = F.conv2d(x, w["weight"], w.get("bias"), stride=node.stride, padding=w["weight"].shape[-1] // 2)
        if "bn.weight" in w:
            x = F.batch_norm(x, w["bn.running_mean"], w["bn.running_var"], w["bn.weight"], w["bn.bias"], eps=node.eps)
        return x.relu_()

    def embed(self, node: Embed, x: torch.Tensor) -> torch.Tensor:
        w = node.weights
        patches = F.conv2d(x, w["weight"], w["bias"], stride=w["weight"].shape[-1]).flatten(2).transpose(1, 2)
        return torch.cat([w["prefix"].expand(len(x), -1, -1), patches], dim=1) + w["pos_embed"]

    def attention(self, node: Attention, x: torch.Tensor) -> torch.Tensor:
        w, (b, n, _), rows, heads = node.weights, x.shape, node.rows, node.num_heads
        y = self.norm(node, x)
        if rows == n:
            qkv = self.linear(y, w["qkv.weight"], w.get("qkv.bias")).view(b, n, 3, heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q = F.linear(y[:, :rows], w["q.weight"], w.get("q.bias")).view(b, rows, heads, -1).transpose(1, 2)
            kv = self.linear(y, w["kv.weight"], w.get("kv.bias")).view(b, n, 2, heads, -1)
            k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
            x = x[:, :rows].contiguous()
        out = self.attend(q, k, v, node.scale).transpose(1, 2).flatten(2)
        return self.add_linear(x, out, w["proj.weight"], w["proj.bias"], node.residual_scale)

    def mlp(self, node: Mlp, x: torch.Tensor) -> torch.Tensor:
        w = node.weights
        hidden = self.linear(self.norm(node, x), w["fc1.weight"], w["fc1.bias"], gelu=True)
        return self.add_linear(x, hidden, w["fc2.weight"], w["fc2.bias"], node.residual_scale)

    def head(self, node: Head, x: torch.Tensor) -> torch.Tensor:
        w = node.weights
        x = self.norm(node, x)
        logits = F.linear(x[:, 0], w["head.weight"], w["head.bias"])
        if "head_dist.weight" in w:
            logits = (logits + F.linear(x[:, 1], w["head_dist.weight"], w["head_dist.bias"])) / 2
        if node.reads_patches:
            logits = logits + 0.5 * F.linear(x[:, 1:], w["aux_head.weight"], w["aux_head.bias"]).amax(dim=1)
        return logits.float()

    def prune(self, node: Prune, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, P+N, C) -> the tokens that stay, and their (B, k) positions among the N."""
        kept_x, index = torch.ops.dvit.prune_tokens(x, node.packed, node.num_keep, node.num_prefix, node.eps)
        return kept_x, index

    def norm(self, node: Attention | Mlp | Head, x: torch.Tensor) -> torch.Tensor:
        w = node.weights
        return F.layer_norm(x, x.shape[-1:], w.get("norm.weight"), w.get("norm.bias"), node.eps)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False
    ) -> torch.Tensor:
        """x weight^T + bias, through GELU if asked for. The result holds until the next linear but one."""
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y

    def add_linear(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """x + scale * (y weight^T + bias). It may be written into x."""
        branch = F.linear(y, weight, bias)
        return x + branch if scale == 1.0 else x + branch * scale

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """softmax(scale * q k^T) v, of (B, heads, tokens, head size)."""
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


_CUDNN: Any = torch.backends.cudnn  # its stubs do not know the setting
_PRECISION = threading.Lock()
_in_full = 0  # how many runs need full precision right now
_before = ""


@contextlib.contextmanager
def as_asked(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Arithmetic in that dtype and no other: no autocast around the call, no TF32 in float32 convolutions.

    TF32 is what cuDNN's convolutions use by default. The setting is the process's: the first run in changes it, the
    last one out puts it back.
    """
    global _in_full, _before
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda" or dtype != torch.float32:
            yield
            return
        with _PRECISION:
            if _in_full == 0:
                _before = _CUDNN.conv.fp32_precision
                _CUDNN.conv.fp32_precision = "ieee"
            _in_full += 1
        try:
            yield
        finally:
            with _PRECISION:
                _in_full -= 1
                if _in_full == 0:
                    _CUDNN.conv.fp32_precision = _before
