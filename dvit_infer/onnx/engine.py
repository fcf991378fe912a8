"""Load an ONNX file written by dvit-convert as a classifier, run by ONNX Runtime."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dvit_infer.classifier import Verifiable
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.graph import Graph, Node
from dvit_infer.models.checkpoint import Source
from dvit_infer.models.header import HEADER_KEY
from dvit_infer.models.labels import checked_labels
from dvit_infer.models.registry import config_of
from dvit_infer.onnx.runner import OnnxRunner
from dvit_infer.onnx.session import input_dtype, open_session
from dvit_infer.utils.devices import resolve_device
from dvit_infer.utils.files import check_name


def is_onnx(source: object) -> bool:
    """Return whether a source is the name of an ONNX file, by its suffix; protobuf files have no magic number."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx"


class OnnxEngine(Verifiable):
    """A model in an ONNX file, with the interface of `Engine`. `load_onnx` makes one.

    Attributes:
        path: the file.
        only_uint8: whether it takes only uint8 images, which it normalises itself.
        config, labels, runner, device, dtype, micro_batch: as of every `Classifier`.
    """

    runner: OnnxRunner

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        session = open_session(path, device, str(path))
        facts = session.get_modelmeta().custom_metadata_map
        if HEADER_KEY not in facts:
            raise InputError(f"{path}: was not written by dvit-convert, so its preprocessing is unknown")
        config = config_of(str(path), facts[HEADER_KEY])
        self.only_uint8 = input_dtype(session) == torch.uint8
        _check_shapes(str(path), session, config, self.only_uint8)
        self._precision = str(facts.get("dtype", "float32"))
        dtype = torch.float16 if self._precision == "float16" else torch.float32
        super().__init__(config, OnnxRunner(session, path, config, device), device, dtype)
        self.labels = _labels(str(path), facts.get("labels"), config.num_classes)

    @property
    def precision(self) -> str:
        return self._precision

    def own_tensors(self) -> dict[str, torch.Tensor]:
        import onnx

        from dvit_infer.onnx.probe import weights_of

        return weights_of(onnx.load(os.fspath(self.path)))  # int8 weights are dequantised

    def tensors(self, graph: Graph) -> dict[str, torch.Tensor]:
        from dvit_infer.onnx.probe import opset_of, weights_of
        from dvit_infer.onnx.writer import onnx_model

        return weights_of(onnx_model(graph, opset=opset_of(self.path), uint8=self.only_uint8))

    def node_values(
        self, nodes: Sequence[Node], images: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> list[tuple[Node, torch.Tensor]]:
        there = [node for node in nodes if not node.keeps_x]
        names = {node.name: node.name for node in there} | {nodes[-1].name: "logits"}
        values = self.runner.node_values(images, kept, tuple(names.values()))
        return [(node, values[names[node.name]]) for node in there]

    def digest(self, source: Source | None = None) -> Iterator[bytes]:
        with self.path.open("rb") as content:  # the file contains a digest of weights stored beside it
            yield hashlib.file_digest(content, "sha256").digest()


def load_onnx(path: str | Path, *, device: str | torch.device | None = None) -> OnnxEngine:
    """Make a classifier from an ONNX file that `export_onnx` or dvit-convert wrote.

    Args:
        path: the file; external weights are beside it.
        device: None: 'cuda' if a GPU and onnxruntime's CUDA provider are available, else 'cpu'.

    Raises:
        InputError: The file cannot be read, is damaged or of another origin, or a package is not installed.
    """
    path = check_file(path)
    return OnnxEngine(path, onnx_device(device))


def check_file(path: str | Path) -> Path:
    """Return the path with links resolved; raise InputError unless it is a non-empty file."""
    path = check_name(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))  # external weights are beside the file, not beside a link to it
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder; an ONNX file is expected")
        with path.open("rb") as file:
            if not file.read(1):
                raise InputError(f"{path}: the file is empty")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    return path


def onnx_device(device: str | torch.device | None) -> torch.device:
    """Return the device; by default CUDA if a GPU and ONNX Runtime's CUDA provider are available."""
    if device is None and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        device = None if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
    resolved = resolve_device(device)
    if resolved.type == "mps":
        raise InputError("device: ONNX Runtime runs on cpu or cuda here, not on mps; convert the checkpoint for that")
    return resolved


def _check_shapes(name: str, session: Any, config: Config, only_uint8: bool) -> None:
    """Raise InputError unless the header agrees with the graph's inputs and outputs."""
    height, width = config.image_size
    width_out = config.num_classes or config.body.pooled_dim
    expected = {"images": [height, width, 3] if only_uint8 else [3, height, width], "logits": [width_out]}
    found = {value.name: list(value.shape[1:]) for value in [*session.get_inputs(), *session.get_outputs()]}
    expected |= {f"kept_{i}": [k] for i, k in enumerate(config.reduction.choice_sizes) if "kept_0" in found}
    for value, shape in expected.items():
        if found.get(value) != shape:
            raise InputError(f"{name}: its header says {value} are {shape}, its graph says {found.get(value)}")


def _labels(name: str, text: str | None, num_classes: int) -> dict[int, str] | None:
    try:
        found = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        found = text
    return checked_labels(name, found, num_classes)
