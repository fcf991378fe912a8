"""Read what all models of four stages have: which positions take the MLPs, sizes, how images are prepared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dvit_infer.config import Config, Size
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.hierarchical.body import STAGES, Hierarchical
from dvit_infer.models.inputs import read_inputs
from dvit_infer.models.reading import Reading
from dvit_infer.models.reducing import check_counts, read_reductions
from dvit_infer.reduction.settings import Trunk

_WARPED_FROM = 384  # pixels: DynamicViT's, Swin's and ConvNeXt's own evaluation warps larger images


@dataclass(frozen=True)
class Arch:
    """A named size."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...] = ()
    num_predictors: int = 0


def depths_of(read: Reading, stages: str, blocks: str) -> tuple[int, ...]:
    """Return the number of blocks of each stage.

    Args:
        read: the facts.
        stages: what stands before a stage's number.
        blocks: what stands between it and a block's.

    Raises:
        InputError: there are other than four stages, or one is empty.
    """
    count = read.count(stages)
    depths = tuple(read.count(f"{stages}{stage}.{blocks}") for stage in range(count))
    if count != STAGES or 0 in depths:
        shown = ", ".join(map(str, depths))
        raise InputError(f"{read.name}: has {count} stages of {shown} blocks; {STAGES} with blocks are expected")
    return depths


def named(read: Reading, kind: str, archs: Mapping[str, Arch], found: Arch, classes: int, given: str | None) -> str:
    """Return the name of a size, or one made of width and depth; note it.

    Raises:
        InputError: the requested one is another.
    """
    name = next((name for name, arch in archs.items() if _sizes(arch) == _sizes(found)), None)
    if given is not None and given != name:
        raise InputError(f"arch: {given} was requested, but {read.name} is {name or _shown(found)}")
    if given is not None:
        read.note("given", "arch", given, "by you; keys and shapes are checked against it")
        return given
    sizes = f"{','.join(map(str, found.dims))} wide, {','.join(map(str, found.depths))} blocks"
    counts = f"{sizes}, {classes} classes, {found.num_predictors} predictors"
    dynamic = "dynamic" if found.num_predictors else ""
    name = name or f"{dynamic}{kind}-{found.dims[0]}x{sum(found.depths)}"
    read.note("read", "arch", name, f"keys and shapes: {counts}")
    return name


def _sizes(arch: Arch) -> tuple[object, ...]:
    return arch.dims, arch.depths, arch.heads, bool(arch.num_predictors)


def _shown(arch: Arch) -> str:
    return f"{','.join(map(str, arch.dims))} wide with {','.join(map(str, arch.depths))} blocks"


def num_classes_of(read: Reading) -> int:
    """Return the number of classes; 0: there is no head."""
    if not any(key.startswith("head.") for key in read.shapes):
        return 0
    return read.vote("the classes", [("head.weight", 0), ("head.bias", 0)])


def num_fast_of(read: Reading, has_fast: Sequence[bool], predictors: int) -> int:
    """Return the number of blocks, the last ones of the third stage, that have a second branch.

    Raises:
        InputError: there are predictors without such blocks, or the reverse.
    """
    first = has_fast.index(True) if any(has_fast) else len(has_fast)
    if bool(predictors) != any(has_fast):
        has = f"{predictors} score predictors" if predictors else "no score predictors"
        what = "blocks with a fast path" if any(has_fast) else "no block with a fast path"
        raise InputError(f"{read.name}: holds {has}, but {what}")
    return len(has_fast) - first


def image_size_of(read: Reading, given: Any, trained: Size, body: Hierarchical) -> Size:
    """Return the size that the model runs at: the caller's, the file's, or the trained one."""
    if given is not None:
        size = check.image_size_of("image_size", given, body)
        read.note("given", "image_size", size, "by you")
    elif read.states("image_size"):
        value, why = read.stated("image_size")
        size = check.image_size_of(f"{read.name}: image_size of {why}", value, body)
        read.note("read", "image_size", size, why)
    else:
        size = check.image_size_of("trained_size", trained, body)
        read.note("assumed", "image_size", size, "as trained")
    return size


def finished_config(
    read: Reading,
    options: Mapping[str, Any],
    *,
    body: Hierarchical,
    image_size: Size,
    predictors: int,
    predictor_eps: float,
    **facts: Any,
) -> Config:
    """Return the config of a body: resolve which positions take the MLPs and how images are prepared.

    Raises:
        InputError: an option is impossible, or means nothing for the model.
    """
    rows, columns = body.grid(image_size)
    blocks, why = _blocks(body, predictors)
    trunk = Trunk(
        body.depth,
        body.embed_dim,
        rows * columns,
        routes=True,
        blocks=blocks,
        why_blocks=why,
        predictor_eps=predictor_eps,
    )
    learned_by = "predictor" if predictors else None
    reduction, learned = read_reductions(read, options.get("method"), trunk, learned_by, predictors)
    if learned.stages and learned.blocks[0] < body.first_fast:
        raise InputError(
            f"{read.origin('prune_at')}: block {learned.blocks[0]} of the third stage has no fast path; "
            f"blocks from {body.first_fast} on have one"
        )
    implied = "the score predictors are of DynamicViT's trainer" if predictors else None
    config = Config(
        body=body,
        image_size=image_size,
        reduction=reduction,
        learned=learned,
        **facts,
        **read_inputs(read, implied),
    )
    read.finish(config.arch, body)
    check_counts(read, reduction, image_size, options.get("image_size") is not None)
    return config


def _blocks(body: Hierarchical, predictors: int) -> tuple[tuple[int, ...], str]:
    """Return where the predictors stand: the first fast path shows where the first one does.

    In the published models the others follow at twice and three times that number.
    """
    first = body.first_fast
    blocks = tuple(first * (s + 1) for s in range(predictors))
    if not predictors or not first or blocks[-1] >= body.depth:
        return (), ""
    return blocks, f"the first fast path is in block {first}; the others as in DynamicViT's models"


def crop_pct(config: Config) -> float | None:
    """Return 0.875; larger images are warped without cropping (DynamicViT's `datasets.py`, Swin's, ConvNeXt's)."""
    return None if min(config.image_size) >= _WARPED_FROM else 0.875
