"""Bounds of numeric options: a message names the bound that a number is beyond."""

from dvit_infer.errors import InputError


def check_bound(what: str, value: float, most: float, *, excluded: bool = False) -> None:
    """Raise InputError if a number is over its upper bound; the message names `what`, the number and the bound.

    Args:
        excluded: the bound itself is not allowed either.
    """
    if value > most or (excluded and value == most):
        expected = f"below {_text(most)}" if excluded else f"at most {_text(most)}"
        raise InputError(f"{what}: {_text(value)} is over the bound; a number {expected} is expected")


def _text(value: float) -> str:
    if not isinstance(value, int):
        return f"{value:g}"
    return str(value) if abs(value) < 1 << 64 else f"a number of {value.bit_length()} bits"
