"""A checkpoint becomes an engine: the folded graph, a backend, a device and a dtype."""

import contextlib
import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dvit_infer.backends import runner_for
from dvit_infer.backends.openvino import OpenVinoRunner
from dvit_infer.backends.openvino_model import constants_of, openvino_model
from dvit_infer.backends.ranges import activation_ranges
from dvit_infer.classifier import Classifier, Verifiable
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.graph import Graph, Node
from dvit_infer.graph.nodes import Attention, Mlp
from dvit_infer.images.calibration import AT_ONCE, calibration_images
from dvit_infer.images.tensors import check_images
from dvit_infer.models.checkpoint import Checkpoint, Source, read_checkpoint
from dvit_infer.models.folded import FoldedWeights, folded_graph
from dvit_infer.models.header import HEADER_KEY, header_text
from dvit_infer.models.labels import labels_of
from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.models.reading import Note
from dvit_infer.models.recognised import recognised
from dvit_infer.models.registry import recognise, unused_keys
from dvit_infer.models.source import WeightSource
from dvit_infer.utils.devices import is_int8, resolve_device, resolve_dtype
from dvit_infer.utils.files import atomic_write, check_output


class Engine(Verifiable):
    """A converted model, to be called with images. `convert` and `load` return one.

    It holds the folded weights alone, in the form that its backend needs: `save`, exporters and, where the backend is
    OpenVINO, `graph` read its source again, and refuse if that has changed.

    Attributes:
        notes: the facts read, assumed or given when the checkpoint was recognised.
        params: the number of weights in the file, without those of a reduction that does not run.
        config: the description of the model (frozen): `engine.config.reduction` says which tokens stay.
        labels: class names by number, if the file has them; else None.
        runner: the backend that runs it.
        device: where it runs.
        dtype: in which dtype it runs; with int8, that of all else.
        micro_batch: the most images that run together; larger batches are split.
    """

    fan_in_dim = 1
    _weights: FoldedWeights | None = None  # of a runner that keeps none

    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        notes: Sequence[Note],
        device: torch.device,
        dtype: torch.dtype,
        source: WeightSource,
        backend: str | None = None,
        int8: bool = False,
        cached: bool = True,
    ) -> None:
        """Fold what was read.

        Args:
            checkpoint: what was read; the tensors are taken out of it, so that they can go as they are folded.
            cached: whether OpenVINO's model may be kept in the user's cache folder.
        """
        self.labels = labels_of(checkpoint, config.num_classes)
        self.params = checkpoint.params(unused_keys(config))
        graph = folded_graph(config, checkpoint, device, dtype, take=True)
        weights = FoldedWeights(config, source, device, dtype, None if source.is_file else graph)
        key = source.digest + header_text(config).encode() + f"{dtype} {int8}".encode() if cached else None
        super().__init__(config, runner_for(graph, backend, weights, key, int8, source.is_file), device, dtype)
        self._int8 = int8
        self.notes = list(notes)
        self._graph = graph
        if isinstance(self.runner, OpenVinoRunner) or graph.is_forgotten:
            self._graph, self._weights = graph.to(torch.device("meta"), dtype), weights
        self._source = source

    @property
    def precision(self) -> str:
        """The name of the dtype it computes in, 'int8' included."""
        return "int8" if self._int8 else super().precision

    @property
    def graph(self) -> Graph:
        """The nodes that run, with their weights; `print(engine.graph)` shows them and their runtime.

        The runtime changes if a kernel fails at the first call. If the runner keeps no weights and the file has gone,
        it is the `outline`.
        """
        graph = self._graph
        if self._weights is not None:
            with contextlib.suppress(InputError):
                graph = self._weights()
        return replace(graph, runtime=self.runner.runtime)

    @property
    def outline(self) -> Graph:
        """The same nodes; their weights may have shapes only (device meta), but nothing has to be read for them."""
        return replace(self._graph, runtime=self.runner.runtime)

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights in the precision in which they run: int8 are the matrices of attention and MLPs."""
        return sum(
            w.numel() * (1 if self._int8 and isinstance(node, Attention | Mlp) and w.ndim == 2 else w.element_size())
            for node in self._graph.nodes
            for w in node.weights.values()
        )

    def save(self, path: str | Path) -> None:
        """Write the weights, unfolded, under their official names and in the source's dtype, and the config.

        Everything can be built from the file: other keep rates, dtypes and devices, the dense counterpart, the
        reference.

        Raises:
            InputError: the file cannot be written, or the source of the weights is gone or has changed. No partial file
                is left.
        """
        with atomic_write(check_output(path, "save"), "save") as part:
            self.write(part)

    def write(self, path: Path) -> None:
        """Write the same to `path` directly, for callers that write to a temporary file.

        Raises:
            OSError: for example, the disk is full.
        """
        state = self._source.read().state
        try:
            save_file(state, path, {HEADER_KEY: header_text(self.config, self.labels)})
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from None

    def graph_in(self, dtype: torch.dtype) -> Graph:
        """Return the graph folded again on the CPU in another dtype, for exporters."""
        return folded_graph(self.config, self._source.read(), torch.device("cpu"), dtype, take=True)

    def tensors(self, graph: Graph) -> dict[str, torch.Tensor]:
        if isinstance(self.runner, OpenVinoRunner):
            return constants_of(openvino_model(graph), graph.nodes)
        return {f"{node.name} {name}": w for node in graph.nodes for name, w in node.weights.items()}

    def own_tensors(self) -> dict[str, torch.Tensor]:
        return self.runner.constants() if isinstance(self.runner, OpenVinoRunner) else self.tensors(self.graph)

    def node_values(
        self, nodes: Sequence[Node], images: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> list[tuple[Node, torch.Tensor]]:
        found: list[tuple[Node, torch.Tensor]] = []
        self.runner.plain().run(images, kept or None, lambda node, out: found.append((node, out.clone())))
        return found

    def digest(self, source: Source | None = None) -> Iterator[bytes | memoryview]:
        return (self._source.read() if source is None else checkpoint_of(self, source)).content()


def convert(
    source: Source,
    *,
    arch: str | None = None,
    keep_rate: float | Sequence[float] | None = None,
    prune_at: Sequence[int] | None = None,
    method: str | None = None,
    merge: int | str | Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    assume: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    calibrate: str | Path | torch.Tensor | None = None,
    backend: str | None = None,
) -> Engine:
    """Make an engine from a checkpoint.

    Args:
        source: the path of a checkpoint or of its folder, `hf-hub:user/name` or `timm/name` on the Hugging Face Hub, a
            loaded state dict, or a module of timm or transformers, which is neither kept nor changed.
        arch: a name from `list_archs()`; None: recognised from keys and shapes.
        keep_rate: the share r of the original patch tokens that the first stage keeps; the second keeps r**2, and so
            on. For 'evit' that of the current ones in every stage, or a list with one for each; a whole number over 1
            is a count. None: from the file's args, else 0.7.
        prune_at: 0-based indices of the blocks before which ('evit': in which) tokens are dropped; None: from the file
            or its depth.
        method: 'predictor'; 'evit', 'tome' or 'random' (a control), which need no training; or 'none' for the dense
            model. None: as the file was trained, 'predictor' if the weights hold predictors, else 'none'.
        merge: for 'tome' the number of tokens merged in every block, a list with one for each, or '8:decreasing', which
            falls from 16 in the first block to 0 in the last; a block merges at most half of its patch tokens. None:
            80% of the patches in equal parts, in blocks where that saves time on a CPU.
        image_size: pixels, one number or (H, W), multiples of the patch size; None: as trained. Another size
            resamples the position embedding.
        assume: facts that the file does not hold: num_heads, skip_lam, eps, predictor_eps, trained_size,
            no_embed_class, mean, std, crop_pct, crop_mode, interpolation, weights (which set of
            several), fuse and score of 'evit', prop_attn of 'tome', and the arguments above.
        device: None: 'cuda' if available, else 'cpu'.
        dtype: None: bfloat16 on CUDA, float32 on a CPU. 'int8' on a CPU: linears of attention and MLPs in int8, scores
            in float32; needs OpenVINO.
        calibrate: for int8: images (B, 3, H, W), uint8 or normalised, or a folder of image files, of which 128 are
            drawn, whose values fix the ranges of the linears' inputs (static quantisation, the faster one); saved with
            the model. None: those in the file, else ranges are taken from each call's values (dynamic).
        backend: 'torch', 'triton' (NVIDIA GPUs), 'openvino' (CPUs); None: the fastest that is installed and knows the
            model.

    Raises:
        InputError: a ValueError whose one line names the file, the key or the argument.
    """
    where, what, int8 = placed(device, dtype)
    if calibrate is not None and not int8:
        raise InputError("calibrate: is for dtype int8")
    checkpoint, config, notes = recognised(source, arch, keep_rate, prune_at, method, merge, image_size, assume)
    if calibrate is not None:
        config = calibrated(config, checkpoint, calibrate)
    return Engine(config, checkpoint, notes, where, what, WeightSource(source, checkpoint), backend, int8)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    method: str | None = None,
    keep_rate: float | Sequence[float] | None = None,
    merge: int | str | Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    backend: str | None = None,
) -> Engine:
    """Make an engine from a file that `Engine.save` wrote. Arguments are as for `convert`; defaults are as saved.

    Raises:
        InputError: as for `convert`, or the file is not a saved engine.
    """
    where, what, int8 = placed(device, dtype)
    checkpoint = read_checkpoint(path)
    if not checkpoint.is_saved_engine:
        raise InputError(f"{path}: is no saved engine; convert() reads checkpoints")
    given = {name: value for name, value in (("keep_rate", keep_rate), ("merge", merge)) if value is not None}
    config, notes = recognise(checkpoint, None, given, {"method": method, "image_size": image_size})
    return Engine(config, checkpoint, notes, where, what, WeightSource(path, checkpoint), backend, int8)


def placed(
    device: str | torch.device | None, dtype: str | torch.dtype | None
) -> tuple[torch.device, torch.dtype, bool]:
    """Return the device, the dtype, and whether linears are int8.

    Raises:
        InputError: one does not exist, or int8 is asked for on a GPU.
    """
    int8 = is_int8(dtype)
    where = resolve_device("cpu" if int8 and device is None else device)
    if int8 and where.type != "cpu":
        raise InputError(f"dtype: int8 is run by openvino on CPUs, not on {where.type}")
    return where, resolve_dtype(None if int8 else dtype, where), int8


def calibrated(config: Config, checkpoint: Checkpoint, images: str | Path | torch.Tensor) -> Config:
    """Return the config with the ranges of the linears' inputs, measured by running images; see `convert`.

    Raises:
        InputError: there is no image, or the tensor is none of images.
    """
    if isinstance(images, torch.Tensor):
        try:
            check_images(images, config)
        except ValueError as error:
            raise InputError(f"calibrate: {error}") from None
        batches: Iterable[torch.Tensor] = torch.split(images, AT_ONCE)
    elif isinstance(images, str | Path):
        batches = calibration_images(images, preprocess_for(config))
    else:
        raise InputError(f"calibrate: images or a folder are expected, not a {type(images).__name__}")
    graph = folded_graph(config, checkpoint, torch.device("cpu"), torch.float32)
    return replace(config, ranges=activation_ranges(graph, batches))


def checkpoint_of(engine: Classifier, source: Source) -> Checkpoint:
    """Return the checkpoint of an engine, with the set of weights that the engine uses."""
    return read_checkpoint(source, engine.config.weights, or_bare=True)
