"""prune_tokens: score the patch tokens, choose the best, gather their rows (Rao et al. 2021, sections 3.2 and 3.3).

The op runs one pruning stage. This file holds plain PyTorch for any device; on CUDA three Triton launches replace it
(dvit_kernels/prune_tokens.py), and with DVIT_PRUNE=native in the environment the native library does, also on CPUs
(native.py). `torch.ops.dvit.prune_tokens` exists once this module is imported: by any use of a public name, or by
`import dvit_infer` after `import torch`.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from dvit_infer.errors import InputError
from dvit_infer.ops.choices import DTYPES, runs_triton
from dvit_infer.ops.fallback import by_kernel, some_of, widened
from dvit_infer.ops.registration import register

OP = "dvit::prune_tokens"
_LAYERS = ("in_conv.0", "in_conv.1", "out_conv.0", "out_conv.2", "out_conv.4")


def pack_predictor(
    predictor: nn.Module | Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """Pack a predictor's weights for the op, with its LayerNorm folded into the first linear.

    Args:
        predictor: a module or a state dict with the official names (`in_conv.*`, `out_conv.*`), width C.
        dtype: the dtype of the tokens; matrices are stored in it, everything else in float32.

    Returns:
        w1 (C, C) = W1 * gain, its row sums (C,) as stored in `dtype`, b1 (C,) = b1 + W1 @ shift;
        w2 (C/2, C/2) for a token's own half and (C/2, C/2) for the mean half, b2 (C/2,); w3 (C/4, C/2), b3 (C/4,);
        w4 (C/4,) and b4 (1,): row 'keep' minus row 'drop' of the last layer.

    Raises:
        ValueError: a weight is missing or has a wrong shape, or `dtype` is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"pack_predictor: dtype {dtype} is not one of {', '.join(map(str, DTYPES))}")
    state = predictor.state_dict() if isinstance(predictor, nn.Module) else predictor
    names = [f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias")]
    if missing := [name for name in names if name not in state]:
        raise ValueError(f"pack_predictor: missing {missing[0]}")
    # Folded in double precision: a gain times a weight is then rounded once, to `dtype`. MPS has none: on the CPU then.
    where = state[names[0]].device
    weights = [state[name].detach() for name in names]
    if where.type == "mps":
        return [w.to(where) for w in pack_predictor({n: w.cpu() for n, w in zip(names, weights, strict=True)}, dtype)]
    gain, shift, w1, b1, w2, b2, w3, b3, w4, b4 = (weight.double() for weight in weights)
    c = gain.numel()
    expected = [(c,), (c,), (c, c), (c,), (c // 2, c), (c // 2,), (c // 4, c // 2), (c // 4,), (2, c // 4), (2,)]
    for name, tensor, shape in zip(names, (gain, shift, w1, b1, w2, b2, w3, b3, w4, b4), expected, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"pack_predictor: {name} has shape {tuple(tensor.shape)}, {shape} is expected")
    folded = (w1 * gain).to(dtype)
    return [
        folded,
        folded.double().sum(dim=1).float(),
        (b1 + w1 @ shift).float(),
        w2[:, : c // 2].to(dtype).contiguous(),
        w2[:, c // 2 :].to(dtype).contiguous(),
        b2.float(),
        w3.to(dtype),
        b3.float(),
        (w4[0] - w4[1]).float(),
        (b4[:1] - b4[1:]).float(),
    ]


def _packed_shapes(c: int) -> list[tuple[int, ...]]:
    half, quarter = c // 2, c // 4
    return [(c, c), (c,), (c,), (half, half), (half, half), (half,), (quarter, half), (quarter,), (quarter,), (1,)]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gelu: bool = False) -> torch.Tensor:
    y = F.linear(x, weight, bias)
    return F.gelu(y) if gelu else y


def score_tokens_ref(
    patches: torch.Tensor, packed: Sequence[torch.Tensor], eps: float, linear: Callable[..., torch.Tensor] = _linear
) -> torch.Tensor:
    """(B, N, C) patch tokens -> (B, N) difference of the keep and drop logits, float32 (float64 for float64 tokens).

    `linear(x, weight, bias, gelu)` multiplies by w1, the own half of w2, and w3.
    """
    w1, _, b1, w2_own, w2_mean, b2, w3, b3, w4, b4 = packed
    dtype, half = patches.dtype, patches.shape[-1] // 2
    wide = torch.promote_types(dtype, torch.float32)
    normed = F.layer_norm(patches, patches.shape[-1:], eps=eps)
    hidden = linear(normed, w1, b1.to(dtype), gelu=True)
    # The mean half is the same for every token of an image: one vector goes through its part of the layer once.
    mean = hidden[..., half:].to(wide).mean(dim=1, keepdim=True)
    shared = F.linear(mean, w2_mean.to(wide), b2)
    hidden = F.gelu(linear(hidden[..., :half], w2_own, None) + shared.to(dtype))
    hidden = linear(hidden, w3, b3.to(dtype), gelu=True)
    return hidden.to(wide) @ w4 + b4


def select_tokens_ref(score: torch.Tensor, num_keep: int) -> torch.Tensor:
    """(B, N) scores -> (B, num_keep) int64 positions of the highest, ascending; NaN is lowest, a tie goes to the lower.

    `0.0 - score` turns descending into ascending order, in which sort puts NaN last, and makes -0.0 equal to 0.0.
    """
    order = torch.sort(0.0 - score, dim=1, stable=True).indices
    return order[:, :num_keep].sort(dim=1).values


def gather_tokens_ref(x: torch.Tensor, index: torch.Tensor, num_prefix: int) -> torch.Tensor:
    """(B, P+N, C) and (B, k) positions among the N -> (B, P+k, C): prefix rows, then the rows at `index`.

    It copies whole rows, as an embedding does; `Tensor.gather` copies single values and takes 10 x as long on a CPU.
    """
    b, n, c = x.shape
    prefix = torch.arange(num_prefix, device=x.device).expand(b, -1)
    firsts = n * torch.arange(b, device=x.device)[:, None]
    return F.embedding(torch.cat([prefix, index + num_prefix], dim=1) + firsts, x.reshape(-1, c))


def prune_tokens_ref(
    x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, num_prefix: int = 1, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op in plain PyTorch; arguments as `prune_tokens`."""
    score = score_tokens_ref(x[:, num_prefix:], packed, eps)
    index = select_tokens_ref(score, num_keep)
    return gather_tokens_ref(x, index, num_prefix), index


def _check(x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, num_prefix: int) -> None:
    if x.ndim != 3 or x.dtype not in DTYPES:
        found = f"{x.dtype} of shape {tuple(x.shape)}"
        raise ValueError(f"prune_tokens: x is {found}; (B, P+N, C) in float32, float16 or bfloat16 is expected")
    if num_prefix < 0:
        raise ValueError(f"prune_tokens: num_prefix is {num_prefix}, 0 or more is expected")
    if not 1 <= num_keep <= x.shape[1] - num_prefix:
        raise ValueError(
            f"prune_tokens: num_keep is {num_keep}, from 1 to {x.shape[1] - num_prefix} patch tokens can be kept"
        )
    check_packed("prune_tokens", x, packed)


def check_packed(op: str, x: torch.Tensor, packed: Sequence[torch.Tensor]) -> None:
    """Raise ValueError, with the op's name, if packed weights do not fit tokens x (B, N, C).

    Matrices have the dtype of the tokens. Kernels get bare addresses: invalid tensors must be rejected here.
    """
    fit = [(shape, x.dtype if len(shape) == 2 else torch.float32, x.device) for shape in _packed_shapes(x.shape[2])]
    if [(tuple(t.shape), t.dtype, t.device) for t in packed] != fit:
        fits = f"x has {x.shape[2]} channels in {x.dtype} on {x.device}"
        raise ValueError(f"{op}: packed does not fit, {fits}; use pack_predictor(predictor, x.dtype)")


def backend_of(device: torch.device, n: int, c: int) -> str:
    """Return the backend of the op for N patch tokens with C channels on a device: 'Triton' or 'PyTorch'.

    With DVIT_PRUNE=native it is 'native (CPU)' or 'native (CUDA)' if the library supports the size.

    Raises:
        InputError: DVIT_PRUNE has another value, or the native library does not exist.
    """
    asked = os.environ.get("DVIT_PRUNE", "")
    if asked == "native":
        from dvit_infer.ops import native  # here: not needed otherwise

        if native.supports(device, n, c):
            return f"native ({device.type.upper()})"
    elif asked:
        raise InputError(f"DVIT_PRUNE: {asked!r}; native or nothing is expected")
    if not runs_triton(device, "prune_tokens"):
        return "PyTorch"
    from dvit_kernels.prune_tokens import supports

    return "Triton" if supports(n, c) else "PyTorch"


def _run(
    x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, num_prefix: int = 1, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, packed, num_keep, num_prefix)
    by = backend_of(x.device, x.shape[1] - num_prefix, x.shape[2])
    if by == "PyTorch":
        return prune_tokens_ref(x, packed, num_keep, num_prefix, eps)
    if by.startswith("native"):
        from dvit_infer.ops import native

        return native.prune_tokens(x, packed, num_keep, num_prefix, eps)

    def kernel() -> tuple[torch.Tensor, torch.Tensor]:
        from dvit_kernels.prune_tokens import launch_prune_tokens  # here: Triton takes a while to import

        return launch_prune_tokens(x, packed, num_keep, num_prefix, eps)

    return by_kernel(
        "prune_tokens",
        x.device,
        kernel,
        lambda: prune_tokens_ref(x, packed, num_keep, num_prefix, eps),
        lambda result: _fault(x, packed, num_prefix, eps, *result),
        (x, num_keep, num_prefix),
    )


def _fault(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    num_prefix: int,
    eps: float,
    kept_x: torch.Tensor,
    index: torch.Tensor,
) -> str | None:
    """Check the kernels' result in a few images."""
    some = some_of(x)
    kept_x, index, x = kept_x[some], index[some], x[some]
    n = x.shape[1] - num_prefix
    if index.min() < 0 or index.max() >= n or (index.diff(dim=1) <= 0).any():
        return f"gives wrong results: the kept tokens are not ascending positions from 0 to {n - 1}"
    if not torch.equal(kept_x, gather_tokens_ref(x, index, num_prefix)):
        return "gives wrong results: kept rows are not exact copies"
    return choice_fault(x[:, num_prefix:], packed, eps, index)


def choice_fault(patches: torch.Tensor, packed: Sequence[torch.Tensor], eps: float, index: torch.Tensor) -> str | None:
    """Return a fault if tokens (B, N, C) are left out that score more than those at `index` (B, k).

    Scores are rounded, so tokens near the cut may change places: a chosen token may score less than the best one left
    out by as much as twice PyTorch's own rounding error in both.
    """
    exact = score_tokens_ref(widened(patches), [widened(t) for t in packed], eps)
    rounding = (score_tokens_ref(patches, packed, eps).double() - exact).abs().max() + 1e-6 * exact.abs().max()
    stays = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, index, True)
    lowest = exact.masked_fill(~stays, math.inf).amin(dim=1)
    highest = exact.masked_fill(stays, -math.inf).amax(dim=1)
    lost = (highest - lowest).max().item() if index.shape[1] < patches.shape[1] else 0.0
    if lost <= 4 * rounding.item():
        return None
    return f"gives wrong results: a token left out scores {lost:.1e} more than a kept one"


def _fake(
    x: torch.Tensor, packed: Sequence[torch.Tensor], num_keep: int, num_prefix: int = 1, eps: float = 1e-5
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, packed, num_keep, num_prefix)
    kept = x.new_empty(x.shape[0], num_prefix + num_keep, x.shape[2])
    return kept, x.new_empty(x.shape[0], num_keep, dtype=torch.int64)


_ADVICE = (
    "Which tokens stay is a hard choice: train with the reference model, whose training forward masks tokens instead "
    "of dropping them."
)
register(OP, prune_tokens_ref, _run, _fake, _ADVICE)


def prune_tokens(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor] | nn.Module | Mapping[str, torch.Tensor],
    num_keep: int,
    num_prefix: int = 1,
    eps: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep each image's `num_keep` best patch tokens.

    Tokens are ranked by the difference of the predictor's two logits, keep minus drop, in float32; for equal
    scores the lower position wins, -0.0 equals 0.0, NaN ranks last (Rao et al. 2021, section 3.2; no softmax is
    needed, as log P(keep) grows with the difference).

    Args:
        x: (B, P+N, C) tokens in float32, float16 or bfloat16, any strides.
        packed: the result of `pack_predictor` for x.dtype, or a predictor module or state dict, packed on the fly.
        num_keep: the number of the N patch tokens to keep, 1 to N.
        num_prefix: the number P of leading tokens (class, distillation, registers), always kept.
        eps: of the predictor's LayerNorm; None: the module's, else 1e-5.

    Returns:
        kept_x (B, P+num_keep, C), prefix rows first, then bit-equal copies of the kept rows in ascending position;
        index (B, num_keep) int64, their positions among the N, ascending.

    Raises:
        ValueError: a shape, a dtype or a count is invalid.
        RuntimeError: on backward; the choice has no gradient.
    """
    if isinstance(packed, nn.Module):
        norm = packed.get_submodule("in_conv.0")
        own_eps = getattr(norm, "eps", None)
        eps = own_eps if eps is None and isinstance(own_eps, float) else eps
    if isinstance(packed, nn.Module | Mapping):
        packed = pack_predictor(packed, x.dtype)
    op = torch.ops.dvit.prune_tokens.default
    kept_x, index = op(x, list(packed), num_keep, num_prefix, 1e-5 if eps is None else eps)
    return kept_x, index
