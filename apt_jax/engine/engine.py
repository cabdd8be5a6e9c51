"""The engine: schedule -> build -> run -> commit, once per `step`. Synchronous and single-threaded.

With asynchronous scheduling one iteration stays in flight: while the device runs it, the host commits the one
before (tokens, text, stop strings) and plans the next, whose newest tokens are still on the device only.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from apt_jax.attention.paged import Kinds
from apt_jax.batching.buckets import Buckets
from apt_jax.batching.builder import MAX_END_IDS, Batch, BatchBuilder, table_pages
from apt_jax.cache import BlockPool, CacheKind
from apt_jax.engine.calibration import base_model, calibrate
from apt_jax.engine.compilations import Compilations
from apt_jax.engine.memory import MemoryPlan, plan_memory
from apt_jax.engine.prompt_logprobs import PromptLogprobs
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.multihost import smallest_of_all
from apt_jax.execution.platform import Platform
from apt_jax.execution.pool import block_bytes
from apt_jax.execution.runner import Runner, Shapes, StepResults, pages_multiple
from apt_jax.execution.sampling import Sampled
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT
from apt_jax.output import DeviceLost, Output, QueueFull, TokenLogprobs
from apt_jax.request import FinishReason, Request, SamplingParams, Slo, Status
from apt_jax.scheduling.costs.fit import Calibration
from apt_jax.scheduling.costs.step_load import StepLoad, step_load
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits, SchedulerState, Span
from apt_jax.tokenization.stop_text import StopText
from apt_jax.tokenization.tokenizer import IncrementalDetokenizer, Tokenizer

logger = logging.getLogger(__name__)

NOT_FINITE = "the model's logits are not finite (NaN or infinity)"
WATERMARK = 0.01  # share of the pool kept free on admission, as vLLM


class EngineStuck(RuntimeError):
    """A policy planned nothing although requests wait and nothing is in flight."""


@dataclass(frozen=True)
class _Flight:
    """An iteration on the device."""

    batch: Batch
    results: StepResults
    load: StepLoad | None  # what it works through, if its time will be learned
    started_s: float


@dataclass
class _Text:
    detokenizer: IncrementalDetokenizer
    stop: StopText
    resumed: str = ""  # of tokens generated before the request was added


class Engine:
    """Serves one model from one device, or from several that it is split over.

    Args:
        model: weights on the device; for `tensor_parallel_size` > 1 split by `sharding.Parallel`.
        tokenizer: None serves token ids only.
        clock: seconds; replaced in tests.
        donate_model: the model's arrays may be taken apart, which saves memory on a CPU; it cannot be used afterwards.

    Raises:
        ValueError: the configuration cannot be served (context, memory, backend); one sentence with the cure.
    """

    def __init__(
        self,
        model: OPT,
        model_config: ModelConfig,
        config: EngineConfig,
        tokenizer: Tokenizer | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        donate_model: bool = False,
    ):
        self.model_config = model_config
        self.tokenizer = tokenizer
        self._clock = clock
        platform = Platform.of_array(model.embed_tokens.embedding[...])
        self.config = config = resolve(config, model_config, platform)
        assert config.max_model_len is not None
        assert config.max_num_seqs is not None
        assert config.max_num_batched_tokens is not None
        self.max_model_len = config.max_model_len
        limits = Limits(config.max_num_seqs, config.max_num_batched_tokens, config.cache_mode)
        buckets = Buckets(max_num_seqs=config.max_num_seqs, max_num_batched_tokens=config.max_num_batched_tokens)
        kinds = Kinds(kv=CacheKind.KV in limits.kinds, hidden=CacheKind.HIDDEN in limits.kinds)
        pages = table_pages(self.max_model_len, config.block_size, pages_multiple(config.block_size))
        shapes = Shapes(config.max_num_seqs, self.max_model_len, pages, config.block_size, kinds)
        self.runner = Runner(model, model_config, shapes, buckets, config.attention_backend, donate_model=donate_model)
        self.builder = BatchBuilder(self.runner.buckets, num_slots=config.max_num_seqs, table_pages=pages)
        _check_devices(self.runner, config)
        self.memory = self._plan_memory(limits)
        logger.info("device memory\n%s", self.memory.table())
        self.runner.allocate(self.memory.num_blocks)
        limits = replace(limits, watermark_blocks=int(WATERMARK * self.memory.num_blocks))
        self.state = SchedulerState(BlockPool(self.memory.num_blocks, config.block_size), limits)
        self.calibration = Calibration(base_model(self))
        self.policy_context = PolicyContext(seed=config.seed)
        self.policy = make_policy(config.scheduling_policy, self.policy_context)
        # Whether iterations are timed to refine the cost model; only some policies look at that.
        self.learns_times = config.calibrate and getattr(self.policy, "uses_cost_model", False)
        self.last_plan = Plan()
        self.last_schedule_s = 0.0
        self.num_failed_steps = 0
        self.compile_s = 0.0  # what `warm_up` took to compile, or to load what was compiled
        self._depth = 1 if config.async_scheduling else 0
        self._inflight: deque[_Flight] = deque()
        self._device_free_s: float | None = None  # when the last iteration ended, if that is known
        self._requests: dict[str, Request] = {}
        self._texts: dict[str, _Text] = {}
        self._prompt_logprobs = PromptLogprobs(buckets.score_rows)
        self._ended: list[Output] = []  # requests that ended outside a step
        self._compilations = Compilations()
        self._seeds = np.random.default_rng(config.seed)

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._requests or self._ended or self._inflight)

    @property
    def num_recompiles(self) -> int:
        """Compilations since `warm_up` in the calling thread, which must be the one that steps; should stay 0."""
        return self._compilations.count

    def warm_up(self, progress: bool = False) -> None:
        """Compile every shape, and measure the device if the policy uses that; afterwards nothing compiles."""
        started = time.perf_counter()
        self.runner.compile_all(progress)
        self.compile_s = time.perf_counter() - started
        logger.info("compiled %d programs in %.1f s", self.runner.num_programs, self.compile_s)
        if self.learns_times:
            self.calibration = calibrate(self)
            self._use_cost_model()
        self._compilations.reset()

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
    ) -> Request:
        """Queue one request (one sample).

        `output_token_ids` were generated before, by this engine or another, and are gone on from: with the same seed
        the same tokens follow. The first output then brings all of their text.

        Raises:
            ValueError: the request can never be served; one sentence with the value, the limit and the cure.
            QueueFull: as many wait as may.
        """
        self._check(prompt_token_ids, params, request_id)
        if len(self.state.waiting) >= self.config.max_num_queued_reqs:
            raise QueueFull(
                f"{len(self.state.waiting)} requests are waiting, max_num_queued_reqs="
                f"{self.config.max_num_queued_reqs}; try again later"
            )
        if params.seed is None:
            params = replace(params, seed=int(self._seeds.integers(2**63)))
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(prompt_token_ids),
            params=params,
            arrival_s=self._clock() if arrival_s is None else arrival_s,
            max_new_tokens=self._max_new_tokens(len(prompt_token_ids), params),
            eos_token_ids=frozenset(self.model_config.eos_token_ids),
            slo=slo or Slo(self.config.ttft_slo_ms / 1e3, self.config.tbt_slo_ms / 1e3),
            priority=priority,
            output_token_ids=list(output_token_ids),
        )
        if len(output_token_ids) >= request.max_new_tokens:
            raise ValueError(f"output_token_ids has all {request.max_new_tokens} tokens that may be generated")
        self.state.add(request)
        self._requests[request_id] = request
        self._prompt_logprobs.add(request)
        if self.tokenizer is not None:
            detokenizer = self.tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
            stop = StopText(params.stop or (), params.include_stop_str_in_output)
            self._texts[request_id] = text = _Text(detokenizer, stop)
            for number, token in enumerate(output_token_ids, start=1):
                text.resumed += self._show(text, token, early=number < params.min_tokens)[0]
        return request

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free at once. Unknown or ended ids change nothing."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, FinishReason.ABORT)

    def step(self) -> list[Output]:
        """One iteration: plan, start it on the device, commit what has come back.

        A request whose part of the iteration fails ends with FinishReason.ERROR; the engine goes on.
        """
        now = self._clock()
        self.last_plan = plan = self.policy.schedule(self.state, now)
        self.last_schedule_s = self._clock() - now
        if plan.scheduled or plan.preempted or plan.converted:
            self._dispatch(plan, now)
        elif not self._inflight and self.state.num_unfinished:
            self._give_up()
        outputs: list[Output] = []
        while len(self._inflight) > (self._depth if plan.scheduled else 0):
            outputs += self._commit(self._inflight.popleft())
        outputs, self._ended = [*self._ended, *outputs], []
        return outputs

    def _plan_memory(self, limits: Limits) -> MemoryPlan:
        devices = self.runner.num_devices

        def plan(activation_bytes: int) -> MemoryPlan:
            assert self.config.max_num_seqs is not None
            return plan_memory(
                self.config,
                device=self.runner.device,
                weight_bytes=self.runner.weight_bytes,
                activation_bytes=activation_bytes,
                block_bytes=block_bytes(self.model_config, self.config.block_size, self.runner.dtype) // devices,
                max_model_len=self.max_model_len,
                max_num_seqs=self.config.max_num_seqs,
                kinds=limits.kinds,
                num_devices=devices,
                sharers=self.runner.num_local_devices,
            )

        guess = plan(activation_bytes=0)
        found = plan(self.runner.measure_activations(smallest_of_all(guess.num_blocks)))
        return replace(found, num_blocks=smallest_of_all(found.num_blocks))

    def _check(self, prompt_token_ids: Sequence[int], params: SamplingParams, request_id: str) -> None:
        length = len(prompt_token_ids)
        if params.n != 1:
            raise ValueError(f"n={params.n}: the engine takes one sample at a time; fan out first")
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        if length == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if length >= self.max_model_len:
            raise ValueError(
                f"the prompt has {length} tokens, but the context holds {self.max_model_len} and one is needed for the "
                f"answer; shorten the prompt or raise --max-model-len"
            )
        low, high = min(prompt_token_ids), max(prompt_token_ids)
        if low < 0 or high >= self.model_config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"prompt token id {bad} is not in the vocabulary 0..{self.model_config.vocab_size - 1}")
        params.check_vocabulary(self.model_config.vocab_size)
        ends = len(params.stop_token_ids or ()) + (0 if params.ignore_eos else len(self.model_config.eos_token_ids))
        if ends > MAX_END_IDS:
            raise ValueError(
                f"stop_token_ids and the model's end-of-sequence ids are {ends} together, at most {MAX_END_IDS} are "
                "possible; give fewer, or ignore_eos"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none; use stop_token_ids")
        total = length + self._max_new_tokens(length, params) - 1  # the last token is never cached
        if not self.state.fits_alone(total):
            pool = self.state.pool
            raise ValueError(
                f"prompt and output of up to {total} tokens do not fit in the cache of {pool.num_blocks} blocks of "
                f"{pool.block_size} tokens; lower max_tokens, or raise --num-blocks"
            )

    def _max_new_tokens(self, prompt_tokens: int, params: SamplingParams) -> int:
        room = self.max_model_len - prompt_tokens
        return room if params.max_tokens is None else min(params.max_tokens, room)

    def _dispatch(self, plan: Plan, now: float) -> None:
        spans: list[Span] = []
        try:
            spans = self.state.apply(plan, now)
            if plan.converted:
                self.runner.convert([c.request.table for c in plan.converted if c.request.table is not None])
            if spans:
                batch, programs = self._build(spans), self.runner.num_programs
                results = self.runner.dispatch(batch)
                compiled = programs != self.runner.num_programs
                load = step_load(plan, spans) if self.learns_times and not compiled and not results.scores else None
                self._inflight.append(_Flight(batch, results, load, now))
        except Exception as error:
            logger.exception("an iteration failed; its requests end with an error")
            self._recover(str(error) or type(error).__name__)

    def _build(self, spans: Sequence[Span]) -> Batch:
        if not self._prompt_logprobs.wanted(spans):
            return self.builder.build(spans)
        batch = self.builder.build(spans, prefill=True)  # only prefill steps hand on every hidden state
        return self._prompt_logprobs.ask(batch)

    def _recover(self, message: str) -> None:
        """After a failed device step nothing in the cache can be trusted: end all that runs, start afresh."""
        self.num_failed_steps += 1
        self._inflight.clear()
        self._prompt_logprobs.rewind()
        self._device_free_s = None
        lost = [request for request in self.state.waiting if request.num_inflight_tokens > 0]  # just preempted
        for request in [*self.state.running, *lost]:
            self._end(request, FinishReason.ERROR, message)
        try:
            self.runner.reset()
        except Exception as error:
            raise DeviceLost(f"the device does not work any more after a failed step: {error}") from error

    def _give_up(self) -> None:
        head = (self.state.waiting or self.state.running)[0]
        error = EngineStuck(
            f"policy {self.config.scheduling_policy!r} planned nothing with {len(self.state.waiting)} waiting and "
            f"{len(self.state.running)} running"
        )
        logger.error("%s; request %s ends with an error", error, head.request_id)
        self._end(head, FinishReason.ERROR, str(error))

    def _commit(self, flight: _Flight) -> list[Output]:
        if flight.results.sampled is None and not flight.results.scores:
            self._device_free_s = None  # nothing is read back, so nobody knows when it ends
            return []
        try:
            host, scores = self.runner.read(flight.results)
        except Exception as error:
            logger.exception("an iteration failed on the device; its requests end with an error")
            self._recover(str(error) or type(error).__name__)
            return []
        now = self._clock()
        self._learn_time(flight, now)
        for request in self._prompt_logprobs.take(flight.batch.chunks, scores):
            self._end(request, FinishReason.ERROR, NOT_FINITE)
        outputs = []
        for row, request in enumerate(flight.batch.requests):
            assert host is not None
            if request.status is Status.FINISHED:
                continue
            if not host.is_finite[row]:
                self._end(request, FinishReason.ERROR, NOT_FINITE)
                continue
            outputs.append(self._accept(request, row, host, now))
        return outputs

    def _learn_time(self, flight: _Flight, now: float) -> None:
        """Refine the cost model by an iteration that ended `now`: it began when the one before had ended."""
        if flight.load is not None and self._device_free_s is not None:
            seconds = now - max(flight.started_s, self._device_free_s)
            if self.calibration.observe(flight.load, seconds):
                self._use_cost_model()
        self._device_free_s = now

    def _use_cost_model(self) -> None:
        if self.calibration.is_fitted:
            self.policy_context.cost_model = self.calibration.model

    def _accept(self, request: Request, row: int, host: Sampled, now: float) -> Output:
        token = int(host.token[row])
        reason = self.state.commit(request, token, now)
        shown = ""
        text = self._texts.get(request.request_id)
        if text is not None:
            shown, stop = self._show(text, token, early=len(request.output_token_ids) < request.params.min_tokens)
            shown, text.resumed = text.resumed + shown, ""
            if stop is not None:
                self.state.finish(request, FinishReason.STOP)
                request.stop_reason = stop
                request.finish_reason = reason = FinishReason.STOP  # also where this token was the last allowed
            elif reason is not None:
                shown += self._flush(text)
        prompt_logprobs = self._prompt_logprobs.pop(request)
        if reason is not None:
            self._forget(request, now)
        logprobs = self._token_logprobs(request, token, row, host)
        return Output(request, shown, (token,), logprobs, reason, prompt_logprobs=prompt_logprobs)

    @staticmethod
    def _token_logprobs(request: Request, token: int, row: int, host: Sampled) -> tuple[TokenLogprobs, ...]:
        count = request.params.logprobs
        if count is None:
            return ()
        ids, values = host.top_ids[row, :count].tolist(), host.top_logprobs[row, :count].tolist()
        top = tuple(zip(ids, values, strict=True))
        return (TokenLogprobs(token, float(host.logprob[row]), int(host.rank[row]), top),)

    @staticmethod
    def _show(text: _Text, token: int, *, early: bool) -> tuple[str, str | None]:
        """Text that a token completes, and the stop string that it ends, if it is not too early for one."""
        shown = text.detokenizer.push([token])
        return (shown, None) if early else text.stop.push(shown)

    @staticmethod
    def _flush(text: _Text) -> str:
        shown, stop = text.stop.push(text.detokenizer.flush())
        return shown if stop is not None else shown + text.stop.flush()

    def _end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request outside the normal course; reported by the next step."""
        if request.status is Status.FINISHED:
            return
        self.state.finish(request, reason)
        text = self._texts.get(request.request_id)
        shown = text.resumed + self._flush(text) if text is not None else ""
        self._forget(request, self._clock())
        self._ended.append(Output(request, shown, (), (), reason, error))

    def _forget(self, request: Request, now: float) -> None:
        self._requests.pop(request.request_id, None)
        self._texts.pop(request.request_id, None)
        self._prompt_logprobs.forget(request.request_id)
        self.policy.finished(request, now)


