"""The repository's shape: imports follow the flow of data, files stay small, and what must parse parses."""

import ast
import json
import subprocess
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "ds_dgemma"

# folder -> what it may import of ours, beside config, errors and itself
MAY_IMPORT = {
    "data": set(),
    "model": set(),
    "objective": {"data", "model"},
    "checkpoint": {"model"},
    "engine": {"data", "objective", "model", "checkpoint"},
    "evaluation": {"data", "objective", "model", "engine"},
    "tracking": set(),
    "tools": set(),
}
FREE_TO_ALL = {"config", "config_file", "config_schema", "errors"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at whatever depth, by its full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    return [path for name in listed.stdout.splitlines() if (path := REPOSITORY / name).is_file()]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_flow_of_data(path):
    folder = path.relative_to(PACKAGE).parts[0]
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("ds_dgemma.")}
    if folder in MAY_IMPORT:
        assert ours <= MAY_IMPORT[folder] | FREE_TO_ALL | {folder}
    if folder != "engine":
        assert not any(name.split(".")[0] == "deepspeed" for name in imports_of(path))
    if path.name != "__main__.py":
        assert not ours & {"train", "cli"}


def test_no_source_file_is_longer_than_400_lines():
    long = {path.name: count for path in modules() if (count := len(path.read_text().splitlines())) > 400}
    assert not long


def test_files_are_small_and_clean():
    for path in tracked():
        assert path.stat().st_size <= 500_000, f"{path} is over 500 kB"
        if path.suffix in {".py", ".md", ".yaml", ".json", ".sh", ".toml"}:
            text = path.read_text()
            assert not text or text.endswith("\n"), f"{path} does not end with a newline"
            assert not [line for line in text.splitlines() if line != line.rstrip()], f"{path}: trailing whitespace"


def test_configs_parse():
    for path in tracked():
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in {".yaml", ".yml"}:
            yaml.safe_load(path.read_text())
