"""Recognise a file that was trained as another function than its keys describe, by the trainer's arguments."""

import re
from collections.abc import Mapping
from typing import Any

from dvit_infer.models.facts import Facts, is_number, text_of
from dvit_infer.models.reading import is_powers

# Methods whose files have the keys of the dense model: names of arguments that only their trainers have, and parts of
# the names of their models. EViT (youweiliang/evit), A-ViT (NVlabs/A-ViT), ToMe (facebookresearch/ToMe).
EVIT = "EViT"
_LIST = re.compile(r"[\[(]?\s*-?[0-9]{1,9}(\s*,\s*-?[0-9]{1,9})*\s*,?\s*[\])]?")
_EVIT = ("base_keep_rate", "drop_loc", "fuse_token")
_METHODS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (EVIT, _EVIT, r"evit|shrink"),
    ("A-ViT", ("ponder_token_scale", "gate_scale", "gate_center"), r"avit"),
    ("ToMe", ("tome", "tome_r", "prop_attn"), r"tome"),
    ("ATS", (), r"ats"),
    ("SPViT", (), r"spvit"),
)


def other_method(args: Mapping[str, Any], shapes: Mapping[str, Any]) -> str | None:
    """Return the method that a file was trained with if it computes another function than the keys describe.

    Args:
        args: the trainer's arguments.
        shapes: of the tensors, by name.
    """
    model = next((args[key] for key in ("model", "arch") if isinstance(args.get(key), str)), "")
    words = set(re.split(r"[^a-z0-9]+", model.lower()))
    learned = any(key.startswith("score_predictor.") for key in shapes)
    if _is_set(
        args.get("reduction_loc")
    ):  # TokenReduction (Haurum et al. 2023) trains ten methods, and dense DeiT beside them
        rates = args.get("keep_rate")
        if learned and (not isinstance(rates, list | tuple) or is_powers(rates)):
            return None
        if learned:
            return f"TokenReduction's DynamicViT with keep rates {text_of(rates)}, not r, r^2, r^3"
        dense = "deit" in words and not words & {"evit", "dyvit", "tome"}
        return None if dense else f"TokenReduction's {text_of(model) or 'model'}"
    if learned:
        return None
    for method, own, called in _METHODS:
        rate = args.get("base_keep_rate", 0) if method == EVIT else 0
        if is_number(rate) and rate >= 1:  # nothing is dropped
            continue
        stated = any(_is_set(args.get(name)) for name in own) or (method == EVIT and is_number(args.get(own[0])))
        if stated or any(re.fullmatch(called, w) for w in words):
            return method
    return None


def evit_facts(args: Mapping[str, Any]) -> Facts:
    """Return what EViT's trainer says of the reduction (main.py; Liang et al. 2022); what it leaves out is assumed."""
    own = [name for name in _EVIT if args.get(name) is not None]
    found: Facts = {
        "method": ("evit", f"the file's args: {', '.join(own) or 'model'}"),
        "fuse": (False, "EViT's trainer's default"),
        "resample": ("huggingface", "EViT's evit.py: bicubic without antialiasing"),
    }
    for name, what in zip(_EVIT, ("keep_rate", "prune_at", "fuse"), strict=True):
        if name in own:
            value = _locations(args[name]) if what == "prune_at" else args[name]
            found[what] = value, f"the file's args: {name}"
    return found


def _locations(value: Any) -> Any:
    """Return block numbers, also those of text as '(3, 6, 9)', in order, which the trainer does not ask for."""
    if isinstance(value, str) and _LIST.fullmatch(value.strip()):
        value = tuple(map(int, re.findall(r"-?[0-9]+", value)))
    whole = isinstance(value, list | tuple) and all(type(block) is int for block in value)
    return tuple(sorted(set(value))) if whole else value


def _is_set(value: Any) -> bool:
    """Return whether an argument is there and not off; a tensor or an array is none."""
    return isinstance(value, str | bool | int | float | list | tuple) and bool(value)
