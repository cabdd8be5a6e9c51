"""The `apt-jax` command. Flags are generated from dataclass fields; jax is imported only when a command needs it."""

import contextlib
import dataclasses
import errno
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, subcommand

from apt_jax import __version__
from apt_jax.engine_config import EngineConfig
from apt_jax.files import reason_of
from apt_jax.flags.reader import parse
from apt_jax.flags.sources import Sourced, flags_of, unknown_variables, with_sources
from apt_jax.pallas_kernels.bench import kernels
from apt_jax.serve.bench.offline.options import BenchLatency, BenchThroughput
from apt_jax.serve.bench.serving.options import BenchServe
from apt_jax.serve.errors import EngineFailure
from apt_jax.serve.logs import set_up_logs, tell
from apt_jax.serve.options import (
    DEMO_NAME,
    AddressOptions,
    DistributedOptions,
    LimitOptions,
    LoadOptions,
    LogOptions,
    Model,
    ServerOptions,
    ShutdownOptions,
)
from apt_jax.serve.replicas.options import RayBatchOptions, RayOptions, ReplicaOptions
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.planning.options import PlanArgs

OTHER_SPELLINGS = {  # vLLM's, where they differ
    "--disable-uvicorn-access-log": "--no-access-log",
    "--enable-log-requests": "--log-requests",
    "--gpu-memory-utilization": "--device-memory-utilization",
    "--kv-cache-dtype": "--cache-dtype",
    "--kv-cache-memory-bytes": "--cache-memory-bytes",
    "--num-gpu-blocks-override": "--num-blocks",
    "--tp": "--tensor-parallel-size",
    "-tp": "--tensor-parallel-size",
    "--uvicorn-log-level": "--log-level",
}


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP with OpenAI's completions and chat API."""

    model: Model = None
    """Hub id, Hugging Face folder or converted folder; default: the bundled demo model."""
    config: str | None = None
    """YAML file with flags, NAME: VALUE; those given here or as APT_JAX_NAME in the environment override it."""
    address: OmitArgPrefixes[AddressOptions] = field(default_factory=AddressOptions)
    limit: OmitArgPrefixes[LimitOptions] = field(default_factory=LimitOptions)
    shutdown: OmitArgPrefixes[ShutdownOptions] = field(default_factory=ShutdownOptions)
    log: OmitArgPrefixes[LogOptions] = field(default_factory=LogOptions)
    replicas: OmitArgPrefixes[ReplicaOptions] = field(default_factory=ReplicaOptions)
    ray: OmitArgPrefixes[RayOptions] = field(default_factory=RayOptions)
    load: OmitArgPrefixes[LoadOptions] = field(default_factory=LoadOptions)
    engine: OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    distributed: OmitArgPrefixes[DistributedOptions] = field(default_factory=DistributedOptions)

    def __post_init__(self) -> None:
        _ = self.server

    @property
    def server(self) -> ServerOptions:
        """The options of the HTTP server, of all their groups; raises ValueError if they do not fit together."""
        groups = (self.address, self.limit, self.shutdown, self.log)
        return ServerOptions(**{f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)})

    def run(self) -> int:
        """Serve until told to stop."""
        from apt_jax.serve.http.server import serve
        from apt_jax.serve.runtime.starting.distributed import join

        if self.replicas.uses_ray and self.distributed.coordinator_address is not None:
            raise ValueError("--replicas starts its own processes; leave --coordinator-address out")
        if self.server.snapshot_cache:
            self._check_snapshot_cache()
        if not join(self.distributed):
            return _follow(self.model, self.load, self.engine)
        return serve(
            *(self.model, self.load, self.server, self.engine, self.replicas, self.ray),
            leader_host=self.distributed.leader_host,
        )

    def _check_snapshot_cache(self) -> None:
        """Raises ValueError where there are no pages that this process could keep."""
        if not self.engine.enable_prefix_caching:
            raise ValueError(
                "snapshot_cache=True keeps pages of the prefix cache, which is off; use --enable-prefix-caching too"
            )
        if self.replicas.uses_ray or self.distributed.coordinator_address is not None:
            raise ValueError(
                "snapshot_cache=True needs the whole cache in this process; leave out --replicas and "
                "--coordinator-address, or --snapshot-cache"
            )


