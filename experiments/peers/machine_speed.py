"""A simulation on a machine whose speed changes: other programs share its cores, and no cost model can know when."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from apt_jax.request import Request
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.fit import Observation, predicted_s
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.interface import Policy
from apt_jax.scheduling.state import SchedulerState


class Speed:
    """How fast a machine was over a run: in each second, the time predicted for its iterations over the time they took.

    Where nothing ran the speed is 1.
    """

    def __init__(self, model: CostModel, served: Sequence[Observation], ends_s: Sequence[float]):
        numbers = np.asarray(ends_s).astype(int)
        real = np.bincount(numbers, [o.seconds for o in served])
        said = np.bincount(numbers, [predicted_s(model, o) for o in served])
        self.speeds = np.divide(said, real, out=np.ones_like(said), where=real > 0)
        self._times_s = np.arange(len(said) + 1.0)
        self._work_s = np.concatenate([[0.0], np.cumsum(self.speeds)])

    def end_s(self, now: float, work_s: float) -> float:
        """When work is done that takes `work_s` at speed 1 and begins `now`."""
        last_s, all_s = self._times_s[-1], self._work_s[-1]
        begun_s = np.interp(now, self._times_s, self._work_s) + max(0.0, now - last_s)
        return float(np.interp(begun_s + work_s, self._work_s, self._times_s) + max(0.0, begun_s + work_s - all_s))


class EveryIteration:
    """A policy that is asked in every iteration, whatever it could say about how long its plans stay."""

    def __init__(self, policy: Policy):
        self._policy = policy

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """The next iteration."""
        return self._policy.schedule(state, now)

    def finished(self, request: Request, now: float) -> None:
        """A request has ended."""
        self._policy.finished(request, now)


class Drifting:
    """A cost model on a machine of changing speed; `now` is when the iteration begins.

    `simulate` says so to `on_plan`, which comes first where the policy is asked in `EveryIteration`.
    """

    def __init__(self, model: CostModel, speed: Speed):
        self._model, self._speed = model, speed
        self._host_s = 0.0  # of the iteration that begins
        self.now = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def host_s(self, candidates: int) -> float:
        """Nothing: the next `step_s` includes the host's seconds, since it begins when they end."""
        self._host_s = self._model.host_s(candidates)
        return 0.0

    def step_s(self, load: StepLoad) -> float:
        """Seconds of the iteration that begins now."""
        work_s, self._host_s = self._host_s + self._model.step_s(load), 0.0
        return self._speed.end_s(self.now, work_s) - self.now
