"""Inspect on DiffusionGemma: `inspect eval TASK --model ds_dgemma/PATH`, by an entry point of this package.

PATH is a checkpoint, a hub id, a run's directory or a PEFT adapter; `-M adapter=DIR`, `-M step=N`, `-M revision=REV`,
`-M batch_size=N` and the sampler's settings (`-M t_max=0.6`) are model arguments. Tools are declared by the model's own
template, and calls are read from its answers.

Source: inspect_ai 0.3 `model/_model.py` (`ModelAPI`).
"""

# pyright: reportMissingImports=false
# an extra: not there where types are checked
from collections import Counter
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolCall, ToolChoice, ToolInfo

from ds_dgemma.data.messages import BadRow, Message, read_message
from ds_dgemma.data.pictures import place, placed_in
from ds_dgemma.errors import UserError
from ds_dgemma.evaluation.answers import Said
from ds_dgemma.evaluation.prompts import message_ids
from ds_dgemma.evaluation.tasks.tool_call import CALL, arguments_of
from ds_dgemma.frameworks.served import answer_texts, cut, open_path, whole

UNUSED = (
    *("temperature", "top_p", "top_k", "frequency_penalty", "presence_penalty", "logit_bias", "logprobs"),
    *("num_choices", "response_schema"),
)


@dataclass
class _Asked:
    ids: list[int]
    seed: int
    max_new_tokens: int | None
    said: Said | None = None


@modelapi(name="ds_dgemma")
class DiffusionGemmaAPI(ModelAPI):
    """A model in this process. Requests that come while it answers wait, and are answered together."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008
        batch_size: int = 16,
        **settings: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config)
        try:
            self._batch_size = whole("batch_size", batch_size, 1)
            self._model = open_path(model_name, settings)
        except UserError as error:
            raise PrerequisiteError(str(error)) from error
        self._waiting, self._lock = list[_Asked](), anyio.Lock()
        self._times: Counter[tuple[int, ...]] = Counter()
        self._told = set[str]()

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answer a conversation. The same one asked again has another seed."""
        self._tell_unused(config, tool_choice)
        declared = [
            {"type": "function", "function": tool.model_dump(exclude_none=True, include=SHOWN)} for tool in tools
        ]
        try:
            messages = [read_message(_message(turn), f"message {n + 1}")[0] for n, turn in enumerate(input)]
            messages = placed_in(place(messages, [])[0], Path.cwd())
            ids = message_ids(self._model.found, messages, "the input", declared or None)
        except (UserError, BadRow) as error:
            raise PrerequisiteError(str(error)) from error
        key = tuple(ids)
        asked = _Asked(ids, (config.seed or 0) + self._times[key], config.max_tokens)
        self._times[key] += 1
        self._waiting.append(asked)
        while asked.said is None:
            async with self._lock:
                if asked.said is None:
                    await self._answer_some()
        text, ended = cut(asked.said, config.max_tokens, config.stop_seqs or (), self._model)
        return _output(self.model_name, text, ended, len(ids), asked.said.tokens, bool(tools))

    async def _answer_some(self) -> None:
        first = self._waiting[0].max_new_tokens
        batch = [one for one in self._waiting if one.max_new_tokens == first][: self._batch_size]
        prompts, seeds = [one.ids for one in batch], [one.seed for one in batch]
        said = await anyio.to_thread.run_sync(answer_texts, self._model, prompts, seeds, first, self._batch_size)
        for one, answer in zip(batch, said, strict=True):
            one.said = answer
            self._waiting.remove(one)

    def max_connections(self) -> int:
        """As many as are answered at once, and as many again that wait."""
        return 2 * self._batch_size

    def _tell_unused(self, config: GenerateConfig, tool_choice: ToolChoice) -> None:
        unused = {name for name in UNUSED if getattr(config, name) is not None}
        if unused := (unused | ({"tool_choice"} if tool_choice not in ("auto", "none") else set())) - self._told:
            self._told |= unused
            getLogger(__name__).warning(
                "ds_dgemma: %s not used: the sampler's settings are model arguments (-M t_max=...).",
                ", ".join(sorted(unused)),
            )


SHOWN = {"name", "description", "parameters"}


def _message(turn: ChatMessage) -> Message:
    """A message as rows of data have it."""
    kinds = {"text"} if isinstance(turn.content, str) else {part.type for part in turn.content}
    if others := kinds - {"text", "reasoning", "image"}:
        raise UserError(f"a message holds {', '.join(sorted(others))}. Only text and images are answered.")
    read: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if "image" in kinds:
        parts = [part for part in turn.content if not isinstance(part, str) and part.type in ("text", "image")]
        read["content"] = [{"type": part.type, part.type: getattr(part, part.type)} for part in parts]
    if isinstance(turn, ChatMessageAssistant) and turn.tool_calls:
        read["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.function, "arguments": call.arguments}}
            for call in turn.tool_calls
        ]
    if isinstance(turn, ChatMessageTool):
        read |= {"name": turn.function, "tool_call_id": turn.tool_call_id}
    return read


def _output(name: str, text: str, ended: bool, asked: int, said: int, has_tools: bool) -> ModelOutput:
    calls = []
    for number, match in enumerate(CALL.finditer(text) if has_tools else ()):
        arguments = arguments_of(match[2])
        problem = None if isinstance(arguments, dict) else f"arguments are no object: {match[2]}"
        calls.append(ToolCall(f"call_{number}", match[1], arguments if problem is None else {}, problem))
    content = CALL.sub("", text) if calls else text
    message = ChatMessageAssistant(content=content, model=name, source="generate", tool_calls=calls or None)
    reason = "tool_calls" if calls else "stop" if ended else "max_tokens"
    return ModelOutput(
        model=name,
        choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
        usage=ModelUsage(input_tokens=asked, output_tokens=said, total_tokens=asked + said),
    )
