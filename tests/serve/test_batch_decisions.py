"""Batch jobs and the driver beneath: what each line is given, counted and retried, at every limit."""

import io
import json
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from apt_jax.request import OFFLINE_SLO, FinishReason, SamplingParams, Slo
from apt_jax.serve.batch.batch_file import MAX_LINE_BYTES, ResultFile, count_lines, read_lines
from apt_jax.serve.batch.batch_jobs import BatchJob, LineError, parse_line
from apt_jax.serve.errors import EngineFailure
from apt_jax.serve.openai.generation import ServedModel
from apt_jax.serve.runtime.driver import Driver
from apt_jax.serve.runtime.samples import fan_out
from tests.serve.test_batch_jobs import line, write
from tests.support.fake_engine import CharTokenizer, FakeEngine


def run_job(tmp_path, engine, *lines):
    """A job over these lines; the job, and its results by line."""
    source = write(tmp_path / "in.jsonl", *lines)
    with ResultFile(tmp_path / "out.jsonl") as results, tqdm(total=count_lines(source), file=io.StringIO()) as bar:
        job = BatchJob(engine, ServedModel(engine, "tiny"), partial(read_lines, source), results, bar)
        try:
            job.run()
        finally:
            job.bar_count = bar.n
    found = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    return job, {int(result["id"].split("_")[2]): result for result in found}


class Noting(FakeEngine):
    """Keeps the requests it was given."""

    def __init__(self):
        super().__init__(tokenizer=CharTokenizer())
        self.given = []

    def add(self, *args, **options):
        self.given.append(super().add(*args, **options))
        return self.given[-1]


def test_lines_are_served_without_a_hurry_unless_they_ask_for_it(tmp_path):
    engine = Noting()
    hurried = {"prompt": "a", "max_tokens": 1, "slo": {"ttft_ms": 250}, "priority": 3}
    run_job(tmp_path, engine, line("one"), line("two", hurried))
    assert [r.slo for r in engine.given] == [OFFLINE_SLO, Slo(0.25, OFFLINE_SLO.tbt_s)]
    assert [r.priority for r in engine.given] == [0, 3] and Slo(86_400.0, 86_400.0) == OFFLINE_SLO


def test_only_a_line_that_asks_for_an_slo_is_told_of_it(tmp_path):
    """A day for the first token says nothing, of one sample or several."""
    body = {"prompt": "a", "max_tokens": 2}
    several = line("three", {**body, "n": 2, "slo": {"stall_ms": 7}})
    lines = [line("one"), line("two", {**body, "n": 2}), several, line("four", {**body, "slo": {}})]
    _, results = run_job(tmp_path, FakeEngine(tokenizer=CharTokenizer()), *lines)
    bodies = [results[number]["response"]["body"] for number in (1, 2, 3, 4)]
    assert ["slo" in body for body in bodies] == [False, False, True, False]
    assert ["slo" in choice for body in bodies[1:3] for choice in body["choices"]] == [False, False, True, True]
    assert (bodies[2]["slo"]["stall_slo_ms"], bodies[2]["slo"]["ttft_slo_ms"]) == (7.0, 86_400_000.0)


def test_what_a_run_counts(tmp_path):
    body = {"prompt": "a", "max_tokens": 3, "n": 2}
    lines = [line("a", body), line("b"), "{", line("c", {"prompt": ""})]
    job, results = run_job(tmp_path, FakeEngine(tokenizer=CharTokenizer()), *lines)
    assert job.counts == {"answered": 2, "refused": 2, "tokens": 2 * 3 + 2} and job.bar_count == 4
    assert results[4]["response"]["request_id"] == f"cmpl-{results[4]['id']}"
    job, _ = run_job(
        tmp_path, FakeEngine(tokenizer=CharTokenizer()), line("a", body), line("b"), "{", line("c", {"prompt": ""})
    )
    assert job.counts == {}, "all of them are done"


def failing_on(engine, text, times):
    """The outputs with this text fail, so many times."""
    step, failed = engine.step, []

    def failing_step():
        outputs = step()
        for number, output in enumerate(outputs):
            if output.text == text and len(failed) < times:
                failed.append(output.request.request_id)
                engine.abort(output.request.request_id)
                outputs[number] = replace(output, finish_reason=FinishReason.ERROR, error="NaN")
        return outputs

    engine.step = failing_step
    return failed


