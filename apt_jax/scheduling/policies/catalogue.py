"""The table of policies by name, and the parser of their options.

To add one: copy a short policy file such as `priority.py`, change its decision, and add a row to `POLICIES`.
`--scheduling-policy NAME:option=value:option=value` sets fields of the policy's options. Policies of other packages
need no row: `installed_policies.py`.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from apt_jax.scheduling.abandonment import Abandoning
from apt_jax.scheduling.installed_policies import installed_names, installed_policy, policy_class
from apt_jax.scheduling.policies.apt.policy import Apt, AptPaper
from apt_jax.scheduling.policies.edf import EarliestDeadlineFirst
from apt_jax.scheduling.policies.fcfs import Fcfs
from apt_jax.scheduling.policies.interface import Policy, PolicyContext
from apt_jax.scheduling.policies.mlfq import MultiLevelFeedbackQueue
from apt_jax.scheduling.policies.papers.alise import Alise
from apt_jax.scheduling.policies.papers.fastserve import FastServe
from apt_jax.scheduling.policies.papers.fastswitch import FastSwitch
from apt_jax.scheduling.policies.papers.semi_pd import SemiPd
from apt_jax.scheduling.policies.papers.wait import NestedWait, Wait
from apt_jax.scheduling.policies.priority import Priority
from apt_jax.scheduling.policies.random_order import RandomOrder
from apt_jax.scheduling.policies.sarathi import Sarathi
from apt_jax.scheduling.policies.sjf import ShortestJobFirst
from apt_jax.scheduling.policies.vllm.v0 import VllmV0
from apt_jax.scheduling.policies.vllm.v1 import VllmV1

# Called with a `PolicyContext` and, if the class has a dataclass `Options`, an instance of that.
POLICIES: dict[str, Callable[..., Policy]] = {
    "alise": Alise,
    "apt": Apt,
    "apt-paper": AptPaper,
    "edf": EarliestDeadlineFirst,
    "fastserve": FastServe,
    "fastswitch": FastSwitch,
    "fcfs": Fcfs,
    "mlfq": MultiLevelFeedbackQueue,
    "nested-wait": NestedWait,
    "priority": Priority,
    "random": RandomOrder,
    "sarathi": Sarathi,
    "semi-pd": SemiPd,
    "sjf": ShortestJobFirst,
    "vllm-v0": VllmV0,
    "vllm-v1": VllmV1,
    "wait": Wait,
}


def policy_names() -> list[str]:
    """Names of the policies here."""
    return sorted(POLICIES)


def find_policy(name: str) -> tuple[str, Callable[..., Policy], list[str]]:
    """The policy of `NAME[:option=value...]` or `MODULE:CLASS[:option=value...]`: what it is called, and its settings.

    Names of this table go before those of installed packages.

    Raises:
        ValueError: there is no such policy, or it cannot be loaded.
    """
    base, *settings = name.split(":")
    if base in POLICIES:
        return base, POLICIES[base], settings
    if settings and "=" not in settings[0]:
        if not (base and settings[0]):
            raise ValueError(f"scheduling_policy={name!r} lacks a name; give NAME:option=value or MODULE:CLASS")
        return f"{base}:{settings[0]}", policy_class(base, settings[0]), settings[1:]
    installed = installed_policy(base)
    if installed is None:
        known = ", ".join([*policy_names(), *installed_names()])
        raise ValueError(f"unknown scheduling_policy={base!r}; known: {known}, and MODULE:CLASS of your own")
    return base, installed, settings


def make_policy(name: str, context: PolicyContext | None = None) -> Policy:
    """A fresh policy by name, e.g. `make_policy("apt:fallback=constant", PolicyContext(cost_model))`.

    Args:
        name: the policy (see `find_policy`), then options as `:field=value`.
        context: what it may use besides the state.

    Raises:
        ValueError: no policy or option has that name, or a value is bad; the message lists what there is.
    """
    base, policy, settings = find_policy(name)
    context = context or PolicyContext()
    options = getattr(policy, "Options", None)
    if options is None and settings:
        raise ValueError(f"policy {base!r} takes no options, got {':'.join(settings)!r}")
    arguments = (context,) if options is None else (context, _parse_options(base, options, settings))
    try:
        made = policy(*arguments)
    except TypeError as error:
        if base in POLICIES:
            raise
        taken = "a PolicyContext" if options is None else "a PolicyContext and its Options"
        raise ValueError(f"policy {base!r} cannot be made from {taken}: {error}") from error
    return made if context.abandon_after_s is None else Abandoning(made, context.abandon_after_s)


def _parse_options(base: str, options: type, settings: list[str]) -> Any:
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(options)}
    types = typing.get_type_hints(options)
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, text = setting.partition("=")
        key = key.replace("-", "_")
        if key not in defaults or not text:
            known = ", ".join(f"{k}={v}" for k, v in defaults.items())
            raise ValueError(f"unknown option {setting!r} of policy {base!r}; known, with defaults: {known}")
        if key in values:
            raise ValueError(f"option {key} of policy {base!r} is given twice; leave one out")
        members = typing.get_args(types[key]) or (types[key],)
        if text.lower() == "none" and type(None) in members:
            values[key] = None
            continue
        given = next(member for member in members if member is not type(None))
        given = given if isinstance(given, type) else type(given)  # a value of a Literal
        try:
            if given is bool:
                values[key] = {"true": True, "on": True, "false": False, "off": False}[text.lower()]
            else:
                values[key] = given(text)
        except (KeyError, ValueError, TypeError) as error:
            kind = "on or off" if given is bool else f"of type {given.__name__}"
            raise ValueError(f"option {key}={text!r} of policy {base!r} must be {kind}") from error
    return options(**values)
