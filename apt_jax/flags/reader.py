"""From arguments to a dataclass of flags: help that reads as text, and one sentence for a bad value."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Sequence
from types import MappingProxyType, NoneType
from typing import Any, get_args

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

KINDS: dict[type, tuple[str, str]] = {int: ("INT", "a whole number"), float: ("FLOAT", "a number")}
SHOWN_CHARS = 80

registry = ConstructorRegistry()


def parse[Command](kind: type[Command], prog: str, arguments: Sequence[str] | None = None) -> Command:
    """The flags of `kind`; `arguments` None are the process's. Exits with 2 after a sentence about a bad one."""
    _spell_out(kind)
    return tyro.cli(kind, prog=prog, args=arguments, registry=registry)


@registry.primitive_rule
def number_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """How tyro reads whole and other numbers, optional ones too; its own sentences are Python's."""
    members = [member for member in get_args(info.type) or (info.type,) if member is not NoneType]
    if len(members) != 1 or members[0] not in KINDS:
        return None
    number, is_optional = members[0], NoneType in get_args(info.type)
    metavar, what = KINDS[number]
    return PrimitiveConstructorSpec(
        nargs=1, metavar=metavar, instance_from_str=_reader(number, what, is_optional),
        is_instance=lambda value: isinstance(value, number) or (is_optional and value is None),
        str_from_instance=lambda value: [str(value)],
    )  # fmt: skip


def _reader(number: type, what: str, is_optional: bool) -> Callable[[list[str]], Any]:
    def read(texts: list[str]) -> Any:
        if is_optional and texts[0] == "None":
            return None
        try:
            return number(texts[0])
        except ValueError as error:
            raise ValueError(f"{texts[0][:SHOWN_CHARS]!r} is not {what}") from error

    return read


def _spell_out(kind: type) -> None:
    """Give tyro the docstring of each field as one paragraph: by itself it breaks them where their lines end."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _field_docs(base)
    for field in dataclasses.fields(kind):
        if field.name in docs:
            field.metadata = MappingProxyType({**field.metadata, "help": docs[field.name]})
        if dataclasses.is_dataclass(group := field.default_factory):
            _spell_out(group)


def _field_docs(kind: type) -> dict[str, str]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for field, doc in zip(node.body, node.body[1:], strict=False):
        match field, doc:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                docs[name] = " ".join(text.split())
    return docs
