"""Encode the texts of requests as lm-eval's model "hf" encodes them."""

from __future__ import annotations

from collections.abc import Sequence

from open_lm.evaluate.lm_eval.scoring import Pair
from open_lm.tokenizer import SentencePieceTokenizer, Tokenizer

_BATCH_TEXTS = 4096  # texts that are encoded at once


class RequestEncoder:
    """Encodes contexts and continuations.

    Args:
        tokenizer: the tokenizer of the model's training data.
        adds_special_tokens: whether texts get the tokenizer's special tokens, such as Llama's <s>.
        prefix_token_id: token in place of an empty context; None for the one that begins a text, or else the one that
            ends it.
    """

    def __init__(self, tokenizer: Tokenizer, adds_special_tokens: bool, prefix_token_id: int | None = None) -> None:
        self.tokenizer, self.adds_special_tokens = tokenizer, adds_special_tokens
        default = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
        self.prefix_token_id = default if prefix_token_id is None else int(prefix_token_id)
        self._prefix = tokenizer.token(self.prefix_token_id)

    def encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """Return the token ids of texts.

        With None, a text gets special tokens only if it does not begin with the token that begins a text.
        """
        ids: list[list[int]] = []
        for start in range(0, len(texts), _BATCH_TEXTS):
            ids += self._encode(texts[start : start + _BATCH_TEXTS], add_special_tokens)
        return ids

    def _encode(self, texts: Sequence[str], add_special_tokens: bool | None) -> list[list[int]]:
        ids = self.tokenizer.encode_batch(texts)
        if isinstance(self.tokenizer, SentencePieceTokenizer):  # it does not find control tokens in a text
            for index, text in enumerate(texts):
                if text.startswith(self._prefix):
                    ids[index] = [self.prefix_token_id, *self.tokenizer.encode(text.removeprefix(self._prefix))]
        if not self.adds_special_tokens or add_special_tokens is False:
            return ids
        keeps = [add_special_tokens is None and text.startswith(self._prefix) for text in texts]
        special = self.tokenizer.encode_with_special_tokens(texts)
        return [plain if keep else other for keep, plain, other in zip(keeps, ids, special, strict=True)]

    def pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Return the ids of (context, continuation) pairs.

        Both are encoded together, and white space at the end of the context belongs to the continuation. An empty
        context becomes the prefix token, unless the continuation begins with it.
        """
        joint = [index for index, (context, _) in enumerate(texts) if context]
        pairs = dict(zip(joint, self._joint_pairs([texts[index] for index in joint]), strict=True))
        alone = [index for index, (context, _) in enumerate(texts) if not context]
        prefix = [self.prefix_token_id]
        for index, ids in zip(alone, self.encode([texts[index][1] for index in alone], False), strict=True):
            pairs[index] = Pair(ids[:1], ids[1:]) if ids[:1] == prefix else Pair(prefix, ids)
        return [pairs[index] for index in range(len(texts))]

    def _joint_pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        moved = []
        for context, continuation in texts:
            stripped = context.rstrip()
            moved.append((stripped, context[len(stripped) :] + continuation))
        whole = self.encode([context + continuation for context, continuation in moved])
        contexts = list(dict.fromkeys(context for context, _ in moved))
        ids = dict(zip(contexts, self.encode(contexts), strict=True))
        return [
            Pair(ids[context] or [self.prefix_token_id], both[len(ids[context]) :])  # a context of white space is empty
            for (context, _), both in zip(moved, whole, strict=True)
        ]
