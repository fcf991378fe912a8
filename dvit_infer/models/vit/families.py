"""The families DeiT and LV-ViT, with predictors (DynamicViT) or without."""

import functools
from typing import Any

from dvit_infer.config import Config
from dvit_infer.models.family import Family, State
from dvit_infer.models.vit.archs import ARCHS
from dvit_infer.models.vit.body import ViT
from dvit_infer.models.vit.graph import graph
from dvit_infer.models.vit.in_timm import in_timm
from dvit_infer.models.vit.in_transformers import in_transformers
from dvit_infer.models.vit.lvvit import LVViT
from dvit_infer.models.vit.plain import PlainViT
from dvit_infer.models.vit.pos_embed import resample_pos_embed
from dvit_infer.models.vit.read import is_deit, is_lvvit, read_deit, read_lvvit
from dvit_infer.models.vit.read_vit import is_other_vit, read_vit
from dvit_infer.models.vit.reference import RelativePosition
from dvit_infer.models.vit.relative_position import resample_table
from dvit_infer.models.vit.timm_config import timm_archs
from dvit_infer.reduction import METHODS
from dvit_infer.reduction.progress import Progress


def _plain(config: Config) -> PlainViT:
    return PlainViT(_body(config), num_classes=config.num_classes, **_trunk_arguments(config))


def _lvvit(config: Config) -> LVViT:
    return LVViT(_body(config), num_classes=config.num_classes, **_trunk_arguments(config))


def _body(config: Config) -> ViT:
    assert isinstance(config.body, ViT)
    return config.body


def _trunk_arguments(config: Config) -> dict[str, Any]:
    """Return the arguments that the reference models share."""
    body, runs, learned = _body(config), config.reduction, config.learned
    modules = (
        METHODS[learned.method].modules(body.embed_dim, dict(learned.settings), len(learned.stages))
        if learned.stages
        else None
    )
    return {
        "grid": config.grid,
        "score_predictor": modules,
        "trainable": runs.method == learned.method,
        "prune_at": runs.blocks,
        "fuses": any(runs.fuses(stage) for stage in range(len(runs.stages))),
        "begin": functools.partial(Progress, runs, body.num_prefix) if runs.stages else None,
    }


def _resized(state: State, config: Config) -> State:
    body, old, new = _body(config), config.trained_grid, config.grid
    tables = {key: resample_table(w, old, new) for key, w in state.items() if key.endswith(RelativePosition.TABLE)}
    if body.no_pos_embed:
        return {**state, **tables}
    rule = body.resample, body.num_registers > 0
    return {**state, **tables, "pos_embed": resample_pos_embed(state["pos_embed"], body.placed_prefix, old, new, *rule)}


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


def _archs(family: str) -> dict[str, Any]:
    return {name: arch for name, arch in ARCHS.items() if arch.family == family}


DEIT = Family(
    name="deit",
    body=ViT,
    archs=_archs("deit"),
    matches=is_deit,
    read=read_deit,
    reference=_plain,
    resized=_resized,
    graph=graph,
    crop_pct=_deit_crop_pct,
    owners={"timm": in_timm, "transformers": in_transformers},
)
LVVIT = DEIT._replace(
    name="lvvit",
    archs=_archs("lvvit"),
    matches=is_lvvit,
    read=read_lvvit,
    reference=_lvvit,
    crop_pct=_lvvit_crop_pct,
    owners={},
)
VIT = DEIT._replace(
    name="vit",
    archs={name: facts for name, facts in timm_archs().items() if "unsupported" not in facts},
    matches=is_other_vit,
    read=read_vit,
    crop_pct=lambda config: 0.875,
)
