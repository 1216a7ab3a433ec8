"""One loader for every kind of tokenizer: a hub name, a folder, a tokenizer .json file, a sentencepiece .model file."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_lm.errors import ConfigError

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"
# Names under which tokenizers keep the token that ends a document, most telling first.
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|endofdocument|>")
# And those of the token that begins one.
BOS_NAMES = ("<|begin_of_text|>", "<|beginoftext|>", "<|startoftext|>", "<s>", "<bos>", "<|bos|>", "[BOS]")


class Tokenizer(ABC):
    """Text to token ids and back, without any tokens added around the text.

    Pickles as its source; what the library makes of that is built again by the first use.

    Attributes:
        library: name of the library that does the work.
        name: what the tokenizer was loaded from.
        eot_id: id of the end-of-text token that closes a document.
        bos_id: id of the token that begins a document for tokenizers that have one.
        vocab_size: largest id + 1.
        fingerprint: sha256 (hex) of the tokenizer's file; equal fingerprints mean equal ids for equal text.
    """

    library: str
    name: str
    eot_id: int
    bos_id: int | None
    vocab_size: int
    fingerprint: str
    _native: Any  # the library's object, None until it is used after unpickling

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of one text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, in their order; may use several threads."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; special tokens such as end of text give none. ValueError for ids outside the vocabulary."""

    @abstractmethod
    def added_tokens(self) -> list[str]:
        """The tokens that are found in a text before anything else is."""

    @abstractmethod
    def _load(self) -> Any:
        """The library's object, from the source."""

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
    """A fast tokenizer described by a `tokenizer.json` of the tokenizers library."""

    library = "tokenizers"

    def __init__(self, source: str, name: str, eot_token: str | None = None, bos_token: str | None = None) -> None:
        self.source = source
        self.name = name
        try:
            self._native = self._load()
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
    """A sentencepiece model file, such as those of Llama 2 and Mistral."""

    library = "sentencepiece"

    def __init__(self, source: bytes, name: str, eot_token: str | None = None, bos_token: str | None = None) -> None:
        self.source = source
        self.name = name
        try:
            self._native = self._load()
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
        found = int(self._loaded.piece_to_id(piece))  # that of the unknown piece where there is no such piece
        return found if self._loaded.id_to_piece(found) == piece else None

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
        spec: a `.json` file, a sentencepiece `.model` file, a folder that holds tokenizer.json or tokenizer.model,
            or a hub name such as EleutherAI/gpt-neox-20b (needs a network or the hub's local cache).
        eot_token: the token that ends a document; found among the special tokens where not given.

    Raises:
        ConfigError: nothing usable at `spec`, or no clear end-of-text token.
    """
    path = Path(spec)
    if path.is_dir():
        return _load_folder(path, eot_token)
    if path.is_file():
        return _load_file(path, spec, eot_token)
    if path.suffix in (".json", ".model") or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise ConfigError(
            f"--tokenizer {spec}: no such file or folder; give a tokenizer.json, a sentencepiece .model file, "
            "a folder that holds one, or a hub name"
        )
    return _load_from_hub(spec, eot_token)


def _load_file(path: Path, name: str, eot_token: str | None, bos_token: str | None = None) -> Tokenizer:
    if path.suffix == ".model":
        return SentencePieceTokenizer(path.read_bytes(), name, eot_token, bos_token)
    try:
        return JsonTokenizer(path.read_text(encoding="utf-8"), name, eot_token, bos_token)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--tokenizer {name}: neither JSON text nor a file ending in .model; give a tokenizer.json or a "
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
        file = _fetch(name, "tokenizer.json") or _fetch(name, "tokenizer.model")
        config = _fetch(name, "tokenizer_config.json") if file is not None else None
    except Exception as error:
        # The hub's client raises a wide family of errors: no network, no such name, no permission.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ConfigError(
            f"--tokenizer {name}: no such file or folder here, and the hub could not give it "
            f"({type(error).__name__}: {reason}); check the name and the network, or give a local tokenizer.json or "
            "sentencepiece .model file"
        ) from error
    if file is None:
        raise ConfigError(f"--tokenizer {name}: the hub has neither tokenizer.json nor tokenizer.model under this name")
    configured_eot, bos_token = _configured_tokens(config) if config is not None else (None, None)
    return _load_file(file, name, eot_token or configured_eot, bos_token)


def _fetch(name: str, filename: str) -> Path | None:
    """A file of the hub, or of its local cache where the hub cannot be reached; None where there is no such file."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:  # one short question: a download without a network would try again for half a minute
        get_hf_file_metadata(hf_hub_url(name, filename))
    except EntryNotFoundError:
        pass  # the download is told so too, and notes it in the cache
    except Exception:
        cached = try_to_load_from_cache(name, filename)
        if cached is None:
            raise
        return Path(cached) if isinstance(cached, str) else None  # the cache may know that there is no such file
    try:
        return Path(hf_hub_download(name, filename))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _configured_tokens(path: Path) -> tuple[str | None, str | None]:
    """The tokens that end and begin a text as a tokenizer_config.json names them, if it does."""
    if not path.is_file():
        return None, None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from error

    def named(key: str) -> str | None:
        token = config.get(key) if isinstance(config, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        return token if isinstance(token, str) else None

    return named("eos_token"), named("bos_token")


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
        f"--tokenizer {name}: cannot tell which token ends a document (special tokens: {found}); "
        "name it with --eot-token"
    )
