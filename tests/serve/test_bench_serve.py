"""`apt-jax bench serve` against real servers on sockets: ours with an engine without a model, and scripted ones."""

import asyncio
import json
import socket
import time

import pytest
from starlette.responses import JSONResponse

from apt_jax.engine_config import EngineConfig
from apt_jax.serve.bench.serving.measure import Serving, parse_goodput
from apt_jax.serve.bench.serving.options import BenchServe
from apt_jax.serve.bench.work_options import WorkOptions
from apt_jax.serve.cli import main
from apt_jax.serve.http.service import Service
from apt_jax.serve.options import ServerOptions
from apt_jax.serve.runtime.engine_thread import EngineThread
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.live_server import live
from tests.support.scripted_server import DONE, Scripted, piece, tokens, usage

SMALL = ["--random-input-len", "12", "--random-output-len", "6"]


def bench(*arguments):
    """Exit code of `apt-jax bench serve` in this process."""
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", *map(str, arguments)])
    return caught.value.code


def apt_jax_server(engine=None, **options):
    made = engine or FakeEngine(tokenizer=CharTokenizer(CHAT_TEMPLATE))
    return live(Service.of_engine(EngineThread(lambda: made), "tiny", ServerOptions(**options)))


CHAT_TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_our_server_answers_every_request_and_the_file_has_vllm_s_names(tmp_path, capsys):
    output, plot = tmp_path / "result.json", tmp_path / "plot.png"
    flags = [*SMALL, "--num-prompts", 12, "--request-rate", 60, "--cv", 0.5, "--goodput", "ttft:60000", "tpot:60000"]
    with apt_jax_server() as url:
        files = ["--output", output, "--plot", plot, "--save-detailed", "--metric-percentiles", "50,99"]
        assert bench("--base-url", f"{url}/v1", *flags, *files, "--ttft-slo-ms", 60000, "--tbt-slo-ms", 60000) == 0
    found = json.loads(output.read_text())
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert all(found[f"{name}_{metric}_ms"] >= 0 for name in ("mean", "median", "std", "p50", "p99"))
    assert (found["completed"], found["failed"], found["errors_by_reason"]) == (12, 0, {})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (12 * 12, 12 * 6)
    assert found["request_goodput"] == found["request_throughput"] == pytest.approx(12 / found["duration"])
    assert found["total_token_throughput"] == pytest.approx(18 * found["request_throughput"])
    assert found["strict_attainment"] == found["attainment"] == 1.0
    assert found["effective_throughput"] == found["effective_throughput_paper"] == {"0.7": 60, "0.9": 60, "0.99": 60}
    assert found["stall_slo_ms"] == 60000 and found["turned_away"] == 0 and found["sustained"] is None
    longest_gap_s = max(gap for gaps in found["itls"] for gap in gaps)  # 0 if all tokens of each came in one piece
    assert found["longest_gap_ms"] == pytest.approx(1e3 * longest_gap_s)
    assert found["longest_wait_ms"] == pytest.approx(1e3 * max(longest_gap_s, *found["ttfts"]))
    assert len(found["backlog_by_quarter"]) == 4
    assert [entry["requests"] for entry in found["attainment_by_class"]["prompt_quartile"]] == [12]
    assert (found["model_id"], found["endpoint_type"], found["request_rate"]) == ("tiny", "openai", 60)
    assert found["offered_rate"] == pytest.approx(60) and found["burstiness"] == pytest.approx(4)
    assert len(found["ttfts"]) == 12 and all(len(gaps) == 5 for gaps in found["itls"])
    assert found["arguments"]["num_prompts"] == 12 and found["tokens_per_piece"] == 1.0
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "12 answered, 0 failed" in shown and "attained 100.0% strictly (no gap over 60000 ms)" in shown
    assert "strictly by prompt quartiles 100.0%" in shown and "sustained: unknown" in shown


