"""A made-up family, as a stranger would add one: a ViT without class token; its head reads the patches' mean."""

import functools

from dvit_infer.config import Config
from dvit_infer.models.family import Family
from dvit_infer.reduction.progress import Progress
from mean_vit.graph import graph
from mean_vit.read import MeanViT, matches, read, resized
from mean_vit.reference import MeanViTModel


def reference(config: Config) -> MeanViTModel:
    reduction = config.reduction
    return MeanViTModel(
        **vars(config.body),
        num_patches=config.num_patches,
        num_classes=config.num_classes,
        begin=functools.partial(Progress, reduction, 0) if reduction.stages else None,
    )


FAMILY = Family(
    name="meanvit",
    body=MeanViT,
    archs={},
    matches=matches,
    read=read,
    reference=reference,
    resized=resized,
    graph=graph,
    crop_pct=lambda config: 1.0,
)
