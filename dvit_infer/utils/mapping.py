"""Files mapped into memory: give back pages that have been read and are not needed now (Linux)."""

import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

_DONT_NEED = 4  # madvise


def release_file(path: Path) -> None:
    """Let the system take back the pages of a file that is mapped read-only and shared.

    Whatever is needed again is read again.
    """
    name = os.path.realpath(path)
    for start, end, permissions, mapped in _mappings():
        if mapped == name and permissions == "r--s":
            _advise(start, end)


def release_part(start: int, size: int) -> None:
    """Let the system take back the pages that lie wholly within an address range, if it is that of a mapped file.

    The caller knows that nobody has written to it: in a private mapping that would be lost.
    """
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if first < last and any(lo <= first and last <= hi and name.startswith("/") for lo, hi, _, name in _mappings()):
        _advise(first, last)


@contextlib.contextmanager
def released_meanwhile(path: Path | None, seconds: float = 0.05) -> Iterator[None]:
    """Call `release_file` again and again while other code reads a file; None: nothing is done."""
    if path is None:
        yield
        return
    done = threading.Event()

    def work(path: Path) -> None:
        while not done.wait(seconds):
            release_file(path)

    thread = threading.Thread(target=work, args=(path,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release_file(path)


def _mappings() -> Iterator[tuple[int, int, str, str]]:
    """Yield start, end, permissions and file of every mapping of this process; none where the system does not say."""
    with contextlib.suppress(OSError), open("/proc/self/maps") as lines:
        for line in lines:
            span, permissions, _, _, _, *name = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(bound, 16) for bound in span.split("-"))
            yield start, end, permissions, name[0] if name else ""


def _advise(start: int, end: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # no such function
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONT_NEED)
