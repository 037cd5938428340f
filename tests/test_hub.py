"""A hub id trains like a directory: downloaded once per machine, and a download that fails ends every rank."""

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.training import REPOSITORY, start_ranks

pytestmark = pytest.mark.slow

NAME, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one model as the hub does, and counts the downloads of every file."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.directory, self.downloads, self.revisions = directory, Counter(), []
        self.broken: str | None = None


class Answer(BaseHTTPRequestHandler):
    """The four requests that huggingface_hub makes."""

    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        files = {file.name: file for file in hub.directory.iterdir()}
        headers = {"X-Repo-Commit": COMMIT}
        if path.startswith(f"/api/models/{NAME}/revision/"):
            hub.revisions.append(path.rpartition("/")[2])
        if path == f"/api/models/{NAME}/revision/main":
            content = json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode()
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{number:040x}"}
                for number, (name, file) in enumerate(files.items())
            ]
            content = json.dumps(entries).encode()
        elif (name := path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")) in files and name != hub.broken:
            content = files[name].read_bytes()
            headers["ETag"] = f'"{list(files).index(name):040x}"'
            hub.downloads[name] += body
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(sudoku_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the tiny model, and an empty cache."""
    server = Hub(sudoku_run.parent / "model")
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for variable in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    yield server
    server.shutdown()


def train_from_hub(config: Path, folder: Path) -> tuple[list[int], str]:
    """Exit codes and log of two ranks."""
    overrides = [f"run.dir={folder}/run", f"model.path={NAME}", "train.max_steps=1", "train.micro_batch_size=4"]
    ranks = start_ranks(config, overrides, 2, folder / "log")
    try:
        codes = [rank.wait(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return codes, (folder / "log").read_text()


def test_one_rank_downloads_for_all_and_a_second_run_downloads_nothing(hub, sudoku_run, tmp_path):
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        codes, log = train_from_hub(sudoku_run, folder)
        assert codes == [0, 0], log
        assert len(re.findall(r"^loaded .*: \d+\.\d\d GB read in \d+\.\d s by rank 0$", log, re.MULTILINE)) == 1, log
        assert hub.downloads["model.safetensors"] == 1
        assert set(hub.downloads.values()) == {1}, hub.downloads


def test_a_download_that_fails_is_told_once_and_ends_every_rank(hub, sudoku_run, tmp_path):
    hub.broken = "model.safetensors"
    codes, log = train_from_hub(sudoku_run, tmp_path)
    assert codes == [2, 2], log
    assert "Traceback" not in log
    assert log.count(f"model.path: {NAME} is no directory and could not be fetched") == 1, log


@pytest.mark.parametrize("command", ["generate --prompt 1", "merge --adapter . --out {out}"])
def test_a_command_asks_for_the_revision_that_it_is_told(command, hub, tmp_path):
    arguments = command.format(out=tmp_path / "out").split()
    program = [sys.executable, "-m", "ds_dgemma", *arguments, "--model", NAME, "--revision", "v2"]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=400, cwd=REPOSITORY)
    assert (ended.returncode, set(hub.revisions)) == (2, {"v2"}), ended.stderr
    assert f"{NAME} at revision v2" in ended.stderr
