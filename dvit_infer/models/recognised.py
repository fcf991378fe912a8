"""A checkpoint, the model that it is, and its reference model; no engine."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.models.checkpoint import Checkpoint, Source, read_checkpoint
from dvit_infer.models.reading import Note
from dvit_infer.models.registry import build_reference, recognise


def load_reference(
    source: Source,
    *,
    arch: str | None = None,
    keep_rate: float | Sequence[float] | None = None,
    prune_at: Sequence[int] | None = None,
    method: str | None = None,
    merge: int | str | Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    assume: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return the reference model of a checkpoint: plain PyTorch, official names, float32, CPU, evaluation mode.

    Its forward returns logits (B, K), with `return_kept=True` also the kept positions; after `.train()` it returns a
    `TrainOutput` (models/reference.py). Arguments and errors are as for `convert`.
    """
    checkpoint, config, _ = recognised(source, arch, keep_rate, prune_at, method, merge, image_size, assume)
    return build_reference(config, checkpoint)


def recognised(
    source: Source,
    arch: str | None = None,
    keep_rate: float | Sequence[float] | None = None,
    prune_at: Sequence[int] | None = None,
    method: str | None = None,
    merge: int | str | Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    assume: Mapping[str, Any] | None = None,
) -> tuple[Checkpoint, Config, list[Note]]:
    """Read a checkpoint; return it, what model it is, and the facts read, assumed or given. Arguments: as `convert`.

    Raises:
        InputError: As for `convert`.
    """
    if assume is not None and not isinstance(assume, Mapping):
        raise InputError(f"assume: a dict such as {{'num_heads': 6}} is expected, not {assume!r}")
    given = dict(assume or {})
    for what, value in (("keep_rate", keep_rate), ("prune_at", prune_at), ("merge", merge)):
        if value is not None:
            given[what] = value
    checkpoint = read_checkpoint(source, given.get("weights"))
    config, notes = recognise(checkpoint, arch, given, {"method": method, "image_size": image_size})
    return checkpoint, config, notes
