"""Prompts to token ids, within the context or cut to it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from apt_jax.engine.interface import EngineFacts
from apt_jax.output import ContextExceeded
from apt_jax.serve.errors import BadRequest, ContextTooLong, ModelNotFound
from apt_jax.serve.json_text import SHOWN_VALUE_CHARS
from apt_jax.serve.openai.bodies.requests import PromptRequest

if TYPE_CHECKING:
    from apt_jax.tokenization.tokenizer import Tokenizer


def prompt_ids(
    prompt: str | Sequence[int], body: PromptRequest, engine: EngineFacts, param: str, *, special: bool
) -> Sequence[int]:
    """Token ids of a text, or those given; the last ones where `truncate_prompt_tokens` says so.

    Args:
        param: the field that the prompt is from.
        special: whether special tokens are added to a text if the body does not say.

    Raises:
        BadRequest: a text and no tokenizer, or more tokens than the context holds.
    """
    limit = _limit(body, engine.max_model_len)
    if not isinstance(prompt, str):
        return prompt if limit is None else prompt[-limit:]
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise BadRequest("this model has no tokenizer; give the prompt as token ids", param)
    special = special if body.add_special_tokens is None else body.add_special_tokens
    if limit is None:
        check_length(prompt, tokenizer, engine.max_model_len, param)
        return tokenizer.encode(prompt, add_special_tokens=special)
    try:
        return tokenizer.encode_end(prompt, limit, add_special_tokens=special)
    except ValueError as error:
        raise BadRequest(str(error), param) from error


def check_fits_queue(count: int, many: str, max_samples: int, param: str) -> None:
    """Raises BadRequest if there are more samples than the queue holds; `many` says what, with its verb."""
    if count > max_samples:
        raise BadRequest(
            f"{many} more than the queue holds ({max_samples}); send fewer at once or raise --max-num-queued-reqs",
            param,
        )


def _limit(body: PromptRequest, max_model_len: int) -> int | None:
    """Tokens that a prompt is cut to; None if it is not to be cut."""
    asked = body.truncate_prompt_tokens
    if asked is None or asked > max_model_len:
        if asked is not None:
            raise BadRequest(
                f"truncate_prompt_tokens={asked} is more than the context of {max_model_len} tokens; give at most "
                "that, or -1 for what fits",
                "truncate_prompt_tokens",
            )
        return None
    if asked > 0:
        return asked
    if body.reserved_tokens >= max_model_len:
        raise BadRequest(no_room(body.reserved_tokens, max_model_len), "max_tokens")
    return max_model_len - body.reserved_tokens


def no_room(max_tokens: int, max_model_len: int) -> str:
    """The sentence for an answer beside which no prompt fits, however it is cut."""
    return (
        f"max_tokens={max_tokens} leaves no room for a prompt, which truncate_prompt_tokens=-1 cuts to what fits: the "
        f"context holds {max_model_len} tokens; ask for at most {max_model_len - 1}"
    )


def check_length(text: str, tokenizer: "Tokenizer", max_model_len: int, param: str) -> None:
    """Raises ContextTooLong if the context cannot hold `text`, whatever its tokens are: they need not be found then."""
    if len(text) <= max_model_len:
        return
    fewest = tokenizer.fewest_tokens(text)
    if fewest > max_model_len:
        error = ContextExceeded(
            f"the prompt has {len(text)} characters and so at least {fewest} tokens, but the context holds "
            f"{max_model_len}; shorten the prompt or raise --max-model-len",
            max_model_len,
        )
        raise ContextTooLong(error, param)


def check_model(name: str | None, served: Sequence[str]) -> None:
    """Raises ModelNotFound if a body names another model than the served one."""
    if name is not None and name not in served:
        known = " or ".join(map(repr, served))
        raise ModelNotFound(f"the model {name[:SHOWN_VALUE_CHARS]!r} is not served here; use {known}", "model")


def check_room(prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
    """Raises ContextTooLong if the context cannot hold both; a prompt that fills it alone is the engine's to refuse."""
    room = max_model_len - prompt_tokens
    if 0 < room < max_tokens:
        error = ContextExceeded(
            f"max_tokens={max_tokens} is more than fits: the context holds {max_model_len} tokens and the prompt has "
            f"{prompt_tokens}; ask for at most {room}, or leave it out",
            max_model_len,
        )
        raise ContextTooLong(error, "max_tokens")
