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
from dvit_infer.models.vit.reference import VisionTransformer
from dvit_infer.reduction import predictor
from dvit_infer.reduction.settings import keep_rate as predictor_rate
from dvit_infer.reduction.settings import positive_float
from dvit_infer.training.new_weights import HEADS, new_heads, new_predictors
from dvit_infer.training.saving import digest

STAGES = 3


@dataclass(frozen=True)
class Pair:
    """The student, in training mode, and its teacher, a dense model.

    Attributes:
        args: the metadata of the student's file.
        notes: facts that were read, assumed or given when the model was recognised.
        origin: what identifies the weights that it begins with (`saving.identity`).
        new: the prefixes of the weights that learn at the full rate from the first step on: predictors, new heads.
        distils_logits: whether the teacher's classes are the student's, so that its logits are distilled too.
        remarks: what the user should know about the choice of weights and teacher, one line each.
    """

    student: Reference
    teacher: Reference
    config: Config
    args: dict[str, Any]
    notes: list[Note]
    origin: dict[str, Any]
    new: tuple[str, ...]
    distils_logits: bool
    remarks: list[str]

    def is_new(self, name: str) -> bool:
        return name.startswith(self.new)


def make_pair(
    dense: str | Path,
    keep_rate: float | None,
    *,
    prune_at: Sequence[int] | None = None,
    arch: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    assume: Mapping[str, Any] | None = None,
    seed: int = 0,
    classes: Sequence[str] | None = None,
    new_head: bool = False,
    teacher: str | Path | None = None,
) -> Pair:
    """Read a checkpoint, and build a student and a teacher.

    A dense model gets additional, randomly initialised score predictors; a dynamic one is trained further from its
    own. With a new head the dense model's logits mean nothing for the new classes. They are not distilled then, nor are
    LV-ViT's auxiliary logits: the token loss compares features, and LV-ViT's auxiliary head learns from the classes, as
    part of the logits of evaluation. A `teacher` of the new classes is distilled in full.

    Args:
        dense: the file to begin with.
        keep_rate: share r of patches kept by the first stage, above 0, below 1; the next two keep r**2 and r**3. None:
            the dynamic file's own.
        prune_at: 0-based indices of the blocks before which patches are dropped; None: those of the dynamic file, else
            evenly spaced.
        seed: seed of new weights, which are truncated normal (0.02) with zero bias, as in the official trainer.
        classes: names of the classes to learn; if they are as many as the model's, they are taken for the same ones.
            None: the model's own.
        new_head: whether to begin with a new head even so.
        teacher: a checkpoint of the same family, width and image size; None: the dense counterpart of `dense`.

    Raises:
        InputError: A file, a key or an argument is invalid.
    """
    start = _read_start(dense, keep_rate, prune_at, arch, image_size, dict(assume or {}))
    config, num_classes = start.config, start.config.num_classes if classes is None else len(classes)
    counterpart = build_reference(config, start.checkpoint)
    state = {key: value.clone() for key, value in counterpart.state_dict().items()}
    origin: dict[str, Any] = {"dense": digest(state)}
    generator = torch.Generator().manual_seed(seed)
    if not start.is_dynamic:
        state |= new_predictors(len(start.blocks), config.body.embed_dim, start.predictor_eps, generator)
    new_head = new_head or num_classes != config.num_classes
    heads = new_heads(state, num_classes, generator) if new_head else {}
    # Recognise the student as a reader of its file will, so that exactly that model is trained. (The file contains the
    # two given facts too; giving them makes error messages name the options.)
    args = start.args()
    content = Checkpoint(str(dense), state | heads, "model", metadata=args)
    student_config, _ = recognise(content, None, {"keep_rate": start.keep_rate, "prune_at": start.blocks}, {})
    if student_config.num_keep[-1] == student_config.num_patches:
        raise InputError(f"keep_rate: {start.keep_rate:g} drops none of the {student_config.num_patches} patches")
    student = build_reference(replace(student_config, weights=None), content)
    if teacher is None:
        _drop_predictors(counterpart)
        teaches, teacher_classes = counterpart, config.num_classes
    else:
        teaches, teacher_classes = _read_teacher(teacher, start, dict(assume or {}))
    distils_logits = teacher_classes == num_classes and not (new_head and teacher is None)
    origin |= {"new_head": new_head, "teacher": None if teacher is None else digest(teaches.state_dict())}
    for model in (student, teaches):
        model.fuse_attention()
        model.distil_features = not distils_logits
    if classes is not None:
        args["dvit_infer"]["classes"] = list(classes)
    remarks = [start.remark()] if start.is_dynamic else []
    if new_head:
        remarks.append(f"new head for {num_classes} classes ({dense} has {config.num_classes}): it learns from scratch")
    if not distils_logits:
        remarks.append(f"the teacher {teacher or dense} has other classes: its features are distilled, not its logits")
    elif start.is_dynamic or teacher is not None:
        remarks.append(f"the teacher is {teacher or f'{dense} without its predictors'}")
    new = (f"{predictor.KEY}.", *(f"{head}." for head in HEADS if f"{head}.weight" in heads))
    return Pair(student, teaches, student_config, args, start.notes, origin, new, distils_logits, remarks)


