"""`bench serve --dataset conversations`: each turn sends the earlier ones and the answers that the server gave."""

import json

import pytest
from starlette.responses import JSONResponse

from apt_jax.engine_config import EngineConfig
from apt_jax.serve.bench.serving.load import NO_TOKEN_IDS, NOT_SENT
from apt_jax.serve.bench.work import load_dataset, make_conversations
from apt_jax.serve.bench.work_options import WorkOptions
from tests.serve.test_bench_serve import CHAT_TEMPLATE, apt_jax_server, bench
from tests.support.fake_engine import CharTokenizer, FakeEngine
from tests.support.scripted_server import DONE, Scripted, piece, usage

LENGTHS = "prompt_tokens,output_tokens\n9,5\n7,3\n"


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "turns.csv"
    path.write_text(LENGTHS)
    return f"conversations:turns=3:system_tokens=20:think_s=0.02:lengths={path}"


def caching_engine():
    config = EngineConfig(
        max_num_seqs=4, max_num_queued_reqs=8, max_num_batched_tokens=64, scheduling_policy="fcfs",
        enable_prefix_caching=True,
    )  # fmt: skip
    return FakeEngine(config, CharTokenizer(CHAT_TEMPLATE))


def measured(url, dataset, tmp_path, *flags):
    output = tmp_path / "result.json"
    assert bench(
        "--base-url", url, "--dataset", dataset, "--num-prompts", 6, "--vocab-size", 200, "--num-warmups", 0,
        "--request-rate", 40, "--save-detailed", "--output", output, *flags,
    ) == 0  # fmt: skip
    return json.loads(output.read_text())


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_later_turns_take_what_was_said_from_the_prefix_cache(endpoint, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("apt_jax.serve.bench.serving.measure.load_tokenizer", lambda name: CharTokenizer(CHAT_TEMPLATE))
    monkeypatch.setattr(CharTokenizer, "vocab_size", 256, raising=False)
    flags = ["--endpoint", "chat", "--tokenizer", "here"] if endpoint == "chat" else []
    with apt_jax_server(caching_engine()) as url:
        found = measured(url, dataset, tmp_path, *flags)
    assert found["completed"] == found["num_prompts"] == 6 and found["failed"] == 0
    by_turn = sorted(zip(found["turns"], found["input_lens"], found["cached_lens"], strict=True))
    assert [turn for turn, _, _ in by_turn] == [1, 1, 2, 2, 3, 3]
    lengths = [tokens for _, tokens, _ in by_turn]
    assert all(later - earlier >= 7 + 3 for earlier, later in zip(lengths, lengths[2:], strict=False))
    # pages of 4 tokens: all but a question, the answer's last token, and part of a page
    assert all(tokens - cached <= 9 + 1 + 3 for turn, tokens, cached in by_turn if turn > 1)
    assert found["total_cached_tokens"] == sum(found["cached_lens"]) and len(found["median_ttft_ms_by_turn"]) == 3
    assert "of prompt tokens from the prefix cache; median time to first token by turn" in capsys.readouterr().out


def test_a_turn_sends_the_very_tokens_of_the_turns_before_it(dataset, tmp_path):
    async def answers(number, body):
        ids = [100 + number, 7]
        yield {"choices": [{"index": 0, "text": "ab", "token_ids": ids, "finish_reason": "length"}]}
        yield usage(len(body["prompt"]), 2)
        yield DONE

    scripted = Scripted(answers)
    with scripted.running() as url:
        measured(url, dataset, tmp_path, "--max-concurrency", 1)
    bodies = scripted.bodies
    assert len(bodies) == 6 and [body.get("return_token_ids") for body in bodies].count(True) == 4
    for number, body in enumerate(bodies):
        before = [k for k in range(number) if body["prompt"][: len(bodies[k]["prompt"])] == bodies[k]["prompt"]]
        if before:
            said = [*bodies[before[-1]]["prompt"], 100 + before[-1], 7]
            assert body["prompt"][: len(said)] == said and len(body["prompt"]) - len(said) in (9, 7)
    assert bodies[0]["prompt"][:20] == bodies[-1]["prompt"][:20]


def test_after_a_turn_that_failed_the_others_fail_unsent_and_count(dataset, tmp_path):
    async def answer(number, body):
        yield piece("ab", "length")
        yield usage(len(body["prompt"]), 2)
        yield DONE

    scripted = Scripted(lambda n, body: JSONResponse({"error": {"message": "no"}}, 503) if n == 0 else answer(n, body))
    with scripted.running() as url:
        found = measured(url, dataset, tmp_path)
    assert found["completed"] == 1 and found["failed"] == 5 and len(scripted.bodies) == 2
    assert found["errors_by_reason"] == {NOT_SENT: 3, "HTTP 503: no": 1, NO_TOKEN_IDS: 1}


def test_runs_have_the_same_lengths_and_other_prompts(dataset):
    made = load_dataset(WorkOptions(dataset=dataset), seed=0, tokenizer=None)
    first, second = (make_conversations(made, 6, vocab_size=200, tokenizer=None, seed=(0, 3, run)) for run in (1, 2))
    assert [w.prompt_tokens for w in first] == [w.prompt_tokens for w in second] and len(first) == 2
    assert first[0].earlier == first[1].earlier != second[0].earlier
    assert len(first[0].earlier[0][1]) == 20 and first[0].num_turns == 3
    small = load_dataset(WorkOptions(dataset="conversations"), seed=0, tokenizer=None, max_model_len=300)
    with pytest.raises(ValueError, match="the context is 300; lower turns or system_tokens"):
        make_conversations(small, 6, vocab_size=200, tokenizer=None, seed=(0, 3, 0))
