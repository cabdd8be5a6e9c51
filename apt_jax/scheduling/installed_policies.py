"""Scheduling policies of other packages: by entry point, or as MODULE:CLASS. No file of this project knows them."""

import importlib
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points

from apt_jax.scheduling.policies.interface import Policy

ENTRY_POINTS = "apt_jax.scheduling_policies"
METHODS = ("schedule", "finished")


def installed_names() -> list[str]:
    """Names that installed packages give to policies."""
    return sorted({point.name for point in entry_points(group=ENTRY_POINTS)})


def installed_policy(name: str) -> Callable[..., Policy] | None:
    """The policy that an installed package calls `name`; None if none does.

    Raises:
        ValueError: several packages have one of that name, or it cannot be loaded.
    """
    points = list(entry_points(group=ENTRY_POINTS, name=name))
    values = sorted({point.value for point in points})
    if not points:
        return None
    if len(values) > 1:
        raise ValueError(
            f"scheduling_policy={name!r} is given by several installed packages: {', '.join(values)}; choose one of "
            "these as MODULE:CLASS"
        )
    return _loaded(f"{name!r} of {_package(points[0])}", *values[0].partition(":")[::2])


def policy_class(module: str, name: str) -> Callable[..., Policy]:
    """The policy that a module has under `name`.

    Raises:
        ValueError: it cannot be imported, or is no policy.
    """
    return _loaded(f"'{module}:{name}'", module, name)


def _loaded(shown: str, module: str, name: str) -> Callable[..., Policy]:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"scheduling_policy {shown}: {error}; install the package that has it, or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:
        raise ValueError(
            f"scheduling_policy {shown}: importing {module} failed: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            classes = sorted(key for key, value in vars(found).items() if _is_policy(value))
            raise ValueError(
                f"scheduling_policy {shown}: {module} has no {name!r}; policies in it: {', '.join(classes) or 'none'}"
            )
        found = getattr(found, part)
    if not _is_policy(found):
        raise ValueError(
            f"scheduling_policy {shown} is no policy: it must be a class with the methods {' and '.join(METHODS)}, see "
            "docs/scheduling"
        )
    policy: Callable[..., Policy] = found  # type: ignore[assignment]
    return policy


def _is_policy(value: object) -> bool:
    return isinstance(value, type) and all(callable(getattr(value, method, None)) for method in METHODS)


def _package(point: EntryPoint) -> str:
    return "an installed package" if point.dist is None else f"the package {point.dist.name}"