def test_a_chat_is_text_of_the_length_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("apt_jax.serve.bench.serving.measure.load_tokenizer", lambda name: CharTokenizer(CHAT_TEMPLATE))
    monkeypatch.setattr(CharTokenizer, "vocab_size", 256, raising=False)
    output = tmp_path / "result.json"
    with apt_jax_server() as url:
        flags = ["--endpoint", "chat", "--tokenizer", "here", "--num-prompts", 3, "--output", output]
        assert bench("--base-url", url, *SMALL, *flags) == 0
    found = json.loads(output.read_text())
    assert found["completed"] == 3 and found["total_output_tokens"] == 18
    assert found["total_input_tokens"] in (33, 36), "with or without the first special token"


class StallingEngine(FakeEngine):
    """Stalls for a second in its first step."""

    def step(self):
        if self.num_steps == 0:
            time.sleep(1.0)
        return super().step()


def test_a_stall_shows_in_every_request_that_was_due_meanwhile(tmp_path):
    """One request at a time: a client that drew the next arrival only then would report one slow request of ten."""
    output = tmp_path / "result.json"
    engine = StallingEngine(tokenizer=CharTokenizer())
    flags = ["--num-prompts", 10, "--request-rate", 20, "--cv", 0, "--max-concurrency", 1, "--num-warmups", 0]
    with apt_jax_server(engine) as url:
        assert bench("--base-url", url, *SMALL, *flags, "--save-detailed", "--output", output) == 0
    found = json.loads(output.read_text())
    assert found["planned_times"] == pytest.approx([0.05 * k for k in range(1, 11)])
    for number, ttft_s in enumerate(found["ttfts"]):
        assert ttft_s >= 1.0 - 0.05 * number, f"request {number} was due while the server stood still"
    assert found["start_times"][-1] > 1.05 and found["max_concurrent_requests"] == 1
    assert found["p99_client_queue_time_ms"] > 500 and found["max_client_lag_ms"] < 500


def test_arrivals_do_not_wait_for_answers(tmp_path):
    """Every request is sent at its time although the first is not answered yet."""
    output = tmp_path / "result.json"
    arrived = asyncio.Event()  # all of them

    async def together(number, body):
        if number == 7:
            arrived.set()
        await arrived.wait()
        async for event in tokens(body, first_s=0.1):
            yield event

    scripted = Scripted(together)
    flags = ["--num-prompts", 8, "--request-rate", 40, "--num-warmups", 0, "--save-detailed", "--output", output]
    with scripted.running() as url:
        assert bench("--base-url", url, *SMALL, *flags) == 0
    found = json.loads(output.read_text())
    assert found["completed"] == found["max_concurrent_requests"] == 8
    assert all(ttft >= 0.1 for ttft in found["ttfts"])


def test_what_is_sent_is_what_the_flags_say():
    scripted = Scripted(lambda number, body: tokens(body), max_model_len=64)
    flags = ["--num-prompts", 2, "--api-key", "secret", "--ttft-slo-ms", 250, "--extra-body", '{"top_k": 3}']
    with scripted.running() as url:
        assert bench("--base-url", url, *SMALL, *flags) == 0
        assert bench("--base-url", url, *SMALL, "--num-prompts", 1, "--no-ignore-eos", "--no-send-slo") == 0
    warm_up, first, _, *rest = scripted.bodies
    assert first["model"] == "scripted" and first["max_tokens"] == 6 and len(first["prompt"]) == 12
    assert first["ignore_eos"] is True and first["top_k"] == 3 and first["temperature"] == 0
    assert warm_up["prompt"] != first["prompt"], "what warms up must not be cached for the run"
    assert not any("ignore_eos" in body for body in rest)
    assert scripted.headers[1]["authorization"] == "Bearer secret" and scripted.headers[1]["x-slo-ttft-ms"] == "250"
    assert "authorization" not in scripted.headers[-1] and "x-slo-ttft-ms" not in scripted.headers[-1]


async def broken_off(body):
    yield piece("x")


async def with_an_error(body):
    yield piece("x")
    yield {"error": {"message": "lost the device"}}
    yield DONE


async def nonsense(body):
    yield b"data: {not json\n\n"


async def short(body):
    yield piece("x", "stop")
    yield usage(12, 1)
    yield DONE


