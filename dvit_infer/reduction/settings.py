"""What a method can be told: its settings, their defaults, and their checks."""

import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import nn

from dvit_infer.config import Setting
from dvit_infer.errors import InputError
from dvit_infer.graph.nodes import Signal
from dvit_infer.utils.bounds import check_bound


class Trunk(NamedTuple):
    """What a method may know about a model before it chooses its defaults.

    Attributes:
        depth: the number of blocks.
        dim: channels of a token.
        num_patches: the number of patch tokens before the first stage.
        class_tokens: the number of class and distillation tokens.
        reads_patches: whether the head reads patch tokens.
        routes: whether a method may only choose which tokens take the MLPs, as all have to stay.
        blocks, why_blocks: where the modules in the weights chose, as far as their keys show it, and how; (): they do
            not.
        predictor_eps: of the LayerNorms of score predictors.
    """

    depth: int
    dim: int
    num_patches: int
    class_tokens: int = 0
    reads_patches: bool = True
    routes: bool = False
    blocks: tuple[int, ...] = ()
    why_blocks: str = ""
    predictor_eps: float = 1e-5


class Known(NamedTuple):
    """A setting of a method: its default for a model, the reason for it, and the check of a value by its origin."""

    default: Callable[[Trunk], Setting]
    why: str
    check: Callable[[str, Any], Setting]


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def positive_float(what: str, value: Any) -> float:
    if not is_number(value) or not value > 0:
        raise InputError(f"{what}: {_shown(value)} is not a positive number")
    check_bound(what, value, 1e30, excluded=True)
    if value <= 1e-30:
        raise InputError(f"{what}: {value:g} is under the bound; a number above 1e-30 is expected")
    return float(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0


def _shown(value: Any) -> str:
    """Return a value for a message, which is one line: it may come from a file."""
    return " ".join(repr(value)[:80].split())


def keep_rate(what: str, value: Any) -> float:
    if _is_list(value):
        raise InputError(f"{what}: one rate is expected, not a list; every stage multiplies it ('evit' takes a list)")
    if not is_number(value) or not 0 < value <= 1:
        raise InputError(f"{what}: {_shown(value)} is not a keep rate; a number above 0, at most 1, is expected")
    return float(value)


def keep_rates(what: str, value: Any) -> float | tuple[float, ...]:
    """Return one rate or count for all stages, or one for each; a whole number over 1 is a count of tokens."""
    if _is_list(value):
        rates = tuple(_rate_or_count(what, one) for one in value)
        if any(rate > 1 for rate in rates) and any(isinstance(one, Integral) and one == 1 for one in value):
            raise InputError(f"{what}: 1 among numbers of tokens is no number of them; 1.0 keeps all, 2 is the least")
        return rates
    return _rate_or_count(what, value)


def _rate_or_count(what: str, value: Any) -> float:
    is_count = is_number(value) and value > 1 and float(value).is_integer()
    if not is_number(value) or not (0 < value <= 1 or is_count):
        raise InputError(
            f"{what}: {_shown(value)} is neither a keep rate, above 0 and at most 1, nor a number of tokens, 2 or more"
        )
    check_bound(what, value, 1 << 40, excluded=True)
    return int(value) if is_count else float(value)


DECREASING = ":decreasing"  # the end of a setting of merges that fall from block to block


def merge_counts(what: str, value: Any) -> int | str | tuple[int, ...]:
    """Return one number of tokens to merge for all blocks, one for each, or '8:decreasing' for 8 on average.

    All may be text as well, a list with commas.
    """
    if isinstance(value, str):
        mean = value.removesuffix(DECREASING)
        if mean != value:
            return f"{_merge_count(what, _whole(mean))}{DECREASING}"
        value = [_whole(part) for part in value.split(",")] if "," in value else _whole(value)
    if _is_list(value):
        return tuple(_merge_count(what, one) for one in value)
    return _merge_count(what, value)


def _whole(text: str) -> int | str:
    """Return the number that a text states, or the text if it states none."""
    return int(text) if re.fullmatch(r"\s*[+-]?[0-9]{1,15}\s*", text) else text


def _merge_count(what: str, value: Any) -> int:
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 0:
        raise InputError(
            f"{what}: {_shown(value)} is not a number of tokens to merge; a whole number such as 8 is, one for each "
            f"block (16,14,12,...), or 8{DECREASING}"
        )
    check_bound(what, int(value), 1 << 40, excluded=True)
    return int(value)


def flag(what: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{what}: {_shown(value)} is not true or false")
    return value


def always(value: Setting) -> Callable[[Trunk], Setting]:
    """Return a default that is the same for every model."""
    return lambda trunk: value


# Parts of methods that have nothing to say.


def fits_all(settings: Mapping[str, Setting], trunk: Trunk) -> str | None:
    """Return None: the method is for every model."""
    return None


def reads_tokens_only(settings: Mapping[str, Setting]) -> Signal:
    """Return that the attention before has to leave nothing."""
    return ""


def no_modules(dim: int, settings: Mapping[str, Setting], count: int) -> nn.ModuleList:
    """Return no modules: the method has no weights."""
    return nn.ModuleList()
