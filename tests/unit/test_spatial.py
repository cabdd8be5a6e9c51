"""Prompts and decodes on shares of a chip: what a share costs, and the two streams."""

from dataclasses import replace

import numpy as np
import pytest

from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.policies.papers.semi_pd import SemiPdOptions
from apt_jax.simulation.spatial.costs import ShareCosts
from apt_jax.simulation.spatial.service import SpatialService
from apt_jax.simulation.workload import Arrival
from experiments.systems.spatial import FORMS, PLACES, run, table

COSTS = ShareCosts(CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"], "one-pass"))
SLO = Slo(1.0, 1.0)


def test_prompts_pay_for_their_share_and_decodes_only_below_half():
    whole, half, tenth = (COSTS.prefill_s(2000, 2e6, 1, share) for share in (1.0, 0.5, 0.1))
    overhead_s = COSTS.model.overhead_s
    assert (half - overhead_s) == pytest.approx(2 * (whole - overhead_s))
    assert (tenth - overhead_s) == pytest.approx(10 * (whole - overhead_s))
    assert COSTS.decode_s(8, 4000, 0.5, 0.0) == COSTS.decode_s(8, 4000, 1.0, 0.0), "memory is what they wait for"
    assert COSTS.decode_s(8, 4000, 0.25, 0.0) > 1.7 * COSTS.decode_s(8, 4000, 0.5, 0.0)
    beside = COSTS.decode_s(8, 4000, 0.5, 0.1)
    assert COSTS.decode_s(8, 4000, 0.5, 0.0) < beside < COSTS.decode_s(8, 4000, 0.5, 1e-3) <= 2 * beside


def served(pages=200, arrivals=(), **options):
    service = SpatialService(COSTS, pages, **options)
    found = service.run([Arrival(at, prompt, output) for at, prompt, output in arrivals], SLO)
    for request in found:
        assert len(request.times_s) == request.arrival.output_tokens and request.times_s == sorted(request.times_s)
    assert service._free == pages and not service._running
    return service, found


def test_a_prompt_does_not_make_decodes_wait():
    _, (first, second) = served(arrivals=[(0.0, 100, 60), (0.5, 1900, 5)])
    gaps = np.diff(first.times_s)
    assert gaps.max() < 0.06 < second.times_s[0] - 0.5, "the prompt took 0.3 s and more on its half"


def test_prompts_are_computed_whole_and_wait_for_room():
    service, (first, second, third) = served(pages=20, arrivals=[(0.0, 200, 40), (0.0, 200, 3), (0.1, 60, 3)])
    assert first.times_s[-1] < second.times_s[0], "13 pages each, of 20"
    assert second.full_s > 0.9 > first.full_s and second.times_s[0] <= third.times_s[0]
    assert service.num_preemptions == 0


def test_the_newest_gives_its_pages_and_is_computed_again():
    service, (first, second) = served(pages=16, arrivals=[(0.0, 110, 60), (0.0, 110, 60)])
    assert service.num_preemptions >= 1 and second.num_preemptions >= 1 and first.num_preemptions == 0
    assert first.times_s[-1] < second.times_s[-1]


def test_the_loop_raises_the_share_where_processors_are_short_and_is_misled_by_memory():
    busy = [(0.25 * i, 1500, 4) for i in range(200)]  # 4 prompts/s of 0.2 s each
    adapting, _ = served(pages=2000, arrivals=busy)
    fixed, _ = served(pages=2000, arrivals=busy, adapts=False)
    assert adapting.shares.share > fixed.shares.share == 0.5
    full = [(0.35 * i, 100, 150) for i in range(150)]  # few tokens, but no room
    misled, _ = served(pages=80, arrivals=full)
    sober, _ = served(pages=80, arrivals=full, counts_memory=False)
    assert misled.shares.share > 0.9 and sober.shares.share == 0.5
    assert served(pages=80, arrivals=full, options=SemiPdOptions(share=0.3), adapts=False)[0].shares.share == 0.3


def test_the_study_has_the_figures_of_the_others():
    place, experiment, rate = PLACES[0]
    rows = [run(place, replace(experiment, duration_s=20.0, num_requests=20), rate, *form) for form in FORMS]
    assert all(row["strict_attainment"] == 1.0 and row["frozen"] == 0.0 for row in rows)
    assert "| ShareGPT | 1.5 | semi-pd, in space | 100.0% | 100.0% |" in table(rows)
