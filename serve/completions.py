"""From a completion body to engine samples, and from engine outputs to OpenAI's completion objects.

HTTP, streamed or not, and batch jobs go through the same two steps: `Completion.prepare`, then `chunk` per output or
`collect` for all.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from apt_jax.output import Output, TokenLogprobs
from apt_jax.request import FinishReason, Slo
from serve.errors import BadRequest, EngineFailure, ModelNotFound
from serve.protocol import CompletionRequest, bad_request, slo_of
from serve.samples import Sample, fan_out

if TYPE_CHECKING:
    from apt_jax.engine import Engine
    from apt_jax.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no minus infinity


@dataclass
class Choice:
    """What one sample has brought so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_chars: int = 0  # of the tokens' texts, for text_offset
    started: bool = False


class Completion:
    """One completion request on its way: its samples for the engine, and its response as outputs come in."""

    def __init__(
        self,
        body: CompletionRequest,
        request_id: str,
        model_name: str,
        tokenizer: "Tokenizer | None",
        prompt_token_ids: Sequence[Sequence[int]],
        samples: list[Sample],
    ):
        self.body = body
        self.request_id = request_id
        self.model_name = model_name
        self.created = int(time.time())
        self.prompt_token_ids = prompt_token_ids
        self.samples = samples
        self.choices = [Choice() for _ in samples]
        self._num_unfinished = len(samples)
        self._tokenizer = tokenizer

    @classmethod
    def prepare(
        cls,
        body: CompletionRequest,
        engine: "Engine",
        *,
        request_id: str,
        model_name: str,
        headers: Mapping[str, str] | None = None,
        arrival_s: float | None = None,
        max_samples: int | None = None,
    ) -> "Completion":
        """Check a body against the model that is served and fan it out into samples. Tokenises; touches no state.

        `headers` (names in lower case) may carry the SLO. Lengths and token ids are the engine's to check.

        Raises:
            ModelNotFound: the body names another model.
            BadRequest: text without a tokenizer, a bad sampling field or SLO, more than `max_samples` samples.
        """
        if body.model not in (None, model_name):
            raise ModelNotFound(f"the model {body.model!r} is not served here; use {model_name!r}", "model")
        params = body.sampling_params()
        if max_samples is not None and len(body.prompt) * params.n > max_samples:
            raise BadRequest(
                f"{len(body.prompt)} prompts x n={params.n} is more than the queue holds ({max_samples}); "
                "send fewer at once or raise --max-num-queued-reqs",
                "prompt",
            )
        tokenizer = engine.tokenizer
        if params.stop and tokenizer is None:
            raise BadRequest("stop needs a tokenizer and this model has none; use stop_token_ids", "stop")
        default = Slo(engine.config.ttft_slo_ms / 1000, engine.config.tbt_slo_ms / 1000)
        prompts = [_token_ids(item, tokenizer) for item in body.prompt]
        samples = fan_out(
            request_id,
            prompts,
            params,
            slo=slo_of(body.slo, headers or {}, default),
            priority=body.priority or 0,
            arrival_s=arrival_s,
        )
        return cls(body, request_id, model_name, tokenizer, prompts, samples)

    @property
    def is_finished(self) -> bool:
        """Whether every sample has ended."""
        return self._num_unfinished == 0

    def usage(self) -> dict[str, int]:
        """OpenAI's `usage`: each prompt counts once, every sample's tokens count."""
        prompt_tokens = sum(len(ids) for ids in self.prompt_token_ids)
        completion_tokens = sum(len(choice.token_ids) for choice in self.choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def chunk(self, sample: Sample, output: Output) -> dict[str, Any]:
        """Take in an output and render it as one streamed completion object.

        Raises:
            EngineFailure: the engine ended the sample with an error.
        """
        choice = self.choices[sample.index]
        text, first = output.text, not choice.started
        if first and self.body.echo:
            text = self._prompt_text(sample) + text
        self._add(choice, output)
        chunk = self._object([self._choice(sample, text, output.token_ids, output.logprobs, output.finish_reason)])
        if first and self.body.return_token_ids:
            chunk["choices"][0]["prompt_token_ids"] = list(sample.prompt_token_ids)
        if self.wants_usage:
            chunk["usage"] = None
        return chunk

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk that reports usage at the end of a stream."""
        return {**self._object([]), "usage": self.usage()}

    def collect(self, sample: Sample, output: Output) -> None:
        """Take in an output for `response`.

        Raises:
            EngineFailure: the engine ended the sample with an error.
        """
        choice = self.choices[sample.index]
        self._add(choice, output)
        choice.text.append(output.text)
        choice.logprobs.extend(output.logprobs)

    def response(self) -> dict[str, Any]:
        """The whole completion object, once every sample has ended."""
        choices = []
        for sample, choice in zip(self.samples, self.choices, strict=True):
            text = "".join(choice.text)
            if self.body.echo:
                text = self._prompt_text(sample) + text
            choice.num_chars = 0
            entry = self._choice(sample, text, choice.token_ids, choice.logprobs, choice.finish_reason)
            if self.body.return_token_ids:
                entry["prompt_token_ids"] = list(sample.prompt_token_ids)
            choices.append(entry)
        return {**self._object(choices), "usage": self.usage()}

    def _add(self, choice: Choice, output: Output) -> None:
        if output.finish_reason is FinishReason.ERROR:
            raise EngineFailure(f"the engine failed on this request: {_first_line(output.error)}")
        choice.started = True
        choice.token_ids.extend(output.token_ids)
        choice.finish_reason = output.finish_reason
        self._num_unfinished -= output.finish_reason is not None

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model_name,
            "choices": choices,
        }

    def _choice(
        self,
        sample: Sample,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        finish_reason: FinishReason | None,
    ) -> dict[str, Any]:
        wanted = sample.params.logprobs is not None
        choice = {
            "index": sample.index,
            "text": text,
            "logprobs": self._logprobs(self.choices[sample.index], logprobs) if wanted else None,
            "finish_reason": None if finish_reason is None else finish_reason.value,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(token_ids)
        return choice

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """OpenAI's four parallel lists; the chosen token is always in `top_logprobs`."""
        tokens, offsets, tops = [], [], []
        for entry in entries:
            tokens.append(self._token_text(entry.token_id))
            offsets.append(choice.num_chars)
            choice.num_chars += len(tokens[-1])
            top = {self._token_text(token_id): _finite(logprob) for token_id, logprob in entry.top}
            tops.append({tokens[-1]: _finite(entry.logprob), **top})
        return {
            "tokens": tokens,
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _token_text(self, token_id: int) -> str:
        """The token's text; as OpenAI writes it where it is only part of a character."""
        data = b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        if not data:
            return f"token_id:{token_id}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _prompt_text(self, sample: Sample) -> str:
        samples_per_prompt = len(self.samples) // len(self.body.prompt)
        item = self.body.prompt[sample.index // samples_per_prompt]
        if isinstance(item, str):
            return item
        return "" if self._tokenizer is None else self._tokenizer.decode(list(item), skip_special_tokens=False)


def as_bad_request(error: ValueError, body: CompletionRequest) -> BadRequest:
    """What the engine refused, as the client's error."""
    if isinstance(error, BadRequest):
        return error
    return bad_request(error, type(body).model_fields)


def _token_ids(item: str | tuple[int, ...], tokenizer: "Tokenizer | None") -> Sequence[int]:
    if not isinstance(item, str):
        return item
    if tokenizer is None:
        raise BadRequest("this model has no tokenizer; give the prompt as token ids", "prompt")
    return tokenizer.encode(item)


def _first_line(error: str | None) -> str:
    """An engine's message without a compiler's details."""
    return (error or "unknown").partition("\n")[0][:200]


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOWEST_LOGPROB
