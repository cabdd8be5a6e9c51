"""The engine decodes with Pallas kernels (interpreted on the CPU) as with XLA; bad kernels are found at start-up."""

import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from apt_jax.attention import selection as attention_backend
from apt_jax.attention.prefix import absorbing_is_cheaper
from apt_jax.attention.selection import select_kernels
from apt_jax.cache import CacheKind
from apt_jax.engine_config import EngineConfig
from apt_jax.model_config import ModelConfig
from apt_jax.pallas_kernels import dispatch
from apt_jax.pallas_kernels.dispatch import (
    REFERENCES,
    Kernels,
    check_cache_writer,
    check_chunk,
    check_prefix,
    self_check,
)
from apt_jax.serve.runtime.build import build_engine
from tests.golden import load_golden
from tests.golden.compare import load_golden_model
from tests.support.engines import GREEDY, Orders, finish, make_engine, run

KV, HIDDEN = CacheKind.KV, CacheKind.HIDDEN
MODEL = "post_norm_projected"  # of all tests, so that programs without attention compile once
TREATMENTS = ("kv", "hidden", "converted", "preempted")
TINY = ModelConfig(
    vocab_size=128, hidden_size=32, num_hidden_layers=2, ffn_dim=64, max_position_embeddings=64,
    num_attention_heads=2, word_embed_proj_dim=32, eos_token_ids=(),
)  # fmt: skip


@pytest.fixture
def few_shapes(monkeypatch):
    """One prefill and one decode shape, contexts of several chunks, and few queries absorbed at these few columns."""
    monkeypatch.setattr("apt_jax.batching.buckets.ladder", lambda smallest, largest: [largest])
    monkeypatch.setattr("apt_jax.attention.prefix.BALANCE_FLOPS_PER_BYTE", 0)
    monkeypatch.setattr("apt_jax.pallas_kernels.tpu.paging.MAX_CHUNK_TOKENS", 16)


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("mixed", [False, True], ids=["apart", "mixed"])
def test_every_cache_kind_gives_the_greedy_tokens_of_transformers(mixed, tmp_path):
    """Requests in KV, hidden, converted on the way and preempted, in one batch; also beside prefill chunks."""
    golden = load_golden(MODEL)
    config = ModelConfig.from_hf(golden.config)
    engine = make_engine(
        load_golden_model(golden, tmp_path), config, num_blocks=300, attention_backend="pallas", max_num_seqs=16
    )
    assert engine.runner.weights.kernels is not None
    treatments = ("kv", "hidden") if mixed else TREATMENTS
    ids = {f"{prompt}-{how}": (prompt, how) for how in treatments for prompt in range(len(golden.prompts))}
    engine.policy = Orders(
        kinds={i: KV if how == "kv" else HIDDEN for i, (_, how) in ids.items()},
        convert_at={i: 9 for i, (_, how) in ids.items() if how == "converted"},
        preempt_at={i: 21 for i, (_, how) in ids.items() if how == "preempted"},
        mixed=mixed,
    )
    requests = {i: engine.add(golden.prompts[prompt], GREEDY, request_id=i) for i, (prompt, _) in ids.items()}
    mixes, ways, heads = [], set(), config.num_attention_heads

    def look(step: int) -> None:
        mixes.append({entry.num_tokens > 1 for entry in engine.last_plan.scheduled})
        for entry in engine.last_plan.scheduled:
            cached = entry.request.num_computed_tokens - entry.num_tokens
            if entry.num_tokens > 1 and cached > 0:
                absorbs = bool(absorbing_is_cheaper(entry.num_tokens, cached, heads=heads, head_dim=config.head_dim))
                ways.add("kv" if entry.kind is KV else "absorbed" if absorbs else "projected")

    finish(engine, look)
    assert ways == {"kv", "absorbed", "projected"}, "chunks over a cached prefix"
    for i, (prompt, how) in ids.items():
        assert requests[i].output_token_ids == golden.greedy_tokens[prompt], i
        assert requests[i].num_conversions == (how == "converted")
        assert requests[i].num_preemptions == (how == "preempted")
    assert {True, False} in mixes or not mixed


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("mode", ["kv", "hidden"])
def test_fcfs_under_memory_pressure(mode, tmp_path):
    """Programs for one kind only, and a pool for about two requests, so that fcfs preempts."""
    golden = load_golden(MODEL)
    engine = make_engine(
        load_golden_model(golden, tmp_path), ModelConfig.from_hf(golden.config), attention_backend="pallas",
        cache_mode=mode, max_num_seqs=16, num_blocks={"kv": 36, "hidden": 25}[mode],
    )  # fmt: skip
    requests = run(engine, golden.prompts)
    assert [r.output_token_ids for r in requests] == golden.greedy_tokens
    assert sum(r.num_preemptions for r in requests) > 0


