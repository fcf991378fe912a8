"""Candidates of other runtimes, if installed: ONNX Runtime, OpenVINO; `owners.py` has those of other code."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dvit_infer.backends.openvino_model import PRECISIONS, compile_model, core
from dvit_infer.benchmark.candidates import Call, Candidate, Subject
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.images.synthetic import sample_images
from dvit_infer.models.folded import folded_graph
from dvit_infer.models.reference import Reference
from dvit_infer.models.registry import build_reference
from dvit_infer.onnx.session import open_session, run_session
from dvit_infer.utils.packages import need

if TYPE_CHECKING:
    from onnx import ModelProto


def onnxruntime_candidate(subject: Subject) -> Candidate:
    """The reference, exported by torch.onnx."""
    _check_served(subject)
    _need("onnx", "onnxscript", "onnxruntime")
    return _of_runtime(subject, "onnxruntime", _session_call(subject, _exported(subject, subject.dtype)))


def onnx_candidate(subject: Subject) -> Candidate:
    """The ONNX model that dvit-convert writes."""
    _check_served(subject)
    _need("onnx", "onnxruntime")
    return _of_converted(subject, "converted", lambda model: model)


def onnx_int8_candidate(subject: Subject) -> Candidate:
    """The ONNX model that dvit-convert writes, quantised to int8."""
    if subject.device.type != "cpu" or subject.dtype != torch.float32:
        raise InputError(
            "compare: onnx-int8 runs on CPUs, beside float32; leave it out, or --device cpu --dtype float32"
        )
    _need("onnx", "onnxruntime")
    from dvit_infer.onnx.quantize import quantize_int8

    return replace(_of_converted(subject, "int8", quantize_int8), approximate=True)


def _of_converted(subject: Subject, variant: str, change: "Callable[[ModelProto], ModelProto]") -> Candidate:
    from dvit_infer.onnx.writer import onnx_model

    graph = folded_graph(subject.config, subject.checkpoint, torch.device("cpu"), subject.dtype)
    call = _session_call(subject, change(onnx_model(graph)).SerializeToString())
    return replace(_of_runtime(subject, "onnxruntime", call), variant=variant, gmacs=graph.gmacs)


def _check_served(subject: Subject) -> None:
    cuda = subject.device.type == "cuda"
    served = (torch.float32, torch.float16) if cuda else (torch.float32,)
    if subject.dtype not in served:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in served)
        raise InputError(f"compare: onnxruntime runs {names} on {subject.device.type}, not {subject.dtype_name}")


def _session_call(subject: Subject, model: bytes) -> Call:
    session = open_session(model, subject.device, "compare: onnxruntime")
    return lambda images: run_session(session, {"images": images}, ["logits"])[0]


def openvino_candidate(subject: Subject) -> Candidate:
    if subject.device.type != "cpu":
        raise InputError("compare: openvino runs on CPUs; leave it out, or --device cpu")
    if subject.dtype not in PRECISIONS:
        raise InputError(f"compare: openvino runs float32 and bfloat16, not {subject.dtype_name}")
    _need("onnx", "onnxscript", "openvino")
    # The precision hint selects bfloat16; weights and images stay float32.
    run = openvino_call(_exported(subject, torch.float32), PRECISIONS[subject.dtype])
    return replace(_of_runtime(subject, "openvino", run), prepare=torch.Tensor.float)


def openvino_call(model: Path | bytes, precision: str) -> Call:
    """Compile an ONNX model without local functions by OpenVINO for this CPU."""
    compiled = compile_model(core().read_model(model), {"INFERENCE_PRECISION_HINT": precision})
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0])


def _of_runtime(subject: Subject, runtime: str, call: Call) -> Candidate:
    return Candidate(runtime, None, subject.config, call, subject.plain_gmacs, lambda: None)


def _exported(subject: Subject, dtype: torch.dtype) -> bytes:
    """The reference by torch.onnx, which takes long, once for all runtimes."""
    if dtype not in subject.exports:
        model = build_reference(subject.config, subject.checkpoint).to(dtype)
        subject.exports[dtype] = traced_onnx(model, subject.config)
    return subject.exports[dtype]


class _Logits(nn.Module):
    """A reference whose forward gives logits alone, for exporters."""

    def __init__(self, model: Reference) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.evaluate(images).logits


@torch.no_grad()
def traced_onnx(model: Reference, config: Config) -> bytes:
    """Export a reference by torch.onnx: input `images` (B, 3, H, W), output `logits` (B, K), any B."""
    from onnxscript import opset18 as op

    def stable_sort(x: Any, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
        """Sort by TopK, which orders equal values by position; the exporter knows no stable sort."""
        gather: Any = op.Gather  # its stubs require a type that is known only at run time
        size = gather(op.Shape(x), op.Constant(value_ints=[dim]))
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    images = sample_images(2, config.image_size).to(next(model.parameters()).dtype)
    with _quiet():
        program = torch.onnx.export(
            _Logits(model).eval(),
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
        )
    assert program is not None
    exported: bytes = program.model_proto.SerializeToString()
    return exported


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which reports packages that it does not need."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _need(*packages: str) -> None:
    """Raise InputError if a package is missing; the last one is named as the candidate."""
    need(f"compare: {packages[-1]}", *packages, extra="dvit-infer[peers]")