def test_failures_are_told_by_reason_and_the_rest_counts(tmp_path, capsys):
    def script(number, body):
        match number % 6:
            case 0:
                return JSONResponse({"error": {"message": f"queue is full, try {number}"}}, 503)
            case 1:
                return broken_off(body)
            case 2:
                return with_an_error(body)
            case 3:
                return nonsense(body)
            case 4:
                return short(body)
        return tokens(body)

    output = tmp_path / "result.json"
    scripted = Scripted(script)
    flags = ["--num-prompts", 6, "--num-warmups", 0, "--max-concurrency", 1, "--output", output]
    with scripted.running() as url:
        assert bench("--base-url", url, *SMALL, *flags) == 0
    found = json.loads(output.read_text())
    assert found["completed"] == 2 and found["failed"] == 4 and found["attainment"] == pytest.approx(1 / 3)
    assert found["errors_by_reason"] == {
        "HTTP 503: queue is full, try 0": 1,
        "the stream broke off": 1,
        "error in the stream: lost the device": 1,
        "no OpenAI stream: ValueError": 1,
    }
    said = capsys.readouterr()
    assert "failed 1 times: the stream broke off" in said.out
    assert "1 answers had fewer tokens than asked for" in said.err


def test_exit_code_is_1_if_every_request_fails(capsys):
    scripted = Scripted(lambda number, body: JSONResponse({"detail": "no"}, 500) if number else tokens(body))
    with scripted.running() as url:
        assert bench("--base-url", url, *SMALL, "--num-prompts", 3) == 1
    assert "failed 3 times: HTTP 500: {'detail': 'no'}" in capsys.readouterr().out


def test_slow_answers_fail_after_the_timeout(capsys):
    scripted = Scripted(lambda number, body: tokens(body, first_s=5.0 * (number > 0)))
    with scripted.running() as url:
        assert bench("--base-url", url, *SMALL, "--num-prompts", 2, "--request-timeout", 0.3) == 1
    assert "failed 2 times: no whole answer within 0.3 s" in capsys.readouterr().out


def free_port():
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


def test_a_server_that_is_not_there_is_one_sentence(capsys):
    url = f"http://127.0.0.1:{free_port()}"
    for flags, sentence in (
        ([], f"cannot connect at {url}; is the server running?"),
        (["--model", "m"], f"the first request to {url}/v1/completions failed: cannot connect"),
    ):
        assert bench("--base-url", url, *flags) == 1
        assert capsys.readouterr().err == f"error: {sentence}\n"


