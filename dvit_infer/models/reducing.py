"""Resolve which tokens of a model stay: the method, its settings, its stages."""

from collections.abc import Mapping
from typing import Any

from dvit_infer.config import Reduction, Setting
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.reading import Reading
from dvit_infer.reduction import Method, methods_of
from dvit_infer.reduction.settings import Trunk

STAGES = 3  # of a method without weights, if there are as many blocks


def read_reductions(
    read: Reading, asked: Any, trunk: Trunk, learned: str | None = None, count: int = 0
) -> tuple[Reduction, Reduction]:
    """Return the reduction that runs and the one whose modules are among the weights.

    Args:
        read: the facts; each one used gets a note.
        asked: the method that was requested, or None.
        trunk: what methods may know about the model.
        learned: the method whose modules are among the weights; None: there are none.
        count: the number of these modules, one per stage.

    Raises:
        InputError: a method, a setting or a block is impossible, or means nothing for the method.
    """
    known = methods_of(trunk)
    method = _method(read, asked, learned, count, known)
    read.use_reduction(method)
    _check_given(read, method, learned, known)
    if method in ("none", learned):
        own = Reduction() if learned is None else _resolved(read, learned, trunk, count, asked is not None)
        return (Reduction() if method == "none" else own), own
    runs = _resolved(read, method, trunk, None, asked is not None)
    return runs, Reduction() if learned is None else _unasked(read, learned, trunk, count)


def _check_given(read: Reading, method: str, learned: str | None, known: Mapping[str, Method]) -> None:
    """Raise InputError for a setting that the caller gave and the method has not."""
    runs = known.get(learned or method) if method == "none" else known[method]
    key = None if learned is None else known[learned].KEY
    for what in ("prune_at", *dict.fromkeys(name for one in known.values() for name in one.SETTINGS)):
        if read.given.get(what) is None or (runs is not None and _takes(runs, what)):
            continue
        owners = [name for name, one in known.items() if _takes(one, what) and one.KEY in (None, key)]
        if not owners and all(one.KEY is not None for one in known.values()):
            raise InputError(f"{what}: {read.name} holds no score predictors, so it runs dense")
        if not owners:
            continue  # that of predictors alone
        many = f"method {owners[0]}" if len(owners) == 1 else f"methods {', '.join(owners[:-1])} and {owners[-1]}"
        if method == "none":
            without = "method none" if learned else f"{read.name} holds no score predictors, so it"
            raise InputError(f"{what}: {without} runs dense; {many} {'takes' if len(owners) == 1 else 'take'} it")
        instead = ", ".join(name for name in (*known[method].SETTINGS, "prune_at") if _takes(known[method], name))
        raise InputError(f"{what}: is for {many}, not {method}, which takes {instead}")


def _takes(method: Method, what: str) -> bool:
    return not method.EVERY_BLOCK if what == "prune_at" else what in method.SETTINGS


def _method(read: Reading, given: Any, learned: str | None, count: int, known: Mapping[str, Method]) -> str:
    if given is not None:
        method = check.method("method", given, learned, read.name, known)
        read.note("given", "method", method, "by you")
    elif read.states("method"):
        stated, why = read.stated("method")
        method = check.method(f"{read.name}: method", stated, learned, read.name, known)
        read.note("read", "method", method, why)
    else:
        method = learned or "none"
        read.note("read", "method", method, f"keys: {count or 'no'} score predictors")
    return method


def _stored_as(name: str) -> str | None:
    """Return the name of a setting in the official trainer's args, where it is another."""
    return "base_rate" if name == "keep_rate" else None


def _evenly(depth: int, count: int) -> tuple[int, ...]:
    return tuple(depth * (s + 1) // (count + 1) for s in range(count))


def _usual_blocks(trunk: Trunk, count: int | None) -> tuple[int, ...]:
    """Return where `count` stages are that nothing states; None: of a method that needs no certain number."""
    if trunk.blocks:
        return trunk.blocks
    return tuple(dict.fromkeys(_evenly(trunk.depth, STAGES))) if count is None else _evenly(trunk.depth, count)


def _resolved(read: Reading, method: str, trunk: Trunk, count: int | None, is_given: bool) -> Reduction:
    """Return a reduction by given facts, else by the file's, else by defaults.

    Args:
        read, trunk: as for `read_reductions`.
        method: its method.
        count: the number of stages that there have to be; None: any.
        is_given: whether the caller gave the method.
    """
    runs, depth = methods_of(trunk)[method], trunk.depth
    known = runs.SETTINGS
    found = {
        name: read.resolve(name, one.default(trunk), one.why, stored_as=_stored_as(name)) for name, one in known.items()
    }
    blocks = tuple(range(depth))
    if not runs.EVERY_BLOCK:
        usual = _usual_blocks(trunk, count)
        why = f"{depth} blocks in {len(usual) + 1} equal parts" if not trunk.blocks else trunk.why_blocks
        asked = read.resolve("prune_at", usual, why)
        blocks = check.block_indices(read.origin("prune_at"), asked, depth, count)
    settings = {name: known[name].check(read.origin(name), value) for name, value in found.items()}
    if (fault := runs.why_not(settings, trunk)) is not None:
        raise InputError(f"{'method' if is_given else f'{read.name}: method'}: {method!r} {fault}")
    return _reduction(method, settings, blocks, trunk)


def _unasked(read: Reading, method: str, trunk: Trunk, count: int) -> Reduction:
    """Return the reduction of the weights' own modules while another one runs: by the file, without notes."""
    if read.stored is not None and read.stored.learned.method == method:
        learned = read.stored.learned
        return _reduction(method, dict(learned.settings), learned.blocks, trunk)
    known = methods_of(trunk)[method].SETTINGS
    found = {name: read.value_of(name, _stored_as(name)) for name in known}
    settings = {
        name: one.default(trunk) if found[name] is None else one.check(f"{read.name}: {name}", found[name])
        for name, one in known.items()
    }
    stated = read.value_of("prune_at") or _usual_blocks(trunk, count)
    blocks = check.block_indices(f"{read.name}: prune_at", stated, trunk.depth, count)
    return _reduction(method, settings, blocks, trunk)


def _reduction(method: str, settings: Mapping[str, Setting], blocks: tuple[int, ...], trunk: Trunk) -> Reduction:
    known, patches = methods_of(trunk)[method], trunk.num_patches
    return Reduction(method, known.stages(settings, blocks, patches), tuple(settings.items()), patches, known.MERGES)


def check_counts(read: Reading, reduction: Reduction, image_size: tuple[int, int], size_is_given: bool) -> None:
    """Raise InputError if a stage keeps no token."""
    for stage, count in enumerate(s.keep for s in reduction.stages):
        if count == 0:
            what = "image_size" if size_is_given and read.given.get("keep_rate") is None else read.origin("keep_rate")
            counts = f"{reduction.num_patches} of a {image_size[0]}x{image_size[1]} image"
            rate = f"a keep rate of {reduction.keep_rate:g}"
            raise InputError(f"{what}: {rate} leaves no patch token of the {counts} at stage {stage}")
