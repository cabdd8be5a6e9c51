"""Elastic sequence parallelism: batches by hand, what an iteration costs, and that every request ends."""

import math

import numpy as np
import pytest

from apt_jax.simulation.elastic.batching import best_batches, pays_to_take
from apt_jax.simulation.elastic.costs import ElasticCosts
from apt_jax.simulation.elastic.disaggregated import Disaggregated
from apt_jax.simulation.elastic.service import ElasticService
from apt_jax.simulation.workload import Arrival
from experiments.systems.elastic import FORMS, OUTPUT, alone_s, best_rate, capacity, lengths, model, point, table

COSTS = ElasticCosts(model(1))


def test_a_long_prompt_gets_instances_and_short_ones_share_one():
    seconds = lambda part, u: 1.0 + sum(n * n for n in part) / u  # noqa: E731
    batches = best_batches([3, 100, 2], 4, seconds)
    assert sorted(places for places, _ in batches) == [(0,), (1,), (2,)] or len(batches) == 2
    given = {places: u for places, u in batches}
    assert given[(1,)] == max(given.values()) and sum(given.values()) <= 4
    flat = lambda part, u: 5.0  # noqa: E731
    assert best_batches([3, 100, 2], 1, flat) == [((2, 0, 1), 1)], "one instance computes them together"


def test_the_best_cut_is_that_of_a_search_over_all():
    drawn = np.random.default_rng(0)
    for _ in range(20):
        prompts = drawn.integers(1, 50, 4).tolist()
        table = drawn.random((5, 4)) + 0.1
        seconds = lambda part, u, table=table: float(table[len(part), u - 1] * sum(part))  # noqa: E731

        def cost(batches, prompts=prompts, seconds=seconds):
            return sum(seconds([prompts[i] for i in b], u) * sum(1 / prompts[i] for i in b) for b, u in batches)

        def every(rest, left):
            if not rest:
                yield []
            for size in range(1, len(rest) + 1):
                for u in range(1, left + 1):
                    for more in every(rest[size:], left - u):
                        yield [(rest[:size], u), *more]

        order = tuple(sorted(range(4), key=lambda i: prompts[i]))
        assert cost(best_batches(prompts, 3, seconds)) == pytest.approx(min(map(cost, every(order, 3))))


def test_what_does_not_fit_is_not_cut():
    assert best_batches([10, 10], 2, lambda part, u: 1.0, lambda part, u: sum(part) <= 5 * u) == []
    assert best_batches([10], 2, lambda part, u: 1.0, lambda part, u: sum(part) <= 5 * u) == [((0,), 2)]


def test_a_decode_gives_its_instance_only_for_more_than_it_loses():
    assert pays_to_take(10.0, 5.0, [10], running=1, mean_output=100)  # 5 / 10 against 5 / 100
    assert not pays_to_take(10.0, 5.0, [1000], running=1, mean_output=100)
    assert not pays_to_take(10.0, 5.0, [10], running=20, mean_output=100)


def test_prefill_scales_with_instances_and_decode_hardly():
    one, eight = (COSTS.prefill_s([100_000], u) for u in (1, 8))
    assert 7 < one / eight < 8.1
    assert COSTS.prefill_s([100], 8) > COSTS.prefill_s([100], 1) / 2, "reading the weights is not shared"
    slow = ElasticCosts(model(1, 1.0))
    ring_s = 2000 * slow.token_bytes * 7 / 8 / 1e9
    assert slow.prefill_s([2000], 8) > ring_s > COSTS.prefill_s([2000], 8), "the ring does not hide behind so little"
    short, long = ([1000], [500, 500]), ([400_000], [200_000, 200_000])
    assert COSTS.decode_s(*short[:1], 1, 1) < COSTS.decode_s(short[1], 1, 1), "two exchanges a layer"
    assert COSTS.decode_s(*long[:1], 1, 1) > COSTS.decode_s(long[1], 1, 1), "each reads half"
    assert COSTS.decode_s([1000, 1000], 64, 2) < COSTS.decode_s([1000, 1000], 600, 1), "masters share the requests"


def served(service, *arrivals):
    found = service.run([Arrival(at, prompt, output) for at, prompt, output in arrivals])
    for request in found:
        assert request.generated == request.arrival.output_tokens and not request.tokens_on
        assert request.arrival.arrival_s < request.first_s <= request.ended_s
    return found


