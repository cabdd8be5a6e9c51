"""Frozen configuration: how a model is served."""

import dataclasses
from typing import Literal

AttentionBackend = Literal["auto", "xla", "pallas", "native"]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How a model is served; each field is also a command-line flag (`--max-num-seqs`) and a keyword of `LLM`."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of weights and cache; auto takes the checkpoint's, except float32 on a CPU."""
    max_model_len: int | None = None
    """Longest context in tokens, prompt and output together; default: what the model was trained for."""
    max_num_seqs: int | None = None
    """Most requests in one iteration; default: 64 on a CPU, 256 on TPU and GPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one iteration; longer prompts are prefilled in chunks; default: 512 on a CPU, else 2048."""
    block_size: int = 16
    """Tokens per cache block."""
    num_blocks: int | None = None
    """Cache blocks; default: as many as the memory left over holds."""
    cache_memory_bytes: int | None = None
    """Bytes of each device for the cache; default: what weights and activations leave of its memory."""
    device_memory_utilization: float = 0.9
    """Share of the device's memory (on a CPU: of the free memory) that the engine may take."""
    cache_mode: Literal["hybrid", "kv", "hidden"] = "hybrid"
    """What requests may cache: KV pairs, hidden vectors at half the memory, or either."""
    scheduling_policy: str = "apt"
    """Name of the scheduling policy, with options as NAME:option=value; docs/scheduling tells them."""
    ttft_slo_ms: float = 1000.0
    """Default promise for the time to the first token."""
    tbt_slo_ms: float = 1000.0
    """Default promise for the 99th percentile of a request's gaps between tokens."""
    max_num_queued_reqs: int = 1024
    """Most requests waiting; more are refused with 503."""
    tensor_parallel_size: int = 1
    """Devices that one model is split over; must divide its heads. docs/tensor_parallelism.md."""
    calibrate: bool = True
    """Measure the device at start-up for policies that predict iteration times; seconds, once per device and model."""
    attention_backend: AttentionBackend = "auto"
    """Implementation of decode attention; auto: Pallas on TPU and GPU, C++ on a CPU that has a compiler, if it passes a
    check there, else XLA."""
    async_scheduling: bool | None = None
    """Plan the next iteration while the device runs this one; default: on for TPU and GPU, off on a CPU."""
    compilation_cache_dir: str | None = None
    """Folder for compiled programs, reused by the next start; default: ~/.cache/apt-jax/xla."""
    seed: int = 0
    """Seed for requests that bring none, and for dummy weights."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "num_blocks", "cache_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("block_size", "tensor_parallel_size", "max_num_queued_reqs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.block_size & (self.block_size - 1) or self.block_size > 128:
            raise ValueError(f"block_size={self.block_size} must be a power of two, at most 128")
        for name in ("ttft_slo_ms", "tbt_slo_ms"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if not 0 < self.device_memory_utilization <= 1:
            raise ValueError(
                f"device_memory_utilization={self.device_memory_utilization} must be greater than 0 and at most 1"
            )
