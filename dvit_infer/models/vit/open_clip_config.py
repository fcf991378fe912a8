"""Read the facts of open_clip_config.json: of the image tower and of its images."""

from collections.abc import Mapping
from typing import Any

from dvit_infer.models.facts import Facts
from dvit_infer.models.vit.timm_config import timm_facts
from dvit_infer.models.vit.timm_values import side_of

_ITS_OWN = ("num_classes", "owner")  # facts of a timm model that do not hold for a tower


def open_clip_facts(content: Mapping[str, Any]) -> Facts:
    """Return the facts of a config of open_clip, as `push_to_hf_hub` writes it beside the weights.

    Args:
        content: with "model_cfg", which has a "vision_cfg", and "preprocess_cfg".
    """
    model, images = _mapping(content.get("model_cfg")), _mapping(content.get("preprocess_cfg"))
    tower, at = _mapping(model.get("vision_cfg")), "model_cfg.vision_cfg"
    if not tower:
        return {}
    found: Facts = {
        "owner": ("open_clip", "model_cfg"),
        "act": ("quick_gelu" if model.get("quick_gelu") is True else "gelu", "model_cfg.quick_gelu"),
    }
    width, of_head = tower.get("width"), tower.get("head_width", 64)
    if isinstance(width, int) and isinstance(of_head, int) and of_head > 0 and width % of_head == 0:
        found["num_heads"] = width // of_head, f"{at}.width over head_width"
        found["embed_dim"] = width, f"{at}.width"
    for what, key in (("depth", "layers"), ("patch_size", "patch_size"), ("image_size", "image_size")):
        value = tower.get(key)
        if what == "image_size" and isinstance(value, int | list):
            found[what] = value, f"{at}.{key}"
        elif what != "image_size" and (side := side_of(value)) is not None:
            found[what] = side, f"{at}.{key}"
    if isinstance(name := tower.get("timm_model_name"), str):  # the tower is timm's, whose registry knows it
        pool = {"global_pool": tower["timm_pool"]} if tower.get("timm_pool") in ("avg", "map", "token") else {}
        known = {
            what: fact for what, fact in timm_facts({"architecture": name, **pool}).items() if what not in _ITS_OWN
        }
        found = {**known, **{what: fact for what, fact in found.items() if what in ("owner", "image_size")}}
    for what in ("mean", "std", "interpolation"):
        if images.get(what) is not None:
            found[what] = images[what], f"preprocess_cfg.{what}"
    if images.get("resize_mode") == "squash":
        found["crop_mode"] = "squash", "preprocess_cfg.resize_mode"
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
