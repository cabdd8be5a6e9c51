"""The table of policies by name, and the parser of their options.

To add one: copy a short policy file such as `priority.py`, change its decision, and add a row to `POLICIES`.
`--scheduling-policy NAME:option=value:option=value` sets fields of the policy's options.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from apt_jax.scheduling.abandonment import Abandoning
from apt_jax.scheduling.policies.apt.policy import Apt, AptPaper
from apt_jax.scheduling.policies.edf import EarliestDeadlineFirst
from apt_jax.scheduling.policies.fcfs import Fcfs
from apt_jax.scheduling.policies.interface import Policy, PolicyContext
from apt_jax.scheduling.policies.mlfq import MultiLevelFeedbackQueue
from apt_jax.scheduling.policies.priority import Priority
from apt_jax.scheduling.policies.random_order import RandomOrder
from apt_jax.scheduling.policies.sarathi import Sarathi
from apt_jax.scheduling.policies.sjf import ShortestJobFirst
from apt_jax.scheduling.policies.vllm.v0 import VllmV0
from apt_jax.scheduling.policies.vllm.v1 import VllmV1

# Called with a `PolicyContext` and, if the class has a dataclass `Options`, an instance of that.
POLICIES: dict[str, Callable[..., Policy]] = {
    "apt": Apt,
    "apt-paper": AptPaper,
    "edf": EarliestDeadlineFirst,
    "fcfs": Fcfs,
    "mlfq": MultiLevelFeedbackQueue,
    "priority": Priority,
    "random": RandomOrder,
    "sarathi": Sarathi,
    "sjf": ShortestJobFirst,
    "vllm-v0": VllmV0,
    "vllm-v1": VllmV1,
}


def policy_names() -> list[str]:
    """Names that `make_policy` takes."""
    return sorted(POLICIES)


def make_policy(name: str, context: PolicyContext | None = None) -> Policy:
    """A fresh policy by name, e.g. `make_policy("apt:fallback=constant", PolicyContext(cost_model))`.

    Args:
        name: the policy, then options as `:field=value`.
        context: what it may use besides the state.

    Raises:
        ValueError: no policy or option has that name, or a value is bad; the message lists what there is.
    """
    base, *settings = name.split(":")
    if base not in POLICIES:
        raise ValueError(f"unknown scheduling_policy={base!r}; known: {', '.join(policy_names())}")
    policy = POLICIES[base]
    context = context or PolicyContext()
    options = getattr(policy, "Options", None)
    if options is None and settings:
        raise ValueError(f"policy {base!r} takes no options, got {':'.join(settings)!r}")
    made = policy(context) if options is None else policy(context, _parse_options(base, options, settings))
    return made if context.abandon_after_s is None else Abandoning(made, context.abandon_after_s)


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
