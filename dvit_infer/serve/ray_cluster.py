"""A Ray cluster: connect to one, or start one on this machine; which engines fit on it."""

import contextlib
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.utils.partial import remove_left_over
from dvit_infer.utils.threads import num_threads

LOCAL = "local"  # the address of a cluster that is started here
CPUS = 2  # of an engine on a CPU: more engines of few threads do more than few of many
_REACHED_S = 5.0
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # of gRPC, which Ray speaks
_AWAY = "HOST:PORT of a cluster's head is expected, or auto, for the one of this machine"


@contextlib.contextmanager
def cluster(address: str) -> Iterator[None]:
    """Connect to a cluster until the block ends.

    Args:
        address: HOST:PORT of its head; "auto": of the one that runs on this machine; "local": one is started, and
            stopped at the end of the block.

    Raises:
        InputError: There is none at the address, or it is of another version.
    """
    import ray

    given: dict[str, Any] = {"num_cpus": num_threads(), "include_dashboard": False} if address == LOCAL else {}
    if address != LOCAL:
        address = _found(address)
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster here: Ray's is 15, this command's is its user's
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **given)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        ray.shutdown()
        why = " ".join(str(error).split()) or "is no cluster of this version of Ray"
        raise InputError(f"ray: {address}: {why:.300}; {_AWAY}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's own would end this process without a word
    try:
        yield
    finally:
        ray.shutdown()
        remove_left_over(Path(tempfile.gettempdir()))  # of its actors on this machine


def _found(address: str) -> str:
    """Return the address HOST:PORT of a cluster.

    Raises:
        InputError: No server like Ray's answers there. Ray itself would wait for minutes.
    """
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
        if not address:  # where Ray notes the last cluster that was started
            with contextlib.suppress(OSError):
                address = Path(tempfile.gettempdir(), "ray", "ray_current_cluster").read_text().strip()
        if not address:
            raise InputError(f"ray: auto: no cluster runs on this machine; {_AWAY}")
    host, colon, port = address.rpartition(":")
    if "://" in address:
        raise InputError(f"ray: {address}: run this on a node of the cluster, without Ray's client; {_AWAY}")
    if not colon or not port.isdecimal():
        raise InputError(f"ray: {address}: is no address; {_AWAY}")
    try:
        with socket.create_connection((host, int(port)), _REACHED_S) as connection:
            connection.sendall(_HELLO)
            if connection.recv(9)[3:4] != _HELLO[-6:-5]:  # a frame of settings, in answer to ours
                raise OSError("is no cluster of Ray")
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error) or "nobody answers"
        raise InputError(f"ray: {address}: {why}; {_AWAY}") from None
    return address


def engines_for(nodes: Sequence[Mapping[str, Any]], device: str | None) -> list[dict[str, int]]:
    """Return what each engine on a cluster needs, as options of an actor.

    One engine a GPU if there are any, else one for every two CPUs of a node.

    Args:
        nodes: as `ray.nodes()` lists them.
        device: as for `convert`.

    Raises:
        InputError: No node has what the device needs.
    """
    there = [node["Resources"] for node in nodes if node["Alive"]]
    kind = None if device is None else device.partition(":")[0]
    if device is not None and kind == "cuda" and device != kind:
        raise InputError(f"device: {device}; on a cluster, Ray gives every engine its GPU: cuda is expected")
    gpus = sum(int(node.get("GPU", 0)) for node in there)
    if gpus and kind in (None, "cuda"):
        return [{"num_gpus": 1, "num_cpus": 1}] * gpus
    if kind == "cuda":
        raise InputError("device: cuda; no node of the cluster has a GPU")
    cpus = [int(node.get("CPU", 0)) for node in there]
    engines = [{"num_cpus": min(CPUS, count)} for count in cpus for _ in range(max(1, count // CPUS)) if count]
    if not engines:
        raise InputError("ray: no node of the cluster has a CPU for tasks")
    return engines


def decoders_for(nodes: Sequence[Mapping[str, Any]], engines: Sequence[Mapping[str, int]], workers: int | None) -> int:
    """Return how many processes decode at a time, by default one an engine, and on GPUs as many as CPUs are left.

    Raises:
        InputError: `workers` is less than one.
    """
    if workers is not None:
        if workers < 1:
            raise InputError(f"workers: {workers} processes cannot decode for a cluster; 1 or more can")
        return workers
    cpus = sum(int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"])
    return max(1, cpus - len(engines)) if on_gpus(engines) else len(engines)


def on_gpus(engines: Sequence[Mapping[str, int]]) -> bool:
    """Return whether the engines are on GPUs."""
    return "num_gpus" in engines[0]
