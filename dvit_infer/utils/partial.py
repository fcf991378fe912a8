"""Hidden folders for files that are being written, and the removal of those whose writer was killed.

A folder `.NAME.XXXXXXXX.part` holds a lock file besides what is written. Its writer keeps the lock file locked; the
system unlocks it when the writer ends, however it ends, so the number of a process, which comes back, decides nothing.
"""

import contextlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be deleted
    fcntl = None  # type: ignore[assignment]

_LOCK = "writer.lock"
_NAME = re.compile(r"\..*\.\w{8}\.part")
_LONG = 24 * 3600.0  # seconds after which a folder of another machine is nobody's any more


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder in a new hidden one beside `target`; at the end, delete both.

    Before, those of killed writers are deleted.
    """
    remove_left_over(target.parent)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:50]}.", suffix=".part", dir=target.parent))
    lock = -1
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can lock it, and it stays
            _lock(lock)
        os.write(lock, _system().encode())  # only now: an empty file is one whose writer is about to lock it
        (folder / "files").mkdir()
        yield folder / "files"
    finally:
        _remove(folder, lock)


def remove_left_over(parent: Path) -> None:
    """Delete the hidden folders in `parent` whose writer is gone.

    What cannot be told, is not ours, or cannot be deleted stays. On a network file system locks may hold on one machine
    alone, so that a folder of another machine, or from before a restart, goes only if it was not touched for a day.
    """
    with contextlib.suppress(OSError):
        for entry in os.scandir(parent):
            if _NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                with contextlib.suppress(OSError):
                    _remove_if_left_over(Path(entry.path))


def _remove_if_left_over(folder: Path) -> None:
    lock = os.open(folder / _LOCK, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        if os.read(lock, 200).decode(errors="replace") != _system():
            touched = max(os.lstat(path).st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - touched < _LONG:
                raise OSError("may have a writer elsewhere")
        _lock(lock)  # fails while the writer lives
    except OSError:
        os.close(lock)
        raise
    if fcntl is None:
        os.close(lock)
        os.remove(folder / _LOCK)  # fails while the writer lives
        lock = -1
    _remove(folder, lock)


def _remove(folder: Path, lock: int) -> None:
    """Delete a folder and close its lock file, which some systems let nobody delete while it is open."""
    shutil.rmtree(folder / "files", ignore_errors=True)
    if fcntl is not None:
        shutil.rmtree(folder, ignore_errors=True)
    if lock >= 0:
        os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)


def _lock(file: int) -> None:
    """Lock an open file.

    Raises:
        OSError: another process holds the lock, or the file system has none.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _system() -> str:
    """Return a name of the running system, equal in all its containers and different after a restart, where known."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()
