"""Two policies on the same arrivals in real time, in process: `fcfs` on keys and values, `apt` on the hybrid cache.

The pool is that of the stage "steps", whose programs are used again; the scheduler may use only a part of it.
"""

import dataclasses
import time
from typing import Any

import numpy as np

from apt_jax.engine.calibration import calibrate
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import WATERMARK
from apt_jax.request import Request, Slo
from apt_jax.scheduling.prefix_pool import make_pool
from apt_jax.serve.runtime.starting.start_up import spare_collector
from apt_jax.simulation.requests.classes import Terms
from apt_jax.simulation.workload import Arrival, load_lengths
from experiments.device_check import model
from experiments.device_check.session import Session
from experiments.device_check.steps import engine_name
from experiments.engine_replay import SETUPS, Prepared, Replayed, Setup, figures_of, make_trace, replay, worst_quartile

_DRAIN_S = 16.0  # after the last arrival, until the last request has ended; as simulated
_CALIBRATION_S = 5.0


def run(session: Session) -> None:
    """Both policies at the higher rate, then at the lower one; an engine starts when its first run is due."""
    engines: dict[Setup, Prepared] = {}
    loaded: list[Any] = []
    serving = session.sizes.serving
    few, every = session.sizes.layers
    compiles_all = not session.ran("steps") or session.result_of(engine_name(session, every), "steps")
    layers = every if compiles_all else few

    def start(setup: Setup) -> dict[str, Any]:
        if not loaded:
            loaded.append(model.load(session, layers))
        began = time.monotonic()
        engines[setup] = _prepare(session, loaded[0], setup)
        pool = engines[setup].state.pool
        return {"layers": layers, "ready_s": round(time.monotonic() - began, 1), "scheduled_blocks": pool.num_blocks}

    lengths = load_lengths("sharegpt", session.sizes.options.max_model_len or 2048)
    terms = Terms(Slo(serving.ttft_slo_s, serving.tbt_slo_s))
    for rate in serving.rates:
        count = max(4, round(rate * serving.arrivals_s))
        arrivals = make_trace(lengths, [(terms, 1.0)], count, rate, seed=0)
        for setup in SETUPS[::-1]:  # apt first: its programs are those of the stage before
            if setup not in engines:
                session.check(f"engine {_name(setup)}", lambda s=setup: start(s), limit_s=session.left_s)  # type: ignore[misc]
                spare_collector()
            if setup not in engines:
                continue
            needs_s = 0.0 if session.sizes.patience > 1 else arrivals[-1].arrival_s + _DRAIN_S
            session.check(
                f"{_name(setup)} at {rate:g}/s", lambda p=engines[setup], a=arrivals: _serve(p, a),  # type: ignore[misc]
                limit_s=session.left_s, needs_s=needs_s,
            )  # fmt: skip


def _name(setup: Setup) -> str:
    return "/".join(setup)


def _prepare(session: Session, loaded: Any, setup: Setup) -> Prepared:
    """A warm engine whose scheduler has `cache_bytes` of the pool, and knows the device's times if its policy asks."""
    policy, mode = setup
    parts = model.parts(session, loaded, mode, policy)  # type: ignore[arg-type]
    sizes, layers = session.sizes, parts.model_config.num_hidden_layers
    of_all = parts.memory.block_bytes * sizes.layers[1] // layers
    blocks = min(sizes.serving.cache_bytes // of_all, parts.memory.num_blocks)
    limits = dataclasses.replace(parts.state.limits, watermark_blocks=int(WATERMARK * blocks))
    state = Replayed(make_pool(blocks, parts.config.block_size, prefix_caching=True), limits)
    engine = Engine(dataclasses.replace(parts, state=state))
    learns, engine.times.learns = engine.times.learns, False
    engine.warm_up(progress=True)
    if learns:
        engine.times.learns = True
        found = calibrate(engine.trials, engine.setup.cost_model, None, max_seconds=_CALIBRATION_S)
        engine.times.calibration = found
    return Prepared(engine, state)


def _serve(prepared: Prepared, arrivals: list[Arrival]) -> dict[str, Any]:
    began = time.monotonic()
    requests = replay(prepared, arrivals)
    figures = figures_of(requests, arrivals)
    return {
        "requests": len(requests),
        "arrivals_s": arrivals[-1].arrival_s,
        "served_s": time.monotonic() - began,
        "output_tokens": sum(len(r.output_token_ids) for r in requests),
        "preemptions": sum(r.num_preemptions for r in requests),
        "worst_quartile": worst_quartile(figures),
        **latencies(requests),
        **figures,
    }


def latencies(requests: list[Request]) -> dict[str, Any]:
    """Percentiles in seconds: time to first token, gaps between tokens of all requests, and each request's own P99."""
    ttft = [r.ttft_s for r in requests if r.ttft_s is not None]
    gaps = [gap for r in requests for gap in r.gaps_s]
    worst = [r.p99_gap_s for r in requests]
    return {"ttft_s": _percentiles(ttft), "tbt_s": _percentiles(gaps), "p99_tbt_of_requests_s": _percentiles(worst)}


def _percentiles(seconds: list[float]) -> dict[str, float]:
    return {f"p{p}": float(np.percentile(seconds, p)) for p in (50, 90, 99)} if seconds else {}
