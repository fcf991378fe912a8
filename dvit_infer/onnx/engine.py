"""An ONNX file that dvit-convert wrote becomes a classifier, run by ONNX Runtime."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dvit_infer.classifier import Classifier, Source
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.graph import Graph, Node
from dvit_infer.models.header import HEADER_KEY, saved_config
from dvit_infer.onnx.runner import OnnxRunner
from dvit_infer.onnx.session import input_dtype, open_session
from dvit_infer.utils.devices import resolve_device
from dvit_infer.utils.files import check_name


def is_onnx(source: object) -> bool:
    """Whether it is the name of an ONNX file; protobuf has no mark to be known by."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx"


class OnnxEngine(Classifier):
    """A model in an ONNX file; called as `Engine` is. `load_onnx` makes one.

    Attributes:
        path: of the file.
        only_uint8: whether it takes uint8 images alone, which it normalises itself.
        config, labels, runner, device, dtype, micro_batch: as of every `Classifier`.
    """

    runner: OnnxRunner

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        session = open_session(path, device, str(path))
        facts = session.get_modelmeta().custom_metadata_map
        if HEADER_KEY not in facts:
            raise InputError(f"{path}: was not written by dvit-convert: how its images are prepared is not known")
        config = saved_config(str(path), facts[HEADER_KEY])
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

        return weights_of(onnx.load(os.fspath(self.path)))  # int8 ones as what they stand for

    def tensors(self, graph: Graph) -> dict[str, torch.Tensor]:
        from dvit_infer.onnx.probe import weights_of
        from dvit_infer.onnx.writer import onnx_model

        return weights_of(onnx_model(graph, uint8=self.only_uint8))

    def node_values(
        self, nodes: Sequence[Node], images: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> list[tuple[Node, torch.Tensor]]:
        names = {node.name: "logits" if node.kind == "head" else node.name for node in nodes}
        values = self.runner.node_values(images, kept, tuple(names.values()))
        return [(node, values[names[node.name]]) for node in nodes]

    def digest(self, source: Source) -> Iterator[bytes]:
        with self.path.open("rb") as content:  # weights beside it are in there too, as their digest
            yield hashlib.file_digest(content, "sha256").digest()


def load_onnx(path: str | Path, *, device: str | torch.device | None = None) -> OnnxEngine:
    """Make a classifier from an ONNX file that `export_onnx` or dvit-convert wrote.

    Args:
        path: of the file; weights in a file of their own lie beside it.
        device: 'cuda' if there is one and onnxruntime has its CUDA provider, else 'cpu'.

    Raises:
        InputError: naming the file: it cannot be read, is damaged, or is of another origin; or the package that is
            not installed.
    """
    path = check_file(path)
    return OnnxEngine(path, onnx_device(device))


def check_file(path: str | Path) -> Path:
    """The path, links followed; raises InputError unless there is a file with something in it."""
    path = check_name(path)
    if path.is_symlink():
        path = Path(os.path.realpath(path))  # weights lie beside the file, not beside a link to it
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
    """The device asked for; by default CUDA where both it and ONNX Runtime's provider are."""
    if device is None and importlib.util.find_spec("onnxruntime"):
        import onnxruntime

        device = None if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"
    return resolve_device(device)


def _check_shapes(name: str, session: Any, config: Config, only_uint8: bool) -> None:
    """What the header says must be what the graph takes and gives."""
    height, width = config.image_size
    expected = {"images": [height, width, 3] if only_uint8 else [3, height, width], "logits": [config.num_classes]}
    found = {value.name: list(value.shape[1:]) for value in [*session.get_inputs(), *session.get_outputs()]}
    expected |= {f"kept_{i}": [k] for i, k in enumerate(config.num_keep) if "kept_0" in found}
    for value, shape in expected.items():
        if found.get(value) != shape:
            raise InputError(f"{name}: its header says {value} are {shape}, its graph says {found.get(value)}")


def _labels(name: str, text: str | None, num_classes: int) -> dict[int, str] | None:
    try:
        labels = None if text is None else {int(index): label for index, label in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        labels = {-1: ""}
    if labels is not None and not all(0 <= i < num_classes and isinstance(t, str) for i, t in labels.items()):
        raise InputError(f"{name}: its labels are not the JSON this project writes, a name for each of its classes")
    return labels
