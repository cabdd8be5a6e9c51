"""A sample: one engine request among those that a client's request (or one of its prompts) is split into."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from apt_jax.engine.interface import ServingEngine
from apt_jax.request import Request, SamplingParams, Slo


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

    def add_to(self, engine: ServingEngine) -> Request:
        """Give it to the engine.

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
        )


def fan_out(
    request_id: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    slo: Slo | None = None,
    priority: int = 0,
    arrival_s: float | None = None,
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
                )
            )
    return samples


def sample_seed(seed: int | None, sample: int) -> int | None:
    """The seed of sample number `sample`: sample 0 keeps `seed`, others get 64 bits of a hash of both; None stays."""
    if seed is None or sample == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)
