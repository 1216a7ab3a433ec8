"""Chat templates: conversations to text, and which of its characters the assistant generates.

A template is jinja source: one of templates/*.jinja, or the tokenizer's own. It marks what the assistant generates:

    {% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}

Only these characters become targets of the loss, so they must include the end of the turn. Templates run in jinja's
sandbox, with the names that transformers gives them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from open_lm import storage
from open_lm.errors import ConfigError, UserError
from open_lm.finetune.conversations import ASSISTANT, SYSTEM, USER, BadConversation, Message
from open_lm.tokenizer import CONFIG_NAME, TEMPLATE_NAME, Tokenizer

FOLDER = Path(__file__).resolve().parent / "templates"
OWN = "tokenizer"  # selects the tokenizer's own template
# Characters that mark positions in rendered text; Unicode reserves them for private use.
START, END, JOINER = "\U0010fff0", "\U0010fff1", "\U0010fff2"
_MARKER = re.compile(f"[{START}{END}]")
_HAS_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MAX_CHARACTERS = 64 << 20


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation: its text, and the spans [start, end) of characters that the assistant generates."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the tokens that it may use.

    Attributes:
        name: where it comes from, for messages.
        source: the jinja source.
        bos_token, eos_token: names of the tokens that begin and end a text; "" for none.
        today: the date for templates that contain it; without one, they fail, because data must not depend on the day.
    """

    name: str
    source: str
    bos_token: str = ""
    eos_token: str = ""
    today: date | None = None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> Rendered:
        """Render messages; with `add_generation_prompt`, end with the text that begins a turn of the assistant.

        Raises:
            BadConversation: the template fails, or refuses the messages.
        """
        if any(_MARKER.search(message.content) for message in messages):
            raise BadConversation("reserved character", "a message holds U+10FFF0 or U+10FFF1, which mark positions")
        try:
            text = self._compiled.render(
                messages=[message.to_json() for message in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                tools=None,
                documents=None,
            )
        except Exception as error:  # a template can raise any error, such as a TypeError of an expression
            reason = str(error) or type(error).__name__
            raise BadConversation("template error", f"chat template {self.name}: {reason}") from error
        if len(text) > _MAX_CHARACTERS:
            raise BadConversation("template error", f"chat template {self.name}: its text has {len(text)} characters")
        return _remove_markers(text)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields only: compiled templates cannot be pickled."""
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__}

    @cached_property
    def _compiled(self) -> Any:
        return _environment(self.today).from_string(self.source)

    def check(self) -> None:
        """Raise ConfigError unless the template trains exactly the turns of the assistant, including their ends."""
        if not _HAS_GENERATION.search(self.source):
            raise ConfigError(
                f"chat template {self.name}: has no {{% generation %}} … {{% endgeneration %}} around the turns of the "
                f"assistant, so nothing would be trained; add them, or choose one of {', '.join(template_names())}"
            )
        from jinja2 import TemplateSyntaxError

        try:
            _ = self._compiled
        except TemplateSyntaxError as error:
            raise ConfigError(f"chat template {self.name}, line {error.lineno}: {error.message}") from error
        rendered = self._probe()
        if problem := _span_problem(rendered):
            raise ConfigError(f"chat template {self.name}: {problem}")

    def _probe(self) -> Rendered:
        turns = [Message(USER, "first question"), Message(ASSISTANT, "first answer")]
        turns += [Message(USER, "second question"), Message(ASSISTANT, "second answer")]
        try:
            return self.render([Message(SYSTEM, "system prompt"), *turns])
        except BadConversation:
            pass  # some templates refuse system prompts
        try:
            return self.render(turns)
        except BadConversation as error:
            raise ConfigError(f"{error}; it must accept a conversation of two turns") from error

    @cached_property
    def turn_end(self) -> str:
        """The text that the assistant generates after its message, such as "<|im_end|>"."""
        rendered = self._probe()
        start, end = rendered.spans[-1]
        return rendered.text[start:end].partition("second answer")[2]


def template_names() -> list[str]:
    """Return the names of the templates of this package."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def find_template(spec: str | None, tokenizer: Tokenizer, today: date | None = None) -> ChatTemplate:
    """Return and check a template: `OWN` (or None) for the tokenizer's, a name of `template_names`, or a .jinja file.

    Raises:
        ConfigError: there is no such template, or it does not mark the turns of the assistant.
    """
    if spec in (None, OWN):
        name, source = f"of {tokenizer.name}", own_template(tokenizer)
        if source is None:
            raise ConfigError(
                f"--tokenizer {tokenizer.name}: has no chat template in its {CONFIG_NAME} or {TEMPLATE_NAME}; choose "
                f"one with --chat-template: {', '.join(template_names())}, or a .jinja file"
            )
    else:
        assert spec is not None
        name, source = spec, _read_template(spec)
    bos_token = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
    template = ChatTemplate(name, source, bos_token, tokenizer.token(tokenizer.eot_id), today)
    template.check()
    return template


def own_template(tokenizer: Tokenizer) -> str | None:
    """Return the template in a tokenizer's configuration (of several, the one named default); None without one."""
    templates = tokenizer.config.get("chat_template")
    if isinstance(templates, list):
        by_name = {item.get("name"): item.get("template") for item in templates if isinstance(item, dict)}
        templates = by_name.get("default")
    return templates if isinstance(templates, str) else None


def _read_template(spec: str) -> str:
    if spec in template_names():
        return (FOLDER / f"{spec}.jinja").read_text(encoding="utf-8")
    try:
        return storage.read_text(spec)
    except (UserError, OSError, UnicodeDecodeError) as error:
        names = ", ".join(template_names())
        raise ConfigError(
            f"--chat-template {spec}: expected {OWN}, one of {names}, or a readable .jinja file ({error})"
        ) from error


# --- jinja -----------------------------------------------------------------------------------------------------------
def _environment(today: date | None) -> Any:
    """Return a sandbox with what transformers offers to templates, and with the tag `generation`."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - the type that jinja declares

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            start, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (START, END))
            return [start, *body, end]

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        if today is None:
            raise TemplateError("uses the current date; pass a fixed one with --template-date YYYY-MM-DD")
        return today.strftime(form)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _remove_markers(text: str) -> Rendered:
    parts, spans, start, length = [], [], None, 0
    position = 0
    for match in _MARKER.finditer(text):
        parts.append(text[position : match.start()])
        length += match.start() - position
        position = match.end()
        if match[0] == START:
            start = length
        elif start is not None:
            spans.append((start, length))
            start = None
    parts.append(text[position:])
    return Rendered("".join(parts), tuple(spans))


def _span_problem(rendered: Rendered) -> str | None:
    """Return what is wrong with the spans of the conversation of `ChatTemplate._probe`."""
    texts = [rendered.text[start:end] for start, end in rendered.spans]
    for words in ("system prompt", "first question", "second question"):
        if any(words in text for text in texts):
            return f"its generation blocks train the text of another role ({words!r})"
    for answer in ("first answer", "second answer"):
        matching = [text for text in texts if answer in text]
        if not matching:
            return f"its generation blocks leave out a turn of the assistant ({answer!r})"
        if not matching[0].partition(answer)[2].strip():
            return (
                "its generation blocks end before the token that ends a turn, so that the model would never stop; move "
                "that token into the block"
            )
    return None
