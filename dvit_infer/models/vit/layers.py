"""The layers of a plain vision transformer, in evaluation and in training."""

from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.masked_attention import masked_attention
from dvit_infer.models.vit.rope import rotate


class Places(NamedTuple):
    """What one block's attention knows about the places of the patches that are there.

    sin, cos: rotary tables, (n, D), (B, n, D), (heads, n, D) or (B, heads, n, D), with an axis for heads if not there.
    bias: relative position bias, (1, heads, P+n, P+n) or (B, heads, P+n, P+n).
    """

    sin: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    bias: torch.Tensor | None = None


NOWHERE = Places()


class Reducing(Protocol):
    """What reduces the tokens between the attention of a block and its MLP.

    Attributes:
        leaves: what attention has to leave for it, "class_attention", "pooled_attention", "mean_keys", or "": nothing.
        sizes: (B, P+n), the number of patches in each token, whose logarithm is added to its key's scores; None: 1.
    """

    @property
    def leaves(self) -> str: ...

    @property
    def sizes(self) -> torch.Tensor | None: ...

    def __call__(self, x: torch.Tensor, signal: torch.Tensor | None) -> torch.Tensor:
        """(B, P+n, C), and what attention left, in float32 -> the tokens that remain."""


def softmax_with_policy(scores: torch.Tensor, policy: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Softmax over the kept keys, differentiable in the policy (Rao et al. 2021, section 3.3, equation 10).

    Args:
        scores: (B, H, N, N) scaled products of queries and keys.
        policy: (B, N, 1), 1 for a kept token and 0 for a dropped one. Every token still attends to itself.
        eps: spread evenly over each row, so that a row of dropped tokens keeps a gradient (official code).
    """
    n = policy.shape[1]
    keys = policy.float().reshape(-1, 1, 1, n)
    keys = keys + (1.0 - keys) * torch.eye(n, device=scores.device)
    weights = (scores - scores.amax(dim=-1, keepdim=True)).float().exp() * keys
    return ((weights + eps / n) / (weights.sum(dim=-1, keepdim=True) + eps)).to(scores.dtype)


def activation(x: torch.Tensor, act: str) -> torch.Tensor:
    """Apply 'gelu' (exact), 'gelu_tanh', 'quick_gelu' (CLIP's x * sigmoid(1.702 x)) or 'silu'."""
    if act == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.silu(x) if act == "silu" else F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


class Attention(nn.Module):
    """Multi-head self-attention by plain matrix products, which FLOP counters can count.

    Attributes:
        fused: use PyTorch's scaled_dot_product_attention where it is faster, and `masked_attention` with a policy;
            FLOP counters do not see these.
    """

    def __init__(self, body: ViT) -> None:
        super().__init__()
        dim, head_dim = body.embed_dim, body.head_dim
        self.fused: bool = False
        self.num_heads, self.num_prefix, self.rope_half = body.num_heads, body.num_prefix, body.rope_half
        self.scale: float = head_dim**-0.5
        if body.qkv == "q_proj":
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=body.has_bias(part)) for part in "qkv")
        else:
            self.qkv = nn.Linear(dim, 3 * dim, bias=body.qkv == "qkv" and body.has_bias("q"))
        if body.qkv == "q_bias":
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.form = body.qkv
        self.qk_norm = body.qk_norm
        if body.qk_norm:
            self.q_norm, self.k_norm = nn.LayerNorm(head_dim, eps=body.eps), nn.LayerNorm(head_dim, eps=body.eps)
        self.norm = nn.LayerNorm(dim, eps=body.eps) if body.attn_norm else None
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, n, C) -> three of (B, heads, n, head size)."""
        if self.form == "q_proj":
            parts = [linear(x) for linear in (self.q_proj, self.k_proj, self.v_proj)]
        elif self.form == "q_bias":
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            parts = list(F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1))
        else:
            parts = list(self.qkv(x).chunk(3, dim=-1))
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def _rotated(self, x: torch.Tensor, places: Places) -> torch.Tensor:
        if places.sin is None or places.cos is None:
            return x
        prefix, patches = x[:, :, : self.num_prefix], x[:, :, self.num_prefix :]
        return torch.cat([prefix, rotate(patches, places.sin, places.cos, self.rope_half)], dim=2)

    def forward(
        self,
        x: torch.Tensor,
        policy: torch.Tensor | None = None,
        places: Places = NOWHERE,
        reducing: Reducing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, n, C) -> the same, and what a reduction needs to know of it, if it does."""
        b, n, c = x.shape
        q, k, v = self.queries_keys_values(x)
        q, k = self._rotated(q, places), self._rotated(k, places)
        # On a CPU, scaled_dot_product_attention's bfloat16 gradient takes 2 to 5 times as long as plain products'.
        slow = self.training and q.device.type == "cpu" and q.dtype == torch.bfloat16
        bias = None if places.bias is None else places.bias.to(q.dtype)
        if reducing is not None and reducing.sizes is not None:
            added = reducing.sizes.log()[:, None, None].to(q.dtype)
            bias = added if bias is None else bias + added
        if self.fused and policy is None and not slow:
            mixed = F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale)
        elif self.fused and policy is not None and bias is None:
            mixed = masked_attention(q, k, v, policy, self.scale)
        else:
            mixed = self._weights(q, k, bias, policy) @ v
        y = mixed.transpose(1, 2).reshape(b, n, c)
        out: torch.Tensor = self.proj(y if self.norm is None else self.norm(y))
        return out, None if reducing is None else self._signal(q, k, bias, reducing.leaves)

    def _weights(
        self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, policy: torch.Tensor | None = None
    ) -> torch.Tensor:
        scores = (q * self.scale) @ k.transpose(-2, -1)
        scores = scores if bias is None else scores + bias
        return scores.softmax(dim=-1) if policy is None else softmax_with_policy(scores, policy)

    def _signal(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, leaves: str) -> torch.Tensor | None:
        """Return what a reduction needs, in float32: (B, heads, n) weights of one query, or (B, n, head size) keys."""
        if not leaves:
            return None
        if leaves == "mean_keys":
            return k.float().mean(dim=1)
        if leaves == "class_attention":
            query = q[:, :, :1]
        else:  # a bias for a mean query does not exist, but for one that is the same for all queries
            query, bias = q[:, :, self.num_prefix :].mean(dim=2, keepdim=True), None
        first = None if bias is None else bias[:, :, :1].float()
        return self._weights(query.float(), k.float(), first)[:, :, 0]


