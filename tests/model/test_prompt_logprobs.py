"""Log-probabilities of prompts: those of one plain forward pass, however the prompt came into the cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apt_jax.cache import CacheKind
from apt_jax.engine.engine import Engine
from apt_jax.model_config import ModelConfig
from apt_jax.models.interface import causal_attention
from apt_jax.models.opt import OPT
from apt_jax.output import ContextExceeded, Output, TokenLogprobs
from apt_jax.request import FinishReason, SamplingParams
from apt_jax.scheduling.plan import Plan, Preempted, Reason, Scheduled
from tests.support.checkpoint_folders import random_model
from tests.support.engines import GREEDY, Orders, count_compilations, failing_dispatch, finish, make_engine

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
)  # fmt: skip
LENGTHS = (1, 2, 9, 16, 17, 33, 50, 60)
SHORT = replace(GREEDY, max_tokens=4)


@pytest.fixture(scope="module")
def model() -> OPT:
    return random_model(CONFIG, seed=0)


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    return make_engine(model, CONFIG, max_num_seqs=16, num_blocks=200)


@pytest.fixture(scope="module")
def expected(model):
    """Log-softmax `[P - 1, V]` after each token but the last, in one pass without a cache."""

    @jax.jit
    def forward(ids):
        hidden, _ = model(ids, jnp.arange(ids.shape[1])[None], causal_attention, None)
        return jax.nn.log_softmax(model.logits(hidden), axis=-1)

    def of(prompt: list[int]) -> np.ndarray:
        padded = jnp.asarray([prompt + [0] * (64 - len(prompt))], jnp.int32)  # causal: padding changes nothing before
        with jax.default_matmul_precision("highest"):
            return np.asarray(forward(padded))[0, : len(prompt) - 1]

    return of


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed + 100 * length).integers(3, 96, length).tolist()


def by_request(outputs: list[Output]) -> dict[str, tuple[TokenLogprobs, ...]]:
    """What each request brought; it must come once, with the first token."""
    found = {}
    for output in outputs:
        if output.prompt_logprobs is not None:
            assert output.request.request_id not in found and len(output.request.output_token_ids) >= 1
            found[output.request.request_id] = output.prompt_logprobs
    return found


def check(entries: tuple[TokenLogprobs, ...], prompt: list[int], expected: np.ndarray, count: int) -> None:
    """Against the plain pass: every token of the prompt but the first."""
    assert [entry.token_id for entry in entries] == prompt[1:]
    for entry, row in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4, rel=1e-5)
        assert abs(entry.rank - 1 - (row > row[entry.token_id]).sum()) <= (np.abs(row - entry.logprob) < 1e-4).sum()
        assert len(entry.top) == count
        values = [value for _, value in entry.top]
        np.testing.assert_allclose(values, np.sort(row)[::-1][:count], atol=1e-4, rtol=1e-5)
        np.testing.assert_allclose(values, row[[token for token, _ in entry.top]], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_every_position_of_every_prompt_is_as_in_one_plain_pass(engine, expected, mixed, asynchronous, monkeypatch):
    """Both kinds of cache, prompts of one chunk and several, beside requests that decode and want nothing."""
    monkeypatch.setattr(engine, "_depth", int(asynchronous))
    kinds = {f"{n}": CacheKind.HIDDEN for n in LENGTHS[::2]}
    monkeypatch.setattr(engine, "policy", Orders(kinds, mixed=mixed))
    shapes = []
    build = engine.builder.build
    monkeypatch.setattr(engine.builder, "build", lambda spans, **how: shapes.append(spans) or build(spans, **how))
    for number, length in enumerate(LENGTHS):
        engine.add(prompt_of(length), replace(SHORT, prompt_logprobs=min(3 * number, 20)), request_id=str(length))
        engine.add(prompt_of(5, number), replace(SHORT, max_tokens=9), request_id=f"plain {number}")
    found = by_request(finish(engine))
    assert set(found) == set(map(str, LENGTHS))
    for number, length in enumerate(LENGTHS):
        prompt = prompt_of(length)
        check(found[str(length)], prompt, expected(prompt), min(3 * number, 20))
    chunks = [spans for spans in shapes if any(s.request.request_id == "50" and not s.samples for s in spans)]
    assert len(chunks) >= 3, "it was prefilled in one piece"


class PreemptsInTheMiddle(Orders):
    """Takes the cache away from every request once, with its prompt half run, and once more while it decodes."""

    def __init__(self):
        super().__init__(kinds={}, preempt_at={"a": 2, "b": 3})
        self.done: set[str] = set()

    def schedule(self, state, now):
        half = [
            r for r in state.running if r.num_computed_tokens and not r.is_decoding and r.request_id not in self.done
        ]
        if not half:
            return super().schedule(state, now)
        self.done |= {r.request_id for r in half}
        return Plan(preempted=tuple(Preempted(r, Reason.PREEMPTED_NO_BLOCKS) for r in half))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_prompt_that_is_run_again_is_not_counted_twice(engine, expected, asynchronous, monkeypatch):
    monkeypatch.setattr(engine, "_depth", int(asynchronous))
    monkeypatch.setattr(engine, "policy", PreemptsInTheMiddle())
    prompts = {"a": prompt_of(40), "b": prompt_of(50)}
    requests = [engine.add(p, replace(SHORT, prompt_logprobs=2), request_id=i) for i, p in prompts.items()]
    found = by_request(finish(engine))
    assert [request.num_preemptions for request in requests] == [2, 2]
    for name, prompt in prompts.items():
        check(found[name], prompt, expected(prompt), 2)


class OneByOne(Orders):
    """Every prompt token in an iteration of its own, as if it decoded."""

    def schedule(self, state, now):
        (request,) = (*state.running, *state.waiting)
        return Plan(scheduled=(Scheduled(request, 1, CacheKind.KV, Reason.CONTINUES_PREFILL),))


def test_chunks_of_one_token(engine, expected, monkeypatch):
    monkeypatch.setattr(engine, "policy", OneByOne(kinds={}))
    prompt = prompt_of(7)
    engine.add(prompt, replace(SHORT, prompt_logprobs=1), request_id="r")
    check(by_request(finish(engine))["r"], prompt, expected(prompt), 1)


def test_a_request_that_goes_on_brings_them_again(engine, expected):
    prompt = prompt_of(20)
    params = replace(SHORT, prompt_logprobs=4)
    engine.add(prompt, params, request_id="r", output_token_ids=[7, 8])
    outputs = finish(engine)
    check(by_request(outputs)["r"], prompt, expected(prompt), 4)
    assert outputs[0].prompt_logprobs is not None and len(outputs) == 2


def test_aborts_leave_nothing_and_an_id_may_be_used_again(engine, expected, monkeypatch):
    monkeypatch.setattr(engine, "_depth", 1)
    prompts = [prompt_of(50), prompt_of(40)]
    engine.add(prompts[0], replace(SHORT, prompt_logprobs=0), request_id="r")
    engine.step()
    engine.step()
    engine.abort("r")  # with a chunk on the device
    engine.add(prompts[1], replace(SHORT, prompt_logprobs=2), request_id="r")
    found = by_request(finish(engine))
    check(found["r"], prompts[1], expected(prompts[1]), 2)
    assert not engine.prompt_logprobs._asked and not engine.prompt_logprobs._found


def test_a_failed_iteration_loses_no_position_of_those_that_wait(engine, expected, monkeypatch):
    """It fails while a preempted request's chunk is on the device; that request waits and is run again whole."""
    monkeypatch.setattr(engine, "_depth", 1)
    prompt = prompt_of(40)

    class Loses(Orders):
        step = 0

        def schedule(self, state, now):
            self.step += 1
            if self.step == 2:
                (victim,) = state.running
                other = next(r for r in state.waiting if r.request_id == "other")
                return Plan(
                    scheduled=(Scheduled(other, 5, CacheKind.KV, Reason.ADMITTED_KV),),
                    preempted=(Preempted(victim, Reason.PREEMPTED_NO_BLOCKS),),
                )
            return super().schedule(state, now)

    monkeypatch.setattr(engine, "policy", Loses(kinds={}))
    engine.add(prompt, replace(SHORT, prompt_logprobs=1), request_id="victim")
    engine.add(prompt_of(5), SHORT, request_id="other")
    engine.step()

    with failing_dispatch(engine, "RESOURCE_EXHAUSTED"):
        (ended,) = engine.step()
    assert (ended.request.request_id, ended.finish_reason) == ("other", FinishReason.ERROR)
    check(by_request(finish(engine))["victim"], prompt, expected(prompt), 1)


