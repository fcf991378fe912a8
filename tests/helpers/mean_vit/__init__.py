"""A made-up family, as a stranger would add one: a ViT without class token; its head reads the patches' mean."""

from dvit_infer.models.family import Family
from mean_vit.graph import graph
from mean_vit.read import MeanViT, matches, read, resized
from mean_vit.reference import reference

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
