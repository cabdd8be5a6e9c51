"""The interface of a scheduling policy, and the table of policies by name.

To add one: copy a short policy file such as `sjf.py`, change its `@register` name and its decision, and import it
in `_load` below. `--scheduling-policy NAME:option=value:option=value` sets fields of the policy's options.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from apt_jax.request import Request
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.state import SchedulerState


@dataclasses.dataclass
class PolicyContext:
    """What a policy may use besides the state. Everything has a default, so a policy runs without any of it.

    `cost_model` may be replaced at any time by a better fitted one; policies read it at each decision. A policy that
    does so says it with a class attribute `uses_cost_model = True`, and the engine measures the device for it.
    """

    cost_model: CostModel | None = None
    predictor: LengthPredictor = dataclasses.field(default_factory=LengthPredictor)
    seed: int = 0

    @property
    def rho_s(self) -> float:
        """Seconds per hidden token and iteration against KV; 0 as long as nothing is known."""
        return 0.0 if self.cost_model is None else self.cost_model.rho_s


class Policy(Protocol):
    """Decides each iteration. It reads the state and never changes it; `now` is in seconds."""

    def schedule(self, state: SchedulerState, now: float) -> Plan:
        """The next iteration. Every step must advance some request if one is unfinished and can run."""
        ...

    def finished(self, request: Request, now: float) -> None:
        """Told once of every request that ends, for policies that learn."""
        ...


_POLICIES: dict[str, Callable[..., Policy]] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: make a policy available as `--scheduling-policy NAME`.

    The class is called with a `PolicyContext` and, if it has a dataclass `Options`, an instance of that.
    """

    def add(policy: type) -> type:
        _POLICIES[name] = policy
        return policy

    return add


def policy_names() -> list[str]:
    """Names that `make_policy` takes."""
    _load()
    return sorted(_POLICIES)


def make_policy(name: str, context: PolicyContext | None = None) -> Policy:
    """A fresh policy by name, e.g. `make_policy("apt:fallback=constant", PolicyContext(cost_model))`.

    Args:
        name: the policy, then options as `:field=value`.
        context: what it may use besides the state.

    Raises:
        ValueError: no policy or option has that name, or a value is bad; the message lists what there is.
    """
    _load()
    base, *settings = name.split(":")
    if base not in _POLICIES:
        raise ValueError(f"unknown scheduling_policy={base!r}; known: {', '.join(policy_names())}")
    policy = _POLICIES[base]
    context = context or PolicyContext()
    options = getattr(policy, "Options", None)
    if options is None:
        if settings:
            raise ValueError(f"policy {base!r} takes no options, got {':'.join(settings)!r}")
        return policy(context)
    return policy(context, _parse_options(base, options, settings))


def _parse_options(base: str, options: type, settings: list[str]) -> Any:
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(options)}
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        key = key.replace("-", "_")
        if key not in defaults or not text:
            known = ", ".join(f"{k}={v}" for k, v in defaults.items())
            raise ValueError(f"unknown option {setting!r} of policy {base!r}; known, with defaults: {known}")
        default = defaults[key]
        try:
            if isinstance(default, bool):
                values[key] = {"true": True, "on": True, "false": False, "off": False}[text.lower()]
            else:
                values[key] = type(default)(text)
        except (KeyError, ValueError) as error:
            kind = "on or off" if isinstance(default, bool) else f"of type {type(default).__name__}"
            raise ValueError(f"option {key}={text!r} of policy {base!r} must be {kind}") from error
    return options(**values)


def _load() -> None:
    from apt_jax.scheduling.policies import edf, fcfs, mlfq, priority, random_order, sarathi, sjf  # noqa: F401
    from apt_jax.scheduling.policies.apt import policy  # noqa: F401  (each registers itself)
