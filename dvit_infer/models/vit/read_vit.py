"""Read any other plain ViT: from timm, Hugging Face, Meta, big_vision, CLIP or SigLIP, under timm's names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dvit_infer.config import Config, Size
from dvit_infer.errors import InputError
from dvit_infer.models import facts as check
from dvit_infer.models.reading import Reading
from dvit_infer.models.vit.body import ACTS, POOLS, RESAMPLES, ViT
from dvit_infer.models.vit.parts import check_channels, finished_config, note_trained_as, num_heads_of, one_of
from dvit_infer.models.vit.pos_embed import RULES
from dvit_infer.models.vit.sizes import bare_size_of, image_size_of, note_resampled, patch_size_of, placed_size_of

# Heads of wide models, which have other than 64 channels: So400m, H/14, g/14, G/14, and EVA02's E/14.
_HEADS = {1152: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}
_ROPES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "dinov3": {"kind": "centered", "theta": 100.0, "half": True},
    "eva02": {"kind": "index", "theta": 10000.0, "ref": 16},
    "axial": {"kind": "index", "theta": 100.0, "xy": True},
    "mixed": {"kind": "mixed", "xy": True},
}
_SIGNS = (
    *("reg_token", "norm_pre.", "fc_norm.", "attn_pool.", "pre_logits.", "rope.", "rel_pos_bias."),
    *("blocks.0.attn.relative_position", "blocks.0.attn.q_", "blocks.0.attn.k_", "blocks.0.attn.norm."),
    *("blocks.0.mlp.norm.", "blocks.0.mlp.fc1_", "blocks.0.gamma_"),
)


def is_other_vit(read: Reading) -> bool:
    """Return whether a file holds a plain ViT with a part, or a stated fact, that no DeiT has."""
    shapes = read.shapes
    if "patch_embed.proj.weight" not in shapes or not any(key.startswith("blocks.") for key in shapes):
        return False
    if read.stored is not None:
        return read.stored.family == "vit"
    if any(key.startswith("score_predictor.") for key in shapes):  # a DynamicViT, perhaps with a key too many
        return False
    usual = {"owner": ("timm",), "act": ("gelu",), "pool": ("token",), "rope": ("none",)}
    stated = {what: read.value_of(what) for what in (*usual, "unsupported")} | read.given
    if any(stated.get(what) not in (None, *allowed) for what, allowed in usual.items()) or stated["unsupported"]:
        return True
    model = read.value_of("model")
    if isinstance(model, str) and read.value_of("owner") == "timm" and not model.startswith("deit"):
        return True
    if any(key.startswith(_SIGNS) for key in shapes) or _is_packed(read):
        return True
    positions = shapes.get("pos_embed", ())
    without_class = "cls_token" not in shapes and len(positions) == 3 and check.is_square(positions[1])
    has_classes = any(key.startswith(("head.", "head_dist.")) for key in shapes)
    return without_class or not has_classes


def read_vit(read: Reading, arch: str | None, options: Mapping[str, Any]) -> Config:
    """Build a Config from keys, shapes, given facts, those of the file and beside it, and, last, assumptions."""
    if read.states("unsupported"):
        reason, where = read.stated("unsupported")
        raise InputError(f"{read.name}: {reason} ({where})")
    if read.stored is not None:
        assert isinstance(read.stored.body, ViT)
        body, trained_size, classes = (
            _as_given(read, read.stored.body),
            read.stored.trained_size,
            read.stored.num_classes,
        )
    else:
        check_channels(read, "patch_embed.proj.weight")
        body, trained_size, classes = _body(read)
    image_size = image_size_of(read, options.get("image_size"), trained_size, body.patch_size)
    _check_size(read, body, image_size, trained_size)
    name = read.value_of("model") or f"vit-{body.embed_dim}x{body.depth}"
    if read.stored is None:
        name = name if read.value_of("owner") in (None, "timm") else f"{name}-{body.embed_dim}x{body.depth}"
        what = f"{classes} classes" if classes else f"no classifier, an embedding of {body.pooled_dim} channels"
        read.note("read", "arch", name, f"keys and shapes: {body.embed_dim} wide, {body.depth} blocks, {what}")
    else:
        name = read.stored.arch
    note_trained_as(read, 0)
    return finished_config(
        read,
        options,
        arch=name,
        family="vit",
        num_classes=classes,
        image_size=image_size,
        trained_size=trained_size,
        body=body,
    )


def _body(read: Reading) -> tuple[ViT, Size, int]:
    """Return the facts of a model, the size that it was trained at, and the number of its classes."""
    shapes = read.shapes
    dim, depth = _agreed(read, "embed_dim", _width(read)), _agreed(read, "depth", read.count("blocks."))
    block = [f"blocks.{i}" for i in range(depth)]
    mlp_dim = read.vote("the MLP's width", [(f"{b}.mlp.fc2.weight", 1) for b in block])
    mlp_dim = _agreed(read, "mlp_dim", mlp_dim)
    patch = _agreed(read, "patch_size", patch_size_of(read, 1))
    registers = shapes["reg_token"][1] if len(shapes.get("reg_token", ())) == 3 else 0
    prefix = sum(name in shapes for name in ("cls_token", "dist_token")) + registers
    facts: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_prefix": prefix,
        "num_registers": registers,
        "no_pos_embed": "pos_embed" not in shapes,
        "norm_pre": "norm_pre.weight" in shapes,
        "no_patch_bias": "patch_embed.proj.bias" not in shapes,
        "layer_scale": _has(read, block, ".ls1.gamma", ".ls2.gamma", ".gamma_1", ".gamma_2"),
        "gamma": _has(read, block, ".gamma_1", ".gamma_2"),
        "qk_norm": _has(read, block, ".attn.q_norm.weight", ".attn.k_norm.weight"),
        "attn_norm": _has(read, block, ".attn.norm.weight", ".attn.norm.bias"),
        "mlp_norm": _has(read, block, ".mlp.norm.weight", ".mlp.norm.bias"),
        "gated": "split"
        if _has(read, block, ".mlp.fc1_g.weight", ".mlp.fc1_x.weight")
        else "packed" * _is_packed(read),
        "no_norm": "norm.weight" not in shapes,
        "fc_norm": "fc_norm.weight" in shapes,
        "pre_logits": "pre_logits.fc.weight" in shapes,
        "owner": read.value_of("owner") or "timm",
    }
    facts |= _queries(read, block) | _rope(read, facts)
    facts["num_heads"] = num_heads_of(read, dim, _heads(dim))
    clip_like = facts["norm_pre"] or (facts["rope"] == "centered")
    eps = read.resolve("eps", 1e-5 if clip_like else 1e-6, "of CLIP and DINOv3" if clip_like else "timm's")
    facts["eps"] = check.positive_float(read.origin("eps"), eps)
    facts["act"] = one_of(
        read, "act", "silu" if facts["gated"] else "gelu", "of a gated MLP" if facts["gated"] else "the usual", ACTS
    )
    facts |= _relative_positions(read, block)
    trained_size, places = (
        (bare_size_of(read, patch), {}) if facts["no_pos_embed"] else placed_size_of(read, patch, prefix, registers)
    )
    facts |= places
    if not facts["no_pos_embed"] or facts["rel_pos"]:
        facts["resample"] = one_of(read, "resample", "timm", "timm's", RESAMPLES)
    pooled, classes = _head(read, facts)
    return ViT(**facts, **pooled), trained_size, classes


def _as_given(read: Reading, body: ViT) -> ViT:
    """Return the body of a saved file with the facts that were given."""
    changes = {}
    for what, known in (("act", ACTS), ("pool", POOLS), ("resample", RESAMPLES)):
        if read.given.get(what) is not None:
            changes[what] = one_of(read, what, None, "", known)
    if read.given.get("num_heads") is not None:
        changes["num_heads"] = num_heads_of(read, body.embed_dim)
    if read.given.get("eps") is not None:
        changes["eps"] = check.positive_float("eps", read.resolve("eps", None, ""))
    return replace(body, **changes)


def _width(read: Reading) -> int:
    places = [
        ("norm.weight", 0),
        ("cls_token", 2),
        ("pos_embed", 2),
        ("blocks.0.norm1.weight", 0),
        ("fc_norm.weight", 0),
    ]
    return read.vote("the width", [*places, ("patch_embed.proj.weight", 0)])


def _agreed(read: Reading, what: str, found: int) -> int:
    """Return a number that shapes show, and raise InputError if another one is stated."""
    if read.states(what):
        value, where = read.stated(what)
        if value != found:
            raise InputError(
                f"{read.name}: {where} says {what} {check.text_of(value)[:40]}, but its weights have {found}"
            )
    return found


def _has(read: Reading, blocks: list[str], *endings: str) -> bool:
    """Return whether most blocks have these weights, so that one without is reported."""
    return 2 * sum(f"{block}{end}" in read.shapes for block in blocks for end in endings[:2]) > 2 * len(blocks) or (
        len(endings) > 2 and _has(read, blocks, *endings[2:])
    )


def _is_packed(read: Reading) -> bool:
    inner, outer = (read.shapes.get(f"blocks.0.mlp.{fc}.weight", ()) for fc in ("fc1", "fc2"))
    return len(inner) == len(outer) == 2 and inner[0] == 2 * outer[1]


def _heads(dim: int) -> tuple[int, str] | None:
    return (_HEADS[dim], f"heads of {dim // _HEADS[dim]} channels") if dim in _HEADS else None


def _queries(read: Reading, block: list[str]) -> dict[str, Any]:
    """Return the form of queries, keys and values."""
    if _has(read, block, ".attn.q_proj.weight", ".attn.k_proj.weight"):
        unbiased = "".join(p for p in "qkv" if not _has(read, block, *(2 * [f".attn.{p}_proj.bias"])))
        return {"qkv": "q_proj", "unbiased": unbiased, "no_qkv_bias": unbiased == "qkv"}
    if _has(read, block, ".attn.q_bias", ".attn.v_bias"):
        return {"qkv": "q_bias", "unbiased": "k"}
    without = not any(key.endswith(".attn.qkv.bias") for key in read.shapes)
    return {"no_qkv_bias": without}


def _rope(read: Reading, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts of rotary positions, of which a file holds frequencies at most."""
    shapes = read.shapes
    eva = facts["gated"] and not facts["no_pos_embed"] and any(".attn.q_" in key for key in shapes)
    relative = any(key.endswith("relative_position_bias_table") for key in shapes)
    if "rope.freqs" in shapes:
        assumed, why = "mixed", "keys: rope.freqs"
    elif "rope.periods" in shapes or (facts["no_pos_embed"] and not relative and facts["num_registers"]):
        assumed, why = "dinov3", "no position embedding, and registers"
    elif eva:
        assumed, why = "eva02", "keys of EVA02"
    else:
        assumed, why = "none", ""
    if assumed == "none" and not read.states("rope"):
        if facts["no_pos_embed"] and not relative:
            raise InputError(
                f"{read.name}: missing key pos_embed; assume rope={'|'.join(_ROPES)} if it has rotary positions"
            )
        return {"rope": ""}
    stated = read.resolve("rope", assumed, why)
    rope = _ROPES.get(stated) if isinstance(stated, str) else stated if read.given.get("rope") is None else None
    if not isinstance(rope, Mapping):
        raise InputError(f"{read.origin('rope')}: {str(stated)[:40]!r} is not one of {', '.join(_ROPES)}")
    found = {"rope": rope.get("kind", ""), "rope_periods": "rope.periods" in shapes}
    return found | {f"rope_{name}": value for name, value in rope.items() if name != "kind"}


