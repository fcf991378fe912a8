"""Turn every owner's names of a vision transformer's weights into timm's, by literal tables, one file for an owner."""

from collections.abc import Mapping

from dvit_infer.models.vit.names.big_vision import BIG_VISION, unstacked
from dvit_infer.models.vit.names.clip import CLIP, SIGLIP
from dvit_infer.models.vit.names.huggingface import DINOV2, DINOV3, VIT
from dvit_infer.models.vit.names.meta import DINO, MAE, TIMM
from dvit_infer.models.vit.names.meta import DINOV2 as META_DINOV2
from dvit_infer.models.vit.names.meta import DINOV3 as META_DINOV3
from dvit_infer.models.vit.names.open_clip import OPEN_CLIP, TORCHVISION, TRUNK
from dvit_infer.models.vit.names.table import Plan, Table, apply, plan, prefix_of

__all__ = ["TABLES", "Plan", "apply", "plan_of", "unstacked"]

# Of several that match, the first counts.
TABLES: tuple[Table, ...] = (
    *(BIG_VISION, TRUNK, OPEN_CLIP, CLIP, SIGLIP),
    *(DINOV3, DINOV2, VIT, TORCHVISION),
    *(MAE, META_DINOV3, META_DINOV2, DINO, TIMM),
)


def plan_of(name: str, keys: Mapping[str, str]) -> Plan | None:
    """Return whose names a file's keys are and where each goes; None: they are timm's already, or unknown.

    Args:
        name: of the file, for messages.
        keys: the keys without wrappers' prefixes -> the keys in the file.

    Raises:
        InputError: a key is unknown, or two are the same part; the message names the key in the file.
    """
    for table in TABLES:
        if (prefix := prefix_of(table, keys)) is not None:
            return plan(name, table, prefix, keys)
    return None
