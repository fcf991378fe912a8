"""Clusters of Ray on this machine, and the processes of commands that use them."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from commands import ENV

STORE = 100 << 20  # bytes of a node's object store
QUIET = {"RAY_memory_monitor_refresh_ms": "0", "RAY_USAGE_STATS_ENABLED": "0"}


@contextlib.contextmanager
def two_nodes(monkeypatch) -> Iterator:
    """A cluster of two nodes of one CPU each, without a dashboard; workers import what the tests do."""
    from ray.cluster_utils import Cluster

    for name, value in {**QUIET, "PYTHONPATH": ENV["PYTHONPATH"]}.items():
        monkeypatch.setenv(name, value)
    node = {"num_cpus": 1, "object_store_memory": STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()


def status(pid: int) -> tuple[int, int]:
    """The parent and the session of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), int(fields[3])


def running() -> dict[int, tuple[int, int]]:
    """The parent and the session of every process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                found[int(name)] = status(int(name))
    return found


def below(pid: int, title: str) -> list[int]:
    """The processes below another whose title begins so."""
    parents, found = {one: parent for one, (parent, _) in running().items()}, []
    for one in parents:
        above = one
        while above in parents and above != pid:
            above = parents[above]
        with contextlib.suppress(OSError):
            if above == pid and Path(f"/proc/{one}/cmdline").read_bytes().startswith(title.encode()):
                found.append(one)
    return found


def of_session(session: int) -> list[int]:
    """The processes of a session, whose number is that of its first process."""
    return [pid for pid, (_, found) in running().items() if found == session]
