"""dvit-serve: what it refuses to start with, how it ends, and what becomes of its workers."""

import contextlib
import http.client
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from commands import ENV, ROOT, TINY, fails
from drawn import draw
from served import HOST, ask, metric, wait_for

from dvit_infer.cli import serve as command

pytestmark = pytest.mark.usefixtures("_empty_folder")
ANY_PORT = ["--port", "0"]
DIGITS = ROOT / "bench" / "proof" / "digits-0.7.pth"


def png(seed: int) -> bytes:
    file = io.BytesIO()
    draw(seed).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["missing.pth"], r"missing\.pth: "),
        (["a/m.pth", "b/m.pth"], r"model: a/m\.pth and b/m\.pth are both named m; give one another: NAME=FILE"),
        (["a=m.pth", "a=n.pth"], r"model: m\.pth and n\.pth are both named a"),
        (["a b.pth"], r"model: a b\.pth: 'a b' cannot be a name in a URL; give one: NAME=a b\.pth"),
        (["m.pth", "--port", "65536"], r"port: 65536 is none; 0 to 65535"),
        (["m.pth", "--host", "192.0.2.1"], r"--host: 192\.0\.2\.1: Cannot assign requested address"),
        (["m.pth", "--host", "no.such.invalid"], r"--host: no\.such\.invalid: "),
        (["m.pth", "--workers", "0"], r"--workers: 0 processes cannot serve; 1 to 64 can"),
        (["m.pth", "--max-batch", "0"], r"--max-batch: 0; 1 or more is expected"),
        (["m.pth", "--max-delay-ms", "nan"], r"--max-delay-ms: nan; 0 or more is expected"),
        (["m.pth", "--max-queue", "3"], r"--max-queue: 3; 64, a batch, to 1048576 are expected"),
        (["m.pth", "--timeout", "0"], r"--timeout: 0; 0\.001 or more is expected"),
        (["m.pth", "--max-pixels", "1000000000"], r"--max-pixels: 1000000000 is over the bound"),
        (["m.pth", "--max-body", "1e9"], r"argument --max-body: invalid int value: '1e9'"),
        (["m.pth", "--token-file", "none"], r"--token-file: none: No such file or directory"),
        (["m.pth", "--token-file", os.devnull], r"--token-file: /dev/null: one line of at least 16 characters"),
    ],
)
def test_what_cannot_be_served(argv, message, capsys):
    port = [] if "--port" in argv else ANY_PORT
    assert re.match(rf"error: (--)?{message}", fails(command, [*argv, *port], capsys))


def test_a_busy_port(capsys):
    with socket.create_server((HOST, 0)) as other:
        port = other.getsockname()[1]
        line = fails(command, ["m.pth", "--port", port], capsys)
    assert line == f"error: --port: {port}: Address already in use; choose another, or 0 for any that is free\n"


