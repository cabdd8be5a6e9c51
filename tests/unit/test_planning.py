"""`apt-jax plan`: replicas and cost follow from the simulated rate, and what cannot be is said."""

import json
from dataclasses import replace

import pytest

from apt_jax.simulation.cli import run as simulate
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.planning.options import PlanArgs
from apt_jax.simulation.planning.planner import plan, read_prices, run
from apt_jax.simulation.workload import load_lengths

QUICK = PlanArgs(
    model="opt-6.7b", rate=30.0, attainment=0.9, hardware="tpu-v6e", numbers="16-bit", policies="vllm-v1",
    duration_s=4.0, jobs=1,
)  # fmt: skip


def test_replicas_and_cost_follow_from_the_rate_that_simulate_finds(tmp_path):
    prices = tmp_path / "prices.csv"
    prices.write_text("hardware,usd_per_hour\ntpu-v6e,2.5\n")
    (entry,) = plan(replace(QUICK, prices=prices))
    found = simulate(
        SimulateArgs(
            model="opt-6.7b", hardware="tpu-v6e", policies="vllm-v1", effective_throughput="0.9", duration_s=4.0,
            num_requests=1, enable_prefix_caching=False, jobs=1,
        )
    )["effective_throughput"]  # fmt: skip
    (expected,) = [each["rate"] for each in found if each["reading"] == "strict"]
    assert expected > entry.rate == entry.fluid_bound and entry.lasts is None, "four seconds say too little"
    assert entry.replicas == entry.devices == -(-30.0 // entry.rate) > 1
    assert entry.usd_per_hour == 2.5 * entry.replicas
    (share,) = simulate(
        SimulateArgs(
            model="opt-6.7b", hardware="tpu-v6e", policies="vllm-v1", rate=str(30.0 / entry.replicas), duration_s=4.0,
            num_requests=1, enable_prefix_caching=False, jobs=1,
        )
    )["runs"]  # fmt: skip
    assert (entry.strict_attainment, entry.worst_class) == (share["strict_attainment"], share["worst_class"])
    assert 0 < entry.worst_class <= entry.strict_attainment
    lengths = load_lengths("sharegpt", 2048)
    tokens = (lengths.prompt_tokens + lengths.output_tokens).mean() * 30.0 * 3600
    assert entry.usd_per_million_tokens == pytest.approx(entry.usd_per_hour / tokens * 1e6)
    assert entry.weights_gib == pytest.approx(12.4, abs=0.1) and 15 < entry.cache_gib < 17


def test_the_cheapest_comes_first_and_what_does_not_fit_last(tmp_path, capsys):
    prices = tmp_path / "prices.csv"
    prices.write_text("hardware,usd_per_hour\ntpu-v6e,2.5\nh200,100\n")
    args = replace(QUICK, model="opt-13b", hardware="h200,tpu-v5e,tpu-v6e", prices=prices, json=tmp_path / "plan.json")
    entries = run(args)
    assert [entry.hardware for entry in entries] == ["tpu-v6e", "h200", "tpu-v5e"]
    assert entries[2].problem and entries[2].replicas == 0
    shown = capsys.readouterr().out
    assert f"tpu-v5e x1, 16-bit, vllm-v1: {entries[2].problem}" in shown
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["arguments"]["rate"] == 30.0 and [e["hardware"] for e in kept["plan"]] == [e.hardware for e in entries]
    assert "json" not in kept["arguments"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no line"),
        ("hardware,usd_per_hour\ntpu-v9,1\n", "line 2: 'tpu-v9' for '1'; give hardware .one of"),
        ("hardware,usd_per_hour\nh200,-1\n", "line 2: 'h200' for '-1'"),
        ("hardware,usd_per_hour\nh200,nan\n", "line 2: 'h200' for 'nan'"),
        ("device,price\nh200,1\n", "line 2: '' for ''"),
    ],
)
def test_prices_that_say_nothing(tmp_path, text, sentence):
    (tmp_path / "prices.csv").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_prices(tmp_path / "prices.csv")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"hardware": "v9"}, "hardware"), ({"numbers": "fp4"}, "numbers"), ({"policies": "lifo"}, "lifo"),
        ({"tensor_parallel_size": "0"}, "tensor_parallel_size"), ({"workload": "nothing"}, "workload"),
    ],
)  # fmt: skip
def test_flags_that_name_nothing(changed, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(replace(QUICK, **changed))
    with pytest.raises(ValueError, match="rate=0"):
        PlanArgs(rate=0)
    with pytest.raises(ValueError, match=r"attainment=1\.5"):
        PlanArgs(attainment=1.5)
