"""The package's tokenizers as transformers tokenizers, giving the very ids the training data was made of."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from open_lm.errors import ConfigError
from open_lm.tokenizer import load_tokenizer

# What a converted sentencepiece model is checked on: spaces, lines, digits, accents, scripts and bytes without a piece.
_PROBES = ("Hello world", " two  spaces\n\ttabs", "naïve 1234 x_y(z) {}", "日本語 и русский", "🙂\x07", "a")


class OpenLMTokenizerFast(PreTrainedTokenizerFast):
    """A fast tokenizer whose end-of-text token is `eos_token`; adds no token of its own around a text."""

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers reads a plain class attribute


def load_hf_tokenizer(
    spec: str, eot_token: str | None = None, add_special_tokens: bool = False, max_length: int | None = None
) -> OpenLMTokenizerFast:
    """A transformers tokenizer for whatever `open_lm.tokenizer.load_tokenizer` accepts.

    Args:
        spec: hub name, folder, tokenizer .json file or sentencepiece .model file.
        eot_token: the end-of-text token; found among the special tokens where not given.
        add_special_tokens: keep the tokens that the tokenizer itself puts around a text, such as Llama's <s>.
            Off by default, because the package's training data has none.
        max_length: `model_max_length` of the result, in tokens.

    Raises:
        ConfigError: nothing usable at `spec`, or a sentencepiece model that cannot be converted exactly.
    """
    plain = load_tokenizer(spec, eot_token)
    file = _tokenizer_file(spec)
    if file.suffix == ".model":
        backend = _from_sentencepiece(file, spec)
        if add_special_tokens:
            _prepend_bos(backend)
    else:
        backend = _from_json(file)
        if not add_special_tokens:
            _add_nothing(backend)
    eos = backend.id_to_token(plain.eot_id)
    settings: dict[str, Any] = {} if max_length is None else {"model_max_length": max_length}
    return OpenLMTokenizerFast(
        tokenizer_object=backend, eos_token=eos, clean_up_tokenization_spaces=False, name_or_path=spec, **settings
    )


def _tokenizer_file(spec: str) -> Path:
    """The file that `load_tokenizer(spec)`, which has succeeded, was read from."""
    path = Path(spec)
    if path.is_file():
        return path
    names = ("tokenizer.json", "tokenizer.model")
    if path.is_dir():
        return next(path / name for name in names if (path / name).is_file())
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            return Path(hf_hub_download(spec, name))
        except EntryNotFoundError:
            continue
    raise ConfigError(f"--tokenizer {spec}: the hub has neither {' nor '.join(names)} under this name")


def _from_json(file: Path) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    backend.no_padding()
    backend.no_truncation()
    return backend


def _add_nothing(backend: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])


def _prepend_bos(backend: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bos = next(token for token in ("<s>", "<bos>") if backend.token_to_id(token) is not None)
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _from_sentencepiece(file: Path, spec: str) -> Any:
    """A byte-fallback BPE of the `tokenizers` library with the ids of a sentencepiece model, checked on probes."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = SentencePieceProcessor()
    pieces.LoadFromSerializedProto(file.read_bytes())
    names = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    vocab = {name: i for i, name in enumerate(names)}
    unk = names[pieces.unk_id()]
    model = models.BPE(vocab, _merges(pieces, vocab), unk_token=unk, fuse_unk=True, byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [names[i] for i in range(len(names)) if pieces.is_control(i) or pieces.is_unknown(i)]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    for probe in _PROBES:
        if backend.encode(probe, add_special_tokens=False).ids != list(pieces.encode(probe)):
            raise ConfigError(
                f"--tokenizer {spec}: this sentencepiece model is not a plain byte-fallback BPE and cannot be "
                "converted exactly; give the tokenizer.json of the same tokenizer"
            )
    return backend


def _merges(pieces: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE, first the ones it would make first.

    sentencepiece joins the pair whose joint piece has the highest score, so that every split of a piece into two
    pieces is a merge, ranked by the score of the whole.
    """
    mergeable = [name for name, i in vocab.items() if not (pieces.is_byte(i) or pieces.is_control(i))]
    known = set(mergeable)
    ranked = sorted(mergeable, key=lambda name: pieces.get_score(vocab[name]), reverse=True)
    splits = (
        sorted(
            ((name[:cut], name[cut:]) for cut in range(1, len(name)) if name[:cut] in known and name[cut:] in known),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
        for name in ranked
    )
    return list(itertools.chain.from_iterable(splits))
