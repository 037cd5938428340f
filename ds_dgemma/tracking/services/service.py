"""What the services have in common: what goes wrong after the start costs the curve and never the training."""

import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ds_dgemma.errors import UserError
from ds_dgemma.tracking.metrics import Record

Rows = list[dict[str, Any]]


class Service(ABC):
    """A sink under the names of `metrics.jsonl`; a record of another kind becomes `kind/name`.

    A service can't forget: after a resume it skips what is older than `newest`, the newest step that it has.
    """

    def __init__(self, newest: int = 0) -> None:
        self._newest, self._broken = newest, False

    @abstractmethod
    def log(self, values: dict[str, Any], step: int) -> None:
        """Take the figures, words and tables (`Rows`) of one record; may raise anything."""

    @abstractmethod
    def finish(self, failed: bool) -> None:
        """Send what is left, for a bounded time; may raise anything."""

    def write(self, record: Record) -> None:
        """Log one record."""
        step = int(record["step"])
        if self._broken or step < self._newest:
            return
        self._newest = step
        prefix = f"{record['kind']}/" if "kind" in record else ""
        named = {prefix + key: value for key, value in record.items() if key not in ("kind", "step")}
        try:
            self.log({key: value for key, value in named.items() if value is not None}, step)
        except Exception as error:  # any failure of a service that the training does not need
            self._give_up(error)

    def close(self, failed: bool) -> None:
        """Send what is left."""
        try:
            self.finish(failed)
        except Exception as error:  # as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        name = type(self).__name__
        print(f"{name} stopped: {error}. Training goes on; metrics.jsonl has every step.", file=sys.stderr, flush=True)
        self._broken = True


def columns(rows: Rows) -> list[str]:
    """The names in the rows of a table, in the order in which they come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def with_tables(values: dict[str, Any], table: Callable[..., Any]) -> dict[str, Any]:
    """The values of a record, each table as the service's own, of `columns` and `data`."""

    def made(rows: Rows) -> Any:
        names = columns(rows)
        return table(columns=names, data=[[row.get(name) for name in names] for row in rows])

    return {key: made(value) if isinstance(value, list) else value for key, value in values.items()}


def package(module: str, setting: str, extra: str) -> ModuleType:
    """A service's package, which is slow to import and pointless where the service is off.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{setting} is set, but {extra} cannot be imported ({error}). "
            f"pip install 'ds-dgemma[{extra}]', or leave the setting out."
        ) from error
