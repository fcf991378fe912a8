"""The fused ops, one file each: reference, fake kernel, registration, public function.

The reference, `<op>_ref`, is plain PyTorch and checks nothing. Its signature is the op's schema, and that of the public
function with the docstring, unless that function takes other arguments than the op.

Importing any of them registers all as `torch.ops.dvit.<name>`.
"""

from dvit_infer.ops import (
    attention,
    attention_signal,
    keep_tokens,
    layer_norm,
    linear,
    merge_tokens,
    patch_embedding,
    prune_tokens,
    rotary_attention,
    route_tokens,
    routed_mlp,
)

__all__ = [
    "attention",
    "attention_signal",
    "keep_tokens",
    "layer_norm",
    "linear",
    "merge_tokens",
    "patch_embedding",
    "prune_tokens",
    "rotary_attention",
    "route_tokens",
    "routed_mlp",
]
