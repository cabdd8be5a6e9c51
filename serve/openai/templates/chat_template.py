"""Messages of a chat to the text that the model was trained on, by the Jinja template of its tokenizer or of a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from apt_jax.files import read_text
from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.chat_requests import Message
from apt_jax.serve.openai.templates.sandbox import render_template

if TYPE_CHECKING:
    from apt_jax.tokenization.tokenizer import Tokenizer


class NoTemplate(BadRequest):
    """There is nothing to turn messages into text with."""

    def __init__(self) -> None:
        super().__init__(
            "this model has no chat template (OPT models come without one), so it cannot chat; start the server with "
            "--chat-template FILE, or use /v1/completions",
            "messages",
        )


def read_template(path: Path) -> str:
    """A chat template from a file; it is compiled once, to find its faults.

    Raises:
        ValueError: not text, not a Jinja template, or one that fails on a plain chat; one sentence.
        OSError: it cannot be read.
    """
    try:
        text = read_text(path, pipe=True)
    except ValueError as error:
        raise ValueError(f"--chat-template {path} is not a Jinja template: {error}") from error
    try:
        render_template(text, [{"role": "user", "content": "x"}], add_generation_prompt=False)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"--chat-template {path} is not a Jinja template: {error}") from error
    except jinja2.TemplateError:  # a template may refuse this chat
        pass
    except Exception as error:  # a template is a program: it can raise anything
        raise ValueError(f"--chat-template {path} fails on a chat of one user message: {_reason(error)}") from error
    return text


def render(messages: Sequence[Message], tokenizer: "Tokenizer", template: str | None, *, generate: bool) -> str:
    """The chat as one text; `template` overrides the tokenizer's own. Runs in a bounded sandbox.

    With `generate`, the text ends where the assistant's answer begins.

    Raises:
        NoTemplate: there is none.
        BadRequest: it refuses the messages or fails on them.
    """
    chosen = template or tokenizer.chat_template
    if chosen is None:
        raise NoTemplate
    variables: dict[str, Any] = {**tokenizer.special_tokens, "add_generation_prompt": generate}
    try:
        text = render_template(chosen, [message.for_template() for message in messages], **variables)
    except jinja2.TemplateError as error:
        raise BadRequest(f"the chat template refuses these messages: {error}", "messages") from error
    except Exception as error:  # a template is a program: it can raise anything
        raise BadRequest(f"the chat template fails on these messages: {_reason(error)}", "messages") from error
    if not text:
        raise BadRequest("the chat template makes nothing of these messages", "messages")
    return text


def _reason(error: Exception) -> str:
    """An error of a template in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
