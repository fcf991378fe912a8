"""The record of Swin Transformers, with predictors (DynamicSwin) or without."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dvit_infer.config import Config
from dvit_infer.models.family import Family, State
from dvit_infer.models.hierarchical.names import load_renamed
from dvit_infer.models.hierarchical.reading import crop_pct
from dvit_infer.models.swin.body import Swin
from dvit_infer.models.swin.graph import graph
from dvit_infer.models.swin.names import in_timm
from dvit_infer.models.swin.read import ARCHS, body_of, matches, read_swin
from dvit_infer.models.swin.reference import SwinTransformer
from dvit_infer.reduction import route


def _reference(config: Config) -> SwinTransformer:
    body, runs, learned = config.body, config.reduction, config.learned
    assert isinstance(body, Swin)
    modules = route.modules(body.embed_dim, dict(learned.settings), len(learned.stages)) if learned.stages else None
    return SwinTransformer(
        body,
        shifts=body.shifts(config.trained_size if body.pads else config.image_size),
        num_classes=config.num_classes,
        begin=functools.partial(route.Routing, runs) if runs.stages else None,
        score_predictor=modules,
    )


def _resized(state: State, config: Config) -> State:
    return state  # nothing in the weights depends on the size


def _in_timm(config: Config, weights: State, beside: Mapping[str, Any], in_file: Callable[[], State]) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer as TimmSwin

    body = config.body
    assert isinstance(body, Swin)
    model = TimmSwin(
        img_size=config.trained_size if body.pads else config.image_size,
        dynamic_img_size=True,
        window_size=max(body.windows),
        embed_dim=body.dims[0],
        depths=body.depths,
        num_heads=body.heads,
        mlp_ratio=body.mlp_ratio,
        num_classes=config.num_classes,
        norm_layer=functools.partial(nn.LayerNorm, eps=body.eps),
    )
    return load_renamed(model, weights, in_timm)


SWIN = Family(
    name="swin",
    body=Swin,
    archs=ARCHS,
    matches=matches,
    read=read_swin,
    reference=_reference,
    resized=_resized,
    graph=graph,
    crop_pct=crop_pct,
    body_of=body_of,
    owners={"timm": _in_timm},
    of_reduction=r"layers\.2\.(score_predictor|blocks\.\d+\.fastmlp)\.",
)
