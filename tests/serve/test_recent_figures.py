"""The dashboard's minute, a response's SLO report and who is refused as late: figures worked out by hand."""

import math
from types import SimpleNamespace

import pytest

from apt_jax.cache import CacheKind
from apt_jax.output import Output
from apt_jax.request import FinishReason, SamplingParams, Slo
from apt_jax.scheduling.plan import Plan, Reason, Scheduled
from apt_jax.serve.errors import PredictedLate
from apt_jax.serve.observability import recent as recent_module
from apt_jax.serve.observability.recent import Recent
from apt_jax.serve.openai.slo_report import slo_report
from apt_jax.serve.runtime import admission as admission_module
from apt_jax.serve.runtime.admission import Admission
from apt_jax.serve.runtime.observer import Stepped
from apt_jax.serve.runtime.samples import fan_out
from tests.support.engine_figures import engine_of, figures_of
from tests.support.scheduling_loop import make_state, request
from tests.support.tiny_states import run, wait

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN


@pytest.fixture
def clock(monkeypatch):
    """The clock of the modules under test; set `.now`."""
    found = SimpleNamespace(now=1000.0)
    found.monotonic = lambda: found.now
    for module in (recent_module, admission_module):
        monkeypatch.setattr(module, "time", found)
    return found


def ended(reason=FinishReason.STOP, ttft_s=0.5, gaps_s=(), slo=None, name=None):
    """A request after its last token."""
    done = request(slo=slo or Slo(1.0, 0.5), arrival_s=10.0, name=name)
    done.first_token_s = None if ttft_s is None else 10.0 + ttft_s
    done.gaps_s, done.finish_reason = list(gaps_s), reason
    return done


def output(of, tokens=1, reason=None):
    return Output(of, "", (5,) * tokens, (), reason)


def brought(figures, *outputs, cancelled=()):
    figures.brought(Stepped(outputs, cancelled, 0.0))


def stepped(figures, num_scheduled):
    plan = Plan(tuple(Scheduled(request(), 1, KV, Reason.DECODES) for _ in range(num_scheduled)))
    figures.stepped(figures_of(make_state(), plan), Stepped((), (), 0.0))


def test_nothing_has_happened():
    assert Recent().figures() == {
        "window_s": 60.0, "requests": 0, "strict_attainment": None, "attainment": None, "tokens_per_s": 0.0,
        "ttft_ms": None, "tbt_ms": None, "batch_requests": None, "longest_gap_ms": None, "turned_away": None,
        "kept_tokens_per_s": 0.0,
    }  # fmt: skip


def test_first_tokens_gaps_and_batches_of_a_minute(clock):
    figures = Recent()
    brought(figures, output(ended(ttft_s=0.25)), output(ended(ttft_s=0.5)), output(ended(gaps_s=[9.0, 0.125])))
    brought(figures, output(ended(ttft_s=None), tokens=0), output(ended(ttft_s=0.75), tokens=0))
    for count in (1, 2, 6):
        stepped(figures, count)
    found = figures.figures()
    assert found["ttft_ms"] == {"p50": 500.0, "p90": 500.0, "p99": 500.0}
    assert found["tbt_ms"] == {"p50": 125.0, "p90": 125.0, "p99": 125.0}, "the newest gap, not the first"
    assert found["tokens_per_s"] == pytest.approx(3 / 60) and found["batch_requests"] == 3.0


def test_percentiles_are_the_value_above_that_share(clock):
    figures = Recent()
    brought(figures, *(output(ended(ttft_s=k / 8)) for k in (7, 1, 9, 3, 5, 2, 8, 4, 10, 6)))
    assert figures.figures()["ttft_ms"] == {"p50": 750.0, "p90": 1250.0, "p99": 1250.0}
    figures = Recent()
    brought(figures, *(output(ended(ttft_s=k / 8)) for k in range(200)))
    assert figures.figures()["ttft_ms"] == {"p50": 12_500.0, "p90": 22_500.0, "p99": 24_750.0}


def test_attainment_counts_those_that_ended_failed_and_were_refused(clock):
    figures = Recent()
    kept, missed = ended(), ended(ttft_s=2.0)
    brought(figures, output(kept, reason=FinishReason.STOP), output(missed, reason=FinishReason.LENGTH))
    assert (figures.figures()["requests"], figures.figures()["attainment"]) == (2, 0.5)
    figures.refused()
    figures.refused()
    assert (figures.figures()["requests"], figures.figures()["attainment"]) == (4, 0.25)
    brought(figures, output(ended(FinishReason.ERROR), 0, FinishReason.ERROR))
    brought(figures, output(ended(), 1, None))
    assert (figures.figures()["requests"], figures.figures()["attainment"]) == (5, 0.2)


def test_requests_that_are_lost_without_an_output_have_missed(clock):
    """As in the metrics: a step failed, or a replica died."""
    figures = Recent()
    brought(figures, output(ended(), reason=FinishReason.STOP))
    figures.lost([None, None, None])
    found = figures.figures()
    assert (found["requests"], found["strict_attainment"], found["attainment"]) == (4, 0.25, 0.25)


