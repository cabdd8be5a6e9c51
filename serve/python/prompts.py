"""Prompts from Python: to samples for the engine, and from its outputs to results."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from apt_jax.engine.interface import EngineFacts
from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import MAX_USER_CHARS, FinishReason, Request, SamplingParams, Slo
from apt_jax.serve.openai.prompts import no_room
from apt_jax.serve.python.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from apt_jax.serve.runtime.samples import Sample, fan_out
from apt_jax.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class RenderedChat:
    """A prompt that a chat template has written, with its token ids."""

    text: str
    token_ids: Sequence[int]


Prompt = str | Mapping[str, Any] | RenderedChat


class Prompted:
    """One prompt: its samples, and its result as outputs come in."""

    def __init__(self, result: RequestOutput, samples: list[Sample], tokenizer: Tokenizer | None):
        self.result, self.samples = result, samples
        self._tokenizer = tokenizer
        self._ended: list[Request] = []

    @classmethod
    def prepare(
        cls,
        prompt: Prompt,
        params: SamplingParams,
        engine: EngineFacts,
        *,
        request_id: str,
        number: int = 0,
        priority: int = 0,
        slo: Slo | None = None,
    ) -> Self:
        """Tokenise a prompt, number `number` of several, and split it into samples.

        Raises:
            ValueError: it is none, or needs a tokenizer and there is none.
        """
        cache_salt, user, tokenizer = None, None, engine.tokenizer
        if isinstance(prompt, Mapping):
            cache_salt, user = prompt.get("cache_salt"), prompt.get("user")
            prompt = {name: value for name, value in prompt.items() if name not in ("cache_salt", "user")}
            if cache_salt is not None and not (isinstance(cache_salt, str) and cache_salt):
                raise ValueError(f"prompt {number} has cache_salt={shown(cache_salt)}; give a text, or leave it out")
            if user is not None and not (isinstance(user, str) and len(user) <= MAX_USER_CHARS):
                raise ValueError(
                    f"prompt {number} has user={shown(user)}; give a text of at most {MAX_USER_CHARS} characters, or "
                    "leave it out"
                )
        text, token_ids = parse_prompt(prompt, number, tokenizer)
        token_ids = truncated(token_ids, params, engine.max_model_len)
        if params.stop and tokenizer is None:
            raise ValueError("stop needs a tokenizer and this model has none; use stop_token_ids or give tokenizer=")
        if params.structured_outputs is not None and tokenizer is not None:
            tokenizer.grammars.check(params.structured_outputs)
        samples = fan_out(request_id, [token_ids], params, priority=priority, slo=slo, cache_salt=cache_salt, user=user)
        outputs = [
            CompletionOutput(
                sample.index,
                cumulative_logprob=None if params.logprobs is None else 0.0,
                logprobs=None if params.logprobs is None else [],
                _text=None if tokenizer is None else [],
            )
            for sample in samples
        ]
        return cls(RequestOutput(request_id, text, list(token_ids), outputs), samples, tokenizer)

    def take(self, sample: Sample, output: Output) -> None:
        """Take in an output.

        Raises:
            RuntimeError: the engine failed on it.
            ValueError: nothing can meet what was asked for.
        """
        if output.is_contradictory:
            raise ValueError(f"request {sample.request_id}: {output.error}")
        if output.finish_reason is FinishReason.ERROR:
            raise RuntimeError(f"the engine failed on request {sample.request_id}: {output.error}")
        output = output.without_answer() if sample.params.is_prompt_only else output
        self._take(self.result.outputs[sample.index], output)
        if output.prompt_logprobs is not None:
            self.result.prompt_logprobs = [None, *map(self._logprobs, output.prompt_logprobs)]
        if output.finish_reason is not None:
            self._ended.append(output.request)
            if len(self._ended) == len(self.samples):
                self.result.metrics = RequestMetrics.of(self._ended)
                self.result.num_cached_tokens = self._ended[0].num_cached_tokens

    def _take(self, target: CompletionOutput, output: Output) -> None:
        target.token_ids.extend(output.token_ids)
        if target._text is not None:
            target._text.append(output.text)
        if target.logprobs is not None:
            assert target.cumulative_logprob is not None
            for entry in output.logprobs:
                target.logprobs.append(self._logprobs(entry))
                target.cumulative_logprob += entry.logprob
        if output.finish_reason is not None:
            target.finish_reason = output.finish_reason.value
            target.stop_reason = output.request.stop_reason if output.finish_reason is FinishReason.STOP else None

    def _logprobs(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        ranked = {token_id: (logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)}
        ranked = {entry.token_id: (entry.logprob, entry.rank), **ranked}
        tokenizer = self._tokenizer
        return {
            token_id: Logprob(logprob, rank, None if tokenizer is None else tokenizer.token_text(token_id))
            for token_id, (logprob, rank) in ranked.items()
        }


SHOWN_CHARS = 60


def shown(value: object) -> str:
    """A value as Python writes it, cut to what fits in a sentence."""
    text = repr(value[: SHOWN_CHARS + 1] if isinstance(value, str | bytes | list | tuple) else value)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}..."


def one_for_each[T](given: T | Sequence[T], kind: type[T], count: int, name: str) -> list[T]:
    """One value for all prompts, or a list with one for each.

    Raises:
        ValueError: the list has another length, or something else in it.
    """
    if isinstance(given, kind) and not isinstance(given, bool):
        return [given] * count
    each = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for value in each:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} has {shown(value)}; give {described(kind)} for all prompts, or a list of them")
    if len(each) != count:
        raise ValueError(f"{count} prompts but {len(each)} {name}; give one for all or one for each")
    return each


def described(kind: type) -> str:
    """A type for a sentence."""
    return "a whole number" if kind is int else f"a {kind.__name__}"


def truncated(token_ids: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """The last tokens of a prompt, as `truncate_prompt_tokens` asks.

    Raises:
        ValueError: it is more than the context holds.
    """
    asked = params.truncate_prompt_tokens
    if asked is None:
        return token_ids
    if asked > max_model_len:
        raise ValueError(
            f"truncate_prompt_tokens={asked} is more than the context of {max_model_len} tokens; give at most that, or "
            "-1 for what fits"
        )
    if asked < 0:
        answer = 1 if params.max_tokens is None else params.max_tokens
        if answer >= max_model_len:
            raise ValueError(no_room(answer, max_model_len))
        asked = max_model_len - answer
    return token_ids[-asked:]


def parse_prompt(prompt: Prompt, number: int, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """Text (None if token ids were given) and token ids of one prompt.

    Raises:
        ValueError: it is none, or a text and there is no tokenizer.
    """
    if isinstance(prompt, RenderedChat):
        return prompt.text, list(prompt.token_ids)
    if isinstance(prompt, Mapping):
        match {name: value for name, value in prompt.items() if value is not None}:
            case {"prompt_token_ids": token_ids, **rest} if not rest:
                return None, _token_ids(token_ids, number)
            case {"prompt_token_ids": token_ids, "prompt": str(text), **rest} if not rest:
                return text, _token_ids(token_ids, number)  # the text is only shown, as in vLLM
            case {"prompt": str(text), **rest} if not rest:
                prompt = text
            case _:
                raise ValueError(
                    f"prompt {number} has the keys {sorted(map(str, prompt))}; give either prompt or prompt_token_ids"
                )
    if not isinstance(prompt, str):
        raise ValueError(f"prompt {number} is a {type(prompt).__name__}; give a text or {{'prompt_token_ids': [...]}}")
    if not prompt:
        raise ValueError(f"prompt {number} is empty; give at least one character or token id")
    if tokenizer is None:
        raise ValueError("this model has no tokenizer; give prompts as {'prompt_token_ids': [...]} or tokenizer=")
    return prompt, tokenizer.encode(prompt)


def _token_ids(given: object, number: int) -> list[int]:
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise ValueError(f"prompt {number} has prompt_token_ids={shown(given)}; give a list of token ids")
    found = []
    for token_id in given:
        try:
            found.append(operator.index(token_id))
        except TypeError:
            raise ValueError(f"prompt {number} has the token id {shown(token_id)}; give whole numbers") from None
    return found
