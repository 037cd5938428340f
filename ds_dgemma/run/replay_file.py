"""`replay/step-NNNNNN.json`: what it takes to compute a skipped step again, alone.

A batch is a function of the run's config, its data, the step and how it was shared out, so the file names those.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_dgemma.errors import UserError, first_fault, told
from ds_dgemma.files import atomic_file

REPLAY = "replay"


class _Part(BaseModel):
    # NaN and infinity, which JSON has not, are strings
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class SeenMicroBatch(_Part):
    """One forward and backward of one rank."""

    rank: int
    micro_batch: int
    bad: bool  # its loss was not finite
    loss: float  # as differentiated: the share of the global mean, times ranks and micro-batches
    examples: tuple[int, ...]  # their ids

    @property
    def name(self) -> str:
        """Which one it is."""
        return f"rank {self.rank} micro-batch {self.micro_batch}"


class SkippedStep(_Part):
    """A step that was left out on every rank."""

    step: int
    # gradient: every loss was finite; which rank its gradient went bad on is not to be seen after it was reduced
    problem: Literal["loss", "gradient"]
    ranks: int
    micro_batch_size: int  # it may change within a run
    model_digest: str
    data_digest: str
    checkpoint: Path | None  # the newest at that moment; None: the model that the run started from
    micro_batches: tuple[SeenMicroBatch, ...] = Field(min_length=1)


def write_skipped(step: SkippedStep, run_dir: Path) -> Path:
    """Write the file, whole or not at all; return where."""
    path = run_dir / REPLAY / f"step-{step.step:06d}.json"
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as file:
        file.write(step.model_dump_json(indent=1) + "\n")
    return path


def read_skipped(path: Path) -> SkippedStep:
    """Read a replay file.

    Raises:
        UserError: it cannot be read, or is no replay file.
    """
    try:
        return SkippedStep.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise UserError(f"{path} is no replay file: {first_fault(error)}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {told(error)}.") from None
