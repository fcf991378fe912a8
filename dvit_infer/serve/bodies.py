"""Reading the bodies of requests: bounded in size, time, and memory of all of them together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from dvit_infer.serve.settings import Settings


class Bodies:
    """Reads bodies for a process."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._held = settings, 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Yield the whole body of a request, whose memory counts until the block ends.

        Raises:
            HTTPException: 413: it is too long, by its announced length or by what came; 408: it takes too long to come;
                415: it is compressed; 503: too much is held already.
            ClientDisconnect: The client has gone.
        """
        most = self._settings.max_body
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "Content-Encoding: compressed bodies are not read; send it as it is")
        announced = request.headers.get("content-length", "0")
        if len(announced) > 18 or int(announced) > most:  # digits, or the server would have refused it
            raise HTTPException(413, f"body: {announced:.20} bytes announced; at most {most:,} are read")
        parts: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self._settings.body_timeout_s):
                    more = True
                    while more:
                        message = await request.receive()
                        if message["type"] == "http.disconnect":
                            raise ClientDisconnect
                        part, more = message.get("body", b""), message.get("more_body", False)
                        if size + len(part) > most:
                            raise HTTPException(413, f"body: more than {most:,} bytes, the most that are read")
                        if self._held + len(part) > self._settings.max_held:
                            raise HTTPException(503, "too many bodies are being read", {"Retry-After": "1"})
                        parts.append(part)
                        size += len(part)
                        self._held += len(part)
            except TimeoutError:
                raise HTTPException(
                    408, f"body: not there after {self._settings.body_timeout_s:g} s; send it faster"
                ) from None
            yield b"".join(parts)
        finally:
            self._held -= size
