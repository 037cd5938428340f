"""`data.columns`: turns from columns by name, or from templates of them, `{question}\\n{context}`."""

from collections.abc import Collection
from string import Formatter
from typing import Any

from ds_dgemma.config.data import ColumnsSection
from ds_dgemma.data.messages import BadRow, kind_of
from ds_dgemma.data.turns import Turns, history_of, pair_of, string, with_system
from ds_dgemma.errors import did_you_mean

Row = dict[str, Any]  # what of a row no one has read yet
BRACES = "Write {{ for a brace itself."


def map_columns(row: Row, columns: ColumnsSection) -> Turns:
    """Take the mapped columns out of a row. A column of messages is taken as messages.

    Raises:
        BadRow: a column is missing, or holds something else.
    """
    whole = dict(row)  # a column may be named twice
    mapped = [spec for spec in (columns.prompt, columns.response, columns.system, columns.history) if spec is not None]
    for name in {name for spec in mapped for name in _names(spec, whole)}:
        row.pop(name, None)
    turns = pair_of(*(_filled(whole, spec) for spec in (columns.prompt, columns.response)), *map(_label, mapped[:2]))
    if columns.history is not None:
        turns = [*history_of(_filled(whole, columns.history), _label(columns.history)), *turns]
    if columns.system is not None and (words := _filled(whole, columns.system)):
        turns = with_system(turns, string(words, _label(columns.system)))
    return turns


def _label(spec: str) -> str:
    return f"{'template' if '{' in spec else 'column'} {spec}"


def _names(spec: str, row: Row) -> list[str]:
    """The columns that a mapping names."""
    if spec in row or "{" not in spec:
        return [spec]
    return [name for _, name, _, _ in _pieces(spec) if name is not None]


def _pieces(spec: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        pieces = list(Formatter().parse(spec))
    except ValueError as error:
        raise BadRow(f"data.columns: {spec!r} is no template: {error}. {BRACES}") from error
    if any(name == "" or form or conversion for _, name, form, conversion in pieces):
        raise BadRow(f"data.columns: {spec!r} is no template: columns' names alone were expected in braces. {BRACES}")
    return pieces


def _filled(row: Row, spec: str) -> Any:
    """A column's value, or a template with the row's values in it."""
    if spec in row or "{" not in spec:
        return _column(row, spec)
    words = ""
    for before, name, _, _ in _pieces(spec):
        words += before
        if name is None:
            continue
        value = _column(row, name)
        if type(value) not in (str, int):
            raise BadRow(f"column {name} is {kind_of(value)}, expected a string for the template {spec!r}.")
        words += str(value)
    return words


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise BadRow(f"no column {name}; {list_columns(row)}{did_you_mean(name, row)}")
    return row[name]


def list_columns(row: Collection[str]) -> str:
    """Name them, for a message."""
    return f"the columns are: {', '.join(row) or 'none'}."
