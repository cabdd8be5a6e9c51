"""The engine's promises: no copy of the pool, nothing compiles while serving, a failure ends only its requests."""

import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.attention.kinds import KindMix
from apt_jax.attention.pool import Pool
from apt_jax.batching.buckets import Buckets
from apt_jax.batching.builder import BatchBuilder, table_pages
from apt_jax.cache import BlockPool, CacheKind
from apt_jax.engine.engine import Engine
from apt_jax.execution.arguments import Shapes, pages_multiple
from apt_jax.execution.compiler import temporary_bytes
from apt_jax.execution.pool import pool_shape
from apt_jax.execution.programs import ConversionKey, StepKey
from apt_jax.execution.runner import Runner
from apt_jax.execution.steps import run_step
from apt_jax.execution.weights.layer_layout import LayerLayout
from apt_jax.execution.weights.layout import StackedLayout
from apt_jax.model_config import ModelConfig
from apt_jax.models.opt import OPT
from apt_jax.output import DeviceLost, QueueFull
from apt_jax.request import FinishReason, Request, SamplingParams
from apt_jax.scheduling.plan import Plan, Reason, Scheduled
from apt_jax.scheduling.state import Limits, SchedulerState
from tests.support.checkpoint_folders import random_model
from tests.support.engines import GREEDY, Orders, count_compilations, failing_dispatch, finish, make_engine, run

CONFIG = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> OPT:
    return random_model(CONFIG, seed=0)


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    """One engine for the tests that need nothing special; it must be idle between them."""
    return make_engine(model, CONFIG, max_num_queued_reqs=20)


def test_steps_update_the_pool_in_place():
    """Step and conversion alias the donated pool and need temporaries far smaller than it."""
    config = replace(CONFIG, num_hidden_layers=4, hidden_size=64, word_embed_proj_dim=64)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: OPT(config, rngs=nnx.Rngs(0))))
    model = nnx.merge(graphdef, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state))
    buckets = Buckets(max_num_seqs=8, max_num_batched_tokens=16)
    shapes = Shapes(8, 64, 8, 16, KindMix((CacheKind.KV, CacheKind.HIDDEN)))
    num_blocks = 2048
    pool_bytes = np.prod(pool_shape(config, num_blocks, 16)) * 4
    for layout in (
        LayerLayout.of(model, jax.devices()[0]),
        StackedLayout(jax.devices()[0]),
    ):  # a CPU's, an accelerator's
        compiled = Runner(layout.lay_out(model), config, shapes, buckets).programs
        steps = [compiled[StepKey(size, num_blocks)] for size in (buckets.prefill[-1], buckets.decode[-1])]
        programs = [step.programs[len(step.programs) // 2] for step in steps]  # the layers'
        programs += compiled[ConversionKey(num_blocks)].programs
        for program in programs:
            assert temporary_bytes(program) < pool_bytes / 20
            assert program.memory_analysis().alias_size_in_bytes >= pool_bytes


def test_nothing_compiles_after_warm_up(model):
    """500 random requests of every sampling option and cache treatment cause no compilation."""
    engine = make_engine(model, CONFIG, max_num_queued_reqs=500)
    engine.warm_up()
    assert engine.runner.num_programs <= 32
    compilations = count_compilations()
    generator = random.Random(0)
    for number in range(500):
        params = SamplingParams(
            temperature=generator.choice([0, 0.7, 1.5]),
            top_k=generator.choice([0, 5]),
            top_p=generator.choice([1.0, 0.8]),
            min_p=generator.choice([0.0, 0.1]),
            repetition_penalty=generator.choice([1.0, 1.3]),
            logit_bias=generator.choice([None, {5: 3.0}]),
            logprobs=generator.choice([None, 3]),
            max_tokens=generator.randint(1, 12),
            min_tokens=generator.randint(0, 1),
        )
        prompt = [generator.randrange(3, 96) for _ in range(generator.randint(1, 50))]
        engine.add(prompt, params, request_id=str(number))
    outputs = finish(engine)
    assert sum(output.finish_reason is not None for output in outputs) == 500
    assert {output.finish_reason for output in outputs if output.finish_reason} <= {
        FinishReason.STOP,
        FinishReason.LENGTH,
    }
    assert compilations() == 0


def test_bfloat16_hidden_is_as_precise_as_kv():
    """Relative error of the logits against float32, with outlier channels: hidden at most 1.5 x KV."""
    config = ModelConfig(
        vocab_size=200, hidden_size=128, num_hidden_layers=4, ffn_dim=256, max_position_embeddings=128,
        num_attention_heads=4, word_embed_proj_dim=128,
    )  # fmt: skip
    graphdef, state = nnx.split(random_model(config, seed=1))

    def scaled(path, leaf):
        values = np.asarray(leaf[...], np.float32)
        if path[-1] == "kernel":
            values = values * {"fc1": 0.06, "fc2": 0.03}.get(path[-2], 0.09)
        if path[-2] == "self_attn_layer_norm":
            values = 1 + 0.1 * values if path[-1] == "scale" else 0.1 * values
            values[..., ::40] *= 30  # a few channels thirty times as large, as OPT's have
        return leaf.replace(jnp.asarray(values, jnp.bfloat16))

    flat = [(path, scaled(path, leaf)) for path, leaf in nnx.to_flat_state(state)]
    low = nnx.from_flat_state(flat)
    high = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    low_graph = nnx.split(nnx.eval_shape(lambda: OPT(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))[0]
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 200, n).tolist() for n in (9, 30, 61, 100, 44, 77, 120, 16)]
    exact = last_logits(nnx.merge(graphdef, high), config, prompts, CacheKind.KV)
    error = {}
    for kind in CacheKind:
        found = last_logits(nnx.merge(low_graph, low), config, prompts, kind)
        error[kind] = np.mean(np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1))
    assert 1e-4 < error[CacheKind.KV] < 0.1
    assert error[CacheKind.HIDDEN] <= 1.5 * error[CacheKind.KV], error


