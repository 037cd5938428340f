"""trackio, https://huggingface.co/docs/trackio: a database on this machine, or a Space of the hub."""

from pathlib import Path
from typing import Any

from ds_dgemma.config.tracking import TrackioSection
from ds_dgemma.errors import UserError, first_line
from ds_dgemma.tracking.services.service import Service, package, with_tables


class Trackio(Service):
    """A run is known by its name; it is continued where the run directory has told of `told` steps already."""

    def __init__(self, config: TrackioSection, run_dir: Path, settings: dict[str, Any], told: int) -> None:
        super().__init__(told + 1 if told else 0)
        self._trackio = package("trackio", "tracking.trackio", "trackio")
        try:
            self._run = self._trackio.init(
                project=config.project,
                name=config.name or run_dir.resolve().name,
                space_id=config.space_id,
                config=settings,
                resume="allow" if told else "never",
                embed=False,
            )
        except Exception as error:  # of the hub, its login, the database
            raise UserError(f"trackio did not start (tracking.trackio): {first_line(error)}") from error

    def log(self, values: dict[str, Any], step: int) -> None:
        """Tables become trackio's."""
        self._run.log(with_tables(values, self._trackio.Table), step=step)

    def finish(self, failed: bool) -> None:
        """trackio waits 30 seconds for its sender."""
        self._run.finish()
