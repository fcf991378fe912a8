"""An ONNX file that dvit-convert wrote becomes a classifier, run by ONNX Runtime."""

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from dvit_infer.backends.onnxruntime import OnnxRunner, input_dtype, open_session
from dvit_infer.checkpoint import HEADER_KEY, read_header
from dvit_infer.classifier import Classifier, Source
from dvit_infer.config import METHODS, Config
from dvit_infer.devices import resolve_device
from dvit_infer.errors import InputError
from dvit_infer.files import check_name
from dvit_infer.graph import Graph, Node


def is_onnx(source: object) -> bool:
    """Whether it is the name of an ONNX file; protobuf has no mark to be known by."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".onnx"


class OnnxEngine(Classifier):
    """A model in an ONNX file; called as `Engine` is. `load_onnx` makes one.

    Attributes:
        path: of the file.
        only_uint8: whether it takes uint8 pictures alone, which it normalises itself.
        config, labels, runner, device, dtype, chunk: as of every `Classifier`.
    """

    runner: OnnxRunner

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        session = open_session(path, device, str(path))
        facts = session.get_modelmeta().custom_metadata_map
        if HEADER_KEY not in facts:
            raise InputError(f"{path}: was not written by dvit-convert: how its pictures are prepared is not known")
        config = _config(str(path), facts[HEADER_KEY])
        self.only_uint8 = input_dtype(session) == torch.uint8
        _check_shapes(str(path), session, config, self.only_uint8)
        self._precision = str(facts.get("dtype", "float32"))
        dtype = torch.float16 if self._precision == "float16" else torch.float32
        super().__init__(config, OnnxRunner(session, path, config, device), device, dtype)
        self.labels = _labels(str(path), facts.get("labels"))

    @property
    def precision(self) -> str:
        return self._precision

    def own_tensors(self) -> dict[str, torch.Tensor]:
        import onnx

        from dvit_infer.onnx_file import weights_of

        return weights_of(onnx.load(os.fspath(self.path)))

    def tensors(self, graph: Graph) -> dict[str, torch.Tensor]:
        from dvit_infer.backends.onnx import onnx_model
        from dvit_infer.onnx_file import weights_of

        return weights_of(onnx_model(graph, uint8=self.only_uint8))

    def node_values(
        self, nodes: Sequence[Node], images: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> list[tuple[Node, torch.Tensor]]:
        names = {node.name: "logits" if node.kind == "head" else node.name for node in nodes}
        values = self.runner.node_values(images, kept, tuple(names.values()))
        return [(node, values[names[node.name]]) for node in nodes]

    def digest(self, source: Source) -> Iterator[bytes]:
        for file in (self.path, self.path.with_name(f"{self.path.name}.data")):
            if file.exists():
                with file.open("rb") as content:
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
    """Raise InputError unless there is a file with something in it."""
    path = check_name(path)
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


def _config(name: str, text: str) -> Config:
    """The config that a file says it has; nothing else there can say it, so types are checked."""
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in read_header(name, text).items()}

    def fits(value: object, like: object) -> bool:
        if isinstance(like, tuple):
            return isinstance(value, tuple) and all(fits(one, like[0]) for one in value)
        if isinstance(like, float):
            return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
        return type(value) is type(like)

    like = dict.fromkeys(said, 1) | {
        **dict.fromkeys(("arch", "family", "method"), ""),
        **dict.fromkeys(("eps", "keep_rate", "predictor_eps", "skip_lam"), 1.0),
        **dict.fromkeys(("image_size", "trained_size", "prune_at"), (1,)),
        **dict.fromkeys(("mean", "std"), (1.0,)),
    }
    optional = {"crop_pct": float, "weights": str}
    for key, value in said.items():
        right = value is None or isinstance(value, optional[key]) if key in optional else fits(value, like[key])
        if not right:
            raise InputError(f"{name}: its {HEADER_KEY} header is damaged at {key!r}")
    config = Config(**cast(dict[str, Any], said))
    sound = len(config.image_size) == 2 and len(config.mean) == len(config.std) == 3 and 0 not in config.std
    if not sound or config.method not in METHODS or min(*config.image_size, config.patch_size, config.embed_dim) < 1:
        raise InputError(f"{name}: its {HEADER_KEY} header is damaged: no such model can be")
    return config


def _check_shapes(name: str, session: Any, config: Config, only_uint8: bool) -> None:
    """What the header says must be what the graph takes and gives."""
    height, width = config.image_size
    expected = [("images", [height, width, 3] if only_uint8 else [3, height, width])]
    expected += [("logits", [config.num_classes])]
    values = {value.name: list(value.shape[1:]) for value in [*session.get_inputs(), *session.get_outputs()]}
    for value, shape in expected:
        if values.get(value) != shape:
            raise InputError(f"{name}: its header says {value} are {shape}, its graph says {values.get(value)}")


def _labels(name: str, text: str | None) -> dict[int, str] | None:
    if text is None:
        return None
    try:
        return {int(index): str(label) for index, label in json.loads(text).items()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{name}: its labels are not the JSON this project writes") from None