def last_logits(model: OPT, config: ModelConfig, prompts: list[list[int]], kind: CacheKind) -> np.ndarray:
    """Logits after each prompt: all but its last token prefilled, the last decoded over the cache of `kind`."""
    rows, length = len(prompts), config.max_position_embeddings
    buckets = Buckets(max_num_seqs=rows, max_num_batched_tokens=length)
    state = SchedulerState(BlockPool(rows * 32, 8), Limits(rows, length))
    builder = BatchBuilder(buckets, num_slots=rows, table_pages=table_pages(length, 8, pages_multiple(8)))
    kinds = KindMix((kind,))
    graphdef, weights = nnx.split(model)
    dtype = model.embed_tokens.embedding[...].dtype
    device = Pool(jnp.zeros(pool_shape(config, rows * 32, 8), dtype)), jnp.zeros((rows, length), jnp.int32)
    requests = [Request(str(i), p, SamplingParams(), 0.0, 1) for i, p in enumerate(prompts)]

    def step(decode_only):
        return jax.jit(lambda weights, *rest: run_step(
            nnx.merge(graphdef, weights), kinds, rows * 32, decode_only, rows, *rest
        ))  # fmt: skip

    prefill, decode = step(False), step(True)
    for request in requests:
        state.add(request)
        entry = Scheduled(request, request.num_prompt_tokens - 1, kind, Reason.ADMITTED_KV)
        batch = builder.build(state.apply(Plan(scheduled=(entry,)), 0.0))
        batch = batch if batch.bucket == buckets.prefill[-1] else widen(batch, builder, request)
        _, *device, _, _ = prefill(weights, *device, batch.tokens, batch.rows)
    entries = tuple(Scheduled(request, 1, kind, Reason.DECODES) for request in requests)
    batch = builder.build(state.apply(Plan(scheduled=entries), 0.0))
    hidden, *_ = decode(weights, *device, batch.tokens, batch.rows)
    return np.asarray(jax.jit(lambda weights, x: nnx.merge(graphdef, weights).logits(x))(weights, hidden))


