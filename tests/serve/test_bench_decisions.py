"""What `bench` prints, draws and sums up, for a few figures worked out by hand."""

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from apt_jax.request import SamplingParams, Slo
from apt_jax.serve.bench.offline.latency import Iteration, measure, summarise
from apt_jax.serve.bench.offline.measure import Tally
from apt_jax.serve.bench.offline.options import BenchLatency, BenchThroughput
from apt_jax.serve.bench.serving.client import (
    REFUSALS,
    TURNED_AWAY,
    Answer,
    Endpoint,
    _first_tokens,
    _is_bare,
    plain_base,
)
from apt_jax.serve.bench.serving.client import Piece as Arrived
from apt_jax.serve.bench.serving.load import load
from apt_jax.serve.bench.serving.measure import Serving
from apt_jax.serve.bench.serving.options import BenchServe
from apt_jax.serve.bench.serving.pictures import draw
from apt_jax.serve.bench.serving.records import Record, Run
from apt_jax.serve.bench.tables import print_point, print_points, warnings_of, worst_class
from apt_jax.serve.bench.work import Work, check_dataset, load_dataset, make_work, text_of_length
from apt_jax.serve.bench.work_options import WorkOptions
from apt_jax.serve.errors import ERROR_REPLIES
from tests.support.fake_engine import CharTokenizer, FakeEngine

FIGURES = {
    "request_rate": 4, "completed": 3, "failed": 1, "duration": 2.0, "request_throughput": 1.5, "output_throughput": 30,
    "total_token_throughput": 45, "request_goodput": None, "strict_attainment": 0.5, "stall_slo_ms": 900,
    "attainment": 0.75, "ttft_slo_ms": 500, "ttft_attainment": 0.8, "tbt_slo_ms": 100, "tbt_attainment": 0.9,
    "longest_gap_ms": 250.0, "longest_wait_ms": 700.0, "turned_away": 0.25, "frozen": 0.125,
    "kept_token_throughput": 20.0,
    "attainment_by_class": {
        "prompt_quartile": [{"strict_attainment": 1.0}, {"strict_attainment": 0.25}],
        "output_quartile": [{"strict_attainment": 0.5}],
    },
    "backlog_by_quarter": [1, 2, 3, 4], "sustained": False, "errors_by_reason": {"HTTP 503: [busy]": 1},
    "max_concurrency": None, "max_client_lag_ms": 10.0, "client_loop_lag_ms": 20.0, "client_cpu_share": 0.2,
    "short_answers": 0, "tokens_per_piece": 1.0, "median_ttft_ms_by_turn": [1.0], "total_cached_tokens": 0,
    "total_input_tokens": 10,
    **{f"{column}_ttft_ms": 1.0 for column in ("mean", "median", "std", "p99")},
    **{f"{column}_client_queue_time_ms": 1.0 for column in ("mean", "median", "std", "p99")},
}  # fmt: skip


def figures(**changed):
    return {**FIGURES, **changed}


def test_turns_and_the_prefix_cache_are_told_where_there_are_any(capsys):
    for changed in ({"median_ttft_ms_by_turn": [30.0, 4.0]}, {"total_cached_tokens": 5}, {}):
        print_point(figures(**changed), [], [])
        said = capsys.readouterr().out
        assert ("from the prefix cache" in said) is bool(changed)
        assert "by turn 30, 4 ms" in said or "median_ttft_ms_by_turn" not in changed
        assert "50.0% of prompt tokens" in said or "total_cached_tokens" not in changed


