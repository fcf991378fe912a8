"""Several processes behind one port: a supervisor that starts them, replaces what is killed, and ends them."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

from prometheus_client import multiprocess

from dvit_infer.errors import InputError, KernelError
from dvit_infer.serve.logs import FIELDS, log
from dvit_infer.serve.metrics import SHARED
from dvit_infer.serve.server import stops_call
from dvit_infer.utils.memory import is_allocation_failure
from dvit_infer.utils.threads import SETTINGS, allowed_threads

MOST = 64
_SPAWN = multiprocessing.get_context("spawn")  # runtimes with threads do not survive a fork
_KILLED = "a worker process was killed while it started, perhaps out of memory; try fewer"
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0  # before a worker is started again that could not start

Work = Callable[[socket.socket, "Lifeline"], None]


class Lifeline:
    """A worker's end of the pipe to its supervisor: it says that it is ready, and learns that the other has gone."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def ready(self, stop: Callable[[], None]) -> None:
        """Report that the worker serves; `stop` is called, in a thread, if the supervisor ends without a word."""
        with contextlib.suppress(OSError):  # it has gone already
            self._pipe.send(None)

        def watch() -> None:
            with contextlib.suppress(EOFError, OSError):
                self._pipe.recv()
            stop()

        threading.Thread(target=watch, daemon=True, name="lifeline").start()


class _Worker:
    def __init__(self, work: Work, listener: socket.socket) -> None:
        self.pipe, other = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_run, args=(work, listener, other), name="dvit-serve worker")
        # Ctrl-C and a hangup reach all processes of a terminal; the supervisor is the one that ends workers.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other.close()
        self.is_ready = False

    def heard(self) -> str | None:
        """Take what the worker said, if anything; return the error that kept it from starting."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll():
                error: str | None = self.pipe.recv()
                self.is_ready = error is None
                return error
        return None


def _run(work: Work, listener: socket.socket, pipe: Connection) -> None:
    """Run a worker: what a new process calls."""
    try:
        work(listener, Lifeline(pipe))
    except (InputError, KernelError) as error:
        message = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_allocation_failure(error):
            raise
        message = "out of memory: fewer workers, a smaller batch or model would fit"
    else:
        return
    with contextlib.suppress(OSError):  # the supervisor has gone
        pipe.send(message)
    raise SystemExit(2)


def supervise(count: int, work: Work, listener: socket.socket) -> None:
    """Run workers until SIGTERM or Ctrl-C, then let them answer what they took.

    They share the listening socket: the system gives each connection to one that waits for one. A worker that dies is
    replaced; connections that it had are lost, those that it had not accepted go to the others.

    Args:
        count: the number of processes. Unless OMP_NUM_THREADS says otherwise, they share the CPUs.
        work: what a worker does, picklable; it calls `Lifeline.ready`.
        listener: of `server.listen`; it is closed here.

    Raises:
        InputError: A worker cannot start, by its own error; or was killed before all were ready.
    """
    asked, ask = os.pipe()  # readable once a signal has arrived
    workers: list[_Worker] = []
    try:
        with stops_call(lambda: os.write(ask, b"\0")), worker_environment(count):
            try:
                workers += [_Worker(work, listener) for _ in range(count)]
                _watch(workers, lambda: _Worker(work, listener), asked)
            finally:
                listener.close()
                _end(workers, asked)
    finally:
        os.close(asked)
        os.close(ask)


def _watch(workers: list[_Worker], start: Callable[[], _Worker], asked: int) -> None:
    """Replace workers that die, until `asked` is readable."""
    started, pause_s = False, _PAUSE_S
    while not wait([asked], 0):
        wait([asked, *(worker.process.sentinel for worker in workers), *(w.pipe for w in workers if not w.is_ready)])
        for place, worker in enumerate(workers):
            error = worker.heard()
            if worker.process.is_alive() and error is None:
                continue
            worker.process.join()
            if wait([asked], 0):  # Ctrl-C may have ended it
                return
            if not started:
                raise InputError(error or f"workers: {_KILLED}")
            fields = {"pid": worker.process.pid, "exit": worker.process.exitcode, "error": error}
            log.error("a worker died; starting another", extra={FIELDS: fields})
            multiprocess.mark_process_dead(worker.process.pid)  # type: ignore[no-untyped-call]
            pause_s = _PAUSE_S if worker.is_ready else min(2 * pause_s, _LONGEST_PAUSE_S)
            if not worker.is_ready and wait([asked], pause_s):
                return
            worker.pipe.close()
            workers[place] = start()
        if not started and all(worker.is_ready for worker in workers):
            started = True
            log.info("serving", extra={FIELDS: {"workers": len(workers)}})


def _end(workers: Sequence[_Worker], asked: int) -> None:
    """Let the workers answer what they took; a second signal ends them at once."""
    for worker in workers:
        worker.process.terminate()
    if wait([asked], 0):
        os.read(asked, 1 << 10)
    while alive := [worker.process for worker in workers if worker.process.is_alive()]:
        if asked in wait([asked, *(process.sentinel for process in alive)]):
            for process in alive:
                process.kill()
            os.read(asked, 1 << 10)


@contextlib.contextmanager
def worker_environment(count: int) -> Iterator[None]:
    """Set what workers inherit: their share of the CPUs, and the folder of their metrics, which is removed."""
    folder = tempfile.mkdtemp(prefix="dvit-serve-")
    changed = {SHARED: folder}
    if not any(os.environ.get(name) for name in SETTINGS):
        changed[SETTINGS[0]] = str(max(1, allowed_threads() // count))
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
