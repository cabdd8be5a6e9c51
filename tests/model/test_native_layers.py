"""A step through all layers in one C++ call, against the layers in XLA one after the other."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from apt_jax.batching.arrays import Tokens
from apt_jax.cpu_kernels import library
from apt_jax.cpu_kernels.large_pages import LargePages
from apt_jax.execution.forms.interface import WholeStep
from apt_jax.execution.forms.layered import LayeredStep
from apt_jax.execution.forms.native import NativeForm, scratch_bytes
from apt_jax.execution.weights.int8 import PARTS
from apt_jax.models.opt import OPT
from tests.support import native_steps
from tests.support.engines import GREEDY, Orders, finish, make_engine
from tests.support.native_steps import BARE, HIDDEN, KV, ODD, PLAIN, POST_NORM, UNEVEN, Step, packed_weights

try:
    library.register()
except library.Unavailable as error:
    pytest.skip(f"the C++ kernels cannot be had here: {error}", allow_module_level=True)


def decoding(contexts, hidden):
    """Rows of a decode step, each with as many tokens as `contexts` says, the new one included; 0 is padding."""
    return [(max(c - 1, 0), min(c, 1), own) for c, own in zip(contexts, hidden, strict=True)]


MIXED = decoding([1, 8, 0, 9, 17, 30], [True, False, False, True, False, True])
ALL_HIDDEN = decoding([3, 0, 5, 16] * 5, [True] * 20)
ALL_KV = decoding([40] + [2] * 16, [False] * 17)
PROMPTS = [(0, 40, False), (0, 8, True), (0, 3, True), (0, 7, False), (0, 0, False), (0, 100, True)]
CHUNKS = [(30, 1, True), (17, 60, True), (64, 33, False), (5, 4, True), (8, 1, False), (21, 8, True), (0, 9, False)]
MANY = [(110, 9, True), (100, 8, False)] * 20  # more keys than are packed at a time


@pytest.mark.parametrize(
    ("config", "requests", "dtype"),
    [
        (PLAIN, MIXED, jnp.float32), (BARE, MIXED, jnp.float32), (PLAIN, ALL_HIDDEN, jnp.float32),
        (PLAIN, ALL_KV, jnp.float32), (POST_NORM, ALL_HIDDEN, jnp.bfloat16),
        (PLAIN, decoding([9], [False]), jnp.float32), (BARE, decoding([120], [True]), jnp.bfloat16),
        (PLAIN, PROMPTS, jnp.float32), (POST_NORM, PROMPTS, jnp.bfloat16),
        (PLAIN, CHUNKS, jnp.float32), (PLAIN, CHUNKS, jnp.bfloat16), (POST_NORM, CHUNKS, jnp.float32),
        (BARE, CHUNKS, jnp.float32), (PLAIN, [(90, 30, True)], jnp.float32), (PLAIN, [(0, 120, False)], jnp.float32),
        (PLAIN, MANY, jnp.float32), (UNEVEN, MIXED, jnp.float32), (UNEVEN, ALL_HIDDEN, jnp.bfloat16),
        (UNEVEN, CHUNKS, jnp.float32), (UNEVEN, PROMPTS, jnp.bfloat16),
    ],
)  # fmt: skip
def test_one_call_is_the_layers_one_after_the_other(config, requests, dtype):
    step = Step(config, dtype, requests)
    found, expected = (run(step.tokens, step.rows) for run in (step.in_one_call, step.in_xla))
    rows, tokens = step.rows.length > 0, step.tokens.row < len(requests)
    for mine, other, counted in zip(found, expected, (rows, slice(None), tokens), strict=True):
        assert mine.dtype == other.dtype == dtype
        assert_close(mine[counted], other[counted])


@pytest.mark.parametrize(
    ("config", "requests", "dtype"),
    [
        (PLAIN, MIXED, jnp.float32), (POST_NORM, ALL_HIDDEN, jnp.bfloat16), (PLAIN, ALL_KV, jnp.bfloat16),
        (BARE, decoding([120], [True]), jnp.float32), (PLAIN, PROMPTS, jnp.float32), (POST_NORM, CHUNKS, jnp.bfloat16),
        (BARE, CHUNKS, jnp.float32), (PLAIN, MANY, jnp.float32), (UNEVEN, CHUNKS, jnp.float32),
        (UNEVEN, ALL_HIDDEN, jnp.float32),
    ],
)  # fmt: skip
def test_one_call_over_an_int8_cache(config, requests, dtype):
    """A number halfway between two codes may become either, which goes on to what reads it."""
    step = Step(config, dtype, requests, is_coded=True)
    found = step.in_one_call(step.tokens, step.rows)
    outside = int(step.outside.item())
    expected = step.in_xla(step.tokens, step.rows)
    rows, tokens = step.rows.length > 0, step.tokens.row < len(requests)
    error = 6e-2 if dtype == jnp.bfloat16 else 4e-3
    for mine, other, counted in zip(found, expected, (rows, slice(None), tokens), strict=True):
        assert_close(mine[counted], other[counted], error)
    written = sum(now * config.hidden_size * 2 for _, now, hidden in requests if hidden)
    assert abs(outside - int(step.outside.item())) <= 0.01 * written and 5 <= outside <= 5 + written / 2


@pytest.mark.parametrize(
    ("config", "requests", "dtype", "quantization", "parts"),
    [
        (PLAIN, MIXED, jnp.float32, "int8", PARTS), (POST_NORM, CHUNKS, jnp.bfloat16, "int8", PARTS),
        (PLAIN, ALL_HIDDEN, jnp.float32, "int8", PARTS), (BARE, CHUNKS, jnp.float32, "int8", PARTS),
        (PLAIN, PROMPTS, jnp.float32, "int8", ("k_proj", "fc2")), (PLAIN, CHUNKS, jnp.float32, "int8-dynamic", PARTS),
        (POST_NORM, MIXED, jnp.bfloat16, "int8-dynamic", PARTS), (ODD, PROMPTS, jnp.bfloat16, "int8-dynamic", PARTS),
        (PLAIN, ALL_HIDDEN, jnp.float32, "int8-dynamic", ("q_proj", "v_proj", "fc1")),
        (UNEVEN, MIXED, jnp.float32, "int8", PARTS), (UNEVEN, CHUNKS, jnp.bfloat16, "int8", PARTS),
    ],
)  # fmt: skip
def test_one_call_with_int8_weights(config, requests, dtype, quantization, parts):
    """In a dynamic product a number halfway between two codes may become either; keys of KV rows are dynamic here."""
    step = Step(config, dtype, requests, quantization=quantization, parts=parts)
    found, expected = (run(step.tokens, step.rows) for run in (step.in_one_call, step.in_xla))
    rows, tokens = step.rows.length > 0, step.tokens.row < len(requests)
    error = None if quantization == "int8" else 6e-2
    for mine, other, counted in zip(found, expected, (rows, slice(None), tokens), strict=True):
        assert_close(mine[counted], other[counted], error)


@pytest.mark.parametrize("quantization", ["int8", "int8-dynamic"])
def test_a_row_with_int8_weights_does_not_depend_on_the_others_or_on_where_chunks_end(quantization):
    requests = [(0, 20, True), (0, 33, False), (7, 1, True), (0, 3, False)]
    step = Step(PLAIN, jnp.float32, requests, quantization=quantization)
    _, _, every = step.in_one_call(step.tokens, step.rows)
    begin = 0
    for r, (cached, length, _) in enumerate(requests):
        parts, pool = [], step.pool
        for start, end in [(0, length // 2), (length // 2, length)]:
            rows = step.rows._replace(
                start=np.full(4, cached + start, np.int32), last=np.full(4, end - start - 1, np.int32),
                length=np.where(np.arange(4) == r, end - start, 0).astype(np.int32),
                wanted=np.full(4, end - start, np.int32),
            )  # fmt: skip
            tokens = Tokens(*(array[begin + start : begin + end] for array in step.tokens))
            if end > start:
                parts.append(step.in_one_call(tokens, rows)[2])
                step.pool = step.new_pool
        step.pool = pool
        own = np.asarray(every[begin : begin + length])
        np.testing.assert_allclose(np.concatenate(parts), own, rtol=1e-3, atol=1e-4 * np.abs(own).max())
        begin += length


def test_an_int8_cache_gives_what_it_holds_wherever_chunks_end():
    """The second half of a prompt after the first, in one row and token by token: to rounding of float32."""
    for hidden in (False, True):
        whole = Step(PLAIN, jnp.float32, [(0, 60, hidden)], is_coded=True)
        every = np.asarray(whole.in_one_call(whole.tokens, whole.rows)[2])
        found = []
        for begin, end in [(0, 37), (37, 55), *((t, t + 1) for t in range(55, 60))]:
            rows = whole.rows._replace(
                start=np.array([begin], np.int32), length=np.array([end - begin], np.int32),
                last=np.array([end - begin - 1], np.int32), wanted=np.array([end - begin], np.int32),
            )  # fmt: skip
            tokens = Tokens(*(array[begin:end] for array in whole.tokens))
            found.append(whole.in_one_call(tokens, rows)[2])
            whole.pool = whole.new_pool
        np.testing.assert_allclose(np.concatenate(found), every[:60], rtol=2e-4, atol=2e-4 * np.abs(every).max())


def assert_close(mine, other, error=None):
    """NaN in the same places, and elsewhere the same but for rounding."""
    error = error or (3e-2 if mine.dtype == jnp.bfloat16 else 2e-5)
    mine, other = np.asarray(mine, np.float32), np.asarray(other, np.float32)
    np.testing.assert_array_equal(np.isnan(mine), np.isnan(other))
    np.testing.assert_allclose(mine, other, rtol=error, atol=error * np.nanmax(np.abs(other)))


@pytest.mark.parametrize("config", [PLAIN, POST_NORM])
@pytest.mark.parametrize(
    ("requests", "wanted"),
    [
        (PROMPTS, [1, 0, 1, 0, 0, 1]), (CHUNKS, [1, 1, 0, 4, 1, 0, 9]), (CHUNKS, [1] * 7),
        ([(50, 40, True)], [0]), ([(0, 40, False), (50, 40, True)], [0, 20]),
    ],
)  # fmt: skip
def test_tokens_that_are_not_wanted_are_cached_all_the_same(config, requests, wanted):
    step = Step(config, jnp.float32, requests)
    _, expected_pool, expected = step.in_one_call(step.tokens, step.rows)
    _, pool, found = step.in_one_call(step.tokens, step.rows._replace(wanted=np.array(wanted, np.int32)))
    assert_close(pool, expected_pool)
    counted = np.zeros(len(step.tokens.row), bool)
    for last, count in zip(step.rows.last, wanted, strict=True):
        counted[last + 1 - count : last + 1] = True
    assert np.isfinite(found).all()
    if counted.any():
        assert_close(found[counted], expected[counted])


def test_a_row_does_not_depend_on_the_others():
    step = Step(PLAIN, jnp.float32, decoding([7, 30, 1, 50, 12], [False, True, True, False, False]))
    beside, pool, _ = step.in_one_call(step.tokens, step.rows)
    assert np.isfinite(beside).all()
    for r in range(5):
        others = np.arange(5) != r
        rows = step.rows._replace(length=np.where(others, 0, 1).astype(np.int32))
        tokens = step.tokens._replace(row=np.where(others, 5, r).astype(np.int32))
        alone, own_pool, _ = step.in_one_call(tokens, rows)
        np.testing.assert_array_equal(alone[r], beside[r])
        written = ~np.isclose(own_pool, step.pool.numbers, equal_nan=True)
        assert written.any() and (np.asarray(own_pool)[written] == np.asarray(pool)[written]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("is_coded", "quantization"), [(False, "none"), (True, "none"), (False, "int8"), (True, "int8")]
)
def test_a_decode_row_is_the_same_in_a_batch_of_any_size(dtype, is_coded, quantization):
    """To the last digit: in batches of 1 to 32, of which kernels for few and for many rows do their parts."""
    contexts = [7, 30, 128, 1, 50, 12, 64, 99] * 4
    step = Step(PLAIN, dtype, decoding(contexts, [r % 3 != 1 for r in range(32)]), is_coded, quantization)
    every, _, _ = step.in_one_call(step.tokens, step.rows)
    assert np.isfinite(np.asarray(every, np.float32)).all()
    for size in (1, 2, 7, 8, 15, 16, 17, 31):
        rows = step.rows._replace(length=np.where(np.arange(32) < size, step.rows.length, 0).astype(np.int32))
        tokens = step.tokens._replace(row=np.where(np.arange(32) < size, step.tokens.row, 32).astype(np.int32))
        found, _, _ = step.in_one_call(tokens, rows)
        np.testing.assert_array_equal(*(np.asarray(x[:size], np.float32) for x in (found, every)), err_msg=f"{size=}")


@pytest.fixture
def few_shapes(monkeypatch):
    """One prefill and one decode shape."""
    monkeypatch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("is_coded", "quantization"), [(False, "none"), (True, "int8")])
@pytest.mark.parametrize(("cached", "count"), [(3, 2), (121, 15), (1018, 9)])
def test_neighbouring_tokens_of_a_row_are_those_of_single_steps(
    monkeypatch, hidden, dtype, is_coded, quantization, cached, count
):
    """To the last digit, though they share each read of what is cached: borders of pages, parts and sizes of parts."""
    monkeypatch.setattr(native_steps, "PAGES", 136)
    step = Step(PLAIN, dtype, [(cached, count, hidden), (40, 3, not hidden)], is_coded, quantization)
    step.rows = step.rows._replace(prompt=np.zeros(2, np.int32))  # a prompt's tokens may be processed together
    _, _, every = step.in_one_call(step.tokens, step.rows)
    found = []
    for t in range(count):
        rows = step.rows._replace(
            start=np.array([cached + t, 0], np.int32), length=np.array([1, 0], np.int32),
            last=np.zeros(2, np.int32), wanted=np.array([1, 0], np.int32),
        )  # fmt: skip
        tokens = Tokens(*(array[t : t + 1] for array in step.tokens))
        found.append(step.in_one_call(tokens, rows)[2])
        step.pool = step.new_pool
    assert np.isfinite(np.asarray(every[:count], np.float32)).all()
    np.testing.assert_array_equal(np.concatenate(found), every[:count])


def test_other_layers_are_left_to_a_program_each_and_the_log_says_so(caplog):
    model = OPT(replace(PLAIN, activation_function="gelu"), rngs=nnx.Rngs(0))
    assert not NativeForm.takes(packed_weights(model))
    config = replace(PLAIN, num_attention_heads=5, hidden_size=80)  # heads of 16, but half a packed tile too many
    with caplog.at_level("INFO"):
        make_engine(OPT(PLAIN, rngs=nnx.Rngs(0)), PLAIN, attention_backend="native", calibrate=False)
        assert "layers: XLA" not in caplog.text
        engine = make_engine(OPT(config, rngs=nnx.Rngs(0)), config, attention_backend="native", calibrate=False)
    assert "layers: XLA" in caplog.text and "head_dim=16, hidden_size=80, dtype=float32" in caplog.text
    prompt = engine.add([5, 6, 7], GREEDY, request_id="a")
    finish(engine)
    assert len(prompt.output_token_ids) == 64
    assert all(isinstance(step, LayeredStep) for step in engine.runner.programs.steps)


@pytest.mark.usefixtures("few_shapes")
def test_every_cache_kind_gives_the_tokens_of_xla():
    """KV, hidden, converted on the way and preempted, in one batch of the real engine."""
    model = OPT(PLAIN, rngs=nnx.Rngs(3))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 96, size).tolist() for size in (3, 17, 40)]
    treatments = ("kv", "hidden", "converted", "preempted")
    ids = {f"{prompt}-{how}": (prompt, how) for how in treatments for prompt in range(len(prompts))}
    found = {}
    for backend in ("xla", "native"):
        options = {"num_blocks": 300, "max_num_seqs": 16, "calibrate": False}
        engine = make_engine(model, PLAIN, attention_backend=backend, **options)
        engine.policy = Orders(
            kinds={i: KV if how == "kv" else HIDDEN for i, (_, how) in ids.items()},
            convert_at={i: 9 for i, (_, how) in ids.items() if how == "converted"},
            preempt_at={i: 21 for i, (_, how) in ids.items() if how == "preempted"},
        )
        requests = {i: engine.add(prompts[prompt], GREEDY, request_id=i) for i, (prompt, _) in ids.items()}
        finish(engine)
        found[backend] = {i: request.output_token_ids for i, request in requests.items()}
        steps = {type(step) for step in engine.runner.programs.steps}
        most = max(step.temporary_bytes for step in engine.runner.programs.steps)
        assert backend == "xla" or most >= scratch_bytes(PLAIN, 16, 16)  # the C++ call's own memory
        sizes = engine.setup.cost_model.sizes
        assert bool(sizes.decode) == bool(sizes.prefill) == (backend == "xla")  # padding takes no time in one call
        assert steps == {WholeStep if backend == "native" else LayeredStep}
    assert found["native"] == found["xla"]
    by_prompt = [{tuple(found["native"][i]) for i, (own, _) in ids.items() if own == prompt} for prompt in range(3)]
    assert all(len(tokens) == 1 for tokens in by_prompt)


@pytest.mark.usefixtures("few_shapes")
def test_tokens_over_an_int8_cache_with_int8_weights_depend_on_the_request_only():
    """Preempted and converted requests beside others; and what attends, by name."""
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 96, size).tolist() for size in (3, 40)]
    ids = {f"{prompt}-{how}": (prompt, how) for how in ("kv", "hidden", "converted", "preempted") for prompt in (0, 1)}
    options = {"cache_dtype": "int8", "quantization": "int8-dynamic", "num_blocks": 300, "calibrate": False}
    engine = make_engine(OPT(PLAIN, rngs=nnx.Rngs(3)), PLAIN, attention_backend="native", **options)
    engine.policy = Orders(
        kinds={i: KV if how == "kv" else HIDDEN for i, (_, how) in ids.items()},
        convert_at={i: 9 for i, (_, how) in ids.items() if how == "converted"},
        preempt_at={i: 21 for i, (_, how) in ids.items() if how == "preempted"},
    )
    assert engine.runner.attention == "cpu"
    requests = {i: engine.add(prompts[prompt], GREEDY, request_id=i) for i, (prompt, _) in ids.items()}
    finish(engine)
    assert {type(step) for step in engine.runner.programs.steps} == {WholeStep}
    tokens = {i: request.output_token_ids for i, request in requests.items()}
    for prompt in (0, 1):
        assert tokens[f"{prompt}-preempted"] == tokens[f"{prompt}-hidden"]
        assert tokens[f"{prompt}-converted"][:9] == tokens[f"{prompt}-hidden"][:9]
        engine.policy = Orders(kinds={"alone": KV})
        alone = engine.add(prompts[prompt], GREEDY, request_id="alone")
        finish(engine)
        assert alone.output_token_ids == tokens[f"{prompt}-kv"]


def test_arrays_are_cut_from_one_piece_of_memory():
    memory = LargePages(1000)
    first, second = memory.empty((5, 3), np.float32), memory.empty((100,), np.int8)
    first[:], second[:] = 2, 3
    assert (first == 2).all() and (second == 3).all()
    assert first.ctypes.data % (2 << 20) == 0 and second.ctypes.data - first.ctypes.data == 64
    with pytest.raises(ValueError, match="no room for 832 bytes, 808 are left"):
        memory.empty((832,), np.int8)
