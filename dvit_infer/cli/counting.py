"""A progress bar over many images: count, rate and remaining time."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from dvit_infer.cli.common import check_interrupt


@contextlib.contextmanager
def counting(what: str, count: Callable[[], int], *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr; the block calls the yielded function with the number of further images done.

    Nothing is shown, and `count`, which returns the total, is not called, if stderr is no terminal or `shown` is False.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda more: check_interrupt()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f} images/s" if task.speed else "")

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    # Keep print on stdout: rich would redirect it to stderr.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task(what, total=None)
        bar.update(task, total=count())

        def advance(more: int) -> None:
            check_interrupt()
            bar.advance(task, more)

        yield advance
