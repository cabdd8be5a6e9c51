"""How a request's tokens are chosen: `SamplingParams`, in vLLM's names and meanings."""

import copy
import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from apt_jax.sampling.structured import check_structured

MAX_LOGIT_BIAS = 300  # OpenAI's limit
MAX_STOP_TOKEN_IDS = 64
MAX_BAD_WORDS = 256
MAX_LOGPROBS = 20
MAX_SAMPLES = 128


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, in vLLM's names and meanings. Immutable; checked when made.

    Attributes:
        n: samples per prompt.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the most likely tokens whose probabilities sum to top_p.
        min_p: drop tokens less likely than min_p times the most likely one.
        repetition_penalty: divides (multiplies, if negative) logits of tokens in prompt or output; 1 is off.
        presence_penalty: subtracted from logits of tokens in the output.
        frequency_penalty: subtracted once per occurrence in the output.
        logit_bias: token id -> value added to its logit, at most 300 entries.
        seed: same seed, same tokens, whatever else runs (of one cache kind); None draws one per request.
        max_tokens: maximum number of tokens to generate; None: up to the context length; 0, with prompt_logprobs:
            only score the prompt, which may fill the context.
        min_tokens: no end-of-sequence or stop token id before this many.
        stop: strings that end the text (left out of it unless include_stop_str_in_output).
        stop_token_ids: token ids that end the output; at most 64.
        allowed_token_ids: only these may be sampled, the end-of-sequence token too only if it is one of them.
        bad_words: texts of which no output has all tokens in a row, with or without a space in front; at most 256.
        ignore_eos: continue past the end-of-sequence token.
        logprobs: report the chosen token's log-probability and those of this many most likely tokens (0 to 20).
        prompt_logprobs: the same for every token of the prompt but its first.
        structured_outputs: what the output must follow: {"json": SCHEMA}, {"json_object": True}, {"regex": TEXT},
            {"choice": [TEXT, ...]} or {"grammar": TEXT} (Lark or GBNF).
        skip_special_tokens: leave special tokens such as </s> out of the text.
        truncate_prompt_tokens: keep the last so many tokens of a prompt; -1: as many as fit beside the answer. From
            Python; over HTTP it is a field of the body.

    Raises:
        ValueError: one sentence with the value and the limit.
    """

    pools: ClassVar[bool] = False  # whether the hidden state after the prompt is what is wanted

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] | str | None = ()
    stop_token_ids: Sequence[int] | None = ()
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: Mapping[str, Any] | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            given = getattr(self, name)
            if given is None and name == "allowed_token_ids":
                continue
            if isinstance(given, str | bytes | Mapping) or not (given is None or isinstance(given, Iterable)):
                raise ValueError(f"{name}={repr(given)[:80]} must be a list")
            object.__setattr__(self, name, tuple(given or ()))
        for name in SWITCHES:
            if type(given := getattr(self, name)).__name__ not in ("bool", "bool_"):  # numpy's too
                raise ValueError(f"{name}={repr(given)[:80]} must be True or False")
        object.__setattr__(self, "logit_bias", _by_token_id(self.logit_bias or {}))
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if name == "max_tokens" and value == 0 and (self.prompt_logprobs is not None or self.pools):
                continue
            whole = isinstance(low, int)
            if not _is_number(value, whole):
                raise ValueError(f"{name}={value!r} must be {'a whole' if whole else 'a'} number")
            if not low <= value <= high:
                limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name}={value} must be {limits}")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens=0 must be at least 1, or -1 for what fits")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if not self.top_p > 0:
            raise ValueError(f"top_p={self.top_p} must be greater than 0 and at most 1")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        for name, limit in LIMITS:
            if len(getattr(self, name)) > limit:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, at most {limit} are allowed")
        for token_id, bias in self.logit_bias.items():  # type: ignore[union-attr]
            if not _is_number(bias, whole=False) or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token_id} is {bias}, must be between -100 and 100")
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids is empty, so that nothing could be sampled; give at least one token id")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token_id in getattr(self, name) or ():
                if not _is_number(token_id, whole=True):
                    raise ValueError(f"{name} has {token_id!r}, every one must be a token id")
        if self.structured_outputs is not None:
            check_structured(self.structured_outputs)
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str):
                    raise ValueError(f"{name} has {text!r}, every one must be a string")
                if not text.strip() if name == "bad_words" else not text:
                    raise ValueError(f"{name} has an empty string, every one needs at least one character")
        named = (*self.logit_bias, *self.stop_token_ids, *(self.allowed_token_ids or ()))  # type: ignore[misc]
        if named and min(named) < 0:
            name = next(name for name in _TOKEN_IDS if min(getattr(self, name) or (0,)) < 0)
            raise ValueError(f"{name} has token id {min(getattr(self, name))}, every one must be at least 0")
        object.__setattr__(self, "_named_ids", (min(named), max(named)) if named else None)

    def with_seed(self, seed: int | None) -> "SamplingParams":
        """These for one sample with its own seed, a checked one; nothing else is checked anew."""
        made = copy.copy(self)
        object.__setattr__(made, "n", 1)
        object.__setattr__(made, "seed", seed)
        return made

    @classmethod
    def field_names(cls) -> frozenset[str]:
        """Names that the constructor takes."""
        return frozenset(f.name for f in fields(cls))

    @property
    def is_prompt_only(self) -> bool:
        """Whether the prompt is only scored. The engine generates one token all the same, which is to be dropped."""
        return self.max_tokens == 0

    @property
    def is_restricted(self) -> bool:
        """Whether some tokens may not be sampled: see `tokenization/restriction.py`."""
        return bool(self.bad_words) or self.allowed_token_ids is not None or self.structured_outputs is not None

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every token must be run: to score the prompt."""
        return self.prompt_logprobs is not None

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on which tokens came before, as the device's history has them."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if a token id that is named is not in the vocabulary."""
        bounds = self._named_ids  # type: ignore[attr-defined]
        if bounds is None or bounds[1] < vocab_size:
            return
        for name in _TOKEN_IDS:
            for token_id in getattr(self, name) or ():
                if token_id >= vocab_size:
                    raise ValueError(f"{name} has token id {token_id}, the vocabulary is 0..{vocab_size - 1}")