def test_a_prefill_spreads_over_idle_instances_and_its_decode_stays_on_the_fewest():
    service = ElasticService(COSTS, 4, 100_000)
    served(service, (0.0, 50_000, 20))
    assert service.degrees == [4] and service.most_decode_instances == 1 and service._free == [100_000] * 4
    wide = ElasticService(COSTS, 4, 30_000)
    served(wide, (0.0, 50_000, 20))
    assert wide.most_decode_instances == 2, "as many as hold it"


def test_what_fits_on_no_instance_is_served_by_several_only_where_it_spreads():
    with pytest.raises(ValueError, match="a request of 50020 tokens does not fit in 30000"):
        ElasticService(COSTS, 4, 30_000, elastic=False).run([Arrival(0.0, 50_000, 20)])
    with pytest.raises(ValueError, match="does not fit in 40000"):
        ElasticService(COSTS, 4, 10_000).run([Arrival(0.0, 50_000, 20)])


def test_a_decode_that_outgrows_its_instance_goes_on_on_another():
    service = ElasticService(COSTS, 2, 1000)
    service._dispatch = lambda instances: service._pending[:16]  # as if answers had been taken to be short
    served(service, (0.0, 900, 300))
    assert service.num_scaled_up > 0 and service.most_decode_instances == 2


def test_many_requests_end_whatever_the_load():
    drawn = np.random.default_rng(3)
    arrivals = [(0.02 * i, int(drawn.integers(10, 20_000)), int(drawn.integers(1, 60))) for i in range(60)]
    for options in ({}, {"elastic": False}):
        service = ElasticService(COSTS, 4, 25_000, **options)
        served(service, *arrivals)
        assert service._free == [25_000] * 4 and (max(service.degrees) > 1) is (not options)


def test_the_halves_hand_over_by_the_link():
    half = model(4)
    quick, slow = (
        Disaggregated(half, model(4, link), 100_000).run([Arrival(0.0, 10_000, 5)])[0] for link in (300.0, 300.0)
    )
    assert quick.ended_s == slow.ended_s
    far = Disaggregated(model(4, 1.0), half, 100_000).run([Arrival(0.0, 10_000, 5)])[0]
    sent_s = 10_000 * COSTS.token_bytes / 4e9
    assert far.ended_s - far.first_s > sent_s > quick.ended_s - quick.first_s
    with pytest.raises(ValueError, match="does not fit in 100"):
        Disaggregated(half, half, 100).run([Arrival(0.0, 200, 5)])


def test_the_study_finds_rates_and_says_what_does_not_fit(monkeypatch):
    assert capacity(8) > 8 * capacity(1), "the weights are there once"
    assert math.isclose(lengths(2048).prompt_tokens.max(), 2048 - OUTPUT)
    assert point("eight instances, chunks", 4 * capacity(1), 300.0, 1.0) is None
    rows = [
        {"form": form, "longest": 2048, "link": 300.0, "rate": 0.0 if form != "loongserve" else 2.0} for form in FORMS
    ]
    assert "| loongserve | 2 |" in table(rows) and "does not fit" in table(rows)

    def made(form, longest, link, rate):
        return {"rate": rate, "attainment": 1.0 if rate <= 3.0 else 0.5} if form != "large" else None

    monkeypatch.setattr("experiments.systems.elastic.point", made)
    for start in (1.0, 50.0):
        rate, row = best_rate("loongserve", 2048, 300.0, start)
        assert 3.0 / 1.25 < rate <= 3.0 and row["rate"] == rate
    assert best_rate("large", 2048, 300.0, 1.0) == (0.0, None)


def test_a_point_has_the_latencies_of_its_requests(monkeypatch):
    monkeypatch.setattr("experiments.systems.elastic.REQUESTS", 40)
    quick, slow = (point("loongserve", 131072, 300.0, rate) for rate in (0.05, 50.0))
    assert quick["attainment"] == 1.0 > slow["attainment"] and quick["p99_ttft_s"] < slow["p99_ttft_s"]
    assert quick["mean_token_latency_s"] * OUTPUT < 5 * alone_s(131072, OUTPUT)
