"""A request: its input (prompt, sampling, SLO) and its progress."""

import copy
import enum
import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from apt_jax.cache import BlockTable, CacheKind

MAX_LOGIT_BIAS = 300  # OpenAI's limit
MAX_STOP_TOKEN_IDS = 64
MAX_LOGPROBS = 20
MAX_SAMPLES = 128
DEFAULT_STALL_S = 1.0  # the longest gap that a request with tight promises may have, unless it says so itself


@dataclass(frozen=True)
class Slo:
    """Latency SLO of one request, in seconds.

    Attributes:
        ttft_s: limit of the time from arrival to the first token.
        tbt_s: limit of the 99th percentile of the gaps between tokens.
        stall_s: limit of every single gap, for the strict reading; None: see `stall_limit_s`.
    """

    ttft_s: float = 1.0
    tbt_s: float = 1.0
    stall_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tbt_s", "stall_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"slo {name}={value} must be > 0 seconds")

    @cached_property
    def stall_limit_s(self) -> float:
        """Longest gap that strict attainment allows: `stall_s`, else `tbt_s` or, if larger, `ttft_s` up to 1 s."""
        if self.stall_s is not None:
            return self.stall_s
        return max(self.tbt_s, min(self.ttft_s, DEFAULT_STALL_S))

    def with_parts(
        self, ttft_s: float | None = None, tbt_s: float | None = None, stall_s: float | None = None
    ) -> "Slo":
        """This one with the parts that are given: what a request, or a class of them, asks for over the default.

        A stall limit that neither gives follows from the other two as they then are (`stall_limit_s`).
        """
        given = {"ttft_s": ttft_s, "tbt_s": tbt_s, "stall_s": stall_s}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def is_kept(self, ttft_s: float, gaps_s: Sequence[float]) -> bool:
        """Whether a request with this first-token time and these gaps attains it as the paper reads it.

        The paper's reading forgives one gap in a hundred, however long.
        """
        return ttft_s <= self.ttft_s and p99_gap_s(gaps_s) <= self.tbt_s

    def is_kept_strictly(self, ttft_s: float, gaps_s: Sequence[float]) -> bool:
        """Whether it attains it with no gap longer than `stall_limit_s`."""
        return self.is_kept(ttft_s, gaps_s) and max(gaps_s, default=0.0) <= self.stall_limit_s


# Offline nobody waits for single tokens: a day, so that only the throughput counts and order still does.
OFFLINE_SLO = Slo(86_400.0, 86_400.0)


def p99_gap_s(gaps_s: Sequence[float]) -> float:
    """99th percentile of a request's gaps (nearest rank above); 0 without a gap."""
    if not gaps_s:
        return 0.0
    ranked = sorted(gaps_s)
    return ranked[min(len(ranked) - 1, math.ceil(0.99 * len(ranked)) - 1)]


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
        seed: same seed, same tokens, whatever else runs; None draws one per request.
        max_tokens: maximum number of tokens to generate; None: up to the context length; 0, with prompt_logprobs:
            only score the prompt, which may fill the context.
        min_tokens: no end-of-sequence or stop token id before this many.
        stop: strings that end the text (left out of it unless include_stop_str_in_output).
        stop_token_ids: token ids that end the output; at most 64.
        ignore_eos: continue past the end-of-sequence token.
        logprobs: report the chosen token's log-probability and those of this many most likely tokens (0 to 20).
        prompt_logprobs: the same for every token of the prompt but its first.
        structured_outputs: what the output must follow: {"json": SCHEMA}, {"json_object": True}, {"regex": TEXT},
            {"choice": [TEXT, ...]} or {"grammar": TEXT} (Lark or GBNF).
        skip_special_tokens: leave special tokens such as </s> out of the text.

    Raises:
        ValueError: one sentence with the value and the limit.
    """

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
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", _by_token_id(self.logit_bias or {}))
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if name == "max_tokens" and value == 0 and self.prompt_logprobs is not None:
                continue
            whole = isinstance(low, int)
            if not _is_number(value, whole):
                raise ValueError(f"{name}={value!r} must be {'a whole' if whole else 'a'} number")
            if not low <= value <= high:
                limits = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise ValueError(f"{name}={value} must be {limits}")
        object.__setattr__(self, "top_k", max(self.top_k, 0))
        if not self.top_p > 0:
            raise ValueError(f"top_p={self.top_p} must be greater than 0 and at most 1")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}")
        for name, limit in (("logit_bias", MAX_LOGIT_BIAS), ("stop_token_ids", MAX_STOP_TOKEN_IDS)):
            if len(getattr(self, name)) > limit:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, at most {limit} are allowed")
        for token_id, bias in self.logit_bias.items():  # type: ignore[union-attr]
            if not _is_number(bias, whole=False) or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token_id} is {bias}, must be between -100 and 100")
        for token_id in self.stop_token_ids:  # type: ignore[union-attr]
            if not _is_number(token_id, whole=True):
                raise ValueError(f"stop_token_ids has {token_id!r}, every one must be a token id")
        if self.structured_outputs is not None:
            check_structured(self.structured_outputs)
        for text in self.stop:  # type: ignore[union-attr]
            if not isinstance(text, str):
                raise ValueError(f"stop has {text!r}, every stop must be a string")
            if not text:
                raise ValueError("stop has an empty string, every stop string needs at least one character")
        named = (*self.logit_bias, *self.stop_token_ids)  # type: ignore[misc]
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
    def needs_whole_prompt(self) -> bool:
        """Whether every token must be run: to score the prompt, or for penalties, which count tokens on the device."""
        return (
            self.prompt_logprobs is not None
            or self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError if a token id in logit_bias or stop_token_ids is not in the vocabulary."""
        bounds = self._named_ids  # type: ignore[attr-defined]
        if bounds is None or (bounds[0] >= 0 and bounds[1] < vocab_size):
            return
        for name in ("logit_bias", "stop_token_ids"):
            for token_id in getattr(self, name):
                if not 0 <= token_id < vocab_size:
                    raise ValueError(f"{name} has token id {token_id}, the vocabulary is 0..{vocab_size - 1}")


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
)
STRUCTURED: dict[str, tuple[type, ...]] = {
    "json": (dict, str), "json_object": (bool,), "regex": (str,), "choice": (list, tuple), "grammar": (str,),
}  # fmt: skip
_OPTIONAL = ("max_tokens", "logprobs", "prompt_logprobs", "seed")  # may be None


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


