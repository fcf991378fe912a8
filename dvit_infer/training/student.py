"""Build the dynamic student of a dense model, and its content in the official file format."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.checkpoint import Checkpoint, read_checkpoint
from dvit_infer.models.reading import Note
from dvit_infer.models.reference import Reference
from dvit_infer.models.registry import build_reference, recognise
from dvit_infer.models.vit.body import ViT
from dvit_infer.reduction import predictor

STAGES = 3


@dataclass(frozen=True)
class Pair:
    """The student, in training mode, and its dense counterpart, the teacher.

    Attributes:
        args: the metadata of the student's file.
        notes: facts that were read, assumed or given when the dense model was recognised.
    """

    student: Reference
    teacher: Reference
    config: Config
    args: dict[str, Any]
    notes: list[Note]


def make_pair(
    dense: str | Path,
    keep_rate: float,
    *,
    prune_at: Sequence[int] | None = None,
    arch: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    assume: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Pair:
    """Read a dense checkpoint, and build a student with additional, randomly initialised score predictors.

    Args:
        keep_rate: share r of patches kept by the first stage, above 0, below 1; the next two keep r**2 and r**3.
        prune_at: 0-based indices of the blocks before which patches are dropped; None: evenly spaced.
        seed: seed of the predictors' weights, which are truncated normal (0.02), as in the official trainer.

    Raises:
        InputError: The file, a key or an argument is invalid, or the file already holds predictors.
    """
    rate = check.keep_rate("keep_rate", keep_rate)
    if rate == 1:
        raise InputError("keep_rate: 1 keeps every patch, so there is nothing to learn; a number below 1 is expected")
    given = dict(assume or {})
    checkpoint = read_checkpoint(dense, given.get("weights"))
    if any(key.startswith("score_predictor.") for key in checkpoint.state):
        raise InputError(f"{dense}: holds score predictors already; a dense model is expected")
    config, notes = recognise(checkpoint, arch, given, {"image_size": image_size})
    body = config.body
    if not isinstance(body, ViT):
        raise InputError(f"{dense}: models of the family {config.family} cannot be trained here")
    evenly = tuple(body.depth * stage // (STAGES + 1) for stage in range(1, STAGES + 1))
    asked = evenly if prune_at is None else tuple(prune_at)
    stages = check.block_indices("prune_at", asked, body.depth, len(asked))
    predictor_eps = given.get("predictor_eps") or predictor.SETTINGS["predictor_eps"][0]
    teacher = build_reference(config, checkpoint)
    args = {
        "model": config.arch,
        "base_rate": rate,
        "num_heads": body.num_heads,
        "prune_at": list(stages),
        "skip_lam": body.skip_lam,
        "mean": list(config.mean),
        "std": list(config.std),
        "crop_pct": config.crop_pct,
        "dvit_infer": {"eps": body.eps, "predictor_eps": predictor_eps, "trained_size": config.image_size},
    }
    state = {key: value.clone() for key, value in teacher.state_dict().items()}
    state |= _predictors(len(stages), body.embed_dim, predictor_eps, seed)
    # Recognise the student as a reader of its file will, so that exactly that model is trained. (The file contains the
    # two given facts too; giving them makes error messages name the options.)
    content = Checkpoint(str(dense), state, "model", metadata=args)
    student_config, _ = recognise(content, None, {"keep_rate": rate, "prune_at": stages}, {})
    if student_config.num_keep[-1] == student_config.num_patches:
        raise InputError(f"keep_rate: {rate:g} drops none of the {student_config.num_patches} patches")
    student = build_reference(replace(student_config, weights=None), content)
    for model in (student, teacher):
        model.fuse_attention()
    return Pair(student, teacher, student_config, args, notes)


def _predictors(count: int, dim: int, eps: float, seed: int) -> dict[str, torch.Tensor]:
    modules = predictor.modules(dim, {"predictor_eps": eps}, count)
    generator = torch.Generator().manual_seed(seed)
    for module in modules.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            nn.init.zeros_(module.bias)
    return {f"{predictor.KEY}.{key}": value for key, value in modules.state_dict().items()}


def set_training(model: nn.Module) -> None:
    """Set training mode, except for BatchNorm (LV-ViT's stem), which keeps using its running statistics.

    Fine-tuning hardly changes the stem, and the output for an image then does not depend on the rest of the batch, so
    the losses do not depend on how a batch is distributed.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def official_content(weights: Mapping[str, torch.Tensor], args: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """Return the content of the official trainer's files: `model`, `args` (a Namespace), `epoch`."""
    state = {key: value.detach().cpu() for key, value in weights.items()}
    return {"model": state, "args": argparse.Namespace(**args), "epoch": epoch}
