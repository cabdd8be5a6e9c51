"""Options that are flags of the command line; those of the engine itself are `EngineConfig`'s fields."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

DEMO_NAME = "apt-jax-demo"  # of the bundled model in the API
DEFAULT_MAX_BODY_BYTES = 4 * 2**20

Model = Positional[Annotated[str | None, arg(metavar="[MODEL]")]]


@dataclass(frozen=True)
class LoadOptions:
    """Where the model's parts come from; also keywords of `LLM`."""

    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; default: the model's own."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    load_format: Literal["auto", "safetensors", "pt", "flax", "orbax", "dummy"] = "auto"
    """Format of the weights; auto takes the best there is, dummy makes random weights from config.json alone."""


@dataclass(frozen=True)
class DistributedOptions:
    """How the processes of one engine find each other; each is started with the same command but its own number."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, where several processes split one model; auto asks the cluster (Cloud TPU, Slurm)."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this is; 0 answers requests, the others follow it."""

    def __post_init__(self) -> None:
        if self.coordinator_address is None:
            for name in ("num_processes", "process_id"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} needs --coordinator-address")


@dataclass(frozen=True)
class ServerOptions:
    """How the server is reached."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every IPv4 interface."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    served_model_name: str | None = None
    """Name of the model in the API; default: MODEL as given."""
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    """Longest request body; longer ones get 413."""

    chat_template: str | None = None
    """File with a Jinja chat template; default: the tokenizer's own (OPT has none)."""

    max_header_bytes: int = 32768
    """Most bytes of all headers of a request; more get 431."""
    api_key: tuple[str, ...] = ()
    """Keys of which a client must send one (Authorization: Bearer KEY); also from APT_JAX_API_KEY; default: none."""
    allowed_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the server from browsers; * is any; default: none."""
    request_read_timeout: float = 60.0
    """Seconds that a client gets to send a request, headers and body; a slower one gets 408."""
    request_timeout: float | None = None
    """Seconds after which an unfinished request gets 504 and gives its blocks back; default: none."""
    reject_predicted_late: bool = False
    """Refuse with 503, instead of queueing, what would miss the promise for its first token."""
    shutdown_timeout: float = 30.0
    """Seconds that running requests get when the server is told to stop."""
    snapshot_file: str | None = "apt-jax-unfinished.jsonl"
    """Where what is unfinished by then is kept, for --resume-from; None keeps nothing."""
    resume_from: str | None = None
    """Such a file of an earlier run, to be finished; results go to FILE.results.jsonl."""
    enable_profiler: bool = False
    """Let POST /debug/profile record what the device does."""
    profile_dir: str = "profiles"
    """Folder for such recordings."""
    otlp_traces_endpoint: str | None = None
    """OpenTelemetry collector to send a trace of each request to, such as http://127.0.0.1:4318/v1/traces."""
    log_requests: bool = False
    """Write prompts and sampling fields to the log."""
    log_format: Literal["text", "json"] = "text"
    """Log lines for people, or one JSON object a line."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port} must be between 0 and 65535")
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes={self.max_body_bytes} must be at least 1")
        if not 0 < self.request_read_timeout < 1e6:
            raise ValueError(f"request_read_timeout={self.request_read_timeout} must be greater than 0 seconds")
        if self.request_timeout is not None and not self.request_timeout > 0:
            raise ValueError(f"request_timeout={self.request_timeout} must be greater than 0 seconds")
        if not 0 <= self.shutdown_timeout < 1e6:
            raise ValueError(f"shutdown_timeout={self.shutdown_timeout} must be at least 0 seconds")
        if self.max_header_bytes < 1024:
            raise ValueError(f"max_header_bytes={self.max_header_bytes} must be at least 1024")
        if not all(self.api_key):
            raise ValueError("api_key has an empty key; give at least one character")
