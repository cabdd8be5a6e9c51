"""generation_config.json: ends of text and defaults of sampling, from the file to the answer."""

import dataclasses
import json
import logging

import httpx
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from apt_jax import LLM, SamplingParams
from apt_jax.checkpoints.generation_config import GenerationConfig, read_generation_config
from apt_jax.serve.runtime.build import with_end_ids
from apt_jax.tokenization.tokenizer import Tokenizer
from tests.support.asgi_service import run, serving
from tests.support.checkpoint_folders import TINY, write_config
from tests.support.fake_engine import CharTokenizer, FakeEngine

GIVEN = {
    "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5, "max_new_tokens": 9,
    "do_sample": True, "num_beams": 4, "typical_p": None, "eos_token_id": [5, 6, 5],
}  # fmt: skip
SAMPLING = {
    "temperature": 0.25, "top_p": 0.5, "top_k": 7, "min_p": 0.125, "repetition_penalty": 1.5, "max_tokens": 9,
}  # fmt: skip


def write(folder, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "generation_config.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.mark.parametrize("choice", ["auto", "none", "vllm"])
def test_the_model_s_own_file(tmp_path, choice):
    found = read_generation_config(write(tmp_path, GIVEN), choice)
    assert found.eos_token_ids == (5, 6), "ends of text are no matter of taste"
    assert found.sampling == (SAMPLING if choice == "auto" else {})


def test_a_folder_by_name_goes_first_and_must_have_the_file(tmp_path):
    other = write(tmp_path / "other", {"top_k": 3.0, "eos_token_id": 8})
    found = read_generation_config(write(tmp_path / "model", GIVEN), str(other))
    assert found == GenerationConfig((8,), {"top_k": 3})
    with pytest.raises(ValueError, match=r"--generation-config .*nowhere: there is no .*generation_config.json"):
        read_generation_config(tmp_path / "model", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("value", [None, {}, {"eos_token_id": None, "temperature": None}])
def test_what_is_not_said_changes_nothing(tmp_path, value):
    folder = tmp_path if value is None else write(tmp_path, value)
    assert read_generation_config(folder) == GenerationConfig()
    assert with_end_ids(TINY, GenerationConfig(), None) == TINY


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("{", "is not JSON"), ("[1]", "is not a JSON object"), ({"eos_token_id": "</s>"}, "must be a token id"),
        ({"eos_token_id": [2, -1]}, "must be a token id"), ({"eos_token_id": True}, "must be a token id"),
        ({"temperature": -1}, "temperature=-1 must be between .* --generation-config none"),
        ('{"top_p": NaN}', "top_p=nan"), ({"top_k": 1.5}, "top_k=1.5"), ({"max_new_tokens": 0}, "max_tokens=0"),
        ({"min_p": "x"}, "min_p='x'"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_told_in_a_sentence(tmp_path, value, sentence):
    with pytest.raises(ValueError, match=sentence) as told:
        read_generation_config(write(tmp_path, value))
    assert "generation_config.json" in str(told.value)


def test_all_ends_of_text_count_but_no_id_that_the_model_does_not_have():
    tokenizer = Tokenizer(Backend(WordLevel({"a": 0, "b": 1}, unk_token="a")), eos_token_id=9)
    assert with_end_ids(TINY, GenerationConfig(), tokenizer).eos_token_ids == (2, 9)
    found = with_end_ids(TINY, GenerationConfig((7, 9, 64, 50_000)), tokenizer)
    assert found == dataclasses.replace(TINY, eos_token_ids=(7, 9))
    assert with_end_ids(TINY, GenerationConfig((7,)), None).eos_token_ids == (7,), "config.json's is then out of date"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_requests_get_the_model_s_defaults_where_they_say_nothing(path):
    engine = FakeEngine(tokenizer=CharTokenizer("{{ messages[0].content }}"))
    engine.sampling_defaults = SAMPLING
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 2}
    seen = []
    add = engine.add
    engine.add = lambda ids, params, **more: (seen.append(params), add(ids, params, **more))[1]

    async def main():
        prompt = {"prompt": "a"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
        async with serving(engine) as client:
            for body in (prompt, {**prompt, **dict.fromkeys(given)}, {**prompt, **given}, {**prompt, "top_p": 0.75}):
                reply: httpx.Response = await client.post(f"/v1/{path}", json=body)
                assert reply.status_code == 200, reply.text

    run(main)
    default = SamplingParams(**SAMPLING)
    own = SamplingParams(max_tokens=2, seed=None)
    assert seen == [default, default, own, dataclasses.replace(default, top_p=0.75)]


def test_a_fine_tuned_model_stops_where_its_file_says(tmp_path, caplog):
    """The whole way: a folder, `LLM`, an answer; greedy by the file's own defaults, so that it can be foretold."""
    caplog.set_level(logging.INFO)
    write_config(tmp_path / "m", TINY)
    prompt = {"prompt_token_ids": [3, 4]}
    options = {
        "load_format": "dummy",
        "attention_backend": "xla",
        "max_num_seqs": 2,
        "num_blocks": 8,
        "calibrate": False,
    }
    options |= {"scheduling_policy": "fcfs", "max_num_batched_tokens": 16, "dtype": "float32", "cache_mode": "kv"}
    write(tmp_path / "m", {"temperature": 0.0, "max_new_tokens": 3})
    llm = LLM(str(tmp_path / "m"), **options)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=3)
    (whole,) = llm.generate(prompt, use_tqdm=False)
    ids = whole.outputs[0].token_ids
    assert len(ids) == 3 and "temperature=0.0, max_tokens=3" in caplog.text
    write(tmp_path / "m", {"eos_token_id": [60, ids[0]]})
    llm = LLM(str(tmp_path / "m"), **options, generation_config="none")
    (ended,) = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=3), use_tqdm=False)
    assert (ended.outputs[0].token_ids, ended.outputs[0].finish_reason) == (ids[:1], "stop")
    assert f"a text ends with token 60 or {ids[0]}" in caplog.text
    (on,) = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True), use_tqdm=False)
    assert on.outputs[0].token_ids == ids
