"""Recognise a file that was trained as another function than its keys describe, by the trainer's arguments."""

import re
from collections.abc import Mapping
from typing import Any

from dvit_infer.models.facts import is_number, text_of
from dvit_infer.models.reading import is_powers

# Methods whose files have the keys of the dense model: names of arguments that only their trainers have, and parts of
# the names of their models. EViT (youweiliang/evit), A-ViT (NVlabs/A-ViT), ToMe (facebookresearch/ToMe).
_EVIT = ("base_keep_rate", "drop_loc", "fuse_token")
_METHODS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("EViT", _EVIT, r"evit|shrink"),
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
        rate = args.get("base_keep_rate") if own == _EVIT else None
        if rate is not None and is_number(rate) and rate >= 1:  # nothing is dropped
            continue
        if any(_is_set(args.get(name)) for name in own) or any(re.fullmatch(called, w) for w in words):
            return method
    return None


def _is_set(value: Any) -> bool:
    """Return whether an argument is there and not off; a tensor or an array is none."""
    return isinstance(value, str | bool | int | float | list | tuple) and bool(value)