class Mlp(nn.Module):
    """Linear, activation, linear; in a gated one the activation of one linear multiplies another (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int, act: str, gated: str = "", norm_eps: float | None = None) -> None:
        super().__init__()
        self.act, self.gated = act, gated
        if gated == "split":
            self.fc1_g, self.fc1_x = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        else:
            self.fc1 = nn.Linear(dim, 2 * hidden if gated else hidden)
        self.norm = None if norm_eps is None else nn.LayerNorm(hidden, eps=norm_eps)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            gate, up = (self.fc1_g(x), self.fc1_x(x)) if self.gated == "split" else self.fc1(x).chunk(2, dim=-1)
            y = activation(gate, self.act) * up
        else:
            y = activation(self.fc1(x), self.act)
        out: torch.Tensor = self.fc2(y if self.norm is None else self.norm(y))
        return out


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al. 2021, 'Going deeper with Image Transformers', section 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm attention and MLP, whose branches may be scaled by channel.

    LV-ViT divides both branches by `skip_lam` (Jiang et al. 2021, section 3.2).
    """

    def __init__(self, body: ViT) -> None:
        super().__init__()
        dim, eps = body.embed_dim, body.eps
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(body)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, body.mlp_dim, body.act, body.gated, eps if body.mlp_norm else None)
        self.skip_lam = body.skip_lam
        self.scales = ("gamma" if body.gamma else "ls") if body.layer_scale else ""
        if self.scales == "gamma":
            self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        elif self.scales:
            self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def _scaled(self, branch: torch.Tensor, number: int) -> torch.Tensor:
        if self.scales == "gamma":
            return branch * self.get_parameter(f"gamma_{number}")
        return self.get_submodule(f"ls{number}")(branch) if self.scales else branch

    def forward(
        self,
        x: torch.Tensor,
        policy: torch.Tensor | None = None,
        places: Places = NOWHERE,
        reducing: Reducing | None = None,
    ) -> torch.Tensor:
        branch, signal = self.attn(self.norm1(x), policy, places, reducing)
        x = x + self._scaled(branch / self.skip_lam, 1)
        x = x if reducing is None else reducing(x, signal)
        out: torch.Tensor = x + self._scaled(self.mlp(self.norm2(x)) / self.skip_lam, 2)
        return out


class AttentionPool(nn.Module):
    """MAP: a learned query attends to all tokens; a norm and an MLP follow (Zhai et al. 2022, section 3.2)."""

    def __init__(self, body: ViT) -> None:
        super().__init__()
        dim = body.embed_dim
        self.num_heads = body.map_heads
        self.scale: float = (dim // body.map_heads) ** -0.5
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=body.eps)
        self.mlp = Mlp(dim, body.map_mlp_dim, body.map_act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, n, C) -> (B, C)."""
        q = self.q(self.latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        y = self.proj(mixed.transpose(1, 2).flatten(2))
        out: torch.Tensor = (y + self.mlp(self.norm(y)))[:, 0]
        return out
