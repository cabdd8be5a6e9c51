"""The engine: schedule -> build -> run -> commit, once per `step`. Synchronous and single-threaded.

With asynchronous scheduling one iteration stays in flight: while the device runs it, the host commits the one
before (tokens, text, stop strings) and plans the next, whose newest tokens are still on the device only.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from apt_jax.batching.allowed_tokens import allowed_tokens
from apt_jax.batching.arrays import Batch
from apt_jax.engine.calibration import calibrate
from apt_jax.engine.compilations import Compilations
from apt_jax.engine.interface import EngineFigures
from apt_jax.engine.prompt_logprobs import PromptLogprobs
from apt_jax.engine.requests import Requests, no_way_on
from apt_jax.engine.setup import EngineSetup
from apt_jax.engine.step_times import StepTimes
from apt_jax.engine.text import OutputTexts
from apt_jax.engine.trials import Trials
from apt_jax.engine.validation import RequestRules
from apt_jax.execution.cache.page_moves import PageMoves
from apt_jax.execution.cache.saved_pages import BlockStore, SavedPages
from apt_jax.execution.interface import StepResults
from apt_jax.execution.sampling import Sampled
from apt_jax.output import DeviceLost, Output, PolicyFailed
from apt_jax.request import FinishReason, Request, SamplingParams, Slo, Status
from apt_jax.routing.instance import InstanceLoad, instance_load
from apt_jax.scheduling.costs.projection import least_projected_tokens
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.idling import Idling
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext, uses_prompt_states
from apt_jax.scheduling.state import Span, Written
from apt_jax.tokenization.restriction import Restriction
from apt_jax.tokenization.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

NOT_FINITE = "the model's logits are not finite (NaN or infinity)"


@dataclass(frozen=True)
class _Flight:
    """An iteration on the device."""

    batch: Batch
    results: StepResults
    load: StepLoad | None  # what it works through, if its time will be learned
    started_s: float | None  # None if it followed an iteration without a pause
    candidates: int  # unfinished requests when it was planned
    written: Sequence[Written]  # for the prefix cache


@dataclass
class _Counts:
    """What `figures` reports in addition to the state: counts since the start, and values of the last step."""

    schedule_s: float = 0.0
    padded_tokens: int = 0
    num_failed_steps: int = 0
    compile_s: float = 0.0
    outside_before: int = 0  # `StepRunner.num_outside` after `warm_up`


class Engine:
    """Serves one model from one device, or from several that it is split over; see `ServingEngine`.

    Args:
        setup: its parts, which it owns from now on.
        tokenizer: None serves token ids only.
        sampling_defaults: see `ServingEngine`; kept for those that make requests.
        fingerprint: of the weights; empty if it is not known.
        clock: seconds; replaced in tests.
    """

    def __init__(
        self,
        setup: EngineSetup,
        tokenizer: Tokenizer | None = None,
        *,
        sampling_defaults: Mapping[str, float] | None = None,
        fingerprint: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        assert setup.config.max_model_len is not None
        self.setup = setup
        self.config, self.model_config = setup.config, setup.model_config
        self.tokenizer, self.fingerprint = tokenizer, fingerprint
        self.sampling_defaults, self.max_model_len = dict(sampling_defaults or {}), setup.config.max_model_len
        self.runner, self.builder, self.state = setup.runner, setup.builder, setup.state
        self.policy_context = PolicyContext(seed=self.config.seed, abandon_after_s=self.config.abandon_after)
        self.policy = make_policy(self.config.scheduling_policy, self.policy_context)
        learns = self.config.calibrate and getattr(self.policy, "uses_cost_model", False)
        self.times, self._pages = StepTimes(setup.cost_model, learns), PageMoves(self.state, self.runner)
        rules = RequestRules(self.model_config, self.max_model_len, tokenizer is not None, self.state)
        self.prompt_logprobs = PromptLogprobs(setup.builder.buckets.score_rows)
        self.requests = Requests(self.state, self.config, rules, OutputTexts(tokenizer), self.prompt_logprobs)
        self.state.least_projected_tokens = least_projected_tokens(setup.cost_model)
        self._counts, self._clock = _Counts(), clock
        self.last_plan, self._depth = Plan(), 1 if self.config.async_scheduling else 0
        self._inflight: deque[_Flight] = deque()
        self._early: list[Output] = []  # committed by the step under way, before it planned
        self._was_idle = True  # after the last step
        self._idling, self._compilations = Idling(), Compilations()

    @property
    def max_num_seqs(self) -> int:
        """Maximum number of requests in one iteration."""
        return self.state.limits.max_num_seqs

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self.requests or self._inflight or self._early)

    @property
    def num_waiting(self) -> int:
        """Requests without blocks."""
        return len(self.state.waiting)

    @property
    def num_running(self) -> int:
        """Requests with blocks."""
        return len(self.state.running)

    @property
    def idle_s(self) -> float:
        """Seconds until `step` has anything to do again; 0 if it has."""
        return self._idling.left_s(self._clock()) if self.state.num_unfinished else 0.0

    @property
    def spare_s(self) -> float:
        """See `ServingEngine`."""
        return self._inflight[-1].results.spare_s if self._inflight else 0.0

    @property
    def longest_step_s(self) -> float:
        """Predicted seconds of the largest iteration that its limits allow."""
        return self.times.longest_s(self.state, self.max_model_len)

    @property
    def saved_pages(self) -> SavedPages | None:
        """See `ServingEngine`."""
        has_pages = self.state.prefixes is not None and isinstance(self.runner, BlockStore)
        return SavedPages(self.state, self.runner, self.fingerprint) if has_pages else None  # type: ignore[arg-type]

    @property
    def trials(self) -> Trials:
        """Synthetic iterations on this engine, while it is idle."""
        return Trials(self.state, self.builder, self.runner, self.max_model_len)

    def warm_up(self, progress: bool = False) -> None:
        """Compile every shape, run a step of each kind, and measure the device if the policy uses that.

        Afterwards nothing compiles.
        """
        started = time.perf_counter()
        self.runner.compile_all(progress)
        self._counts.compile_s = time.perf_counter() - started
        logger.info("compiled %d programs in %.1f s", self.runner.num_programs, self._counts.compile_s)
        self.trials.rehearse()
        if self.times.learns:
            self.times.calibration = calibrate(self.trials, self.setup.cost_model, self.setup.calibration_file)
            self._use_cost_model()
        self._compilations.reset()
        self._counts.outside_before = self.runner.num_outside

    def renew_policy(self) -> None:
        """Continue with a fresh policy, which knows the device's times and nothing else. The engine must be idle."""
        self.policy_context = PolicyContext(
            self.times.fitted_model, seed=self.config.seed, abandon_after_s=self.config.abandon_after
        )
        self.policy = make_policy(self.config.scheduling_policy, self.policy_context)

    def add(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        slo: Slo | None = None,
        priority: int = 0,
        arrival_s: float | None = None,
        output_token_ids: Sequence[int] = (),
        cache_salt: str | None = None,
        user: str | None = None,
        restriction: Restriction | None = None,
    ) -> Request:
        """Queue one request (one sample); see `ServingEngine.add`."""
        self._idling.end()
        return self.requests.add(
            prompt_token_ids, params, request_id=request_id, slo=slo, priority=priority, cache_salt=cache_salt,
            user=user, arrival_s=self._clock() if arrival_s is None else arrival_s, output_token_ids=output_token_ids,
            restriction=restriction,
        )  # fmt: skip

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free at once. Unknown or ended ids change nothing."""
        if (request := self.requests.get(request_id)) is not None:
            self._end(request, FinishReason.ABORT)

    def step(self) -> list[Output]:
        """One iteration: plan, start it on the device, commit results.

        A request whose part of the iteration fails ends with FinishReason.ERROR; the engine continues.

        Raises:
            PolicyFailed: the policy raised, and no iteration is in flight that could be committed instead.
        """
        outputs = self._early  # kept if the policy raises
        while any(r.restriction and r.restriction.follows_tokens for f in self._inflight for r in f.batch.requests):
            outputs += self._commit(self._inflight.popleft())  # before its next bits
        now = self._clock()
        self.last_plan = plan = self._plan(now)
        self._counts.schedule_s = self._clock() - now
        if not plan.is_empty:
            self._idling.end()
            self._dispatch(plan, now, started_s=now if self._was_idle else None)
        elif not self._inflight and self.state.num_unfinished and not self._idling.accepts(plan, now):
            self._give_up()
        goes_on = bool(self._inflight) and self._inflight[-1].results.running is not None  # if the next step has more
        while len(self._inflight) > (max(self._depth, goes_on) if plan.scheduled else 0):
            outputs += self._commit(self._inflight.popleft())
        self._early = []
        self._was_idle = not self.has_unfinished
        return [*self.requests.take_ended(), *outputs]

    def figures(self) -> EngineFigures:
        """Figures after the last step; to be called in the thread that steps, whose compilations are counted."""
        return EngineFigures(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            num_blocks=self.state.pool.num_blocks,
            blocks=self.state.blocks_by_kind(),
            plan=self.last_plan,
            schedule_s=self._counts.schedule_s,
            padded_tokens=self._counts.padded_tokens,
            num_failed_steps=self._counts.num_failed_steps,
            num_recompiles=self._compilations.count,
            compile_s=self._counts.compile_s,
            cost_model=self.times.fitted_model,
            prefix_queries=self.state.prefix_queries,
            prefix_hits=self.state.prefix_hits,
            cache_config=self.setup.cache_config,
            weights={"dtype": str(self.setup.dtype), "quantization": self.config.quantization or "none"},
            num_outside_range=self.runner.num_outside - self._counts.outside_before,
            **self.state.host_figures(),
        )

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache; see `ServingEngine.reset_prefix_cache`."""
        self.state.forget_prefixes()

    def recent_plans(self) -> list[dict[str, Any]]:
        """The newest plans with their reasons, oldest first."""
        return self.state.plans.as_dicts()

    def load(self, now: float) -> InstanceLoad:
        """The load that this engine reports to a router."""
        return instance_load(self.state, self.policy_context.cost_model, now, predictor=self.policy_context.predictor)

    def _plan(self, now: float) -> Plan:
        """The policy's plan; an empty one without unfinished requests, and where it raised but results are to come."""
        if not self.state.num_unfinished:
            return Plan()
        try:
            return self.policy.schedule(self.state, now)
        except Exception as error:
            if not self._inflight:
                shown = str(error) or type(error).__name__
                raise PolicyFailed(f"policy {self.config.scheduling_policy!r} raised: {shown}") from error
            self._counts.num_failed_steps += 1
            return Plan()

    def _dispatch(self, plan: Plan, now: float, started_s: float | None) -> None:
        for abandoned in plan.abandoned:  # first, so that each is reported whatever becomes of the rest
            self._end(abandoned.request, FinishReason.ABANDONED)
        spans: list[Span] = []
        candidates = self.state.num_unfinished
        try:
            spans = self.state.apply(plan, now)
            spans, moved = self._pages.begin(spans)
            self.runner.project(self.state.projections)
            if spans:
                batch, programs = self._build(spans), self.runner.num_programs
                self._counts.padded_tokens = batch.bucket.tokens
                results = self.runner.dispatch(batch)
                usual = programs == self.runner.num_programs and not results.scores and not moved
                load = self.times.load(plan, spans, self.state.num_projected_tokens) if usual else None
                self._inflight.append(_Flight(batch, results, load, started_s, candidates, self.state.written(spans)))
                for request, reason in () if batch.allowed is None else batch.allowed.failed:
                    self._end(request, FinishReason.ERROR, no_way_on(request, reason))
            self._pages.end()
        except BaseException as error:  # an interrupt too: arrays that were given to a program may be lost
            logger.exception("an iteration failed; its requests end with an error")
            self._recover(str(error) or type(error).__name__)
            if not isinstance(error, Exception):
                raise

    def _build(self, spans: Sequence[Span]) -> Batch:
        scores = self.prompt_logprobs.wanted(spans)
        batch = self.builder.build(spans, prefill=scores)  # only prefill steps hand on every hidden state
        allowed = allowed_tokens(batch.requests, len(batch.sample_slot), self.model_config.vocab_size)
        batch = batch._replace(allowed=allowed, pools=any(map(self._wants_state, batch.requests)))
        return self.prompt_logprobs.ask(batch) if scores else batch

    def _wants_state(self, request: Request) -> bool:
        """Whether the hidden state after its last token is wanted: by its client, or after a prompt by the policy."""
        return request.params.pools or (request.num_generated_tokens == 1 and uses_prompt_states(self.policy))

    def _recover(self, message: str) -> None:
        """After a failed device step the cache cannot be trusted: end all running requests, start with an empty one."""
        self._counts.num_failed_steps += 1
        self._inflight.clear()
        self.prompt_logprobs.rewind()
        self.times.forget_end()
        lost = [request for request in self.state.waiting if request.num_inflight_tokens > 0]  # just preempted
        for request in [*self.state.running, *lost]:
            self._end(request, FinishReason.ERROR, message)
        self.state.forget_prefixes()
        try:
            self.runner.reset()
        except Exception as error:
            raise DeviceLost(f"the device does not work any more after a failed step: {error}") from error

    def _give_up(self) -> None:
        head = (self.state.waiting or self.state.running)[0]
        counts = f"{self.num_waiting} waiting and {self.num_running} running"
        error = f"policy {self.config.scheduling_policy!r} planned nothing with {counts}"
        logger.error("%s; request %s ends with an error", error, head.request_id)
        self._end(head, FinishReason.ERROR, error)

    def _commit(self, flight: _Flight) -> list[Output]:
        if not flight.results.is_read:
            self.times.forget_end()  # nothing is read back
            self.state.keep(flight.written)
            return []
        try:
            found = self.runner.read(flight.results)
        except Exception as error:
            logger.exception("an iteration failed on the device; its requests end with an error")
            self._recover(str(error) or type(error).__name__)
            return []
        now, host, pooled = self._clock(), cast(Sampled, found.sampled), found.pooled  # where there is a row
        if self.times.ended(flight.load, flight.started_s, now, flight.candidates):
            self._use_cost_model()
        for request in self.prompt_logprobs.take(flight.batch.chunks, found.scores):
            self._spoil(request)
        for row, request in enumerate(flight.batch.requests):
            if request.status is not Status.FINISHED and not host.is_finite[row]:
                self._spoil(request)
            self.requests.push(request, int(host.token[row]))
        self.state.keep(flight.written)  # before requests end and give their pages back
        outputs = []
        for row, request in enumerate(flight.batch.requests):
            if request.status is Status.FINISHED:
                continue
            is_asked = request.params.pools
            if pooled is not None and not (request.output_token_ids or is_asked) and uses_prompt_states(self.policy):
                self._tell_policy("saw_prompt", request, pooled[row])
            output = self.requests.accept(request, row, host, now, pooled[row] if is_asked else None)
            if output.finish_reason is not None:
                self._tell_policy("finished", request, now)
            outputs.append(output)
        return outputs

    def _spoil(self, request: Request) -> None:
        """End a request whose results are not finite; none of its pages is ever found again."""
        self.state.forget_prefixes(request)
        self._end(request, FinishReason.ERROR, NOT_FINITE)

    def _use_cost_model(self) -> None:
        if (model := self.times.fitted_model) is not None:
            self.policy_context.cost_model, self.state.least_projected_tokens = model, least_projected_tokens(model)

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request outside the normal course; reported by the next step."""
        if request.status is not Status.FINISHED:
            self._idling.end()
            self.requests.end(request, reason, error)
            self._tell_policy("finished", request, self._clock())

    def _tell_policy(self, what: str, request: Request, about: Any) -> None:
        """Call a method of the policy. What it makes of it must not take the outputs of others away."""
        try:
            getattr(self.policy, what)(request, about)
        except Exception:
            self._counts.num_failed_steps += 1
            logger.exception("the policy failed to take in that request %s has %s", request.request_id, what)
