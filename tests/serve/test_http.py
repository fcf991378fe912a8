"""The server over sockets: /predict, deadlines, the bounded queue, clients that go away, limits, the token, metrics."""

import io
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from drawn import draw
from served import HOST, Gated, ask, infer, metric, raw, serving, tensor, wait_for

import dvit_infer as dvit
from dvit_infer.evaluate.predictions import model_id, predict
from dvit_infer.models.preprocessing import preprocess_for

ONE = np.zeros((1, 3, 64, 64), np.uint8)
QUEUE = 'dvit_queue_images{model="tiny"}'


def png(seed: int = 0, width: int = 60, height: int = 45) -> bytes:
    file = io.BytesIO()
    draw(seed, width, height).save(file, "PNG")
    return file.getvalue()


def test_predict_answers_as_the_command(port, engine, checkpoint, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    identity = model_id(engine, checkpoint, preprocess_for(engine.config))
    expected = next(predict(engine, [str(path)], workers=0))[0].line(identity, engine.labels)
    status, headers, body = ask(port, "POST", f"/predict?image={path}", png())
    assert (status, headers["content-type"], body.decode()) == (200, "application/json", expected + "\n")
    assert ask(port, "POST", f"/predict?image={path}&model=tiny", png())[2] == body


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is not a readable image (JPEG, "),
        (b"this is no image", "is not a readable image (JPEG, "),
        (png()[:-40], "damaged: "),
    ],
)
def test_a_body_that_is_no_image(port, content, why):
    status, _, body = ask(port, "POST", "/predict", content)
    answer = json.loads(body)
    assert status == 400
    assert list(answer) == ["image", "model", "error"]
    assert why in answer["error"]


def test_the_size_of_an_image_is_limited(engine, checkpoint):
    with serving({"tiny": engine}, checkpoint, max_batch=1, max_pixels=2699) as port:
        status, _, body = ask(port, "POST", "/predict", png(0, 60, 45))
        assert status == 400
        assert "60x45 is a decompression bomb: at most 2,699 pixels" in json.loads(body)["error"]
        assert ask(port, "POST", "/predict", png(0, 45, 59))[0] == 200


@pytest.mark.parametrize(
    ("query", "headers", "status", "message"),
    [
        ("?model=other", {}, 404, "model: 'other' is not served; these are: tiny"),
        ("?timeout=soon", {}, 400, 'timeout: "soon"; a whole number of microseconds is expected'),
        (
            "",
            {"Content-Type": "multipart/form-data; boundary=x"},
            415,
            "send the image file itself: curl --data-binary",
        ),
        ("", {"Content-Encoding": "gzip"}, 415, "Content-Encoding: compressed bodies are not read"),
    ],
)
def test_predict_refuses(port, query, headers, status, message):
    found, _, body = ask(port, "POST", f"/predict{query}", png(), headers)
    assert found == status
    assert message in json.loads(body)["error"]


def test_several_models_have_to_be_named(engine, checkpoint):
    bare = dvit.convert(checkpoint, device="cpu", backend="torch", image_size=32, assume={"num_heads": 2})
    with serving({"tiny": engine, "small": bare}, checkpoint, max_batch=1) as port:
        status, _, body = ask(port, "POST", "/predict", png())
        assert (status, json.loads(body)["error"]) == (400, "model: one has to be named, ?model=NAME: tiny, small")
        answers = [json.loads(ask(port, "POST", f"/predict?model={n}", png())[2]) for n in ("tiny", "small")]
        assert answers[0]["model"] != answers[1]["model"]
        assert infer(port, "small", {"inputs": [tensor(ONE)]}, ONE.tobytes())[0] == 400


@pytest.fixture
def held(engine, checkpoint):
    """A server whose engine waits, one image in it: its port, the engine, and the answer to that image."""
    gated = Gated(engine)
    with (
        serving({"tiny": gated}, checkpoint, max_batch=2, max_queue=2, max_delay_ms=0) as port,
        ThreadPoolExecutor(8) as pool,
    ):
        gated.gate.clear()
        first = pool.submit(ask, port, "POST", "/predict", png())
        while not gated.batches:
            pass
        try:
            yield port, gated, pool, first
        finally:
            gated.gate.set()


