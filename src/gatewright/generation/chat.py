"""A conversation with a model: each turn reads only what is new, and the cache goes on from turn to turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from gatewright.errors import UserError
from gatewright.generation.opened import TextModel
from gatewright.generation.reader import Reader
from gatewright.generation.routing import NOTHING, routers_of, routing_data
from gatewright.generation.sampling import Sampling
from gatewright.generation.steps import check_tokens
from gatewright.generation.writing import End, Writer, Writing, show_pieces

NEW = "/new"
Show = Callable[[str], object]


class ContextFull(UserError):
    """The conversation has no room for an answer in the model's context."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer. `read_tokens`: how many ids were read for it, not those that the cache held;
    `end` as `Writer`, "context" where the context was full, "interrupted" by Ctrl-C.
    """

    user: str
    assistant: str
    end: End
    read_tokens: int
    new_tokens: int
    seconds: float
    routing: dict[str, Any] | None = None


class Chat:
    """A conversation that goes on from turn to turn. `messages` are its turns so far.

    Args: `template` is a file that replaces the model's own chat template; `system` the first message, ""
    for none; `interruptible`: Ctrl-C ends an answer, which counts as far as it went.
    Raises: UserError for a model without a chat template.
    """

    def __init__(
        self,
        opened: TextModel,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen
        writing: Writing = Writing(),  # noqa: B008
        system: str = "",
        template: Path | None = None,
        interruptible: bool = False,
    ) -> None:
        self.opened, self.sampling, self.writing = opened, sampling, writing
        self.template, self.system, self.interruptible = opened.chat_template(template), system, interruptible
        self.routing = writing.show_routing and bool(routers_of(opened.model))
        self.reader = Reader(opened.model, 1, 1, capture=self.routing)
        self.turns = 0
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the turns so far."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, question: str, show: Show = str, tell: Show = str) -> Turn:
        """Return the next turn; `show` takes its answer piece by piece, `tell` the lines of its routing.

        Raises: ContextFull where no token of an answer has room; the conversation stays as it was.
        """
        begun = time.monotonic()
        messages = [*self.messages, {"role": "user", "content": question}]
        ids, context = self.opened.conversation(self.template.ids(messages)), self.opened.model.context
        count = min(self.writing.max_new_tokens, context - len(ids))
        if len(ids) >= context:
            raise ContextFull(
                f"the conversation has {len(ids)} tokens, and the model a context of {context}; allowed: "
                "fewer, with room for an answer; begin a new one"
            )
        prompt, _ = check_tokens(self.opened.model, ids)
        kept = self.reader.go_on_with(prompt, len(ids) + count)
        writer = Writer(
            self.reader,
            prompt,
            self.opened.tokenizer,
            count=count,
            sampling=self.sampling,
            ends=self.opened.ends,
            stop=self.writing.stop,
            turn=self.turns,
        )
        try:
            show_pieces(writer, show, tell)
        except KeyboardInterrupt:
            if not self.interruptible:
                raise
            writer.end = "interrupted"
        cut_short = writer.end == "length" and count < self.writing.max_new_tokens
        self.messages = [*messages, {"role": "assistant", "content": writer.text}]
        self.turns += 1
        return Turn(
            user=question,
            assistant=writer.text,
            end="context" if cut_short else writer.end or "length",
            read_tokens=len(ids) - kept,
            new_tokens=len(writer.ids),
            seconds=time.monotonic() - begun,
            routing=self._routing(writer),
        )

    def _routing(self, writer: Writer) -> dict[str, Any] | None:
        if not self.routing:
            return None
        pieces = self.opened.tokenizer.pieces([token for token, _ in writer.routed])
        return routing_data(writer.routed, pieces, self.opened.model)


def talk(
    chat: Chat, lines: Iterable[str], show: Show, tell: Show, *, interactive: bool = False
) -> tuple[list[Turn], str]:
    """Return the turns of a conversation, a line each, and why it ended early, "" if it did not.

    Interactively, what does not fit is told, not returned, and the line "/new" begins a new conversation.
    """
    turns: list[Turn] = []
    if chat.writing.show_routing and not chat.routing:
        tell(NOTHING)
    for line in lines:
        question = line.rstrip("\r\n")
        if interactive and question.strip() == NEW:
            chat.begin_anew()
            tell("a new conversation")
        elif question.strip():
            try:
                turns.append(chat.ask(question, show, tell))
            except ContextFull as full:
                if not interactive:
                    return turns, str(full)
                tell(f"{full}: {NEW}")
                continue
            show("\n")
            if turns[-1].end == "context":
                tell(f"the context of {chat.opened.model.context} tokens is full: the answer ends here")
    return turns, ""


def typed_lines(keyboard: TextIO, terminal: TextIO) -> Iterator[str]:
    """Yield what somebody types, a line at a time behind a prompt, until the end of input (Ctrl-D)."""
    while True:
        print("> ", end="", file=terminal, flush=True)
        line = keyboard.readline()
        if not line:
            print(file=terminal)
            return
        yield line
