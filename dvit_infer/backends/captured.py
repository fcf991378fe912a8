"""CUDA graphs: a forward is captured once per batch size and replayed as one launch.

A graph has its own memory: images are copied in (in large batches, their tokens are written there), and outputs are
copied out. So that few graphs serve all batch sizes, a batch is padded to the next of `BUCKETS`; images do not affect
each other, and outputs of the padding are not returned.
"""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from dvit_infer.backends.state import Hook, State, follow
from dvit_infer.backends.torch import TorchRunner
from dvit_infer.graph.heads import Wanted, nodes_for
from dvit_infer.graph.reductions import Reduce
from dvit_infer.ops.choices import choices_for, runs_triton

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # at most a third of a batch is padding
MAX_GRAPHS = 2 * len(BUCKETS)  # kept at a time, enough for float and uint8; the least recently used is dropped first


class Forward(Protocol):
    """A forward for at most a bucket of images, with its own memory."""

    buffer_bytes: int

    def __call__(self, images: torch.Tensor, return_choices: bool) -> State: ...


# CUDA captures one graph at a time in a process, and nothing may synchronise the device meanwhile.
_CAPTURING = threading.Lock()


class _Shared:
    """State shared by the captured forwards of a runner, which run one at a time and whose outputs are copied out.

    Attributes:
        stream, beside: the streams of the capture and of the second of two branches.
        warm: the stream of the run before the capture. It must be another: a library workspace kept for the capture's
            stream could be reused by others once the library frees it; made in the capture, it belongs to the graph.
        pool: the memory for everything but images and outputs.
        free: an event recorded when that memory may be written again.
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
        runner: runs the forward that is captured.
        batch: the number of images per replay.
        dtype: the dtype of its images.
        shared: the state that the captured forwards of a runner share.
    """

    def __init__(self, runner: TorchRunner, batch: int, dtype: torch.dtype, shared: "_Shared") -> None:
        torch.cuda.empty_cache()  # as the capture does, so that reserved memory can be compared before and after
        reserved = torch.cuda.memory_reserved(runner.device)
        apart = runner.embeds_apart_from
        self._embeds_apart = apart is not None and batch >= apart
        if self._embeds_apart:
            self._input = torch.zeros(batch, *runner.nodes[0].out_shape, dtype=runner.dtype, device=runner.device)
        else:
            self._input = torch.zeros(batch, 3, *runner.config.image_size, dtype=dtype, device=runner.device)
        self._runner, self._shared, self._graph, warm = runner, shared, torch.cuda.CUDAGraph(), shared.warm
        first = choices_for(runner.device).two_branches_from
        in_two = first is not None and batch >= max(2, first)
        sizes = [batch // 2, batch - batch // 2] if in_two else [batch]
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm), _programmatic(runner.device):
            # Compiles kernels and initialises libraries; a GPU with too little memory fails here.
            for size in {batch, *sizes}:
                runner.check(size, dtype)
            self._forward(sizes, warm, warm)
        warm.synchronize()
        with (
            torch.cuda.graph(self._graph, pool=shared.pool, stream=shared.stream, capture_error_mode="thread_local"),
            _programmatic(runner.device),
        ):
            self._output = self._forward(sizes, shared.stream, shared.beside)
        self.buffer_bytes = max(0, torch.cuda.memory_reserved(runner.device) - reserved)

    def _forward(self, sizes: list[int], stream: torch.cuda.Stream, beside: torch.cuda.Stream) -> State:
        """Run the input, or two halves of it side by side: where one leaves multiprocessors idle, the other fills."""
        nodes, _ = nodes_for(self._runner.nodes[int(self._embeds_apart) :], "logits", choices=False)
        run = self._runner.run_nodes
        follows = self._runner.has_places
        if len(sizes) == 1:
            return run(State(self._input, follows=follows), nodes)
        head, tail = self._input[: sizes[0]], self._input[sizes[0] :]
        beside.wait_stream(stream)
        try:
            with torch.cuda.stream(beside):
                second = run(State(tail, follows=follows), nodes)
            first = run(State(head, follows=follows), nodes)
        finally:  # also when memory runs out: branches must be joined before a capture can end
            stream.wait_stream(beside)
        decided = [
            (node, torch.cat([one, other]))
            for (node, one), (_, other) in zip(first.decided, second.decided, strict=True)
        ]
        return State(torch.cat([first.x, second.x]), decided=decided)

    def __call__(self, images: torch.Tensor, return_choices: bool) -> State:
        """Return the outputs for the images, on the current stream. Only one thread at a time may call this."""
        stream, count = torch.cuda.current_stream(), len(images)
        stream.wait_event(self._shared.free)  # an earlier call may have been on another stream
        if self._embeds_apart:
            self._runner.embed_into(images, self._input[:count])
        else:
            self._input[:count].copy_(images)
        self._graph.replay()
        logits = self._output.x[:count].clone()
        wanted = self._output.decided if return_choices else []
        decided = [(node, choice[:count].clone()) for node, choice in wanted]
        self._shared.free.record(stream)
        return follow(logits, decided)


