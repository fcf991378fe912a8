"""Recognise and read checkpoints of Swin Transformers and DynamicSwin."""

import math
import re
from collections.abc import Mapping
from typing import Any

from dvit_infer.config import Config, Size
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
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
from dvit_infer.models.swin.body import Swin

_TABLE = "attn.relative_position_bias_table"
_SIZES = {  # width, blocks, heads: Liu et al. 2021, section 3.3
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
}
ARCHS = {
    f"{kind}-{size}": Arch(tuple(dim << i for i in range(4)), depths, heads, predictors)
    for kind, predictors in (("dynamicswin", 3), ("swin", 0))
    for size, (dim, depths, heads) in _SIZES.items()
}


def body_of(arch: str) -> Swin:
    """Return the body of a named size, with windows of 7x7."""
    named = ARCHS[arch]
    first = {6: 1, 18: 2}[named.depths[2]]  # DynamicViT's `infer.py`
    return Swin(
        patch_size=16,
        embed_dim=named.dims[2],
        depth=named.depths[2],
        depths=named.depths,
        dims=named.dims,
        mlp_ratio=4,
        eps=1e-5,
        num_fast=named.depths[2] - first if named.num_predictors else 0,
        heads=named.heads,
        windows=(7,) * 4,
    )


def matches(read: Reading) -> bool:
    return any(re.fullmatch(rf"layers\.\d+\.blocks\.\d+\.{re.escape(_TABLE)}", key) for key in read.shapes)


def read_swin(read: Reading, arch: str | None, options: Mapping[str, Any]) -> Config:
    """Build a Config from keys, shapes, args, given facts and, last, assumptions."""
    depths = depths_of(read, "layers.", "blocks.")
    blocks = [[f"layers.{stage}.blocks.{i}." for i in range(depth)] for stage, depth in enumerate(depths)]
    dims = tuple(read.vote("the width", [(f"{block}norm1.weight", 0) for block in stage]) for stage in blocks)
    heads = tuple(read.vote("the heads", [(f"{block}{_TABLE}", 1) for block in stage]) for stage in blocks)
    hidden = read.vote("the MLP's width", [(f"{block}mlp.fc1.weight", 0) for block in blocks[0]])
    kernel = read.shape("patch_embed.proj.weight", 4)
    if kernel[1:] != (3, 4, 4):
        raise InputError(f"{read.name}: patch_embed.proj.weight has shape {kernel}; kernels of (3, 4, 4) are expected")
    classes = num_classes_of(read)
    predictors = read.count("layers.2.score_predictor.")
    fast = [any(key.startswith(f"{block}fastmlp.") for key in read.shapes) for block in blocks[2]]
    name = named(read, "swin", ARCHS, Arch(dims, depths, heads, predictors), classes, arch)
    eps = read.resolve("eps", 1e-5, "Swin's LayerNorms")
    body = Swin(
        patch_size=16,
        embed_dim=dims[2],
        depth=depths[2],
        depths=depths,
        dims=dims,
        mlp_ratio=max(1, hidden // dims[0]),
        eps=check.positive_float(read.origin("eps"), eps),
        num_fast=num_fast_of(read, fast, predictors),
        heads=heads,
        windows=tuple(_window(read, f"{stage[0]}{_TABLE}") for stage in blocks),
        pads=read.value_of("pads") or "",
    )
    trained_size = _trained_size(read, body)
    return finished_config(
        read,
        options,
        arch=name,
        family="swin",
        num_classes=classes,
        image_size=image_size_of(read, options.get("image_size"), trained_size, body),
        trained_size=trained_size,
        body=body,
        predictors=predictors,
        predictor_eps=1e-5,
    )


def _window(read: Reading, key: str) -> int:
    """Return positions per side of a window, by the rows of its table: one for every step down and across."""
    rows = read.shape(key, 2)[0]
    side = math.isqrt(rows)
    if side * side != rows or side % 2 == 0:
        raise InputError(
            f"{read.name}: {read.in_file(key)} has {rows} rows, which are those of no window; one of 7x7 has 169"
        )
    return (side + 1) // 2


def _trained_size(read: Reading, body: Swin) -> Size:
    """Return the size at which windows were built: it decides which stages shift them."""
    last = 32 * body.windows[-1]
    usual = (224, 224) if body.fits((224, 224)) else (last, last)
    why = f"windows of {','.join(map(str, body.windows))}; nothing says the size that they were built for"
    value = read.resolve("trained_size", usual, why)
    size = check.image_size_of(read.origin("trained_size"), value, body)
    if not body.fits(size):
        raise InputError(
            f"{read.origin('trained_size')}: {size[0]}x{size[1]} has other windows than "
            f"{','.join(map(str, body.windows))}, which the tables of {read.name} are for"
        )
    return size
