"""What the sections of the config have in common."""

from pydantic import BaseModel, ConfigDict

# Of a setting, or a section, that leaves the numbers of a run alone; config.yaml in the run directory fixes the others
MAY_CHANGE = "may change within a run"


class Section(BaseModel):
    """A strict, frozen group of settings: an unknown key is an error, never a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
