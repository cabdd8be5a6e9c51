"""One simulated configuration by its names, as the command line gives them, and the points it can be asked for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast, get_args

import numpy as np

from apt_jax.cache import MODE_KINDS, CacheMode, as_cache_dtype
from apt_jax.model_config import Quantization
from apt_jax.request import Slo
from apt_jax.routing.autoscaler import Autoscaler, AutoscalerOptions
from apt_jax.routing.catalogue import DEFAULT_ROUTER, make_router
from apt_jax.scheduling.costs.cost_model import CostModel, HiddenMode, block_bytes, cache_blocks, coded_bytes
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS, by_name
from apt_jax.scheduling.costs.host_copies import CopyForm
from apt_jax.scheduling.costs.host_times import host_time
from apt_jax.scheduling.length import LengthPredictor
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.policies.vllm.defaults import BASELINES, DEFAULT_LIMITS
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.fleet import Fleet
from apt_jax.simulation.instance import Instance
from apt_jax.simulation.report import Report, summarise
from apt_jax.simulation.requests.classes import RequestClass, load_classes
from apt_jax.simulation.requests.conversations import UNIFORM, Conversations, Requests
from apt_jax.simulation.requests.known_lengths import KnownLengths
from apt_jax.simulation.requests.surge import Surge
from apt_jax.simulation.simulator import Outcome, Stalled, simulate_fleet
from apt_jax.simulation.throughput.bound import fluid_bound
from apt_jax.simulation.throughput.questions import Question, are_decided
from apt_jax.simulation.workload import MIN_DURATION_S, Arrival, Lengths, load_lengths, make_arrivals

Configuration = tuple[str, CacheMode, HiddenMode]  # policy, cache mode, hidden attention

QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
BOUND_REQUESTS = 20_000  # drawn of mixed classes for the fluid bound
MOST_BLOCKS = 10**8  # of all instances; each takes some 40 bytes here
DEFAULT_UTILIZATION = 0.9  # of the device's memory


@dataclass(frozen=True)
class Experiment:
    """What stays fixed while policies, cache modes and rates vary. Field names are the command-line flags.

    `None` in a limit or in the share of memory stands for the default, which may be that of the policy (`set_up_for`).
    """

    model: str = "opt-13b"
    hardware: str = "a100-40gb"
    tensor_parallel_size: int = 1
    quantization: str = "none"
    workload: str = "sharegpt"
    cv: float | None = None
    num_requests: int = 1000
    ttft_slo_ms: float = 1000.0
    tbt_slo_ms: float = 1000.0
    stall_slo_ms: float | None = None
    classes: Path | None = None
    seed: int = 0
    block_size: int = 16
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    device_memory_utilization: float | None = None
    num_blocks: int | None = None
    cache_dtype: str = "auto"
    enable_prefix_caching: bool = True
    host_cache_bytes: int = 0
    host_cache_dtype: str = "auto"
    max_num_queued_reqs: int = 1024
    abandon_after: float | None = None
    duration_s: float = MIN_DURATION_S
    surge: Surge | None = None
    known_lengths: bool = False
    known_lengths_error: float = 0.0
    instances: int = 1
    max_instances: int | None = None
    router: str = DEFAULT_ROUTER
    report_interval_s: float = 0.0

    @cached_property
    def lengths(self) -> Lengths:
        """The workload's table."""
        return self._table(self.workload) if self.conversations is None else self._conversation_requests.lengths

    @cached_property
    def conversations(self) -> Conversations | None:
        """The shape of conversations, if they are the workload."""
        return Conversations.parse(self.workload)

    @cached_property
    def _conversation_table(self) -> Lengths | None:
        assert self.conversations is not None
        return None if self.conversations.lengths == UNIFORM else self._table(self.conversations.lengths)

    @cached_property
    def _conversation_requests(self) -> Requests:
        assert self.conversations is not None
        return self.conversations.requests(self._conversation_table, max_model_len=self.max_model_len)

    @property
    def max_model_len(self) -> int:
        """The model's context."""
        return by_name(MODELS, self.model, "model").max_position_embeddings

    @property
    def slo(self) -> Slo:
        """The SLO of requests that have none of their own."""
        stall_s = None if self.stall_slo_ms is None else self.stall_slo_ms / 1000
        return Slo(self.ttft_slo_ms / 1000, self.tbt_slo_ms / 1000, stall_s)

    @cached_property
    def request_classes(self) -> list[tuple[RequestClass, Lengths | None]]:
        """The classes of `classes`, each with its own table if it names one."""
        if self.classes is None:
            return []
        if self.conversations is not None:
            raise ValueError(f"--classes {self.classes} cannot be combined with conversations, whose turns are classes")
        found = load_classes(self.classes, self.slo)
        return [(each, None if each.workload is None else self._table(each.workload)) for each in found]

    def _table(self, workload: str) -> Lengths:
        return load_lengths(workload, self.max_model_len, self.slo)

    def arrivals(self, rate: float | None) -> tuple[list[Arrival], float]:
        """Requests at `rate` (None: as recorded), and that rate. Without `cv`, recorded arrivals keep their pattern."""
        if self.conversations is not None:
            assert rate is not None
            return self.conversations.arrivals(
                self._conversation_table, rate=rate, num_requests=self.num_requests, duration_s=self.duration_s,
                cv=1.0 if self.cv is None else self.cv, seed=self.seed, max_model_len=self.max_model_len, slo=self.slo,
                surge=self.surge,
            ), rate  # fmt: skip
        rate = self.lengths.recorded_rate if rate is None else rate
        cv = 1.0 if self.cv is None and self.lengths.arrival_s is None else self.cv
        return make_arrivals(
            self.lengths, rate=rate, num_requests=self.num_requests, cv=cv, seed=self.seed, duration_s=self.duration_s,
            classes=self.request_classes, surge=self.surge,
        ), rate  # fmt: skip

    def set_up_for(self, policy: str) -> "Experiment":
        """This experiment with nothing left open: a baseline has the defaults of the server that it stands for."""
        baseline = BASELINES.get(policy.split(":")[0])
        tokens, seqs = DEFAULT_LIMITS if baseline is None else baseline.limits_on(self.hardware)
        share = DEFAULT_UTILIZATION if baseline is None else baseline.device_memory_utilization
        return replace(
            self,
            max_num_seqs=self.max_num_seqs or seqs,
            max_num_batched_tokens=self.max_num_batched_tokens or tokens,
            device_memory_utilization=self.device_memory_utilization or share,
        )

    def cost_model(self, hidden_attention: HiddenMode) -> CostModel:
        """Physics of the device.

        Raises:
            ValueError: an unknown name, or a number of devices that the model cannot be split over.
        """
        model, hardware = by_name(MODELS, self.model, "model"), by_name(HARDWARE, self.hardware, "hardware")
        model.check_split(self.tensor_parallel_size)
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(f"unknown quantization {self.quantization!r}; known: {', '.join(QUANTIZATIONS)}")
        return CostModel(
            model, hardware, hidden_attention, self.tensor_parallel_size,
            quantization=cast(Quantization, self.quantization), cache_dtype=as_cache_dtype(self.cache_dtype),
        )  # fmt: skip

    def _cost_model_for(self, policy: str, hidden_attention: HiddenMode) -> CostModel:
        """Physics of the device under a policy: a baseline is a server with kernels of its own, which lacks none."""
        return self.cost_model("one-pass" if policy.split(":")[0] in BASELINES else hidden_attention)

    def pool_blocks(self, policy: str = "") -> int:
        """Blocks of the pool: `num_blocks`, or what the device's memory leaves."""
        ready = self.set_up_for(policy)
        assert ready.max_num_batched_tokens and ready.max_num_seqs and ready.device_memory_utilization
        num_blocks = self.num_blocks or cache_blocks(
            self.cost_model("absorbed"),
            block_size=self.block_size,
            max_num_batched_tokens=ready.max_num_batched_tokens,
            max_num_seqs=ready.max_num_seqs,
            utilization=ready.device_memory_utilization,
        )
        if num_blocks * max(self.instances, self.max_instances or 0) > MOST_BLOCKS:
            raise ValueError(
                f"{num_blocks} cache blocks in each instance are more than the {MOST_BLOCKS:,} in all that can be "
                "simulated; lower --num-blocks or --instances, or raise --block-size"
            )
        return num_blocks

    def run(
        self,
        policy: str,
        cache_mode: CacheMode,
        hidden_attention: HiddenMode,
        rate: float | None,
        *,
        on_progress: Callable[[int], None] | None = None,
        questions: tuple[Question, ...] = (),
        copies: CopyForm = CopyForm(),  # noqa: B008  # frozen
    ) -> tuple[Outcome, Report | None]:
        """One point; with `questions` it ends as soon as they are decided, then without a report."""
        arrivals, rate = self.arrivals(rate)
        try:
            outcome = simulate_fleet(
                arrivals,
                self.fleet(policy, cache_mode, hidden_attention, copies),
                slo=self.slo,
                max_model_len=self.max_model_len,
                on_progress=on_progress,
                is_decided=partial(are_decided, questions) if questions else None,
                max_num_queued_reqs=self.max_num_queued_reqs,
            )
        except Stalled as error:
            raise ValueError(
                f"policy {policy!r} ({cache_mode}) stalls: {error}; a plan must advance, admit or preempt a request, "
                "see docs/scheduling"
            ) from error
        if not outcome.is_complete:
            return outcome, None
        report = summarise(
            outcome, policy=policy, cache_mode=cache_mode, hidden_attention=hidden_attention, rate=rate,
            num_blocks=self.pool_blocks(policy), instances=self.instances, router=self.router if self.is_routed else "",
            report_interval_s=self.report_interval_s, seed=self.seed,
            fluid_bound=self.fluid_bound((policy, cache_mode, hidden_attention)), surge=self.surge,
        )  # fmt: skip
        return outcome, report

    def fluid_bound(self, configuration: Configuration) -> float:
        """Requests per second that the instances could serve for long, whatever the policy (`throughput/bound.py`).

        With prefix caching nothing of a conversation is computed twice there.
        """
        policy, cache_mode, hidden_attention = configuration
        prompt, output = self.lengths.prompt_tokens, self.lengths.output_tokens
        if self.request_classes:
            arrivals, _ = replace(self, num_requests=BOUND_REQUESTS, duration_s=0.0).arrivals(1.0)
            prompt, output = (np.array([getattr(a, f"{n}_tokens") for a in arrivals]) for n in ("prompt", "output"))
        ready = self.set_up_for(policy)
        assert ready.max_num_seqs
        uncached, shared = None, 0
        if self.enable_prefix_caching and self.conversations is not None:
            _, uncached, shared, _ = self._conversation_requests
        return max(self.instances, self.max_instances or 0) * fluid_bound(
            prompt, output, self._cost_model_for(policy, hidden_attention), kinds=MODE_KINDS[cache_mode],
            num_blocks=self.pool_blocks(policy), block_size=self.block_size, max_num_seqs=ready.max_num_seqs,
            uncached_tokens=uncached, shared_tokens=shared,
        )  # fmt: skip

    @property
    def is_routed(self) -> bool:
        """Whether there is, or may be, more than one instance."""
        return max(self.instances, self.max_instances or 0) > 1

    def fleet(
        self,
        policy: str,
        cache_mode: CacheMode,
        hidden_attention: HiddenMode,
        copies: CopyForm = CopyForm(),  # noqa: B008  # frozen
    ) -> Fleet:
        """Fresh instances, a fresh policy in each, and the router in front.

        Raises:
            ValueError: a name or number is bad; the message says which.
        """
        cost_model, ready = self._cost_model_for(policy, hidden_attention), self.set_up_for(policy)
        num_blocks = self.pool_blocks(policy)
        if self.host_cache_dtype == "int8":
            copies = replace(copies, share=coded_bytes(cost_model) / cost_model.number_bytes)
        assert ready.max_num_seqs and ready.max_num_batched_tokens
        limits = Limits(
            ready.max_num_seqs, ready.max_num_batched_tokens, cache_mode, watermark_blocks=num_blocks // 100
        )

        def start(name: str) -> Instance:
            predictor = LengthPredictor()
            if self.known_lengths:
                predictor = KnownLengths(self.known_lengths_error, self.seed)
            context = PolicyContext(
                cost_model, predictor=predictor, seed=self.seed + int(name), abandon_after_s=self.abandon_after
            )
            return Instance(
                make_policy(policy, context), cost_model, num_blocks=num_blocks, limits=limits,
                block_size=self.block_size, name=name, prefix_caching=self.enable_prefix_caching,
                host_slots=int(self.host_cache_bytes // (block_bytes(cost_model, self.block_size) * copies.share)),
                host_time=host_time(policy), copies=copies,
            )  # fmt: skip

        return Fleet(
            start,
            self.instances,
            make_router(self.router, self.seed) if self.is_routed else None,
            report_interval_s=self.report_interval_s,
            autoscaler=None
            if self.max_instances is None
            else Autoscaler(AutoscalerOptions(self.instances, self.max_instances)),
        )
