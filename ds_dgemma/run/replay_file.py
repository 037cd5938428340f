"""`replay/step-NNNNNN.json`: what a skipped step computed on, enough to compute it again alone.

The batch is a function of seed, step and data, so its ids stand for it; noise levels, canvases and coins are there
for the reader, and to be compared when it is made again.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ds_dgemma.checkpoint.run_state import step_directories
from ds_dgemma.errors import UserError, first_fault, told
from ds_dgemma.files import atomic_file
from ds_dgemma.run.directory import CHECKPOINTS

REPLAY = "replay"


class _Part(BaseModel):
    # NaN and infinity, which JSON has not, are strings
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class SeenExample(_Part):
    """One example of a micro-batch."""

    id: int  # of its source and row
    index: int  # among the examples that are trained on
    epoch: int
    canvases: tuple[int, ...]  # where the scored ones start
    noise_levels: tuple[float, ...]  # of each of them
    self_conditioning: tuple[bool, ...]  # of each of them


class SeenMicroBatch(_Part):
    """One forward and backward of one rank."""

    rank: int
    micro_batch: int
    bad: bool  # its loss was not finite
    loss: float  # as differentiated: the share of the global mean, times ranks and micro-batches
    diffusion_nll: float
    ar_nll: float
    examples: tuple[SeenExample, ...]

    @property
    def name(self) -> str:
        """Which one it is."""
        return f"rank {self.rank} micro-batch {self.micro_batch}"


class SkippedStep(_Part):
    """A step that was left out on every rank."""

    step: int
    seed: int
    # gradient: every loss was finite; which rank its gradient went bad on is not to be seen after it was reduced
    problem: Literal["loss", "gradient"]
    config: Path  # the run's config.yaml
    model_digest: str
    data_digest: str
    checkpoint: Path | None  # the newest at that moment; None: the model that the run started from
    steps_after_checkpoint: int  # that were made, or skipped, between it and this one
    micro_batches: tuple[SeenMicroBatch, ...] = Field(min_length=1)

    @property
    def bad(self) -> list[SeenMicroBatch]:
        """The micro-batches whose loss was not finite."""
        return [seen for seen in self.micro_batches if seen.bad]


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


def checkpoints_until(run_dir: Path, step: int) -> list[Path]:
    """The run's checkpoints of a step and before, newest first; that of a skipped step has the weights it read."""
    found = step_directories(run_dir / CHECKPOINTS)
    return [path for number, path in reversed(found) if number <= step]
