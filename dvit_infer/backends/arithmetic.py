"""Arithmetic of node kinds that every backend does in PyTorch: where tokens are, and what attention leaves."""

import torch
from torch.nn import functional as F

from dvit_infer.graph.nodes import PLACES, Attention
from dvit_infer.ops.attention_signal import class_attention_ref, mean_keys_ref


def places_of(node: Attention, positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the tables of places of a node for the patches that are there, in the layout of queries and keys.

    `sin` and `cos`: (n, 1 or heads, D) or (B, n, 1 or heads, D); `pair_bias` as `attend` takes it, for the node's rows.
    """
    tables = {name: node.weights[name] for name in PLACES if name in node.weights}
    if not tables:
        return {}
    if positions is not None and node.unplaced:
        tables = {name: _padded(name, table) for name, table in tables.items()}
        positions = positions.clamp(max=_patches(tables, node.num_prefix) - 1)
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


def signal_of(
    q: torch.Tensor,
    k: torch.Tensor,
    node: Attention,
    bias: torch.Tensor | None = None,
    pair_bias: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return what a node's attention leaves, in float32 (`nodes.Signal`); arguments as of `TorchRunner.mix`."""
    if not node.leaves:
        return None
    if node.leaves == "mean_keys":
        return mean_keys_ref(k)
    if node.leaves == "class_attention":
        return class_attention_ref(q, k, node.scale, bias, pair_bias)
    query = q[:, node.num_prefix :].float().mean(dim=1, keepdim=True)
    return class_attention_ref(query, k.float(), node.scale, bias, None)


def weighted_mean(x: torch.Tensor, sizes: torch.Tensor | None, first: int) -> torch.Tensor:
    """Return the mean (B, C) of the tokens x (B, n, C) of all from `first` on, by their sizes (B, any); None: 1."""
    if sizes is None:
        return x.mean(dim=1)
    share = sizes[:, first:]
    share = share / share.sum(dim=1, keepdim=True)
    return (share[:, None].to(x.dtype) @ x)[:, 0]


def _padded(name: str, table: torch.Tensor) -> torch.Tensor:
    """Return a table of places with one more row, of a token without a place: not rotated, no bias."""
    if name == "pair_bias":
        return F.pad(table, (0, 1, 0, 1))
    return F.pad(table, (0, 0, 0, 1), value=float(name == "cos"))


def _patches(tables: dict[str, torch.Tensor], num_prefix: int) -> int:
    name, table = next(iter(tables.items()))
    return table.shape[-2] - (num_prefix if name == "pair_bias" else 0)


def _with_prefix(positions: torch.Tensor, num_prefix: int) -> torch.Tensor:
    prefix = torch.arange(num_prefix, device=positions.device).expand(len(positions), -1)
    return torch.cat([prefix, positions + num_prefix], dim=1)
