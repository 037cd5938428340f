"""A checkpoint that is not what was written is passed over by all ranks alike, and a disk that refuses costs no older
one.
"""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_dgemma.checkpoint import save as saving
from ds_dgemma.checkpoint.manifest import describe, read_state, write_state
from ds_dgemma.checkpoint.retention import Scores, best_step, prune
from ds_dgemma.checkpoint.run_state import newest, open_state, step_directories, step_directory
from ds_dgemma.checkpoint.save import NotWritten, save, settle
from ds_dgemma.config.run import CheckpointSection
from ds_dgemma.errors import UserError
from tests.ranks import on_ranks

KINDS = ("fp32", "exp_avg")
SIZE = 1000  # elements of every logical tensor
NAMES = ("model.a", "model.b", "model.c")


@dataclass
class Part:
    """A rank's half of a logical tensor, as training hands it over."""

    name: str
    start: int
    stop: int
    kinds: tuple[str, ...] = KINDS
    full: bool = False

    def get(self, kind: str) -> torch.Tensor:
        if self.full:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return whole(self.name, kind)[self.start : self.stop]


def whole(name: str, kind: str) -> torch.Tensor:
    draw = torch.Generator().manual_seed(NAMES.index(name) * len(KINDS) + KINDS.index(kind))
    return torch.randn(SIZE, generator=draw)


def write(rank: int, root: Path, steps: tuple[int, ...], world: int = 1, full: bool = False) -> None:
    """Save steps, a tensor a file; with `full` the last rank finds its quota used up in the midst of the last step."""
    saving.FILE_BYTES = 1
    root.mkdir(parents=True, exist_ok=True)
    bounds = (rank * SIZE // world, (rank + 1) * SIZE // world)
    for step in steps:
        refused = full and step == steps[-1] and rank == world - 1
        parts = [Part(name, *bounds, full=refused and name == NAMES[1]) for name in NAMES]
        save(root, step, parts, rank, {"adam_step": float(step)})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two checkpoints of one rank."""
    assert on_ranks(1, tmp_path, write, tmp_path / "checkpoints", (4, 8)) == [None]
    return tmp_path / "checkpoints"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def rewrite(step: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a file's tensors and make a manifest that fits: what another program may have left."""
    file = shard(step)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"intervals": json.dumps({NAMES[1]: (0, SIZE)})})
    remake(step, lambda files: files.update({file.name: describe(file)}))


