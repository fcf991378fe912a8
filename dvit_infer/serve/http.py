"""The HTTP server's application: Open Inference Protocol, POST /predict, health and metrics."""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import dvit_infer
from dvit_infer.errors import InputError
from dvit_infer.evaluate.one_logit import check_classes
from dvit_infer.evaluate.predictions import Prediction
from dvit_infer.images.decode import ImageFileError
from dvit_infer.serve import inference_protocol as protocol
from dvit_infer.serve.batcher import ExpiredError, FullError
from dvit_infer.serve.bodies import Bodies
from dvit_infer.serve.logs import FIELDS, requests_log
from dvit_infer.serve.metrics import Metrics
from dvit_infer.serve.model import Model
from dvit_infer.serve.settings import Settings
from dvit_infer.utils.threads import allowed_threads

CLIENT_GONE = 499  # in logs and metrics alone; nginx's number for it
_HEALTH = "/v2/health/"
_ENDPOINTS = ("live", "ready", "infer", "predict", "metrics")  # labels of metrics; all else is "other"
_Out = TypeVar("_Out")


def application(models: Mapping[str, Model], settings: Settings, metrics: Metrics) -> Starlette:
    """Return the ASGI application for models that have started."""
    server = _Server(models, settings, metrics)
    model = "/v2/models/{model}"
    routes = [
        Route("/v2", server.metadata),
        Route(f"{_HEALTH}live", server.live),
        Route(f"{_HEALTH}ready", server.ready),
        *(
            Route(f"{prefix}{path}", endpoint, methods=[method])
            for prefix in (model, f"{model}/versions/{{version}}")
            for path, endpoint, method in (
                ("", server.model_metadata, "GET"),
                ("/ready", server.model_ready, "GET"),
                ("/infer", server.infer, "POST"),
            )
        ),
        Route("/predict", server.predict, methods=["POST"]),
        Route("/metrics", server.metrics_page),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Observed, metrics=metrics), Middleware(_Guarded, token=settings.token)],
        exception_handlers={
            HTTPException: _refused,
            ClientDisconnect: _gone,
            Exception: _failed,  # Starlette raises it again, so that the server logs the traceback
        },
    )
    app.router.redirect_slashes = False
    return app


class _Server:
    """The endpoints."""

    def __init__(self, models: Mapping[str, Model], settings: Settings, metrics: Metrics) -> None:
        self._models, self._settings, self._metrics = models, settings, metrics
        self._bodies = Bodies(settings)
        self._decoders = ThreadPoolExecutor(allowed_threads(), "decode")

    async def metadata(self, request: Request) -> Response:
        extensions = ["binary_tensor_data"]
        return JSONResponse({"name": "dvit-serve", "version": dvit_infer.__version__, "extensions": extensions})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        return JSONResponse({"ready": True})  # models are warm before the first connection is accepted

    async def model_ready(self, request: Request) -> Response:
        return JSONResponse({"name": self._model(request).name, "ready": True})

    async def model_metadata(self, request: Request) -> Response:
        return JSONResponse(protocol.metadata(self._model(request)))

    async def metrics_page(self, request: Request) -> Response:
        return Response(self._metrics.page(), headers={"Content-Type": self._metrics.content_type})

    async def infer(self, request: Request) -> Response:
        arrived, model = time.monotonic(), self._model(request)
        async with self._bodies.body(request) as body:
            try:
                wanted = protocol.parse(body, request.headers.get(protocol.LENGTH_HEADER), model)
            except protocol.ProtocolError as error:
                raise HTTPException(400, str(error)) from None
            request.state.images = len(wanted.images)
            deadline = arrived + (wanted.timeout_s or self._settings.timeout_s)

            async def answer() -> Any:
                with model.batcher.place(len(wanted.images), deadline) as ticket:
                    return await asyncio.wrap_future(model.batcher.submit(ticket, wanted.images))

            logits = await _in_time(request, answer(), deadline)
        if not np.isfinite(logits).all():
            raise HTTPException(500, f"the model's output in {model.engine.precision} is NaN or Inf")
        content, length = protocol.response(wanted, logits, model)
        if length is None:
            return Response(content, media_type="application/json")
        headers = {protocol.LENGTH_HEADER: str(length)}
        return Response(content, headers=headers, media_type="application/octet-stream")

    async def predict(self, request: Request) -> Response:
        arrived, model = time.monotonic(), self._model(request)
        name = request.query_params.get("image", "image")
        try:
            check_classes(model.engine.config, model.name)
            timeout_s = protocol.timeout_s(request.query_params.get("timeout")) or self._settings.timeout_s
        except (InputError, protocol.ProtocolError) as error:
            raise HTTPException(400, str(error)) from None
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, "body: a form; send the image file itself: curl --data-binary @FILE")
        deadline = arrived + timeout_s
        async with self._bodies.body(request) as body:

            async def answer() -> Prediction:
                with model.batcher.place(1, deadline) as ticket:
                    loop = asyncio.get_running_loop()
                    image = await loop.run_in_executor(self._decoders, model.decode, body, name)
                    return model.prediction(name, await asyncio.wrap_future(model.batcher.submit(ticket, image)))

            request.state.images = 1
            try:
                prediction, status = await _in_time(request, answer(), deadline), 200
            except ImageFileError as error:
                prediction, status = Prediction(name, error=error.why), 400
        if prediction.error and status == 200:
            status = 500
        return Response(model.line(prediction) + "\n", status, media_type="application/json")

    def _model(self, request: Request) -> Model:
        """Return the model that a request names; the only one need not be named."""
        name = request.path_params.get("model", request.query_params.get("model"))
        if name is None and len(self._models) == 1:
            name = next(iter(self._models))
        if name is None:
            raise HTTPException(400, f"model: one has to be named, ?model=NAME: {', '.join(self._models)}")
        if name not in self._models:
            raise HTTPException(404, f"model: {name[:100]!a} is not served; these are: {', '.join(self._models)}")
        request.state.model = name
        if request.path_params.get("version", protocol.VERSION) != protocol.VERSION:
            raise HTTPException(404, f"version: {name} has version {protocol.VERSION} alone")
        return self._models[name]


