"""What each way to serve a workload takes: the rate that one replica keeps and makes last, found by simulation.

Replicas are counted as if the rate of several were that of one times their number. With a router that looks at loads
it is a little more (study `routing-instances`), and there is nothing left for one that fails.
"""

import csv
import itertools
import json as json_format
import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from apt_jax.cache import CacheKind
from apt_jax.files import EVERYBODY, check_writable, read_text, replace_file
from apt_jax.flags.lists import listed_counts, listed_names
from apt_jax.host_limits import usable_processors
from apt_jax.progress import is_hidden
from apt_jax.scheduling.costs.cost_model import block_bytes
from apt_jax.scheduling.costs.hardware import HARDWARE
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.vllm.defaults import BASELINES
from apt_jax.simulation.experiment import Configuration, Experiment
from apt_jax.simulation.planning.options import PlanArgs
from apt_jax.simulation.report import Report
from apt_jax.simulation.throughput.points import Job, Point, Task, run_jobs
from apt_jax.simulation.throughput.questions import Question
from apt_jax.simulation.throughput.searches import Found, search

NUMBERS = {
    "16-bit": ("auto", "none"), "int8": ("int8", "int8"), "int8-cache": ("int8", "none"),
    "int8-weights": ("auto", "int8"),
}  # fmt: skip  # cache and weights
GIB = 2**30
SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Way:
    """One way to serve: devices of a replica, number types, policy."""

    hardware: str
    devices: int
    numbers: str
    policy: str
    experiment: Experiment

    @property
    def configuration(self) -> Configuration:
        """The hybrid cache, baselines with their own; hidden attention as this package runs it on the device."""
        baseline = BASELINES.get(self.policy.split(":")[0])
        return self.policy, "hybrid" if baseline is None else baseline.cache_mode, "absorbed"


@dataclass(frozen=True)
class Entry:
    """What a way takes.

    Attributes:
        problem: why it cannot be, in words; then nothing else is known.
        rate: requests per second that a replica keeps and that last, at most the fluid bound.
        lasts: whether that is known to last; None if too little was simulated.
        strict_attainment, worst_class: of a replica with its share of the requests, and of the quartile of prompt or
            output lengths that is kept least; None where no number of replicas keeps it.
        usd_per_hour, usd_per_million_tokens: of all devices; prompt and output tokens together, at the rate asked for.
    """

    hardware: str
    devices_per_replica: int
    numbers: str
    policy: str
    problem: str | None = None
    weights_gib: float = 0.0
    cache_gib: float = 0.0
    tokens_as_kv: int = 0
    rate: float = 0.0
    lasts: bool | None = None
    fluid_bound: float = 0.0
    replicas: int = 0
    devices: int = 0
    strict_attainment: float | None = None
    worst_class: float | None = None
    usd_per_hour: float | None = None
    usd_per_million_tokens: float | None = None


