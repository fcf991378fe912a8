"""Checkpoints in the official format with random weights, for demonstrations and measurements."""

import argparse
from typing import Any

import numpy as np
import torch

from dvit_infer.config import Body, Config, Reduction, Stage
from dvit_infer.errors import InputError
from dvit_infer.models.fill import fill
from dvit_infer.models.registry import FAMILIES, family_of, own_archs
from dvit_infer.models.vit.archs import ARCHS
from dvit_infer.models.vit.body import ViT


def example_checkpoint(arch: str, keep_rate: float = 0.7, seed: int = 0) -> dict[str, Any]:
    """Return a checkpoint of `arch` as the official trainer saves it, at 224 pixels and 1,000 classes.

    The weights are random and not trained. They keep the variance of their input, and the predictors separate the
    tokens well, so that outputs differ from image to image.

    Raises:
        InputError: the architecture does not exist.
    """
    shapes = example_shapes(arch)
    state = {key: torch.from_numpy(np.asarray(fill(key, shape, seed))) for key, shape in shapes.items()}
    args = argparse.Namespace(model=arch.removeprefix("dynamicvit-"))
    if any("score_predictor." in key for key in shapes):
        args.base_rate = keep_rate
    return {"model": state, "optimizer": {}, "epoch": 0, "scaler": {}, "args": args}


def example_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of `arch`, at 224 pixels and 1,000 classes.

    Raises:
        InputError: the architecture does not exist.
    """
    family = next((family for family in FAMILIES if family.body_of is not None and arch in family.archs), None)
    if family is not None and family.body_of is not None:
        stages = family.archs[arch].num_predictors
        return shapes_of(family.name, family.body_of(arch), size=224, num_classes=1000, stages=stages)
    if arch not in ARCHS:
        raise InputError(f"arch: {arch!r} does not exist; these do: {', '.join(own_archs())}")
    sizes = ARCHS[arch]
    body = ViT(
        patch_size=16,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_dim=sizes.embed_dim * sizes.mlp_ratio,
        eps=1e-6,
        num_prefix=sizes.num_prefix,
        stem_dim=sizes.stem_dim,
    )
    return shapes_of(sizes.family, body, size=224, num_classes=1000, stages=sizes.num_predictors)


def shapes_of(family: str, body: Body, size: int, num_classes: int, stages: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a model's tensors with `stages` predictors for images of `size` x `size` pixels."""
    learned = Reduction("predictor", tuple(map(Stage, range(stages))), (("predictor_eps", 1e-5),))
    config = Config(
        arch="example",
        family=family,
        num_classes=num_classes,
        image_size=(size, size),
        trained_size=(size, size),
        body=body,
        learned=learned if stages else Reduction(),
    )
    with torch.device("meta"):
        model = family_of(config).reference(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
