"""A directory of weights that appears whole or not at all, and takes the place of nothing but an older one of its kind.

It is filled beside its place, flushed, and renamed last; a killed writer leaves the older one as it was. Only what this
project wrote is replaced, renamed or removed: a hidden file in it says so. (Not safetensors' metadata: its order is
random, and an export would not be the same twice.)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ds_dgemma.checkpoint.weights import INDEX
from ds_dgemma.errors import UserError, told
from ds_dgemma.files import flush, lock, sync_directory

MARK = ".ds_dgemma"


@contextmanager
def whole_directory(out: Path, marker: str, companions: set[str]) -> Iterator[Path]:
    """Give a directory to fill, which takes the place of `out`, or of an older `out` that has `marker` and, weights and
    their index apart, nothing else than `companions`.

    Raises:
        UserError: `out` holds something else, somebody writes there now, or the disk refuses.
    """
    out = Path(os.path.realpath(out))  # a link's target is replaced, never the link
    beside, old = _neighbour(out, "partial"), _neighbour(out, "old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            if (old / MARK).is_file() and not out.exists():  # killed between the two renames below
                old.rename(out)
            _check_replaceable(out, {marker, INDEX, MARK, *companions}, marker)
            _remove(beside)
            _remove(old)
            beside.mkdir()
            try:
                (beside / MARK).write_text("written by ds-dgemma, and replaced by its next export to this place\n")
                yield beside
                for file in beside.iterdir():
                    flush(file)
                sync_directory(beside)
                if out.exists():
                    out.rename(old)
                beside.rename(out)
                sync_directory(out.parent)
                with suppress(OSError):  # files that are still read, on a network file system: the next one's to remove
                    _remove(old)
            finally:
                with suppress(OSError):
                    _remove(beside)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {out} could not be written: {told(error)}.") from error


def _neighbour(out: Path, role: str) -> Path:
    """A hidden place beside `out`, of a name that no person gives."""
    return out.with_name(f".{out.name}.ds_dgemma-{role}")


def _remove(directory: Path) -> None:
    """Remove what a writer left, its mark last, and nothing else: without a mark only an empty directory."""
    if (directory / MARK).is_file():
        for file in directory.iterdir():
            if file.name != MARK:
                file.unlink()
        (directory / MARK).unlink()
    if directory.exists():
        directory.rmdir()


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second writer of the same directory out."""
    path = _neighbour(out, "lock")
    with path.open("a") as file:
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise UserError(f"--out {out} is being written by another process. Wait, or choose another.") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _check_replaceable(out: Path, known: set[str], marker: str) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or not (out / marker).is_file():
        raise UserError(f"--out {out} exists and holds something else, no {marker}. Choose another.")
    entries = {entry.name for entry in out.iterdir() if entry.is_dir() or entry.suffix != ".safetensors"}
    if strangers := sorted(entries - known):
        raise UserError(f"--out {out} holds {strangers[0]}, which would be lost. Move it away, or choose another.")
    if not (out / MARK).is_file():
        raise UserError(f"--out {out} is a checkpoint that ds-dgemma did not write. Choose another directory.")
