"""ONNX files: written whole from an engine, checked, with what they say of themselves; read to look inside."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dvit_infer.models.checkpoint import HEADER_KEY, header_text
from dvit_infer.utils.devices import resolve_dtype
from dvit_infer.engine import Engine
from dvit_infer.errors import InputError
from dvit_infer.utils.files import check_output, whole_files
from dvit_infer.utils.packages import need

if TYPE_CHECKING:
    import numpy as np
    import onnx

# A protobuf message holds 2 GiB at most; weights of larger models go into a file beside it.
LARGEST = 2**31 - 2**20
_EXTERNAL_FROM = 1024  # bytes: smaller tensors stay, among them shapes that readers have to see


def export_onnx(
    engine: Engine,
    path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    opset: int = 20,
    kept: bool = False,
    uint8: bool = False,
    inline: bool = False,
    quantize: str | None = None,
    calibration: "Iterable[np.ndarray] | None" = None,
    labels: Mapping[int, str] | None = None,
) -> None:
    """Write an engine's model as an ONNX file, for any number of pictures.

    Input `images`: (B, 3, H, W) normalised, in the dtype, or with `uint8` (B, H, W, 3) uint8. Outputs: `logits`
    (B, K) float32; with `kept` also `kept_0` and so on, (B, k) int64 original patch positions, ascending. Over 2 GiB
    the weights go into `<path>.data` beside it.

    Args:
        engine: on any device, in any dtype.
        path: of the file; replaced whole, or not at all.
        dtype: float32 or float16; in float16 LayerNorm, softmax and scores stay float32.
        opset: 20 or 21.
        inline: write the function `dvit.prune_tokens` out where it is called, for runtimes without functions.
        quantize: 'int8' for 8-bit weights and products on CPUs (`quantize_int8`); scores stay float32.
        calibration: batches of `images` that a static quantisation sees; None: dynamic.
        labels: names of classes.

    Raises:
        InputError: naming the argument; a package that is not installed; nothing can be written there.
    """
    with whole_files(check_output(path, "path"), "path") as part:
        write_onnx(
            engine,
            part,
            dtype=dtype,
            opset=opset,
            kept=kept,
            uint8=uint8,
            inline=inline,
            quantize=quantize,
            calibration=calibration,
            labels=labels,
        )


def write_onnx(
    engine: Engine,
    path: Path,
    *,
    dtype: str | torch.dtype,
    opset: int,
    kept: bool,
    uint8: bool,
    inline: bool,
    quantize: str | None,
    calibration: "Iterable[np.ndarray] | None",
    labels: Mapping[int, str] | None,
) -> None:
    """What `export_onnx` does, but right to `path`: for callers with a temporary folder of their own."""
    need("format: onnx", "onnx", *(["onnxruntime"] if quantize else []), extra="dvit-infer[onnx]")
    import onnx

    from dvit_infer.onnx.writer import onnx_model

    if not isinstance(engine, Engine):
        raise InputError(f"engine: an Engine is expected, not a {type(engine).__name__}")
    exact = resolve_dtype(dtype, torch.device("cpu"))
    if quantize not in (None, "int8"):
        raise InputError(f"quantize: {quantize!r} is not known; int8 is")
    if quantize and exact != torch.float32:
        raise InputError("quantize: int8 starts from float32, not from float16")
    if calibration is not None and not quantize:
        raise InputError("calibration: is for quantize='int8'")
    model = onnx_model(engine.graph_in(exact), opset=opset, uint8=uint8, kept=kept)
    if quantize:
        from dvit_infer.onnx.quantize import quantize_int8

        model = quantize_int8(model, calibration)
    facts = _facts(engine, quantize or str(exact).removeprefix("torch."), labels)
    onnx.helper.set_model_props(model, {**facts, "weights_sha256": _digest(model)})
    save(model, path, inline)
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ValueError(f"the ONNX model is not valid: {error}") from error  # ours to mend


def _facts(engine: Engine, dtype: str, labels: Mapping[int, str] | None) -> dict[str, str]:
    """What a file says of itself, as text: JSON where it is no single word."""
    from dvit_infer import __version__
    from dvit_infer.images.decode import preprocess_for

    config = engine.config
    preprocess = preprocess_for(config)
    preprocessing = {**asdict(preprocess), "mean": config.mean, "std": config.std, "interpolation": "bicubic"}
    rates = [count / config.num_patches for count in config.num_keep]
    facts = {
        HEADER_KEY: header_text(config),
        "version": __version__,
        "family": config.family,
        "arch": config.arch,
        "keep_rate": str(config.keep_rate if config.num_keep else 1.0),
        "keep_rates": json.dumps(rates),
        "num_keep": json.dumps(config.num_keep),
        "preprocessing": json.dumps(preprocessing),
        "dtype": dtype,
        "gflops": str(engine.graph.gflops),
        "params": str(engine.params),
    }
    return facts | ({} if labels is None else {"labels": json.dumps({str(k): v for k, v in sorted(labels.items())})})


def _digest(model: "onnx.ModelProto") -> str:
    """Of all weights: a file whose weights lie beside it changes with them, and so do the answers' marks."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(tensor.name.encode())
        digest.update(tensor.raw_data)
    return digest.hexdigest()


def save(model: "onnx.ModelProto", path: Path, inline: bool = False) -> None:
    """Write a model, the weights of a large one beside it as `<name>.data`."""
    import onnx

    if model.ByteSize() > LARGEST:
        data = f"{path.name}.data"
        onnx.external_data_helper.convert_model_to_external_data(model, location=data, size_threshold=_EXTERNAL_FROM)
        model = onnx.external_data_helper.write_external_data_tensors(model, os.fspath(path.parent))
    if inline:
        model = _inlined(model)
    path.write_bytes(model.SerializeToString())


def _inlined(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The model without its local functions; `onnx.inliner` leaves their domain behind."""
    import onnx.inliner

    inlined: onnx.ModelProto = onnx.inliner.inline_local_functions(model)
    used = {node.domain for node in inlined.graph.node} | {""}
    domains = [entry for entry in inlined.opset_import if entry.domain in used]
    del inlined.opset_import[:]
    inlined.opset_import.extend(domains)
    return inlined


@contextlib.contextmanager
def probed(path: Path, given: bool, outputs: Sequence[str]) -> Iterator["Path | bytes"]:
    """The model of a file that also gives the values `outputs` and, if `given`, takes every stage's choice as an input.

    Raises:
        InputError: it cannot be read, or has no such values.
    """
    need(f"{path}", "onnx", extra="dvit-infer[onnx]")
    import onnx

    try:
        model = _inlined(onnx.load(os.fspath(path)))
    except Exception as error:  # protobuf's and onnx's own have no common base
        raise InputError(f"{path}: cannot be read as ONNX: {error}") from None
    graph = model.graph
    known = {value.name: value for value in [*graph.value_info, *graph.output]}
    if missing := [name for name in outputs if name not in known]:
        raise InputError(f"{path}: has no value {missing[0]}; dvit-convert writes files that have")
    present = {value.name for value in graph.output}
    graph.output.extend(known[name] for name in outputs if name not in present)
    if given:
        choices = [name for name in known if name.startswith("prune.") and name.endswith("/index")]
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


def weights_of(model: "onnx.ModelProto") -> dict[str, torch.Tensor]:
    """A model's floating point weights by name; for quantised ones, what they stand for: scale * (q - zero point)."""
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
