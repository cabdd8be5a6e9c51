"""Flags of `apt-jax bench throughput` and `bench latency`. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from apt_jax.engine_config import EngineConfig
from apt_jax.ranges import check_at_least, check_at_most, check_finite
from apt_jax.serve.bench.work_options import MOST_REQUESTS, MOST_TOKENS, WorkOptions
from apt_jax.serve.options import LoadOptions, Model


@dataclass(frozen=True)
class BenchThroughput:
    """Measure the throughput of the engine without HTTP; all requests are present from the start."""

    model: Model = None
    """Hub id, Hugging Face folder or converted folder; default: the bundled demo model."""
    work: OmitArgPrefixes[WorkOptions] = field(default_factory=WorkOptions)
    temperature: float = 0.0
    """Sampling temperature; 0: greedy."""
    output: Path | None = None
    """JSON file for the results."""
    load: OmitArgPrefixes[LoadOptions] = field(default_factory=LoadOptions)
    engine: OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_finite(self)
        check_at_least(self, 0, ("temperature",))
        self.engine.check_offline()


@dataclass(frozen=True)
class BenchLatency:
    """Measure the latency of one batch of equal requests without HTTP: first token, each further token, total."""

    model: Model = None
    """Hub id, Hugging Face folder or converted folder; default: the bundled demo model."""
    batch_size: int = 8
    """Requests in the batch."""
    input_len: int = 32
    """Prompt tokens of each request."""
    output_len: int = 128
    """Output tokens of each request."""
    num_iters_warmup: int = 3
    """Uncounted batches before the measurement."""
    num_iters: int = 10
    """Measured batches."""
    output: Path | None = None
    """JSON file for the results."""
    load: OmitArgPrefixes[LoadOptions] = field(default_factory=LoadOptions)
    engine: OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_at_least(self, 1, ("batch_size", "input_len", "output_len", "num_iters"))
        check_at_least(self, 0, ("num_iters_warmup",))
        check_at_most(self, MOST_REQUESTS, ("batch_size", "num_iters", "num_iters_warmup"))
        check_at_most(self, MOST_TOKENS, ("input_len", "output_len"))
        self.engine.check_offline()
