"""`apt-jax simulate`: attainment of policies and cache modes over request rates, without a device."""

import itertools
import json as json_format
import math
from dataclasses import fields, replace
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from apt_jax.cache import MODE_KINDS, CacheKind, CacheMode, keeps_hidden
from apt_jax.files import EVERYBODY, check_plot, check_writable, replace_file
from apt_jax.progress import is_hidden
from apt_jax.routing.catalogue import make_router
from apt_jax.scheduling.costs.cost_model import HiddenMode
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.vllm.defaults import BASELINES
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.report import Report
from apt_jax.simulation.search import START_RATE, effective_throughput
from apt_jax.simulation.simulator import Sample

DEFAULT_MODES = ("kv", "hybrid")
UNCUT_COLUMNS = 10_000  # on a narrow terminal lines wrap, and no figure is cut

Configuration = tuple[str, CacheMode, HiddenMode]


def configurations(args: SimulateArgs) -> list[Configuration]:
    """Every combination asked for; the KV cache has no hidden attention and appears once.

    Raises:
        ValueError: an unknown policy, cache mode or hidden attention.
    """
    policies = _names(args.policies, "policies")
    for policy in policies:
        make_policy(policy)
    given = _chosen(args.cache_modes, tuple(MODE_KINDS), "cache_modes") if args.cache_modes else None
    attentions = _chosen(args.hidden_attention, ("recompute", "absorbed", "one-pass"), "hidden_attention")
    return [
        (policy, cast(CacheMode, mode), cast(HiddenMode, attention))
        for policy in policies
        for mode, attention in itertools.product(given or _default_modes(policy), attentions)
        if keeps_hidden(cast(CacheMode, mode)) or attention == attentions[0]
    ]


def _default_modes(policy: str) -> tuple[str, ...]:
    baseline = BASELINES.get(policy.split(":")[0])
    return DEFAULT_MODES if baseline is None else (baseline.cache_mode,)


def run(args: SimulateArgs) -> dict[str, Any]:
    """Simulate, print a table, write the files asked for; returns what the JSON file holds.

    Raises:
        ValueError: a flag has a bad value; the message says which and what there is.
    """
    experiment = Experiment(**{f.name: getattr(args, f.name) for f in fields(Experiment) if hasattr(args, f.name)})
    routed = [replace(experiment, router=router) for router in _names(args.router, "router")]
    for each in routed:
        make_router(each.router)
    chosen = list(itertools.product(routed if experiment.is_routed else [experiment], configurations(args)))
    targets = _numbers(args.effective_throughput, "effective_throughput")
    if any(not 0 < target <= 1 for target in targets):
        raise ValueError(f"effective_throughput={args.effective_throughput} must be shares between 0 and 1, e.g. 0.9")
    recorded = experiment.lengths.arrival_s is not None
    rates: list[float | None] = [*_numbers(args.rate, "rate")] or ([None] if recorded else [1.0, 2.0, 3.0])
    if targets and not args.rate:
        rates = []
    check_writable(args.json, "--json")
    check_plot(args.plot)
    if args.plot is not None and not rates:
        raise ValueError("nothing to plot: give --rate")
    reports: list[Report] = []
    timelines: dict[Any, list[Sample]] = {}
    first_tokens: dict[Any, list[float]] = {}
    with tqdm(total=len(chosen) * len(rates), desc="points", unit="point", disable=is_hidden(bool(rates))) as bar:
        for (each, configuration), rate in itertools.product(chosen, rates):
            bar.set_postfix_str(f"{'/'.join(configuration)} at {rate or experiment.lengths.recorded_rate:g}/s")
            outcome, report = each.run(*configuration, rate)
            assert report is not None
            reports.append(report)
            timelines[report.key] = outcome.samples_by_instance[0]
            first_tokens[report.key] = [r.ttft_s for r in outcome.requests if r.ttft_s is not None]
            bar.update()
    found = _search(chosen, targets)
    result = {
        "arguments": {f.name: getattr(args, f.name) for f in fields(args) if f.name not in ("json", "plot")},
        "num_blocks": experiment.pool_blocks(),
        "block_size": experiment.block_size,
        "runs": [report.as_dict() for report in reports],
        "effective_throughput": found,
    }
    _print(Console(width=UNCUT_COLUMNS), experiment, reports, found)
    if args.json is not None:
        text = json_format.dumps(result, indent=1, sort_keys=False) + "\n"
        replace_file(args.json, text.encode(), mode=EVERYBODY)
    if args.plot is not None:
        from apt_jax.simulation.plots import draw

        draw(args.plot, reports, timelines, first_tokens, experiment.pool_blocks())
    return result


