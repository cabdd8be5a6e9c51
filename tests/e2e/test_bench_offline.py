"""`apt-jax bench throughput` and `bench latency` with a real engine and a tiny model."""

import json

import pytest

from apt_jax.serve.bench.offline.options import BenchThroughput
from apt_jax.serve.bench.offline.throughput import token_works
from apt_jax.serve.bench.work import Work
from apt_jax.serve.bench.work_options import WorkOptions
from apt_jax.serve.cli import main
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.served_model import flags, write_folder

FLAGS = ["--load-format", "dummy", "--scheduling-policy", "fcfs"]  # shares its programs with other tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny"))


def bench(what, folder, *arguments):
    """Exit code in this process."""
    with pytest.raises(SystemExit) as caught:
        main(["bench", what, str(folder), *FLAGS, *flags(), *map(str, arguments)])
    return caught.value.code


def test_throughput_counts_every_token_and_tells_padding_and_cache(folder, tmp_path, capsys):
    output = tmp_path / "result.json"
    work = ["--num-prompts", 9, "--random-input-len", 11, "--random-output-len", 7, "--random-range-ratio", 0.2]
    assert bench("throughput", folder, *work, "--output", output) == 0
    found = json.loads(output.read_text())
    assert found["num_requests"] == 9 and found["requests_per_second"] == pytest.approx(9 / found["elapsed_time"])
    assert 9 * 6 <= found["total_output_tokens"] <= 9 * 8
    assert 9 * 9 <= found["total_num_tokens"] - found["total_output_tokens"] <= 9 * 13
    assert found["output_tokens_per_second"] == pytest.approx(found["total_output_tokens"] / found["elapsed_time"])
    assert 0 < found["padding"] < 0.6 and 1 < found["mean_batch"] <= 4
    assert found["num_blocks"] == 48 and 0 < found["mean_kv_usage"] + found["mean_hidden_usage"] <= 1
    assert found["peak_cache_usage"] <= 1 and found["arguments"]["max_num_seqs"] == 4 and "jax" in found["versions"]
    said = capsys.readouterr().out
    assert "output tokens/s" in said and "token slots were padding" in said and "preemptions" in said


def test_texts_of_a_dataset_become_token_ids(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps([{"conversations": [{"value": "abcd"}, {"value": "efghi"}]}]))
    args = BenchThroughput(work=WorkOptions(dataset=str(path), num_prompts=2))
    works = token_works(args, FakeEngine(tokenizer=CharTokenizer()))
    assert works == [Work([2, *b"abcd"], 5, 6)] * 2


def test_latency_is_split_in_first_token_and_the_rest(folder, tmp_path, capsys):
    output = tmp_path / "result.json"
    work = ["--batch-size", 3, "--input-len", 9, "--output-len", 5, "--num-iters", 3, "--num-iters-warmup", 1]
    assert bench("latency", folder, *work, "--output", output) == 0
    found = json.loads(output.read_text())
    assert len(found["latencies"]) == 3
    assert found["mean_latency_ms"] == pytest.approx(1e3 * sum(found["latencies"]) / 3)
    assert 0 < found["p50_ttft_ms"] < found["p50_latency_ms"] and 0 < found["p50_tpot_ms"] < found["p50_latency_ms"]
    assert found["mean_ttft_ms"] + 4 * found["mean_tpot_ms"] <= found["mean_latency_ms"]
    assert found["output_tokens_per_second"] == pytest.approx(15e3 / found["mean_latency_ms"])
    assert "first token of a request" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "arguments", "code", "sentence"),
    [
        ("latency", ["--batch-size", 5], 1, "batch_size=5 is more than max_num_seqs=4; raise --max-num-seqs"),
        ("latency", ["--batch-size", 2, "--input-len", 127, "--output-len", 8], 1, "135 tokens, the context holds 128"),
        ("latency", ["--num-iters", 0], 2, "num_iters=0 must be at least 1"),
        ("throughput", ["--random-input-len", 200], 1, "328 tokens are more than the 128 of the model's context"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(what, arguments, code, sentence, folder, capsys):
    assert bench(what, folder, *arguments) == code
    assert sentence in " ".join(capsys.readouterr().err.replace("│", " ").split())
