"""What the chat template writes: the prompt that `generate` will be given, and the answer behind it.

The prompt is the template's rendering of all messages before an answer, with the generation prompt; the response is
what the template writes from there to the end of the answer. Generation tags in the template are not needed.

- Usually the prompt is a prefix of the rendering with the answer.
- Some generation prompts say more than a rendered turn does (an empty thought channel in templates of Gemma 4's larger
  models): then the response starts where the turn's own content does, and the prompt stays what `generate` sees.
- Behind a tool's response some templates (the released one) open the turn again, which their generation prompt does
  not: that opener is neither learned nor put before the model. What the generation prompt writes there instead, such as
  the begin of a thought, must be the begin of the answer.

Anything else is refused.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Template, meta
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils as templates  # its private names are used in this file only

from ds_dgemma.data.control_tokens import ControlTokens
from ds_dgemma.data.formats import BadRow, Message
from ds_dgemma.errors import UserError, did_you_mean

OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")

MARK = "\ue002"  # stands for a content
Render = Callable[[list[Message], bool], str]  # messages, whether the generation prompt follows


class Split(NamedTuple):
    """An answer as the template writes it."""

    prompt: str  # what `generate` will be given
    response: str  # what is learned
    whole: str  # the rendering up to and with the answer; it ends with the response


class ChatTemplate:
    """The tokenizer's chat template, compiled, and called without what `apply_chat_template` adds to each call."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, variables: dict[str, Any]):
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template, which says how "
                "a conversation is written. Put a chat_template.jinja beside its tokenizer.json."
            )
        if taken := [name for name in OWN_VARIABLES if name in variables]:
            raise UserError(
                f"data.chat_template_kwargs has {taken[0]}, which each row's conversation sets: leave it out."
            )
        self._tokenizer = tokenizer
        self._variables = {"documents": None, **tokenizer.special_tokens_map, **variables}
        self._plain: Render | None = None
        self._compiled: dict[bool, tuple[Template, dict[str, Any]]] = {}
        if unknown := self._unknown(variables):
            raise UserError(f"data.chat_template_kwargs has {unknown}")

    def for_row(self, tools: list[dict[str, Any]] | None, variables: dict[str, Any]) -> Render:
        """The function that renders messages of a row, with its tools and its own variables."""
        if tools is None and not variables:
            self._plain = self._plain or self._bound(None, {})
            return self._plain
        return self._bound(tools, variables)

    def of_tool(self, tool: dict[str, Any], variables: dict[str, Any]) -> str:
        """A short conversation with one tool; may raise whatever the template does."""
        return self._bound([tool], variables)([{"role": "user", "content": "x"}], True)

    @cached_property
    def _reads(self) -> frozenset[str]:
        """The variables that the template asks for."""
        reads = set(OWN_VARIABLES)
        for tools in (None, [{}]):
            environment = self._for_tools(tools)[0].environment
            reads |= meta.find_undeclared_variables(environment.parse(self._tokenizer.get_chat_template(None, tools)))
        return frozenset(reads)

    def _unknown(self, variables: dict[str, Any]) -> str | None:
        """The begin of a message on a variable that no one would read."""
        name = next((name for name in variables if name not in self._reads), None)
        if name is None:
            return None
        return f"{name}, which the chat template does not read. Leave it out.{did_you_mean(name, self._reads)}"

    def without_tools(self) -> tuple[Template, str, dict[str, Any]]:
        """The template for rows without tools, its source, and the variables of all rows."""
        template, variables = self._for_tools(None)
        return template, self._tokenizer.get_chat_template(None, None), {**variables, "tools": None}

    def _bound(self, tools: list[dict[str, Any]] | None, variables: dict[str, Any]) -> Render:
        if taken := [name for name in OWN_VARIABLES if name in variables]:
            raise BadRow(f"chat_template_kwargs has {taken[0]}, which the row's conversation sets: leave it out.")
        if unknown := self._unknown(variables):
            raise BadRow(f"chat_template_kwargs has {unknown}")
        template, common = self._for_tools(tools)
        variables = {**common, **variables, "tools": tools}
        environment, blocks = template.environment, template.blocks

        def render(messages: list[Message], add_generation_prompt: bool) -> str:
            own = {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
            try:  # `template.render` merges its globals anew in each call, which costs more than the rendering
                context = environment.context_class(environment, own, template.name, blocks)
                return "".join(template.root_render_func(context))
            except Exception as error:  # the template is a program of somebody else's
                raise BadRow(f"the chat template refuses this conversation: {error}") from error

        return render

    def _for_tools(self, tools: list[dict[str, Any]] | None) -> tuple[Template, dict[str, Any]]:
        """The template for rows with or without tools, and the variables of all rows."""
        if bool(tools) not in self._compiled:
            try:
                text = self._tokenizer.get_chat_template(None, tools or None)
                template: Template = templates._compile_jinja_template(text)
            except Exception as error:
                raise UserError(f"the chat template cannot be read: {error}") from error
            self._compiled[bool(tools)] = template, {**template.globals, **self._variables}
        return self._compiled[bool(tools)]


def as_templates_read(messages: list[Message]) -> list[Message]:
    """The messages with their thoughts under all names that templates know."""
    if any("reasoning_content" in message for message in messages):
        return templates._alias_reasoning_fields(messages)
    return messages


def split(before: list[Message], upto: list[Message], render: Render, control: ControlTokens) -> Split:
    """Render an answer, given the messages before it and those up to and with it."""
    prompt, whole = render(before, True), render(upto, False)
    if follows_tool(before) and (opened := _opened_again(before, upto, render)):
        base, head = opened
        begun = head + prompt[len(base) :]
        if not whole.startswith(begun):
            raise _open_thought(prompt[len(base) :])
        return _some(prompt, whole, len(begun))
    if prompt and whole.startswith(prompt):
        return _some(prompt, whole, len(prompt))
    head = _before_content(before, upto, render)
    if head and prompt.startswith(head) and whole.startswith(head):
        if _opens(prompt[len(head) :], control):
            raise _open_thought(prompt[len(head) :])
        return _some(prompt, whole, len(head))
    raise _unknown_start(before, prompt, whole)


def follows_tool(messages: list[Message]) -> bool:
    """Whether the last words are a tool's."""
    return bool(messages) and (messages[-1]["role"] == "tool" or bool(messages[-1].get("tool_responses")))


def _opened_again(before: list[Message], upto: list[Message], render: Render) -> tuple[str, str] | None:
    """The text before an answer and the same with an opener of the turn, where the generation prompt writes none."""
    base, prompt, head = render(before, False), render(before, True), _before_content(before, upto, render)
    if not (prompt.startswith(base) and head.startswith(base)) or prompt.startswith(head):
        return None
    user = next((end for end, message in enumerate(before, 1) if message["role"] == "user"), None)
    closed, asked = render(before[:user], False), render(before[:user], True)
    usual = asked[len(closed) :] if asked.startswith(closed) else ""
    return (base, head) if usual.startswith(head[len(base) :]) else None


def _before_content(before: list[Message], upto: list[Message], render: Render) -> str:
    if len(upto) == len(before):  # the content of a message whose calls and responses are in the prompt
        marked = [*before[:-1], {**upto[-1], "content": MARK}]
    else:
        marked = [*before, {"role": "assistant", "content": MARK}]
    return render(marked, False).rpartition(MARK)[0]


def _opens(text: str, control: ControlTokens) -> bool:
    """Whether text that only the generation prompt has leaves something open, such as a thought."""
    return any(name in text for name in control.added) and not text.rstrip().endswith(control.added)


def _unknown_start(before: list[Message], prompt: str, whole: str) -> BadRow:
    both = next((n for n, message in enumerate(before) if message.get("tool_calls") and message["content"]), None)
    if both is not None:
        return BadRow(
            f"messages[{both}] has both content and tool_calls, and this chat template writes that content behind the "
            "tools' responses: put it into its reasoning_content, or leave it out."
        )
    return BadRow(
        f"the chat template renders what stands before messages[{len(before)}] differently once that answer is there: "
        f"for generation ...{prompt[-40:]!r}, with the answer ...{whole[-40:]!r}. A template that rewrites or joins "
        "earlier turns cannot be trained on: change it, or the data."
    )


def _open_thought(begun: str) -> BadRow:
    return BadRow(
        f"for generation the chat template begins this answer with {begun!r}, which the answer does not have. Give its "
        "thought as reasoning_content, or set enable_thinking: false in chat_template_kwargs."
    )


def _some(prompt: str, whole: str, start: int) -> Split:
    response = whole[start:]
    if not response.strip():
        raise BadRow("the chat template writes nothing for the answer, so there is nothing to learn.")
    return Split(prompt, response, whole)
