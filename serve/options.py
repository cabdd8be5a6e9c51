"""Options that are flags of the command line; those of the engine itself are `EngineConfig`'s fields."""

import json
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from apt_jax.ranges import check_at_least, check_finite, check_greater
from apt_jax.serve.logs import LogLevel

DEMO_NAME = "apt-jax-demo"  # of the bundled model in the API
DEFAULT_MAX_BODY_BYTES = 4 * 2**20
ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+")
DEFAULT_SNAPSHOT_FILE = "apt-jax-unfinished.jsonl"

Model = Positional[Annotated[str | None, arg(metavar="[MODEL]")]]


def listed(name: str, given: tuple[str, ...]) -> tuple[str, ...]:
    """The values of a flag that may be repeated, each one value, several separated by commas, or a JSON list.

    Raises:
        ValueError: a value is empty, or not a JSON list of texts.
    """
    found: list[str] = []
    for text in given:
        try:
            found += json.loads(text) if text.lstrip().startswith("[") and '"' in text else text.split(",")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}={text[:80]!r} is not a JSON list; give values separated by commas") from error
    found = [value.strip() if isinstance(value, str) else "" for value in found]
    if not all(found):
        raise ValueError(f"{name}={','.join(given)!r} has an empty value; give texts separated by commas")
    return tuple(found)


@dataclass(frozen=True)
class LoadOptions:
    """How model and tokenizer are loaded; each field is also a keyword of `LLM`."""

    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    load_format: Literal["auto", "safetensors", "pt", "flax", "orbax", "dummy"] = "auto"
    """Format of the weights; auto: the best one present; dummy: random weights, needs only config.json."""
    generation_config: str = "auto"
    """Sampling defaults of requests; auto: the model's generation_config.json; none or vllm: neutral; or a FOLDER."""


@dataclass(frozen=True)
class DistributedOptions:
    """One model over several processes; start each with the same command and its own --process-id."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0; auto asks the cluster (Cloud TPU, Slurm); default: one process."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0; process 0 answers requests, the others run the same steps."""

    def __post_init__(self) -> None:
        if self.coordinator_address is None:
            for name in ("num_processes", "process_id"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} needs --coordinator-address")

    @property
    def leader_host(self) -> str | None:
        """Host of process 0 as the others reach it; None where the options do not name it."""
        address = self.coordinator_address
        return None if address in (None, "auto") else address.rpartition(":")[0] or None


@dataclass(frozen=True)
class AddressOptions:
    """Addresses and names of the HTTP server, and who may use it."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all IPv4 interfaces."""
    port: int = 8000
    """Port to listen on; 0: any free port."""
    served_model_name: str | None = None
    """Name of the model in the API, or several by commas, of which answers have the first; default: MODEL as given."""
    root_path: str = ""
    """Path below which a proxy serves this, such as /llm."""
    ssl_keyfile: str | None = None
    """File with the private key (PEM) to serve https with."""
    ssl_certfile: str | None = None
    """File with the certificate (PEM), and those that it was signed by."""
    ssl_ca_certs: str | None = None
    """File with certificates (PEM) that those of clients must be signed by."""
    ssl_cert_reqs: Literal[0, 1, 2] = 0
    """Whether clients need a certificate; 0: no, 1: it is checked if they have one, 2: yes."""
    api_key: UseAppendAction[tuple[str, ...]] = ()
    """Accepted API key (Authorization: Bearer KEY), a flag for each; APT_JAX_API_KEY adds one; default: none needed."""
    allowed_origins: UseAppendAction[tuple[str, ...]] = ()
    """Origins of web pages that may call the server from browsers (CORS), by commas; *: any; default: none."""
    allowed_hosts: UseAppendAction[tuple[str, ...]] = ()
    """Names that the Host header may have, by commas; *: any; default: localhost on a loopback address, else any."""


@dataclass(frozen=True)
class LimitOptions:
    """Requests and answers of the HTTP server: what they may take, and chats."""

    chat_template: str | None = None
    """File with a Jinja chat template; default: the tokenizer's own (OPT has none)."""
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    """Maximum size of a request body in bytes; a larger one gets 413."""
    max_header_bytes: int = 32768
    """Maximum size of a request's headers in bytes; larger ones get 431."""
    request_read_timeout: float = 60.0
    """Seconds within which a client must send its request, headers and body; a slower one gets 408."""
    response_write_timeout: float = 300.0
    """Seconds within which a client must take some of its answer; one that reads nothing is disconnected."""
    request_timeout: float | None = None
    """Seconds after which an unfinished request gets 504 and its blocks are freed; default: no limit."""
    reject_predicted_late: bool = False
    """Answer 503 at once to requests that are predicted to miss their TTFT SLO, instead of queueing them."""
    max_failed_steps: int = 10
    """Consecutive failed steps of the engine from which on /health is 503, until a step succeeds."""
    max_step_seconds: float | None = None
    """Seconds that a step may take before /health is 503; default: 20 times the largest step's predicted time, at
    least 60."""
    stream_interval: int = 1
    """Tokens that a stream sends at once, but for the first and the last; more cost less per token."""


