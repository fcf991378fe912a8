"""Check each fact about a model that a file or a user states; the message names its origin."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from dvit_infer.config import CROP_MODES, INTERPOLATIONS, Body
from dvit_infer.errors import InputError
from dvit_infer.reduction import METHODS, Method
from dvit_infer.reduction.settings import is_number as is_number  # here, as the other checks
from dvit_infer.reduction.settings import positive_float as positive_float
from dvit_infer.utils.bounds import check_bound

Facts = dict[str, tuple[Any, str]]  # a fact's name -> its value and where it stands

NOT_YET = "dvit_infer does not read such models yet"  # the end of a message where nothing else would do
MAX_PATCHES = 1 << 14  # one head's attention weights of one image are then 1 GiB


def text_of(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ",".join(map(text_of, value))
    return "".join(c if c.isprintable() else "?" for c in str(value)[:80])  # it may come from the file


def is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count


def positive_int(what: str, value: Any) -> int:
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 1:
        raise InputError(f"{what}: {value!r} is not a positive integer")
    check_bound(what, int(value), 1 << 40, excluded=True)
    return int(value)


def count(what: str, value: Any) -> int:
    """Return a number that may be zero."""
    return 0 if value == 0 and type(value) is int else positive_int(what, value)


def block_indices(what: str, value: Any, depth: int, count: int | None) -> tuple[int, ...]:
    """Return strictly increasing block indices, one per predictor if there are `count` of them."""
    indices = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if any(isinstance(i, bool) or not isinstance(i, Integral) for i in indices):
        raise InputError(f"{what}: {text_of(value)!r} is not a list of block indices")
    indices = tuple(map(int, indices))
    if not indices and count != 0:
        raise InputError(f"{what}: no block is given")
    for index in indices:
        if not 0 <= index < depth:
            raise InputError(f"{what}: there is no block {index}; the model has blocks 0 to {depth - 1}")
    if list(indices) != sorted(set(indices)):
        raise InputError(f"{what}: {text_of(indices)} is not strictly increasing")
    if count is not None and len(indices) != count:
        raise InputError(f"{what}: {len(indices)} given ({text_of(indices)}), but the weights hold {count} predictors")
    return indices


def image_size(what: str, value: Any, patch: int) -> tuple[int, int]:
    """Return (height, width), both multiples of the patch size."""
    return image_size_of(what, value, Body(patch_size=patch, embed_dim=1, depth=1))


def image_size_of(what: str, value: Any, body: Body) -> tuple[int, int]:
    """Return (height, width) of images that a body takes."""
    sides = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2:
        raise InputError(f"{what}: {value!r} is not a size; one number or height and width are expected")
    height, width = (positive_int(what, side) for side in sides)
    if (why := body.why_not_size((height, width))) is not None:
        raise InputError(f"{what}: {height}x{width} {why}")
    rows, columns = body.grid((height, width))
    if rows * columns > MAX_PATCHES:
        raise InputError(f"{what}: {height}x{width} is too large: over {MAX_PATCHES} patches, each attending to all")
    return height, width


def crop_pct(what: str, value: Any) -> float | None:
    if value is not None and (not is_number(value) or not 0.1 <= value <= 1):
        raise InputError(f"{what}: {value!r} is not between 0.1 and 1")
    return None if value is None else float(value)


def interpolation(what: str, value: Any) -> str:
    """Return the name of one of Pillow's filters, which may also be given as Pillow's number."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(INTERPOLATIONS):
        return INTERPOLATIONS[value]
    return _one_of(what, value, INTERPOLATIONS)


def crop_mode(what: str, value: Any) -> str:
    return _one_of(what, value, CROP_MODES)


def _one_of(what: str, value: Any, names: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in names:
        raise InputError(f"{what}: {text_of(value)!r} is not one of {', '.join(names)}")
    return value


def three_floats(what: str, value: Any, positive: bool) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else ()
    good = all(is_number(v) and not math.isnan(v) and (v > 0 or not positive) for v in values)
    if len(values) != 3 or not good:
        raise InputError(f"{what}: {value!r} is not three {'positive ' if positive else ''}numbers, one per channel")
    for v in values:
        check_bound(what, abs(v), 1e30, excluded=True)
    return tuple(map(float, values))


def method(what: str, value: Any, learned: str | None, name: str, known: Mapping[str, Method]) -> str:
    """Return a method of the known ones that `name` can run, whose weights hold the modules of `learned`."""
    if not isinstance(value, str) or (value != "none" and value not in known):
        takes = ", ".join([*known, "none"])
        if isinstance(value, str) and value in METHODS:  # of another kind of model
            raise InputError(
                f"{what}: {value!r} removes tokens, but windows and convolutions need all of them; {name} takes {takes}"
            )
        raise InputError(f"{what}: {value!r} is not one of {takes}")
    if value != "none" and known[value].KEY is not None and value != learned:
        free = ", ".join(repr(name) for name, method in known.items() if method.KEY is None)
        need = f"{free} need none, " if free else ""
        raise InputError(f"{what}: {value!r} needs score predictors, and {name} holds none; {need}'none' runs it dense")
    return str(value)
