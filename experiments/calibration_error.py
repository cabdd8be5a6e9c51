"""Error of the cost model on iterations that it was not fitted to: `python -m experiments.calibration_error`.

An engine with random weights of a preset's shape is measured as at start-up. Then it serves requests with ShareGPT's
lengths under `fcfs` in hybrid mode, a pool small enough to use both cache kinds, and every iteration's time is compared
with the prediction made without it.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.engine.calibration import measure
from apt_jax.engine.engine import Engine
from apt_jax.engine.setup import set_up
from apt_jax.engine_config import EngineConfig
from apt_jax.execution.weights.choice import laid_out
from apt_jax.request import SamplingParams
from apt_jax.scheduling.costs.fit import Observation, fit, relative_errors
from apt_jax.scheduling.costs.step_load import StepLoad
from apt_jax.serve.runtime.starting.compile_cache import use_compile_cache
from apt_jax.simulation.workload import load_lengths
from experiments.preset_model import preset_model


def held_out(engine: Engine, num_requests: int, seed: int) -> list[Observation]:
    """Serve requests of ShareGPT's lengths (at most 400 tokens of output) and record the engine's own timings."""
    lengths = load_lengths("sharegpt", engine.max_model_len)
    rows = np.random.default_rng(seed).permutation(len(lengths.prompt_tokens))[:num_requests]
    found: list[Observation] = []

    def record(load: StepLoad, seconds: float, candidates: int = 0) -> bool:
        found.append(Observation(load, seconds, candidates))
        return False

    engine.times.calibration.observe = record  # type: ignore[method-assign]
    for i, row in enumerate(rows.tolist()):
        output = min(int(lengths.output_tokens[row]), 400)
        params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        engine.add([5] * int(lengths.prompt_tokens[row]), params, request_id=str(i))
    while engine.has_unfinished:
        engine.step()
    return found


def main() -> None:
    """Measure, fit, serve, compare; print a table of errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-requests", type=int, default=40)
    parser.add_argument("--num-blocks", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    use_compile_cache(None)
    with tempfile.TemporaryDirectory() as folder:
        loaded = preset_model(args.model, Path(folder), dtype=args.dtype, seed=args.seed)
    options = EngineConfig(dtype=args.dtype, num_blocks=args.num_blocks, calibrate=False, scheduling_policy="fcfs")
    engine = Engine(set_up(laid_out(loaded.model, loaded.config, options), loaded.config, options))
    engine.times.learns = True  # so that every iteration is timed
    engine.warm_up(progress=True)
    started = time.perf_counter()
    measured = measure(engine.trials)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    model = fit(engine.setup.cost_model, measured)
    print(f"{len(measured)} iterations measured in {seconds:.1f} s, fitted in {time.perf_counter() - started:.2f} s")
    print(f"scales: {model.scales}")
    print(
        f"rho: {1e6 * model.rho_s:+.2f} us per hidden token (KV {1e6 * model.attention_s[CacheKind.KV.index]:.2f} us)"
    )
    served = held_out(engine, args.num_requests, args.seed)
    print(f"{'iterations':<28} {'count':>6} {'median error':>13} {'p90':>6}")
    decodes = [o for o in served if not o.load.prefill_tokens]
    for name, group in (
        ("fitted to", measured), ("held out, all", served), ("held out, decode", decodes),
        ("held out, with prefill", [o for o in served if o.load.prefill_tokens]),
    ):  # fmt: skip
        errors = relative_errors(model, group)
        print(f"{name:<28} {len(group):>6} {np.median(errors):>13.1%} {np.percentile(errors, 90):>6.1%}")


if __name__ == "__main__":
    main()
