"""Files that appear whole or not at all, what is on the disk for good, and locks. Directories of weights:
`checkpoint/whole_directory.py`; of training state: `checkpoint/save.py`.
"""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def atomic_file(path: Path, binary: bool = False) -> Iterator[IO[Any]]:
    """Give a file to fill beside its place, UTF-8 text unless `binary`; when all went well it takes the place, durably.
    Several processes may write the same one: each is whole, the last stays.

    Raises:
        OSError: the disk refuses.
    """
    made, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".part", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(made, "wb") if binary else os.fdopen(made, "w", encoding="utf-8") as file:
            yield file
        flush(beside)
        beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink()
    sync_directory(path.parent)


def flush(file: Path) -> None:
    """Bring a file to the disk, readable for all."""
    file.chmod(0o644)  # safetensors and tempfile write for the owner alone
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(directory: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[Any], wait: bool) -> bool:
    """Take the exclusive lock of a file, which lasts as long as it is open and a killed process gives back; False on a
    file system without locks.

    Raises:
        BlockingIOError: another process has it, and `wait` is false.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True
