"""The fused ops, one file each: reference, schema, fake kernel, registration, public function.

Importing any of them registers all as `torch.ops.dvit.<name>`.
"""

from dvit_infer.ops import attention, layer_norm, linear, patch_embedding, prune_tokens

__all__ = ["attention", "layer_norm", "linear", "patch_embedding", "prune_tokens"]
