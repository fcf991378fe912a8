"""A checkpoint becomes an engine: the folded graph, a backend, a device and a dtype."""

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from dvit_infer.backends import runner_for
from dvit_infer.checkpoint import FORMAT, HEADER_KEY, Checkpoint, read_checkpoint
from dvit_infer.config import Config
from dvit_infer.devices import chunk, free_memory, is_out_of_memory, resolve_device, resolve_dtype
from dvit_infer.errors import InputError
from dvit_infer.families import build_reference, recognise
from dvit_infer.families.reading import Note
from dvit_infer.files import check_output, whole_file
from dvit_infer.graph import Graph, build_graph, fold
from dvit_infer.images import check_images, is_plain

Source = str | Path | Mapping[str, Any]


class Engine:
    """A converted model. Call it with pictures; `convert` and `load` make one.

    Attributes:
        config: what the model is (frozen).
        graph: the nodes that run, with their weights; `print(engine.graph)` shows them and what runs them.
        runner: what runs the graph, for one batch that fits.
        notes: what was read, assumed or given when the checkpoint was recognised.
        device, dtype: where and in what the graph runs.
        chunk: pictures that go through the graph together; larger batches are cut.
    """

    def __init__(
        self, config: Config, checkpoint: Checkpoint, notes: Sequence[Note], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        self.config = config
        self.notes = list(notes)
        graph = folded_graph(config, checkpoint, self.device, self.dtype)
        self.runner = runner_for(graph)
        self.graph = replace(graph, how=self.runner.how)
        self._checkpoint = checkpoint
        self.chunk = chunk(device, config.num_patches, config.embed_dim)

    @overload
    def __call__(
        self, images: torch.Tensor, *, return_kept: Literal[False] = False, kept: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self, images: torch.Tensor, *, return_kept: Literal[True], kept: Sequence[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]: ...
    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, *, return_kept: bool = False, kept: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor]]:
        """Classify pictures.

        Args:
            images: (B, 3, H, W), any B >= 1, any device and strides; floating point is taken as normalised, uint8 is
                normalised inside with the config's mean and std.
            return_kept: also return which patches were kept.
            kept: a stage each, (B, k) int64 original patch positions, ascending, to keep instead of the predictors'
                choice; every stage's must be among the stage's before.

        Returns:
            Logits (B, K) float32 on the engine's device; with `return_kept` also the kept positions, a stage each
            (B, k) int64 in the original grid, row-major, ascending.

        Raises:
            ValueError: images or kept are of a rank, size, dtype or content that does not fit.
            MemoryError: a GPU has no memory for even one picture.
        """
        check_images(images, self.config)
        stages = None if kept is None else check_kept(kept, self.config, len(images), self.device)
        logits, chosen = [], []
        start = 0
        while start < len(images):
            part = slice(start, start + self.chunk)
            given = None if stages is None else [stage[part] for stage in stages]
            try:
                out = self.runner(images[part], given, return_kept=return_kept)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                out = None  # what the failed call held is free only once its traceback is gone
            if out is None:
                self._take_less(len(images[part]))
                continue
            start += len(out[0])
            logits.append(out[0])
            chosen.append(out[1])
        result = torch.cat(logits)
        return (result, [torch.cat(stage) for stage in zip(*chosen, strict=True)]) if return_kept else result

    def _take_less(self, images: int) -> None:
        """After a GPU had too little memory for so many pictures at a time: halve that, from now on.

        Raises:
            MemoryError: there is nothing to halve.
        """
        self.runner.release()
        if images == 1:
            free = free_memory(self.device) or 0
            height, width = self.config.image_size
            raise MemoryError(
                f"images: not one picture of {height}x{width} fits in what is free on {self.device}, "
                f"{free / 2**20:.0f} MiB; other programs may hold the rest"
            )
        self.chunk = (images + 1) // 2

    def save(self, path: str | Path) -> None:
        """Write the weights, unfolded, under their official names and in the source's dtype, and the config.

        Everything can be built from the file: other keep rates, dtypes and devices, the dense twin, the reference.

        Raises:
            InputError: nothing can be written there. No partial file is left.
        """
        with whole_file(check_output(path, "save"), "save") as part:
            self.write(part)

    def write(self, path: Path) -> None:
        """What `save` does, but right to `path`: for callers with a temporary file of their own.

        Raises:
            OSError: the disk is full, say.
        """
        header = {HEADER_KEY: json.dumps({"format": FORMAT, "config": asdict(self.config)})}
        try:
            save_file(self._checkpoint.state, path, header)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from None


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


def checkpoint_of(engine: Engine, source: Source) -> Checkpoint:
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


def check_kept(kept: Sequence[torch.Tensor], config: Config, batch: int, device: torch.device) -> list[torch.Tensor]:
    """Kept sets given by the caller, on the device, after every check that keeps indices in bounds.

    Raises:
        ValueError: the number of stages, a shape, a dtype, an order, or a position that an earlier stage dropped.
    """
    if not isinstance(kept, list | tuple):
        raise ValueError(f"kept: a list of tensors is expected, not a {type(kept).__name__}")
    if len(kept) != len(config.num_keep):
        raise ValueError(f"kept: {len(kept)} stages given, the model has {len(config.num_keep)}")
    alive = torch.ones(batch, config.num_patches, dtype=torch.bool, device=device)
    stages = []
    for stage, (index, count) in enumerate(zip(kept, config.num_keep, strict=True)):
        if not isinstance(index, torch.Tensor) or not is_plain(index):
            raise ValueError(f"kept: stage {stage} is a {type(index).__name__}; a dense tensor is expected")
        if tuple(index.shape) != (batch, count) or index.dtype != torch.int64:
            found = f"{index.dtype} of shape {tuple(index.shape)}"
            raise ValueError(f"kept: stage {stage} is {found}; int64 ({batch}, {count}) is expected")
        index = index.to(device).contiguous()
        if index.min() < 0 or index.max() >= config.num_patches or (index.diff(dim=1) <= 0).any():
            raise ValueError(f"kept: stage {stage} is not ascending positions from 0 to {config.num_patches - 1}")
        if not alive.gather(1, index).all():
            raise ValueError(f"kept: stage {stage} keeps a position that an earlier stage dropped")
        alive = torch.zeros_like(alive).scatter_(1, index, True)
        stages.append(index)
    return stages
