"""The unfinished requests of an engine: adding, accepting tokens, ending."""

from collections.abc import Sequence

import numpy as np

from apt_jax.engine.prompt_logprobs import PromptLogprobs
from apt_jax.engine.text import OutputTexts
from apt_jax.engine.validation import RequestRules
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.sampling import Sampled
from apt_jax.logprob_rows import LogprobRows
from apt_jax.output import NO_WAY_ON, Output, QueueFull, TokenLogprobs
from apt_jax.request import FinishReason, Request, SamplingParams, Slo
from apt_jax.scheduling.state import SchedulerState
from apt_jax.tokenization.restriction import Restriction


class Requests:
    """The unfinished requests by id. `state` holds queues and blocks, `prompt_logprobs` the prompts' results."""

    def __init__(
        self,
        state: SchedulerState,
        config: EngineConfig,
        rules: RequestRules,
        texts: OutputTexts,
        prompt_logprobs: PromptLogprobs,
    ):
        self.prompt_logprobs = prompt_logprobs
        self._state = state
        self._config = config
        self._rules = rules
        self._texts = texts
        self._unfinished: dict[str, Request] = {}
        self._ended: list[Output] = []  # of requests that ended outside the normal course
        self._seeds = np.random.default_rng(config.seed)

    def __bool__(self) -> bool:
        """Whether a request is unfinished, or has ended and was not reported."""
        return bool(self._unfinished or self._ended)

    def add(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        slo: Slo | None,
        priority: int,
        arrival_s: float,
        output_token_ids: Sequence[int],
        cache_salt: str | None = None,
        user: str | None = None,
        restriction: Restriction | None = None,
    ) -> Request:
        """Queue a request; see `ServingEngine.add`."""
        config = self._config
        if request_id in self._unfinished:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        self._rules.check(prompt_token_ids, params)
        waiting = len(self._state.waiting)
        if waiting >= config.max_num_queued_reqs:
            raise QueueFull(
                f"{waiting} requests are waiting, max_num_queued_reqs={config.max_num_queued_reqs}; try again later"
            )
        if params.seed is None:
            params = params.with_seed(int(self._seeds.integers(2**63)))
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            params=params,
            arrival_s=arrival_s,
            max_new_tokens=self._rules.max_new_tokens(len(prompt_token_ids), params),
            eos_token_ids=frozenset(self._rules.model_config.eos_token_ids),
            slo=slo or config.slo,
            priority=priority,
            cache_salt=cache_salt,
            user=user,
            output_token_ids=list(output_token_ids),
        )
        if restriction is None:
            restriction = self._texts.restriction(params, self._rules.model_config.vocab_size, output_token_ids)
        request.restriction = restriction
        if request.restriction is not None and not output_token_ids:
            ends = {*request.eos_token_ids, *(params.stop_token_ids or ())} if params.min_tokens else ()
            request.restriction.check_begins(self._rules.model_config.vocab_size, ends)
        if len(output_token_ids) >= request.max_new_tokens:
            raise ValueError(f"output_token_ids has all {request.max_new_tokens} tokens that may be generated")
        self._state.add(request)
        self._unfinished[request_id] = request
        self.prompt_logprobs.add(request)
        self._texts.add(request)
        return request

    def get(self, request_id: str) -> Request | None:
        """The unfinished request with this id."""
        return self._unfinished.get(request_id)

    def push(self, request: Request, token: int) -> None:
        """Begin what `accept` is to end, for all rows of an iteration first."""
        if request.restriction is not None and request.request_id in self._unfinished:
            request.restriction.push(token)

    def accept(self, request: Request, row: int, host: Sampled, now: float, hidden: np.ndarray | None = None) -> Output:
        """Take in the token that was sampled in `row` of an iteration; it may be the request's last."""
        token = int(host.token[row])
        reason = self._state.commit(request, token, now)
        shown, stop = self._texts.push(request, token)
        if stop is not None:
            self._state.finish(request, FinishReason.STOP)
            request.stop_reason = stop
            request.finish_reason = reason = FinishReason.STOP  # also where this token was the last allowed
        error = None
        if reason is None and request.restriction is not None:
            error = request.restriction.accept(token)
            if error is not None or request.restriction.is_complete:
                reason = FinishReason.STOP if error is None else FinishReason.ERROR
                self._state.finish(request, reason)
        if reason is not None and stop is None:
            shown += self._texts.flush(request)
        prompt_logprobs = self.prompt_logprobs.pop(request)
        if reason is not None:
            self._forget(request)
        logprobs = token_logprobs(request, token, row, host)
        failure = None if error is None else no_way_on(request, error)
        return Output(request, shown, (token,), logprobs, reason, failure, prompt_logprobs, hidden)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End an unfinished request early (abort or error); `take_ended` reports it."""
        self._state.finish(request, reason)
        shown = self._texts.flush(request)
        self._forget(request)
        self._ended.append(Output(request, shown, (), (), reason, error))

    def take_ended(self) -> list[Output]:
        """The last outputs of requests that were ended, once."""
        ended, self._ended = self._ended, []
        return ended

    def _forget(self, request: Request) -> None:
        self._unfinished.pop(request.request_id, None)
        if request.restriction is not None:
            request.restriction.close()
        self._texts.forget(request.request_id)
        self.prompt_logprobs.forget(request.request_id)


def no_way_on(request: Request, reason: str) -> str:
    """The error of a request whose restrictions leave nothing that could follow."""
    return f"{NO_WAY_ON}{request.restriction.asked}: {reason}"


def token_logprobs(request: Request, token: int, row: int, host: Sampled) -> Sequence[TokenLogprobs]:
    """What a request wants of the token that was sampled in `row` of an iteration."""
    count = request.params.logprobs
    if count is None:
        return ()
    found, here = LogprobRows(), slice(row, row + 1)
    top_ids, top_logprobs = host.top_ids[here, :count], host.top_logprobs[here, :count]
    found.extend_from_arrays(np.array([token]), host.rank[here], host.logprob[here], top_ids, top_logprobs)
    return found