@pytest.mark.usefixtures("few_shapes")
def test_hidden_rows_are_left_to_xla_where_only_kv_has_a_kernel(tmp_path, monkeypatch):
    """As on GPUs other than Hopper."""
    monkeypatch.setattr(dispatch, "kernels_for", lambda _: Kernels("kv only", REFERENCES.kv_decode, None))
    golden = load_golden(MODEL)
    engine = make_engine(
        load_golden_model(golden, tmp_path), ModelConfig.from_hf(golden.config), attention_backend="pallas",
        max_num_seqs=16,
    )  # fmt: skip
    engine.policy = Orders(kinds={"kv": KV, "hidden": HIDDEN})
    requests = [engine.add(golden.prompts[i], GREEDY, request_id=how) for i, how in enumerate(("kv", "hidden"))]
    finish(engine, lambda step: None)
    assert [r.output_token_ids for r in requests] == golden.greedy_tokens[:2]


def test_pallas_on_a_cpu_says_that_it_is_slow_and_auto_takes_xla_for_several(caplog):
    options = {"block_size": 16, "dtype": jnp.float32, "device": jax.devices("cpu")[0], "cpp_kernels": True}
    with caplog.at_level(logging.WARNING):
        assert select_kernels("xla", TINY, **options) is None
        assert select_kernels("auto", TINY, **options, num_devices=2) is None
        assert not caplog.records
        kernels = select_kernels("pallas", TINY, **options)
    assert kernels is not None and kernels.name == "tpu-interpreted"
    assert "interprets the TPU kernels" in caplog.text


def test_kernels_are_selected_once_from_a_folder_to_an_engine(caplog):
    """The loader lays the weights out for them, and the programs attend with them: one check, one line in the log."""
    config = EngineConfig(max_model_len=64, max_num_seqs=2, max_num_batched_tokens=16, num_blocks=32)
    with caplog.at_level(logging.INFO, "apt_jax.attention.selection"):
        engine = build_engine(None, engine_config=config)
    lines = [record.message for record in caplog.records if record.name == "apt_jax.attention.selection"]
    assert len(lines) == 1 and lines[0].startswith("attention: ")
    kernels = engine.runner.weights.kernels
    assert engine.runner.attention == ("xla" if kernels is None else kernels.name)


def check(kernels: Kernels, *, is_coded: bool = False) -> str | None:
    shape = {"heads": 2, "head_dim": 8, "dtype": jnp.float32}
    paged = {"block_size": 32 if is_coded else 16, "is_coded": is_coded, **shape}
    decode_or_prefix = self_check(kernels, **paged) or check_prefix(kernels, **paged)
    return decode_or_prefix or check_chunk(kernels, **shape) or check_cache_writer(kernels, **paged)


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("is_coded", [False, True], ids=["float32", "int8"])
def test_the_kernels_pass_the_self_check(is_coded):
    assert check(dispatch.kernels_for(jax.devices("cpu")[0]), is_coded=is_coded) is None


@pytest.mark.parametrize("name", ["kv_decode", "hidden_decode", "kv_prefix", "hidden_prefix"])
def test_kernels_that_take_the_wrong_scales_are_found(name):
    """The scale of the token, or head, beside the right one, in a hundredth of the places."""
    kernel = getattr(REFERENCES, name)

    def wrong(*args, scales):
        return kernel(*args, scales=jnp.where(jnp.arange(scales.size).reshape(scales.shape) % 100, scales, scales * 2))

    found = check(REFERENCES._replace(**{name: wrong}), is_coded=True)
    assert found is not None and found.startswith(f"{name} differs from its reference by ")


def test_a_wrong_scale_writer_is_found():
    def wrong(*places, block_size):
        right = REFERENCES.scale_writer(*places, block_size=block_size)
        return lambda *args: right(*args).at[0, 0, 0].add(1)

    found = check(REFERENCES._replace(scale_writer=wrong), is_coded=True)
    assert found == "scale_writer puts 1 numbers wrong"


def test_a_wrong_scale_reader_is_found():
    def wrong(scales, blocks):
        return REFERENCES.scale_reader(scales, blocks).at[1, 0, 3].add(1)

    found = check(REFERENCES._replace(scale_reader=wrong), is_coded=True)
    assert found == "scale_reader gives 1 wrong numbers"

    def fails(scales, blocks):
        raise NotImplementedError("no")

    found = check(REFERENCES._replace(scale_reader=fails), is_coded=True)
    assert found == "scale_reader failed: NotImplementedError: no"


@pytest.mark.parametrize("name", ["kv_decode", "hidden_decode", "kv_prefix", "hidden_prefix", "chunk"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda found: found._replace(out=found.out * 1.01), "differs from its reference by 1.0e-02, more than 1e-03"),
        (lambda found: found._replace(lse=found.lse + 0.1), "differs from its reference by 1.0e-01"),
        (lambda found: found._replace(out=found.out.at[0, 0, 0].set(jnp.nan)), "differs from its reference by nan"),
    ],
    ids=["output", "log-sum-exp", "NaN"],
)
def test_wrong_kernels_are_found(name, fault, reason):
    kernel = getattr(REFERENCES, name)
    found = check(REFERENCES._replace(**{name: lambda *args: fault(kernel(*args))}))
    assert found is not None and found.startswith(f"{name} {reason}")


