"""Flags of `apt-jax bench serve`. Imports nothing heavy: the command line shows its help at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes

from apt_jax.ranges import check_at_least, check_cv, check_finite, check_greater
from apt_jax.request import Slo
from apt_jax.serve.bench.work_options import WorkOptions

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class BenchServe:
    """Load a running OpenAI server and measure what its clients see. Lists are separated by commas.

    All arrival times are drawn before the run and latencies count from them, so a stalled server cannot hide the stall
    by slowing the client down. Exits with 1 if every request fails.
    """

    base_url: str = "http://127.0.0.1:8000"
    """Address of the server."""
    endpoint: Literal["completions", "chat"] = "completions"
    """/v1/completions or /v1/chat/completions."""
    model: str | None = None
    """Name of the model in the API; default: the first of /v1/models."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer; with it, prompts are sent as text instead of token ids."""
    api_key: str | None = None
    """Key of the server; default: OPENAI_API_KEY or APT_JAX_API_KEY."""
    work: OmitArgPrefixes[WorkOptions] = field(default_factory=WorkOptions)
    max_model_len: int | None = None
    """Skip requests of a dataset that are longer; default: the limit that /v1/models reports, else 2048."""
    request_rate: str = "inf"
    """Requests per second, one run for each rate, such as 1,2,4; inf: all at once."""
    burstiness: float | None = None
    """Shape of the Gamma distribution of arrival gaps: 1 (default): Poisson; less: burstier; inf: regular."""
    cv: float | None = None
    """Coefficient of variation of arrival gaps, instead of --burstiness: 1: Poisson; more: burstier; 0: regular."""
    dataset_arrivals: bool = False
    """Use the dataset's recorded arrivals, stretched to each rate (inf: as recorded)."""
    max_concurrency: int | None = None
    """Maximum number of concurrent requests; the time that a request waits for a slot counts as latency."""
    sweep: bool = False
    """Search for the highest rate that reaches each of --targets, starting from the first --request-rate, or 1."""
    sweep_tolerance: float = 0.1
    """Precision of the search, as a share of the rate; each halving costs one more run."""
    targets: str = "0.7,0.9,0.99"
    """Attainment targets for effective throughput; a search is for strict attainment."""
    ttft_slo_ms: float = 1000.0
    """SLO for the time to the first token, in milliseconds."""
    tbt_slo_ms: float = 1000.0
    """SLO for the 99th percentile of a request's gaps between tokens, in milliseconds."""
    stall_slo_ms: float | None = None
    """SLO for every single gap, in milliseconds, for strict attainment; default: as `serve --stall-slo-ms`."""
    send_slo: bool = True
    """Send the SLOs in the headers x-slo-ttft-ms, x-slo-tbt-ms and x-slo-stall-ms; servers that do not know them
    ignore them."""
    goodput: tuple[str, ...] = ()
    """Limits in ms, such as ttft:500 tpot:50 e2el:10000: report the requests per second that meet all of them."""
    ignore_eos: bool = True
    """Generate the full output length, past end-of-text tokens; not every server supports it."""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy."""
    extra_body: str = ""
    """JSON object with additional fields for every request."""
    num_warmups: int = 1
    """Uncounted requests before the first run; the first of them must succeed."""
    request_timeout: float = 3600.0
    """Seconds after which a request counts as failed."""
    seed: int = 0
    """Seed of arrivals, lengths and prompts."""
    percentile_metrics: str = "ttft,tpot,itl,e2el"
    """Latencies to report: ttft, tpot, itl, e2el."""
    metric_percentiles: str = "90,99"
    """Percentiles to report of each."""
    save_detailed: bool = False
    """Include every request's lengths, times and error in the output."""
    output: Path | None = None
    """JSON file for the results; its keys are those of vllm bench serve."""
    plot: Path | None = None
    """Plot attainment and time to first token against the rate (PNG, PDF or SVG; needs matplotlib)."""

    def __post_init__(self) -> None:
        if self.burstiness is not None and self.cv is not None:
            raise ValueError(f"burstiness={self.burstiness} and cv={self.cv} say the same thing; give one of them")
        check_finite(self, may_be_infinite=("burstiness",))
        check_greater(self, 0, ("burstiness", "ttft_slo_ms", "tbt_slo_ms", "stall_slo_ms", "request_timeout"))
        check_at_least(self, 1e-3, ("sweep_tolerance",))  # rates have four digits
        check_at_least(self, 0, ("cv", "temperature", "num_warmups", "seed"))
        check_at_least(self, 1, ("max_concurrency", "max_model_len"))
        if self.dataset_arrivals and (drawn := [n for n in ("burstiness", "cv") if getattr(self, n) is not None]):
            raise ValueError(f"{drawn[0]}={getattr(self, drawn[0])} is of drawn arrivals; leave out --dataset-arrivals")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key has characters that no HTTP header can carry; give the key alone")
        if self.cv is not None:
            check_cv(self.cv)
        elif self.burstiness is not None:
            check_cv(self.burstiness**-0.5, f"burstiness={self.burstiness}")

    @property
    def slo(self) -> Slo:
        """The SLO of every request."""
        return Slo(
            self.ttft_slo_ms / 1e3,
            self.tbt_slo_ms / 1e3,
            None if self.stall_slo_ms is None else self.stall_slo_ms / 1e3,
        )