def test_a_full_queue_says_when_to_come_again(held):
    port, gated, pool, first = held
    waiting = [pool.submit(ask, port, "POST", "/predict", png(seed)) for seed in (1, 2)]
    wait_for(port, QUEUE, 2)
    status, headers, body = ask(port, "POST", "/predict", png())
    assert (status, headers["retry-after"]) == (503, "1")
    assert json.loads(body) == {"error": "queue: 2 images are waiting; retry in 1 s"}
    gated.gate.set()
    assert [answer.result()[0] for answer in (first, *waiting)] == [200] * 3
    assert gated.batches == [1, 2]  # those that waited ran together
    assert metric(port, QUEUE) == 0


def test_a_deadline_ends_the_wait_and_its_image_does_not_run(held):
    port, gated, _, first = held
    status, _, body = ask(port, "POST", "/predict?timeout=1000", png())
    assert (status, json.loads(body)) == (504, {"error": "timeout: the deadline passed before the images ran"})
    request = {"inputs": [tensor(ONE)], "parameters": {"timeout": 1000}}
    assert infer(port, "tiny", request, ONE.tobytes())[0] == 504
    assert metric(port, QUEUE) == 0
    gated.gate.set()
    assert first.result()[0] == 200
    assert gated.batches == [1]


def test_the_work_of_a_client_that_went_away_does_not_run(held):
    port, gated, _, first = held
    body = png()
    with socket.create_connection((HOST, port)) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(port, QUEUE, 1)
    wait_for(port, QUEUE, 0)
    gated.gate.set()
    assert first.result()[0] == 200
    assert gated.batches == [1]
    wait_for(port, 'dvit_requests_total{endpoint="predict",model="tiny",status="499"}', 1)


def test_an_error_of_the_engine_is_no_traceback(engine, checkpoint, caplog):
    class Broken(Gated):
        def __call__(self, images):
            if self.gate.is_set():
                raise RuntimeError("secret")
            return self._engine(images)

    broken = Broken(engine)
    broken.gate.clear()
    with serving({"tiny": broken}, checkpoint, max_batch=1) as port:
        broken.gate.set()
        status, _, body = ask(port, "POST", "/predict", png())
        assert (status, json.loads(body)) == (500, {"error": "internal error; the server's log has the reason"})
        broken.gate.clear()
        assert ask(port, "POST", "/predict", png())[0] == 200
    assert "secret" in caplog.text


def test_an_output_that_is_not_finite(engine, checkpoint):
    class Overflowing(Gated):
        def __call__(self, images):
            return self._engine(images) * float("inf")

    with serving({"tiny": Overflowing(engine)}, checkpoint, max_batch=1) as port:
        message = "the model's output in float32 is NaN or Inf"
        status, _, body = ask(port, "POST", "/predict", png())
        assert (status, json.loads(body)["error"]) == (500, message)
        assert infer(port, "tiny", {"inputs": [tensor(ONE)]}, ONE.tobytes()) == (500, {"error": message})


POST = b"POST /predict HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        ([POST + b"Content-Length: 10000000000\r\n\r\n"], b"413", b"10000000000 bytes announced; at most 400,000 are"),
        ([POST + b"Content-Length: " + b"9" * 18 + b"\r\n\r\n"], b"413", b"999999999999999999 bytes announced"),
        (
            [POST + b"Transfer-Encoding: chunked\r\n\r\n", *[b"10000\r\n" + bytes(1 << 16) + b"\r\n"] * 7],
            b"413",
            b"body: more than 400,000 bytes",
        ),
        ([POST + b"Content-Length: 9\r\n\r\nabc"], b"408", b"body: not there after 0.3 s; send it faster"),
        ([POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"], b"408", b"body: not there after 0.3 s"),
        ([POST], b"408", b""),
        ([b"POST /pre"], b"408", b""),
        ([POST, *[b"X: " + b"y" * 5000 + b"\r\n"] * 20], b"431", b""),
        ([POST + b"Content-Length: -1\r\n\r\n"], b"400", b"Invalid HTTP request received."),
        ([b"\x16\x03\x01 this is TLS"], b"400", b"Invalid HTTP request received."),
    ],
)
def test_bodies_and_headers_that_do_not_end_are_answered_and_the_connection_closed(port, sent, status, message):
    received = raw(port, *sent)
    assert received.startswith(b"HTTP/1.1 " + status)
    assert message in received
    assert b"connection: close" in received
    assert ask(port, "GET", "/v2/health/ready")[0] == 200


