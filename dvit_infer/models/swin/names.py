"""Names of a Swin Transformer's weights: timm's become the official ones, buffers are made anew."""

import math
import re
from collections.abc import Mapping

from dvit_infer.models.hierarchical.names import plan_by
from dvit_infer.models.vit.names.draft import Draft
from dvit_infer.models.vit.names.table import Place, Plan

_BLOCK = re.compile(r"layers\.\d+\.blocks\.\d+\.attn\.relative_position_bias_table")
_TIMMS = re.compile(r"layers\.(\d{1,4})\.downsample\.(.+)")
_INDEX = "made anew from the windows"
_MASK = re.compile(r"layers\.(\d)\.blocks\.\d+\.attn_mask")


def plan_of(name: str, keys: Mapping[str, str]) -> Plan | None:
    """Return whose names a file's keys are and where each goes; None: they are no Swin Transformer's."""
    if not any(map(_BLOCK.fullmatch, keys)):
        return None
    # timm merges at the beginning of a stage, the official code at its end.
    if "layers.0.downsample.reduction.weight" in keys or not any(map(_TIMMS.fullmatch, keys)):
        return plan_by(name, keys, "Swin Transformer", _official, _built_at)
    return plan_by(name, keys, "timm's Swin Transformer", _timms, _pads, owner="timm")


def _official(key: str) -> Place:
    if key.endswith(".relative_position_index"):
        return Place(unused=("layers.*.relative_position_index", _INDEX))
    return Place(key)


def _timms(key: str) -> Place:
    if found := _TIMMS.fullmatch(key):
        return Place(f"layers.{int(found[1]) - 1}.downsample.{found[2]}")
    if key.endswith((".relative_position_index", ".attn_mask")):
        return Place(unused=("layers.*.attn_mask and relative_position_index", _INDEX))
    return Place(re.sub(r"^head\.fc\.", "head.", key))


def _pads(draft: Draft) -> None:
    draft.imply("timm's names: windows are those of the trained size, maps are padded", pads="after_roll")


def _built_at(draft: Draft) -> None:
    """Take the size at which windows were built from the number of them, which a mask shows, and drop the masks."""
    for key in [key for key in draft.state if key.endswith(".attn_mask")]:
        found, shape = _MASK.fullmatch(key), draft.shapes[key]
        if found and len(shape) == 3 and all(math.isqrt(size) ** 2 == size > 0 for size in shape[:2]):
            side = math.isqrt(shape[0]) * math.isqrt(shape[1]) * 4 << int(found[1])
            draft.imply(f"{key}: {shape[0]} windows of {shape[1]} positions", trained_size=(side, side))
        del draft.state[key], draft.files[key]
        draft.left_over["layers.*.attn_mask"] = _INDEX


def in_timm(key: str) -> str:
    """Return timm's name of an official one."""
    if found := _TIMMS.fullmatch(key):
        return f"layers.{int(found[1]) + 1}.downsample.{found[2]}"
    return re.sub(r"^head\.", "head.fc.", key)
