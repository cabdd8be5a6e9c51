"""From a body to engine samples, and from engine outputs to OpenAI's objects, for both kinds of completion.

HTTP, streamed or not, and batch jobs go through the same two steps: `Generation.prepare`, then `chunk` per output or
`collect` for all. How the objects look is up to `Completion` and `ChatCompletion`.
"""

import dataclasses
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic_core import to_json

from apt_jax.engine.interface import EngineFacts
from apt_jax.logprob_rows import LogprobRows
from apt_jax.output import ContextExceeded, Output, TokenLogprobs
from apt_jax.request import FinishReason, Request, Slo
from apt_jax.serve.errors import BadRequest, ContextTooLong, EngineFailure, error_reply
from apt_jax.serve.json_text import finite, json_pieces
from apt_jax.serve.openai.bodies.requests import GenerationRequest, PromptRequest, bad_request
from apt_jax.serve.openai.bodies.slo import slo_of
from apt_jax.serve.openai.bodies.strict import check_grammar
from apt_jax.serve.openai.prompts import check_fits_queue, check_model, check_room
from apt_jax.serve.openai.replies import PromptTokenLogprob, prompt_tokens_details
from apt_jax.serve.openai.slo_report import is_unanswered, slo_abandoned, slo_report
from apt_jax.serve.openai.sse import event
from apt_jax.serve.runtime.samples import Sample, fan_out
from apt_jax.tokenization.token_texts import ByteTokenTexts, TokenTexts

if TYPE_CHECKING:
    from apt_jax.tokenization.tokenizer import Tokenizer

VALUES_AT_ONCE = 2048
VALUES_OF_CHOICE = 24  # beside its tokens: the SLO report above all


@dataclass(frozen=True)
class ServedModel:
    """The served model, which bodies are checked against."""

    engine: EngineFacts
    name: str
    chat_template: str | None = None  # overrides the tokenizer's own
    other_names: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All that it may be called by."""
        return (self.name, *self.other_names)


@dataclass
class Choice:
    """Output of one sample so far."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: LogprobRows = field(default_factory=LogprobRows)
    prompt_logprobs: Sequence[TokenLogprobs] | None = None  # of its prompt but for the first token, once known
    finish_reason: FinishReason | None = None
    token_texts: TokenTexts | None = None  # of the tokens rendered so far, if log-probabilities are wanted
    started: bool = False
    request: Request | None = None  # the engine's, once it has ended
    frame: tuple[bytes, bytes] | None = None  # what a streamed token's text goes between


