"""What a search has found so far, in a file, so that an interrupted one resumes."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dvit_infer.errors import InputError
from dvit_infer.tuning.quality import Tally
from dvit_infer.tuning.search import Found
from dvit_infer.utils.files import atomic_write, cache_folder

VERSION = 1


def key_of(parts: Sequence[bytes | str]) -> str:
    """Return a digest of what a search depends on."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        one = part.encode() if isinstance(part, str) else part
        digest.update(len(one).to_bytes(8, "little") + one)
    return digest.hexdigest()


class SearchFile:
    """The file of one search; without a path it is in the user's cache folder.

    A file of another search, or one that cannot be read, counts as none.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self.path = path or cache_folder() / "tune" / f"{key}.json"
        self._key, self._named = key, path is not None

    def read(self) -> Found | None:
        try:
            content = json.loads(self.path.read_text())
            if content["version"] != VERSION or content["key"] != self._key:
                return None
            tallies = {name: _tally(**fields) for name, fields in content["tallies"].items()}
            return Found(tallies, {name: float(value) for name, value in content["times"].items()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def save(self, found: Found) -> None:
        """Write what is known.

        Raises:
            InputError: it cannot be written, if the caller named the path.
        """
        content = {
            "version": VERSION,
            "key": self._key,
            "tallies": {name: asdict(tally) for name, tally in found.tallies.items()},
            "times": found.times,
        }
        with contextlib.nullcontext() if self._named else contextlib.suppress(OSError, InputError):
            if not self._named:
                self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with atomic_write(self.path, "search") as part:
                part.write_text(json.dumps(content) + "\n")

    def remove(self) -> None:
        """Delete the file, unless the caller named it."""
        if not self._named:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def _tally(images: Any, loss: Any, squares: Any, complete: Any) -> Tally:
    return Tally(int(images), float(loss), float(squares), bool(complete))