@dataclass(frozen=True)
class _Start:
    """The file to begin with, and what the student is to be."""

    name: str
    checkpoint: Checkpoint
    config: Config
    body: ViT
    notes: list[Note]
    is_dynamic: bool
    keep_rate: float
    blocks: tuple[int, ...]
    predictor_eps: float

    def args(self) -> dict[str, Any]:
        """Return the metadata of the student's file."""
        config, body = self.config, self.body
        return {
            "model": config.arch,
            "base_rate": self.keep_rate,
            "num_heads": body.num_heads,
            "prune_at": list(self.blocks),
            "skip_lam": body.skip_lam,
            "mean": list(config.mean),
            "std": list(config.std),
            "crop_pct": config.crop_pct,
            "crop_mode": config.crop_mode,
            "interpolation": config.interpolation,
            "dvit_infer": {
                "eps": body.eps,
                "predictor_eps": self.predictor_eps,
                "trained_size": config.image_size,
            },
        }

    def remark(self) -> str:
        found = f"keep rate {self.keep_rate:g}, before blocks {','.join(map(str, self.blocks))}"
        return f"{self.name} is dynamic: its predictors are trained further; {found}"


def _read_start(
    dense: str | Path,
    keep_rate: float | None,
    prune_at: Sequence[int] | None,
    arch: str | None,
    image_size: int | tuple[int, int] | None,
    given: dict[str, Any],
) -> _Start:
    """Read the checkpoint, recognise its dense counterpart, and resolve where the student prunes."""
    rate = None if keep_rate is None else predictor_rate("keep_rate", keep_rate)
    checkpoint = read_checkpoint(dense, given.get("weights"))
    is_dynamic = any(key.startswith(f"{predictor.KEY}.") for key in checkpoint.state)
    wanted = {"keep_rate": rate, "prune_at": prune_at} if is_dynamic else {}
    facts = given | {name: value for name, value in wanted.items() if value is not None}
    options = {"image_size": image_size, "method": "none" if is_dynamic else None}
    config, notes = recognise(checkpoint, arch, facts, options)
    body = config.body
    if not isinstance(body, ViT):
        raise InputError(f"{dense}: models of the family {config.family} cannot be trained here")
    if config.reduction.stages:
        raise InputError(
            f"{dense}: runs as {config.reduction.method}, which is not trained here; a dense model becomes a dynamic "
            "one: dvit-convert --method none writes it as that"
        )
    if is_dynamic:
        rate, eps = config.learned.keep_rate, dict(config.learned.settings)["predictor_eps"]
        blocks: Sequence[int] = config.learned.blocks
    else:
        eps = given.get("predictor_eps") or predictor.EPS
        evenly = tuple(body.depth * stage // (STAGES + 1) for stage in range(1, STAGES + 1))
        blocks = evenly if prune_at is None else tuple(prune_at)
    if rate is None:
        raise InputError(f"keep_rate: is needed, e.g. 0.7: {dense} is a dense model, whose file states none")
    if rate == 1:
        raise InputError("keep_rate: 1 keeps every patch, so there is nothing to learn; a number below 1 is expected")
    blocks = check.block_indices("prune_at", blocks, body.depth, len(blocks))
    eps = positive_float("predictor_eps", eps)
    return _Start(str(dense), checkpoint, config, body, notes, is_dynamic, rate, blocks, eps)


def _read_teacher(path: str | Path, start: _Start, given: dict[str, Any]) -> tuple[Reference, int]:
    """Return the dense model of a file, at the student's image size, and its number of classes."""
    config = start.config
    facts = {name: value for name, value in given.items() if name not in _OF_THE_START}
    checkpoint = read_checkpoint(path)
    found, _ = recognise(checkpoint, None, facts, {"image_size": config.image_size, "method": "none"})
    if (found.family, found.num_patches, found.body.embed_dim) != _tokens(config):
        tokens = f"{config.family}, {config.num_patches} patches, {config.body.embed_dim} channels"
        raise InputError(f"teacher: {path}: is {found.arch}, whose tokens are not those of {start.name} ({tokens})")
    if (found.mean, found.std) != (config.mean, config.std):
        raise InputError(f"teacher: {path}: has another mean or std than {start.name}; --assume sets those of both")
    model = build_reference(found, checkpoint)
    _drop_predictors(model)
    return model, found.num_classes


def _drop_predictors(model: Reference) -> None:
    if isinstance(model, VisionTransformer):
        model.score_predictor = None


_OF_THE_START = ("weights", "keep_rate", "prune_at", "predictor_eps")


def _tokens(config: Config) -> tuple[str, int, int]:
    return config.family, config.num_patches, config.body.embed_dim


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
