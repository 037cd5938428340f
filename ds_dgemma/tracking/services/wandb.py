"""Weights & Biases, https://docs.wandb.ai: uploads in a process of its own."""

import secrets
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ds_dgemma.config.tracking import WandbSection
from ds_dgemma.errors import UserError, first_fault
from ds_dgemma.tracking.services.service import Service, with_tables

START_SECONDS = 60
FINISH_SECONDS = 300


class Wandb(Service):
    """The run id lives in the run directory, so a resumed run continues its curve."""

    def __init__(self, config: WandbSection, run_dir: Path, settings: dict[str, Any]) -> None:
        import wandb  # slow to import and pointless when disabled

        self._wandb = wandb
        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=config.name or run_dir.resolve().name,
                tags=config.tags,
                id=id_file.read_text().strip(),
                resume="allow",
                mode=config.mode,
                dir=run_dir,
                config=settings,
                # console: wandb's capture of stdout would record every redraw of the progress bar
                settings=wandb.Settings(init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS, console="off"),
            )
        except (wandb.Error, ValidationError) as error:  # of its own settings
            reason = first_fault(error) if isinstance(error, ValidationError) else error
            raise UserError(
                f"wandb did not start (tracking.wandb.mode = {config.mode}): {reason}\n"
                "  Log in with `wandb login`, or set tracking.wandb.mode to offline (`wandb sync` uploads "
                "later) or to disabled."
            ) from error
        super().__init__(self._run.step)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Tables become wandb's."""
        self._run.log(with_tables(values, self._wandb.Table), step=step)

    def finish(self, failed: bool) -> None:
        """At most FINISH_SECONDS."""
        self._run.finish(exit_code=int(failed))
