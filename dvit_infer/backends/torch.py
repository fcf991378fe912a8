"""The PyTorch backend: every node kind in plain PyTorch operators, on any device."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from dvit_infer.backends.arithmetic import places_of, rotate_patches, weighted_mean
from dvit_infer.backends.maps import MapNodes
from dvit_infer.backends.precision import as_asked
from dvit_infer.backends.state import Hook, State
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.heads import OF_ALL_TOKENS, Classify, Head, MapPool, Pool, Wanted, nodes_for
from dvit_infer.graph.nodes import PLACES, Attention, Branch, Convolution, Embed, Mlp, Node, Norm
from dvit_infer.graph.reductions import Prune
from dvit_infer.graph.tokens import note_last
from dvit_infer.images.tensors import prepare
from dvit_infer.ops import prune_tokens as op
from dvit_infer.ops.activations import activate
from dvit_infer.ops.merge_tokens import average_rows_ref, match_tokens_ref
from dvit_infer.reduction.predictor import PredictorPrune
from dvit_infer.reduction.tome import Merge


class TorchRunner(MapNodes):
    """Runs a graph: one loop, and one method per node kind, on a few primitives.

    Subclasses replace primitives for a device, and the node kinds embed and convolution.

    Args:
        graph: the graph to run.
        why: the reason for plain PyTorch on a device that could have kernels; shown in `runtime`.

    Attributes:
        runtime: a description of what runs the model.
        prunes_by: the backend of prune_tokens.
        has_places: whether nodes need to know where tokens were.
        config: the model's config.
        device, dtype: the device and dtype of the weights.
        takes_uint8: whether `embed` normalises uint8 images itself.
        embeds_apart_from: the batch size from which a captured forward begins at the tokens, which `embed_into`
            computes from the caller's images without copying them. None: it always begins at the images.
    """

    takes_uint8 = False
    embeds_apart_from: int | None = None

    def __init__(self, graph: Graph, why: str = "") -> None:
        super().__init__()
        self.config = graph.config
        self.nodes: Sequence[Node] = graph.nodes
        self.device, self.dtype = graph.device, graph.dtype
        self.has_places = any(name in node.weights for node in graph.nodes for name in PLACES)
        pruned = [node for node in graph.nodes if isinstance(node, PredictorPrune)]
        by = {op.backend_of(self.device, node.tokens - node.num_prefix, node.dim) for node in pruned}
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

    def check(self, batch: int, dtype: torch.dtype) -> None:
        """Check the kernels of a forward for this batch size and image dtype, once; here there are none."""

    def release(self) -> None:
        """Free memory that calls keep for later calls; here there is none."""

    def plain(self) -> "TorchRunner":
        """Return a runner whose `run` takes a hook cheaply: itself."""
        return self

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Return images as the first node needs them: on the device, normalised, in the dtype."""
        return prepare(images, self.config, self.device, self.dtype)

    @torch.no_grad()
    def run(
        self,
        images: torch.Tensor,
        given: Sequence[torch.Tensor] | None = None,
        hook: Hook | None = None,
        return_choices: bool = True,
        output: Wanted = "logits",
    ) -> State:
        """Run the graph.

        Args:
            images: (B, 3, H, W), any device, strides and dtype that `check_images` accepts.
            given: one tensor per stage: what to do instead of the graph's choice, as `State.choices`.
            hook: called with every node and its output, which is valid until the next node runs.
            return_choices: whether they are wanted; if not, a runner may leave them out to save time.
            output: what x is in the end: logits (B, K), or in float32 after the last norm the features (B, D) that the
                classifier reads, all tokens (B, P+k, D), or for every original patch the token that holds it or did
                when it was dropped (B, N, D).

        Returns:
            The state after the last node.
        """
        self.check(len(images), images.dtype)
        follows = return_choices or given is not None or output in OF_ALL_TOKENS or self.has_places
        state = State(self.prepare(images), given=given, follows=follows)
        if output == "feature_map":
            shape = len(images), self.config.num_patches + 1, self.config.body.embed_dim
            state.last = torch.empty(shape, dtype=self.dtype, device=self.device)
        nodes, reader = nodes_for(self.nodes, output, return_choices or given is not None)
        state = self.run_nodes(state, nodes, hook)
        if state.last is not None:
            note_last(state)
            state.x = state.last[:, :-1]
        with as_asked(self.device, self.dtype):
            if reader is None:
                state.x = state.x.float()
            elif isinstance(reader, Pool) or output in OF_ALL_TOKENS:
                state.x = self.last_norm(reader, state.x).float()
            else:
                rows = reader.feature_rows
                sizes = state.sizes if reader.reads == "mean" else None
                state.x = weighted_mean(self.last_norm(reader, state.x[:, rows]), sizes, rows.start)
        return state

    def run_nodes(self, state: State, nodes: Sequence[Node], hook: Hook | None = None) -> State:
        """Run nodes in order on a state, which they change."""
        with as_asked(self.device, self.dtype):
            for node in nodes:
                getattr(self, node.kind)(node, state)
                if hook is not None:
                    hook(node, state.x)
        return state

    def embed_into(self, images: torch.Tensor, tokens: torch.Tensor) -> None:
        """Write the first node's output for images (B, 3, H, W) into `tokens` (B, P+N, C)."""
        tokens.copy_(self.run_nodes(State(self.prepare(images)), self.nodes[:1]).x)

    def last_norm(self, reader: Head | Pool, x: torch.Tensor) -> torch.Tensor:
        """Return the last LayerNorm of rows (..., C), gain and shift included, in float32; x itself without one."""
        if reader.last_norm is None:
            return x
        return self.layer_norm(x, *reader.last_norm, reader.eps)

    # The node kinds.

    def convolution(self, node: Convolution, state: State) -> None:
        w = node.weights
        x = F.conv2d(state.x, w["weight"], w.get("bias"), stride=node.stride, padding=w["weight"].shape[-1] // 2)
        if "bn.weight" in w:
            x = F.batch_norm(x, w["bn.running_mean"], w["bn.running_var"], w["bn.weight"], w["bn.bias"], eps=node.eps)
        state.x = x.relu_()

    def embed(self, node: Embed, state: State) -> None:
        w = node.weights
        patches = F.conv2d(state.x, w["weight"], w.get("bias"), stride=w["weight"].shape[-1])
        prefix = w["prefix"].expand(len(patches), -1, -1)
        state.x = torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1) + w["pos_embed"]

    def norm(self, node: Norm, state: State) -> None:
        w = node.weights
        state.x = self.norm_rows(state.x, w["norm.weight"], w["norm.bias"], node.eps)

    def attention(self, node: Attention, state: State) -> None:
        x, (b, n, _), heads = state.x, state.x.shape, node.num_heads
        if "qkv.weight" in node.weights:
            q, k, v = self.norm_linear(node, "qkv", x, stats=state.stats).view(b, n, 3, heads, -1).unbind(2)
        else:  # fewer query rows than key rows
            k, v = self.norm_linear(node, "kv", x, stats=state.stats).view(b, n, 2, heads, -1).unbind(2)
            state.x = x[:, : node.rows]
            q = self.norm_linear(node, "q", x, slice(node.rows)).view(b, node.rows, heads, -1)
        y, state.signal = self.attend_by_places(q, k, v, node, state)
        self.linear_add(node, "proj", self.inner_norm(node, y.flatten(2)), state)

    def attend_by_places(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, node: Attention, state: State
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what `attend` does, of queries and keys that are first normalised and rotated as the node says."""
        if node.has_qk_norm:
            q, k = self.head_norm(node, "q_norm", q), self.head_norm(node, "k_norm", k)
        places = places_of(node, state.positions)
        if "sin" in places:
            q, k = (rotate_patches(part, node, places["sin"], places["cos"]) for part in (q, k))
        sizes = state.sizes if node.adds_sizes else None
        return self.attend(q, k, v, node, sizes, places.get("pair_bias"))

    def head_norm(self, node: Attention, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return queries or keys (B, tokens, heads, head size), normalised for each head."""
        return self.norm_rows(x, node.weights[f"{name}.weight"], node.weights[f"{name}.bias"], node.eps)

    def inner_norm(self, node: Branch, y: torch.Tensor) -> torch.Tensor:
        """Return y, normalised if the node does so before its last linear."""
        if not node.has_inner_norm:
            return y
        return self.norm_rows(y, node.weights.get("inner_norm.weight"), node.weights.get("inner_norm.bias"), node.eps)

    def mlp(self, node: Mlp, state: State) -> None:
        x = state.x
        if node.of_branch:
            assert state.branch is not None
            x, state.branch = state.branch, None
        act = self.forms_of.get(node.act, node.act)
        hidden = self.norm_linear(node, "fc1", x, stats=state.stats, activation=act, gated=node.gated)
        self.linear_add(node, "fc2", self.inner_norm(node, hidden), state)

    def prune(self, node: Prune, state: State) -> None:
        if state.last is not None:
            note_last(state)
        if state.given is not None:
            index = node.choice_of(state, state.given[len(state.choices)])
            state.x = node.keep(state.x, index, state.signal) if node.rows is None else state.x
        else:
            index = self.select(node, state)
        state.decide(node, index)

    def merge(self, node: Merge, state: State) -> None:
        if state.given is not None:
            rows = node.choice_of(state, state.given[len(state.choices)])
            if node.rows is None:
                state.x, state.sizes = average_rows_ref(state.x, state.sizes, rows, node.left)
        elif node.rows is not None:
            assert state.signal is not None
            rows = match_tokens_ref(state.signal, node.merged, node.num_prefix)
        else:
            rows = self.merge_tokens(node, state)
        state.decide(node, rows)

    def head(self, node: Head, state: State) -> None:
        x = state.x
        if node.reads == "mean":
            w, patches = node.weights, x[:, node.num_prefix :]
            y = F.layer_norm(patches, patches.shape[-1:], w.get("norm.weight"), w.get("norm.bias"), node.eps)
            y = weighted_mean(y.float(), state.sizes, node.num_prefix).to(x.dtype)
            state.x = F.linear(y, w["head.weight"], w["head.bias"]).float()
            return
        logits = self.norm_linear(node, "head", x, 0, out_dtype=torch.float32)
        if "head_dist.weight" in node.weights:
            logits = (logits + self.norm_linear(node, "head_dist", x, 1, out_dtype=torch.float32)) / 2
        if node.reads == "all":
            logits = logits + 0.5 * self.norm_linear(node, "aux_head", x, slice(1, None)).amax(dim=1)
        state.x = logits

    def pool(self, node: Pool, state: State) -> None:
        y = self.last_norm(node, state.x[:, : node.rows]).float()
        parts = [y[:, : node.class_rows].mean(dim=1)] if node.reads.startswith("prefix") else []
        if node.reads != "prefix":
            first = 0 if node.reads == "all" else node.num_prefix
            parts.append(weighted_mean(y[:, first:], state.sizes, first))
        state.x = self.after_pooling(node, torch.cat(parts, dim=-1))

    def map_pool(self, node: MapPool, state: State) -> None:
        w, x = node.weights, state.x
        if node.last_norm is not None:
            x = self.norm_rows(x, *node.last_norm, node.eps)
        x = x[:, node.num_prefix :]
        queries = w["queries"] if "queries" in w else F.linear(w["latent"], w["q.weight"], w["q.bias"])
        (b, n, _), heads = x.shape, node.num_heads
        q = queries.expand(b, -1, -1).reshape(b, 1, heads, -1)
        k, v = self.linear("kv", x, w["kv.weight"], w["kv.bias"]).view(b, n, 2, heads, -1).unbind(2)
        y = self.pooled_linear(node, "proj", self.mix(q, k, v, node.scale).flatten(2))
        hidden = self.norm_rows(y, w["mlp_norm.weight"], w["mlp_norm.bias"], node.eps)
        hidden = self.pooled_linear(node, "fc1", hidden, node.act)
        y = self.pooled_linear(node, "fc2", hidden, residual=y)
        state.x = self.after_pooling(node, y[:, 0].float())

    def pooled_linear(
        self,
        node: MapPool,
        name: str,
        x: torch.Tensor,
        activation: str = "none",
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return residual + activation(x w^T + b) for one row (B, 1, C) of each image."""
        y = activate(F.linear(x, node.weights[f"{name}.weight"], node.weights[f"{name}.bias"]), activation)
        return y if residual is None else residual + y

    def after_pooling(self, node: Pool, y: torch.Tensor) -> torch.Tensor:
        """Apply what follows pooling to rows (B, C) in float32, and return them in float32."""
        w = node.weights
        if "fc_norm.weight" in w:
            y = self.layer_norm(y, w["fc_norm.weight"], w["fc_norm.bias"], node.eps)
        if "pre_logits.weight" in w:
            y = (
                F.linear(y.to(w["pre_logits.weight"].dtype), w["pre_logits.weight"], w["pre_logits.bias"])
                .float()
                .tanh()
            )
        if "projection.weight" in w:
            y = F.linear(y.to(w["projection.weight"].dtype), w["projection.weight"], w.get("projection.bias")).float()
        return y

    def classify(self, node: Classify, state: State) -> None:
        w = node.weights
        state.x = F.linear(state.x.to(w["weight"].dtype), w["weight"], w.get("bias")).float()
