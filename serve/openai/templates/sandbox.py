"""Jinja's sandbox for chat templates, with bounds on the work and the text that one rendering may cost.

A template is a program from a model's folder, and messages from a client are its input. The sandbox keeps it from
files and from Python's internals, not from loops over loops of messages or from 'x' * 10**9. Here every round of a
loop, call and filter is a step of a budget, and whatever makes text or lists larger is checked before it does.
Options, filters and functions are those that transformers offers to templates, so that they give the same text.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import TemplateError, TemplateRuntimeError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_STEPS = 200_000  # several tens for each of the most messages that are taken
MAX_CHARS = 8 * 2**20  # of any text, and entries of any list; twice the largest body
CHARS_PER_STEP = 1024  # of text that a filter or method reads
STEPS_PER_CALL = 5
MAX_EXPONENT = 1024

_WIDTHS = frozenset(["center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice"])
_WIDE_FORMAT = re.compile(r"%[-#0 +.\d]*(\d{5}|\*)|\{[^{}]*:[^{}]*(\d{5}|\{)")


class TemplateTooCostly(TemplateRuntimeError):
    """A rendering takes too many steps or makes too long a text."""


class _Budget:
    def __init__(self) -> None:
        self._steps = MAX_STEPS

    def spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise TemplateTooCostly(
                f"it takes more than {MAX_STEPS} steps (rounds of loops, calls, filters); send fewer messages"
            )


_budget: ContextVar[_Budget] = ContextVar("budget")


def render_template(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """The text that `template` makes of messages.

    Raises:
        TemplateError: it is not a template, refuses the messages, or is too costly.
        Exception: whatever its expressions raise.
    """
    token = _budget.set(_Budget())
    try:
        pieces, size = [], 0
        for piece in _compiled(template).generate(messages=messages, tools=None, documents=None, **variables):
            pieces.append(piece)
            size += len(piece)
            _check_size(size)
        return "".join(pieces)
    finally:
        _budget.reset(token)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return BoundedEnvironment().from_string(template)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one template."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters = {name: _charged(name, filter) for name, filter in self.filters.items()}
        self.filters |= {"apt rounds": _rounds, "apt concat": _concat}  # names that no template can write
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
            "dict": _Dict(),
            "namespace": _Namespace,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The syntax tree, with loops that count their rounds and `~` that counts characters."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "apt rounds", [], [], None, None, lineno=loop.lineno)
        _replace_concat(tree)
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """+, *, ** and %, which can make much of little."""
        if operator == "**":
            if abs(right) > MAX_EXPONENT or (isinstance(left, int) and left.bit_length() > MAX_EXPONENT):
                raise TemplateTooCostly(f"an exponent or base is larger than {MAX_EXPONENT} bits")
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    _check_size(len(one) * other)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, Sized):
            _check_size(len(left) + len(right))
            _spend(_steps_of(left) + _steps_of(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function, method or macro."""
        if isinstance(__obj, LoopContext) and args:  # a recursive loop
            args = (_rounds(__context, args[0]), *args[1:])
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | list | tuple | dict):
            _check_call(name, owner, args, kwargs)
            if name in ("format", "format_map"):
                _check_format(str(owner))
        _spend(STEPS_PER_CALL)
        return super().call(__context, __obj, *args, **kwargs)


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks the assistant's text for training and changes nothing here."""

    tags = {"generation"}  # noqa: RUF012 -- as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """`dict`, without a way to its class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`, without a way to Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        for name in dict(*given, **kwargs):
            _check_name(name)
        Namespace.__init__(self, *given, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise TemplateRuntimeError(f"a namespace cannot have the attribute {name!r}; leave out the first _")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@pass_context  # so that it is not run when the template is compiled
def _rounds(context: Context, iterable: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, each a step."""
    budget = _budget.get(None) or _Budget()
    for item in iterable:
        budget.spend(1)
        yield item


def _concat(parts: list[Any]) -> str:
    """The operator `~`."""
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    _spend(sum(map(_steps_of, texts)))
    return "".join(texts)


def _replace_concat(node: nodes.Node) -> None:
    """Every `~` under `node` becomes a filter over the list of its operands."""
    for field, value in node.iter_fields():
        inner = value if isinstance(value, list) else [value]
        for child in inner:
            if isinstance(child, nodes.Node):
                _replace_concat(child)
        found = [_of_concat(child) if isinstance(child, nodes.Concat) else child for child in inner]
        setattr(node, field, found if isinstance(value, list) else found[0])


def _of_concat(node: nodes.Concat) -> nodes.Filter:
    operands = nodes.List(node.nodes, lineno=node.lineno)
    return nodes.Filter(operands, "apt concat", [], [], None, None, lineno=node.lineno)


def _charged[F: Callable[..., Any]](name: str, filter: F) -> F:
    """`filter`, which counts what it reads and checks how much it may make."""
    takes_context = hasattr(filter, "jinja_pass_arg")

    @functools.wraps(filter)
    def run(*args: Any, **kwargs: Any) -> Any:
        before, (value, *others) = args[:takes_context], args[takes_context:]
        if name == "join":
            value = list(value)
            _check_size(_chars(value))
        _check_call(name, value, others, kwargs)
        return filter(*before, value, *others, **kwargs)

    return run  # type: ignore[return-value]


def _check_call(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Before a filter or method `name` of `value` runs: its steps, and the size of what it can make."""
    _spend(_steps_of(value))
    size = len(value) if isinstance(value, Sized) else 0
    lines = value.count("\n") + 1 if isinstance(value, str) else 1
    for given in (*args, *kwargs.values()):
        if isinstance(given, int) and name in _WIDTHS:
            _check_size(abs(given) * lines)
        elif isinstance(given, str) and name == "replace":
            old = max(len(args[0]), 1) if args and isinstance(args[0], str) else 1
            _check_size((size // old + 1) * len(given))
        elif isinstance(given, Sized) and name == "join":
            _check_size(max(size, 1) * max(len(given), 1) + _chars(given) + _chars(value))
    if name == "format" and isinstance(value, str):
        _check_format(value)


def _chars(parts: Any) -> int:
    """Characters of the texts in a list."""
    return sum(len(part) for part in parts if isinstance(part, str)) if isinstance(parts, list | tuple) else 0


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise TemplateTooCostly("a format has a width of more than four digits, or one that is computed")


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise TemplateTooCostly(f"it makes a text or list of more than {MAX_CHARS} entries; send shorter messages")


def _steps_of(value: Any) -> int:
    if isinstance(value, str):
        return 1 + len(value) // CHARS_PER_STEP
    return 1 + (len(value) if isinstance(value, Sized) else 0)


def _spend(steps: int) -> None:
    budget = _budget.get(None)
    if budget is not None:
        budget.spend(steps)