def test_the_share_that_was_refused_or_ended(clock):
    figures = Recent()
    brought(figures, output(ended(), reason=FinishReason.STOP), output(ended(ttft_s=9.0), reason=FinishReason.LENGTH))
    brought(figures, output(ended(FinishReason.ABANDONED, ttft_s=None), 0, FinishReason.ABANDONED))
    figures.refused()
    assert (figures.figures()["requests"], figures.figures()["turned_away"]) == (4, 0.5)


def test_the_longest_gap_of_the_minute_is_found_however_many_came_after_it(clock):
    figures, long, short = Recent(), output(ended(gaps_s=[3.5])), output(ended(gaps_s=[0.25]))
    for gap in (short, long, short):
        brought(figures, gap)
        clock.now += 15.0
    brought(figures, *[short] * 30_000)
    assert figures.figures()["longest_gap_ms"] == 3500.0
    clock.now += 31.0
    assert figures.figures()["longest_gap_ms"] == 250.0, "the long one came more than a minute ago"


def test_tokens_of_requests_that_were_kept_strictly(clock):
    """12 tokens in a minute; 30 of one that stood still and 6 of one that was ended do not count."""
    figures = Recent()
    for tokens, done in ((12, ended()), (30, ended(gaps_s=[1.25])), (6, ended(FinishReason.ABANDONED))):
        done.output_token_ids = [5] * tokens
        brought(figures, output(done, reason=done.finish_reason))
    assert figures.figures()["kept_tokens_per_s"] == 12 / 60


