"""The interface of a scheduling policy: what it decides, and what it may use besides the state."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from apt_jax.request import Request
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.state import SchedulerState


@dataclass
class PolicyContext:
    """What a policy may use besides the state. Everything has a default, so a policy runs without any of it.

    `cost_model` may be replaced at any time by a better fitted one, so a policy reads it anew at each decision. Such a
    policy has the class attribute `uses_cost_model = True`; the engine then measures the device at start-up.
    """

    cost_model: CostModel | None = None
    predictor: LengthPredictor = field(default_factory=LengthPredictor)
    seed: int = 0
    abandon_after_s: float | None = None  # see `abandonment.py`; `make_policy` sees to it for every policy


class Policy(Protocol):
    """Decides each iteration. It reads the state and never changes it; `now` is in seconds."""

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """The next iteration. Every step must advance some request if one is unfinished and can run."""
        ...

    def finished(self, request: Request, now: float) -> None:
        """Called once for every request that ends, for policies that learn."""
        ...


class PromptReader(Policy, Protocol):
    """A policy that is shown every prompt as the served model sees it, if it has `uses_prompt_states = True`.

    The simulator's requests have no such states, nor have those that an engine continues, whose first tokens were
    generated before they came.
    """

    uses_prompt_states: bool

    def saw_prompt(self, request: Request, state: NDArray[np.float32]) -> None:
        """The prompt has been computed; its last hidden state `[E]` is to be copied. Once, before `finished`."""
        ...


def uses_prompt_states(policy: Policy) -> bool:
    """Whether it is a `PromptReader`."""
    return getattr(policy, "uses_prompt_states", False)


class Repeat(NamedTuple):
    """How long a policy would plan again what it has just planned: a token for every running request, nothing else.

    That is so as long as nobody arrives or ends and the free blocks last for those that grow, and

    Attributes:
        until_s: in iterations that begin before this time;
        longest_gap_s: after iterations in which no request had a longer gap between two tokens;
        iterations: in so many further ones.
        through_ends: it would also do so without a request that has ended.
    """

    until_s: float = math.inf
    longest_gap_s: float = math.inf
    iterations: float = math.inf
    through_ends: bool = False


@runtime_checkable
class Repeating(Policy, Protocol):
    """A policy that says for how long its plan stays, so that the simulator need not ask it in every iteration."""

    def repeat(self, state: SchedulerState, plan: Plan, now: float) -> Repeat | None:
        """Asked after `schedule(state, now)` returned such a `plan`; None if it has to be asked again."""
        ...

    def repeated(self, now: float) -> None:
        """Its plan was carried out again, the last time at `now`."""
        ...
