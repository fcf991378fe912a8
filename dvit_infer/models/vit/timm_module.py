"""Read the facts of a module of timm's VisionTransformer, Eva or Beit: what its weights do not show."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dvit_infer.errors import InputError
from dvit_infer.models.facts import NOT_YET, Facts
from dvit_infer.models.vit.timm_values import ACT_CLASSES, NO_ROPE, pool_of, rope_of, side_of

KINDS = {
    "VisionTransformer": "VisionTransformer",
    "VisionTransformerDistilled": "VisionTransformer",
    "Eva": "Eva",
    "Beit": "Beit",
}  # timm's classes -> the one that says what they compute
PREPROCESSING = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
_PARTS = {
    "blocks": ("Block", "EvaBlock"),
    "attn": ("Attention", "EvaAttention", "AttentionRope"),
    "mlp": ("Mlp", "GluMlp", "SwiGLU"),
    "patch_embed": ("PatchEmbed",),
    "attn_pool": ("AttentionPoolLatent",),
    "rope": ("RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMixed"),
}
_NORMS = ("LayerNorm", "LayerNormFp32")


def is_timm_module(module: nn.Module) -> bool:
    """Return whether a module is of one of timm's classes that are read here."""
    return type(module).__name__ in KINDS and type(module).__module__.startswith("timm.")


def module_facts(module: nn.Module) -> Facts:
    """Return the facts of a module of timm, which is not changed.

    Raises:
        InputError: it is none of timm's plain vision transformers.
    """
    if not is_timm_module(module):
        raise InputError(
            f"{type(module).__name__}: a module of none of timm's classes {', '.join(KINDS)}; timm.create_model makes "
            "them, and a subclass may compute anything"
        )
    found = {name: (value, f"the module's {where}") for name, (value, where) in _facts(module).items()}
    if (reason := reason_of(module)) is not None:
        found["unsupported"] = f"{reason}; {NOT_YET}", "the module"
    found["owner"] = "timm", "the module's class"
    return found


def reason_of(module: nn.Module) -> str | None:
    """Return in a few words why a module of timm cannot be read, or None."""
    return next(_reasons(module), None)


def _facts(module: Any) -> Facts:
    block = module.blocks[0]
    dim, patch = module.embed_dim, module.patch_embed.patch_size
    found: Facts = {
        "embed_dim": (dim, "embed_dim"),
        "depth": (len(module.blocks), "blocks"),
        "patch_size": (side_of(patch) or tuple(patch), "patch_embed.patch_size"),
        "resample": ("timm", "class"),
        "rope": (_rope(module), "rope"),
    }
    if hasattr(block, "attn"):
        found["num_heads"] = block.attn.num_heads, "blocks.0.attn.num_heads"
    if (fc2 := getattr(getattr(block, "mlp", None), "fc2", None)) is not None:
        found["mlp_dim"] = fc2.in_features, "blocks.0.mlp.fc2"
    if act := _act(block):
        found["act"] = act, "blocks.0.mlp.act"
    for norm in _norms(module):
        found.setdefault("eps", (float(norm.eps), "LayerNorms"))
    if isinstance(module.head, nn.Linear | nn.Identity):  # a new head may have been put in without telling the module
        found["num_classes"] = getattr(module.head, "out_features", 0), "head"
    pool = _pool(module)[0]
    if pool is not None:
        found["pool"] = pool, "global_pool"
    if pool in ("map", "map_all"):
        found["map_heads"] = module.attn_pool.num_heads, "attn_pool.num_heads"
        if act := _act(module.attn_pool):
            found["map_act"] = act, "attn_pool.mlp.act"
    if (size := _image_size(module)) is not None:
        found["image_size"] = size
    cfg = _pretrained_cfg(module)
    found |= {
        what: (list(value) if isinstance(value, tuple) else value, f"pretrained_cfg.{what}")
        for what in PREPROCESSING
        if (value := cfg.get(what)) is not None
    }
    if isinstance(name := cfg.get("architecture"), str) and name:
        found["model"] = name, "pretrained_cfg.architecture"
    return found


def _reasons(module: Any) -> Iterator[str]:
    """Yield why the module cannot be read, each reason in a few words."""
    for part in (module.patch_embed, getattr(module, "rope", None), getattr(module, "attn_pool", None)):
        name = next((name for name in _PARTS if part is not None and getattr(module, name, None) is part), "")
        if part is not None and type(part).__name__ not in _PARTS[name]:
            yield f"its {name} is a {type(part).__name__}"
    if not isinstance(getattr(module.patch_embed, "norm", nn.Identity()), nn.Identity):
        yield "it has a norm in patch_embed"
    if side_of(module.patch_embed.patch_size) is None:
        yield f"its patches are {'x'.join(map(str, module.patch_embed.patch_size))}"
    for index, block in enumerate(module.blocks):
        if type(block).__name__ not in _PARTS["blocks"]:
            yield f"its blocks are {type(block).__name__}"
        yield from (f"{reason} (block {index})" for reason in _of_a_block(block, module))
    tables = [getattr(getattr(block, "attn", None), "relative_position_bias_table", None) for block in module.blocks]
    if getattr(module, "rel_pos_bias", None) is not None and any(table is not None for table in tables):
        yield "its blocks have relative positions beside those that they share"
    if len({block.attn.num_heads for block in module.blocks if hasattr(block, "attn")}) > 1:
        yield "its blocks have different numbers of heads"
    for layer in module.modules():
        if "Norm" in type(layer).__name__ and type(layer).__name__ not in _NORMS:
            yield f"it has a {type(layer).__name__}"
    if len(eps := {norm.eps for norm in _norms(module)}) > 1:
        yield f"its LayerNorms have different eps: {', '.join(f'{value:g}' for value in sorted(eps))}"
    if (reason := _pool(module)[1]) is not None:
        yield reason
    if getattr(module, "attn_pool", None) is not None:
        yield from _of_the_attention_pool(module.attn_pool)
    yield from _of_the_rope(module)
    if not isinstance(module.head, nn.Linear | nn.Identity):
        yield f"its head is a {type(module.head).__name__}"


