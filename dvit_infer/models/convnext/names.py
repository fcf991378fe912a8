"""Names of a ConvNeXt's weights: timm's become the official ones."""

import re
from collections.abc import Mapping

from dvit_infer.models.hierarchical.names import plan_by
from dvit_infer.models.vit.names.table import Place, Plan

_BLOCK = re.compile(r"stages\.\d+\.(\d+\.dwconv|blocks\.\d+\.conv_dw)\.weight")
_TIMMS = (  # patterns, and what they become
    (r"^stem\.(\d)\.", r"downsample_layers.0.\1."),
    (r"^stages\.(\d+)\.downsample\.(\d)\.", r"downsample_layers.\1.\2."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.conv_dw\.", r"stages.\1.\2.dwconv."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.", r"stages.\1.\2.pwconv\3."),
    (r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
)


def plan_of(name: str, keys: Mapping[str, str]) -> Plan | None:
    """Return whose names a file's keys are and where each goes; None: they are no ConvNeXt's."""
    if not any(map(_BLOCK.fullmatch, keys)) or any(".grn." in key for key in keys):  # ConvNeXt V2
        return None
    if any(key.startswith("downsample_layers.") for key in keys):
        return plan_by(name, keys, "ConvNeXt", Place, lambda draft: None)
    return plan_by(name, keys, "timm's ConvNeXt", _timms, lambda draft: None, owner="timm")


def _timms(key: str) -> Place:
    for pattern, ours in _TIMMS:
        if re.match(pattern, key):
            return Place(re.sub(pattern, ours, key))
    return Place(key)


_OFFICIAL = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
    (r"^stages\.(\d+)\.(\d+)\.pwconv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^norm\.", "head.norm."),
    (r"^head\.", "head.fc."),
)


def in_timm(key: str) -> str:
    """Return timm's name of an official one."""
    pattern, theirs = next(((p, t) for p, t in _OFFICIAL if re.match(p, key)), ("", ""))
    return re.sub(pattern, theirs, key) if pattern else key
