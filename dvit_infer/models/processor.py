"""Read how one of Hugging Face's image processors prepares images, from its JSON file or from the type of a model.

What a file leaves out is what the class of transformers 5 does, whose name is in the file or follows from the model.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from dvit_infer.config import IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS
from dvit_infer.models.facts import Facts, is_number, text_of

_HALF = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
_IMAGENET = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
_OPENAI = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_BILINEAR, _BICUBIC = {"resample": 2}, {"resample": 3}  # Pillow's numbers
_ALL = {"size": {"height": 224, "width": 224}, "do_center_crop": False, "square": True}
_CENTER = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "square": False}
# Of each class its file's keys; "square": whether one number as a size is both sides, or the shorter one.
_CLASSES: dict[str, dict[str, Any]] = {
    "ViT": {**_ALL, **_BILINEAR, **_HALF},
    "DINOv3ViT": {**_ALL, **_BILINEAR, **_IMAGENET},
    "Beit": {**_ALL, **_BICUBIC, **_HALF, "crop_size": 224},
    "Siglip": {**_ALL, **_BICUBIC, **_HALF, "square": False},
    "Siglip2": {**_ALL, **_BILINEAR, **_HALF, "patch_size": 16, "max_num_patches": 256},
    "DeiT": {**_CENTER, **_BICUBIC, **_HALF, "size": {"height": 256, "width": 256}, "square": True},
    "CLIP": {**_CENTER, **_BICUBIC, **_OPENAI},
    "Bit": {**_CENTER, **_BICUBIC, **_OPENAI},
}
# The class of each model type, and what all published weights of the type have in place of the class's own.
_DINOV2 = ("Bit", {**_IMAGENET, "size": {"shortest_edge": 256}})
_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("vit", "ijepa"), ("ViT", {})),
    **dict.fromkeys(("vit_mae", "vit_msn"), ("ViT", _IMAGENET)),
    **dict.fromkeys(("beit", "data2vec-vision"), ("Beit", {})),
    **dict.fromkeys(("clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model", "mlcd"), ("CLIP", {})),
    **dict.fromkeys(("siglip", "siglip_vision_model"), ("Siglip", {})),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), ("Siglip2", {})),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _DINOV2),
    "deit": ("DeiT", _IMAGENET),
    "dinov3_vit": ("DINOv3ViT", {}),
}
_LARGEST = 1e6
_CLASS = re.compile(r"(\w+?)(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)")
_ONE_SIZE = "here they are resized to one size"


class _File:
    """A processor's values, of the file or else of its class, and remarks on what is not used."""

    def __init__(self, stated: Mapping[str, Any], kind: str | None) -> None:
        self.stated = {key: value for key, value in stated.items() if value is not None}
        self.own = {} if kind is None else _CLASSES[kind]
        self.whose = "" if kind is None else f"{kind}ImageProcessor's own"
        self.remarks: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.stated or key in self.own

    def get(self, key: str, default: Any = None) -> Any:
        return self.stated.get(key, self.own.get(key, default))

    def place(self, *keys: str) -> str:
        """Return where values stand."""
        where = " over ".join(keys)
        return where if not self.whose or any(key in self.stated for key in keys) else f"{self.whose} {where}"

    def flag(self, key: str, default: bool) -> bool:
        if isinstance(value := self.get(key, default), bool):
            return value
        self.remark(key)
        return bool(self.own.get(key, default))

    def remark(self, key: str, why: str = "") -> None:
        self.remarks.append(f"{key} is {text_of(self.get(key))[:40]}{why and '; '}{why}")

    def facts(self) -> Facts:
        found = _normalisation(self) | _resizing(self)
        if "max_num_patches" in self:  # NaFlex
            self.remark("max_num_patches", f"images keep their aspect ratio in at most so many patches; {_ONE_SIZE}")
        return found | ({"not here": (self.remarks, "")} if self.remarks else {})


def processor_facts(content: Mapping[str, Any], model_type: Any = None) -> Facts:
    """Return the facts of a preprocessor_config.json, or of the part of a processor_config.json that is about images.

    Values for unscaled pixels are divided by the scale. Under "not here" stands what is not used.

    Args:
        content: the JSON object.
        model_type: what a config.json calls the model, if there is one.
    """
    inner = content.get("image_processor")
    if isinstance(inner, Mapping):
        content = inner
    named = content.get("image_processor_type", content.get("feature_extractor_type"))
    match = _CLASS.fullmatch(named) if isinstance(named, str) else None
    kind = match[1] if match and match[1] in _CLASSES else None
    if kind is None and not {"image_mean", "image_std"} & content.keys():
        return {}
    if named is None:
        kind = _TYPES[model_type][0] if isinstance(model_type, str) and model_type in _TYPES else None
    file = _File(content, kind)
    if named is not None and kind is None:
        file.remarks.append(f"its type, {text_of(named)[:40]}, is not known: what it leaves out is assumed")
    return file.facts()


