"""Decode images in worker processes, in order, with bounded read-ahead."""

import contextlib
import ctypes
import itertools
import math
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from queue import Queue
from typing import NoReturn, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dvit_infer.errors import InputError
from dvit_infer.images.decoded import Decoded as Decoded
from dvit_infer.images.decoded import decoded
from dvit_infer.images.entry import Entry as Entry
from dvit_infer.images.preprocess import Preprocess
from dvit_infer.utils.bounds import check_bound
from dvit_infer.utils.memory import check_batch_fits, is_allocation_failure
from dvit_infer.utils.threads import allowed_threads

Group = TypeVar("Group")
AT_ONCE = 8  # images sent to a worker together; small, so that few images keep all workers busy
MOST_WORKERS = 64  # each uses some of the 1,024 files that a process may usually open
_PR_SET_PDEATHSIG = 1  # of prctl(2)
# Forked workers start at once and need no main module that can be imported again; other systems spawn theirs.
START_METHOD = "fork" if sys.platform == "linux" else "spawn"
AHEAD = 4  # groups of AT_ONCE per worker that are read ahead at least


class _Dataset(Dataset[Decoded]):
    """What workers run. It returns NumPy arrays, because tensors would use scarce shared memory."""

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess

    def __getitem__(self, entry: Entry) -> Decoded:
        return decoded(entry, self.preprocess)


def worker_count(workers: int | None) -> int:
    """Return the number of workers; by default one less than the processors that this process may use, at most 8.

    Raises:
        InputError: It is negative or too large.
    """
    if workers is None:
        return min(8, allowed_threads() - 1)
    if not 0 <= workers <= MOST_WORKERS:
        raise InputError(f"workers: {workers} worker processes cannot be started; 0 to {MOST_WORKERS} can")
    return workers


def decode(
    entries: Iterable[Entry], preprocess: Preprocess, workers: int | None = None, batch: int = 1
) -> Iterator[Decoded]:
    """Read images in worker processes; yield the results in the order of the entries.

    The larger of `batch` and `AT_ONCE` * `AHEAD` per worker, in whole groups, are read ahead.

    Args:
        workers: number of workers (`worker_count`); 0: this process decodes.
        batch: images that the caller takes at a time: so many are decoded while a model runs the ones before.

    Raises:
        InputError: The number of workers is out of range.
        RuntimeError: A worker was killed; `running` turns this into an InputError.
    """
    workers = worker_count(workers)
    chunks = _chunks(entries)
    first = list(itertools.islice(chunks, 1))  # finding it may take a while, and Ctrl-C must work meanwhile
    with interrupts_held(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than processors: as asked
        loader = DataLoader(
            _Dataset(preprocess),
            batch_sampler=itertools.chain(first, chunks),
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=first_in_worker(),
            prefetch_factor=max(AHEAD, math.ceil(batch / (AT_ONCE * workers))) if workers else None,
            generator=torch.Generator(),  # otherwise it would draw from the process's generator
            multiprocessing_context=START_METHOD if workers else None,
        )
        results = iter(loader)
    for group in results:
        yield from group


def _chunks(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    source = iter(entries)
    while chunk := list(itertools.islice(source, AT_ONCE)):
        yield chunk


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Block signals, so that workers started in this block never receive them; this process ends its workers.

    Ctrl-C reaches every process of a terminal, and SIGTERM of a batch system every process of a job. Windows cannot
    block signals; there, `first_in_worker` lets workers ignore Ctrl-C.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def first_in_worker() -> Callable[[int], None] | None:
    """Return a worker initialiser: it asks the kernel to kill the worker when this process is killed.

    Otherwise a worker that waits to hand over its images would wait forever. Linux binds this to the thread that
    forked, so it is used only in the main thread, which lives as long as the process. Other systems have no such call.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return _ignore_interrupts
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    return lambda worker: ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _ignore_interrupts(worker: int) -> None:  # a function of the module: workers of Windows are sent its name
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(images: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    """Yield batches of `size`; the last may be shorter. Unreadable images are included."""
    source = iter(images)
    while batch := list(itertools.islice(source, size)):
        yield batch


def fetched(groups: Iterator[Group]) -> Iterator[Group]:
    """Yield the same; while the caller works, a thread receives the next one from the workers.

    The first is received by the caller's thread, as that starts the workers (`first_in_worker`). Nobody waits for the
    thread in the end: of a worker that is killed while it sends, it would wait for the rest forever.
    """
    received = list(itertools.islice(groups, 1))
    while received:
        later: Queue[Callable[[], list[Group]]] = Queue()
        threading.Thread(target=_receive, args=(groups, later), daemon=True).start()
        yield received[0]
        received = later.get()()


def _receive(groups: Iterator[Group], later: "Queue[Callable[[], list[Group]]]") -> None:
    """Put what returns the next group, or raises the error that came instead."""
    try:
        received = list(itertools.islice(groups, 1))
        later.put(lambda: received)
    except BaseException as error:  # raised again in the caller's thread
        later.put(partial(_raise, error))


def _raise(error: BaseException) -> NoReturn:
    raise error


def pixels(batch: Sequence[Decoded]) -> torch.Tensor | None:
    """Return the readable images as (B, 3, H, W) uint8; None if there are none."""
    readable = [image.pixels for image in batch if image.pixels is not None]
    return torch.from_numpy(np.stack(readable)) if readable else None


def batch_size(batch: int | None, device: torch.device) -> int:
    """Return the batch size; by default 256 on CUDA, 16 on a CPU.

    Raises:
        InputError: It is not positive or too large.
    """
    if batch is None:
        return 256 if device.type == "cuda" else 16
    check_bound("batch", batch, 1 << 24)
    if batch < 1:
        raise InputError(f"batch: {batch} images at a time cannot be run; 1 or more can")
    return batch


def check_fits(batch: int, image_size: tuple[int, int]) -> None:
    """Raise InputError if a batch, as bytes and normalised, would not fit in main memory."""
    check_batch_fits(batch, batch * 3 * math.prod(image_size) * (2 + 2 * 4))


@contextlib.contextmanager
def running(batch: int) -> Iterator[None]:
    """Turn out-of-memory errors and killed workers in the block into InputErrors that name a remedy.

    Raises:
        InputError: A batch does not fit in memory, or a worker process was killed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker (pid" in str(error):
            raise InputError("workers: a worker process was killed, perhaps out of memory; try fewer") from None
        if not is_allocation_failure(error):
            raise
        raise InputError(f"batch: {batch} images do not fit in memory; use a smaller batch") from None
