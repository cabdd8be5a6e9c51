"""The lines of the dashboard: spans of time worked out by hand, in bounded memory."""

import asyncio
import sys
from types import SimpleNamespace

import pytest

from apt_jax.output import Output
from apt_jax.request import OFFLINE_SLO, FinishReason, SamplingParams, Slo
from apt_jax.serve.observability import timeline as module
from apt_jax.serve.observability.timeline import LINES, MOST_CLASSES, NUM_SPANS, Timeline
from apt_jax.serve.runtime.observer import Stepped
from apt_jax.serve.runtime.samples import fan_out
from tests.support.asgi_service import run, serving
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.scheduling_loop import request


@pytest.fixture
def clock(monkeypatch):
    """The clock of the timeline; set `.now`. It begins at the start of a span of every width."""
    found = SimpleNamespace(now=1440.0)
    found.monotonic, found.time = lambda: found.now, lambda: 5000.0 + found.now
    monkeypatch.setattr(module, "time", found)
    return found


def ended(ttft_s=0.5, gaps_s=(), reason=FinishReason.STOP, slo=None, tokens=1):
    done = request(slo=slo or Slo(1.0, 0.5))
    done.arrival_s, done.first_token_s = 10.0, 10.0 + ttft_s
    done.gaps_s, done.finish_reason, done.output_token_ids = list(gaps_s), reason, [5] * tokens
    return Output(done, "", (5,), (), reason)


def brought(line, *outputs, cancelled=()):
    line.brought(Stepped(outputs, cancelled, 0.0))


def levels(waiting=0, running=0, kv=0, hidden=0, free=10, **counts):
    return {
        "waiting": waiting, "running": running, "blocks": {"kv": kv, "hidden": hidden, "free": free}, "counts": counts
    }  # fmt: skip


def last(line, name, range_="10m", back=1):
    return line.figures(range_)["lines"][name][-back]


def test_nothing_is_known_of_the_time_before_the_start(clock):
    line = Timeline()
    clock.now += 12.0
    found = line.figures("10m")
    assert set(found["lines"]) == set(LINES) and {len(values) for values in found["lines"].values()} == {NUM_SPANS}
    assert found["lines"]["tokens_per_s"] == [None] * (NUM_SPANS - 3) + [0.0] * 3
    assert found["lines"]["strict_attainment"] == [None] * NUM_SPANS and found["classes"] == []
    assert (found["span_s"], found["ends_at"]) == (5.0, 6455.0), "the span under way ends in 3 s"


def test_lines_do_not_begin_empty_for_whoever_looks_later(clock):
    line = Timeline()
    line.looked(levels(waiting=3, running=2, kv=4, hidden=1, free=5))
    line.looked(levels(waiting=1, running=2, kv=5, hidden=0, free=5))
    brought(line, *[ended(gaps_s=[0.25])] * 10)
    clock.now += 60.0
    assert last(line, "waiting", back=13) == 2.0 and last(line, "most_waiting", back=13) == 3
    assert last(line, "running", back=13) == 2.0 and last(line, "waiting") is None
    assert (last(line, "kv", back=13), last(line, "hidden", back=13)) == (0.45, 0.05)
    assert last(line, "tokens_per_s", back=13) == 2.0 and last(line, "strict_attainment", back=13) == 1.0
    assert last(line, "tokens_per_s", "1h", back=3) == pytest.approx(10 / 30, abs=0.001)
    assert line.figures("1d")["sums"]["tokens"] == 10


def test_rates_of_the_span_under_way_are_of_what_has_passed_of_it(clock):
    line = Timeline()
    clock.now += 10.0
    brought(line, *[ended()] * 6)
    assert last(line, "tokens_per_s") == 6.0, "no more than a fifth of a span's time is guessed"
    clock.now += 3.0
    assert last(line, "tokens_per_s") == 2.0 and last(line, "kept_tokens_per_s") == 2.0


def test_percentiles_are_right_within_five_percent(clock):
    line = Timeline()
    brought(line, *(ended(ttft_s=0.01 * (i + 1), gaps_s=()) for i in range(100)))
    brought(line, *(ended(gaps_s=[0.001 * (i + 1)]) for i in range(1000)))
    for name, exact in (("ttft_p50_ms", 510), ("ttft_p99_ms", 1000), ("tbt_p50_ms", 501), ("tbt_p99_ms", 991)):
        assert last(line, name) == pytest.approx(exact, rel=0.05), name
    assert last(line, "longest_gap_ms") == 1000.0


def test_what_ends_is_kept_missed_refused_an_error_or_no_promise(clock):
    line = Timeline()
    brought(line, ended(tokens=7), ended(ttft_s=3.0), ended(reason=FinishReason.ERROR))
    brought(line, ended(reason=FinishReason.ABANDONED), ended(slo=OFFLINE_SLO), ended(reason=FinishReason.ABORT))
    gone = ended(reason=FinishReason.ABORT)
    brought(line, gone, cancelled={gone.request.request_id})
    line.refused("queue_full")
    line.refused("bad_request")
    line.lost(fan_out("x", [[1], [2]], SamplingParams(), slo=Slo(1.0, 0.5)))
    sums = line.figures("10m")["sums"]
    assert sums == line.figures("10m")["since_start"]
    assert (sums["finished"], sums["promised"], sums["kept"]) == (8, 8, 1)
    assert (sums["errors"], sums["abandoned"]) == (3, 1)
    assert sums["refused"] == {"queue_full": 1, "bad_request": 1}
    assert last(line, "refused") == 2 and last(line, "errors") == 3 and sums["strict_attainment"] == 0.125
    assert last(line, "kept_tokens_per_s") == 7.0