@dataclass(frozen=True)
class RunBatch:
    """Answer a file of OpenAI batch lines; the same command resumes a job that was stopped."""

    input: Annotated[Path, arg(aliases=["-i"])]
    """File of requests, one JSON object per line: custom_id, method, url, body."""
    output: Annotated[Path, arg(aliases=["-o"])]
    """File of results, in order of completion; requests that are answered in it are skipped."""
    model: Model = None
    """Hub id, Hugging Face folder or converted folder; default: the bundled demo model."""
    config: str | None = None
    """YAML file with flags, NAME: VALUE; those given here or as APT_JAX_NAME in the environment override it."""
    served_model_name: str | None = None
    """Name of the model in the lines; default: MODEL as given."""
    chat_template: str | None = None
    """File with a Jinja chat template; default: the tokenizer's own (OPT has none)."""
    load: OmitArgPrefixes[LoadOptions] = field(default_factory=LoadOptions)
    engine: OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    distributed: OmitArgPrefixes[DistributedOptions] = field(default_factory=DistributedOptions)
    replicas: OmitArgPrefixes[RayBatchOptions] = field(default_factory=RayBatchOptions)

    def __post_init__(self) -> None:
        self.engine.check_offline()

    def run(self) -> int:
        """Answer what is unanswered."""
        from apt_jax.serve.batch.batch_jobs import run_batch
        from apt_jax.serve.runtime.starting.distributed import join

        if self.replicas.ray is not None:
            from apt_jax.serve.replicas.batch import run_batch_on_ray
            from apt_jax.serve.replicas.messages import EngineSpec

            spec = EngineSpec(self.model, self.load, self.engine, self.served_model_name or self.model or DEMO_NAME)
            return run_batch_on_ray(self.input, self.output, spec, self.replicas, self.chat_template)
        if not join(self.distributed):
            return _follow(self.model, self.load, self.engine)
        return run_batch(
            *(self.input, self.output, self.model, self.served_model_name, self.load, self.engine, self.chat_template),
            self.distributed.leader_host,
        )


@dataclass(frozen=True)
class Convert:
    """Convert a checkpoint to Orbax's format, which loads straight to the device."""

    source: Positional[Annotated[str, arg(metavar="SRC")]]
    """Hub id or Hugging Face folder."""
    destination: Positional[Annotated[Path, arg(metavar="DST")]]
    """New folder."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type to store; default: the checkpoint's own."""
    load_format: Literal["auto", "safetensors", "pt", "flax", "orbax", "dummy"] = "auto"
    """Format of SRC; auto: the best one present."""
    quantization: Literal["none", "int8"] | None = None
    """Number type of the weights to store: none (that of --dtype) or int8; default: as SRC stores them."""
    cache_dtype: str = "auto"
    """auto or int8; int8: measure what --cache-dtype int8 of `serve` needs once and keep it with the weights."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    def run(self) -> int:
        """Convert."""
        from apt_jax.checkpoints.convert import convert

        done = convert(**dataclasses.asdict(self))
        kind = done.dtype.name if done.quantization == "none" else f"{done.quantization} and {done.dtype.name}"
        print(f"wrote {done.folder} ({done.weight_bytes:,} bytes of {kind} weights, {done.fingerprint})")
        return 0


@dataclass(frozen=True)
class Simulate(SimulateArgs):
    """Simulate a server: the engine's scheduler under a virtual clock. Lists are separated by commas."""

    def run(self) -> int:
        """Simulate, print tables, write files."""
        from apt_jax.simulation.cli import run

        run(self)
        return 0


@dataclass(frozen=True)
class Plan(PlanArgs):
    """Plan a deployment by simulation: devices, replicas and cost. Lists are separated by commas."""

    def run(self) -> int:
        """Simulate, print a table, write the file asked for."""
        from apt_jax.simulation.planning.planner import run

        run(self)
        return 0


Measurement = (
    Annotated[BenchServe, subcommand("serve")]
    | Annotated[BenchThroughput, subcommand("throughput")]
    | Annotated[BenchLatency, subcommand("latency")]
    | Annotated[kernels.BenchKernels, subcommand("kernels")]
)


@dataclass(frozen=True)
class Bench:
    """Measure a server, the engine alone, or its kernels."""

    what: OmitSubcommandPrefixes[Measurement]

    def run(self) -> int:
        """Measure, print, write files."""
        match self.what:
            case BenchServe():
                from apt_jax.serve.bench.serving import measure

                return measure.run(self.what)
            case BenchThroughput():
                from apt_jax.serve.bench.offline import throughput

                return throughput.run(self.what)
            case BenchLatency():
                from apt_jax.serve.bench.offline import latency

                return latency.run(self.what)
            case kernels.BenchKernels():
                return kernels.run(self.what)


Command = (
    Annotated[Serve, subcommand("serve")]
    | Annotated[RunBatch, subcommand("run-batch")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Simulate, subcommand("simulate")]
    | Annotated[Plan, subcommand("plan")]
    | Annotated[Bench, subcommand("bench")]
)


@dataclass(frozen=True)
class AptJax:
    """Serve OPT language models in JAX, with a hybrid cache of KV pairs and hidden vectors."""

    command: OmitSubcommandPrefixes[Command]


def _follow(model: str | None, load: LoadOptions, config: EngineConfig) -> int:
    """Run what process 0 runs, until it ends."""
    from apt_jax.serve.runtime.build import build_engine

    build_engine(model, engine_config=config, **dataclasses.asdict(load))
    raise AssertionError("only process 0 gets an engine")


