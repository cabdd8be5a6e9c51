"""What the prefix cache saves and costs on this machine: first tokens with and without a hit, host time, throughput.

    python -m experiments.prefix_cache host
    python -m experiments.prefix_cache first --kind kv --rounds 5
    python -m experiments.prefix_cache unshared --rounds 3

Everything that is compared runs alternately in one process, after one run of each that is not counted. Dummy weights.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

from apt_jax.cache import BlockTable, CacheKind
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.prefix_pool import PrefixPool

PROMPT_TOKENS, CACHED_TOKENS, BLOCK_SIZE = 1024, 960, 16
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def host(rounds: int) -> None:
    """Microseconds on the host of each part of a hit of 960 tokens."""
    pool, draw = PrefixPool(4096, BLOCK_SIZE), random.Random(0)
    shared = [draw.randrange(50_000) for _ in range(CACHED_TOKENS)]
    spent: dict[str, list[float]] = {"find": [], "share": [], "keep": [], "release": []}
    for number in range(-2, rounds):
        prompt = [*shared, *(draw.randrange(50_000) for _ in range(PROMPT_TOKENS - CACHED_TOKENS))]
        request = Request(str(number), prompt, ONE, 0.0, 1, order=number + 2)
        times = [time.perf_counter()]
        found = pool.find(request, CacheKind.KV, (PROMPT_TOKENS - 1) // BLOCK_SIZE)
        times.append(time.perf_counter())
        request.table = BlockTable(CacheKind.KV)
        pool.share(request.table, found)
        times.append(time.perf_counter())
        pool.grow(request.table, PROMPT_TOKENS)
        before = time.perf_counter()
        pool.keep(request, PROMPT_TOKENS // BLOCK_SIZE)
        after = time.perf_counter()
        pool.release(request.table)
        released = time.perf_counter()
        if number >= 0:
            assert len(found) == CACHED_TOKENS // BLOCK_SIZE
            parts = (times[1] - times[0], times[2] - times[1], after - before, released - after)
            for name, seconds in zip(spent, parts, strict=True):
                spent[name].append(1e6 * seconds)
    medians = {name: statistics.median(values) for name, values in spent.items()}
    shown = ", ".join(f"{name} {value:.0f}" for name, value in medians.items())
    total = sum(medians.values())
    print(f"host us per request of {PROMPT_TOKENS} tokens, {CACHED_TOKENS} cached: {shown}; {total:.0f} in all")


def open_engine(folder: Path, **options):  # type: ignore[no-untyped-def]
    """OPT-125M's shape with dummy weights."""
    from apt_jax.engine_config import EngineConfig
    from apt_jax.serve.runtime.build import build_engine

    config = EngineConfig(
        block_size=BLOCK_SIZE, max_model_len=1088, max_num_seqs=16, max_num_batched_tokens=512,
        scheduling_policy="fcfs", calibrate=False, **options,
    )  # fmt: skip
    return build_engine(str(folder), engine_config=config, load_format="dummy")


def serve(engine, prompts, params) -> float:  # type: ignore[no-untyped-def]
    """Seconds until all are answered."""
    began = time.perf_counter()
    for number, prompt in enumerate(prompts):
        engine.add(prompt, params, request_id=str(number))
    while engine.has_unfinished:
        engine.step()
    return time.perf_counter() - began


def first(folder: Path, kind: str, rounds: int) -> None:
    """Time to the first token of prompts of 1,024 tokens: nothing cached, and 960 of them."""
    engine, draw = open_engine(folder, cache_mode=kind, num_blocks=1600, enable_prefix_caching=True), random.Random(1)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(4, 50_000) for _ in range(count)]

    shared = tokens(CACHED_TOKENS)
    serve(engine, [[*shared, *tokens(64)]], ONE)
    cold, warm = [], []
    for number in range(-1, rounds):
        seconds = serve(engine, [tokens(PROMPT_TOKENS)], ONE), serve(engine, [[*shared, *tokens(64)]], ONE)
        if number >= 0:
            cold.append(seconds[0])
            warm.append(seconds[1])
    figures = engine.figures()
    assert figures.prefix_hits == CACHED_TOKENS * (rounds + 1)
    a, b = statistics.median(cold), statistics.median(warm)
    print(
        f"{kind}, attention {engine.setup.attention}: cold {1e3 * a:.1f} ms ({1e3 * min(cold):.1f} to "
        f"{1e3 * max(cold):.1f}), {CACHED_TOKENS} cached {1e3 * b:.1f} ms ({1e3 * min(warm):.1f} to "
        f"{1e3 * max(warm):.1f}): {a / b:.2f} x"
    )


def unshared(folder: Path, rounds: int) -> None:
    """Output tokens per second of random prompts, with and without the cache."""
    engines = {
        on: open_engine(folder, cache_mode="kv", num_blocks=1600, enable_prefix_caching=on) for on in (False, True)
    }
    draw = random.Random(2)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    for number in range(-1, rounds):
        for on in (False, True) if number % 2 else (True, False):
            prompts = [[draw.randrange(4, 50_000) for _ in range(128)] for _ in range(16)]
            spent = serve(engines[on], prompts, params)
            if number >= 0:
                seconds[on].append(spent)
    rates = {on: 16 * 32 / statistics.median(values) for on, values in seconds.items()}
    print(
        f"16 random prompts of 128 tokens, 32 each: {rates[False]:.1f} tokens/s without, {rates[True]:.1f} with: "
        f"{100 * (rates[True] / rates[False] - 1):+.1f}%"
    )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["host", "first", "unshared"])
    parser.add_argument("--kind", choices=["kv", "hidden"], default="kv")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.what == "host":
        return host(200)
    with tempfile.TemporaryDirectory() as folder:
        from apt_jax.scheduling.costs.hardware import MODELS, by_name
        from experiments.preset_model import write_config

        path = write_config(Path(folder), by_name(MODELS, "opt-125m", "model"))
        return first(path, args.kind, args.rounds) if args.what == "first" else unshared(path, args.rounds)


if __name__ == "__main__":
    main()
