"""Read facts beside a checkpoint's weights: timm's config.json and pretrained_cfg, Hugging Face's processors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvit_infer.config import CROP_MODES, INTERPOLATIONS
from dvit_infer.models.facts import Facts as Facts
from dvit_infer.models.facts import is_number, text_of
from dvit_infer.models.processor import facts_of_type, processor_facts
from dvit_infer.models.vit.described import COUNTS, SOUND, model_facts

FILES = ("config.json", "processor_config.json", "preprocessor_config.json", "open_clip_config.json")

_MOST_BYTES = 16 << 20  # 21,843 names of classes, there and back, are 2 MiB
_TIMM_CROP = 0.875  # where timm's description says none
_PREPARED = ("mean", "std", "crop_pct", "crop_mode", "interpolation")


def read_beside(folder: Path) -> dict[str, Any]:
    """Return the parsed JSON object of each of `FILES` in the folder, or a string that says why it cannot be read."""
    found: dict[str, Any] = {}
    for name in FILES:
        try:
            if not (folder / name).is_file():  # a pipe would never end
                continue
            with (folder / name).open("rb") as file:
                text = file.read(_MOST_BYTES + 1)
            content = json.loads(text) if len(text) <= _MOST_BYTES else None
            found[name] = content if isinstance(content, dict) else "is no JSON object, or too large"
        except OSError as error:
            found[name] = f"cannot be read ({error.strerror or error})"
        except (ValueError, RecursionError):
            found[name] = "is no JSON"
    return found


def facts_of(sources: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> tuple[Facts, list[tuple[str, str]]]:
    """Return the facts of JSON objects, and what of them is not used: pairs of a name and the reason.

    Among the facts, "unsupported" says in words why the model cannot be read; "by type" lists those that nothing but
    the type of the model implies.

    Args:
        sources: objects as timm and Hugging Face write them, by name; of two that state a fact, the first counts.
        shapes: of the checkpoint's tensors; an object that describes other ones is not used.
    """
    facts: Facts = {}
    unused: list[tuple[str, str]] = []
    model_type = _mapping(sources.get("config.json")).get("model_type")
    of_models: dict[str, Facts] = {}

    def take(name: str, found: Facts, of_model: bool = False) -> None:
        for what, (value, key) in found.items():
            if what == "not here":
                unused.extend((name, remark) for remark in value)
                continue
            if what in COUNTS and isinstance(value, float) and value.is_integer():
                value = int(value)
            if not _is_sound(what, value) and of_model and what in SOUND:  # a guess in its place would be silent
                facts["unsupported"] = f"{key} is {text_of(value)[:40]!r}, which is impossible", f"{name}: {key}"
            elif not _is_sound(what, value):
                unused.append((name, f"{key} is {text_of(value)[:40]}"))
            else:
                facts.setdefault(what, (value, f"{name}: {key}"))

    for name, content in sources.items():
        if isinstance(content, str):
            unused.append((name, content))
            continue
        of_models[name] = model_facts(content)
        if not of_models[name] and (other := _of_another_model(content, shapes)):
            unused.append((name, f"describes another model: {other}"))
            continue
        take(name, {**_timm(content), **processor_facts(content, model_type)})
    for name, found in of_models.items():  # what is stated of images counts before what follows from the model
        take(name, found, of_model=True)
    by_type = {what: fact for what, fact in facts_of_type(model_type).items() if what not in facts}
    if {"crop_pct", "crop_mode"} & facts.keys():  # they belong together
        by_type = {what: fact for what, fact in by_type.items() if what not in ("crop_pct", "crop_mode")}
    return facts | by_type | ({"by type": (tuple(by_type), "")} if by_type else {}), unused


def _of_another_model(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for key, tensor, axis in (("num_classes", "head.weight", 0), ("num_features", "cls_token", 2)):
        stated, shape = content.get(key), shapes.get(tensor, ())
        if type(stated) is int and len(shape) > axis and stated != shape[axis]:
            return f"{key} {stated}, {tensor} has shape {shape}"
    return None


def _timm(content: Mapping[str, Any]) -> Facts:
    """Return the facts of timm's config.json: those of `pretrained_cfg`, which were at the top before 2023."""
    inner = "pretrained_cfg" in content
    if not inner and "architecture" not in content:
        return {}
    stated, chosen = _mapping(content["pretrained_cfg"] if inner else content), _mapping(content.get("model_args"))
    at = "pretrained_cfg." if inner else ""
    found: Facts = {what: (stated[what], at + what) for what in _PREPARED if stated.get(what) is not None}
    if stated.get("crop_mode") == "squash" and "crop_pct" not in found:
        found["crop_pct"] = _TIMM_CROP, f"timm's, as {at}crop_pct is missing"
    size = stated.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        found["image_size"] = size[1:], f"{at}input_size"
    if "img_size" in chosen:
        found["image_size"] = chosen["img_size"], "model_args.img_size"
    if "num_heads" in chosen:
        found["num_heads"] = chosen["num_heads"], "model_args.num_heads"
    return found


def _is_sound(what: str, value: Any) -> bool:
    if what in SOUND:
        return SOUND[what](value)
    if what in ("mean", "std"):
        return _numbers(value) and len(value) == 3 and (what == "mean" or min(value) > 0)
    if what == "crop_pct":
        return is_number(value) and 0.1 <= value <= 1
    if what in ("crop_mode", "interpolation"):
        return isinstance(value, str) and value in (CROP_MODES if what == "crop_mode" else INTERPOLATIONS)
    if what == "image_size":
        return _numbers(value if isinstance(value, list) else [value])
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(is_number(v) and abs(v) < 1e6 for v in values)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
