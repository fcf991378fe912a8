"""Find the facts of a model that a config.json describes, be it timm's or Hugging Face's; check that they are sound."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.models.facts import Facts, is_number
from dvit_infer.models.vit.body import ACTS, POOLS, RESAMPLES
from dvit_infer.models.vit.huggingface_config import huggingface_facts
from dvit_infer.models.vit.open_clip_config import open_clip_facts
from dvit_infer.models.vit.timm_config import timm_facts


def model_facts(content: Mapping[str, Any]) -> Facts:
    """Return the facts of the model that a JSON object describes; none if it describes no model.

    A model that is not known is no error: its weights may be of a family that asks for none of these facts.
    """
    key = "architecture"
    try:
        if isinstance(content.get(key), str):
            return timm_facts(content)
        key = "model_cfg.vision_cfg.timm_model_name"
        if isinstance(content.get("model_cfg"), Mapping):
            return open_clip_facts(content)
    except InputError as error:
        return {"unsupported": (str(error), key)}
    return huggingface_facts(content) if isinstance(content.get("model_type"), str) else {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _is_positive(value: Any) -> bool:
    return is_number(value) and math.isfinite(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_rope(value: Any) -> bool:
    if isinstance(value, str):
        return True
    whole = isinstance(value["ref"], int) and 0 <= value["ref"] < 1 << 16
    flags = isinstance(value["xy"], bool) and isinstance(value["half"], bool)
    return whole and flags and _is_positive(value["theta"]) and math.isfinite(value["offset"])


COUNTS = ("num_heads", "embed_dim", "depth", "patch_size", "mlp_dim", "map_heads")
# What each fact's value has to be: it may come from a file.
SOUND: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(COUNTS, _is_count),
    **dict.fromkeys(("unsupported", "owner", "model"), _is_text),
    "num_classes": lambda value: _is_count(value) or (value == 0 and not isinstance(value, bool)),
    "eps": _is_positive,
    "act": ACTS.__contains__,
    "map_act": ACTS.__contains__,
    "pool": POOLS.__contains__,
    "resample": RESAMPLES.__contains__,
    "rope": _is_rope,
}
