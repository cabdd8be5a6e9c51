"""Flags of `apt-jax simulate`. Imports nothing heavy: the command line shows its help at once."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SimulateArgs:
    """Simulate a server: the real scheduler under a virtual clock. Lists are separated by commas."""

    model: str = "opt-13b"
    """Model size: opt-125m to opt-66b."""
    hardware: str = "a100-40gb"
    """Device: a100-40gb, a100-80gb, h100-80gb, h200, tpu-v5e, tpu-v5p, tpu-v6e, tpu7x."""
    tensor_parallel_size: int = 1
    """Devices that the model is split over."""
    workload: str = "sharegpt"
    """sharegpt, humaneval, longbench, azure, or a CSV file: arrival_s,prompt_tokens,output_tokens."""
    rate: str = ""
    """Requests per second, e.g. 1,2,3. Default: 1,2,3; with recorded arrivals their own rate."""
    cv: float | None = None
    """Coefficient of variation of the gaps (1 is Poisson). Default: 1, or recorded arrivals stretched to the rate."""
    num_requests: int = 1000
    """Requests per point; more where these would arrive within 300 seconds."""
    policies: str = "fcfs,apt"
    """Scheduling policies, with options as NAME:option=value:option=value."""
    cache_modes: str = "kv,hybrid"
    """kv, hidden, hybrid."""
    hidden_attention: str = "absorbed"
    """recompute (Apt-Serve's), absorbed."""
    ttft_slo_ms: float = 1000.0
    """Promise for the time to the first token."""
    tbt_slo_ms: float = 1000.0
    """Promise for the 99th percentile of a request's gaps between tokens."""
    effective_throughput: str = ""
    """Attainment targets, e.g. 0.7,0.9,0.99: search the highest rate that reaches each."""
    seed: int = 0
    """Seed of arrivals and lengths."""
    max_num_seqs: int = 256
    """Most requests in one iteration."""
    max_num_batched_tokens: int = 2048
    """Most tokens in one iteration."""
    block_size: int = 16
    """Tokens per cache block."""
    num_blocks: int | None = None
    """Cache blocks; default: what the device's memory leaves."""
    duration_s: float = 300.0
    """Arrivals last at least this long; short traces flatter policies that starve."""
    instances: int = 1
    """Instances of the model; --rate is for all together."""
    router: str = "pending-time"
    """Who chooses the instance of a request: pending-time, least-requests, power-of-two, round-robin, random."""
    report_interval_s: float = 0.0
    """Age that an instance's report to the router can reach. 0: the router sees the present."""
    max_instances: int | None = None
    """Autoscaling between --instances and this; a new instance takes requests after 30 s."""
    json: Path | None = None
    """Write all results here."""
    plot: Path | None = None
    """Draw attainment, first-token times, batch size and cache mix here (PNG, PDF or SVG; needs matplotlib)."""
