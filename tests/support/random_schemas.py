"""Random JSON schemas whose answers are short, drawn by hypothesis."""

from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

WHOLE = st.integers(-999, 999)
VALUE = st.one_of(st.text(max_size=6), WHOLE, st.booleans(), st.none())


def _between(kind: str, low: str, high: str, lows: tuple[int, int], highs: tuple[int, int]) -> st.SearchStrategy:
    return st.fixed_dictionaries({"type": st.just(kind), low: st.integers(*lows), high: st.integers(*highs)})


LEAF = st.one_of(
    _between("string", "minLength", "maxLength", (0, 3), (3, 12)),
    _between("integer", "minimum", "maximum", (-1000, 0), (0, 10**6)),
    _between("number", "minimum", "maximum", (-9, 0), (1, 9)),
    st.sampled_from(["boolean", "null"]).map(lambda kind: {"type": kind}),
    st.sampled_from(["date", "ipv4", "uuid"]).map(lambda name: {"type": "string", "format": name}),
    st.sampled_from(["^[a-f0-9]{4}$", "^(yes|no)!?$", "^\\d{1,3}(,\\d{3}){0,2}$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.lists(VALUE, min_size=1, max_size=4, unique_by=repr).map(lambda values: {"enum": values}),
    VALUE.map(lambda value: {"const": value}),
)


def _around(inner: st.SearchStrategy) -> st.SearchStrategy:
    named = st.dictionaries(st.text('abcdefg_é"', min_size=1, max_size=6), st.tuples(inner, st.booleans()), max_size=3)
    return st.one_of(
        named.map(
            lambda found: {
                "type": "object",
                "properties": {name: schema for name, (schema, _) in found.items()},
                "required": [name for name, (_, required) in found.items() if required],
                "additionalProperties": False,
            }
        ),
        st.tuples(inner, st.integers(0, 1), st.integers(1, 3)).map(
            lambda found: {"type": "array", "items": found[0], "minItems": found[1], "maxItems": found[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda found: {"anyOf": found}),
        inner,
    )


def random_schemas(count: int) -> list[dict[str, Any]]:
    """As many schemas of at most three levels, the same ones each time."""
    found: list[dict[str, Any]] = []

    @seed(0)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(_around(_around(LEAF)))
    def draw(schema: dict[str, Any]) -> None:
        found.append(schema)

    draw()
    return found[:count]
