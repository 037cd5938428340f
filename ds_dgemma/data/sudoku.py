"""Sudoku puzzles with exactly one solution, as conversations: answers can be checked, and the test is clean.

A grid of size n (4 or 9) is n*n cells, row by row, 1..n or 0 for a blank; as text a blank is `.`. In a
record the user's turn is the puzzle's cells and the assistant's the solution's, nothing else; 1..n are written as
digits, or as letters from A.

- *Split.* A solution grid belongs to train or to test by a fixed hash of its text, never by the seed, so
  no file of one split holds a solution of the other. Size 4: the 40 of all 288 grids with the smallest
  hashes are test; size 9: about one in ten.
- *Clues.* As many puzzles of each clue count as there can be. Size 4: 5 to 9 clues, drawn from all such
  puzzles (9,386,112; 5-clue ones are the rarest, 284,160), so a rare count takes no luck. Size 9: 28 to 45
  clues; cells are blanked in random order while the solution stays the only one. Far below 28 most orders
  get stuck (the proven minimum is 17).
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations, islice
from pathlib import Path

import numpy as np

from ds_dgemma.errors import UserError
from ds_dgemma.files import atomic_file

BLANK = "."
SYMBOLS = {"digits": "123456789", "letters": "ABCDEFGHI"}
CLUES = {4: range(5, 10), 9: range(28, 46)}
HELD_OUT_4X4 = 40
HELD_OUT_9X9 = 0.1

Cells = tuple[int, ...]


def write_sudoku(size: int, split: str, count: int, seed: int, out: Path, symbols: str = "digits") -> None:
    """Write `count` puzzles as JSONL, in the `SYMBOLS` of that name, the file whole or not at all."""
    if count < 1:
        raise UserError(f"--count {count}: at least 1 puzzle is needed.")
    if out.is_dir():
        raise UserError(f"--out {out} is a directory; name the JSONL file to write.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as file:  # before the search, so that a path that cannot be written costs no wait
            for puzzle, solution in make_puzzles(size, split, count, seed):
                file.write(json.dumps(record(puzzle, solution, SYMBOLS[symbols])) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}). Name another file.") from error


def record(puzzle: Cells, solution: Cells, symbols: str = SYMBOLS["digits"]) -> dict[str, list[dict[str, str]]]:
    """One line of the file."""
    turns = {"user": to_text(puzzle, symbols), "assistant": to_text(solution, symbols)}
    return {"messages": [{"role": role, "content": content} for role, content in turns.items()]}


def to_text(cells: Cells, symbols: str = SYMBOLS["digits"]) -> str:
    """Write cells row by row in the symbols of 1 to n, `.` for a blank."""
    return "".join(symbols[cell - 1] if cell else BLANK for cell in cells)


def make_puzzles(size: int, split: str, count: int, seed: int) -> list[tuple[Cells, Cells]]:
    """Return `count` different (puzzle, solution) of one split, shuffled; equal arguments, equal puzzles."""
    rng = random.Random(f"sudoku {size} {split} {seed}")
    pairs = _draw_4x4(split, count, rng) if size == 4 else _draw_9x9(split, count, rng)
    rng.shuffle(pairs)
    return pairs


def split_of(grid: Cells) -> str:
    """Return `train` or `test`, a property of the solution grid alone."""
    if len(grid) == 16:
        return "test" if grid in _held_out_4x4() else "train"
    return "test" if _hash(grid) < HELD_OUT_9X9 * 2**64 else "train"


@cache
def units(size: int) -> tuple[tuple[int, ...], ...]:
    """Return the cells of every row, column and box: each must hold every digit once."""
    box = round(size**0.5)
    rows = [tuple(size * row + column for column in range(size)) for row in range(size)]
    corners = [size * row + column for row in range(0, size, box) for column in range(0, size, box)]
    boxes = [tuple(corner + size * row + column for row in range(box) for column in range(box)) for corner in corners]
    return (*rows, *zip(*rows, strict=True), *boxes)


def solutions(puzzle: Sequence[int], rng: random.Random | None = None) -> Iterator[Cells]:
    """Find every completion, the cell with the fewest candidates first; `rng` shuffles the digits tried."""
    size = round(len(puzzle) ** 0.5)
    units_of = _units_of(size)
    cells = list(puzzle)
    used = [0] * (3 * size)  # per unit, bit d - 1 says that digit d is taken
    for cell, digit in enumerate(cells):
        if digit:
            for unit in units_of[cell]:
                used[unit] |= 1 << (digit - 1)

    def fill(blanks: list[int]) -> Iterator[Cells]:
        if not blanks:
            yield tuple(cells)
            return
        fewest, chosen, candidates = size + 1, -1, 0
        for cell in blanks:
            a, b, c = units_of[cell]
            free = ~(used[a] | used[b] | used[c]) & ((1 << size) - 1)
            if (options := free.bit_count()) < fewest:
                fewest, chosen, candidates = options, cell, free
                if options <= 1:
                    break
        digits = [digit for digit in range(1, size + 1) if candidates >> (digit - 1) & 1]
        if rng is not None:
            rng.shuffle(digits)
        others = [cell for cell in blanks if cell != chosen]
        a, b, c = units_of[chosen]
        for digit in digits:
            bit = 1 << (digit - 1)
            used[a], used[b], used[c], cells[chosen] = used[a] | bit, used[b] | bit, used[c] | bit, digit
            yield from fill(others)
            used[a], used[b], used[c] = used[a] ^ bit, used[b] ^ bit, used[c] ^ bit

    return fill([cell for cell, digit in enumerate(cells) if not digit])


def is_unique(puzzle: Sequence[int]) -> bool:
    """Whether there is exactly one solution."""
    return len(list(islice(solutions(puzzle), 2))) == 1


@cache
def _units_of(size: int) -> tuple[tuple[int, ...], ...]:
    """Return the three units of every cell, as indices into `units`."""
    return tuple(tuple(u for u, unit in enumerate(units(size)) if cell in unit) for cell in range(size * size))


def _hash(grid: Cells) -> int:
    return int.from_bytes(hashlib.sha256(to_text(grid).encode()).digest()[:8], "big")


@cache
def _all_4x4() -> tuple[Cells, ...]:
    return tuple(solutions([0] * 16))


@cache
def _held_out_4x4() -> frozenset[Cells]:
    return frozenset(sorted(_all_4x4(), key=_hash)[:HELD_OUT_4X4])


def _draw_4x4(split: str, count: int, rng: random.Random) -> list[tuple[Cells, Cells]]:
    """Draw without replacement from all puzzles of each clue count."""
    grids = [grid for grid in _all_4x4() if split_of(grid) == split]
    clue_sets = {clues: _clue_sets(clues) for clues in CLUES[4]}
    pools = {clues: [] for clues in CLUES[4]}  # per clue count and grid: the clue sets that leave one solution
    for grid in grids:
        essential = _unavoidable(grid)
        for clues, sets in clue_sets.items():
            pools[clues].append(sets[((sets[:, None] & essential) != 0).all(axis=1)])
    sizes = {clues: sum(map(len, pool)) for clues, pool in pools.items()}
    if count > sum(sizes.values()):
        raise UserError(f"--count {count}: {split} has {sum(sizes.values())} different 4x4 puzzles; ask for fewer.")
    pairs = []
    for clues, quota in _even_quotas(sizes, count).items():
        starts = np.cumsum([0, *map(len, pools[clues])])
        for drawn in rng.sample(range(sizes[clues]), quota):
            which = int(np.searchsorted(starts, drawn, side="right")) - 1
            kept = int(pools[clues][which][drawn - starts[which]])
            grid = grids[which]
            pairs.append((tuple(digit if kept >> cell & 1 else 0 for cell, digit in enumerate(grid)), grid))
    return pairs


def _clue_sets(clues: int) -> np.ndarray:
    """Return every choice of that many of 16 cells as the bits of a uint16."""
    return np.array([sum(1 << cell for cell in cells) for cells in combinations(range(16), clues)], np.uint16)


def _unavoidable(grid: Cells) -> np.ndarray:
    """Return the minimal sets of cells in which another grid differs: clues that touch each fix this grid."""
    others = np.array(_all_4x4())
    bits = (others != np.array(grid)) @ (1 << np.arange(16))
    minimal: list[int] = []
    for cells in sorted(set(bits.tolist()) - {0}, key=int.bit_count):
        if not any(smaller & cells == smaller for smaller in minimal):
            minimal.append(cells)
    return np.array(minimal, np.uint16)


def _even_quotas(available: dict[int, int], count: int) -> dict[int, int]:
    """Share `count` out evenly; what a scarce kind cannot give, the others do."""
    quotas = {}
    scarcest_first = sorted(available, key=lambda kind: available[kind])
    for place, kind in enumerate(scarcest_first):
        quotas[kind] = min(available[kind], count // (len(scarcest_first) - place))
        count -= quotas[kind]
    return quotas


def _draw_9x9(split: str, count: int, rng: random.Random) -> list[tuple[Cells, Cells]]:
    found: dict[Cells, Cells] = {}
    while len(found) < count:
        grid = _random_9x9(split, rng)
        clues = CLUES[9][len(found) % len(CLUES[9])]
        if puzzle := _blank_out(grid, clues, rng):
            found[puzzle] = grid
    return list(found.items())


def _random_9x9(split: str, rng: random.Random) -> Cells:
    """Fill a grid at random, then rename its digits until it lies in the split."""
    grid = next(solutions([0] * 81, rng))
    while split_of(grid) != split:
        names = rng.sample(range(1, 10), 9)
        grid = tuple(names[digit - 1] for digit in grid)
    return grid


def _blank_out(grid: Cells, clues: int, rng: random.Random) -> Cells | None:
    """Blank cells in random order, keeping those that the solution needs; None if `clues` is not reached."""
    cells, left = list(grid), 81
    for cell in rng.sample(range(81), 81):
        cells[cell] = 0
        if is_unique(cells):
            left -= 1
            if left == clues:
                return tuple(cells)
        else:
            cells[cell] = grid[cell]
    return None
