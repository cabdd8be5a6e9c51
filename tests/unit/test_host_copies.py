"""Host memory in the cost model and the simulator: what copies cost, and what they save."""

from dataclasses import replace

import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import Request, SamplingParams
from apt_jax.scheduling.costs.cost_model import CostModel, block_bytes
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.host_copies import CopyForm, worth_restoring
from apt_jax.scheduling.host_tier import HostTier
from apt_jax.scheduling.policies.fcfs import Fcfs
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.instance import Instance, Sample
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.requests.columns import SimulatedRequest
from apt_jax.simulation.simulator import Outcome
from experiments.systems.switching import stall_share

A100 = CostModel(MODELS["opt-13b"], HARDWARE["a100-40gb"])


def test_bytes_of_a_block():
    assert block_bytes(A100, 16) == 40 * 5120 * 2 * 16


def test_a_page_is_copied_back_where_that_is_quicker_than_its_products():
    """16 tokens of OPT-13B take 0.41 TFLOP, 2.2 ms at 60% of 312 TFLOP/s, and some attention; KV is two blocks."""
    assert worth_restoring(A100, 16, 1.0e-3) == [True, True]
    assert worth_restoring(A100, 16, 1.5e-3) == [False, True]
    assert worth_restoring(A100, 16, 2.5e-3) == [False, False]


class Costs(CostModel):
    """A second for each iteration."""

    def step_s(self, load):
        return 1.0


def test_saving_runs_beside_the_step_and_restoring_before_it():
    hardware = replace(HARDWARE["a100-40gb"], host_bytes_per_s=block_bytes(A100, 16) / 0.4)  # 0.4 s for a block
    model = Costs(MODELS["opt-13b"], hardware)
    limits = Limits(8, 512, "hidden")
    instance = Instance(Fcfs(PolicyContext()), model, num_blocks=8, limits=limits, prefix_caching=True, host_slots=99)
    instance.state.pool.host.restores[:] = [True, True]
    found, now = [], 0.0
    for number, begins in enumerate((0, 1000, 0)):
        asked = SimulatedRequest(
            request_id=str(number), prompt_token_ids=range(begins, begins + 100), params=SamplingParams(),
            arrival_s=now, max_new_tokens=9,
        )  # fmt: skip
        instance.add(asked, 1)
        ends_s = instance.begin(now)
        assert instance.end() == [asked]
        found.append(ends_s - now)
        now = ends_s
    # the second takes seven of eight blocks, so that five pages are saved; the third finds six, of them five there,
    # for which five of the second's are saved
    assert found == pytest.approx([1.0, max(1.0, 5 * 0.4), max(1.0 + 5 * 0.4, 5 * 0.4)])
    assert instance.moved_bytes == 15 * block_bytes(A100, 16)


@pytest.mark.parametrize(("mode", "num_blocks"), [("kv", 900), ("hidden", 450)])
def test_conversations_find_more_with_host_memory(mode, num_blocks):
    experiment = Experiment(
        workload="conversations", num_requests=80, duration_s=1.0, num_blocks=num_blocks, enable_prefix_caching=True
    )
    roomy = replace(experiment, host_cache_bytes=2 * 10**11)
    short, more = (each.run("fcfs", mode, "one-pass", 3.0)[1] for each in (experiment, roomy))
    assert more.cached_share > short.cached_share + 0.05
    assert more.p50_ttft_s < short.p50_ttft_s and more.moved_bytes > 0 == short.moved_bytes


def test_options_that_make_no_sense():
    with pytest.raises(ValueError, match="which is off; use --enable-prefix-caching too"):
        SimulateArgs(host_cache_bytes=1, enable_prefix_caching=False)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (CopyForm(), 5.0),  # in before the step, out beside both
        (CopyForm(restores_beside=True), 4.0),
        (CopyForm(saves_beside=False), 9.0),
        (CopyForm(saves_beside=False, restores_beside=True), 5.0),
    ],
)
def test_copies_run_before_the_step_or_beside_it(form, expected):
    assert form.seconds(1.0, saves_s=4.0, restores_s=4.0) == expected


