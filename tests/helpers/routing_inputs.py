"""What tests of route_tokens and routed_mlp share: weights of both branches, orders, and the op in float64."""

import torch
from linear_inputs import exact_linear, make_linear, make_rows

from dvit_infer.ops.linear import row_sums


def make_branches(c: int, hidden: int, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], ...]:
    """The MLP's weights, biases and row sums, and those of the fast linear."""
    (w1, b1), (w2, b2), (w, b) = (
        make_linear(*sizes, dtype, seed) for seed, sizes in enumerate(((c, hidden), (hidden, c), (c, c)))
    )
    return [w1, b1, row_sums(w1), w2, b2], [w, b, row_sums(w)]


def make_map(b: int, n: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return make_rows(b, n, c, dtype=dtype, seed=seed)


def make_order(b: int, n: int, k: int) -> torch.Tensor:
    """k positions of every image, ascending, then the others."""
    generator = torch.Generator().manual_seed(n)
    mixed = torch.stack([torch.randperm(n, generator=generator) for _ in range(b)])
    return torch.cat([part.sort(dim=1).values for part in (mixed[:, :k], mixed[:, k:])], dim=1)


def exact_routed(x, residual, order, k, mlp, fast, eps=1e-5, activation="gelu") -> torch.Tensor:
    """What the op approximates: both branches of all tokens in float64, of which each takes its own."""
    w1, b1, _, w2, b2 = mlp
    slow = exact_linear(exact_linear(x, w1, b1, None, True, eps, activation), w2, b2)
    quick = exact_linear(x, fast[0], fast[1], None, True, eps)
    chosen = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :k].cpu(), True)
    return residual.cpu().double() + torch.where(chosen[..., None], slow, quick)
