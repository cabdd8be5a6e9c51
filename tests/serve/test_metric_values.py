"""What each metric counts, after outputs and plans made by hand."""

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from apt_jax.cache import CacheKind
from apt_jax.output import Output
from apt_jax.request import FinishReason, Slo
from apt_jax.scheduling.plan import Converted, Plan, Preempted, Reason, Scheduled, Waited
from apt_jax.serve.observability.engine_metrics import EngineMetrics
from apt_jax.serve.observability.metrics import Metrics
from apt_jax.serve.observability.request_metrics import REASONS, REJECTIONS, SLOS, STAGES, RequestMetrics
from apt_jax.serve.replicas.fleet_view import FleetMetrics
from apt_jax.serve.runtime.observer import Stepped
from tests.support.engine_figures import figures_of
from tests.support.scheduling_loop import make_state, request
from tests.support.tiny_states import run, wait

KV = CacheKind.KV
METRICS_PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def reader(metrics):
    """Looks up a sample by its name on the wire, 0 if it does not exist."""

    def value(name, **labels):
        return metrics.registry.get_sample_value(name, {"model_name": "m", **labels}) or 0.0

    return value


def output(of, tokens=1, reason=None):
    return Output(of, "", (5,) * tokens, (), reason)


def done(ttft_s=0.5, gaps_s=(), reason=FinishReason.STOP, name=None):
    """A request of 8 prompt tokens that arrived at 10 s, was scheduled at 10.25 s and has ended; stall limit 2 s."""
    ended = request(8, slo=Slo(1.0, 0.5, 2.0), arrival_s=10.0, name=name)
    ended.first_scheduled_s, ended.first_token_s = 10.25, 10.0 + ttft_s
    ended.gaps_s, ended.last_token_s = list(gaps_s), 10.0 + ttft_s + sum(gaps_s)
    ended.output_token_ids, ended.finish_reason = [5] * (1 + len(gaps_s)), reason
    return ended


def judged(value):
    return {
        slo: (value("apt:slo_attained_total", slo=slo), value("apt:slo_missed_total", slo=slo))
        for slo in ("strict", "both", "ttft", "tbt")
    }


@pytest.mark.parametrize(
    ("ended", "kept"),
    [
        (done(1.0, [0.5]), "strict both ttft tbt"),
        (done(1.0, [0.25] * 99 + [2.0]), "strict both ttft tbt"),
        (done(1.0, [0.25] * 99 + [2.25]), "both ttft tbt"),  # the one gap in a hundred that only the paper forgives
        (done(1.25, [0.5]), "tbt"),
        (done(1.0, [0.75]), "ttft"),
        (done(1.25, [0.75]), ""),
        (done(reason=FinishReason.ERROR), ""),
        (done(reason=FinishReason.ABORT), ""),
        (done(reason=FinishReason.ABANDONED), ""),
    ],
)
def test_which_promise_a_request_kept(ended, kept):
    metrics = RequestMetrics("m")
    metrics.brought(Stepped((output(ended, reason=ended.finish_reason),), (), 0.0))
    slos = ("strict", "both", "ttft", "tbt")
    assert judged(reader(metrics)) == {slo: (1.0, 0.0) if slo in kept.split() else (0.0, 1.0) for slo in slos}


def test_the_longest_gap_of_each_request_that_has_one_is_observed_however_it_ended():
    metrics = RequestMetrics("m")
    for ended in (done(1.0, [0.25, 2.25, 0.5]), done(1.0), done(1.0, [4.0, 0.5], FinishReason.ABORT)):
        metrics.brought(Stepped((output(ended, reason=ended.finish_reason),), (), 0.0))
    value = reader(metrics)
    name = "apt:request_longest_gap_seconds"
    assert (value(f"{name}_count"), value(f"{name}_sum")) == (2.0, 6.25)


