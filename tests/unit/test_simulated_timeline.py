"""Three requests through the simulator, second by second, and the report over them; search and arrivals by hand."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from apt_jax.engine_config import EngineConfig
from apt_jax.request import FinishReason, Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.plan import Abandoned, Plan, Reason
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.policies.fcfs import Fcfs
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits
from apt_jax.simulation import experiment
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.instance import Sample
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.report import summarise
from apt_jax.simulation.search import effective_throughput, interpolated_throughput
from apt_jax.simulation.simulator import Standing, simulate
from apt_jax.simulation.throughput.questions import Question, are_decided
from apt_jax.simulation.workload import (
    Arrival,
    Lengths,
    gamma_times,
    load_lengths,
    make_arrivals,
    recorded_times,
    shuffled_rows,
)
from tests.support.scheduling_loop import request

ARRIVALS = [Arrival(1.0, 4, 3), Arrival(1.5, 4, 2), Arrival(2.0, 4, 1)]
# a prefills 1..2, b 2..3, c 3..4 and ends; a and b decode 4..4.25, where b ends; a decodes 4.25..4.5 and ends


class Costs(CostModel):
    """A second for an iteration with a prompt, a quarter for one that only decodes, nothing for an empty one."""

    def step_s(self, load):
        return 1.0 if load.prefill_tokens else 0.25 * bool(load.decode_requests)


SECONDS = Costs(MODELS["opt-125m"], HARDWARE["h200"])


def timeline(mode="kv", slo=None, **options):
    return simulate(
        ARRIVALS, make_policy("fcfs"), cost_model=SECONDS, num_blocks=20, limits=Limits(8, 4, mode), block_size=4,
        slo=slo, max_model_len=32, **options,
    )  # fmt: skip


class GivesUp(Fcfs):
    """First come, first served; gives up what has waited `after_s` for its next token."""

    def __init__(self, after_s):
        super().__init__(PolicyContext())
        self.after_s, self.ended = after_s, []

    def schedule(self, state, now):
        late = [r for r in (*state.waiting, *state.running) if r.pending_s(now) >= self.after_s]
        for each in late:
            return Plan(abandoned=(Abandoned(each, Reason.ABANDONED_LATE),))
        return super().schedule(state, now)

    def finished(self, request, now):
        self.ended.append((request.request_id, now))


def test_abandoned_requests_end_at_once_and_count_as_missed():
    policy = GivesUp(1.0)
    outcome = simulate(
        ARRIVALS, policy, cost_model=SECONDS, num_blocks=20, limits=Limits(8, 4, "kv"), block_size=4,
        slo=Slo(3.0, 3.0), max_model_len=32,
    )  # fmt: skip
    assert policy.ended == [
        ("r2", 3.0),
        ("r0", 3.0),
        ("r1", 3.25),
    ]  # at 3.0 c has waited, and a has its token since 2.0
    a, b, c = outcome.requests
    assert [r.finish_reason for r in (a, b, c)] == [FinishReason.ABANDONED, FinishReason.STOP, FinishReason.ABANDONED]
    assert (a.ttft_s, a.gaps_s, c.ttft_s, c.first_scheduled_s) == (1.0, [], None, None)
    report = summarise(outcome, policy="own", cache_mode="kv", hidden_attention="", rate=1.0, num_blocks=20)
    assert report.attainment == 1 / 3 and outcome.makespan_s == 3.25
    assert (report.ttft_attainment, report.tbt_attainment) == (1 / 3, 1 / 3), "b alone: what is ended keeps nothing"
    assert (report.p99_ttft_s, report.p99_queue_s) == (1.5, 0.5)


def test_the_timeline_of_three_requests():
    planned = []
    outcome = timeline(on_plan=lambda plan, now: planned.append((now, [s.request.request_id for s in plan.scheduled])))
    assert planned == [(1.0, ["r0"]), (2.0, ["r1"]), (3.0, ["r2"]), (4.0, ["r0", "r1"]), (4.25, ["r0"])]
    a, b, c = outcome.requests
    assert [(r.ttft_s, r.gaps_s) for r in (a, b, c)] == [(1.0, [2.25, 0.25]), (1.5, [1.25]), (2.0, [])]
    assert [r.first_scheduled_s for r in (a, b, c)] == [1.0, 2.0, 3.0]
    assert [len(r.output_token_ids) for r in (a, b, c)] == [3, 2, 1]
    assert {r.finish_reason for r in (a, b, c)} == {FinishReason.STOP} and a.slo == Slo() and a.max_new_tokens == 28
    assert (outcome.makespan_s, outcome.backlog, outcome.instance_s, outcome.by_instance) == (4.5, 3, 4.5, [3])
    assert outcome.samples == [
        # seconds, requests of the iteration, running and waiting after it, blocks
        Sample(1.0, 2.0, 1, 1, 2, (2, 0)),
        Sample(2.0, 3.0, 1, 2, 1, (4, 0)),
        Sample(3.0, 4.0, 1, 2, 0, (4, 0)),
        Sample(4.0, 4.25, 2, 1, 0, (4, 0)),
        Sample(4.25, 4.5, 1, 0, 0, (0, 0)),
    ]


def quartile(first, last, count, share):
    shares = {"strict_attainment": share, "attainment": share}
    return {"from_tokens": first, "to_tokens": last, "requests": count, **shares}


@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_the_report_over_them(mode):
    slo = Slo(1.5, 1.25)
    report = summarise(
        timeline(mode, slo), policy="fcfs", cache_mode=mode, hidden_attention="absorbed", rate=2.0, num_blocks=20
    )
    blocks = (2 * 1 + 4 * 1 + 4 * 1 + 4 * 0.25) / 3.5 / 20  # blocks x seconds of the 3.5 that are busy
    held = {"kv": blocks, "hidden": 0.0} if mode == "kv" else {"kv": 0.0, "hidden": blocks / 2}
    found = report.as_dict()
    assert found.pop("cache_mix") == pytest.approx({**held, "free": 1 - sum(held.values())}, rel=1e-5)
    assert found == {
        "policy": "fcfs", "cache_mode": mode, "hidden_attention": "absorbed", "rate": 2.0, "num_requests": 3,
        "seed": 0, "strict_attainment": 0.333333, "worst_class": 0.0, "attainment_by_class": {
            "slo_class": [{"name": "default", "requests": 3, "strict_attainment": 0.333333, "attainment": 0.333333}],
            "prompt_quartile": [quartile(4, 4, 3, 0.333333)],
            "output_quartile": [quartile(1, 1, 1, 0.0), quartile(2, 2, 1, 1.0), quartile(3, 3, 1, 0.0)],
        },
        "attainment_by_phase": [],
        "turned_away": 0.0, "frozen": 0.333333, "kept_token_throughput": 0.0,  # b's tokens come after the last arrival
        "sustained": None, "backlog_by_quarter": [0, 1, 2, 3],
        # ten parts of 1..2 s, half of them with one request and half with two, at 1.5 requests/s
        "backlog_growth": round(1.25 / 0.825 / 1.5, 5), "fluid_bound": 0.0, "drain_s": 2.5, "longest_gap_s": 2.25,
        "attainment": 0.333333,  # b alone: a has a gap of 2.25 s, c waits 2 s
        "ttft_attainment": 0.666667, "tbt_attainment": 0.666667,
        "p50_ttft_s": 1.5, "p99_ttft_s": 2.0, "p50_tbt_s": 1.25, "p99_tbt_s": 2.25, "p50_queue_s": 0.5,
        "p99_queue_s": 1.0, "preemptions": 0, "conversions": 0, "moved_bytes": 0.0,
        "mean_token_latency_s": round((3.5 / 3 + 2.75 / 2 + 2.0) / 3, 5),
        "mean_batch": round((1 + 1 + 1 + 2 * 0.25 + 0.25) / 3.5, 5),
        "arrivals_s": 2.0, "makespan_s": 4.5, "iterations": 5, "backlog": 3, "longest_wait_s": 2.25, "instances": 1,
        "router": "", "report_interval_s": 0.0, "mean_instances": 1.0, "cached_share": 0.0,
    }  # fmt: skip


def test_a_first_token_may_be_the_longest_wait_and_preemptions_are_summed():
    outcome = timeline()
    outcome.requests[2].arrival_s = 0.5
    for count, done in enumerate(outcome.requests):
        done.num_preemptions, done.num_conversions = count, 2 * count
    report = summarise(outcome, policy="", cache_mode="kv", hidden_attention="", rate=1.0, num_blocks=20, instances=2)
    assert (report.longest_wait_s, report.preemptions, report.conversions, report.instances) == (3.5, 3, 6, 2)


def test_percentiles_are_the_value_above_that_share_of_each_figure():
    outcome = timeline()
    outcome.requests = [request(arrival_s=8.0) for _ in range(200)]
    for k, done in enumerate(outcome.requests):
        done.first_scheduled_s, done.first_token_s, done.gaps_s = 8.0 + k / 16, 8.0 + k / 8, [k / 4]
        done.ended_s, done.class_name, done.target_tokens = None, "any", 1
    report = summarise(outcome, policy="", cache_mode="kv", hidden_attention="", rate=1.0, num_blocks=20)
    assert (report.p50_queue_s, report.p50_ttft_s, report.p50_tbt_s) == (100 / 16, 100 / 8, 100 / 4)
    assert (report.p99_queue_s, report.p99_ttft_s, report.p99_tbt_s) == (198 / 16, 198 / 8, 198 / 4)


def test_nobody_decodes_so_nobody_has_a_gap():
    outcome = simulate(
        [Arrival(0.0, 4, 1)], make_policy("fcfs"), cost_model=SECONDS, num_blocks=20, limits=Limits(8, 4, "kv")
    )
    report = summarise(outcome, policy="", cache_mode="kv", hidden_attention="", rate=1.0, num_blocks=20)
    assert (report.p50_tbt_s, report.p99_tbt_s, report.tbt_attainment, report.longest_wait_s) == (0.0, 0.0, 1.0, 1.0)


def test_a_search_is_told_how_many_missed_and_are_left_and_may_end_it():
    told = []
    timeline(slo=Slo(1.5, 1.25), is_decided=lambda s: bool(told.append((s.missed, s.unfinished))))
    assert told == [(0, 3), (0, 3), (1, 2), (1, 1), (2, 0)]
    outcome = timeline(slo=Slo(1.5, 1.25), is_decided=lambda standing: standing.missed == 1)
    assert outcome.makespan_s == 4.0
    assert [r.finish_reason for r in outcome.requests] == [None, None, FinishReason.STOP]


def test_progress_is_told_by_fifties():
    told = []
    simulate(
        [Arrival(0.0, 1, 1)] * 120, make_policy("fcfs"), cost_model=SECONDS, num_blocks=20,
        limits=Limits(8, 4, "kv"), on_progress=told.append,
    )  # fmt: skip
    assert told == [50, 100]


def test_requests_that_arrive_together_are_planned_together_and_idle_time_passes():
    arrivals = [Arrival(1.0, 1, 1), Arrival(1.0, 1, 1), Arrival(9.0, 1, 1)]
    outcome = simulate(arrivals, make_policy("fcfs"), cost_model=SECONDS, num_blocks=20, limits=Limits(8, 4, "kv"))
    assert [(s.start_s, s.end_s, s.scheduled) for s in outcome.samples] == [(1.0, 2.0, 2), (9.0, 10.0, 1)]
    assert outcome.backlog == 1 and outcome.makespan_s == 10.0


def asked_by(limit, **options):
    asked = []

    def reaches(rate, target):
        asked.append(rate)
        return rate <= limit

    return asked, effective_throughput(reaches, [0.9], **options)[0.9]


def test_the_search_raises_the_rate_until_it_fails_and_bisects():
    asked, found = asked_by(5.0)
    assert asked[:5] == pytest.approx([1.0, 1.6, 2.56, 4.096, 6.5536])
    assert asked[5] == pytest.approx(math.sqrt(4.096 * 6.5536)) and asked[6] == pytest.approx(
        math.sqrt(4.096 * asked[5])
    )
    assert found <= 5.0 < 1.03 * found and len(asked) == 5 + 4
    asked, found = asked_by(5.0, start=4.0, tolerance=0.5)
    assert asked == pytest.approx([4.0, 6.4, math.sqrt(4 * 6.4)]) and found == 4.0


def test_the_search_halves_the_rate_until_it_succeeds_or_gives_up():
    asked, found = asked_by(0.3)
    assert asked[:4] == pytest.approx([1.0, 0.5, 0.25, math.sqrt(0.125)]) and found <= 0.3 < 1.03 * found
    assert asked_by(0.0) == ([2.0**-k for k in range(7)], 0.0)
    assert asked_by(0.0, lowest=0.3) == ([1.0, 0.5, 0.25], 0.0)
    assert asked_by(1 / 64)[1] == 1 / 64


def test_the_search_ends_where_nothing_is_too_much():
    asked, found = asked_by(math.inf)
    assert found == asked[-1] == pytest.approx(1.6**17)  # the next would be more than 4,096


def test_the_search_begins_for_a_lower_target_above_the_rate_of_the_higher():
    asked = []

    def reaches(rate, target):
        asked.append((target, rate))
        return rate <= (2.0 if target > 0.8 else 8.0)

    found = effective_throughput(reaches, [0.7, 0.9, 0.7])
    assert [target for target, _ in asked] == sorted((target for target, _ in asked), reverse=True)
    assert next(rate for target, rate in asked if target == 0.7) == pytest.approx(1.25 * found[0.9])
    assert list(found) == [0.9, 0.7]


@pytest.mark.parametrize(
    ("points", "rate"),
    [
        ([], 0.0), ([(1, 0.875)], 0.0), ([(1, 0.9)], 1.0), ([(1, 1.0), (3, 0.8)], 2.0),
        ([(1, 1.0), (2, 0.9), (4, 0.5)], 2.0), ([(2, 1.0), (4, 0.95), (8, 0.75)], 5.0),
    ],
)  # fmt: skip
def test_the_rate_between_measured_ones(points, rate):
    assert interpolated_throughput(points, 0.9) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("missed", "unfinished", "target", "kept", "decided"),
    [
        (1, 0, 0.9, True, True), (2, 8, 0.9, False, True), (1, 9, 1.0, False, True), (0, 1, 1.0, True, False),
        (0, 1, 0.9, True, True),  # one is left, and one may miss
        (0, 2, 0.9, True, False), (3, 1, 0.7, True, False), (4, 6, 0.7, False, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reading", ["strict", "paper"])
def test_a_question_is_decided_as_soon_as_no_request_can_change_it(reading, missed, unfinished, target, kept, decided):
    both = (missed, 0) if reading == "strict" else (10, missed)  # whoever misses in the paper's reading, misses
    standing, question = Standing(*both, unfinished, 0, 10), Question(reading, target)
    assert question.is_kept(standing) is kept and question.is_decided(standing) is decided
    assert are_decided((question,), standing) is decided


def test_a_simulation_ends_early_where_all_is_lost_or_all_have_arrived_and_nothing_can_change():
    strict, paper = Question("strict", 0.9), Question("paper", 0.9)
    assert are_decided((strict, paper), Standing(2, 2, 8, 5, 10))
    assert not are_decided((strict, paper), Standing(2, 1, 1, 1, 10)), "whether the rate lasts is not known yet"
    assert are_decided((strict, paper), Standing(2, 1, 0, 0, 10))
    assert not are_decided((strict, paper), Standing(2, 1, 1, 0, 10))


def test_each_instance_of_an_experiment_has_its_own_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(experiment, "make_policy", lambda name, context: seeds.append(context.seed))
    Experiment(num_blocks=450, instances=3, seed=7, workload="azure").fleet("fcfs", "kv", "absorbed")
    assert seeds == [7, 8, 9]


def test_an_experiment_gives_a_hundredth_of_the_pool_as_watermark_to_each_instance():
    found = Experiment(num_blocks=450, instances=2, seed=7, workload="azure")
    fleet = found.fleet("fcfs", "kv", "absorbed")
    assert [instance.state.limits.watermark_blocks for instance in fleet.instances] == [4, 4]
    assert [instance.state.pool.num_blocks for instance in fleet.instances] == [450, 450] and found.is_routed
    assert not Experiment().is_routed and Experiment(max_instances=2).is_routed
    arrivals, rate = replace(found, num_requests=1, duration_s=1.0).arrivals(None)
    assert rate == found.lengths.recorded_rate and arrivals[0].arrival_s == 0.0


def test_an_experiment_s_defaults_are_those_of_the_command():
    defaults = {field.name: field.default for field in fields(Experiment)}
    flags = {field.name: field.default for field in fields(SimulateArgs) if field.name in defaults}
    assert flags.pop("duration_s") is None, "it depends on what is asked for"
    assert flags.pop("seed") is None and defaults["seed"] == 0, "so that --seeds beside --seed is noticed"
    assert {name: defaults[name] for name in flags} == flags and {*flags, "duration_s", "seed"} == set(defaults)
    assert defaults["max_num_queued_reqs"] == EngineConfig().max_num_queued_reqs
    assert Experiment().set_up_for("apt").device_memory_utilization == EngineConfig().device_memory_utilization
    assert (defaults["ttft_slo_ms"], defaults["tbt_slo_ms"]) == (1000.0, 1000.0)


TABLE = Lengths("t", np.array([1, 2, 3]), np.array([4, 5, 6]), np.array([0.0, 1.0, 3.0]))


def test_recorded_times_are_stretched_and_repeated():
    assert TABLE.recorded_rate == 1.0  # three requests in three seconds
    assert recorded_times(TABLE, 7, rate=2.0).tolist() == [0.0, 0.5, 1.5, 1.5, 2.0, 3.0, 3.0]
    arrivals = make_arrivals(TABLE, rate=1.0, num_requests=4, cv=None, seed=0, duration_s=0.0)
    assert arrivals == [Arrival(0.0, 1, 4), Arrival(1.0, 2, 5), Arrival(3.0, 3, 6), Arrival(3.0, 1, 4)]
    with pytest.raises(ValueError, match="has no recorded arrivals; give --rate"):
        recorded_times(replace(TABLE, arrival_s=None), 1, rate=1.0)


def test_gaps_of_no_variation_are_regular_and_an_infinite_rate_is_all_at_once():
    assert gamma_times(4, rate=2.0, cv=0.0, seed=3).tolist() == [0.5, 1.0, 1.5, 2.0]
    assert gamma_times(3, rate=math.inf, cv=1.0, seed=3).tolist() == [0.0] * 3
    times = gamma_times(50_000, rate=4.0, cv=0.5, seed=1)
    gaps = np.diff(times)
    assert times[-1] / 50_000 == pytest.approx(0.25, rel=0.02) and gaps.std() == pytest.approx(0.125, rel=0.02)
    assert (gamma_times(5, rate=1.0, cv=1.0, seed=1) != gamma_times(5, rate=1.0, cv=1.0, seed=2)).all()


def test_rows_are_drawn_in_shuffled_passes():
    rows = shuffled_rows(50, 120, seed=1)
    assert len(rows) == 120 and sorted(rows[:50]) == sorted(rows[50:100]) == list(range(50))
    assert len(set(rows[100:])) == 20 and rows[:50].tolist() != rows[50:100].tolist() != sorted(rows[50:100])
    assert shuffled_rows(50, 50, seed=2).tolist() != rows[:50].tolist()


@pytest.mark.parametrize(
    ("rate", "num_requests", "duration_s", "count"), [(2.0, 5, 10.0, 20), (2.0, 30, 10.0, 30), (0.3, 1, 5.0, 2)]
)
def test_as_many_requests_as_asked_for_or_as_the_duration_takes(rate, num_requests, duration_s, count):
    options = {"rate": rate, "num_requests": num_requests, "duration_s": duration_s}
    assert len(make_arrivals(TABLE, cv=1.0, seed=0, **options)) == count


@pytest.mark.parametrize("change", [{"rate": 0.0}, {"num_requests": 0}, {"cv": 0.0}, {"cv": -1.0}, {"rate": math.inf}])
def test_numbers_that_make_no_arrivals_are_refused(change):
    with pytest.raises(ValueError, match="must all be greater than 0"):
        make_arrivals(TABLE, **{"rate": 1.0, "num_requests": 1, "cv": 1.0, "seed": 0, **change})


@pytest.mark.parametrize("change", [{"num_requests": 10_000_001}, {"rate": 1001.0, "duration_s": 10_000.0}])
def test_more_than_ten_million_requests_are_refused(change):
    with pytest.raises(ValueError, match="more than 10,000,000 requests"):
        make_arrivals(TABLE, **{"rate": 1.0, "num_requests": 1, "cv": 1.0, "seed": 0, **change})


def test_recorded_arrivals_begin_with_the_first(tmp_path):
    (tmp_path / "w.csv").write_text("arrival_s,prompt_tokens,output_tokens\n7,1,1\n5,2,1\n8.5,3,1\n")
    lengths = load_lengths(str(tmp_path / "w.csv"))
    assert lengths.prompt_tokens.tolist() == [2, 1, 3]
    assert lengths.arrival_s is not None and lengths.arrival_s.tolist() == [0.0, 2.0, 3.5]


def test_rows_that_do_not_fit_are_left_out(tmp_path):
    (tmp_path / "w.csv").write_text("prompt_tokens,output_tokens\n5,5\n5,6\n1,1\n")
    (tmp_path / "v.csv").write_text("prompt_tokens,output_tokens\n7,1\n")
    lengths = load_lengths(str(tmp_path / "w.csv"), max_model_len=10)
    assert lengths.prompt_tokens.tolist() == [5, 1] and lengths.output_tokens.tolist() == [5, 1]
    mixed = load_lengths(f"{tmp_path / 'w.csv'}+{tmp_path / 'v.csv'}", max_model_len=10)
    assert mixed.prompt_tokens.tolist() == [5, 7, 1, 7] and mixed.output_tokens.tolist() == [5, 1, 1, 1]
    assert mixed.name == f"{tmp_path / 'w.csv'}+{tmp_path / 'v.csv'}"


@pytest.mark.parametrize("row", ["0,5", "5,0", "-1,5", "nan,5", "1.5,5", "5,inf", "5,1000000001", "5,"])
def test_a_row_without_whole_numbers_of_tokens_is_refused_with_its_line(tmp_path, row):
    (tmp_path / "w.csv").write_text(f"prompt_tokens,output_tokens\n1,1000000000\n{row}\n")
    with pytest.raises(ValueError, match=r"w\.csv, line 3: (prompt|output)_tokens="):
        load_lengths(str(tmp_path / "w.csv"), max_model_len=10)


@pytest.mark.parametrize("arrival_s", ["-1", "nan", "inf", "soon"])
def test_an_arrival_that_is_no_time_is_refused_with_its_line(tmp_path, arrival_s):
    (tmp_path / "w.csv").write_text(f"arrival_s,prompt_tokens,output_tokens\n0,1,1\n{arrival_s},1,1\n")
    with pytest.raises(ValueError, match=r"w\.csv, line 3: arrival_s="):
        load_lengths(str(tmp_path / "w.csv"))
