"""Load tokenizers of every kind: from a hub name, a folder, a tokenizer .json file or a sentencepiece .model file."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_lm.errors import ConfigError

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"
# Common names of the token that ends a document, in order of preference.
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|endofdocument|>")
# Common names of the token that begins a document.
BOS_NAMES = ("<|begin_of_text|>", "<|beginoftext|>", "<|startoftext|>", "<s>", "<bos>", "<|bos|>", "[BOS]")


class Tokenizer(ABC):
    """A converter between text and token ids that adds no tokens around the text.

    Pickles only its source. The library's object is rebuilt on first use.

    Attributes:
        library: name of the library that implements it.
        name: what the tokenizer was loaded from.
        eot_id: id of the end-of-text token that ends a document.
        bos_id: id of the token that begins a document, for tokenizers that have one.
        vocab_size: largest id + 1.
        fingerprint: sha256 (hex) of the tokenizer's file; equal fingerprints mean equal ids for equal text.
    """

    library: str
    name: str
    eot_id: int
    bos_id: int | None
    vocab_size: int
    fingerprint: str
    _native: Any  # the library's object; None between unpickling and first use

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several texts, in their order. May use several threads."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens. Raise ValueError for ids outside the vocabulary."""

    @abstractmethod
    def added_tokens(self) -> list[str]:
        """Return the added tokens, which are matched in a text before the text is split into other tokens."""

    @abstractmethod
    def _load(self) -> Any:
        """Create the library's object from the source."""

    @property
    def _loaded(self) -> Any:
        if self._native is None:
            self._native = self._load()
        return self._native

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        bad = sorted({i for i in ids if not 0 <= i < self.vocab_size})
        if bad:
            raise ValueError(f"token ids {bad[:8]} are outside the vocabulary of {self.name} ({self.vocab_size} ids)")
        return list(ids)


class JsonTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, from a `tokenizer.json` file."""

    library = "tokenizers"

    def __init__(self, source: str, name: str, eot_token: str | None = None, bos_token: str | None = None) -> None:
        self.source = source
        self.name = name
        try:
            self._native = self._load()
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise ConfigError(
                f"--tokenizer {name}: not a tokenizer.json of the tokenizers library ({error})"
            ) from error
        self.fingerprint = hashlib.sha256(source.encode()).hexdigest()
        vocab: dict[str, int] = self._native.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        special = {token.content for token in self._native.get_added_tokens_decoder().values() if token.special}
        self.eot_id = _eot_from_vocab(vocab, special, name, eot_token)
        known = [token for token in BOS_NAMES if token in special]
        self.bos_id = vocab.get(bos_token) if bos_token is not None else vocab[known[0]] if known else None

    def _load(self) -> Any:
        from tokenizers import Tokenizer as FastTokenizer

        native = FastTokenizer.from_str(self.source)
        native.no_padding()
        native.no_truncation()
        return native

    def encode(self, text: str) -> list[int]:
        return list(self._loaded.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(e.ids) for e in self._loaded.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._loaded.decode(self._check_ids(ids), skip_special_tokens=True))

    def added_tokens(self) -> list[str]:
        return [token.content for token in self._loaded.get_added_tokens_decoder().values()]


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer of the sentencepiece library, from a model file such as those of Llama 2 and Mistral."""

    library = "sentencepiece"

    def __init__(self, source: bytes, name: str, eot_token: str | None = None, bos_token: str | None = None) -> None:
        self.source = source
        self.name = name
        try:
            self._native = self._load()
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise ConfigError(f"--tokenizer {name}: not a sentencepiece model ({error})") from error
        self.fingerprint = hashlib.sha256(source).hexdigest()
        self.vocab_size = int(self._native.vocab_size())
        eot_id = int(self._native.eos_id()) if eot_token is None else self._id_of(eot_token)
        if eot_id is None or eot_id < 0:
            raise _unclear_eot(name, []) if eot_token is None else _unknown_eot(name, eot_token)
        self.eot_id = eot_id
        bos_id = int(self._native.bos_id()) if bos_token is None else self._id_of(bos_token)
        self.bos_id = None if bos_id is None or bos_id < 0 else bos_id

    def _load(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        native = SentencePieceProcessor()
        native.LoadFromSerializedProto(self.source)
        return native

    def _id_of(self, piece: str) -> int | None:
        piece_id = int(self._loaded.piece_to_id(piece))  # the id of the unknown token if the piece does not exist
        return piece_id if self._loaded.id_to_piece(piece_id) == piece else None

    def encode(self, text: str) -> list[int]:
        return list(self._loaded.encode(text, out_type=int))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(ids) for ids in self._loaded.encode(list(texts), out_type=int)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._loaded.decode(self._check_ids(ids)))

    def added_tokens(self) -> list[str]:
        return [self._loaded.id_to_piece(i) for i in range(self.vocab_size) if self._loaded.is_control(i)]


