"""The last plans with their reasons, which answer "why was my request not scheduled"."""

from collections import Counter, deque
from typing import Any

from apt_jax.scheduling.plan import Plan, Reason

SEVERAL = {  # what a Reason says of one request, said of several
    Reason.CONTINUES_PREFILL: "continue their prefill",
    Reason.ADMITTED_HIDDEN_KV_DOES_NOT_FIT: "admitted with hidden cache because KV does not fit",
    Reason.ADMITTED_HIDDEN_SERVES_MORE: "admitted with hidden cache because their half of the memory serves others",
    Reason.ADMITTED_HIDDEN_CACHED: "admitted with hidden cache because more of their prompts is cached so",
    Reason.ADMITTED_LATE: "admitted although past their SLO because memory was left over",
    Reason.ADMITTED_LONGEST_LATE: "admitted because they have waited longest of those past their SLO",
    Reason.DECODES: "decode their next token",
    Reason.FETCHED_BESIDE: "have their pages copied back beside this iteration, after which they go on",
    Reason.FETCHED_AHEAD: "have their pages copied back ahead of their turn, into blocks that are free",
    Reason.PREEMPTED_NO_BLOCKS: "preempted because no block is free for requests ahead of them",
    Reason.PREEMPTED_LEAST_VALUE: "preempted because memory ran out and they were worth least per block",
    Reason.PREEMPTED_FOR_EARLIER: "preempted for waiting requests that go before them",
    Reason.PREEMPTED_LATE: "preempted because they are past their SLO and others can still meet theirs",
    Reason.WAITS_FOR_BLOCKS: "wait for free blocks",
    Reason.WAITS_FOR_SEQUENCES: "wait because max_num_seqs requests are running",
    Reason.WAITS_FOR_TOKENS: "wait because the token budget of this iteration is spent",
    Reason.WAITS_FOR_PREFILL: "wait because this iteration prefills",
    Reason.WAITS_FOR_DECODE: "wait because this iteration decodes",
    Reason.WAITS_FOR_COPIES: "wait because pages of requests ahead of them are copied back first",
    Reason.WAITS_LATE: "wait because they are past their SLO and were demoted",
    Reason.WAITS_BEHIND: "wait behind earlier requests",
    Reason.ABANDONED_LATE: "abandoned because their SLO can no longer be kept",
}


class PlanLog:
    """A ring buffer of the newest plans. Recording is cheap; reading builds plain dicts."""

    def __init__(self, capacity: int = 64):
        self._entries: deque[tuple[int, float, Plan]] = deque(maxlen=capacity)
        self._count = 0

    @property
    def num_recorded(self) -> int:
        """Plans recorded since the start, those forgotten included."""
        return self._count

    def record(self, plan: Plan, now: float) -> None:
        """Keep `plan`, made at `now` seconds; the oldest is forgotten when the buffer is full."""
        self._entries.append((self._count, now, plan))
        self._count += 1

    def as_dicts(self) -> list[dict[str, Any]]:
        """The plans kept, oldest first, as JSON-ready dicts."""
        return [plan_dict(number, now, plan) for number, now, plan in list(self._entries)]

    def of_request(self, request_id: str) -> list[dict[str, Any]]:
        """What each plan kept did with one request: `{number, now_s, action, reason}`, oldest first."""
        return [
            {"number": number, "now_s": now, "action": action, "reason": reason.value}
            for number, now, plan in list(self._entries)
            for action, request, reason in plan.decisions()
            if request.request_id == request_id
        ]


def plan_dict(number: int, now: float, plan: Plan) -> dict[str, Any]:
    """One plan as plain data."""
    return {
        "number": number,
        "now_s": now,
        "summary": summary(plan),
        "scheduled": [
            {"request": s.request.request_id, "tokens": s.num_tokens, "cache": s.kind.value, "reason": s.reason.value}
            for s in plan.scheduled
        ],
        "preempted": [{"request": p.request.request_id, "reason": p.reason.value} for p in plan.preempted],
        "converted": [{"request": c.request.request_id, "reason": c.reason.value} for c in plan.converted],
        "abandoned": [{"request": a.request.request_id, "reason": a.reason.value} for a in plan.abandoned],
        "fetched": [
            {"request": f.request.request_id, "blocks": f.num_blocks, "cache": f.kind.value, "reason": f.reason.value}
            for f in plan.fetched
        ],
        "waited": [
            {"requests": [request.request_id for request in w.requests], "reason": w.reason.value} for w in plan.waited
        ],
    }


def summary(plan: Plan) -> list[str]:
    """What was decided, a phrase for each reason in the order it is applied: "33 requests decode their next token"."""
    counts = Counter[Reason]()
    for entries in (plan.abandoned, plan.preempted, plan.converted, plan.scheduled, plan.fetched):
        counts.update(entry.reason for entry in entries)
    for waited in plan.waited:
        counts[waited.reason] += len(waited.requests)
    return [
        f"{count} requests {SEVERAL.get(reason, reason.value)}" if count > 1 else f"1 request {reason.value}"
        for reason, count in counts.items()
    ]