def test_what_is_fetched_runs_beside_the_step_on_the_same_link_as_copies_before_it():
    assert CopyForm().seconds(1.0, 0.0, 0.5, fetches_s=0.9) == 1.5
    assert CopyForm().seconds(1.0, 0.0, 0.5, fetches_s=3.0) == 3.5


def switching(copies, policy="fastswitch:update_every=5:fetch=off"):
    """Two classes of requests in a pool for a few of them, under `fastswitch`."""
    experiment = Experiment(num_requests=60, duration_s=1.0, num_blocks=700, host_cache_bytes=2 * 10**11)
    return experiment.run(policy, "kv", "one-pass", 4.0, copies=copies)


@pytest.fixture(scope="module")
def as_the_engine():
    return switching(CopyForm())


def test_small_copies_stall_longer_and_copies_beside_the_step_less(as_the_engine):
    def stalls_s(found):
        return sum(sample.copied_s for sample in found[0].samples_by_instance[0])

    usual = stalls_s(as_the_engine)
    assert stalls_s(switching(CopyForm(), "fastswitch:update_every=5")) < 0.1 * usual, "pages come ahead"
    assert 0.0 < stalls_s(switching(CopyForm(restores_beside=True))) < 0.8 * usual
    assert stalls_s(switching(CopyForm(calls_s=400e-6))) > 1.5 * usual


def test_retained_copies_and_halves_move_fewer_bytes(as_the_engine):
    moved = as_the_engine[0].moved_bytes
    assert switching(CopyForm(retains=False))[0].moved_bytes > 1.2 * moved
    assert switching(CopyForm(share=0.5))[0].moved_bytes < 0.7 * moved


def test_int8_pages_in_host_memory_are_half_the_bytes_on_the_link_and_twice_as_many():
    experiment = Experiment(num_requests=60, duration_s=1.0, num_blocks=700, host_cache_bytes=2 * 10**11)
    half = replace(experiment, host_cache_dtype="int8")
    one, other = (each.fleet("fastswitch", "kv", "one-pass").instances[0] for each in (experiment, half))
    share = (1 + 4 / 128) / 2
    assert other._copies.share == share and other._moved_bytes == share * one._moved_bytes
    slots = [each.state.pool.host.num_slots for each in (one, other)]
    assert slots[1] == pytest.approx(slots[0] / share, abs=2)
    for wrong, words in (({}, "use --host-cache-bytes too"), ({"cache_dtype": "int8"}, "changes nothing of an int8")):
        with pytest.raises(ValueError, match=words):
            SimulateArgs(host_cache_dtype="int8", **wrong)


def test_a_tier_that_does_not_retain_gives_the_slots_of_what_came_back():
    tier = HostTier(4, retains=False)
    for key, blocks in ((b"a", [0, 1]), (b"b", [2, 3])):
        tier.save(key, CacheKind.KV, blocks)
    tier.take_moves()
    page = tier.find(b"a", CacheKind.KV)
    tier.hold(page)
    tier.restore(page, [4, 5])
    assert tier.take_moves().restored and tier.find(b"a", CacheKind.KV) is None
    assert tier.num_used == 2 and tier.find(b"b", CacheKind.KV) is not None
    tier.check()


def test_share_of_stalls_in_the_longest_waits():
    """A second for the first token, half of it copying; gaps of 1 and 3 s, half of the longer one copying."""
    request = Request("r", range(4), SamplingParams(), arrival_s=0.0, max_new_tokens=3)
    request.first_token_s, request.gaps_s = 1.0, [1.0, 3.0]
    outcome = Outcome([request], 0.0)
    outcome.samples_by_instance = [
        [Sample(a, b, 1, 1, 0, (0, 0), copied) for a, b, copied in ((0, 1, 0.5), (1, 2, 0.0), (2, 5, 1.5))]
    ]
    assert stall_share(outcome, first=True) == 0.5 and stall_share(outcome, first=False) == 0.5


def test_the_engines_stalls_are_seen_in_its_requests(as_the_engine):
    assert 0.0 < stall_share(as_the_engine[0], first=False) < 1.0
