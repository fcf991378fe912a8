"""What a module of timm says of itself."""

from torch import nn

from dvit_infer.models.beside import Facts


def module_facts(module: nn.Module) -> Facts:
    """Return the facts of a timm model that its weights do not show."""
    return {}
