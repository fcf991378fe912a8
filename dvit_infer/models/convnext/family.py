"""The record of ConvNeXt, with predictors (DynamicConvNeXt) or without."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from dvit_infer.config import Config
from dvit_infer.models.convnext.body import ConvNeXt
from dvit_infer.models.convnext.graph import graph
from dvit_infer.models.convnext.names import in_timm
from dvit_infer.models.convnext.read import ARCHS, body_of, matches, read_convnext
from dvit_infer.models.convnext.reference import ConvNeXtModel, PointConv
from dvit_infer.models.family import Family, State
from dvit_infer.models.hierarchical.names import load_renamed
from dvit_infer.models.hierarchical.reading import crop_pct
from dvit_infer.reduction import predictor, route


def _reference(config: Config) -> ConvNeXtModel:
    body, runs, learned = config.body, config.reduction, config.learned
    assert isinstance(body, ConvNeXt)
    settings = dict(learned.settings)
    modules = predictor.modules(body.embed_dim, settings, len(learned.stages), PointConv) if learned.stages else None
    return ConvNeXtModel(
        body,
        num_classes=config.num_classes,
        begin=functools.partial(route.Routing, runs) if runs.stages else None,
        score_predictor=modules,
    )


def _resized(state: State, config: Config) -> State:
    return state  # nothing in the weights depends on the size


def _in_timm(config: Config, weights: State, beside: Mapping[str, Any], in_file: Callable[[], State]) -> nn.Module:
    from timm.models.convnext import ConvNeXt as TimmConvNeXt

    body = config.body
    assert isinstance(body, ConvNeXt)
    model = TimmConvNeXt(
        depths=body.depths,
        dims=body.dims,
        kernel_sizes=body.kernel,
        num_classes=config.num_classes,
        norm_eps=body.eps,
    )
    return load_renamed(model, weights, in_timm)


CONVNEXT = Family(
    name="convnext",
    body=ConvNeXt,
    archs=ARCHS,
    matches=matches,
    read=read_convnext,
    reference=_reference,
    resized=_resized,
    graph=graph,
    crop_pct=crop_pct,
    body_of=body_of,
    owners={"timm": _in_timm},
    of_reduction=r"score_predictor\.|stages\.2\.\d+\.fast_path",
)
