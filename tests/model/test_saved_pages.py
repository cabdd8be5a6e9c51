"""Cached pages as bytes, from one engine to another: over a cache that holds token ids, so a wrong page shows.

And of a real int8 cache, whose blocks have scales.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apt_jax.model_config import ModelConfig
from apt_jax.serve.http.snapshot_cache import SnapshotCache, tokens_of
from apt_jax.serve.runtime.samples import Sample
from tests.model.test_prefix_engine import greedy
from tests.support.checkpoint_folders import random_model
from tests.support.engines import finish
from tests.support.engines import make_engine as real_engine
from tests.support.token_runner import answer, make_engine

PROMPT, COUNT, GENERATED = [3 * k % 97 for k in range(30)], 24, 9  # 9 pages are full when 9 tokens are known
PAGES = (len(PROMPT) + GENERATED - 1) // 4


def stopped(mode: str, salt: str | None = None):
    """An engine with the pages of a request that was ended, and what is left of it."""
    engine = make_engine(60, cache_mode=mode, enable_prefix_caching=True)
    request = engine.add(PROMPT, greedy(COUNT), request_id="r", cache_salt=salt)
    while len(request.output_token_ids) < GENERATED:
        engine.step()
    engine.abort("r")
    finish(engine)
    return engine, Sample("r", 0, PROMPT, greedy(COUNT), output_token_ids=request.output_token_ids, cache_salt=salt)


def resumed(engine, sample: Sample) -> int:
    """Tokens that the rest of it took from the cache; its answer is that of its tokens."""
    request = sample.add_to(engine)
    while engine.has_unfinished:
        engine.step()
        engine.state.check()
    assert request.output_token_ids == answer(PROMPT, COUNT)
    assert engine.state.pool.num_free == engine.state.pool.num_blocks and engine.figures().num_failed_steps == 0
    return request.num_cached_tokens


@pytest.mark.parametrize("mode", ["kv", "hidden", "hybrid"])
def test_a_resumed_request_begins_with_them(mode, tmp_path):
    engine, sample = stopped(mode)
    cache = SnapshotCache(tmp_path / "left.jsonl")
    kept = cache.keep(engine, [sample])
    assert (kept.num_samples, kept.num_tokens) == (1, 4 * PAGES)
    (path,) = cache.folder.iterdir()
    assert kept.num_bytes == path.stat().st_size > 32 * PAGES and path.stat().st_mode & 0o777 == 0o600
    other = make_engine(60, cache_mode=mode, enable_prefix_caching=True)
    assert (
        cache.restore(other, [sample]) == cache.restore(other, [sample]) == 4 * PAGES
    )  # a second time changes nothing
    assert resumed(other, sample) == 4 * PAGES
    cache.drop(["r"])
    assert not cache.folder.exists()


@given(
    mode=st.sampled_from(["kv", "hidden", "hybrid"]), blocks=st.integers(28, 60), others=st.integers(0, 3),
    held=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_they_take_no_page_away_from_others(mode, blocks, others, held):
    """`others` have ended, with pages of their own and of the same beginning, and `held` still run."""
    first, sample = stopped(mode)
    saved = first.saved_pages.save(tokens_of(sample), None)
    engine = make_engine(blocks, cache_mode=mode, enable_prefix_caching=True)
    for number in range(others):
        engine.add([*PROMPT[: 8 * number], *range(number, number + 12)], greedy(5), request_id=f"other {number}")
    finish(engine)
    running = [engine.add([number, *range(9)], greedy(9), request_id=f"held {number}") for number in range(held)]
    engine.step()
    before = engine.state.pool.num_idle, engine.state.pool.num_free
    found = engine.saved_pages.restore(tokens_of(sample), None, saved.form, saved.pages)
    engine.state.check()
    assert engine.state.pool.num_free == before[1] and engine.state.pool.num_idle >= before[0]
    assert found == 4 * PAGES if not (others or held or blocks < 40) else 0 <= found <= 4 * PAGES
    resumed(engine, sample)
    assert all(r.output_token_ids == answer(r.prompt_token_ids, 9) for r in running)


@given(
    mode=st.sampled_from(["kv", "hidden"]), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7),
    change=st.sampled_from(["flip", "cut", "swap", "ones"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damage_means_that_tokens_are_computed_again(mode, where, bit, change, tmp_path_factory):
    engine, sample = stopped(mode)
    cache = SnapshotCache(tmp_path_factory.mktemp("cache") / "left.jsonl")
    cache.keep(engine, [sample])
    (path,) = cache.folder.iterdir()
    data = bytearray(path.read_bytes())
    at = int(where * len(data))
    if change == "flip":
        data[at] ^= 1 << bit
    elif change == "cut":
        del data[at:]
    elif change == "swap":  # two pages with their digests
        size = 32 + (len(data) - data.index(b"\n") - 1) // PAGES - 32
        start = data.index(b"\n") + 1
        data[start : start + 2 * size] = data[start + size : start + 2 * size] + data[start : start + size]
    else:
        data[at:] = b"\xff" * (len(data) - at)
    path.write_bytes(data)
    other = make_engine(60, cache_mode=mode, enable_prefix_caching=True)
    found = cache.restore(other, [sample])
    assert found < 4 * PAGES and resumed(other, sample) == found
    if change == "swap":
        assert found == 0


@pytest.mark.parametrize("difference", ["salt", "tokens", "fewer tokens", "fingerprint", "kind", "block size", "off"])
def test_pages_of_something_else_are_not_taken(difference, tmp_path):
    engine, sample = stopped("kv", salt="a")
    cache = SnapshotCache(tmp_path / "left.jsonl")
    cache.keep(engine, [sample])
    options = {"cache_mode": "kv", "enable_prefix_caching": True}
    changed = {
        "kind": {"cache_mode": "hidden"},
        "block size": {"block_size": 8},
        "off": {"enable_prefix_caching": False},
    }
    other = make_engine(60, **options | changed.get(difference, {}))
    if difference == "fingerprint":
        other.fingerprint = "other weights"
    asked = {
        "salt": Sample("r", 0, PROMPT, greedy(COUNT), cache_salt="b", output_token_ids=sample.output_token_ids),
        "tokens": Sample("r", 0, [*PROMPT[:-1], 0], greedy(COUNT), cache_salt="a"),
        "fewer tokens": Sample("r", 0, PROMPT[:-9], greedy(COUNT), cache_salt="a"),
    }.get(difference, sample)
    assert cache.restore(other, [asked]) == 0
    assert cache.restore(make_engine(60, **options), [sample]) == 4 * PAGES


def test_nothing_is_kept_of_weights_that_are_not_known():
    engine, sample = stopped("kv")
    engine.fingerprint = ""
    assert engine.saved_pages.save(tokens_of(sample), None) is None


def test_a_write_that_fails_lists_what_was_written_before():
    engine, sample = stopped("kv")
    saved = engine.saved_pages.save(tokens_of(sample), None)
    pages, other = list(saved.pages), make_engine(60, cache_mode="kv", enable_prefix_caching=True)
    write, calls = other.runner.write_blocks, []

    def fails(blocks, contents):
        calls.append(blocks)
        if len(calls) > 1:
            raise MemoryError("no memory for a copy")
        write(blocks, contents)

    other.runner.write_blocks = fails
    with pytest.raises(MemoryError):
        other.saved_pages.restore(tokens_of(sample), None, saved.form, iter(pages))
    other.state.check()
    assert resumed(other, sample) == 4 * 8


@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_pages_of_an_int8_cache_have_their_scales_and_only_its_own_ranges(mode):
    config = ModelConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
        num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(2,),
    )  # fmt: skip
    model, prompt, params = random_model(config, seed=3), [4 + 7 * k % 90 for k in range(40)], greedy(10)

    def engine():
        made = real_engine(model, config, cache_mode=mode, cache_dtype="int8", num_blocks=28, max_num_seqs=2)
        made.fingerprint = "these weights"
        return made

    first, other = engine(), engine()
    cold = first.add(prompt, params, request_id="cold")
    finish(first)
    saved = first.saved_pages.save(prompt, None)
    pages = list(saved.pages)
    assert saved.num_pages == len(pages) == 5 and {len(page) for page in pages} == {saved.page_bytes}
    assert other.saved_pages.restore(prompt, None, saved.form, pages) == 40
    again = other.add(prompt, params, request_id="again")
    finish(other)
    assert again.num_cached_tokens == 32 and again.output_token_ids == cold.output_token_ids
    assert list(other.saved_pages.save(prompt, None).pages) == pages
    if mode == "hidden":
        other.runner._channels = 2 * other.runner._channels
        other.reset_prefix_cache()
        assert other.saved_pages.restore(prompt, None, saved.form, pages) == 0, "ranges of another calibration"