@pytest.mark.parametrize(("times", "status"), [(1, 200), (2, 200), (3, 500)])
def test_a_line_has_three_attempts_each_with_an_id_of_its_own(tmp_path, times, status):
    engine = FakeEngine(tokenizer=CharTokenizer())
    failed = failing_on(engine, "z", times)
    job, results = run_job(tmp_path, engine, line("ok"), line("bad", {"prompt": "y", "max_tokens": 2}))
    assert results[2]["response"]["status_code"] == status and results[1]["response"]["status_code"] == 200
    first = f"cmpl-{results[2]['id']}"
    assert failed == [first, f"{first}-2", f"{first}-3"][:times]
    last = first if times == 0 else f"{first}-{min(times + 1, 3)}"
    assert results[2]["response"]["request_id"] == last
    assert job.counts["answered"] == (2 if status == 200 else 1) and job.counts["refused"] == (status == 500)


@pytest.mark.parametrize(("times", "passes"), [(0, 1), (1, 2), (2, 3), (3, 3)])
def test_the_lines_are_read_once_for_each_attempt_that_is_needed(tmp_path, times, passes):
    engine = FakeEngine(tokenizer=CharTokenizer())
    failing_on(engine, "z", times)
    source = write(tmp_path / "in.jsonl", line("bad", {"prompt": "y", "max_tokens": 2}))
    read, told = [], []

    def lines():
        read.append(source)
        return read_lines(source)

    bar = SimpleNamespace(update=lambda: None, set_postfix_str=lambda text, refresh: told.append((text, refresh)))
    with ResultFile(tmp_path / "out.jsonl") as results:
        BatchJob(engine, ServedModel(engine, "tiny"), lines, results, bar).run()
    assert len(read) == passes
    assert len(told) == min(times + 1, 3), "the rate is told when a line has ended, for the bar's next turn"
    assert all(re.fullmatch(r"\d+ tokens/s, \d+ running", text) and refresh is False for text, refresh in told)


def test_failures_count_as_in_a_row_only_until_a_line_succeeds(tmp_path):
    """4 requests at once make 16 failures in a row hopeless: 15 and a good line between them are not."""
    bad = [line(f"x{k}", {"prompt": "y", "max_tokens": 1}) for k in range(15)]
    lines = [*bad, line("good", {"prompt": "a", "max_tokens": 1}), *(text.replace('"x', '"w') for text in bad)]
    engine = FakeEngine(tokenizer=CharTokenizer())
    failed = failing_on(engine, "z", 30)
    job, results = run_job(tmp_path, engine, *lines)
    assert len(failed) == 30 and job.counts["answered"] == 31 and len(results) == 31
    engine = FakeEngine(tokenizer=CharTokenizer())
    failing_on(engine, "z", 99)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(EngineFailure, match="failed on 16 lines in a row"):
        run_job(other, engine, *bad, line("last", {"prompt": "y", "max_tokens": 1}))


@pytest.mark.parametrize(
    ("text", "code", "custom_id"),
    [
        (line("x", method="PUT"), "unsupported_url", "x"), (line("x", url="/v1/models"), "unsupported_url", "x"),
        (line("x" * 513), "invalid_line", "x" * 513), (line("x", {"a": 1}, other=2), "invalid_line", "x"),
        ("3", "invalid_line", None), ("nope", "invalid_json", None),
    ],
)  # fmt: skip
def test_a_line_that_is_none_says_which_and_why(tmp_path, text, code, custom_id):
    (found,) = read_lines(write(tmp_path / "x", text))
    with pytest.raises(LineError) as caught:
        parse_line(found)
    assert (caught.value.code, caught.value.custom_id) == (code, custom_id)


def test_the_longest_custom_id_is_taken(tmp_path):
    (found,) = read_lines(write(tmp_path / "x", line("x" * 512)))
    assert parse_line(found).custom_id == "x" * 512


