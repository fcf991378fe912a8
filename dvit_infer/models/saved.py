"""The config in the header of a saved file, with every value checked."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from dvit_infer.config import Body, Config, Ranges, Reduction, Stage
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.header import HEADER_KEY
from dvit_infer.reduction import methods_of

T = TypeVar("T")


def saved_config(name: str, header: Mapping[str, Any], bodies: Mapping[str, type[Body]]) -> Config:
    """Return the config that a header states.

    Args:
        name: the file name, for messages.
        header: as `read_header` returns it.
        bodies: the body class of every family.

    Raises:
        InputError: a key is unknown or missing, or a value is impossible.
    """
    try:
        values = _named(Config, header)
        family = values["family"]
        if not isinstance(family, str) or family not in bodies:
            raise InputError(f"family: {family!r} is not known")
        body = _body(bodies[family], values["body"])
        image_size, trained_size = (
            check.image_size_of(key, values[key], body) for key in ("image_size", "trained_size")
        )
        rows, columns = body.grid(image_size)
        reductions = {key: _reduction(key, values[key], body, rows * columns) for key in ("reduction", "learned")}
        return Config(
            arch=_text("arch", values["arch"]),
            family=family,
            num_classes=check.count("num_classes", values["num_classes"]),
            image_size=image_size,
            trained_size=trained_size,
            body=body,
            **reductions,
            mean=check.three_floats("mean", values["mean"], positive=False),
            std=check.three_floats("std", values["std"], positive=True),
            crop_pct=check.crop_pct("crop_pct", values["crop_pct"]),
            crop_mode=check.crop_mode("crop_mode", values["crop_mode"]),
            interpolation=check.interpolation("interpolation", values["interpolation"]),
            weights=None if values["weights"] is None else _text("weights", values["weights"]),
            assumed=_assumed(values["assumed"]),
            ranges=_ranges(values["ranges"]),
        )
    except InputError as error:
        raise InputError(f"{name}: its {HEADER_KEY} header is invalid: {error}") from None


def _named(kind: type[Any], values: Any) -> dict[str, Any]:
    """Return the values of a dataclass's fields by name; missing ones take the default, unknown ones are refused."""
    if not isinstance(values, Mapping):
        raise InputError(f"{kind.__name__.lower()}: {str(values)[:40]!r} is not an object")
    defaults = {f.name: f.default for f in fields(kind)}
    if unknown := sorted(map(str, values.keys() - defaults.keys())):
        raise InputError(f"{unknown[0][:40]!r} is not known")
    for key, default in defaults.items():
        if default is MISSING and values.get(key) is None:
            raise InputError(f"it does not say {key}")
    return {key: values[key] if values.get(key) is not None else default for key, default in defaults.items()}


def _body(kind: type[Body], values: Any) -> Body:
    """Check the facts of a family by the types of its fields: counts and numbers are positive, or the default."""
    checked: dict[str, Any] = {}
    types = get_type_hints(kind)
    for f in fields(kind):
        value = _named(kind, values)[f.name]
        if f.default is not MISSING and value == f.default and type(value) is type(f.default):
            checked[f.name] = value
        elif types[f.name] is bool:
            checked[f.name] = _flag(f.name, value)
        elif types[f.name] == tuple[int, ...]:
            checked[f.name] = _counts(f.name, value)
        else:
            optional = f.default is not MISSING  # such a number may be zero
            checks = {int: check.count if optional else check.positive_int, float: check.positive_float}
            checked[f.name] = checks.get(types[f.name], _text)(f.name, value)
    return kind(**checked)


def _counts(what: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{what}: {str(value)[:40]!r} is not a list of numbers")
    return tuple(check.positive_int(what, one) for one in value)


def _reduction(key: str, header: Any, body: Body, num_patches: int) -> Reduction:
    if isinstance(header, Reduction):  # the default
        return header
    values = _named(Reduction, header)
    if "merges" in header:
        raise InputError(f"{key}: 'merges' is not known")
    method, stages, settings = (values[name] for name in ("method", "stages", "settings"))
    if method == "none":
        if stages or settings:
            raise InputError(f"{key}: a dense model has no stages")
        return Reduction()
    methods = methods_of(body)
    learns = isinstance(method, str) and method in methods and methods[method].KEY is not None
    if not isinstance(method, str) or method not in methods or (key == "learned" and not learns):
        raise InputError(f"method: {str(method)[:40]!r} is not one of {', '.join([*methods, 'none'])}")
    if not isinstance(stages, list) or not isinstance(settings, dict):
        raise InputError(f"{key}: its stages are not a list, or its settings not an object")
    stated = [_named(Stage, stage) for stage in stages]
    if settings.keys() != methods[method].SETTINGS.keys():
        raise InputError(f"{key}: its settings are not {', '.join(methods[method].SETTINGS)}")
    known = {name: one.check(name, settings[name]) for name, one in methods[method].SETTINGS.items()}
    blocks = tuple(range(body.depth))
    if not methods[method].EVERY_BLOCK:
        blocks = check.block_indices("prune_at", [stage["block"] for stage in stated], body.depth, None)
    counted = methods[method].stages(known, blocks, num_patches)
    if not check.is_number(values["num_patches"]) or values["num_patches"] not in (0, num_patches):
        raise InputError(f"{key}: num_patches is {str(values['num_patches'])[:20]}, the image has {num_patches}")
    if len(stated) != len(counted) or any(
        stage["block"] != other.block or stage["keep"] not in (None, other.keep) or stage["where"] != other.where
        for stage, other in zip(stated, counted, strict=True)
    ):
        raise InputError(f"{key}: its stages do not keep what its settings say")
    return Reduction(method, counted, tuple(known.items()), num_patches, methods[method].MERGES)


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable() or not value:
        raise InputError(f"{what}: {str(value)[:40]!r} is not a name")
    return value


def _assumed(value: Any) -> tuple[str, ...]:
    known = ("mean", "std", "crop_pct")
    if not isinstance(value, list | tuple) or not all(isinstance(what, str) and what in known for what in value):
        raise InputError(f"assumed: {str(value)[:40]!r} is not a list of {', '.join(known)}")
    return tuple(value)


def _ranges(value: Any) -> Ranges:
    """Check ranges: (linear, lowest, highest), around zero."""

    def is_range(one: Any) -> bool:
        if not isinstance(one, list | tuple) or len(one) != 3 or not isinstance(one[0], str):
            return False
        return (
            all(check.is_number(x) and math.isfinite(x) for x in one[1:]) and one[1] <= 0 <= one[2] and one[1] < one[2]
        )

    if not isinstance(value, list | tuple) or not all(map(is_range, value)):
        raise InputError("ranges: they are not a list of names with a lowest and a highest value")
    return tuple((name, float(low), float(high)) for name, low, high in value)


def _flag(what: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{what}: {str(value)[:40]!r} is not true or false")
    return value
