"""Strict attainment of the real engine under load, several policies in one run: `python -m experiments.engine_replay`.

One model, one pool small enough to hurt. A trace of request lengths is replayed in real time at several rates, for
`fcfs` with KV cache and `apt` with the hybrid cache alternately (the same arrivals, rates interleaved, so that a
change of the machine's speed affects both). Requests belong to SLO classes, whose SLOs are multiples of what an idle
engine needs for the median prompt and for one token. Printed are strict attainment, the paper's reading, strict
attainment of each SLO class and of the worst quartile of prompt or output length, and the longest gap; in brackets what
the simulator says for the same arrivals and pool.

The simulator's cost model is the engine's own: start-up's measurement together with the iterations of that very run,
at the pace of the run (`fit.py`). `error` is the median relative error of its prediction of an iteration. `pace` is the
time of the run's iterations altogether, over what the cost model known before the run predicts for them: how much the
machine has changed, or what is asked of it. At the end stand the median differences between measured and simulated,
also for simulations with the cost model from before each run.

Output lengths are the trace's: `ignore_eos` with `max_tokens`, which a policy that knows `max_tokens` could exploit;
so every request asks for all the context holds and the replay ends it, as a stop token would.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from apt_jax.checkpoints.load import load_model
from apt_jax.engine.calibration import calibrate
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.weights.choice import laid_out
from apt_jax.request import FinishReason, Request, SamplingParams, Slo
from apt_jax.run_figures import by_quartile
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.fit import Observation, pace, predicted_s, relative_errors
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import SchedulerState
from apt_jax.serve.runtime.starting.compile_cache import use_compile_cache
from apt_jax.serve.runtime.starting.start_up import spare_collector
from apt_jax.simulation.requests.classes import Terms
from apt_jax.simulation.search import interpolated_throughput
from apt_jax.simulation.simulator import simulate
from apt_jax.simulation.workload import Arrival, Lengths, load_lengths, shuffled_rows
from experiments.peers.machine_speed import Drifting, EveryIteration, Speed
from experiments.preset_model import preset_model

Setup = tuple[str, str]  # policy, cache mode
Figures = dict[str, Any]

SETUPS: tuple[Setup, ...] = (("fcfs", "kv"), ("apt", "hybrid"))
MOST_OBSERVATIONS = 2048  # iterations of a run that its cost model is fitted to, evenly spread
SIMULATIONS = {
    "simulated": "as above",
    "simulated_at_its_speed": "at the machine's speed in each second of the run",
    "predicted": "with the cost model from before each run",
}
READINGS = {"strict_attainment": "strictly", "attainment": "by the 99th percentile of gaps"}


class Replayed(SchedulerState):
    """Ends each request at the trace's length, which no policy can see."""

    lengths: dict[str, int]

    def commit(self, request: Request, token_id: int, now: float) -> FinishReason | None:
        """The usual decision, except that a request that has reached its length stops."""
        reason = super().commit(request, token_id, now)
        if reason is None and len(request.output_token_ids) >= self.lengths[request.request_id]:
            self.finish(request, FinishReason.STOP)
        return request.finish_reason


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A warm engine, what ends its requests, and its iterations since they were last taken."""

    engine: Engine
    state: Replayed
    served: list[Observation] = dataclasses.field(default_factory=list)
    ends_s: list[float] = dataclasses.field(default_factory=list)


def prepare(model: Any, config: Any, options: EngineConfig, setup: Setup) -> Prepared:
    """An engine for one policy and cache mode, measured now; every iteration is timed, whatever its policy."""
    policy, mode = setup
    chosen = dataclasses.replace(options, scheduling_policy=policy, cache_mode=mode)  # type: ignore[arg-type]
    parts = set_up(laid_out(model, config, chosen), config, chosen)
    state = Replayed(parts.state.pool, parts.state.limits)
    engine = Engine(dataclasses.replace(parts, state=state))
    engine.warm_up(progress=True)
    prepared = Prepared(engine, state)
    engine.times.learns = True
    engine.times.calibration = calibrate(engine.trials, engine.setup.cost_model, None)
    learn = engine.times.calibration.observe

    def record(load: StepLoad, seconds: float, candidates: int = 0) -> bool:
        prepared.served.append(Observation(load, seconds, candidates))
        prepared.ends_s.append(time.monotonic())
        return learn(load, seconds, candidates)

    engine.times.calibration.observe = record  # type: ignore[method-assign]
    return prepared


def replay(prepared: Prepared, arrivals: list[Arrival]) -> list[Request]:
    """Serve the arrivals in real time with a fresh policy; returns the finished requests."""
    engine = prepared.engine
    engine.renew_policy()
    prepared.served.clear()
    prepared.ends_s.clear()
    prepared.state.lengths = {f"r{i}": a.output_tokens for i, a in enumerate(arrivals)}
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    requests: list[Request] = []
    start = time.monotonic()
    while len(requests) < len(arrivals) or engine.has_unfinished:
        now = time.monotonic() - start
        while len(requests) < len(arrivals) and arrivals[len(requests)].arrival_s <= now:
            due = arrivals[len(requests)]
            assert due.terms is not None
            prompt = [5 + k % 64 for k in range(due.prompt_tokens)]
            name, arrival_s = f"r{len(requests)}", start + due.arrival_s
            requests.append(engine.add(prompt, params, request_id=name, slo=due.terms.slo, arrival_s=arrival_s))
        if engine.has_unfinished:
            engine.step()
        else:
            time.sleep(max(0.0, start + arrivals[len(requests)].arrival_s - time.monotonic()))
    prepared.ends_s[:] = [end_s - start for end_s in prepared.ends_s]
    return requests


def figures_of(requests: Sequence[Request], arrivals: list[Arrival]) -> Figures:
    """Both readings of attainment, strict first, the longest gap, and the classes."""
    strictly, kept = [r.attained_strictly for r in requests], [r.attained for r in requests]
    members: dict[str, list[int]] = {}
    for i, arrival in enumerate(arrivals):
        assert arrival.terms is not None
        members.setdefault(arrival.terms.name, []).append(i)
    return {
        "strict_attainment": float(np.mean(strictly)),
        "attainment": float(np.mean(kept)),
        "longest_gap_s": max(r.longest_gap_s for r in requests),
        "attainment_by_class": {
            "slo": [
                {
                    "class": name,
                    "requests": len(of),
                    "strict_attainment": float(np.asarray(strictly)[of].mean()),
                    "attainment": float(np.asarray(kept)[of].mean()),
                }
                for name, of in sorted(members.items())
            ],
            "prompt_quartile": by_quartile([a.prompt_tokens for a in arrivals], strictly, kept),
            "output_quartile": by_quartile([a.output_tokens for a in arrivals], strictly, kept),
        },
    }


def worst_quartile(figures: Figures) -> float:
    """Strict attainment of the worst quartile of prompt or output length."""
    classes = figures["attainment_by_class"]
    return min(e["strict_attainment"] for of in ("prompt_quartile", "output_quartile") for e in classes[of])


def simulated(
    prepared: Prepared, setup: Setup, arrivals: list[Arrival], cost_model: CostModel, speed: Speed | None = None
) -> Figures:
    """The figures that the simulator predicts from a measured cost model."""
    engine, state = prepared.engine, prepared.state
    drifting = None if speed is None else Drifting(cost_model, speed)

    def note(plan: Plan, now: float) -> None:
        if drifting is not None:
            drifting.now = now

    policy = make_policy(setup[0], PolicyContext(cost_model))
    if drifting is not None:
        policy = EveryIteration(policy)
    outcome = simulate(
        arrivals, policy, cost_model=cost_model if drifting is None else cast(CostModel, drifting), on_plan=note,
        num_blocks=state.pool.num_blocks, limits=state.limits,
        block_size=engine.config.block_size, max_model_len=engine.max_model_len,
    )  # fmt: skip
    return figures_of(outcome.requests, arrivals)


def compare(prepared: Prepared, setup: Setup, arrivals: list[Arrival]) -> Figures:
    """One run and its simulations: with the cost model of the run, and with the one that was known before it."""
    calibration = prepared.engine.times.calibration
    before = calibration.model
    measured = figures_of(replay(prepared, arrivals), arrivals)
    served = prepared.served[:: -(-len(prepared.served) // MOST_OBSERVATIONS)]
    speed = Speed(model := calibration.fitted_to(served), prepared.served, prepared.ends_s)
    return {
        "measured": measured,
        "simulated": simulated(prepared, setup, arrivals, model),
        "simulated_at_its_speed": simulated(prepared, setup, arrivals, model, speed),
        "speed_by_second": [round(float(each), 3) for each in speed.speeds],
        "predicted": simulated(prepared, setup, arrivals, before),
        "iterations": len(prepared.served),
        "pace": pace(before, served),
        "median_error": float(np.median(relative_errors(model, served))),
        "iterations_by_kind": by_kind(model, served),
    }


def by_kind(model: CostModel, served: Sequence[Observation]) -> list[Figures]:
    """How well the cost model predicts decodes, prompts, and both in one iteration; milliseconds on average."""
    found = []
    for name, decodes, prompts in (("decode", True, False), ("prefill", False, True), ("mixed", True, True)):
        of = [
            o for o in served if (bool(o.load.decode_requests), bool(o.load.prefill_tokens)) == (decodes, prompts)
        ]  # fmt: skip
        if of:
            seconds = [o.seconds for o in of]
            predicted = [predicted_s(model, o) for o in of]
            found.append(
                {
                    "kind": name, "iterations": len(of), "measured_ms": 1e3 * float(np.mean(seconds)),
                    "predicted_ms": 1e3 * float(np.mean(predicted)),
                    "median_error": float(np.median(relative_errors(model, of))),
                }
            )  # fmt: skip
    return found


def make_trace(
    lengths: Lengths, classes: Sequence[tuple[Terms, float]], count: int, rate: float, seed: int
) -> list[Arrival]:
    """`count` requests with Poisson arrivals; the pattern is the same at every rate, stretched."""
    rng = np.random.default_rng(seed)
    rows = shuffled_rows(len(lengths.prompt_tokens), count, seed=seed)
    times = np.cumsum(rng.exponential(1.0, count)) / rate
    shares = np.array([share for _, share in classes])
    terms = rng.choice(len(classes), count, p=shares / shares.sum())
    return [
        Arrival(float(t), int(lengths.prompt_tokens[i]), int(lengths.output_tokens[i]), classes[k][0])
        for t, i, k in zip(times, rows, terms, strict=True)
    ]


def scaled_slo(model: CostModel, lengths: Lengths, factor: float) -> Slo:
    """`factor` times the measured model's prediction for the median prompt alone, and for one token of one request."""
    prompt = int(np.median(lengths.prompt_tokens))
    prefill = model.step_s(StepLoad(prefill_tokens=prompt, prefill_pairs=prompt * (prompt + 1) // 2, samples=1))
    decode = model.step_s(
        StepLoad(decode_requests=1, context_tokens=(prompt, 0), samples=1, decodes=(1, 0))
    )  # fmt: skip
    return Slo(factor * prefill, factor * decode)


def main() -> None:
    """Build, calibrate, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo", help="demo, or an OPT size with random weights such as opt-125m")
    parser.add_argument("--workload", default="sharegpt")
    parser.add_argument("--rates", default="1,2,3,4,6,8")
    parser.add_argument("--duration-s", type=float, default=40.0, help="of arrivals, at each rate")
    parser.add_argument("--num-blocks", type=int, default=160)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument(
        "--classes", default="tight:20:1,loose:80:1",
        help="SLO classes: name, SLO as a multiple of what an idle engine needs, share of the requests",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_compile_cache(None)
    if args.model == "demo":
        loaded = load_model(None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            loaded = preset_model(args.model, Path(folder), dtype="float32")
    options = EngineConfig(num_blocks=args.num_blocks, max_model_len=args.max_model_len)
    engines = {setup: prepare(loaded.model, loaded.config, options, setup) for setup in SETUPS}
    lengths = load_lengths(args.workload, args.max_model_len)
    measured = engines["apt", "hybrid"].engine.times.calibration.model
    classes = []
    print(
        f"{args.model}, {args.num_blocks} blocks of 16, {args.workload} lengths of at most {args.max_model_len} tokens"
    )
    for name, factor, share in (each.split(":") for each in args.classes.split(",")):
        slo = scaled_slo(measured, lengths, float(factor))
        classes.append((Terms(slo, name=name), float(share)))
        print(
            f"SLO class {name}, {factor} x idle: first token {1e3 * slo.ttft_s:.0f} ms, gaps {1e3 * slo.tbt_s:.0f} ms,"
            f" no gap over {1e3 * slo.stall_limit_s:.0f} ms"
        )
    spare_collector()
    found = run(engines, lengths, classes, [float(rate) for rate in args.rates.split(",")], args)
    summary = summarise(found)
    if args.json is not None:
        result = {"arguments": {**vars(args), "json": None}, "runs": found, **summary}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run(
    engines: dict[Setup, Prepared], lengths: Lengths, classes: Sequence[tuple[Terms, float]], rates: Sequence[float],
    args: argparse.Namespace,
) -> list[Figures]:  # fmt: skip
    """Every rate with every setup, printed as they end."""
    names = sorted(terms.name for terms, _ in classes)
    columns = ["strict", "P99 of gaps", *names, "worst quartile"]
    print("attained strictly, and by the 99th percentile of gaps; strictly by SLO class and in the worst quartile of")
    print("lengths; longest gap in seconds. In brackets: simulated")
    print(f"{'rate':>5} {'':<10} {' '.join(f'{c:>15}' for c in columns)} {'longest gap':>13} {'error':>6} {'pace':>5}")
    found = []
    for rate in tqdm(rates, desc="rates", disable=None):
        arrivals = make_trace(lengths, classes, max(20, int(rate * args.duration_s)), rate, args.seed)
        for setup in SETUPS:
            figures = compare(engines[setup], setup, arrivals)
            found.append({"rate": rate, "policy": setup[0], "cache_mode": setup[1], **figures})
            pairs = zip(shares_of(figures["measured"]), shares_of(figures["simulated"]), strict=True)
            cells = " ".join(f"{real:>6.1%} ({said:>6.1%})" for real, said in pairs)
            gaps = f"{figures['measured']['longest_gap_s']:.2f} ({figures['simulated']['longest_gap_s']:.2f})"
            accuracy = f"{figures['median_error']:>6.0%} {figures['pace']:>5.2f}"
            tqdm.write(f"{rate:>5g} {'/'.join(setup):<10} {cells} {gaps:>13} {accuracy}")
    return found


def shares_of(figures: Figures) -> list[float]:
    """The shares of one line of the table."""
    classes = [entry["strict_attainment"] for entry in figures["attainment_by_class"]["slo"]]
    return [figures["strict_attainment"], figures["attainment"], *classes, worst_quartile(figures)]


def summarise(found: Sequence[Figures]) -> Figures:
    """Effective throughput, and how far measured and simulated attainment are apart; printed."""
    for reading, words in READINGS.items():
        for target in (0.9, 0.99):
            fcfs, apt = (
                interpolated_throughput(
                    [(row["rate"], row["measured"][reading]) for row in found if row["policy"] == policy], target
                )
                for policy, _ in SETUPS
            )
            ratio = f"{apt / fcfs:.2f} x" if fcfs else "fcfs does not reach it at any of these rates"
            print(f"effective throughput at {target:.0%} {words}: fcfs/kv {fcfs:.2f}, apt/hybrid {apt:.2f}/s, {ratio}")
    apart = {
        which: {
            reading: 100 * float(np.median([abs(row["measured"][reading] - row[which][reading]) for row in found]))
            for reading in READINGS
        }
        for which in SIMULATIONS
    }
    by_class = [
        abs(real["strict_attainment"] - said["strict_attainment"])
        for row in found
        for real, said in zip(
            *(row[which]["attainment_by_class"]["slo"] for which in ("measured", "simulated")), strict=True
        )
    ]
    class_points = 100 * float(np.median(by_class))
    print("measured and simulated attainment differ in the median, in points:")
    for which, words in SIMULATIONS.items():
        strict, paper = (apart[which][reading] for reading in READINGS)
        print(f"  {words}: strictly {strict:.1f}, by the 99th percentile of gaps {paper:.1f}")
    print(f"  by SLO class, strictly {class_points:.1f}")
    print_iterations(found)
    return {"median_difference_points": apart, "median_difference_points_by_class": class_points}


def print_iterations(found: Sequence[Figures]) -> None:
    """How long iterations took and were predicted to take, by what they compute, over all runs of a setup."""
    for policy, mode in SETUPS:
        cells = []
        for kind in ("decode", "prefill", "mixed"):
            rows = [
                each for row in found if row["policy"] == policy
                for each in row["iterations_by_kind"] if each["kind"] == kind
            ]  # fmt: skip
            if count := sum(row["iterations"] for row in rows):
                real, said = (
                    sum(row["iterations"] * row[name] for row in rows) / count
                    for name in ("measured_ms", "predicted_ms")
                )
                cells.append(f"{kind} {real:.1f} ms (predicted {said:.1f})")
        print(f"iterations of {policy}/{mode} on average: {', '.join(cells)}")


if __name__ == "__main__":
    main()
