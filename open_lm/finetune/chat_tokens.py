"""Conversations to token ids, for training data and for prompts of a chat."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from open_lm.errors import ConfigError
from open_lm.finetune.chat_templates import JOINER, ChatTemplate, Rendered
from open_lm.finetune.conversations import ASSISTANT, USER, BadConversation, Message
from open_lm.tokenizer import JsonTokenizer, Tokenizer


@dataclass(frozen=True)
class ChatEncoding:
    """A conversation as token ids: ids int64 (T,), and is_trained bool (T,), true for what the assistant generates."""

    ids: np.ndarray
    is_trained: np.ndarray


class ChatTokenizer:
    """A tokenizer with a chat template.

    The template's special tokens become their ids. The same text in a message is encoded as plain text, so that a
    message cannot end a turn or begin another one. The tokenizer adds no tokens of its own: a begin-of-text token is
    there once, if the template has it.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        """Raise ConfigError for a tokenizer of the sentencepiece library, which finds no special tokens in a text."""
        if not isinstance(tokenizer, JsonTokenizer):
            raise ConfigError(
                f"--tokenizer {tokenizer.name}: a sentencepiece .model file finds no special tokens in the text of a "
                "chat template; use the tokenizer.json of the same model (save_pretrained of transformers writes it)"
            )
        self.tokenizer, self.template = tokenizer, template
        tokens = sorted(tokenizer.special_tokens(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._plain: JsonTokenizer | None = None

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[ChatEncoding | BadConversation]:
        """Return the encoding of each conversation, or why it has none."""
        rendered: list[Rendered | BadConversation] = []
        for messages in conversations:
            try:
                rendered.append(self.template.render([self._guarded(message) for message in messages]))
            except BadConversation as error:
                rendered.append(error)
        encoded = iter(self._encode([item for item in rendered if isinstance(item, Rendered)]))
        results = [item if isinstance(item, BadConversation) else next(encoded) for item in rendered]
        return [
            BadConversation("nothing to train", "the template gives no token that the assistant generates")
            if isinstance(item, ChatEncoding) and not item.is_trained[1:].any()
            else item
            for item in results
        ]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids after which the assistant's next turn begins. BadConversation: the template refuses them."""
        guarded = [self._guarded(message) for message in messages]
        (encoding,) = self._encode([self.template.render(guarded, add_generation_prompt=True)])
        return [int(token) for token in encoding.ids]

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a turn of the assistant: the special tokens after its message, and the end-of-text token."""
        tokens = {self.tokenizer.eot_id}
        for name in self._special.findall(self.template.turn_end):
            tokens.update(self.tokenizer.encode(name))
        return tuple(sorted(tokens))

    def check(self) -> None:
        """Raise ConfigError if generation would begin after other ids than those of training."""
        turns = [Message(USER, "first"), Message(ASSISTANT, "one"), Message(USER, "second"), Message(ASSISTANT, "two")]
        (encoding,) = self.encode([turns])
        if isinstance(encoding, BadConversation):
            raise ConfigError(f"chat template {self.template.name}: {encoding}")
        prompt = self.prompt(turns[:-1])
        if encoding.ids[: len(prompt)].tolist() != prompt or not encoding.is_trained[len(prompt)]:
            raise ConfigError(
                f"chat template {self.template.name}: with the tokenizer {self.tokenizer.name}, the ids before a turn "
                "of the assistant differ between training and generation; use a template whose markers are special "
                "tokens of this tokenizer, or tulu, which needs none"
            )

    @property
    def stop_text(self) -> str:
        """The text that ends a turn if the tokenizer has no special token for it, else ""."""
        return "" if self._special.search(self.template.turn_end) else self.template.turn_end.strip()

    def _guarded(self, message: Message) -> Message:
        """Return the message with a joiner inside each text of a special token, which `_encode` removes."""
        if JOINER in message.content:
            raise BadConversation("reserved character", "a message holds U+10FFF2, which marks special tokens")
        content = self._special.sub(lambda match: match[0][0] + JOINER + match[0][1:], message.content)
        return Message(message.role, content)

    def _encode(self, rendered: Sequence[Rendered]) -> list[ChatEncoding]:
        plain = [item for item in rendered if JOINER not in item.text]
        assert isinstance(self.tokenizer, JsonTokenizer)
        encoded = iter(self.tokenizer.encode_with_offsets([item.text for item in plain]))
        results = []
        for item in rendered:
            is_generated = _generated(item)
            ids, starts = self._encode_guarded(item.text) if JOINER in item.text else next(encoded)
            # A token that begins before the assistant's text belongs to the prompt, after which generation begins.
            results.append(ChatEncoding(np.array(ids, np.int64), is_generated[np.array(starts, np.int64)]))
        return results

    def _encode_guarded(self, text: str) -> tuple[list[int], list[int]]:
        """Encode the pieces between special tokens as plain text, without the joiners in it."""
        if self._plain is None:
            assert isinstance(self.tokenizer, JsonTokenizer)
            # Another tokenizer object: with_split_special_tokens takes over the library's object of its own.
            self._plain = JsonTokenizer(
                self.tokenizer.source, self.tokenizer.name, self.template.eos_token or None, self.tokenizer.config
            ).with_split_special_tokens()
        ids: list[int] = []
        starts: list[int] = []
        position = 0
        for match in [*self._special.finditer(text), None]:
            piece = text[position : match.start() if match else len(text)]
            kept = [n for n, character in enumerate(piece, position) if character != JOINER]
            ((piece_ids, piece_starts),) = self._plain.encode_with_offsets([piece.replace(JOINER, "")])
            ids += piece_ids
            starts += [kept[min(start, len(kept) - 1)] for start in piece_starts]
            if match:
                (token,) = self.tokenizer.encode(match[0])
                ids.append(token)
                starts.append(match.start())
                position = match.end()
        return ids, starts


def _generated(rendered: Rendered) -> np.ndarray:
    """Return which characters the assistant generates, bool (characters + 1,); the last one is False."""
    marks = np.zeros(len(rendered.text) + 1, bool)
    for start, end in rendered.spans:
        marks[start:end] = True
    return marks
