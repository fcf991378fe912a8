"""The registry of checkpoint families: recognise a checkpoint, read its config, build its reference model."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.models.arch import ARCHS
from dvit_infer.models.checkpoint import Checkpoint
from dvit_infer.models.header import WEIGHT_SETS
from dvit_infer.models.reading import Note, Reading
from dvit_infer.models.vit.pos_embed import resample_pos_embed
from dvit_infer.models.vit.read import DEIT, LVVIT
from dvit_infer.models.vit.reference import VisionTransformer

_FAMILIES = (LVVIT, DEIT)  # LV-ViT first: it has all keys of a DeiT


def list_archs() -> list[str]:
    """Return the names that `arch` accepts."""
    return list(ARCHS)


def recognise(
    checkpoint: Checkpoint, arch: str | None, given: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Config, list[Note]]:
    """Recognise the model in a checkpoint.

    Args:
        checkpoint: weights and metadata.
        arch: one of `list_archs()` to check the file against, or None to recognise it.
        given: facts that override the file and every assumption (`models.reading.ASSUMABLE`).
        options: `image_size` and `method`, or None for each.

    Returns:
        The config, and a note for each fact read, assumed or given.

    Raises:
        InputError: the keys belong to no known family, or a fact is impossible; the message names the key or option.
    """
    if arch is not None and (not isinstance(arch, str) or arch not in ARCHS):
        raise InputError(f"arch: {arch!r} does not exist; these do: {', '.join(ARCHS)}")
    reading = Reading(checkpoint, given)
    if checkpoint.weights is not None:
        others = f"; also there: {', '.join(checkpoint.other_sets)}" if checkpoint.other_sets else ""
        reading.note(
            "given" if given.get("weights") else "read", "weights", checkpoint.weights, f"key in the file{others}"
        )
    family = next((f for f in _FAMILIES if f.matches(reading.shapes)), None)
    if family is None:
        first = next(iter(reading.shapes))
        raise InputError(f"{checkpoint.name}: of no known family (first key {first}); known: {', '.join(ARCHS)}")
    if arch is not None and ARCHS[arch].family != family.name:
        raise InputError(f"arch: {arch} was asked for, but the keys of {checkpoint.name} are those of {family.name}")
    saved_as = checkpoint.metadata.get("weights") if checkpoint.is_saved_engine else None
    weights = checkpoint.weights or (saved_as if saved_as in WEIGHT_SETS else None)
    config = replace(family.read(reading, arch, options), weights=weights)
    if checkpoint.is_saved_engine:
        _check_header(checkpoint, config, {*given, *(name for name, value in options.items() if value is not None)})
    return config, reading.notes


def _check_header(checkpoint: Checkpoint, config: Config, overridden: set[str]) -> None:
    """Check that header and weights of a saved file agree in every fact that was not overridden.

    The name may differ: an unnamed size may get a name later.
    """
    for name, value in asdict(config).items():
        stated = checkpoint.metadata[name]
        if name not in {"arch", *overridden} and value != (tuple(stated) if isinstance(stated, list) else stated):
            raise InputError(
                f"{checkpoint.name}: its header says {name} is {str(stated)[:40]}, its weights say {value}"
            )


def build_reference(config: Config, checkpoint: Checkpoint) -> VisionTransformer:
    """Return the reference model with the checkpoint's weights, in float32, on the CPU, in evaluation mode.

    Raises:
        InputError: a key is missing or unexpected, or its shape does not match the config.
    """
    family = next(f for f in _FAMILIES if config.family == f.name)
    with torch.device("meta"):
        model: VisionTransformer = family.reference(config)
    _check(checkpoint, {key: tuple(value.shape) for key, value in model.state_dict().items()}, config)
    state = {k: v.float() if v.is_floating_point() else v for k, v in checkpoint.state.items()}
    state["pos_embed"] = resample_pos_embed(state["pos_embed"], config.num_prefix, config.trained_grid, config.grid)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _check(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], config: Config) -> None:
    found = {key: tuple(value.shape) for key, value in checkpoint.state.items()}
    rows, width = config.trained_grid[0] * config.trained_grid[1] + config.num_prefix, config.embed_dim
    expected = {**expected, "pos_embed": (1, rows, width)}
    for key in expected:
        if key not in found:
            raise InputError(f"{checkpoint.name}: missing key {key}, which {config.arch} has")
    for key in found:
        if key not in expected:
            raise InputError(f"{checkpoint.name}: unexpected key {key}, which {config.arch} does not have")
    for key, shape in expected.items():
        if found[key] != shape:
            others = sorted(k for k in found if "head" in k and k != key and found[k][:1] == shape[:1])
            # Either of two tensors that disagree may be the wrong one: name both.
            because = f", as {others[0]} has {shape[0]} rows" if "head" in key and others else ""
            raise InputError(f"{checkpoint.name}: {key} has shape {found[key]}, {shape} is expected{because}")
