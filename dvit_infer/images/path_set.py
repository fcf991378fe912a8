"""Sets of names that may not fit in memory, in a private temporary database that spills to disk."""

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator


class Names:
    """A set of file names, each with a flag, ordered by bytes. It takes some megabytes of memory at any size.

    Raises:
        OSError: A method failed, e.g. the temporary folder is full.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # on disk, deleted when it is closed
        self._run("CREATE TABLE names (name BLOB PRIMARY KEY, flag INTEGER) WITHOUT ROWID")
        self._run("BEGIN")  # never committed: nobody else reads it, and it need not be durable

    def add(self, named: Iterable[tuple[str, bool]]) -> None:
        """Add names; an existing name gets the new flag."""
        for name, flag in named:  # as bytes: SQLite's text is UTF-8, but a file name need not be
            self._run("INSERT OR REPLACE INTO names VALUES (?, ?)", os.fsencode(name), flag)

    def get(self, name: str) -> bool | None:
        """Return the flag of a name; None if it is not in the set."""
        row = self._run("SELECT flag FROM names WHERE name = ?", os.fsencode(name)).fetchone()
        return None if row is None else bool(row[0])

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        for name, flag in self._run("SELECT name, flag FROM names ORDER BY name"):
            yield os.fsdecode(name), bool(flag)

    def _run(self, command: str, *values: bytes | bool) -> sqlite3.Cursor:
        try:
            return self._database.execute(command, values)
        except sqlite3.Error as error:
            raise OSError(errno.ENOSPC, f"temporary database: {error}", tempfile.gettempdir()) from None
