"""The facts of a plain vision transformer. Does not import torch."""

from dataclasses import dataclass

from dvit_infer.config import Body
from dvit_infer.errors import InputError

_MOST_BLOCKS = 1000
ACTS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
POOLS = ("token", "mean", "mean_all", "token_mean", "map", "map_all")
ROPES = ("", "index", "centered", "mixed")
RESAMPLES = ("timm", "huggingface", "meta", "big_vision", "siglip2", "torchvision")
_NAMES = {
    "act": ACTS,
    "map_act": ACTS,
    "pool": POOLS,
    "rope": ROPES,
    "resample": RESAMPLES,
    "qkv": ("qkv", "q_bias", "q_proj"),
    "gated": ("", "packed", "split"),
    "rel_pos": ("", "blocks", "shared"),
}


@dataclass(frozen=True)
class ViT(Body):
    """A plain vision transformer: patches, equal blocks, a head. Names of parts and of values are timm's.

    Attributes:
        eps: for every LayerNorm but a predictor's.
        num_prefix: class token, distillation token, register tokens: never pruned, in this order.
        stem_dim: channels of LV-ViT's convolutional stem; 0: patches are projected directly.
        skip_lam: residual branches are divided by this (LV-ViT).
        layer_scale: whether residual branches are scaled by channel (DeiT III).
        no_qkv_bias: whether DeiT's queries, keys and values lack the bias that LV-ViT's never have.
        no_embed_class: whether the prefix tokens have no position of their own (DeiT III).
        owner: whose file it was: its rules hold, and its name for the model is `Config.arch`.
        num_registers: the number of register tokens among the prefix tokens (Darcet et al. 2024).
        no_embed_registers: whether the register tokens have no position, but the class token has one.
        no_pos_embed: whether there is no position embedding.
        resample: whose rule resamples the position embedding.
        rope: coordinates of rotary positions (Su et al. 2021): "index", "centered" (DINOv3), or "mixed", with
            frequencies in the weights (Heo et al. 2024); "": there are none.
        rope_theta: base of their frequencies.
        rope_ref: patches per side that indices are scaled to; 0: they are not.
        rope_offset: added to the coordinates.
        rope_xy: whether x comes before y.
        rope_half: whether channel i is rotated with i + half of the head's channels, not with its neighbour.
        rope_periods: whether the weights hold the periods.
        no_patch_bias: whether the patch projection has no bias.
        norm_pre: whether a LayerNorm stands before the blocks (CLIP).
        qkv: the form of queries, keys and values: one linear "qkv", one with separate "q_bias" and v_bias, or three
            linears "q_proj", k_proj, v_proj.
        unbiased: those of the letters q, k, v whose linear has no bias.
        qk_norm: whether the heads' queries and keys are normalised.
        attn_norm, mlp_norm: whether a LayerNorm stands before the last linear of the branch.
        act: the activation of the MLP.
        gated: the form of a gated MLP: "packed" in one linear, gate first, or "split"; "": it is not gated.
        gamma: whether layer scales are called gamma_1 and gamma_2, as in timm's Eva.
        rel_pos: relative position bias (BEiT): a table for each of the "blocks", one "shared"; "": there is none.
        pool: what the head reads: the class "token"; the "mean" of the patches; "mean_all", with prefix tokens;
            "token_mean", the class token and the mean side by side; "map", a learned query's attention to the patches;
            "map_all", to all tokens.
        map_heads, map_mlp_dim, map_act: heads, MLP width and activation of "map" and "map_all".
        no_norm: whether no LayerNorm follows the last block.
        fc_norm: whether a LayerNorm follows pooling.
        pre_logits: whether a linear and tanh follow pooling.
        no_head_dist: whether a distillation token has no head.
        no_head_bias: whether the head has no bias.
        projection: channels of the embedding that a projection returns (CLIP); 0: there is none.
    """

    num_heads: int
    mlp_dim: int
    eps: float
    num_prefix: int = 1
    stem_dim: int = 0
    skip_lam: float = 1.0
    layer_scale: bool = False
    no_qkv_bias: bool = False
    no_embed_class: bool = False
    owner: str = "timm"
    num_registers: int = 0
    no_embed_registers: bool = False
    no_pos_embed: bool = False
    resample: str = "timm"
    rope: str = ""
    rope_theta: float = 100.0
    rope_ref: int = 0
    rope_offset: float = 0.0
    rope_xy: bool = False
    rope_half: bool = False
    rope_periods: bool = False
    no_patch_bias: bool = False
    norm_pre: bool = False
    qkv: str = "qkv"
    unbiased: str = ""
    qk_norm: bool = False
    attn_norm: bool = False
    mlp_norm: bool = False
    act: str = "gelu"
    gated: str = ""
    gamma: bool = False
    rel_pos: str = ""
    pool: str = "token"
    map_heads: int = 0
    map_mlp_dim: int = 0
    map_act: str = "gelu"
    no_norm: bool = False
    fc_norm: bool = False
    pre_logits: bool = False
    no_head_dist: bool = False
    no_head_bias: bool = False
    projection: int = 0

    @property
    def class_tokens(self) -> int:
        """The number of prefix tokens that are no registers: the class token and a distillation token."""
        return self.num_prefix - self.num_registers

    @property
    def placed_prefix(self) -> int:
        """The number of prefix tokens in the position embedding."""
        if self.no_embed_class:
            return 0
        return self.class_tokens if self.no_embed_registers else self.num_prefix

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def pooled_dim(self) -> int:
        """Channels of the row that pooling returns and a classifier reads."""
        return self.projection or self.embed_dim * (2 if self.pool == "token_mean" else 1)

    def has_bias(self, part: str) -> bool:
        """Return whether the linear of 'q', 'k' or 'v' has a bias."""
        return not (self.no_qkv_bias or self.stem_dim) and part not in self.unbiased

    def __post_init__(self) -> None:
        if self.depth > _MOST_BLOCKS or self.embed_dim % self.num_heads:
            raise InputError(f"depth: {self.depth} blocks of {self.num_heads} heads are impossible")
        for name, known in _NAMES.items():
            if (value := getattr(self, name)) not in known:
                raise InputError(f"{name}: {str(value)[:40]!r} is not one of {', '.join(filter(None, known))}")
        if not 0 <= self.class_tokens <= 2:
            raise InputError(f"num_prefix: {self.num_prefix} with {self.num_registers} registers is impossible")
        if self.pool in ("token", "token_mean") and not self.class_tokens:
            raise InputError(f"pool: {self.pool!r} needs a class token, and there is none")
        if self.rope and self.head_dim % 4:
            raise InputError(f"num_heads: rotary positions need heads of a multiple of 4 channels, not {self.head_dim}")
        if self.pool.startswith("map") and (
            self.map_heads < 1 or self.embed_dim % self.map_heads or not self.map_mlp_dim
        ):
            raise InputError(f"map_heads: {self.map_heads} heads do not divide the width {self.embed_dim}")
