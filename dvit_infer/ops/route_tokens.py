"""route_tokens: choose which tokens of an image take the MLP; all of them stay (Rao et al. 2023, T-PAMI 45(9)).

In DynamicSwin and DynamicConvNeXt every token stays in its place: the chosen ones take the MLP of a block, the others a
linear. The order that this op returns says which, once for all blocks up to the next predictor; `routed_mlp` follows
it. Deciding is apart from scoring: `order_tokens_ref` chooses by `prune_tokens.select_tokens_ref`. On CUDA three Triton
launches replace all (dvit_kernels/route_tokens.py). `torch.ops.dvit.route_tokens` exists once this module is imported.
"""

from collections.abc import Sequence

import torch

from dvit_infer.ops.choices import DTYPES, runs_triton
from dvit_infer.ops.fallback import by_kernel, some_of
from dvit_infer.ops.prune_tokens import check_packed, choice_fault, score_tokens_ref, select_tokens_ref
from dvit_infer.ops.registration import register

OP = "dvit::route_tokens"


def order_of(index: torch.Tensor, n: int) -> torch.Tensor:
    """Return the order (B, N) int64 of N tokens of which those at `index` (B, k) are chosen: they, then the others.

    Both are ascending.
    """
    left = torch.ones(index.shape[0], n, dtype=torch.uint8, device=index.device).scatter_(1, index, 0)
    return left.sort(dim=1, stable=True).indices


def order_tokens_ref(score: torch.Tensor, num_keep: int) -> torch.Tensor:
    """(B, N) scores -> (B, N) int64: positions of the num_keep highest, ascending, then the others, ascending.

    NaN is lowest, a tie goes to the lower position.
    """
    return order_of(select_tokens_ref(score, num_keep), score.shape[1])


def route_tokens_ref(x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, eps: float = 1e-5) -> torch.Tensor:
    """Choose each image's `num_keep` tokens with the highest score; the others keep their place too.

    The score is the predictor's difference of the keep and drop logits, as for `prune_tokens`. A block that routes
    takes two calls, the first once for all blocks up to the next predictor:

        order = route_tokens(x, packed, num_keep, eps)
        y, y_stats = routed_mlp(x, residual, order, num_keep, mlp, fast, stats, eps, activation, stats_block)

    Args:
        x: (B, N, C) tokens in float32, float16 or bfloat16, any strides; a map with channels last, viewed so.
        packed: the result of `pack_predictor` for x's dtype, on x's device; a predictor's 1 x 1 convolutions are packed
            as linears.
        num_keep: the number of tokens to choose, 1 to N.
        eps: of the predictor's LayerNorm.

    Returns:
        order (B, N) int64, a permutation of the positions of each image: the chosen ones in ascending order, then the
        others in ascending order. NaN ranks last, a tie goes to the lower position. `order[:, :num_keep]` are those
        that a Prune node would keep.

    Raises:
        ValueError: a shape, a dtype, a device or a count is invalid.
        RuntimeError: on backward.
    """
    return order_tokens_ref(score_tokens_ref(x, packed, eps), num_keep)


def branch_rows(order: torch.Tensor, num_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of x viewed as (B N, C) that are chosen, (B k,), and the others, (B (N-k),), image by image."""
    b, n = order.shape
    rows = order + n * torch.arange(b, device=order.device)[:, None]
    return rows[:, :num_keep].reshape(-1), rows[:, num_keep:].reshape(-1)


def _check(x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int) -> None:
    if x.ndim != 3 or x.dtype not in DTYPES:
        found = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"route_tokens: x is {found}; (B, N, C) in float32, float16 or bfloat16 is expected")
    if not 1 <= num_keep <= x.shape[1]:
        raise ValueError(f"route_tokens: num_keep is {num_keep}, from 1 to {x.shape[1]} tokens can be chosen")
    check_packed("route_tokens", x, packed)


def backend_of(device: torch.device, n: int, c: int) -> str:
    """Return the backend of the op for N tokens with C channels on a device: 'Triton' or 'PyTorch'."""
    if not runs_triton(device, "route_tokens"):
        return "PyTorch"
    from dvit_kernels.prune_tokens import supports

    return "Triton" if supports(n, c) else "PyTorch"


def _run(x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, eps: float = 1e-5) -> torch.Tensor:
    _check(x, packed, num_keep)
    if backend_of(x.device, *x.shape[1:]) == "PyTorch":
        return route_tokens_ref(x, packed, num_keep, eps)

    def kernel() -> torch.Tensor:
        from dvit_kernels.route_tokens import launch_route_tokens  # here: Triton takes a while to import

        return launch_route_tokens(x, packed, num_keep, eps)

    return by_kernel(
        "route_tokens",
        x.device,
        kernel,
        lambda: route_tokens_ref(x, packed, num_keep, eps),
        lambda order: _fault(x, packed, num_keep, eps, order),
        (x, num_keep),
    )


def _fault(
    x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, eps: float, order: torch.Tensor
) -> str | None:
    """Check the kernels' result in a few images: an order, of the best scores but for rounding."""
    some = some_of(x)
    x, order = x[some], order[some]
    chosen = order[:, :num_keep]
    if order.numel() and (order.min() < 0 or order.max() >= x.shape[1]):
        return f"gives wrong results: a position is not from 0 to {x.shape[1] - 1}"
    if not torch.equal(order_of(chosen, x.shape[1]), order):
        return "gives wrong results: the order is not that of the chosen positions, then the others"
    return choice_fault(x, packed, eps, chosen)


def _fake(x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, eps: float = 1e-5) -> torch.Tensor:
    _check(x, packed, num_keep)
    return x.new_empty(x.shape[:2], dtype=torch.int64)


_ADVICE = "Which tokens take the MLP is a hard choice: train with the reference model."
route_tokens = register(OP, route_tokens_ref, _run, _fake, _ADVICE)