def test_a_run_in_words_and_a_table(capsys):
    print_point(figures(mean_ttft_ms=None), ["ttft"], [99.0])
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == (
        "4 requests/s offered: 3 answered, 1 failed in 2.0 s; 1.5 requests/s, 30 output and 45 total tokens/s"
    )
    assert lines[1] == (
        "attained 50.0% strictly (no gap over 900 ms), 75.0% by the 99th percentile of gaps (first token within "
        "500 ms: 80.0%, gaps within 100 ms: 90.0%)"
    )
    assert lines[2] == (
        "longest gap 250 ms, longest wait 700 ms; 12.5% froze; 25.0% refused or ended; 20 tokens/s of kept requests"
    )
    assert lines[3] == (
        "strictly by prompt quartiles 100.0%, 25.0%; by output quartiles 50.0%; unfinished after each quarter "
        "1, 2, 3, 4; sustained: no"
    )
    assert lines[4] == "failed 1 times: HTTP 503: [busy]"
    (row,) = [line for line in lines if "time to first token" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["time to first token", "-", "1.00", "1.00", "1.00"]
    assert "wait in the client" not in said
    print_point(figures(request_goodput=1.25, max_concurrency=2, backlog_by_quarter=None), ["ttft"], [99.0])
    said = capsys.readouterr().out
    assert ", goodput 1.25 requests/s" in said and "wait in the client" in said and "all arrived at once" in said
    print_point(figures(completed=0), ["ttft"], [99.0])
    assert "time to first token" not in capsys.readouterr().out, "nothing was answered: there are no latencies"


def test_several_runs_and_the_rates_that_were_reached(capsys):
    points = [figures(request_rate=2, sustained=True), figures(backlog_by_quarter=None)]
    found = {"strict": {0.9: 0.0, 0.5: 2.0}, "paper": {0.9: 2.0, 0.5: 4.0}}
    print_points(points, found)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    shares = ["25.0%", "12.5%", "50.0%", "75.0%", "80.0%", "90.0%", "25.0%"]
    assert rows == [
        ["2", "3", "1", *shares, "0.25", "20.0", "1 2 3 4", "yes"],
        ["4", "3", "1", *shares, "0.25", "20.0", "-", "no"],
    ]
    assert lines[-2:] == [
        "effective throughput at 90% attainment: not reached strictly, 2 requests/s by the 99th percentile",
        "effective throughput at 50% attainment: 2 requests/s strictly, at least 4 requests/s by the 99th percentile",
    ]
    print_points([points[0], figures(sustained=None)], found)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "whether these rates last is unknown: that takes 900 s of arrivals"


def test_the_worst_class_is_of_either_length():
    assert worst_class(FIGURES) == 0.25 and worst_class({"attainment_by_class": {}}) == 0.0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None), ({"max_client_lag_ms": 50.0, "client_cpu_share": 0.7}, None),
        ({"max_client_lag_ms": 51.0}, "up to 51 ms late and used 20% of a core"),
        ({"client_loop_lag_ms": 60.0}, "up to 60 ms late"), ({"client_cpu_share": 0.71}, "20 ms late and used 71%"),
        ({"short_answers": 2}, "2 answers had fewer tokens than asked for"),
        ({"tokens_per_piece": 1.05}, None), ({"tokens_per_piece": None}, None),
        ({"tokens_per_piece": 1.06}, "the server sends 1.06 tokens in a piece"),
    ],
)  # fmt: skip
def test_when_figures_are_doubtful(changed, words):
    said = warnings_of(figures(**changed))
    assert said == [] if words is None else len(said) == 1 and words in said[0]


@pytest.fixture
def drawn(monkeypatch):
    """Figures instead of rendered pictures, which take seconds and are tested elsewhere."""
    found = []

    def savefig(self, file, **options):
        found.append((self, options))
        file.write(b"drawn")

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def answered(planned_s, first_s):
    return Record(planned_s, 4, 1, piece_s=[first_s], output_tokens=1)


