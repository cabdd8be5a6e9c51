"""vLLM's defaults: what a comparison by a policy's name runs with. Sources: docs/scheduling/vllm-v1.md."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from apt_jax.cache import CacheMode


@dataclass(frozen=True)
class Baseline:
    """A server that a policy stands for.

    Attributes:
        cache_mode: what it caches.
        device_memory_utilization: share of the device's memory that it takes.
        limits: tokens and requests of one iteration, by device of `HARDWARE`; `DEFAULT_LIMITS` elsewhere.
    """

    cache_mode: CacheMode
    device_memory_utilization: float
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def limits_on(self, device: str) -> tuple[int, int]:
        """`max_num_batched_tokens` and `max_num_seqs` on a device."""
        return self.limits.get(device, DEFAULT_LIMITS)


DEFAULT_LIMITS = 2048, 256
BASELINES = {
    "vllm-v0": Baseline("kv", 0.9),
    "vllm-v1": Baseline(
        "kv", 0.92,
        {
            "h100-80gb": (8192, 1024), "h200": (8192, 1024),
            "tpu-v5e": (512, 256), "tpu-v5p": (256, 256), "tpu-v6e": (1024, 256),
        },
    ),
}  # fmt: skip
