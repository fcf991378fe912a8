"""Measure dvit-serve over loopback: throughput, latency under load, memory, and what a killed worker loses.

    PYTHONPATH=.:kernels python bench/serve.py [--parts throughput,latency,kill,memory] [--models deit-s,digits]

Clients share the CPUs with the server. Throughput: `hey` (Debian's package) keeps 32 requests in flight; its rounds
alternate with dvit-bench's, and ratios are of one round. Latency: hey and wrk wait for an answer before they send the
next request, so that a slow server is asked less often; here requests arrive at random times (Poisson), at 80% of the
throughput, whether or not earlier ones are answered, and latency counts from the time of arrival.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
import torch
from PIL import Image

from dvit_infer.benchmark.results import environment, write_json
from dvit_infer.models.example import example_checkpoint

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "bench" / "proof" / "digits-0.7.pth"
CLIENTS, LOAD = 32, 0.8
BATCHES = {"deit-s": "8,16,32", "digits": "32,64,128"}


class Post(NamedTuple):
    """A request that is sent again and again."""

    kind: str
    path: str
    headers: dict[str, str]
    body: bytes


class Served(NamedTuple):
    url: str
    process: "subprocess.Popen[str]"
    workers: list[int]


def posts(name: str, size: int) -> list[Post]:
    """Return an image file (JPEG, 256 pixels; of digits PNG, as large as the model sees it), and a binary tensor."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file, side = io.BytesIO(), 256 if size > 64 else size
    Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG" if size > 64 else "PNG")
    tensor = np.zeros((1, 3, size, size), np.uint8)
    sent = {"name": "images", "datatype": "UINT8", "shape": list(tensor.shape)}
    text = json.dumps({"inputs": [sent | {"parameters": {"binary_data_size": tensor.nbytes}}]}).encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    return [
        Post("image file", "/predict", {}, file.getvalue()),
        Post("binary tensor", f"/v2/models/{name}/infer", length, text + tensor.tobytes()),
    ]


