"""How many token slots of the padded batches are padding, on real request lengths.

    python -m experiments.padding_waste

Runs the engine's own scheduling, block accounting and buckets without a model, one fixed time per iteration. The
trace is a CSV with the columns arrival_s, prompt_tokens, output_tokens and unit-rate arrivals.
"""

import csv
import random
from dataclasses import dataclass
from pathlib import Path

import tyro

from apt_jax.batching.buckets import Buckets
from apt_jax.cache import BlockPool
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.state import Limits, SchedulerState

ITERATION_S = 0.05


@dataclass(frozen=True)
class Padding:
    """Token slots run and how many of them held a token."""

    decode_slots: int
    decode_tokens: int
    prefill_slots: int
    prefill_tokens: int

    @property
    def decode_waste(self) -> float:
        """Share of the decode iterations' slots that were padding."""
        return 1 - self.decode_tokens / max(self.decode_slots, 1)

    @property
    def prefill_waste(self) -> float:
        """Share of the prefill iterations' slots that were padding."""
        return 1 - self.prefill_tokens / max(self.prefill_slots, 1)

    @property
    def waste(self) -> float:
        """Share of all slots that were padding."""
        return 1 - (self.decode_tokens + self.prefill_tokens) / max(self.decode_slots + self.prefill_slots, 1)


def read_lengths(path: Path) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of every row."""
    with path.open(newline="") as file:
        return [(int(row["prompt_tokens"]), int(row["output_tokens"])) for row in csv.DictReader(file)]


def measure(
    lengths: list[tuple[int, int]],
    *,
    rate: float,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_blocks: int = 4096,
    cache_mode: str = "hybrid",
    policy: str = "fcfs",
    seed: int = 0,
) -> Padding:
    """Serve `lengths` with Poisson arrivals of `rate` requests per second of 20 iterations. Pure; seeded."""
    generator = random.Random(seed)
    limits = Limits(max_num_seqs, max_num_batched_tokens, cache_mode, num_blocks // 100)  # type: ignore[arg-type]
    state = SchedulerState(BlockPool(num_blocks, 16), limits)
    buckets = Buckets(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    scheduler = make_policy(policy)
    arrivals, at = [], 0.0
    for number, (prompt, output) in enumerate(lengths):
        at += generator.expovariate(rate)
        arrivals.append(Request(str(number), range(prompt), SamplingParams(max_tokens=output), at, output))
    arrivals.reverse()
    now, slots, tokens = 0.0, {True: 0, False: 0}, {True: 0, False: 0}
    while arrivals or state.num_unfinished:
        if not state.num_unfinished:
            now = max(now, arrivals[-1].arrival_s)
        while arrivals and arrivals[-1].arrival_s <= now:
            state.add(arrivals.pop())
        spans = state.apply(scheduler.schedule(state, now), now)
        now += ITERATION_S
        count = sum(span.num_tokens for span in spans)
        bucket = buckets.choose(count, len(spans), decode_only=count == len(spans))
        slots[bucket.decode_only] += bucket.tokens
        tokens[bucket.decode_only] += count
        for span in spans:
            if span.samples:
                state.commit(span.request, 0, now)
    return Padding(slots[True], tokens[True], slots[False], tokens[False])


def main(
    trace: Path = Path("../shared/traces/sharegpt_v3_firstturn_le2048.csv"),
    num_requests: int = 1000,
    rates: tuple[float, ...] = (0.1, 0.5, 1.0, 2.0, 4.0),
) -> None:
    """Print the padding of CPU and GPU default shapes at several rates."""
    lengths = read_lengths(trace)[:num_requests]
    print(f"{trace.name}, {len(lengths)} requests, fcfs, hybrid cache, {ITERATION_S * 1e3:.0f} ms an iteration")
    print(f"{'shapes':>12} {'rate/s':>7} {'decode':>8} {'prefill':>8} {'all':>8}   padding as a share of token slots")
    for seqs, tokens in ((64, 512), (256, 2048)):
        for rate in rates:
            found = measure(lengths, rate=rate, max_num_seqs=seqs, max_num_batched_tokens=tokens)
            shapes = f"{seqs} x {tokens}"
            print(f"{shapes:>12} {rate:7.1f} {found.decode_waste:8.1%} {found.prefill_waste:8.1%} {found.waste:8.1%}")


if __name__ == "__main__":
    tyro.cli(main)