def test_the_plot_has_the_runs_and_nothing_that_changes_from_run_to_run(drawn, tmp_path):
    slow = Run([answered(0.0, 0.5), answered(0.0, 0.25), Record(0.0, 4, 1, error="x"), answered(1.0, 1.0)], 2.0)
    failed = Run([Record(0.0, 4, 1, error="x")], 1.0)
    draw(tmp_path / "a.png", [(2.0, 0.5, slow), (4.0, 0.0, failed), (math.inf, 0.25, slow)], Slo(0.3, 1.0))
    figure, options = drawn.pop()
    assert (tmp_path / "a.png").read_bytes() == b"drawn"
    assert options == {"format": "png", "metadata": {"Software": None}}
    cliff, ttft = figure.axes
    assert list(cliff.lines[0].get_xdata()) == [2.0, 4.0] and list(cliff.lines[0].get_ydata()) == [50.0, 0.0]
    assert list(cliff.lines[1].get_ydata()) == [25.0, 25.0] and cliff.get_legend() is not None
    steps = ttft.lines[0]
    assert list(steps.get_xdata()) == [1e-4, 0.25, 0.5] and list(steps.get_ydata()) == [25.0, 50.0, 75.0]
    assert [line.get_label() for line in ttft.lines[:2]] == ["2/s", "inf/s"], "a run without answers has no line"
    assert list(ttft.lines[2].get_xdata()) == [0.3, 0.3] and ttft.get_xscale() == "log"
    assert ttft.get_legend() is not None and cliff.get_ylim() == ttft.get_ylim() == (0, 102)
    draw(tmp_path / "b.svg", [(2.0, 0.0, failed)], Slo())
    figure, options = drawn.pop()
    assert options == {"format": "svg", "metadata": None}
    assert [axes.get_legend() for axes in figure.axes] == [None, None]


def test_latencies_of_batches_in_ms_and_tokens_per_second():
    batches = [Iteration(0.1, 0.02, 0.01), Iteration(0.3, 0.04, 0.03)]
    found = summarise(batches, BenchLatency(batch_size=4, output_len=10))
    assert (found["batch_size"], found["latencies"]) == (4, [0.1, 0.3])
    assert (found["mean_latency_ms"], found["mean_ttft_ms"]) == (pytest.approx(200), pytest.approx(30))
    assert (found["p10_tpot_ms"], found["p99_latency_ms"]) == (pytest.approx(12), pytest.approx(298))
    assert found["output_tokens_per_second"] == pytest.approx(4 * 10 / 0.2)


def test_a_batch_s_times_are_those_of_its_tokens(monkeypatch):
    """A clock that goes on by a second with each look at it: 3 tokens of 2 requests, and the start and the end."""
    now = iter(range(100))
    monkeypatch.setattr("apt_jax.serve.bench.offline.latency.time", SimpleNamespace(perf_counter=lambda: next(now)))
    works = [Work([5, 6], 2, 3), Work([7, 8], 2, 3)]
    assert measure(FakeEngine(), works) == Iteration(latency_s=7.0, ttft_s=1.5, tpot_s=2.0)


def test_a_tally_counts_iterations_with_work():
    engine = FakeEngine(num_blocks=8)
    tally = Tally(engine)
    assert tally.figures()["mean_batch"] == 0 and tally.figures()["padding"] == 1
    for name in ("a", "b"):
        engine.add([5] * 6, SamplingParams(max_tokens=2, temperature=0), request_id=name)
    tally.add()  # nothing was planned yet
    for _ in range(2):
        engine.step()
        tally.add()
    found = tally.figures()
    assert (found["iterations"], found["mean_batch"], found["padding"]) == (2, 2.0, 0.0)
    assert (found["preemptions"], found["conversions"], found["num_blocks"]) == (0, 0, 8)
    assert (found["mean_kv_usage"], found["mean_hidden_usage"]) == (0.5, 0.0), "all 8 blocks, then none"
    assert found["peak_cache_usage"] == 1.0


