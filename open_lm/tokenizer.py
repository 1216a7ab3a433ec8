"""Load tokenizers of every kind: from a hub name, a folder, a tokenizer .json file or a sentencepiece .model file."""

from __future__ import annotations

import copy
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from open_lm.errors import ConfigError
from open_lm.system.hub import hub_file

DEFAULT_TOKENIZER = "EleutherAI/gpt-neox-20b"
COPY_FOLDER = "tokenizer"  # of a data set or a run: the files of its tokenizer, see `Tokenizer.files`
JSON_NAME, MODEL_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"  # where newer releases of transformers store the template
OPTIONAL_NAMES = (CONFIG_NAME, TEMPLATE_NAME)
FILE_NAMES = (*OPTIONAL_NAMES, JSON_NAME, MODEL_NAME)  # in this order: a copy with one of the last two is complete
NO_TOKENIZER = "none: documents come as ids"  # in place of the fingerprint of data without a tokenizer
# Common names of the tokens that end and begin a document, in order of preference.
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|endofdocument|>")
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
        config: content of its tokenizer_config.json, with the template of chat_template.jinja unless it has one.
        fingerprint: sha256 (hex) of the tokenizer's file; equal fingerprints mean equal ids for equal text.
        splits_special_tokens: whether `encode` gives the text of a special token, such as "<|endoftext|>", the ids of
            plain text instead of the token's id (`with_split_special_tokens`).
    """

    library: str
    name: str
    eot_id: int
    bos_id: int | None
    vocab_size: int
    fingerprint: str
    config: Mapping[str, Any]
    source: Any  # the content of its file: text for JsonTokenizer, bytes for SentencePieceTokenizer
    splits_special_tokens: bool = False
    _native: Any  # the library's object; None between unpickling and first use

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of several texts, in their order. May use several threads."""

    @abstractmethod
    def encode_with_special_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts with the special tokens that the tokenizer's library adds, such as Llama's <s>.

        Training data contains none of them. Raise ConfigError if the tokenizer has no such token.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens. Raise ValueError for ids outside the vocabulary."""

    @abstractmethod
    def added_tokens(self) -> list[str]:
        """Return the added tokens, which are matched in a text before the text is split into other tokens."""

    def special_tokens(self) -> list[str]:
        """Return the special tokens that `encode` finds in a text unless it splits them."""
        return []  # sentencepiece never finds control pieces in a text

    def with_split_special_tokens(self) -> Tokenizer:
        """Return this tokenizer with `splits_special_tokens` set. Documents that quote a special token need this."""
        return self

    @abstractmethod
    def token(self, token_id: int) -> str:
        """Return the name of a token in the vocabulary, such as "<|endoftext|>"."""

    @abstractmethod
    def _source_file(self) -> tuple[str, bytes]:
        """Return the name and the content of the file that holds the tokenizer."""

    @abstractmethod
    def _load(self) -> Any:
        """Create the library's object from the source."""

    def files(self) -> dict[str, bytes]:
        """Return the files, by name, of a folder from which `load_tokenizer` loads the same tokenizer.

        They include a tokenizer_config.json that names the tokens that begin and end a document.
        """
        tokens = {"eos_token": self.eot_id} | ({} if self.bos_id is None else {"bos_token": self.bos_id})
        config = dict(self.config)
        for key, token_id in tokens.items():
            if _configured_token(config, key) != self.token(token_id):
                config[key] = self.token(token_id)
        name, content = self._source_file()
        text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False)
        return {CONFIG_NAME: f"{text}\n".encode(), name: content}

    def _read(self, source: str | bytes, name: str, config: Mapping[str, Any] | None, kind: str) -> None:
        """Set the attributes that come from the files, and create the library's object.

        Raises:
            ConfigError: the source is no `kind`.
        """
        self.source, self.name, self.config = source, name, config or {}
        try:
            self._native = self._load()
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise ConfigError(f"--tokenizer {name}: not a {kind} ({error})") from error
        self.fingerprint = hashlib.sha256(source.encode() if isinstance(source, str) else source).hexdigest()

    @property
    def _loaded(self) -> Any:
        if self._native is None:
            self._native = self._load()
        return self._native

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None}

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        if bad := sorted({i for i in ids if not 0 <= i < self.vocab_size}):
            raise ValueError(f"token ids {bad[:8]} are outside the vocabulary of {self.name} ({self.vocab_size} ids)")
        return list(ids)


