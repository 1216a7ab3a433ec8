"""Chat templates: what is trained, equality with transformers, and templates that are refused."""

from __future__ import annotations

import pickle
from datetime import date
from pathlib import Path

import pytest
from sft_helpers import CHAT, TOKENS, write_chat_tokenizer

from open_lm.data.tokenizer_copies import read_files
from open_lm.errors import ConfigError
from open_lm.finetune.chat_templates import find_template, template_names
from open_lm.finetune.chat_tokens import ChatEncoding, ChatTokenizer
from open_lm.finetune.conversations import BadConversation, Message
from open_lm.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_files

MESSAGES = [Message(**message) for message in CHAT]
ENDS = {
    "chatml": "<|im_end|>", "gemma": "<end_of_turn>", "llama2": "</s>", "llama3": "<|eot_id|>", "olmo": "</s>",
    "tulu": "</s>",
}  # fmt: skip
HEAD = "{% for message in messages %}"
TAIL = "{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


def chat_of(tokenizer: Tokenizer, name: str) -> ChatTokenizer:
    chat = ChatTokenizer(tokenizer, find_template(name, tokenizer))
    chat.check()
    return chat


def encoding_of(chat: ChatTokenizer, messages: list[Message]) -> ChatEncoding:
    (encoding,) = chat.encode([messages])
    assert isinstance(encoding, ChatEncoding)
    return encoding


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text with the names of special tokens."""
    return "".join(f"{tokenizer.token(i)}" if i >= 256 else tokenizer.decode([i]) for i in ids)


def trained_runs(tokenizer: Tokenizer, encoding: ChatEncoding) -> list[str]:
    """Return the texts of consecutive trained tokens."""
    runs: list[list[int]] = []
    for position, (token, trained) in enumerate(zip(encoding.ids.tolist(), encoding.is_trained.tolist(), strict=True)):
        if trained and (not position or not encoding.is_trained[position - 1]):
            runs.append([])
        if trained:
            runs[-1].append(token)
    return [text_of(tokenizer, run) for run in runs]


@pytest.mark.parametrize("name", template_names())
def test_every_assistant_turn_is_trained_with_its_end_and_nothing_else(tokenizer: Tokenizer, name: str) -> None:
    chat = chat_of(tokenizer, name)
    encoding = encoding_of(chat, MESSAGES)
    expected = [f" hello {ENDS[name]}", f" enough {ENDS[name]}"]
    found = trained_runs(tokenizer, encoding)
    assert found == (expected if name == "llama2" else [text.replace(" ", "") for text in expected])
    assert "be kind" in text_of(tokenizer, encoding.ids.tolist())
    end = tokenizer.encode(ENDS[name])[0]
    assert end in chat.stop_ids and tokenizer.eot_id in chat.stop_ids and chat.stop_text == ""


@pytest.mark.parametrize("name", template_names())
def test_prompt_is_the_beginning_of_the_trained_conversation(tokenizer: Tokenizer, name: str) -> None:
    chat = chat_of(tokenizer, name)
    encoding = encoding_of(chat, MESSAGES)
    for turns in (2, 4):
        prompt = chat.prompt(MESSAGES[:turns])
        assert encoding.ids[: len(prompt)].tolist() == prompt
        assert encoding.is_trained[len(prompt)] and not encoding.is_trained[len(prompt) - 1]


@pytest.mark.parametrize("name", ["llama2", "llama3", "gemma"])
def test_text_begins_with_one_begin_token(tokenizer: Tokenizer, name: str) -> None:
    """The tokenizer adds <s> to every text by itself, and the template writes it too."""
    assert tokenizer.encode_with_special_tokens(["a"])[0][0] == tokenizer.bos_id
    ids = encoding_of(chat_of(tokenizer, name), MESSAGES[:3]).ids.tolist()
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1


@pytest.mark.parametrize("name", template_names())
def test_ids_and_masks_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = load_tokenizer(str(write_chat_tokenizer(tmp_path)))
    template = find_template(name, tokenizer)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = reference.apply_chat_template(
        CHAT, chat_template=template.source, return_assistant_tokens_mask=True, return_dict=True
    )
    encoding = encoding_of(ChatTokenizer(tokenizer, template), MESSAGES)
    assert encoding.ids.tolist() == expected["input_ids"]
    assert encoding.is_trained.astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.parametrize("name", ["chatml", "llama2"])
@pytest.mark.parametrize("token", TOKENS)
def test_special_tokens_in_messages_are_plain_text(tokenizer: Tokenizer, name: str, token: str) -> None:
    chat = chat_of(tokenizer, name)
    messages = [Message("user", f"a{token}b é"), Message("assistant", f"c{token}d 😀")]
    encoding = encoding_of(chat, messages)
    harmless = encoding_of(chat, [Message("user", "ab"), Message("assistant", "cd")])
    special = [i for i in encoding.ids.tolist() if i >= 256]
    assert special == [i for i in harmless.ids.tolist() if i >= 256]
    trained = encoding.ids[encoding.is_trained]
    assert tokenizer.decode(trained[trained < 256].tolist()).strip() == f"c{token}d 😀"


def test_own_template_of_a_tokenizer(tmp_path: Path) -> None:
    source = (
        HEAD + "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}"
        "{% endgeneration %}{% else %}{{ message.content }}?{% endif %}" + TAIL
    )
    tokenizer = load_tokenizer(str(write_chat_tokenizer(tmp_path, source)))
    chat = ChatTokenizer(tokenizer, find_template(None, tokenizer))
    assert trained_runs(tokenizer, encoding_of(chat, MESSAGES)) == ["hello</s>", "enough</s>"]
    assert pickle.loads(pickle.dumps(chat.template)).render(MESSAGES) == chat.template.render(MESSAGES)


def test_own_template_in_a_separate_file(tmp_path: Path) -> None:
    folder = write_chat_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(find_template("chatml", load_tokenizer(str(folder))).source)
    tokenizer = load_tokenizer(str(folder))
    expected = find_template("chatml", tokenizer).render(MESSAGES)
    copy = tokenizer_from_files(tokenizer.files(), "another folder")
    from_files = tokenizer_from_files(read_files(str(folder)), "yet another folder")
    for found in (tokenizer, copy, from_files):
        assert find_template(None, found).render(MESSAGES) == expected
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template.jinja is not UTF-8 text"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{{ message.content }}", "has no {% generation %}"),
        ("{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}", "train the text of another role"),
        (
            "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
            "{{ eos_token }}{% endif %}",
            "end before the token that ends a turn",
        ),
        (
            "{% if message.role == 'assistant' and loop.last %}{% generation %}{{ message.content }}{{ eos_token }}"
            "{% endgeneration %}{% endif %}",
            "leave out a turn of the assistant",
        ),
        ("{% generation %}{{ message.content }}", "line 1: "),
        ("{% generation %}{{ message.content.nothing() }}{% endgeneration %}", "must accept a conversation"),
        ("{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}", "--template-date"),
        ("{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}", "unsafe"),
    ],
)  # fmt: skip
def test_templates_that_would_train_something_else_are_errors(tmp_path: Path, body: str, message: str) -> None:
    tokenizer = load_tokenizer(str(write_chat_tokenizer(tmp_path, HEAD + body + TAIL)))
    with pytest.raises(ConfigError, match=message) as caught:
        find_template("tokenizer", tokenizer)
    assert "chat template" in str(caught.value)


def test_dates_of_templates_are_fixed(tmp_path: Path) -> None:
    source = "{{ strftime_now('%d %b %Y') }}" + (
        HEAD + "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}"
        "{% endgeneration %}{% endif %}" + TAIL
    )
    tokenizer = load_tokenizer(str(write_chat_tokenizer(tmp_path, source)))
    template = find_template("tokenizer", tokenizer, date(2024, 7, 26))
    assert template.render(MESSAGES).text.startswith("26 Jul 2024")


def test_tokenizer_without_a_template_or_with_an_unknown_one(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"has no chat template .* chatml, gemma"):
        find_template("tokenizer", tokenizer)
    with pytest.raises(ConfigError, match="--chat-template nothing"):
        find_template("nothing", tokenizer)


def test_templates_whose_markers_merge_with_the_next_text_are_errors(shared_dir: Path) -> None:
    tokenizer = load_tokenizer(str(shared_dir / "data" / "tokenizers" / "gpt-neox-20b.json"))
    with pytest.raises(ConfigError, match="differ between training and generation"):
        chat_of(tokenizer, "llama3")
    assert chat_of(tokenizer, "chatml").stop_text == "<|im_end|>"
    assert trained_runs(tokenizer, encoding_of(chat_of(tokenizer, "tulu"), MESSAGES))[0].startswith("hello")


def test_sentencepiece_models_are_refused(shared_dir: Path) -> None:
    tokenizer = load_tokenizer(str(shared_dir / "data" / "tokenizers" / "llama2.model"))
    with pytest.raises(ConfigError, match=r"use the tokenizer\.json"):
        chat_of(tokenizer, "llama2")


@pytest.mark.parametrize("character", ["\U0010fff0", "\U0010fff1", "\U0010fff2"])
def test_characters_that_mark_positions_are_refused(tokenizer: Tokenizer, character: str) -> None:
    (result,) = chat_of(tokenizer, "chatml").encode([[Message("user", character), Message("assistant", "a")]])
    assert isinstance(result, BadConversation) and result.kind == "reserved character"
