"""Named sizes of DeiT and LV-ViT. A model of another size is recognised too and is named by width and depth."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """A named size: facts that shapes do not show (heads, skip_lam), and facts that shapes are checked against."""

    family: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: int
    num_prefix: int = 1
    num_predictors: int = 0
    stem_dim: int = 0
    skip_lam: float = 1.0


# DeiT: Touvron et al. 2021, table 1. LV-ViT: Jiang et al. 2021, table 2, and TokenLabeling's model file.
# Dynamic ones: DynamicViT's infer.py.
_DENSE = {
    "deit-t": Arch("deit", 192, 12, 3, 4),
    "deit-256": Arch("deit", 256, 12, 4, 4),
    "deit-s": Arch("deit", 384, 12, 6, 4),
    "deit-b": Arch("deit", 768, 12, 12, 4),
    "lvvit-t": Arch("lvvit", 240, 12, 4, 3, stem_dim=64, skip_lam=1.0),
    "lvvit-s": Arch("lvvit", 384, 16, 6, 3, stem_dim=64, skip_lam=2.0),
    "lvvit-m": Arch("lvvit", 512, 20, 8, 3, stem_dim=64, skip_lam=2.0),
    "lvvit-l": Arch("lvvit", 768, 24, 12, 3, stem_dim=128, skip_lam=3.0),
}


_DYNAMIC = ("deit-t", "deit-256", "deit-s", "deit-b", "lvvit-s", "lvvit-m")


def _with(arch: Arch, **changes: int) -> Arch:
    return Arch(**{**vars(arch), **changes})


ARCHS: dict[str, Arch] = {
    **{f"dynamicvit-{name}": _with(_DENSE[name], num_predictors=3) for name in _DYNAMIC},
    **_DENSE,
    **{f"{name}-distilled": _with(_DENSE[name], num_prefix=2) for name in ("deit-t", "deit-s", "deit-b")},
}