def widen(batch, builder, request):
    """The same batch in the largest prefill shape, so that one program serves every prompt."""
    bucket, tokens = builder.buckets.prefill[-1], batch.tokens
    extra, R = bucket.tokens - len(tokens.ids), bucket.rows
    padded = tokens._replace(
        ids=np.pad(tokens.ids, (0, extra)),
        on_device=np.pad(tokens.on_device, (0, extra)),
        row=np.pad(np.where(tokens.row == batch.bucket.rows, bucket.rows, tokens.row), (0, extra), constant_values=R),
        position=np.pad(tokens.position, (0, extra)),
    )  # fmt: skip
    rows = jax.tree.map(lambda a: np.pad(a, [(0, bucket.rows - len(a))] + [(0, 0)] * (a.ndim - 1)), batch.rows)
    slots = np.full(bucket.rows, builder.num_slots, np.int32)
    slots[: len(batch.rows.slot)] = batch.rows.slot
    return batch._replace(bucket=bucket, tokens=padded, rows=rows._replace(slot=slots))


def test_abort_frees_blocks_at_once_while_waiting_and_running(engine):
    for number in range(12):  # 8 can run
        engine.add([5, 6, 7], replace(GREEDY, max_tokens=40), request_id=str(number))
    engine.step()
    engine.step()
    assert len(engine.state.running) == 8
    held = engine.state.pool.num_free
    engine.abort("3")
    assert engine.state.pool.num_free > held
    engine.abort("11")
    engine.abort("11")
    engine.abort("never heard of")
    outputs = finish(engine)
    ended = {o.request.request_id: o.finish_reason for o in outputs if o.finish_reason}
    assert ended.pop("3") is ended.pop("11") is FinishReason.ABORT
    assert set(ended.values()) == {FinishReason.LENGTH}
    assert len(ended) == 10


def test_bad_requests_are_refused_with_a_sentence_and_leave_nothing(engine):
    cases = [
        ([], GREEDY, "the prompt is empty"),
        ([1] * 64, GREEDY, "the prompt has 64 tokens, but the context holds 64"),
        ([96], GREEDY, r"the prompt has token id 96, which is not in the vocabulary 0\.\.95"),
        ([-1], GREEDY, "the prompt has token id -1, which is not in the vocabulary"),
        ([5], replace(GREEDY, logit_bias={96: 1.0}), "logit_bias has token id 96"),
        ([5], replace(GREEDY, stop_token_ids=[500]), "stop_token_ids has token id 500"),
        ([5], replace(GREEDY, stop=["x"]), "stop strings need a tokenizer"),
        ([5], replace(GREEDY, n=2), "n=2"),
    ]
    for prompt, params, message in cases:
        with pytest.raises(ValueError, match=message):
            engine.add(prompt, params, request_id="bad")
    engine.add([5], GREEDY, request_id="twice")
    with pytest.raises(ValueError, match="'twice' is in use"):
        engine.add([5], GREEDY, request_id="twice")
    for number in range(19):
        engine.add([5], replace(GREEDY, max_tokens=1), request_id=str(number))
    with pytest.raises(QueueFull, match="20 requests are waiting, max_num_queued_reqs=20"):
        engine.add([5], GREEDY, request_id="one too many")
    finish(engine)


def test_more_ends_than_the_device_holds_are_refused(model):
    engine = make_engine(model, replace(CONFIG, eos_token_ids=tuple(range(9))))
    params = SamplingParams(stop_token_ids=range(64), max_tokens=1)
    with pytest.raises(ValueError, match="stop_token_ids and the model's end-of-sequence ids are 73 together"):
        engine.add([1], params, request_id="r")
    engine.add([1], replace(params, ignore_eos=True), request_id="r")


def test_a_request_larger_than_the_pool_is_refused(model):
    engine = make_engine(model, CONFIG, num_blocks=7)
    with pytest.raises(ValueError, match=r"up to 63 tokens do not fit in the cache of 7 blocks of 8 tokens"):
        engine.add([5] * 10, replace(GREEDY, max_tokens=None), request_id="large")
    assert run(engine, [[5] * 10], replace(GREEDY, max_tokens=46))[0].finish_reason is FinishReason.LENGTH


