"""Read the sizes of a plain ViT: patches, the grid of its position embedding, images."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.reading import Reading

T = TypeVar("T")


def patch_size_of(read: Reading, of_kernel: int) -> int:
    height, width = read.shape("patch_embed.proj.weight", 4)[2:]
    if height != width:
        raise InputError(
            f"{read.name}: patch_embed.proj.weight has a {height}x{width} kernel; a square one is expected"
        )
    read.note("read", "patch_size", height * of_kernel, "shape of patch_embed.proj.weight")
    return height * of_kernel


def trained_size_of(read: Reading, num_prefix: int, patch: int) -> tuple[tuple[int, int], bool]:
    """Return the size that the position embedding was trained for, and whether it lacks rows for the prefix tokens.

    Of n and n - 1 or n - 2 rows at most one is a square number, so that the rows of a square grid say which it is.
    """
    rows = read.shape("pos_embed", 3)[1]
    patches, side = rows - num_prefix, math.isqrt(rows)
    alone = _no_embed_class(read)  # None: not stated
    layouts = {count: bare for count, bare in ((num_prefix, False), (0, True)) if alone in (None, bare)}
    if (stated_fit := _of_stated_size(read, rows, patch, layouts)) is not None:
        return stated_fit
    if not read.states("trained_size"):
        fits = [bare for bare in (False, True) if alone in (None, bare) and check.is_square(rows if bare else patches)]
        if not fits:
            raise InputError(
                f"{read.name}: pos_embed has {patches} patch positions, or {rows} if none is the class token's, no "
                "square grid; assume trained_size=HxW says which"
            )
        side = math.isqrt(rows if fits[0] else patches) * patch
        without = f", none for the class token (DeiT III's layout: {rows} rows)" if fits[0] else ""
        grid_of = f"{rows if fits[0] else patches} positions, a square grid"
        read.note("read", "trained_size", (side, side), f"pos_embed: {grid_of}{without}")
        return (side, side), fits[0]
    value = read.resolve("trained_size", None, "")
    what = read.origin("trained_size")
    height, width = check.image_size(what, value, patch)
    stated = (height // patch) * (width // patch)
    if stated == rows and alone is not False:
        read.note("read", "pos_embed", "patches alone", f"its {rows} rows are those patches; the class token has none")
        return (height, width), True
    if stated == patches and alone is not True:
        if alone is None and read.given.get("trained_size") is not None and check.is_square(rows):
            raise InputError(
                f"{what}: {height}x{width} has {patches} patches, but the {rows} rows of pos_embed are also "
                f"{side}x{side} patches without a row for the class token, as DeiT III's, that is "
                f"{side * patch}x{side * patch}; assume no_embed_class=0 too if they are not"
            )
        return (height, width), False
    raise InputError(
        f"{what}: {height}x{width} has {stated} patches, other than the {patches} patches of pos_embed, and other "
        f"than {rows} without a row for the class token"
    )


def _no_embed_class(read: Reading) -> bool | None:
    """Return whether it is stated that the prefix tokens have no positions; None: it is not."""
    value = read.resolve_if_known("no_embed_class")
    if value not in (None, 0, 1):
        raise InputError(f"{read.origin('no_embed_class')}: {value!r} is not 0 or 1")
    return None if value is None else bool(value)


def _of_stated_size(read: Reading, rows: int, patch: int, layouts: Mapping[int, T]) -> tuple[tuple[int, int], T] | None:
    """Return the size of images that a file states, and what the layout means, if the position embedding is for it.

    Args:
        read: the facts.
        rows: of the position embedding.
        patch: pixels per side of a patch.
        layouts: by the number of rows that are not the patches'.
    """
    if read.states("trained_size") or not read.states("image_size"):
        return None
    value, where = read.stated("image_size")
    try:
        size = check.image_size("image_size", value, patch)
    except InputError:
        return None  # who runs it there hears of it
    others = rows - (size[0] // patch) * (size[1] // patch)
    if others not in layouts:
        return None
    read.note("read", "trained_size", size, f"{where}, and pos_embed has the rows for it")
    return size, layouts[others]


def image_size_of(read: Reading, given: Any, trained: tuple[int, int], patch: int) -> tuple[int, int]:
    if given is not None:
        size = check.image_size("image_size", given, patch)
        read.note("given", "image_size", size, "by you")
    elif read.states("image_size"):
        value, why = read.stated("image_size")
        size = check.image_size(f"{read.name}: image_size of {why}", value, patch)
        read.note("read", "image_size", size, why)
    else:
        return trained
    return size


def note_resampled(
    read: Reading, rule: str, trained: tuple[int, int], size: tuple[int, int], what: str = "pos_embed"
) -> None:
    if size != trained:
        read.note("read", what, "resampled", f"{rule}, from {trained[0]}x{trained[1]} to {size[0]}x{size[1]}")


def bare_size_of(read: Reading, patch: int) -> tuple[int, int]:
    """Return the size that a model without position embedding was trained for, as relative positions say, or stated."""
    tables = [shape for key, shape in read.shapes.items() if key.endswith("relative_position_bias_table")]
    if tables and not read.states("trained_size"):
        side = (math.isqrt(max(0, tables[0][0] - 3)) + 1) // 2
        if (2 * side - 1) ** 2 + 3 != tables[0][0]:
            raise InputError(
                f"{read.name}: its table of relative positions has {tables[0][0]} rows, those of no square grid; "
                "assume trained_size=HxW says which"
            )
        return side * patch, side * patch
    for what in ("trained_size", "image_size"):
        if read.states(what):
            value = read.resolve(what, None, "")
            return check.image_size(read.origin(what), value, patch)
    size = 224 // patch * patch
    read.note("assumed", "image_size", (size, size), "rotary positions are for any size")
    return size, size


def placed_size_of(
    read: Reading, patch: int, num_prefix: int, registers: int
) -> tuple[tuple[int, int], dict[str, bool]]:
    """Return the size that the position embedding was trained for, and which prefix tokens have no rows in it.

    All have, or all but the registers, or none: at most one of them leaves a square grid, unless it is tiny.
    """
    rows = read.shape("pos_embed", 3)[1]
    alone = _no_embed_class(read)
    layouts = {
        num_prefix: {},
        num_prefix - registers: {"no_embed_registers": True},
        0: {"no_embed_class": True},
    }
    if num_prefix == 0:
        layouts = {0: {}}
    elif not registers:
        layouts = {num_prefix: {}, 0: {"no_embed_class": True}}
    if alone is None and read.value_of("owner") == "huggingface":  # its class tokens have positions
        alone = False
    if alone is not None and num_prefix:
        layouts = {count: facts for count, facts in layouts.items() if facts.get("no_embed_class", False) == alone}
    if (stated_fit := _of_stated_size(read, rows, patch, layouts)) is not None:
        return stated_fit
    if read.states("trained_size"):
        height, width = check.image_size(read.origin("trained_size"), read.resolve("trained_size", None, ""), patch)
        count = (height // patch) * (width // patch)
        if rows - count not in layouts:
            raise InputError(
                f"{read.origin('trained_size')}: {height}x{width} has {count} patches, other than the {rows} rows of "
                f"pos_embed with {num_prefix} prefix tokens"
            )
        return (height, width), layouts[rows - count]
    for count, facts in layouts.items():
        if check.is_square(rows - count):
            side = math.isqrt(rows - count) * patch
            without = "" if count == num_prefix else ", none for " + ("registers" if count else "prefix tokens")
            read.note(
                "read", "trained_size", (side, side), f"pos_embed: {rows - count} positions, a square grid{without}"
            )
            return (side, side), facts
    raise InputError(
        f"{read.name}: pos_embed has {rows} rows with {num_prefix} prefix tokens, no square grid; assume "
        "trained_size=HxW says which"
    )