def test_a_connection_that_sends_nothing_is_closed(port):
    assert raw(port) == b""


def test_a_client_that_leaves_in_its_request_leaves_nothing(port):
    for part in (POST, POST + b"Content-Length: 9\r\n\r\nabc"):
        with socket.create_connection((HOST, port)) as client:
            client.sendall(part)
    assert ask(port, "POST", "/predict", png())[0] == 200
    assert metric(port, QUEUE) == 0


def test_bodies_together_are_bounded(engine, checkpoint):
    body = bytes(1000)
    with serving({"tiny": engine}, checkpoint, max_batch=1, max_body=1000, body_timeout_s=60) as port:
        clients = [socket.create_connection((HOST, port)) for _ in range(8)]
        for client in clients:  # all but the last byte, eight times: the most that is held
            client.sendall(POST + b"Content-Length: 1000\r\n\r\n" + body[:-1])
        whole = POST + b"Connection: close\r\nContent-Length: 1000\r\n\r\n" + body
        while not (received := raw(port, whole)).startswith(b"HTTP/1.1 503"):
            pass
        assert b"retry-after: 1" in received.lower()
        for client in clients:
            client.sendall(b"x")
            assert client.recv(12) == b"HTTP/1.1 400"  # no image
            client.close()
        assert raw(port, whole).startswith(b"HTTP/1.1 400")


def test_a_token_is_needed_if_there_is_one(engine, checkpoint):
    token = "0123456789abcdef"
    with serving({"tiny": engine}, checkpoint, max_batch=1, token=token) as port:
        for headers in ({}, {"Authorization": token}, {"Authorization": f"Bearer {token}x"}, {"Authorization": "é"}):
            status, found, body = ask(port, "POST", "/predict", png(), headers)
            assert (status, found["www-authenticate"], found["connection"]) == (401, "Bearer", "close")
            assert json.loads(body) == {"error": "authorization: the token is missing or wrong"}
        assert ask(port, "GET", "/metrics")[0] == 401
        assert ask(port, "GET", "/v2/health/live")[0] == 200
        assert ask(port, "POST", "/predict", png(), {"Authorization": f"Bearer {token}"})[0] == 200


def test_metrics_count_requests_images_and_batches(engine, checkpoint):
    with serving({"tiny": engine}, checkpoint, max_batch=4) as port:
        two = np.concatenate([ONE, ONE])
        assert infer(port, "tiny", {"inputs": [tensor(two)]}, two.tobytes())[0] == 200
        ask(port, "POST", "/predict", b"no image")
        ask(port, "GET", "/a/path/that/is/not/there")
        count = 'dvit_requests_total{endpoint="%s",model="%s",status="%s"}'
        assert metric(port, count % ("infer", "tiny", 200)) == 1
        assert metric(port, count % ("predict", "tiny", 400)) == 1
        assert metric(port, count % ("other", "", 404)) == 1
        assert metric(port, 'dvit_images_total{model="tiny"}') == 2
        assert metric(port, 'dvit_batch_images_bucket{le="2.0",model="tiny"}') == 1
        assert metric(port, 'dvit_batch_images_bucket{le="1.0",model="tiny"}') == 0
        assert metric(port, 'dvit_request_seconds_count{endpoint="infer",model="tiny"}') == 1
        assert metric(port, "process_resident_memory_bytes") > 0


def test_nothing_is_left_running(engine, checkpoint):
    before = set(threading.enumerate())
    with serving({"tiny": engine}, checkpoint, max_batch=1) as port:
        assert ask(port, "POST", "/predict", png())[0] == 200
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "batcher"]
    with pytest.raises(ConnectionRefusedError):
        ask(port, "GET", "/v2/health/live")