def remake(step: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = read_state(step)
    files = state.pop("files")
    change(files)
    write_state(step, state, files)


def shard(step: Path) -> Path:
    return sorted(step.glob("*.safetensors"))[1]


def cut(step: Path) -> None:
    shard(step).write_bytes(shard(step).read_bytes()[:-1])


def replace(tensors: dict[str, torch.Tensor], value: torch.Tensor) -> None:
    tensors[f"{NAMES[1]}|fp32"] = value


# what happened to the newest, and what the one line on it says
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "000-001.safetensors has"),
    "a bit of a number": (lambda step: flip(shard(step), -100), "001.safetensors is not what was written"),
    "a bit of a header's text": (lambda step: flip(shard(step), 20), "001.safetensors"),
    "a bit of a header's length": (lambda step: flip(shard(step), 1), "001.safetensors"),
    "a missing file": (lambda step: shard(step).unlink(), "001.safetensors is missing"),
    "an extra file": (lambda step: (step / "x.safetensors").write_bytes(b"x"), "does not name"),
    "another type": (lambda step: rewrite(step, lambda t: replace(t, torch.zeros(SIZE).half())), "is F16"),
    "another shape": (lambda step: rewrite(step, lambda t: replace(t, torch.zeros(SIZE - 1))), "of shape [999]"),
    "a missing tensor": (lambda step: rewrite(step, lambda t: t.pop(f"{NAMES[1]}|fp32")), f"{NAMES[1]} is missing"),
    "no manifest": (lambda step: (step / "state.json").unlink(), "state.json is missing or broken"),
    "half a manifest": (lambda step: os.truncate(step / "state.json", 50), "state.json is missing or broken"),
    "another manifest's step": (
        lambda step: (step / "state.json").write_text(
            (step / "state.json").read_text().replace('"step": 8', '"step": 9')
        ),
        "state.json is not what was written",
    ),
    "another step's name": (lambda step: step.rename(step.with_name("step-000012")), "step-000012 is of step 8"),
    "a file elsewhere": (
        lambda step: remake(step, lambda files: files.update({f"../{step.name}/x.safetensors": files.popitem()[1]})),
        "Refused",
    ),
    "a file that is no safetensors": (
        lambda step: remake(step, lambda files: files.update({"x.bin": files.popitem()[1]})),
        "Refused",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_checkpoint_is_passed_over_with_one_line(damage, root):
    break_it, said = DAMAGE[damage]
    older = contents(root / "step-000004")
    break_it(root / "step-000008")
    found, problems = newest(root)
    assert found is not None
    assert found.checkpoint.step == 4
    (problem,) = problems
    assert said in problem
    assert problem.startswith(f"checkpoint {root}/step-0000")
    assert "\n" not in problem
    assert contents(root / "step-000004") == older
    with pytest.raises(UserError, match="step-000008"):
        open_state(root / "step-000008")


def test_what_was_written_is_read_back_and_only_where_it_fits(root):
    state = open_state(root / "step-000008")
    for name in NAMES:
        for kind in KINDS:
            assert torch.equal(state.read(name, kind), whole(name, kind))
    sizes = dict.fromkeys(NAMES, SIZE)
    state.check_fits(sizes)
    for other in ({**sizes, NAMES[0]: SIZE - 1}, {**sizes, "model.d": 3}, dict.fromkeys(NAMES[1:], SIZE)):
        with pytest.raises(UserError, match="written by another model or config"):
            state.check_fits(other)


def look(rank: int, root: Path) -> tuple[int, list[str]]:
    found, problems = newest(root)
    assert found is not None
    return found.checkpoint.step, problems


def test_a_reader_that_is_closed_holds_no_space(root):
    reader = newest(root)[0]
    assert reader is not None
    held = lambda: [one for one in psutil.Process().memory_maps() if one.path.startswith(str(root))]  # noqa: E731
    assert reader.read("model.a", "fp32").shape == (SIZE,)
    assert held()
    reader.close()
    assert not held()


@pytest.mark.parametrize("file", [0, 5])  # the first rank's share, and the last one's
def test_all_ranks_choose_the_same_though_one_of_them_finds_the_damage(file, tmp_path):
    root = tmp_path / "checkpoints"
    on_ranks(2, tmp_path, write, root, (4, 8), 2)
    flip(sorted((root / "step-000008").glob("*.safetensors"))[file], -1)
    first, second = on_ranks(2, tmp_path, look, root)
    assert first == second
    assert first[0] == 4


def test_a_refusal_on_one_rank_is_told_on_all_and_leaves_nothing_of_the_attempt(tmp_path):
    root = tmp_path / "checkpoints"
    errors = on_ranks(2, tmp_path, write, root, (4, 8), 2, True)
    assert [type(error) for error in errors] == [NotWritten] * 2
    assert str(errors[0]) == str(errors[1])
    assert "rank 1: [Errno 122] Disk quota exceeded" in str(errors[0])
    assert [path.name for path in root.iterdir()] == ["step-000004"]
    assert open_state(root / "step-000004").checkpoint.step == 4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 150 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small tmpfs needs the right to mount one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_costs_no_older_checkpoint_and_no_space(small_disk, tmp_path):
    root = small_disk / "checkpoints"
    assert on_ranks(1, tmp_path, write, root, (4, 8)) == [None]
    before, free = contents(root), os.statvfs(small_disk).f_bfree
    (root / "step-000099.partial").mkdir()  # of a killed writer, all the room that is left
    (root / "step-000099.partial/x.safetensors").write_bytes(bytes(free * 4096))
    (error,) = on_ranks(1, tmp_path, write, root, (8, 12, 16))  # 8 once more: beside, then in its place
    assert isinstance(error, NotWritten)
    assert "No space left on device" in str(error)
    assert before.items() <= contents(root).items()
    assert [step for step, _ in step_directories(root)] == [4, 8, 12]
    assert newest(root)[1] == []
    shutil.rmtree(root / "step-000012")
    assert os.statvfs(small_disk).f_bfree == free


def test_a_writer_killed_between_its_renames_loses_nothing(root):
    before = contents(root)
    (root / "step-000008").rename(root / "step-000008.old")
    (root / "step-000008.partial").mkdir()
    settle(root)
    assert contents(root) == before
    prune(root, 8, CheckpointSection())
    assert sorted(path.name for path in root.iterdir()) == ["step-000004", "step-000008"]


def kept(root: Path, losses: dict[int, float | None], **policy: Any) -> list[int]:
    """Which steps stay of a run with these validation losses that prunes after every checkpoint."""
    scores = Scores("validation/loss", "held-out")
    for step, loss in losses.items():
        if loss is not None:
            scores.add("validation", step, {"loss": loss})
        step_directory(root, step).mkdir(parents=True)
        write_state(step_directory(root, step), {"step": step, **scores.facts(step)}, {})
        prune(root, step, CheckpointSection(every=1, **policy))
        restarted = open_state(step_directory(root, step)).checkpoint
        scores = Scores.continued("validation/loss", "held-out", restarted)  # as after a resume
    assert scores.best is None or scores.best["value"] == min(loss for loss in losses.values() if loss is not None)
    return [step for step, _ in step_directories(root)]


def test_checkpoints_are_kept_by_number_by_interval_and_by_loss(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 1.5, 6: 9.0, 7: 8.0}
    assert kept(tmp_path / "last", losses, keep_last=2) == [6, 7]
    assert kept(tmp_path / "every", losses, keep_last=1, keep_every=3) == [3, 6, 7]
    assert kept(tmp_path / "best", losses, keep_last=1, keep_best=2) == [2, 5, 7]
    assert best_step(tmp_path / "best") == 2


def test_pruning_spares_the_last_whole_checkpoint_and_removes_damaged_newer_ones(tmp_path):
    kept(tmp_path, {4: None, 12: None, 16: None}, keep_last=3)
    (tmp_path / "step-000012/state.json").write_text("{}")
    (tmp_path / "step-000016/state.json").write_text("{}")
    prune(tmp_path, 16, CheckpointSection(keep_last=1))  # 16 is not whole
    assert [step for step, _ in step_directories(tmp_path)] == [4, 12, 16]
    kept(tmp_path, {8: None}, keep_last=1)  # continued from 4, at another interval
    assert [step for step, _ in step_directories(tmp_path)] == [8]


def test_a_loss_on_other_data_or_that_is_no_number_is_not_the_best(tmp_path):
    kept(tmp_path, {1: 1.0})
    checkpoint = open_state(step_directory(tmp_path, 1)).checkpoint
    assert Scores.continued("validation/loss", "held-out", checkpoint).best == checkpoint.state["score"]
    scores = Scores.continued("validation/loss", "other", checkpoint)
    scores.add("validation", 2, {"loss": float("nan")})
    assert scores.facts(2) == {"score": None, "best": None, "since_best": 1}
    assert Scores.continued("evaluation/solved", "held-out", checkpoint).best is None


def test_of_shares_more_is_better_and_what_is_not_better_is_counted():
    scores = Scores("evaluation/solved", "held-out")
    for step, solved in enumerate((0.1, 0.5, 0.4, 0.5), start=1):
        scores.add("evaluation", step, {"solved": solved, "stopped": 1.0})
        scores.add("validation", step, {"loss": 1.0 / step})
    assert scores.best is not None
    assert (scores.best["step"], scores.since) == (2, 2)
