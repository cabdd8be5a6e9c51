"""Frozen configuration: how a model is served."""

import dataclasses
from typing import Literal

from apt_jax.cache import CacheMode, as_cache_dtype
from apt_jax.model_config import as_quantization
from apt_jax.ranges import (
    check_at_least,
    check_block_size,
    check_finite,
    check_greater,
    check_host_cache,
    check_host_dtype,
    check_share,
)
from apt_jax.request import Slo

AttentionBackend = Literal["auto", "xla", "pallas", "native"]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How a model is served; each field is also a command-line flag (`--max-num-seqs`) and a keyword of `LLM`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of weights and cache; auto: the checkpoint's own, but float32 on a CPU."""
    max_model_len: int | None = None
    """Longest context in tokens, prompt and output together; default: the model's own limit."""
    max_num_seqs: int | None = None
    """Maximum number of requests in one iteration; default: 64 on a CPU, 256 on TPU and GPU."""
    max_num_batched_tokens: int | None = None
    """Maximum number of tokens in one iteration, prompts are cut into chunks; default: 512 on a CPU, else 2048."""
    block_size: int = 16
    """Tokens per cache block."""
    num_blocks: int | None = None
    """Number of cache blocks; default: as many as fit into the memory that is left."""
    cache_memory_bytes: int | None = None
    """Bytes of cache on each device; default: the memory that weights and activations leave free."""
    device_memory_utilization: float = 0.9
    """Share of the device's memory (on a CPU: of the free memory) that the engine may use."""
    cache_mode: CacheMode = "hybrid"
    """What requests cache: keys and values (kv), hidden vectors at half the memory (hidden), or either (hybrid)."""
    enable_prefix_caching: bool = True
    """Keep full cache pages of ended requests, and share them with requests that begin with the same tokens; see
    docs/prefix_caching.md."""
    host_cache_bytes: int = 0
    """Bytes of host memory for cached pages that the device has no room for, of this process; 0: none. Needs prefix
    caching. --kv-offloading-size is the same in GiB."""
    host_cache_dtype: str = "auto"
    """Number type of pages in host memory: auto, that of the cache; or int8 with a scale for each token and head, half
    the bytes of 16 bits. What a request says then depends a little on whether its pages were moved."""
    cache_dtype: str = "auto"
    """Number type of the cache, auto or int8; auto: that of the model; int8: a byte for each number, half of a 16-bit
    cache. --kv-cache-dtype is another spelling."""
    quantization: str | None = None
    """Number type of the weights: none (that of --dtype), int8 (half of 16 bits, multiplied in --dtype) or int8-dynamic
    (activations are multiplied as 8-bit integers too); default: as they are stored. See docs/quantization.md."""
    scheduling_policy: str = "apt"
    """Scheduling policy: alise, apt, apt-paper, edf, fastserve, fastswitch, fcfs, mlfq, nested-wait, priority, random,
    sarathi, semi-pd, sjf, vllm-v0, vllm-v1, wait; or MODULE:CLASS of your own; with options as NAME:option=value. See
    docs/scheduling."""
    ttft_slo_ms: float = 1000.0
    """Default SLO for the time to the first token, in milliseconds."""
    tbt_slo_ms: float = 1000.0
    """Default SLO for the 99th percentile of a request's gaps between tokens, in milliseconds."""
    stall_slo_ms: float | None = None
    """Default SLO for every single gap, in milliseconds, which strict attainment adds; default: the larger of
    --tbt-slo-ms and the smaller of --ttft-slo-ms and 1000."""
    abandon_after: float | None = None
    """End a request (503 slo_abandoned, or finish_reason abandoned) once its next token is this many seconds past its
    SLO and it is not being served; for `serve` only; default: never."""
    max_num_queued_reqs: int = 1024
    """Maximum number of waiting requests; further ones get 503."""
    tensor_parallel_size: int = 1
    """Number of devices that one model is split over; must divide its heads. See docs/scale_out.md."""
    calibrate: bool = True
    """Measure the device at start-up if the policy predicts iteration times; seconds, once per device and model."""
    attention_backend: AttentionBackend = "auto"
    """Implementation of attention; auto: Pallas kernels on TPU and GPU, C++ kernels (native) on a CPU with a compiler,
    each only if it passes a numeric check at start-up, else XLA."""
    async_scheduling: bool | None = None
    """Plan the next iteration while the device runs the current one; default: on for TPU and GPU, off on a CPU."""
    compilation_cache_dir: str | None = None
    """Folder for compiled programs, which later starts reuse; default: ~/.cache/apt-jax/xla."""
    seed: int = 0
    """Seed for requests without one, and for dummy weights."""

    def __post_init__(self) -> None:
        as_cache_dtype(self.cache_dtype)
        as_quantization("none" if self.quantization is None else self.quantization)
        check_finite(self)
        check_at_least(
            *(self, 1, ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks", "cache_memory_bytes"))
        )
        check_at_least(self, 1, ("block_size", "tensor_parallel_size", "max_num_queued_reqs"))
        check_block_size(self.block_size)
        check_at_least(self, 0, ("abandon_after", "seed", "host_cache_bytes"))
        check_greater(self, 0, ("ttft_slo_ms", "tbt_slo_ms", "stall_slo_ms"))
        check_share(self, ("device_memory_utilization",))
        check_host_cache(self.host_cache_bytes, self.enable_prefix_caching)
        check_host_dtype(self.host_cache_dtype, self.host_cache_bytes, self.cache_dtype)

    @property
    def slo(self) -> Slo:
        """The SLO of a request that brings none."""
        stall_s = None if self.stall_slo_ms is None else self.stall_slo_ms / 1e3
        return Slo(self.ttft_slo_ms / 1e3, self.tbt_slo_ms / 1e3, stall_s)

    def check_offline(self) -> None:
        """Raise ValueError if it is of no use without clients that wait."""
        if self.abandon_after is not None:
            raise ValueError(
                f"abandon_after={self.abandon_after:g}: offline requests are never abandoned, since nobody waits for "
                "them; leave it out"
            )