async def _in_time(request: Request, answer: Awaitable[_Out], deadline: float) -> _Out:
    """Return an answer, unless its deadline passes, the queue is full, or the client goes away: its work is dropped.

    Raises:
        HTTPException: 503, 504.
        ClientDisconnect: Nobody waits for the answer.
    """
    waiting, gone = asyncio.ensure_future(answer), asyncio.ensure_future(request.receive())
    try:
        left = deadline - time.monotonic()
        done, _ = await asyncio.wait({waiting, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if waiting in done:
            return waiting.result()
        if gone in done:  # after the body nothing else is received
            raise ClientDisconnect
        raise ExpiredError
    except FullError as error:
        raise HTTPException(503, f"queue: {error}", {"Retry-After": str(error.retry_after_s)}) from None
    except ExpiredError as error:
        raise HTTPException(504, f"timeout: {error}") from None
    finally:
        waiting.cancel()
        gone.cancel()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)  # goes nowhere


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "internal error; the server's log has the reason"}, 500)


class _Guarded:
    """Refuses requests without the token, before anything of them is read; health is for everyone."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._expected = None if token is None else b"Bearer " + token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._expected is None or scope["path"].startswith(_HEALTH):
            return await self._app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if hmac.compare_digest(given, self._expected):
            return await self._app(scope, receive, send)
        headers = {"WWW-Authenticate": "Bearer"}
        await JSONResponse({"error": "authorization: the token is missing or wrong"}, 401, headers)(
            scope, receive, send
        )


class _Observed:
    """Logs and counts each request, and closes a connection whose request was answered before it was read."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start, status = time.monotonic(), 500
        headers = dict(scope["headers"])
        unread = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"

        async def received() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if unread:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            await self._app(scope, received, sent)
        finally:
            seconds, state = time.monotonic() - start, scope.get("state", {})
            path, model = scope["path"], state.get("model", "")
            endpoint = path.rpartition("/")[2]
            self._metrics.answered(endpoint if endpoint in _ENDPOINTS else "other", model, status, seconds)
            if requests_log.isEnabledFor(logging.INFO):
                fields = {
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "ms": round(seconds * 1e3, 2),
                    "model": model,
                    "images": state.get("images", 0),
                    "client": (scope.get("client") or ("",))[0],
                }
                requests_log.info("request", extra={FIELDS: fields})
