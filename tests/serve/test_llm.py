"""`LLM` over the fake engine: shapes, order, errors."""

import io
import subprocess
import sys

import pytest
import tqdm

import apt_jax.serve.llm
from apt_jax import LLM, SamplingParams, progress
from tests.support.fake_engine import CharTokenizer, FakeEngine


@pytest.fixture
def engine():
    return FakeEngine(tokenizer=CharTokenizer())


@pytest.fixture
def llm(engine, monkeypatch):
    monkeypatch.setattr(apt_jax.serve.llm, "build_engine", lambda model, **options: engine)
    return LLM("tiny")


@pytest.fixture
def llm_without_tokenizer(monkeypatch):
    monkeypatch.setattr(apt_jax.serve.llm, "build_engine", lambda model, **options: FakeEngine())
    return LLM("tiny")


def generate(llm, prompts, params=None):
    return llm.generate(prompts, params, use_tqdm=False)


def test_one_prompt_gives_a_list_of_one(llm):
    (result,) = generate(llm, "ab", SamplingParams(max_tokens=3))
    (output,) = result.outputs
    assert (result.prompt, result.prompt_token_ids, result.finished) == ("ab", [2, 97, 98], True)
    assert (output.index, output.text, output.token_ids) == (0, "cde", [99, 100, 101])
    assert (output.finish_reason, output.stop_reason) == ("length", None)
    assert output.logprobs is None and output.cumulative_logprob is None
    times = result.metrics
    assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time
    assert times.ttft >= times.time_in_queue >= 0 and times.num_preemptions == 0 and result.num_cached_tokens == 0


def test_many_prompts_of_all_kinds_come_back_in_order(llm):
    prompts = ["a", {"prompt": "b"}, {"prompt_token_ids": [99]}, *("A" * i for i in range(1, 30))]
    results = generate(llm, prompts, SamplingParams(max_tokens=1))
    assert [r.outputs[0].text for r in results] == ["b", "c", "d", *["B"] * 29]
    assert [r.prompt for r in results[:3]] == ["a", "b", None]
    assert len({r.request_id for r in results}) == 32


def test_default_params_are_vllm_s(llm):
    assert generate(llm, "A")[0].outputs[0].text == "BCDEFGHIJKLMNOPQ"


def test_params_may_be_one_for_each(llm):
    params = [
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=2, n=2),
        SamplingParams(stop_token_ids=[ord("z")]),
    ]
    results = generate(llm, ["a", "b", "x"], params)
    assert [[o.text for o in r.outputs] for r in results] == [["b"], ["cd", "cd"], ["yz"]]
    assert [o.index for o in results[1].outputs] == [0, 1]
    assert (results[2].outputs[0].finish_reason, results[2].outputs[0].stop_reason) == ("stop", ord("z"))
    with pytest.raises(ValueError, match="2 prompts but 1 params"):
        generate(llm, ["a", "b"], [SamplingParams()])


def test_logprobs_are_dicts_by_token_id(llm):
    output = generate(llm, "a", SamplingParams(max_tokens=2, logprobs=2))[0].outputs[0]
    assert output.cumulative_logprob == -1.0
    assert [sorted(entry) for entry in output.logprobs] == [[98, 99], [99, 100]]
    first = output.logprobs[0]
    assert (first[98].logprob, first[98].rank, first[98].decoded_token) == (-0.5, 1, "b")
    assert (first[99].logprob, first[99].rank) == (-1.5, 2)


def test_prompt_logprobs_belong_to_the_prompt(llm):
    plain, asked = generate(llm, ["ab", "ab"], [SamplingParams(), SamplingParams(n=2, prompt_logprobs=1)])
    assert plain.prompt_logprobs is None
    first, a, b = asked.prompt_logprobs
    assert first is None and (sorted(a), sorted(b)) == ([97, 98], [98, 99])
    assert (a[97].logprob, a[97].rank, a[97].decoded_token) == (-1.5, 2, "a")
    assert (a[98].logprob, a[98].rank, a[98].decoded_token) == (-0.5, 1, "b")


