"""Flags from a YAML file and from the environment, as arguments: a flag that is given twice has the nearer source's.

The command line is nearer than the environment, and that than the file.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from tyro.conf import Positional

from apt_jax.files import read_text

PREFIX = "APT_JAX_"
MODEL = "model"  # a positional argument
POSITIONAL = get_args(Positional[int])[1]
OF_CLUSTERS = "tcp://"  # Kubernetes sets APT_JAX_PORT=tcp://... for a service called apt-jax


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag, or the model: on or off by its name alone, or by a value, or one that each value gets a flag of."""

    is_switch: bool = False
    is_tristate: bool = False
    may_repeat: bool = False
    is_word: bool = False  # the model, where it stands without a flag


def flags_of(kind: type) -> dict[str, Flag]:
    """Those of a command, by name with underscores; positional arguments but the model are none."""
    found: dict[str, Flag] = {}
    hints, marked = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if field.name == "config":
            continue
        group = field.default_factory
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            found |= flags_of(group)
            continue
        hint, is_word = hints[field.name], POSITIONAL in getattr(marked[field.name], "__metadata__", ())
        if field.name == MODEL or not is_word:
            is_tuple = getattr(hint, "__origin__", None) is tuple
            found[field.name] = Flag(hint is bool, bool in get_args(hint), is_tuple, is_word)
    return found


def with_sources(
    arguments: Sequence[str],
    kind: type,
    environment: Mapping[str, str],
    spelling: Callable[[str], str] = lambda name: name,
) -> list[str]:
    """The arguments, with what `--config FILE` and the environment say of other flags of the command.

    Args:
        spelling: the own name, with hyphens, of a flag in another spelling.

    Raises:
        ValueError: --config without a file, a file that is none, a key that is no flag, or a value that a flag cannot
            have.
        OSError: the file cannot be read.
    """
    flags = flags_of(kind)
    own, file = _without_config(arguments)
    file = file or environment.get(f"{PREFIX}CONFIG")
    given = _given(own, flags)
    found = {} if file is None else _of_file(Path(file), flags, spelling)
    found |= _of_environment(environment, flags)
    more: list[str] = []
    for name, value in found.items():
        if name in given:
            continue
        if flags[name].is_word:
            own = [str(value), *own]
        else:
            more += _arguments(name, value, flags[name])
    return [*more, *own]


def _of_environment(environment: Mapping[str, str], flags: Mapping[str, Flag]) -> dict[str, str]:
    """What is set for flags; APT_JAX_API_KEY adds a key and is the server's to read."""
    named = {name: environment.get(PREFIX + name.upper()) for name in flags if name != "api_key"}
    return {name: text for name, text in named.items() if text is not None and not text.startswith(OF_CLUSTERS)}


def _without_config(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    own, file = [], None
    left = iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name != "--config":
            own.append(argument)
            continue
        file = value if equals else next(left, "")
        if not file:
            raise ValueError("--config needs a YAML file")
    return own, file


def _given(arguments: Sequence[str], flags: Mapping[str, Flag]) -> set[str]:
    """Names of flags among the arguments; the model where a word stands that is no flag's value."""
    found: set[str] = set()
    takes_value = False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, _ = argument[2:].replace("-", "_").partition("=")
            base = name.removeprefix("no_")
            is_switch = flags[name].is_switch if name in flags else base in flags and flags[base].is_switch
            found.add(name if name in flags else base)
            takes_value = not (equals or is_switch)
        elif argument.startswith("-") and len(argument) > 1:
            takes_value = True
        else:
            if not takes_value and MODEL in flags and flags[MODEL].is_word:
                found.add(MODEL)
            takes_value = False
    return found


def _of_file(file: Path, flags: Mapping[str, Flag], spelling: Callable[[str], str]) -> dict[str, Any]:
    try:
        read = yaml.safe_load(read_text(file, pipe=True))
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {file} is not YAML: {reason}") from error
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise ValueError(f"--config {file} must hold flags as NAME: VALUE, not a {type(read).__name__}")
    found = {}
    for key, value in read.items():
        name = spelling(f"--{str(key).replace('_', '-')}").removeprefix("--").replace("-", "_")
        if name not in flags:
            near = difflib.get_close_matches(name, flags, n=1)
            hint = f"; did you mean {near[0].replace('_', '-')}?" if near else ""
            raise ValueError(f"--config {file} has {str(key)[:80]!r}, which is no flag of this command{hint}")
        if isinstance(value, dict) or (isinstance(value, list) and not flags[name].may_repeat):
            raise ValueError(f"--config {file}: {key} must be one value, not a {type(value).__name__}")
        found[name] = value
    return found


def _arguments(name: str, value: Any, flag: Flag) -> list[str]:
    spelled = name.replace("_", "-")
    if flag.is_switch:
        text = str(value).lower()
        if text not in ("true", "false", "1", "0", "yes", "no"):
            raise ValueError(f"{name}={str(value)[:80]!r} must be true or false")
        return [f"--{'' if text in ('true', '1', 'yes') else 'no-'}{spelled}"]
    if flag.is_tristate:
        value = str(value).capitalize()
    values = value if isinstance(value, list) else [value]
    return [f"--{spelled}={each}" for each in values]
