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
    """Runs a graph. Subclasses override the primitives norm, linear, add_linear, attend and prune for a device.

    Args:
        graph: the graph to run.
        why: the reason for plain PyTorch on a device that could have kernels; shown in `runtime`.

    Attributes:
        runtime: a description of what runs the model.
        prunes_by: the backend of prune_tokens.
        config: the model's config.
        device, dtype: the device and dtype of the weights.
        takes_uint8: whether `run` normalises uint8 images itself.
        embeds_apart_from: the batch size from which a captured forward begins at the tokens, which `embed_into`
            computes from the caller's images without copying them. None: it always begins at the images.
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
        """Return `runtime`, with the backend of prune_tokens if it is not the usual one."""
        return runtime if self.prunes_by in ("", usually) else f"{runtime}, prune_tokens by {self.prunes_by}"

    @property
    def buffer_bytes(self) -> int:
        """Bytes held beside the graph's weights."""
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
            images: (B, 3, H, W), any device, strides and dtype that `check_images` accepts.
            kept: one (B, k) tensor per stage: original patch positions to keep instead of the predictors' choice.
            hook: called with every node and its output, which is valid until the next node runs.
            return_kept: whether the kept positions are wanted; if not, a runner may return none to save time.

        Returns:
            Logits (B, K) float32, and the kept original positions, one tensor per stage.
        """
        images = self.prepare(images)
        with as_asked(self.device, self.dtype):
            return self.run(images, kept, hook)

    def check(self, batch: int, dtype: torch.dtype) -> None:
        """Check the kernels of a forward for this batch size and image dtype, before it is captured."""

    def embed_into(self, images: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write the first node's output for images (B, 3, H, W) into `tokens` (B, P+N, C)."""
        images = self.prepare(images)
        with as_asked(self.device, self.dtype):
            tokens.copy_(getattr(self, self.nodes[0].kind)(self.nodes[0], images))

    def from_tokens(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run all nodes after the first; returns the same as a call."""
        with as_asked(self.device, self.dtype):
            return self.run(tokens, None, None, self.nodes[1:])

    def release(self) -> None:
        """Free memory that calls keep for later calls; here there is none."""

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Return images as `run` needs them: on the device, normalised, in the dtype."""
        return prepare(images, self.config, self.device, self.dtype)

    def run(
        self,
        x: torch.Tensor,
        kept: Sequence[torch.Tensor] | None,
        hook: Hook | None,
        nodes: Sequence[Node] | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run all nodes, or only the last ones, `nodes`, on the output of those before."""
        chosen: list[torch.Tensor] = []
        positions: torch.Tensor | None = None  # original positions of the remaining patches; None: all remain
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
        """Return the kept tokens and their original positions; `positions` are those of x's patches (None: all)."""
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
        """(B, P+N, C) -> the kept tokens, and their (B, k) positions among the N."""
        kept_x, index = torch.ops.dvit.prune_tokens(x, node.packed, node.num_keep, node.num_prefix, node.eps)
        return kept_x, index

    def norm(self, node: Attention | Mlp | Head, x: torch.Tensor) -> torch.Tensor:
        w = node.weights
        return F.layer_norm(x, x.shape[-1:], w.get("norm.weight"), w.get("norm.bias"), node.eps)

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False
    ) -> torch.Tensor:
        """Return x weight^T + bias, through GELU if `gelu`; valid until the second linear after this one."""
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y

    def add_linear(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return x + scale * (y weight^T + bias), which may be written into x."""
        branch = F.linear(y, weight, bias)
        return x + branch if scale == 1.0 else x + branch * scale

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Return softmax(scale * q k^T) v for q, k, v of (B, heads, tokens, head size)."""
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


_CUDNN: Any = torch.backends.cudnn  # its stubs lack the setting
_PRECISION = threading.Lock()
_in_full = 0  # the number of runs that need full precision now
_before = ""


@contextlib.contextmanager
def as_asked(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute in exactly this dtype: without the caller's autocast, without TF32 in float32 convolutions.

    cuDNN's convolutions use TF32 by default. The setting is global to the process: the first run that enters changes
    it, the last one that leaves restores it.
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
