"""A conversation with a model: turns of the assistant as streams of text, and the terminal chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TextIO

from open_lm import storage
from open_lm.errors import ConfigError, DataError, UserError
from open_lm.finetune.chat_tokens import ChatTokenizer
from open_lm.finetune.conversations import ASSISTANT, SYSTEM, USER, BadConversation, Message
from open_lm.generate.sampling import Sampling, TextStream, generate_ids
from open_lm.model.transformer import Transformer
from open_lm.system.names import user_path

HELP = """/reset        start a new conversation (the system prompt stays)
/system TEXT  start a new conversation with this system prompt; without TEXT, with none
/save FILE    append the conversation to a file of JSON lines, as make_sft.py reads them
/help         show this list
/quit         end (also Ctrl-D)"""


@dataclass
class Turn:
    """A turn of the assistant while it is generated.

    Attributes:
        prompt_tokens, new_tokens: token counts; the end of the turn counts too.
        finish_reason: "stop" if the turn ended, "length" if a limit did; None while it is generated.
    """

    prompt_tokens: int
    new_tokens: int = 0
    finish_reason: str | None = None
    text: str = ""


@dataclass(frozen=True)
class ChatModel:
    """A model with a chat template."""

    model: Transformer
    chat: ChatTokenizer
    name: str = "model"

    def reply(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        stop: Sequence[str] = (),
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> tuple[Turn, Iterator[str]]:
        """Return the next turn of the assistant, and an iterator that generates it and yields its text.

        Text that may be the beginning of a stop text is held back.

        Args:
            messages: the conversation so far.
            sampling: its stop ids are those of the template.
            stop: texts that end the turn; they are not part of it.
            is_cancelled: asked after every token; ends the turn like a limit.

        Raises:
            BadConversation: the template refuses the messages.
            ConfigError: the conversation is as long as the model's sequence length, or longer.
        """
        prompt = self.chat.prompt(messages)
        if len(prompt) >= self.model.seq_len:
            raise ConfigError(
                f"the conversation has {len(prompt)} tokens, but the model reads at most {self.model.seq_len - 1}; "
                "shorten it or start a new one"
            )
        turn = Turn(len(prompt))
        stops = [text for text in (*stop, self.chat.stop_text) if text]
        return turn, self._generate(turn, prompt, sampling, stops, is_cancelled)

    def _generate(
        self,
        turn: Turn,
        prompt: list[int],
        sampling: Sampling,
        stops: Sequence[str],
        is_cancelled: Callable[[], bool],
    ) -> Iterator[str]:
        tokenizer = self.chat.tokenizer
        limit = min(tokenizer.vocab_size, sampling.vocab_limit or tokenizer.vocab_size)
        sampling = replace(sampling, stop_ids=self.chat.stop_ids, vocab_limit=limit)
        stream, pending = TextStream(tokenizer, prompt), ""
        turn.finish_reason = "length"
        for (token,) in generate_ids(self.model, [prompt], sampling):
            assert token is not None
            turn.new_tokens += 1
            is_end = token in sampling.stop_ids
            is_last = is_end or turn.new_tokens == min(sampling.max_new_tokens, self.model.seq_len - turn.prompt_tokens)
            # A token that ends the turn has no text of its own, but completes the text before it.
            pending += stream.push(token, final=is_last)
            found = [position for text in stops if (position := pending.find(text)) >= 0]
            if found or is_end:
                turn.finish_reason = "stop"
                pending = pending[: min(found)] if found else pending
                break
            ready = len(pending) - _held_back(pending, stops)
            if ready:
                turn.text += pending[:ready]
                yield pending[:ready]
                pending = pending[ready:]
            if is_cancelled():
                break
        if pending:
            turn.text += pending
            yield pending


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many characters at the end of `text` are the beginning of a stop text."""
    return max(
        (size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size])),
        default=0,
    )


@dataclass
class TerminalChat:
    """A terminal chat that reads lines, streams the answers and runs the commands in HELP."""

    model: ChatModel
    sampling: Sampling
    system: str = ""
    output: TextIO = field(default_factory=lambda: sys.stdout)
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new conversation."""
        self.messages = [Message(SYSTEM, self.system)] if self.system else []

    def run(self, read: Callable[[], str]) -> None:
        """Answer lines until `read` raises EOFError or /quit is entered. Ctrl-C ends a turn, or the chat."""
        while True:
            try:
                line = read()
            except (EOFError, KeyboardInterrupt):
                self._print("")
                return
            if line.strip() == "/quit":
                return
            if line.strip():
                self.answer(line)

    def answer(self, line: str) -> None:
        """Obey a command, or add the line to the conversation and print the assistant's turn."""
        if line.startswith("/"):
            self._command(*line.strip().partition(" ")[::2])
            return
        self.messages.append(Message(USER, line))
        try:
            turn, pieces = self.model.reply(self.messages, self.sampling)
        except (BadConversation, ConfigError, DataError) as error:
            self.messages.pop()
            self._print(f"error: {error}")
            return
        try:
            for piece in pieces:
                print(piece, end="", file=self.output, flush=True)
        except KeyboardInterrupt:
            turn.finish_reason = "length"
        self._print(" […]" if turn.finish_reason == "length" else "")
        self.messages.append(Message(ASSISTANT, turn.text))

    def _command(self, name: str, argument: str) -> None:
        if name == "/help":
            self._print(HELP)
        elif name == "/reset":
            self.reset()
            self._print("new conversation")
        elif name == "/system":
            self.system = argument.strip()
            self.reset()
            self._print("new conversation with this system prompt" if self.system else "new conversation")
        elif name == "/save":
            self._save(argument.strip())
        else:
            self._print(f"error: unknown command {name}; /help lists the commands")

    def _save(self, file: str) -> None:
        if not file or not any(message.role == ASSISTANT for message in self.messages):
            self._print("error: /save needs a file name" if not file else "error: there is nothing to save yet")
            return
        path = user_path(file)
        messages = [message.to_json() for message in self.messages]
        line = json.dumps({"messages": messages}, ensure_ascii=False, allow_nan=False)
        try:
            before = storage.read_text(path) if storage.exists(path) else ""
            separator = "" if not before or before.endswith("\n") else "\n"
            storage.write_text(path, f"{before}{separator}{line}\n")
        except (UserError, OSError) as error:
            self._print(f"error: {error}")
            return
        self._print(f"saved to {path}")

    def _print(self, text: str) -> None:
        print(text, file=self.output, flush=True)
