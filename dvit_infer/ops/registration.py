"""Registration of an op with PyTorch's dispatcher."""

from collections.abc import Callable
from typing import Any

import torch


def register(op: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any], advice: str) -> None:
    """Define an op that runs on every device, has a fake kernel and raises on backward.

    It is defined by schema, not by torch.library.custom_op, which wraps every call in torch.compile's machinery: its
    import costs two seconds and 300 MiB where nobody compiles.

    Args:
        op: its name, with the namespace.
        schema: of its arguments and results.
        run, fake: what runs it on real and on fake tensors, with its arguments as the dispatcher passes them.
        advice: what to use in training, for the error on backward.
    """

    def no_gradient(ctx: object, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{op} has no gradient: it is for inference. {advice}")

    torch.library.define(op, schema)
    torch.library.impl(op, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(op)(fake)
    torch.library.register_autograd(op, no_gradient)
