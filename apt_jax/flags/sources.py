"""Flags from a YAML file and from the environment, as arguments: a flag that is given twice has the nearer source's.

The command line is nearer than the environment, and that than the file.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args, get_type_hints

import yaml
from tyro.conf import Positional

from apt_jax.files import read_text

PREFIX = "APT_JAX_"
MODEL = "model"  # a positional argument
POSITIONAL = get_args(Positional[int])[1]
OF_CLUSTERS = "tcp://"  # Kubernetes sets APT_JAX_PORT=tcp://... for a service called apt-jax


OF_SERVICES = re.compile(r"(.*_)?(service_(host|port.*)|port(_\d+_.*)?)")


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
    own_flag: Callable[[str, Any], tuple[str, Any]] = lambda flag, value: (flag, value),
) -> list[str]:
    """The arguments, with what `--config FILE` and the environment say of other flags of the command.

    Args:
        own_flag: a flag of another spelling, with hyphens, and its value, as this command has them.

    Returns:
        Arguments, those of the two sources as `Sourced`.

    Raises:
        ValueError: --config without a file, a file that is none, a key that is no flag, or a value that a flag cannot
            have.
        OSError: the file cannot be read.
    """
    flags = flags_of(kind)
    own, file = _without_config(arguments)
    file = file or environment.get(f"{PREFIX}CONFIG")
    given = _given(own, flags)
    found = {}
    if file is not None:
        found = {name: (value, f"--config {file}") for name, value in _of_file(Path(file), flags, own_flag).items()}
    for name, text in _of_environment(environment, flags).items():
        found[name] = text, f"{PREFIX}{name.upper()} of the environment"
    more: list[str] = []
    for name, (value, source) in found.items():
        if name in given:
            continue
        try:
            texts = [str(value)] if flags[name].is_word else _arguments(name, value, flags[name])
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        if flags[name].is_word:
            own = [Sourced(texts[0], source), *own]
        else:
            more += [Sourced(text, source) for text in texts]
    return [*more, *own]


class Sourced(str):
    """An argument that is from a file or variable."""

    source: str

    def __new__(cls, text: str, source: str) -> Self:
        """`source` for a sentence."""
        made = super().__new__(cls, text)
        made.source = source
        return made


def unknown_variables(environment: Mapping[str, str], known: Collection[str]) -> list[str]:
    """A sentence for each variable that is no flag's and nearly has the name of one that is.

    Others may be somebody else's, such as those that Kubernetes sets for a service called apt-jax.
    """
    found = []
    for variable in sorted(environment):
        name = variable.removeprefix(PREFIX).lower()
        if variable.startswith(PREFIX) and name not in known and not OF_SERVICES.fullmatch(name):
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
            if near:
                found.append(f"{variable} is no flag's and is ignored; did you mean {PREFIX}{near[0].upper()}?")
    return found


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML's reader would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; raises ValueError for a key that comes twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1} has {key.value[:80]!r} for the second time")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


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


def _of_file(file: Path, flags: Mapping[str, Flag], own_flag: Callable[[str, Any], tuple[str, Any]]) -> dict[str, Any]:
    try:
        read = yaml.load(read_text(file, pipe=True), _UniqueKeys)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        if "for the second time" in reason:
            raise ValueError(f"--config {file}: {reason}; leave one out") from error
        raise ValueError(f"--config {file} is not YAML: {reason}") from error
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise ValueError(f"--config {file} must hold flags as NAME: VALUE, not a {type(read).__name__}")
    found = {}
    for key, value in read.items():
        flag, value = own_flag(f"--{str(key).replace('_', '-')}", value)
        name = flag.removeprefix("--").replace("-", "_")
        if name in found:
            raise ValueError(f"--config {file}: {str(key)[:80]!r} is {name} for the second time; leave one out")
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
