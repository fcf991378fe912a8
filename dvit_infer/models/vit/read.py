"""Recognise and read DeiT and LV-ViT checkpoints, with predictors (DynamicViT) or without."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.reading import Reading
from dvit_infer.models.vit.archs import ARCHS, Arch
from dvit_infer.models.vit.body import RESAMPLES, ViT
from dvit_infer.models.vit.parts import (
    check_channels,
    check_classes,
    finished_config,
    has_layer_scale,
    has_no_qkv_bias,
    note_trained_as,
    num_heads_of,
    one_of,
    trainer_of,
)
from dvit_infer.models.vit.pos_embed import RULES
from dvit_infer.models.vit.sizes import image_size_of, note_resampled, patch_size_of, trained_size_of


@dataclass(frozen=True)
class Trunk:
    """The facts in which the families differ."""

    family: str
    eps: float  # for the blocks' LayerNorms
    patch_of_kernel: int  # patch size = this times the projection's kernel size
    class_heads: tuple[str, ...]
    stem_dim: int = 0
    has_skip_lam: bool = False


def read_config(read: Reading, trunk: Trunk, arch: str | None, options: Mapping[str, Any]) -> Config:
    """Build a Config from keys, shapes, args, given facts and, last, assumptions."""
    check_channels(read, f"patch_embed.{'conv1' if trunk.stem_dim else 'proj'}.weight")
    check_classes(read, trunk.class_heads)
    dim = read.vote("the width", [("norm.weight", 0), ("cls_token", 2), ("pos_embed", 2), ("blocks.0.norm1.weight", 0)])
    depth = read.count("blocks.")
    if not depth:
        raise InputError(f"{read.name}: missing key blocks.0.norm1.weight: there are no blocks")
    mlp_dim = read.vote("the MLP's width", [(f"blocks.{i}.mlp.fc1.weight", 0) for i in range(depth)])
    classes = read.vote(
        "the classes", [(f"{head}.{part}", 0) for head in trunk.class_heads for part in ("weight", "bias")]
    )
    predictors = read.count("score_predictor.")
    num_prefix = 2 if "dist_token" in read.shapes else 1
    if predictors > depth:
        raise InputError(f"{read.name}: unexpected key score_predictor.{predictors - 1}: there are only {depth} blocks")
    found = Arch(trunk.family, dim, depth, 0, 0, num_prefix, predictors, trunk.stem_dim)
    name, sizes = _named(found, mlp_dim)
    if arch is not None:
        name, sizes = arch, ARCHS[arch]
        read.note("given", "arch", name, "by you; keys and shapes are checked against it")
        if sizes.num_predictors != predictors:
            has = f"{predictors} score predictors" if predictors else "no score predictors"
            raise InputError(f"arch: {name} has {sizes.num_predictors} score predictors, {read.name} holds {has}")
        dim, depth, mlp_dim = sizes.embed_dim, sizes.depth, sizes.embed_dim * sizes.mlp_ratio
        num_prefix = sizes.num_prefix
    else:
        counts = f"{dim} wide, {depth} blocks, {classes} classes, {predictors} predictors"
        read.note("read", "arch", name, f"keys and shapes: {counts}")
    note_trained_as(read, predictors)
    patch = patch_size_of(read, trunk.patch_of_kernel)
    trained_size, no_embed_class = trained_size_of(read, num_prefix, patch)
    image_size = image_size_of(read, options.get("image_size"), trained_size, patch)
    resample = one_of(read, "resample", None, "", RESAMPLES) if read.states("resample") else "timm"
    note_resampled(read, RULES[resample], trained_size, image_size)
    of_arch = (sizes.num_heads, "of that architecture") if sizes else None
    skip_lam = 1.0
    if trunk.has_skip_lam:
        by_depth = {12: 1.0, 24: 3.0}.get(depth, 2.0)
        resolved = read.resolve("skip_lam", by_depth, f"LV-ViT's for {depth} blocks (12: 1, 16 and 20: 2, 24: 3)")
        skip_lam = check.positive_float(read.origin("skip_lam"), resolved)
    eps = read.resolve("eps", trunk.eps, f"{trunk.family}'s LayerNorms")
    layer_scale, no_qkv_bias = has_layer_scale(read, depth), has_no_qkv_bias(read, trunk.family)
    body = ViT(
        patch_size=patch,
        embed_dim=dim,
        depth=depth,
        num_heads=num_heads_of(read, dim, of_arch),
        mlp_dim=mlp_dim,
        eps=check.positive_float(read.origin("eps"), eps),
        num_prefix=num_prefix,
        stem_dim=trunk.stem_dim,
        skip_lam=skip_lam,
        layer_scale=layer_scale,
        no_qkv_bias=no_qkv_bias,
        no_embed_class=no_embed_class,
        resample=resample,
    )
    return finished_config(
        read,
        options,
        arch=name,
        family=trunk.family,
        num_classes=classes,
        image_size=image_size,
        trained_size=trained_size,
        body=body,
        predictors=predictors,
        implied=trainer_of(read, trunk.family, predictors, num_prefix),
    )


def is_deit(read: Reading) -> bool:
    return any(key.startswith("blocks.") for key in read.shapes) and not is_lvvit(read)


def is_lvvit(read: Reading) -> bool:
    return any(key.startswith(("patch_embed.conv", "patch_embed.bn", "aux_head.")) for key in read.shapes)


def read_deit(reading: Reading, arch: str | None, options: Mapping[str, Any]) -> Config:
    trunk = Trunk("deit", 1e-6, patch_of_kernel=1, class_heads=("head", "head_dist"))
    return read_config(reading, trunk, arch, options)


def read_lvvit(reading: Reading, arch: str | None, options: Mapping[str, Any]) -> Config:
    places = [(f"patch_embed.{layer}.weight", 0) for layer in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")]
    stem_dim = reading.vote("the stem's width", places)
    trunk = Trunk("lvvit", 1e-5, 2, ("head", "aux_head"), stem_dim, has_skip_lam=True)
    return read_config(reading, trunk, arch, options)


def _named(found: Arch, mlp_dim: int) -> tuple[str, Arch | None]:
    """Return a name for the architecture found, and the named one of the same sizes, with or without predictors."""

    def sizes(a: Arch) -> tuple[object, ...]:
        return a.family, a.embed_dim, a.depth, a.num_prefix, a.stem_dim

    same = {n: a for n, a in ARCHS.items() if sizes(a) == sizes(found) and a.embed_dim * a.mlp_ratio == mlp_dim}
    for name, arch in same.items():
        if bool(arch.num_predictors) == bool(found.num_predictors):
            return name, arch
    kind = f"{'dynamicvit-' if found.num_predictors else ''}{found.family}"
    distilled = "-distilled" if found.num_prefix == 2 else ""
    return f"{kind}-{found.embed_dim}x{found.depth}{distilled}", next(iter(same.values()), None)
