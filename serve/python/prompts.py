"""Prompts from Python: to samples for the engine, and from its outputs to results."""

from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import FinishReason, Request, SamplingParams, Slo
from apt_jax.serve.python.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from apt_jax.serve.runtime.samples import Sample, fan_out
from apt_jax.tokenization.tokenizer import Tokenizer

Prompt = str | Mapping[str, Any]


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
        tokenizer: Tokenizer | None,
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
        cache_salt = None
        if isinstance(prompt, Mapping):
            cache_salt = prompt.get("cache_salt")
            prompt = {name: value for name, value in prompt.items() if name != "cache_salt"}
            if cache_salt is not None and not isinstance(cache_salt, str):
                raise ValueError(f"prompt {number} has cache_salt={cache_salt!r}; give a text")
        text, token_ids = parse_prompt(prompt, number, tokenizer)
        if params.stop and tokenizer is None:
            raise ValueError("stop needs a tokenizer and this model has none; use stop_token_ids or give tokenizer=")
        if params.structured_outputs is not None and tokenizer is not None:
            tokenizer.grammars.check(params.structured_outputs)
        samples = fan_out(request_id, [token_ids], params, priority=priority, slo=slo, cache_salt=cache_salt)
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


def one_for_each[T](given: T | Sequence[T], kind: type[T], count: int, name: str) -> list[T]:
    """One value for all prompts, or a list with one for each.

    Raises:
        ValueError: the list has another length.
    """
    each = [given] * count if isinstance(given, kind) else list(cast(Sequence[T], given))
    if len(each) != count:
        raise ValueError(f"{count} prompts but {len(each)} {name}; give one for all or one for each")
    return each


def parse_prompt(prompt: Prompt, number: int, tokenizer: Tokenizer | None) -> tuple[str | None, list[int]]:
    """Text (None if token ids were given) and token ids of one prompt.

    Raises:
        ValueError: it is none, or a text and there is no tokenizer.
    """
    if isinstance(prompt, Mapping):
        match {name: value for name, value in prompt.items() if value is not None}:
            case {"prompt_token_ids": token_ids, **rest} if rest.keys() <= {"prompt"}:
                return rest.get("prompt"), [int(token_id) for token_id in token_ids]
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