def test_end_of_sequence_stop_ids_and_limits(engine):
    end = SamplingParams(temperature=0, max_tokens=30, logit_bias={2: 100.0})
    assert run(engine, [[5]], end)[0].output_token_ids == [2]
    later = run(engine, [[5]], replace(end, min_tokens=4))[0]
    assert later.output_token_ids[-1] == 2
    assert len(later.output_token_ids) == 5
    assert later.finish_reason is FinishReason.STOP
    assert later.stop_reason is None
    assert run(engine, [[5]], replace(end, ignore_eos=True))[0].output_token_ids == [2] * 30
    stopped = run(engine, [[5]], replace(end, logit_bias={9: 100.0}, stop_token_ids=[9]))[0]
    assert (stopped.output_token_ids, stopped.stop_reason) == ([9], 9)
    full = run(engine, [[5] * 60], replace(GREEDY, max_tokens=None))[0]
    assert (len(full.output_token_ids), full.finish_reason) == (4, FinishReason.LENGTH)


def test_not_a_number_ends_its_request_and_no_other(model):
    """A request whose cached vectors are NaN fails; those beside it, and those that reuse its blocks, do not notice."""
    engine = make_engine(model, CONFIG)
    prompts = [[5, 6, 7], [8, 9, 10]]
    expected = [r.output_token_ids for r in run(engine, prompts, replace(GREEDY, max_tokens=20))]
    requests = [engine.add(p, replace(GREEDY, max_tokens=20), request_id=str(i)) for i, p in enumerate(prompts)]
    engine.step()
    runner, blocks = engine.runner, requests[0].table.blocks[0]
    runner._pool = replace(runner._pool, numbers=runner._pool.numbers.at[jnp.asarray(blocks)].set(jnp.nan))
    outputs = finish(engine)
    ended = {o.request.request_id: o for o in outputs if o.finish_reason}
    assert ended["0"].finish_reason is FinishReason.ERROR
    assert "not finite" in ended["0"].error
    assert requests[1].output_token_ids == expected[1]
    assert [r.output_token_ids for r in run(engine, prompts, replace(GREEDY, max_tokens=20))] == expected


def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(model):
    engine = make_engine(model, CONFIG)
    params = replace(GREEDY, max_tokens=6)
    expected = run(engine, [[5, 6]], params)[0].output_token_ids
    engine.add([5, 6], params, request_id="unlucky")
    engine.step()

    with failing_dispatch(engine, "RESOURCE_EXHAUSTED: out of memory"):
        (last,) = engine.step()
    assert finish(engine) == []
    assert last.finish_reason is FinishReason.ERROR
    assert "out of memory" in last.error
    assert run(engine, [[5, 6]], params)[0].output_token_ids == expected


def test_a_failing_step_also_ends_the_preempted_one_whose_token_is_lost_with_it(engine, monkeypatch):
    monkeypatch.setattr(engine, "_depth", 1)  # as with async_scheduling
    monkeypatch.setattr(engine, "policy", Orders(kinds={}, preempt_at={"0": 2}))
    for number in range(2):
        engine.add([5, 6], replace(GREEDY, max_tokens=6), request_id=str(number))
    engine.step()
    engine.step()

    with failing_dispatch(engine, "RESOURCE_EXHAUSTED: out of memory"):
        outputs = engine.step()
    assert [entry.request.request_id for entry in engine.last_plan.preempted] == ["0"]
    ended = {o.request.request_id: o for o in [*outputs, *finish(engine)] if o.finish_reason}
    assert [ended[i].finish_reason for i in "01"] == [FinishReason.ERROR] * 2
    assert all("out of memory" in output.error for output in ended.values())


def test_stop_strings_before_min_tokens_are_text_like_any_other(engine):
    class Letters:
        """One character per token."""

        def detokenizer(self, skip_special_tokens, prompt_token_ids):
            return self

        def push(self, token_ids):
            return "".join(map(chr, token_ids))

        def flush(self):
            return ""

    engine = Engine(engine.setup, Letters())  # the same programs; no other engine is at work
    params = SamplingParams(temperature=0, max_tokens=20, logit_bias={ord("A"): 100}, stop="AA")
    for min_tokens, text in ((0, ""), (2, "A"), (5, "AAAA")):
        request = engine.add([5], replace(params, min_tokens=min_tokens), request_id=text)
        outputs = finish(engine)
        assert "".join(output.text for output in outputs) == text
        assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, "AA")
        assert len(request.output_token_ids) == len(text) + 2


