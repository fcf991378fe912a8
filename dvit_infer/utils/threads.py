"""The number of threads for arithmetic on a CPU: as many as this process may use, not as many as the machine has.

PyTorch takes a thread for every core of the machine that its affinity mask allows, and knows nothing of the CPU quota
of a container. With more threads than the quota pays for, the kernel stops all of them for the rest of each period
(100 ms), and threads that wait for stopped ones at a barrier spend the quota by spinning.

Whoever sets OMP_NUM_THREADS (or MKL_NUM_THREADS), or calls `torch.set_num_threads` after the first engine on a CPU was
made, decides: their number is taken as it is.
"""

import functools
import math
import os

import torch

from dvit_infer.utils.cpu_quota import cpu_quota

SETTINGS = "OMP_NUM_THREADS", "MKL_NUM_THREADS"  # of the environment; PyTorch obeys the first of them that is set
_limited = False  # `limit_threads` has run: what PyTorch has since is the limit, or what the user asked for


def allowed_threads() -> int:
    """Return how many threads of this process can run at once: the CPUs of its affinity mask, and its CPU quota.

    A quota with a fraction is rounded down, to at least 1. Rounded up, the threads would use all of it, but would be
    stopped in every period; rounded down, they are not, and the fraction is left to the threads that do no arithmetic.
    """
    quota = _quota()
    return affinity_threads() if quota is None else min(affinity_threads(), quota)


def affinity_threads() -> int:
    """Return the number of CPUs in the affinity mask; of all CPUs on systems without masks."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _quota() -> int | None:
    """Return the whole CPUs of the quota, read once per process."""
    quota = cpu_quota()
    return None if quota is None else max(1, math.floor(quota))


def num_threads() -> int:
    """Return the threads that a backend takes: PyTorch's number, at most `allowed_threads` unless the user chose it."""
    threads = torch.get_num_threads()
    return threads if _limited or _setting() else min(threads, allowed_threads())


def limit_threads() -> int:
    """Lower PyTorch's number of threads to `num_threads`, and return that.

    The number is a setting of the whole process. It is lowered by the first call alone and never raised, so that a
    later `torch.set_num_threads` stays in force.
    """
    global _limited
    threads = num_threads()
    if threads < torch.get_num_threads():
        torch.set_num_threads(threads)
    _limited = True
    return threads


def describe_threads() -> str:
    """Return the number of threads, and the reason if it is not the machine's: '2 threads (of 64: the CPU quota)'."""
    threads, machine = num_threads(), os.cpu_count() or 1
    text = f"{threads} thread{'s' * (threads != 1)}"
    if setting := _setting():
        return f"{text} ({setting})"
    if threads == _quota() and threads < affinity_threads():
        return f"{text} (of {machine}: the container's CPU quota)"
    if threads == affinity_threads() < machine:
        return f"{text} (of {machine}: the affinity mask)"
    return text


def _setting() -> str | None:
    return next((name for name in SETTINGS if os.environ.get(name)), None)
