"""The OpenVINO backend: runs the whole graph as one OpenVINO model, on CPUs."""

import functools
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dvit_infer.backends.cpu import CpuRunner
from dvit_infer.backends.openvino_cache import LEAST_BYTES, Cache
from dvit_infer.backends.state import Hook, State
from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.heads import Wanted
from dvit_infer.graph.nodes import Node
from dvit_infer.images.tensors import prepare
from dvit_infer.utils.threads import limit_threads

EXTRA = "dvit-infer[cpu]"
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


@functools.cache
def core() -> Any:
    """Return OpenVINO's core, one for the life of the process.

    The first model that a core compiles sets an alternate signal stack, owned by the CPU plugin, on the thread. The
    plugin removes it together with its core, but not on another thread, nor if a second core was created in between
    (pull request 11894 of openvinotoolkit/openvino). The next signal that Python handles, e.g. Ctrl-C, then ends the
    process.
    """
    import openvino

    return openvino.Core()


def compile_model(model: Any, precision: str) -> Any:
    """Compile a model for this CPU with PyTorch's number of threads; `precision` is 'f32' or 'bf16'."""
    settings = {
        "INFERENCE_NUM_THREADS": limit_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return core().compile_model(model, "CPU", settings)


def why_not_openvino(graph: Graph) -> str | None:
    """Return the reason why a graph cannot run in OpenVINO, by what can be known before trying; None: it may."""
    if graph.device.type != "cpu":
        return f"openvino runs on CPUs, not on {graph.device.type}"
    if graph.dtype not in PRECISIONS:
        return f"openvino runs float32 and bfloat16, not {str(graph.dtype).removeprefix('torch.')}"
    if os.environ.get("DVIT_PRUNE"):
        return "openvino has prune_tokens of its own, not that of DVIT_PRUNE"
    if importlib.util.find_spec("openvino") is None:
        return f"openvino is not installed, which would be faster: pip install '{EXTRA}'"
    return None


class OpenVinoRunner:
    """Runs a graph in OpenVINO.

    Of every output that is asked for (logits, features, tokens) and for given kept sets it holds one compiled model,
    made when it is first needed. PyTorch runs the nodes one by one where a hook is given, with weights that are read
    again. Threads may share it: each has its own infer requests.

    Args:
        graph: the graph with its weights, which are not kept.
        weights: returns the same again.
        key: identifies the weights and the config, for the cache of models; None: do not use it.

    Raises:
        InputError: a node kind is not known here, or OpenVINO cannot compile the model.
    """

    def __init__(self, graph: Graph, weights: Callable[[], Graph], key: bytes | None = None) -> None:
        self.config, self.device, self.dtype = graph.config, graph.device, graph.dtype
        self._weights, self._key = weights, key
        self._nodes = graph.to(torch.device("meta"), graph.dtype).nodes
        self._size = sum(w.numel() * w.element_size() for node in graph.nodes for w in node.weights.values())
        self._lock, self._local = threading.Lock(), threading.local()
        self._models: dict[tuple[Wanted, bool], Any] = {}
        self._notes: list[str] = []
        self._compile(("logits", False), graph)

    def __deepcopy__(self, memo: object) -> "OpenVinoRunner":
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_of, (self._weights, self._key)

    @property
    def runtime(self) -> str:
        import openvino

        version = openvino.__version__.split("-")[0]
        name = str(self.dtype).removeprefix("torch.")
        return "; ".join([f"OpenVINO {version}, {name}, {torch.get_num_threads()} threads", *self._notes])

    @property
    def buffer_bytes(self) -> int:
        """0: OpenVINO does not report it."""
        return 0

    def release(self) -> None:
        """Do nothing: OpenVINO manages its own memory."""

    def plain(self) -> CpuRunner:
        """Return a runner of the same graph in PyTorch, node by node, which holds its own weights."""
        return CpuRunner(self._weights())

    def constants(self) -> dict[str, torch.Tensor]:
        """Return the weights of the model of logits, in float32, by their names in it."""
        written = self._written(("logits", False), None)
        return constants_of(core().read_model(written) if isinstance(written, Path) else written, self._nodes)

    @torch.no_grad()
    def run(
        self,
        images: torch.Tensor,
        given: Sequence[torch.Tensor] | None = None,
        hook: Hook | None = None,
        return_choices: bool = True,
        output: Wanted = "logits",
    ) -> State:
        """Run the graph; arguments and result are as for every runner.

        Raises:
            MemoryError: out of memory.
        """
        if hook is not None:
            return self.plain().run(images, given, hook, return_choices, output)
        inputs = [prepare(images, self.config, self.device, torch.float32), *_indices(given or ())]
        request = self._request((output, given is not None))
        try:
            found = request.infer([tensor.detach().numpy() for tensor in inputs], share_inputs=True)
        except RuntimeError as error:
            if "alloc" in str(error):
                raise MemoryError(str(error)) from None
            raise
        x, *kept = (torch.from_numpy(found[i]) for i in range(len(found)))
        return State(x, choices=list(given) if given is not None else kept)

    def _request(self, variant: tuple[Wanted, bool]) -> Any:
        """Return the calling thread's infer request for a model."""
        requests = self._local.__dict__.setdefault("requests", {})
        if variant not in requests:
            with self._lock:
                if variant not in self._models:
                    self._compile(variant)
            requests[variant] = self._models[variant].create_infer_request()
        return requests[variant]

    def _compile(self, variant: tuple[Wanted, bool], graph: Graph | None = None) -> None:
        try:
            self._models[variant] = compile_model(self._written(variant, graph), PRECISIONS[self.dtype])
        except InputError as error:
            raise InputError(f"backend: {error} for openvino") from None
        except RuntimeError as error:  # OpenVINO's only class
            raise InputError(f"backend: openvino cannot compile {self.config.arch}: {first_reason(error)}") from None

    def _written(self, variant: tuple[Wanted, bool], graph: Graph | None) -> Any:
        """Return the path of a model in the cache, or a model in memory."""
        import openvino

        if self._key is not None and self._size >= LEAST_BYTES and not variant[1]:
            cache = Cache(self._key + variant[0].encode())
            path = cache.path(
                lambda path: openvino.serialize(
                    openvino_model(graph or self._weights(), *variant), path, path.with_suffix(".bin")
                )
            )
            self._notes += [cache.note] if cache.note and cache.note not in self._notes else []
            if path is not None:
                return path
        return openvino_model(graph or self._weights(), *variant)


def _made_of(weights: Callable[[], Graph], key: bytes | None) -> OpenVinoRunner:
    return OpenVinoRunner(weights(), weights, key)


def openvino_model(graph: Graph, output: Wanted, given: bool) -> Any:
    """Return a graph as an OpenVINO model for any number of images.

    Inputs: images (B, 3, H, W) float32, normalised, and with `given` the positions of each stage's kept tokens among
    its patches, (B, k) int64. Outputs: the output, and without `given` each stage's kept positions, (B, k) int64.
    """
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    from dvit_infer.operators.openvino import OpenVinoBuilder
    from dvit_infer.operators.writer import write

    images = ops.parameter([-1, 3, *graph.config.image_size], np.float32, name="images")
    chosen = [ops.parameter([-1, k], np.int64, name=f"index_{i}") for i, k in enumerate(graph.config.num_keep)]
    chosen = chosen if given else []
    values = [parameter.output(0) for parameter in chosen]
    with torch.device("cpu"):  # whatever the caller's default is
        written = write(OpenVinoBuilder(core()), graph, images.output(0), output=output, kept=not given, given=values)
    return openvino.Model([written.x, *written.kept], [images, *chosen], graph.config.arch)


def constants_of(model: Any, nodes: Sequence[Node]) -> dict[str, torch.Tensor]:
    """Return the weights in an OpenVINO model of these nodes, by their names there, in float32."""
    import numpy as np

    stems, found = {node.name for node in nodes}, {}
    for operator in model.get_ops():
        name = operator.get_friendly_name()
        is_weight = operator.get_type_name() == "Constant" and operator.get_element_type().is_real()
        if is_weight and name.split("/")[0] in stems:
            found[name] = torch.from_numpy(np.array(operator.get_data(dtype=np.float32)))
    return found


def _indices(given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the positions of each stage's kept tokens among those that the stage before left."""
    before = [None, *given][: len(given)]
    return [
        positions if there is None else torch.searchsorted(there, positions)
        for positions, there in zip(given, before, strict=True)
    ]


def first_reason(error: RuntimeError) -> str:
    """Return the first line of an OpenVINO error that says more than the source file it comes from."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith("Exception from")), "no reason given")
