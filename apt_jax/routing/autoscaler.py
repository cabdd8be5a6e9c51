"""The number of instances, from SLO attainment and queues; not from processor use, which says nothing here.

An engine at half its throughput and one past its limit both keep the device busy. They differ in whether
requests attain their SLO and whether they wait for blocks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from apt_jax.ranges import check_finite
from apt_jax.routing.instance import InstanceLoad

REMEMBERED_DELAYS = 10  # of `down_delay_s`: for this long the load at which SLOs were missed is remembered


@dataclass(frozen=True)
class AutoscalerOptions:
    """When to change the number of instances.

    Attributes:
        min_instances: never fewer.
        max_instances: never more.
        target_attainment: fewer requests that keep their SLO than this, and one is added.
        high_occupancy: mean share of the blocks that is held or waited for, above which instances are added.
        low_occupancy: a smaller share than this on one instance fewer, and one is removed.
        up_delay_s: it must look too small for this long.
        down_delay_s: it must look too large for this long.
    """

    min_instances: int = 1
    max_instances: int = 1
    target_attainment: float = 0.95
    high_occupancy: float = 0.8
    low_occupancy: float = 0.6
    up_delay_s: float = 5.0
    down_delay_s: float = 60.0

    def __post_init__(self) -> None:
        check_finite(self)
        if not 1 <= self.min_instances <= self.max_instances:
            raise ValueError(
                f"min_instances={self.min_instances} and max_instances={self.max_instances} must be 1 <= min <= max"
            )
        if not 0 < self.low_occupancy < self.high_occupancy or not 0 <= self.target_attainment <= 1:
            raise ValueError(
                f"low_occupancy={self.low_occupancy} and high_occupancy={self.high_occupancy} must be 0 < low < high, "
                f"target_attainment={self.target_attainment} a share in 0..1"
            )
        if self.up_delay_s < 0 or self.down_delay_s < 0:
            raise ValueError(f"up_delay_s={self.up_delay_s} and down_delay_s={self.down_delay_s} must not be negative")


class Autoscaler:
    """Remembers since when the service has looked too small or too large."""

    def __init__(self, options: AutoscalerOptions | None = None):
        self.options = options or AutoscalerOptions()
        self._small_since_s: float | None = None
        self._large_since_s: float | None = None
        self._too_much_per_s = math.inf  # requests that one instance ended while SLOs were missed
        self._too_much_at_s = 0.0

    def desired(
        self,
        loads: Sequence[InstanceLoad],
        num_instances: int,
        now: float,
        attainment: float | None = None,
        ended_per_s: float = 0.0,
    ) -> int:
        """How many instances there should be now.

        Args:
            loads: the newest reports of instances that take requests.
            num_instances: those that run, those being started included.
            now: seconds of any monotonic clock.
            attainment: share of the requests finished in the last half minute or so that attained their SLO
                strictly; None if too few finished. It does not count while an instance is being started: what is
                missed then is what that one is for. For the same reason the caller forgets what came before an
                instance was ready.
            ended_per_s: requests that all instances finished per second in this time. It keeps
                the number from swinging where memory is free: an instance that was added because SLOs were missed
                is not removed while the load is much the same.
        """
        options = self.options
        is_starting = len(loads) < num_instances
        is_missing = attainment is not None and attainment < options.target_attainment and not is_starting
        wanted = self._wanted(loads, num_instances, is_missing)
        if wanted < num_instances and self._was_too_much(ended_per_s / wanted, now):
            wanted = num_instances
        self._small_since_s = _since(self._small_since_s, now, wanted > num_instances)
        self._large_since_s = _since(self._large_since_s, now, wanted < num_instances)
        answer = num_instances
        if self._small_since_s is not None and now - self._small_since_s >= options.up_delay_s:
            answer, self._small_since_s = wanted, None
            if is_missing and ended_per_s > 0 and num_instances < options.max_instances:
                self._too_much_per_s, self._too_much_at_s = ended_per_s / num_instances, now
        elif self._large_since_s is not None and now - self._large_since_s >= options.down_delay_s:
            answer, self._large_since_s = num_instances - 1, None
        return min(max(answer, options.min_instances), options.max_instances)

    def _was_too_much(self, ended_per_s: float, now: float) -> bool:
        """Whether this rate per instance is close to one at which SLOs were missed."""
        if now - self._too_much_at_s > REMEMBERED_DELAYS * self.options.down_delay_s:
            self._too_much_per_s = math.inf
        return ended_per_s > self.options.low_occupancy / self.options.high_occupancy * self._too_much_per_s

    def _wanted(self, loads: Sequence[InstanceLoad], num_instances: int, is_missing: bool) -> int:
        """How many would do for what the reports say, before any delay."""
        options = self.options
        if not loads:
            return num_instances
        occupancy = sum(load.taken_blocks / load.total_blocks for load in loads)  # in pools
        wanted = num_instances
        if occupancy > options.high_occupancy * num_instances:
            wanted = math.ceil(occupancy / options.high_occupancy)
        elif num_instances > 1 and occupancy < options.low_occupancy * (num_instances - 1):
            wanted = num_instances - 1
        if is_missing:
            wanted = max(wanted, num_instances + 1)
        return wanted


def _since(began_s: float | None, now: float, is_so: bool) -> float | None:
    if not is_so:
        return None
    return now if began_s is None else began_s
