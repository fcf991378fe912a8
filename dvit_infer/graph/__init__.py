"""The inference graph: a few coarse nodes that know their shapes, MACs and bytes."""

from dvit_infer.graph.folding import fold
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.nodes import Node

__all__ = ["Graph", "Node", "fold"]
