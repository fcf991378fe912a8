"""The record of Swin Transformers, with predictors (DynamicSwin) or without."""

import functools

from dvit_infer.config import Config
from dvit_infer.models.family import Family, State
from dvit_infer.models.hierarchical.reading import crop_pct
from dvit_infer.models.swin.body import Swin
from dvit_infer.models.swin.graph import graph
from dvit_infer.models.swin.read import ARCHS, matches, read_swin
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
    of_reduction=r"layers\.2\.(score_predictor|blocks\.\d+\.fastmlp)\.",
)
