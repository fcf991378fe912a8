"""Registration of an op with PyTorch's dispatcher."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def register(
    op: str,
    reference: Callable[Arguments, Result],
    run: Callable[..., Result],
    fake: Callable[..., Result],
    advice: str,
) -> Callable[Arguments, Result]:
    """Define an op that runs on every device, has a fake kernel and raises on backward.

    It is defined by schema, not by torch.library.custom_op, which wraps every call in torch.compile's machinery: its
    import costs two seconds and 300 MiB where nobody compiles. `infer_schema` comes with torch.library itself.

    Args:
        op: its name, with the namespace.
        reference: the op in plain PyTorch, whose annotated arguments, defaults and results are the schema's.
        run, fake: run it on real and on fake tensors. The dispatcher omits arguments that equal their defaults.
        advice: what to use in training, for the error on backward.

    Returns:
        A function that calls the op, with the reference's signature and docstring.
    """

    def no_gradient(ctx: object, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{op} has no gradient: it is for inference. {advice}")

    # The published schemas have int: numbers of tokens and block sizes are fixed when a graph is traced.
    schema = torch.library.infer_schema(reference, mutates_args=()).replace("SymInt", "int")
    torch.library.define(op, schema)
    torch.library.impl(op, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(op)(fake)
    torch.library.register_autograd(op, no_gradient)
    namespace, name = op.split("::")
    overload: Any = getattr(getattr(torch.ops, namespace), name).default

    @functools.wraps(reference)
    def call(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        result: Result = overload(*arguments, **named)
        return result

    call.__name__ = call.__qualname__ = name
    return call
