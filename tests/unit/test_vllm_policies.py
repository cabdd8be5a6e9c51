"""The baselines' plans for tiny states, worked out by hand. Pages hold 4 tokens: two blocks as KV."""

from dataclasses import replace

import pytest

from apt_jax.scheduling.costs.hardware import HARDWARE
from apt_jax.scheduling.policies.catalogue import POLICIES, make_policy
from apt_jax.scheduling.policies.vllm.defaults import BASELINES
from apt_jax.simulation.cli import configurations
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.options import SimulateArgs
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import lines, run, wait


def plan(policy, state):
    return lines(make_policy(policy).schedule(state, 0.0))


def old_and_new(old_tokens, new_tokens, num_blocks=100, **limits):
    """`old` decodes and `new` waits."""
    state = make_state(num_blocks, **limits)
    run(state, "old", old_tokens)
    wait(state, "new", new_tokens)
    return state


def test_v0_prefills_first_and_nobody_decodes_meanwhile():
    assert plan("vllm-v0", old_and_new(4, 8)) == ["run new 8 kv ADMITTED_KV", "wait old WAITS_FOR_PREFILL"]


def test_v0_never_splits_a_prompt():
    """10 tokens an iteration: 6 of one prompt, and 5 do not fit into the 4 that are left."""
    state = make_state(100, tokens=10)
    for name, prompt in (("first", 6), ("second", 5), ("third", 1)):
        wait(state, name, prompt)
    assert plan("vllm-v0", state) == [
        "run first 6 kv ADMITTED_KV", "wait second WAITS_FOR_TOKENS", "wait third WAITS_BEHIND",
    ]  # fmt: skip
    assert plan("fcfs", state)[:2] == ["run first 6 kv ADMITTED_KV", "run second 4 kv ADMITTED_KV"]


def test_v0_splits_only_what_no_iteration_could_hold():
    state = make_state(100, tokens=10)
    wait(state, "long", 13)
    assert plan("vllm-v0", state) == ["run long 10 kv ADMITTED_KV"]


@pytest.mark.parametrize(("policy", "admitted"), [("vllm-v0", False), ("sarathi", False), ("vllm-v1", True)])
def test_the_watermark_holds_for_v0_and_not_for_v1(policy, admitted):
    """Of 6 blocks 4 are free, all of which `new` takes; one is to stay free."""
    found = plan(policy, old_and_new(3, 8, 6, watermark=1))
    assert ("run new 8 kv ADMITTED_KV" in found) is admitted
    assert ("wait new WAITS_FOR_BLOCKS" in found) is not admitted


def test_v1_decodes_first_and_gives_prompts_the_rest_of_the_budget():
    """12 tokens: two decodes, 5 left of a prompt under way, 5 of the next; a third prompt waits."""
    state = make_state(100, tokens=12)
    run(state, "a"), run(state, "b")
    run(state, "under way", 8, computed=3)
    wait(state, "next", 9)
    wait(state, "last", 2)
    assert plan("vllm-v1", state) == [
        "run a 1 kv DECODES", "run b 1 kv DECODES", "run under way 5 kv CONTINUES_PREFILL", "run next 5 kv ADMITTED_KV",
        "wait last WAITS_FOR_TOKENS",
    ]  # fmt: skip


def test_v1_takes_the_smaller_of_its_own_budget_and_the_engines():
    for policy, limit, chunk in (
        ("vllm-v1:token_budget=6", 12, 6), ("vllm-v1:token_budget=20", 12, 12), ("vllm-v1", 12, 12),
        ("vllm-v1", 8192, 8192),  # an H200's: without a budget of its own the engine's limit is the only one
    ):  # fmt: skip
        state = make_state(5000, tokens=limit)
        wait(state, "new", 9000 if limit > 12 else 20)
        assert plan(policy, state) == [f"run new {chunk} kv ADMITTED_KV"]