def resolve(config: EngineConfig, model_config: ModelConfig, platform: Platform) -> EngineConfig:
    """Fill in the defaults that depend on the model and the device.

    Raises:
        ValueError: an option asks for what this model or this version cannot do.
    """
    if config.max_model_len is not None and config.max_model_len > model_config.max_position_embeddings:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the model's max_position_embeddings="
            f"{model_config.max_position_embeddings}; lower --max-model-len"
        )
    max_num_seqs = config.max_num_seqs or platform.max_num_seqs
    max_model_len = config.max_model_len or model_config.max_position_embeddings
    resolved = replace(
        config,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens or max(platform.max_num_batched_tokens, max_num_seqs),
        async_scheduling=platform.async_scheduling if config.async_scheduling is None else config.async_scheduling,
    )
    return resolved


def _check_devices(runner: Runner, config: EngineConfig) -> None:
    """Refuse weights that do not lie as the configuration says.

    Raises:
        ValueError: they are on another number of devices, or not split for the kinds of cache.
    """
    if runner.num_devices != config.tensor_parallel_size:
        raise ValueError(
            f"tensor_parallel_size={config.tensor_parallel_size}, but the weights lie on {runner.num_devices} "
            "device(s); load them with the same number"
        )
    parallel = runner.parallel
    if parallel is not None and runner.num_devices > 1 and runner.shapes.kinds.hidden and not parallel.hidden:
        raise ValueError(
            f"cache_mode={config.cache_mode!r} needs k and v split by inputs, and these weights are split by heads; "
            "load them for that mode, or use --cache-mode kv"
        )
