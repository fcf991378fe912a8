"""The families DeiT and LV-ViT, with predictors (DynamicViT) or without."""

import functools
from typing import Any

from torch import nn

from dvit_infer.config import Config
from dvit_infer.models.family import Family, State
from dvit_infer.models.vit.archs import ARCHS
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.deit import DeiT
from dvit_infer.models.vit.graph import graph
from dvit_infer.models.vit.lvvit import LVViT
from dvit_infer.models.vit.pos_embed import resample_pos_embed
from dvit_infer.models.vit.read import has_blocks, has_stem, read_deit, read_lvvit
from dvit_infer.reduction import METHODS


def _deit(config: Config) -> DeiT:
    body = _body(config)
    return DeiT(
        **_trunk_arguments(config),
        num_prefix=body.num_prefix,
        qkv_bias=not body.no_qkv_bias,
        layer_scale=body.layer_scale,
        no_embed_class=body.no_embed_class,
    )


def _lvvit(config: Config) -> LVViT:
    body = _body(config)
    return LVViT(**_trunk_arguments(config), stem_dim=body.stem_dim, skip_lam=body.skip_lam)


def _body(config: Config) -> ViT:
    assert isinstance(config.body, ViT)
    return config.body


def _trunk_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments that the reference models of both families share."""
    body, runs, learned = _body(config), config.reduction, config.learned
    modules = (
        METHODS[learned.method].modules(body.embed_dim, dict(learned.settings), len(learned.stages))
        if learned.stages
        else None
    )
    return {
        "patch_size": body.patch_size,
        "embed_dim": body.embed_dim,
        "depth": body.depth,
        "num_heads": body.num_heads,
        "mlp_dim": body.mlp_dim,
        "num_classes": config.num_classes,
        "num_patches": config.num_patches,
        "eps": body.eps,
        "score_predictor": modules,
        "trainable": runs.method == learned.method,
        "prune_at": runs.blocks,
        "num_keep": config.num_keep,
        "choose": METHODS[runs.method].choose if runs.stages else None,
    }


def _resized(state: State, config: Config) -> State:
    pos_embed = resample_pos_embed(state["pos_embed"], _body(config).placed_prefix, config.trained_grid, config.grid)
    return {**state, "pos_embed": pos_embed}


def _deit_crop_pct(config: Config) -> float | None:
    """Return 0.875, and 1.0 for DeiT III (Touvron et al. 2022), whose position embedding has no class row.

    DynamicViT (Rao et al. 2021, `datasets.py`) warps without cropping from 384 pixels on.
    """
    if config.learned.stages:
        return None if min(config.image_size) >= 384 else 0.875
    return 1.0 if _body(config).no_embed_class else 0.875


def _lvvit_crop_pct(config: Config) -> float | None:
    """Return token labeling's (`models/lvvit.py`): 0.9 for T and S, 1.0 for M and L; with predictors DynamicViT's."""
    if config.learned.stages:
        return _deit_crop_pct(config)
    return 0.9 if _body(config).depth <= 16 else 1.0


def _deit_in_timm(config: Config) -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    body = _body(config)
    model: nn.Module = (VisionTransformerDistilled if body.num_prefix == 2 else VisionTransformer)(
        img_size=config.image_size,
        patch_size=body.patch_size,
        num_classes=config.num_classes,
        embed_dim=body.embed_dim,
        depth=body.depth,
        num_heads=body.num_heads,
        mlp_ratio=body.mlp_dim / body.embed_dim,
        norm_layer=functools.partial(nn.LayerNorm, eps=body.eps),
        **({"qkv_bias": False} if body.no_qkv_bias else {}),
        **({"init_values": 1e-5} if body.layer_scale else {}),
        **({"no_embed_class": True} if body.no_embed_class else {}),
    )
    return model


def _matches_deit(shapes: Any) -> bool:
    return has_blocks(shapes) and not has_stem(shapes)


def _archs(family: str) -> dict[str, Any]:
    return {name: arch for name, arch in ARCHS.items() if arch.family == family}


DEIT = Family(
    name="deit",
    body=ViT,
    archs=_archs("deit"),
    matches=_matches_deit,
    read=read_deit,
    reference=_deit,
    resized=_resized,
    graph=graph,
    crop_pct=_deit_crop_pct,
    in_timm=_deit_in_timm,
)
LVVIT = DEIT._replace(
    name="lvvit",
    archs=_archs("lvvit"),
    matches=has_stem,
    read=read_lvvit,
    reference=_lvvit,
    crop_pct=_lvvit_crop_pct,
    in_timm=None,
)
