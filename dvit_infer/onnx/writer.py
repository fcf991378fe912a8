"""Graphs as ONNX models."""

from collections.abc import Sequence

import onnx
import torch
from onnx import TensorProto, helper

from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.onnx.building import DOMAIN, OnnxBuilder, value_info
from dvit_infer.onnx.opsets import DEFAULT, IR_VERSIONS, check_opset
from dvit_infer.onnx.prune_tokens import prune_tokens_function
from dvit_infer.operators.writer import write
from dvit_infer.reduction.predictor import PredictorPrune


def onnx_model(
    graph: Graph,
    *,
    opset: int = DEFAULT,
    uint8: bool = False,
    kept: bool = False,
) -> onnx.ModelProto:
    """Return a folded graph as an ONNX model for any number of images.

    Input `images` (B, 3, H, W), normalised, in the graph's dtype; outputs `logits` (B, K) float32, of a model without
    classes the embedding, and, with `kept`, `kept_0` and so on: for each stage (B, k) int64 original patch positions,
    ascending, or where tokens are merged (B, N), for every original patch the lowest one of its group. In a float16
    model LayerNorm, softmax, rotation, pooling and scores are float32, and so are activations that opset lacks.

    Args:
        graph: folded, in float32 or float16.
        opset: opset version of the default domain, one of `IR_VERSIONS`.
        uint8: take uint8 (B, H, W, 3) images instead and normalise them by the config's mean and std.
        kept: also output the kept positions.

    Raises:
        InputError: A node kind, the dtype or the opset is not supported.
        ValueError: The graph is not folded.
    """
    check_opset(opset)
    if graph.dtype not in (torch.float32, torch.float16):
        raise InputError(f"dtype: {str(graph.dtype)[6:]} cannot be written as ONNX; float32 and float16 can")
    domains, functions = [helper.make_opsetid("", opset)], []
    if any(isinstance(node, PredictorPrune) for node in graph.nodes):
        domains.append(helper.make_opsetid(DOMAIN, 1))
        functions.append(prune_tokens_function(opset, graph.dtype, graph.config.body.embed_dim))
    model: onnx.ModelProto = helper.make_model(
        _graph_proto(graph, opset, uint8, kept),
        functions=functions,
        opset_imports=domains,
        ir_version=IR_VERSIONS[opset],
        producer_name="dvit_infer",
    )
    return model


def _graph_proto(graph: Graph, opset: int, uint8: bool, kept: bool) -> onnx.GraphProto:
    to = OnnxBuilder(opset, graph.dtype, graph.nodes[-1].name)
    height, width = graph.config.image_size
    if uint8:
        images, x = value_info("images", TensorProto.UINT8, height, width, 3), _normalised(to, graph, "images")
    else:
        images, x = value_info("images", to.element, 3, height, width), "images"
    try:
        written = write(to, graph, x, kept=kept)
    except InputError as error:
        raise InputError(f"format: {error} as ONNX") from None
    outputs = [value_info("logits", TensorProto.FLOAT, *graph.nodes[-1].out_shape)]
    outputs += [
        value_info(name, TensorProto.INT64, count)
        for name, count in zip(written.kept, graph.config.reduction.choice_sizes, strict=False)
    ]
    return helper.make_graph(to.nodes, "dvit_infer", [images], outputs, to.weights, value_info=to.values)


def _normalised(to: OnnxBuilder, graph: Graph, images: str) -> str:
    """Convert uint8 (B, H, W, 3) to normalised (B, 3, H, W) in the dtype, like `images.tensors.normalise`."""

    def constant(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)

    mean, std, scale = (constant(values) for values in (graph.config.mean, graph.config.std, [1 / 255]))
    x = to.emit("Cast", to.emit("Transpose", images, perm=(0, 3, 1, 2)), to=TensorProto.FLOAT)
    x = to.emit("Sub", to.emit("Mul", x, to.own("inverse", scale)), to.own("mean", mean))
    return to.in_dtype(to.emit("Mul", x, to.own("inverse_std", 1 / std)))
