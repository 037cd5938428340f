"""CSV, Parquet and hub datasets, read by `datasets` into Arrow files on disk.

Arrow gives the objects of a column all the same keys, null where a row had none. So keys with null are left out again,
inside of objects: a null that was meant (an argument of a tool, say) is lost, which JSONL keeps. The cells of a CSV
file are text as it stands there: 007 stays 007.
"""

import csv
import gzip
import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_dgemma.data.json_files import CHUNK, NumberedRows, digest_of, opened
from ds_dgemma.data.messages import TEXT_ONLY
from ds_dgemma.data.reading import Reading
from ds_dgemma.errors import UserError, first_line
from ds_dgemma.files import atomic_file

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SEPARATORS = {".csv": ",", ".tsv": "\t"}


# Opens a table, mapped from disk or streamed; of a file that is mapped it is told the digest
Loader = Callable[..., "Dataset | IterableDataset"]


@dataclass(frozen=True)
class TableChunk:
    """Some rows of a table; it travels to another process as the names of Arrow files."""

    dataset: "Dataset"
    first_row: int
    start: int
    end: int
    ignored: frozenset[str]  # columns that are left out

    def rows(self, reading: Reading | None = None) -> NumberedRows:
        """Yield the rows with their numbers in the source, and note them in `reading`."""
        columns = self.dataset[self.start : self.end]
        if reading is not None:
            reading.named |= self.ignored
        for row, values in enumerate(zip(*columns.values(), strict=True), self.first_row):
            record = _without_nulls(dict(zip(columns, values, strict=True)))
            if reading is not None:
                reading.saw(row, record)
            yield row, record


class Table:
    """A CSV or Parquet file, or a split of a hub dataset."""

    def __init__(self, name: str, load: Loader, ignore: frozenset[str] = frozenset(), path: Path | None = None):
        self.name, self.path = name, path
        self._load, self._ignore = load, ignore

    @cached_property
    def dataset(self) -> "Dataset":
        """Mapped from disk, without the columns that are ignored."""
        return self._read_columns(self._whole)  # type: ignore[return-value]  # streaming is off

    @cached_property
    def _whole(self) -> "Dataset":
        told = {} if self.path is None else {"digest": self.digest}
        return self._load(streaming=False, **told)  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.dataset)

    def count(self) -> int:
        """The rows of a stream, which is not kept on disk."""
        if self.path is not None and self.path.suffix == ".parquet":
            from pyarrow import parquet

            return parquet.read_metadata(self.path).num_rows
        return sum(1 for _ in self.stream(0))

    @property
    def digest(self) -> str:
        """Of the content; of a hub dataset what `datasets` keys its own caches with."""
        return self.dataset._fingerprint if self.path is None else self._digest_of_file

    @cached_property
    def _digest_of_file(self) -> str:
        assert self.path is not None
        return digest_of(self.path, self.name)

    def chunks(self, first_row: int) -> Iterator[TableChunk]:
        """Pieces of 500 rows; `first_row` is the number of the table's first row in its source."""
        ignored = self._ignore & set(self._whole.column_names)
        for start in range(0, len(self), CHUNK):
            yield TableChunk(self.dataset, first_row + start, start, min(start + CHUNK, len(self)), ignored)

    def stream(self, start: int) -> NumberedRows:
        """Rows from `start` on, read as they are asked for."""
        dataset = self._read_columns(self._load(streaming=True))
        for row, record in enumerate(dataset.skip(start), start):
            yield row, _without_nulls(record)

    def row(self, row: int) -> dict[str, Any]:
        """Read one row again."""
        return _without_nulls(self.dataset[row])

    def where(self, row: int) -> str:
        """Say where a row is."""
        return f"{self.name} row {row}"

    def _read_columns(self, dataset: "Dataset | IterableDataset") -> "Dataset | IterableDataset":
        """Leave out ignored columns, refuse video and audio, and keep images as the files that they are."""
        if ignored := [name for name in dataset.column_names or () if name in self._ignore]:
            dataset = dataset.remove_columns(ignored)
        for name, feature in (dataset.features or {}).items():
            if (as_files := _as_files(feature)) != feature:
                dataset = dataset.cast_column(name, as_files)
            if type(feature).__name__ in ("Audio", "Video"):
                raise UserError(
                    f"{self.name} has a column {name}. {TEXT_ONLY} If the text stands alone, name it in data.ignore."
                )
        return dataset


