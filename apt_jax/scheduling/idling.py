"""Doing nothing on purpose: a plan that schedules nobody and says when to plan anew (`Plan.wake_at_s`).

Policies that gather requests into full batches need it. Every other empty plan means that a policy is stuck, and so
does one that goes on waiting while nothing happens.
"""

from apt_jax.scheduling.plan import Plan

MOST_IDLE_S = 10.0  # without anything planned, and without anybody who came or left


class Idling:
    """Whether nothing is being done on purpose. `until_s` is when to plan again, None while something is done."""

    def __init__(self) -> None:
        self.until_s: float | None = None
        self._since_s: float | None = None

    def accepts(self, plan: Plan, now: float) -> bool:
        """Whether nothing is to be done until the time that an empty plan says; False: the policy is stuck."""
        self._since_s = now if self._since_s is None else self._since_s
        wakes = plan.wake_at_s is not None and plan.wake_at_s > now and now - self._since_s < MOST_IDLE_S
        self.until_s = plan.wake_at_s if wakes else None
        return wakes

    def end(self) -> None:
        """Something was planned, or somebody came or left: there is reason to plan at once."""
        self.until_s = self._since_s = None

    def left_s(self, now: float) -> float:
        """Seconds until it is time to plan again; 0 if it is."""
        return 0.0 if self.until_s is None else max(self.until_s - now, 0.0)
