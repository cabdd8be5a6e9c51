"""Figures of `bench serve` from timings that are known."""

import math

import pytest

from apt_jax.request import Slo
from apt_jax.serve.bench.serving.records import Record, Run, details, summarise

SLO = Slo(ttft_s=0.5, tbt_s=0.1)


def record(planned_s, piece_s, *, output_tokens=None, error=None, prompt_tokens=10, sent_s=None):
    made = Record(planned_s, prompt_tokens, len(piece_s), started_s=planned_s, sent_s=sent_s, piece_s=list(piece_s))
    made.output_tokens = len(piece_s) if output_tokens is None else output_tokens
    made.error = error
    return made


def figures(records, duration_s=2.0, **options):
    chosen = {"slo": SLO, "goodput": {}, "metrics": ("ttft", "tpot", "itl", "e2el"), "percentiles": (50.0, 99.0)}
    return summarise(Run(records, duration_s), **(chosen | options))


def test_latencies_count_from_the_planned_arrival_and_not_from_sending():
    late = record(1.0, [3.0, 3.1], sent_s=2.9)
    assert late.ttft_s == 2.0 and late.e2el_s == pytest.approx(2.1) and late.queue_s == pytest.approx(1.9)


def test_statistics_are_those_of_the_timings():
    """TTFT 100, 300 ms; gaps 50, 50 and 100 ms; TPOT 50, 100 ms; the whole 200, 400 ms."""
    found = figures([record(0.0, [0.1, 0.15, 0.2]), record(1.0, [1.3, 1.4])])
    expected = {
        "duration": 2.0, "completed": 2, "failed": 0, "total_input_tokens": 20, "total_output_tokens": 5,
        "request_throughput": 1.0, "output_throughput": 2.5, "total_token_throughput": 12.5,
        "mean_ttft_ms": 200, "median_ttft_ms": 200, "std_ttft_ms": 100, "p50_ttft_ms": 200, "p99_ttft_ms": 298,
        "mean_tpot_ms": 75, "mean_itl_ms": 200 / 3, "median_itl_ms": 50, "mean_e2el_ms": 300, "tokens_per_piece": 1.0,
    }  # fmt: skip
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_failed_requests_count_as_missed_and_are_told_by_reason():
    done = [record(0.0, [0.1, 0.2])] * 2
    failed = [record(0.0, [], error="HTTP 503: busy"), record(0.0, [0.1], error="HTTP 503: busy")]
    found = figures([*done, *failed, record(0.0, [], error="cannot connect")])
    assert found["completed"] == 2 and found["failed"] == 3 and found["attainment"] == 0.4
    assert found["errors_by_reason"] == {"HTTP 503: busy": 2, "cannot connect": 1}
    assert found["total_output_tokens"] == 4, "what a failed request brought is not counted"


def test_attainment_takes_the_99th_percentile_of_a_request_s_own_gaps():
    """Of 100 gaps one may be long, of 99 none; the first token has its own promise."""
    long_gap = [0.1 + 0.01 * k for k in range(100)]
    tolerated = record(0.0, [*long_gap, long_gap[-1] + 1.0])  # 100 gaps
    missed = record(0.0, [*long_gap[:99], long_gap[98] + 1.0])  # 99 gaps
    assert tolerated.attains(SLO) and not missed.attains(SLO)
    late_start = record(0.0, [0.6, 0.61])
    found = figures([tolerated, missed, late_start, record(0.0, [0.5])])
    assert (found["attainment"], found["ttft_attainment"], found["tbt_attainment"]) == (0.5, 0.75, 0.75)


def test_goodput_is_what_keeps_every_limit_per_second():
    records = [record(0.0, [0.1, 0.15, 0.2]), record(0.0, [0.3, 0.35, 0.4]), record(0.0, [0.1, 0.3, 0.5])]
    for limits, good in (
        ({"ttft": 100.0}, 2),
        ({"ttft": 99.0}, 0),
        ({"tpot": 50.1}, 2),
        ({"ttft": 100.0, "tpot": 50.1}, 1),
        ({"e2el": 500.0}, 3),
    ):
        assert figures(records, goodput=limits)["request_goodput"] == good / 2.0, limits
    assert figures(records)["request_goodput"] is None


def test_a_request_of_one_token_has_no_time_per_token_and_keeps_any_limit_for_it():
    found = figures([record(0.0, [0.2])], goodput={"tpot": 1.0})
    assert found["mean_tpot_ms"] is None and found["mean_itl_ms"] is None and found["request_goodput"] == 0.5