def check_structured(asked: object) -> None:
    """Raise ValueError unless it asks for one form of structured output; whether it can be compiled is not checked."""
    if not isinstance(asked, Mapping):
        raise ValueError(f"structured_outputs={asked!r} must be an object with one of {', '.join(STRUCTURED)}")
    if len(asked) != 1 or not asked.keys() <= STRUCTURED.keys():
        raise ValueError(f"structured_outputs has {sorted(asked)}, give exactly one of {', '.join(STRUCTURED)}")
    ((kind, value),) = asked.items()
    texts: Any = value if kind == "choice" else ()
    if not isinstance(value, STRUCTURED[kind]) or value in ("", [], (), False):
        raise ValueError(f"structured_outputs {kind}={value!r} must be a {STRUCTURED[kind][0].__name__} and not empty")
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("structured_outputs choice has something that is no text; every choice must be one")


def _is_number(value: object, whole: bool) -> bool:
    """Whether it is a number, numpy's included, and no bool."""
    return isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)


class Status(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    ABANDONED = "abandoned"  # ended by the policy, since its SLO could no longer be kept


@dataclass(eq=False)
class Request:
    """One sample of one prompt, and its progress. Mutated only by `SchedulerState`.

    Times are in seconds of the caller's clock. `max_new_tokens` is `max_tokens` cut to the context length.
    `num_inflight_tokens` counts tokens that the device is producing and the host has not read yet;
    `num_computed_tokens` counts tokens whose keys and values, or hidden vectors, are (or are being) cached.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    arrival_s: float
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    slo: Slo = Slo()
    priority: int = 0
    cache_salt: str | None = None  # only requests with the same one share cached prefixes
    matcher: Any = None  # its state in the grammar of structured outputs, see `tokenization/grammars.py`
    order: int = -1  # arrival number, given by SchedulerState.add; ties are broken by it

    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    output_token_ids: list[int] = field(default_factory=list)
    num_inflight_tokens: int = 0
    num_computed_tokens: int = 0
    table: BlockTable | None = None
    cache_history: list[CacheKind] = field(default_factory=list)
    page_keys: list[bytes] = field(default_factory=list)  # of its first pages, as far as they were asked for
    page_hash: Any = None  # of the tokens up to the last of them
    num_cached_tokens: int | None = None  # of its tokens, taken from the prefix cache at its first admission
    num_preemptions: int = 0
    num_conversions: int = 0
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    num_late_gaps: int = 0  # those longer than the SLO's
    num_stalls: int = 0  # those longer than the SLO's stall limit

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens generated, those in flight included."""
        return len(self.output_token_ids) + self.num_inflight_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens: the context that the cache must hold."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_inflight_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to be run through the model: 1 when decoding, more while prefilling."""
        known = len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_inflight_tokens
        return known - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is left to compute."""
        generated = len(self.output_token_ids) + self.num_inflight_tokens
        return generated > 0 and len(self.prompt_token_ids) + generated - self.num_computed_tokens == 1

    @property
    def is_exhausted(self) -> bool:
        """Whether every token it may generate is generated or in flight."""
        return len(self.output_token_ids) + self.num_inflight_tokens >= self.max_new_tokens

    @property
    def cache_kind(self) -> CacheKind | None:
        """The kind of the blocks it holds; None when it holds none."""
        return self.table.kind if self.table is not None else None

    def pending_s(self, now: float) -> float:
        """Seconds since its last token, or since arrival (p_i of the paper's formulation)."""
        return now - (self.arrival_s if self.last_token_s is None else self.last_token_s)

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token; None before the first."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def p99_gap_s(self) -> float:
        """99th percentile of the gaps between its tokens (nearest rank above); 0 without a gap."""
        return p99_gap_s(self.gaps_s)

    @property
    def longest_gap_s(self) -> float:
        """The longest gap between its tokens; 0 without a gap."""
        return max(self.gaps_s, default=0.0)

    @property
    def attained(self) -> bool:
        """Whether it finished within its SLO as the paper reads it, without an error or abort."""
        if self.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH) or self.ttft_s is None:
            return False
        return self.slo.is_kept(self.ttft_s, self.gaps_s)

    @property
    def attained_strictly(self) -> bool:
        """Whether it attained its SLO and no gap was longer than the stall limit."""
        return self.attained and self.longest_gap_s <= self.slo.stall_limit_s
