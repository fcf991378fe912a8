"""Resolve how a model's images are prepared: mean, std, resizing and crop, and which of these nothing states."""

from collections.abc import Sequence
from typing import Any

from dvit_infer.config import IMAGENET_MEAN, IMAGENET_STD
from dvit_infer.models import facts as check
from dvit_infer.models.reading import Reading

_LARGEST = 2.0  # of a mean or std for pixels of 0 to 1; a larger one is for pixels of 0 to 255


def read_inputs(read: Reading, implied: str | None = None) -> dict[str, Any]:
    """Return the fields `mean`, `std`, `crop_pct`, `crop_mode`, `interpolation` and `assumed` of a Config.

    Args:
        read: the facts; each one used gets a note.
        implied: the reason why facts that nothing states are ImageNet's and the family's; None: they are assumed.

    Raises:
        InputError: a value is impossible.
    """
    found: dict[str, Any] = {}
    stated = [what for what in ("mean", "std", "crop_pct") if read.states(what)]
    for what, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        if what in stated:
            found[what] = check.three_floats(read.origin(what), read.resolve(what, None, ""), positive=what == "std")
        else:
            found[what] = usual
            why = implied or "only uint8 images are normalised here"
            read.note("read" if implied else "assumed", what, usual, f"ImageNet's; {why}")
    if read.stored is None:
        of_bytes = [what for what in stated if what != "crop_pct" and _is_of_bytes(found[what])]
        if of_bytes == ["mean"] and "std" in stated and set(found["std"]) == {1.0}:
            of_bytes.append("std")  # of networks that only subtract a mean from pixels of 0 to 255
        for what in of_bytes:
            found[what] = tuple(value / 255 for value in found[what])
            read.amend(what, found[what], "for pixels of 0 to 255; divided by 255")
    crop = read.resolve_if_known("crop_pct")
    found["crop_pct"] = check.crop_pct(read.origin("crop_pct"), crop)
    for what, named in (("crop_mode", check.crop_mode), ("interpolation", check.interpolation)):
        if read.states(what):
            found[what] = named(read.origin(what), read.resolve(what, None, ""))
    if read.stored is not None:  # it states all of them, and remembers which ones were assumed
        found["assumed"] = tuple(what for what in read.stored.assumed if read.given.get(what) is None)
    else:
        left = [w for w in ("mean", "std", "crop_pct") if w not in stated or read.only_by_type(w)]
        found["assumed"] = () if implied else tuple(left)
    if found.get("crop_mode") == "squash" and crop is None:  # all of the image: nothing is left to assume
        found["assumed"] = tuple(what for what in found["assumed"] if what != "crop_pct")
    return found


def _is_of_bytes(values: Sequence[float]) -> bool:
    return max(map(abs, values)) > _LARGEST
