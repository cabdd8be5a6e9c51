"""Engines for tests: small shapes that compile quickly, a run loop, and a policy that follows orders."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.weights.choice import laid_out
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT
from apt_jax.output import Output
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.plan import Converted, Plan, Preempted, Reason, Scheduled
from apt_jax.scheduling.state import SchedulerState

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def make_engine(model: OPT, config: ModelConfig, **options) -> Engine:
    """An engine of few shapes: 8 requests, 16 tokens an iteration, blocks of 8; plans that do not look at the clock."""
    options = {
        "max_num_seqs": 8, "max_num_batched_tokens": 16, "block_size": 8, "num_blocks": 40,
        "scheduling_policy": "fcfs", **options,
    }  # fmt: skip
    chosen = EngineConfig(**options)
    return Engine(set_up(laid_out(model, config, chosen), config, chosen))


def run(
    engine: Engine, prompts: Iterable[list[int]], params: SamplingParams | list[SamplingParams] = GREEDY
) -> list[Request]:
    """Generate for all prompts at once; blocks are checked after every step and all free at the end."""
    prompts = list(prompts)
    each = params if isinstance(params, list) else [params] * len(prompts)
    requests = [engine.add(p, s, request_id=str(i)) for i, (p, s) in enumerate(zip(prompts, each, strict=True))]
    finish(engine)
    return requests


def finish(engine: Engine, after_step: Callable[[int], None] = lambda step: None) -> list[Output]:
    """Step until nothing is unfinished; returns all outputs."""
    outputs: list[Output] = []
    steps = 0
    while engine.has_unfinished:
        outputs += engine.step()
        engine.state.check()
        steps += 1
        after_step(steps)
        assert steps < 10_000, "the engine makes no progress"
    assert engine.state.pool.num_free == engine.state.pool.num_blocks
    return outputs


class Orders:
    """A policy for tests: prefill in order with a given kind; convert or preempt a request at a given length.

    Args:
        kinds: cache kind by request id; KV if absent.
        convert_at, preempt_at: generated tokens at which to do it, by request id.
        mixed: put prefill chunks and decoding requests in one iteration.
    """

    def __init__(
        self,
        kinds: dict[str, CacheKind],
        convert_at: dict[str, int] | None = None,
        preempt_at: dict[str, int] | None = None,
        mixed: bool = False,
    ):
        self.kinds, self.convert_at, self.preempt_at = kinds, convert_at or {}, dict(preempt_at or {})
        self.mixed = mixed

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        preempted = []
        for request in state.running:
            if request.is_decoding and request.num_generated_tokens == self.preempt_at.get(request.request_id):
                del self.preempt_at[request.request_id]
                preempted.append(Preempted(request, Reason.PREEMPTED_NO_BLOCKS))
        gone = {entry.request.request_id for entry in preempted}
        decoding = [r for r in state.running if r.is_decoding and not r.is_exhausted and r.request_id not in gone]
        prefills = self._prefills(state, gone, len(decoding) if self.mixed else 0)
        if prefills and not self.mixed:
            return Plan(scheduled=tuple(prefills), preempted=tuple(preempted))
        converted = tuple(
            Converted(r, Reason.CONVERTED_MEMORY_FREE)
            for r in decoding
            if r.num_generated_tokens == self.convert_at.get(r.request_id) and r.cache_kind is CacheKind.HIDDEN
        )
        kv = {entry.request.request_id for entry in converted}
        decodes = [
            Scheduled(r, 1, CacheKind.KV if r.request_id in kv else r.cache_kind, Reason.DECODES) for r in decoding
        ]
        return Plan(scheduled=(*decodes, *prefills), preempted=tuple(preempted), converted=converted)

    def finished(self, request: Request, now: float) -> None:
        pass

    def _prefills(self, state: SchedulerState, gone: set[str], used: int) -> list[Scheduled]:
        budget = state.limits.max_num_batched_tokens - used
        prefills = []
        for request in (*state.running, *state.waiting):
            if request.is_decoding or request.is_exhausted or request.request_id in gone or budget <= 0:
                continue
            if request.table is None and len(state.running) >= state.limits.max_num_seqs:
                continue
            tokens = min(budget, request.num_uncomputed_tokens)
            kind = request.cache_kind or self.kinds.get(request.request_id, CacheKind.KV)
            prefills.append(Scheduled(request, tokens, kind, Reason.CONTINUES_PREFILL))
            budget -= tokens
        return prefills


class Reader(Orders):
    """The same, and keeps a copy of every prompt's hidden state, by request id."""

    uses_prompt_states = True

    def __init__(self, *args, fails: bool = False, **options):
        super().__init__(*args, **options)
        self.seen: dict[str, list[np.ndarray]] = {}
        self.fails = fails

    def saw_prompt(self, request: Request, state: np.ndarray) -> None:
        if self.fails:
            raise KeyError(request.request_id)
        self.seen.setdefault(request.request_id, []).append(state.copy())


def count_compilations() -> Callable[[], int]:
    """Start counting XLA compilations in this process; returns a function that reports their number."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: len(seen)


@contextmanager
def failing_dispatch(engine: Engine, message: str) -> Iterator[None]:
    """Every step on the device fails with `message` as long as this lasts."""

    def fail(batch):
        raise RuntimeError(message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "dispatch", fail)
        yield
