"""/debug routes, histories and traces over the fake engine."""

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from apt_jax.cache import CacheKind
from apt_jax.output import Output
from apt_jax.request import FinishReason, Request, SamplingParams
from apt_jax.scheduling.plan import Plan, Preempted, Reason, Scheduled, Waited
from apt_jax.serve.http.routes.probes import VERSION
from apt_jax.serve.observability.history import KEPT_EVENTS, KEPT_FIRST, KEPT_REQUESTS, SHOWN_REQUESTS, History, Story
from apt_jax.serve.observability.tracing import Tracing
from apt_jax.serve.runtime.observer import Stepped
from tests.support.asgi_service import run, serving, until
from tests.support.fake_engine import CharTokenizer, FakeEngine


def test_the_last_plans_and_each_request_s_story_give_reasons():
    engine = FakeEngine(tokenizer=CharTokenizer(), paced=True)

    async def main():
        async with serving(engine) as client:
            body = {"prompt": ["abc"] * 6, "max_tokens": 3}  # of which 4 run at once
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            await until(lambda: engine.has_unfinished)
            engine.allow_step(100)
            reply = (await task).json()
            story = (await client.get(f"/debug/requests/{reply['id']}")).json()
            assert [s["id"] for s in story["samples"]] == [f"{reply['id']}-{i}" for i in range(6)]
            first, last = story["samples"][0], story["samples"][-1]
            assert [(e["action"], e["reason"], e["steps"]) for e in first["events"]] == [
                ("scheduled", Reason.ADMITTED_KV.value, 1),
                ("scheduled", Reason.DECODES.value, 2),
                ("finished", "length", 1),
            ]
            assert last["events"][0]["action"] == "waited" and last["events"][0]["steps"] >= 2
            assert last["status"] == "finished" and last["slo"]["attained"] and last["tokens"] == 3
            assert (await client.get(f"/debug/requests/{reply['id']}-2")).json()["samples"][0]["id"].endswith("-2")
            assert len(first["token_ms"]) == 3 and first["token_ms"] == sorted(first["token_ms"])
            assert first["events"][0]["tokens"] == 4 and first["arrived_ago_ms"] > first["token_ms"][-1]
            newest = (await client.get("/debug/requests")).json()["requests"]
            assert {entry["id"] for entry in newest} == {sample["id"] for sample in story["samples"]}
            assert {(entry["finish_reason"], entry["tokens"], entry["doing"]) for entry in newest} == {
                ("length", 3, "length")
            }
            plans = (await client.get("/debug/plans?last=2")).json()
            assert plans["policy"] == "fcfs" and len(plans["plans"]) == 2
            assert plans["plans"][-1]["scheduled"][0]["reason"] == Reason.DECODES.value
            for path, status in (
                ("/debug/requests/none", 404),
                ("/debug/plans?last=0", 400),
                ("/debug/plans?last=x", 400),
            ):
                assert (await client.get(path)).status_code == status

    run(main)


def test_the_state_shows_what_the_dashboard_needs():
    engine = FakeEngine(tokenizer=CharTokenizer())

    async def main():
        async with serving(engine) as client:
            fast, slow = {"prompt": "a", "max_tokens": 5}, {"prompt": "a", "max_tokens": 5, "slo": {"tbt_ms": 0.001}}
            for body in (fast, fast, fast, slow):
                await client.post("/v1/completions", json=body)
            state = (await client.get("/debug/state")).json()
            assert state["strict_attainment"] == state["attainment"] == 0.75 and state["requests"] == 4
            assert state["ttft_ms"]["p50"] <= state["ttft_ms"]["p99"] and state["tbt_ms"]["p99"] > 0
            assert state["blocks"] == {"kv": 0, "hidden": 0, "free": 64} and state["policy"] == "fcfs"
            assert state["plans"][-1]["summary"] == ["1 request decodes its next token"] and state["can_chat"] is False
            assert state["version"] == VERSION and 0 <= state["uptime_s"] < 300
            assert state["counts"]["preemptions"] == 0

    run(main)


def test_histories_are_bounded():
    engine = FakeEngine()
    history = History()
    request = None
    for number in range(KEPT_REQUESTS + 10):
        request = engine.add([1], SamplingParams(max_tokens=1), request_id=str(number))
        engine.state.waiting.clear()
        history.stepped(engine.figures(), Stepped([Output(request, "", (), (), FinishReason.ABORT)], (), 0.0))
        engine._requests.clear()
    assert history.of("0") == [] and len(history._stories) == KEPT_REQUESTS
    story = Story(request)
    for i in range(KEPT_EVENTS + 5):
        story.add("waited", str(i), float(i))
    assert len(story.events) == KEPT_EVENTS and story.events[-1].reason == str(KEPT_EVENTS + 4)
    assert [event.reason for event in story.events[:KEPT_FIRST]] == [str(i) for i in range(KEPT_FIRST)]
    assert story.num_forgotten == 5 and story.events[KEPT_FIRST].reason == str(KEPT_FIRST + 5)
    assert len(history.newest()) == SHOWN_REQUESTS and history.newest()[0]["finish_reason"] is None


