"""Flags of `apt-jax plan`. Imports nothing heavy: the command line shows its help at once."""

from dataclasses import dataclass
from pathlib import Path

from apt_jax.ranges import check_at_least, check_finite, check_greater, check_share

DEVICES = "tpu-v5e,tpu-v6e,a100-40gb,a100-80gb,h100-80gb,h200"


@dataclass(frozen=True)
class PlanArgs:
    """Plan a deployment by simulation: devices, replicas and cost. Lists are separated by commas."""

    model: str = "opt-13b"
    """Model size: opt-125m to opt-66b."""
    workload: str = "sharegpt"
    """Lengths of the requests, as for apt-jax simulate."""
    rate: float = 10.0
    """Requests per second that all replicas together are to serve."""
    attainment: float = 0.99
    """Share of all requests whose SLO is to be kept strictly."""
    ttft_slo_ms: float = 1000.0
    """SLO for the time to the first token, in milliseconds."""
    tbt_slo_ms: float = 1000.0
    """SLO for the 99th percentile of a request's gaps between tokens, in milliseconds."""
    stall_slo_ms: float | None = None
    """Limit of every single gap; default: the gap SLO or, if larger, that of the first token up to 1 s."""
    hardware: str = DEVICES
    """Devices to compare."""
    tensor_parallel_size: str = "1"
    """Numbers of devices of a replica, such as 1,2."""
    numbers: str = "16-bit,int8"
    """Number types of weights and cache: 16-bit, int8 (both), int8-cache, int8-weights."""
    policies: str = "apt"
    """Scheduling policies; vllm-v1 stands for vLLM, with KV."""
    prices: Path | None = None
    """CSV file with columns hardware and usd_per_hour, of one device; without it nothing is said of cost."""
    duration_s: float = 900.0
    """Seconds of simulated arrivals; fewer than 900 do not say whether a rate lasts."""
    seed: int = 0
    """Seed of the arrivals."""
    jobs: int | None = None
    """Number of processes; default: one for each usable CPU."""
    json: Path | None = None
    """JSON file for the plan."""

    def __post_init__(self) -> None:
        check_finite(self)
        check_greater(self, 0, ("rate", "ttft_slo_ms", "tbt_slo_ms", "stall_slo_ms", "duration_s"))
        check_share(self, ("attainment",))
        check_at_least(self, 0, ("seed",))
        check_at_least(self, 1, ("jobs",))
