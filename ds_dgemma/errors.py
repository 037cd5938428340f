"""The one way this project tells a person what to change.

A `UserError` is a mistake that the reader can mend: its text says what was found, what was expected and what to do.
Entry points print it without a trace and exit with `EXIT_USER_ERROR`; any other exception is our own bug and keeps
its trace.
"""

import difflib
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError  # `--help` need not wait for it

# How a run ends; 0: it is complete. launch/README.md has the table for people. What a second signal ends has
# 128 + the signal's number, and our own bugs have Python's 1.
EXIT_USER_ERROR = 2
EXIT_ORPHANED = 3  # the launcher is gone, and there was no time for a checkpoint
EXIT_LOST_RANK = 4  # a rank died or hangs; rank 0 says which
EXIT_BAD_NUMBERS = 5  # health.max_bad_steps were skipped in a row
EXIT_UNREACHABLE = 69  # a node is away, nothing was started: later it may work (sysexits.h: EX_UNAVAILABLE)
EXIT_STOPPED = 75  # stopped by a signal with nothing lost: the same command continues (sysexits.h: EX_TEMPFAIL)


class UserError(Exception):
    """A mistake in a config, a file, an environment or a command line, told in the user's own spelling."""


class BadNumbers(Exception):
    """NaN or infinity in too many steps in a row; every rank raises it after the same step."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for the closest of `known`, or "" when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


def say(text: str) -> None:
    """Print, whatever characters the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def counted(count: int, thing: str) -> str:
    """Return "1 row" or "2,000 rows"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def one_line_each(heading: str, problems: list[str], advice: str | None = None) -> UserError:
    """Join every problem found into one error: a heading that counts them, then a line each, then what to do."""
    count = counted(len(problems), "problem")
    return UserError(
        "\n".join(
            [f"{count} in {heading}", *(f"  {problem}" for problem in [*problems, *([advice] if advice else [])])]
        )
    )


def told(error: Exception) -> str:
    """What the system says of a file: the file, where it is named, and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text: what a person needs of a library's long message."""
    return str(error).strip().split("\n")[0]


def first_fault(error: "ValidationError") -> str:
    """The first setting that pydantic refuses, with its value where it has one, and what was expected of it."""
    found = error.errors(include_url=False)[0]
    setting = ".".join(map(str, found["loc"]))
    value = "" if isinstance(found["input"], dict | list) else f" = {found['input']!r}"
    return f"{setting}{value}: {found['msg']}" if setting else found["msg"]
