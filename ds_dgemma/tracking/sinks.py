"""Where records go: `metrics.jsonl`, the console, and the services in `tracking/services`. Rank 0 has the sinks, every
other rank none.

A sink has two methods: `write(record)` and `close(failed)`. After a resume the run repeats the steps since its
checkpoint: `JsonlSink` forgets the first telling of them.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from ds_dgemma.errors import UserError
from ds_dgemma.files import atomic_file
from ds_dgemma.tracking.metrics import START, Record, StepMetrics, read_lines, to_line

NOT_SHOWN = ("kind", "step", "sampler", "answers")  # on the console


class Sink(Protocol):
    """Something that takes records."""

    def write(self, record: Record) -> None:
        """Take one record."""
        ...

    def close(self, failed: bool) -> None:
        """Release everything; `failed`: the run ends by an exception."""
        ...


class Tracker:
    """Every sink in turn; a context, so that terminal and files are left in order however a run ends.

    What a sink refuses is told to `refused`, for a rank that left a step here would leave the others in it.
    """

    def __init__(self, sinks: Sequence[Sink], refused: Callable[[str], None]) -> None:
        self._sinks, self._refused = sinks, refused

    def track(self, record: StepMetrics | Record) -> None:
        """Hand a step's metrics, or a record of another kind, to every sink."""
        if isinstance(record, StepMetrics):
            flat = record.record()
        else:
            flat = {name: value for name, value in record.items() if value is not None}
        for sink in self._sinks:
            try:
                sink.write(flat)
            except UserError as error:
                self._refused(str(error))

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for sink in self._sinks:
            sink.close(failed=kind is not None)


class JsonlSink:
    """Appends to `metrics.jsonl`, whole lines only; a line is with the kernel, safe from SIGKILL, when `write` returns.

    A line that the disk refuses is kept and tried again with the next and at the end. `patient` says so and goes on;
    otherwise `write` raises, for a run that is not recorded does not go on.
    """

    def __init__(self, path: Path, keep_through_step: int, patient: bool = False) -> None:
        self._path, self._patient = path, patient
        self._pending: list[str] = []
        try:
            if path.exists():
                _cut_back(path, keep_through_step)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"metrics cannot be written: {path}: {error.strerror}.") from error

    def write(self, record: Record) -> None:
        """Append one line, after those that were refused before.

        Raises:
            UserError: the disk refuses.
        """
        self._pending.append(to_line(record))
        try:
            self._append("".join(self._pending).encode())
        except OSError as error:
            if not self._patient:
                raise self._refused(error) from error
            if len(self._pending) == 1:
                print(f"warning: {self._refused(error)} Kept until then.", file=sys.stderr, flush=True)
        else:
            self._pending.clear()

    def close(self, failed: bool) -> None:
        """Close the file.

        Raises:
            UserError: a run that went on could not write its last lines.
        """
        try:
            if self._pending:
                self._append("".join(self._pending).encode())
        except OSError as error:
            if self._patient and not failed:
                raise self._refused(error) from error
        finally:
            self._file.close()

    def _append(self, data: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            while data:  # a disk that fills up takes a part
                data = data[self._file.write(data) :]
        except OSError:
            self._file.truncate(end)
            raise

    def _refused(self, error: OSError) -> UserError:
        return UserError(f"metrics cannot be written: {self._path}: {error.strerror}. Make room.")


def _cut_back(path: Path, keep_through_step: int) -> None:
    """Drop every record after a step, whole or not at all; a start from that step too, for this one tells it again."""
    kept = [
        line
        for line, record in read_lines(path)
        if int(record["step"]) + (record.get("kind") == START) <= keep_through_step
    ]
    with atomic_file(path) as file:
        file.writelines(kept)


class ConsoleSink:
    """A progress bar on a terminal; elsewhere a line for the first, the last and every `every`-th step."""

    def __init__(self, total_steps: int, start_step: int, every: int) -> None:
        self._total_steps = total_steps
        self._every = every
        self._first = True
        self._clock: deque[float] = deque(maxlen=51)  # when the last 50 steps ended, and the one before them
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.description}"),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step)

    def write(self, record: Record) -> None:
        """Show one record; kinds other than a step always get a line of their own."""
        if "kind" in record:
            self._console.print(_other_line(record), markup=False)
            return
        step = int(record["step"])
        left = _duration(self._seconds_left(step, float(record["seconds"])))
        if self._bar is not None:
            self._bar.start()  # not before: loading has a bar of its own
            self._bar.update(self._task, completed=step, description=_bar_text(record, left))
        elif self._first or step == self._total_steps or step % self._every == 0:
            print(_plain_line(record, self._total_steps, left), flush=True)
        self._first = False

    def close(self, failed: bool) -> None:
        """Leave the bar as it stands and restore the cursor."""
        if self._bar is not None:
            self._bar.stop()

    def _seconds_left(self, step: int, step_seconds: float) -> float:
        """Time of the steps left at the pace of the last 50, whatever was done between them included."""
        now = time.monotonic()
        if not self._clock:
            self._clock.append(now - step_seconds)
        self._clock.append(now)
        return (self._total_steps - step) * (now - self._clock[0]) / (len(self._clock) - 1)


def _plain_line(record: Record, total_steps: int, left: str) -> str:
    width = len(str(total_steps))
    return (
        f"step {record['step']:>{width}}/{total_steps}  loss {record['loss']:.4f}  "
        f"diffusion {record['loss_diffusion']:.4f}  ar {record['loss_ar']:.4f}  "
        f"grad {record['grad_norm']:.3g}  lr {record['lr']:.2e}  "
        f"{record['tokens_per_second']:,.0f} tok/s  {left} left"
    )


def _bar_text(record: Record, left: str) -> str:
    return (
        f"loss [bold]{record['loss']:.3f}[/] [dim]diff[/] {record['loss_diffusion']:.3f} "
        f"[dim]ar[/] {record['loss_ar']:.3f} [cyan]{record['tokens_per_second']:,.0f}[/] tok/s {left} left"
    )


def _other_line(record: Record) -> str:
    shown = (
        f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
        for key, value in record.items()
        if key not in NOT_SHOWN
    )
    return f"{record['kind']} at step {record['step']}: " + "  ".join(shown)


def _duration(seconds: float) -> str:
    """Write a duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
