"""Conversations from JSON records in the forms that data sets use.

    messages    {"messages": [{"role": "user", "content": "…"}, …]}      also with "tools"
    sharegpt    {"conversations": [{"from": "human", "value": "…"}, …]}   also with "system" and "tools"
    prompt      {"prompt": "…", "completion": "…"}                        or "response"; both may be lists of messages
    alpaca      {"instruction": "…", "input": "…", "output": "…"}         also with "system"

A form is one function with a `register` call, so that others can be added in a file of this package. Contents are text:
parts of a message that are not text are an error, and tools and calls of tools are kept as their JSON.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from open_lm.config.registry import CONVERSATION_FORMS
from open_lm.errors import DataError

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = (SYSTEM, USER, ASSISTANT, TOOL)
_ROLE_NAMES = {
    "system": SYSTEM, "developer": SYSTEM, "user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT,
    "model": ASSISTANT, "chatgpt": ASSISTANT, "function_call": ASSISTANT, "tool": TOOL, "function": TOOL,
    "observation": TOOL, "function_response": TOOL, "ipython": TOOL,
}  # fmt: skip
_SHOWN = 60
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class BadConversation(DataError):
    """A record that is no usable conversation; `kind` groups such records in counts."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Message:
    """A turn of a conversation: one of `ROLES`, and its text."""

    role: str
    content: str

    def to_json(self) -> dict[str, str]:
        """Return the message as chat templates expect it."""
        return {"role": self.role, "content": self.content}


Conversation = tuple[Message, ...]


def parse_conversation(record: Any, form: str = "auto") -> Conversation:
    """Return the conversation of a decoded JSON record. `form` is a name of CONVERSATION_FORMS, or "auto" to detect it.

    Raises:
        BadConversation: another form, an unknown role, an empty turn of the assistant, or none.
    """
    if not isinstance(record, dict):
        raise BadConversation("not an object", f"expected a JSON object, found {type(record).__name__}")
    messages = CONVERSATION_FORMS.get(_form_of(record) if form == "auto" else form)(record)
    for number, message in enumerate(messages, start=1):
        if message.role == ASSISTANT and not message.content.strip():
            raise BadConversation("empty assistant turn", f"message {number}: the assistant says nothing")
    if not any(message.role == ASSISTANT for message in messages):
        raise BadConversation("no assistant turn", "no message is from the assistant, so there is nothing to train")
    return tuple(messages)


def fingerprint(conversation: Conversation) -> bytes:
    """Return a hash (16 bytes) that is equal for conversations with the same roles and contents."""
    text = json.dumps([[message.role, message.content] for message in conversation], allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).digest()[:16]


def _form_of(record: Mapping[str, Any]) -> str:
    for name, entry in CONVERSATION_FORMS.entries().items():
        if all(any(key in record for key in key_or_other.split("|")) for key_or_other in entry.facts["keys"]):
            return name
    raise BadConversation(
        "unknown form",
        f"found the keys {_names(record)}, expected messages, conversations, prompt and completion, or instruction and "
        "output",
    )


# --- forms -----------------------------------------------------------------------------------------------------------
@CONVERSATION_FORMS.register("messages", help="a list of role and content", keys=("messages",))
def _from_messages(record: Mapping[str, Any]) -> list[Message]:
    return _with_tools(parse_messages(record["messages"], "messages"), record.get("tools"))


@CONVERSATION_FORMS.register("sharegpt", help="conversations of from and value", keys=("conversations",))
def _from_sharegpt(record: Mapping[str, Any]) -> list[Message]:
    messages = parse_messages(record["conversations"], "conversations", role_key="from", content_key="value")
    return _with_tools(_with_system(messages, record.get("system")), record.get("tools"))


@CONVERSATION_FORMS.register(
    "prompt", help="prompt, and completion or response", keys=("prompt", "completion|response")
)
def _from_prompt(record: Mapping[str, Any]) -> list[Message]:
    completion = record.get("completion", record.get("response"))
    messages = []
    for key, value, role in (("prompt", record["prompt"], USER), ("completion", completion, ASSISTANT)):
        messages += parse_messages(value, key) if isinstance(value, list) else [Message(role, _text(value, key))]
    return _with_tools(_with_system(messages, record.get("system")), record.get("tools"))


