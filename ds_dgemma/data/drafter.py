"""What all rows of a source are read with: rows to documents as text."""

import json
from collections import Counter
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerFast

from ds_dgemma.config.data import Learn
from ds_dgemma.data.answers import answers_of, learned_weights
from ds_dgemma.data.control_tokens import ControlTokenPolicy, checked, control_tokens_of
from ds_dgemma.data.declarations import Unseen, unseen_parts
from ds_dgemma.data.drafts import Chat, Draft, Learned
from ds_dgemma.data.formats import BadRow, Conversation, Text
from ds_dgemma.data.image_files import ImageFiles, Measured
from ds_dgemma.data.pictures import origins
from ds_dgemma.data.recipes import Recipes
from ds_dgemma.data.rendering import ChatTemplate, Render, as_templates_read

DECLARATIONS = 1000  # of tools, whose unseen parts are remembered


class Drafter:
    """What all rows of a source are read with."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        learn: Learn,
        policy: ControlTokenPolicy,
        variables: dict[str, Any],
        images: ImageFiles | None = None,
        ignore: Collection[str] = (),
    ):
        """`images`: how those of rows are read; None: the model has no tokens for any."""
        self.tokenizer = tokenizer
        self.unread: Counter[str] = Counter()  # parts of tools' declarations that are not shown and say nothing
        self._learn: Learn = learn
        self._policy: ControlTokenPolicy = policy
        self._variables = variables
        self._images = images
        self._image_tokens: Collection[str] = images.tokens if images else ()
        self._ignore = ignore
        self._unseen: dict[tuple[str, str], list[Unseen]] = {}
        self._control = control_tokens_of(tokenizer)
        self._template: ChatTemplate | None = None  # running text needs none
        self._recipes: Recipes | None = None

    @property
    def image_token(self) -> str | None:
        """What stands for a soft token of an image."""
        return next(iter(self._image_tokens), None)

    def drafts(self, data: Conversation | Text) -> list[Draft]:
        """The documents of a row; the one that ends with its last learned answer first.

        Raises:
            BadRow: the row cannot be learned as it is.
            UserError: the tokenizer has no chat template.
        """
        if isinstance(data, Text):
            return [self._running(data.text)]
        template = self._template = self._template or ChatTemplate(self.tokenizer, self._variables)
        if data.tools is None and not data.template_kwargs and not data.has_images:
            self._recipes = self._recipes or Recipes(
                *template.without_tools(), self._control, self._image_tokens, self._by
            )
            if (known := self._recipes.drafts(data)) is not None:
                return known
        return self._by(data, None)

    def _by(self, data: Conversation, render: Render | None) -> list[Draft]:
        """By the template's own rendering, or by `render`."""
        template = self._template
        assert template
        brought = {"messages": data.messages, "tools": data.tools, "chat_template_kwargs": data.template_kwargs}
        kept = checked(brought, self._control, self._policy, self._image_tokens)
        messages = as_templates_read(kept["messages"])
        render = render or template.for_row(kept["tools"], kept["chat_template_kwargs"])
        found = self._find(data) if data.has_images else []
        if found:
            assert self._images
            render = self._images.rendering(render, found)
        if kept["tools"]:
            self._check_tools(kept["tools"], kept["chat_template_kwargs"])
        answers = answers_of(messages, data.weights, render)
        weights = learned_weights(answers, self._learn)
        return Chat(kept["tools"], answers, weights, render, self._control, kept is not brought, found).drafts()

    def _find(self, data: Conversation) -> list[Measured]:
        if self._images is None:
            raise BadRow("has images, and this model has no tokens for them.")
        return [self._images.find(origin) for origin in origins(data.messages)]

    def _check_tools(self, tools: list[dict[str, Any]], variables: dict[str, Any]) -> None:
        """Refuse declarations with words that the template does not show, and note other parts."""
        unread: set[str] = set()
        for number, tool in enumerate(tools):
            for part in self._unseen_of(tool, variables):
                if part.key in self._ignore:
                    continue
                if part.says:
                    raise BadRow(
                        f"the chat template does not show tools[{number}].{part.name} of {tool['function']['name']} to "
                        f"the model. Say it in a description, or name {part.key} in data.ignore to leave it out."
                    )
                unread.add(f"tools' {part.key}")
        self.unread.update(unread)

    def _unseen_of(self, tool: dict[str, Any], variables: dict[str, Any]) -> list[Unseen]:
        template = self._template
        assert template
        key = (json.dumps(tool), json.dumps(variables))
        if key not in self._unseen:
            if len(self._unseen) >= DECLARATIONS:
                self._unseen.clear()
            self._unseen[key] = unseen_parts(tool, lambda other: template.of_tool(other, variables))
        return self._unseen[key]

    def _running(self, text: str) -> Draft:
        brought = {"text": text}
        kept = checked(brought, self._control, self._policy, self._image_tokens)
        if not text.strip():
            raise BadRow("text is empty: nothing to learn.")
        return Draft(Learned("", kept["text"], 1.0, 0, 0), hidden=kept is not brought)
