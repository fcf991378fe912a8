"""One process that serves: a socket, uvicorn, and a graceful end."""

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from dvit_infer.errors import InputError
from dvit_infer.serve.connection import connection_class
from dvit_infer.serve.http import application
from dvit_infer.serve.metrics import Metrics
from dvit_infer.serve.model import Model
from dvit_infer.serve.settings import Settings

BACKLOG = 1024  # connections that wait to be accepted


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; clients that connect before a server accepts them wait.

    Raises:
        InputError: The port is in use or may not be used, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise InputError(f"host: {host}: {getattr(error, 'strerror', None) or error}") from None
    try:
        if os.name == "posix":  # a port whose last server has just ended is free
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        what = f"port: {port}" if error.errno in (errno.EADDRINUSE, errno.EACCES) else f"host: {host}"
        does = "; choose another, or 0 for any that is free" if what.startswith("port") else ""
        raise InputError(f"{what}: {error.strerror}{does}") from None
    return listener


@contextlib.contextmanager
def stops_call(stop: Callable[[], object]) -> Iterator[None]:
    """Call `stop` at every SIGTERM, SIGINT or SIGHUP in the block that is not ignored (nohup); in the main thread."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if before[number] != signal.SIG_IGN:
                signal.signal(number, lambda *_: stop())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Server(uvicorn.Server):
    """uvicorn's server. SIGTERM and Ctrl-C end it when it has answered what it took; a second one ends it at once."""

    def __init__(self, models: Mapping[str, Model], settings: Settings, metrics: Metrics) -> None:
        self._models = models
        super().__init__(
            uvicorn.Config(
                application(models, settings, metrics),
                http=connection_class(settings.body_timeout_s),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=75,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals in the block; uvicorn would end the process by the same signal afterwards."""
        with stops_call(self.stop):
            yield

    def stop(self) -> None:
        """Accept nothing more, answer what was taken, and end; when called again, end at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        threading.Thread(target=self._hurry).start()  # a signal's handler may interrupt whoever holds the lock

    def _hurry(self) -> None:
        for model in self._models.values():
            model.batcher.hurry()


def serve(
    listener: socket.socket,
    models: Mapping[str, Model],
    settings: Settings,
    metrics: Metrics,
    ready: Callable[[Server], None] = lambda server: None,
) -> None:
    """Serve models that have started, until a signal.

    Args:
        listener: of `listen`; it is closed.
        ready: called with the server just before it accepts connections.
    """
    server = Server(models, settings, metrics)
    ready(server)
    server.run(sockets=[listener])
