"""What the sections of the config have in common."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

# Of a setting, or a section, that leaves the numbers of a run alone; config.yaml in the run directory fixes the others
MAY_CHANGE = "may change within a run"


class Section(BaseModel):
    """A strict, frozen group of settings: an unknown key is an error, never a silent default."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic reads true as 1; nobody means that."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in members_of(annotation):
            raise PydanticCustomError("boolean", "neither true nor false has a meaning here")
        return value


def members_of(annotation: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    yield annotation
    for member in get_args(annotation):
        yield from members_of(member)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, also where it may be null or holds a list of them; None for a plain setting."""
    return next((m for m in members_of(field.annotation) if isinstance(m, type) and issubclass(m, BaseModel)), None)
