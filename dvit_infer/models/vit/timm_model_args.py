"""Apply the arguments with which a model of timm was built to the facts of its architecture."""

from collections.abc import Mapping
from typing import Any

from dvit_infer.models.facts import NOT_YET, Facts, is_number, text_of
from dvit_infer.models.vit.timm_values import ACTS, NO_ROPE, NORMS, rope_of, side_of

_FACTS = {
    "num_heads": "num_heads",
    "depth": "depth",
    "embed_dim": "embed_dim",
    "num_classes": "num_classes",
    "global_pool": "global_pool",
    "pool_include_prefix": "include_prefix",
    "attn_pool_num_heads": "map_heads",
}
# The names and shapes of the weights show them.
_SHOWN = """
    in_chans qkv_bias qkv_fused qk_norm scale_attn_norm scale_mlp_norm scale_mlp scale_attn_inner init_values
    class_token reg_tokens num_reg_tokens no_embed_class pos_embed use_abs_pos_emb pre_norm final_norm fc_norm
    use_fc_norm use_pre_transformer_norm use_post_transformer_norm use_rel_pos_bias use_shared_rel_pos_bias
    mlp_ratio swiglu_align_to attn_type attn_pool_mlp_ratio
"""
# Of training, of initial values, of images, or of how the same function is computed.
_HARMLESS = """
    drop_rate pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate weight_init fix_init
    head_init_scale rope_shift_coords rope_jitter_coords rope_rescale_coords img_size dynamic_img_size dynamic_img_pad
    strict_img_size qkv_bias_separate
"""
_IGNORED = frozenset(f"{_SHOWN} {_HARMLESS}".split())
# Those that only some values make another model.
_USUAL = {
    "use_post_norm": False,
    "attn_only_layer_scale": False,
    "gated_attn": False,
    "proj_bias": True,
    "attn_layer": "attn",
}
_ROPE = {
    "use_rot_pos_emb",
    "rope_type",
    "rope_temperature",
    "rope_grid_offset",
    "rope_grid_indexing",
    "rope_rotate_half",
    "ref_feat_shape",
}
_KNOWN = {*_IGNORED, *_FACTS, *_USUAL, *_ROPE, "patch_size", "act_layer", "norm_layer", "swiglu_mlp"}
_ROPE_KINDS = {"cat": "index", "dinov3": "centered", "mixed": "mixed"}


def known_args(args: object) -> dict[str, Any]:
    """Return those of timm's `model_args` that say what a model is, and not what timm is to load or run."""
    return {name: value for name, value in args.items() if name in _KNOWN} if isinstance(args, Mapping) else {}


def with_model_args(values: Facts, args: Mapping[str, Any]) -> Facts:
    """Return the facts of an architecture after timm's `model_args`.

    Args:
        values: its facts, and the names that pooling follows from.
        args: by timm's names; one that is not known makes the model unsupported.
    """
    out, args = (
        dict(values),
        {name: value for name, value in args.items() if value is not None},
    )  # as timm leaves it out
    for name, value in args.items():
        at = f"model_args.{name}"
        if name in _IGNORED or name in _ROPE:
            continue
        if name in _FACTS:
            out[_FACTS[name]] = value, at
        elif name == "patch_size":
            out["patch_size"] = side_of(value) or value, at
        elif name == "act_layer":
            _set(out, "act", ACTS.get(value) if isinstance(value, str) else None, name, value)
            if values["kind"][0] != "Eva":  # its attention pool always has the exact GELU
                _set(out, "map_act", ACTS.get(value) if isinstance(value, str) else None, name, value)
        elif name == "norm_layer":
            known = isinstance(value, str) and value.replace("_", "").lower() in NORMS
            _set(out, "eps", 1e-6 if known else None, name, value)
        elif name == "swiglu_mlp":
            out["act"] = ("silu" if value else "gelu"), at
        elif name not in _USUAL or value != _USUAL[name]:
            _set(out, "", None, name, value)
    if args.keys() & {"embed_dim", "mlp_ratio", "swiglu_mlp", "swiglu_align_to"}:
        out.pop("mlp_dim", None)  # the shapes show it
    of_eva = values["kind"][0] == "Eva"
    if "num_heads" in out and ("map_heads" not in out or ("num_heads" in args and not of_eva)):
        out["map_heads"] = out["num_heads"]
    out.setdefault("map_act", ("gelu", "timm's Eva") if of_eva else out["act"])
    if stated := _ROPE & args.keys():
        out["rope"] = _rope(out["rope"][0], args), f"model_args.{min(stated)}"
        if out["rope"][0] is None:
            what = ", ".join(f"{name} {text_of(args[name])[:20]}" for name in sorted(stated))
            reason = f"its rotary positions are of another kind: {what}; {NOT_YET}"
            out.setdefault("unsupported", (reason, f"model_args.{min(stated)}"))
    return {name: value for name, value in out.items() if value[0] is not None}


def _set(out: Facts, what: str, value: Any, name: str, stated: Any) -> None:
    """Set a fact; without a value, the argument changes the model in a way that is not known."""
    if value is None:
        reason = f"{text_of(name)[:40]} is {text_of(stated)[:40]}, which is not supported; {NOT_YET}"
        out.setdefault("unsupported", (reason, f"model_args.{text_of(name)[:40]}"))
    else:
        out[what] = value, f"model_args.{name}"


def _rope(known: Any, args: Mapping[str, Any]) -> dict[str, Any] | str | None:
    """Return the fact "rope" of timm's Eva after its arguments; None: there is no such kind."""
    has = args.get("use_rot_pos_emb", known != NO_ROPE)
    if not has:
        return NO_ROPE
    old = known if isinstance(known, Mapping) else rope_of("index", theta=10000.0)
    kind = _ROPE_KINDS.get(str(args["rope_type"])) if "rope_type" in args else old["kind"]
    theta, offset = args.get("rope_temperature", old["theta"]), args.get("rope_grid_offset", old["offset"])
    ref = side_of(args.get("ref_feat_shape", old["ref"]))
    if kind is None or ref is None or not is_number(theta) or not is_number(offset):
        return None
    xy = args["rope_grid_indexing"] == "xy" if "rope_grid_indexing" in args else old["xy"]
    return rope_of(kind, theta, ref if kind == "index" else 0, offset, xy, args.get("rope_rotate_half", old["half"]))
