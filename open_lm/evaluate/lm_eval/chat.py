"""Format conversations with the chat template of a tokenizer, in the way of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from open_lm.errors import ConfigError
from open_lm.tokenizer import Tokenizer


def find_template(tokenizer: Tokenizer) -> str | None:
    """Return the chat template of a tokenizer's configuration or folder (of several, the default); None without one."""
    template = tokenizer.config.get("chat_template")
    if isinstance(template, list):
        template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    if isinstance(template, str):
        return template
    file = Path(tokenizer.name) / "chat_template.jinja"  # where newer releases of transformers store it
    return file.read_text(encoding="utf-8") if file.is_file() else None


def render_chat(
    template: str, messages: Sequence[dict[str, str]], add_generation_prompt: bool, tokenizer: Tokenizer
) -> str:
    """Return the text of a conversation.

    Without a generation prompt, the last message is to be continued, so the text ends with it.

    Args:
        template: a Jinja template, which runs in a sandbox.
        messages: dicts with role and content.
        add_generation_prompt: end with the text before an answer of the model.
        tokenizer: its tokens that begin and end a text are variables of the template.

    Raises:
        ConfigError: a template that cannot format these messages.
    """
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what the assistant generates, which changes no text."""

        tags = {"generation"}  # noqa: RUF012 - the type that jinja declares

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    tokens: dict[str, Any] = {"eos_token": tokenizer.token(tokenizer.eot_id)}
    if tokenizer.bos_id is not None:
        tokens["bos_token"] = tokenizer.token(tokenizer.bos_id)

    def render(conversation: Sequence[dict[str, str]]) -> str:
        return str(compiled.render(messages=conversation, add_generation_prompt=add_generation_prompt, **tokens))

    try:
        compiled = environment.from_string(template)
        try:
            text = render(messages)
        except TemplateError:  # some templates accept no system message
            text = render([message for message in messages if message["role"] != "system"])
    except TemplateSyntaxError as error:
        raise ConfigError(f"the chat template of {tokenizer.name}, line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template can raise any error, such as a TypeError of an expression
        reason = str(error) or type(error).__name__
        raise ConfigError(f"the chat template of {tokenizer.name} does not accept the messages: {reason}") from error
    if add_generation_prompt or not messages:
        return text
    last = messages[-1]["content"].strip()
    if last not in text:
        raise ConfigError(
            f"the chat template of {tokenizer.name} changes the last message, so that a task that lets the model "
            "continue it cannot be evaluated; remove --apply_chat_template, or correct the template"
        )
    return text[: text.rindex(last) + len(last)]
