"""The encoder of preprocessing for conversations: records to ids with a loss mask.

It replaces the encoder of texts in open_lm.datapreprocess.engine, so that data for fine-tuning are made, resumed and
accounted for exactly as data for pretraining are.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from open_lm.data.shard_format import FLAGGED_DTYPE, flag_document
from open_lm.datapreprocess.accounting import MASKED
from open_lm.datapreprocess.readers import BadDocument, Block, Document, Piece, Record
from open_lm.datapreprocess.readers.base import excerpt
from open_lm.datapreprocess.tokenization import DocumentEncoder, Encoded
from open_lm.finetune.chat_tokens import ChatEncoding, ChatTokenizer
from open_lm.finetune.conversations import (
    ASSISTANT,
    BadConversation,
    Conversation,
    fingerprint,
    parse_conversation,
)
from open_lm.tokenizer import CONFIG_NAME

Location = tuple[str, int, int]  # url and start of the piece, line in it


@dataclass(frozen=True)
class SftSettings:
    """How conversations become sequences.

    Attributes:
        length: ids in a sequence, the limit of a conversation.
        form: form of the records, or "auto".
        overlong: what to do with longer conversations, a key of sft_data.OVERLONG.
        keep_duplicates: use a conversation as often as it occurs; otherwise only its first occurrence is used.
    """

    length: int
    form: str = "auto"
    overlong: str = "error"
    keep_duplicates: bool = False


@dataclass
class _Pending:
    """A conversation of a block, and what became of it."""

    record: Record
    conversation: Conversation | None = None
    problem: BadConversation | None = None


class ConversationEncoder(DocumentEncoder):
    """An encoder of records with conversations as ids with flags (open_lm.data.token_flags).

    `duplicates` has the location of the first of several equal conversations, by fingerprint.
    """

    def __init__(
        self,
        chat: ChatTokenizer,
        settings: SftSettings,
        vocab_size: int | None = None,
        duplicates: Mapping[bytes, Location] | None = None,
    ) -> None:
        super().__init__(chat.tokenizer, vocab_size, allow_special_tokens=True)
        self._fast, self.fallback_reason = None, None  # it finds no positions of tokens in the text
        self.dtype = FLAGGED_DTYPE
        self._chat, self._settings, self._duplicates = chat, settings, duplicates or {}

    def settings(self) -> dict[str, Any]:
        """Return the facts that determine the ids of a conversation, for dataset.json."""
        template, settings = self._chat.template, self._settings
        return {
            **super().settings(),
            "loss_mask": "flags in the ids",
            "chat_template": template.source,
            "template_date": template.today.isoformat() if template.today else None,
            "form": settings.form,
            "overlong": settings.overlong,
            "keep_duplicates": settings.keep_duplicates,
        }

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Return the files of the tokenizer, with the chat template in its configuration."""
        files = dict(super().tokenizer_files())
        config = {**json.loads(files[CONFIG_NAME]), "chat_template": self._chat.template.source}
        files[CONFIG_NAME] = f"{json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)}\n".encode()
        return files

    def reject_unusable(self, block: Block, piece: Piece) -> None:
        """Replace the records of a block by their ids with flags; move those without a conversation to the bad ones."""
        counts: Counter[str] = Counter()
        pending = [self._parsed(document, piece, counts) for document in block.documents]
        kept = [item for item in pending if item is not None]
        good = [item for item in kept if item.conversation is not None]
        encodings = self._chat.encode([item.conversation for item in good if item.conversation is not None])
        ids: list[Document] = []
        for item, encoding in zip(good, encodings, strict=True):
            try:
                fitted = self._fitted(item, encoding, counts)
            except BadConversation as error:
                item.problem = error
                continue
            if fitted is not None:
                flagged = flag_document(fitted.ids, fitted.is_trained)
                masked = int(np.count_nonzero(~fitted.is_trained[1:])) + 1
                counts += Counter({MASKED: masked, "trained_tokens": len(flagged) - masked})
                ids.append(flagged)
        block.bad += [_bad_document(item, piece) for item in kept if item.problem is not None]
        block.documents = ids
        block.counts = dict(counts)

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """Join the ids that `reject_unusable` has made."""
        ids = [document for document in documents if isinstance(document, np.ndarray)]
        assert len(ids) == len(documents), "records become ids in reject_unusable"
        return Encoded(np.concatenate(ids), np.cumsum([len(part) for part in ids]))

    def _parsed(self, document: Document, piece: Piece, counts: Counter[str]) -> _Pending | None:
        """Return the conversation of a record, or the problem with it; None for a repeated one."""
        assert isinstance(document, Record)
        item = _Pending(document)
        try:
            item.conversation = parse_conversation(decode_record(document), self._settings.form)
        except BadConversation as error:
            item.problem = error
            return item
        if self._duplicates:
            location = (piece.url, piece.start, document.line)
            if self._duplicates.get(fingerprint(item.conversation), location) != location:
                counts["duplicates"] += 1
                return None
        return item

    def _fitted(
        self, item: _Pending, encoding: ChatEncoding | BadConversation, counts: Counter[str]
    ) -> ChatEncoding | None:
        """Return an encoding that fits a sequence; None if the conversation is left out. Raise BadConversation."""
        if isinstance(encoding, BadConversation):
            raise encoding
        if int(encoding.ids.max()) >= self.vocab_size:
            raise BadConversation(
                "id out of range", f"found the id {encoding.ids.max()}, but the vocabulary has {self.vocab_size} ids"
            )
        length, policy = self._settings.length, self._settings.overlong
        if len(encoding.ids) <= length:
            return encoding
        if policy == "error":
            raise BadConversation(
                "too long",
                f"found {len(encoding.ids)} tokens, but a sequence holds {length}; increase --seqlen, or choose what "
                "to do with --overlong drop, cut or turns",
            )
        shorter = None
        if policy == "cut":
            shorter = ChatEncoding(encoding.ids[:length], encoding.is_trained[:length])
        elif policy == "turns":
            assert item.conversation is not None
            shorter = self._without_last_turns(item.conversation)
        if shorter is None or not shorter.is_trained[1:].any():
            counts["too_long_dropped"] += 1
            return None
        counts["too_long_cut" if policy == "cut" else "too_long_shortened"] += 1
        return shorter

    def _without_last_turns(self, conversation: Conversation) -> ChatEncoding | None:
        """Return the longest beginning that ends with a turn of the assistant and fits; None if none does."""
        ends = [number for number, message in enumerate(conversation, start=1) if message.role == ASSISTANT]
        for end in reversed(ends):
            (encoding,) = self._chat.encode([conversation[:end]])
            if isinstance(encoding, ChatEncoding) and len(encoding.ids) <= self._settings.length:
                return encoding
        return None


def decode_record(record: str) -> Any:
    """Return the value of a JSON text. BadConversation for other text."""
    try:
        return orjson.loads(record)
    except orjson.JSONDecodeError as error:
        try:
            return json.loads(record)  # accepts NaN and lone surrogates in values that are not used
        except (ValueError, RecursionError):
            raise BadConversation("invalid JSON", str(error)) from error


def _bad_document(item: _Pending, piece: Piece) -> BadDocument:
    assert item.problem is not None
    detail = str(item.problem).encode("utf-8", "backslashreplace").decode("utf-8")
    return BadDocument(item.problem.kind, piece.url, item.record.line, detail, piece.start, excerpt(item.record))