def test_counters_exist_with_every_value_of_their_label_before_anything_happens():
    """So that shares and alerts have a figure: a rate of what does not exist yet is nothing."""
    value = RequestMetrics("m").registry.get_sample_value
    labels = {
        "apt:slo_attained_total": ("slo", ("strict", "both", "ttft", "tbt")),
        "apt:slo_missed_total": ("slo", ("strict", "both", "ttft", "tbt")),
        "apt:requests_rejected_total": (
            "reason",
            (
                "queue_full",
                "predicted_late",
                "not_ready",
                "timeout",
                "bad_request",
                "model_not_found",
                "body_too_large",
                "unsupported_media_type",
            ),
        ),
        "apt:requests_abandoned_total": ("stage", ("waiting", "running")),
        "vllm:request_success_total": ("finished_reason", ("stop", "length", "abort", "error", "abandoned")),
    }
    for name, (label, values) in labels.items():
        for each in values:
            assert value(name, {"model_name": "m", label: each}) == 0.0, (name, each)
    for text in (RequestMetrics("m"), Metrics("m"), FleetMetrics("m")):
        for family in text_string_to_metric_families(text.text().decode()):
            assert family.type != "counter" or family.samples, f"{family.name} does not exist until something happens"


def test_the_values_of_labels_are_the_documented_ones():
    rows = [line for line in METRICS_PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]
    for metric, values in (
        ("apt:requests_rejected_total{reason}", REJECTIONS), ("vllm:request_success_total{finished_reason}", REASONS),
        ("apt:slo_attained_total{slo}", SLOS), ("apt:requests_abandoned_total{stage}", STAGES),
    ):  # fmt: skip
        (row,) = [row for row in rows if f"`{metric}`" in row]
        assert {value for value in values if f"`{value}`" not in row} == set(), metric


def test_tokens_of_requests_that_were_kept_strictly_count_when_they_end():
    metrics = RequestMetrics("m")
    for ended in (done(1.0, [0.5]), done(1.0, [0.25] * 99 + [2.25]), done(reason=FinishReason.ABANDONED), done(0.5)):
        metrics.brought(Stepped((output(ended, reason=ended.finish_reason),), (), 0.0))
    assert reader(metrics)("apt:kept_generation_tokens_total") == 2 + 1


def test_what_its_client_gave_up_is_counted_and_not_judged():
    metrics = RequestMetrics("m")
    gone = done(reason=FinishReason.ABORT, name="gone")
    metrics.brought(Stepped((output(gone, 0, FinishReason.ABORT),), {"gone"}, 0.0))
    value = reader(metrics)
    assert judged(value) == dict.fromkeys(("strict", "both", "ttft", "tbt"), (0.0, 0.0))
    assert value("vllm:request_success_total", finished_reason="abort") == 1.0


def test_a_first_token_a_later_one_and_the_last():
    metrics = RequestMetrics("m")
    value = reader(metrics)
    first, later = done(0.5), done(0.5, [0.25])
    metrics.brought(Stepped((output(first), output(later)), (), 0.0))
    assert value("vllm:generation_tokens_total") == 2 and value("vllm:prompt_tokens_total") == 8
    assert value("vllm:time_to_first_token_seconds_count") == 1 and value("vllm:time_to_first_token_seconds_sum") == 0.5
    assert value("vllm:request_queue_time_seconds_sum") == 0.25 and value("vllm:request_prompt_tokens_sum") == 8
    assert (value("vllm:inter_token_latency_seconds_count"), value("vllm:inter_token_latency_seconds_sum")) == (1, 0.25)
    assert value("vllm:e2e_request_latency_seconds_count") == 0, "nobody has ended"
    last = done(0.5, [0.25, 0.75])
    metrics.brought(Stepped((output(last, reason=FinishReason.LENGTH),), (), 0.0))
    assert (value("vllm:inter_token_latency_seconds_count"), value("vllm:inter_token_latency_seconds_sum")) == (2, 1.0)
    assert value("vllm:e2e_request_latency_seconds_sum") == 1.5
    assert value("vllm:request_time_per_output_token_seconds_sum") == (1.5 - 0.5) / 2
    assert value("vllm:request_generation_tokens_sum") == 3 and value("vllm:generation_tokens_total") == 3
    assert value("vllm:request_success_total", finished_reason="length") == 1