def facts_of_type(model_type: Any) -> Facts:
    """Return how images are prepared for published models of one of transformers' types; {} if it is not known."""
    if not isinstance(model_type, str) or model_type not in _TYPES:
        return {}
    kind, published = _TYPES[model_type]
    found = _File(published, kind).facts()
    why = f"as published models of type {model_type}; no file of their processor is there"
    return {what: (value, why) for what, (value, _) in found.items() if what not in ("image_size", "not here")}


def _normalisation(file: _File) -> Facts:
    found: Facts = {}
    scale = 255.0  # of the pixels that mean and std are for, as a factor of 0..1
    if file.flag("do_rescale", True):
        factor = file.get("rescale_factor", 1 / 255)
        if not is_number(factor) or not 0 < factor < _LARGEST:
            file.remark("rescale_factor")
            factor = 1 / 255
        scale = 255.0 * factor
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    normalised = file.flag("do_normalize", True)
    for what in ("mean", "std"):
        key = f"image_{what}"
        value, where = file.get(key), file.place(key)
        if not normalised:
            value, where = [0.0 if what == "mean" else 1.0] * 3, "do_normalize"
        if is_number(value):
            value = [value] * 3
        if scale != 1 and isinstance(value, list | tuple) and all(is_number(v) and abs(v) < _LARGEST for v in value):
            value, where = [v / scale for v in value], f"{where}, for pixels of 0 to {scale:g}, divided by that"
        if value is not None:
            found[what] = value, where
    return found


def _resizing(file: _File) -> Facts:
    found: Facts = {}
    if "resample" in file:
        value = file.get("resample")
        is_known = value in INTERPOLATIONS or (type(value) is int and 0 <= value < len(INTERPOLATIONS))
        if is_known:
            name = INTERPOLATIONS[value] if isinstance(value, int) else value
            found["interpolation"] = name, file.place("resample")
        else:
            file.remark("resample", "none of Pillow's filters")
    crops = file.flag("do_center_crop", "crop_size" in file) and "crop_size" in file
    square = bool(file.get("square", not crops))
    size, crop = _size(file, "size", square), _size(file, "crop_size", True) if crops else None
    if not file.flag("do_resize", True):
        file.remark("do_resize", "here images are resized")
        size = None
    if crop is not None and "crop_size" in file.stated:
        found["image_size"] = list(crop[1:]), "crop_size"
    elif size is not None and not crops and "size" in file.stated:
        found["image_size"] = list(size[1:]), "size"
    if size is None:
        return found
    mode, *sides = size
    found["crop_mode"] = mode, file.place("size")
    if crop is None:
        found["crop_pct"] = 1.0, "no crop"
        if mode != "squash":
            file.remark("size", "images keep their aspect ratio without a crop; here their centre is cropped")
        return found
    shares = [_share(inside, of) for inside, of in zip(crop[1:], sides, strict=True)]
    if max(shares) > 1:
        file.remark("crop_size", "images get a margin; here they are resized to that")
    elif len(set(shares)) > 1:
        file.remark("crop_size", "of another aspect ratio than size; here both sides are cropped alike")
    found["crop_pct"] = min(1.0, *shares), file.place("crop_size", "size")
    return found


def _size(file: _File, key: str, square: bool) -> tuple[str, int, int] | None:
    """Return the crop mode that a size implies, height and width; None, with a remark, if it is none of the known.

    It is a number, height and width, or the length of the shorter edge.
    """
    value = file.get(key)
    if value is None:
        return None
    mode, sides = "squash", [value, value]
    if isinstance(value, Mapping):
        if edge := value.get("shortest_edge"):
            mode, sides = "center_floor", [edge, edge]
            if "longest_edge" in value:
                file.remark(key, "only shortest_edge is used")
        else:
            sides = [value.get("height"), value.get("width")]
    elif isinstance(value, list | tuple):
        sides = list(value)
    elif not square:
        mode = "center_floor"
    if len(sides) != 2 or not all(is_number(side) and 1 <= side < 1 << 20 and side == int(side) for side in sides):
        keeps = isinstance(value, Mapping) and ("longest_edge" in value or "max_height" in value)
        file.remark(key, f"images keep their aspect ratio; {_ONE_SIZE}" if keeps else "")
        return None
    return mode, int(sides[0]), int(sides[1])


def _share(crop: int, size: int) -> float:
    """Return the share `crop` of `size`, such that int(crop / share) is `size`."""
    share = crop / size
    while int(crop / share) < size:
        share = math.nextafter(share, 0)
    return share