def test_several_tokens_in_a_piece_are_counted_by_usage():
    found = figures([record(0.0, [0.1, 0.3], output_tokens=5)])
    assert found["tokens_per_piece"] == 2.5 and found["mean_itl_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx(50)


def test_concurrency_is_counted_from_sending_to_the_last_token():
    records = [record(0.0, [1.0], sent_s=0.0), record(0.0, [2.0], sent_s=1.0), record(0.0, [1.6], sent_s=1.5)]
    assert figures(records)["max_concurrent_requests"] == 2


def test_nothing_answered_gives_zeros_and_no_statistics():
    found = figures([record(0.0, [], error="cannot connect")])
    assert found["attainment"] == 0 and found["request_throughput"] == 0 and found["mean_ttft_ms"] is None
    assert not any(isinstance(value, float) and math.isnan(value) for value in found.values())


def test_details_have_one_entry_per_request():
    found = details(Run([record(0.5, [0.6, 0.8]), record(0.0, [], error="x")], 1.0))
    assert found["ttfts"] == [pytest.approx(0.1), None] and found["errors"] == [None, "x"]
    assert found["itls"] == [[pytest.approx(0.2)], []] and {len(values) for values in found.values()} == {2}


def test_a_freeze_that_the_99th_percentile_forgives_is_a_strict_miss():
    steady = [0.05 * k for k in range(1, 101)]
    frozen = record(0.0, [*steady, steady[-1] + 4.0])  # one gap of 4 s in a hundred
    assert frozen.attains(SLO) and not frozen.attains_strictly(SLO)
    found = figures([frozen, record(1.0, [1.2, 1.7]), record(0.0, [0.1, 0.15])])
    assert (found["attainment"], found["strict_attainment"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert (found["longest_gap_ms"], found["longest_wait_ms"]) == (pytest.approx(4000), pytest.approx(4000))
    late = figures([record(0.0, [9.0, 9.1])])
    assert (late["longest_gap_ms"], late["longest_wait_ms"]) == (pytest.approx(100), pytest.approx(9000))


def test_one_without_a_whole_answer_waited_until_it_ended():
    """Its first token never came, or its next one did not; the end of a whole answer is no wait."""
    never, broken, whole = record(1.0, [], error="x"), record(0.0, [0.1, 0.2], error="x"), record(0.0, [0.1])
    never.ended_s, broken.ended_s, whole.ended_s = 4.0, 2.7, 9.0
    assert figures([never, whole])["longest_wait_ms"] == pytest.approx(3000)
    assert figures([broken, whole])["longest_wait_ms"] == pytest.approx(2500)
    assert figures([whole])["longest_wait_ms"] == pytest.approx(100)


def test_tokens_of_kept_requests_count_while_requests_arrive():
    kept = record(0.0, [0.125, 0.1875, 0.25, 0.3125, 0.375])
    last = record(0.35, [0.4375, 0.5])
    found = figures([kept, last, record(0.1, [2.0, 2.1])])
    assert found["arrivals_s"] == 0.35 and found["kept_token_throughput"] == pytest.approx(4 / 0.35)
    at_once = figures([kept], duration_s=2.0)
    assert at_once["kept_token_throughput"] == pytest.approx(5 / 2.0) and at_once["backlog_by_quarter"] is None
    several = record(0.0, [0.1, 0.2, 0.3], output_tokens=9)
    several.first_tokens = 3
    assert [several.tokens_until(at_s) for at_s in (0.05, 0.1, 0.25, 1.0)] == [0.0, 3, 6.0, 9.0]


def test_classes_backlog_and_those_turned_away():
    records = [record(float(k), [k + 0.1, k + 0.15], prompt_tokens=10 * (k + 1)) for k in range(8)]
    for each in records:
        each.ended_s = each.planned_s + 1.5
    records[7].error, records[7].was_turned_away, records[7].ended_s = "HTTP 503: busy", True, 7.0
    records[6].piece_s = [7.0, 7.1]
    found = figures(records)
    by_prompt = found["attainment_by_class"]["prompt_quartile"]
    assert [(e["from_tokens"], e["to_tokens"], e["strict_attainment"]) for e in by_prompt] == [
        (10, 20, 1.0), (30, 40, 1.0), (50, 60, 1.0), (70, 80, 0.0),
    ]  # fmt: skip
    assert len(found["attainment_by_class"]["output_quartile"]) == 1, "all asked for the same"
    assert found["turned_away"] == 1 / 8 and found["sustained"] is None
    assert found["backlog_by_quarter"] == [1, 1, 2, 1]  # at 1.75, 3.5, 5.25 and 7 s
