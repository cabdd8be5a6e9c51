"""A sample: one engine request among those that a client's request (or one of its prompts) is split into.

And its record, a `Request` as its client sees it: its times are those at which its tokens were ready to be sent, on the
event loop, not those at which the engine had them. So a loop that stands still counts, and a client that reads slowly
does not. Answers, metrics, logs and traces are about records; the scheduler's own times are the engine's.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apt_jax.engine.interface import ServingEngine
from apt_jax.output import Output
from apt_jax.request import Request, SamplingParams, Slo

if TYPE_CHECKING:
    from apt_jax.tokenization.restriction import Restriction


@dataclass(frozen=True)
class Sample:
    """One request to the engine: one sample (`params.n` is 1) of one prompt.

    `index` is the sample's place in the client's response; `arrival_s` is on the engine's clock, None means now.
    """

    request_id: str
    index: int
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    slo: Slo | None = None
    priority: int = 0
    arrival_s: float | None = None
    output_token_ids: Sequence[int] = ()  # generated before
    cache_salt: str | None = None
    user: str | None = None
    tokens_at_once: int = 1  # that its client gets in one piece, but for the first and the last

    def add_to(self, engine: ServingEngine, restriction: "Restriction | None" = None) -> Request:
        """Give it to the engine, with what that has made of its restrictions if they were prepared.

        Raises:
            ValueError: it is bad input.
            QueueFull: too many requests are waiting.
        """
        return engine.add(
            self.prompt_token_ids,
            self.params,
            request_id=self.request_id,
            slo=self.slo,
            priority=self.priority,
            arrival_s=self.arrival_s,
            output_token_ids=self.output_token_ids,
            cache_salt=self.cache_salt,
            user=self.user,
            restriction=restriction,
        )


def record_of(request: Request) -> Request:
    """The record of a request that was just added to an engine."""
    record = copy.copy(request)
    record.output_token_ids, record.gaps_s, record.cache_history = list(request.output_token_ids), [], []
    return record


def record_tokens(record: Request, token_ids: Sequence[int], now: float) -> None:
    """Tokens are ready to be sent, `now` on the engine's clock."""
    if record.last_token_s is None:
        record.first_token_s = now
    else:
        record.gaps_s.append(now - record.last_token_s)
    record.last_token_s = now
    record.output_token_ids.extend(token_ids)


def as_sent(record: Request, output: Output, now: float) -> Output:
    """An engine's output that is ready to be sent, with its record instead of the engine's request.

    The engine may be steps ahead: what it still changes in its request is only read once that has ended.
    """
    request, reason = output.request, output.finish_reason
    if output.token_ids:
        record.first_scheduled_s = request.first_scheduled_s
        record_tokens(record, output.token_ids, now)
    if reason is not None:
        record.status, record.finish_reason, record.stop_reason = request.status, reason, request.stop_reason
        record.cache_history, record.first_scheduled_s = request.cache_history, request.first_scheduled_s
        record.num_preemptions, record.num_conversions = request.num_preemptions, request.num_conversions
        record.num_cached_tokens = request.num_cached_tokens
    return output.of(record)


def has_broken_slo(record: Request, now: float) -> bool:
    """Whether a limit is broken that a client which leaves `now` need not have waited for."""
    slo, ttft_s = record.slo, record.ttft_s
    if ttft_s is None or record.last_token_s is None:
        return now - record.arrival_s > slo.ttft_s
    return now - record.last_token_s > slo.stall_limit_s or not slo.is_kept_strictly(ttft_s, record.gaps_s)


def fan_out(
    request_id: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    slo: Slo | None = None,
    priority: int = 0,
    arrival_s: float | None = None,
    cache_salt: str | None = None,
    user: str | None = None,
) -> list[Sample]:
    """One sample per prompt and per `params.n`, prompt by prompt. Pure.

    Ids are `request_id`, then `-PROMPT` when there are several prompts, then `-SAMPLE` when n > 1. Sample i of every
    prompt gets the seed `sample_seed(params.seed, i)`.
    """
    samples = []
    seeds = [sample_seed(params.seed, i) for i in range(params.n)]
    params_of = {seed: params.with_seed(seed) for seed in seeds}
    for prompt_index, prompt in enumerate(prompts):
        prompt_id = request_id if len(prompts) == 1 else f"{request_id}-{prompt_index}"
        for i in range(params.n):
            samples.append(
                Sample(
                    request_id=prompt_id if params.n == 1 else f"{prompt_id}-{i}",
                    index=prompt_index * params.n + i,
                    prompt_token_ids=prompt,
                    params=params_of[seeds[i]],
                    slo=slo,
                    priority=priority,
                    arrival_s=arrival_s,
                    cache_salt=cache_salt,
                    user=user,
                )
            )
    return samples


def sample_seed(seed: int | None, sample: int) -> int | None:
    """The seed of sample number `sample`: sample 0 keeps `seed`, others get 64 bits of a hash of both; None stays."""
    if seed is None or sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
