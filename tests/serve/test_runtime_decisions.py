"""Small decisions of serve/runtime, each by hand: times as sent, broken promises, groups, the offline loop, caches."""

import asyncio
import os
import sys
from types import SimpleNamespace

import pytest

from apt_jax.output import Output
from apt_jax.request import OFFLINE_SLO, FinishReason, Request, SamplingParams, Slo, Status
from apt_jax.serve.errors import NotReady, PredictedLate
from apt_jax.serve.runtime.admission import ENOUGH_S, Admission
from apt_jax.serve.runtime.driver import Driver
from apt_jax.serve.runtime.engine_thread import REPORT_S, EngineThread
from apt_jax.serve.runtime.group import Group
from apt_jax.serve.runtime.samples import as_sent, fan_out, has_broken_slo, record_of, record_tokens, sample_seed
from apt_jax.serve.runtime.starting.compile_cache import use_compile_cache
from apt_jax.serve.runtime.starting.start_up import StartUp
from apt_jax.serve.runtime.status import EngineStatus
from tests.support.fake_engine import CharTokenizer, FakeEngine


def request(**fields):
    return Request("r", [1, 2], SamplingParams(), 10.0, 4, slo=Slo(1.0, 0.5, 2.0), **fields)


def test_the_record_has_the_times_at_which_tokens_are_sent():
    record = record_of(request(output_token_ids=[7], gaps_s=[9.0]))
    assert (record.output_token_ids, record.gaps_s, record.cache_history) == ([7], [], [])
    record_tokens(record, [5], 11.0)
    assert (record.first_token_s, record.last_token_s, record.gaps_s) == (11.0, 11.0, [])
    record_tokens(record, [6, 8], 11.25)
    record_tokens(record, [9], 12.0)
    assert (record.first_token_s, record.last_token_s, record.gaps_s) == (11.0, 12.0, [0.25, 0.75])
    assert record.output_token_ids == [7, 5, 6, 8, 9]


def test_an_output_as_sent_says_what_the_engine_knew_when_it_ended():
    made = request(first_scheduled_s=10.5, num_preemptions=2, num_conversions=1, stop_reason="x")
    made.status, made.cache_history = Status.FINISHED, ["kv"]
    record = record_of(made)
    record.first_scheduled_s = record.stop_reason = None
    record.num_preemptions = record.num_conversions = 0
    record.status = Status.RUNNING
    first = as_sent(record, Output(made, "a", (5,), (), None), 11.0)
    assert first.request is record and (record.first_scheduled_s, record.first_token_s) == (10.5, 11.0)
    assert (record.num_preemptions, record.stop_reason, record.status) == (0, None, Status.RUNNING)
    record.first_scheduled_s = None
    last = as_sent(record, Output(made, "", (), (), FinishReason.STOP), 12.0)
    assert last.finish_reason is record.finish_reason is FinishReason.STOP
    assert (record.status, record.stop_reason, record.cache_history) == (Status.FINISHED, "x", ["kv"])
    assert (record.num_preemptions, record.num_conversions, record.first_scheduled_s) == (2, 1, 10.5)
    assert record.last_token_s == 11.0, "no token, no time"


@pytest.mark.parametrize(
    ("first_s", "gaps", "now", "is_broken"),
    [
        (None, [], 11.0, False),  # the first token is due just now
        (None, [], 11.001, True),
        (10.75, [], 12.75, False),  # 2 s since the last one, the stall limit
        (10.75, [], 12.751, True),
        (11.5, [], 11.5, True),  # the first came late
        (10.5, [0.5], 11.0, False),
        (10.5, [0.75], 11.25, True),  # over the gap SLO
    ],
)
def test_when_a_client_leaves_over_a_broken_promise(first_s, gaps, now, is_broken):
    record = request(first_token_s=first_s, gaps_s=gaps)
    record.last_token_s = None if first_s is None else first_s + sum(gaps)
    assert has_broken_slo(record, now) is is_broken


