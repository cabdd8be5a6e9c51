"""How many prompt tokens `apt` computes, and whose, worked out by hand: 1/1,024 s a token, blocks of 4 tokens.

A request that `run` puts there has its last token at time 0, so it arrives before that. Nothing is predicted.
"""

from dataclasses import replace

import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import Slo
from apt_jax.scheduling.costs.cost_model import CostModel
from apt_jax.scheduling.costs.hardware import HARDWARE, MODELS
from tests.support.apt_plans import decide, view_of
from tests.support.scheduling_loop import make_state
from tests.support.tiny_states import run, wait

PATIENT = Slo(60.0, 60.0)


class Toy(CostModel):
    """A chunk pays 1/4,096 s for each hidden token cached before it; a step takes `decode` before it takes prompts."""

    token_s, attention_s = 1 / 1024, (1 / 1024, 1 / 1024)
    free_tokens, decode = 0, 0.0

    def step_s(self, load):
        return self.decode

    def prefix_s(self, kind, tokens, cached_tokens):
        return cached_tokens / 4096 if kind.is_projected else 0.0


def toy(**figures):
    return type("Figures", (Toy,), figures)(MODELS["opt-125m"], HARDWARE["h200"])


def chunks(plan):
    """What is computed of prompts: name and tokens."""
    return [
        (line.split()[1], int(line.split()[2])) for line in plan if line.startswith("run") and "DECODES" not in line
    ]


def urgent(tokens, **fields):
    """Half of its limit is not enough for so many tokens, but the whole is."""
    return {"slo": Slo(1.3 * tokens / 1024, 60.0), **fields}


# -- what is free, what is needed, what the tightest promise allows -------------------------------------------------


@pytest.mark.parametrize(
    ("free_tokens", "now", "tokens"),
    [
        # 1 s of products by 3.25 s, a step before it: 3 s are left. With b seconds an iteration they take
        # 1 / b iterations of 0.25 + b seconds: b = 1 x 0.25 / (3 - 1)
        (0, 0.0, 128),
        (65, 0.0, 96),  # one for the decode; 64 are free, so an iteration takes 0.1875 + b seconds
        (129, 0.0, 128),  # free, and more than the 64 needed
        (257, 0.0, 256),
        (2000, 0.0, 1024),
        # half of the limit is over: half of the rest is 1.625 s, a step before it
        (0, 3.25, 682),  # 0.25 / 0.375 s
        (0, 4.0, 1024),  # 1.25 s of which a step takes 0.25: all that is allowed, 1.375 s
    ],
)
def test_as_many_tokens_as_are_free_and_more_if_they_are_needed(free_tokens, now, tokens):
    state = make_state(4000, tokens=4096)
    run(state, "talker", 7, slo=PATIENT)
    wait(state, "essay", 1024, slo=Slo(6.5, 60.0))
    assert chunks(decide(state, now, model=toy(free_tokens=free_tokens, decode=0.25))) == [("essay", tokens)]


def test_what_is_needed_counts_those_that_are_due_before():
    """`a` alone needs 0.5 x 0.25 / (1.5 - 0.5) s, both together 1 x 0.25 / (2.5 - 1)."""
    state = make_state(4000, tokens=4096)
    run(state, "talker", 7, slo=PATIENT)
    run(state, "a", 513, computed=1, slo=Slo(3.5, 60.0))
    assert chunks(decide(state, 0.0, model=toy(decode=0.25))) == [("a", 128)]
    run(state, "b", 513, computed=1, slo=Slo(5.5, 60.0))
    assert chunks(decide(state, 0.0, model=toy(decode=0.25))) == [("a", 170)]


def test_what_is_needed_counts_the_prefix():
    """0.75 s of products and 0.25 s for 1,024 cached tokens: as much as the essay above."""
    state = make_state(4000, tokens=4096, mode="hidden")
    run(state, "talker", 7, kind=CacheKind.HIDDEN, slo=PATIENT)
    run(state, "half", 1792, kind=CacheKind.HIDDEN, computed=1024, slo=Slo(6.5, 60.0))
    assert chunks(decide(state, 0.0, model=toy(decode=0.25, free_tokens=1))) == [("half", 128)]


def test_late_prompts_need_nothing():
    for arrival_s, tokens in ((-0.1, 256), (-5.0, 16)):
        state = make_state(4000, tokens=4096)
        run(state, "talker", 7, slo=PATIENT)
        wait(state, "essay", 900, arrival_s=arrival_s)
        assert chunks(decide(state, 0.0, model=toy())) == [("essay", tokens)]


@pytest.mark.parametrize(
    ("talker", "other", "arrival_s", "tokens"),
    [
        (Slo(60.0, 60.0), None, 0.0, 624),  # a quarter of the essay's own 2.4375 s
        (Slo(60.0, 0.5), None, 0.0, 128),
        (Slo(0.5, 60.0), None, 0.0, 128),  # its first token is out, but others like it will come
        (Slo(60.0, 60.0), Slo(0.25, 60.0), 0.0, 64),
        (Slo(60.0, 60.0), Slo(0.25, 60.0), -9.0, 624),  # what is broken already binds nobody
        (Slo(60.0, 60.0), Slo(60.0, 0.25), 0.0, 624),  # nor do the gaps of one that does not decode
    ],
)
def test_a_quarter_of_the_tightest_promise_first_token_or_gap(talker, other, arrival_s, tokens):
    state = make_state(4000, tokens=4096)
    run(state, "talker", 7, slo=talker)
    wait(state, "essay", 1920, **urgent(1920))
    if other:
        wait(state, "other", 40, arrival_s=arrival_s, slo=other)
    assert sum(count for _, count in chunks(decide(state, 0.0, model=toy()))) == tokens


