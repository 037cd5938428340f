"""A conversation in the terminal."""

import sys

from ds_dgemma.data.messages import Message
from ds_dgemma.errors import UserError, say
from ds_dgemma.evaluation.answers import answer_prompts
from ds_dgemma.evaluation.open_model import OpenModel
from ds_dgemma.evaluation.prompts import message_ids
from ds_dgemma.evaluation.watch import Watch

HELP = "/watch shows canvases or not, /reset forgets what was said, /quit ends (or Ctrl-D)"


def chat(model: OpenModel, system: str | None, seed: int, watches: bool) -> None:
    """Read lines, answer them, until the input ends. The n-th answer has the seed `seed + n`."""
    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages, answers = list(begin), 0
    print(HELP, file=sys.stderr)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return
        if said == "/quit":
            return
        if said == "/reset":
            messages = list(begin)
        elif said == "/watch":
            watches = not watches
            print(f"watching: {'on' if watches else 'off'}", file=sys.stderr)
        elif said.startswith("/"):
            print(f"{said.split()[0]}: no such command. {HELP}", file=sys.stderr)
        elif said:
            asked: list[Message] = [*messages, {"role": "user", "content": said}]
            try:
                ids = message_ids(model.found, asked, "this message")
            except UserError as problem:  # of this line alone
                print(problem, file=sys.stderr)
                continue
            watch = Watch(model.found.model.tokenizer) if watches else None
            (answer,) = answer_prompts(model, [ids], 1, [seed + answers], watch)
            if watch is not None:
                watch.close()
            say(answer.text)
            messages = [*asked, {"role": "assistant", "content": answer.text}]
            answers += 1