def test_the_least_that_may_be_asked_for():
    assert BenchThroughput(temperature=0.0).temperature == 0 and BenchLatency(num_iters_warmup=0, num_iters=1)
    with pytest.raises(ValueError, match="temperature=-1 must be at least 0"):
        BenchThroughput(temperature=-1)
    with pytest.raises(ValueError, match="num_iters_warmup=-1 must be at least 0"):
        BenchLatency(num_iters_warmup=-1)
    for name in ("batch_size", "input_len", "output_len", "num_iters"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            BenchLatency(**{name: 0})
    fields = {"cv": 0.0, "temperature": 0.0, "num_warmups": 0, "seed": 0, "max_concurrency": 1, "max_model_len": 1}
    assert BenchServe(**fields, sweep_tolerance=1e-3).num_warmups == 0
    for name, value in (("max_concurrency", 0), ("max_model_len", 0), ("num_warmups", -1), ("sweep_tolerance", 1e-4)):
        with pytest.raises(ValueError, match=f"{name}={value:g} must be at least"):
            BenchServe(**{name: value})
    for name in ("burstiness", "ttft_slo_ms", "tbt_slo_ms", "stall_slo_ms", "request_timeout"):
        with pytest.raises(ValueError, match=f"{name}=0 must be greater than 0"):
            BenchServe(**{name: 0})


def test_what_a_benchmark_does_without_flags():
    plain = BenchServe()
    assert (plain.num_warmups, plain.sweep, plain.dataset_arrivals, plain.save_detailed) == (1, False, False, False)
    assert (plain.ignore_eos, plain.send_slo, plain.temperature, plain.slo) == (True, True, 0.0, Slo(1.0, 1.0))
    assert BenchServe(ttft_slo_ms=250, tbt_slo_ms=50, stall_slo_ms=80).slo == Slo(0.25, 0.05, 0.08)


def test_arrivals_that_no_distribution_has_are_refused():
    assert BenchServe(burstiness=math.inf).burstiness == math.inf
    with pytest.raises(ValueError, match="burstiness=1e-09"):
        BenchServe(burstiness=1e-9)


def test_a_context_given_is_used_and_not_the_server_s():
    def longest(**flags):
        return max(Serving(BenchServe(model="m", work=WorkOptions("sharegpt"), **flags)).dataset.lengths.prompt_tokens)

    assert longest(max_model_len=64) < 64 < longest() < 2048


def test_the_longest_random_request_is_one_that_fits():
    assert load_dataset(WorkOptions(random_input_len=1920), seed=0, tokenizer=None).lengths.prompt_tokens.max() == 1920
    with pytest.raises(ValueError, match="up to 2049 tokens are more than the 2048"):
        load_dataset(WorkOptions(random_input_len=1921), seed=0, tokenizer=None)


def test_prompts_are_those_of_their_rows_from_the_lowest_ordinary_id():
    options = WorkOptions(num_prompts=5, random_range_ratio=0.5)
    dataset = load_dataset(options, seed=0, tokenizer=None)
    assert len(set(dataset.lengths.prompt_tokens.tolist())) > 2
    works = make_work(dataset, [0, 2], vocab_size=12, tokenizer=None, seed=(0, 1))
    assert [work.prompt_tokens for work in works] == dataset.lengths.prompt_tokens[[0, 2]].tolist()
    assert {token for work in works for token in work.prompt} == {10, 11}


def test_names_of_several_datasets_and_of_a_json_file_with_a_plus(tmp_path):
    (tmp_path / "a+b.json").write_text("[]")
    check_dataset(WorkOptions(dataset=str(tmp_path / "a+b.json")))
    with pytest.raises(ValueError, match=r"dataset='.*a' is neither a file"):
        check_dataset(WorkOptions(dataset=str(tmp_path / "a+b.csv")))


def test_a_text_is_as_long_as_asked_for_special_tokens_included():
    for tokens in (2, 3, 50):
        text, found = text_of_length(CharTokenizer(), tokens, np.random.default_rng(0))
        assert found == tokens == len(CharTokenizer().encode(text))


def pieces(*given):
    """Pieces of (chars, tokens, is_role)."""
    return [Arrived(float(at), *piece) for at, piece in enumerate(given)]


@pytest.mark.parametrize(
    ("given", "tokens", "bare"),
    [
        ([], 3, False), ([(1, None, True), (1, None, False)], 1, False), ([(0, 1, True), (1, None, False)], 1, False),
        ([(0, None, False), (1, None, False)], 1, True),  # more pieces than tokens: one of them was none
        ([(0, None, True), (1, None, False)], 2, False), ([(0, None, True), (1, None, False)], 3, True),
        ([(0, None, False), (1, None, False)], 3, False), ([(0, None, True)], 3, False),
    ],
)  # fmt: skip
def test_whether_a_piece_without_text_was_a_token(given, tokens, bare):
    assert _is_bare(pieces(*given), 0, tokens) is bare


@pytest.mark.parametrize(
    ("given", "tokens", "first"),
    [
        ([], 0, 1), ([(4, None, False), (2, None, False)], 2, 1), ([(4, None, False), (2, None, False)], 6, 4),
        ([(0, None, False), (2, None, False)], 3, 1), ([(9, None, False), (0, None, False)], 5, 4),
        ([(1, 9, False), (1, None, False)], 3, 3), ([(1, 2, False), (1, None, False)], 5, 2),
        ([(0, None, False), (0, None, False)], 4, 1),
    ],
)  # fmt: skip
def test_tokens_of_the_first_piece(given, tokens, first):
    assert _first_tokens(pieces(*given), tokens) == first


def test_who_was_turned_away():
    def ended(chunk):
        record = Record(0.0, 5, 3)
        Answer(record).take(chunk, 1.0)
        return record.was_turned_away, record.error

    assert TURNED_AWAY == (429, 503, 504), "the statuses of those without room or time"

    def reason(name):
        return b'{"choices": [{"text": "a", "finish_reason": "%s"}]}' % name

    assert ended(reason(b"abort")) == (True, "the server ended it: abort")
    assert ended(reason(b"error")) == (False, "the server ended it: error") and ended(reason(b"stop")) == (False, None)
    assert ended(b'{"error": {"message": "m", "code": "queue_full"}}') == (True, "error in the stream: m")
    assert ended(b'{"error": {"message": "m", "code": "oom"}}') == (False, "error in the stream: m")
    assert ended(b'{"error": "full"}') == (False, "error in the stream: full")


def test_a_refusal_counts_alike_as_a_status_and_in_a_stream():
    statuses = {reply.code: reply.status for _, reply in ERROR_REPLIES if reply.code in REFUSALS}
    assert set(statuses) == set(REFUSALS) and set(statuses.values()) <= set(TURNED_AWAY)


def test_addresses_that_are_none():
    for base_url in ("ftp://x", "http://", "https://x:0x", "http://x:y", "http://x y"):
        with pytest.raises(ValueError, match="base_url="):
            plain_base(base_url)
    assert plain_base("https://x") == "https://x"
    assert Endpoint("b", "completions", "m", {}, {}, 1.0).url == "b/v1/completions"


def test_a_queue_is_from_the_plan_to_the_sending_and_the_client_s_lag_to_its_turn():
    waited = Record(1.0, 4, 2, started_s=1.5, sent_s=3.0)
    assert (waited.queue_s, Record(1.0, 4, 2).queue_s) == (2.0, 0.0)
    run = Run([waited, Record(2.0, 4, 2)], 4.0)
    assert (run.max_lag_s, run.window_s, Run([], 1.0).max_lag_s, Run([], 1.0).window_s) == (0.5, 2.0, 0.0, 0.0)


def test_the_client_counts_an_answer_s_tokens_where_it_has_a_tokenizer(monkeypatch):
    monkeypatch.setattr("apt_jax.serve.bench.serving.measure.load_tokenizer", lambda name: name and CharTokenizer())
    counting = Serving(BenchServe(model="m", tokenizer="here")).endpoint.count
    assert counting is not None and counting("abc") == 3, "without the first special token"
    assert Serving(BenchServe(model="m")).endpoint.count is None


@pytest.mark.parametrize(("limit", "at_once"), [(None, 3), (1, 1)])
def test_requests_are_sent_when_they_are_due_and_as_many_at_once_as_allowed(monkeypatch, limit, at_once):
    running, most, ended = [], [0], []

    async def ask(session, endpoint, body, record, origin, **more):
        running.append(body)
        most[0] = max(most[0], len(running))
        await asyncio.sleep(0.05)
        running.remove(body)

    monkeypatch.setattr("apt_jax.serve.bench.serving.load.ask", ask)
    endpoint, planned = Endpoint("b", "completions", "m", {}, {}, 1.0), [0.0, 0.0, 0.0, 0.3]
    works = [Work([number], 1, 2) for number in range(4)]
    sending = load(None, endpoint, works, planned, max_concurrency=limit, on_done=ended.append)
    run = asyncio.run(asyncio.wait_for(sending, 10))
    assert most == [at_once] and len(ended) == 4
    for record, due in zip(run.records, planned, strict=True):
        assert (record.planned_s, record.asked_tokens) == (due, 2) and record.sent_s >= record.started_s >= due
    assert run.duration_s >= 0.35 and run.loop_lag_s > 0
