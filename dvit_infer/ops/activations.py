"""Activations in plain PyTorch, by the names that nodes and ops have for them."""

import torch
from torch.nn import functional as F


def activate(y: torch.Tensor, act: str) -> torch.Tensor:
    """Apply an activation by its name in `Mlp.act`, or 'none'.

    Raises:
        ValueError: it is not known.
    """
    if act == "none":
        return y
    if act == "quick_gelu":
        return y * torch.sigmoid(1.702 * y)
    if act == "silu":
        return F.silu(y)
    if act not in ("gelu", "gelu_tanh"):
        raise ValueError(f"activation: {act!r} is not known")
    return F.gelu(y, approximate="tanh" if act == "gelu_tanh" else "none")
