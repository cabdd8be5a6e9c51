"""The router that knows prefixes: where it sends a prompt, by hand, and in a simulated fleet."""

from dataclasses import replace

import pytest

from apt_jax.cache import CacheKind
from apt_jax.request import Request, SamplingParams
from apt_jax.routing.catalogue import make_router
from apt_jax.routing.instance import InstanceLoad, instance_load
from apt_jax.routing.interface import RouteRequest
from apt_jax.routing.prefix import CHUNK_TOKENS, MOST_CHUNKS, Prefix, chunk_keys
from apt_jax.scheduling.policies.catalogue import make_policy
from apt_jax.scheduling.prefix_pool import PrefixPool
from apt_jax.scheduling.state import Limits, SchedulerState
from apt_jax.simulation.experiment import Experiment

EMPTY = InstanceLoad("a", 0.0, 0, 0, 0.0, 1000, 1000, 0, 16, 1, 0, 0.0, 1e-3)
FOUR = [replace(EMPTY, instance=str(k)) for k in range(4)]


def prompt(*parts: tuple[int, int], time_s=1.0, **more) -> RouteRequest:
    """Tokens `first .. first+count` of each part."""
    tokens = [token for first, count in parts for token in range(first, first + count)]
    return RouteRequest(len(tokens), time_s, token_ids=tokens, **more)


def test_a_next_turn_goes_where_the_turns_before_it_went():
    router = make_router("prefix")
    users = {user: router.choose(prompt((1000 * user, 200)), FOUR) for user in range(1, 9)}
    assert len(set(users.values())) == 4, "new ones are spread"
    for user, place in users.items():
        assert router.choose(prompt((1000 * user, 200), (50, 90), time_s=2.0), FOUR) == place


def test_prompts_that_share_a_beginning_are_spread_and_their_next_turns_are_not():
    router = Prefix()
    first = {k: router.choose(prompt((0, 640), (1000 * k, 100)), FOUR) for k in range(1, 9)}
    assert sorted(first.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
    for k, place in first.items():
        reported = [replace(load, time_s=k + 1) for load in FOUR]  # what was sent before is done
        assert router.choose(prompt((0, 640), (1000 * k, 100), (50, 200), time_s=k + 1.5), reported) == place


@pytest.mark.parametrize(("held", "place"), [(199, 0), (201, 1)])
def test_an_instance_that_is_too_much_fuller_is_passed_over(held, place):
    router, asked = Prefix(), prompt((0, 320))
    router._remember(chunk_keys(asked), "0")
    # the other would take 20 blocks more, one is taken at least
    loads = [replace(EMPTY, instance="0", free_blocks=1000 - held - 19), replace(EMPTY, instance="1")]
    assert router.choose(asked, loads) == place


def test_what_is_cached_counts_when_it_asks_who_is_in_time():
    router, asked = Prefix(), prompt((0, 1280))  # 1.28 s of prompt, and a second is promised
    loads = [replace(EMPTY, instance=name, free_blocks=free) for name, free in (("0", 700), ("1", 900))]
    assert router.choose(asked, loads) == 0, "late everywhere: the fullest"
    assert router.choose(replace(asked, time_s=2.0), [replace(load, time_s=1.5) for load in loads]) == 0
    router._remember(chunk_keys(asked), "1")
    full = [replace(loads[0], backlog_s=2.0, time_s=2.5), replace(loads[1], time_s=2.5)]
    assert router.choose(replace(asked, time_s=3.0), full) == 1


def test_salts_do_not_share_and_what_is_remembered_is_bounded(monkeypatch):
    router, asked = Prefix(), prompt((0, 10 * CHUNK_TOKENS + 5))
    keys, salted = chunk_keys(asked), chunk_keys(replace(asked, cache_salt="x"))
    assert len(keys) == 10 and not set(keys) & set(salted)
    assert keys[:4] == chunk_keys(prompt((0, 4 * CHUNK_TOKENS)))
    monkeypatch.setattr("apt_jax.routing.prefix.MOST_CHUNKS", 15)
    router._remember(keys, "0")
    router._remember(salted, "1")
    assert list(router._chunks) == [*keys[5:], *salted] and MOST_CHUNKS > 15


def test_a_report_s_queue_lacks_what_is_cached():
    state = SchedulerState(PrefixPool(100, 16), Limits(4, 64, "kv"))
    policy, params = make_policy("fcfs"), SamplingParams(max_tokens=1)
    for name in ("a", "b"):
        state.add(Request(name, range(50), params, arrival_s=0.0, max_new_tokens=1))
        if name == "a":
            spans = state.apply(policy.schedule(state, 0.0), 0.0)
            state.keep(state.written(spans))
            state.commit(spans[0].request, 5, 0.1)
    assert state.cached_tokens(state.waiting[0], CacheKind.KV) == 48
    assert instance_load(state, None, 1.0).queued_tokens == 2


def test_in_a_fleet_conversations_find_more_in_the_cache():
    found = {}
    for router in ("pending-time", "prefix"):
        experiment = Experiment(
            workload="conversations", num_requests=1, duration_s=15.0, instances=3, router=router,
            enable_prefix_caching=True,
        )  # fmt: skip
        outcome, report = experiment.run("sarathi", "hidden", "one-pass", 10.0)
        found[router] = report
        assert min(outcome.by_instance) > 0.5 * max(outcome.by_instance)
    assert found["prefix"].cached_share > found["pending-time"].cached_share + 0.15
    assert found["prefix"].p50_ttft_s < found["pending-time"].p50_ttft_s
