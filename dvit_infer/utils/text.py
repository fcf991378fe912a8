"""Words for messages."""

from collections.abc import Sequence

NAMED = 3  # names that a message shows


def listed(names: Sequence[str]) -> str:
    """Return the first names for a message."""
    return ", ".join(f"{name!a}" for name in names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def plural(count: int, noun: str) -> str:
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending if count != 1 else ''}"
