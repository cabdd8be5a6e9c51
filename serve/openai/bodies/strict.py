"""The base of all bodies, checked strictly up to the first fault, which one sentence tells."""

import difflib
from collections.abc import Mapping, Sized
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, ValidationError, model_validator
from pydantic_core import CoreSchema

from apt_jax.serve.errors import BadRequest
from apt_jax.serve.json_text import SHOWN_VALUE_CHARS, shown
from apt_jax.serve.openai.bodies.neutral_fields import ALL, Fields, Neutral, refused, without_neutral

if TYPE_CHECKING:
    from apt_jax.tokenization.tokenizer import Tokenizer

HOLDERS = ("slo", "stream_options", "messages", "structured_outputs", "response_format")  # whose members are named too
MAX_OBJECT_FIELDS = 256  # known and unknown
TEXT, LIST = FORMS = "a text", "a list"  # of a field that may be either, which no path of a field names


def check_length(value: Sized, name: str, limit: int) -> None:
    """Raises ValueError if `value` has more than `limit` entries: told before any of them is checked."""
    if len(value) > limit:
        raise ValueError(f"{name} has {len(value)} entries, at most {limit} are allowed")


def at_most(limit: int, name: str) -> BeforeValidator:
    """A limit on the length of the list or object in field `name`."""

    def check(value: object) -> object:
        if isinstance(value, list | dict):
            check_length(value, name, limit)
        return value

    return BeforeValidator(check)


class Strict(BaseModel):
    """Base of all bodies: no unknown fields, no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    NEUTRAL: ClassVar[Fields] = {}  # fields that are not served

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, value: Any) -> Any:
        """Drop what changes nothing. Of unknown fields every one would become an error object: only few may come."""
        if not isinstance(value, dict):
            return value
        check_length(value, "an object", MAX_OBJECT_FIELDS)
        return without_neutral(value, cls.NEUTRAL) if value.keys() & cls.NEUTRAL.keys() else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """The fields, then those that may come with values that change nothing."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema.get("properties", {}).update({name: field.schema() for name, field in cls.NEUTRAL.items()})
        return schema


def parse_body[Body: BaseModel](value: object, model: type[Body]) -> Body:
    """Check a parsed body against its model.

    Raises:
        BadRequest: one sentence that names the field, and its value where that helps.
    """
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {shown(value)}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise first_fault(error, model) from error


def not_served(name: str, model: type[BaseModel]) -> Neutral | None:
    """The field called `name`, of `model` or of an object in it, if it is one of those that are not served."""
    own = model.NEUTRAL if issubclass(model, Strict) else {}
    return next((fields[name] for fields in (own, *ALL) if name in fields), None)


def first_fault(error: ValidationError, model: type[BaseModel]) -> BadRequest:
    """What pydantic found first, in one sentence; unknown fields come with the nearest field of `model`."""
    fault = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"] if part not in FORMS]
    name = ".".join(path[:2] if path and path[0] in HOLDERS else path[:1])
    match fault["type"]:
        case "extra_forbidden" if (field := not_served(path[-1], model)) is not None:
            return BadRequest(refused(path[-1], field), name)
        case "extra_forbidden":
            known = path[-1] if len(path[-1]) <= SHOWN_VALUE_CHARS else ""
            near = difflib.get_close_matches(known, _holder(model, path).model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return BadRequest(f"unknown field {shown('.'.join(path))}{hint}", name[:SHOWN_VALUE_CHARS])
        case "missing":
            return BadRequest(f"field {name} is missing", name)
        case "value_error":
            return BadRequest(str(fault["ctx"]["error"]), name)
        case "model_type":
            return BadRequest(f"{name}={shown(fault['input'])}: input should be a JSON object", name)
    return BadRequest(f"{name}={shown(fault['input'])}: {_lower_first(fault['msg'])}", name)


def _holder(model: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The model of the object that holds the last field of `path`; `model` if that is in none of its own."""
    for part in path[:-1]:
        field = model.model_fields.get(part)
        kinds = () if field is None else (field.annotation, *get_args(field.annotation))
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)
    return model


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def check_grammar(asked: Mapping[str, Any], tokenizer: "Tokenizer | None") -> None:
    """Compile structured outputs, for the engine to find; raises BadRequest if that is impossible."""
    name = "structured_outputs"
    if tokenizer is None:
        raise BadRequest("structured outputs need a tokenizer, and this model has none; leave them out", name)
    try:
        tokenizer.grammars.check(asked)
    except ValueError as error:
        raise BadRequest(str(error), name) from error
