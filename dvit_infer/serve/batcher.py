"""Dynamic batching: images of many requests run together, in the order in which they came, one batch at a time."""

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]


class FullError(Exception):
    """The queue has no room.

    Attributes:
        retry_after_s: about how long the queue needs to be worked off, in whole seconds.
    """

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} images are waiting; retry in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class ExpiredError(Exception):
    """The deadline passed before the images ran."""

    def __init__(self) -> None:
        super().__init__("the deadline passed before the images ran")


class Meter(Protocol):
    """Is told what a batcher does."""

    def queued(self, images: int) -> None:
        """Take the number of images that are waiting now."""

    def ran(self, images: int, seconds: float) -> None:
        """Take the size of a batch that ran, and its time."""


@dataclass(eq=False)
class Ticket:
    """The place of a request in the queue.

    Attributes:
        count: the number of its images, at most a batch.
        deadline: on the batcher's clock; the images do not run after it.
        images: (count, 3, H, W); None: not there yet.
        since: when they were submitted.
        answer: becomes (count, K), a copy. To cancel it takes the images out, unless they run already.
    """

    count: int
    deadline: float = math.inf
    images: np.ndarray | None = None
    since: float = 0.0
    answer: "Future[np.ndarray]" = field(default_factory=Future)


class Batcher:
    """Collects images until a batch is full, or the first of them has waited for the longest delay; then runs them.

    A thread of its own runs the batches. While one runs, requests collect for the next. Images of two dtypes never run
    together. The policy is in `due` and `take`, which are called with the time.

    Args:
        run: takes (B, 3, H, W), B <= max_batch, and returns (B, K); called by the batcher's thread alone.
        max_batch: the most images in a request.
        full: the images of a full batch, at most `max_batch`; a request with more is a batch of its own.
        max_delay_s: the longest that the first image waits for others while nothing runs.
        max_queue: the most images that may have a place and not be running.
        meter: is told of queue and batches.
        clock: seconds.
    """

    def __init__(
        self,
        run: Run,
        max_batch: int,
        full: int,
        max_delay_s: float,
        max_queue: int,
        meter: Meter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_batch, self.clock = max_batch, clock
        self._run, self._full, self._max_delay_s, self._max_queue = run, full, max_delay_s, max_queue
        self._meter = meter
        self._queue: deque[Ticket] = deque()
        self._waiting = 0  # images that have a place
        self._seconds = 0.0  # for an image of the last batch
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread()

    def start(self, first: Callable[[], None] = lambda: None) -> None:
        """Start the thread; return when `first`, which runs in it, has: runtimes keep buffers for each thread.

        Raises:
            Exception: what `first` raised.
        """
        warm: Future[None] = Future()

        def work() -> None:
            try:
                first()
            except BaseException as error:  # raised again where `start` waits
                warm.set_exception(error)
                return
            warm.set_result(None)
            self._work()

        self._thread = threading.Thread(target=work, name="batcher", daemon=True)
        self._thread.start()
        warm.result()

    def hurry(self) -> None:
        """Let no image wait for others any more."""
        with self._changed:
            self._max_delay_s = 0.0
            self._changed.notify()

    def close(self) -> None:
        """Run what waits, and end the thread. Nothing may be submitted any more."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    @contextlib.contextmanager
    def place(self, count: int, deadline: float = math.inf) -> Iterator[Ticket]:
        """Hold a place in the queue for `count` images, which are to be decoded and submitted in the block.

        Images that still wait when the block ends, because the client has gone, say, never run.

        Raises:
            FullError: The queue has no room.
            ValueError: There are more images than fit in a batch.
        """
        if not 1 <= count <= self.max_batch:
            raise ValueError(f"{count} images; 1 to {self.max_batch} are expected")
        with self._changed:
            self._drop(self.clock())
            if self._waiting + count > self._max_queue:
                raise FullError(self._waiting, max(1, math.ceil(self._waiting * self._seconds)))
            self._count(count)
        ticket = Ticket(count, deadline)
        try:
            yield ticket
        finally:
            ticket.answer.cancel()
            with self._changed:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                    self._count(-count)
                elif ticket.images is None:
                    self._count(-count)

    def submit(self, ticket: Ticket, images: np.ndarray) -> "Future[np.ndarray]":
        """Put the images (count, 3, H, W) of a place in the queue, and return its answer."""
        with self._changed:
            ticket.images, ticket.since = images, self.clock()
            self._queue.append(ticket)
            self._changed.notify()
        return ticket.answer

    def due(self, now: float) -> float | None:
        """Return in how many seconds a batch is to run, 0 for at once; None if nothing waits."""
        self._drop(now)
        if not self._queue:
            return None
        head = self._queue[0]
        if self._closing or sum(ticket.count for ticket in self._alike(head)) >= self._full:
            return 0.0
        return max(0.0, head.since + self._max_delay_s - now)

    def take(self, now: float) -> list[Ticket]:
        """Remove the next batch from the queue: the first ticket, and those of its dtype that fit with it, in order.

        None of them can be cancelled any more.
        """
        self._drop(now)
        batch: list[Ticket] = []
        if self._queue:
            room = self._full
            for ticket in self._alike(self._queue[0]):
                if ticket.count > room and batch:
                    break
                room -= ticket.count
                batch.append(ticket)
        for ticket in batch:
            self._queue.remove(ticket)
        self._count(-sum(ticket.count for ticket in batch))
        return [ticket for ticket in batch if ticket.answer.set_running_or_notify_cancel()]

    def _alike(self, head: Ticket) -> list[Ticket]:
        return [ticket for ticket in self._queue if _dtype(ticket) == _dtype(head)]

    def _drop(self, now: float) -> None:
        """Remove tickets whose deadline has passed."""
        late = [ticket for ticket in self._queue if ticket.deadline <= now]
        for ticket in late:
            self._queue.remove(ticket)
            if ticket.answer.set_running_or_notify_cancel():
                ticket.answer.set_exception(ExpiredError())
        self._count(-sum(ticket.count for ticket in late))

    def _count(self, images: int) -> None:
        self._waiting += images
        if images:
            self._meter.queued(self._waiting)

    def _work(self) -> None:
        while batch := self._next():
            self._answer(batch)

    def _next(self) -> list[Ticket]:
        """Wait for a batch; return none if the batcher was closed and everything has run."""
        with self._changed:
            while True:
                wait = self.due(self.clock())
                if wait == 0 and (batch := self.take(self.clock())):
                    return batch
                if wait is None and self._closing:
                    return []
                if wait != 0:
                    self._changed.wait(wait)

    def _answer(self, batch: Sequence[Ticket]) -> None:
        start = self.clock()
        count = sum(ticket.count for ticket in batch)
        try:
            answers = self._run(np.concatenate([ticket.images for ticket in batch if ticket.images is not None]))
        except Exception as error:  # whoever waits for an answer gets it; the thread lives on
            for ticket in batch:
                ticket.answer.set_exception(error)
            return
        seconds = self.clock() - start
        self._seconds = seconds / count
        self._meter.ran(count, seconds)
        at = 0
        for ticket in batch:
            ticket.answer.set_result(answers[at : at + ticket.count].copy())
            at += ticket.count


def _dtype(ticket: Ticket) -> np.dtype | None:
    return None if ticket.images is None else ticket.images.dtype
