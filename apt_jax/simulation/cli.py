"""`apt-jax simulate`: attainment of policies and cache modes over request rates, without a device."""

import itertools
import json as json_format
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from tqdm import tqdm

from apt_jax.cache import MODE_KINDS, CacheMode, keeps_hidden
from apt_jax.files import EVERYBODY, check_plot, check_writable, replace_file
from apt_jax.host_limits import usable_processors
from apt_jax.progress import is_hidden
from apt_jax.routing.catalogue import make_router
from apt_jax.run_figures import SUSTAINED_S
from apt_jax.scheduling.costs.cost_model import HiddenMode
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.vllm.defaults import BASELINES
from apt_jax.simulation.experiment import Configuration, Experiment
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.report import means_over_seeds
from apt_jax.simulation.requests.surge import Surge
from apt_jax.simulation.tables import print_result
from apt_jax.simulation.throughput.points import Job, Point, Task, run_jobs
from apt_jax.simulation.throughput.questions import READINGS, Question
from apt_jax.simulation.throughput.searches import search, throughput_rows
from apt_jax.simulation.workload import MIN_DURATION_S

DEFAULT_MODES = ("kv", "hybrid")
UNRECORDED = ("json", "plot", "jobs")  # flags that change no figure


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
    """Simulate, print tables, write the files asked for; returns what the JSON file holds.

    Raises:
        ValueError: a flag has a bad value; the message says which and what there is.
    """
    targets = _numbers(args.effective_throughput, "effective_throughput")
    if any(not 0 < target <= 1 for target in targets):
        raise ValueError(f"effective_throughput={args.effective_throughput} must be shares between 0 and 1, e.g. 0.9")
    given = {f.name: getattr(args, f.name) for f in fields(Experiment) if hasattr(args, f.name)}
    given["surge"] = Surge.parse(args.surge) if args.surge else None
    if args.duration_s is None:
        given["duration_s"] = SUSTAINED_S if targets else MIN_DURATION_S
    experiment = Experiment(**given)
    routed = [replace(experiment, router=router) for router in _names(args.router, "router")]
    for each in routed:
        make_router(each.router)
    chosen = list(itertools.product(routed if experiment.is_routed else [experiment], configurations(args)))
    seeds = _seeds(args)
    recorded = experiment.lengths.arrival_s is not None
    experiment.request_classes  # noqa: B018  # a bad file is refused before anything is simulated
    rates: list[float | None] = [*_numbers(args.rate, "rate")] or ([None] if recorded else [1.0, 2.0, 3.0])
    if targets and not args.rate:
        rates = []
    check_writable(args.json, "--json")
    check_plot(args.plot)
    if args.plot is not None and not rates:
        raise ValueError("nothing to plot: give --rate")
    questions = [Question(reading, target) for reading in READINGS for target in targets]
    points, found = _simulate(args, chosen, rates, seeds, questions)
    reports = [point.report for point in points if point.report is not None]
    result = {
        "arguments": {f.name: _plain(getattr(args, f.name)) for f in fields(args) if f.name not in UNRECORDED},
        "num_blocks": experiment.pool_blocks(),
        "block_size": experiment.block_size,
        "runs": [report.as_dict() for report in reports],
        "means": means_over_seeds(reports),
        "effective_throughput": found,
    }
    print_result(experiment, reports, result, seeds)
    if args.json is not None:
        text = json_format.dumps(result, indent=1, sort_keys=False) + "\n"
        replace_file(args.json, text.encode(), mode=EVERYBODY)
    if args.plot is not None:
        from apt_jax.simulation.plots import draw

        first = [(report.key, point) for report, point in zip(reports, points, strict=True) if report.seed == seeds[0]]
        drawn = [report for report in reports if report.seed == seeds[0]]
        timelines = {key: point.samples for key, point in first}
        draw(args.plot, drawn, timelines, {k: p.first_tokens_s for k, p in first}, experiment.pool_blocks())
    return result


def _simulate(
    args: SimulateArgs, chosen: list[tuple[Experiment, Configuration]], rates: list[float | None], seeds: list[int],
    questions: list[Question],
) -> tuple[list[Point], list[dict[str, Any]]]:  # fmt: skip
    """Points in order of configuration, rate and seed, and rows of effective throughput; in parallel processes."""
    jobs: list[Job] = [
        _one(Task(replace(each, seed=seed), configuration, rate, with_timeline=args.plot is not None))
        for (each, configuration), rate, seed in itertools.product(chosen, rates, seeds)
    ]
    num_points = len(jobs)
    if questions:
        jobs += [
            search(replace(each, seed=seed), configuration, questions)
            for (each, configuration), seed in itertools.product(chosen, seeds)
        ]
    with tqdm(total=num_points or None, desc="points", unit="point", disable=is_hidden()) as bar:

        def note(task: Task) -> None:
            bar.set_postfix_str(f"{'/'.join(task.configuration)} at {task.rate or 0:g}/s")
            bar.update()

        answers = run_jobs(jobs, args.jobs or usable_processors(), note)
    rows = []
    for number, (each, configuration) in enumerate(chosen if questions else []):
        first = num_points + number * len(seeds)
        policy, mode, attention = configuration
        names = {"policy": policy, "cache_mode": mode, "hidden_attention": attention}
        if each.is_routed:
            names["router"] = each.router
        found = answers[first : first + len(seeds)]
        rows += throughput_rows(names, questions, seeds, found, each.fluid_bound(configuration))
    return answers[:num_points], rows


def _one(task: Task) -> Job:
    point = yield task
    return point


def _seeds(args: SimulateArgs) -> list[int]:
    if not args.seeds:
        return [args.seed]
    parts = [part.strip() for part in args.seeds.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"seeds={args.seeds!r} must be whole numbers of at least 0 separated by commas, e.g. 0,1,2")
    return list(dict.fromkeys(map(int, parts)))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


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