class JsonTokenizer(Tokenizer):
    """A tokenizer of the tokenizers library, from a `tokenizer.json` file.

    `encoding_source` is the tokenizer.json to encode with. It differs from `source` if special tokens are split, but
    the file does not mark the tokens that begin and end a document as special.
    """

    library = "tokenizers"

    def __init__(
        self, source: str, name: str, eot_token: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        self.encoding_source = source
        self._read(source, name, config, "tokenizer.json of the tokenizers library")
        bos_token = _configured_token(self.config, "bos_token")
        eot_token = eot_token or _configured_token(self.config, "eos_token")
        vocab: dict[str, int] = self._native.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        special = {token.content for token in self._native.get_added_tokens_decoder().values() if token.special}
        self.eot_id = _eot_from_vocab(vocab, special, name, eot_token)
        known = [token for token in BOS_NAMES if token in special]
        self.bos_id = vocab.get(bos_token) if bos_token is not None else vocab[known[0]] if known else None

    def _load(self) -> Any:
        from tokenizers import Tokenizer as FastTokenizer

        native = FastTokenizer.from_str(self.encoding_source)
        native.no_padding()
        native.no_truncation()
        native.encode_special_tokens = self.splits_special_tokens
        return native

    def special_tokens(self) -> list[str]:
        added = self._loaded.get_added_tokens_decoder()
        return [token.content for i, token in added.items() if token.special or i in (self.eot_id, self.bos_id)]

    def with_split_special_tokens(self) -> JsonTokenizer:
        other = copy.copy(self)
        other.splits_special_tokens = True
        added = self._loaded.get_added_tokens_decoder()
        unmarked = {i for i in (self.eot_id, self.bos_id) if i in added and not added[i].special}
        if unmarked:
            content = json.loads(self.source)
            for token in content["added_tokens"]:
                token["special"] = token["special"] or token["id"] in unmarked
            other.encoding_source, other._native = json.dumps(content, allow_nan=False), None
        else:  # take the library's object, because loading another takes long; this one loads again if it is used
            other._native, self._native = self._native, None
            other._native.encode_special_tokens = True
        return other

    def encode(self, text: str) -> list[int]:
        return list(self._loaded.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(e.ids) for e in self._loaded.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_special_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(e.ids) for e in self._loaded.encode_batch_fast(list(texts), add_special_tokens=True)]

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Return the ids of each text, and for each id the position of its first character in the text."""
        encodings = self._loaded.encode_batch(list(texts), add_special_tokens=False)
        return [(list(e.ids), [start for start, _ in e.offsets]) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._loaded.decode(self._check_ids(ids), skip_special_tokens=True))

    def added_tokens(self) -> list[str]:
        return [token.content for token in self._loaded.get_added_tokens_decoder().values()]

    def token(self, token_id: int) -> str:
        return str(self._loaded.id_to_token(token_id))

    def _source_file(self) -> tuple[str, bytes]:
        return JSON_NAME, self.source.encode()


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer of the sentencepiece library, from a model file such as those of Llama 2 and Mistral."""

    library = "sentencepiece"

    def __init__(
        self, source: bytes, name: str, eot_token: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        self._read(source, name, config, "sentencepiece model")
        bos_token = _configured_token(self.config, "bos_token")
        eot_token = eot_token or _configured_token(self.config, "eos_token")
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

    def encode_with_special_tokens(self, texts: Sequence[str]) -> list[list[int]]:
        if self.bos_id is None:
            raise ConfigError(f"--tokenizer {self.name}: has no token that begins a text; omit --add-special-tokens")
        return [[self.bos_id, *ids] for ids in self.encode_batch(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._loaded.decode(self._check_ids(ids)))

    def added_tokens(self) -> list[str]:
        return [self._loaded.id_to_piece(i) for i in range(self.vocab_size) if self._loaded.is_control(i)]

    def token(self, token_id: int) -> str:
        return str(self._loaded.id_to_piece(token_id))

    def _source_file(self) -> tuple[str, bytes]:
        return MODEL_NAME, self.source


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


def tokenizer_from_files(files: Mapping[str, bytes], name: str, eot_token: str | None = None) -> Tokenizer:
    """Create a tokenizer from the contents of tokenizer.json or tokenizer.model, and of tokenizer_config.json.

    Args:
        files: contents by file name; those of `OPTIONAL_NAMES` are optional. tokenizer.json takes precedence over
            tokenizer.model, and a template in the configuration over chat_template.jinja.
        name: where the files come from, for messages.
        eot_token: the token that ends a document; by default that of the configuration, or a known special token.

    Raises:
        ConfigError: unusable content, or no known end-of-text token.
    """
    config = _parse_config(files[CONFIG_NAME], name) if CONFIG_NAME in files else {}
    if TEMPLATE_NAME in files and not config.get("chat_template"):
        config["chat_template"] = _decode(files[TEMPLATE_NAME], name, f"{TEMPLATE_NAME} is not UTF-8 text")
    if JSON_NAME not in files:
        return SentencePieceTokenizer(files[MODEL_NAME], name, eot_token, config)
    problem = "neither JSON text nor a file ending in .model; pass a tokenizer.json or a sentencepiece .model file"
    text = _decode(files[JSON_NAME], name, problem)
    # Fingerprints do not depend on how the lines of a file end.
    return JsonTokenizer(text.replace("\r\n", "\n").replace("\r", "\n"), name, eot_token, config)


def _load_file(path: Path, name: str, eot_token: str | None, optional: Sequence[Path | None] = ()) -> Tokenizer:
    files = {MODEL_NAME if path.suffix == ".model" else JSON_NAME: path.read_bytes()}
    files |= {file.name: file.read_bytes() for file in optional if file is not None and file.is_file()}
    return tokenizer_from_files(files, name, eot_token)


def _load_folder(folder: Path, eot_token: str | None) -> Tokenizer:
    for name in (JSON_NAME, MODEL_NAME):
        if (folder / name).is_file():
            return _load_file(folder / name, str(folder), eot_token, [folder / other for other in OPTIONAL_NAMES])
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"
    raise ConfigError(f"--tokenizer {folder}: expected tokenizer.json or tokenizer.model in this folder; found {found}")


def _load_from_hub(name: str, eot_token: str | None) -> Tokenizer:
    try:
        file = hub_file(name, JSON_NAME) or hub_file(name, MODEL_NAME)
        optional = [hub_file(name, other) for other in OPTIONAL_NAMES] if file is not None else []
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of many types: no network, unknown name, no permission
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--tokenizer {name}: no such local file or folder, and the download from the hub failed "
            f"({type(error).__name__}: {reason}); check the name and the network, or pass a local tokenizer.json or "
            "sentencepiece .model file"
        ) from error
    if file is None:
        raise ConfigError(f"--tokenizer {name}: the hub has neither tokenizer.json nor tokenizer.model under this name")
    return _load_file(file, name, eot_token, optional)


def _parse_config(content: bytes, name: str) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"--tokenizer {name}: {CONFIG_NAME} is not valid JSON ({error})") from error
    return config if isinstance(config, dict) else {}


def _decode(content: bytes, name: str, problem: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--tokenizer {name}: {problem}") from error


def _configured_token(config: Mapping[str, Any], key: str) -> str | None:
    """Return the token that a tokenizer_config.json has under `key`; None if it does not define one."""
    token = config.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


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
        "pass it with --eot-token, or use a folder whose tokenizer_config.json names it as eos_token"
    )
