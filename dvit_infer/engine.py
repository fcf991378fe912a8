"""A checkpoint becomes an engine: the folded graph, a backend, a device and a dtype."""

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from dvit_infer.backends import runner_for
from dvit_infer.classifier import Classifier, Source
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.graph import Graph, Node, fold
from dvit_infer.models.checkpoint import Checkpoint, read_checkpoint
from dvit_infer.models.header import HEADER_KEY, header_text
from dvit_infer.models.reading import Note
from dvit_infer.models.registry import build_reference, recognise
from dvit_infer.models.vit.graph import build_graph
from dvit_infer.utils.devices import resolve_device, resolve_dtype
from dvit_infer.utils.files import atomic_write, check_output


class Engine(Classifier):
    """A converted model. Call it with images; `convert` and `load` make one.

    Attributes:
        graph: the nodes that run, with their weights; `print(engine.graph)` shows them and what runs them.
        notes: what was read, assumed or given when the checkpoint was recognised.
        config, runner, device, dtype, micro_batch: as of every `Classifier`.
    """

    def __init__(
        self, config: Config, checkpoint: Checkpoint, notes: Sequence[Note], device: torch.device, dtype: torch.dtype
    ) -> None:
        graph = folded_graph(config, checkpoint, device, dtype)
        super().__init__(config, runner_for(graph), device, dtype)
        self.notes = list(notes)
        self._graph = graph
        self._checkpoint = checkpoint

    @property
    def graph(self) -> Graph:
        """What runs it may change at its first call, where a kernel fails."""
        return replace(self._graph, runtime=self.runner.runtime)

    def save(self, path: str | Path) -> None:
        """Write the weights, unfolded, under their official names and in the source's dtype, and the config.

        Everything can be built from the file: other keep rates, dtypes and devices, the dense twin, the reference.

        Raises:
            InputError: nothing can be written there. No partial file is left.
        """
        with atomic_write(check_output(path, "save"), "save") as part:
            self.write(part)

    def write(self, path: Path) -> None:
        """What `save` does, but right to `path`: for callers with a temporary file of their own.

        Raises:
            OSError: the disk is full, say.
        """
        try:
            save_file(self._checkpoint.state, path, {HEADER_KEY: header_text(self.config)})
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from None

    def graph_in(self, dtype: torch.dtype) -> Graph:
        """The graph folded anew, on the CPU in another dtype: for what writes it elsewhere."""
        return folded_graph(self.config, self._checkpoint, torch.device("cpu"), dtype)

    @property
    def params(self) -> int:
        """Weights of the model as the file has them, a dense engine's without the predictors (`Checkpoint.params`)."""
        return self._checkpoint.params(dense=self.config.method == "none")

    def tensors(self, graph: Graph) -> dict[str, torch.Tensor]:
        return {f"{node.name} {name}": w for node in graph.nodes for name, w in node.weights.items()}

    def own_tensors(self) -> dict[str, torch.Tensor]:
        return self.tensors(self.graph)

    def node_values(
        self, nodes: Sequence[Node], images: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> list[tuple[Node, torch.Tensor]]:
        found: list[tuple[Node, torch.Tensor]] = []
        self.runner(images, kept or None, lambda node, out: found.append((node, out.clone())))
        return found

    def digest(self, source: Source) -> Iterator[bytes]:
        for name, tensor in sorted(checkpoint_of(self, source).state.items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def convert(
    source: Source,
    *,
    arch: str | None = None,
    keep_rate: float | None = None,
    prune_at: Sequence[int] | None = None,
    method: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    assume: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Engine:
    """Make an engine from a checkpoint.

    Args:
        source: a checkpoint's path, or an already loaded state dict.
        arch: a name of `list_archs()`; None: recognised from keys and shapes.
        keep_rate: share r of the patch tokens kept at the first stage, r**2 at the second and so on, of the original
            count; None: from the file's args, else 0.7.
        prune_at: 0-based indices of the blocks before which tokens are dropped; None: from the file or its depth.
        method: 'predictor', or 'none' for the dense model; None: what the weights allow.
        image_size: pixels, one number or (H, W), multiples of the patch; None: as trained. Another size resamples the
            position embedding.
        assume: what a file cannot say: num_heads, skip_lam, eps, predictor_eps, trained_size, mean, std, weights
            (which set of several), and the above.
        device: 'cuda' if there is one, else 'cpu'.
        dtype: bfloat16 on CUDA, float32 on a CPU.

    Raises:
        InputError: a ValueError whose one line names the file, the key or the argument.
    """
    where = resolve_device(device)
    what = resolve_dtype(dtype, where)
    checkpoint, config, notes = _recognised(source, arch, keep_rate, prune_at, method, image_size, assume)
    return Engine(config, checkpoint, notes, where, what)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    method: str | None = None,
    keep_rate: float | None = None,
) -> Engine:
    """Make an engine from a file that `Engine.save` wrote; arguments as `convert`, by default as saved.

    Raises:
        InputError: as `convert`, and when the file is no saved engine.
    """
    where = resolve_device(device)
    what = resolve_dtype(dtype, where)
    checkpoint = read_checkpoint(path)
    if not checkpoint.is_saved_engine:
        raise InputError(f"{path}: is no saved engine; convert() reads checkpoints")
    given = {} if keep_rate is None else {"keep_rate": keep_rate}
    config, notes = recognise(checkpoint, None, given, {"method": method})
    return Engine(config, checkpoint, notes, where, what)


def load_reference(
    source: Source,
    *,
    arch: str | None = None,
    keep_rate: float | None = None,
    prune_at: Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    assume: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The reference model of a checkpoint: plain PyTorch, official parameter names, float32, CPU, evaluation mode.

    Its forward gives logits (B, K), with `return_kept=True` also the kept positions; after `.train()` it gives what
    training needs (`reference.vit.TrainOutput`). Arguments and errors as `convert`.
    """
    checkpoint, config, _ = _recognised(source, arch, keep_rate, prune_at, None, image_size, assume)
    return build_reference(config, checkpoint)


def checkpoint_of(engine: Classifier, source: Source) -> Checkpoint:
    """The checkpoint that an engine was made from, with the set of weights that it took, if there are several."""
    checkpoint = read_checkpoint(source)
    wanted = engine.config.weights
    return checkpoint if None in (checkpoint.weights, wanted) else read_checkpoint(source, wanted)


def folded_graph(config: Config, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Graph:
    """The graph an engine runs: built from the reference model, folded, on its device in its dtype."""
    return fold(build_graph(build_reference(config, checkpoint), config), dtype).to(device, dtype)


def _recognised(
    source: Source,
    arch: str | None,
    keep_rate: float | None,
    prune_at: Sequence[int] | None,
    method: str | None,
    image_size: int | tuple[int, int] | None,
    assume: Mapping[str, Any] | None,
) -> tuple[Checkpoint, Config, list[Note]]:
    if assume is not None and not isinstance(assume, Mapping):
        raise InputError(f"assume: a dict such as {{'num_heads': 6}} is expected, not {assume!r}")
    given = dict(assume or {})
    for what, value in (("keep_rate", keep_rate), ("prune_at", prune_at)):
        if value is not None:
            given[what] = value
    checkpoint = read_checkpoint(source, given.get("weights"))
    config, notes = recognise(checkpoint, arch, given, {"method": method, "image_size": image_size})
    return checkpoint, config, notes
