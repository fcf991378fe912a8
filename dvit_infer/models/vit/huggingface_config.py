"""Read the facts of Hugging Face's config.json of a vision transformer, for which files may be sparse."""

from collections.abc import Mapping
from typing import Any

from dvit_infer.models.facts import NOT_YET, Facts, is_number, text_of
from dvit_infer.models.vit.timm_values import rope_of, side_of

_ACTS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # of a constant with ten digits
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}  # transformers/activations.py: ACT2CLS
_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
}
_DINOV2 = {**_BASE, "intermediate_size": None, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False}
_SIGLIP = {**_BASE, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True}
# transformers 5.24, models/*/configuration_*.py: what its classes take for a key that is missing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": {**_BASE, "pooler_act": "tanh"},
    "deit": {**_BASE, "pooler_act": "tanh"},
    "beit": {**_BASE, "use_mean_pooling": True},
    "vit_mae": _BASE,
    "dinov2": {**_DINOV2, "patch_size": 14},
    "dinov2_with_registers": _DINOV2,
    "dinov3_vit": {
        **_BASE,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "proj_bias": True,
        "mlp_bias": True,
    },
    "clip": {**_BASE, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32},
    "siglip": _SIGLIP,
    "siglip2": {**_SIGLIP, "image_size": None},
}
_TOWERS = {f"{name}_vision_model": name for name in ("clip", "siglip", "siglip2")}
_SHOWN = ("embed_dim", "depth", "mlp_dim", "patch_size")
_CHECKED = {
    "num_heads": "num_attention_heads",
    "eps": "layer_norm_eps",
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
}


def huggingface_facts(content: Mapping[str, Any]) -> Facts:
    """Return the facts of Hugging Face's config.json.

    Its image size counts only where no preprocessor states another: position embeddings are resampled.

    Args:
        content: with "model_type"; of CLIP and SigLIP the vision tower counts.
    """
    model_type = str(content["model_type"])
    name = _TOWERS.get(model_type, model_type)
    if name not in _DEFAULTS:
        known = ", ".join(_DEFAULTS)
        reason = f"model_type is {text_of(model_type)[:40]!r}, none of Hugging Face's that are read here: {known}"
        return {"unsupported": (reason, "model_type"), "owner": ("huggingface", "model_type")}
    tower, inside = _tower(content) if name in _TOWERS.values() else (content, "")

    def get(key: str) -> tuple[Any, str]:
        stated = tower.get(key)
        if stated is not None:
            return stated, f"{inside}{key}"
        return _DEFAULTS[name].get(key), f"no {inside}{key}, so transformers' for {name}"

    found: Facts = {what: get(key) for what, key in _CHECKED.items()}
    found |= {
        "owner": ("huggingface", "model_type"),
        "model": (name, "model_type"),
        "resample": ("siglip2" if name == "siglip2" else "huggingface", "model_type"),
        "rope": ("none", "model_type"),
    }
    if name == "dinov2_with_registers" and tower.get("num_register_tokens") == 0:
        found["resample"] = "timm", "num_register_tokens"  # with antialiasing, which transformers' dinov2 has not
    patch, key = get("patch_size")
    found["patch_size"] = side_of(patch) or patch, key
    size, key = get("image_size")
    is_of_images = tower.get("image_size") is not None or name == "dinov3_vit"  # without it the positions show theirs
    if is_of_images and name != "siglip2":
        found["image_size"] = (list(size) if isinstance(size, list | tuple) else size), key
    act, key = get("hidden_act")
    if name.startswith("dinov2"):
        found["mlp_dim"] = _dinov2_mlp(get), get("mlp_ratio")[1]
        act = "silu" if get("use_swiglu_ffn")[0] else act
    if isinstance(act, str) and act in _ACTS:
        found["act"] = _ACTS[act], key
    else:
        found["unsupported"] = f"hidden_act is {text_of(act)[:40]!r}, none of {', '.join(_ACTS)}; {NOT_YET}", key
    if name == "dinov3_vit":
        theta, where = get("rope_theta")
        found["rope"] = rope_of("centered", theta if is_number(theta) else 0.0, half=True), where
    found |= _pooling(name, _classes_of(content), get)
    if (classes := _num_classes(content)) is not None:
        found["num_classes"] = classes
    if unread := _unread(content, get):
        found["unsupported"] = unread
    unstated = {what for what in _SHOWN if found.get(what, ("", ""))[1].startswith("no ")}  # shapes show what counts
    return {what: fact for what, fact in found.items() if fact[0] is not None and what not in unstated}


def _tower(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the config of the vision tower, and what to call it; CLIP's first files have it twice."""
    for key in ("vision_config_dict", "vision_config"):
        if isinstance(inner := content.get(key), Mapping):
            return inner, f"{key}."
    return content, ""


def _dinov2_mlp(get: Any) -> int | None:
    dim, ratio = get("hidden_size")[0], get("mlp_ratio")[0]
    if not is_number(dim) or not is_number(ratio):
        return None
    hidden = int(dim * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if get("use_swiglu_ffn")[0] else hidden


def _classes_of(content: Mapping[str, Any]) -> str:
    """Return the name of the class that wrote the file; "": it is not stated."""
    names = content.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _pooling(name: str, written_by: str, get: Any) -> Facts:
    classifies = "ForImageClassification" in written_by
    if name == "beit":
        mean, key = get("use_mean_pooling")
        return {"pool": ("mean" if mean else "token", key)}
    if name in ("siglip", "siglip2"):
        if classifies:
            return {"pool": ("mean", f"architectures: {written_by[:40]}")}
        heads, act = get("num_attention_heads"), get("hidden_act")
        head, key = get("vision_use_head")
        if not head:
            return {"unsupported": (f"vision_use_head is false: it returns tokens, no embedding; {NOT_YET}", key)}
        return {"pool": ("map", key), "map_heads": heads, "map_act": (_ACTS.get(str(act[0])), act[1])}
    theirs = written_by.lower().startswith(name.partition("_")[0])  # "" and a user's own class are not
    if not theirs and name in ("clip", "dinov2", "dinov2_with_registers"):
        return {}  # a classifier of theirs reads something else, and the weights show if there is one
    pool = {"clip": "mean", "dinov2": "token_mean", "dinov2_with_registers": "token_mean"}.get(name, "token")
    return {
        "pool": (pool if classifies else "token", f"architectures: {written_by[:40]}" if written_by else "model_type")
    }


def _num_classes(content: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return the classes of a classifier; of other models id2label, which has two names by default, says nothing."""
    if "ForImageClassification" not in _classes_of(content):
        return None
    labels, count = content.get("id2label"), content.get("num_labels")
    if isinstance(labels, Mapping):
        return len(labels), "id2label"
    return (count, "num_labels") if isinstance(count, int) else None


def _unread(content: Mapping[str, Any], get: Any) -> tuple[str, str] | None:
    code = content.get("auto_map")
    if isinstance(code, Mapping) and any(str(name).startswith("AutoModel") for name in code):
        reason = "auto_map names code that came with the weights, which is never run: what it computes is not known"
        return f"{reason}; without auto_map they are read as the model that model_type names", "auto_map"
    for name, usual in (("proj_bias", True), ("mlp_bias", True), ("pooler_act", "tanh")):
        value, key = get(name)
        if value not in (None, usual):
            return f"{name} is {text_of(value)[:40]}, which is not supported; {NOT_YET}", key
    return None
