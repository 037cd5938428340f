"""How far the loading of a model is: a bar on a terminal, elsewhere a line now and then, and what it came to."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

LINE_SECONDS = 10


class ReadProgress:
    """A context that is told of elements done, out of `total`, and asks `bytes_read` what they took."""

    def __init__(self, what: str, total: int, bytes_read: Callable[[], int], shown: bool) -> None:
        self._what, self._total, self._bytes_read, self._shown = what, total, bytes_read, shown
        self._done = 0
        self._began = self._last_line = time.monotonic()
        console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if shown and console.is_terminal and not console.is_dumb_terminal:
            columns = (TaskProgressColumn(), BarColumn(bar_width=None), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console, expand=True, transient=True)
            self._task = self._bar.add_task(f"loading {what}", total=total)

    def advance(self, elements: int) -> None:
        """Count elements as done."""
        self._done += elements
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=f"loading, {self._figures()}")
        elif self._shown and now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print(f"loading {self._what}: {self._done / self._total:.0%}, {self._figures()}", flush=True)

    def _figures(self) -> str:
        return f"{self._bytes_read() / 1e9:.2f} GB read in {time.monotonic() - self._began:.1f} s"

    def __enter__(self) -> "ReadProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._shown and kind is None:
            print(f"loaded {self._what}: {self._figures()} by rank 0", flush=True)