def _relative_positions(read: Reading, block: list[str]) -> dict[str, Any]:
    if "rel_pos_bias.relative_position_bias_table" in read.shapes:
        return {"rel_pos": "shared"}
    return {"rel_pos": "blocks" if _has(read, block, *(2 * [".attn.relative_position_bias_table"])) else ""}


def _head(read: Reading, facts: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return the facts of pooling and head, and the number of classes."""
    shapes, dim = read.shapes, facts["embed_dim"]
    weight = shapes.get("head.weight", ())
    projects = len(weight) == 2 and ("head.bias" not in shapes or bool(read.value_of("projection")))
    rows = read.vote("the classes", [(f"head.{p}", 0) for p in ("weight", "bias")]) if "head.weight" in shapes else 0
    classes = 0 if projects else rows
    if read.states("num_classes"):
        stated, where = read.stated("num_classes")
        if not (projects or "head.weight" in shapes) and stated:
            raise InputError(f"{read.name}: has no classifier (no head.weight), but {where} says {stated} classes")
        if projects and stated and "head.bias" not in shapes:
            file_key = read.in_file("head.weight")
            raise InputError(f"{read.name}: {file_key} has no bias beside it, but {where} says {stated} classes")
        _agreed(read, "num_classes", classes)
    has_class = facts["num_prefix"] > facts["num_registers"]
    if "attn_pool.latent" in shapes:
        assumed, why = "map", "keys: attn_pool"
    elif len(weight) == 2 and weight[1] == 2 * dim:
        assumed, why = "token_mean", f"head.weight reads {2 * dim} channels"
    elif not has_class or facts["fc_norm"]:
        assumed, why = "mean", "keys: fc_norm" if has_class else "there is no class token"
    elif facts["rope"] == "centered" and facts["owner"] == "timm":
        assumed, why = "mean", "timm's DINOv3"
    else:
        assumed, why = "token", "the usual"
    pool = one_of(read, "pool", assumed, why, POOLS)
    found: dict[str, Any] = {"pool": pool, "projection": rows if projects else 0}
    found["no_head_bias"] = len(weight) == 2 and "head.bias" not in shapes
    # timm reads both tokens of a distilled model without classifier; Hugging Face never reads the second one alone.
    reads_both = facts["owner"] == "timm" and "head.weight" not in shapes
    found["no_head_dist"] = "dist_token" in shapes and "head_dist.weight" not in shapes and not reads_both
    if pool.startswith("map"):
        found["map_mlp_dim"] = read.shape("attn_pool.mlp.fc1.weight", 2)[0]
        heads = read.resolve("map_heads", facts["num_heads"], "those of the blocks")
        found["map_heads"] = check.positive_int(read.origin("map_heads"), heads)
        found["map_act"] = one_of(read, "map_act", facts["act"], "that of the blocks", ACTS)
    return found, classes


def _check_size(read: Reading, body: ViT, image_size: Size, trained_size: Size) -> None:
    if image_size == trained_size or (body.no_pos_embed and not body.rel_pos):
        return
    if body.rel_pos and body.resample != "huggingface":
        raise InputError(
            f"image_size: {image_size[0]}x{image_size[1]} needs other relative positions than {read.name} holds, which "
            "only Hugging Face's rule resamples here; assume resample=huggingface takes it"
        )
    if body.rel_pos:
        note_resampled(read, "bilinear, as Hugging Face", trained_size, image_size, "relative positions")
    if not body.no_pos_embed:
        note_resampled(read, RULES[body.resample], trained_size, image_size)
