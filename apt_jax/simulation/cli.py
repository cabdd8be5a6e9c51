"""`apt-jax simulate`: attainment of policies and cache modes over request rates, without a device."""

import itertools
import json as json_format
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from apt_jax.scheduling.cost_model import HiddenMode
from apt_jax.scheduling.policy import make_policy
from apt_jax.scheduling.state import CacheMode
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.report import Report
from apt_jax.simulation.search import effective_throughput
from apt_jax.simulation.simulator import Sample


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
    json: Path | None = None
    """Write all results here."""
    plot: Path | None = None
    """Draw attainment, first-token times, batch size and cache mix here (PNG, PDF or SVG; needs matplotlib)."""


Configuration = tuple[str, CacheMode, HiddenMode]


def configurations(args: SimulateArgs) -> list[Configuration]:
    """Every combination asked for; the KV cache has no hidden attention and appears once.

    Raises:
        ValueError: an unknown policy, cache mode or hidden attention.
    """
    policies = _names(args.policies, "policies")
    for policy in policies:
        make_policy(policy)
    modes = _chosen(args.cache_modes, ("kv", "hidden", "hybrid"), "cache_modes")
    attentions = _chosen(args.hidden_attention, ("recompute", "absorbed"), "hidden_attention")
    return [
        (policy, cast(CacheMode, mode), cast(HiddenMode, attention))
        for policy, mode, attention in itertools.product(policies, modes, attentions)
        if mode != "kv" or attention == attentions[0]
    ]


def run(args: SimulateArgs) -> dict[str, Any]:
    """Simulate, print a table, write the files asked for; returns what the JSON file holds.

    Raises:
        ValueError: a flag has a bad value; the message says which and what there is.
    """
    experiment = Experiment(**{f.name: getattr(args, f.name) for f in fields(Experiment) if hasattr(args, f.name)})
    chosen = configurations(args)
    targets = _numbers(args.effective_throughput, "effective_throughput")
    if any(not 0 < target <= 1 for target in targets):
        raise ValueError(f"effective_throughput={args.effective_throughput} must be shares between 0 and 1, e.g. 0.9")
    recorded = experiment.lengths.arrival_s is not None
    rates: list[float | None] = [*_numbers(args.rate, "rate")] or ([None] if recorded else [1.0, 2.0, 3.0])
    if targets and not args.rate:
        rates = []
    reports: list[Report] = []
    timelines: dict[tuple[Configuration, float], list[Sample]] = {}
    first_tokens: dict[tuple[Configuration, float], list[float]] = {}
    with tqdm(total=len(chosen) * len(rates), desc="points", unit="point", disable=not rates) as bar:
        for configuration, rate in itertools.product(chosen, rates):
            bar.set_postfix_str(f"{'/'.join(configuration)} at {rate or experiment.lengths.recorded_rate:g}/s")
            outcome, report = experiment.run(*configuration, rate)
            assert report is not None
            reports.append(report)
            timelines[configuration, report.rate] = outcome.samples
            first_tokens[configuration, report.rate] = [r.ttft_s for r in outcome.requests if r.ttft_s is not None]
            bar.update()
    found = _search(experiment, chosen, targets)
    result = {
        "arguments": {f.name: getattr(args, f.name) for f in fields(args) if f.name not in ("json", "plot")},
        "num_blocks": experiment.pool_blocks,
        "block_size": experiment.block_size,
        "runs": [report.as_dict() for report in reports],
        "effective_throughput": found,
    }
    console = Console()
    _print(console if console.is_terminal else Console(width=170), experiment, reports, found)
    if args.json is not None:
        args.json.write_text(json_format.dumps(result, indent=1, sort_keys=False) + "\n", encoding="utf-8")
    if args.plot is not None:
        from apt_jax.simulation.plots import draw

        draw(args.plot, reports, timelines, first_tokens, experiment.pool_blocks)
    return result


def _search(experiment: Experiment, chosen: list[Configuration], targets: list[float]) -> list[dict[str, Any]]:
    found = []
    for policy, mode, attention in tqdm(chosen, desc="searches", unit="search", disable=not targets):
        if targets:
            rates = effective_throughput(experiment.reaches(policy, mode, attention), targets)
            found += [
                {
                    "policy": policy, "cache_mode": mode, "hidden_attention": attention, "target": target,
                    "rate": float(f"{rates[target]:.4g}"),
                }
                for target in targets
            ]  # fmt: skip
    return found


def _print(console: Console, experiment: Experiment, reports: list[Report], found: list[dict[str, Any]]) -> None:
    tokens = experiment.pool_blocks // 2 * experiment.block_size
    console.print(
        f"{experiment.model} on {experiment.tensor_parallel_size} x {experiment.hardware}, {experiment.workload}: "
        f"{experiment.pool_blocks} blocks, {tokens} tokens as KV"
    )
    if reports:
        table = Table("policy", "cache", "hidden", "rate", "attained", "TTFT ok", "TBT ok", "TTFT p50/p99 s",
                      "TBT p99 s", "batch", "preempt", "convert", "backlog", "longest wait s")  # fmt: skip
        for r in reports:
            table.add_row(
                r.policy, r.cache_mode, "-" if r.cache_mode == "kv" else r.hidden_attention, f"{r.rate:g}",
                f"{r.attainment:.1%}", f"{r.ttft_attainment:.1%}", f"{r.tbt_attainment:.1%}",
                f"{r.p50_ttft_s:.2f}/{r.p99_ttft_s:.2f}", f"{r.p99_tbt_s:.3f}", f"{r.mean_batch:.0f}",
                str(r.preemptions), str(r.conversions), str(r.backlog), f"{r.longest_wait_s:.1f}",
            )  # fmt: skip
        console.print(table)
    if found:
        table = Table("policy", "cache", "hidden", "target", "effective throughput (requests/s)")
        for row in found:
            hidden = "-" if row["cache_mode"] == "kv" else row["hidden_attention"]
            table.add_row(row["policy"], row["cache_mode"], hidden, f"{row['target']:.0%}", f"{row['rate']:.2f}")
        console.print(table)


def _names(text: str, flag: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"{flag} is empty; give at least one name")
    return names


def _chosen(text: str, known: tuple[str, ...], flag: str) -> list[str]:
    names = _names(text, flag)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {flag} {name!r}; known: {', '.join(known)}")
    return names


def _numbers(text: str, flag: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{flag}={text!r} must be numbers separated by commas") from error
    if any(not number > 0 for number in numbers):
        raise ValueError(f"{flag}={text!r} must be numbers greater than 0")
    return numbers
