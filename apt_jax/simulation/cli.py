"""`apt-jax simulate`: attainment of policies and cache modes over request rates, without a device."""

import itertools
import json as json_format
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast, get_args

from tqdm import tqdm

from apt_jax.cache import MODE_KINDS, CacheMode, keeps_hidden
from apt_jax.files import EVERYBODY, check_apart, check_plot, check_writable, replace_file
from apt_jax.flags.lists import listed_counts, listed_names, listed_numbers
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
MIN_RATE, MAX_RATE = 1e-6, 1e9  # requests per second
UNRECORDED = ("json", "plot", "jobs")  # flags that change no figure


def configurations(args: SimulateArgs) -> list[Configuration]:
    """Every combination asked for; the KV cache has no hidden attention and appears once.

    Raises:
        ValueError: an unknown policy, cache mode or hidden attention.
    """
    policies = listed_names("policies", args.policies)
    for policy in policies:
        make_policy(policy)
    given = listed_names("cache_modes", args.cache_modes, tuple(MODE_KINDS)) if args.cache_modes else None
    attentions = listed_names("hidden_attention", args.hidden_attention, get_args(HiddenMode))
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
    asked = args.effective_throughput
    targets = listed_numbers("effective_throughput", asked, high=1.0) if asked else []
    given = {f.name: getattr(args, f.name) for f in fields(Experiment) if hasattr(args, f.name)}
    given["surge"] = Surge.parse(args.surge) if args.surge else None
    given["seed"] = args.seed or 0
    if args.duration_s is None:
        given["duration_s"] = SUSTAINED_S if targets else MIN_DURATION_S
    experiment = Experiment(**given)
    routed = [replace(experiment, router=router) for router in listed_names("router", args.router)]
    for each in routed:
        make_router(each.router)
    chosen = list(itertools.product(routed if experiment.is_routed else [experiment], configurations(args)))
    seeds = listed_counts("seeds", args.seeds, 0) if args.seeds else [experiment.seed]
    recorded = experiment.lengths.arrival_s is not None
    experiment.request_classes  # noqa: B018  # a bad file is refused before anything is simulated
    rates: list[float | None] = [None] if recorded else [1.0, 2.0, 3.0]
    if args.rate:
        rates = [*listed_numbers("rate", args.rate, MIN_RATE, MAX_RATE)]
    elif targets:
        rates = []
    check_writable(args.json, "--json")
    check_plot(args.plot)
    check_apart({"--json": args.json, "--plot": args.plot})
    if args.plot is not None and not rates:
        raise ValueError("nothing to plot: give --rate")
    questions = [Question(reading, target) for reading in READINGS for target in targets]
    points, found = _simulate(args, chosen, rates, seeds, questions)
    reports = [point.report for point in points if point.report is not None]
    result = {
        "arguments": {f.name: _plain(getattr(args, f.name)) for f in fields(args) if f.name not in UNRECORDED}
        | {"seed": experiment.seed},
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
        names = {
            "policy": policy, "cache_mode": mode, "hidden_attention": attention, "cache_dtype": each.cache_dtype,
            "quantization": each.quantization, "enable_prefix_caching": each.enable_prefix_caching,
        }  # fmt: skip
        if each.is_routed:
            names["router"] = each.router
        found = answers[first : first + len(seeds)]
        rows += throughput_rows(names, questions, seeds, found, each.fluid_bound(configuration))
    return answers[:num_points], rows


def _one(task: Task) -> Job:
    point = yield task
    return point


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
