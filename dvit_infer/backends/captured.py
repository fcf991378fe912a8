"""CUDA graphs: a forward captured once for each size of batch, replayed as one launch.

A graph works in memory of its own: images are copied in, or in large batches their tokens made there, and answers are
copied out. So that few graphs serve all batches, a batch
is padded up to the next of `BUCKETS`; images do not feel each other, and what the padding holds is not returned.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from dvit_infer.backends.torch import Hook, TorchRunner
from dvit_infer.ops.choices import choices_for, runs_triton

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # at most a third of a batch is padding
MAX_GRAPHS = 2 * len(BUCKETS)  # kept at a time, enough for float and uint8; the one not used for longest goes first

Answers = tuple[torch.Tensor, list[torch.Tensor]]


class Forward(Protocol):
    """A forward for up to a bucket of images, in memory of its own."""

    buffer_bytes: int

    def __call__(self, images: torch.Tensor, return_kept: bool) -> Answers: ...


# CUDA captures one graph at a time in a process, and nothing may synchronise the device meanwhile.
_CAPTURING = threading.Lock()


class _Shared:
    """What captured forwards of one runner share, as one at a time runs and its answers are copied out before the next.

    Attributes:
        stream, beside: where they are captured, and the second of two branches.
        warm: where they run before that. Not where they are captured: a workspace that a library keeps for a stream
            could be given to others once the library lets go of it; made in the capture it is the graph's.
        pool: memory of whatever is neither images nor answers.
        free: recorded when that memory may be written again.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.beside: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.warm: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.free: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()


