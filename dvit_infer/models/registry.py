"""The registry of families: recognise a checkpoint, read its config, build its reference model and graph."""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import nn

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.models.checkpoint import Checkpoint
from dvit_infer.models.convnext.family import CONVNEXT
from dvit_infer.models.facts import text_of
from dvit_infer.models.family import Family
from dvit_infer.models.header import read_header
from dvit_infer.models.kinds import describe
from dvit_infer.models.reading import Note, Reading
from dvit_infer.models.reference import Reference
from dvit_infer.models.saved import saved_config
from dvit_infer.models.swin.family import SWIN
from dvit_infer.models.trained_as import EVIT, evit_facts, other_method
from dvit_infer.models.vit.families import DEIT, LVVIT, VIT
from dvit_infer.models.vit.timm_config import arch_of, timm_facts
from dvit_infer.reduction import SETTINGS

FAMILIES: tuple[Family, ...] = (SWIN, CONVNEXT, LVVIT, VIT, DEIT)  # the first one that matches


def list_archs() -> list[str]:
    """Return the names that `arch` accepts."""
    return [name for family in FAMILIES for name in family.archs]


def family_of(config: Config) -> Family:
    return next(family for family in FAMILIES if family.name == config.family)


def config_of(name: str, header: str) -> Config:
    """Return the config in the header of the file `name`.

    Raises:
        InputError: the header has another version, or its values are impossible.
    """
    return saved_config(name, read_header(name, header), {family.name: family.body for family in FAMILIES})


def recognise(
    checkpoint: Checkpoint, arch: str | None, given: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Config, list[Note]]:
    """Recognise the model in a checkpoint.

    Args:
        checkpoint: weights and metadata.
        arch: one of `list_archs()`, timm's also with a tag, to check the file against, or None to recognise it.
        given: facts that override the file and every assumption (`models.reading.ASSUMABLE`).
        options: `image_size` and `method`, or None for each.

    Returns:
        The config, and a note for each fact read, assumed or given.

    Raises:
        InputError: the keys belong to no known family, or a fact is impossible; the message names the key or option.
    """
    arch = _known_arch(arch)
    stored = None if checkpoint.header is None else config_of(checkpoint.name, checkpoint.header)
    reading = Reading(checkpoint, given, stored)
    if arch in VIT.archs:
        reading.take_as_given(timm_facts({"architecture": arch}))
    if checkpoint.weights is not None:
        others = f"; also there: {', '.join(checkpoint.other_sets)}" if checkpoint.other_sets else ""
        reading.note(
            "given" if given.get("weights") else "read", "weights", checkpoint.weights, f"key in the file{others}"
        )
    if checkpoint.owner is not None:
        reading.note("read", "names", checkpoint.whose, f"its keys become {checkpoint.renamed}")
    for what, why in checkpoint.left_over:
        reading.note("read", text_of(what), "not used", why)
    known = describe(reading.shapes) if stored is None else None
    if known is not None:
        raise InputError(
            f"{checkpoint.name}: is {known[0]} (key {known[1]}), which is not read yet; plain vision transformers, "
            "Swin and ConvNeXt are"
        )
    family = next((f for f in FAMILIES if f.matches(reading)), None)
    if family is None:
        first = next(iter(reading.shapes))
        own = ", ".join(own_archs())
        raise InputError(
            f"{checkpoint.name}: of no known family (first key {first}); known: {own}, and other plain vision "
            "transformers under their owners' names"
        )
    if arch in VIT.archs:
        arch = None  # its facts are known by now
    elif arch is not None and arch not in family.archs:
        raise InputError(f"arch: {arch} was requested, but the keys of {checkpoint.name} are those of {family.name}")
    if checkpoint.skipped:
        names = ", ".join(text_of(name) for name in checkpoint.skipped[:5])
        more = f" and {len(checkpoint.skipped) - 5} more" if len(checkpoint.skipped) > 5 else ""
        reading.notes.append(Note("read", "skipped", names + more, "no weights: beside them in the file"))
    if stored is None:
        _check_method(reading, checkpoint.metadata, options.get("method"))
    weights = checkpoint.weights or (None if stored is None else stored.weights)
    ranges = () if stored is None else stored.ranges
    config = replace(family.read(reading, arch, options), weights=weights, ranges=ranges)
    if config.crop_pct is None:
        crop = None if config.crop_mode == "squash" else family.crop_pct(config)
        if crop is None and given.get("crop_mode") not in (None, "squash"):
            raise InputError(f"crop_mode: {family.name} warps images of this size; assume crop_pct too, 0.875 say")
        how: Literal["read", "assumed"] = "assumed" if "crop_pct" in config.assumed else "read"
        whose = "crop_mode squash" if config.crop_mode == "squash" else f"{family.name}'s"
        reading.note(how, "crop_pct", "none, images are warped" if crop is None else crop, whose)
    if stored is not None:
        overridden = {*given, *(name for name, value in options.items() if value is not None)}
        _check_header(checkpoint.name, stored, config, overridden)
    return config, reading.notes


