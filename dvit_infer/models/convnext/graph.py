"""Build the graph of a ConvNeXt, with unchanged weights; nothing is folded yet."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from dvit_infer.config import Config
from dvit_infer.graph.heads import Classify, Pool
from dvit_infer.graph.maps import Depthwise, Downsample, Stem
from dvit_infer.graph.nodes import Node
from dvit_infer.models.convnext.reference import ConvNeXtModel
from dvit_infer.models.hierarchical.graph import Routes, Tensors, own, unprefixed


def graph(model: ConvNeXtModel, config: Config) -> Iterator[Node]:
    """Yield the nodes of a reference model in evaluation, for one image size."""
    body = model.body
    maps, eps = body.maps(config.image_size), body.eps
    weights = unprefixed(own(model.downsample_layers[0], w="0", norm="1"), "w.")
    yield Stem(name="stem", equals="stages.0.0:in", weights=weights, image=config.image_size, eps=eps)
    routes = Routes(config, model.score_predictor, "stages.2.")
    for number, stage in enumerate(model.stages):
        tokens = maps[number][0] * maps[number][1]
        if number:
            facts: dict[str, Any] = {"map": maps[number - 1], "tokens": maps[number - 1][0] * maps[number - 1][1]}
            weights = _downsampling(model.downsample_layers[number])
            how: dict[str, Any] = {"norms_four": False, "pads": False, "eps": eps}
            name, equals = f"downsample_layers.{number}", f"stages.{number}.0:in"
            yield Downsample(name=name, equals=equals, weights=weights, **facts, **how)
        for i, block in enumerate(stage.children()):
            name = f"stages.{number}.{i}"
            yield from routes.before(number, i)
            weights = unprefixed(own(block, w="dwconv"), "w.")
            yield Depthwise(name=f"{name}.dwconv", equals="", weights=weights, map=maps[number])
            mlp = own(block, norm="norm", fc1="pwconv1", fc2="pwconv2", gamma="gamma")
            fast = own(block, fast_norm="fast_path.0", fast="fast_path.1", fast_gamma="fast_path_gamma")
            yield routes.mlp(
                number, mlp, fast, name=f"{name}.mlp", equals=f"{name}:out", tokens=tokens, eps=eps, of_branch=True
            )
    yield Pool(
        name="pool",
        equals="head:in" if config.num_classes else ":out",
        weights=own(model, fc_norm="norm"),
        tokens=tokens,
        eps=eps,
        reads="mean",
        num_prefix=0,
        channels=body.dims[-1],
    )
    if config.num_classes:
        yield Classify(name="head", equals=":out", weights=unprefixed(own(model, head="head"), "head."))


def _downsampling(layers: nn.Module) -> Tensors:
    """Return the weights of a LayerNorm and a 2x2 convolution as those of a linear of four positions, row by row."""
    weights = own(layers, norm="0", reduction="1")
    kernel = weights["reduction.weight"]
    norm = {name: weights[name].repeat(4) for name in ("norm.weight", "norm.bias")}
    return weights | norm | {"reduction.weight": kernel.permute(0, 2, 3, 1).flatten(1)}
