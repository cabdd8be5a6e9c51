"""The simulator: workloads, the search, deterministic results, and the very plans of the engine."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apt_jax.execution.interface import StepResults
from apt_jax.model_config import ModelConfig
from apt_jax.request import SamplingParams
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.step_load import Chunk, StepLoad, step_load
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.plan_log import plan_dict
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.cli import configurations, run
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.search import effective_throughput, interpolated_throughput
from apt_jax.simulation.simulator import Stalled, simulate
from apt_jax.simulation.workload import NAMED, Arrival, load_lengths, make_arrivals
from tests.support.checkpoint_folders import random_model
from tests.support.engines import make_engine

SMALL = SimulateArgs(
    model="opt-125m", hardware="tpu-v5e", num_blocks=260, num_requests=30, rate="0.1,0.2", cache_modes="kv,hybrid"
)


@pytest.mark.parametrize(
    ("name", "prompt", "output"), [("sharegpt", 157, 325), ("humaneval", 171, 98), ("longbench", 1217, 248)]
)
def test_named_workloads_have_the_known_means(name, prompt, output):
    lengths = load_lengths(name)
    assert lengths.prompt_tokens.mean() == pytest.approx(prompt, abs=1)
    assert lengths.output_tokens.mean() == pytest.approx(output, abs=1)
    assert (lengths.prompt_tokens + lengths.output_tokens <= 2048).all()


def test_all_named_workloads_load_and_only_azure_has_recorded_arrivals():
    assert [name for name in NAMED if load_lengths(name).arrival_s is not None] == ["azure"]


@pytest.mark.parametrize("rate", [0.5, 8.0])
def test_arrivals_last_300_seconds_at_the_rate_asked_for(rate):
    arrivals = make_arrivals(load_lengths("sharegpt"), rate=rate, num_requests=1000, cv=1.0, seed=0)
    assert len(arrivals) == max(1000, 300 * rate)
    assert arrivals[-1].arrival_s > 280 and len(arrivals) / arrivals[-1].arrival_s == pytest.approx(rate, rel=0.1)


def test_arrivals_have_the_variation_asked_for_and_one_pattern_at_all_rates():
    lengths = load_lengths("humaneval")
    for cv in (1.0, 2.0, 4.0):
        gaps = np.diff([a.arrival_s for a in make_arrivals(lengths, rate=2, num_requests=20_000, cv=cv, seed=1)])
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    slow = make_arrivals(lengths, rate=1, num_requests=1000, cv=1.0, seed=5)
    fast = make_arrivals(lengths, rate=2, num_requests=1000, cv=1.0, seed=5)
    assert [a.arrival_s / 2 for a in slow] == pytest.approx([a.arrival_s for a in fast])
    assert [a.prompt_tokens for a in slow] == [a.prompt_tokens for a in fast]


def test_recorded_arrivals_keep_their_pattern_and_order():
    lengths = load_lengths("azure")
    arrivals = make_arrivals(lengths, rate=2 * lengths.recorded_rate, num_requests=100, cv=None, seed=0)
    assert lengths.arrival_s is not None and lengths.arrival_s[90] > 0
    assert arrivals[90].arrival_s == pytest.approx(lengths.arrival_s[90] / 2)
    assert [a.prompt_tokens for a in arrivals[:90]] == list(lengths.prompt_tokens[:90])


def test_a_csv_is_read_sorted_and_filtered(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n5,10,4\n3,20,6\n9,3000,1\n")
    lengths = load_lengths(str(path))
    assert list(lengths.prompt_tokens) == [20, 10] and list(lengths.arrival_s) == [0.0, 2.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("prompt_tokens\n3\n", "no column output_tokens"), ("prompt_tokens,output_tokens\n3,x\n", "must be a number"),
     ("prompt_tokens,output_tokens\n3000,5\n", "at most 2048"),
     *((f"arrival_s,prompt_tokens,output_tokens\n0,1,1\n\n1,{cell},3\n", f"line 4: prompt_tokens={cell} must be")
       for cell in ("nan", "inf", "-inf", "0", "-3", "1.5", "1e300", "1e-9")),
     *((f"arrival_s,prompt_tokens,output_tokens\n0,1,1\n1,3,{cell}\n", f"line 3: output_tokens={cell} must be")
       for cell in ("NaN", "Infinity", "0.0", "-1", "0.5")),
     *((f"arrival_s,prompt_tokens,output_tokens\n{cell},1,1\n1,3,4\n", f"line 2: arrival_s={cell} must be")
       for cell in ("nan", "inf", "-1", "-1e-9")),
     ("arrival_s,prompt_tokens,output_tokens\n1,3\n", "line 2: there is no cell for output_tokens"),
     ("prompt_tokens,output_tokens\n3,4\n" + "9" * 200_000 + ",4\n", "line [23]: field larger than")],
)  # fmt: skip
def test_a_bad_csv_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_lengths(str(path))
    with pytest.raises(ValueError, match="neither a file nor one of"):
        load_lengths("sharegtp")


def test_a_byte_order_mark_is_no_part_of_a_column(tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text("\ufeffprompt_tokens,output_tokens\n10,4\n", encoding="utf-8")
    assert list(load_lengths(str(path)).prompt_tokens) == [10]


@pytest.mark.parametrize("arrivals", [(0.0,), (7.0, 7.0, 7.0)])
def test_arrivals_all_at_one_time_have_no_rate(tmp_path, arrivals):
    path = tmp_path / "mine.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "".join(f"{at},10,4\n" for at in arrivals))
    with pytest.raises(ValueError, match="all at one time"):
        make_arrivals(load_lengths(str(path)), rate=1.0, num_requests=5, cv=None, seed=0)


@pytest.mark.parametrize(
    "numbers", [{"rate": math.nan}, {"rate": math.inf}, {"cv": math.nan}, {"duration_s": math.nan}, {"rate": 1e12}]
)
def test_arrivals_of_numbers_that_are_none_are_refused(numbers):
    with pytest.raises(ValueError, match=r"must all be greater than 0|lower one"):
        make_arrivals(load_lengths("sharegpt"), **{"rate": 1.0, "num_requests": 5, "cv": 1.0, "seed": 0, **numbers})


def test_search_finds_the_cliff_of_each_target():
    asked = []

    def reaches(rate, target):
        asked.append(rate)
        return 1.2 - rate / 10 >= target  # 0.9 at 3, 0.99 at 2.1, 0.7 at 5

    found = effective_throughput(reaches, [0.7, 0.9, 0.99])
    for target, rate in ((0.7, 5.0), (0.9, 3.0), (0.99, 2.1)):
        assert rate / 1.03 <= found[target] <= rate
    assert len(asked) < 30
    assert effective_throughput(lambda rate, target: False, [0.9]) == {0.9: 0.0}


@pytest.mark.parametrize(
    ("points", "rate"),
    [
        ([(1, 1.0), (2, 0.5)], 1.2),
        ([(1, 1.0), (2, 0.95), (4, 0.85)], 3.0),
        ([(1, 1.0), (2, 0.95)], 2.0),  # not beyond what was tried
        ([(1, 0.5), (2, 0.95)], 0.0),  # nor above a rate that missed it
        ([(1, 0.95), (2, 0.9), (3, 0.8)], 2.0),
    ],
)
def test_effective_throughput_between_measured_rates(points, rate):
    assert interpolated_throughput(points, 0.9) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"policies": "fcfs,lifo"}, "known: .*apt"), ({"cache_modes": "kv,both"}, "known: kv, hidden"),
     ({"hardware": "a100"}, "a100-40gb"), ({"rate": "1,fast"}, "numbers"), ({"rate": "0"}, "greater than 1e-06"),
     ({"effective_throughput": "90"}, "at most 1"), ({"model": "opt-7b"}, "opt-6.7b")],
)  # fmt: skip
def test_bad_flags_are_refused_with_what_there_is(change, message):
    with pytest.raises(ValueError, match=message):
        run(replace(SMALL, **change))


def test_kv_has_no_hidden_attention_and_appears_once():
    chosen = configurations(replace(SMALL, policies="apt", hidden_attention="recompute,absorbed"))
    assert chosen == [("apt", "kv", "recompute"), ("apt", "hybrid", "recompute"), ("apt", "hybrid", "absorbed")]


class Idle:
    def schedule(self, state, now):
        return Plan()

    def finished(self, request, now):
        pass


def test_an_idle_policy_is_caught_and_an_impossible_request_refused():
    model = CostModel(MODELS["opt-125m"], HARDWARE["tpu-v5e"])
    with pytest.raises(Stalled):
        simulate([Arrival(0.0, 5, 5)], Idle(), cost_model=model, num_blocks=10, limits=Limits(4, 64, "kv"))
    with pytest.raises(ValueError, match="does not fit"):
        simulate(
            [Arrival(0.0, 500, 5)], make_policy("fcfs"), cost_model=model, num_blocks=10, limits=Limits(4, 64, "kv")
        )


def test_one_request_takes_the_time_of_its_iterations():
    model = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"])
    outcome = simulate(
        [Arrival(1.0, 100, 3)], make_policy("fcfs"), cost_model=model, num_blocks=100, limits=Limits(4, 64, "kv")
    )
    chunks = [
        model.step_s(StepLoad(prefill_tokens=64, prefill_pairs=64 * 65 // 2)),
        model.step_s(
            StepLoad(prefill_tokens=36, prefill_pairs=36 * 64 + 36 * 37 // 2, samples=1, chunks=(Chunk(0, 36, 64),))
        ),
    ]
    decode = StepLoad(decode_requests=1, samples=1, decodes=(1, 0))
    decodes = [model.step_s(replace(decode, context_tokens=(n, 0))) for n in (101, 102)]
    request = outcome.requests[0]
    assert request.ttft_s == pytest.approx(sum(chunks)) and request.gaps_s == pytest.approx(decodes)
    assert outcome.makespan_s == pytest.approx(1 + sum(chunks) + sum(decodes))


CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
)  # fmt: skip


class FakeRunner:
    """Takes the cost model's time for each iteration and ends each request at its length."""

    num_programs = 0

    def __init__(self, engine, model, lengths):
        self.now, self._engine, self._model, self._lengths = 0.0, engine, model, lengths
        self._apply = engine.state.apply
        engine.state.apply = self._applied
        engine.runner, engine._clock = self, lambda: self.now

    def _applied(self, plan, now):
        self._spans = self._apply(plan, now)
        self._load = step_load(plan, self._spans)
        return self._spans

    def project(self, projections):
        pass

    def dispatch(self, batch):
        self.now += self._model.step_s(self._load)
        return StepResults(batch if any(span.samples for span in self._spans) else None, ())

    def read(self, results):
        batch = results.sampled
        last = [len(r.output_token_ids) + 1 >= self._lengths[r.request_id] for r in batch.requests]
        return StepResults(SimpleNamespace(token=np.where(last, 2, 5), is_finite=np.ones(len(last), bool)), ())