def _known_arch(arch: Any) -> str | None:
    """Return one of `list_archs()`, or None if none is given; timm's names may have a tag, or be names of before."""
    if arch is None or (isinstance(arch, str) and arch in list_archs()):
        return arch
    try:
        name, facts = arch_of(str(arch))
    except InputError:
        name, facts = "", {}
    if name in VIT.archs:
        return name
    if name:
        raise InputError(f"arch: {name} is not supported: {facts['unsupported']}")
    nearest = difflib.get_close_matches(str(arch)[:100], VIT.archs, n=3)
    timms = f", the nearest: {', '.join(nearest)}" if nearest else ""
    raise InputError(
        f"arch: {arch!r} does not exist; these do: {', '.join(own_archs())}, and timm's names of plain vision "
        f"transformers{timms}"
    )


def own_archs() -> list[str]:
    """Return the names of sizes that are this project's own, not timm's."""
    return [name for family in (DEIT, LVVIT, SWIN, CONVNEXT) for name in family.archs]


def _check_method(reading: Reading, args: Mapping[str, Any], asked: Any) -> None:
    """Take the method that the file was trained with, if it is another function than its keys describe.

    Raises:
        InputError: there is no such method here, and none is given.
    """
    other = other_method(args, reading.shapes)
    if other is None:
        return
    if other == EVIT:
        facts = evit_facts(args)
        reading.take_trained(facts, [what for what, (_, where) in facts.items() if not where.startswith("the file's")])
        if asked is None or asked == "evit":
            _note_evit(reading, facts["method"][1])
            return
    elif asked is None:
        raise InputError(
            f"{reading.name}: was trained as {other}: another function than the model that its keys describe; "
            "dvit-convert --method none (method='none') takes it as the dense one"
        )
    reading.note("given", "trained as", other, f"another function than this, which you gave: method {asked}")


def _note_evit(reading: Reading, where: str) -> None:
    reading.note("read", "trained as", EVIT, where)
    if "dist_token" in reading.shapes:
        reading.note("read", "dist_token", "always kept", "as every prefix token here; EViT's own code may drop it")


def _check_header(name: str, stored: Config, config: Config, overridden: set[str]) -> None:
    """Check that header and weights of a saved file agree in every fact that was not overridden.

    The name may differ: an unnamed size may get a name later.
    """
    if counts := overridden & {"prune_at", "image_size", *SETTINGS}:
        overridden = overridden | {"learned"}
    if counts or "method" in overridden:
        overridden = overridden | {"reduction"}
    compared = [(f.name, getattr(stored, f.name), getattr(config, f.name)) for f in fields(Config) if f.name != "body"]
    mine = vars(config.body)
    compared += [(key, value, mine.get(key)) for key, value in vars(stored.body).items()]
    for what, stated, found in compared:
        if what not in {"arch", "assumed", *overridden} and stated != found:
            raise InputError(f"{name}: its header says {what} is {str(stated)[:40]}, its weights say {found}")


def build_reference(config: Config, checkpoint: Checkpoint, *, take: bool = False) -> Reference:
    """Return the reference model with the checkpoint's weights, in float32, on the CPU, in evaluation mode.

    With `take`, they are taken out of the checkpoint, so that nothing else holds them.

    Raises:
        InputError: a key is missing or unexpected, or its shape does not match the config.
    """
    family = family_of(config)
    with torch.device("meta"):
        as_trained = family.reference(replace(config, image_size=config.trained_size))
        model = family.reference(config)
    _check(checkpoint, {key: tuple(value.shape) for key, value in as_trained.state_dict().items()}, config.arch)
    state = {}
    for key in list(checkpoint.state):
        value = checkpoint.state.pop(key) if take else checkpoint.state[key]
        state[key] = value.float() if value.is_floating_point() else value
    model.load_state_dict(family.resized(state, config), strict=True, assign=True)
    return model.eval()


def unused_keys(config: Config) -> str | None:
    """Return a pattern for the weights of a reduction that does not run, or None if there are none."""
    learned = config.learned.method
    return None if learned in ("none", config.reduction.method) else family_of(config).of_reduction


def build_graph(model: nn.Module, config: Config) -> Graph:
    """Return the graph of a reference model in evaluation, with unchanged weights; nothing is folded yet."""
    return Graph(config, tuple(family_of(config).graph(model, config)))


def outline(config: Config) -> Graph:
    """Return the graph of a config, whose weights have shapes only."""
    return outliner(config)(config)


def outliner(config: Config) -> Callable[[Config], Graph]:
    """Return a function that returns the `outline` of configs that differ from this one in their reduction only."""
    with torch.device("meta"):
        model = family_of(config).reference(config)

    def outlined(reduced: Config) -> Graph:
        with torch.device("meta"):
            return build_graph(model, reduced)

    return outlined


def _check(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]], arch: str) -> None:
    found = {key: tuple(value.shape) for key, value in checkpoint.state.items()}
    for key in expected:
        if key not in found:
            raise InputError(f"{checkpoint.name}: missing key {checkpoint.in_file(key)}, which {arch} has")
    for key in found:
        if key not in expected:
            raise InputError(f"{checkpoint.name}: unexpected key {checkpoint.in_file(key)}, which {arch} does not have")
    for key, shape in expected.items():
        if found[key] != shape:
            others = sorted(k for k in found if "head" in k and k != key and found[k][:1] == shape[:1])
            # Either of two tensors that disagree may be the wrong one: name both.
            because = f", as {others[0]} has {shape[0]} rows" if "head" in key and others else ""
            raise InputError(
                f"{checkpoint.name}: {checkpoint.in_file(key)} has shape {found[key]}, {shape} is expected{because}"
            )
