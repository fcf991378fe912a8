"""Checkpoints in the official format with random weights, for demonstrations and measurements."""

import argparse
from typing import Any

import numpy as np
import torch

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.models.arch import ARCHS
from dvit_infer.models.fill import fill
from dvit_infer.models.vit.read import DEIT, LVVIT


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
    if ARCHS[arch].num_predictors:
        args.base_rate = keep_rate
    return {"model": state, "optimizer": {}, "epoch": 0, "scaler": {}, "args": args}


def example_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors of `arch`, at 224 pixels and 1,000 classes.

    Raises:
        InputError: the architecture does not exist.
    """
    if arch not in ARCHS:
        raise InputError(f"arch: {arch!r} does not exist; these do: {', '.join(ARCHS)}")
    sizes = ARCHS[arch]
    stages = range(1, sizes.num_predictors + 1)
    config = Config(
        arch=arch,
        family=sizes.family,
        image_size=(224, 224),
        trained_size=(224, 224),
        patch_size=16,
        num_classes=1000,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        mlp_dim=sizes.embed_dim * sizes.mlp_ratio,
        eps=1e-6,
        num_prefix=sizes.num_prefix,
        method="none",
        prune_at=tuple(sizes.depth * stage // (sizes.num_predictors + 1) for stage in stages),
        keep_rate=1.0,
        stem_dim=sizes.stem_dim,
    )
    with torch.device("meta"):
        model = (LVVIT if sizes.family == LVVIT.name else DEIT).reference(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