def test_counts_of_the_engines_are_taken_as_what_came_since_the_last_look(clock):
    line = Timeline()
    line.looked(levels(preemptions=5, prefix_queries=100, prefix_hits=25))
    line.looked(levels(preemptions=2, prefix_queries=20, prefix_hits=5))  # a replica has gone
    line.looked(levels(preemptions=3, prefix_queries=40, prefix_hits=25))
    assert last(line, "preemptions") == 6
    assert last(line, "prefix_hits") == pytest.approx(45 / 120, abs=1e-4)
    clock.now += 5.0
    line.looked(levels(preemptions=3, prefix_queries=40, prefix_hits=25))
    assert last(line, "preemptions") == 0 and last(line, "prefix_hits") is None


def test_each_slo_is_a_class_and_the_worst_comes_first(clock):
    line, strict = Timeline(), Slo(0.2, 0.1, 0.3)
    brought(line, *[ended()] * 3, ended(ttft_s=2.0), ended(slo=OFFLINE_SLO))
    brought(line, ended(ttft_s=0.1, slo=strict), ended(ttft_s=0.1, gaps_s=[0.05, 0.4], slo=strict))
    worst, other = line.figures("10m")["classes"]
    assert worst["slo"] == {"ttft_ms": 200.0, "tbt_ms": 100.0, "stall_ms": 300.0}
    assert (worst["requests"], worst["strict_attainment"], worst["longest_gap_ms"]) == (2, 0.5, 400.0)
    assert worst["ttft_p99_ms"] == pytest.approx(100, rel=0.05)
    assert (other["requests"], other["strict_attainment"]) == (4, 0.75)
    clock.now += 601.0
    assert line.figures("10m")["classes"] == [] and len(line.figures("1h")["classes"]) == 2


def test_the_time_of_a_line_passes_and_the_sum_since_the_start_stays(clock):
    line = Timeline()
    brought(line, ended())
    for passed_s, found in ((599.0, (1, 1, 1)), (2.0, (0, 1, 1)), (3000.0, (0, 0, 1)), (90_000.0, (0, 0, 0))):
        clock.now += passed_s
        counts = tuple(line.figures(name)["sums"]["finished"] for name in ("10m", "1h", "1d"))
        assert counts == found and line.figures("10m")["since_start"]["finished"] == 1


def size_of(found, seen=None):
    """Bytes of an object and what it holds."""
    seen = set() if seen is None else seen
    if id(found) in seen:
        return 0
    seen.add(id(found))
    parts = [getattr(found, name) for name in getattr(type(found), "__slots__", ()) if hasattr(found, name)]
    parts += list(getattr(found, "__dict__", {}).values())
    if isinstance(found, dict):
        parts += [*found.keys(), *found.values()]
    elif isinstance(found, (list, tuple, set)) or type(found).__name__ == "deque":
        parts += list(found)
    return sys.getsizeof(found) + sum(size_of(part, seen) for part in parts)


def test_memory_is_bounded_however_much_happens_and_however_many_slos_there_are(clock):
    line, sizes = Timeline(), []
    for round_ in range(2):
        for step in range(1500):
            slo = Slo(1.0 + 0.001 * (step + 1500 * round_), 0.5)
            brought(line, *(ended(ttft_s=0.001 * 1.3 ** (i % 40), gaps_s=[0.001 * 1.2**i], slo=slo) for i in range(40)))
            line.refused("queue_full")
            line.looked(levels(preemptions=step))
            clock.now += 72.0
        sizes.append(size_of(line.__dict__))
    assert sizes[1] < 1.05 * sizes[0] and sizes[1] < 6_000_000
    classes = line.figures("1d")["classes"]
    assert len(classes) == MOST_CLASSES + 1 and None in [entry["slo"] for entry in classes]


def test_the_route_answers_every_range_and_says_which_there_are():
    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer())) as client:
            await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 5})
            await client.post("/v1/completions", json={"prompt": "a", "max_tokens": -1})
            for name, span_s in (("10m", 5.0), ("1h", 30.0), ("1d", 720.0)):
                found = (await client.get(f"/debug/history?range={name}")).json()
                assert (found["range"], found["span_s"]) == (name, span_s)
                assert (found["sums"]["finished"], found["sums"]["tokens"]) == (1, 5)
                assert found["since_start"]["refused"] == {"bad_request": 1}
                assert found["classes"][0]["requests"] == 1
            reply = await client.get("/debug/history?range=1w")
            assert reply.status_code == 400 and "10m, 1h, 1d" in reply.json()["error"]["message"]

    run(main)


def test_the_service_looks_at_the_levels_while_it_runs(monkeypatch):
    monkeypatch.setattr("apt_jax.serve.http.service.LOOK_EVERY_S", 0.01)
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():

        async with serving(engine) as client:
            task = asyncio.create_task(client.post("/v1/completions", json={"prompt": ["a"] * 6, "max_tokens": 2}))
            engine.allow_step(1)
            async with asyncio.timeout(20):
                while not (await client.get("/debug/history")).json()["lines"]["running"][-1]:
                    await asyncio.sleep(0.02)
            found = (await client.get("/debug/history")).json()["lines"]
            assert found["most_waiting"][-1] >= 2 and found["kv"][-1] > 0
            engine.allow_step(100)
            await task

    run(main)
