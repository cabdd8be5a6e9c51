"""Chats from Python to prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from apt_jax.serve.errors import BadRequest
from apt_jax.serve.openai.bodies.chat_requests import parse_chat
from apt_jax.serve.openai.templates.chat_template import NoTemplate, render
from apt_jax.serve.python.prompts import Prompt, RenderedChat
from apt_jax.tokenization.tokenizer import Tokenizer


def chat_prompts(
    messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
    tokenizer: Tokenizer | None,
    template: str | None,
    *,
    generate: bool,
) -> list[Prompt]:
    """One chat, or each of a list of chats, as text and token ids.

    Raises:
        ValueError: there is no tokenizer or template, or the template refuses the messages.
    """
    if tokenizer is None:
        raise ValueError("this model has no tokenizer, so it cannot chat; use generate, or give tokenizer=")
    chats = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
    prompts: list[Prompt] = []
    for number, chat in enumerate(chats):
        try:
            body = parse_chat({"messages": list(chat)})
            text = render(body.messages, tokenizer, template, generate=generate)
        except NoTemplate as error:
            cure = "give chat_template=, or use generate"
            raise ValueError(f"chat {number} of {len(chats)}: this model has no chat template; {cure}") from error
        except BadRequest as error:
            raise ValueError(f"chat {number} of {len(chats)}: {error}") from error
        token_ids = tokenizer.encode(text, add_special_tokens=False)  # the template writes the special ones
        prompts.append(RenderedChat(text, token_ids))
    return prompts