@contextlib.contextmanager
def _programmatic(device: torch.device) -> Iterator[None]:
    if not runs_triton(device) or not choices_for(device).programmatic:
        yield
        return
    from dvit_kernels.launch import programmatic_launches

    with programmatic_launches(torch.cuda.get_device_capability(device) >= (9, 0)):
        yield


class CapturedRunner:
    """Runs a graph like another runner, with captured forwards for plain calls.

    Safe to call from several threads and streams: replays take turns, each on its caller's stream. While the first call
    of a size captures, other threads must not synchronise the device, which CUDA forbids.

    Args:
        runner: the runner whose forwards are captured. It directly runs calls with given kept sets or a hook, and calls
            inside a capture of the caller.
        capture: returns a forward for a batch size and a dtype of images.
    """

    def __init__(self, runner: TorchRunner, capture: Callable[[int, torch.dtype], Forward] | None = None) -> None:
        self.runner = runner
        self._capture = capture
        self._forwards: OrderedDict[tuple[int, torch.dtype], Forward] = OrderedDict()
        self._lock = threading.Lock()
        self._shared: _Shared | None = None
        # Captured forwards leave out a choice that nothing but the caller reads, which then runs directly.
        self._leaves_out = any(isinstance(node, Reduce) and node.rows is not None for node in runner.nodes)

    def __reduce__(self) -> tuple[type["CapturedRunner"], tuple[TorchRunner]]:
        return CapturedRunner, (self.runner,)

    def plain(self) -> "CapturedRunner":
        """Return a runner whose `run` takes a hook: itself."""
        return self

    @property
    def runtime(self) -> str:
        return f"{self.runner.runtime}, in CUDA graphs"

    @property
    def buffer_bytes(self) -> int:
        """Bytes held beside the graph's weights: the buffers of the captured forwards."""
        with self._lock:
            return self.runner.buffer_bytes + sum(forward.buffer_bytes for forward in self._forwards.values())

    @torch.no_grad()
    def run(
        self,
        images: torch.Tensor,
        given: Sequence[torch.Tensor] | None = None,
        hook: Hook | None = None,
        return_choices: bool = True,
        output: Wanted = "logits",
    ) -> State:
        """Run the graph, as `TorchRunner.run`; at most `BUCKETS[-1]` images. Choices are returned if wanted."""
        on_gpu = self.runner.device.type == "cuda"
        with torch.cuda.device(self.runner.device if on_gpu else -1):
            complete = not (return_choices and self._leaves_out)
            plain = given is None and hook is None and output == "logits" and complete
            if not plain or (on_gpu and torch.cuda.is_current_stream_capturing()):
                return self.runner.run(images, given, hook, return_choices, output)
            if images.dtype == torch.uint8 and not self.runner.takes_uint8:
                images = self.runner.prepare(images)
            dtype = torch.uint8 if images.dtype == torch.uint8 else self.runner.dtype  # copying converts other dtypes
            key = next(size for size in BUCKETS if size >= len(images)), dtype
            with self._lock:
                if key not in self._forwards:
                    # Tensors that outlive this call must not be created in the caller's inference mode.
                    with _CAPTURING, torch.inference_mode(False), torch.no_grad():
                        while len(self._forwards) >= MAX_GRAPHS:
                            self._drop(next(iter(self._forwards)))
                        if self._capture is None:
                            self._forwards[key] = CapturedForward(self.runner, *key, self._memory())
                        else:
                            self._forwards[key] = self._capture(*key)
                self._forwards.move_to_end(key)
                return self._forwards[key](images, return_choices)

    def _memory(self) -> _Shared:
        if self._shared is None or not self._forwards:  # a pool is freed with its last graph
            self._shared = _Shared(self.runner.device)
        return self._shared

    def _drop(self, key: tuple[int, torch.dtype]) -> None:
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)  # it may be running
        del self._forwards[key]

    def release(self) -> None:
        """Give back the memory of all captured forwards; the next call captures again."""
        with self._lock, _CAPTURING:
            for key in list(self._forwards):
                self._drop(key)
            if self.runner.device.type == "cuda":
                torch.cuda.empty_cache()
