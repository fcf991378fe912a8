"""Save ONNX models, with external weights if large, and read values and weights from inside them."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dvit_infer.errors import InputError
from dvit_infer.utils.packages import need

if TYPE_CHECKING:
    import onnx

# A protobuf message is limited to 2 GiB; weights of larger models go into a second file.
LARGEST = 2**31 - 2**20
_EXTERNAL_FROM = 1024  # bytes; smaller tensors stay in the model, among them shapes that readers must see


def save(model: "onnx.ModelProto", path: Path, inline: bool = False) -> None:
    """Write a model; weights of a large one go beside it into `<name>.data`."""
    import onnx

    if model.ByteSize() > LARGEST:
        data = f"{path.name}.data"
        onnx.external_data_helper.convert_model_to_external_data(model, location=data, size_threshold=_EXTERNAL_FROM)
        model = onnx.external_data_helper.write_external_data_tensors(model, os.fspath(path.parent))
    if inline:
        model = _inlined(model)
    path.write_bytes(model.SerializeToString())


def _inlined(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return the model with local functions inlined and their domain removed, which `onnx.inliner` leaves behind."""
    import onnx.inliner

    inlined: onnx.ModelProto = onnx.inliner.inline_local_functions(model)
    used = {node.domain for node in inlined.graph.node} | {""}
    domains = [entry for entry in inlined.opset_import if entry.domain in used]
    del inlined.opset_import[:]
    inlined.opset_import.extend(domains)
    return inlined


@contextlib.contextmanager
def probed(path: Path, given: bool, outputs: Sequence[str]) -> Iterator["Path | bytes"]:
    """Yield the file's model with `outputs` as additional outputs and, if `given`, each stage's choice as an input.

    Raises:
        InputError: The file cannot be read, or has no such values.
    """
    need(f"{path}", "onnx", extra="dvit-infer[onnx]")
    import onnx

    try:
        model = _inlined(onnx.load(os.fspath(path)))
    except Exception as error:  # protobuf's and onnx's exceptions have no common base
        raise InputError(f"{path}: cannot be read as ONNX: {error}") from None
    graph = model.graph
    known = {value.name: value for value in [*graph.value_info, *graph.output]}
    if missing := [name for name in outputs if name not in known]:
        raise InputError(f"{path}: has no value {missing[0]}, which files of dvit-convert have")
    present = {value.name for value in graph.output}
    graph.output.extend(known[name] for name in outputs if name not in present)
    if given:
        choices = [name for name in known if re.fullmatch(r"(prune|merge|route)\.\d+/(index|rows)", name)]
        for node in graph.node:
            for position, name in enumerate(node.output):
                if name in choices:
                    node.output[position] = f"{name}/own"
        graph.input.extend(known[name] for name in choices)
    if model.ByteSize() <= LARGEST:
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "probe.onnx")
        yield Path(folder) / "probe.onnx"


def opset_of(path: Path) -> int:
    """Return the version of the default opset of a file."""
    import onnx

    domains = onnx.load(os.fspath(path), load_external_data=False).opset_import
    return next(int(entry.version) for entry in domains if entry.domain in ("", "ai.onnx"))


def weights_of(model: "onnx.ModelProto") -> dict[str, torch.Tensor]:
    """Return a model's floating-point weights by name; quantised ones are dequantised: scale * (q - zero point)."""
    import numpy as np
    from onnx import numpy_helper

    arrays: dict[str, Any] = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for name, array in arrays.items():
        stem = name.removesuffix("_quantized")
        if stem != name:
            zero, scale = arrays[f"{stem}_zero_point"], arrays[f"{stem}_scale"]
            found[stem] = torch.from_numpy((array.astype(np.float32) - zero.astype(np.float32)) * scale)
        elif array.dtype.kind == "f" and not name.endswith("_scale"):
            found[name] = torch.from_numpy(np.array(array))
    return found
