"""The interface of an engine to servers, batch jobs and benchmarks. Without jax, so that importing it stays light."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from apt_jax.engine_config import EngineConfig
from apt_jax.model_config import ModelConfig
from apt_jax.output import Output
from apt_jax.request import Request, SamplingParams, Slo
from apt_jax.routing.instance import InstanceLoad
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.plan import Plan

if TYPE_CHECKING:
    from apt_jax.execution.cache.saved_pages import SavedPages
    from apt_jax.tokenization.restriction import Restriction
    from apt_jax.tokenization.tokenizer import Tokenizer


@dataclass(frozen=True)
class EngineFigures:
    """Figures of an engine between two steps.

    Attributes:
        num_waiting: requests without blocks.
        num_running: requests with blocks.
        num_blocks: size of the cache pool.
        blocks: blocks by use: kv, hidden, free.
        plan: of the last step.
        schedule_s: seconds that the policy took for it.
        padded_tokens: tokens that the last iteration computed, padding included.
        num_failed_steps: since the start; the engine continued after each.
        num_recompiles: programs compiled since `warm_up`; should stay 0.
        compile_s: seconds that `warm_up` took to compile programs, or to load compiled ones.
        cost_model: as measured on the device; None if it was not.
        prefix_queries: tokens of requests that were looked up in the prefix cache when first admitted.
        prefix_hits: of these, tokens that were found there.
        cache_config: how the cache is set up, in vLLM's names; the same at all times.
        weights: number types of the weights, by name; the same at all times.
        num_outside_range: numbers of hidden vectors, written to an int8 cache since `warm_up`, that were outside the
            range of their channel in the calibration text.
        host_blocks: blocks of the cache in host memory.
        host_saved, host_restored: blocks copied there, and back, since the start.
    """

    num_waiting: int
    num_running: int
    num_blocks: int
    blocks: Mapping[str, int]
    plan: Plan
    schedule_s: float = 0.0
    padded_tokens: int = 0
    num_failed_steps: int = 0
    num_recompiles: int = 0
    compile_s: float = 0.0
    cost_model: CostModel | None = None
    prefix_queries: int = 0
    prefix_hits: int = 0
    cache_config: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    num_outside_range: int = 0
    host_blocks: int = 0
    host_saved: int = 0
    host_restored: int = 0

    @property
    def num_held_blocks(self) -> int:
        """Blocks that are not free; 0 when no request is unfinished."""
        return self.num_blocks - self.blocks["free"]


class EngineFacts(Protocol):
    """Facts that requests are checked against. `Engine` has them, and so has a replica's report about its engine."""

    @property
    def config(self) -> EngineConfig:
        """With every default filled in."""

    @property
    def tokenizer(self) -> "Tokenizer | None":
        """None takes token ids only."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""

    @property
    def sampling_defaults(self) -> Mapping[str, float]:
        """The model's own, as keywords of `SamplingParams`, for requests that do not say otherwise."""

    @property
    def fingerprint(self) -> str:
        """Of the weights; empty if it is not known."""


class ServingEngine(EngineFacts, Protocol):
    """Generates for many requests at once. Synchronous; only the counts may be read from other threads."""

    @property
    def model_config(self) -> ModelConfig:
        """The model's shape."""

    @property
    def max_num_seqs(self) -> int:
        """Maximum number of requests in one iteration."""

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do or to report."""

    @property
    def num_waiting(self) -> int:
        """Requests without blocks."""

    @property
    def num_running(self) -> int:
        """Requests with blocks."""

    @property
    def idle_s(self) -> float:
        """Seconds until `step` has anything to do again, while a policy waits on purpose; else 0."""

    @property
    def spare_s(self) -> float:
        """Seconds for which the device has enough to do; who comes within them is planned for as soon as others."""

    @property
    def longest_step_s(self) -> float:
        """Predicted seconds of the largest iteration that its limits allow. From any thread."""

    def warm_up(self, progress: bool = False) -> None:
        """Compile every shape, and measure the device if the policy uses that; afterwards nothing compiles."""

    def add(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        slo: Slo | None = None,
        priority: int = 0,
        arrival_s: float | None = None,
        output_token_ids: Sequence[int] = (),
        cache_salt: str | None = None,
        user: str | None = None,
        restriction: "Restriction | None" = None,
    ) -> Request:
        """Queue one request (one sample).

        `output_token_ids` were generated before, by this engine or another, and are continued: with the same seed
        the same tokens follow. The first output then brings all of their text. Cached prefixes are shared only among
        requests of the same `cache_salt`; `user` is for policies that share
        fairly. `restriction` is what `tokenization/restriction.py` has made
        of the same parameters and tokens; else it is made here, which takes seconds where a grammar is to be compiled.

        Raises:
            ValueError: the request can never be served; one sentence with the value, the limit and the cure.
            QueueFull: the maximum number of requests waits.
        """

    def abort(self, request_id: str) -> None:
        """End a request; its blocks are free at once. Unknown or ended ids change nothing."""

    def step(self) -> list[Output]:
        """One iteration; returns its outputs, and the last outputs of requests that ended since the previous one.

        Raises:
            PolicyFailed: the policy raised; the requests are as before, and the step may be tried again.
            DeviceLost: the device takes no cache any more.
        """

    def renew_policy(self) -> None:
        """Continue with a fresh policy. The engine must be idle."""

    @property
    def saved_pages(self) -> "SavedPages | None":
        """Pages of the prefix cache as bytes, between two steps; None without the cache, or over several processes."""

    def reset_prefix_cache(self) -> None:
        """Empty the prefix cache. Running requests keep what they hold; nobody finds it any more."""

    def figures(self) -> EngineFigures:
        """Figures after the last step; in the thread that steps."""

    def recent_plans(self) -> list[dict[str, Any]]:
        """The newest plans with their reasons, oldest first, as JSON-ready dicts. From any thread."""

    def load(self, now: float) -> InstanceLoad:
        """The report of this engine to a router at `now`; walks over all unfinished requests."""
