"""Which tokens may come next where an output must follow a grammar: a JSON schema, a regular expression, choices, Lark.

Grammars are compiled and followed by the llguidance library, within LIMITS of time and memory: a hostile one is
refused, or ends its own request, with a reason. No jax here.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import llguidance.numpy
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_CHARS = 400_000  # of a schema, expression, grammar, or of all choices
MOST_KEPT, MOST_KEPT_CHARS = 64, 2_000_000  # compiled grammars, those used last
# Of what the library allows by itself: the third of a second that an ambiguous grammar may take for a token would be
# other requests' time too, and 250,000 states of 1 to 2 kB each are half a gigabyte of one request.
LIMITS = LLParserLimits(max_items_in_row=500, step_max_items=20_000, max_lexer_states=50_000)
MOST_REFS = 16  # within each other, that are followed for it
MOST_MULTIPLE = 100_000  # product of the multipleOf that one number has to meet: the library multiplies them out
NOTHING_MEETS_IT = "no text meets it"
_ANY_OBJECT = {"type": "object"}
_WHITE_SPACE = r"[ ]?|\n[ ]{0,40}"  # between the parts of JSON: without a bound some models write nothing else


class Matcher:
    """The state of one output in its grammar."""

    def __init__(self, matcher: LLMatcher, num_words: int):
        self._matcher = matcher
        self._words = np.zeros((1, num_words), np.int32)

    def allow(self, words: np.ndarray) -> str | None:
        """Set the bits of the tokens that may come next, and clear all others; an error if none can be found.

        Args:
            words: int32 `[W]`, token t is bit t % 32 of word t // 32; W is the model's, the tokenizer may have others.
        """
        words[:] = 0
        llguidance.numpy.fill_next_token_bitmask(self._matcher, self._words)  # without Python's lock
        count = min(len(words), self._words.shape[1])
        words[:count] = self._words[0, :count]
        return self._error() or (None if words.any() else "no token can follow")

    def accept(self, token_id: int) -> str | None:
        """Take in the next token; an error if it may not follow."""
        if self._matcher.consume_token(token_id):
            return None
        return self._error() or f"token {token_id} may not follow"

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow but the end."""
        return self._matcher.is_stopped()

    def _error(self) -> str | None:
        error = self._matcher.get_error()
        if not error:
            return None
        reason = error.strip().splitlines()[0]
        return NOTHING_MEETS_IT if reason == "NoExtensionBias" else reason


class Grammars:
    """Compiles grammars for one tokenizer. Thread-safe.

    Args:
        tokenizer: a `tokenizers.Tokenizer` as JSON.
        eos_token_id: what ends an output that could go on.
    """

    def __init__(self, tokenizer: str, eos_token_id: int | None):
        if eos_token_id is None:
            raise ValueError("structured outputs need an end-of-sequence token, and this tokenizer has none")
        self._tokenizer = LLTokenizer(tokenizer, eos_token=eos_token_id)
        self._num_words = -(-self._tokenizer.vocab_size // 32)
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, asked: Mapping[str, Any]) -> Matcher:
        """A new matcher at the beginning of what `SamplingParams.structured_outputs` asks for.

        Raises:
            ValueError: it cannot be compiled, or is over the limits; one sentence with the library's reason.
        """
        key = json.dumps(asked, sort_keys=True)
        if len(key) > MAX_CHARS:
            raise ValueError(f"structured_outputs has {len(key)} characters, at most {MAX_CHARS} are allowed")
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
        if kept is None:
            kept = self._compile(asked)
            with self._lock:
                self._kept[key] = kept
                while len(self._kept) > MOST_KEPT or sum(map(len, self._kept)) > MOST_KEPT_CHARS:
                    self._kept.popitem(last=False)
        return Matcher(kept.deep_copy(), self._num_words)

    def _compile(self, asked: Mapping[str, Any]) -> LLMatcher:
        ((kind, value),) = asked.items()
        refusal = f"structured_outputs {kind} cannot be compiled"
        try:
            matcher = LLMatcher(self._tokenizer, _grammar(kind, value), log_level=0, limits=LIMITS)
        except Exception as error:  # of the library, which raises nothing narrower
            raise ValueError(f"{refusal}: {_one_line(str(error))}") from error
        if matcher.is_error():
            raise ValueError(f"{refusal}: {_one_line(matcher.get_error())}")
        reason = Matcher(matcher.deep_copy(), self._num_words).allow(np.zeros(self._num_words, np.int32))
        if reason is not None:
            raise ValueError(f"structured_outputs {kind} cannot be followed from its first token on: {reason}")
        return matcher


def _grammar(kind: str, value: Any) -> str:
    """Text in llguidance's own form.

    Raises:
        ValueError: what it takes to compile it has no bound.
    """
    if kind == "json":
        schema = json.loads(value) if isinstance(value, str) else value
        _check_multiples(schema, schema)
        return _json_grammar(json.dumps(schema))
    if kind == "grammar" and "multipleOf" in value:
        raise ValueError("multipleOf within a grammar is not served; use a JSON schema")
    if kind == "json_object":
        return _json_grammar(json.dumps(_ANY_OBJECT))
    if kind == "regex":
        return LLMatcher.grammar_from_regex(value)
    if kind == "choice":
        # one lexeme, which is found in a hundredth of the time of a rule with as many alternatives
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, value)))
    return llguidance.grammar_from("grammar", value)


def _check_multiples(node: Any, root: Any) -> None:
    """Raises ValueError if one number of the schema would have to meet too many multipleOf at a time."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            waiting += node.values()
            if any(key in node for key in ("multipleOf", "allOf", "anyOf", "oneOf", "$ref")):
                product = _multiples(node, root, frozenset())
                if product > MOST_MULTIPLE:
                    raise ValueError(
                        f"the multipleOf of one number have a product of {product:.6g}, at most {MOST_MULTIPLE} is "
                        "allowed; leave some out"
                    )


def _multiples(node: Any, root: Any, within: frozenset[str]) -> float:
    """The product of all multipleOf that a value of `node` may have to meet; those of its parts are others' values."""
    if not isinstance(node, dict):
        return 1.0
    product, own = 1.0, node.get("multipleOf")
    if isinstance(own, int | float) and not isinstance(own, bool) and own:
        numerator, denominator = Decimal(repr(own)).copy_abs().as_integer_ratio()
        product = float(min(max(numerator * denominator, 1), 10**30))
    for key in ("allOf", "anyOf", "oneOf"):
        parts = node.get(key)
        for part in parts if isinstance(parts, list) else ():
            product = min(product * _multiples(part, root, within), 1e30)
    name = node.get("$ref")
    if isinstance(name, str) and name.startswith("#") and name not in within and len(within) < MOST_REFS:
        target = root
        for step in name[1:].strip("/").split("/") if name.strip("#/") else ():
            step = step.replace("~1", "/").replace("~0", "~")
            target = target.get(step) if isinstance(target, dict) else None
        product = min(product * _multiples(target, root, within | {name}), 1e30)
    return product


def _json_grammar(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITE_SPACE})


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.strip().splitlines() if line.strip())[:500]