class CapturedForward:
    """One CUDA graph of a runner's forward.

    Args:
        runner: what runs when it is captured.
        batch: images a replay.
        dtype: of the images it takes.
        shared: what the captured forwards of a runner share.
    """

    def __init__(self, runner: TorchRunner, batch: int, dtype: torch.dtype, shared: "_Shared") -> None:
        torch.cuda.empty_cache()  # as the capture does: what is reserved after it is then comparable
        reserved = torch.cuda.memory_reserved(runner.device)
        apart = runner.embeds_apart_from
        self._runner = runner if apart is not None and batch >= apart else None  # what embeds before each replay
        shape = (batch, 3, *runner.config.image_size) if self._runner is None else (batch, *runner.nodes[0].out_shape)
        dtype_in = dtype if self._runner is None else runner.dtype
        self._input = torch.zeros(shape, dtype=dtype_in, device=runner.device)
        self._shared, self._graph, warm = shared, torch.cuda.CUDAGraph(), shared.warm
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            # Kernels are compiled and libraries set up, and a GPU with too little memory says so.
            with _programmatic(runner.device):
                for size in {batch, *self._branches(runner.device, batch)}:
                    runner.check(size, dtype)
            self._run(runner, batch, warm, warm)
        warm.synchronize()
        with torch.cuda.graph(self._graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local"):
            self._logits, self._chosen = self._run(runner, batch, shared.stream, shared.beside)
        self.buffer_bytes = max(0, torch.cuda.memory_reserved(runner.device) - reserved)

    @staticmethod
    def _branches(device: torch.device, batch: int) -> tuple[int, ...]:
        """Images of two halves that are to run side by side; none where they are not."""
        first = choices_for(device).two_branches_from
        return () if first is None or batch < max(2, first) else (batch // 2, batch - batch // 2)

    def _run(self, runner: TorchRunner, batch: int, stream: torch.cuda.Stream, beside: torch.cuda.Stream) -> Answers:
        forward = runner if self._runner is None else runner.from_tokens
        with _programmatic(runner.device):
            if not self._branches(runner.device, batch):
                return forward(self._input)
            # Two halves side by side: where one has too few tiles left for all multiprocessors, the other fills them.
            beside.wait_stream(stream)
            try:
                with torch.cuda.stream(beside):
                    logits, chosen = forward(self._input[batch // 2 :])
                first_logits, first_chosen = forward(self._input[: batch // 2])
            finally:  # also when memory runs out: a capture has to be joined to be ended
                stream.wait_stream(beside)
            stages = zip(first_chosen, chosen, strict=True)
            return torch.cat([first_logits, logits]), [torch.cat(stage) for stage in stages]

    def __call__(self, images: torch.Tensor, return_kept: bool) -> Answers:
        """Answers for the images, on the current stream. One thread at a time."""
        stream, count = torch.cuda.current_stream(), len(images)
        stream.wait_event(self._shared.free)  # an earlier call may have been on another stream
        if self._runner is None:
            self._input[:count].copy_(images)
        else:
            self._runner.embed_into(images, self._input[:count])
        self._graph.replay()
        logits = self._logits[:count].clone()
        chosen = [stage[:count].clone() for stage in self._chosen] if return_kept else []
        self._shared.free.record(stream)
        return logits, chosen


@contextlib.contextmanager
def _programmatic(device: torch.device) -> Iterator[None]:
    if not runs_triton(device) or not choices_for(device).programmatic:
        yield
        return
    from dvit_kernels.launch import programmatic_launches

    with programmatic_launches(torch.cuda.get_device_capability(device) >= (9, 0)):
        yield


class CapturedRunner:
    """Runs a graph as another runner does, by captured forwards where the call is a plain one.

    Safe to call from several threads and streams: replays take turns, each on its caller's stream. While the first call
    of a size captures, other threads must not synchronise the device, which CUDA forbids.

    Args:
        runner: what is captured; it runs calls with given sets or a hook itself, and calls that are being captured by
            the caller.
        capture: makes a forward for a batch size and a dtype of images.
    """

    def __init__(self, runner: TorchRunner, capture: Callable[[int, torch.dtype], Forward] | None = None) -> None:
        self.runner = runner
        self._capture = capture or self._captured
        self._forwards: OrderedDict[tuple[int, torch.dtype], Forward] = OrderedDict()
        self._lock = threading.Lock()
        self._shared: _Shared | None = None

    def __reduce__(self) -> tuple[type["CapturedRunner"], tuple[TorchRunner]]:
        return CapturedRunner, (self.runner,)

    @property
    def runtime(self) -> str:
        return f"{self.runner.runtime}, in CUDA graphs"

    @property
    def buffer_bytes(self) -> int:
        """What it holds beside the graph's weights, in bytes: the buffers of the forwards so far."""
        with self._lock:
            return self.runner.buffer_bytes + sum(forward.buffer_bytes for forward in self._forwards.values())

    @torch.no_grad()
    def __call__(
        self,
        images: torch.Tensor,
        kept: Sequence[torch.Tensor] | None = None,
        hook: Hook | None = None,
        return_kept: bool = True,
    ) -> Answers:
        """As `TorchRunner`; images are at most `BUCKETS[-1]`."""
        on_gpu = self.runner.device.type == "cuda"
        with torch.cuda.device(self.runner.device if on_gpu else -1):
            if kept is not None or hook is not None or (on_gpu and torch.cuda.is_current_stream_capturing()):
                return self.runner(images, kept, hook)
            return self._by_graph(images, return_kept)

    def _by_graph(self, images: torch.Tensor, return_kept: bool) -> Answers:
        if images.dtype == torch.uint8 and not self.runner.takes_uint8:
            images = self.runner.prepare(images)
        dtype = torch.uint8 if images.dtype == torch.uint8 else self.runner.dtype  # copying in converts the others
        bucket = next(size for size in BUCKETS if size >= len(images))
        with self._lock:
            return self._forward(bucket, dtype)(images, return_kept)

    def _forward(self, batch: int, dtype: torch.dtype) -> Forward:
        key = batch, dtype
        if key not in self._forwards:
            # A caller's inference mode must not mark what outlives its call.
            with _CAPTURING, torch.inference_mode(False), torch.no_grad():
                while len(self._forwards) >= MAX_GRAPHS:
                    self._drop(next(iter(self._forwards)))
                self._forwards[key] = self._capture(batch, dtype)
        self._forwards.move_to_end(key)
        return self._forwards[key]

    def _captured(self, batch: int, dtype: torch.dtype) -> Forward:
        if self._shared is None or not self._forwards:  # a pool does not outlive its last graph
            self._shared = _Shared(self.runner.device)
        return CapturedForward(self.runner, batch, dtype, self._shared)

    def _drop(self, key: tuple[int, torch.dtype]) -> None:
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)  # it may be running
        del self._forwards[key]

    def release(self) -> None:
        """Give back the memory of all captured forwards; the next call captures anew."""
        with self._lock, _CAPTURING:
            for key in list(self._forwards):
                self._drop(key)
            if self.runner.device.type == "cuda":
                torch.cuda.empty_cache()
