"""Messages between a front and its replicas. Plain data that pickles quickly; a report holds the outputs of a step.

A ticket is one attempt at one group of samples: a group that moves to another replica gets a new one, so that late
outputs of the old replica are ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from apt_jax.engine_config import EngineConfig
from apt_jax.output import TokenLogprobs
from apt_jax.request import FinishReason
from apt_jax.routing.instance import InstanceLoad
from apt_jax.serve.logs import LogLevel
from apt_jax.serve.options import LoadOptions
from apt_jax.serve.runtime.samples import Sample
from apt_jax.serve.runtime.status import WatchLimits

if TYPE_CHECKING:
    from apt_jax.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineSpec:
    """Arguments from which a replica makes its engine."""

    model: str | None
    load: LoadOptions
    config: EngineConfig
    model_name: str
    refuses_late: bool = False
    log_format: Literal["text", "json"] = "text"
    log_level: LogLevel = "info"
    limits: WatchLimits = field(default_factory=WatchLimits)
    preemption_notice: str | None = None  # as of `PreemptionNotice.parse`
    preemption_grace: float = 30.0


@dataclass(frozen=True)
class Facts:
    """Of a replica's engine, once it is ready. `clock_s` is the replica's clock, read when this was made."""

    config: EngineConfig
    tokenizer: "Tokenizer | None"
    max_model_len: int
    clock_s: float
    process_id: int
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    start_s: float = 0.0  # that loading and compiling took
    fingerprint: str = ""  # of the weights


@dataclass(frozen=True, slots=True)
class Submit:
    """Take these samples. `waited_s`: seconds since arrival, or since the last token, of each."""

    ticket: int
    samples: tuple[Sample, ...]
    waited_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Cancel them; no more outputs are wanted."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """Every sample is queued."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Refused:
    """No sample is queued, or, after `Accepted`, none will be finished."""

    ticket: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Brought:
    """The output of a step for sample number `index` of a ticket. With `ending`, it is the last."""

    ticket: int
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    queued_s: float | None = None  # with the first token: arrival to being scheduled
    ending: "Ending | None" = None
    hidden: Any = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a sample ended, and what its replica did with it (cache kinds, preemptions)."""

    finish_reason: FinishReason
    error: str | None
    stop_reason: int | str | None
    cache_kinds: tuple[str, ...]
    num_preemptions: int
    num_conversions: int
    num_cached_tokens: int | None = None


Command = Submit | Abort
Event = Accepted | Refused | Brought


@dataclass(frozen=True, slots=True)
class Report:
    """Events in order, the engine's load if it was counted since the last report, and why it is unhealthy if it is.

    `lasts_s`: seconds until its machine is taken away, once it has notice of that.
    `counts` are those of `EngineMetrics`, since the engine's start.
    """

    events: list[Event]
    load: InstanceLoad | None = None
    blocks: dict[str, int] = field(default_factory=dict)
    trouble: str | None = None
    lasts_s: float | None = None
    counts: dict[str, int] = field(default_factory=dict)


Answer = Any  # of a question about a replica: JSON-like, or bytes
