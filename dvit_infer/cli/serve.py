"""dvit-serve: an HTTP server with dynamic batching."""

import argparse
import contextlib
import functools
import ipaddress
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from dvit_infer.cli.common import Parser, run
from dvit_infer.cli.images import add_engine_options, model_of, warn
from dvit_infer.errors import InputError

if TYPE_CHECKING:
    import socket

    from dvit_infer.serve.settings import Settings
    from dvit_infer.serve.workers import Lifeline


def _parser() -> Parser:
    parser = Parser(
        prog="dvit-serve",
        description="Serve models over HTTP: the Open Inference Protocol (V2), and POST /predict for image files.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="saved file, checkpoint or ONNX file; or NAME=FILE")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free; default: %(default)s")
    parser.add_argument("--token-file", metavar="FILE", help="clients have to send the token in it (Bearer)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default: %(default)s")
    parser.add_argument("--max-batch", type=int, default=64, metavar="B", help="images at a time; default: %(default)s")
    parser.add_argument(
        "--max-delay-ms", type=float, default=3.0, metavar="T", help="wait for a fuller batch; default: %(default)g"
    )
    parser.add_argument("--max-queue", type=int, metavar="N", help="images that may wait; default: four batches")
    parser.add_argument(
        "--timeout",
        dest="timeout_s",
        type=float,
        default=30.0,
        metavar="S",
        help="of a request; default: %(default)g s",
    )
    parser.add_argument(
        "--body-timeout",
        dest="body_timeout_s",
        type=float,
        default=20.0,
        metavar="S",
        help="until a request has arrived; default: %(default)g s",
    )
    parser.add_argument(
        "--max-body", type=int, default=64 << 20, metavar="BYTES", help="of a request; default: %(default)s"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=50_000_000, metavar="N", help="of an image file; default: %(default)s"
    )
    parser.add_argument("--no-access-log", action="store_true", help="log what happens, but not each request")
    add_engine_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(_parser(), _serve, argv)


def _serve(options: argparse.Namespace) -> int:
    from dvit_infer.utils.packages import need

    need("dvit-serve", "starlette", "uvicorn", "httptools", "prometheus_client", extra="dvit-infer[serve]")
    from dvit_infer.serve.logs import json_logs
    from dvit_infer.serve.model import named
    from dvit_infer.serve.server import listen
    from dvit_infer.serve.workers import MOST, supervise

    options.sources, options.settings = named(options.models), _settings(options)
    if not 1 <= options.workers <= MOST:
        raise InputError(f"workers: {options.workers} processes cannot serve; 1 to {MOST} can")
    if options.workers > 1 and os.name != "posix":
        raise InputError(f"workers: {options.workers} processes cannot share a port on this system; 1 can serve")
    if not 0 <= options.port <= 65535:
        raise InputError(f"port: {options.port} is none; 0 to 65535 are expected")
    with listen(options.host, options.port) as listener:  # before models are loaded: a busy port is known at once
        if options.settings.token is None and not _is_loopback(listener):
            warn([f"whoever reaches {options.host} may use this server; --token-file limits that"])
        if options.workers == 1:
            _work(options, listener)
        else:
            with json_logs(not options.no_access_log):
                supervise(options.workers, functools.partial(_work, options), listener)
    return 0


def _work(options: argparse.Namespace, listener: "socket.socket", lifeline: "Lifeline | None" = None) -> None:
    """Load the models, and serve them in this process."""
    from dvit_infer.serve.logs import FIELDS, json_logs, log
    from dvit_infer.serve.metrics import Metrics, ModelMeter
    from dvit_infer.serve.model import Model
    from dvit_infer.serve.server import Server, serve

    def ready(server: Server) -> None:
        if lifeline is not None:
            lifeline.ready(server.stop)
        host, port = listener.getsockname()[:2]
        facts = {"host": host, "port": port, "pid": os.getpid(), "models": {n: m.id for n, m in models.items()}}
        log.info("ready", extra={FIELDS: facts})

    metrics, models = Metrics(), {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(json_logs(not options.no_access_log))
        for name, source in options.sources.items():
            own = argparse.Namespace(**{**vars(options), "model": source, "batch": options.max_batch, "workers": 0})
            engine, preprocess, classes = model_of(own, classifies=False)
            labels = engine.labels if classes is None else classes.labels
            models[name] = Model(name, source, engine, preprocess, labels, options.settings, ModelMeter(metrics, name))
            models[name].start()
            stack.callback(models[name].batcher.close)
        serve(listener, models, options.settings, metrics, ready)


def _settings(options: argparse.Namespace) -> "Settings":
    from dvit_infer.serve.settings import Settings

    given = {field.name: getattr(options, field.name) for field in fields(Settings) if field.name != "token"}
    return Settings(**given, token=_token(options.token_file))


def _token(path: str | None) -> str | None:
    """Return the token in a file.

    Raises:
        InputError: The file cannot be read, or holds none.
    """
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not ASCII"
        raise InputError(f"token_file: {path}: {why}") from None
    if not token.isprintable() or len(token) < 16 or " " in token:
        raise InputError(f"token_file: {path}: one line of at least 16 characters without spaces is expected")
    return token


def _is_loopback(listener: "socket.socket") -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


if __name__ == "__main__":
    sys.exit(main())