def test_a_freeze_counts_in_the_strict_share_alone(clock):
    figures = Recent()
    for gaps_s in ([0.25] * 100, [0.25] * 99 + [1.25], [0.75]):  # the SLO is 0.5 s, no gap may take over 1 s
        brought(figures, output(ended(gaps_s=gaps_s), reason=FinishReason.STOP))
    found = figures.figures()
    assert (found["strict_attainment"], found["attainment"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_what_its_client_gave_up_does_not_count_and_what_the_server_aborted_does(clock):
    figures = Recent()
    gone, stopped = ended(FinishReason.ABORT, name="gone"), ended(FinishReason.ABORT, name="stopped")
    brought(
        figures, output(gone, 0, FinishReason.ABORT), output(stopped, 0, FinishReason.ABORT), cancelled={"gone"}
    )  # fmt: skip
    assert (figures.figures()["requests"], figures.figures()["attainment"]) == (1, 0.0)


def test_the_minute_ends_after_sixty_seconds(clock):
    figures = Recent()
    brought(figures, output(ended(), reason=FinishReason.STOP), output(ended(gaps_s=[0.25])))
    stepped(figures, 4)
    clock.now += 60.0
    figures.refused()
    found = figures.figures()
    assert (found["requests"], found["attainment"], found["batch_requests"]) == (2, 0.5, 4.0)
    clock.now += 0.25
    found = figures.figures()
    assert (found["requests"], found["attainment"], found["batch_requests"]) == (1, 0.0, None)
    assert (found["ttft_ms"], found["tbt_ms"], found["tokens_per_s"]) == (None, None, 0.0)


def test_figures_count_everything_however_much_happens_in_a_minute(clock):
    figures, token = Recent(), output(ended(gaps_s=[0.25]))
    for _ in range(600):
        brought(figures, *[token] * 100, *[output(ended(), reason=FinishReason.STOP)] * 50)
        stepped(figures, 2)
        clock.now += 0.1
    found = figures.figures()
    assert found["tokens_per_s"] == pytest.approx(1500, rel=0.01)
    assert (found["requests"], found["attainment"], found["batch_requests"]) == (30_000, 1.0, 2.0)
    clock.now += 30.0
    assert figures.figures()["tokens_per_s"] == pytest.approx(750, rel=0.01)


def test_the_report_of_two_samples_is_of_the_worse_one():
    first, second = ended(gaps_s=[0.25, 0.5]), ended(ttft_s=0.75, gaps_s=[0.125])
    first.first_scheduled_s, second.first_scheduled_s = 10.25, 10.125
    first.cache_history, second.cache_history = [HIDDEN, KV], [KV]
    first.num_preemptions, second.num_preemptions = 1, 2
    first.num_conversions, second.num_conversions = 3, 4
    assert slo_report([first, second]) == {
        "attained_strict": True, "attained": True, "abandoned": False,
        "ttft_ms": 750.0, "p99_tbt_ms": 500.0, "longest_gap_ms": 500.0,
        "ttft_slo_ms": 1000.0, "tbt_slo_ms": 500.0, "stall_slo_ms": 1000.0,
        "cache_kinds": ["hidden", "kv"], "queue_ms": 250.0, "preemptions": 3, "conversions": 7,
    }  # fmt: skip
    second.gaps_s = [0.5005]
    found = slo_report([first, second])
    assert (found["attained"], found["p99_tbt_ms"], found["longest_gap_ms"]) == (False, 500.5, 500.5)
    second.gaps_s = [0.125] * 99 + [1.5]
    found = slo_report([first, second])
    assert (found["attained_strict"], found["attained"], found["longest_gap_ms"]) == (False, True, 1500.0)
    second.finish_reason = FinishReason.ABANDONED
    found = slo_report([first, second])
    assert (found["attained_strict"], found["attained"], found["abandoned"]) == (False, False, True)


def test_a_sample_without_a_token_leaves_times_unknown():
    first, never = ended(), ended(FinishReason.ABORT, ttft_s=None)
    first.first_scheduled_s = 10.5
    report = slo_report([first, never])
    assert (report["ttft_ms"], report["queue_ms"], report["attained"], report["p99_tbt_ms"]) == (None, None, False, 0.0)
    assert slo_report([first])["queue_ms"] == 500.0


def test_the_rate_of_prefill_fades_by_a_third_in_ten_busy_seconds():
    for seconds, known in ((0.49, False), (0.5, True)):
        admission = Admission()
        admission.learn(100, seconds)
        assert (admission.tokens_per_s is not None) is known
    admission = Admission()
    admission.learn(100, 1.0)
    assert admission.tokens_per_s == pytest.approx(100.0)
    admission.learn(30, 10.0)
    assert admission.tokens_per_s == pytest.approx((100 / math.e + 30) / (1 / math.e + 10))


def test_it_learns_from_prompts_while_anybody_waits(clock):
    admission, state = Admission(), make_state(100)
    entries = (
        Scheduled(request(), 300, KV, Reason.ADMITTED_KV), Scheduled(request(), 200, KV, Reason.CONTINUES_PREFILL),
        Scheduled(request(), 1, KV, Reason.DECODES),
    )  # fmt: skip
    clock.now = 102.0
    admission.stepped(figures_of(state, Plan(entries[2:])), Stepped((), (), 90.0))
    assert admission.tokens_per_s is None, "a step of decodes while nobody waits tells nothing"
    admission.stepped(figures_of(state, Plan(entries)), Stepped((), (), 100.0))
    assert admission.tokens_per_s == pytest.approx(250.0)
    wait(state, "waits")
    clock.now = 104.0
    admission.stepped(figures_of(state, Plan(entries[2:])), Stepped((), (), 102.0))
    kept = math.exp(-0.2)
    assert admission.tokens_per_s == pytest.approx(500 * kept / (2 * kept + 2))


def busy_state():
    """40 tokens wait, 12 of a prompt are left, and one decodes."""
    state = make_state(100)
    run(state, "decodes", 8, 3)
    run(state, "chunked", 20, computed=8)
    wait(state, "waits", 40)
    return state


def test_the_wait_is_the_prompts_ahead_and_its_own_over_the_rate():
    admission = Admission()
    samples = fan_out("r", [[1] * 10, [1] * 4], SamplingParams(n=2), slo=Slo(1.0, 1.0))
    assert admission.predicted_ttft_s(engine_of(busy_state()), samples) is None
    admission.learn(16, 2.0)
    assert admission.predicted_ttft_s(engine_of(busy_state()), samples) == pytest.approx((40 + 12 + 2 * 14) / 8)


@pytest.mark.parametrize(
    ("ttft_s", "waited_s", "late_s"),
    [(7.75, 0.0, None), (7.5, 0.0, None), (7.25, 0.0, 0.25), (7.75, 0.5, 0.25), (8.0, 0.5, None)],
)
def test_who_is_refused_as_late(clock, ttft_s, waited_s, late_s):
    """52 tokens ahead and 8 of its own, at 8 a second: 7.5 s."""
    admission = Admission()
    admission.learn(16, 2.0)
    samples = fan_out("r", [[1] * 8], SamplingParams(), slo=Slo(ttft_s, 1.0), arrival_s=clock.now - waited_s)
    if late_s is None:
        admission.check(engine_of(busy_state()), samples)
        return
    with pytest.raises(PredictedLate, match=rf"about {7.5 + waited_s:.1f} s, its SLO is {ttft_s:g} s") as caught:
        admission.check(engine_of(busy_state()), samples)
    assert caught.value.late_s == pytest.approx(late_s)


def test_nobody_is_refused_who_promised_nothing_or_where_nobody_waits(clock):
    admission = Admission()
    admission.learn(16, 2.0)
    hurried = {"slo": Slo(0.01, 1.0)}
    admission.check(engine_of(busy_state()), fan_out("r", [[1] * 8], SamplingParams()))
    free = make_state(100)
    run(free, "chunked", 20, computed=8)
    admission.check(engine_of(free), fan_out("r", [[1] * 8], SamplingParams(), **hurried))
    with pytest.raises(PredictedLate):
        admission.check(engine_of(busy_state()), fan_out("r", [[1] * 8], SamplingParams(), **hurried))
    admission = Admission()
    admission.learn(0, 1.0)
    with pytest.raises(PredictedLate):  # a rate of nothing is no rate unknown
        admission.check(engine_of(busy_state()), fan_out("r", [[1] * 8], SamplingParams(), **hurried))