@dataclass(frozen=True)
class PoolingParams(SamplingParams):
    """For the model's last hidden state after the last token of a prompt, and no answer; see `Output.hidden`."""

    pools: ClassVar[bool] = True

    temperature: float = 0.0
    max_tokens: int | None = 0


RANGES = (  # field, lowest, highest value; whole numbers where the lowest is one
    ("n", 1, MAX_SAMPLES),
    ("temperature", 0.0, 1e4),
    ("top_k", -1, math.inf),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1e-4, 1e4),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("max_tokens", 1, math.inf),
    ("min_tokens", 0, math.inf),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("seed", -(2**63), 2**63 - 1),
    ("truncate_prompt_tokens", -1, math.inf),
)
SWITCHES = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
LIMITS = (("logit_bias", MAX_LOGIT_BIAS), ("stop_token_ids", MAX_STOP_TOKEN_IDS), ("bad_words", MAX_BAD_WORDS))
_TOKEN_IDS = ("logit_bias", "stop_token_ids", "allowed_token_ids")
_OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs", "seed", "truncate_prompt_tokens")  # may be None


def _by_token_id(bias: Mapping[int, float]) -> dict[int, float]:
    """`logit_bias` with whole numbers as keys, also where they came as text, as JSON has them."""
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias={bias!r} must map token ids to numbers")
    found = {}
    for key, value in bias.items():
        try:
            token_id = int(key) if isinstance(key, str) else operator.index(key)
        except (ValueError, TypeError) as error:
            raise ValueError(f"logit_bias has the key {key!r}, every key must be a token id") from error
        found[token_id] = value
    return found


def _is_number(value: object, whole: bool) -> bool:
    """Whether it is a number, numpy's included, and no bool."""
    return isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