def _of_a_block(block: Any, module: Any) -> Iterator[str]:
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    for name, part in (("attn", attn), ("mlp", mlp)):
        if part is not None and type(part).__name__ not in _PARTS[name]:
            yield f"its {name} is a {type(part).__name__}"
    if attn is None or mlp is None:
        return
    if getattr(attn, "gate", None) is not None:
        yield "its attention is gated"
    if getattr(attn, "num_kv_heads", attn.num_heads) != attn.num_heads:
        yield f"it has {attn.num_heads} heads of queries and {attn.num_kv_heads} of keys"
    if attn.proj.in_features != module.embed_dim:
        yield f"its heads are {attn.proj.in_features} wide together, its tokens {module.embed_dim}"
    elif abs(attn.scale - (module.embed_dim // attn.num_heads) ** -0.5) > 1e-6:
        yield f"its attention is scaled by {attn.scale:g}"
    if attn.proj.bias is None or mlp.fc2.bias is None:
        yield "its branches end without a bias"
    if getattr(mlp, "gate_last", False):
        yield "its MLP is gated by the second half of fc1"
    if _act(block) is None:
        yield f"its activation is {type(mlp.act).__name__}"
    for first, second in (("ls1", "ls2"), ("gamma_1", "gamma_2")):
        one, two = (_is_there(getattr(block, name, None)) for name in (first, second))
        if one != two:
            yield "one branch alone has a layer scale"


def _of_the_attention_pool(pool: Any) -> Iterator[str]:
    if type(pool).__name__ not in _PARTS["attn_pool"]:
        return
    odd = (
        pool.latent_len != 1,
        pool.pos_embed is not None,
        _is_there(pool.q_norm),
        not isinstance(pool.q, nn.Linear),
        not _is_there(pool.norm),
        pool.mlp is None,
        pool.pool != "token",
    )
    if any(odd):
        yield "its attention pool is another than SigLIP's"
    elif _act(pool) is None:
        yield f"the activation of its attention pool is {type(pool.mlp.act).__name__}"


def _of_the_rope(module: Any) -> Iterator[str]:
    rope: Any = getattr(module, "rope", None)
    name = type(rope).__name__
    half = getattr(rope, "rotate_half", False)
    if rope is not None and any(getattr(block.attn, "rotate_half", False) != half for block in module.blocks):
        yield "its attention pairs channels in another way than its rotary positions"
    if name == "RotaryEmbeddingCat":
        if rope.in_pixels or getattr(rope, "grid_type", "index") != "index":
            yield "its rotary positions count pixels"
        if rope.ref_feat_shape is not None and side_of(rope.ref_feat_shape) is None:
            yield f"its rotary positions refer to a grid of {'x'.join(map(str, rope.ref_feat_shape))}"
    if name == "RotaryEmbeddingDinoV3":
        if rope.min_period is not None and rope.max_period is not None:
            yield "the periods of its rotary positions have a least and a largest"
        if rope.normalize_coords != "separate":
            yield f"the coordinates of its rotary positions are normalised by {rope.normalize_coords!r}"


def _rope(module: Any) -> dict[str, Any] | str:
    rope: Any = getattr(module, "rope", None)
    name = type(rope).__name__
    if name not in _PARTS["rope"]:
        return NO_ROPE
    xy = rope.grid_indexing == "xy"
    if name == "RotaryEmbeddingMixed":
        return rope_of("mixed", rope.temperature, xy=xy)
    if name == "RotaryEmbeddingDinoV3":
        return rope_of("centered", rope.temperature or 100.0, 0, rope.grid_offset, xy, rope.rotate_half)
    ref = 0 if rope.ref_feat_shape is None else side_of(rope.ref_feat_shape) or 0
    return rope_of("index", rope.temperature, ref, rope.grid_offset, xy, rope.rotate_half)


def _pool(module: Any) -> tuple[str | None, str | None]:
    include = getattr(module, "pool_include_prefix", False)
    return pool_of(module.global_pool, KINDS[type(module).__name__], include)


def _act(part: Any) -> str | None:
    act = getattr(getattr(part, "mlp", None), "act", None)
    if isinstance(act, nn.GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    return ACT_CLASSES.get(type(act).__name__)


def _norms(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if type(layer).__name__ in _NORMS]


def _is_there(part: object) -> bool:
    return part is not None and not isinstance(part, nn.Identity)


def _image_size(module: Any) -> tuple[Any, str] | None:
    """Return the size it was built for; for one that takes any size, and was given none, that of its preprocessing."""
    cfg, asked = _pretrained_cfg(module), getattr(module, "_traits", {}).get("img_size")
    wanted = cfg.get("input_size")
    if getattr(module, "dynamic_img_size", False) and not asked and isinstance(wanted, list | tuple):
        return list(wanted[1:]), "pretrained_cfg.input_size"
    size = module.patch_embed.img_size
    return None if size is None else (list(size), "patch_embed.img_size")


def _pretrained_cfg(module: Any) -> Mapping[str, Any]:
    cfg = getattr(module, "pretrained_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}