def test_a_single_token_has_no_time_between_tokens_and_text_without_a_token_is_none():
    metrics = RequestMetrics("m")
    value = reader(metrics)
    metrics.brought(Stepped((output(done(), reason=FinishReason.STOP), output(done(), 0)), (), 0.0))
    assert value("vllm:request_time_per_output_token_seconds_count") == 0
    assert (value("vllm:e2e_request_latency_seconds_count"), value("vllm:generation_tokens_total")) == (1, 1)
    assert value("vllm:time_to_first_token_seconds_count") == 1
    metrics.brought(Stepped((output(done(0.5, [0.25]), reason=FinishReason.STOP),), (), 0.0))
    assert value("vllm:request_time_per_output_token_seconds_sum") == 0.25, "two tokens have one"


@pytest.mark.parametrize(
    ("reason", "missed"),
    [
        ("queue_full", 1),
        ("predicted_late", 1),
        ("not_ready", 1),
        ("timeout", 1),
        ("bad_request", 0),
        ("body_too_large", 0),
    ],
)
def test_a_refusal_misses_the_promise_where_the_server_is_at_fault(reason, missed):
    metrics = RequestMetrics("m")
    metrics.reject(reason)
    value = reader(metrics)
    assert value("apt:requests_rejected_total", reason=reason) == 1
    assert judged(value) == dict.fromkeys(("strict", "both", "ttft", "tbt"), (0.0, float(missed)))


def test_samples_that_were_lost_are_errors_and_missed():
    metrics = RequestMetrics("m")
    metrics.lost([object(), object()])
    value = reader(metrics)
    assert value("vllm:request_success_total", finished_reason="error") == 2
    assert judged(value) == dict.fromkeys(("strict", "both", "ttft", "tbt"), (0.0, 2.0))


def step(metrics, state, plan=None, outputs=(), **figures):
    metrics.stepped(figures_of(state, plan, **figures), Stepped(outputs, (), 0.0))


def test_levels_of_queues_and_blocks():
    metrics, state = EngineMetrics("m"), make_state(20, mode="hybrid")
    value = reader(metrics)
    run(state, "a")
    run(state, "b", 8, kind=CacheKind.HIDDEN)
    wait(state, "c")
    step(metrics, state)
    assert (value("vllm:num_requests_running"), value("vllm:num_requests_waiting")) == (2, 1)
    assert value("vllm:kv_cache_usage_perc") == pytest.approx(4 / 20)
    assert [value("apt:cache_blocks", kind=kind) for kind in ("kv", "hidden", "free")] == [2, 2, 16]
    metrics.idle(figures_of(make_state(20)), lost_blocks=3)
    assert (value("apt:idle_lost_blocks"), value("vllm:num_requests_running")) == (3, 0)
    metrics.ready(figures_of(make_state(20)))
    assert value("apt:cache_blocks", kind="free") == 20


def test_blocks_in_host_memory_and_copied_since_the_start():
    metrics, state = EngineMetrics("m"), make_state(20)
    value = reader(metrics)
    assert [value("apt:host_cache_copied_blocks_total", direction=way) for way in ("out", "in")] == [0, 0]
    step(metrics, state, host_blocks=5, host_saved=6, host_restored=2)
    step(metrics, state, host_blocks=4, host_saved=8, host_restored=5)
    assert value("apt:host_cache_blocks") == 4
    assert [value("apt:host_cache_copied_blocks_total", direction=way) for way in ("out", "in")] == [8, 5]


def test_what_plans_did_is_summed():
    metrics, state = EngineMetrics("m"), make_state(20)
    value = reader(metrics)
    a, b = request(name="a"), request(name="b")
    plan = Plan(
        (Scheduled(a, 1, KV, Reason.DECODES), Scheduled(b, 1, KV, Reason.DECODES)),
        (Preempted(a, Reason.PREEMPTED_NO_BLOCKS), Preempted(b, Reason.PREEMPTED_NO_BLOCKS)),
        (Converted(a, Reason.CONVERTED_MEMORY_FREE),),
    )
    for each in (plan, plan, Plan()):
        step(metrics, state, each)
    assert (value("vllm:num_preemptions_total"), value("apt:cache_conversions_total")) == (4, 2)
    assert (value("apt:batch_requests_count"), value("apt:batch_requests_sum")) == (2, 4), "an empty plan is no batch"
    assert (value("apt:schedule_seconds_count"), value("apt:schedule_seconds_sum")) == (3, 0.75)


