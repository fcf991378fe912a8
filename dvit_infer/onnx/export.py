"""Export an engine as an ONNX file: written atomically, checked, with metadata."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dvit_infer.engine import Engine
from dvit_infer.errors import InputError
from dvit_infer.models.header import HEADER_KEY, header_text
from dvit_infer.utils.devices import resolve_dtype
from dvit_infer.utils.files import atomic_write_files, check_output
from dvit_infer.utils.packages import need

if TYPE_CHECKING:
    import numpy as np
    import onnx

# OpenVINO's default on a CPU with bfloat16 units is bfloat16, scores included, so it may keep other patches. Its reader
# copies a file's metadata to the model's rt_info (under `framework`), but compiles by none of it: the caller has to
# give this property.
OPENVINO_HINT = "INFERENCE_PRECISION_HINT=f32"


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
    """Write an engine's model as an ONNX file, for any number of images.

    Input `images`: (B, 3, H, W) normalised, in the dtype, or with `uint8` (B, H, W, 3) uint8. Outputs: `logits`
    (B, K) float32, the embedding of a model without classes; with `kept` also `kept_0` and so on, (B, k) int64 original
    patch positions, ascending. Weights over 2 GiB go into `<path>.data` beside it.

    Args:
        engine: on any device, in any dtype.
        path: the output file, replaced atomically.
        dtype: float32 or float16; in float16 LayerNorm, softmax, rotation, pooling and scores stay float32.
        opset: 17 to 21 (`onnx.opsets`: with IR version 8 to 10); below 20 GELU is written out, in float32.
        inline: inline the function `dvit.prune_tokens`, for runtimes without functions.
        quantize: 'int8' for int8 weights and matrix products on CPUs (`quantize_int8`); scores stay float32.
        calibration: batches of `images` for static quantisation; None: dynamic.
        labels: class names.

    Raises:
        InputError: An argument is invalid, a package is not installed, or the file cannot be written.
    """
    with atomic_write_files(check_output(path, "path"), "path") as part:
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
    """Write the file like `export_onnx`, but directly to `path`, for callers with their own temporary folder."""
    need("format: onnx", "onnx", *(["onnxruntime"] if quantize else []), extra="dvit-infer[onnx]")
    import onnx

    from dvit_infer.onnx.probe import save
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
        raise ValueError(f"the ONNX model is not valid: {error}") from error  # a bug in this project


def _facts(engine: Engine, dtype: str, labels: Mapping[int, str] | None) -> dict[str, str]:
    """Return the metadata of a file, as text; values of more than one word are JSON."""
    from dvit_infer import __version__
    from dvit_infer.models.preprocessing import preprocess_for

    config = engine.config
    preprocess = preprocess_for(config)
    preprocessing = {**asdict(preprocess), "warp": preprocess.warp, "mean": config.mean, "std": config.std}
    if config.assumed:
        preprocessing["assumed"] = config.assumed
    rates = [count / config.num_patches for count in config.num_keep]
    facts = {
        HEADER_KEY: header_text(config),
        "version": __version__,
        "family": config.family,
        "arch": config.arch,
        "reduction": str(config.reduction),
        "keep_rate": str(config.reduction.keep_rate),
        "keep_rates": json.dumps(rates),
        "num_keep": json.dumps(config.num_keep),
        "preprocessing": json.dumps(preprocessing),
        "dtype": dtype,
        "gflops": str(engine.outline.gmacs),
        "params": str(engine.params),
        "openvino_hint": OPENVINO_HINT,
    }
    return facts | ({} if labels is None else {"labels": json.dumps({str(k): v for k, v in sorted(labels.items())})})


def _digest(model: "onnx.ModelProto") -> str:
    """Return a digest of all weights, so that a file with external weights, and its `model_id`, change with them."""
    digest = hashlib.sha256()
    for tensor in model.graph.initializer:
        digest.update(tensor.name.encode())
        digest.update(tensor.raw_data)
    return digest.hexdigest()
