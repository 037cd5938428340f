"""A hub id trains like a directory: downloaded once per machine, and a download that fails ends every rank."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.forks import start
from tests.training import start_ranks

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one model under any name as the hub does, and counts the downloads of every file."""

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
        name = path.removeprefix("/api/models").partition("/revision/")[0].strip("/")
        if "/revision/" in path:
            hub.revisions.append(path.rpartition("/")[2])
        if path == f"/api/models/{name}/revision/main":
            content = json.dumps({"id": name, "sha": COMMIT, "siblings": []}).encode()
        elif path.startswith("/api/models/") and path.endswith(f"/tree/{COMMIT}"):
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": f"{number:040x}"}
                for number, (name, file) in enumerate(files.items())
            ]
            content = json.dumps(entries).encode()
        elif f"/resolve/{COMMIT}/" in path and (file := path.rpartition("/")[2]) in files and file != hub.broken:
            content = files[file].read_bytes()
            headers["ETag"] = f'"{list(files).index(file):040x}"'
            hub.downloads[file] += body
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


@pytest.fixture(scope="module")
def hub(sudoku_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with the tiny model, and a cache that is empty at first."""
    server = Hub(sudoku_run.parent / "model")
    Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("NO_PROXY", "127.0.0.1")
        for variable in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            patch.delenv(variable, raising=False)
        yield server
    server.shutdown()


@pytest.fixture(autouse=True)
def _nothing_asked_yet(hub: Hub) -> None:
    hub.downloads.clear()
    hub.revisions.clear()
    hub.broken = None


def train_from_hub(config: Path, folder: Path, name: str) -> tuple[list[int], str]:
    """Exit codes and log of two ranks."""
    overrides = [f"run.dir={folder}/run", f"model.path={name}", "train.max_steps=1", "train.micro_batch_size=4"]
    ranks = start_ranks(config, overrides, 2, folder / "log")
    try:
        codes = [rank.wait(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return codes, (folder / "log").read_text()


def test_one_rank_downloads_for_all_and_a_second_run_downloads_nothing(hub, sudoku_run, tmp_path):
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        codes, log = train_from_hub(sudoku_run, folder, "someone/tiny")
        assert codes == [0, 0], log
        assert len(re.findall(r"^loaded .*: \d+\.\d\d GB read in \d+\.\d s by rank 0$", log, re.MULTILINE)) == 1, log
        assert hub.downloads["model.safetensors"] == 1
        assert set(hub.downloads.values()) == {1}, hub.downloads


def test_a_download_that_fails_is_told_once_and_ends_every_rank(hub, sudoku_run, tmp_path):
    hub.broken = "model.safetensors"
    codes, log = train_from_hub(sudoku_run, tmp_path, "someone/broken")
    assert codes == [2, 2], log
    assert "Traceback" not in log
    assert log.count("model.path: someone/broken is no directory and could not be fetched") == 1, log


@pytest.mark.parametrize("command", ["generate --prompt 1", "merge --adapter . --out {out}"])
def test_a_command_asks_for_the_revision_that_it_is_told(command, hub, tmp_path):
    arguments = command.format(out=tmp_path / "out").split()
    with (tmp_path / "log").open("wb") as log:
        ended = start(["ds_dgemma", *arguments, "--model", "someone/other", "--revision", "v2"], dict(os.environ), log)
    said = (ended.wait(timeout=300), set(hub.revisions), (tmp_path / "log").read_text())
    assert said[:2] == (2, {"v2"}), said
    assert "someone/other at revision v2" in said[2]
