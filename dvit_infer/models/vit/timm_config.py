"""Read the facts of timm's config.json: those of the architecture that it names, and those that it states."""

import difflib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.models.facts import NOT_YET, Facts, text_of
from dvit_infer.models.vit.timm_model_args import with_model_args
from dvit_infer.models.vit.timm_values import pool_of

# What bench/timm_archs.py leaves out of the file.
DEFAULTS: dict[str, Any] = {
    "kind": "VisionTransformer",
    "act": "gelu",
    "eps": 1e-6,
    "rope": "none",
    "global_pool": "token",
    "include_prefix": False,
    "any_size": False,
    "image_size": 224,
    "patch_size": 16,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
}
PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
_FILE = Path(__file__).with_name("timm_archs.json")


@cache
def _file() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_FILE.read_text())
    return found


def timm_archs() -> Mapping[str, Mapping[str, Any]]:
    """Return the facts of timm's plain vision transformers by name, without those in `DEFAULTS`."""
    archs: dict[str, dict[str, Any]] = _file()["archs"]
    return archs


def arch_of(name: str) -> tuple[str, dict[str, Any]]:
    """Return timm's name for an architecture, and its facts; "unsupported" says why it cannot be read.

    Args:
        name: the same, or one that timm had before, with a tag of weights after a dot or without.

    Raises:
        InputError: it is none of timm's plain vision transformers.
    """
    archs, before = timm_archs(), _file()["renamed"]
    plain = name.split(".")[0]
    plain = before.get(plain, plain)
    if plain not in archs:
        known = difflib.get_close_matches(plain[:100], archs, n=3, cutoff=0.6)
        nearest = f"the nearest of them: {', '.join(known)}" if known else NOT_YET
        raise InputError(
            f"architecture {text_of(name)[:60]!r} is none of the {len(archs)} plain vision transformers of timm "
            f"{_file()['timm']} that are known here; {nearest}"
        )
    facts = {**DEFAULTS, **archs[plain]}
    if "unsupported" in facts:
        facts["unsupported"] += f"; {NOT_YET}"
    return plain, facts


def timm_facts(content: Mapping[str, Any]) -> Facts:
    """Return the facts of timm's config.json.

    Of what it says about the model, `model_args` counts first, then its own keys, then the architecture's facts. What
    the shapes of the weights show is not among the facts, but where it can be checked against them. Its description of
    images is read elsewhere; the architecture's stands for it where there is none.

    Args:
        content: with "architecture"; before 2023 it had the keys of "pretrained_cfg" beside that one.

    Raises:
        InputError: the architecture is none of timm's plain vision transformers.
    """
    name, known = arch_of(str(content["architecture"]))
    at = f"architecture {name}"
    values = {what: (value, at) for what, value in known.items()}
    if content.get("global_pool") is not None:
        values["global_pool"] = content["global_pool"], "global_pool"
    if (classes := content.get("num_classes")) is not None:
        values["num_classes"] = classes, "num_classes"
    if "pretrained_cfg" in content or content.keys() & {*PREPROCESSING, "input_size"}:
        values = {what: value for what, value in values.items() if what not in PREPROCESSING}
    if not known["any_size"]:
        del values["image_size"]  # the position embedding shows it
    args = content.get("model_args")
    values = with_model_args(values, args if isinstance(args, Mapping) else {})
    del values["any_size"]
    kind, global_pool, include = (values.pop(what) for what in ("kind", "global_pool", "include_prefix"))
    pool, reason = pool_of(global_pool[0], kind[0], bool(include[0]))
    if reason is not None:
        values.setdefault("unsupported", (f"{reason}; {NOT_YET}", global_pool[1]))
    elif pool is not None:
        values["pool"] = pool, global_pool[1]
    if pool not in ("map", "map_all"):
        values = {what: value for what, value in values.items() if not what.startswith("map_")}
    return {**values, "owner": ("timm", at), "model": (name, at), "resample": ("timm", at)}
