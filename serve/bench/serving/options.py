"""Flags of `apt-jax bench serve`. Imports nothing heavy: the command line shows its help at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from apt_jax.serve.bench.work_options import WorkOptions

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class BenchServe:
    """Load a running OpenAI server and measure what its clients see. Lists are separated by commas.

    All arrival times are drawn beforehand and latencies count from them, so a server that stalls cannot hide it by
    slowing the client down. Exits with 1 if every request fails.
    """

    base_url: str = "http://127.0.0.1:8000"
    """Address of the server."""
    endpoint: Literal["completions", "chat"] = "completions"
    """/v1/completions or /v1/chat/completions."""
    model: str | None = None
    """Name of the model in the API; default: the first of /v1/models."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer: send texts instead of token ids."""
    api_key: str | None = None
    """Key of the server; default: OPENAI_API_KEY or APT_JAX_API_KEY."""
    work: OmitArgPrefixes[WorkOptions] = field(default_factory=WorkOptions)
    max_model_len: int | None = None
    """Leave out longer requests of a dataset; default: what /v1/models says, else 2048."""
    request_rate: str = "inf"
    """Requests per second, such as 1,2,4: one run each; inf sends all at once."""
    burstiness: float | None = None
    """Shape of the Gamma distributed gaps: 1 (default) is Poisson, less is burstier, inf is regular."""
    cv: float | None = None
    """The same as a coefficient of variation of the gaps: 1 is Poisson, more is burstier, 0 is regular."""
    dataset_arrivals: bool = False
    """Take the arrivals that the dataset recorded, stretched to each rate (inf: as recorded)."""
    max_concurrency: int | None = None
    """Most requests under way; the time that others wait for that counts."""
    sweep: bool = False
    """Search the highest rate that reaches each of --targets; begins at the first of --request-rate, or at 1."""
    sweep_tolerance: float = 0.1
    """How exactly to search, as a share of the rate; each halving costs a run."""
    targets: str = "0.7,0.9,0.99"
    """Attainment targets for effective throughput."""
    ttft_slo_ms: float = 1000.0
    """Promise for the time to the first token."""
    tbt_slo_ms: float = 1000.0
    """Promise for the 99th percentile of a request's gaps between tokens."""
    send_slo: bool = True
    """Tell the server these promises in headers (x-slo-ttft-ms, x-slo-tbt-ms), which others than apt-jax ignore."""
    goodput: tuple[str, ...] = ()
    """Limits such as ttft:500 tpot:50 e2el:10000 in ms: report requests per second that keep all of them."""
    ignore_eos: bool = True
    """Ask for every output token, also past the end of the text; not every server knows the field."""
    temperature: float = 0.0
    """Of sampling; 0 is greedy."""
    extra_body: str = ""
    """JSON object with more fields of every request."""
    num_warmups: int = 1
    """Requests before the first run; they are not counted, and the first must succeed."""
    request_timeout: float = 3600.0
    """Seconds after which a request has failed."""
    seed: int = 0
    """Seed of arrivals, lengths and prompts."""
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    """What to report: ttft, tpot, itl, e2el."""
    metric_percentiles: str = "90,99"
    """Which percentiles of it."""
    save_detailed: bool = False
    """Write every request's lengths, times and error too."""
    output: Path | None = None
    """JSON file for the results, in the names that vLLM's benchmark uses."""
    plot: Path | None = None
    """Draw attainment against rate, and first-token times (PNG, PDF or SVG; needs matplotlib)."""

    def __post_init__(self) -> None:
        if self.burstiness is not None and self.cv is not None:
            raise ValueError(f"burstiness={self.burstiness} and cv={self.cv} say the same thing; give one of them")
        if self.burstiness is not None and not self.burstiness > 0:
            raise ValueError(f"burstiness={self.burstiness} must be greater than 0")
        if self.cv is not None and not 0 <= self.cv < float("inf"):
            raise ValueError(f"cv={self.cv} must be at least 0")
        for name in ("ttft_slo_ms", "tbt_slo_ms", "request_timeout", "sweep_tolerance"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.num_warmups < 0:
            raise ValueError(f"num_warmups={self.num_warmups} must be at least 0")
        for name in ("max_concurrency", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")

    def run(self) -> int:
        """Load the server, print what was measured, write files."""
        from apt_jax.serve.bench.serving.measure import run

        return run(self)
