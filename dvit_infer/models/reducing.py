"""Resolve which tokens of a model stay: the method, its settings, its stages."""

from collections.abc import Mapping
from typing import Any

from dvit_infer.config import Reduction
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.reading import Reading
from dvit_infer.reduction import METHODS

STAGES = 3  # of a method without weights


def read_reductions(
    read: Reading, asked: Any, depth: int, num_patches: int, learned: str | None = None, count: int = 0
) -> tuple[Reduction, Reduction]:
    """Return the reduction that runs and the one whose modules are among the weights.

    Args:
        read: the facts; each one used gets a note.
        asked: the method that was requested, or None.
        depth: the number of blocks.
        num_patches: the number of patch tokens before the first stage.
        learned: the method whose modules are among the weights; None: there are none.
        count: the number of these modules, one per stage.

    Raises:
        InputError: a method, a setting or a block is impossible.
    """
    method = _method(read, asked, learned, count)
    read.use_reduction(method)
    if method == "none" and learned is None:
        for what in ("keep_rate", "prune_at"):
            if read.given.get(what) is not None:
                raise InputError(f"{what}: {read.name} holds no score predictors, so no tokens can be pruned")
    if method in ("none", learned):
        own = Reduction() if learned is None else _resolved(read, learned, depth, num_patches, count)
        return (Reduction() if method == "none" else own), own
    runs = _resolved(read, method, depth, num_patches, None)
    return runs, Reduction() if learned is None else _unasked(read, learned, depth, num_patches, count)


def _method(read: Reading, given: Any, learned: str | None, count: int) -> str:
    if given is not None:
        method = check.method("method", given, learned, read.name)
        read.note("given", "method", method, "by you")
    elif (stated := read.metadata.get("method")) is not None:
        method = check.method(f"{read.name}: method", stated, learned, read.name)
        read.note("read", "method", method, f"{read.metadata_source}: method")
    else:
        method = learned or "none"
        read.note("read", "method", method, f"keys: {count or 'no'} score predictors")
    return method


def _stored_as(name: str) -> str | None:
    """Return the name of a setting in the official trainer's args, where it is another."""
    return "base_rate" if name == "keep_rate" else None


def _evenly(depth: int, count: int) -> tuple[int, ...]:
    return tuple(depth * (s + 1) // (count + 1) for s in range(count))


def _resolved(read: Reading, method: str, depth: int, num_patches: int, count: int | None) -> Reduction:
    """Return a reduction by given facts, else by the file's, else by defaults; `count`: stages there have to be."""
    stages = STAGES if count is None else count
    found = {
        name: read.resolve(name, *default, stored_as=_stored_as(name))
        for name, default in METHODS[method].SETTINGS.items()
    }
    asked = read.resolve("prune_at", _evenly(depth, stages), f"{depth} blocks in {stages + 1} equal parts")
    blocks = check.block_indices(read.origin("prune_at"), asked, depth, count)
    settings = {name: check.SETTINGS[name](read.origin(name), value) for name, value in found.items()}
    return _reduction(method, settings, blocks, num_patches)


def _unasked(read: Reading, method: str, depth: int, num_patches: int, count: int) -> Reduction:
    """Return the reduction of the weights' own modules while another one runs: by the file, without notes."""
    if read.stored is not None and read.stored.learned.method == method:
        learned = read.stored.learned
        return _reduction(method, dict(learned.settings), learned.blocks, num_patches)
    defaults = {name: default for name, (default, _) in METHODS[method].SETTINGS.items()}
    found = {name: read.value_of(name, _stored_as(name)) for name in defaults}
    settings = {
        name: default if found[name] is None else check.SETTINGS[name](f"{read.name}: {name}", found[name])
        for name, default in defaults.items()
    }
    stated = read.value_of("prune_at") or _evenly(depth, count)
    blocks = check.block_indices(f"{read.name}: prune_at", stated, depth, count)
    return _reduction(method, settings, blocks, num_patches)


def _reduction(method: str, settings: Mapping[str, float], blocks: tuple[int, ...], num_patches: int) -> Reduction:
    stages = METHODS[method].stages(settings, blocks, num_patches)
    return Reduction(method, stages, tuple(settings.items()), num_patches)


def check_counts(read: Reading, reduction: Reduction, image_size: tuple[int, int], size_is_given: bool) -> None:
    """Raise InputError if a stage keeps no token."""
    for stage, count in enumerate(s.keep for s in reduction.stages):
        if count == 0:
            what = "image_size" if size_is_given and read.given.get("keep_rate") is None else read.origin("keep_rate")
            counts = f"{reduction.num_patches} of a {image_size[0]}x{image_size[1]} image"
            rate = f"a keep rate of {reduction.keep_rate:g}"
            raise InputError(f"{what}: {rate} leaves no patch token of the {counts} at stage {stage}")