@contextlib.contextmanager
def server(model: str, *options: str) -> Iterator[Served]:
    """Run dvit-serve without a log of requests until the block ends."""
    workers = int(options[options.index("--workers") + 1]) if "--workers" in options else 1
    command = [sys.executable, "-m", "dvit_infer.cli.serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, process_group=0)
    assert process.stderr is not None
    ready: list[dict[str, Any]] = []
    try:
        while len(ready) < workers:
            line = process.stderr.readline()
            if not line:
                raise SystemExit(f"dvit-serve ended with status {process.wait()}")
            if line.startswith("{") and (said := json.loads(line))["message"] == "ready":
                ready.append(said)
        yield Served(f"http://127.0.0.1:{ready[0]['port']}", process, [line["pid"] for line in ready])
    finally:
        process.terminate()
        process.communicate()


def best_batch(model: str, batches: str, seconds: float) -> float:
    """Return the images/s of dvit-bench's best batch."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        options = ["--batch", batches, "--compare", "dense", "--seconds", f"{seconds}", "--json", out.name]
        command = [sys.executable, "-m", "dvit_infer.cli.bench", model, *options]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        rows = json.loads(Path(out.name).read_text())["rows"]
    return float(max(row["images_per_s"] for row in rows if row["runtime"] == "engine"))


def hey(url: str, post: Post, *options: str) -> float:
    """Send requests with `hey`; return the answers per second.

    Raises:
        SystemExit: One was not answered by 200.
    """
    with tempfile.NamedTemporaryFile() as body:
        Path(body.name).write_bytes(post.body)
        headers = [word for name, value in post.headers.items() for word in ("-H", f"{name}: {value}")]
        command = ["hey", *options, "-t", "60", "-m", "POST", "-D", body.name, *headers, url + post.path]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    statuses = re.findall(r"\[(\d+)\]\s+\d+ responses", printed)
    if statuses != ["200"] or "Error distribution" in printed:
        raise SystemExit(f"not all requests were answered:\n{printed}")
    found = re.search(r"Requests/sec:\s+([\d.]+)", printed)
    assert found is not None
    return float(found[1])


async def poisson(url: str, post: Post, per_s: float, seconds: float) -> tuple[list[float], int]:
    """Send requests at random times.

    Returns:
        The seconds from each one's time to its answer, and the number of those that were refused (503).
    """
    chance, loop, times, refused = random.Random(0), asyncio.get_running_loop(), [], 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(due: float) -> None:
            nonlocal refused
            async with session.post(url + post.path, data=post.body, headers=post.headers) as answer:
                await answer.read()
            if answer.status == 503:
                refused += 1
                return
            answer.raise_for_status()
            times.append(loop.time() - due)

        asked, due, end = [], loop.time(), loop.time() + seconds
        while due < end:
            due += chance.expovariate(per_s)
            await asyncio.sleep(due - loop.time())
            asked.append(asyncio.create_task(ask(due)))
        await asyncio.gather(*asked)
    return times, refused


async def kill_one(served: Served, post: Post, seconds: float) -> dict[str, int]:
    """Keep requests in flight, and kill a worker halfway; return how many were answered, and how many broke off."""
    counts: dict[str, int] = {}
    end = time.monotonic() + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            while time.monotonic() < end:
                try:
                    async with session.post(served.url + post.path, data=post.body, headers=post.headers) as answer:
                        await answer.read()
                        what = f"answered {answer.status}"
                except aiohttp.ClientError as error:
                    what = f"no answer: {type(error).__name__}"
                counts[what] = counts.get(what, 0) + 1

        clients = [asyncio.create_task(client()) for _ in range(CLIENTS)]
        await asyncio.sleep(seconds / 2)
        os.kill(served.workers[0], signal.SIGKILL)
        await asyncio.gather(*clients)
    return counts


def resident_mib(served: Served) -> float:
    """Return the resident memory of the server, in MiB."""
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def throughput(name: str, model: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    ratios: dict[str, list[tuple[float, float]]] = {}
    for _ in range(given.rounds):
        alone = best_batch(model, BATCHES[name], given.seconds)
        with server(model, "--no-access-log") as served:
            for post in posts(Path(model).stem, given.sizes[name]):
                hey(served.url, post, "-z", "2s", "-c", f"{CLIENTS}")
                found = hey(served.url, post, "-z", f"{given.seconds:g}s", "-c", f"{CLIENTS}")
                ratios.setdefault(post.kind, []).append((found, alone))
    for kind, pairs in ratios.items():
        yield {
            "what": f"throughput, {kind}, {CLIENTS} clients",
            "images_per_s": statistics.median(found for found, _ in pairs),
            "best_batch_images_per_s": statistics.median(alone for _, alone in pairs),
            "ratio": statistics.median(found / alone for found, alone in pairs),
        }


def latency(name: str, model: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with server(model, "--no-access-log") as served:
        for post in posts(Path(model).stem, given.sizes[name]):
            most = hey(served.url, post, "-z", f"{given.seconds:g}s", "-c", f"{CLIENTS}")
            times, refused = asyncio.run(poisson(served.url, post, LOAD * most, 2 * given.seconds))
            p50, p99 = np.percentile(times, [50, 99]) * 1e3
            yield {
                "what": f"latency, {post.kind}, {LOAD:.0%} of {most:.0f} images/s",
                **{"answered": len(times), "refused": refused, "p50_ms": float(p50), "p99_ms": float(p99)},
            }


def kill(name: str, model: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    post = posts(Path(model).stem, given.sizes[name])[0]
    with server(model, "--no-access-log", "--workers", "2") as served:
        yield {"what": "one of 2 workers killed", **asyncio.run(kill_one(served, post, given.seconds))}


def memory(name: str, model: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with server(model, "--no-access-log") as served:
        post, done = posts(Path(model).stem, given.sizes[name])[0], 0
        row: dict[str, Any] = {"what": "resident MiB after requests", "0": resident_mib(served)}
        for share in (0.1, 0.25, 0.5, 1.0):
            count = int(given.requests * share) - done
            hey(served.url, post, "-n", f"{count}", "-c", f"{CLIENTS}")
            done += count
            row[f"{done}"] = resident_mib(served)
        yield row


PARTS = {"throughput": throughput, "latency": latency, "kill": kill, "memory": memory}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--models", default="deit-s,digits")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of throughput")
    parser.add_argument("--requests", type=int, default=100_000, help="of the memory part, digits only")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    given.sizes = {"deit-s": 224, "digits": 64}
    if shutil.which("hey") is None:
        raise SystemExit("hey is not here; run apt-get install hey")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"deit-s": f"{folder}/deit-s.pth", "digits": str(DIGITS)}
        torch.save(example_checkpoint("dynamicvit-deit-s"), models["deit-s"])
        for part in given.parts.split(","):
            for name in given.models.split(",") if part != "memory" else ["digits"]:
                for row in PARTS[part](name, models[name], given):
                    rows.append({"model": name, **row})
                    shown = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                    print(f"{name}: {shown}", flush=True)
    if given.json is not None:
        write_json(given.json, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