def told(plans) -> History:
    """What a history makes of these plans, a second apart."""
    engine, history = FakeEngine(), History()
    for number, plan in enumerate(plans):
        engine.last_plan = plan
        history.stepped(engine.figures(), Stepped([], (), float(number)))
    return history


REQUESTS = [Request(f"r{i}", [1], SamplingParams(), 0.0, 1) for i in range(5)]
ACTIONS = st.sampled_from(["scheduled", "preempted", "waits for blocks", "waits behind", "absent"])


@given(st.lists(st.tuples(*[ACTIONS] * len(REQUESTS)), max_size=12), st.randoms(use_true_random=False))
def test_a_story_is_what_the_plans_say_step_by_step(steps, shuffle):
    plans = []
    for actions in steps:
        of = {name: [r for r, a in zip(REQUESTS, actions, strict=True) if a == name] for name in set(actions)}
        groups = [
            Waited((request,), reason)
            for name, reason in (("waits for blocks", Reason.WAITS_FOR_BLOCKS), ("waits behind", Reason.WAITS_BEHIND))
            for request in of.get(name, [])
        ]
        shuffle.shuffle(groups)
        plans.append(
            Plan(
                scheduled=tuple(Scheduled(r, 1, CacheKind.KV, Reason.DECODES) for r in of.get("scheduled", [])),
                preempted=tuple(Preempted(r, Reason.PREEMPTED_LATE) for r in of.get("preempted", [])),
                waited=tuple(groups),
            )
        )
    for length in range(len(plans) + 1):  # after every step, not only the last
        history, expected = told(plans[:length]), {r.request_id: Story(r) for r in REQUESTS}
        for number, plan in enumerate(plans[:length]):
            for action, request, reason in plan.decisions():
                expected[request.request_id].add(action, reason.value, float(number), int(action == "scheduled"))
        for name, story in expected.items():
            shown = [s["events"] for s in history.of(name)]
            events = [
                {
                    "action": e.action,
                    "reason": e.reason,
                    "after_ms": 1000 * e.first_s,
                    "until_ms": 1000 * e.last_s,
                    "steps": e.count,
                    **({"tokens": e.tokens} if e.tokens else {}),
                }
                for e in story.events
            ]
            assert shown == ([events] if events else [])


def test_waiting_on_costs_nothing_per_step(monkeypatch):
    added = []
    add = Story.add
    monkeypatch.setattr(Story, "add", lambda story, *event: added.append(event) or add(story, *event))
    waiting = tuple(Request(f"w{i}", [1], SamplingParams(), 0.0, 1) for i in range(1000))
    plans = [Plan(waited=(Waited(waiting[i // 10 :], Reason.WAITS_FOR_SEQUENCES),)) for i in range(100)]
    history = told(plans)  # one leaves every ten steps
    assert len(added) == 1000
    assert history.of("w999")[0]["events"][0]["steps"] == 100 and history.of("w3")[0]["events"][0]["steps"] == 40


def test_profiling_is_off_unless_enabled(tmp_path):
    async def main():
        async with serving(FakeEngine()) as client:
            reply = await client.post("/debug/profile")
            assert reply.status_code == 403 and "--enable-profiler" in reply.text
        async with serving(FakeEngine(), enable_profiler=True, profile_dir=str(tmp_path)) as client:
            assert (await client.post("/debug/profile", json={"seconds": 0})).status_code == 400
            tasks = [asyncio.create_task(client.post("/debug/profile", json={"seconds": 0.2})) for _ in range(2)]
            replies = [await task for task in tasks]
            assert sorted(reply.status_code for reply in replies) == [200, 409]

    run(main)
    assert list(tmp_path.rglob("*.xplane.pb")), "a recording is there"


def test_a_request_is_a_trace():
    exporter = InMemorySpanExporter()
    tracing = Tracing("http://127.0.0.1:1/", "tiny", exporter)

    async def main():
        async with serving(FakeEngine(tokenizer=CharTokenizer())) as client:
            client.service.backend.observers.append(tracing)
            await client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5})

    run(main)
    tracing.close()
    (span,) = exporter.get_finished_spans()
    assert span.name == "llm_request" and span.end_time > span.start_time
    assert span.attributes["gen_ai.usage.completion_tokens"] == 5 and span.attributes["apt.slo_attained"]
    assert [event.name for event in span.events] == ["scheduled", "first token"]
    assert json.loads(span.to_json())["resource"]["attributes"]["service.name"] == "apt-jax"


def test_tracing_without_its_packages_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match=r"pip install 'apt-jax\[otel\]'"):
        Tracing("http://127.0.0.1:1/", "tiny")
