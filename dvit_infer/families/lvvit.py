"""LV-ViT and DynamicViT on it."""

from collections.abc import Mapping
from typing import Any

from dvit_infer.config import Config
from dvit_infer.models.reading import Reading
from dvit_infer.models.vit.read import Trunk, read_config, trunk_arguments
from dvit_infer.models.vit.lvvit import LVViT

FAMILY = "lvvit"


def matches(shapes: Mapping[str, Any]) -> bool:
    return any(key.startswith(("patch_embed.conv", "patch_embed.bn", "aux_head.")) for key in shapes)


def read(reading: Reading, arch: str | None, options: Mapping[str, Any]) -> Config:
    places = [(f"patch_embed.{layer}.weight", 0) for layer in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")]
    stem_dim = reading.vote("the stem's width", places)
    trunk = Trunk(FAMILY, 1e-5, 2, ("head", "aux_head"), stem_dim, has_skip_lam=True)
    return read_config(reading, trunk, arch, options)


def reference(config: Config) -> LVViT:
    return LVViT(**trunk_arguments(config), stem_dim=config.stem_dim, skip_lam=config.skip_lam)
