"""The layers of a pruned vision transformer, in evaluation and in training."""

import torch
from torch import nn

from dvit_infer.models.vit.masked_attention import masked_attention


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


class Attention(nn.Module):
    """Multi-head self-attention by plain matrix products, which FLOP counters can count.

    Attributes:
        fused: use PyTorch's scaled_dot_product_attention where it is faster, and `masked_attention` with a policy;
            FLOP counters do not see these.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.fused: bool = False
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, policy: torch.Tensor | None = None) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        # On a CPU, scaled_dot_product_attention's bfloat16 gradient takes 2 to 5 times as long as plain products'.
        slow = self.training and q.device.type == "cpu" and q.dtype == torch.bfloat16
        if self.fused and policy is None and not slow:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=self.scale)
        elif self.fused and policy is not None:
            mixed = masked_attention(q, k, v, policy, self.scale)
        else:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            mixed = (scores.softmax(dim=-1) if policy is None else softmax_with_policy(scores, policy)) @ v
        out: torch.Tensor = self.proj(mixed.transpose(1, 2).reshape(b, n, c))
        return out


class Mlp(nn.Module):
    """Linear, GELU (exact), linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """A factor for each channel (Touvron et al. 2021, 'Going deeper with Image Transformers', section 2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm attention and MLP.

    LV-ViT divides both branches by `skip_lam` (Jiang et al. 2021, section 3.2); DeiT III scales their channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_dim: int,
        eps: float,
        qkv_bias: bool,
        skip_lam: float,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_dim)
        self.skip_lam = skip_lam
        self.layer_scale = layer_scale
        if layer_scale:
            self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x: torch.Tensor, policy: torch.Tensor | None = None) -> torch.Tensor:
        branch = self.attn(self.norm1(x), policy) / self.skip_lam
        x = x + (self.ls1(branch) if self.layer_scale else branch)
        branch = self.mlp(self.norm2(x)) / self.skip_lam
        out: torch.Tensor = x + (self.ls2(branch) if self.layer_scale else branch)
        return out