def load_tokenizer(spec: str, eot_token: str | None = None) -> Tokenizer:
    """Load a tokenizer from a file, a folder or the hub.

    Args:
        spec: a `.json` file, a sentencepiece `.model` file, a folder with tokenizer.json or tokenizer.model, or a hub
            name such as EleutherAI/gpt-neox-20b (needs network access or the hub's local cache).
        eot_token: the token that ends a document; by default one of the special tokens.

    Raises:
        ConfigError: no usable tokenizer at `spec`, or no known end-of-text token.
    """
    path = Path(spec)
    if path.is_dir():
        return _load_folder(path, eot_token)
    if path.is_file():
        return _load_file(path, spec, eot_token)
    if path.suffix in (".json", ".model") or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ConfigError(
            f"--tokenizer {spec}: no such file or folder; pass a tokenizer.json, a sentencepiece .model file, "
            "a folder with one of them, or a hub name"
        )
    return _load_from_hub(spec, eot_token)


def _load_file(path: Path, name: str, eot_token: str | None, bos_token: str | None = None) -> Tokenizer:
    if path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), name, eot_token, bos_token)
    try:
        return JsonTokenizer(path.read_text(encoding="utf-8"), name, eot_token, bos_token)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--tokenizer {name}: neither JSON text nor a file ending in .model; pass a tokenizer.json or a "
            "sentencepiece .model file"
        ) from error


def _load_folder(folder: Path, eot_token: str | None) -> Tokenizer:
    configured_eot, bos_token = _configured_tokens(folder / "tokenizer_config.json")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return _load_file(folder / name, str(folder), eot_token or configured_eot, bos_token)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
    raise ConfigError(f"--tokenizer {folder}: expected tokenizer.json or tokenizer.model in this folder; found {found}")


def _load_from_hub(name: str, eot_token: str | None) -> Tokenizer:
    try:
        file = _download(name, "tokenizer.json") or _download(name, "tokenizer.model")
        config = _download(name, "tokenizer_config.json") if file is not None else None
    except ModuleNotFoundError:
        raise
    except Exception as error:
        # The hub's client raises many types of errors: no network, unknown name, no permission.
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--tokenizer {name}: no such local file or folder, and the download from the hub failed "
            f"({type(error).__name__}: {reason}); check the name and the network, or pass a local tokenizer.json or "
            "sentencepiece .model file"
        ) from error
    if file is None:
        raise ConfigError(f"--tokenizer {name}: the hub has neither tokenizer.json nor tokenizer.model under this name")
    configured_eot, bos_token = _configured_tokens(config) if config is not None else (None, None)
    return _load_file(file, name, eot_token or configured_eot, bos_token)


def _download(name: str, filename: str) -> Path | None:
    """Return a file of the hub, or of its local cache if the hub is unreachable. None if the file does not exist."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:  # check with one short request first: without a network, a download retries for half a minute
        get_hf_file_metadata(hf_hub_url(name, filename))
    except EntryNotFoundError:
        pass  # the download below fails with the same error and records it in the cache
    except Exception:
        cached = try_to_load_from_cache(name, filename)
        if cached is None:
            raise
        return Path(cached) if isinstance(cached, str) else None  # the cache may record that the file does not exist
    try:
        return Path(hf_hub_download(name, filename))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _configured_tokens(path: Path) -> tuple[str | None, str | None]:
    """Return the (end, begin) tokens of a tokenizer_config.json; None for those that it does not define."""
    if not path.is_file():
        return None, None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error

    def configured(key: str) -> str | None:
        token = config.get(key) if isinstance(config, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else None

    return configured("eos_token"), configured("bos_token")


def _eot_from_vocab(vocab: dict[str, int], special: set[str], name: str, eot_token: str | None) -> int:
    if eot_token is not None:
        if eot_token not in vocab:
            raise _unknown_eot(name, eot_token)
        return vocab[eot_token]
    known = [token for token in EOT_NAMES if token in special]
    if not known:
        raise _unclear_eot(name, sorted(special))
    return vocab[known[0]]


def _unknown_eot(name: str, eot_token: str) -> ConfigError:
    return ConfigError(f"--eot-token {eot_token}: not in the vocabulary of --tokenizer {name}")


def _unclear_eot(name: str, special: list[str]) -> ConfigError:
    found = ", ".join(special[:12]) if special else "none"
    return ConfigError(
        f"--tokenizer {name}: cannot determine which token ends a document (special tokens: {found}); "
        "pass it with --eot-token"
    )
