"""TensorBoard, by torch's own writer: event files, https://docs.pytorch.org/docs/stable/tensorboard.html."""

import json
from pathlib import Path
from typing import Any

from ds_dgemma.tracking.services.service import Rows, Service, columns, package


class TensorBoard(Service):
    """Below the run directory, in `tensorboard/`; what was told after the step of a resume is purged."""

    def __init__(self, run_dir: Path, settings: dict[str, Any], start: int) -> None:
        super().__init__()
        writer = package("torch.utils.tensorboard", "tracking.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(run_dir / "tensorboard"), purge_step=start + 1 if start else None)
        self._writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```", start)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Words and tables go to the page of texts, as Markdown."""
        for name, value in values.items():
            if isinstance(value, list):
                self._writer.add_text(name, _markdown(value), step)
            elif isinstance(value, str):
                self._writer.add_text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def finish(self, failed: bool) -> None:
        """Write what is left."""
        self._writer.close()


def _markdown(rows: Rows) -> str:
    names = columns(rows)
    lines = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
