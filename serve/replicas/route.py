"""Unfinished requests as the front of the replicas knows them: enough to continue each on another replica."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.engine.interface import EngineFacts
from apt_jax.output import Output
from apt_jax.request import FinishReason, Request
from apt_jax.routing.interface import RouteRequest
from apt_jax.serve.replicas.messages import Brought, Command, Submit
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.samples import Sample, record_tokens


@dataclass(eq=False)
class Progress:
    """One sample. `request` is the front's own: its times are those at which tokens came here."""

    sample: Sample
    request: Request
    num_chars: int = 0  # of text delivered
    skip_chars: int = 0  # of the next output: a replica that goes on brings the text from the beginning
    has_prompt_logprobs: bool = False

    @classmethod
    def of(cls, sample: Sample, facts: EngineFacts, seed: int, now: float) -> "Progress":
        """A new one. A sample without a seed gets `seed`, so that it can be continued on another replica."""
        params = sample.params if sample.params.seed is not None else dataclasses.replace(sample.params, seed=seed)
        slo = sample.slo or facts.config.slo
        room = max(facts.max_model_len - len(sample.prompt_token_ids), 0)
        request = Request(
            request_id=sample.request_id,
            prompt_token_ids=sample.prompt_token_ids,
            params=params,
            arrival_s=now if sample.arrival_s is None else sample.arrival_s,
            max_new_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            slo=slo,
            priority=sample.priority,
            user=sample.user,
            output_token_ids=list(sample.output_token_ids),
        )
        return cls(sample, request)

    def remainder(self) -> Sample:
        """The remaining work: the sample, with every token that came."""
        request = self.request
        return dataclasses.replace(
            self.sample, params=request.params, slo=request.slo, output_token_ids=tuple(request.output_token_ids)
        )

    def take(self, brought: Brought, now: float) -> Output:
        """A replica's output, without what was delivered before."""
        request, tokens = self.request, brought.token_ids
        text, self.skip_chars = brought.text[self.skip_chars :], 0
        self.num_chars += len(text)
        if tokens:
            if brought.queued_s is not None and request.first_scheduled_s is None:
                request.first_scheduled_s = request.arrival_s + brought.queued_s
            record_tokens(request, tokens, now)
        prompt_logprobs = None if self.has_prompt_logprobs else brought.prompt_logprobs
        self.has_prompt_logprobs |= prompt_logprobs is not None
        reason = error = None
        if (ending := brought.ending) is not None:
            reason, error = ending.finish_reason, ending.error
            request.finish_reason, request.stop_reason = reason, ending.stop_reason
            request.cache_history += [CacheKind.named(kind) for kind in ending.cache_kinds]
            request.num_preemptions += ending.num_preemptions
            request.num_conversions += ending.num_conversions
            request.num_cached_tokens = ending.num_cached_tokens
        return Output(request, text, tokens, brought.logprobs, reason, error, prompt_logprobs, brought.hidden)

    def aborted(self) -> Output:
        """The last output of a sample that is not continued."""
        self.request.finish_reason = FinishReason.ABORT
        return Output(self.request, "", (), (), FinishReason.ABORT)


class Place(Protocol):
    """Where a group is sent to: a replica. `routes` are the groups there, by ticket."""

    name: str
    routes: dict[int, "Route"]

    def send(self, command: Command) -> None:
        """Send a message, after those sent before."""


@dataclass(eq=False)
class Route:
    """A group, and where it is. `refused_by` are the replicas whose queues were full for it."""

    group: Group
    unfinished: dict[int, Progress]  # by the sample's index
    replica: Place | None = None
    ticket: int = -1
    sent_s: float = 0.0
    is_accepted: bool = False  # by any replica; its client knows
    is_confirmed: bool = False  # by the present one
    num_moves: int = 0
    refused_by: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls, group: Group, samples: Sequence[Sample], facts: EngineFacts, seeds: np.random.Generator, now: float
    ) -> "Route":
        """A new one, without a replica yet."""
        made = {s.index: Progress.of(s, facts, int(seeds.integers(2**63)), now) for s in samples}
        return cls(group, made)

    def asked(self, now: float) -> RouteRequest:
        """The request as a router sees it."""
        requests = [progress.request for progress in self.unfinished.values()]
        return RouteRequest(
            prompt_tokens=sum(len(r.prompt_token_ids) + len(r.output_token_ids) for r in requests),
            time_s=now,
            slo=requests[0].slo,
            waited_s=now - requests[0].arrival_s,
            has_started=all(request.output_token_ids for request in requests),
            token_ids=requests[0].prompt_token_ids,
            cache_salt=requests[0].cache_salt,
        )

    def submission(self, now: float) -> Submit:
        """The message to a replica. A continued request counts from its last token, not from its arrival."""
        samples, waited_s = [], []
        for progress in self.unfinished.values():
            request = progress.request
            progress.skip_chars = progress.num_chars
            samples.append(progress.remainder())
            waited_s.append(now - (request.arrival_s if request.last_token_s is None else request.last_token_s))
        return Submit(self.ticket, tuple(samples), tuple(waited_s))
