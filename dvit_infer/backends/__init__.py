"""Backends: each runs a graph, with a method per node kind. A backend is one file."""

from dvit_infer.backends.captured import CapturedRunner
from dvit_infer.backends.cpu import CpuRunner
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.ops.choices import why_not_triton
from dvit_infer.ops.fallback import SETTING, setting
from dvit_infer.utils.threads import limit_threads


def runner_for(graph: Graph) -> TorchRunner | CapturedRunner:
    """Return the runner for a graph on the device of its weights.

    The first one on a CPU lowers PyTorch's number of threads, for the whole process, if a container allows fewer.

    Raises:
        InputError: DVIT_KERNELS is neither require nor off, or it is require and the GPU runs no kernels.
    """
    asked = setting()
    if graph.device.type == "cpu":
        limit_threads()  # before the runner measures which linear is the fastest
        return CpuRunner(graph)
    why_not = why_not_triton(graph.device)
    if why_not and asked == "require":
        raise InputError(f"{SETTING}: {asked} is impossible here: {why_not}")
    if graph.device.type != "cuda":  # no kernels, and nothing to capture
        return TorchRunner(graph)
    if why_not:
        return CapturedRunner(TorchRunner(graph, why_not))
    from dvit_infer.backends.triton import TritonRunner

    return CapturedRunner(TritonRunner(graph))