def test_where_all_are_late_the_tightest_of_their_promises_counts():
    """A quarter of 0.25 s and of 1 s, for a prompt of the lane beside a stream that has stood still."""
    for gap_s, tokens in ((0.25, 64), (1.0, 256), (5.0, 512)):
        state = make_state(4000, tokens=4096)
        run(state, "talker", 7, arrival_s=-9.0, slo=Slo(2.0, gap_s, 5.0))
        run(state, "essay", 1920, computed=16, arrival_s=-30.0, slo=Slo(3.0, 60.0))
        view = view_of(state, 0.0, model=toy(), prediction=False)
        assert view.late_r.all() and view.tightest_s(np.array([0])) * 1024 / 4 == tokens


# -- hidden prefixes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "computed", "free_tokens", "slo", "tokens"),
    [
        # a quarter of 0.5 s are 128 tokens; 400 cached ones cost as much as 100
        (CacheKind.KV, 400, 0, "urgent", 128),
        (CacheKind.HIDDEN, 400, 0, "urgent", 28),
        (CacheKind.HIDDEN, 800, 0, "urgent", 16),  # nothing is left, but the first one always gets on
        # 64 are free; a prefix that costs more than 32 of them is paid once: all that the promise allows
        (CacheKind.KV, 400, 65, "patient", 64),
        (CacheKind.HIDDEN, 128, 65, "patient", 64),
        (CacheKind.HIDDEN, 132, 65, "patient", 128 + 64 - 33),
        (CacheKind.HIDDEN, 400, 65, "patient", 128 + 64 - 100),
    ],
)
def test_a_cached_hidden_prefix_is_counted(kind, computed, free_tokens, slo, tokens):
    state = make_state(4000, tokens=4096, mode=kind.value)
    run(state, "talker", 7, kind=kind, slo=Slo(60.0, 0.5))
    fields = urgent(1400 if kind is CacheKind.KV else 1400 + computed) if slo == "urgent" else {"slo": Slo(1e5, 1e5)}
    run(state, "half", 1400 + computed, kind=kind, computed=computed, **fields)
    assert chunks(decide(state, 0.0, model=toy(free_tokens=free_tokens))) == [("half", tokens)]


def test_a_second_prompt_with_a_long_prefix_waits_for_an_iteration_of_its_own():
    state = make_state(4000, tokens=4096, mode="hidden")
    run(state, "talker", 7, kind=CacheKind.HIDDEN, slo=Slo(60.0, 0.5))
    run(state, "first", 60, kind=CacheKind.HIDDEN, computed=20, slo=Slo(500.0, 1e5))
    run(state, "second", 1800, kind=CacheKind.HIDDEN, computed=400, slo=Slo(1e5, 1e5))
    assert chunks(decide(state, 0.0, model=toy(free_tokens=65))) == [("first", 40)]


# -- whose ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", [("tight", 40), ("begun", 20), ("calm", 40), ("late", 10)]),
        (":paced=off", [("begun", 20), ("late", 40), ("tight", 40), ("calm", 10)]),
    ],
)
def test_chunks_go_by_urgency(options, expected):
    """110 tokens beside the decode; `begun` is due after 5 s, `calm` after 60."""
    state = make_state(4000, tokens=111)
    run(state, "talker", 7, slo=PATIENT)
    run(state, "begun", 40, computed=20, slo=Slo(5.0, 60.0))
    run(state, "late", 41, computed=1, arrival_s=-5.0)
    wait(state, "calm", 40, slo=PATIENT)
    wait(state, "tight", 40, arrival_s=0.1)
    plan = decide(state, 0.2, f"apt:prediction=off{options}", toy(free_tokens=999))
    assert chunks(plan) == expected


def test_an_admission_in_the_middle_that_gets_no_chunk_spares_its_victim():
    """`large` is worth most per block and takes the late one's memory, but `tight` is due first and takes all."""
    state = make_state(30, tokens=16)
    run(state, "late", 31, arrival_s=-5.0)  # 16 blocks: 14 are free
    wait(state, "large", 32, arrival_s=0.0, slo=Slo(2.0, 60.0))  # 16
    wait(state, "tight", 16, arrival_s=0.4, slo=Slo(1.0, 60.0))  # 8
    plan = decide(state, 0.5, model=toy(free_tokens=99))
    assert plan == ["run late 1 kv DECODES", "run tight 15 kv ADMITTED_KV", "wait large WAITS_FOR_BLOCKS"]
    assert decide(replace_tokens(state, 64), 0.5, model=toy(free_tokens=99))[0] == "preempt late PREEMPTED_LATE"


def replace_tokens(state, tokens):
    state.limits = replace(state.limits, max_num_batched_tokens=tokens)
    return state
