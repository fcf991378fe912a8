"""The Triton backend for NVIDIA GPUs: this project's ops, a few launches each, with LayerNorm fused into linears."""

import torch
from dvit_kernels.activations import CHEAPEST_GELU
from dvit_kernels.attention import supports
from dvit_kernels.keep_tokens import supports as keeps
from dvit_kernels.launch import is_programmatic
from dvit_kernels.merge_tokens import supports as merges
from dvit_kernels.prune_tokens import supports as scores

from dvit_infer.backends.kernel_check import check_kernels
from dvit_infer.backends.primitives import ALL
from dvit_infer.backends.state import State
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.heads import MapPool, Pool
from dvit_infer.graph.maps import WindowAttention
from dvit_infer.graph.nodes import Attention, Branch, Convolution, Embed, Node, NormNode
from dvit_infer.graph.reductions import Prune
from dvit_infer.graph.routes import Route, RoutedMlp
from dvit_infer.ops import routed_mlp as routed
from dvit_infer.ops.attention import attention, attention_with_signal
from dvit_infer.ops.choices import DTYPES, choices_for
from dvit_infer.ops.fallback import replaced
from dvit_infer.ops.keep_tokens import keep_tokens_with_stats
from dvit_infer.ops.layer_norm import layer_norm
from dvit_infer.ops.linear import free_stats_block, linear, row_sums
from dvit_infer.ops.merge_tokens import merge_tokens_with_stats
from dvit_infer.ops.patch_embedding import pack_patch_embedding, patch_embedding, patch_embedding_into
from dvit_infer.ops.rotary_attention import rotary_attention
from dvit_infer.reduction.evit import AttentionPrune
from dvit_infer.reduction.tome import Merge
from dvit_infer.utils.devices import is_out_of_memory

# Copying so many images takes 18 us at 3 TB/s, as long as launching a separate kernel. Derived, not measured.
EMBED_APART_FROM = 128


