"""Time single launches: many in one CUDA graph, each on the next of several buffers."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from dvit_infer.benchmark.timing import interleave

Call = Callable[[], object]
CACHE_BYTES = 120e6  # twice the L2 cache of an H200
REPLAY_US = 1500.0  # target length of one replay, so that its launch overhead is negligible


def copies(bytes_moved: float, device: torch.device) -> int:
    """Return the number of buffers to rotate so that they exceed the cache; at batch 1 some stay in it."""
    return 2 if device.type == "cpu" else max(2, min(48, math.ceil(CACHE_BYTES / max(1.0, bytes_moved))))


def captured(calls: Sequence[Call], times: int) -> Call:
    """Capture a CUDA graph of `times` calls, taken in turn."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [
            call() for call in itertools.islice(itertools.cycle(calls), times)
        ]  # so that no output buffer is reused
    del held
    return graph.replay


def microseconds(
    candidates: Mapping[str, Sequence[Call]], device: torch.device, seconds: float, expected_us: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the median microseconds of every candidate's call, interleaved, and the reasons of those that failed.

    Raises:
        RuntimeError: A candidate left the device unusable.
    """
    times = 1 if device.type == "cpu" else max(4, min(400, round(REPLAY_US / max(expected_us, 1e-3))))
    ready: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for name, calls in candidates.items():
        try:
            ready[name] = captured(calls, times) if device.type == "cuda" else calls[0]
        except Exception as error:  # e.g. a tile is too large, or a backend is missing
            failed[name] = f"{type(error).__name__}: {str(error)[:100]!r}"
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises if the device is unusable
    timings = interleave(ready, device, seconds, warm_up=0.02) if ready else {}
    return {name: timing.rates(1)["p50_ms"] * 1e3 / times for name, timing in timings.items()}, failed
