"""The OpenVINO backend: runs the whole graph as one OpenVINO model, on CPUs."""

import functools
import importlib.metadata
import importlib.util
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dvit_infer.backends.cpu import CpuRunner
from dvit_infer.backends.openvino_cache import LEAST_BYTES, Cache, release_pages
from dvit_infer.backends.state import Hook, State
from dvit_infer.errors import InputError
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.heads import Wanted
from dvit_infer.graph.nodes import Attention, Mlp, Node
from dvit_infer.images.tensors import prepare
from dvit_infer.utils.threads import limit_threads, num_threads

EXTRA = "dvit-infer[cpu]"
OLDEST = (2025, 4)  # before, Python could not set attributes of nodes
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Values of a row that share a range in dynamic quantisation. DeiT-S/0.7 on two threads of a Xeon, batch 1, 8, 32: with
# 32 of them 1.3 x float32, with 64 1.5 x, with 128 1.65, 1.67 and 1.54 x, as with 384.
_GROUP = 128


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


def compile_model(model: Any, settings: Mapping[str, Any]) -> Any:
    """Compile a model for this CPU with PyTorch's number of threads.

    They are not pinned to cores: processes would all be pinned to the same ones. Beside another busy process, unpinned
    threads run DeiT-S/0.7 at 1.08 x the speed, and idle as fast (batch 1, two threads on two cores of a Xeon).
    """
    usual = {
        "INFERENCE_NUM_THREADS": limit_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,
    }
    return core().compile_model(model, "CPU", {**usual, **settings})


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
    if version() < OLDEST:
        old, new = (".".join(map(str, two)) for two in (version(), OLDEST))
        return f"openvino {old} is too old, {new} or later runs it"
    return None


def version() -> tuple[int, ...]:
    """Return the year and number of the OpenVINO that is installed, without importing it."""
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("openvino"))[:2])


class OpenVinoRunner:
    """Runs a graph in OpenVINO.

    Of every output that is asked for (logits, features, tokens) and for given kept sets it holds one compiled model,
    made when it is first needed. PyTorch runs the nodes one by one where a hook is given, with weights that are read
    again. Threads may share it: each has its own infer requests.

    Args:
        graph: the graph with its weights, which are not kept.
        weights: returns the same again.
        key: identifies the weights and the config, for the cache of models; None: do not use it.
        int8: linears in int8: static quantisation by the config's `ranges`, dynamic without them.

    Raises:
        InputError: a node kind is not known here, or OpenVINO cannot compile the model.
    """

    def __init__(
        self, graph: Graph, weights: Callable[[], Graph], key: bytes | None = None, int8: bool = False
    ) -> None:
        self.config, self.device, self.dtype, self.int8 = graph.config, graph.device, graph.dtype, int8
        self._weights, self._key = weights, key
        self._nodes = graph.to(torch.device("meta"), graph.dtype).nodes
        self._size = sum(w.numel() * w.element_size() for node in graph.nodes for w in node.weights.values())
        self._lock, self._local = threading.Lock(), threading.local()
        self._models: dict[tuple[Wanted, bool], Any] = {}
        self._notes: list[str] = []
        self._mapped: dict[tuple[Wanted, bool], Path] = {}  # models whose weights are mapped and not all packed yet
        self._compile(("logits", False), graph)

    def __deepcopy__(self, memo: object) -> "OpenVinoRunner":
        return self  # nothing in it changes

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_of, (self._weights, self._key, self.int8)

    @property
    def runtime(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.int8:
            rest = {"f32": "float32", "bf16": "bfloat16"}[self._settings["INFERENCE_PRECISION_HINT"]]
            name = f"int8 ({'static' if self.config.ranges else 'dynamic'}; scores float32, the rest {rest})"
        runs = f"OpenVINO {importlib.metadata.version('openvino')}, {name}, {num_threads()} threads"
        return "; ".join([runs, *self._notes])

    @property
    def _settings(self) -> dict[str, Any]:
        if not self.int8:
            return {"INFERENCE_PRECISION_HINT": PRECISIONS[self.dtype]}
        fast = "BF16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return {
            "INFERENCE_PRECISION_HINT": "bf16" if fast else "f32",
            # With bfloat16 on a CPU with AMX only the weights are int8 then: products in bfloat16 are faster there.
            **({} if self.config.ranges else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": _GROUP}),
        }

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
        if (path := self._mapped.pop((output, given is not None), None)) is not None:
            release_pages(path)
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
            written = self._written(variant, graph)
            try:
                self._models[variant] = compile_model(written, self._settings)
            except RuntimeError:
                if not isinstance(written, Path):
                    raise
                written = self._anew(variant, graph)  # another process may just be replacing the file
                self._models[variant] = compile_model(written, self._settings)
        except RuntimeError as error:  # OpenVINO's only class
            raise InputError(f"backend: openvino cannot compile {self.config.arch}: {first_reason(error)}") from None
        if isinstance(written, Path):
            release_pages(written)
            self._mapped[variant] = written  # the first call packs more of them

    def _anew(self, variant: tuple[Wanted, bool], graph: Graph | None) -> Any:
        graph = graph or self._weights()
        try:
            return openvino_model(graph, *variant, int8=self.int8)
        except InputError as error:
            raise InputError(f"backend: {error} for openvino") from None

    def _written(self, variant: tuple[Wanted, bool], graph: Graph | None) -> Any:
        """Return the path of a model in the cache, or a model in memory."""
        import openvino

        if self._key is not None and self._size >= LEAST_BYTES and not variant[1]:
            cache = Cache(self._key + variant[0].encode())
            path = cache.path(
                lambda path: openvino.serialize(self._anew(variant, graph), path, path.with_suffix(".bin"))
            )
            self._notes += [cache.note] if cache.note and cache.note not in self._notes else []
            if path is not None:
                return path
        return self._anew(variant, graph)


def _made_of(weights: Callable[[], Graph], key: bytes | None, int8: bool) -> OpenVinoRunner:
    return OpenVinoRunner(weights(), weights, key, int8)


def openvino_model(graph: Graph, output: Wanted, given: bool, int8: bool = False) -> Any:
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
    linears = [node.name for node in graph.nodes if isinstance(node, Attention | Mlp)]
    with torch.device("cpu"):  # whatever the caller's default is
        to = OpenVinoBuilder(core(), linears if int8 else (), graph.config.ranges)
        written = write(to, graph, images.output(0), output=output, kept=not given, given=values)
    return openvino.Model([written.x, *written.kept], [images, *chosen], graph.config.arch)


def constants_of(model: Any, nodes: Sequence[Node]) -> dict[str, torch.Tensor]:
    """Return the weights in an OpenVINO model of these nodes, by their names there, in float32; int8 dequantised."""
    import numpy as np

    stems, found = {node.name for node in nodes}, {}
    for operator in model.get_ops():
        name = operator.get_friendly_name()
        if operator.get_type_name() != "Constant" or name.split("/")[0] not in stems:
            continue
        if operator.get_element_type().is_real() or operator.get_element_type().get_type_name() == "i8":
            found[name] = torch.from_numpy(np.array(operator.get_data(dtype=np.float32)))
    for name in [name for name in found if name.endswith("/scale")]:
        found[name.removesuffix("/scale")] *= found.pop(name)
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