class TritonRunner(TorchRunner):
    """Runs a folded graph.

    Row statistics travel with the rows: where a node leaves them, the launch that adds the residual also returns them,
    if that is free (`ops.linear.free_stats_block`).

    Args:
        graph: a graph with LayerNorm, scales and predictors folded into its weights.

    Raises:
        ValueError: the graph is not folded.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self._graph = graph
        for node in graph.nodes:
            names = {"norm.weight", "inner_norm.weight", "gamma"} if isinstance(node, NormNode) else set()
            if names & node.weights.keys() or getattr(node, "residual_scale", 1.0) != 1.0:
                raise ValueError(f"{node.name} is not folded, which the Triton backend needs")
        self.nodes = [_channels_last(node) if isinstance(node, Convolution) else node for node in graph.nodes]
        self.forms_of = {"gelu": CHEAPEST_GELU[self.dtype]}
        self._sums = {node.name: _sums(node) for node in graph.nodes}
        self._head_norms = {
            node.name: _head_norms(node) for node in graph.nodes if isinstance(node, Attention) and node.has_qk_norm
        }
        self._stem = isinstance(graph.nodes[0], Convolution)
        self._embed = {
            node.name: self._packed_embedding(node, uint8=False) for node in graph.nodes if isinstance(node, Embed)
        }
        self.takes_uint8 = isinstance(graph.nodes[0], Embed)
        self.embeds_apart_from = EMBED_APART_FROM if self.takes_uint8 else None
        # BatchNorm is folded; in float32 another setting would be needed to keep cuDNN from using TF32.
        fuses = self.device.type == "cuda" and self.dtype != torch.float32
        self._fused_convolutions = {node.name for node in graph.nodes if isinstance(node, Convolution) and fuses}
        self._embed_uint8 = self._packed_embedding(graph.nodes[0], uint8=True) if self.takes_uint8 else []
        known = "as measured on this GPU" if choices_for(self.device).rows else "by defaults: none was measured here"
        self._runtime = self.describe(f"Triton and cuBLAS, {known}", usually="Triton")
        if others := _by_pytorch(graph):
            self._runtime += f"; PyTorch for {', '.join(others)}"
        self.checks_kernels = self.device.type == "cuda"
        self._checked: set[tuple[int, bool, bool]] = set()

    def __reduce__(self) -> tuple[type["TritonRunner"], tuple[Graph]]:
        return TritonRunner, (self._graph,)

    @property
    def buffer_bytes(self) -> int:
        own = [t for sums in self._sums.values() for t in sums.values()] + list(self._head_norms.values())
        own += [t for packed in (*self._embed.values(), self._embed_uint8) for t in packed]
        return sum(t.numel() * t.element_size() for t in own)

    def _packed_embedding(self, node: Node, uint8: bool) -> list[torch.Tensor]:
        w = node.weights
        mean, std = (self.config.mean, self.config.std) if uint8 else (None, None)
        return pack_patch_embedding(
            w["weight"], w.get("bias"), w["prefix"], w["pos_embed"], self.dtype, mean, std, channels_last=self._stem
        )

    @property
    def runtime(self) -> str:
        failed = replaced(self.device)
        return f"{self._runtime}; PyTorch in place of {', '.join(failed)}, which failed" if failed else self._runtime

    def check(self, batch: int, dtype: torch.dtype) -> None:
        takes = batch, dtype == torch.uint8 and self.takes_uint8, is_programmatic()
        if self.checks_kernels and takes not in self._checked and not _is_captured(self.device):
            self._checked.add(takes)
            check_kernels(self._graph, *takes, self.run)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Prepare images, as any runner; but the patch embedding takes uint8 and any strides directly."""
        if images.dtype == torch.uint8 and self.takes_uint8:
            return images.to(self.device)
        return super().prepare(images)

    def convolution(self, node: Convolution, state: State) -> None:
        # cuDNN's tensor-core convolutions need channels last, and would convert other inputs at every call.
        state.x = state.x.contiguous(memory_format=torch.channels_last)
        if node.name in self._fused_convolutions:
            # Fused with bias and ReLU, which PyTorch's own call applies in two more passes over the result.
            w, size = node.weights["weight"], node.weights["weight"].shape[-1]
            settings = [node.stride] * 2, [size // 2] * 2, [1, 1], 1  # stride, padding, dilation, groups
            try:
                state.x = torch.cudnn_convolution_relu(state.x, w, node.weights.get("bias"), *settings)
                return
            except RuntimeError as error:  # cuDNN has no such engine for some numbers of channels
                if is_out_of_memory(error):
                    raise
                self._fused_convolutions.discard(node.name)
        super().convolution(node, state)

    def embed(self, node: Embed, state: State) -> None:
        state.x = patch_embedding(state.x, *self._embedding(node, state.x.dtype))

    def embed_into(self, images: torch.Tensor, tokens: torch.Tensor) -> None:
        node = self.nodes[0]
        if not isinstance(node, Embed):
            super().embed_into(images, tokens)
            return
        # The kernel takes any dtype and strides, and rounds to its weight's dtype.
        takes = images.dtype == torch.uint8 or images.dtype in DTYPES
        images = images.to(self.device) if takes else self.prepare(images)
        patch_embedding_into(tokens, images, *self._embedding(node, images.dtype))

    def _embedding(self, node: Embed, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
        """Return the arguments of `patch_embedding` after images of that dtype."""
        weight, table = self._embed_uint8 if dtype == torch.uint8 else self._embed[node.name]
        return weight, table, node.weights["weight"].shape[-1], self._stem

    def norm_linear(
        self,
        node: NormNode,
        name: str,
        x: torch.Tensor,
        rows: slice | int = ALL,
        stats: torch.Tensor | None = None,
        activation: str = "none",
        out_dtype: torch.dtype | None = None,
        gated: bool = False,
    ) -> torch.Tensor:
        w, b = node.weights[f"{name}.weight"], node.weights.get(f"{name}.bias")
        sums = self._sums[node.name][name]
        y, _ = linear(x[:, rows], w, b, None, sums, stats, node.eps, activation, out_dtype=out_dtype, gated=gated)
        return y

    def linear(
        self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
    ) -> torch.Tensor:
        return linear(x, weight, bias, activation=activation)[0]

    def pooled_linear(
        self,
        node: MapPool,
        name: str,
        x: torch.Tensor,
        activation: str = "none",
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return linear(x, node.weights[f"{name}.weight"], node.weights[f"{name}.bias"], residual, activation=activation)[
            0
        ]

    def inner_norm(self, node: Branch, y: torch.Tensor) -> torch.Tensor:
        return y  # the linear behind it normalises

    def norm_rows(
        self, x: torch.Tensor, gain: torch.Tensor | None, shift: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        return layer_norm(x, gain, shift, eps)

    def linear_add(self, node: Branch, name: str, y: torch.Tensor, state: State) -> None:
        w, b = node.weights[f"{name}.weight"], node.weights.get(f"{name}.bias")
        rows, (dim_out, dim_in) = y.numel() // y.shape[-1], w.shape
        sums, sizes = self._sums[node.name].get(name), (rows, dim_in, dim_out)
        block = free_stats_block(y.device, y.dtype, *sizes, sums is not None) if node.leaves_stats else 0
        state.x, left = linear(y, w, b, state.x, sums, None, node.eps, stats_block=block)
        state.stats = left if block else None

    def routed_add(self, node: RoutedMlp, source: torch.Tensor, state: State) -> None:
        assert state.order is not None
        w, sums = node.weights, self._sums[node.name]
        mlp = [w["fc1.weight"], w["fc1.bias"], sums["fc1"], w["fc2.weight"], w["fc2.bias"]]
        fast = [w["fast.weight"], w["fast.bias"], sums["fast"]]
        sizes = source.shape[:2].numel(), node.dim, len(w["fc1.weight"])
        block = routed.free_stats_block(source.device, source.dtype, *sizes) if node.leaves_stats else 0
        given = source, state.x, state.order, node.num_keep, mlp, fast
        act = self.forms_of.get(node.act, node.act)
        state.x, left = routed.routed_mlp(*given, state.stats, node.eps, act, block)
        state.stats = left if block else None

    def attend_by_places(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, node: Attention, state: State
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        w, norms = node.weights, self._head_norms.get(node.name)
        if node.leaves or "pair_bias" in w or (norms is None and "sin" not in w):
            return super().attend_by_places(q, k, v, node, state)
        bias = state.sizes.log() if node.adds_sizes and state.sizes is not None else None
        places = w.get("sin"), w.get("cos"), state.positions, node.num_prefix
        return rotary_attention(q, k, v, node.scale, bias, *places, norms, node.eps), None

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        node: Attention,
        sizes: torch.Tensor | None = None,
        pair_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if node.leaves in ("class_attention", "mean_keys"):
            return attention_with_signal(q, k, v, node.scale, sizes, node.leaves, pair_bias, log_bias=True)
        return super().attend(q, k, v, node, sizes, pair_bias)

    def select(self, node: Prune, state: State) -> torch.Tensor:
        if not isinstance(node, AttentionPrune) or state.signal is None or node.rows is not None:
            return super().select(node, state)
        counts = node.num_keep, node.num_prefix, node.fused is not None
        (state.x, index), state.stats = keep_tokens_with_stats(state.x, state.signal, *counts)
        return index

    def merge_tokens(self, node: Merge, state: State) -> torch.Tensor:
        assert state.signal is not None
        moved, state.stats = merge_tokens_with_stats(state.x, state.signal, state.sizes, node.merged, node.num_prefix)
        state.x, state.sizes, rows = moved
        return rows

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None = None,
        pair_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return attention(q, k, v, scale, bias, pair_bias=pair_bias)


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _channels_last(node: Convolution) -> Convolution:
    return node.with_weights(lambda w: w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w)


def _head_norms(node: Attention) -> torch.Tensor:
    """Return gain and shift of the LayerNorms of queries and keys, (2, 2, D) float32."""
    w = node.weights
    rows = [w[f"{part}_norm.{kind}"].float() for part in "qk" for kind in ("weight", "bias")]
    return torch.stack(rows).view(2, 2, -1)


def _sums(node: Node) -> dict[str, torch.Tensor]:
    """Return row sums of the weights that multiply normalised rows, by the linear's name."""
    names = node.normed if isinstance(node, NormNode) else ()
    names += (node.last,) if isinstance(node, Branch) and node.has_inner_norm else ()
    names += ("fast",) if isinstance(node, RoutedMlp) else ()
    return {n: row_sums(node.weights[f"{n}.weight"]) for n in names if f"{n}.weight" in node.weights}


def _by_pytorch(graph: Graph) -> list[str]:
    """Return what of a graph no kernel knows, in words for its description."""
    found: dict[str, None] = {}
    most: dict[str, int] = {}
    heads = 0
    for node in graph.nodes:
        if isinstance(node, Attention):
            heads, size = node.num_heads, node.dim // node.num_heads
            if node.leaves == "pooled_attention":
                found["attention of a mean query"] = None
            if not supports(size):
                found[f"attention of heads of {size} channels"] = None
            if "sin" in node.weights and node.leaves:  # which no kernel writes beside a rotation
                found["rotary positions"] = None
        elif isinstance(node, Merge) and not merges(node.tokens - node.num_prefix, node.key_dim):
            most.setdefault("merging", node.tokens)
        elif isinstance(node, AttentionPrune) and not keeps(node.tokens - node.num_prefix, heads):
            most.setdefault("choosing", node.tokens)
        elif isinstance(node, WindowAttention) and not supports(node.dim // node.num_heads):
            found[f"attention of heads of {node.dim // node.num_heads} channels"] = None
        elif isinstance(node, Route) and not scores(node.tokens, node.dim):
            most.setdefault("choosing", node.tokens)
        elif isinstance(node, MapPool) and not supports(node.dim // node.num_heads):
            found[f"attention of heads of {node.dim // node.num_heads} channels"] = None
        elif isinstance(node, Pool) and not isinstance(node, MapPool):
            found["pooling"] = None
    return [*found, *(f"{what} among {tokens} tokens" for what, tokens in most.items())]