@CONVERSATION_FORMS.register("alpaca", help="instruction, input and output", keys=("instruction", "output"))
def _from_alpaca(record: Mapping[str, Any]) -> list[Message]:
    instruction, extra = _text(record["instruction"], "instruction"), _text(record.get("input") or "", "input")
    question = f"{instruction}\n\n{extra}" if extra.strip() else instruction
    messages = [Message(USER, question), Message(ASSISTANT, _text(record["output"], "output"))]
    return _with_system(messages, record.get("system"))


def parse_messages(items: Any, key: str, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """Return the messages of a list of objects. `key` names the list in errors.

    Raises:
        BadConversation: not a list of messages, an unknown role, contents that are not text, or calls of tools that
            are not a list.
    """
    if not isinstance(items, list) or not items:
        found = "an empty list" if items == [] else type(items).__name__
        raise BadConversation("wrong type", f'"{key}" must be a list of messages, found {found}')
    messages = []
    for number, item in enumerate(items, start=1):
        place = f"{key}, message {number}"
        if not isinstance(item, dict):
            raise BadConversation("wrong type", f"{place}: expected an object, found {type(item).__name__}")
        if role_key not in item:
            raise BadConversation("missing key", f'{place}: found no key "{role_key}", only {_names(item)}')
        name = item[role_key]
        role = _ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise BadConversation("unknown role", f"{place}: found the role {name!r}, expected {', '.join(ROLES)}")
        calls = item.get("tool_calls") or []
        if not isinstance(calls, list):
            raise BadConversation(
                "wrong tool calls", f"{place}: tool_calls must be a list, found {type(calls).__name__}"
            )
        content = _text(item.get(content_key), place, optional=bool(calls))
        parts = [content, *(_as_text(_call_of(call), place) for call in calls)]
        messages.append(Message(role, "\n".join(part for part in parts if part)))
    return messages


def _text(value: Any, place: str, optional: bool = False) -> str:
    """Return a text, or the joined texts of a list of parts such as [{"type": "text", "text": "…"}]."""
    if value is None and optional:
        return ""
    if isinstance(value, list):
        kinds = sorted({str(p.get("type")) for p in value if isinstance(p, dict)} - {"text"})
        if kinds:
            raise BadConversation("not text", f"{place}: found a part of type {kinds[0]}, expected text only")
        value = "".join(_text(p.get("text") if isinstance(p, dict) else p, place) for p in value)
    if not isinstance(value, str):
        raise BadConversation("wrong type", f"{place}: the content must be text, found {type(value).__name__}")
    return unicode_text(value, place)


def _with_system(messages: list[Message], system: Any) -> list[Message]:
    if not system:
        return messages
    if messages and messages[0].role == SYSTEM:
        raise BadConversation("two system prompts", 'found "system" and a first message of the role system')
    return [Message(SYSTEM, _text(system, "system")), *messages]


def _with_tools(messages: list[Message], tools: Any) -> list[Message]:
    """Add the descriptions of tools to the system prompt, as JSON."""
    if not tools:
        return messages
    text = f"Tools:\n{_as_text(tools, 'tools')}"
    if messages[0].role == SYSTEM:
        return [Message(SYSTEM, f"{messages[0].content}\n\n{text}"), *messages[1:]]
    return [Message(SYSTEM, text), *messages]


def _call_of(call: Any) -> Any:
    return call.get("function", call) if isinstance(call, dict) else call


def _as_text(value: Any, place: str) -> str:
    if isinstance(value, str):
        return unicode_text(value, place)
    try:
        return unicode_text(json.dumps(value, ensure_ascii=False, allow_nan=False), place)
    except ValueError as error:
        raise BadConversation("not JSON", f"{place}: found NaN or an infinity, which JSON does not have") from error


def unicode_text(text: str, place: str) -> str:
    """Return a text. Raise BadConversation if it has half of a surrogate pair, which JSON allows and UTF-8 does not."""
    if found := _SURROGATE.search(text):
        raise BadConversation(
            "not Unicode", f"{place}: found {found[0]!r}, half of a surrogate pair; remove it or add the other half"
        )
    return text


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(str(key)[:_SHOWN] for key in list(record)[:8]) or "none"
