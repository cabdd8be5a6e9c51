"""Ending requests whose next token is overdue by more than the operator lets one wait (`--abandon-after`).

It goes around any policy: `make_policy` wraps the chosen one where the context has a limit, so that the engine and the
simulator abandon alike. What the policy serves in this iteration is never abandoned, nor what goes on after it with
pages that are copied back beside it, nor what has a token in flight.
"""

from dataclasses import replace
from typing import Any

from apt_jax.request import Request
from apt_jax.scheduling.plan import Abandoned, Plan, Reason
from apt_jax.scheduling.policies.interface import Policy
from apt_jax.scheduling.state import SchedulerState


def overdue_s(request: Request, now: float) -> float:
    """Seconds that its next token is past the TTFT SLO, or past the stall limit after the first; may be negative."""
    slo = request.slo
    return request.pending_s(now) - (slo.ttft_s if request.last_token_s is None else slo.stall_limit_s)


def give_up(plan: Plan, state: SchedulerState, now: float, after_s: float) -> Plan:
    """`plan`, with what it does not serve and is overdue by more than `after_s` seconds abandoned. Pure."""
    served = {id(entry.request) for entry in plan.scheduled}
    served |= {id(entry.request) for entry in plan.fetched if entry.reason is Reason.FETCHED_BESIDE}
    gone = {
        id(request): Abandoned(request, Reason.ABANDONED_LATE)
        for queue in (state.waiting, state.running)
        for request in queue
        if overdue_s(request, now) > after_s and not request.num_inflight_tokens and id(request) not in served
    }
    for entry in plan.abandoned:
        gone.setdefault(id(entry.request), entry)
    if not gone:
        return plan
    waited = [
        replace(entry, requests=tuple(request for request in entry.requests if id(request) not in gone))
        for entry in plan.waited
    ]
    return replace(
        plan,
        preempted=tuple(entry for entry in plan.preempted if id(entry.request) not in gone),
        converted=tuple(entry for entry in plan.converted if id(entry.request) not in gone),
        waited=tuple(entry for entry in waited if entry.requests),
        abandoned=tuple(gone.values()),
        fetched=tuple(entry for entry in plan.fetched if id(entry.request) not in gone),
    )


class Abandoning:
    """A policy that does as another one, and abandons what is overdue by more than `after_s` seconds."""

    def __init__(self, policy: Policy, after_s: float):
        self.policy = policy
        self._after_s = after_s

    def __getattr__(self, name: str) -> Any:
        """What else the policy has, such as `uses_cost_model`."""
        return getattr(self.policy, name)

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """The policy's plan, and what it abandons."""
        return give_up(self.policy.schedule(state, now), state, now, self._after_s)

    def finished(self, request: Request, now: float) -> None:
        """For the policy."""
        self.policy.finished(request, now)