def test_v1_admits_only_what_fits_as_a_whole():
    """5 tokens of budget and 4 free blocks: the chunk of 5 would fit, the prompt of 12 does not."""
    state = old_and_new(3, 12, 6, tokens=6)
    wait(state, "short", 4)
    assert plan("vllm-v1", state) == ["run old 1 kv DECODES", "wait new WAITS_FOR_BLOCKS", "wait short WAITS_BEHIND"]


def test_v1_preempts_the_last_and_admits_nobody_then():
    """Both need a block more for each of K and V, and none is free; `new` would fit into what `second` gives back."""
    state = make_state(8)
    run(state, "first", 8), run(state, "second", 8)
    wait(state, "new", 2)
    assert plan("vllm-v1", state) == ["preempt second PREEMPTED_NO_BLOCKS", "run first 1 kv DECODES"]


def test_v1_counts_what_decodes_take_before_it_admits():
    """8 blocks: 4 held, 2 for the decode's next page, 2 left: a prompt of 5 tokens needs 4."""
    assert plan("vllm-v1", old_and_new(8, 5, 8)) == ["run old 1 kv DECODES", "wait new WAITS_FOR_BLOCKS"]


def test_v1_admits_up_to_its_seats():
    state = make_state(100, max_num_seqs=2)
    for name in "abc":
        wait(state, name, 2)
    assert plan("vllm-v1", state)[-1] == "wait c WAITS_FOR_SEQUENCES"


def test_baselines_are_policies_with_vllms_defaults():
    assert set(BASELINES) <= set(POLICIES)
    shares = {name: (b.cache_mode, b.device_memory_utilization) for name, b in BASELINES.items()}
    assert shares == {"vllm-v0": ("kv", 0.9), "vllm-v1": ("kv", 0.92)}
    v1 = BASELINES["vllm-v1"]
    assert set(v1.limits) <= set(HARDWARE)
    assert (v1.limits_on("a100-80gb"), v1.limits_on("h200"), v1.limits_on("tpu-v6e")) == (
        (2048, 256), (8192, 1024), (1024, 256),
    )  # fmt: skip


def test_a_simulation_by_a_baseline_s_name_has_its_cache_limits_and_memory_unless_they_are_given():
    experiment = Experiment(model="opt-6.7b", hardware="h200")
    ours, theirs = experiment.set_up_for("apt"), experiment.set_up_for("vllm-v1:token_budget=512")
    found = [(e.max_num_batched_tokens, e.max_num_seqs, e.device_memory_utilization) for e in (ours, theirs)]
    assert found == [(2048, 256, 0.9), (8192, 1024, 0.92)]
    given = replace(experiment, max_num_batched_tokens=4096, max_num_seqs=32, device_memory_utilization=0.5)
    assert given.set_up_for("vllm-v1") == given
    a100 = Experiment()
    gained = a100.pool_blocks("vllm-v1") - a100.pool_blocks("vllm-v0")
    assert gained == pytest.approx(0.02 * 40 * 2**30 / (40 * 5120 * 2 * 16), abs=1)
    assert a100.pool_blocks() == a100.pool_blocks("vllm-v0") == a100.pool_blocks("fcfs")
    limits = experiment.fleet("vllm-v1", "kv", "absorbed").instances[0].state.limits
    assert (limits.max_num_batched_tokens, limits.max_num_seqs, limits.cache_mode) == (8192, 1024, "kv")


def test_cache_modes_of_a_command_line_with_baselines():
    def chosen(**flags):
        return [(policy, mode) for policy, mode, _ in configurations(SimulateArgs(**flags))]

    assert chosen(policies="vllm-v1,apt") == [("vllm-v1", "kv"), ("apt", "kv"), ("apt", "hybrid")]
    assert chosen(policies="vllm-v1", cache_modes="hidden") == [("vllm-v1", "hidden")]
    with pytest.raises(ValueError, match=r"device_memory_utilization=1\.5 must be greater than 0 and at most 1"):
        SimulateArgs(device_memory_utilization=1.5)
