"""The base class of all models that classify images: input checks, micro-batches, kept sets."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, get_args, overload

import torch
from torch.nn import functional as F

from dvit_infer.backends.state import Hook, State
from dvit_infer.config import Config
from dvit_infer.errors import InputError
from dvit_infer.graph import Graph, Node
from dvit_infer.graph.heads import Wanted
from dvit_infer.images.tensors import check_images
from dvit_infer.models.checkpoint import Source
from dvit_infer.reduction.given import check_kept
from dvit_infer.utils.devices import free_memory, is_out_of_memory, micro_batch

Fill = Literal["last", "zeros"]


class Runner(Protocol):
    """Runs a model on one batch that fits in memory (`backends.torch.TorchRunner.run`)."""

    @property
    def runtime(self) -> str: ...

    @property
    def buffer_bytes(self) -> int: ...

    def run(
        self,
        images: torch.Tensor,
        given: Sequence[torch.Tensor] | None = None,
        hook: Hook | None = None,
        return_choices: bool = True,
        output: Wanted = "logits",
    ) -> State: ...

    def release(self) -> None: ...

    def plain(self) -> "Runner":
        """Return a runner of the same whose `run` takes a hook."""


class Output(NamedTuple):
    """The outputs for some images.

    Attributes:
        logits: (B, K) float32.
        choices: for each stage the original positions of the patches that were kept, (B, k) int64, ascending; or the
            groups that were merged, (B, N) int64, as a call returns them.
    """

    logits: torch.Tensor
    choices: list[torch.Tensor]


class Classifier(ABC):
    """A model that classifies images and can return the patches that it kept.

    Attributes:
        config: the description of the model (frozen).
        runner: runs one micro-batch.
        device, dtype: the device it runs on and the dtype it runs in.
        micro_batch: the most images that run together; larger batches are split.
    """

    only_uint8 = False  # whether it accepts uint8 images only
    labels: Mapping[int, str] | None = None  # class names, if present in the file

    def __init__(self, config: Config, runner: Runner, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.runner, self.device, self.dtype = config, runner, device, dtype
        self.micro_batch = micro_batch(device, config.num_patches, config.body.embed_dim)

    @property
    def precision(self) -> str:
        """The name of the dtype it computes in."""
        return str(self.dtype).removeprefix("torch.")

    @abstractmethod
    def digest(self, source: Source | None = None) -> Iterator[bytes | memoryview]:
        """Yield bytes that identify its weights as read from `source`; None: from what it was made of."""

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
            kept: for each stage what to do instead of the model's own choice, in the form that is returned. The
                positions of a stage must be a subset of those of the stage before, unless all stay; its groups must
                contain those of the stage before.

        Returns:
            Logits (B, K) float32 on the engine's device; with `return_kept` also the kept positions, one (B, k) int64
            tensor per stage, in the original grid, row-major, ascending; of DynamicSwin and DynamicConvNeXt the
            positions of the third stage's map that take the MLPs. N + j stands for the token into which stage j fused
            the others ('evit'). A model that merges tokens ('tome') returns groups, one (B, N) tensor per stage,
            which has for every original patch the lowest one of the group that then holds it.

        Raises:
            ValueError: images or kept have an invalid rank, size, dtype or content.
            MemoryError: the GPU has no memory for even one image.
        """
        out = self._in_parts(images, kept, return_kept, "logits")
        return (out.x, out.choices) if return_kept else out.x

    @torch.no_grad()
    def run(self, images: torch.Tensor, given: Sequence[torch.Tensor] | None = None) -> Output:
        """Return logits and choices; arguments and errors are as for a call, `given` as its `kept`."""
        return Output(*self(images, return_kept=True, kept=given))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the classifier reads, (B, D) float32: the last norm's output for the class token.

        With a distillation token, the mean of both tokens, as timm's `forward_head(pre_logits=True)`; without prefix
        tokens, that of the patches. Arguments and errors are as for a call.

        Raises:
            InputError: the model gives logits only.
        """
        return self._in_parts(images, None, False, "features").x

    @torch.no_grad()
    def tokens(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all tokens after the last norm, and where the patches among them were.

        Returns:
            (B, P+k, D) float32 with the prefix tokens in front, and (B, k) int64 original positions of the patch
            tokens, in the same order: ascending, N + j of the token that stage j fused; of merged tokens the lowest of
            each group, in the order in which they are left.

        Raises:
            InputError: the model gives logits only.
        """
        out = self._in_parts(images, None, True, "tokens")
        if out.positions is not None:
            return out.x, out.positions
        rows, columns = self.config.body.last_grid(self.config.image_size)
        return out.x, torch.arange(rows * columns, device=out.x.device).repeat(len(out.x), 1)

    @torch.no_grad()
    def feature_map(self, images: torch.Tensor, fill: Fill = "last") -> torch.Tensor:
        """Return the patch tokens after the last norm at their places, for detection and segmentation heads.

        A merged patch has its group's token. Like `features` and `tokens` it is not captured in CUDA graphs.

        Args:
            images: as for a call.
            fill: what a dropped patch has: 'last', its token when it was dropped, through the last norm too, where one
                is applied to all tokens; or 'zeros'. A patch whose token was fused into another counts as dropped.

        Returns:
            (B, D, h, w) float32, in the memory format channels_last; of models of four stages the last map.

        Raises:
            InputError: `fill` is another, or the model gives logits only.
            ValueError, MemoryError: as for a call.
        """
        if not isinstance(fill, str) or fill not in get_args(Fill):
            raise InputError(f"fill: {str(fill)[:40]!r} is not one of {', '.join(get_args(Fill))}")
        stay = self.config.body.routes
        out = self._in_parts(images, None, True, "tokens" if stay else "feature_map")
        if fill == "zeros" and not stay and out.choices and not self.config.reduction.merges:
            held = torch.zeros(out.x.shape[:2], dtype=torch.bool, device=out.x.device)
            held = F.pad(held, (0, len(out.choices))).scatter_(1, out.choices[-1], True)  # fused tokens are behind
            out.x.masked_fill_(~held[:, : out.x.shape[1], None], 0.0)
        return out.x.view(len(out.x), *self.config.body.last_grid(self.config.image_size), -1).permute(0, 3, 1, 2)

    def warm_up(self, batches: Iterable[int] = (1,), *, uint8: bool = False) -> None:
        """Run batches of these sizes, so that kernels are compiled and forwards captured before images arrive.

        Args:
            batches: numbers of images.
            uint8: for uint8 images; else for floating-point ones.

        Raises:
            ValueError: a number is not a positive integer.
        """
        dtype = torch.uint8 if uint8 or self.only_uint8 else self.dtype
        for batch in batches:
            if not isinstance(batch, int) or batch < 1:
                raise ValueError(f"batches: {batch!r} is not a positive number of images")
            self(torch.zeros(1, 3, *self.config.image_size, dtype=dtype).expand(batch, -1, -1, -1))

    def _in_parts(
        self, images: torch.Tensor, kept: Sequence[torch.Tensor] | None, return_choices: bool, output: Wanted
    ) -> State:
        """Check the arguments of a call, run micro-batches, and return their x and choices together."""
        check_images(images, self.config)
        stages = None if kept is None else check_kept(kept, self.config.reduction, len(images), self.device)
        done: list[State] = []
        start = 0
        while start < len(images):
            part = slice(start, start + self.micro_batch)
            given = None if stages is None else [stage[part] for stage in stages]
            try:
                out = self.runner.run(images[part], given, None, return_choices, output)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                out = None  # memory of the failed call is freed only once its traceback is gone
            if out is None:
                self._take_less(len(images[part]))
                continue
            start += len(out.x)
            done.append(out)
        choices = zip(*(out.choices for out in done), strict=True)
        positions = [out.positions for out in done if out.positions is not None]
        return State(
            torch.cat([out.x for out in done]),
            torch.cat(positions) if positions else None,
            choices=[torch.cat(stage) for stage in choices],
        )

    def _take_less(self, images: int) -> None:
        """Halve the micro-batch for this and all later calls, after the GPU ran out of memory.

        Raises:
            MemoryError: the micro-batch was a single image.
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


class Verifiable(Classifier):
    """A classifier that `verify` can compare with its reference: its weights and the values inside it can be read.

    Attributes:
        fan_in_dim: the dimension of its matrices over which an output channel's weights, and int8's scale, run.
    """

    fan_in_dim = 0

    @abstractmethod
    def own_tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor it runs with, by name."""

    @abstractmethod
    def tensors(self, graph: Graph) -> dict[str, torch.Tensor]:
        """Return the tensors it would run with if it were built from `graph`."""

    @abstractmethod
    def node_values(
        self, nodes: Sequence[Node], images: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> list[tuple[Node, torch.Tensor]]:
        """Return the output of every node, computed with the given kept sets (none: the model is dense)."""
