"""States of a few requests, put together by hand, and plans as lines that a table can hold."""

from apt_jax.cache import CacheKind
from apt_jax.request import Request
from apt_jax.scheduling.plan import Plan, Reason, Scheduled
from apt_jax.scheduling.state import SchedulerState
from tests.support.scheduling_loop import request

WORD = 5


def wait(state: SchedulerState, name: str, prompt: int = 4, output: int = 9999, **fields) -> Request:
    """Add a request that waits."""
    added = request(prompt, output, name=name, **fields)
    state.add(added)
    return added


def run(
    state: SchedulerState, name: str, prompt: int = 4, generated: int = 1, *, kind: CacheKind = CacheKind.KV,
    computed: int | None = None, output: int = 9999, **fields,
) -> Request:  # fmt: skip
    """Add a request that runs: `generated` tokens are out, or only `computed` tokens of its prompt are done."""
    added = wait(state, name, prompt, output, **fields)
    state.apply(Plan((Scheduled(added, computed or prompt, kind, Reason.ADMITTED_KV),)), 0.0)
    if computed is None:
        generate(state, added, generated, prompt_done=True)
    return added


def generate(state: SchedulerState, running: Request, tokens: int, *, prompt_done: bool = False, now=0.0) -> None:
    """Let a running request bring `tokens` more."""
    for k in range(tokens):
        if k or not prompt_done:
            assert running.cache_kind is not None
            state.apply(Plan((Scheduled(running, 1, running.cache_kind, Reason.DECODES),)), now)
        state.commit(running, WORD, now)


def lines(plan: Plan) -> list[str]:
    """What the plan does, in the order it is applied: "run NAME TOKENS KIND REASON", "preempt NAME REASON", ..."""
    return [
        *(f"preempt {p.request.request_id} {p.reason.name}" for p in plan.preempted),
        *(f"convert {c.request.request_id} {c.reason.name}" for c in plan.converted),
        *(f"run {s.request.request_id} {s.num_tokens} {s.kind.value} {s.reason.name}" for s in plan.scheduled),
        *(f"wait {r.request_id} {w.reason.name}" for w in plan.waited for r in w.requests),
    ]


def order(plan: Plan) -> list[str]:
    """Names of those that run, in order."""
    return [s.request.request_id for s in plan.scheduled]
