"""`data`: where rows come from, what they are, and how they become token sequences."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ds_dgemma.config.section import MAY_CHANGE, Section

FormatName = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]  # data/formats.py
Learn = Literal["last", "all", "weights"]


class ColumnsSection(Section):
    """Where the turns of a row stand: a column's name, or a template with names in braces, `{question} {context}`."""

    prompt: str = Field(description="the user's turn")
    response: str = Field(description="the assistant's turn")
    system: str | None = Field(default=None, description="the system's turn")
    history: str | None = Field(default=None, description="column of earlier turns, a list of [user, assistant] pairs")
    images: str | None = Field(default=None, description="column of the user's image, or of a list of them")


class SourceSection(Section):
    """One source of a mixture; what it leaves out is taken from `data`."""

    path: str = Field(min_length=1, description="a file, folder, glob or hub dataset id")
    weight: float = Field(default=1.0, gt=0, description="how often its examples come, against their own number")
    config: str | None = Field(default=None, description="configuration name of a hub dataset")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub dataset")
    split: str | None = Field(default=None, description="split of a hub dataset")
    format: FormatName | None = Field(default=None, description="as data.format")
    columns: ColumnsSection | None = Field(default=None, description="as data.columns")
    learn: Learn | None = Field(default=None, description="as data.learn")
    ignore: tuple[str, ...] | None = Field(default=None, description="as data.ignore")


def _as_sources(value: Any) -> Any:
    """A name, a section or a list of both, as a list of sections."""
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": entry} if isinstance(entry, str) else entry for entry in entries)


Sources = Annotated[tuple[SourceSection, ...], BeforeValidator(_as_sources)]


class DataSection(Section):
    """Conversations and texts, and how they become token sequences."""

    train: Annotated[Sources, MAY_CHANGE] = Field(
        min_length=1,
        description="a file (JSONL, JSON, CSV, Parquet; also .gz), folder, glob or hub dataset id as text; or a list "
        "of these, each as text or {path: ..., weight: 2, ...}",
    )
    validation: Annotated[Sources | None, MAY_CHANGE] = Field(
        default=None, min_length=1, description="held-out data, as data.train"
    )
    hub_config: str | None = Field(default=None, description="configuration name of a hub dataset")
    train_split: str = Field(default="train", description="split of a hub dataset")
    validation_split: Annotated[str, MAY_CHANGE] = Field(default="test", description="split of a hub dataset")
    streaming: bool = Field(
        default=False, description="read and tokenize while training: for data that does not fit the disk"
    )
    shuffle_buffer: int = Field(
        default=10_000, ge=1, le=10**7, description="rows that are shuffled at once when streaming"
    )
    format: FormatName = Field(default="auto", description="what a row is; auto: seen from its keys")
    columns: ColumnsSection | None = Field(default=None, description="where prompt and response of a row stand")
    ignore: tuple[str, ...] = Field(
        default=(), description="keys of a row that are left out on purpose, though they hold words or settings"
    )
    invalid: Literal["error", "drop"] = Field(
        default="error", description="rows that cannot be trained on: stop and list them, or list them and go on"
    )
    learn: Learn = Field(
        default="last",
        description="last: the last answer; all: every answer; weights: every answer, and a conversation must say of "
        "one at least what it counts for. A weight of the row's own is obeyed in all three",
    )
    control_tokens: Literal["error", "text", "allow"] = Field(
        default="error",
        description="control tokens written in a text, such as <eos>: refuse the row, encode them as plain "
        "characters, or let them be control tokens",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="variables of the chat template, such as enable_thinking; a row's own come first"
    )
    allow_urls: bool = Field(default=False, description="fetch images that rows name by http(s) address")
    max_soft_tokens: Literal[70, 140, 280, 560, 1120] | None = Field(
        default=None, description="most tokens of an image; null: as the checkpoint's processor says"
    )
    max_length: int = Field(default=4096, ge=2, le=10**7, description="tokens of prompt, response and fill together")
    over_length: Literal["drop", "truncate", "error"] = Field(
        default="drop",
        description="examples over max_length: leave out, cut the last answer to whole canvases, or stop",
    )
    packing: bool = Field(default=False, description="several examples in a row of max_length; none sees another")
    group_by_length: bool = Field(default=False, description="micro-batches of examples of like length")
    workers: Annotated[int, Field(ge=0, le=1024), MAY_CHANGE] = Field(
        default=1, description="loader processes per rank; 0 loads inline"
    )

    def named(self, split: Literal["train", "validation"]) -> str:
        """The sources of a split, for a message."""
        return ", ".join(source.path for source in getattr(self, split) or ())

    @model_validator(mode="after")
    def _possible(self) -> "DataSection":
        if self.packing and self.group_by_length:
            raise ValueError("packing and group_by_length: packed rows are all of one length, set one of them")
        return self
