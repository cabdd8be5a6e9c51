"""What `apt` promises over a whole load, simulated: the mix of kinds never hurts, and an overload ends when it ends."""

import statistics
from dataclasses import replace

import numpy as np
import pytest

from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.simulator import simulate, simulate_fleet
from apt_jax.simulation.workload import Arrival, load_lengths

SEEDS = (0, 1)
MOST_TOKENS = MODELS["opt-13b"].max_position_embeddings


def strictly_kept(experiment, mode, attention, rate):
    reports = [
        Experiment(**experiment, seed=seed).run("apt", mode, attention, rate)[1].strict_attainment for seed in SEEDS
    ]
    return statistics.mean(reports), statistics.stdev(reports) / len(reports) ** 0.5


@pytest.mark.parametrize(
    ("hardware", "attention", "rate"),
    [
        ("a100-40gb", "recompute", 1.2),  # hidden attention costs far more than its memory is worth
        ("h200", "absorbed", 4.5),  # somewhat slower, and worth it when memory is short
        ("tpu-v6e", "absorbed", 3.0),  # faster, except for short contexts, but not in iterations with both
    ],
)
def test_hybrid_is_no_worse_than_the_better_kind_alone(hardware, attention, rate):
    experiment = {"hardware": hardware, "num_blocks": 640, "duration_s": 60.0, "num_requests": 1}
    kept = {mode: strictly_kept(experiment, mode, attention, rate) for mode in ("kv", "hidden", "hybrid")}
    best, error = max(kept["kv"], kept["hidden"])
    assert kept["hybrid"][0] >= best - max(0.02, 2 * max(error, kept["hybrid"][1])), kept


def test_a_minute_after_an_overload_promises_are_kept_again():
    """Three times the load for two minutes. Afterwards `sarathi`, which forgets no one, is behind for minutes."""
    base, generator, lengths = 1.1, np.random.default_rng(0), load_lengths("sharegpt", MOST_TOKENS)
    arrivals, now = [], 0.0
    for end, rate in ((60, base), (180, 3 * base), (360, base)):
        while (now := now + generator.exponential(1 / rate)) < end:
            row = generator.integers(len(lengths.prompt_tokens))
            arrivals.append(Arrival(now, int(lengths.prompt_tokens[row]), int(lengths.output_tokens[row])))
        now = end
    later = [k for k, arrival in enumerate(arrivals) if arrival.arrival_s > 240]
    kept = {}
    for policy in ("apt", "sarathi"):
        fleet = Experiment(num_blocks=640).fleet(policy, "hidden", "one-pass")
        requests = simulate_fleet(arrivals, fleet, slo=Slo(), max_model_len=MOST_TOKENS).requests
        kept[policy] = sum(requests[k].attained_strictly for k in later) / len(later)
    assert kept["apt"] >= 0.95 > kept["sarathi"], kept


def test_promises_that_nobody_could_keep_cost_the_others_nothing(tmp_path):
    """4% of the requests ask for their first token within a microsecond. Before, 94% of the others were kept."""
    kept = {}
    for limits in (",", "0.001,"):
        (tmp_path / "c.csv").write_text(f"name,share,ttft_ms,tbt_ms\nusual,96,,\nodd,4,{limits}\n")
        experiment = Experiment(num_blocks=2000, classes=tmp_path / "c.csv", duration_s=40.0, num_requests=1)
        _, report = experiment.run("apt", "hybrid", "one-pass", 4.0)
        classes = {entry["name"]: entry["strict_attainment"] for entry in report.attainment_by_class["slo_class"]}
        kept[limits], odd = classes["usual"], classes["odd"]
        assert odd == 0 or limits == ","
    assert min(kept.values()) >= kept[","] - 0.01, kept


def test_more_samples_than_seats_do_not_preempt_one_another():
    """128 requests of 500 tokens for 64 seats, while a stream runs; all that wait are late soon, and grow old.

    Before, older ones that became late pushed younger ones out of the lane: 1,936 preemptions, and the stream stalled.
    """
    slow = replace(HARDWARE["a100-40gb"], overhead_s=0.1)  # an iteration takes as long as on a small machine
    model = CostModel(MODELS["opt-125m"], slow, "one-pass")
    arrivals = [Arrival(0.0, 20, 900), *(Arrival(2.0, 10, 250) for _ in range(128))]
    requests = simulate(
        arrivals, make_policy("apt", PolicyContext(model)), cost_model=model, num_blocks=20_000,
        limits=Limits(64, 2048, "hybrid"),
    ).requests  # fmt: skip
    assert requests[0].attained_strictly
    assert sum(request.num_preemptions for request in requests) < 16