@dataclass(frozen=True)
class ShutdownOptions:
    """What becomes of unfinished requests when the server stops, and of batches."""

    shutdown_timeout: float = 30.0
    """Seconds that running requests may go on after SIGTERM or SIGINT."""
    preemption_notice: str | None = None
    """Notices that the machine will be taken away: gce (metadata server), file:PATH (once it is there) or signal
    (SIGUSR1). The server then stops as by SIGTERM, within --preemption-grace instead of --shutdown-timeout. A replica
    hands its requests over to others; PATH may contain {replica}, its name."""
    preemption_grace: float = 30.0
    """Seconds that the machine lasts after a notice; running requests go on until 5 s before."""
    snapshot_file: str | None = DEFAULT_SNAPSHOT_FILE
    """File for requests that are still unfinished after that, for --resume-from; None: do not keep them."""
    snapshot_cache: bool = False
    """Keep the cached pages of these requests too, in the folder FILE.caches: resumed requests then begin with them
    instead of computing their prompts again."""
    resume_from: str | None = None
    """Finish the requests in this snapshot file of an earlier run; results go to FILE.results.jsonl."""
    batch_dir: str | None = None
    """Folder for OpenAI's Batch API (/v1/files, /v1/batches): files and unfinished batches are kept there; default: no
    such routes."""
    max_batch_file_bytes: int = 200 * 2**20
    """Maximum size of a file of requests in bytes; a larger one gets 413."""


@dataclass(frozen=True)
class LogOptions:
    """Logs, traces and recordings of the HTTP server."""

    log_level: LogLevel = "info"
    """Least level of log lines."""
    log_format: Literal["text", "json"] = "text"
    """Format of log lines: plain text, or one JSON object per line."""
    access_log: bool = True
    """Write a line to the log for each request."""
    log_requests: bool = False
    """Write prompts and sampling fields to the log."""
    otlp_traces_endpoint: str | None = None
    """OpenTelemetry collector for a span per request, such as http://127.0.0.1:4318/v1/traces."""
    enable_profiler: bool = False
    """Enable POST /debug/profile, which records host and device with jax.profiler."""
    profile_dir: str = "profiles"
    """Folder for the recordings of --enable-profiler."""


@dataclass(frozen=True)
class ServerOptions(LogOptions, ShutdownOptions, LimitOptions, AddressOptions):
    """The HTTP server: address, keys, limits, shutdown, logs."""

    def __post_init__(self) -> None:
        check_finite(self)
        if (self.ssl_keyfile or self.ssl_ca_certs) and not self.ssl_certfile:
            raise ValueError("ssl_keyfile and ssl_ca_certs need --ssl-certfile, the server's certificate")
        if self.ssl_cert_reqs and not self.ssl_ca_certs:
            raise ValueError(f"ssl_cert_reqs={self.ssl_cert_reqs} needs --ssl-ca-certs, to check certificates with")
        if self.root_path and not ROOT_PATH.fullmatch(self.root_path):
            raise ValueError(
                f"root_path={self.root_path!r} must begin with / and not end with it, and have what URLs may have, "
                "such as /llm"
            )
        for name in ("allowed_origins", "allowed_hosts"):
            object.__setattr__(self, name, listed(name, getattr(self, name)))
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be between 0 and 65535")
        if self.max_batch_file_bytes < 1:
            raise ValueError(f"max_batch_file_bytes={self.max_batch_file_bytes} must be at least 1")
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes={self.max_body_bytes} must be at least 1")
        for name in ("request_read_timeout", "response_write_timeout"):
            if not 0 < (seconds := getattr(self, name)) < 1e6:
                raise ValueError(f"{name}={seconds} must be greater than 0 seconds")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ValueError(f"request_timeout={self.request_timeout} must be greater than 0 seconds")
        check_at_least(self, 1, ("max_failed_steps", "stream_interval"))
        check_greater(self, 0, ("max_step_seconds",))
        if not 0 <= self.shutdown_timeout < 1e6:
            raise ValueError(f"shutdown_timeout={self.shutdown_timeout} must be at least 0 seconds")
        if not 0 <= self.preemption_grace < 1e6:
            raise ValueError(f"preemption_grace={self.preemption_grace} must be at least 0 seconds")
        if self.max_header_bytes < 1024:
            raise ValueError(f"max_header_bytes={self.max_header_bytes} must be at least 1024")
        if self.snapshot_cache and self.snapshot_file is None:
            raise ValueError("snapshot_cache=True keeps pages beside the snapshot; use --snapshot-file too")
        if not all(self.api_key):
            raise ValueError("api_key has an empty key; give at least one character")

    def served_names(self, model: str | None) -> tuple[str, ...]:
        """Names of the model in the API.

        Raises:
            ValueError: one is empty.
        """
        if self.served_model_name is None:
            return (model or DEMO_NAME,)
        return listed("served_model_name", (self.served_model_name,))

    @property
    def checks_host(self) -> bool:
        """Whether the Host header of requests is checked; `Hosts` then looks at the address they came in at."""
        return bool(self.allowed_hosts) or self.host not in ("", "0.0.0.0", "::")

    @property
    def own_hosts(self) -> tuple[str, ...]:
        """Names in the Host header that are taken besides those of the loopback address."""
        return (*self.allowed_hosts, self.host)