def test_a_policy_that_plans_nothing_cannot_hang_the_engine(model):
    class Lazy(Orders):
        def schedule(self, state, now):
            return Plan()

    engine = make_engine(model, CONFIG)
    engine.policy = Lazy(kinds={})
    engine.add([5], GREEDY, request_id="stuck")
    (output,) = finish(engine)
    assert output.finish_reason is FinishReason.ERROR
    assert "planned nothing with 1 waiting" in output.error


def test_asynchronous_scheduling_reads_a_step_while_the_next_runs(model, monkeypatch):
    """The host dispatches step n+1 before it reads step n, reads once per step, and the tokens are the same."""
    sync = make_engine(model, CONFIG, async_scheduling=False)
    engine = make_engine(model, CONFIG, async_scheduling=True)
    events = []
    dispatch, read = engine.runner.dispatch, engine.runner.read
    monkeypatch.setattr(engine.runner, "dispatch", lambda batch: (events.append("dispatch"), dispatch(batch))[1])
    monkeypatch.setattr(engine.runner, "read", lambda sampled: (events.append("read"), read(sampled))[1])
    params = [replace(GREEDY, max_tokens=9), replace(GREEDY, max_tokens=5)]
    prompts = [[5, 6, 7], [9]]
    tokens = [r.output_token_ids for r in run(engine, prompts, params)]
    assert tokens == [r.output_token_ids for r in run(sync, prompts, params)]
    assert events[:6] == ["dispatch", "dispatch", "read", "dispatch", "read", "dispatch"]
    assert events.count("read") == events.count("dispatch")


def test_too_little_memory_names_bytes_and_flag(model):
    with pytest.raises(ValueError, match=r"max_model_len=64 needs .* MiB of cache.*raise --cache-memory-bytes"):
        make_engine(model, CONFIG, num_blocks=None, cache_memory_bytes=10_000)
    with pytest.raises(ValueError, match=r"max_model_len=65 is more than the model's max_position_embeddings=64"):
        make_engine(model, CONFIG, max_model_len=65)


def test_logprobs_follow_the_request(engine):
    params = [SamplingParams(temperature=0, max_tokens=3, logprobs=count) for count in (0, 5)]
    engine.add([5, 6], params[0], request_id="none")
    engine.add([5, 6], params[1], request_id="five")
    outputs = finish(engine)
    for output in outputs:
        (entry,) = output.logprobs
        assert len(entry.top) == output.request.params.logprobs
        assert entry.rank == 1
        if entry.top:
            assert entry.top[0] == (entry.token_id, pytest.approx(entry.logprob))
            values = [value for _, value in entry.top]
            assert values == sorted(values, reverse=True)


def test_a_device_that_takes_no_cache_after_a_failed_step_is_lost(model, monkeypatch):
    engine = make_engine(model, CONFIG)

    def fail(*_):
        raise RuntimeError("the device is gone")

    engine.add([5], GREEDY, request_id="r")
    monkeypatch.setattr(engine.runner, "dispatch", fail)
    monkeypatch.setattr(engine.runner, "reset", fail)
    with pytest.raises(DeviceLost, match="does not work any more after a failed step: the device is gone"):
        engine.step()
    assert engine.figures().num_failed_steps == 1


def test_a_request_goes_on_from_tokens_of_an_earlier_run(model):
    engine = make_engine(model, CONFIG)
    params = SamplingParams(seed=3, max_tokens=30, ignore_eos=True, presence_penalty=0.5)
    whole = run(engine, [[5, 6, 7]], params)[0].output_token_ids
    for given in (1, 13, 29):
        request = engine.add([5, 6, 7], params, request_id="again", output_token_ids=whole[:given])
        finish(engine)
        assert request.output_token_ids == whole and request.finish_reason is FinishReason.LENGTH
    with pytest.raises(ValueError, match="output_token_ids has all 30 tokens"):
        engine.add([5, 6, 7], params, request_id="done", output_token_ids=whole)
