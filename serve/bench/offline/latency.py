"""`apt-jax bench latency`: one batch of equal requests at a time, without HTTP and without waiting."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from apt_jax.engine.interface import ServingEngine
from apt_jax.files import check_writable
from apt_jax.progress import is_hidden
from apt_jax.serve.bench.offline.measure import checked, open_engine, samples_of, write_result
from apt_jax.serve.bench.offline.options import BenchLatency
from apt_jax.serve.bench.work import LOWEST_ID, Work
from apt_jax.serve.runtime.driver import Driver

PERCENTILES = (10, 25, 50, 75, 90, 99)
NAMES = {"latency": "whole batch", "ttft": "first token of a request", "tpot": "each further token"}


@dataclass(frozen=True)
class Iteration:
    """Seconds of one batch: all of it, mean time to a request's first token, mean time per token after it."""

    latency_s: float
    ttft_s: float
    tpot_s: float


def run(args: BenchLatency) -> int:
    """Run the command.

    Raises:
        ValueError: a flag has a bad value, or the batch does not fit; one sentence.
    """
    check_writable(args.output, "--output")
    engine = open_engine(args.model, args.load, args.engine)
    if args.batch_size > engine.max_num_seqs:
        raise ValueError(
            f"batch_size={args.batch_size} is more than max_num_seqs={engine.max_num_seqs}; raise --max-num-seqs"
        )
    if (longest := args.input_len + args.output_len) > engine.max_model_len:
        raise ValueError(
            f"input_len={args.input_len} and output_len={args.output_len} are {longest} tokens, the context holds "
            f"{engine.max_model_len}"
        )
    engine.warm_up(progress=True)
    generator = np.random.default_rng(args.engine.seed)
    found = []
    for number in tqdm(
        range(args.num_iters_warmup + args.num_iters), desc="batches", unit="batch", disable=is_hidden()
    ):
        ids = generator.integers(LOWEST_ID, engine.model_config.vocab_size, (args.batch_size, args.input_len))
        works = [Work(row, args.input_len, args.output_len) for row in ids.tolist()]
        iteration = measure(engine, works)
        if number >= args.num_iters_warmup:
            found.append(iteration)
    figures = summarise(found, args)
    shown = ("mean", *(f"p{percent}" for percent in PERCENTILES))
    print(f"{args.batch_size} requests of {args.input_len} + {args.output_len} tokens, {len(found)} batches; ms")
    print(f"{'':<26}" + "".join(f"{name:>10}" for name in shown))
    for key, name in NAMES.items():
        print(f"{name:<26}" + "".join(f"{figures[f'{column}_{key}_ms']:>10.2f}" for column in shown))
    print(f"{figures['output_tokens_per_second']:.1f} output tokens/s")
    write_result(args.output, args, figures)
    return 0


def measure(engine: ServingEngine, works: list[Work]) -> Iteration:
    """Serve one batch to the end.

    Raises:
        ValueError: the engine refused a request.
        RuntimeError: it failed on one.
    """
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    started = time.perf_counter()
    for sample, output in Driver(engine).run(samples_of(works, temperature=0.0, prefix="latency-")):
        checked(output)
        last[sample.request_id] = time.perf_counter() - started
        first.setdefault(sample.request_id, last[sample.request_id])
    latency = time.perf_counter() - started
    further = [(last[name] - first[name]) / max(works[0].output_tokens - 1, 1) for name in first]
    return Iteration(latency, float(np.mean(list(first.values()))), float(np.mean(further)))


def summarise(found: list[Iteration], args: BenchLatency) -> dict[str, Any]:
    """Means and percentiles over the batches, in ms."""
    figures: dict[str, Any] = {"batch_size": args.batch_size, "latencies": [i.latency_s for i in found]}
    for key in NAMES:
        values = np.array([getattr(iteration, f"{key}_s") for iteration in found]) * 1e3
        figures[f"mean_{key}_ms"] = float(values.mean())
        figures |= {f"p{p}_{key}_ms": float(np.percentile(values, p)) for p in PERCENTILES}
    seconds = figures["mean_latency_ms"] / 1e3
    figures["output_tokens_per_second"] = args.batch_size * args.output_len / seconds
    return figures
