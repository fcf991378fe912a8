"""A server in a thread of the test, clients for it, and an engine that can be held up."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator

import numpy as np

from dvit_infer.models.preprocessing import preprocess_for
from dvit_infer.serve.metrics import Metrics, ModelMeter
from dvit_infer.serve.model import Model
from dvit_infer.serve.server import Server, listen, serve
from dvit_infer.serve.settings import Settings

HOST = "127.0.0.1"


class Gated:
    """An engine that runs only while its gate is open, as it is at first.

    Attributes:
        batches: sizes of the batches that it was called with.
    """

    def __init__(self, engine) -> None:
        self._engine, self.gate, self.batches = engine, threading.Event(), []
        self.gate.set()

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def __call__(self, images):
        self.batches.append(len(images))
        assert self.gate.wait(60)
        return self._engine(images)


@contextlib.contextmanager
def serving(engines: dict, source, **settings) -> Iterator[int]:
    """Serve engines by name, all made of one source; the port."""
    chosen, metrics, models = Settings(**settings), Metrics(), {}
    for name, engine in engines.items():
        meter = ModelMeter(metrics, name)
        models[name] = Model(name, source, engine, preprocess_for(engine.config), engine.labels, chosen, meter)
        models[name].start()
        getattr(engine, "batches", []).clear()
    servers: list[Server] = []
    listener = listen(HOST, 0)
    port = listener.getsockname()[1]
    thread = threading.Thread(target=serve, args=(listener, models, chosen, metrics, servers.append))
    thread.start()
    try:
        yield port
    finally:
        while not servers:
            thread.join(0.01)
        servers[0].stop()
        for engine in engines.values():
            getattr(engine, "gate", threading.Event()).set()
        thread.join()
        for model in models.values():
            model.batcher.close()


def ask(port: int, method: str, path: str, body=None, headers=None) -> tuple[int, dict[str, str], bytes]:
    """The status, headers (in lower case) and body of an answer."""
    client = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        client.request(method, path, body, headers or {})
        found = client.getresponse()
        return found.status, {name.lower(): value for name, value in found.getheaders()}, found.read()
    finally:
        client.close()


def infer(port: int, model: str, request: dict, binary: bytes = b"") -> tuple[int, dict]:
    """The status and the JSON of an answer to a request, in JSON."""
    text = json.dumps(request).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))} if binary else {}
    status, _, body = ask(port, "POST", f"/v2/models/{model}/infer", text + binary, headers)
    return status, json.loads(body)


def tensor(images: np.ndarray, **changes) -> dict:
    """The input of a request whose data are in binary."""
    kind = "UINT8" if images.dtype == np.uint8 else "FP32"
    sent = {"name": "images", "datatype": kind, "shape": list(images.shape)}
    return sent | {"parameters": {"binary_data_size": images.nbytes}} | changes


def metric(port: int, line: str) -> float:
    """The value of a metric, by its name and labels; 0 if it has none yet."""
    page = ask(port, "GET", "/metrics")[2].decode()
    return next((float(found.split()[-1]) for found in page.splitlines() if found.startswith(f"{line} ")), 0.0)


def wait_for(port: int, line: str, value: float) -> None:
    """Wait until a metric has a value."""
    while metric(port, line) != value:
        pass


def raw(port: int, *parts: bytes) -> bytes:
    """What a server sends until it closes the connection, on these bytes and no more."""
    with socket.create_connection((HOST, port), timeout=60) as client:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                client.sendall(part)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while more := client.recv(1 << 16):
                received += more
        return received
