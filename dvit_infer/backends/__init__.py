"""Backends: each runs a graph, with a method per node kind. A backend is one file."""

from collections.abc import Callable

from torch import device as Device  # `torch` is a module of this package

from dvit_infer.backends.captured import CapturedRunner
from dvit_infer.backends.cpu import CpuRunner
from dvit_infer.backends.openvino import OpenVinoRunner
from dvit_infer.backends.openvino_cache import LEAST_BYTES
from dvit_infer.backends.openvino_model import FASTER, MISSING, why_no_openvino, why_not_openvino
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.ops.choices import why_not_triton
from dvit_infer.ops.fallback import SETTING, setting
from dvit_infer.utils.threads import limit_threads

BACKENDS = ("torch", "triton", "openvino")


def runner_for(
    graph: Graph,
    backend: str | None = None,
    weights: Callable[[], Graph] | None = None,
    key: bytes | None = None,
    int8: bool = False,
    take: bool = False,
) -> TorchRunner | CapturedRunner | OpenVinoRunner:
    """Return the runner for a graph on the device of its weights.

    The first one on a CPU lowers PyTorch's number of threads, for the whole process, if a container allows fewer.

    Args:
        graph: folded.
        backend: one of `BACKENDS`; None: the fastest that is installed and knows the graph.
        weights: returns the graph anew; a runner that is given it may hold no weights itself.
        key: identifies the graph and its weights, for caches.
        int8: run linears in int8, which only OpenVINO does.
        take: whether a runner that needs weights in a form of its own may take them out of the graph, whose place
            their shapes then have (device meta): `weights` returns them when they are needed.

    Raises:
        InputError: the backend does not exist or cannot run the graph here; DVIT_KERNELS is neither require nor off, or
            it is require and the GPU runs no kernels.
    """
    if backend is not None and backend not in BACKENDS:
        raise InputError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    if int8 and (graph.device.type != "cpu" or backend not in (None, "openvino")):
        where = graph.device.type if graph.device.type != "cpu" else f"backend {backend}"
        raise InputError(f"dtype: int8 is run by openvino on CPUs, not by {where}")
    asked = setting()
    if graph.device.type == "cpu":
        limit_threads()  # before the runner measures which linear is the fastest
        return _on_cpu(graph, backend, weights or (lambda: graph), key, int8, take)
    why_not = why_not_triton(graph.device)
    if backend == "openvino":
        raise InputError(f"backend: {why_not_openvino(graph)}")
    if backend == "triton" and (why_not or graph.device.type != "cuda"):
        raise InputError(f"backend: triton is impossible here: {why_not or graph.device.type}")
    if why_not and asked == "require":
        raise InputError(f"{SETTING}: {asked} is impossible here: {why_not}")
    if graph.device.type != "cuda":  # no kernels, and nothing to capture
        return TorchRunner(graph)
    if why_not or backend == "torch":
        return CapturedRunner(TorchRunner(graph, why_not or "as asked"))
    from dvit_infer.backends.triton import TritonRunner

    return CapturedRunner(TritonRunner(graph))


def default_backend(device: Device) -> tuple[str, str | None]:
    """Return the backend that runs graphs on a device if none is asked for, and what keeps a faster one from it.

    A graph may need another one still: a node that OpenVINO's builder does not know is run by torch.

    Raises:
        InputError: DVIT_KERNELS is neither require nor off.
    """
    if device.type == "cpu":
        why_not = why_no_openvino()
        return ("openvino", None) if why_not is None else ("torch", why_not)
    why_not = why_not_triton(device)
    return ("triton", None) if why_not is None else ("torch", why_not)


def _on_cpu(
    graph: Graph, backend: str | None, weights: Callable[[], Graph], key: bytes | None, int8: bool, take: bool
) -> CpuRunner | OpenVinoRunner:
    if backend == "triton":
        raise InputError("backend: triton runs on NVIDIA GPUs, not on a CPU")
    take = take and graph.weight_bytes >= LEAST_BYTES
    if backend == "torch":
        return CpuRunner(graph, weights=weights if take else None)
    why_not = why_not_openvino(graph)
    if why_not is None:
        try:
            return OpenVinoRunner(graph, weights, key, int8, take)
        except InputError as error:
            why_not = str(error)
            graph = weights() if graph.is_forgotten else graph
    if backend == "openvino" or int8:
        raise InputError(f"{'dtype' if int8 else 'backend'}: {why_not.removeprefix('backend: ')}")
    why = FASTER if why_not == MISSING else why_not.removeprefix("backend: ")
    return CpuRunner(graph, why=why, weights=weights if take else None)
