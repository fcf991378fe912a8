"""A connection: uvicorn's, with limits on how long the headers of a request may be, and how long they may take."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADERS = 1 << 16  # bytes of a request before its body


class Connection(HttpToolsProtocol):
    """Closes a connection that sends nothing, or whose headers do not end. uvicorn waits for both forever."""

    headers_timeout_s = 20.0
    _timer: asyncio.TimerHandle | None = None
    _unfinished = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # httptools reads from this kind
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.headers_timeout_s, self._refuse, 408)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self.headers_timeout_s, self._refuse, 408)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        between = self.cycle is None or self.cycle.response_complete  # no body can be in these data, but after headers
        super().data_received(data)
        self._unfinished = self._unfinished + len(data) if between and self._timer is not None else 0
        if self._unfinished > MAX_HEADERS:
            self._refuse(431)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int) -> None:
        """Answer an unfinished request, and close the connection; one that has sent nothing is closed only."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self.headers is not None and (self.cycle is None or self.cycle.response_complete):
            self.transport.write(f"HTTP/1.1 {status} \r\nconnection: close\r\ncontent-length: 0\r\n\r\n".encode())
        self.transport.close()


def connection_class(headers_timeout_s: float) -> Any:
    """Return `Connection` with another limit of time."""
    return type("Connection", (Connection,), {"headers_timeout_s": headers_timeout_s})
