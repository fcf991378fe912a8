"""Choices of tokens that a caller gives instead of the model's own: checks before their indices are used."""

from collections.abc import Sequence

import torch

from dvit_infer.config import Reduction
from dvit_infer.images.tensors import is_plain


def check_kept(
    kept: Sequence[torch.Tensor], reduction: Reduction, batch: int, device: torch.device
) -> list[torch.Tensor]:
    """Check the choices given by a caller and return them on the device; their indices are then in bounds.

    Raises:
        ValueError: the number of stages, a shape, a dtype or an order is wrong, an earlier stage dropped a position, or
            groups are none, or split what an earlier stage merged.
    """
    if not isinstance(kept, list | tuple):
        raise ValueError(f"kept: a list of tensors is expected, not a {type(kept).__name__}")
    if len(kept) != len(reduction.stages):
        raise ValueError(f"kept: {len(kept)} stages given, the model has {len(reduction.stages)}")
    stages = []
    for stage, (index, count) in enumerate(zip(kept, reduction.choice_sizes, strict=True)):
        if not isinstance(index, torch.Tensor) or not is_plain(index):
            raise ValueError(f"kept: stage {stage} is a {type(index).__name__}; a dense tensor is expected")
        if tuple(index.shape) != (batch, count) or index.dtype != torch.int64:
            found = f"{index.dtype} of shape {tuple(index.shape)}"
            raise ValueError(f"kept: stage {stage} is {found}; int64 ({batch}, {count}) is expected")
        stages.append(index.to(device).contiguous())
    (_check_groups if reduction.merges else _check_positions)(stages, reduction)
    return stages


def _check_positions(stages: Sequence[torch.Tensor], reduction: Reduction) -> None:
    n = reduction.num_patches
    alive: torch.Tensor | None = None
    for stage, index in enumerate(stages):
        fused = 0 if reduction.routes else stage  # the number of tokens that earlier stages may have fused
        if index.min() < 0 or index.max() >= n + fused or (index.diff(dim=1) <= 0).any():
            known = f"positions from 0 to {n - 1}" + (f", or {n} and up for fused tokens" if fused else "")
            raise ValueError(f"kept: stage {stage} is not ascending {known}")
        if reduction.routes:  # a stage ranks all positions anew
            continue
        if alive is None:  # with room for a fused token of every stage
            alive = torch.ones(len(index), n + len(stages), dtype=torch.bool, device=index.device)
            alive[:, n:] = False
        if not alive.gather(1, index).all():
            raise ValueError(f"kept: stage {stage} keeps a position that an earlier stage dropped")
        alive = torch.zeros_like(alive).scatter_(1, index, True)
        alive[:, n + stage] = reduction.fuses(stage)


def _check_groups(stages: Sequence[torch.Tensor], reduction: Reduction) -> None:
    n, before = reduction.num_patches, None
    for stage, (groups, s) in enumerate(zip(stages, reduction.stages, strict=True)):
        own = torch.arange(n, device=groups.device).expand_as(groups)
        if groups.min() < 0 or (groups > own).any() or (groups.gather(1, groups) != groups).any():
            raise ValueError(f"kept: stage {stage} does not give for every patch the lowest one of its group")
        if (groups == own).sum(dim=1).ne(s.keep or 0).any():
            raise ValueError(f"kept: stage {stage} does not make {s.keep} groups")
        if before is not None and (groups.gather(1, before) != groups).any():
            raise ValueError(f"kept: stage {stage} splits a group that an earlier stage made")
        before = groups
