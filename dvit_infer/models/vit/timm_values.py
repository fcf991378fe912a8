"""Say in this project's words what timm's names stand for: activations, pooling, norms, rotary positions."""

from typing import Any

ACTS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu"}
ACT_CLASSES = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
NORMS = ("layernorm", "layernormfp32")  # with timm's eps, 1e-6
NO_ROPE = "none"
_LARGEST = "the largest of the patches"
_UNREAD_POOLS = {
    "max": f"its head reads {_LARGEST}",
    "avgmax": f"its head reads the mean and {_LARGEST}",
    "prr": "its head reads patches refined by one another",
    "": "it returns tokens, no embedding",
}


def pool_of(global_pool: object, kind: str, include_prefix: bool) -> tuple[str | None, str | None]:
    """Return the fact "pool", or None and the reason why this pooling cannot be read.

    Args:
        global_pool: timm's name for it.
        kind: the name of timm's class: Eva's attention pool reads prefix tokens, VisionTransformer's only if told to.
        include_prefix: timm's `pool_include_prefix`.
    """
    if global_pool == "token":
        return "token", None
    if global_pool == "avg":
        return ("mean_all" if include_prefix else "mean"), None
    if global_pool == "map":
        return ("map_all" if kind == "Eva" or include_prefix else "map"), None
    if isinstance(global_pool, str) and global_pool in _UNREAD_POOLS:
        return None, f"global_pool is {global_pool!r}: {_UNREAD_POOLS[global_pool]}"
    return None, f"global_pool is {str(global_pool)[:40]!r}, which timm does not have"


def rope_of(
    kind: str, theta: float = 100.0, ref: int = 0, offset: float = 0.0, xy: bool = False, half: bool = False
) -> dict[str, Any]:
    """Return the fact "rope" of a model that has rotary positions."""
    return {"kind": kind, "theta": float(theta), "ref": ref, "offset": float(offset), "xy": xy, "half": half}


def side_of(value: Any) -> int | None:
    """Return the side of a square: of a number, or of two equal ones; None: it is neither."""
    sides = list(value) if isinstance(value, list | tuple) else [value]
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    return sides[0] if whole and sides and len(sides) <= 2 and sides[0] == sides[-1] else None
