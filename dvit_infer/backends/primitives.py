"""What the node kinds are made of, in plain PyTorch; a backend replaces some of it for its device."""

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from dvit_infer.backends.arithmetic import signal_of
from dvit_infer.backends.state import State
from dvit_infer.graph.nodes import Attention, Branch, NormNode
from dvit_infer.graph.reductions import Prune
from dvit_infer.ops.activations import activate
from dvit_infer.ops.attention import attention_ref
from dvit_infer.ops.merge_tokens import merge_tokens_ref
from dvit_infer.reduction.tome import Merge

ALL = slice(None)  # tokens


class Primitives:
    """The parts of node kinds that a backend may do in another way.

    Attributes:
        forms_of: forms of activations, by their names, that norm_linear alone computes in place of them.
    """

    forms_of: Mapping[str, str] = {}

    def layer_norm(self, x: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the LayerNorm of rows (..., C) in float32."""
        return F.layer_norm(x.float(), x.shape[-1:], gain.float(), shift.float(), eps)

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
        """Return activation(LayerNorm(x) w^T + b) for the node's linear `name`; valid until the second one after it.

        Args:
            x: (B, n, C) tokens.
            rows: the tokens to return it for.
            stats: statistics of x's rows, as `linear_add` may have left them; for all rows only.
            activation: 'none', 'gelu', 'gelu_tanh', 'quick_gelu', 'silu', or a form of `forms_of`.
            out_dtype: the dtype of the result; None: x's.
            gated: whether the linear gives gate and factor side by side: activation(gate) * factor is returned.
        """
        w = node.weights
        x = F.layer_norm(x, x.shape[-1:], w.get("norm.weight"), w.get("norm.bias"), node.eps)
        linear = x[:, rows], w[f"{name}.weight"], w.get(f"{name}.bias")
        if gated:
            gate, factor = self.linear(name, *linear).chunk(2, dim=-1)
            y = activate(gate, activation) * factor
        else:
            y = self.linear(name, *linear, activation)
        return y if out_dtype is None else y.to(out_dtype)

    def norm_rows(
        self, x: torch.Tensor, gain: torch.Tensor | None, shift: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        """Return the LayerNorm of rows (..., C), computed in float32, in x's dtype."""
        return F.layer_norm(x, x.shape[-1:], gain, shift, eps)

    def linear(
        self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
    ) -> torch.Tensor:
        """Return activation(x weight^T + bias) for the linear `name`."""
        return activate(F.linear(x, weight, bias), activation)

    def linear_add(self, node: Branch, name: str, y: torch.Tensor, state: State) -> None:
        """Set state.x to x + residual_scale * (y w^T + b), which may be written into x; may leave its statistics."""
        branch = F.linear(y, node.weights[f"{name}.weight"], node.weights[f"{name}.bias"])
        if "gamma" in node.weights:
            branch = branch * node.weights["gamma"]
        state.x = state.x + (branch if node.residual_scale == 1.0 else branch * node.residual_scale)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        node: Attention,
        sizes: torch.Tensor | None = None,
        pair_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what a node's attention mixes, as `mix`, and what it leaves for the reduction behind it.

        The bias is the logarithm of `sizes` (B, tokens).
        """
        bias = None if sizes is None else sizes.log()
        return self.mix(q, k, v, node.scale, bias, pair_bias), signal_of(q, k, node, bias, pair_bias)

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None = None,
        pair_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return softmax(scale * q k^T + bias + pair_bias) v for (B, tokens, heads, head size), in that layout.

        `bias` is (B, tokens), `pair_bias` (heads, queries, tokens) or (B, heads, queries, tokens), both in float32.
        """
        if bias is not None or pair_bias is not None:
            return attention_ref(q, k, v, scale, bias, pair_bias=pair_bias)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    def select(self, node: Prune, state: State) -> torch.Tensor:
        """Set state.x to the tokens that remain, and return their (B, k) positions; may leave statistics of rows."""
        state.x, index = node.prune(state.x, state.signal)
        return index

    def merge_tokens(self, node: Merge, state: State) -> torch.Tensor:
        """Set state.x and sizes to the tokens that remain, and return every token's row; may leave statistics."""
        assert state.signal is not None
        state.x, state.sizes, rows = merge_tokens_ref(state.x, state.signal, state.sizes, node.merged, node.num_prefix)
        return rows
