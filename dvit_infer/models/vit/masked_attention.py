"""Attention over the kept keys in training, with little memory and few passes over the attention weights."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, policy: torch.Tensor, scale: float, eps: float = 1e-6
) -> torch.Tensor:
    """Return `softmax_with_policy(q * scale @ k^T, policy) @ v`, differentiable once in all four.

    See Rao et al. 2021, section 3.3, equation 10; `eps` is that of the official code. Matrix products run in q's dtype,
    the softmax in float32 (float64 if q is), also under autocast.

    Args:
        q, k, v: (B, H, N, D), in one dtype.
        policy: (B, N, 1), 1 for a kept token and 0 for a dropped one. Every token still attends to itself.

    Returns:
        (B, H, N, D) in q's dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
    """
    out: torch.Tensor = _MaskedAttention.apply(q, k, v, policy, scale, eps)  # type: ignore[no-untyped-call]
    return out


def _minus(products: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return (B, H, N, N) minus (B, H, N, 1) in the dtype of `rows`; in place if `products` has the same dtype."""
    return products.sub_(rows) if products.dtype == rows.dtype else products - rows


def _mask(weights: torch.Tensor, policy: torch.Tensor) -> torch.Tensor:
    """Multiply (B, H, N, N) by the keys' (B, N, 1) policy in place, except the diagonal: a token attends to itself."""
    own = weights.diagonal(dim1=-2, dim2=-1).clone()
    weights.mul_(policy.to(weights.dtype).reshape(-1, 1, 1, policy.shape[1]))
    weights.diagonal(dim1=-2, dim2=-1).copy_(own)
    return weights


class _MaskedAttention(torch.autograd.Function):
    """Keeps row statistics and recomputes the attention weights for the gradient, as FlashAttention does.

    With e = exp(score - largest of its row) and u = e * policy (e itself on the diagonal), the weights are
    a = (u + eps / n) / (sum of u + eps).
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, policy: torch.Tensor, scale: float, eps: float
    ) -> torch.Tensor:
        n, exact = q.shape[2], torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = (q * scale) @ k.transpose(-2, -1)
            largest, top = scores.max(dim=-1, keepdim=True)
            largest = largest.to(exact)
            u = _mask(_minus(scores, largest).exp_(), policy)
            inverse = 1 / (u.sum(dim=-1, keepdim=True) + eps)
            spread = (eps / n) * v.sum(dim=-2, keepdim=True, dtype=exact)
            if q.dtype == exact:
                out = (u @ v).add_(spread).mul_(inverse)
            else:  # divided first: if the largest score is that of a dropped key, u may underflow in float16
                out = ((u.mul_(inverse).to(q.dtype) @ v) + spread * inverse).to(q.dtype)
        ctx.save_for_backward(q, k, v, policy, out, largest, inverse, top)
        ctx.scale, ctx.eps = scale, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, policy, out, largest, inverse, top = ctx.saved_tensors
        scale, eps, exact = ctx.scale, ctx.eps, largest.dtype
        dq, dk, dv, dpolicy = None, None, None, None
        with torch.autocast(q.device.type, enabled=False):
            scaled = q * scale
            e = _minus(scaled @ k.transpose(-2, -1), largest).exp_()
            rows = grad * inverse
            if q.dtype == exact:
                grad = rows
            else:  # divided here, in float32: rows may overflow in float16
                e.mul_(inverse)
            if any(ctx.needs_input_grad[i] for i in (0, 1, 3)):
                mean = (grad.to(exact) * out).sum(dim=-1, keepdim=True)
                du_e = _minus(grad @ v.transpose(-2, -1), mean).mul_(e)
                if ctx.needs_input_grad[3]:
                    others = du_e.sum(dim=(1, 2)) - du_e.diagonal(dim1=-2, dim2=-1).sum(dim=1)
                    dpolicy = others.reshape(policy.shape).to(policy.dtype)
                dscores = _mask(du_e, policy)
                # The gradient through the largest score cancels except for eps: minus the row sum, without a pass.
                beyond = v.mean(dim=-2, keepdim=True, dtype=exact) - out
                dscores.scatter_add_(-1, top, (rows * beyond).sum(dim=-1, keepdim=True) * eps)
                dscores = dscores.to(q.dtype)
                dq = (dscores @ k) * scale if ctx.needs_input_grad[0] else None
                dk = dscores.transpose(-2, -1) @ scaled if ctx.needs_input_grad[1] else None
            if ctx.needs_input_grad[2]:
                spread = (eps / q.shape[2]) * rows.sum(dim=-2, keepdim=True)
                dv = ((_mask(e, policy).to(q.dtype).transpose(-2, -1) @ grad) + spread).to(v.dtype)
        return dq, dk, dv, dpolicy, None, None