def test_without_a_tokenizer_token_ids_work_and_text_is_an_error(llm_without_tokenizer):
    llm = llm_without_tokenizer
    output = generate(llm, {"prompt_token_ids": [7]}, SamplingParams(max_tokens=2))[0].outputs[0]
    assert output.token_ids == [8, 9]
    with pytest.raises(ValueError, match="has no tokenizer; use token_ids"):
        _ = output.text
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        generate(llm, "text")
    with pytest.raises(ValueError, match="stop needs a tokenizer"):
        generate(llm, {"prompt_token_ids": [7]}, SamplingParams(stop="x"))


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ("", "prompt 0 is empty"),
        (["a", 3], "prompt 1 is a int; give a text"),
        ([{"text": "a"}], r"prompt 0 has the keys \['text'\]; give either prompt or prompt_token_ids"),
        (["a", "b", {"prompt_token_ids": [1, 999]}, "c"], "prompt 2 of 4: prompt has token id 999"),
        ([{"prompt_token_ids": []}], "prompt 0 of 1: prompt is empty"),
    ],
)
def test_bad_prompts_are_refused_and_leave_nothing_running(llm, engine, prompts, sentence):
    generate(llm, ["a"] * 5)
    with pytest.raises(ValueError, match=sentence):
        generate(llm, prompts)
    assert engine.is_idle
    assert generate(llm, "a", SamplingParams(max_tokens=1))[0].outputs[0].text == "b"


def test_an_interrupt_leaves_nothing_running(llm, engine):
    step = engine.step

    def interrupted():
        if engine.num_steps == 3:
            raise KeyboardInterrupt
        return step()

    engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        generate(llm, ["a"] * 20)
    assert engine.is_idle


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="unknown option max_num_seq=4; did you mean max_num_seqs"):
        LLM("tiny", max_num_seq=4)
    with pytest.raises(ValueError, match="unknown option tokeniser='x'; did you mean tokenizer"):
        LLM("tiny", tokeniser="x")


def test_importing_the_package_is_light():
    code = "import sys, apt_jax; from apt_jax import SamplingParams; print('jax' in sys.modules, dir(apt_jax))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False") and "LLM" in done.stdout
    with pytest.raises(ImportError):
        from apt_jax import Nothing  # noqa: F401


def test_vllm_s_call_works_in_every_spelling(llm, capsys):
    params = SamplingParams(max_tokens=2)
    calls = [
        llm.generate(["a", "b"], sampling_params=params),
        llm.generate(prompts=["a", "b"], sampling_params=[params, params], use_tqdm=False),
        llm.generate(["a", "b"], params, False, lora_request=None, priority=[0, 1]),
        llm.generate(["a", {"prompt": "b", "multi_modal_data": None}], params=params, priority=3),
        llm.generate([{"prompt": "a", "prompt_token_ids": [97]}, {"prompt_token_ids": [98]}], params),
    ]
    assert [[r.outputs[0].text for r in results] for results in calls] == [["bc", "cd"]] * 5
    assert calls[-1][0].prompt == "a" and capsys.readouterr().err == ""


def test_priorities_reach_the_engine(llm, engine, monkeypatch):
    found, add = [], engine.add
    monkeypatch.setattr(engine, "add", lambda *args, **more: found.append(more["priority"]) or add(*args, **more))
    llm.generate(["a", "b"], SamplingParams(max_tokens=1), priority=[5, -1])
    assert found == [5, -1]


def test_a_bar_of_another_class_is_taken(llm):
    made = []

    class Bar(tqdm.tqdm):
        def __init__(self, *args, **more):
            super().__init__(*args, **more, file=io.StringIO())
            made.append(self)

    llm.generate(["a", "b"], use_tqdm=Bar)
    assert [(bar.n, bar.total) for bar in made] == [(2, 2)]


def test_what_is_not_served_is_named(llm):
    with pytest.raises(ValueError, match="lora_request: LoRA adapters are not served"):
        llm.generate("a", lora_request="x")
    with pytest.raises(ValueError, match="two names of one argument"):
        llm.generate("a", SamplingParams(), params=SamplingParams())
    with pytest.raises(ValueError, match="1 prompts but 2 priority"):
        llm.generate("a", priority=[1, 2])


