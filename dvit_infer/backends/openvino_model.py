"""OpenVINO models: written from graphs, with every output; compiled for one of them."""

import importlib
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dvit_infer.config import Config
from dvit_infer.graph.graph import Graph
from dvit_infer.graph.heads import Wanted
from dvit_infer.graph.nodes import Attention, Mlp, Node
from dvit_infer.graph.reductions import Reduce
from dvit_infer.utils.threads import limit_threads

_INSTALL = "run pip install 'dvit-infer[cpu]'"
MISSING, FASTER = f"openvino is not installed; {_INSTALL}", f"openvino would be faster; {_INSTALL}"
OLDEST = (2025, 4)  # before, Python could not set attributes of nodes
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_core: list[Any] = []
_making_core = threading.Lock()


class Variant(NamedTuple):
    """One function of a graph: an output, by its own choice of tokens or with kept sets given."""

    output: Wanted = "logits"
    given: bool = False

    def __str__(self) -> str:
        return f"{self.output} given" if self.given else self.output


VARIANTS = (
    *(Variant("logits"), Variant("features"), Variant("tokens"), Variant("feature_map")),
    Variant("logits", given=True),
)


def core() -> Any:
    """Return OpenVINO's core, one for the life of the process.

    The first model that a core compiles sets an alternate signal stack, owned by the CPU plugin, on the thread. The
    plugin removes it together with its core, but not on another thread, nor if a second core was created in between
    (pull request 11894 of openvinotoolkit/openvino). The next signal that Python handles, e.g. Ctrl-C, then ends the
    process.
    """
    with _making_core:
        if not _core:
            import openvino

            _core.append(openvino.Core())
    return _core[0]


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
    return why_no_openvino()


def why_no_openvino() -> str | None:
    """Return the reason why OpenVINO runs no graph in this process; None: it runs those that fit it."""
    if os.environ.get("DVIT_PRUNE"):
        return "openvino has prune_tokens of its own, not that of DVIT_PRUNE"
    try:
        importlib.import_module("openvino")
    except Exception as error:  # importing runs another project's code, and a damaged installation may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == "openvino":
            return MISSING
        return f"openvino cannot be imported: {next(iter(str(error).splitlines()), type(error).__name__)}"
    found = version()
    if found < OLDEST:
        old, new = (".".join(map(str, two)) for two in (found, OLDEST))
        return f"openvino {old} is too old; {new} or later runs it"
    return None


def version() -> tuple[int, ...]:
    """Return the year and the number of the OpenVINO that is installed."""
    text = str(importlib.import_module("openvino").__version__)
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def openvino_model(graph: Graph, variants: Sequence[Variant] = VARIANTS[:1], int8: bool = False) -> Any:
    """Return a graph as an OpenVINO model for any number of images, whose variants share their weights.

    Inputs: images (B, 3, H, W) float32, normalised, and with `given` the choice of each stage, (B, any) int64, as its
    node states it. Outputs, by the names of variants: the output, and unless choices are given those of each stage, as
    `logits/choice_00` and so on.
    """
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    from dvit_infer.operators.openvino import OpenVinoBuilder
    from dvit_infer.operators.writer import write

    images = ops.parameter([-1, 3, *graph.config.image_size], np.float32, name="images")
    reductions = [node for node in graph.nodes if isinstance(node, Reduce)]
    chosen = [
        ops.parameter([-1, node.choice_size], np.int64, name=f"choice_{i:02}") for i, node in enumerate(reductions)
    ]
    linears = [node.name for node in graph.nodes if isinstance(node, Attention | Mlp)]
    results = []
    with torch.device("cpu"):  # whatever the caller's default is
        to = OpenVinoBuilder(
            core(), linears if int8 else (), graph.config.ranges, half=int8 or graph.dtype == torch.bfloat16
        )
        for variant in variants:
            values = [parameter.output(0) for parameter in chosen] if variant.given else []
            written = write(to, graph, images.output(0), output=variant.output, given=values)
            results.append(ops.result(written.x, name=str(variant)))
            if not variant.given:
                results += [
                    ops.result(choice, name=f"{variant}/choice_{i:02}") for i, choice in enumerate(written.choices)
                ]
    used = chosen if any(variant.given for variant in variants) else []
    return openvino.Model(results, [images, *used], graph.config.arch)


def only(model: Any, variant: Variant) -> Any:
    """Return the part of a model with several variants that computes one."""
    import openvino

    names = re.compile(rf"{variant}(/choice_\d+)?")
    results = [result for result in model.get_results() if names.fullmatch(result.get_friendly_name())]
    results.sort(key=lambda result: result.get_friendly_name())
    inputs = [
        parameter for parameter in model.get_parameters() if variant.given or parameter.get_friendly_name() == "images"
    ]
    return openvino.Model(results, inputs, model.get_friendly_name())


def no_images(config: Config, count: int = 1) -> Any:
    """Return an input that stands for none: a request holds on to its last one, and with it to a caller's memory."""
    import openvino

    return openvino.Tensor(openvino.Type.f32, openvino.Shape([count, 3, *config.image_size]))


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


def first_reason(error: RuntimeError) -> str:
    """Return the first line of an OpenVINO error that says more than the source file it comes from."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith("Exception from")), "no reason given")
