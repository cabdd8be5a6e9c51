"""Flags of `apt-jax simulate`. Imports nothing heavy: the command line shows its help at once."""

from dataclasses import dataclass
from pathlib import Path

from apt_jax.cache import as_cache_dtype
from apt_jax.ranges import (
    check_at_least,
    check_at_most,
    check_block_size,
    check_cv,
    check_finite,
    check_greater,
    check_host_cache,
    check_host_dtype,
    check_share,
)

MOST_LENGTH_ERROR = 3.0  # a factor of 20 either way
MOST_INSTANCES = 1000


@dataclass(frozen=True)
class SimulateArgs:
    """Simulate a server: the engine's scheduler under a virtual clock. Lists are separated by commas."""

    model: str = "opt-13b"
    """Model size: opt-125m to opt-66b."""
    hardware: str = "a100-40gb"
    """Device preset: a100-40gb, a100-80gb, h100-80gb, h200, tpu-v5e, tpu-v5p, tpu-v6e, tpu7x."""
    tensor_parallel_size: int = 1
    """Number of devices that the model is split over."""
    workload: str = "sharegpt"
    """sharegpt, humaneval, longbench, azure, a mix such as sharegpt+longbench, or a CSV file with columns
    prompt_tokens, output_tokens and, as wanted, arrival_s, ttft_slo_ms, tbt_slo_ms, stall_slo_ms, priority, user,
    class; or conversations, with options as conversations:turns=4:system_tokens=500:think_s=5:lengths=uniform."""
    rate: str = ""
    """Requests per second, such as 1,2,3; default: 1,2,3, or the recorded rate of a workload with arrivals."""
    cv: float | None = None
    """Coefficient of variation of arrival gaps (1: Poisson); default: 1, or recorded arrivals stretched to the rate."""
    num_requests: int = 1000
    """Requests per point; more if these would arrive in less than --duration-s."""
    policies: str = "fcfs,apt"
    """Scheduling policies, with options as NAME:option=value:option=value."""
    cache_modes: str = ""
    """Cache modes: kv, hidden, hybrid; default: kv,hybrid, or kv for vllm-v0 and vllm-v1."""
    hidden_attention: str = "absorbed"
    """Attention over hidden blocks: absorbed, as this package runs it on the device; one-pass, by a kernel that reads
    each vector once; recompute, as in Apt-Serve."""
    quantization: str = "none"
    """How weights are stored and multiplied: none (16 bits), int8, int8-dynamic."""
    ttft_slo_ms: float = 1000.0
    """SLO for the time to the first token, in milliseconds."""
    tbt_slo_ms: float = 1000.0
    """SLO for the 99th percentile of a request's gaps between tokens, in milliseconds."""
    stall_slo_ms: float | None = None
    """Limit of every single gap, for strict attainment; default: the gap SLO or, if larger, that of the first token
    up to 1 s."""
    classes: Path | None = None
    """Classes of requests, CSV or JSON: share, name, ttft_ms, tbt_ms, stall_ms, priority, user, workload."""
    effective_throughput: str = ""
    """Attainment targets, such as 0.7,0.9,0.99: search for the highest rate that reaches each and lasts, read strictly
    and as in Apt-Serve's paper."""
    seed: int | None = None
    """Seed of arrivals and lengths; default: 0."""
    seeds: str = ""
    """Several seeds, such as 0,1,2, instead of --seed: every figure with its mean and standard deviation."""
    max_num_seqs: int | None = None
    """Maximum number of requests in one iteration; default: 256, or vLLM's on the device for vllm-v0 and vllm-v1."""
    max_num_batched_tokens: int | None = None
    """Maximum number of tokens in one iteration; default: 2048, or vLLM's on the device for vllm-v0 and vllm-v1."""
    device_memory_utilization: float | None = None
    """Share of the device's memory for weights, activations and cache; default: 0.9, or 0.92 for vllm-v1."""
    block_size: int = 16
    """Tokens per cache block."""
    num_blocks: int | None = None
    """Number of cache blocks; default: as many as fit into the device's memory next to the weights."""
    cache_dtype: str = "auto"
    """Number type of the cache: auto (16 bits), or int8 with its scales, as if all kernels read that."""
    enable_prefix_caching: bool = True
    """Keep full cache pages, as the server does: for requests that begin alike, which only those of conversations do,
    and for preempted ones that come back."""
    host_cache_bytes: int = 0
    """Bytes of host memory of an instance for cached pages that the device has no room for; 0: none."""
    host_cache_dtype: str = "auto"
    """Number type of pages in host memory: auto, that of the cache, or int8 with a scale for each token and head."""
    max_num_queued_reqs: int = 1024
    """Maximum number of waiting requests of an instance; further ones are refused and count as missed."""
    abandon_after: float | None = None
    """End a request once its next token is this many seconds past its SLO and it is not being served, as the server
    does with the same flag; it counts as missed; default: never."""
    duration_s: float | None = None
    """Minimum duration of arrivals; default: 300 s, and 900 s with --effective-throughput, which whether a rate lasts
    takes; short traces flatter policies that starve requests."""
    surge: str | None = None
    """A stretch of overload, START_S:SECONDS:FACTOR: 300:300:3 is three times the rate from the 300th second for 300
    seconds; attainment is then also told by phase: before, surge, minute after, later."""
    known_lengths: bool = False
    """Policies know the length of every output in advance: a bound on what predicting them better could bring."""
    known_lengths_error: float = 0.0
    """With --known-lengths, the standard deviation of the logarithm of what they are misjudged by: 0.5 is a factor of
    1.65 either way."""
    instances: int = 1
    """Number of instances of the model; --rate is the total over all of them."""
    router: str = "pending-time"
    """Router that chooses a request's instance: pending-time, least-requests, power-of-two, round-robin, random, prefix
    (where prompts' beginnings were sent before)."""
    report_interval_s: float = 0.0
    """Interval of an instance's reports to the router; 0: the router always sees the current state."""
    max_instances: int | None = None
    """Upper limit for autoscaling from --instances; a new instance takes requests after 30 s."""
    jobs: int | None = None
    """Number of processes; default: one for each usable CPU. The figures do not depend on it."""
    json: Path | None = None
    """JSON file for all results."""
    plot: Path | None = None
    """Plot of attainment, time to first token, batch size and cache mix (PNG, PDF or SVG; needs matplotlib)."""

    def __post_init__(self) -> None:
        as_cache_dtype(self.cache_dtype)
        check_finite(self)
        check_greater(self, 0, ("cv", "ttft_slo_ms", "tbt_slo_ms", "stall_slo_ms"))
        check_at_least(self, 0, ("abandon_after", "duration_s", "report_interval_s", "seed", "host_cache_bytes"))
        check_host_cache(self.host_cache_bytes, self.enable_prefix_caching)
        check_host_dtype(self.host_cache_dtype, self.host_cache_bytes, self.cache_dtype)
        check_at_least(self, 1, ("tensor_parallel_size", "num_requests", "max_num_seqs", "max_num_batched_tokens"))
        check_at_least(
            self, 1, ("block_size", "num_blocks", "instances", "max_instances", "max_num_queued_reqs", "jobs")
        )
        check_share(self, ("device_memory_utilization",))
        if not 0 <= self.known_lengths_error <= MOST_LENGTH_ERROR:
            raise ValueError(f"known_lengths_error={self.known_lengths_error} must be in 0..{MOST_LENGTH_ERROR:g}")
        if self.known_lengths_error and not self.known_lengths:
            raise ValueError(f"known_lengths_error={self.known_lengths_error} needs --known-lengths")
        check_at_most(self, MOST_INSTANCES, ("instances", "max_instances"))
        check_block_size(self.block_size)
        if self.cv is not None:
            check_cv(self.cv)
        if self.max_instances is not None and self.max_instances < self.instances:
            raise ValueError(f"max_instances={self.max_instances} must be at least instances={self.instances}")
        if self.seeds and self.seed is not None:
            raise ValueError(f"seed={self.seed} and seeds={self.seeds!r} say the same thing; give one of them")
