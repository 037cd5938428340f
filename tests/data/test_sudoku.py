"""Puzzles have one solution, spread over their clue counts, and no seed mixes train and test."""

import json
from collections import Counter
from itertools import permutations, product
from pathlib import Path

import pytest

from ds_dgemma.data.sudoku import CLUES, make_puzzles, record, split_of, to_text, write_sudoku
from ds_dgemma.errors import UserError


def is_grid(cells: tuple[int, ...], size: int) -> bool:
    """The rules of Sudoku, written as a person says them."""
    box, digits = {4: 2, 9: 3}[size], set(range(1, size + 1))
    rows = [cells[size * r : size * r + size] for r in range(size)]
    columns = [cells[c::size] for c in range(size)]
    boxes = [
        [cells[size * (top + r) + left + c] for r in range(box) for c in range(box)]
        for top, left in product(range(0, size, box), repeat=2)
    ]
    return len(cells) == size * size and all(set(unit) == digits for unit in [*rows, *columns, *boxes])


ALL_4X4 = [grid for rows in product(permutations((1, 2, 3, 4)), repeat=4) if is_grid(grid := sum(rows, start=()), 4)]


def all_solutions(cells: list[int], size: int) -> list[tuple[int, ...]]:
    """Try every digit in the first blank cell: slow and obvious."""
    if 0 not in cells:
        return [tuple(cells)] if is_grid(tuple(cells), size) else []
    blank, box = cells.index(0), {4: 2, 9: 3}[size]
    row, column = divmod(blank, size)
    seen = {
        cells[size * r + c]
        for r, c in product(range(size), repeat=2)
        if r == row or c == column or (r // box, c // box) == (row // box, column // box)
    }
    found = []
    for digit in set(range(1, size + 1)) - seen:
        found += all_solutions([*cells[:blank], digit, *cells[blank + 1 :]], size)
    return found


@pytest.mark.parametrize(("size", "count"), [(4, 200), (9, 6)])
def test_each_puzzle_has_its_solution_and_no_other(size: int, count: int) -> None:
    for puzzle, solution in make_puzzles(size, "train", count, seed=3):
        assert all_solutions(list(puzzle), size) == [solution]


@pytest.mark.parametrize(("size", "count"), [(4, 2000), (9, 72)])
def test_puzzles_differ_and_every_clue_count_is_equally_common(size: int, count: int) -> None:
    puzzles = [puzzle for puzzle, _ in make_puzzles(size, "test", count, seed=0)]
    clues = Counter(size * size - puzzle.count(0) for puzzle in puzzles)
    assert len(set(puzzles)) == count
    assert clues == dict.fromkeys(CLUES[size], count // len(CLUES[size]))


def test_a_scarce_clue_count_is_used_up_and_the_others_give_the_rest() -> None:
    clues = Counter(16 - puzzle.count(0) for puzzle, _ in make_puzzles(4, "test", 250_000, seed=0))
    assert clues[5] < 50_000 < clues[9]
    assert clues.total() == 250_000


def test_no_solution_of_test_is_ever_in_train_whatever_the_seeds() -> None:
    def grids(split: str, seed: int) -> set[tuple[int, ...]]:
        return {solution for _, solution in make_puzzles(4, split, 1500, seed)}

    train, test = grids("train", 1) | grids("train", 2), grids("test", 3) | grids("test", 4)
    assert (len(train), len(test)) == (248, 40)
    assert train | test == set(ALL_4X4)


def test_the_split_of_a_grid_never_moves() -> None:
    """Pinned, for another hash would let a new training file hold the solutions of an old test file."""
    shifts = (0, 3, 6, 1, 4, 7, 2, 5, 8)
    grids = [tuple((shift + column + k) % 9 + 1 for shift in shifts for column in range(9)) for k in range(9)]
    assert all(is_grid(grid, 9) for grid in grids)
    assert [k for k, grid in enumerate(grids) if split_of(grid) == "test"] == [2]
    held_out_4x4 = [to_text(grid) for grid in sorted(ALL_4X4) if split_of(grid) == "test"]
    assert held_out_4x4[:3] == ["1234431221433421", "1234432131422413", "1324241332414132"]
    for split in ("train", "test"):
        assert {split_of(solution) for _, solution in make_puzzles(9, split, 5, seed=8)} == {split}


def test_a_file_holds_cells_and_nothing_else_and_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_sudoku(4, "train", 50, seed, tmp_path / "new" / name)
    a, b, c = ((tmp_path / "new" / name).read_bytes() for name in "abc")
    assert a == b != c
    for line in a.decode().splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert len(user["content"]) == 16
        assert set(user["content"]) <= set(".1234")
        assert is_grid(tuple(map(int, assistant["content"])), 4)
        assert all(clue in (".", digit) for clue, digit in zip(user["content"], assistant["content"], strict=True))
    assert record((0, 1), (2, 1))["messages"][0] == {"role": "user", "content": ".1"}


def test_letters_stand_for_the_same_puzzles(tmp_path):
    for symbols in ("digits", "letters"):
        write_sudoku(4, "test", 20, 3, tmp_path / symbols, symbols)
    digits, letters = ((tmp_path / name).read_text() for name in ("digits", "letters"))
    assert letters != digits
    assert [json.loads(line) for line in letters.splitlines()] == [
        json.loads(line.translate(str.maketrans("1234", "ABCD"))) for line in digits.splitlines()
    ]


def test_a_file_that_cannot_be_made_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for count, out in (
        (0, tmp_path / "x"),
        (5, tmp_path / "file" / "x"),
        (5, tmp_path),
        (10**8, tmp_path / "x"),
    ):
        with pytest.raises(UserError, match=r"--count|--out"):
            write_sudoku(4, "train", count, 0, out)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
