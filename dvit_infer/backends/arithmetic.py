"""Arithmetic of node kinds that every backend does in PyTorch: activations, and where tokens are."""

import torch
from torch.nn import functional as F

from dvit_infer.graph.nodes import PLACES, Attention


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


def places_of(node: Attention, positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the tables of places of a node for the patches that are there, in the layout of queries and keys.

    `sin` and `cos`: (n, 1 or heads, D) or (B, n, 1 or heads, D); `pair_bias` as `attend` takes it, for the node's rows.
    """
    tables = {name: node.weights[name] for name in PLACES if name in node.weights}
    rows = None if positions is None else _with_prefix(positions, node.num_prefix)
    for name, table in tables.items():
        if name == "pair_bias":
            if rows is not None:
                table = table[:, rows[:, :, None], rows[:, None, :]].transpose(0, 1)
            tables[name] = table[..., : node.rows, :]
            continue
        table = table[..., positions, :] if positions is not None else table  # ([heads,] [B,] n, D)
        by_head = node.weights[name].ndim == 3
        tables[name] = table.movedim(0, -2) if by_head else table.unsqueeze(-2)
    return tables


def rotate_patches(x: torch.Tensor, node: Attention, sin: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
    """Rotate the patches' rows of queries or keys (B, tokens, heads, head size); there may be only prefix rows."""
    if x.shape[1] <= node.num_prefix:
        return x
    patches = x[:, node.num_prefix :]
    if node.rope_half:
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([x[:, : node.num_prefix], (patches * cos + turned * sin).to(x.dtype)], dim=1)


def _with_prefix(positions: torch.Tensor, num_prefix: int) -> torch.Tensor:
    prefix = torch.arange(num_prefix, device=positions.device).expand(len(positions), -1)
    return torch.cat([prefix, positions + num_prefix], dim=1)
