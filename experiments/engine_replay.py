"""Strict attainment of the real engine under load, several policies in one run: `python -m experiments.engine_replay`.

One model, one pool small enough to hurt. A trace of request lengths is replayed in real time at several rates, for
`fcfs` with KV cache and `apt` with the hybrid cache alternately (the same arrivals, rates interleaved, so that a
change of the machine's speed hits both), and strict attainment is printed side by side, with that of the worst quartile
of prompt or output length. Promises are scaled to the machine: multiples of what an idle engine needs for the median
prompt and for one token. The simulator's answer for the same arrivals, pool and measured cost model is printed next to
each figure, and at the end the median difference between the two. The JSON file has the paper's reading too.

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
from typing import Any

import numpy as np
from tqdm import tqdm

from apt_jax.cache import CacheKind
from apt_jax.checkpoints.load import load_model
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.weights.choice import laid_out
from apt_jax.request import FinishReason, Request, SamplingParams, Slo
from apt_jax.run_figures import by_quartile
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import SchedulerState
from apt_jax.serve.runtime.compile_cache import use_compile_cache
from apt_jax.simulation.search import interpolated_throughput
from apt_jax.simulation.simulator import simulate
from apt_jax.simulation.workload import Arrival, Lengths, load_lengths
from experiments.preset_model import preset_model

Setup = tuple[str, str]  # policy, cache mode


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
    """A warm engine, and what ends its requests."""

    engine: Engine
    state: Replayed


def prepare(model: Any, config: Any, options: EngineConfig, setup: Setup) -> Prepared:
    """An engine for one policy and cache mode."""
    policy, mode = setup
    chosen = dataclasses.replace(options, scheduling_policy=policy, cache_mode=mode)  # type: ignore[arg-type]
    parts = set_up(laid_out(model, config, chosen), config, chosen)
    state = Replayed(parts.state.pool, parts.state.limits)
    engine = Engine(dataclasses.replace(parts, state=state))
    engine.warm_up(progress=True)
    return Prepared(engine, state)


def replay(prepared: Prepared, arrivals: list[Arrival], slo: Slo) -> list[Request]:
    """Serve the arrivals in real time with a fresh policy; returns the finished requests."""
    engine = prepared.engine
    engine.renew_policy()
    prepared.state.lengths = {f"r{i}": a.output_tokens for i, a in enumerate(arrivals)}
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    requests: list[Request] = []
    start = time.monotonic()
    while len(requests) < len(arrivals) or engine.has_unfinished:
        now = time.monotonic() - start
        while len(requests) < len(arrivals) and arrivals[len(requests)].arrival_s <= now:
            due = arrivals[len(requests)]
            prompt = [5 + k % 64 for k in range(due.prompt_tokens)]
            name = f"r{len(requests)}"
            requests.append(engine.add(prompt, params, request_id=name, slo=slo, arrival_s=start + due.arrival_s))
        if engine.has_unfinished:
            engine.step()
        else:
            time.sleep(max(0.0, start + arrivals[len(requests)].arrival_s - time.monotonic()))
    return requests


def figures_of(requests: Sequence[Request], arrivals: list[Arrival]) -> dict[str, Any]:
    """Both readings of attainment, strict first, the longest gap, and the classes."""
    strictly, kept = [r.attained_strictly for r in requests], [r.attained for r in requests]
    return {
        "strict_attainment": float(np.mean(strictly)),
        "attainment": float(np.mean(kept)),
        "longest_gap_s": max(r.longest_gap_s for r in requests),
        "attainment_by_class": {
            "prompt_quartile": by_quartile([a.prompt_tokens for a in arrivals], strictly, kept),
            "output_quartile": by_quartile([a.output_tokens for a in arrivals], strictly, kept),
        },
    }


def worst_class(figures: dict[str, Any]) -> float:
    """Strict attainment of the worst quartile."""
    classes = figures["attainment_by_class"].values()
    return min(entry["strict_attainment"] for entries in classes for entry in entries)


def simulated(prepared: Prepared, setup: Setup, arrivals: list[Arrival], slo: Slo) -> dict[str, Any]:
    """The figures that the simulator predicts from the calibrated cost model."""
    engine, state = prepared.engine, prepared.state
    cost_model = engine.times.calibration.model
    outcome = simulate(
        arrivals, make_policy(setup[0], PolicyContext(cost_model)), cost_model=cost_model,
        num_blocks=state.pool.num_blocks, limits=state.limits, slo=slo,
        block_size=engine.config.block_size, max_model_len=engine.max_model_len,
    )  # fmt: skip
    return figures_of(outcome.requests, arrivals)


def make_trace(lengths: Lengths, count: int, rate: float, seed: int) -> list[Arrival]:
    """`count` requests with Poisson arrivals; the pattern is the same at every rate, stretched."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(lengths.prompt_tokens))[:count]
    times = np.cumsum(rng.exponential(1.0, count)) / rate
    return [
        Arrival(float(t), int(lengths.prompt_tokens[i]), int(lengths.output_tokens[i]))
        for t, i in zip(times, rows, strict=True)
    ]