def read_prices(path: Path) -> dict[str, float]:
    """US dollars per hour of one device, by its name.

    Raises:
        ValueError: the file cannot be read, or a line says nothing; one sentence.
    """
    try:
        rows = list(csv.DictReader(read_text(path).splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--prices {path} cannot be read: {error}") from error
    found = {}
    for number, row in enumerate(rows, start=1):
        name, text = (row.get("hardware") or "").strip(), (row.get("usd_per_hour") or "").strip()
        try:
            price = float(text)
        except ValueError:
            price = -1.0
        if name not in HARDWARE or not 0 <= price < math.inf:
            known = ", ".join(sorted(HARDWARE))
            raise ValueError(
                f"--prices {path}, line {number + 1}: {name!r} for {text!r}; give hardware (one of {known}) and "
                "usd_per_hour, at least 0"
            )
        found[name] = price
    if not found:
        raise ValueError(f"--prices {path} has no line; give columns hardware and usd_per_hour")
    return found


def ways(args: PlanArgs) -> list[Way]:
    """Every combination asked for.

    Raises:
        ValueError: a name is unknown.
    """
    policies = listed_names("policies", args.policies)
    for policy in policies:
        make_policy(policy)
    return [
        Way(
            hardware, devices, numbers, policy,
            Experiment(
                model=args.model, hardware=hardware, tensor_parallel_size=devices, workload=args.workload,
                ttft_slo_ms=args.ttft_slo_ms, tbt_slo_ms=args.tbt_slo_ms, stall_slo_ms=args.stall_slo_ms,
                cache_dtype=NUMBERS[numbers][0], quantization=NUMBERS[numbers][1], seed=args.seed,
                duration_s=args.duration_s, num_requests=1, enable_prefix_caching=False,
            ),
        )
        for hardware, devices, numbers, policy in itertools.product(
            listed_names("hardware", args.hardware, tuple(HARDWARE)),
            listed_counts("tensor_parallel_size", args.tensor_parallel_size, 1),
            listed_names("numbers", args.numbers, tuple(NUMBERS)), policies,
        )
    ]  # fmt: skip


def plan(args: PlanArgs) -> list[Entry]:
    """What each way takes: the cheapest first, or those with the fewest devices; what cannot be comes last.

    Raises:
        ValueError: a flag has a bad value.
    """
    prices = {} if args.prices is None else read_prices(args.prices)
    question = Question("strict", args.attainment)
    asked, problems = [], []
    for way in ways(args):
        way.experiment.lengths  # noqa: B018  # a bad workload is refused before anything is simulated
        try:
            way.experiment.pool_blocks(way.policy)
            way.experiment.fluid_bound(way.configuration)
        except ValueError as error:
            problems.append(Entry(way.hardware, way.devices, way.numbers, way.policy, problem=str(error)))
        else:
            asked.append(way)
    jobs: list[Job] = [_simulated(args, way, question) for way in asked]
    with tqdm(desc="points", unit="point", disable=is_hidden()) as bar:
        answers = run_jobs(jobs, args.jobs or usable_processors(), lambda task: bar.update() and None)
    entries = [_entry(args, prices, way, *answer) for way, answer in zip(asked, answers, strict=True)]
    return sorted(entries, key=_order) + problems


def _simulated(
    args: PlanArgs, way: Way, question: Question
) -> Generator[Task, Point, tuple[Found, float, int, Report | None]]:
    """A job: what a replica keeps, that at most as the bound allows, replicas, and one of them under its share."""
    found = (yield from search(way.experiment, way.configuration, [question]))[question]
    rate = min(found.rate, way.experiment.fluid_bound(way.configuration))  # a short simulation may pass it
    replicas = math.ceil(args.rate / rate - 1e-9) if rate else 0
    if not replicas:
        return found, rate, 0, None
    point = yield Task(way.experiment, way.configuration, args.rate / replicas)
    return found, rate, replicas, point.report


def _entry(
    args: PlanArgs, prices: dict[str, float], way: Way, found: Found, rate: float, replicas: int, report: Report | None
) -> Entry:
    experiment = way.experiment
    model = experiment.cost_model("absorbed")
    blocks = experiment.pool_blocks(way.policy)
    lengths = experiment.lengths
    tokens = float((lengths.prompt_tokens + lengths.output_tokens).mean())
    bound = experiment.fluid_bound(way.configuration)
    devices, price = replicas * way.devices, prices.get(way.hardware)
    cost = None if price is None or not replicas else devices * price
    return Entry(
        way.hardware, way.devices, way.numbers, way.policy,
        weights_gib=model.weight_bytes / GIB,
        cache_gib=blocks * block_bytes(model, experiment.block_size) / GIB,
        tokens_as_kv=blocks // CacheKind.KV.blocks_per_page * experiment.block_size,
        rate=rate, lasts=found.sustained, fluid_bound=bound,
        replicas=replicas, devices=devices, usd_per_hour=cost,
        strict_attainment=None if report is None else report.strict_attainment,
        worst_class=None if report is None else report.worst_class,
        usd_per_million_tokens=None if cost is None else cost / (args.rate * tokens * SECONDS_PER_HOUR) * 1e6,
    )  # fmt: skip


def _order(entry: Entry) -> tuple[bool, bool, float, int, float]:
    cost = entry.usd_per_hour
    return not entry.replicas, cost is None, cost or 0.0, entry.devices, -entry.rate


def run(args: PlanArgs) -> list[Entry]:
    """Plan, print, write the file asked for."""
    check_writable(args.json, "--json")
    entries = plan(args)
    _print(args, entries)
    if args.json is not None:
        arguments: dict[str, Any] = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(args).items()
            if name not in ("json", "jobs")
        }
        text = json_format.dumps({"arguments": arguments, "plan": [asdict(entry) for entry in entries]}, indent=1)
        replace_file(args.json, f"{text}\n".encode(), mode=EVERYBODY)
    return entries


def _print(args: PlanArgs, entries: Sequence[Entry]) -> None:
    console = Console(width=200, markup=False)
    table = Table(
        "device", "per replica", "numbers", "policy", "weights GiB", "cache GiB", "tokens as KV", "requests/s", "bound",
        "replicas", "devices", "kept", "worst class", "USD/hour", "USD/million tokens",
    )  # fmt: skip
    for e in entries:
        if e.problem is None:
            lasts = "" if e.lasts else " ?"
            table.add_row(
                e.hardware, str(e.devices_per_replica), e.numbers, e.policy, f"{e.weights_gib:.1f}",
                f"{e.cache_gib:.1f}", f"{e.tokens_as_kv:,}", f"{e.rate:.2f}{lasts}", f"{e.fluid_bound:.2f}",
                str(e.replicas) if e.replicas else "none keeps it", str(e.devices or "-"),
                "-" if e.strict_attainment is None else f"{e.strict_attainment:.1%}",
                "-" if e.worst_class is None else f"{e.worst_class:.1%}",
                "-" if e.usd_per_hour is None else f"{e.usd_per_hour:.2f}",
                "-" if e.usd_per_million_tokens is None else f"{e.usd_per_million_tokens:.3f}",
            )  # fmt: skip
    console.print(
        f"{args.model}, {args.workload}: {args.rate:g} requests/s, {args.attainment:.0%} kept strictly "
        f"(first token within {args.ttft_slo_ms:g} ms, gaps within {args.tbt_slo_ms:g} ms)"
    )
    console.print(table)
    for e in entries:
        if e.problem is not None:
            name = f"{e.hardware} x{e.devices_per_replica}, {e.numbers}, {e.policy}"
            console.print(f"{name}: {e.problem}", soft_wrap=True)
    console.print(
        "Kept: by a replica with its share of the requests; the worst class is the quartile of prompt or output "
        "lengths that is kept least. Simulated, one seed; hidden attention as this package runs it on the device, "
        "vllm-v1 with kernels of its own; int8 as if every kernel read it. Replicas share the rate evenly, and none "
        "is spare. A rate with ? is not known to last.",
        soft_wrap=True,
    )
