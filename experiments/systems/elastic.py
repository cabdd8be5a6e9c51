"""Elastic sequence parallelism (LoongServe) beside fixed forms of eight devices, by the length of prompts.

OPT-6.7B's shape with a context that it does not have, on eight A100 with 80 GB. A request attains if it took at most 5
times as long as alone on all devices.
Run `python -m experiments.systems.elastic --out docs/studies/elastic.json`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from apt_jax.cache import CacheKind
from apt_jax.scheduling.costs.cost_model import CostModel, block_bytes, cache_blocks
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.elastic.costs import ElasticCosts
from apt_jax.simulation.elastic.disaggregated import Disaggregated
from apt_jax.simulation.elastic.service import ElasticService, Served
from apt_jax.simulation.fleet import Fleet
from apt_jax.simulation.instance import Instance
from apt_jax.simulation.simulator import simulate_fleet
from apt_jax.simulation.workload import Arrival, Lengths, make_arrivals

DEVICES, BLOCK_SIZE, CHUNK, UTILIZATION = 8, 64, 2048, 0.9
MODEL = replace(MODELS["opt-6.7b"], max_position_embeddings=2048)  # positions are free of charge beyond that
LIMIT = 5.0  # times the latency alone; the paper has 25, which a run of some hundred requests cannot miss
TARGET = 0.9
LONGEST = (2048, 16384, 131072, 524288)
LINKS = (300.0, 25.0)  # GB/s between two devices: NVLink, and the lanes of PCIe
OUTPUT = 200
REQUESTS = 400  # of long prompts; of short ones more, or none would have to wait
STEP = 1.25  # between two rates
Ends = list[tuple[float, float]]  # of each request: seconds to its first token, and to its last
Row = dict[str, Any]


def model(devices: int, link: float = LINKS[0]) -> CostModel:
    """Iteration times of a tensor-parallel group."""
    hardware = replace(HARDWARE["a100-80gb"], link_bytes_per_s=link * 1e9)
    return CostModel(MODEL, hardware, "one-pass", devices)


def capacity(devices: int) -> int:
    """Tokens that a group holds as KV."""
    blocks = cache_blocks(
        model(devices), block_size=BLOCK_SIZE, max_num_batched_tokens=CHUNK, max_num_seqs=256, utilization=UTILIZATION
    )
    assert block_bytes(model(devices), BLOCK_SIZE) > 0
    return blocks // CacheKind.KV.blocks_per_page * BLOCK_SIZE


def lengths(longest: int) -> Lengths:
    """Prompts from 1/64 of the longest to the longest, evenly by their logarithm: most tokens are in the longest."""
    count = REQUESTS * max(16384 // longest, 1)
    prompts = np.geomspace(max(longest / 64, 32), longest - OUTPUT, count).astype(np.int64)
    return Lengths(f"up to {longest}", prompts, np.full(count, OUTPUT))


def elastic(arrivals: Sequence[Arrival], link: float, *, spreads: bool = True) -> Ends:
    """LoongServe; if it does not spread, each prompt is on one instance."""
    service = ElasticService(ElasticCosts(model(1, link)), DEVICES, capacity(1), mean_output=OUTPUT, elastic=spreads)
    return _ends(service.run(arrivals))


def chunked(arrivals: Sequence[Arrival], link: float, *, instances: int = 1) -> Ends:
    """Tensor parallelism with prompts in chunks beside decodes (vLLM, SplitFuse), in one group or several.

    Of several, which get requests in turn, one is simulated.
    """
    cost_model = model(DEVICES // instances, link)
    num_blocks = capacity(DEVICES // instances) // BLOCK_SIZE * CacheKind.KV.blocks_per_page

    def start(name: str) -> Instance:
        policy = make_policy("sarathi", PolicyContext(cost_model))
        limits = Limits(256, CHUNK, "kv", watermark_blocks=num_blocks // 100)
        return Instance(policy, cost_model, num_blocks=num_blocks, limits=limits, block_size=BLOCK_SIZE, name=name)

    outcome = simulate_fleet(arrivals[::instances], Fleet(start), max_model_len=2 * LONGEST[-1])
    return [(r.ttft_s or 0.0, (r.ended_s or 0.0) - r.arrival_s) for r in outcome.requests]


def disaggregated(arrivals: Sequence[Arrival], link: float) -> Ends:
    """DistServe: half of the devices compute prompts, half decode."""
    half = model(DEVICES // 2, link)
    return _ends(Disaggregated(half, half, capacity(DEVICES // 2)).run(arrivals))


def _ends(served: Sequence[Served]) -> Ends:
    found = []
    for request in served:
        assert request.first_s is not None and request.ended_s is not None
        found.append((request.first_s - request.arrival.arrival_s, request.ended_s - request.arrival.arrival_s))
    return found


FORMS: dict[str, Callable[[Sequence[Arrival], float], Ends]] = {
    "loongserve": elastic,
    "the same, a prompt on one instance": partial(elastic, spreads=False),
    "one group of 8, chunks": chunked,
    "eight instances, chunks": partial(chunked, instances=8),
    "4 + 4, disaggregated": disaggregated,
}


def alone_s(prompt: int, output: int) -> float:
    """Seconds of a request that has all devices for itself."""
    costs = ElasticCosts(model(1))
    return costs.prefill_s([prompt], DEVICES) + (output - 1) * costs.decode_s([prompt // DEVICES] * DEVICES, 1, 1)


def point(form: str, longest: int, link: float, rate: float, seed: int = 0) -> Row | None:
    """One simulation; None if a request does not fit."""
    table = lengths(longest)
    count = len(table.prompt_tokens)
    arrivals = make_arrivals(table, rate=rate, num_requests=count, cv=1.0, seed=seed, duration_s=0.0)
    try:
        ends = FORMS[form](arrivals, link)
    except ValueError:
        return None
    served = arrivals[:: count // len(ends)]
    slow = [end_s / alone_s(a.prompt_tokens, a.output_tokens) for a, (_, end_s) in zip(served, ends, strict=True)]
    return {
        "form": form, "longest": longest, "link": link, "rate": rate, "seed": seed,
        "attainment": float(np.mean(np.array(slow) <= LIMIT)),
        "p99_ttft_s": float(np.percentile([first for first, _ in ends], 99)),
        "mean_token_latency_s": float(np.mean([e / a.output_tokens for a, (_, e) in zip(served, ends, strict=True)])),
    }  # fmt: skip


def best_rate(form: str, longest: int, link: float, start: float) -> tuple[float, Row | None]:
    """The highest rate of a grid at which `TARGET` of the requests attain; 0 if a request does not fit."""
    kept: Row | None = None
    rate, found = start, 0.0
    while True:
        row = point(form, longest, link, rate)
        if row is None or rate > 1000 * start:
            return 0.0, None
        if row["attainment"] >= TARGET:
            kept, found, rate = row, rate, rate * STEP
        elif found or rate < 1e-4:
            return found, kept
        else:
            rate /= STEP**4
            start = rate


def first_rate(longest: int) -> float:
    """A rate to begin with: about half of what eight instances can do, each with sixteen decodes at a time."""
    costs = ElasticCosts(model(1))
    prompts = lengths(longest).prompt_tokens[::10]
    prompt_s = float(np.mean([costs.prefill_s([int(n)], 1) for n in prompts]))
    return 0.5 * DEVICES / (prompt_s + OUTPUT * costs.decode_s([int(prompts.mean())], 1, 1) / 16)


def table(rows: list[Row]) -> str:
    """Markdown."""
    columns = list(dict.fromkeys((row["link"], row["longest"]) for row in rows))
    heads = " | ".join(f"{longest:,}, {link:g} GB/s" for link, longest in columns)
    lines = [f"| prompts up to, link | {heads} |", "|---|" + "---:|" * len(columns)]
    for form in FORMS:
        found = [next(r for r in rows if (r["form"], r["link"], r["longest"]) == (form, *each)) for each in columns]
        cells = (f"{row['rate']:.3g}" if row["rate"] else "does not fit" for row in found)
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--longest", default=",".join(map(str, LONGEST)))
    parser.add_argument("--links", default=",".join(map(str, LINKS)), help="GB/s")
    parser.add_argument("--table", type=Path, help="show this file instead")
    args = parser.parse_args()
    rows: list[Row] = []
    if args.table is not None:
        rows = json.loads(args.table.read_text("utf-8"))["rows"]
        print(table(rows))
        return
    for link in map(float, args.links.split(",")):
        for longest in map(int, args.longest.split(",")):
            start = first_rate(longest)
            for form in FORMS:
                rate, row = best_rate(form, longest, link, start)
                rows.append({"form": form, "longest": longest, "link": link, **(row or {}), "rate": rate})
    if args.out is not None:
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
