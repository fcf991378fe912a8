"""What classifies images, whatever runs it: checks, chunks, kept sets given or returned."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import torch

from dvit_infer.config import Config
from dvit_infer.graph import Graph, Node
from dvit_infer.images.tensors import check_images, is_plain
from dvit_infer.utils.devices import free_memory, is_out_of_memory, micro_batch

Source = str | Path | Mapping[str, Any]


class Runner(Protocol):
    """What runs a model for one batch that fits."""

    @property
    def runtime(self) -> str: ...

    @property
    def buffer_bytes(self) -> int: ...

    def __call__(
        self,
        images: torch.Tensor,
        kept: Sequence[torch.Tensor] | None = None,
        hook: Any = None,
        return_kept: bool = True,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]: ...

    def release(self) -> None: ...


class Classifier(ABC):
    """A model that classifies images and tells which patches it kept.

    Attributes:
        config: what the model is (frozen).
        runner: what runs it, for one batch that fits.
        device, dtype: where and in what it runs.
        micro_batch: images that go through it together; larger batches are cut.
    """

    only_uint8 = False  # whether it takes no images but uint8
    labels: Mapping[int, str] | None = None  # names of classes, where the file has them

    def __init__(self, config: Config, runner: Runner, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.runner, self.device, self.dtype = config, runner, device, dtype
        self.micro_batch = micro_batch(device, config.num_patches, config.embed_dim)

    @property
    def precision(self) -> str:
        """What it computes in: a dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    # What `verify` and result files ask of it.

    @abstractmethod
    def own_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor it runs with, by name."""

    @abstractmethod
    def tensors(self, graph: Graph) -> dict[str, torch.Tensor]:
        """Those it would run with, were it made from that graph."""

    @abstractmethod
    def node_values(
        self, nodes: Sequence[Node], images: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> list[tuple[Node, torch.Tensor]]:
        """What it has at every node of its graph, kept sets given (none: it is dense)."""

    @abstractmethod
    def digest(self, source: Source) -> Iterator[bytes]:
        """All that tells its weights, as read from `source`, from others."""

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
        """Classify images.

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
            MemoryError: a GPU has no memory for even one image.
        """
        check_images(images, self.config)
        stages = None if kept is None else check_kept(kept, self.config, len(images), self.device)
        logits, chosen = [], []
        start = 0
        while start < len(images):
            part = slice(start, start + self.micro_batch)
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
        """After a GPU had too little memory for so many images at a time: halve that, from now on.

        Raises:
            MemoryError: there is nothing to halve.
        """
        self.runner.release()
        if images == 1:
            free = free_memory(self.device) or 0
            height, width = self.config.image_size
            raise MemoryError(
                f"images: not one image of {height}x{width} fits in what is free on {self.device}, "
                f"{free / 2**20:.0f} MiB; other programs may hold the rest"
            )
        self.micro_batch = (images + 1) // 2


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
