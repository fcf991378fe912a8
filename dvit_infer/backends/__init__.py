"""Backends: node kind -> what runs it. A backend is one file."""

from dvit_infer.backends.captured import CapturedRunner
from dvit_infer.backends.cpu import CpuRunner
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph.graph import Graph
from dvit_infer.ops.choices import runs_triton


def runner_for(graph: Graph) -> TorchRunner | CapturedRunner:
    """What runs the graph where its weights are."""
    if graph.device.type == "cpu":
        return CpuRunner(graph)
    if not runs_triton(graph.device):
        return CapturedRunner(TorchRunner(graph))
    from dvit_infer.backends.triton import TritonRunner

    return CapturedRunner(TritonRunner(graph))