def test_not_a_number_in_the_prompt_ends_the_request(model):
    engine = make_engine(model, CONFIG)
    request = engine.add(prompt_of(40), replace(SHORT, prompt_logprobs=1), request_id="r")
    engine.step()
    pool = engine.runner._pool
    engine.runner._pool = replace(pool, numbers=pool.numbers.at[jnp.asarray(request.table.blocks[0])].set(jnp.nan))
    (output,) = finish(engine)
    assert output.finish_reason is FinishReason.ERROR and "not finite" in output.error


def test_nothing_compiles_and_who_asks_for_none_pays_nothing(model, monkeypatch):
    engine = make_engine(model, CONFIG)
    engine.warm_up()
    compilations = count_compilations()
    for number, length in enumerate(LENGTHS):
        engine.add(prompt_of(length), replace(SHORT, prompt_logprobs=number % 3), request_id=str(number))
    finish(engine)
    assert compilations() == 0 and engine.figures().num_recompiles == 0

    dispatch = engine.runner.dispatch

    def scores_nothing(batch):
        results = dispatch(batch)
        assert results.scores == (), "asked for nothing"
        return results

    monkeypatch.setattr(engine.runner, "dispatch", scores_nothing)
    engine.add(prompt_of(40), SHORT, request_id="plain")
    assert all(output.prompt_logprobs is None for output in finish(engine))


@pytest.mark.parametrize("count", [-1, 21, 1.5, True])
def test_how_many_is_checked(count):
    with pytest.raises(ValueError, match=f"prompt_logprobs={count}"):
        SamplingParams(prompt_logprobs=count)


def test_a_prompt_that_fills_the_context_is_scored(engine, expected):
    """With max_tokens=0 the last position is run as well; the token after it is not asked for."""
    prompt = prompt_of(64)
    engine.add(prompt, replace(GREEDY, max_tokens=0, prompt_logprobs=3), request_id="whole")
    found = by_request(finish(engine))["whole"]
    check(found, prompt, expected(prompt), 3)
    for length, max_tokens in ((65, 0), (64, 1), (64, None)):
        with pytest.raises(ContextExceeded, match="64"):
            engine.add(prompt_of(length), replace(GREEDY, max_tokens=max_tokens, prompt_logprobs=0), request_id="more")
