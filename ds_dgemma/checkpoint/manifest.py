"""state.json: what a checkpoint holds, and how to tell that it holds it still.

    {"step": 100, ..., "files": {"rank-00000-000.safetensors": {"bytes": 1234, "xxh3_128": "..."}}, "xxh3_128": "..."}

The last one is state.json's own. XXH3 finds damage, not malice: 30 GB/s on one core, where SHA-256 has 2 at best and
8 ranks would wait for it rather than for the disk.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from ds_dgemma.errors import UserError, first_line, told

STATE = "state.json"
CHECKSUM = "xxh3_128"
READ_BYTES = 8 * 2**20
READERS = 4  # files read at once: a parallel file system gives one reader little

Entry = dict[str, Any]  # bytes, checksum


def checksum(file: Path) -> str:
    """The checksum of a file's content."""
    digest, buffer = xxh3_128(), bytearray(READ_BYTES)
    view = memoryview(buffer)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def describe(file: Path) -> Entry:
    """A file's entry in the manifest."""
    return {"bytes": file.stat().st_size, CHECKSUM: checksum(file)}


def write_state(directory: Path, facts: Mapping[str, Any], files: Mapping[str, Entry]) -> None:
    """Write state.json, flushed; `facts` are JSON."""
    state = json.loads(json.dumps({**facts, "files": files}))  # as it will be read
    with (directory / STATE).open("w") as stream:
        stream.write(json.dumps({**state, CHECKSUM: _own_checksum(state)}, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_state(directory: Path) -> dict[str, Any]:
    """Read state.json.

    Raises:
        UserError: missing, unreadable, changed since it was written, or naming files outside of its directory.
    """
    if not directory.is_dir():
        raise UserError(f"checkpoint {directory} does not exist.")
    try:
        state = json.loads((directory / STATE).read_text())
        written = state.pop(CHECKSUM)
        names = [name for name, entry in state["files"].items() if {"bytes", CHECKSUM} <= entry.keys()]
        int(state["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else told(error)
        raise UserError(f"checkpoint {directory}: {STATE} is missing or broken: {found}.") from error
    if written != _own_checksum(state) or len(names) != len(state["files"]):
        raise UserError(f"checkpoint {directory} is damaged: {STATE} is not what was written (checksum).")
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise UserError(
            f"checkpoint {directory}: {STATE} names {outside[0]!r}, which is no safetensors file beside it. Refused."
        )
    return state


def check_sizes(directory: Path, files: Mapping[str, Entry]) -> None:
    """Raise `UserError` unless the files are there, as long as they were, and no others are among them."""
    for name, entry in files.items():
        file = directory / name
        if not file.is_file():
            raise UserError(f"checkpoint {directory} is not complete: {name} is missing.")
        if (size := file.stat().st_size) != entry["bytes"]:
            raise UserError(
                f"checkpoint {directory} is damaged: {name} has {size} bytes, {entry['bytes']} were written."
            )
    if others := sorted({file.name for file in directory.glob("*.safetensors")} - files.keys()):
        raise UserError(
            f"checkpoint {directory} holds {others[0]}, which {STATE} does not name: parts of two checkpoints? "
            "Move it away."
        )


def check_content(directory: Path, files: Mapping[str, Entry], names: Iterable[str]) -> None:
    """Read the files `names` and raise `UserError` unless they are, byte for byte, what was written."""

    def fault(name: str) -> str | None:
        try:
            found = checksum(directory / name)
        except OSError as error:
            return f"{name} cannot be read: {first_line(error)}"
        return None if found == files[name][CHECKSUM] else f"{name} is not what was written (checksum)"

    with ThreadPoolExecutor(READERS) as pool:
        faults = [text for text in pool.map(fault, names) if text]
    if faults:
        raise UserError(f"checkpoint {directory} is damaged: {faults[0]}.")


def _own_checksum(state: dict[str, Any]) -> str:
    return xxh3_128(json.dumps(state, sort_keys=True).encode()).hexdigest()
