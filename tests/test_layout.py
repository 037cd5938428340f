"""The shape of the repository: which folder may import which, and what every file must be.

The picture that the imports follow (the arrow is the way of the data; `train.py` and `cli.py` join everything):

    config ─▶ data ─▶ objective ─▶ model ─▶ engine ─▶ checkpoint ─▶ tracking
"""

import ast
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ds_dgemma"

EVERYONE_MAY_IMPORT = {"config", "errors", "files"}
# Besides itself and what everyone may import. No two folders import each other.
MAY_IMPORT = {
    "data": set(),
    "model": set(),
    "tracking": set(),
    "tools": set(),
    "objective": {"data", "model"},
    "checkpoint": {"data", "model", "ranks"},
    "config": set(),
    "ranks": set(),
    "watch": {"ranks"},
    "launch": {"ranks"},
    "engine": {"checkpoint", "model", "objective", "ranks"},
    "plan": {"engine", "model"},
    "run": {
        "checkpoint",
        "data",
        "engine",
        "evaluation",
        "launch",
        "model",
        "objective",
        "ranks",
        "tracking",
        "watch",
    },
    "inspection": {"checkpoint", "data", "model", "objective"},
    "evaluation": {"checkpoint", "data", "engine", "model", "objective", "ranks"},
    "frameworks": {"evaluation", "data"},
}
LONGEST_FILE = 400  # lines of Python
LARGEST_FILE = 500_000  # bytes


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, with `from package import module` resolved."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import; write the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Folders and top-level modules of this package that a file imports."""
    return {name.split(".")[1] for name in imported_modules(path) if name.startswith("ds_dgemma.")}


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


@cache
def repository_files() -> list[Path]:
    """What git tracks or would: no build output, no runs."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs git and a checkout")
    return [path for name in listing.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_a_folder_imports_only_what_the_picture_allows(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | EVERYONE_MAY_IMPORT | {folder}
    strangers = {str(path.relative_to(ROOT)): ours(path) - allowed for path in python_files(PACKAGE / folder)}
    assert not {path: names for path, names in strangers.items() if names}


def test_the_picture_names_every_folder_and_has_no_circle() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(MAY_IMPORT)
    left = {folder: set(others) for folder, others in MAY_IMPORT.items()}
    while free := {folder for folder, others in left.items() if not others & left.keys()}:
        left = {folder: others for folder, others in left.items() if folder not in free}
    assert not left


def test_nothing_imports_an_entry_point() -> None:
    importers = {path.name for path in python_files(PACKAGE) if ours(path) & {"train", "cli", "__main__"}}
    assert importers == {"__main__.py"}


def test_only_the_engine_imports_deepspeed() -> None:
    users = [
        path
        for path in python_files(PACKAGE)
        if {name.split(".")[0] for name in imported_modules(path)} & {"deepspeed"}
    ]
    assert {path.parent.name for path in users} == {"engine", "launch"}  # of launch its launcher


def test_no_python_file_is_too_long_to_read() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in repository_files() if path.suffix == ".py"}
    assert not {str(path): length for path, length in lengths.items() if length > LONGEST_FILE}


def test_no_file_is_too_large_for_a_repository() -> None:
    assert not [str(path) for path in repository_files() if path.stat().st_size > LARGEST_FILE]
