"""Pictures of coloured shapes, as conversations: a task that needs the image, with answers that can be checked.

A picture is 64 x 64 pixels, four cells of 32; in each stands one shape, of a size and at a place of its own. The answer
names the cells row by row, a letter for the colour and one for the kind: `RcGsBtYx` is a red circle, a green square, a
blue triangle and a yellow cross. There are 24 of each cell, 331,776 of all four: a guess is right in one of that many.

What a picture shows belongs to train or to test by a fixed hash, never by the seed: about one in ten is test, and no
answer is in both. A file has no answer twice.
"""

import hashlib
import json
import random
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ds_dgemma.errors import UserError

COLOURS = {
    "R": (255, 0, 0),
    "G": (0, 255, 0),
    "B": (0, 0, 255),
    "Y": (255, 255, 0),
    "M": (255, 0, 255),
    "C": (0, 255, 255),
}
KINDS = "cstx"  # circle, square, triangle, cross
BACKGROUND = (128, 128, 128)
CELL = 32  # pixels
SMALLEST, LARGEST = 24, 29  # pixels, of a shape
QUESTION = "What is where?"
HELD_OUT = 0.1
PICTURE_NAME = re.compile(r"\d{6,}\.png")


def write_shapes(split: str, count: int, seed: int, out: Path) -> None:
    """Write `count` conversations as JSONL and their pictures into a folder beside it, named as the file is.

    What an earlier call left there is replaced. A file that is there has all its pictures.
    """
    if count < 1:
        raise UserError(f"--count {count}: at least 1 picture is needed.")
    if out.is_dir() or not out.suffix:
        raise UserError(f"--out {out}: name the JSONL file to write, such as {out}/train.jsonl.")
    folder = out.with_suffix("")
    try:
        if folder.exists() and not (folder.is_dir() and all(map(PICTURE_NAME.fullmatch, _names(folder)))):
            raise UserError(
                f"--out {out}: its pictures would go to {folder}, which holds something else. Choose another."
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as part:
            rows, pictures = Path(part, "rows"), Path(part, "pictures")
            pictures.mkdir()
            with rows.open("w") as file:
                for number, (answer, picture) in enumerate(make_shapes(split, count, seed), 1):
                    name = f"{number:06}.png"
                    picture.save(pictures / name)
                    file.write(json.dumps(record(f"{folder.name}/{name}", answer)) + "\n")
            out.unlink(missing_ok=True)
            if folder.exists():
                folder.rename(Path(part, "old"))
            pictures.rename(folder)
            rows.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: cannot write there ({error.strerror}). Name another file.") from error


def record(picture: str, answer: str) -> dict[str, list[dict[str, Any]]]:
    """One line of the file."""
    asked = [{"type": "image", "path": picture}, {"type": "text", "text": QUESTION}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def make_shapes(split: str, count: int, seed: int) -> list[tuple[str, Image.Image]]:
    """Return `count` different answers of one split with their pictures; equal arguments, equal pictures."""
    answers = _answers(split)
    if count > len(answers):
        raise UserError(f"--count {count}: {split} has {len(answers)} different pictures; ask for fewer.")
    rng = random.Random(f"shapes {split} {seed}")
    return [(answer, draw(answer, rng)) for answer in rng.sample(answers, count)]


def split_of(answer: str) -> str:
    """Return `train` or `test`, a property of the answer alone."""
    number = int.from_bytes(hashlib.sha256(answer.encode()).digest()[:8], "big")
    return "test" if number < HELD_OUT * 2**64 else "train"


def draw(answer: str, rng: random.Random) -> Image.Image:
    """Draw the shapes that an answer names, each of a random size and at a random place in its cell."""
    picture = Image.new("RGB", (2 * CELL, 2 * CELL), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for cell in range(4):
        colour, kind = answer[2 * cell : 2 * cell + 2]
        size = rng.randint(SMALLEST, LARGEST)
        left, top = (CELL * corner + rng.randint(1, CELL - size - 1) for corner in (cell % 2, cell // 2))
        _draw_shape(pen, kind, left, top, size, COLOURS[colour])
    return picture


def _draw_shape(pen: ImageDraw.ImageDraw, kind: str, left: int, top: int, size: int, colour: tuple[int, ...]) -> None:
    right, bottom, third = left + size - 1, top + size - 1, size // 3
    if kind == "c":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif kind == "s":
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif kind == "t":
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
    else:
        pen.rectangle((left + third, top, right - third, bottom), fill=colour)
        pen.rectangle((left, top + third, right, bottom - third), fill=colour)


@cache
def _answers(split: str) -> tuple[str, ...]:
    """Every answer of a split."""
    cells = [colour + kind for colour in COLOURS for kind in KINDS]
    pairs = [first + second for first in cells for second in cells]
    return tuple(answer for upper in pairs for lower in pairs if split_of(answer := upper + lower) == split)


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]
