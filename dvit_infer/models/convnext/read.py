"""Recognise and read checkpoints of ConvNeXt and DynamicConvNeXt."""

import re
from collections.abc import Mapping
from typing import Any

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.convnext.body import ConvNeXt
from dvit_infer.models.hierarchical.reading import (
    Arch,
    depths_of,
    finished_config,
    image_size_of,
    named,
    num_classes_of,
    num_fast_of,
)
from dvit_infer.models.reading import Reading

_SIZES = {  # channels and blocks: Liu et al. 2022, section 3
    "t": ((96, 192, 384, 768), (3, 3, 9, 3)),
    "s": ((96, 192, 384, 768), (3, 3, 27, 3)),
    "b": ((128, 256, 512, 1024), (3, 3, 27, 3)),
}
ARCHS = {
    f"{kind}-{size}": Arch(dims, depths, num_predictors=predictors)
    for kind, predictors in (("dynamicconvnext", 3), ("convnext", 0))
    for size, (dims, depths) in _SIZES.items()
}


def body_of(arch: str) -> ConvNeXt:
    """Return the body of a named size."""
    named = ARCHS[arch]
    first = {9: 1, 27: 3}[named.depths[2]]  # DynamicViT's `infer.py`
    return ConvNeXt(
        patch_size=16,
        embed_dim=named.dims[2],
        depth=named.depths[2],
        depths=named.depths,
        dims=named.dims,
        mlp_ratio=4,
        eps=1e-6,
        num_fast=named.depths[2] - first if named.num_predictors else 0,
    )


def matches(read: Reading) -> bool:
    return any(re.fullmatch(r"stages\.\d+\.\d+\.dwconv\.weight", key) for key in read.shapes)


def read_convnext(read: Reading, arch: str | None, options: Mapping[str, Any]) -> Config:
    """Build a Config from keys, shapes, args, given facts and, last, assumptions."""
    depths = depths_of(read, "stages.", "")
    blocks = [[f"stages.{stage}.{i}." for i in range(depth)] for stage, depth in enumerate(depths)]
    dims = tuple(
        read.vote("the width", [(f"{block}{key}", 0) for block in stage for key in ("norm.weight", "gamma")])
        for stage in blocks
    )
    hidden = read.vote("the MLP's width", [(f"{block}pwconv1.weight", 0) for block in blocks[0]])
    kernel = read.vote("the kernel", [(f"{block}dwconv.weight", 2) for stage in blocks for block in stage])
    stem = read.shape("downsample_layers.0.0.weight", 4)
    if stem[1:] != (3, 4, 4) or kernel % 2 == 0:
        key = read.in_file("downsample_layers.0.0.weight")
        raise InputError(f"{read.name}: {key} has shape {stem}; kernels of (3, 4, 4) are expected")
    classes = num_classes_of(read)
    predictors = read.count("score_predictor.")
    fast = [any(key.startswith(f"{block}fast_path") for key in read.shapes) for block in blocks[2]]
    name = named(read, "convnext", ARCHS, Arch(dims, depths, num_predictors=predictors), classes, arch)
    eps = read.resolve("eps", 1e-6, "ConvNeXt's LayerNorms")
    body = ConvNeXt(
        patch_size=16,
        embed_dim=dims[2],
        depth=depths[2],
        depths=depths,
        dims=dims,
        mlp_ratio=max(1, hidden // dims[0]),
        eps=check.positive_float(read.origin("eps"), eps),
        num_fast=num_fast_of(read, fast, predictors),
        kernel=kernel,
    )
    usual = read.resolve("trained_size", (224, 224), "ConvNeXt's; nothing in the weights depends on it")
    trained_size = check.image_size_of(read.origin("trained_size"), usual, body)
    return finished_config(
        read,
        options,
        arch=name,
        family="convnext",
        num_classes=classes,
        image_size=image_size_of(read, options.get("image_size"), trained_size, body),
        trained_size=trained_size,
        body=body,
        predictors=predictors,
        predictor_eps=1e-6,
    )