def _search(chosen: list[tuple[Experiment, Configuration]], targets: list[float]) -> list[dict[str, Any]]:
    found = []
    for experiment, (policy, mode, attention) in tqdm(
        chosen, desc="searches", unit="search", disable=is_hidden(bool(targets))
    ):
        if targets:
            rates = effective_throughput(
                experiment.reaches(policy, mode, attention), targets, start=START_RATE * experiment.instances
            )
            router = {"router": experiment.router} if experiment.is_routed else {}
            found += [
                {
                    "policy": policy, "cache_mode": mode, "hidden_attention": attention, **router, "target": target,
                    "rate": float(f"{rates[target]:.4g}"),
                }
                for target in targets
            ]  # fmt: skip
    return found


def _attention(mode: str, hidden_attention: str) -> str:
    return hidden_attention if keeps_hidden(cast(CacheMode, mode)) else "-"


def _print(console: Console, experiment: Experiment, reports: list[Report], found: list[dict[str, Any]]) -> None:
    num_blocks = experiment.pool_blocks()
    tokens = num_blocks // CacheKind.KV.blocks_per_page * experiment.block_size
    console.print(
        f"{experiment.model} on {experiment.tensor_parallel_size} x {experiment.hardware}, {experiment.workload}: "
        f"{num_blocks} blocks, {tokens} tokens as KV{_instances(experiment)}"
    )
    if reports:
        routed = ["router", "instances"] if experiment.is_routed else []
        table = Table(*routed, "policy", "cache", "hidden", "rate", "attained", "TTFT ok", "TBT ok", "TTFT p50/p99 s",
                      "TBT p99 s", "batch", "preempt", "convert", "backlog", "longest wait s")  # fmt: skip
        for r in reports:
            where = [r.router, f"{r.mean_instances:.1f}"] if experiment.is_routed else []
            table.add_row(
                *where, r.policy, r.cache_mode, _attention(r.cache_mode, r.hidden_attention), f"{r.rate:g}",
                f"{r.attainment:.1%}", f"{r.ttft_attainment:.1%}", f"{r.tbt_attainment:.1%}",
                f"{r.p50_ttft_s:.2f}/{r.p99_ttft_s:.2f}", f"{r.p99_tbt_s:.3f}", f"{r.mean_batch:.0f}",
                str(r.preemptions), str(r.conversions), str(r.backlog), f"{r.longest_wait_s:.1f}",
            )  # fmt: skip
        console.print(table)
    if found:
        routed = ["router"] if experiment.is_routed else []
        table = Table(*routed, "policy", "cache", "hidden", "target", "effective throughput (requests/s)")
        for row in found:
            hidden = _attention(row["cache_mode"], row["hidden_attention"])
            names = [row[name] for name in (*routed, "policy", "cache_mode")]
            table.add_row(*names, hidden, f"{row['target']:.0%}", f"{row['rate']:.2f}")
        console.print(table)


def _instances(experiment: Experiment) -> str:
    if not experiment.is_routed:
        return ""
    most = "" if experiment.max_instances is None else f" to {experiment.max_instances}"
    age = f", reports up to {experiment.report_interval_s:g} s old" if experiment.report_interval_s else ""
    return f"; {experiment.instances}{most} instances{age}"


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
    if any(not 0 < number < math.inf for number in numbers):
        raise ValueError(f"{flag}={text!r} must be numbers greater than 0")
    return numbers
