"""`apt-jax simulate` with flags and files that make no sense: one sentence with the value, the limit and the cure."""

import re
from dataclasses import replace

import pytest

from apt_jax.flags.lists import listed_counts, listed_names, listed_numbers
from apt_jax.request import Slo
from apt_jax.scheduling.plan import Plan
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.simulation.cli import run
from apt_jax.simulation.experiment import Experiment
from apt_jax.simulation.options import SimulateArgs
from apt_jax.simulation.requests.classes import load_classes
from apt_jax.simulation.workload import load_lengths

SMALL = SimulateArgs(
    model="opt-125m", policies="fcfs", cache_modes="kv", rate="1", num_requests=3, duration_s=0.0, jobs=1
)


class PlansNothing:
    """A policy by name: `tests.unit.test_simulate_flags:PlansNothing`."""

    def __init__(self, context):
        pass

    def schedule(self, state, now):
        return Plan()

    def finished(self, request, now):
        pass


def refused(flags, sentence):
    """The command, or the making of its flags, raises exactly this sentence."""
    with pytest.raises(ValueError, match=re.escape(sentence)) as caught:
        run(replace(SMALL, **flags))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"seeds": "0,0"}, "seeds='0,0' has 0 twice; leave one out"),
        ({"policies": "fcfs,apt,fcfs"}, "policies='fcfs,apt,fcfs' has fcfs twice; leave one out"),
        ({"cache_modes": "kv,kv"}, "cache_modes='kv,kv' has kv twice"),
        ({"hidden_attention": "absorbed,absorbed"}, "hidden_attention='absorbed,absorbed' has absorbed twice"),
        ({"router": "random,random"}, "router='random,random' has random twice"),
        ({"rate": "1,2,1.0"}, "rate='1,2,1.0' has 1 twice"),
        ({"effective_throughput": "0.9,0.90"}, "effective_throughput='0.9,0.90' has 0.9 twice"),
        ({"effective_throughput": ","}, "effective_throughput=',' must be numbers separated by commas"),
        ({"effective_throughput": "0.9,1.5"}, "greater than 0 and at most 1"),
        ({"rate": ","}, "rate=',' must be numbers separated by commas, greater than 1e-06 and at most 1e+09"),
        ({"rate": "inf"}, "rate='inf' must be numbers"),
        ({"policies": "fcfs,"}, "policies='fcfs,' has an empty value; give names separated by commas"),
        ({"seeds": "1,²"}, "seeds='1,²' must be whole numbers separated by commas, at least 0"),
    ],
)
def test_a_list_has_each_value_once_and_none_that_is_empty(flags, sentence):
    refused(flags, sentence)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"seed": 3, "seeds": "1,2"}, "seed=3 and seeds='1,2' say the same thing; give one of them"),
        ({"instances": 3, "max_instances": 2}, "max_instances=2 must be at least instances=3"),
        ({"instances": 1001}, "instances=1001 must be at most 1000"),
        ({"block_size": 24}, "block_size=24 must be a power of two, at most 128"),
        ({"block_size": 256}, "block_size=256 must be a power of two, at most 128"),
    ],
)
def test_flags_that_contradict_each_other_or_a_limit(flags, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        replace(SMALL, **flags)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            {"tensor_parallel_size": 5},
            "tensor_parallel_size=5 does not divide num_attention_heads=12 and ffn_dim=3072; --tensor-parallel-size "
            "may be 1, 2, 3, 4, 6, 12",
        ),
        ({"num_blocks": 10**20}, f"{10**20} cache blocks in each instance are more than the 100,000,000 in all"),
        ({"num_blocks": 2 * 10**5, "instances": 501}, "200000 cache blocks in each instance are more than"),
        ({"max_num_batched_tokens": 10**9}, "activations of 24576.1 GB (for max_num_batched_tokens=1000000000 and"),
        ({"policies": ":X"}, "scheduling_policy=':X' lacks a name; give NAME:option=value or MODULE:CLASS"),
        ({"policies": "math:"}, "scheduling_policy='math:' lacks a name"),
        ({"policies": "vllm-v1:token_budget=0"}, "token_budget=0 must be at least 1"),
        ({"policies": "sarathi:token_budget=-5"}, "token_budget=-5 must be at least 1"),
        (
            {"policies": "apt:lane_share=0.1:lane-share=0.2"},
            "option lane_share of policy 'apt' is given twice; leave one out",
        ),
        ({"num_blocks": 2}, "tokens does not fit in 2 blocks of 16 tokens; raise --num-blocks"),
    ],
)
def test_what_cannot_be_simulated_is_refused_with_the_cure(flags, sentence):
    refused(flags, sentence)


