"""Backends: node kind -> what runs it. A backend is one file."""

from dvit_infer.backends.cpu import CpuRunner
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph.graph import Graph


def runner_for(graph: Graph, device_type: str) -> TorchRunner:
    """What runs the graph on such a device, where its weights are."""
    return CpuRunner(graph) if device_type == "cpu" else TorchRunner(graph)
