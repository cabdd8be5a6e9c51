"""What Python gets back, in vLLM's shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from apt_jax.request import Request


@dataclass(frozen=True)
class Logprob:
    """Log-probability of a token at one position; `rank` 1 is the most likely, None is unknown."""

    logprob: float
    rank: int | None
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One sample of one prompt.

    Attributes:
        index: its number among the prompt's samples.
        token_ids: the tokens generated.
        cumulative_logprob: sum over the tokens; None unless logprobs were asked for.
        logprobs: per token, id -> `Logprob` of the chosen and the most likely; None unless asked for.
        finish_reason: stop, length, abort or error.
        stop_reason: the stop string or token id that ended it; None for the end-of-sequence token.
    """

    index: int
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    _text: list[str] | None = None

    @property
    def text(self) -> str:
        """The text generated.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self._text is None:
            raise ValueError("there is no text: the model's folder has no tokenizer; use token_ids or give tokenizer=")
        return "".join(self._text)


@dataclass
class RequestOutput:
    """Outputs of one prompt; `prompt` is None if it was given as token ids.

    `prompt_logprobs` has per prompt token id -> `Logprob` of the token itself and the most likely, None for the first
    token; it is None unless asked for. `metrics` are of the whole request once it has ended, `num_cached_tokens` the
    tokens of its prompt that came from the prefix cache (None without one).
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: "RequestMetrics | None" = None
    num_cached_tokens: int | None = None

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, in seconds of `time.monotonic`; of several samples, the first and the last.

    Attributes:
        arrival_time: it was given to the engine.
        first_scheduled_time: the engine began to work on it.
        first_token_time: its first token.
        finished_time: its last token.
        num_preemptions: how often its blocks were taken away.
    """

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None
    num_preemptions: int

    @classmethod
    def of(cls, requests: Sequence[Request]) -> "RequestMetrics":
        """Those of the samples of one prompt."""

        def first(times: list[float | None]) -> float | None:
            return min((time for time in times if time is not None), default=None)

        return cls(
            arrival_time=min(request.arrival_s for request in requests),
            first_scheduled_time=first([request.first_scheduled_s for request in requests]),
            first_token_time=first([request.first_token_s for request in requests]),
            finished_time=max((r.last_token_s for r in requests if r.last_token_s is not None), default=None),
            num_preemptions=sum(request.num_preemptions for request in requests),
        )

    @property
    def time_in_queue(self) -> float | None:
        """Seconds from arrival to being scheduled."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def ttft(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(frozen=True)
class PoolingOutput:
    """The vector of one prompt, float32 `[E]`: the model's last hidden state after its last token, of length 1."""

    data: np.ndarray

    @property
    def embedding(self) -> list[float]:
        """As numbers."""
        found: list[float] = self.data.tolist()
        return found


@dataclass(frozen=True)
class PoolingRequestOutput:
    """The vector of one prompt, and the prompt."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: PoolingOutput
    finished: bool = True


@dataclass(frozen=True)
class ScoringOutput:
    """How alike two texts are: the cosine of the angle between their vectors, -1 to 1."""

    score: float


@dataclass(frozen=True)
class ScoringRequestOutput:
    """Of one pair of texts."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: ScoringOutput
    finished: bool = True
