"""The folded weights of a model: a graph made from a checkpoint, or again from where its weights came from."""

import math
from collections import deque
from typing import Any

import torch

from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.graph import Graph
from dvit_infer.graph.folding import fold_across, fold_node
from dvit_infer.graph.nodes import Node
from dvit_infer.graph.reductions import Prune
from dvit_infer.models.checkpoint import Checkpoint
from dvit_infer.models.registry import build_graph, build_reference
from dvit_infer.models.source import WeightSource
from dvit_infer.utils.memory import return_freed


def folded_graph(
    config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, *, take: bool = False
) -> Graph:
    """Return the graph that an engine runs: built from the reference model, folded, on the device in the dtype.

    Args:
        take: whether to take the tensors out of the checkpoint, so that each can go when it is folded: the memory
            needed is then that of the graph and a few more tensors.

    Raises:
        InputError: a weight is too large for the dtype.
    """
    unfolded = deque(build_graph(build_reference(config, checkpoint, take=take), config).nodes)
    nodes = []
    while unfolded:
        node = fold_node(unfolded.popleft(), dtype)
        if dtype == torch.float16:
            _check_float16(checkpoint.name, node)
        nodes.append(node.to(device, dtype, copy=not take))
        del node
        return_freed()  # or what folds let go of, matrices among it, stays with the heap
    return fold_across(Graph(config, tuple(nodes)))


def _check_float16(name: str, node: Node) -> None:
    """Raise InputError for a weight of a folded node, which is in float32 or converted already, that overflows."""
    for part, weight in node.weights.items():
        changed = weight if isinstance(node, Prune) else weight.half()  # a Prune node keeps its own dtypes
        if not torch.isinf(changed).any():
            continue
        value = weight[torch.isinf(changed)].flatten()[0].item()
        holds = f"holds {value:g}, more than" if math.isfinite(value) else "holds a value over"
        raise InputError(f"{name}: {node.name}.{part} {holds} float16's largest 65504; bfloat16 or float32 hold it")


class FoldedWeights:
    """The weights of an engine whose runner keeps none, folded from its source when they are needed.

    If `graph` is given, it is held: the caller may change a state dict, and a pickled copy's file may not be there.
    """

    def __init__(
        self, config: Config, source: WeightSource, device: torch.device, dtype: torch.dtype, graph: Graph | None = None
    ) -> None:
        self._config, self._source, self._device, self._dtype = config, source, device, dtype
        self._graph = graph

    def __call__(self) -> Graph:
        if self._graph is not None:
            return self._graph
        return folded_graph(self._config, self._source.read(), self._device, self._dtype, take=True)

    def __deepcopy__(self, memo: object) -> "FoldedWeights":
        return self

    def __reduce__(self) -> tuple[type["FoldedWeights"], tuple[Any, ...]]:
        return FoldedWeights, (self._config, self._source, self._device, self._dtype, self())