def test_a_wrong_key_is_one_sentence(capsys, monkeypatch):
    with apt_jax_server(api_key=("right",)) as url:
        monkeypatch.setenv("OPENAI_API_KEY", "wrong")
        assert bench("--base-url", url, *SMALL, "--num-prompts", 1) == 1
        assert "HTTP 401" in capsys.readouterr().err
        assert bench("--base-url", url, *SMALL, "--num-prompts", 1, "--api-key", "right") == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--request-rate", "1,fast"], "request_rate='1,fast' must be numbers separated by commas, greater than 1e-06"),
        (["--goodput", "itl:3"], "--goodput 'itl:3' must be one of ttft, tpot, e2el"),
        (["--percentile-metrics", "ttft,gap"], "unknown 'gap'; known: ttft, tpot, itl, e2el"),
        (["--targets", "90"], "targets='90' must be numbers separated by commas, greater than 0 and at most 1"),
        (["--endpoint", "chat"], "a chat is text: give --tokenizer"),
        (["--base-url", "nowhere"], "base_url='nowhere' must begin with http://"),
        (["--sweep", "--request-rate", "1,inf"], "a sweep cannot begin at inf"),
        (["--extra-body", "[1]"], "extra_body='[1]' must be a JSON object"),
        (["--model", "m", "--dataset-arrivals"], "dataset=random recorded no arrivals"),
        (["--request-rate", "1,2,1"], "request_rate='1,2,1' has 1 twice; leave one out"),
        (["--request-rate", "1e-300"], "greater than 1e-06"),
        (["--targets", "0.9,0.90"], "targets='0.9,0.90' has 0.9 twice"),
        (["--metric-percentiles", "99,99"], "metric_percentiles='99,99' has 99 twice"),
        (["--percentile-metrics", "ttft,ttft"], "percentile_metrics='ttft,ttft' has ttft twice"),
        (["--percentile-metrics", ""], "percentile_metrics='' has an empty value"),
        (["--goodput", "ttft:1", "ttft:2"], "--goodput 'ttft:2': ttft has a limit already; leave one out"),
        (["--goodput", "ttft:0"], "--goodput 'ttft:0' must be one of"),
        (["--goodput", "ttft:inf"], "--goodput 'ttft:inf' must be one of"),
        (["--extra-body", '{"stream": false}'], "has stream, which the benchmark sets itself; leave it out"),
        (["--base-url", "http://[::1"], "base_url='http://[::1' is no address such as http://127.0.0.1:8000"),
        (["--base-url", "http://127.0.0.1:99999"], "base_url='http://127.0.0.1:99999' is no address"),
        (["--base-url", "http://:80"], "base_url='http://:80' is no address"),
        (["--base-url", "http://a b"], "base_url='http://a b' is no address"),
        (["--dataset", "none.csv"], "dataset='none.csv' is neither a file nor one of random, sharegpt, humaneval,"),
        (["--output", "a.svg", "--plot", "./a.svg"], "--output and --plot both name a.svg; give each a file of"),
    ],
)
def test_what_cannot_be_asked_ends_with_1_and_one_sentence(flags, sentence, capsys):
    assert bench(*flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--cv", 1, "--burstiness", 1], "burstiness=1.0 and cv=1.0 say the same thing; give one of them"),
        (["--dataset-arrivals", "--cv", 2], "cv=2.0 is of drawn arrivals; leave out --dataset-arrivals"),
        (["--dataset-arrivals", "--burstiness", 2], "burstiness=2.0 is of drawn arrivals"),
        (["--seed", -1], "seed=-1 must be at least 0"),
        (["--num-prompts", 10**20], f"num_prompts={10**20} must be at most 1e+07"),
        (["--random-input-len", 10**10], f"random_input_len={10**10} must be at most 1e+09"),
        (["--api-key", "a\nb"], "api_key has characters that no HTTP header can carry; give the key alone"),
        (["--api-key", "schlüssel"], "api_key has characters that no HTTP header can carry"),
    ],
)
def test_flags_that_contradict_each_other_or_a_limit_are_wrong_usage(flags, sentence, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert bench(*flags) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_limits_of_goodput_are_milliseconds_by_name():
    assert parse_goodput(("ttft:500", "e2el:1e4")) == {"ttft": 500.0, "e2el": 10000.0}


def arrivals(rate, **flags):
    made = BenchServe(model="m", work=WorkOptions(num_prompts=500), **flags)
    count = made.work.num_prompts
    return Serving(made).planned_s(rate, count, count)


def test_arrivals_offer_exactly_the_rate_and_burstiness_is_cv():
    for flags in ({}, {"cv": 2.0}, {"burstiness": 0.25}, {"burstiness": float("inf")}):
        assert arrivals(4.0, **flags)[-1] == pytest.approx(125.0)
    assert arrivals(4.0, cv=2.0) == arrivals(4.0, burstiness=0.25) != arrivals(4.0)
    assert arrivals(2.0) == pytest.approx([2 * at for at in arrivals(4.0)])
    assert arrivals(4.0, seed=1) != arrivals(4.0) and set(arrivals(float("inf"))) == {0.0}


def test_a_sweep_finds_the_rate_that_a_server_can_take(tmp_path, capsys):
    """One request at a time, 10 ms each: 100 requests/s at the very most."""
    turn = asyncio.Semaphore(1)

    async def one_at_a_time(body):
        async with turn:
            await asyncio.sleep(0.01)
            yield piece("x", "length")
        yield DONE

    output, plot = tmp_path / "result.json", tmp_path / "plot.svg"
    flags = ["--sweep", "--sweep-tolerance", 0.5, "--targets", "0.6,0.9", "--request-rate", 20, "--num-prompts", 30]
    flags += ["--ttft-slo-ms", 100, "--random-input-len", 4, "--random-output-len", 1, "--cv", 0.3]
    with Scripted(lambda number, body: one_at_a_time(body)).running() as url:
        assert bench("--base-url", url, *flags, "--output", output, "--plot", plot) == 0
    result = json.loads(output.read_text())
    points, found = result["points"], result["effective_throughput"]
    rates = [point["request_rate"] for point in points]
    assert rates == sorted(set(rates)) and len(rates) >= 3, "no rate is measured twice"
    assert 0 < found["0.9"] <= found["0.6"] < max(rates)
    for target, rate in found.items():
        assert {p["request_rate"]: p["attainment"] for p in points}[float(f"{rate:.4g}")] >= float(target)
    assert any(point["attainment"] < 0.6 for point in points if point["request_rate"] > found["0.6"])
    assert plot.read_text().startswith("<?xml") and "effective throughput at 90%" in capsys.readouterr().out


def test_several_rates_are_one_run_each_and_recorded_arrivals_are_kept(tmp_path, capsys):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,3,2\n0.1,4,3\n0.2,5,4\n")
    output = tmp_path / "result.json"
    engine = FakeEngine(config=EngineConfig(max_num_seqs=2, max_num_batched_tokens=64, scheduling_policy="fcfs"))
    flags = ["--dataset", trace, "--num-prompts", 3, "--dataset-arrivals", "--request-rate", "15,30", "--save-detailed"]
    with apt_jax_server(engine) as url:
        assert bench("--base-url", url, *flags, "--output", output) == 0
    first, second = json.loads(output.read_text())["points"]
    assert first["input_lens"] == second["input_lens"] == [3, 4, 5] and first["output_lens"] == [2, 3, 4]
    assert first["planned_times"] == pytest.approx([0, 0.1, 0.2])
    assert second["planned_times"] == pytest.approx([0, 0.05, 0.1])
    assert "effective throughput at 99% attainment: at least 30 requests/s" in capsys.readouterr().out


def test_a_freeze_and_who_was_turned_away_are_told_and_the_limits_are_sent(tmp_path, capsys):
    """Of five requests one stands still for 1.2 s, one is abandoned with a token, one without, one is refused."""

    async def frozen():
        yield piece("x")
        await asyncio.sleep(1.2)
        yield piece("y", "length")
        yield usage(4, 2)
        yield DONE

    async def abandoned():
        yield piece("x")
        yield piece("", "abandoned")
        yield usage(4, 1)
        yield DONE

    async def whole():
        yield piece("x")
        yield piece("y", "length")
        yield usage(4, 2)
        yield DONE

    async def late():
        yield {"error": {"message": "too late", "type": "server_error", "param": None, "code": "slo_abandoned"}}
        yield DONE

    scripts = [whole, frozen, abandoned, lambda: JSONResponse({"error": {"message": "full"}}, 503), late, whole]
    server, output = Scripted(lambda number, body: scripts[number]()), tmp_path / "result.json"
    flags = ["--num-prompts", 5, "--random-input-len", 4, "--random-output-len", 2, "--request-rate", 5]
    flags += ["--ttft-slo-ms", 5000, "--tbt-slo-ms", 5000, "--stall-slo-ms", 1000]
    with server.running() as url:
        assert bench("--base-url", url, *flags, "--output", output) == 0
    found = json.loads(output.read_text())
    assert (found["completed"], found["failed"], found["turned_away"]) == (2, 3, 3 / 5)
    assert (found["attainment"], found["strict_attainment"], found["frozen"]) == (2 / 5, 1 / 5, 1 / 5)
    assert found["longest_gap_ms"] >= 1190 and found["stall_slo_ms"] == 1000
    assert "the server ended it: abandoned" in found["errors_by_reason"]
    sent = {name: value for name, value in server.headers[-1].items() if name.startswith("x-slo")}
    assert sent == {"x-slo-ttft-ms": "5000", "x-slo-tbt-ms": "5000", "x-slo-stall-ms": "1000"}
    assert "60.0% refused or ended" in capsys.readouterr().out
