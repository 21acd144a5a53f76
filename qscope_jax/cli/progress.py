"""A progress bar on standard error, with rate and time left; none where no terminal shows it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def token_progress(doing: str, total: int | None, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar of tokens; what it yields is called with the number done so far.

    Args:
        doing: What is done, before the bar.
        total: Tokens in the end, where that is known.
        shown: Whether there is to be a bar at all.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(doing), BarColumn(), TextColumn("{task.completed:,.0f} tokens"), TextColumn("{task.fields[rate]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    disabled = not (shown and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), disable=disabled, transient=True) as bar:
        task = bar.add_task("", total=total, rate="")

        def advance(done: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, completed=done, rate=f"{speed:,.0f} tokens/s" if speed else "")

        yield advance


@contextmanager
def count_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of things; what it yields takes the number done and the number of all."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