@pytest.mark.parametrize("fault", [lambda pool: pool.at[0, 0, 0].add(1), lambda pool: pool.at[-1, -1, -1].set(jnp.nan)])
def test_a_wrong_cache_writer_is_found(fault):
    def wrong(*places):
        right = REFERENCES.cache_writer(*places)
        return lambda *args: fault(right(*args))

    assert check(REFERENCES._replace(cache_writer=wrong)) == "cache_writer puts 1 numbers wrong"


def broken(*args: object) -> None:
    raise RuntimeError("no such instruction\nand a long dump")


@pytest.mark.parametrize("cause", ["fails", "lacks"])
def test_auto_falls_back_with_a_reason_and_pallas_refuses(cause, monkeypatch, caplog):
    """On an accelerator whose kernels do not run; `device` stands for it, everything runs on the CPU."""
    device = SimpleNamespace(platform="tpu" if cause == "fails" else "rocket")
    if cause == "fails":
        monkeypatch.setattr(dispatch, "kernels_for", lambda _: Kernels("broken", broken, broken))
    monkeypatch.setattr(attention_backend.jax, "default_device", lambda _: jax.named_scope("here"))
    options = {"block_size": 16, "dtype": jnp.float32, "device": device, "cpp_kernels": False}
    reason = {
        "fails": "kv_decode failed: RuntimeError: no such instruction",
        "lacks": "there are no Pallas kernels for platform 'rocket'; use tpu, gpu or cpu",
    }[cause]
    assert select_kernels("auto", TINY, **options) is None
    assert f"attention: XLA, because the kernels cannot be used here ({reason})" in caplog.text
    with pytest.raises(ValueError, match="use auto or xla") as raised:
        select_kernels("pallas", TINY, **options)
    assert reason in str(raised.value)
    assert select_kernels("xla", TINY, **options) is None


def test_what_is_left_to_xla_is_said(monkeypatch, caplog):
    """Kernels for KV rows only, as on GPUs other than Hopper, and others that do not run."""
    kernels = REFERENCES._replace(name="kv only", hidden_decode=None)
    some_broken = kernels._replace(chunk=broken, hidden_prefix=broken, cache_writer=broken)
    monkeypatch.setattr(dispatch, "kernels_for", lambda _: some_broken)
    monkeypatch.setattr(attention_backend.jax, "default_device", lambda _: jax.named_scope("here"))
    options = {"block_size": 16, "dtype": jnp.float32, "device": SimpleNamespace(platform="gpu"), "cpp_kernels": False}
    found = select_kernels("auto", TINY, **options)
    names = "kv_prefix", "hidden_prefix", "chunk", "cache_writer", "scale_writer", "scale_reader"
    assert found == kernels._replace(name="kv only, prefixes, chunks, writes by xla", **dict.fromkeys(names))
    hidden, prefix, chunk, writes = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert hidden == "attention: XLA for hidden rows, because the 'kv only' kernels have none for them"
    assert "XLA over cached prefixes, because the kernels cannot be used (hidden_prefix failed: " in prefix
    assert "chunk failed: RuntimeError: no such instruction" in chunk
    assert "cache_writer failed: RuntimeError: no such instruction" in writes
    monkeypatch.setattr(dispatch, "kernels_for", lambda _: kernels)
    assert select_kernels("pallas", TINY, **options) == kernels


def test_an_int8_cache_gets_the_kernels_that_read_it(monkeypatch, caplog):
    monkeypatch.setattr(attention_backend.jax, "default_device", lambda _: jax.named_scope("here"))
    options = {"block_size": 32, "dtype": jnp.float32, "device": SimpleNamespace(platform="tpu"), "cpp_kernels": False}
    monkeypatch.setattr(dispatch, "kernels_for", lambda _: REFERENCES)
    assert select_kernels("auto", TINY, **options, cache_dtype="int8") == REFERENCES
    monkeypatch.setattr(dispatch, "kernels_for", lambda _: REFERENCES._replace(kv_decode=broken))
    assert_chunks_only(select_kernels("auto", TINY, **options, cache_dtype="int8"))
    assert "attention: XLA over the int8 cache, because the kernels cannot be used (kv_decode failed: " in caplog.text
    with pytest.raises(ValueError, match=r"cannot be used here \(kv_decode failed: "):
        select_kernels("pallas", TINY, **options, cache_dtype="int8")
    monkeypatch.setattr(dispatch, "kernels_for", lambda _: REFERENCES._replace(reads_int8=False))
    assert_chunks_only(select_kernels("auto", TINY, **options, cache_dtype="int8"))
    with pytest.raises(ValueError, match="has no kernels here for cache_dtype='int8'"):
        select_kernels("pallas", TINY, **options, cache_dtype="int8")


def assert_chunks_only(found: Kernels | None) -> None:
    """Those for a chunk's own tokens, none that use the pool."""
    assert found is not None and found.chunk is REFERENCES.chunk and found.name == "xla, chunks by reference"
    assert found.kv_decode is found.hidden_decode is found.kv_prefix is found.cache_writer is None
