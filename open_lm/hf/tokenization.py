"""The package's tokenizers as transformers tokenizers, with the same ids as in the training data."""

from __future__ import annotations

import itertools
from typing import Any

from transformers import PreTrainedTokenizerFast

from open_lm.errors import ConfigError
from open_lm.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer

# Texts that check a converted sentencepiece model: spaces, lines, digits, accents, scripts, bytes without a piece.
_CHECK_TEXTS = ("Hello world", " two  spaces\n\ttabs", "naïve 1234 x_y(z) {}", "日本語 и русский", "🙂\x07", "a")


class OpenLMTokenizerFast(PreTrainedTokenizerFast):
    """A fast tokenizer whose end-of-text token is `eos_token`. It adds no special tokens to a text."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers reads a plain class attribute


def load_hf_tokenizer(
    spec: str | Tokenizer,
    eot_token: str | None = None,
    add_special_tokens: bool = False,
    max_length: int | None = None,
) -> OpenLMTokenizerFast:
    """Return a transformers tokenizer for any `spec` that `open_lm.tokenizer.load_tokenizer` accepts, or its result.

    For the tokenizer of a run, pass the result of `open_lm.data.tokenizers.choose_tokenizer`.

    Args:
        spec: hub name, folder, tokenizer .json file, sentencepiece .model file, or a loaded tokenizer.
        eot_token: the end-of-text token, if `spec` is not loaded; if None, it is determined from the special tokens.
        add_special_tokens: keep the special tokens that the tokenizer adds to a text, such as Llama's <s>. Off by
            default because the package's training data has none.
        max_length: `model_max_length` of the result, in tokens.

    Raises:
        ConfigError: no tokenizer at `spec`, or a sentencepiece model that cannot be converted exactly.
    """
    tokenizer = load_tokenizer(spec, eot_token) if isinstance(spec, str) else spec
    if isinstance(tokenizer, SentencePieceTokenizer):
        backend = _from_sentencepiece(tokenizer)
        if add_special_tokens:
            _prepend_bos(backend)
    else:
        backend = _from_json(tokenizer.source)
        if not add_special_tokens:
            _remove_special_tokens(backend)
    eos = backend.id_to_token(tokenizer.eot_id)
    settings: dict[str, Any] = {} if max_length is None else {"model_max_length": max_length}
    return OpenLMTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        clean_up_tokenization_spaces=False,
        name_or_path=tokenizer.name,
        **settings,
    )


def _from_json(source: str) -> Any:
    from tokenizers import Tokenizer as FastTokenizer

    backend = FastTokenizer.from_str(source)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _remove_special_tokens(backend: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])


def _prepend_bos(backend: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = next(token for token in ("<s>", "<bos>") if backend.token_to_id(token) is not None)
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Any:
    """Convert a sentencepiece model to a byte-fallback BPE of the `tokenizers` library, and check its ids on texts."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as FastTokenizer

    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(tokenizer.source)
    names = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {name: i for i, name in enumerate(names)}
    unk = names[processor.unk_id()]
    model = models.BPE(vocab, _merges(processor, vocab), unk_token=unk, fuse_unk=True, byte_fallback=True)
    backend = FastTokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [names[i] for i in range(len(names)) if processor.is_control(i) or processor.is_unknown(i)]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    for text in _CHECK_TEXTS:
        if backend.encode(text, add_special_tokens=False).ids != list(processor.encode(text)):
            raise ConfigError(
                f"--tokenizer {tokenizer.name}: this sentencepiece model is not a plain byte-fallback BPE and cannot "
                "be converted exactly; give the tokenizer.json of the same tokenizer"
            )
    return backend


def _merges(processor: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return the merges of a sentencepiece BPE in the order of their priority.

    sentencepiece merges the pair whose merged piece has the highest score. Every split of a piece into two pieces is
    therefore a merge, ranked by the score of the piece.
    """
    mergeable = [name for name, i in vocab.items() if not (processor.is_byte(i) or processor.is_control(i))]
    known = set(mergeable)
    ranked = sorted(mergeable, key=lambda name: processor.get_score(vocab[name]), reverse=True)
    splits = (
        sorted(
            ((name[:cut], name[cut:]) for cut in range(1, len(name)) if name[:cut] in known and name[cut:] in known),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
        for name in ranked
    )
    return list(itertools.chain.from_iterable(splits))