@pytest.mark.parametrize(
    ("extra", "ending", "kept"), [(0, b"\n", True), (0, b"", True), (1, b"\n", False), (1, b"", False)]
)
def test_the_longest_line_is_read_and_one_byte_more_is_not(tmp_path, extra, kept, ending):
    path = tmp_path / "x"
    path.write_bytes(b"y" * (MAX_LINE_BYTES + extra) + ending + b"next\n" * bool(ending))
    found = list(read_lines(path))
    assert (found[0].data is not None) is kept
    assert [text.data for text in found[1:]] == [b"next"] * bool(ending)
    assert [text.number for text in found] == [1, 2][: len(found)]


def test_a_result_file_knows_what_is_done(tmp_path):
    path = tmp_path / "out.jsonl"
    lines = list(read_lines(write(tmp_path / "in", "a", "b")))
    with ResultFile(path) as results:
        assert results.num_done == 0 and not results.is_done(lines[0])
        results.write(lines[0], "a", {"status_code": 200}, None)
        assert results.num_done == 1 and results.is_done(lines[0]) and not results.is_done(lines[1])
        with pytest.raises(AssertionError, match="line 1 is answered twice"):
            results.write(lines[0], "a", None, None)
    with ResultFile(path) as results:
        assert results.num_done == 1 and results.is_done(lines[0]) and not results.is_done(lines[1])
        other = replace(lines[0], digest="0" * 16)
        with pytest.raises(ValueError, match="answers another line 1"):
            results.is_done(other)
    result = json.loads(path.read_text())
    assert result == {"id": lines[0].result_id, "custom_id": "a", "response": {"status_code": 200}, "error": None}


def samples_of(count, **params):
    return fan_out("r", [[97]] * count, SamplingParams(**{"max_tokens": 2, **params}))


@pytest.mark.parametrize("count", [1, 3, 9])
def test_the_driver_brings_every_output_and_tells_every_step(count):
    engine, steps = Noting(), []
    driver = Driver(engine, lambda: steps.append(engine.num_steps))
    found = [(sample.index, output.text) for sample, output in driver.run(iter(samples_of(count)))]
    assert sorted(found) == sorted((k, text) for k in range(count) for text in "bc")
    assert steps == list(range(1, engine.num_steps + 1)) and engine.is_idle
    assert {request.slo for request in engine.given} == {OFFLINE_SLO}


@pytest.mark.parametrize(("max_num_seqs", "queued", "most"), [(4, 8, 4), (4, 3, 3), (2, 9, 2)])
def test_the_driver_keeps_as_many_waiting_as_run_at_once_or_may_wait(max_num_seqs, queued, most):
    engine = FakeEngine(
        replace(FakeEngine().config, max_num_seqs=max_num_seqs, max_num_queued_reqs=queued), CharTokenizer()
    )
    seen, step = [], engine.step
    engine.step = lambda: (seen.append(len(engine.state.waiting)), step())[1]
    list(Driver(engine).run(iter(samples_of(20))))
    assert max(seen) == most and seen[0] == most


def test_the_driver_s_samples_keep_a_promise_of_their_own_and_an_abort_ends_them():
    engine = Noting()
    driver = Driver(engine)
    found = []
    for sample, output in driver.run(fan_out("r", [[97]] * 2, SamplingParams(max_tokens=5), slo=Slo(2.0, 3.0))):
        found.append((sample.index, output.text))
        if sample.index == 0:
            driver.abort("r-0")
            driver.abort("unknown")
    assert {r.slo for r in engine.given} == {Slo(2.0, 3.0)}
    assert found == [(0, "b"), *((1, text) for text in "bcdef")] and engine.is_idle


def test_a_sample_that_is_refused_is_told_and_the_others_go_on():
    engine = FakeEngine(tokenizer=CharTokenizer())
    samples = samples_of(3)
    samples[1] = replace(samples[1], prompt_token_ids=[999])
    found = [(sample.index, isinstance(output, ValueError)) for sample, output in Driver(engine).run(samples)]
    assert sorted(found) == [(0, False), (0, False), (1, True), (2, False), (2, False)]


def test_leaving_the_driver_s_loop_ends_what_is_unfinished():
    engine = FakeEngine(tokenizer=CharTokenizer())
    outputs = Driver(engine).run(samples_of(5, max_tokens=50))
    next(outputs)
    outputs.close()
    engine.step()
    assert engine.is_idle
