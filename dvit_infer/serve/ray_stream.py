"""Images through decoding tasks and engines on a cluster, in order; a process or a node that dies loses nothing.

The driver hands out groups of images: first to a task that decodes them, then to the actor that has the least to do.
Results wait until those of all groups before them are there. A group whose process died is handed out again, so that
its results come once. How much is handed out and not yet taken back is bounded.
"""

import heapq
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dvit_infer.errors import InputError
from dvit_infer.evaluate.features import Rates, Rows
from dvit_infer.images.decoded import decoded_elsewhere
from dvit_infer.images.entry import Entry
from dvit_infer.serve.ray_actors import MOST_DEATHS, Actor, Actors, root_of
from dvit_infer.serve.ray_engine import Facts, OnEngine

Out = TypeVar("Out")
AT_ONCE = 64  # images of a group at least, as Ray needs some milliseconds for each
_HELD = 2  # groups that an actor has: one runs, one waits
_WAIT_S = 1.0  # an interrupt waits no longer


@dataclass(eq=False)
class _Group:
    number: int
    entries: Sequence[Entry]
    images: Any = None  # the reference of them, decoded
    deaths: int = 0  # of processes that had it


class EngineStream(Generic[Out]):
    """Gives what engines on a cluster give for images, in order.

    Args:
        make: makes an engine; every actor calls it.
        needs: of each actor (`engines_for`).
        decoders: groups that are decoded at a time.
        decoder_cpus: CPUs that Ray counts for a task that decodes.

    Attributes:
        facts: of the engines, known once one has started.
    """

    facts: Facts

    def __init__(
        self, make: Callable[[], OnEngine[Out]], needs: Sequence[dict[str, int]], decoders: int, decoder_cpus: int
    ) -> None:
        import ray

        self._actors = Actors(make, needs)
        self.decoders, self.engines = decoders, len(needs)
        self._decode = ray.remote(decoded_elsewhere).options(
            num_cpus=decoder_cpus, max_retries=MOST_DEATHS, scheduling_strategy="SPREAD"
        )

    def start(self, waiting: Callable[[], None]) -> None:
        """Wait until an engine has started; `waiting` is called each second.

        Raises:
            InputError: One cannot start.
        """
        while not self._actors.live:
            waiting()
            for started in _finished(self._actors.starting):
                self._actors.take(started)
        self.facts = self._actors.facts

    def __call__(self, entries: Iterable[Entry], /) -> Iterator[Out]:
        """Yield what the engines give for images, batch by batch.

        Raises:
            InputError: An engine raised it, or processes that had the same images died several times.
        """
        return _Run(self._actors, self._decode, self.facts, self.decoders).outputs(entries)


class _Run(Generic[Out]):
    """One stream of images.

    Where a group is: `decoding`, `ready`, `running` (references and what they are of), or `done` by its number.
    """

    def __init__(self, actors: "Actors[Out]", decode: Any, facts: Facts, decoders: int) -> None:
        self._actors, self._decode, self._facts, self._decoders = actors, decode, facts, decoders
        self._folder = os.getcwd()
        self._decoding: dict[Any, _Group] = {}
        self._ready: list[tuple[int, _Group]] = []
        self._running: dict[Any, tuple[Actor, _Group]] = {}
        self._done: dict[int, list[Out]] = {}
        self._next = 0  # whose outputs are yielded next

    def outputs(self, entries: Iterable[Entry]) -> Iterator[Out]:
        groups = self._groups(entries)
        while True:
            while self._next in self._done:
                yield from self._done.pop(self._next)
                self._next += 1
            while len(self._decoding) < self._decoders and self._has_room():
                if (group := next(groups, None)) is None:
                    break
                self._start_decoding(group)
            self._hand_out()
            if not (self._decoding or self._ready or self._running):
                return
            for done in _finished([*self._decoding, *self._running, *self._actors.starting]):
                self._take(done)

    def _groups(self, entries: Iterable[Entry]) -> Iterator[_Group]:
        source, batch = iter(entries), self._facts.batch
        for number in itertools.count():
            group = list(itertools.islice(source, batch * math.ceil(AT_ONCE / batch)))
            if not group:
                return
            yield _Group(number, group)

    def _has_room(self) -> bool:
        """Return whether the actors will have work for another group soon, and few outputs wait for an earlier one."""
        live = len(self._actors.live)
        return len(self._ready) <= live and len(self._done) <= 4 * (self._decoders + _HELD * live)

    def _start_decoding(self, group: _Group) -> None:
        group.images = self._decode.remote(group.entries, self._facts.preprocess, self._folder)
        self._decoding[group.images] = group

    def _hand_out(self) -> None:
        while self._ready and self._actors.live:
            actor = min(self._actors.live, key=lambda one: one.running)
            if actor.running == _HELD:
                return
            _, group = heapq.heappop(self._ready)
            self._running[actor.handle.run.remote(group.images)] = actor, group
            actor.running += 1

    def _take(self, done: Any) -> None:
        if done in self._actors.starting:
            self._actors.take(done)
        elif done in self._decoding:  # an error in it comes back from the actor
            group = self._decoding.pop(done)
            heapq.heappush(self._ready, (group.number, group))
        else:
            self._take_outputs(done, *self._running.pop(done))

    def _take_outputs(self, done: Any, actor: Actor, group: _Group) -> None:
        import ray
        from ray.exceptions import RayActorError, RayError

        actor.running -= 1
        try:
            self._done[group.number] = ray.get(done)
        except RayError as error:
            root = root_of(error)
            group.deaths += 1
            if group.deaths > MOST_DEATHS:
                named = f"{group.entries[0].path} to {group.entries[-1].path}"
                raise InputError(
                    f"ray: {group.deaths} processes that had the images {named} were killed, perhaps out of memory; a "
                    "smaller --batch takes less"
                ) from None
            if isinstance(root, RayActorError):
                self._actors.replace(actor)
                heapq.heappush(self._ready, (group.number, group))
            else:  # what was decoded is lost, with its process or its node
                self._start_decoding(group)


def _finished(references: Iterable[Any]) -> list[Any]:
    """Return which references are there, after waiting for one, but not long."""
    import ray

    waiting = list(references)
    # Not fetched: decoded images go from one process to the other.
    found: list[Any] = ray.wait(waiting, timeout=_WAIT_S, fetch_local=False)[0]
    if found:
        found = ray.wait(waiting, num_returns=len(waiting), timeout=0, fetch_local=False)[0]
    return found


class RowsOnCluster:
    """The features of images, in the form that `write_rows` takes.

    Attributes:
        rates: of all streams so far.
    """

    def __init__(self, stream: EngineStream[Rows]) -> None:
        self._stream = stream
        self.rates = Rates(stream.decoders, stream.engines)

    def __call__(self, entries: Iterable[Entry], /) -> Iterator[Rows]:
        """Yield the features of images in order, batch by batch."""
        start = time.perf_counter()
        for rows in self._stream(entries):
            yield rows
            now = time.perf_counter()
            self.rates.add(rows, now - start)
            start = now