@pytest.mark.parametrize(
    ("prompts", "n", "ids"),
    [(1, 1, ["r"]), (2, 1, ["r-0", "r-1"]), (1, 2, ["r-0", "r-1"]), (2, 2, ["r-0-0", "r-0-1", "r-1-0", "r-1-1"])],
)
def test_ids_of_samples(prompts, n, ids):
    samples = fan_out("r", [[1]] * prompts, SamplingParams(n=n))
    assert [sample.request_id for sample in samples] == ids and [s.index for s in samples] == list(range(len(ids)))


def group_of(num_samples=2):
    closed = []
    return Group(fan_out("r", [[1]], SamplingParams(n=num_samples)), closed.append), closed


def output(reason=None):
    return Output(request(), "", (5,), (), reason)


def test_a_group_is_wanted_while_its_client_waits():
    group, closed = group_of()
    assert not group.is_wanted, "it is not queued"
    group.accept()
    assert group.is_wanted and not group.closed
    group.fail(NotReady("stopping"))
    assert group.is_wanted, "the server ends, the client still waits"
    group.fail(ValueError("no"))
    assert not group.is_wanted
    other, closed = group_of()
    other.accept()
    other.abandon()
    assert (other.is_wanted, other.closed, closed) == (False, True, [other])
    other.close()
    assert closed == [other], "closing again changes nothing"


def test_a_group_gives_out_what_has_come_and_ends_with_its_last_sample():
    async def main():
        group, _ = group_of()
        waiting = asyncio.create_task(group.accepted())
        await asyncio.sleep(0)
        assert not waiting.done()
        group.accept()
        await asyncio.wait_for(waiting, 5)
        a, b = group.samples
        begun = asyncio.create_task(group.begun())
        await asyncio.sleep(0)
        group.receive(a, output())
        assert len(await asyncio.wait_for(begun, 5)) == 1, "and it is still to be iterated over"
        group.receive(b, output(FinishReason.STOP))
        found = []
        async for pairs in group:
            found.append([sample for sample, _ in pairs])
            if len(found) == 1:
                group.put_back(pairs[1:])
                assert group.take_pending() == pairs[1:] and group.take_pending() == []
                group.receive(a, output(FinishReason.LENGTH))
        assert found == [[a, b], [a]]

    asyncio.run(asyncio.wait_for(main(), 10))


def test_closing_or_failing_a_group_wakes_who_waits():
    async def main():
        for wait in (Group.accepted, Group.begun):
            group, _ = group_of()
            waiting = asyncio.create_task(wait(group))
            await asyncio.sleep(0)
            group.close()
            await asyncio.wait_for(waiting, 5)
            group, _ = group_of()
            waiting = asyncio.create_task(wait(group))
            await asyncio.sleep(0)
            group.fail(NotReady("stopped"))
            with pytest.raises(NotReady, match="stopped"):
                await asyncio.wait_for(waiting, 5)
        group, closed = group_of()
        group.accept()
        group.expire(NotReady("late"))
        assert closed == [group]
        with pytest.raises(NotReady, match="late"):
            await group.begun()

    asyncio.run(asyncio.wait_for(main(), 10))


def test_the_offline_loop_keeps_as_many_waiting_as_run_at_once_and_aborts_what_is_left():
    engine = FakeEngine(tokenizer=CharTokenizer())
    taken, steps, aborted, abort = [], [], [], engine.abort
    engine.abort = lambda request_id: (aborted.append(request_id), abort(request_id))

    def source():
        for sample in fan_out("r", [[97]] * 200, SamplingParams(max_tokens=2)):
            taken.append(sample)
            yield sample

    driver = Driver(engine, lambda: steps.append(engine.num_waiting))
    loop = driver.run(source())
    sample, first = next(loop)
    assert sample is taken[0] and first.request.slo == OFFLINE_SLO
    assert len(taken) == min(engine.max_num_seqs, engine.config.max_num_queued_reqs) < 200 and len(steps) == 1
    driver.abort(sample.request_id)
    driver.abort("unknown")
    assert aborted == [sample.request_id]
    assert all(known is not sample for known, _ in (next(loop) for _ in range(20)))
    left = set(driver._active)
    loop.close()
    assert driver._active == {} and left and set(aborted) == left | {sample.request_id}
    engine.step()
    assert engine.is_idle, "what is unfinished was aborted"