def test_without_the_extra(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    line = fails(command, ["m.pth"], capsys)
    assert line == "error: dvit-serve needs uvicorn, not installed; run pip install 'dvit-infer[serve]'\n"


class Served:
    """A running dvit-serve: its lines are read as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines, self._more = process, [], threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._more:
                self.lines.append(json.loads(line) if line.startswith("{") else line)
                self._more.notify()
        with self._more:
            self.lines.append(None)  # the end: no process has its end of the pipe any more
            self._more.notify()

    def said(self, message: str, count: int = 1) -> list[dict]:
        """Wait until there are so many lines with a message; return them."""

        def found() -> list[dict]:
            return [line for line in self.lines if isinstance(line, dict) and line["message"] == message]

        with self._more:
            assert self._more.wait_for(lambda: len(found()) >= count or None in self.lines, 120)
        assert len(found()) >= count, self.lines
        return found()

    def ended(self) -> int:
        """Wait until it and everything that it started has ended; its exit status."""
        with self._more:
            assert self._more.wait_for(lambda: None in self.lines, 120), "something is left running"
        return self.process.wait(60)


@contextlib.contextmanager
def started(*argv: str) -> Iterator[Served]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dvit_infer.cli.serve", *map(str, argv), *ANY_PORT],
        stderr=subprocess.PIPE,
        text=True,
        env={**ENV, "TMPDIR": os.getcwd()},  # the metrics of workers
        process_group=0,
    )
    served = Served(process)
    try:
        yield served
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        served._reader.join()
        process.stderr.close()


@pytest.mark.slow
def test_sigterm_lets_it_finish_what_it_took(checkpoint):
    with started(checkpoint, *TINY, "--image-size", "64", "--max-delay-ms", "60000", "--max-batch", "4") as served:
        port = served.said("ready")[0]["port"]
        statuses = []
        clients = [
            threading.Thread(target=lambda seed=seed: statuses.append(ask(port, "POST", "/predict", png(seed))[0]))
            for seed in range(3)
        ]
        for client in clients:
            client.start()
        wait_for(port, 'dvit_queue_images{model="tiny"}', 3)  # one more would fill the batch
        served.process.send_signal(signal.SIGTERM)
        for client in clients:
            client.join()
        assert statuses == [200] * 3
        assert served.ended() == 0


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_no_answer_is_lost(checkpoint, engine_lines):
    """Clients that ask again where a connection broke get every answer, and each the expected one."""
    with started(checkpoint, *TINY, "--image-size", "64", "--workers", "2") as served:
        workers = served.said("ready", 2)
        assert served.said("serving")[0]["workers"] == 2
        port, broken, answers, done = workers[0]["port"], [], [], threading.Event()

        def ask_on(seed: int) -> None:
            while not done.is_set():
                try:
                    answers.append((seed, *ask(port, "POST", f"/predict?image={seed}", png(seed))))
                except (ConnectionError, http.client.RemoteDisconnected):
                    broken.append(seed)

        clients = [threading.Thread(target=ask_on, args=(seed,)) for seed in range(4)]
        for client in clients:
            client.start()
        os.kill(workers[0]["pid"], signal.SIGKILL)
        replaced = served.said("ready", 3)[2]
        assert replaced["pid"] not in [worker["pid"] for worker in workers]
        done.set()
        for client in clients:
            client.join()
        assert {status for _, status, _, _ in answers} == {200}
        assert {body.decode() for _, _, _, body in answers} == {engine_lines[seed] for seed in range(4)}
        count = metric(port, 'dvit_requests_total{endpoint="predict",model="tiny",status="200"}')
        assert count >= len(answers)  # of all processes, the dead one too
        assert len(broken) <= len(clients)  # at most the one request that each had in the killed process
        assert {line["pid"] for line in served.said("a worker died; starting another")} == {workers[0]["pid"]}
        served.process.kill()  # without a supervisor, workers end by themselves
        served.ended()


@pytest.fixture(scope="module")
def engine_lines(checkpoint, tmp_path_factory) -> list[str]:
    """What dvit-predict prints for the images of four seeds, named by them."""
    import dvit_infer as dvit
    from dvit_infer.evaluate.predictions import model_id, predict
    from dvit_infer.models.preprocessing import preprocess_for

    engine = dvit.convert(checkpoint, device="cpu", image_size=64, assume={"num_heads": 2})
    folder = tmp_path_factory.mktemp("seeds")
    paths = [folder / str(seed) for seed in range(4)]
    for seed, path in enumerate(paths):
        path.write_bytes(png(seed))
    identity = model_id(engine, checkpoint, preprocess_for(engine.config))
    found = next(predict(engine, list(map(str, paths)), workers=0))
    return [p.line(identity, engine.labels).replace(f"{folder}/", "") + "\n" for p in found]


@pytest.mark.slow
def test_workers_that_cannot_start_are_one_error(checkpoint):
    with started("missing.pth", "--workers", "2") as served:
        assert served.ended() == 2
        assert re.fullmatch(r"error: missing\.pth: [^\n]+\n", served.lines[-2])
        assert not [line for line in served.lines if isinstance(line, str) and "Traceback" in line]


@pytest.mark.slow
def test_a_second_interrupt_does_not_wait_for_a_slow_sender():
    with started(DIGITS) as served:
        port = served.said("ready")[0]["port"]
        with socket.create_connection((HOST, port)) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
            ask(port, "POST", "/predict", png(0))  # when it is answered, the other was taken too
            for _ in range(2):
                served.process.send_signal(signal.SIGINT)
                served.said("Shutting down")
            assert served.ended() == 0