def test_a_policy_that_plans_nothing_is_named_and_no_traceback_ends_the_command():
    name = "tests.unit.test_simulate_flags:PlansNothing"
    refused({"policies": name}, f"policy '{name}' (kv) stalls: nothing scheduled at")


def test_two_results_have_two_files(tmp_path):
    same = tmp_path / "out.svg"
    refused({"json": same, "plot": tmp_path / "." / "out.svg"}, f"--json and --plot both name {same}; give each")


def test_more_processes_than_points_are_as_many_as_points(monkeypatch):
    """A pool of a trillion cannot even be made."""
    assert len(run(replace(SMALL, jobs=10**12, rate="1"))["runs"]) == 1


def test_a_default_stall_limit_holds_for_classes_as_on_the_server(tmp_path):
    """Part by part, as a request's body or headers are over the server's flags."""
    (tmp_path / "c.csv").write_text(
        "name,share,ttft_ms,tbt_ms,stall_ms\nchat,1,300,50,\nown,1,300,50,80\nplain,1,,,\nlong,1,30000,5000,\n"
    )
    explicit = [each.terms.slo for each in load_classes(tmp_path / "c.csv", Slo(2.0, 0.7, 0.9))]
    assert explicit == [Slo(0.3, 0.05, 0.9), Slo(0.3, 0.05, 0.08), Slo(2.0, 0.7, 0.9), Slo(30.0, 5.0, 0.9)]
    derived = [each.terms.slo for each in load_classes(tmp_path / "c.csv", Slo(2.0, 0.7))]
    assert [slo.stall_s for slo in derived] == [None, 0.08, None, None]
    assert [slo.stall_limit_s for slo in derived] == [0.3, 0.08, 1.0, 5.0]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("prompt_tokens,output_tokens,stall_slo_ms\n3,4,soon\n", "line 2: stall_slo_ms='soon' must be a number"),
        ("prompt_tokens,output_tokens,ttft_slo_ms\n3,4,0\n", "line 2: ttft_slo_ms=0 must be greater than 0"),
        ("prompt_tokens,output_tokens,priority\n3,4,1.5\n", "line 2: priority=1.5 must be a whole number"),
        ("prompt_tokens,output_tokens,priority\n3,4,1e300\n", "line 2: priority=1e+300 must be a whole number"),
        ("", "is empty; give a table with the columns prompt_tokens and output_tokens"),
        ("prompt_tokens,output_tokens\n3\n", "line 2: there is no cell for output_tokens"),
        ("prompt_tokens,output_tokens\n3,4,5\n", "line 2: there are more cells than columns"),
        ("prompt_tokens,output_tokens,prompt_tokens\n3,4,5\n", "has the column 'prompt_tokens' twice; leave one out"),
    ],
)
def test_a_workload_is_told_in_the_words_of_its_own_columns(table, sentence, tmp_path):
    path = tmp_path / "w.csv"
    path.write_text(table)
    with pytest.raises(ValueError, match=re.escape(f"workload {path}")) as caught:
        load_lengths(str(path))
    assert str(caught.value).endswith(sentence)


def test_a_class_without_a_share_is_told_so(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('[{"name": "a"}]')
    with pytest.raises(ValueError, match=re.escape(f"{path}, class 1 has no share; give a number greater than 0")):
        load_classes(path, Slo())
    (tmp_path / "c.csv").write_text("name,share,stall_ms\na,1,0\n")
    with pytest.raises(ValueError, match=r"class 1: stall_ms=0 must be greater than 0"):
        load_classes(tmp_path / "c.csv", Slo())


def test_lists_keep_their_order():
    assert listed_names("f", "b, a", {"a", "b"}) == ["b", "a"]
    assert listed_numbers("f", "3,0.5") == [3.0, 0.5] and listed_numbers("f", "1,inf") == [1.0, float("inf")]
    assert listed_counts("f", "7, 0", 0) == [7, 0]
    with pytest.raises(ValueError, match="f='0' must be whole numbers separated by commas, at least 1"):
        listed_counts("f", "0", 1)


def test_the_defaults_can_be_simulated():
    assert make_policy(SMALL.policies) is not None and Experiment().pool_blocks() > 1000
