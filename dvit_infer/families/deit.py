"""DeiT, with or without distillation token, and DynamicViT on it."""

from collections.abc import Mapping
from typing import Any

from dvit_infer.config import Config
from dvit_infer.models.reading import Reading
from dvit_infer.models.vit.read import Trunk, read_config, trunk_arguments
from dvit_infer.models.vit.deit import DeiT

FAMILY = "deit"


def matches(shapes: Mapping[str, Any]) -> bool:
    return any(key.startswith("blocks.") for key in shapes)


def read(reading: Reading, arch: str | None, options: Mapping[str, Any]) -> Config:
    trunk = Trunk(FAMILY, 1e-6, patch_of_kernel=1, class_heads=("head", "head_dist"))
    return read_config(reading, trunk, arch, options)


def reference(config: Config) -> DeiT:
    return DeiT(**trunk_arguments(config), num_prefix=config.num_prefix)
