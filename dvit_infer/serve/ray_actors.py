"""The actors that hold the engines of a job; one that dies is replaced, and until then the others go on."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dvit_infer.errors import InputError, KernelError
from dvit_infer.images.decoded import Decoded
from dvit_infer.serve.ray_engine import Facts, OnEngine

Out = TypeVar("Out")
MOST_DEATHS = 3  # of processes for the same reason: a fourth would die too


class Worker(Generic[Out]):
    """The code of an actor. It makes its engine when told to, so that an error is one of a task, not a death."""

    _engine: OnEngine[Out]

    def __init__(self, make: Callable[[], OnEngine[Out]]) -> None:
        self._make = make

    def start(self) -> Facts:
        self._engine = self._make()
        return self._engine.facts

    def run(self, images: Sequence[Decoded]) -> list[Out]:
        return self._engine.run(images)


@dataclass(eq=False)
class Actor:
    """An actor: its handle, what it needs of a node, and the number of groups that it has."""

    handle: Any
    needs: dict[str, int]
    running: int = 0


class Actors(Generic[Out]):
    """All actors of a job.

    Ray's own restarts are not used: it would hold back the calls of an actor until a node has room for it again, while
    others could answer them.

    Attributes:
        live: those whose engine is loaded.
        starting: the others, by the reference of their start.
        facts: of the engines; there once one is live.
    """

    facts: Facts

    def __init__(self, make: Callable[[], OnEngine[Out]], needs: Sequence[dict[str, int]]) -> None:
        import ray

        self._make, self._class = make, ray.remote(Worker)
        self.live: list[Actor] = []
        self.starting: dict[Any, Actor] = {}
        self._deaths = 0  # in a row, while loading
        for one in needs:
            self._start(one)

    def _start(self, needs: dict[str, int]) -> None:
        handle = self._class.options(max_restarts=0, max_task_retries=0, **needs).remote(self._make)
        self.starting[handle.start.remote()] = Actor(handle, needs)

    def take(self, started: Any) -> None:
        """Take the outcome of a start.

        Raises:
            InputError: The engine cannot be made, is another than the others, or its process died repeatedly; or the
                node lacks a package.
        """
        import ray
        from ray.exceptions import RayError

        actor = self.starting.pop(started)
        try:
            facts = ray.get(started)
        except RayError as error:
            root_of(error)
            self._deaths += 1
            if self._deaths > MOST_DEATHS:
                raise InputError(
                    f"ray: {self._deaths} processes in a row were killed while they loaded the model, perhaps out of "
                    "memory"
                ) from None
            self._start(actor.needs)
            return
        self._deaths = 0
        if not self.live and not hasattr(self, "facts"):
            self.facts = facts
        elif (facts.model, facts.batch) != (self.facts.model, self.facts.batch):
            raise InputError(
                f"ray: nodes differ: {facts.precision}, batch {facts.batch} on {facts.machine}, {self.facts.precision}"
                f", batch {self.facts.batch} on {self.facts.machine}; --dtype, --device and --batch say which"
            )
        self.live.append(actor)

    def replace(self, actor: Actor) -> None:
        """Start another actor for one that died; for one that does not answer any more, too."""
        import ray

        if actor in self.live:
            self.live.remove(actor)
            ray.kill(actor.handle)
            self._start(actor.needs)


def root_of(error: Any) -> Any:
    """Return the error of Ray at the root of another.

    Raises:
        InputError: Our code raised it there, or a node lacks a package.
        Exception: It is another one that code raised.
    """
    from ray.exceptions import RayError, RayTaskError

    root = error
    while isinstance(root, RayTaskError) and root.cause is not None:
        root = root.cause
    text = str(error)
    if lacking := re.search(r"No module named '([\w.]+)'", text):
        where = re.search(r"ip=([\w.:]+)", text)
        raise InputError(
            f"ray: node {where[1] if where else 'of the cluster'}: has no Python package {lacking[1]}; install the "
            "same versions on every node"
        ) from None
    if isinstance(root, InputError | KernelError | MemoryError):
        raise root from None
    if not isinstance(root, RayError):
        raise error
    return root
