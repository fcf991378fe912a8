"""Sets of names that may not fit in memory: a private temporary database, which goes to disk when it grows."""

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator


class Names:
    """File names, each with a flag. Takes some megabytes of memory, however many there are; ordered by their bytes.

    Raises:
        OSError: from every method, when the temporary folder is full, say.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # on disk, deleted when it is closed
        self._run("CREATE TABLE names (name BLOB PRIMARY KEY, flag INTEGER) WITHOUT ROWID")
        self._run("BEGIN")  # never ended: nobody else reads it, and nothing has to be safe on the disk

    def add(self, named: Iterable[tuple[str, bool]]) -> None:
        """Add names; one that is there already gets the new flag."""
        for name, flag in named:  # as bytes: SQLite's text is UTF-8, which a file's name need not be
            self._run("INSERT OR REPLACE INTO names VALUES (?, ?)", os.fsencode(name), flag)

    def get(self, name: str) -> bool | None:
        """The name's flag; None if it is not there."""
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