def with_own_spelling(arguments: list[str]) -> list[str]:
    """The arguments with flags in other spellings replaced by those that the fields give."""
    pairs = (argument.partition("=") for argument in _with_host_cache_bytes(arguments))
    return [OTHER_SPELLINGS.get(name.replace("_", "-"), name) + equals + value for name, equals, value in pairs]


def with_model_first(arguments: list[str], kind: type) -> list[str]:
    """The arguments with vLLM's `--model MODEL` as what it is in most commands, a word without a flag."""
    model = flags_of(kind).get("model")
    if model is None or not model.is_word:
        return arguments
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--model" and (equals or at + 1 < len(arguments)):
            rest = arguments[at + (1 if equals else 2) :]
            return [value if equals else arguments[at + 1], *arguments[:at], *rest]
    return arguments


def _with_host_cache_bytes(arguments: list[str]) -> list[str]:
    """The arguments with `--kv-offloading-size`, which is in GiB, as `--host-cache-bytes`."""
    found: list[str] = []
    follows = False  # whether the next argument is the size
    for argument in arguments:
        name, equals, value = argument.partition("=")
        is_size = name.replace("_", "-") == "--kv-offloading-size"
        if is_size:
            argument = "--host-cache-bytes" + equals + (_from_gib(value) if equals else "")
        found.append(_from_gib(argument) if follows else argument)
        follows = is_size and not equals
    return found


def _from_gib(size: str) -> str:
    """GiB in bytes; what is no number stays as it is, to be refused with the flag's name."""
    try:
        return str(int(float(size) * 2**30))
    except (ValueError, OverflowError):
        return size


COMMANDS: dict[str, type] = {
    "serve": Serve, "run-batch": RunBatch, "convert": Convert, "simulate": Simulate, "plan": Plan,
    "bench serve": BenchServe,
    "bench throughput": BenchThroughput, "bench latency": BenchLatency, "bench kernels": kernels.BenchKernels,
    "bench": Bench,
}  # fmt: skip


def own_flag(flag: str, value: Any) -> tuple[str, Any]:
    """A flag of a file and its value, as the fields have them."""
    if flag == "--kv-offloading-size":
        return "--host-cache-bytes", _from_gib(str(value))
    return OTHER_SPELLINGS.get(flag, flag), value


def read_with_sources(kind: type, prog: str, arguments: Sequence[str]) -> Any:
    """`parse`, whose errors also say of which file or variable the bad value is."""
    try:
        return parse(kind, prog, arguments)
    except SystemExit as error:
        if error.code == 2:
            for source in [found.source for found in arguments if is_bad(found, kind, prog, arguments)]:
                tell(f"that value is from {source}")
        raise


def is_bad(argument: str, kind: type, prog: str, arguments: Sequence[str]) -> TypeGuard[Sourced]:
    """Whether it comes from a file or variable, and what would be read without it."""
    if not isinstance(argument, Sourced):
        return False
    silent = io.StringIO()
    try:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            parse(kind, prog, [each for each in arguments if each is not argument])
    except SystemExit:
        return False
    return True


def warn_of_variables() -> None:
    """Tell of variables that look like a flag's and are none's: one that is spelled wrong would do nothing."""
    known = {"config", "api_key"}.union(*(flags_of(kind) for kind in COMMANDS.values() if kind is not Bench))
    for sentence in unknown_variables(os.environ, known):
        tell(sentence, "warning")


def read_command(arguments: list[str]) -> Any:
    """The command. One that is named first is read alone, so that errors and help are its own."""
    for name, kind in COMMANDS.items():
        words = name.split()
        if arguments[: len(words)] == words:
            own = arguments[len(words) :]
            if kind is not Bench:
                own = with_model_first(own, kind)
                own = with_sources(own, kind, os.environ, own_flag)
            command: Any = read_with_sources(kind, f"apt-jax {name}", own)
            return Bench(command) if len(words) > 1 else command
    return parse(AptJax, "apt-jax", arguments).command


def check_standard_output() -> None:
    """Raises OSError if it is a full device: noticed before the work, not when the results are printed."""
    try:
        os.write(1, b"")
    except OSError as error:
        if error.errno == errno.ENOSPC:  # others, such as a closed one, concern nobody who prints nothing
            raise OSError(error.errno, error.strerror, "standard output") from error


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, 1 (it failed), 2 (wrong usage) or 130 (interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        print(f"apt-jax {__version__}")
        sys.exit(0)
    try:
        command = read_command(with_own_spelling(arguments))
        if isinstance(command, Serve):
            set_up_logs(command.server.log_format, command.server.log_level)
        else:
            set_up_logs()
        warn_of_variables()
        if not isinstance(command, Serve):
            check_standard_output()
        code = command.run()
    except KeyboardInterrupt:
        code = 130
    except (ValueError, OSError, EngineFailure) as error:
        tell(reason_of(error) if isinstance(error, OSError) else error)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