def test_a_late_request_is_demoted_once_until_it_ends():
    metrics, state = EngineMetrics("m"), make_state(20)
    value = reader(metrics)
    a, b, c = (request(name=name) for name in "abc")
    step(metrics, state, Plan(waited=(Waited((a, b), Reason.WAITS_LATE), Waited((c,), Reason.WAITS_BEHIND))))
    assert value("apt:late_demotions_total") == 2
    step(metrics, state, Plan(waited=(Waited((a, b), Reason.WAITS_LATE),)))
    step(metrics, state, Plan(waited=(Waited((b, c), Reason.WAITS_LATE),)))
    assert value("apt:late_demotions_total") == 3
    late = Plan(preempted=(Preempted(a, Reason.PREEMPTED_LATE), Preempted(c, Reason.PREEMPTED_NO_BLOCKS)))
    step(metrics, state, late)
    assert value("apt:late_demotions_total") == 3, "a was demoted before"
    step(metrics, state, outputs=(output(a), output(b, reason=FinishReason.STOP)))
    step(metrics, state, late)
    step(metrics, state, Plan(preempted=(Preempted(b, Reason.PREEMPTED_LATE),)))
    assert value("apt:late_demotions_total") == 4, "b ended, and another of its name is late"
    metrics.failed(figures_of(state))
    step(metrics, state, late)
    assert value("apt:late_demotions_total") == 5


def test_numbers_outside_their_range_are_counted_by_what_is_new():
    metrics, state = EngineMetrics("m"), make_state(20)
    value = reader(metrics)
    for count in (0, 7, 7, 12):
        step(metrics, state, num_outside_range=count)
        assert value("apt:cache_values_outside_range_total") == count


def test_failures_and_compilations_of_the_engine_are_counted_by_what_is_new():
    metrics, state = EngineMetrics("m"), make_state(20)
    value = reader(metrics)
    for failed, compiled in ((0, 0), (2, 1), (2, 1), (3, 4)):
        step(metrics, state, num_failed_steps=failed, num_recompiles=compiled)
    assert (value("apt:failed_steps_total"), value("apt:recompiles_after_warmup_total")) == (3, 4)
    metrics.failed(figures_of(state, num_failed_steps=3, num_recompiles=4))
    assert value("apt:failed_steps_total") == 4, "a step that raised"


def test_where_the_time_of_a_request_went():
    metrics = RequestMetrics("m")
    ended = done(1.0, [0.5, 0.25])
    first = output(ended, reason=ended.finish_reason)
    metrics.brought(Stepped((first,), (), 0.0))
    value = reader(metrics)
    assert value("vllm:request_decode_time_seconds_sum") == pytest.approx(0.75)
    assert value("vllm:request_inference_time_seconds_sum") == pytest.approx(1.5)
    assert value("vllm:request_params_max_tokens_count") == 1


def test_waiting_by_reason_is_of_the_last_step():
    metrics = EngineMetrics("m")
    value = metrics.registry.get_sample_value
    name = "vllm:num_requests_waiting_by_reason"
    waiting = [done(1.0), done(1.0), done(1.0)]
    plan = Plan(waited=(Waited(tuple(waiting[:2]), Reason.WAITS_FOR_BLOCKS), Waited((waiting[2],), Reason.WAITS_LATE)))
    step = Stepped((), (), 0.0)
    metrics.stepped(figures_of(make_state(), plan, num_waiting=3), step)
    labels = {"model_name": "m"}
    assert [value(name, {**labels, "reason": reason}) for reason in ("blocks", "late", "behind")] == [2, 1, 0]
    metrics.stepped(figures_of(make_state()), step)
    assert [value(name, {**labels, "reason": reason}) for reason in ("blocks", "late")] == [0, 0]


def test_nothing_says_when_a_metric_was_created():
    assert "_created" not in Metrics("m").text().decode()
    assert (
        'apt:build_info{jax="' in Metrics("m").text().decode() and b"process_cpu_seconds_total" in Metrics("m").text()
    )
