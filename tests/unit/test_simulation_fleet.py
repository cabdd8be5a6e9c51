"""Several simulated instances: as each would be alone, reports as old as they say, a number that follows the load."""

import json
from dataclasses import replace

import numpy as np
import pytest

from apt_jax.routing.autoscaler import Autoscaler, AutoscalerOptions
from apt_jax.routing.catalogue import make_router
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.cli import run
from apt_jax.simulation.fleet import Fleet
from apt_jax.simulation.instance import Instance
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.simulator import simulate, simulate_fleet
from apt_jax.simulation.workload import Arrival, load_lengths

MODEL = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"])
LIMITS = Limits(16, 512, "kv")
BLOCKS = 60  # 480 tokens


def start(name):
    policy = make_policy("fcfs", PolicyContext(MODEL))
    return Instance(policy, MODEL, num_blocks=BLOCKS, limits=LIMITS, name=name)


def some_arrivals(count, rate, seed=1):
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, count))
    return [Arrival(float(t), int(rng.integers(5, 120)), int(rng.integers(2, 30))) for t in times]


def figures(outcome):
    return [(r.ttft_s, r.gaps_s, r.num_preemptions) for r in outcome.requests]


def test_instances_in_turn_serve_as_each_would_alone():
    arrivals = some_arrivals(60, 12)
    fleet = simulate_fleet(arrivals, Fleet(start, 2, make_router("round-robin")))
    assert fleet.by_instance == [30, 30]
    for k in range(2):
        alone = simulate(
            arrivals[k::2],
            make_policy("fcfs", PolicyContext(MODEL)),
            cost_model=MODEL,
            num_blocks=BLOCKS,
            limits=LIMITS,
        )
        assert figures(fleet)[k::2] == figures(alone)
    assert any(preemptions for _, _, preemptions in figures(fleet)), "the pools were meant to be too small"


class Watching:
    """Round robin that keeps what it was shown."""

    def __init__(self):
        self.seen = []

    def choose(self, request, loads):
        self.seen.append((request.time_s, loads))
        return len(self.seen) % len(loads)


def test_reports_are_as_old_as_the_interval_allows_and_true_when_made():
    arrivals, interval_s = some_arrivals(60, 12), 0.4
    old, fresh = Watching(), Watching()
    outcomes = [
        simulate_fleet(arrivals, Fleet(start, 2, router, report_interval_s=seconds))
        for router, seconds in ((old, interval_s), (fresh, 0.0))
    ]
    assert figures(outcomes[0]) == figures(outcomes[1])
    ages = [now - load.time_s for now, loads in old.seen for load in loads if now > interval_s]
    assert min(ages) >= 0 and max(ages) < interval_s and np.mean(ages) > interval_s / 4
    # unfinished requests at the time of each report, from what became of all requests
    for k in range(2):
        given = [(r.arrival_s, r.last_token_s) for i, r in enumerate(outcomes[0].requests) if (i + 1) % 2 == k]
        for _, loads in old.seen:
            t = loads[k].time_s
            assert loads[k].num_requests == sum(arrival < t < end for arrival, end in given)


def test_knowing_memory_keeps_more_promises_past_the_cliff():
    arrivals = some_arrivals(400, 70)
    kept = {}
    for name in ("pending-time", "least-requests", "round-robin"):
        outcome = simulate_fleet(arrivals, Fleet(start, 4, make_router(name)))
        kept[name] = np.mean([r.attained for r in outcome.requests])
    assert kept["pending-time"] > max(kept["least-requests"], kept["round-robin"]) + 0.1


def test_instances_come_with_the_load_and_go_after_it():
    busy = some_arrivals(160, 16)
    quiet = [Arrival(busy[-1].arrival_s + 3.0 * k, 20, 4) for k in range(1, 60)]
    options = AutoscalerOptions(1, 4, up_delay_s=1.0, down_delay_s=20.0)
    fleet = Fleet(start, 1, make_router("pending-time"), autoscaler=Autoscaler(options), start_s=2.0)
    outcome = simulate_fleet([*busy, *quiet], fleet)
    assert all(r.finish_reason is not None for r in outcome.requests)
    assert sum(outcome.by_instance) == len(busy) + len(quiet) and len(fleet.members) > 2
    assert sum(member.ended_s is None for member in fleet.members) == 1
    assert outcome.makespan_s < outcome.instance_s < 3 * outcome.makespan_s
    first_new = fleet.members[1]
    assert first_new.ready_s == first_new.asked_s + 2.0
    assert min(s.start_s for s in first_new.instance.samples) >= first_new.ready_s


def test_a_fleet_needs_a_router():
    with pytest.raises(ValueError, match="need a router"):
        Fleet(start, 2)


def test_the_command_compares_routers_and_gives_the_same_bytes(tmp_path):
    args = SimulateArgs(
        num_blocks=300, num_requests=20, duration_s=5.0, rate="4,8", policies="fcfs", cache_modes="kv",
        workload="humaneval+sharegpt", instances=2, max_instances=3, router="pending-time,random",
        report_interval_s=0.2,
    )  # fmt: skip
    for name in ("a", "b"):
        run(replace(args, json=tmp_path / f"{name}.json", plot=tmp_path / f"{name}.png"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    rows = json.loads((tmp_path / "a.json").read_text())["runs"]
    assert [(row["router"], row["rate"]) for row in rows] == [
        ("pending-time", 4), ("pending-time", 8), ("random", 4), ("random", 8)
    ]  # fmt: skip
    assert all(row["instances"] == 2 and 2 <= row["mean_instances"] <= 3 for row in rows)
    with pytest.raises(ValueError, match="known: least-requests"):
        run(replace(args, router="pending"))


def test_a_mixture_has_as_many_requests_of_each_part():
    mixed, parts = load_lengths("humaneval+longbench"), [load_lengths("humaneval"), load_lengths("longbench")]
    assert len(mixed.prompt_tokens) == 2 * max(len(part.prompt_tokens) for part in parts)
    assert mixed.arrival_s is None
    for k, part in enumerate(parts):
        assert set(mixed.prompt_tokens[k::2]) == set(part.prompt_tokens)
