"""prune_tokens as a model-local ONNX function: one box in viewers, standard operators for runtimes."""

from typing import Any, NamedTuple

import onnx
import torch
from onnx import helper, numpy_helper

from dvit_infer.onnx.building import DOMAIN, NAME, OnnxBuilder
from dvit_infer.operators.prune_tokens import INPUTS, prune_tokens


def prune_tokens_function(opset: int, dtype: torch.dtype, dim: int) -> onnx.FunctionProto:
    """Return `dvit.prune_tokens`: `operators.prune_tokens` of any weights and counts.

    Inputs: x (B, P+N, C), and the weights of `ops.prune_tokens.pack_predictor` without the row sums, matrices
    transposed to (in, out). Attributes: num_keep, num_prefix, eps. Outputs: kept_x (B, P+num_keep, C) and index
    (B, num_keep) int64.

    Args:
        opset: opset version of the default domain.
        dtype: of x and the matrices; float32 is used for LayerNorm, the mean and the scores, and below opset 20 for
            GELU.
        dim: channels C.
    """
    to = _FunctionBuilder(opset, dtype)

    def norm(x: str) -> str:
        return to.in_dtype(to.normalise(to.float32(x), dim, _Attribute("eps")))

    prune_tokens(to, "x", {name: name for name in INPUTS}, norm, to.count("num_keep"), to.count("num_prefix"))
    return helper.make_function(
        DOMAIN,
        NAME,
        ["x", *INPUTS],
        ["kept_x", "index"],
        to.nodes,
        [helper.make_opsetid("", opset)],
        attributes=["num_keep", "num_prefix", "eps"],
        doc_string="Scores the patch tokens, keeps the num_keep best and drops the rest; prefix tokens always stay.",
    )


class _Attribute(NamedTuple):
    """A floating-point attribute of the function, as one of an operator in it."""

    name: str


class _FunctionBuilder(OnnxBuilder):
    """A builder of a function's body, where weights are operators, too."""

    def __init__(self, opset: int, dtype: torch.dtype) -> None:
        super().__init__(opset, dtype)
        self.stem = "body"
        self._constants: set[str] = set()

    def emit_all(self, op: str, *inputs: str, outs: tuple[str, ...], **attributes: Any) -> tuple[str, ...]:
        stated = {name: value for name, value in attributes.items() if not isinstance(value, _Attribute)}
        super().emit_all(op, *inputs, outs=outs, **stated)
        for name in attributes.keys() - stated.keys():
            self._refer(name, attributes[name].name, onnx.AttributeProto.FLOAT)
        return outs

    def weight(self, name: str, tensor: torch.Tensor) -> str:
        if name not in self._constants:
            self._constants.add(name)
            self.emit("Constant", out=name, value=numpy_helper.from_array(tensor.numpy()))
        return name

    def count(self, attribute: str) -> str:
        """Convert an integer attribute of the function to a tensor with one element."""
        scalar = self.emit("Constant", out=f"{attribute}_scalar")
        self._refer("value_int", attribute, onnx.AttributeProto.INT)
        return self.emit("Unsqueeze", scalar, self.ints(0))

    def _refer(self, name: str, attribute: str, kind: Any) -> None:
        """Let the last operator take an attribute from the function's."""
        self.nodes[-1].attribute.append(onnx.AttributeProto(name=name, ref_attr_name=attribute, type=kind))