def test_bars_are_for_terminals(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert not progress.is_hidden() and progress.is_hidden(wanted=False)
    monkeypatch.setattr(progress, "_is_off", True)
    assert progress.is_hidden()
    monkeypatch.setattr(progress, "_is_off", False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert progress.is_hidden()


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_a_chat_and_several_become_prompts_by_the_template(llm):
    one = [{"role": "user", "content": "a"}]
    params = SamplingParams(max_tokens=2)
    (result,) = llm.chat(one, params, use_tqdm=False, chat_template=TEMPLATE)
    assert (result.prompt, result.prompt_token_ids) == ("user: a\n", [ord(c) for c in "user: a\n"])
    assert (
        result.outputs[0].text
        == generate(llm, {"prompt_token_ids": result.prompt_token_ids}, params)[0].outputs[0].text
    )
    both = llm.chat([one, [*one, {"role": "assistant", "content": "b"}]], params, False, chat_template=TEMPLATE)
    assert [r.prompt for r in both] == ["user: a\n", "user: a\nassistant: b\n"]


@pytest.mark.parametrize(
    ("messages", "template", "sentence"),
    [
        ([{"role": "user", "content": "a"}], None, "chat 0 of 1: this model has no chat template; give chat_template="),
        ([[{"role": "user", "content": "a"}], [{"role": "user"}]], TEMPLATE, "chat 1 of 2: .*content"),
        ([{"role": "user", "content": "a"}], "{{ 1 / 0 }}", "chat 0 of 1: the chat template fails"),
    ],
)
def test_chats_that_cannot_be_prompts(llm, engine, messages, template, sentence):
    with pytest.raises(ValueError, match=sentence):
        llm.chat(messages, use_tqdm=False, chat_template=template)
    assert not engine.has_unfinished


def test_without_a_tokenizer_nobody_can_chat(llm_without_tokenizer):
    with pytest.raises(ValueError, match="no tokenizer, so it cannot chat"):
        llm_without_tokenizer.chat([{"role": "user", "content": "a"}], chat_template=TEMPLATE)


def test_a_with_statement_gives_the_engine_back(llm, engine):
    with llm as opened:
        assert opened is llm and opened.get_tokenizer() is engine.tokenizer
    llm.close()
    for call in (llm.get_tokenizer, lambda: llm.generate("a"), lambda: llm.embed("a"), lambda: llm.chat([])):
        with pytest.raises(
            ValueError, match=r"this LLM was closed, by close.* or the end of its `with`; make a new one"
        ):
            call()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda llm: llm.generate(None), r"prompts=None must be a text, \{'prompt_token_ids': \[...\]\}, or a list"),
        (lambda llm: llm.generate(5), "prompts=5 must be a text"),
        (lambda llm: llm.generate([5]), "prompt 0 is a int; give a text"),
        (lambda llm: llm.embed(5), "prompts=5 must be a text"),
        (lambda llm: llm.encode(b"ab"), "must be a text"),
        (lambda llm: llm.score(5, "a"), "data_1=5 must be a text"),
        (lambda llm: llm.score("a", None), "data_2=None must be a text"),
        (lambda llm: llm.generate("a", "warm"), "params has 'warm'; give a SamplingParams for all prompts, or a list"),
        (lambda llm: llm.generate("a", [None]), "params has None; give a SamplingParams for all"),
        (lambda llm: llm.generate("a", {"n": 1}), "params has "),
        (lambda llm: llm.generate("a", priority="high"), "priority has 'high'; give a whole number for all prompts"),
        (lambda llm: llm.generate("a", priority=True), "priority has True; give a whole number"),
        (lambda llm: llm.generate({"prompt": "a", "cache_salt": ""}), "prompt 0 has cache_salt=''; give a text, or"),
        (lambda llm: llm.generate({"prompt": 5, "prompt_token_ids": [5]}), "give either prompt or prompt_token_ids"),
        (
            lambda llm: llm.generate({"prompt_token_ids": 5}),
            "prompt 0 has prompt_token_ids=5; give a list of token ids",
        ),
        (lambda llm: llm.generate({"prompt_token_ids": "abc"}), "has prompt_token_ids='abc'; give a list of token ids"),
        (lambda llm: llm.generate({"prompt_token_ids": [1.5]}), "prompt 0 has the token id 1.5; give whole numbers"),
        (
            lambda llm: llm.generate("a", SamplingParams(truncate_prompt_tokens=9999)),
            "tokens=9999 is more",
        ),
    ],
)
def test_arguments_of_another_type_are_a_sentence(llm, engine, call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(llm)
    assert engine.is_idle


def test_nothing_to_score_gives_nothing(llm):
    assert llm.score([], "a") == llm.score("a", []) == llm.score([], []) == []


def test_prompts_are_cut_as_asked(llm):
    for asked, kept in ((3, "def"), (100, "\2abcdef"), (-1, "\2abcdef")):
        (result,) = generate(llm, "abcdef", SamplingParams(max_tokens=1, truncate_prompt_tokens=asked))
        assert bytes(result.prompt_token_ids).decode() == kept
    context = llm.engine.max_model_len
    (result,) = generate(
        llm, {"prompt_token_ids": [5] * 3 * context}, SamplingParams(max_tokens=7, truncate_prompt_tokens=-1)
    )
    assert len(result.prompt_token_ids) == context - 7


def test_what_the_context_has_no_room_for_is_cut_as_in_vllm(llm):
    """Over HTTP it is refused, as there."""
    context = llm.engine.max_model_len
    (result,) = generate(llm, {"prompt_token_ids": [65] * (context - 5)}, SamplingParams(max_tokens=100))
    assert len(result.outputs[0].token_ids) == 5 and result.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("module", ["apt_jax", "apt_jax.serve"])
def test_the_version_by_every_way_to_start_the_command(module):
    shown = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=120)
    assert (shown.returncode, shown.stdout) == (0, f"apt-jax {apt_jax.__version__}\n")