def main() -> None:
    """Build, calibrate, replay, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="demo", help="demo, or an OPT size with random weights such as opt-125m")
    parser.add_argument("--workload", default="sharegpt")
    parser.add_argument("--rates", default="2,4,6,8,12,16")
    parser.add_argument("--duration-s", type=float, default=30.0, help="of arrivals, at each rate")
    parser.add_argument("--num-blocks", type=int, default=160)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument(
        "--slo-factor", type=float, default=20.0, help="SLO, as a multiple of what an idle engine needs"
    )
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
    setups: list[Setup] = [("fcfs", "kv"), ("apt", "hybrid")]
    engines = {setup: prepare(loaded.model, loaded.config, options, setup) for setup in setups}
    lengths = load_lengths(args.workload, args.max_model_len)
    measured = engines["apt", "hybrid"].engine.times.calibration
    slo = scaled_slo(measured.model, lengths, args.slo_factor)
    engines["fcfs", "kv"].engine.times.calibration = measured
    print(
        f"{args.model}, {args.num_blocks} blocks of 16, {args.workload} lengths of at most {args.max_model_len} tokens"
    )
    kv_s = measured.model.attention_s[CacheKind.KV.index]
    print(
        f"SLO: first token {1e3 * slo.ttft_s:.0f} ms, gaps {1e3 * slo.tbt_s:.0f} ms, {args.slo_factor:g} x idle, no"
        f" gap over {1e3 * slo.stall_limit_s:.0f} ms;"
        f" rho {1e6 * measured.model.rho_s:+.2f} us per hidden token (KV {1e6 * kv_s:.2f})"
    )
    rates = [float(rate) for rate in args.rates.split(",")]
    found: dict[Setup, list[dict[str, Any]]] = {setup: [] for setup in setups}
    print("strict attainment, worst class in brackets")
    print(f"{'rate':>6} " + " ".join(f"{policy + '/' + mode:>17} {'(simulated)':>17}" for policy, mode in setups))
    for rate in tqdm(rates, desc="rates", disable=None):
        arrivals = make_trace(lengths, max(20, int(rate * args.duration_s)), rate, args.seed)
        cells = []
        for setup in setups:
            measured_figures = figures_of(replay(engines[setup], arrivals, slo), arrivals)
            simulated_figures = simulated(engines[setup], setup, arrivals, slo)
            found[setup].append({"rate": rate, "measured": measured_figures, "simulated": simulated_figures})
            cells += [
                f"{figures['strict_attainment']:>7.1%} ({worst_class(figures):>6.1%})"
                for figures in (measured_figures, simulated_figures)
            ]
        tqdm.write(f"{rate:>6g} " + " ".join(cells))
    for reading in ("strict_attainment", "attainment"):
        for target in (0.9, 0.99):
            fcfs, apt = (
                interpolated_throughput([(row["rate"], row["measured"][reading]) for row in found[setup]], target)
                for setup in setups
            )
            ratio = f"{apt / fcfs:.2f} x" if fcfs else "fcfs does not reach it at any of these rates"
            what = "strictly" if reading == "strict_attainment" else "by the 99th percentile of gaps"
            print(f"effective throughput at {target:.0%} {what}: fcfs/kv {fcfs:.2f}, apt/hybrid {apt:.2f}/s, {ratio}")
    apart = [
        abs(row["measured"]["strict_attainment"] - row["simulated"]["strict_attainment"])
        for rows in found.values()
        for row in rows
    ]
    print(
        f"measured and simulated strict attainment differ by {100 * float(np.median(apart)):.1f} points in the median"
    )
    if args.json is not None:
        rows = {"/".join(setup): found[setup] for setup in setups}
        args.json.write_text(json.dumps({"slo": dataclasses.asdict(slo), "runs": rows}, indent=1) + "\n", "utf-8")


def scaled_slo(model: Any, lengths: Lengths, factor: float) -> Slo:
    """`factor` times the measured model's prediction for the median prompt alone, and for one token of one request."""
    prompt = int(np.median(lengths.prompt_tokens))
    prefill = model.step_s(StepLoad(prefill_tokens=prompt, prefill_pairs=prompt * (prompt + 1) // 2, samples=1))
    decode = model.step_s(StepLoad(decode_requests=1, context_tokens=(prompt, 0), samples=1))
    return Slo(factor * prefill, factor * decode)


if __name__ == "__main__":
    main()