@pytest.mark.parametrize("policy", ["fcfs", "apt", "apt-paper", "sarathi"])
def test_engine_and_simulator_make_the_same_plans(policy):
    """One trace through the engine's own loop with a fake runner, and through the simulator.

    No prompt begins like another, but preempted requests find their own pages.
    """
    rng = np.random.default_rng(4)
    cost = CostModel(CONFIG, HARDWARE["tpu-v5e"], "recompute")
    times = np.cumsum(rng.exponential(0.003, 60))
    arrivals = [Arrival(float(t), int(rng.integers(2, 30)), int(rng.integers(2, 30))) for t in times]
    engine = make_engine(random_model(CONFIG, seed=0), CONFIG, num_blocks=40, async_scheduling=False)
    runner = FakeRunner(engine, cost, {f"r{i}": a.output_tokens for i, a in enumerate(arrivals)})
    engine.policy = make_policy(policy, PolicyContext(cost))
    served, coming = [], list(enumerate(arrivals))
    while coming or engine.has_unfinished:
        while coming and coming[0][1].arrival_s <= runner.now:
            index, arrival = coming.pop(0)
            engine.add(
                [5 + index, *[4] * (arrival.prompt_tokens - 1)], SamplingParams(max_tokens=None),
                request_id=f"r{index}", arrival_s=arrival.arrival_s,
            )  # fmt: skip
        if not engine.has_unfinished:
            runner.now = coming[0][1].arrival_s
            continue
        now = runner.now
        engine.step()
        served.append((now, engine.last_plan))
    simulated = []
    simulate(
        arrivals, make_policy(policy, PolicyContext(cost)), cost_model=cost, num_blocks=40, limits=engine.state.limits,
        block_size=8, max_model_len=64, prefix_caching=True, on_plan=lambda plan, now: simulated.append((now, plan)),
    )  # fmt: skip
    served = [(now, plan) for now, plan in served if not plan.is_empty]
    assert len(served) == len(simulated) > 60
    assert [plan_dict(0, *entry) for entry in served] == [plan_dict(0, *entry) for entry in simulated]
    assert any(plan.preempted or plan.waited for _, plan in simulated), "the pool was meant to be too small"


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    """JSON and plot, searches included, learned lengths and random orders too; arrivals last 5 s to be quick."""
    args = replace(
        SMALL, model="opt-13b", hardware="a100-40gb", workload=str(tmp_path / "short.csv"), policies="apt,random,fcfs",
        cache_modes="hybrid", rate="3", effective_throughput="0.9", num_requests=20, num_blocks=100, max_num_seqs=4,
        duration_s=5.0,
    )  # fmt: skip
    (tmp_path / "short.csv").write_text("prompt_tokens,output_tokens\n30,4\n200,2\n60,6\n")
    for name in ("a", "b"):
        run(replace(args, json=tmp_path / f"{name}.json", plot=tmp_path / f"{name}.png"))
    for kind in ("json", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    result = json.loads((tmp_path / "a.json").read_text())
    assert [r["policy"] for r in result["runs"]] == ["apt", "random", "fcfs"]
    assert {e["policy"]: e["target"] for e in result["effective_throughput"]} == dict.fromkeys(
        ("apt", "random", "fcfs"), 0.9
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"plot": "no/such.png"}, "--plot no/such.png: there is no folder no; make it, or choose another file"),
        ({"plot": "x.xyz"}, "--plot x.xyz: the format '.xyz' is unknown; known: .*svg"),
        ({"plot": "."}, "--plot . is a folder"),
        ({"json": "no/such.json"}, "--json no/such.json: there is no folder no"),
        ({"plot": "x.png", "rate": "", "effective_throughput": "0.9"}, "nothing to plot: give --rate"),
    ],
)
def test_files_are_checked_before_anything_is_simulated(flags, sentence, monkeypatch):
    monkeypatch.setattr(Experiment, "run", lambda *args: pytest.fail("it was simulated"))
    paths = {name: Path(text) if name in ("plot", "json") else text for name, text in flags.items()}
    with pytest.raises(ValueError, match=sentence):
        run(SimulateArgs(**{"rate": "1", **paths}))


def test_a_missing_matplotlib_is_found_first(monkeypatch, tmp_path):
    monkeypatch.setattr(Experiment, "run", lambda *args: pytest.fail("it was simulated"))
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ValueError, match="--plot needs matplotlib; install it with"):
        run(SimulateArgs(rate="1", plot=tmp_path / "x.png"))


@pytest.mark.parametrize("terminal", [False, True])
def test_no_figure_is_cut(terminal, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    policies = "apt:value=footprint:lane_share=0.25:patience_s=12.5,fcfs"
    found = run(SimulateArgs(rate="1", policies=policies, num_requests=5, duration_s=1))
    text = capsys.readouterr().out
    assert "…" not in text and all(f"{r['longest_wait_s']:.1f}" in text for r in found["runs"])
    assert policies.partition(",")[0] in text
