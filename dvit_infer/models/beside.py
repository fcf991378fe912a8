"""Read facts beside a checkpoint's weights: timm's config.json and pretrained_cfg, Hugging Face's preprocessor."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvit_infer.models.facts import Facts as Facts
from dvit_infer.models.facts import is_number, text_of
from dvit_infer.models.vit.described import SOUND, model_facts

FILES = ("config.json", "preprocessor_config.json")

_MOST_BYTES = 1 << 20
_BICUBIC = 3  # Pillow's number
_POOLED = {"avg": "the mean of the patches", "max": "the largest of the patches", "map": "a learned pooling"}


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

    Among the facts, "unsupported" says in words why the model cannot be read, and "unlike" what changes the function of
    a DeiT and shows in no key.

    Args:
        sources: objects as timm and Hugging Face write them, by name; of two that state a fact, the first counts.
        shapes: of the checkpoint's tensors; an object that describes other ones is not used.
    """
    facts: Facts = {}
    unused: list[tuple[str, str]] = []
    for name, content in sources.items():
        if isinstance(content, str):
            unused.append((name, content))
            continue
        of_model = model_facts(name, sources)
        if not of_model and (other := _of_another_model(content, shapes)):
            unused.append((name, f"describes another model: {other}"))
            continue
        found = {**of_model, **_timm(content), **_huggingface(content)}
        for what, (value, key) in found.items():
            if what == "not here":
                unused += [(name, remark) for remark in value]
            elif not _is_sound(what, value):
                unused.append((name, f"{key} is {text_of(value)[:40]}"))
            else:
                facts.setdefault(what, (value, f"{name}: {key}"))
    return facts, unused


def _of_another_model(content: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    for key, tensor, axis in (("num_classes", "head.weight", 0), ("num_features", "cls_token", 2)):
        stated, shape = content.get(key), shapes.get(tensor, ())
        if type(stated) is int and len(shape) > axis and stated != shape[axis]:
            return f"{key} {stated}, {tensor} has shape {shape}"
    return None


def _unlike(content: Mapping[str, Any]) -> str | None:
    """Return how timm's description differs from a ViT whose class token is classified, with the exact GELU."""
    chosen = _mapping(content.get("model_args"))
    pool, act = chosen.get("global_pool", content.get("global_pool")), chosen.get("act_layer")
    if isinstance(pool, str) and pool in _POOLED:
        return f"global_pool is {pool!r}: its head reads {_POOLED[pool]}"
    return None if act in (None, "gelu") else f"act_layer is {str(act)[:40]!r}, not the exact GELU"


def _timm(content: Mapping[str, Any]) -> Facts:
    """Return the facts of timm's config.json: those of `pretrained_cfg`, which were at the top before 2023."""
    inner = "pretrained_cfg" in content
    if not inner and "architecture" not in content:
        return {}
    stated, chosen = _mapping(content["pretrained_cfg"] if inner else content), _mapping(content.get("model_args"))
    at = "pretrained_cfg." if inner else ""
    found: Facts = {what: (stated[what], at + what) for what in ("mean", "std", "crop_pct") if what in stated}
    size = stated.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        found["image_size"] = size[1:], f"{at}input_size"
    if "img_size" in chosen:
        found["image_size"] = chosen["img_size"], "model_args.img_size"
    if "num_heads" in chosen:
        found["num_heads"] = chosen["num_heads"], "model_args.num_heads"
    if unlike := _unlike(content):
        found["unlike"] = unlike, unlike
    odd = [(key, stated.get(key), ours) for key, ours in (("interpolation", "bicubic"), ("crop_mode", "center"))]
    remarks = [
        f"{at}{key} is {text_of(value)[:20]}; {ours} here" for key, value, ours in odd if value not in (None, ours)
    ]
    return found | ({"not here": (remarks, "")} if remarks else {})


def _huggingface(content: Mapping[str, Any]) -> Facts:
    """Return the facts of preprocessor_config.json. Values for unscaled pixels are divided by the scale."""
    if "image_mean" not in content and "image_std" not in content:
        return {}
    found: Facts = {}
    remarks = []
    scale = 255.0  # of the pixels that mean and std are for, as a factor of 0..1
    if content.get("do_rescale") is not False:
        factor = content.get("rescale_factor", 1 / 255)
        scale = 255.0 * factor if is_number(factor) and factor > 0 else 1.0
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    for what in ("mean", "std"):
        value, key = content.get(f"image_{what}"), f"image_{what}"
        if content.get("do_normalize") is False:
            value, key = [0.0 if what == "mean" else 1.0] * 3, "do_normalize"
        if is_number(value):
            value = [value] * 3
        if scale != 1 and isinstance(value, list) and _is_sound(what, value):
            value, key = [v / scale for v in value], f"{key}, for pixels of 0 to {scale:g}, divided by that"
        if value is not None:
            found[what] = value, key
    size, crop = _side(content.get("size")), _side(content.get("crop_size"))
    if crop is not None and content.get("do_center_crop") is not False:
        found["image_size"] = crop, "crop_size"
        if size is not None and size[0] and 0 < crop[0] <= size[0]:
            found["crop_pct"] = crop[0] / size[0], "crop_size over size"
    elif size is not None:
        found["image_size"] = size, "size"
        found["crop_pct"] = 1.0, "no crop"
        remarks.append("it warps images to the size; their centre is cropped here")
    if content.get("resample") not in (None, _BICUBIC):
        remarks.append(f"resample is {text_of(content['resample'])[:20]}; {_BICUBIC}, bicubic, here")
    return found | ({"not here": (remarks, "")} if remarks else {})


def _side(value: Any) -> list[int] | None:
    """Return (height, width) of Hugging Face's sizes: a number, or height and width, or the shortest edge."""
    if isinstance(value, Mapping):
        edge = value.get("shortest_edge")
        sides = [value.get("height", edge), value.get("width", edge)]
    else:
        sides = [value, value]
    return [int(side) for side in sides] if all(is_number(s) and 0 < s < 1 << 20 for s in sides) else None


def _is_sound(what: str, value: Any) -> bool:
    if what in SOUND:
        return SOUND[what](value)
    if what in ("mean", "std"):
        return _numbers(value) and len(value) == 3 and (what == "mean" or min(value) > 0)
    if what == "crop_pct":
        return is_number(value) and 0.1 <= value <= 1
    if what == "unlike":
        return True
    if what == "image_size":
        return _numbers(value if isinstance(value, list) else [value])
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(is_number(v) and abs(v) < 1e6 for v in values)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
