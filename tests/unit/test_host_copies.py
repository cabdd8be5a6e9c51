"""Host memory in the cost model and the simulator: what copies cost, and what they save."""

from dataclasses import replace

import pytest

from apt_jax.request import SamplingParams
from apt_jax.scheduling.costs.cost_model import CostModel, block_bytes
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from apt_jax.scheduling.costs.host_copies import worth_restoring
from apt_jax.scheduling.policies.fcfs import Fcfs
from apt_jax.scheduling.policies.interface import PolicyContext
from apt_jax.scheduling.state import Limits
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.instance import Instance
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.requests.columns import SimulatedRequest

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