def test_compiled_programs_of_any_time_and_size_are_kept_in_the_folder_that_is_named(tmp_path, monkeypatch):
    given = {}
    config = SimpleNamespace(update=given.__setitem__)
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(config=config))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "environment"))
    assert use_compile_cache(str(tmp_path / "a/b")) == tmp_path / "a/b" and (tmp_path / "a/b").is_dir()
    assert given == {
        "jax_compilation_cache_dir": str(tmp_path / "a/b"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    assert use_compile_cache(None) == tmp_path / "environment"
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"cannot use .*file/x for compiled programs \(Not a directory\); choose another"
    ):
        use_compile_cache(str(tmp_path / "file/x"))
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "environment")


SECOND = Slo(1.0, 1.0)


def late(admission, *, waiting=1, queued=60, slo=SECOND, arrival_s=None):
    """By how much a request of 40 tokens is predicted to be late; None if it is taken."""
    engine = SimpleNamespace(num_waiting=waiting, load=lambda now: SimpleNamespace(queued_tokens=queued))
    (sample,) = fan_out("r", [[1] * 40], SamplingParams(), slo=slo, arrival_s=arrival_s)
    try:
        admission.check(engine, [sample])
    except PredictedLate as error:
        return error.late_s
    return None


def test_a_request_is_refused_if_the_prompts_ahead_and_its_own_take_longer_than_its_slo():
    admission = Admission()
    assert admission.tokens_per_s is None and late(admission) is None, "nothing is known yet"
    admission.learn(50, ENOUGH_S)
    assert admission.tokens_per_s == pytest.approx(100)  # 100 tokens take 1 s, the SLO
    assert late(admission, slo=Slo(1.001, 1.0)) is None and late(admission, queued=160) == pytest.approx(1.0)
    assert late(admission, queued=160, waiting=0) is None, "so that the rate can be learned again"
    assert late(admission, queued=160, slo=None) is None
    assert late(Admission(), queued=10**9) is None


def test_further_samples_have_seeds_of_64_bits_that_never_change():
    """Snapshots and answers of a seed depend on them."""
    assert (sample_seed(7, 0), sample_seed(None, 3)) == (7, None)
    assert (sample_seed(5, 1), sample_seed(-1, 2)) == (-7718033652045977177, -1712228958632948010)
    drawn = [sample_seed(5, i) for i in range(1, 200)]
    assert len(set(drawn)) == 199 and all(-(2**63) <= seed < 2**63 for seed in drawn)


@pytest.mark.parametrize("status", EngineStatus)
def test_health_is_looked_at_again_and_again_until_the_engine_has_ended(status, monkeypatch):
    thread, looks = EngineThread(FakeEngine), []
    thread.watchdog = SimpleNamespace(report=lambda: looks.append("looked"))
    loop = SimpleNamespace(call_later=lambda seconds, look: looks.append((seconds, look)))
    monkeypatch.setattr("asyncio.get_running_loop", lambda: loop)
    thread.status = status
    thread._report_health()
    ended = status in (EngineStatus.FAILED, EngineStatus.STOPPED)
    assert looks == ([] if ended else ["looked", (REPORT_S, thread._report_health)])


def test_phases_of_a_start_begin_with_the_process_and_are_never_negative(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(
        "apt_jax.serve.runtime.starting.start_up.time", SimpleNamespace(monotonic=lambda: now[0], time=lambda: 50.0)
    )
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(create_time=lambda: 48.0))
    start_up = StartUp()
    now[0] = 103.0
    start_up.ended("imports")
    now[0] = 105.0
    start_up.ended("measuring", compiling_s=1.5)
    assert start_up.phases == {"Python": 2.0, "imports": 3.0, "programs": 1.5, "measuring": 0.5}
    assert start_up.total_s == 7.0 and start_up.text() == "Python 2.0, imports 3.0, programs 1.5, measuring 0.5"
    start_up.ended("more", compiling_s=9.0)
    assert start_up.phases["more"] == 0.0, "another clock than the compiler's"
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(create_time=lambda: 51.0))
    assert StartUp().phases == {"Python": 0.0}, "the machine's clock was put back"
