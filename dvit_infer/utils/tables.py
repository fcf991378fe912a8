"""Tables as plain text."""

from collections.abc import Iterable, Sequence
from io import StringIO


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, total: Sequence[str] | None = None
) -> str:
    """Return a plain-text table, at most 160 characters wide. A column whose name begins with '>' is right-aligned."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    for name in columns:
        drawn.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left")
    for row in rows:
        drawn.add_row(*row)
    if total is not None:
        drawn.add_section()
        drawn.add_row(*total)
    text = StringIO()
    # Cells may contain text from a file, which must not be read as markup.
    Console(file=text, width=160, force_terminal=False, markup=False, emoji=False, highlight=False).print(drawn)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())
