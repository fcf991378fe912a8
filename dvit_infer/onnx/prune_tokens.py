"""prune_tokens as a model-local ONNX function: one box in viewers, standard operators for runtimes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dvit_infer.onnx.opsets import axes_are_input, has_gelu, has_num_outputs, needs_norm_bias

DOMAIN, NAME = "dvit", "prune_tokens"
INPUTS = ("x", "w1", "b1", "w2_own", "w2_mean", "b2", "w3", "b3", "w4", "b4")


def prune_tokens_function(opset: int, element: int, dim: int) -> onnx.FunctionProto:
    """Return `dvit.prune_tokens`: score patch tokens, keep the best, gather their rows (Rao et al. 2021, section 3.2).

    Inputs: x (B, P+N, C), and the weights of `ops.prune_tokens.pack_predictor` without the row sums, matrices
    transposed to (in, out). Attributes: num_keep, num_prefix, eps. Outputs: kept_x (B, P+num_keep, C), prefix rows and
    then the kept rows in ascending position; index (B, num_keep) int64, ascending positions among the N. Of equal
    scores the lower position wins, -0.0 equals 0.0, NaN ranks last.

    Args:
        opset: opset version of the default domain.
        element: ONNX element type of x and the matrices; float32 is used for LayerNorm, the mean and the scores, and
            below opset 20 for GELU.
        dim: channels C.
    """
    body = _Body(opset, element)
    body.scores(dim)
    body.select()
    body.gather()
    return helper.make_function(
        DOMAIN,
        NAME,
        INPUTS,
        ["kept_x", "index"],
        body.nodes,
        [helper.make_opsetid("", opset)],
        attributes=["num_keep", "num_prefix", "eps"],
        doc_string="Scores the patch tokens, keeps the num_keep best and drops the rest; prefix tokens always stay.",
    )


class _Body:
    def __init__(self, opset: int, element: int) -> None:
        self._opset, self._element = opset, element
        self.nodes: list[onnx.NodeProto] = []

    def _emit(self, op: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, name=f"{op}_{outputs[-1]}", **attributes))

    def _given(self, attribute: str, out: str) -> None:
        """Convert an integer attribute of the function to a tensor with one element."""
        node = helper.make_node("Constant", [], [f"{out}_scalar"], name=f"Constant_{out}")
        reference = onnx.AttributeProto(name="value_int", ref_attr_name=attribute, type=onnx.AttributeProto.INT)
        node.attribute.append(reference)
        self.nodes.append(node)
        self._emit("Unsqueeze", [f"{out}_scalar", "zero"], out)

    def _constant(self, out: str, *values: int) -> None:
        self._emit("Constant", [], out, value_ints=values)

    def _tensor(self, out: str, array: np.ndarray) -> None:
        self._emit("Constant", [], out, value=numpy_helper.from_array(array))

    def _float32(self, x: str) -> str:
        return self._cast(x, TensorProto.FLOAT, f"{x}_float32")

    def _in_dtype(self, x: str) -> str:
        return self._cast(x, self._element, f"{x}_in_dtype")

    def _cast(self, x: str, to: int, out: str) -> str:
        if self._element == TensorProto.FLOAT:
            return x
        self._emit("Cast", [x], out, to=to)
        return out

    def _gelu(self, x: str, out: str) -> None:
        """Emit GELU, written out in float32 where there is no such operator, as the writer of the graph does."""
        if has_gelu(self._opset):
            self._emit("Gelu", [x], out)
            return
        y, whole = self._float32(x), self._element == TensorProto.FLOAT
        self._emit("Div", [y, "gelu_root"], f"{out}_scaled")
        self._emit("Erf", [f"{out}_scaled"], f"{out}_erf")
        self._emit("Add", [f"{out}_erf", "gelu_one"], f"{out}_shifted")
        self._emit("Mul", [y, f"{out}_shifted"], f"{out}_doubled")
        self._emit("Mul", [f"{out}_doubled", "gelu_half"], out if whole else f"{out}_exact")
        if not whole:
            self._emit("Cast", [f"{out}_exact"], out, to=self._element)

    def scores(self, dim: int) -> None:
        """Emit score (B, N) float32, the difference of the keep and drop logits."""
        self._constant("zero", 0)
        self._constant("one", 1)
        self._constant("end", np.iinfo(np.int64).max)
        self._given("num_prefix", "start")
        self._emit("Slice", ["x", "zero", "start", "one"], "prefix")
        self._emit("Slice", ["x", "start", "end", "one"], "patches")

        self._tensor("gain", np.ones(dim, np.float32))
        affine = ["gain"]
        if needs_norm_bias(self._opset):
            self._tensor("shift", np.zeros(dim, np.float32))
            affine.append("shift")
        norm = helper.make_node(
            "LayerNormalization", [self._float32("patches"), *affine], ["normed"], "LayerNorm", axis=-1
        )
        norm.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT))
        self.nodes.append(norm)
        if not has_gelu(self._opset):
            for name, value in (("gelu_root", math.sqrt(2)), ("gelu_one", 1.0), ("gelu_half", 0.5)):
                self._tensor(name, np.array(value, np.float32))
        self._emit("MatMul", [self._in_dtype("normed"), "w1"], "project")
        self._emit("Add", ["project", self._in_dtype("b1")], "project_b")
        self._gelu("project_b", "hidden")
        # The mean half is equal for all tokens of an image, so its part of the layer is computed once.
        halves = {"num_outputs": 2} if has_num_outputs(self._opset) else {}
        self._emit("Split", ["hidden"], "own", "averaged", axis=-1, **halves)
        averaged = self._float32("averaged")
        if axes_are_input(self._opset):
            self._emit("ReduceMean", [averaged, "one"], "mean", keepdims=1)
        else:
            self._emit("ReduceMean", [averaged], "mean", axes=(1,), keepdims=1)
        self._emit("MatMul", ["mean", self._float32("w2_mean")], "mean_part")
        self._emit("Add", ["mean_part", "b2"], "shared")
        self._emit("MatMul", ["own", "w2_own"], "own_part")
        self._emit("Add", ["own_part", self._in_dtype("shared")], "second")
        self._gelu("second", "second_gelu")
        self._emit("MatMul", ["second_gelu", "w3"], "third")
        self._emit("Add", ["third", self._in_dtype("b3")], "third_b")
        self._gelu("third_b", "third_gelu")
        self._emit("MatMul", [self._float32("third_gelu"), "w4"], "last")
        self._emit("Add", ["last", "b4"], "score")

    def select(self) -> None:
        """Emit index (B, num_keep): the smallest of 0 - score, so -0.0 equals 0.0; NaN ranks behind even -inf."""
        self._given("num_keep", "k")
        self._tensor("no_score", np.zeros(1, np.float32))
        self._tensor("lowest", np.array([np.finfo(np.float32).max]))
        self._tensor("nan_key", np.array([np.inf], np.float32))
        self._emit("Sub", ["no_score", "score"], "descending")
        self._emit("Min", ["descending", "lowest"], "finite")
        self._emit("IsNaN", ["score"], "is_nan")
        self._emit("Where", ["is_nan", "nan_key", "finite"], "key")
        self._emit(
            "TopK", ["key", "k"], "best_key", "best", axis=1, largest=0, sorted=1
        )  # equal values: lower index first
        self._emit("TopK", ["best", "k"], "index", "order", axis=1, largest=0, sorted=1)  # into ascending order

    def gather(self) -> None:
        """Emit kept_x (B, P+num_keep, C), a copy of the kept rows."""
        self._constant("last_axis", -1)
        self._emit("Unsqueeze", ["index", "last_axis"], "row")
        self._emit("GatherND", ["patches", "row"], "kept", batch_dims=1)
        self._emit("Concat", ["prefix", "kept"], "kept_x", axis=1)