def _as_files(feature: Any) -> Any:
    """The same type of a column, in which images are files that are not decoded."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_as_files(feature.feature))
    if isinstance(feature, list):
        return [_as_files(item) for item in feature]
    return {key: _as_files(item) for key, item in feature.items()} if isinstance(feature, dict) else feature


def csv_file(path: Path, name: str, ignore: frozenset[str]) -> Table:
    """A table of text, its columns named in its first line."""
    separator = SEPARATORS[path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix]
    return Table(name, partial(_load_csv, path, name, separator), ignore, path)


def parquet_file(path: Path, name: str, ignore: frozenset[str]) -> Table:
    """A Parquet file."""
    return Table(name, partial(_load_parquet, path, name), ignore, path)


def hub_dataset(
    source: str, config: str | None, revision: str | None, hub_split: str, split: str, ignore: frozenset[str]
) -> Table:
    """A split of a hub dataset; `split` is whose setting names it."""
    name = f"{source} [{', '.join(filter(None, (config, revision, hub_split)))}]"
    return Table(name, partial(_load_hub, source, config, revision, hub_split, split), ignore)


def saved_dataset(path: Path, name: str, ignore: frozenset[str]) -> Table:
    """A folder that `Dataset.save_to_disk` wrote."""
    return Table(name, partial(_load_saved, path, name), ignore)


def _load_csv(
    path: Path, name: str, separator: str, streaming: bool, digest: str | None = None
) -> "Dataset | IterableDataset":
    import datasets

    csv.field_size_limit(2**31 - 1)
    with opened(path, name) as file:
        lines = csv.reader(io.TextIOWrapper(file, "utf-8-sig", "replace", newline=""), delimiter=separator)
        header, first = next(lines, []), next(filter(None, lines), [])  # pandas passes over empty lines too
    if not all(header) or len(set(header)) < len(header):
        raise UserError(f"{name}: its first line is no list of different column names: {separator.join(header)!r}.")
    if len(first) > len(header):  # pandas would take the first of them for a row's name, in silence
        raise UserError(f"{name}: its first row has {len(first)} cells, but there are {len(header)} column names.")
    if not first:
        return _empty(header, streaming)
    features = datasets.Features({column: datasets.Value("string") for column in header})
    return _load_file(
        "csv",
        path,
        name,
        streaming,
        digest,
        sep=separator,
        keep_default_na=False,
        encoding="utf-8-sig",
        features=features,
    )


def _load_parquet(path: Path, name: str, streaming: bool, digest: str | None = None) -> "Dataset | IterableDataset":
    from pyarrow import ArrowException, parquet

    plain = _unpacked(path, digest or digest_of(path, name)) if path.suffix == ".gz" else path
    with suppress(ArrowException, OSError):  # who reads it will say what is wrong
        if not (known := parquet.read_metadata(plain)).num_rows:
            return _empty(known.schema.to_arrow_schema().names, streaming)
    return _load_file("parquet", plain, name, streaming, digest)


def _empty(columns: list[str], streaming: bool) -> "Dataset | IterableDataset":
    """A table without rows, which `datasets` reads no file for."""
    import datasets

    table = datasets.Dataset.from_dict({column: [] for column in columns})
    return table.to_iterable_dataset() if streaming else table


def _load_file(
    kind: str, path: Path, name: str, streaming: bool, digest: str | None, **options: Any
) -> "Dataset | IterableDataset":
    """`digest`: of the file's content, for a file that is read whole."""
    import datasets  # here, for it takes seconds that a JSONL file need not pay
    from datasets.config import HF_DATASETS_CACHE
    from datasets.exceptions import DatasetsError

    # `datasets` keeps what it read by path and date, and a file may be replaced by one of the same date
    own = digest and str(Path(HF_DATASETS_CACHE) / "ds_dgemma" / digest)
    try:
        loaded = datasets.load_dataset(
            kind, data_files=str(path), split="train", streaming=streaming, cache_dir=own, **options
        )
    except (DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error  # what the reader said, under "an error occurred while ..."
        raise UserError(f"cannot read {name} as {kind}: {first_line(reason) or type(reason).__name__}") from error
    assert isinstance(loaded, datasets.Dataset | datasets.IterableDataset)  # one split was named
    return loaded


def _unpacked(path: Path, digest: str) -> Path:
    """A compressed Parquet file is read from its end, so it is unpacked once, beside `datasets`' own files."""
    from datasets import config

    unpacked = Path(config.HF_DATASETS_CACHE) / "ds_dgemma" / f"{digest}.parquet"
    if not unpacked.exists():
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "rb") as packed, atomic_file(unpacked, binary=True) as file:
            shutil.copyfileobj(packed, file)
    return unpacked


def _load_hub(
    source: str, config: str | None, revision: str | None, hub_split: str, split: str, streaming: bool
) -> "Dataset | IterableDataset":
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        loaded = datasets.load_dataset(source, config, split=hub_split, revision=revision, streaming=streaming)
    except (DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"data.{split}: no local file {source}, and the hub dataset of that id (configuration {config}, revision "
            f"{revision}, split {hub_split}) cannot be loaded: {first_line(error) or type(error).__name__}"
        ) from error
    assert isinstance(loaded, datasets.Dataset | datasets.IterableDataset)  # one split was named
    return loaded


def _load_saved(path: Path, name: str, streaming: bool) -> "Dataset | IterableDataset":
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {name} as a saved dataset: {first_line(error)}") from error
    if not isinstance(loaded, datasets.Dataset):
        raise UserError(f"{name} holds several splits: {', '.join(map(str, loaded))}. Name one of its folders.")
    return loaded.to_iterable_dataset() if streaming else loaded


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