class Generation[Body: GenerationRequest]:
    """One unfinished API request: its samples for the engine, and its response as outputs come in."""

    ID_PREFIX: ClassVar[str]
    END: ClassVar[bytes] = b"data: [DONE]\n\n"  # of a stream

    def __init__(
        self,
        body: Body,
        request_id: str,
        model_name: str,
        tokenizer: "Tokenizer | None",
        prompt_token_ids: Sequence[Sequence[int]],
        samples: list[Sample],
        created: int | None = None,
    ):
        self.body = body
        self.request_id = request_id
        self.model_name = model_name
        self.created = int(time.time()) if created is None else created
        self.prompt_token_ids = prompt_token_ids
        self.samples = samples
        self.choices = [Choice() for _ in samples]
        self.num_unfinished = len(samples)
        self.reports_slo = True
        self._tokenizer = tokenizer
        self._num_prompt_tokens: int | None = None
        self._num_completion_tokens: int | None = None

    @classmethod
    def prepare(
        cls,
        body: Body,
        model: ServedModel,
        *,
        request_id: str,
        headers: Mapping[str, str] | None = None,
        arrival_s: float | None = None,
        max_samples: int | None = None,
        otherwise_slo: Slo | None = None,
    ) -> Self:
        """Check a body against the model that is served and fan it out into samples. Tokenises; touches no state.

        `headers` (names in lower case) may carry the SLO, which otherwise is `otherwise_slo`, of which the response
        says nothing then, or the engine's. Token ids are the engine's to check.

        Raises:
            ModelNotFound: the body names another model.
            BadRequest: text without a tokenizer, a bad sampling field or SLO, more than `max_samples` samples, or
                more tokens than the context holds.
        """
        check_model(body.model, model.names)
        engine = model.engine
        params = body.sampling_params(engine.sampling_defaults)
        if max_samples is not None:
            many = f"{body.num_prompts} prompts x n={params.n} is"
            check_fits_queue(body.num_prompts * params.n, many, max_samples, "prompt")
        if params.stop and engine.tokenizer is None:
            raise BadRequest("stop needs a tokenizer and this model has none; use stop_token_ids", "stop")
        if params.structured_outputs is not None:
            check_grammar(params.structured_outputs, engine.tokenizer)
        prompts = cls._prompts(body, model)
        if body.asked_max_tokens is not None:
            check_room(max(map(len, prompts)), body.asked_max_tokens, engine.max_model_len)
        slo = slo_of(body.slo, headers or {}, otherwise_slo or engine.config.slo)
        samples = fan_out(
            request_id, prompts, params,
            slo=slo, priority=body.priority or 0, arrival_s=arrival_s, cache_salt=body.cache_salt,
            user=body.user,
        )  # fmt: skip
        made = cls(body, request_id, model.name, engine.tokenizer, prompts, samples)
        made.reports_slo = slo != otherwise_slo
        return made

    @classmethod
    def _prompts(cls, body: Body, model: ServedModel) -> list[Sequence[int]]:
        """Token ids of each prompt of a body."""
        raise NotImplementedError

    @property
    def is_finished(self) -> bool:
        """Whether every sample has ended."""
        return self.num_unfinished == 0

    @property
    def is_whole(self) -> bool:
        """Whether every sample has ended without an abort."""
        return all(choice.finish_reason not in (None, FinishReason.ABORT) for choice in self.choices)

    @property
    def num_values(self) -> int:
        """About how many numbers and texts the response has: how long it takes to write."""
        params = self.samples[0].params
        framed = len(self.samples) * VALUES_OF_CHOICE
        written = sum(len(choice.token_ids) for choice in self.choices) * (2 + 2 * (params.logprobs or 0))
        read = sum(len(sample.prompt_token_ids) for sample in self.samples) * (1 + 2 * (params.prompt_logprobs or 0))
        return framed + written + read

    @property
    def outputs_at_once(self) -> int:
        """Streamed outputs that are written in a few milliseconds, a first one with its whole prompt."""
        params = self.samples[0].params
        with_prompt = self.body.return_token_ids or getattr(self.body, "echo", False)
        prompt = max(map(len, self.prompt_token_ids)) if with_prompt else 0
        return max(VALUES_AT_ONCE // (16 + 2 * (params.logprobs or 0) + prompt // 4), 1)

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`: each prompt counts once, every sample's tokens count."""
        if self._num_prompt_tokens is None or self._num_completion_tokens is None:  # with those of an earlier run
            self._num_prompt_tokens = sum(len(ids) for ids in self.prompt_token_ids)
            self._num_completion_tokens = sum(len(choice.token_ids) for choice in self.choices)
        first = self.choices[:: len(self.choices) // len(self.prompt_token_ids)]  # sample of each prompt
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
            **prompt_tokens_details(choice.request for choice in first),
        }

    def chunk(self, sample: Sample, output: Output) -> dict[str, Any]:
        """Take in an output and render it as one streamed object.

        Raises:
            EngineFailure: the engine ended the sample with an error.
            SloAbandoned: it was the last one, and all were abandoned before they had a token.
        """
        choice = self.choices[sample.index]
        first, output = not choice.started, self._wanted(output)
        self._add(choice, output)
        entry = self._delta(sample, output, first)
        if self.body.return_token_ids:
            entry["token_ids"] = list(output.token_ids)
            if first:
                entry["prompt_token_ids"] = list(sample.prompt_token_ids)
        chunk = self._object([entry], stream=True)
        if self.wants_usage:
            chunk["usage"] = self.usage() if self._wants_running_usage else None
        if output.finish_reason is not None and self.reports_slo:
            chunk["slo"] = slo_report([output.request])
        return chunk

    def streamed(self, sample: Sample, output: Output) -> bytes:
        """Take in an output and render it as one server-sent event. Most differ from the previous one only in text.

        Raises:
            EngineFailure: the engine ended the sample with an error.
            SloAbandoned: it was the last one, and all were abandoned before they had a token.
        """
        choice = self.choices[sample.index]
        varies = sample.params.logprobs is not None or self.body.return_token_ids or self._wants_running_usage
        if varies or output.finish_reason is not None or not choice.started:
            return event(self.chunk(sample, output))
        if choice.frame is None:
            choice.frame = self._frame(sample, output)
        self._add(choice, output)
        return choice.frame[0] + to_json(output.text) + choice.frame[1]

    def _frame(self, sample: Sample, output: Output) -> tuple[bytes, bytes]:
        """An event without its text: what comes before and after it."""
        mark = uuid.uuid4().hex
        delta = self._delta(sample, dataclasses.replace(output, text=mark), first=False)
        usage = {"usage": None} if self.wants_usage else {}
        head, _, tail = event({**self._object([delta], stream=True), **usage}).partition(to_json(mark))
        return head, tail

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    @property
    def _wants_running_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.continuous_usage_stats)

    def opening(self) -> bytes:
        """What a stream begins with."""
        return b""

    def closing(self) -> bytes:
        """What a stream ends with: usage, if it is wanted."""
        return event(self.usage_chunk()) if self.wants_usage else b""

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk that reports usage at the end of a stream."""
        return {**self._object([], stream=True), "usage": self.usage()}

    def failing(self, error: Exception) -> bytes:
        """What a stream that fails ends with; OpenAI's clients know an error event."""
        return event(error_reply(error)[1])

    def collect(self, sample: Sample, output: Output) -> None:
        """Take in an output for `response`.

        Raises:
            EngineFailure: the engine ended the sample with an error.
            SloAbandoned: it was the last one, and all were abandoned before they had a token.
        """
        self._add(self.choices[sample.index], self._wanted(output))

    def response(self) -> dict[str, Any]:
        """The whole object, once every sample has ended."""
        return self._response(list(self._entries()))

    def response_pieces(self) -> Iterator[bytes]:
        """`response` as JSON, made and written piece by piece."""
        yield from json_pieces(self._response(self._entries()))

    def _response(self, choices: Iterable[dict[str, Any]]) -> dict[str, Any]:
        requests = [choice.request for choice in self.choices if choice.request is not None]
        is_known = self.reports_slo and len(requests) == len(self.samples)  # not when it was resumed
        report = {"slo": slo_report(requests)} if is_known else {}
        return {**self._object(choices), "usage": self.usage(), **report}

    def _entries(self) -> Iterator[dict[str, Any]]:
        """The choices of the whole object."""
        for sample, choice in zip(self.samples, self.choices, strict=True):
            choice.token_texts = None
            entry = self._whole(sample, choice)
            if self.body.return_token_ids:
                entry["token_ids"] = list(choice.token_ids)
                entry["prompt_token_ids"] = list(sample.prompt_token_ids)
            if choice.request is not None and len(self.samples) > 1 and self.reports_slo:
                entry["slo"] = slo_report([choice.request])
            yield entry

    def _wanted(self, output: Output) -> Output:
        """What the client is to see of an output."""
        return output

    def _delta(self, sample: Sample, output: Output, first: bool) -> dict[str, Any]:
        """The choice in which a stream brings an output; `first` is the sample's first one."""
        raise NotImplementedError

    def _whole(self, sample: Sample, choice: Choice) -> dict[str, Any]:
        """A choice of the whole object."""
        raise NotImplementedError

    def _object(self, choices: Iterable[dict[str, Any]], stream: bool = False) -> dict[str, Any]:
        raise NotImplementedError

    def _add(self, choice: Choice, output: Output) -> None:
        if (error := failed(output)) is not None:
            raise error
        choice.started = True
        if output.finish_reason is not None:
            choice.request = output.request
        choice.text.append(output.text)
        choice.token_ids.extend(output.token_ids)
        if self._num_completion_tokens is not None:
            self._num_completion_tokens += len(output.token_ids)
        choice.logprobs.extend(output.logprobs)
        if output.prompt_logprobs is not None:
            choice.prompt_logprobs = output.prompt_logprobs
        choice.finish_reason = output.finish_reason
        self.num_unfinished -= output.finish_reason is not None
        if self.is_finished and is_unanswered(output) and not any(choice.token_ids for choice in self.choices):
            raise slo_abandoned(output.request)

    def _prompt_logprobs(self, choice: Choice) -> list[dict[str, PromptTokenLogprob] | None] | None:
        """vLLM's list, an object per prompt token; the first token has none. None where they are not known."""
        count = self.body.prompt_logprobs
        if choice.prompt_logprobs is None or count is None:
            return None
        return [None, *(self._likely(entry, count) for entry in choice.prompt_logprobs)]

    def _likely(self, entry: TokenLogprobs, count: int) -> dict[str, PromptTokenLogprob]:
        """The token itself and the `count` most likely ones, by id."""
        ranked = {entry.token_id: (entry.logprob, entry.rank)}
        for rank, (token_id, logprob) in enumerate(entry.top[:count], start=1):
            ranked.setdefault(token_id, (logprob, rank))
        return {
            str(token_id): {
                "logprob": finite(logprob),
                "rank": rank,
                "decoded_token": None if self._tokenizer is None else self._tokenizer.token_text(token_id),
            }
            for token_id, (logprob, rank) in ranked.items()
        }

    def texts(self, sample: Sample, offset: int = 0) -> TokenTexts:
        """The sample's tokens as parts of its text, which begins after `offset` characters."""
        choice = self.choices[sample.index]
        if choice.token_texts is None:
            if self._tokenizer is None:
                choice.token_texts = ByteTokenTexts(self.token_bytes)
            else:
                skip = sample.params.skip_special_tokens
                choice.token_texts = self._tokenizer.token_texts(skip, sample.prompt_token_ids, offset)
        return choice.token_texts

    def name_of(self, token_id: int, shown: str) -> str:
        """How log-probabilities name a token: as it is shown, or by its id where the body asks for that."""
        return f"token_id:{token_id}" if self.body.return_tokens_as_token_ids else shown

    def token_bytes(self, token_id: int) -> bytes:
        """Those of a token's text."""
        return b"" if self._tokenizer is None else self._tokenizer.token_bytes(token_id)


def failed(output: Output) -> EngineFailure | BadRequest | None:
    """The error with which the engine ended a request; the client's if it asked for what nothing can meet."""
    if output.finish_reason is not FinishReason.ERROR:
        return None
    if output.is_contradictory:
        return BadRequest(output.error or "", "structured_outputs")
    return EngineFailure(f"the engine failed on this request: {_first_line(output.error)}")


def as_bad_request(error: ValueError, body: PromptRequest) -> BadRequest:
    """The engine's refusal as the client's error."""
    if isinstance(error, BadRequest):
        return error
    prompt = next(name for name in ("prompt", "messages", "input", "text_2") if name in type(body).model_fields)
    if isinstance(error, ContextExceeded):
        return ContextTooLong(error, prompt)
    refused = bad_request(error, [*type(body).model_fields, "prompt"])
    if refused.param != "prompt":
        return refused
    return BadRequest(str(error).replace("the prompt", "the input") if prompt == "input" else str(error), prompt)


def _first_line(error: str | None) -> str:
    """An engine's message without a compiler's details."""
    return (error or "unknown").partition("\n")[0][:200]
